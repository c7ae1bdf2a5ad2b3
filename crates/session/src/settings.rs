//! The settings of a session: built from config and command line, passed whole to the volume process.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sprat_luks::{Header, LuksError, OpenedBy, Pins, Secret, SlotKind};

use crate::Failure;
use crate::address::Target;
use crate::file_system::FileSystemKind;
use crate::upload_rates::UploadRates;

/// A takeover waits for this many quiet times.
///
/// A session that loses its connection notices that only when its ssh gives up, and waits one quiet
/// time from then on. A killed ssh does not give up: the kernel sends what is left in its socket for
/// up to 102 s more (`tcp_orphan_retries`, net/ipv4/tcp_timer.c). A takeover waits twice as long.
pub const TAKEOVER_QUIET_TIMES: u32 = 2;

/// Whether a session may change the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// Never write to the server, not even a lock. Works on a full disk and with a read-only account.
    ReadOnly,
    /// Read and write, under the lock.
    ReadWrite,
}

impl From<Access> for sprat_store::Access {
    fn from(access: Access) -> Self {
        match access {
            Access::ReadOnly => Self::ReadOnly,
            Access::ReadWrite => Self::ReadWrite,
        }
    }
}

/// Where the volume is decrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// In the kernel if it has dm-crypt, else in sprat.
    #[default]
    Auto,
    /// In the kernel; the FUSE file is the ciphertext.
    Kernel,
    /// In the volume process; the FUSE file is the plaintext.
    User,
}

impl Mode {
    /// Which side decrypts. `Auto` checks what this machine's kernel can do.
    pub(crate) fn opened_by(self) -> Result<OpenedBy, Failure> {
        if self == Self::User {
            return Ok(OpenedBy::Sprat);
        }
        match sprat_attach::kernel_mode_works() {
            Ok(()) => Ok(OpenedBy::Kernel),
            Err(_) if self == Self::Auto => Ok(OpenedBy::Sprat),
            Err(error) => Err(Failure::from(&error)),
        }
    }
}

/// What the container's header is compared with before the key is used on it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IdentityPolicy {
    /// What this machine knows of the container. Any difference is refused.
    Known(Pins),
    /// The fingerprint on the recovery sheet. Any difference is refused.
    Expect(String),
    /// This machine has never seen the container. The header found is trusted and reported
    /// ([`Notice::TrustedOnce`](crate::Notice::TrustedOnce)); the caller pins it.
    TrustOnce,
}

impl IdentityPolicy {
    /// Checks that a header belongs to this container. It may be an older one, as kept headers are.
    pub fn fits(&self, header: &Header) -> Result<(), LuksError> {
        match self {
            Self::Known(pins) => {
                let mut pins = pins.clone();
                pins.sequence_id = 0;
                header.check_pins(&pins)
            }
            Self::Expect(fingerprint) => header.check_fingerprint(fingerprint),
            Self::TrustOnce => Ok(()),
        }
    }
}

/// How a server is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshOptions {
    /// The ssh program and its first arguments.
    pub command: Vec<OsString>,
    /// How long the server may leave a request unanswered. An fsync may take ten times as long.
    /// `None`: the limits of the store crate.
    pub answer_timeout: Option<Duration>,
}

impl Default for SshOptions {
    fn default() -> Self {
        Self {
            command: vec![OsString::from("ssh")],
            answer_timeout: None,
        }
    }
}

/// Most connections to one server, if nothing else is set.
pub const CONNECTIONS: usize = 4;

/// How a container is opened.
///
/// A new setting is a field here, with its default in [`SessionSettings::new`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SessionSettings {
    /// The container.
    pub target: Target,
    /// The containers of the config. No snapshot contains one that is on this machine, and no restore
    /// overwrites it.
    pub containers: Vec<Target>,
    /// Where it is decrypted.
    pub mode: Mode,
    /// How its server is reached.
    pub ssh: SshOptions,
    /// Read, or read and write.
    pub access: Access,
    /// The folder for lock records, pins and headers (`/var/lib/sprat`).
    #[serde(with = "any_path")]
    pub state_dir: PathBuf,
    /// If a past state is read: the state folder of this machine. `state_dir` is then one for past states.
    /// The volume process needs only that.
    #[serde(skip)]
    pub machine_state_dir: Option<PathBuf>,
    /// The folder for mounts (`/run/sprat`).
    #[serde(with = "any_path")]
    pub runtime_dir: PathBuf,
    /// Write although the server can't fsync.
    pub allow_no_fsync: bool,
    /// Read although another host holds the lock. Only a read-only session may.
    pub ignore_lock: bool,
    /// Accept a state of the container that is older than the known one.
    pub accept_older_state: bool,
    /// Accept key slots that another machine changed.
    pub accept_changed_keys: bool,
    /// Read everything from the server, and compare it with the cache.
    pub verify_cache: bool,
    /// How long to wait for a lost connection. Zero ends the session at the first loss.
    pub reconnect_max: Duration,
    /// How long blocks that were in flight at a loss are not written again.
    pub quiet_time: Duration,
    /// How often [`SessionProgress`](crate::SessionProgress) is reported.
    pub stats_interval: Duration,
    /// Most connections to the server, 1 to 8. All but the first begin only when more is queued
    /// than the first carries in one round trip.
    pub connections: usize,
    /// Much will be read: the further connections begin at once.
    pub expects_much: bool,
    /// How fast data may be sent to the server.
    pub upload_rates: UploadRates,
    /// Most bytes that may wait to be durable on the server.
    pub write_buffer_bytes_max: usize,
    /// The folder in which each container has its persistent cache (`/var/cache/sprat`).
    #[serde(with = "any_path")]
    pub cache_dir: PathBuf,
    /// Size limit of one container's cache. Zero: the cache is not used.
    pub cache_bytes_max: u64,
    /// Size of the reserve file beside the container, which is made if it is missing. Zero: no reserve.
    pub reserve_bytes: u64,
    /// Remove the reserve if the server's disk is full. For commands that free space.
    pub may_use_reserve: bool,
    /// How often the server's free space is checked while the session writes.
    pub space_interval: Duration,
    /// What the header must match.
    pub pins: IdentityPolicy,
    /// The sprat program, for the volume process and the worker.
    #[serde(with = "any_path")]
    pub program: PathBuf,
}

impl SessionSettings {
    /// The defaults for `target`.
    #[must_use]
    pub fn new(target: Target, access: Access, state_dir: PathBuf, runtime_dir: PathBuf) -> Self {
        Self {
            target,
            containers: Vec::new(),
            mode: Mode::default(),
            ssh: SshOptions::default(),
            access,
            cache_dir: state_dir.join("cache"),
            cache_bytes_max: 2 << 30,
            reserve_bytes: 0,
            may_use_reserve: false,
            space_interval: Duration::from_secs(10),
            state_dir,
            machine_state_dir: None,
            runtime_dir,
            allow_no_fsync: false,
            ignore_lock: false,
            accept_older_state: false,
            accept_changed_keys: false,
            verify_cache: false,
            reconnect_max: Duration::from_secs(15 * 60),
            quiet_time: Duration::from_secs(60),
            stats_interval: Duration::from_millis(500),
            connections: CONNECTIONS,
            expects_much: false,
            upload_rates: UploadRates::default(),
            write_buffer_bytes_max: 128 << 20,
            pins: IdentityPolicy::TrustOnce,
            // The child resolves this link, so it runs this very program even if an upgrade has
            // replaced the file.
            program: PathBuf::from("/proc/self/exe"),
        }
    }
}

/// A path as serde's own form of it, but one that need not be UTF-8.
mod any_path {
    use std::ffi::OsString;
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().serialize(to)
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<PathBuf, D::Error> {
        OsString::deserialize(from).map(PathBuf::from)
    }
}

/// How a container is created.
#[derive(Debug)]
pub struct CreateOptions {
    /// Target, folders and limits. `access` and `pins` are ignored.
    pub settings: SessionSettings,
    /// Length of the container file in bytes, rounded down to a multiple of 4096.
    pub size_bytes: u64,
    /// Each gets one key slot, in this order.
    pub secrets: Vec<(Secret, SlotKind)>,
    /// A fixed UUID, else a random one.
    pub uuid: Option<String>,
    /// The kind of file system in the volume.
    pub file_system: FileSystemKind,
    /// The file system's label.
    pub label: Option<String>,
    /// See [`sprat_attach::MkfsOptions`].
    pub inodes: Option<u64>,
    /// Weak key derivation, for tests only.
    pub fast_kdf_for_tests: bool,
}

/// The smallest container that [`create`](crate::create()) makes: header, journal and room for a
/// snapshot.
pub const SIZE_BYTES_MIN: u64 = 64 << 20;
