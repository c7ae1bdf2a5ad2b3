//! What can go wrong between the volume and its mounted file system.

use std::io;
use std::path::PathBuf;

/// Attaching, mounting or detaching failed.
#[allow(
    missing_docs,
    reason = "each variant's message says what its fields hold"
)]
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
    /// This process may not do that: it isn't root, or a container keeps the capability from it.
    #[error("{op} {object}: not permitted; it needs root")]
    NotRoot {
        op: &'static str,
        object: String,
        #[source]
        source: io::Error,
    },
    /// The kernel has no FUSE, or `/dev/fuse` isn't there for us.
    #[error("no FUSE here: {reason}")]
    NoFuse {
        reason: &'static str,
        #[source]
        source: io::Error,
    },
    /// The kernel gives us no loop device.
    #[error("no loop device to be had: {reason}")]
    NoLoop {
        reason: &'static str,
        #[source]
        source: io::Error,
    },
    /// There is no dm-crypt to be had here; user mode needs none.
    #[error("no dm-crypt here: {reason}")]
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
    /// The device that was to be served doesn't suit: its length isn't a positive multiple of
    /// [`BLOCK_BYTES`](crate::BLOCK_BYTES).
    #[error("a device of {len_bytes} bytes can't be served: not a positive multiple of 4096")]
    DeviceLength { len_bytes: u64 },
    /// The volume process ended, or gave up, before or while the device was attached.
    #[error("the volume process no longer serves the device")]
    ServerGone {
        #[source]
        source: io::Error,
    },
    /// A program isn't installed.
    #[error("{program} not found (looked in {looked_in})")]
    ProgramMissing {
        program: &'static str,
        looked_in: String,
    },
    /// A program failed; `stderr` is escaped and cut.
    #[error("{program} failed ({status}): {stderr}")]
    ProgramFailed {
        program: &'static str,
        status: String,
        stderr: String,
    },
    /// The mount point is in use: something is mounted there, or (when unmounting) something has
    /// files open below it or its working folder there.
    #[error("{op} {}: in use (EBUSY){}", dir.display(), users_text(users))]
    Busy {
        op: &'static str,
        dir: PathBuf,
        /// Processes that were seen using it, as `name (pid)`; may be empty.
        users: Vec<String>,
    },
    /// Nothing that we mounted is mounted there.
    #[error("{}: no volume is mounted there", dir.display())]
    NotMounted { dir: PathBuf },
    /// The file system on the device can't be mounted.
    #[error("mount {device} on {}: {reason}", dir.display())]
    MountRefused {
        device: String,
        dir: PathBuf,
        reason: &'static str,
        /// What lies on the device is no whole file system.
        damaged: bool,
        #[source]
        source: io::Error,
    },
    /// The file system was unmounted here, yet something (another mount namespace, a process with
    /// the device open) still holds the device after `waited_s` seconds.
    #[error("{device} is still held {waited_s} s after the unmount: {holder}")]
    StillHeld {
        device: String,
        waited_s: u64,
        holder: String,
    },
    /// The process has threads already, or isn't in the state this step needs.
    #[error("{op}: the process has {threads} threads where it must have one")]
    ManyThreads { op: &'static str, threads: usize },
    /// Mounts made here would show elsewhere: what the process has as its root is a folder of
    /// some mount, which it can't name.
    #[error("the root of this process is no mount point: it runs in a chroot")]
    RootNotMounted,
    /// The process that started this one is gone.
    #[error("the session process has ended")]
    ParentGone,
    /// No, or not exactly one, file descriptor came over the control socket.
    #[error("expected one file descriptor over the control socket, got {got}")]
    DescriptorCount { got: usize },
    /// A step was called out of order.
    #[error("{op}: {reason}")]
    OutOfOrder {
        op: &'static str,
        reason: &'static str,
    },
    /// The FUSE session ended with an error of the protocol.
    #[error("the FUSE session broke")]
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
    /// Wraps the failure of one system call.
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
