//! A session: one container, open, from a lock to a durable end.
//!
//! Three processes share it. S is the command itself; V (`volume-process`) holds the connection,
//! the lock, the key and the volume, and serves it over FUSE; W (`worker`) holds the mounts in
//! namespaces of its own and runs rsync. Whichever dies, the other two end.

#[allow(dead_code)]
mod link;
mod options;
#[allow(dead_code)]
mod protocol;

use std::path::Path;

use sprat_luks::Secret;
use sprat_snapshot::{RestoreReport, RestoreSpec, SnapshotEntry, SnapshotReport, SnapshotSpec};

pub use options::{
    Access, ClosedReport, ContainerFacts, CreateOptions, Created, Notice, Observer, Phase,
    PinPolicy, SIZE_BYTES_MIN, SessionOptions, SessionProgress, VolumeFigures,
};
pub use protocol::FileSystemCheck;

use crate::Failure;
use crate::interrupt::Interrupt;

/// An open container with its file system mounted where only the worker sees it.
///
/// Whatever an operation returned, [`Session::close`] ends the session; dropping it instead stops
/// everything at once, as a crash does.
#[derive(Debug)]
pub struct Session {}

impl Session {
    /// Opens the container and mounts its volume.
    pub fn open(
        options: SessionOptions,
        secret: &Secret,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let _ = (options, secret, observer, interrupt);
        Err(Failure::failed("not built yet"))
    }

    /// What was found at the target; the caller pins it where nothing was pinned.
    #[must_use]
    pub fn facts(&self) -> &ContainerFacts {
        unreachable!()
    }

    /// Takes a snapshot. After an interrupt the volume holds a `.partial`, and the error is
    /// [`Exit::Interrupted`](crate::Exit).
    pub fn take_snapshot(
        &mut self,
        spec: SnapshotSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<SnapshotReport, Failure> {
        let _ = (spec, observer, interrupt);
        Err(Failure::failed("not built yet"))
    }

    /// Lists the snapshots of all jobs.
    pub fn snapshots(
        &mut self,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Vec<SnapshotEntry>, Failure> {
        let _ = (observer, interrupt);
        Err(Failure::failed("not built yet"))
    }

    /// Copies a snapshot, or a part of it, back.
    pub fn restore(
        &mut self,
        spec: RestoreSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<RestoreReport, Failure> {
        let _ = (spec, observer, interrupt);
        Err(Failure::failed("not built yet"))
    }

    /// Unmounts, sends what is left, waits for the server's fsync and releases the lock. What an
    /// operation did counts only after this has returned `Ok`. An interrupt doesn't shorten it;
    /// a second one ends everything at once.
    pub fn close(
        self,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<ClosedReport, Failure> {
        let _ = (observer, interrupt);
        Err(Failure::failed("not built yet"))
    }
}

/// Makes a container: file, header, key slots, file system. It gets its name only when it is
/// whole and durable, and never replaces one.
pub fn create(
    options: CreateOptions,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Created, Failure> {
    let _ = (options, observer, interrupt);
    Err(Failure::failed("not built yet"))
}

/// Mounts the volume at `dir` for everybody; it stays when the command ends. Reads only, unless
/// `options.access` says otherwise; then every fsync waits for the server's.
pub fn mount(
    options: SessionOptions,
    secret: &Secret,
    dir: &Path,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<ContainerFacts, Failure> {
    let _ = (options, secret, dir, observer, interrupt);
    Err(Failure::failed("not built yet"))
}

/// Unmounts `dir` and waits until its volume process has ended; returns its result.
pub fn unmount(
    runtime_dir: &Path,
    dir: &Path,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<ClosedReport, Failure> {
    let _ = (runtime_dir, dir, observer, interrupt);
    Err(Failure::failed("not built yet"))
}

pub mod volume_process {
    //! V: the hidden `volume-process` command.

    use crate::Exit;

    /// Runs V; its standard input is the control socket.
    pub fn run() -> Exit {
        Exit::Failed
    }
}

pub mod worker {
    //! W: the hidden `worker` command.

    use crate::Exit;

    /// Runs W; its standard input is the control socket.
    pub fn run() -> Exit {
        Exit::Failed
    }
}

pub mod mount_keeper {
    //! The hidden `mount-keeper` command: cleans up after a background mount.

    use crate::Exit;

    /// Runs the keeper; its standard input is V's control socket.
    pub fn run() -> Exit {
        Exit::Failed
    }
}
