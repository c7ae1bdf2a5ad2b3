//! The command line and the config, before anything starts; and the recovery sheet.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod completions;
mod config;
mod help;
mod install;
mod recovery_sheet;
mod refusals;
