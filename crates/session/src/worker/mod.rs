//! W, the hidden `worker` command: mounts in namespaces of its own, mkfs, rsync, e2fsck.
//!
//! Each order may block while the volume blocks. Then the session kills W.

pub mod mount_keeper;
pub(crate) mod readers;
mod reading;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use sprat_attach::{AttachError, AttachOptions, Attachment, CryptMapping, MountOptions};
use sprat_snapshot::{Cancel, Progress, SnapshotError, SnapshotSpec};
use sprat_volume::BLOCK_BYTES;
use zeroize::Zeroizing;

use crate::file_system::FileSystemKind;
use crate::protocol::frames::{Receiver, Sender};
use crate::protocol::messages::{WorkerOrder, WorkerReply};
use crate::protocol::reports::{Finished, Notice, VolumeRoom};
use crate::protocol::spawn::{Role, leave_signals_to_the_session, take_sockets};
use crate::{Exit, Failure};
use readers::Readers;
use reading::Reading;

/// The longest volume key: AES-256-XTS. It fits into a pipe that no process reads from yet.
const KEY_BYTES_MAX: usize = 64;
const BLOCK: u64 = BLOCK_BYTES as u64;
/// What ssh needs of this machine's mounts: names, keys, known hosts, agents.
const SSH_NEEDS: [&str; 3] = ["/etc", "/root", "/run"];

/// Runs W; its standard input is the control socket.
pub fn run() -> Exit {
    let _ = rustix::thread::set_name(Role::Worker.title());
    leave_signals_to_the_session();
    // First, before a thread is started or a file is opened: it runs this program again.
    let private = sprat_attach::enter_private_namespaces();
    converse(private, false)
}

/// Runs the keeper of a background mount: a worker in the caller's namespaces.
pub(super) fn run_keeper() -> Exit {
    let _ = rustix::thread::set_name(Role::Keeper.title());
    let _ = rustix::process::setsid();
    leave_signals_to_the_session();
    converse(Ok(()), true)
}

fn converse(private: Result<(), AttachError>, keeps_mount: bool) -> Exit {
    let Ok((control, descriptors)) = take_sockets() else {
        return Exit::Usage;
    };
    let Ok(sending) = control.try_clone() else {
        return Exit::Failed;
    };
    let events = Sender::new(sending);
    if let Err(error) = private {
        let failure = Failure::from(&error).context("can't make a mount namespace");
        let _ = events.send(&WorkerReply::Failed(failure));
        return Exit::Failed;
    }
    let cancel = Cancel::new();
    let session_is_dead = move || {
        // This process is pid 1 of its namespace: all processes and mounts of the namespace end with it. A mount
        // in the caller's namespace does not. The main thread unmounts it when it sees the end of the queue.
        if !keeps_mount {
            std::process::exit(i32::from(Exit::Failed.code()));
        }
    };
    let Ok(orders) = hear_orders(Receiver::new(control), &cancel, session_is_dead) else {
        return Exit::Failed;
    };
    let mut worker = Worker {
        events,
        descriptors,
        cancel,
        attachment: None,
        mounted: None,
        readers: None,
        file_system: FileSystemKind::DEFAULT,
        writes: false,
    };
    while let Ok(order) = orders.recv() {
        if let WorkerOrder::Keep(mount) = order {
            match worker.leave_mounted() {
                Ok(control) => {
                    worker.reply(&WorkerReply::Done);
                    return mount_keeper::keep(&mount, control);
                }
                Err(failure) => worker.reply(&WorkerReply::Failed(failure)),
            }
            continue;
        }
        let last = matches!(order, WorkerOrder::Unmount);
        match worker.obey(order) {
            Ok(Some(reply)) => worker.reply(&reply),
            Ok(None) => {}
            Err(failure) => {
                worker.reply(&WorkerReply::Failed(failure));
                continue;
            }
        }
        if last {
            return Exit::Done;
        }
    }
    worker.abandon();
    Exit::Failed
}

/// Reads orders on a thread of its own, so that a cancel arrives while rsync runs. The end of the socket stops
/// what runs. Then that thread calls `ended`.
fn hear_orders(
    mut receiver: Receiver,
    cancel: &Cancel,
    ended: impl FnOnce() + Send + 'static,
) -> std::io::Result<mpsc::Receiver<WorkerOrder>> {
    let (queue, orders) = mpsc::channel();
    let cancel = cancel.clone();
    std::thread::Builder::new()
        .name("orders".to_owned())
        .spawn(move || {
            while let Ok(Some(order)) = receiver.receive() {
                match order {
                    WorkerOrder::Cancel => cancel.cancel(),
                    WorkerOrder::CancelCurrent => cancel.cancel_current(),
                    // The one before is done: its answer was waited for.
                    order => {
                        cancel.begin_next();
                        if queue.send(order).is_err() {
                            break;
                        }
                    }
                }
            }
            cancel.cancel();
            ended();
        })?;
    Ok(orders)
}

struct Worker {
    events: Sender,
    descriptors: UnixStream,
    cancel: Cancel,
    attachment: Option<Attachment>,
    mounted: Option<PathBuf>,
    readers: Option<Readers>,
    /// What is mounted.
    file_system: FileSystemKind,
    /// It is mounted for writing.
    writes: bool,
}

/// The paths of this machine that a run of `spec` reads.
fn needed_by(spec: &SnapshotSpec) -> Vec<&Path> {
    let paths = spec
        .sources
        .iter()
        .chain(&spec.exclude_from)
        .chain(&spec.never_enter);
    let containers = spec.containers.iter().map(|container| &container.path);
    let hosts = SSH_NEEDS.iter().filter(|_| !spec.pulled.is_empty());
    let needed = paths.chain(containers).map(|path| &**path);
    needed.chain(hosts.map(Path::new)).collect()
}

/// The server shows the file system's newest super block, and older blocks behind it.
fn newest_gone(gone: &[String]) -> Failure {
    Failure::new(
        Exit::Damaged,
        format!(
            "the newest snapshot is gone, although nobody has written since this machine saw it: {}",
            gone.join(", ")
        ),
    )
    .with_hint(
        "either the server shows a mixture of a newer and an older state of the container, or its disk \
         is damaged. Check the server's disk, and search it for other copies of the file. Run `sprat \
         check --read-data` to see the damage. To continue, add --accept-older-state once: that \
         snapshot is then lost",
    )
}

impl Worker {
    fn reply(&self, reply: &WorkerReply) {
        // If the session process has ended, this one ends in a moment, too.
        if let Err(error) = self.events.send(reply)
            && error.kind() == std::io::ErrorKind::InvalidData
        {
            // The session process waits for this answer.
            let failure = Failure::failed("the worker can't answer").caused_by(&error);
            let _ = self.events.send(&WorkerReply::Failed(failure));
        }
    }

    fn obey(&mut self, order: WorkerOrder) -> Result<Option<WorkerReply>, Failure> {
        Ok(Some(match order {
            WorkerOrder::Begin => {
                self.begin()?;
                WorkerReply::Done
            }
            WorkerOrder::Attach => {
                self.attachment()?.attach_loop()?;
                WorkerReply::Done
            }
            WorkerOrder::Map(mapping) => {
                self.map(&mapping)?;
                WorkerReply::Done
            }
            WorkerOrder::MakeFileSystem {
                file_system,
                label,
                inodes,
            } => {
                let device = self.attachment()?.device().to_owned();
                file_system.make(&device, label.as_deref(), inodes)?;
                WorkerReply::Done
            }
            WorkerOrder::Mount {
                file_system,
                at,
                read_only,
                browse,
                grow,
                expected,
                remembered,
            } => {
                let dir = PathBuf::from(at);
                let mut options = MountOptions::default();
                options.read_only = read_only;
                options.browse = browse;
                options.grow = grow;
                sprat_attach::keep_only(&[&dir])?;
                file_system.mount(self.attachment()?, &dir, &options)?;
                let gone = sprat_snapshot::missing(&dir, &expected);
                self.mounted = Some(dir.clone());
                self.file_system = file_system;
                self.writes = !read_only;
                if !gone.is_empty() {
                    return Err(newest_gone(&gone));
                }
                let snapshots = sprat_snapshot::gone_without_trace(&dir, &remembered);
                if !snapshots.is_empty() {
                    self.reply(&WorkerReply::Notice(Notice::SnapshotsGone { snapshots }));
                }
                WorkerReply::Done
            }
            WorkerOrder::CheckFileSystem { file_system, at } => {
                let cancel = self.cancel.clone();
                let found = file_system.check(self.attachment()?, Path::new(&at), &cancel)?;
                WorkerReply::Checked(found)
            }
            WorkerOrder::Trim => {
                self.attachment()?.trim()?;
                WorkerReply::Done
            }
            WorkerOrder::Grow { volume_bytes } => {
                let file_system = self.file_system;
                file_system.grow(self.attachment()?, volume_bytes)?;
                WorkerReply::Done
            }
            WorkerOrder::Shrink { volume_bytes } => {
                if let Some(subvolumes) = self.file_system.subvolumes() {
                    // Their space is in use until then.
                    sprat_snapshot::finish_deletions(self.root()?, subvolumes, &self.cancel)?;
                }
                let file_system = self.file_system;
                file_system.shrink(self.attachment()?, volume_bytes)?;
                WorkerReply::Done
            }
            WorkerOrder::StageFile { job, path, first } => {
                let from = sprat_attach::receive_fd(&self.descriptors)?;
                let (root, path) = (self.root()?, Path::new(&path));
                let staged = sprat_snapshot::stage(root, &job, path, first, from, &self.cancel)?;
                WorkerReply::FileStaged(staged)
            }
            WorkerOrder::Unstage(job) => {
                sprat_snapshot::unstage(self.root()?, &job)?;
                WorkerReply::Done
            }
            WorkerOrder::TakeSnapshot(mut spec) => {
                let events = self.events.clone();
                spec.listener.send_to(move |path| {
                    let _ = events.send(&WorkerReply::Copied(path.to_owned()));
                });
                spec.page_cache.ask(sprat_attach::is_cached);
                let now = jiff::Timestamp::now();
                let cancel = self.cancel.clone();
                let root = self.root()?;
                let subvolumes = self.file_system.subvolumes();
                let taken =
                    self.reading()?
                        .with_mounts(needed_by(&spec), &spec.rsync, |events| {
                            let taken = match subvolumes {
                                Some(by) => sprat_snapshot::take_into_subvolume(
                                    root, &spec, now, by, events, &cancel,
                                ),
                                None => sprat_snapshot::take(root, &spec, now, events, &cancel),
                            };
                            match taken {
                                Err(SnapshotError::TooMuchNew { census }) => Ok(Err(census)),
                                taken => taken.map(Ok),
                            }
                        })?;
                self.warn_if_nearly_full();
                match taken {
                    Ok(report) => WorkerReply::SnapshotTaken(Box::new(report)),
                    Err(census) => WorkerReply::TooMuchNew(census),
                }
            }
            WorkerOrder::Count(spec) => {
                let (now, cancel) = (jiff::Timestamp::now(), self.cancel.clone());
                let root = self.root()?;
                let needed = needed_by(&spec);
                let census = self.reading()?.with_mounts(needed, &spec.rsync, |events| {
                    sprat_snapshot::count(root, &spec, now, events, &cancel)
                })?;
                WorkerReply::Counted(census.map(Box::new))
            }
            WorkerOrder::Prune(spec) => {
                let cancel = self.cancel.clone();
                let (root, events) = (self.root()?, &mut |progress| self.progress(progress));
                let report = match self.file_system.subvolumes() {
                    Some(by) => sprat_snapshot::prune_subvolumes(root, &spec, by, events, &cancel),
                    None => sprat_snapshot::prune(root, &spec, events, &cancel),
                }?;
                WorkerReply::Pruned(Box::new(report))
            }
            WorkerOrder::Remove(spec) => {
                let cancel = self.cancel.clone();
                let (root, events) = (self.root()?, &mut |progress| self.progress(progress));
                let report = match self.file_system.subvolumes() {
                    Some(by) => sprat_snapshot::remove_subvolumes(root, &spec, by, events, &cancel),
                    None => sprat_snapshot::remove(root, &spec, events, &cancel),
                }?;
                WorkerReply::Removed(Box::new(report))
            }
            WorkerOrder::Pin(spec) => {
                WorkerReply::Pinned(Box::new(sprat_snapshot::pin(self.root()?, &spec)?))
            }
            WorkerOrder::CheckFiles(spec) => {
                let cancel = self.cancel.clone();
                let root = self.root()?;
                // The sources stand in the volume only.
                let report = self.reading()?.with_mounts(
                    vec![Path::new("/")],
                    Path::new("/"),
                    |events| sprat_snapshot::check(root, &spec, events, &cancel),
                )?;
                WorkerReply::FilesChecked(Box::new(report))
            }
            WorkerOrder::Drill(spec) => {
                let (root, cancel) = (self.root()?, self.cancel.clone());
                // The sources stand in the volume only.
                let needed = vec![Path::new("/"), &*spec.scratch];
                let report = self
                    .reading()?
                    .with_mounts(needed, Path::new("/"), |events| {
                        sprat_snapshot::drill(root, &spec, events, &cancel)
                    })?;
                WorkerReply::Drilled(Box::new(report))
            }
            WorkerOrder::NameBlocks { blocks, suspects } => {
                let places: Vec<Range<u64>> = blocks
                    .iter()
                    .map(|block| block * BLOCK..(block + 1) * BLOCK)
                    .collect();
                let extents = self.file_system.extents(self.root()?)?;
                let found = sprat_snapshot::files_on(
                    self.root()?,
                    &places,
                    &*extents,
                    Path::new(&suspects),
                    &self.cancel,
                );
                WorkerReply::BlocksNamed(found.names, found.not_saved)
            }
            WorkerOrder::ServeReaders(facts) => {
                let listener = UnixListener::from(sprat_attach::receive_fd(&self.descriptors)?);
                let root = self.root()?.to_owned();
                let served = Readers::serve(listener, root, *facts, self.writes);
                self.readers =
                    Some(served.map_err(|error| {
                        Failure::failed("can't accept readers").caused_by(&error)
                    })?);
                WorkerReply::Done
            }
            WorkerOrder::Use { at, file_system } => {
                self.mounted = Some(PathBuf::from(at));
                self.file_system = file_system;
                WorkerReply::Done
            }
            WorkerOrder::Cancel | WorkerOrder::CancelCurrent | WorkerOrder::Keep(_) => {
                return Ok(None);
            }
            WorkerOrder::Unmount => {
                if let Some(readers) = self.readers.take() {
                    readers.end();
                }
                let room = self.room();
                let finished = self.finished();
                self.mounted = None;
                if let Some(attachment) = self.attachment.take() {
                    attachment.unmount()?;
                }
                WorkerReply::Unmounted(room, finished)
            }
            order => return self.reading()?.answer(order),
        }))
    }

    /// For orders that only read.
    fn reading(&self) -> Result<Reading<'_>, Failure> {
        Ok(Reading {
            root: self.root()?,
            events: &self.events,
            descriptors: &self.descriptors,
            cancel: &self.cancel,
            file_system: self.file_system,
        })
    }

    /// Warns if the volume is nearly full.
    fn warn_if_nearly_full(&self) {
        if let Some(room) = self.room()
            && room.is_low()
        {
            self.reply(&WorkerReply::Notice(Notice::VolumeSpaceLow {
                available_bytes: room.available_bytes,
                inodes: room.files_left(),
                metadata_bytes: room.metadata.map(|metadata| metadata.available_bytes),
            }));
        }
    }

    /// The finished snapshots of each job, of a volume that was written to. `None`: not known.
    fn finished(&self) -> Option<Finished> {
        let root = self.mounted.as_deref().filter(|_| self.writes)?;
        sprat_snapshot::finished(root).ok()
    }

    /// What is left in the mounted volume. Needs only the kernel's memory, no read from the server.
    fn room(&self) -> Option<VolumeRoom> {
        self.file_system.room(self.mounted.as_deref()?)
    }

    fn progress(&self, progress: Progress) {
        self.reply(&WorkerReply::Progress(progress));
    }

    /// Mounts FUSE and sends its descriptor away. Only the volume process may have it open, or the kernel
    /// would not notice the death of that process.
    fn begin(&mut self) -> Result<(), Failure> {
        let fuse = sprat_attach::open_fuse()?;
        let attachment = Attachment::begin(fuse.as_fd(), AttachOptions::default())?;
        sprat_attach::send_fd(&self.descriptors, fuse.as_fd())?;
        drop(fuse);
        self.attachment = Some(attachment);
        Ok(())
    }

    /// Receives the volume key. Keeps it only until dm-crypt has it.
    fn map(&mut self, mapping: &CryptMapping) -> Result<(), Failure> {
        // Each is best effort, as in the volume process.
        let _ = sprat_attach::hide_from_debuggers();
        let _ = sprat_attach::lock_memory();
        let pipe = sprat_attach::receive_fd(&self.descriptors)?;
        let mut key = Zeroizing::new(Vec::with_capacity(KEY_BYTES_MAX + 1));
        File::from(pipe)
            .take(KEY_BYTES_MAX as u64)
            .read_to_end(&mut key)
            .map_err(|error| Failure::failed("can't read the volume key").caused_by(&error))?;
        self.attachment()?.map(mapping, &key)?;
        Ok(())
    }

    /// The session ended before the mount went on in the background. Unmounts it, dead or alive.
    fn abandon(&mut self) {
        let dir = self.mounted.take();
        let unmounted = match self.attachment.take() {
            Some(attachment) => attachment.unmount().is_ok(),
            None => true,
        };
        if let (false, Some(dir)) = (unmounted, dir) {
            let _ = sprat_attach::unmount_dead(&dir);
        }
    }

    /// The mount stays. The session sends the volume process's control socket.
    fn leave_mounted(&mut self) -> Result<OwnedFd, Failure> {
        let control = sprat_attach::receive_fd(&self.descriptors)?;
        if let Some(attachment) = self.attachment.take() {
            attachment.leave_mounted()?;
        }
        Ok(control)
    }

    fn attachment(&mut self) -> Result<&mut Attachment, Failure> {
        self.attachment
            .as_mut()
            .ok_or_else(|| Failure::failed("the worker was ordered out of turn: not attached"))
    }

    fn root(&self) -> Result<&Path, Failure> {
        self.mounted
            .as_deref()
            .ok_or_else(|| Failure::failed("the worker was ordered out of turn: not mounted"))
    }
}
