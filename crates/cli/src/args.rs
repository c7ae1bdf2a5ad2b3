//! Options that every command accepts, and what the arguments of several commands share. Doc comments
//! here are the help texts.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, value_parser};
use sprat_session::Mode;

/// The heading of the global options. The help of a command leaves them out: `sprat help options`
/// shows them.
pub(crate) const GLOBAL_HEADING: &str = "Global options";

/// A container's name in the config, or its location.
pub(crate) const TARGET_HELP: &str = "A container's name in the config, \
                                      ssh://[user@]host[:port]/path/x.luks, \
                                      [user@]host:path/x.luks, or a local path";

/// The TARGET of a command that only reads.
#[derive(Debug, Clone, Args)]
pub(crate) struct ReadTarget {
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Read a past state that the server keeps: its name in `sprat generations`, the beginning of a name
    /// (the newest match), or latest-before:TIME
    #[arg(long, value_name = "NAME")]
    pub generation: Option<String>,
}

/// Options that every command accepts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = GLOBAL_HEADING)]
pub(crate) struct GlobalArgs {
    /// Read only this config file instead of /etc/sprat/sprat.toml (root) or ~/.config/sprat/sprat.toml
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print results as JSON on stdout and failures as JSON on stderr
    #[arg(long, global = true)]
    pub json: bool,
    /// Print only results, warnings and failures
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Print every step, and each file that a backup copies
    #[arg(long, short, global = true)]
    pub verbose: bool,
    /// Run this command instead of `ssh`; it is split into words and not run by a shell
    #[arg(long, global = true, value_name = "CMD")]
    pub ssh_command: Option<String>,
    /// Choose where data is decrypted
    #[arg(long, global = true, value_parser = mode(), default_value = "auto")]
    pub mode: Mode,
    /// Unlock with this key file
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Unlock with the passphrase in this file; one newline at its end is ignored
    #[arg(long, global = true, value_name = "FILE", conflicts_with_all = ["key_file", "passphrase_command"])]
    pub passphrase_file: Option<PathBuf>,
    /// Unlock with the passphrase that this command prints; it is split into words and not run by a shell
    #[arg(long, global = true, value_name = "CMD", conflicts_with = "key_file")]
    pub passphrase_command: Option<String>,
    /// Accept the container only if it has this fingerprint; its recovery sheet shows it
    #[arg(long, global = true, value_name = "HEX")]
    pub fingerprint: Option<String>,
    /// Write even if the server has no fsync; if the server crashes, the container can be lost
    #[arg(long, global = true, alias = "insist-without-fsync")]
    pub allow_no_fsync: bool,
    /// Read although another machine has the lock; use this only if that machine is gone for good
    #[arg(long, global = true)]
    pub ignore_lock: bool,
    /// Accept an older state of the container than this machine has seen; newer snapshots can be
    /// missing
    #[arg(long, global = true)]
    pub accept_older_state: bool,
    /// Accept key slots that another machine or program changed
    #[arg(long, global = true)]
    pub accept_changed_keys: bool,
    /// Folder for what sprat remembers of each container.
    #[arg(
        long,
        global = true,
        hide = true,
        env = "SPRAT_STATE_DIR",
        default_value = "/var/lib/sprat"
    )]
    pub state_dir: PathBuf,
    /// Folder for files that are not needed after a reboot.
    #[arg(
        long,
        global = true,
        hide = true,
        env = "SPRAT_RUNTIME_DIR",
        default_value = "/run/sprat"
    )]
    pub runtime_dir: PathBuf,
    /// Do not use the local cache of encrypted blocks; read everything from the server
    #[arg(long, global = true)]
    pub no_cache: bool,
    /// Folder where encrypted blocks are kept from one session to the next.
    #[arg(
        long,
        global = true,
        hide = true,
        env = "SPRAT_CACHE_DIR",
        default_value = "/var/cache/sprat"
    )]
    pub cache_dir: PathBuf,
    /// Largest size of each container's cache, in bytes.
    #[arg(long, global = true, hide = true, default_value = "2147483648")]
    pub cache_bytes_max: u64,
    /// Size of the reserve beside each container, in bytes.
    #[arg(
        long,
        global = true,
        hide = true,
        env = "SPRAT_RESERVE_BYTES",
        default_value = "67108864"
    )]
    pub reserve_bytes: u64,
    /// Time between two checks of the server's free space, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "10")]
    pub room_interval: Duration,
    /// How long after a lost connection its late writes may arrive, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "60")]
    pub quiet_time: Duration,
    /// How long to try to reconnect, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "900")]
    pub reconnect_max: Duration,
    /// Time between two reports of progress, in seconds; the default depends on where they go.
    #[arg(long, global = true, hide = true, value_parser = seconds, value_name = "SECONDS")]
    pub progress_interval: Option<Duration>,
    /// Most connections to the server.
    #[arg(long, global = true, hide = true, value_parser = value_parser!(u8).range(1..=8))]
    pub connections: Option<u8>,
    /// Largest amount of unsent data in memory, in bytes.
    #[arg(long, global = true, hide = true, default_value = "134217728")]
    pub write_buffer_bytes_max: usize,
    /// Weak key derivation, to make tests fast.
    #[arg(long, global = true, hide = true)]
    pub cheap_kdf_for_tests: bool,
}

fn mode() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new([
        PossibleValue::new("auto").help("In the kernel if it has dm-crypt, otherwise in sprat"),
        PossibleValue::new("kernel").help("In the kernel, with dm-crypt"),
        PossibleValue::new("user").help("In sprat itself"),
    ])
    .map(|name| match name.as_str() {
        "kernel" => Mode::Kernel,
        "user" => Mode::User,
        _ => Mode::Auto,
    })
}

/// A number of seconds, with a fraction if needed.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
