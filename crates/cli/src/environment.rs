//! The environment: user, folders and variables. It is read once, and only here.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sprat_run::clock::TRUST_VARIABLE;
use sprat_run::config::ConfigPlaces;
use sprat_run::hooks::RUN_VARIABLE;
use sprat_run::notify::Network;

use crate::Failure;

/// The folder of root's config. The timers know no other one.
pub(crate) const ROOT_CONFIG_DIR: &str = "/etc/sprat";

/// The level of the log that `SPRAT_LOG` sets.
pub(crate) fn log_level() -> Option<String> {
    std::env::var("SPRAT_LOG").ok()
}

/// The state folder, where no command line was parsed.
pub(crate) fn state_dir() -> PathBuf {
    let set = std::env::var_os("SPRAT_STATE_DIR");
    set.map_or_else(|| PathBuf::from("/var/lib/sprat"), PathBuf::from)
}

/// The environment of this process.
#[derive(Debug, Clone)]
pub(crate) struct Environment {
    /// The user is root.
    pub root: bool,
    /// The user's home folder: `HOME`, else what the account says.
    pub home: Option<PathBuf>,
    /// The folder of the config and the key files: `/etc/sprat` (root) or `~/.config/sprat`.
    pub config_dir: Option<PathBuf>,
    /// `PATH`: notices look for sendmail there.
    path: OsString,
    /// How long a server may leave a request unanswered (`SPRAT_ANSWER_TIMEOUT`, in seconds).
    pub answer_timeout: Option<Duration>,
    /// `SPRAT_TRUST_CLOCK=1`: the clock is right, whatever it shows. For tests.
    pub trust_clock: bool,
    /// Colours are welcome on a terminal: `NO_COLOR` is not set (no-color.org), and the terminal is none of
    /// the simplest.
    pub colours: bool,
    /// `SPRAT_RUN`, which is set for every hook.
    pub run_variable: Option<OsString>,
    /// The folder that relative paths on the command line start from.
    pub current_dir: PathBuf,
}

impl Environment {
    /// Reads it.
    pub(crate) fn read() -> Result<Self, Failure> {
        let root = rustix::process::geteuid().is_root();
        let folder = |name: &str| -> Option<PathBuf> {
            std::env::var_os(name)
                .filter(|value: &OsString| Path::new(value).is_absolute())
                .map(PathBuf::from)
        };
        // systemd sets no HOME for the services of the system.
        let home = std::env::home_dir().filter(|home| home.is_absolute());
        let user_config = || {
            folder("XDG_CONFIG_HOME")
                .or_else(|| home.as_ref().map(|home| home.join(".config")))
                .map(|config| config.join("sprat"))
        };
        let config_dir = folder("SPRAT_CONFIG_DIR").or_else(|| {
            if root {
                Some(PathBuf::from(ROOT_CONFIG_DIR))
            } else {
                user_config()
            }
        });
        let current_dir = std::env::current_dir().map_err(|error| {
            Failure::failed("the current folder can't be used").caused_by(&error)
        })?;
        Ok(Self {
            root,
            home,
            config_dir,
            path: std::env::var_os("PATH").unwrap_or_default(),
            answer_timeout: answer_timeout(),
            colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
                && std::env::var_os("TERM").is_some_and(|terminal| terminal != "dumb"),
            trust_clock: std::env::var(TRUST_VARIABLE).is_ok_and(|value| value == "1"),
            run_variable: std::env::var_os(RUN_VARIABLE),
            current_dir,
        })
    }

    /// Makes a path of the command line absolute. The shell has expanded `~` already.
    pub(crate) fn absolute(&self, path: &Path) -> PathBuf {
        self.current_dir.join(path)
    }

    /// How notices leave this machine.
    pub(crate) fn network(&self) -> Network {
        Network::with_path(&self.path)
    }

    /// What reading the config needs.
    pub(crate) fn config_places(&self) -> ConfigPlaces {
        ConfigPlaces {
            root: self.root,
            home: self.home.clone(),
            folder: self.config_dir.clone(),
        }
    }

    /// Fails unless root: `what` needs FUSE, a loop device and a mount.
    pub(crate) fn need_root(&self, what: &str) -> Result<(), Failure> {
        if self.root {
            return Ok(());
        }
        Err(Failure::failed(format!(
            "`sprat {what}` must be run as root: only root can mount and unmount the volume"
        ))
        .with_hint("nothing was started. Run it with sudo or as root"))
    }
}

/// For servers on slow disks, and for tests. A value that is not a number from 1 to 3600 is ignored.
fn answer_timeout() -> Option<Duration> {
    let set = std::env::var("SPRAT_ANSWER_TIMEOUT").ok()?;
    let seconds = set.parse::<u64>().ok()?;
    let is_valid = (1..=3600).contains(&seconds);
    is_valid.then(|| Duration::from_secs(seconds))
}
