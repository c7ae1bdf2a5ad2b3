//! The `sprat` command line: arguments, config, secrets, output and exit codes.
//!
//! Above: the user, cron, a systemd timer.
//! Below: `session` for every container that is opened; `snapshot`, `luks` and `store` for types in
//! arguments and output; `attach` for `doctor`. This crate alone reads the environment and prints.
//!
//! Always true:
//! - stdout carries results only; every error ends as one [`Failure`] on stderr and in one of the exit
//!   codes of [`Exit`].
//! - Arguments and config are checked completely before anything is asked, created or started.
//! - A secret is never an argument, never in the environment, never in a message.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod environment;
mod logging;
mod output;
mod secrets;
mod sheet_files;
mod terminal;

use std::ffi::OsString;

pub use commands::ENVIRONMENT;
pub use sprat_session::{Exit, Failure};

/// The grammar of the command line with the texts of the help, for man pages.
pub fn grammar() -> clap::Command {
    commands::grammar()
}

/// Runs the command that `arguments` (program name first) name, and returns how it ended.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    if let Err(failure) = logging::begin(environment::log_level().as_deref()) {
        output::Output::default().failure(&failure);
        return failure.exit;
    }
    commands::run(arguments.into_iter().collect())
}
