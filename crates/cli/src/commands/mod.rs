//! Carries out one command of the command line; a file for each.

use crate::args::{Cli, Command};
use crate::{Exit, session};

/// Runs the command and prints how it ended.
pub(crate) fn run(cli: Cli) -> Exit {
    match cli.command {
        Command::VolumeProcess { .. } => session::volume_process::run(),
        Command::Worker { .. } => session::worker::run(),
    }
}
