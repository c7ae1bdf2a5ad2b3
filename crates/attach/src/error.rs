//! The errors of attaching, mounting and detaching a volume.

use std::io;
use std::path::PathBuf;

/// Attaching, mounting or detaching failed.
#[allow(missing_docs, reason = "each variant's message explains its fields")]
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// A system call failed.
    #[error("{op} {object}")]
    Io {
        op: &'static str,
        object: String,
        #[source]
        source: io::Error,
    },
    /// The operation is not permitted: the process isn't root, or a container lacks the capability.
    #[error("{op} {object}: not permitted; it needs root")]
    NotRoot {
        op: &'static str,
        object: String,
        #[source]
        source: io::Error,
    },
    /// The kernel has no FUSE, or `/dev/fuse` is not usable.
    #[error("FUSE is not available: {reason}")]
    NoFuse {
        reason: &'static str,
        #[source]
        source: io::Error,
    },
    /// No loop device is available.
    #[error("no loop device available: {reason}")]
    NoLoop {
        reason: &'static str,
        #[source]
        source: io::Error,
    },
    /// dm-crypt is not available. User mode doesn't need it.
    #[error("dm-crypt is not available: {reason}")]
    NoDmCrypt {
        reason: &'static str,
        #[source]
        source: io::Error,
    },
    /// libcryptsetup failed to make or remove a map.
    #[error("{op} the dm-crypt map {name}")]
    CryptMap {
        op: &'static str,
        name: String,
        #[source]
        source: libcryptsetup_rs::LibcryptErr,
    },
    /// The device can't be served: its length isn't a positive multiple of
    /// [`BLOCK_BYTES`](crate::BLOCK_BYTES).
    #[error("a device of {len_bytes} bytes can't be served: not a positive multiple of 4096")]
    DeviceLength { len_bytes: u64 },
    /// The volume process ended or stopped serving, before or while the device was attached.
    #[error("the volume process no longer serves the device")]
    ServerGone {
        #[source]
        source: io::Error,
    },
    /// A program isn't installed.
    #[error("{program} not found (searched in {searched_in})")]
    ProgramMissing {
        program: &'static str,
        searched_in: String,
    },
    /// A program failed. `stderr` is escaped and its length is limited.
    #[error("{program} failed ({status}): {stderr}")]
    ProgramFailed {
        program: &'static str,
        status: String,
        stderr: String,
    },
    /// The mount point is in use. Something is mounted there, or, for an unmount, a process has open
    /// files or its working folder there.
    #[error("{op} {}: in use (EBUSY){}", dir.display(), users_text(users))]
    Busy {
        op: &'static str,
        dir: PathBuf,
        /// Processes that use it, as `name (pid)`. May be empty.
        users: Vec<String>,
    },
    /// No volume of sprat is mounted there.
    #[error("{}: no volume is mounted there", dir.display())]
    NotMounted { dir: PathBuf },
    /// The file system on the device can't be mounted.
    #[error("mount {device} on {}: {reason}", dir.display())]
    MountRefused {
        device: String,
        dir: PathBuf,
        reason: &'static str,
        /// Whether the device has no intact file system.
        damaged: bool,
        #[source]
        source: io::Error,
    },
    /// The file system was unmounted here, but something still has the device open after `waited_s`
    /// seconds, such as another mount namespace or a process.
    #[error("{device} is still in use {waited_s} s after the unmount: {holder}")]
    StillHeld {
        device: String,
        waited_s: u64,
        holder: String,
    },
    /// The process must have a single thread for this step, and has more.
    #[error("{op}: the process has {threads} threads where it must have one")]
    ManyThreads { op: &'static str, threads: usize },
    /// Mounts of this process would appear outside: its root is a folder inside of a mount, and no path
    /// leads to the root of that mount.
    #[error("the root folder of this process is not a mount point: it runs in a chroot")]
    RootNotMounted,
    /// The process that started this one is gone.
    #[error("the session process has ended")]
    ParentGone,
    /// Not exactly one file descriptor arrived over the control socket.
    #[error("expected one file descriptor over the control socket, got {got}")]
    DescriptorCount { got: usize },
    /// A step was called in the wrong order.
    #[error("{op}: {reason}")]
    OutOfOrder {
        op: &'static str,
        reason: &'static str,
    },
    /// The FUSE session failed with a protocol error.
    #[error("the FUSE session failed")]
    FuseSession {
        #[source]
        source: io::Error,
    },
}

fn users_text(users: &[String]) -> String {
    if users.is_empty() {
        String::new()
    } else {
        format!("; used by {}", users.join(", "))
    }
}

impl AttachError {
    /// Wraps the failure of a system call.
    pub(crate) fn io(
        op: &'static str,
        object: impl Into<String>,
        source: impl Into<io::Error>,
    ) -> Self {
        let (object, source) = (object.into(), source.into());
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::NotRoot { op, object, source },
            _ => Self::Io { op, object, source },
        }
    }
}
