//! `sprat key`: manages keys, the recovery sheet and header backups.

mod add;
mod change;
mod header_backup;
mod header_restore;
mod list;
mod rehearse;
mod remove;
mod sheet;

pub(super) use change::{header, open};
use clap::{Args, Subcommand};
pub(super) use sheet::recovery_key;

use super::context::{CommandArgs, Context};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat key list home
  sprat key add home --new-recovery --html sheet.html
  sprat key rehearse home
  sprat key remove home 1";

pub(super) const NOTES: &str = "\
A removed key still opens old copies of the container file and of its header.";

#[derive(Debug, Args)]
pub(super) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// List the key slots: kind, derivation, when each was added
    List(list::ListArgs),
    /// Add a key; unlock with an existing one
    Add(add::AddArgs),
    /// Remove a key; unlock with another one
    Remove(remove::RemoveArgs),
    /// Print the recovery sheet again; prompts for the recovery key and tests it
    Sheet(sheet::SheetArgs),
    /// Save the header to a file; protect it like a key: today's keys open it for ever
    HeaderBackup(header_backup::HeaderBackupArgs),
    /// Restore a saved header, with the keys of that time
    HeaderRestore(header_restore::HeaderRestoreArgs),
    /// Test whether the key on the recovery sheet opens the container
    Rehearse(rehearse::RehearseArgs),
}

impl CommandArgs for KeyArgs {
    fn state_when_interrupted(&self) -> Option<&'static str> {
        matches!(self.command, KeyCommand::List(_)).then_some("nothing was changed")
    }

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        match &self.command {
            KeyCommand::List(args) => args.run(context),
            KeyCommand::Add(args) => args.run(context),
            KeyCommand::Remove(args) => args.run(context),
            KeyCommand::Sheet(args) => args.run(context),
            KeyCommand::HeaderBackup(args) => args.run(context),
            KeyCommand::HeaderRestore(args) => args.run(context),
            KeyCommand::Rehearse(args) => args.run(context),
        }
    }
}
