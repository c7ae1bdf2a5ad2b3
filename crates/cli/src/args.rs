//! The command line's grammar. Doc comments here are the help texts.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::Exit;

/// End-to-end encrypted backups with rsync: one LUKS2 file on any SSH server
#[derive(Debug, Parser)]
#[command(
    name = "sprat",
    version,
    arg_required_else_help = true,
    max_term_width = 100
)]
pub struct Cli {
    /// What applies to every command.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// Options that every command accepts.
#[derive(Debug, Clone, Args)]
pub struct GlobalArgs {
    /// Read this config instead of /etc/sprat/sprat.toml (root) or ~/.config/sprat/sprat.toml
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    pub config: Option<PathBuf>,
    /// Print results as JSON on stdout, and a failure as JSON on stderr
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// Print results and failures only
    #[arg(
        long,
        short,
        global = true,
        conflicts_with = "verbose",
        help_heading = "Global options"
    )]
    pub quiet: bool,
    /// Print every step
    #[arg(long, short, global = true, help_heading = "Global options")]
    pub verbose: bool,
    /// Run this instead of `ssh`; split into words as a shell does, never run by one
    #[arg(
        long,
        global = true,
        value_name = "CMD",
        help_heading = "Global options"
    )]
    pub ssh_command: Option<String>,
    /// Where decryption happens
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "auto",
        help_heading = "Global options"
    )]
    pub mode: Mode,
    /// Unlock with this key file
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    pub key_file: Option<PathBuf>,
    /// Unlock with the passphrase in this file (one newline at its end is dropped)
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        conflicts_with_all = ["key_file", "passphrase_command"],
        help_heading = "Global options"
    )]
    pub passphrase_file: Option<PathBuf>,
    /// Unlock with the passphrase that this command prints; split into words, not run by a shell
    #[arg(
        long,
        global = true,
        value_name = "CMD",
        conflicts_with = "key_file",
        help_heading = "Global options"
    )]
    pub passphrase_command: Option<String>,
    /// Accept this container only with the fingerprint that its recovery sheet shows
    #[arg(
        long,
        global = true,
        value_name = "HEX",
        help_heading = "Global options"
    )]
    pub fingerprint: Option<String>,
    /// Write although the server can't fsync: a crash of the server may then lose the container
    #[arg(long, global = true, help_heading = "Global options")]
    pub insist_without_fsync: bool,
    /// Where sprat keeps what it knows of containers.
    #[arg(
        long,
        global = true,
        hide = true,
        value_name = "DIR",
        env = "SPRAT_STATE_DIR",
        default_value = "/var/lib/sprat"
    )]
    pub state_dir: PathBuf,
    /// Where sprat keeps what ends with a reboot.
    #[arg(
        long,
        global = true,
        hide = true,
        value_name = "DIR",
        env = "SPRAT_RUNTIME_DIR",
        default_value = "/run/sprat"
    )]
    pub runtime_dir: PathBuf,
    /// How long a late write of a lost connection is feared, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "60")]
    pub quiet_time: Duration,
    /// How long a lost connection is sought again, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "900")]
    pub reconnect_max: Duration,
    /// SFTP channels for data.
    #[arg(long, global = true, hide = true, default_value = "4")]
    pub data_channels: usize,
    /// Bound of unsent data in memory, in bytes.
    #[arg(long, global = true, hide = true, default_value = "268435456")]
    pub write_buffer_bytes_max: usize,
    /// Weak key derivation, so that tests take no seconds.
    #[arg(long, global = true, hide = true)]
    pub cheap_kdf_for_tests: bool,
}

/// Where the encrypted volume is decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// The best that works here
    Auto,
    /// In the kernel (dm-crypt); not in this version
    Kernel,
    /// In sprat; needs FUSE and loop devices
    User,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// One half of a session: the encrypted volume.
    #[command(hide = true)]
    VolumeProcess {
        /// Whatever the session says.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
    /// The other half of a session: the mounted files.
    #[command(hide = true)]
    Worker {
        /// Whatever the session says.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        arguments: Vec<OsString>,
    },
}

/// Prints help, version or a complaint of the parser, and says how to exit.
pub fn report(error: &clap::Error) -> Exit {
    // Nothing is left to do where stdout or stderr is closed.
    let _ = error.print();
    if error.use_stderr() {
        Exit::Usage
    } else {
        Exit::Done
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
