//! `sprat-agent`: a small program on the server that keeps past states of each container file.
//!
//! Above: sshd, which runs it as a forced command, and the server's administrator. Below: the file system.
//!
//! Always true:
//! - The old content of a block is durable before the block can be overwritten by a client.
//! - No request reaches a file outside the root's allowed names, or removes or shortens a container.
//! - Memory is bounded, whatever a client sends.
#![forbid(unsafe_code)]

mod admin;
mod alarm;
mod cli;
mod clock;
mod confine;
mod disk;
mod generation;
mod holes;
mod index;
mod journal;
mod keeper;
mod lease;
mod log;
mod names;
mod notify;
mod page;
mod past;
mod policy;
mod ranges;
mod retention;
mod root;
mod serve;
mod space;
mod state;
mod status;
mod tidy;
mod time_text;
mod wire;
mod writers;

fn main() -> std::process::ExitCode {
    cli::run(std::env::args_os().skip(1).collect())
}
