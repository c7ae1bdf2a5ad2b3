//! The command line's grammar. Doc comments here are the help texts.

mod check;
mod copy;
mod key;
mod prune;
mod status;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use sprat_session::text::parse_size;

use crate::Exit;

pub use check::CheckArgs;
pub use copy::CopyArgs;
pub use key::{
    KeyAddArgs, KeyArgs, KeyCommand, KeyHeaderBackupArgs, KeyHeaderRestoreArgs, KeyRemoveArgs,
    KeySheetArgs, KeyTargetArgs,
};
pub use prune::PruneArgs;
pub use status::StatusArgs;

/// End-to-end encrypted backups with rsync: one LUKS2 file on any SSH server
#[derive(Debug, Parser)]
#[command(
    name = "sprat",
    version,
    arg_required_else_help = true,
    after_help = exit_codes(),
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
    /// Print results, warnings and failures only
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
    /// Read although another machine holds the lock: for when that machine is gone for good
    #[arg(long, global = true, help_heading = "Global options")]
    pub ignore_lock: bool,
    /// Go on although the container is older than this machine knows it: snapshots may be missing
    #[arg(long, global = true, help_heading = "Global options")]
    pub accept_older_state: bool,
    /// Go on although key slots were changed, and not by this machine
    #[arg(long, global = true, help_heading = "Global options")]
    pub accept_changed_keys: bool,
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
    /// Read everything from the server: neither use nor fill the local cache of encrypted blocks
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_cache: bool,
    /// Where blocks are kept from one session to the next, encrypted as they are.
    #[arg(
        long,
        global = true,
        hide = true,
        value_name = "DIR",
        env = "SPRAT_CACHE_DIR",
        default_value = "/var/cache/sprat"
    )]
    pub cache_dir: PathBuf,
    /// Bound of each container's cache, in bytes.
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
    /// Between two questions for the server's free space, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "10")]
    pub room_interval: Duration,
    /// How long a late write of a lost connection is feared, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "60")]
    pub quiet_time: Duration,
    /// How long a lost connection is sought again, in seconds.
    #[arg(long, global = true, hide = true, value_parser = seconds, default_value = "900")]
    pub reconnect_max: Duration,
    /// Between two reports of progress, in seconds; by default it suits who reads them.
    #[arg(long, global = true, hide = true, value_parser = seconds, value_name = "SECONDS")]
    pub progress_interval: Option<Duration>,
    /// SFTP channels for data.
    #[arg(long, global = true, hide = true, default_value = "4")]
    pub data_channels: usize,
    /// Bound of unsent data in memory, in bytes.
    #[arg(long, global = true, hide = true, default_value = "134217728")]
    pub write_buffer_bytes_max: usize,
    /// Weak key derivation, so that tests take no seconds.
    #[arg(long, global = true, hide = true)]
    pub cheap_kdf_for_tests: bool,
}

/// Where the encrypted volume is decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// In the kernel where it has dm-crypt, else in sprat
    Auto,
    /// In the kernel, by dm-crypt
    Kernel,
    /// In sprat itself
    User,
}

impl From<Mode> for sprat_session::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Auto => Self::Auto,
            Mode::Kernel => Self::Kernel,
            Mode::User => Self::User,
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a container: key file, LUKS2 header, file system; print its recovery sheet
    #[command(after_help = INIT_EXAMPLES)]
    Init(InitArgs),
    /// Run jobs of the config, or one job given here
    #[command(after_help = BACKUP_EXAMPLES, override_usage = BACKUP_USAGE)]
    Backup(BackupArgs),
    /// List the snapshots of a container
    #[command(after_help = SNAPSHOTS_EXAMPLES)]
    Snapshots(SnapshotsArgs),
    /// Copy a snapshot, or a part of it, back
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore(RestoreArgs),
    /// Remove the snapshots of a job that no rule keeps
    #[command(after_help = prune::EXAMPLES)]
    Prune(PruneArgs),
    /// Mount a container to look round in it; it stays mounted until `sprat umount`
    #[command(after_help = MOUNT_EXAMPLES)]
    Mount(MountArgs),
    /// Unmount a container and wait until everything is on the server's disk
    #[command(after_help = "Example:\n  sprat umount /mnt/backup")]
    Umount(UmountArgs),
    /// Look whether a container is whole: header, file system, and if asked for every file
    #[command(after_help = check::CHECK_EXAMPLES)]
    Check(CheckArgs),
    /// Copy a container to another store, or move it there, and read it back
    #[command(after_help = copy::COPY_EXAMPLES)]
    Copy(CopyArgs),
    /// Give the space of deleted snapshots back to the server
    #[command(after_help = TRIM_EXAMPLES)]
    Trim(TrimArgs),
    /// Give a container a larger size
    #[command(after_help = GROW_EXAMPLES)]
    Grow(GrowArgs),
    /// Show how things stand: space, the last runs of each job, the lock
    #[command(after_help = status::STATUS_EXAMPLES)]
    Status(StatusArgs),
    /// Remove the lock of a session that died on another machine
    #[command(after_help = UNLOCK_EXAMPLES)]
    Unlock(UnlockArgs),
    /// List, add and remove keys; print the recovery sheet; keep the header and put it back
    #[command(after_help = key::EXAMPLES)]
    Key(KeyArgs),
    /// Look whether this machine, the config and the servers are in order
    #[command(
        after_help = "Examples:\n  sprat doctor\n  sprat doctor home ssh://u1234@example.org/backup/www.luks"
    )]
    Doctor(DoctorArgs),
    /// Print a shell's completion script
    #[command(after_help = "Example:\n  sprat completions bash > /etc/bash_completion.d/sprat")]
    Completions {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// One part of a session: the encrypted volume.
    #[command(hide = true)]
    VolumeProcess,
    /// One part of a session: the mounted files.
    #[command(hide = true)]
    Worker,
    /// What cleans up after a mount in the background.
    #[command(hide = true)]
    MountKeeper,
}

impl Command {
    /// The command's name, if it mounts and so must be root.
    pub(crate) fn needs_root(&self) -> Option<&'static str> {
        match self {
            Self::Init(_) => Some("init"),
            Self::Backup(_) => Some("backup"),
            Self::Snapshots(_) => Some("snapshots"),
            Self::Restore(_) => Some("restore"),
            Self::Prune(_) => Some("prune"),
            Self::Mount(_) => Some("mount"),
            Self::Umount(_) => Some("umount"),
            Self::Check(_) => Some("check"),
            Self::Trim(_) => Some("trim"),
            Self::Grow(_) => Some("grow"),
            Self::Copy(_)
            | Self::Unlock(_)
            | Self::Key(_)
            | Self::Doctor(_)
            | Self::Status(_)
            | Self::Completions { .. }
            | Self::VolumeProcess
            | Self::Worker
            | Self::MountKeeper => None,
        }
    }
}

/// A container's name in the config, or its place.
const TARGET_HELP: &str = "A container's name in the config, ssh://[user@]host[:port]/path/x.luks, \
                           [user@]host:path/x.luks, or a local path";

/// Arguments of `init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Write the recovery sheet to this new file (mode 0600) instead of standard output
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,
    /// Also write the sheet as a page to print, with the recovery key as a QR code
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Size that the container may grow to; it is sparse and takes only what is written
    #[arg(long, value_parser = parse_size, default_value = "5T")]
    pub size: u64,
    /// How many files and folders all snapshots can have together; unchanged ones count once [default: one
    /// for each 16 KiB of --size, from 4T on for each 32 KiB, from 16T on for each 64 KiB]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1000..=4_000_000_000))]
    pub inodes: Option<u64>,
}

const INIT_EXAMPLES: &str = "\
Makes a key file of 4096 random bytes if it is missing (--key-file, the config's key_file, or
/etc/sprat/keys/NAME.key), and prints a recovery sheet with a second key. Never overwrites anything.

Examples:
  sprat init ssh://u1234@example.org/backup/home.luks
  sprat init --size 500G --sheet sheet.txt home";

/// Arguments of `backup`.
#[derive(Debug, Args)]
pub struct BackupArgs {
    /// Jobs of the config (all of them if none is named); with --name: TARGET SOURCE…
    #[arg(value_name = "JOB")]
    pub words: Vec<OsString>,
    /// Back up without a config, as a job of this name
    #[arg(long, value_name = "JOB")]
    pub name: Option<String>,
    /// Leave out what matches this pattern of rsync's (with --name; may be repeated)
    #[arg(long, value_name = "PATTERN", requires = "name")]
    pub exclude: Vec<String>,
    /// Leave out what matches a pattern in this file (with --name; may be repeated)
    #[arg(long, value_name = "FILE", requires = "name")]
    pub exclude_from: Vec<PathBuf>,
    /// Stay on the file system of each source (with --name)
    #[arg(long, requires = "name")]
    pub one_file_system: bool,
    /// Compare the content of every file, not only its size and time; reads all of source and snapshot
    #[arg(long)]
    pub checksum: bool,
    /// Accept sources that hold nothing (with --name)
    #[arg(long, requires = "name")]
    pub allow_empty: bool,
    /// The disk that was mounted at PATH is gone for good: no longer warn of it (may be repeated)
    #[arg(long, value_name = "PATH")]
    pub disk_gone: Vec<PathBuf>,
}

const BACKUP_USAGE: &str = "sprat backup [OPTIONS] [JOB]...
       sprat backup [OPTIONS] --name JOB TARGET SOURCE...";

const BACKUP_EXAMPLES: &str = "\
Success is told only after everything is on the server's disk. An interrupted run loses nothing: the
next one goes on from it.

Examples:
  sprat backup
  sprat backup home
  sprat backup ssh://u1234@example.org/backup/home.luks --name home /home --exclude .cache/

Exit codes: 0 done, 3 some source files unread, others in `sprat --help`.";

/// Arguments of `snapshots`.
#[derive(Debug, Args)]
pub struct SnapshotsArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Only this job's
    #[arg(long)]
    pub job: Option<String>,
}

const SNAPSHOTS_EXAMPLES: &str =
    "Examples:\n  sprat snapshots home\n  sprat snapshots home --job www --json";

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// What: the snapshot is the latest one, the path everything, if not named
    #[arg(value_name = "JOB[/SNAPSHOT][:PATH]")]
    pub what: OsString,
    /// Where to: PATH becomes DIR/basename; without PATH everything goes below DIR with its whole path
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// Only tell what would be done
    #[arg(long)]
    pub dry_run: bool,
    /// Also delete from DIR what the snapshot does not have
    #[arg(long)]
    pub delete: bool,
    /// With --delete, where the job left something out (patterns, disks): that may go from DIR, too
    #[arg(long, requires = "delete")]
    pub delete_excluded: bool,
    /// Leave files of equal size and time as they are without reading them: to go on after an interruption
    #[arg(long)]
    pub trust_times: bool,
    /// When all is written, compare it with the snapshot: read from both disks, byte for byte
    #[arg(long, conflicts_with = "dry_run")]
    pub verify: bool,
}

const RESTORE_EXAMPLES: &str = "\
Examples:
  sprat restore home www --to /restore
  sprat restore home www/2026-11-23T13-21-01Z:/etc/fstab --to /tmp
  sprat restore home www --to / --dry-run --delete";

/// Arguments of `mount`.
#[derive(Debug, Args)]
pub struct MountArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// An existing folder
    pub dir: PathBuf,
    /// Mount for reading and writing; without it nothing is ever written to the server
    #[arg(long)]
    pub rw: bool,
    /// Mount where other users can enter: they see the files as their old modes allow
    #[arg(long)]
    pub allow_other: bool,
}

const MOUNT_EXAMPLES: &str = "\
DIR must lie in a folder that only root can enter, or other users could read what the modes in the
backup let them; --allow-other does without.

Example:
  mkdir -p -m 700 /mnt/private && mkdir -p /mnt/private/backup
  sprat mount home /mnt/private/backup && ls /mnt/private/backup/www/latest
  sprat umount /mnt/private/backup";

/// Arguments of `umount`.
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// Where `sprat mount` mounted it
    pub dir: PathBuf,
}

/// Arguments of `trim`.
#[derive(Debug, Args)]
pub struct TrimArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Have the server write the container anew beside itself, where no holes can be made in it
    #[arg(long)]
    pub rewrite: bool,
    /// Let all that is used cross the line for that, where the server can't copy by itself
    #[arg(long, requires = "rewrite")]
    pub through_client: bool,
}

const TRIM_EXAMPLES: &str = "\
Makes holes in the container where the file system in it uses nothing: by itself in a local folder,
with `fallocate` where the account has a shell. Shows the server how much is used, and where.
Interrupted anywhere nothing is lost; run it again.

Examples:
  sprat trim home
  sprat trim home --rewrite";

/// Arguments of `grow`.
#[derive(Debug, Args)]
pub struct GrowArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// The new size; it is sparse and takes only what is written
    #[arg(value_parser = parse_size)]
    pub size: u64,
}

const GROW_EXAMPLES: &str = "\
Interrupted anywhere the container stays usable, and the same command finishes. Needs
CAP_SYS_RESOURCE, which root has outside of containers.

Example:
  sprat grow home 8T";

/// Arguments of `unlock`.
#[derive(Debug, Args)]
pub struct UnlockArgs {
    /// The container.
    #[arg(help = TARGET_HELP)]
    pub target: String,
    /// Take over even if the lock's owner still renews it: that session stops, and its run fails
    #[arg(long)]
    pub force: bool,
    /// Do not wait for a machine that is off (not asleep)
    #[arg(long)]
    pub that_machine_is_off: bool,
    /// Stop waiting for the comparison of what sessions wrote after a takeover
    #[arg(long)]
    pub forget_watch: bool,
    /// How long the lock is watched, in seconds.
    #[arg(long, hide = true, value_parser = seconds)]
    pub watch: Option<Duration>,
    /// The silence after which a session counts as gone, in seconds.
    #[arg(long, hide = true, value_parser = seconds)]
    pub silence: Option<Duration>,
}

const UNLOCK_EXAMPLES: &str = "\
A session that died on this machine needs no unlock: the next run takes over.

Example:
  sprat unlock home";

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Containers to look at (all of the config if none is named)
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
}

/// The end of `sprat --help`.
fn exit_codes() -> String {
    let line = |exit: &Exit| format!("\n  {:>3}  {}", exit.code(), exit.meaning());
    format!(
        "Exit codes:{}",
        Exit::ALL.iter().map(line).collect::<String>()
    )
}

/// The arguments without `--help` behind `help`, which the parser takes for a command.
pub(crate) fn without_help_for_help(
    arguments: impl IntoIterator<Item = OsString>,
) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    let asks = |text: &OsString| text == "--help" || text == "-h";
    if arguments.get(1).is_some_and(|text| text == "help") && arguments.get(2).is_some_and(asks) {
        arguments.remove(2);
    }
    arguments
}

/// A complaint lists the commands that there are: those of sprat's own processes are nobody's.
fn hide_internal(error: &mut clap::Error) {
    let Some(ContextValue::Strings(commands)) = error.get(ContextKind::ValidSubcommand) else {
        return;
    };
    let all = Cli::command();
    let is_hidden = |name: &String| {
        all.get_subcommands()
            .any(|command| command.is_hide_set() && command.get_name() == name)
    };
    let shown = commands.iter().filter(|name| !is_hidden(name)).cloned();
    let shown = ContextValue::Strings(shown.collect());
    error.insert(ContextKind::ValidSubcommand, shown);
}

/// Prints help, version or a complaint of the parser, and says how to exit.
pub fn report(mut error: clap::Error) -> Exit {
    hide_internal(&mut error);
    if !error.use_stderr() {
        use std::io::Write as _;
        // `print` buffers: what can't be written is seen only when it is flushed.
        let shown = error.print().and_then(|()| std::io::stdout().flush());
        return match shown {
            Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                crate::output::complain(&format!("standard output can't be written to: {error}\n"));
                Exit::Failed
            }
            _ => Exit::Done,
        };
    }
    let text = error.render().to_string();
    crate::output::complain(text.strip_prefix("error: ").unwrap_or(&text));
    Exit::Usage
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}
