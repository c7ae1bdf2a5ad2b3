//! The grammar of `sprat key`. Doc comments here are the help texts.

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};

use super::TARGET_HELP;

/// Arguments of `key`.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: KeyCommand,
}

pub(super) const EXAMPLES: &str = "\
A removed key still opens old copies of the container file, and of its header.

Examples:
  sprat key list home
  sprat key add home --new-recovery --html sheet.html
  sprat key rehearse home
  sprat key remove home 1";

/// What is done with keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List the key slots: what they are, what guessing costs, when they were added
    List(KeyTargetArgs),
    /// Add a key; the given key must open the container
    Add(KeyAddArgs),
    /// Remove a key; the given key must be another one, which stays
    Remove(KeyRemoveArgs),
    /// Print the recovery sheet again; asks for the recovery key and proves that it opens
    Sheet(KeySheetArgs),
    /// Keep the header in a file of this machine; it opens the container with the keys of today
    HeaderBackup(KeyHeaderBackupArgs),
    /// Put a kept header back, and with it the keys of that day
    HeaderRestore(KeyHeaderRestoreArgs),
    /// Prove that what is on the recovery sheet opens the container
    Rehearse(KeyTargetArgs),
}

/// Arguments of `key list` and `key rehearse`.
#[derive(Debug, Args)]
pub struct KeyTargetArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
}

/// Arguments of `key add`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("new").required(true)))]
pub struct KeyAddArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Add the content of this key file; it is made if it is missing
    #[arg(long, value_name = "FILE", group = "new")]
    pub new_key_file: Option<PathBuf>,
    /// Add a passphrase, asked for twice on the terminal
    #[arg(long, group = "new")]
    pub new_passphrase: bool,
    /// Add the passphrase in this file
    #[arg(long, value_name = "FILE", group = "new")]
    pub new_passphrase_file: Option<PathBuf>,
    /// Make a new recovery key, add it, and print the recovery sheet
    #[arg(long, group = "new")]
    pub new_recovery: bool,
    /// A name for `sprat key list`, kept on this machine only
    #[arg(long, value_name = "TEXT")]
    pub label: Option<String>,
    /// Write the sheet to this new file (mode 0600) instead of standard output (with --new-recovery)
    #[arg(long, value_name = "FILE", requires = "new_recovery")]
    pub sheet: Option<PathBuf>,
    /// Also write the sheet as a page to print (with --new-recovery)
    #[arg(long, value_name = "FILE", requires = "new_recovery")]
    pub html: Option<PathBuf>,
}

/// Arguments of `key remove`.
#[derive(Debug, Args)]
pub struct KeyRemoveArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// The slot's number in `sprat key list`
    pub slot: u32,
    /// Remove the slot although it is the one that the given key opens
    #[arg(long)]
    pub although_in_use: bool,
    /// Remove the slot although it holds the only recovery key, or the last key that is not a file
    #[arg(long)]
    pub allow_last: bool,
}

/// Arguments of `key sheet`.
#[derive(Debug, Args)]
pub struct KeySheetArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Write it to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,
    /// Write it as a page to print, with the recovery key as a QR code, instead of text
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Leave the recovery key out, to be written in by hand
    #[arg(long)]
    pub without_secret: bool,
}

/// Arguments of `key header-backup`.
#[derive(Debug, Args)]
pub struct KeyHeaderBackupArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// A new file; `cryptsetup luksHeaderRestore` takes it, too
    pub file: PathBuf,
}

/// Arguments of `key header-restore`.
#[derive(Debug, Args)]
pub struct KeyHeaderRestoreArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// The kept header; else the one that this machine keeps by itself
    pub file: Option<PathBuf>,
    /// Don't ask
    #[arg(long)]
    pub yes: bool,
}
