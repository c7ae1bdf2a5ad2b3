//! The `sprat` command line: arguments, config, secrets, output, exit codes, and the session that
//! holds a container open.
//!
//! Above: the user, cron, a systemd timer.
//! Below: `snapshot`, `attach`, `luks`, `volume`, `store`; this crate alone reads the environment,
//! prints, and starts processes of its own kind.
//!
//! Always true:
//! - stdout carries results only; whatever goes wrong ends as one [`Failure`] on stderr and in one
//!   of the exit codes of [`Exit`].
//! - Arguments and config are checked as a whole before anything is asked, made or started.
//! - A secret is never an argument, never in the environment, never in a message.
#![forbid(unsafe_code)]

pub mod args;
mod commands;
mod config;
mod environment;
pub mod failure;
mod filed;
pub mod interrupt;
mod kept_check;
mod kept_header;
mod key_notes;
mod known_server;
mod moved;
mod output;
mod own_names;
mod passphrase_command;
mod pinned;
mod reach;
mod secrets;
pub mod session;
mod sheet;
mod sheet_page;
mod standing;
mod state;
mod state_file;
mod suggest;
pub mod target;
mod terminal;
mod trial;
mod trusted_file;

use std::ffi::OsString;

use clap::Parser;

pub use failure::{Exit, Failure};

/// Runs the command that `arguments` (program name first) ask for, and returns how it ended.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> Exit {
    match args::Cli::try_parse_from(args::without_help_for_help(arguments)) {
        Ok(cli) => commands::run(cli),
        Err(error) => args::report(error),
    }
}
