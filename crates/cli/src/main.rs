//! The `sprat` program: hands its arguments to the library and returns the exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    sprat_attach::find_system_programs();
    sprat_attach::lift_limits();
    sprat::run(std::env::args_os()).into()
}
