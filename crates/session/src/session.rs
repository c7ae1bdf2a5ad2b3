//! An open container as a command uses it: operations on the mounted volume, and the end.

pub mod check;
pub mod drill;
pub(crate) mod inside;
pub mod preview;

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sprat_luks::Secret;
use sprat_snapshot::{
    Census, ExportReport, ExportSpec, FileListener, JobName, LocalContainer, NameList, PinReport,
    PinSpec, PruneReport, PruneSpec, RemoveReport, RemoveSpec, RestoreReport, RestoreSpec,
    SnapshotEntry, SnapshotError, SnapshotReport, SnapshotSpec, StagedFile,
};
use sprat_store::unattended;

use crate::address::Target;
use crate::beside::{self, Beside, Opening, ReaderSocket};
use crate::file_system::FileSystemCheck;
use crate::files::make_private_folder;
use crate::interrupt::Interrupt;
use crate::protocol::messages::WorkerOrder;
use crate::protocol::reports::{ClosedReport, ContainerFacts, Notice, Observer, Phase};
use crate::protocol::spawn::Role;
use crate::settings::{Access, SessionSettings};
use crate::state::paths::{self, StatePaths};
use crate::state::{KnownState, identity, reserved_names};
use crate::supervisor::calls::Answer;
use crate::supervisor::{Shape, Supervisor, Watch};
use crate::{Exit, Failure, text};

/// How long a pulled host may take to answer.
const HOST_TIMEOUT: Duration = Duration::from_secs(30);

/// An open container with its file system mounted where only the worker sees it.
///
/// Whatever an operation returned, [`Session::close`] ends the session; dropping it instead stops
/// everything at once, as a crash does. To be used on the thread that opened it, which must live
/// as long as the session: the kernel ends the other processes with it.
#[derive(Debug)]
pub struct Session {
    via: Via,
    facts: ContainerFacts,
    settings: SessionSettings,
    too_much: Option<Census>,
    /// Dropped last: until then, other commands that want to read wait.
    readers: Option<ReaderSocket>,
}

/// Who carries out the orders.
#[derive(Debug)]
enum Via {
    /// Processes of its own.
    Own(Box<Supervisor>),
    /// This machine has the container open already. With the secret: the other session may end first.
    Beside(Box<Beside>, Secret),
}

impl Session {
    /// Opens the container and mounts its volume. A session that only reads uses the one that this machine has
    /// open already, or its mount.
    pub fn open(
        settings: SessionSettings,
        secret: &Secret,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let begun = Instant::now();
        loop {
            let mut watch = Watch::new(observer, interrupt);
            if let Some((beside, facts)) = Beside::find(&settings, &mut watch)? {
                tracing::info!(target = %settings.target, "reads through an open session or mount");
                observer.phase(Phase::Working);
                return Ok(Self {
                    via: Via::Beside(Box::new(beside), secret.clone()),
                    facts,
                    settings,
                    too_much: None,
                    readers: None,
                });
            }
            let opening = Opening::announce(&settings);
            let opened = Self::open_own(settings.clone(), secret, observer, interrupt);
            drop(opening);
            match opened {
                // Another command opened it a moment earlier.
                Err(failure)
                    if failure.exit == Exit::Locked
                        && begun.elapsed() < beside::READER_WAITS
                        && beside::may_accept(&settings) => {}
                opened => return opened,
            }
        }
    }

    /// As [`Self::open`], never through another session.
    fn open_own(
        settings: SessionSettings,
        secret: &Secret,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        let mut session = Self::attach(settings, secret, observer, interrupt)?;
        let mut watch = Watch::new(observer, interrupt);
        let purpose = match session.settings.access {
            Access::ReadOnly => MountFor::Reading,
            Access::ReadWrite => MountFor::Writing,
        };
        mount_privately(session.via.own()?, &session.settings, purpose, &mut watch)?;
        session.serve_readers(&mut watch);
        if interrupt.requested() {
            session.close(observer, interrupt)?;
            return Err(Failure::interrupted().with_hint("nothing was changed"));
        }
        tracing::info!(target = %session.settings.target, "session opened");
        observer.phase(Phase::Working);
        if session.settings.access == Access::ReadOnly {
            session.name_overwritten(observer, interrupt)?;
        }
        Ok(session)
    }

    /// Has the worker check the file system of the attached device.
    fn check_attached(
        &mut self,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<FileSystemCheck, Failure> {
        observer.phase(Phase::Working);
        let at = self.settings.runtime_dir.join("volume");
        make_private_folder(&at)?;
        let order = WorkerOrder::CheckFileSystem {
            file_system: self.facts.file_system,
            at: OsString::from(at),
        };
        self.ask(&order, observer, interrupt)
    }

    /// Opens the container and attaches its volume as a block device, without mounting it.
    fn attach(
        settings: SessionSettings,
        secret: &Secret,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Self, Failure> {
        drill::empty_left(&settings.cache_dir);
        let mut watch = Watch::new(observer, interrupt);
        let access = settings.access;
        let untouched = |failure: Failure| {
            match (failure.exit, access, &failure.hint) {
            (Exit::Interrupted, Access::ReadOnly, None) => failure.with_hint("nothing was changed"),
            // A server that stands still lets nobody give the lease back either.
            (Exit::Interrupted, Access::ReadWrite, None) => failure.with_hint(
                "no data was changed. If sprat had locked the container already, the lock may stay: the \
                 next session on this machine takes it over",
            ),
            _ => failure,
        }
        };
        let (mut supervisor, facts) =
            Supervisor::start(&settings, Shape::Session, &[secret], &mut watch)
                .map_err(untouched)?;
        supervisor
            .attach(Role::Worker, &mut watch)
            .map_err(untouched)?;
        Ok(Self {
            via: Via::Own(Box::new(supervisor)),
            facts,
            settings,
            too_much: None,
            readers: None,
        })
    }

    /// Lets other commands of this machine read through this session. Without it they wait for its end.
    fn serve_readers(&mut self, watch: &mut Watch<'_>) {
        let served = ReaderSocket::bind(&self.settings).and_then(|socket| {
            self.via.give_worker(socket.as_fd())?;
            let facts = Box::new(self.facts.clone());
            self.via
                .call::<()>(&WorkerOrder::ServeReaders(facts), watch)?;
            Ok(socket)
        });
        match served {
            Ok(socket) => self.readers = Some(socket),
            Err(failure) => {
                tracing::warn!(failure = failure.in_one_line(), "can't serve readers");
            }
        }
    }

    /// What was found at the target; the caller pins it where nothing was pinned.
    #[must_use]
    pub fn facts(&self) -> &ContainerFacts {
        &self.facts
    }

    /// Takes a snapshot. After an interrupt the volume holds a `.partial`, and the error is
    /// [`Exit::Interrupted`](crate::Exit). The container itself, sprat's own files beside it and
    /// its own folders never enter a snapshot.
    pub fn take_snapshot(
        &mut self,
        mut spec: SnapshotSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<SnapshotReport, Failure> {
        exclude_own(&self.settings, &mut spec);
        without_questions(&mut spec);
        spec.suspects = Some(self.suspects());
        spec.blocks = Some(self.state_paths().blocks(spec.job.as_str()));
        spec.listener = FileListener::new(observer.wants_files());
        self.too_much = None;
        let order = WorkerOrder::TakeSnapshot(Box::new(spec));
        let taken: Result<SnapshotReport, Box<Census>> = self.ask(&order, observer, interrupt)?;
        taken.map_err(|census| {
            self.too_much = Some((*census).clone());
            Failure::from(SnapshotError::TooMuchNew { census })
        })
    }

    /// Why the last [`Self::take_snapshot`] copied nothing, if it was because of
    /// [`CensusSpec::stop_over_bytes`](sprat_snapshot::CensusSpec).
    pub fn too_much(&mut self) -> Option<Census> {
        self.too_much.take()
    }

    /// Counts what is new in the sources, as [`Self::take_snapshot`] does before it copies. `None`: they can't
    /// be walked.
    pub fn count_new(
        &mut self,
        mut spec: SnapshotSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Option<Census>, Failure> {
        exclude_own(&self.settings, &mut spec);
        without_questions(&mut spec);
        self.ask(&WorkerOrder::Count(Box::new(spec)), observer, interrupt)
    }

    /// Writes a file's content for the job's next snapshot, up to the end of `content`. With `first`, removes
    /// what waits for that snapshot. The content counts only if [`SnapshotSpec::staged`] names it.
    pub fn stage_file(
        &mut self,
        job: &JobName,
        path: &Path,
        first: bool,
        content: OwnedFd,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<StagedFile, Failure> {
        interrupt.check()?;
        self.via.give_worker(content.as_fd())?;
        // Only W has it now: when W is gone, the next write to the pipe fails.
        drop(content);
        let order = WorkerOrder::StageFile {
            job: job.clone(),
            path: path.into(),
            first,
        };
        self.ask(&order, observer, interrupt)
    }

    /// Removes what waits for the job's next snapshot.
    pub fn unstage(
        &mut self,
        job: &JobName,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<(), Failure> {
        self.ask(&WorkerOrder::Unstage(job.clone()), observer, interrupt)
    }

    /// The list that checks keep of files whose content is wrong.
    fn suspects(&self) -> PathBuf {
        self.state_paths().file(paths::CHECKS, paths::SUSPECTS)
    }

    fn state_paths(&self) -> StatePaths {
        let settings = &self.settings;
        StatePaths::new(&settings.state_dir, &self.facts.uuid, &settings.target)
    }

    /// Names the files in blocks that were overwritten late. Once that is noted, sessions that write
    /// go on, and read those files from their source. `None` where nothing was overwritten.
    fn name_overwritten(
        &mut self,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Option<NameList>, Failure> {
        if self.facts.overwritten.is_empty() {
            return Ok(None);
        }
        let blocks = self.facts.overwritten.clone();
        let order = WorkerOrder::NameBlocks {
            blocks: blocks.clone(),
            suspects: self.suspects().into_os_string(),
        };
        let (names, not_saved): (NameList, _) = self.ask(&order, observer, interrupt)?;
        interrupt.check()?;
        let noted = match not_saved {
            Some(reason) => Err(reason),
            None => {
                let paths = self.state_paths();
                KnownState::load(&paths)
                    .name_overwritten(&paths, &blocks)
                    .map_err(|failure| failure.in_one_line())
            }
        };
        if let Err(reason) = noted {
            observer.notice(Notice::NotNoted { reason });
        }
        observer.notice(Notice::Overwritten {
            blocks: blocks.len() as u64,
            files: names.names.clone(),
        });
        Ok(Some(names))
    }

    /// Lists the snapshots of all jobs.
    pub fn snapshots(
        &mut self,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Vec<SnapshotEntry>, Failure> {
        self.ask(&WorkerOrder::List, observer, interrupt)
    }

    /// Copies a snapshot, or a part of it, back. What never enters a snapshot stays as it is.
    pub fn restore(
        &mut self,
        spec: RestoreSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<RestoreReport, Failure> {
        self.restore_matching(spec, Vec::new(), observer, interrupt)
    }

    /// As [`Self::restore`], of the paths that match one of the patterns; without one, of all.
    pub fn restore_matching(
        &mut self,
        mut spec: RestoreSpec,
        patterns: Vec<String>,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<RestoreReport, Failure> {
        spec.never_enter.extend(own_folders(&self.settings));
        // What is known of locks, keys and headers now is newer than what any snapshot has.
        spec.never_enter
            .push(self.settings.machine_state_dir().to_owned());
        spec.containers = local_containers(&self.settings);
        spec.suspects = Some(self.suspects());
        spec.change_lists = Some(self.state_paths().change_lists());
        let order = WorkerOrder::Restore(Box::new(spec), patterns);
        self.ask(&order, observer, interrupt)
    }

    /// Exports snapshots to a folder of this machine.
    pub fn export(
        &mut self,
        mut spec: ExportSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<ExportReport, Failure> {
        spec.suspects = Some(self.suspects());
        self.ask(&WorkerOrder::Export(Box::new(spec)), observer, interrupt)
    }

    /// Removes the snapshots of a job that no rule keeps.
    pub fn prune(
        &mut self,
        mut spec: PruneSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<PruneReport, Failure> {
        spec.suspects = Some(self.suspects());
        self.ask(&WorkerOrder::Prune(Box::new(spec)), observer, interrupt)
    }

    /// Removes the snapshots that are named.
    pub fn remove(
        &mut self,
        mut spec: RemoveSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<RemoveReport, Failure> {
        spec.suspects = Some(self.suspects());
        if !spec.dry_run {
            // If this session does not end in order, the next one must not miss them. The newest one may be
            // incomplete, and then no option is needed to remove it.
            let paths = self.state_paths();
            KnownState::load(&paths).forget_newest(&paths)?;
        }
        self.ask(&WorkerOrder::Remove(Box::new(spec)), observer, interrupt)
    }

    /// Pins or unpins a snapshot.
    pub fn pin(
        &mut self,
        spec: PinSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<PinReport, Failure> {
        self.ask(&WorkerOrder::Pin(Box::new(spec)), observer, interrupt)
    }

    fn ask<T: Answer>(
        &mut self,
        order: &WorkerOrder,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<T, Failure> {
        interrupt.check()?;
        let answer = self.call(order, observer, interrupt);
        answer.map_err(|mut failure| {
            if let (Exit::Interrupted, false, Some(available_bytes)) = (
                failure.exit,
                interrupt.requested(),
                self.via.stopped_for_room(),
            ) {
                return no_room(available_bytes);
            }
            // rsync may have got the same signal and have failed of it by itself.
            if interrupt.requested() {
                failure.exit = Exit::Interrupted;
            }
            failure
        })
    }

    /// Sends an order and waits for its answer. If the session through which this one reads ends or refuses the
    /// order, the container is opened once more, and the order is sent again.
    fn call<T: Answer>(
        &mut self,
        order: &WorkerOrder,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<T, Failure> {
        let mut waits_since = Instant::now();
        loop {
            let begun = Instant::now();
            let answer = self.via.call(order, &mut Watch::new(observer, interrupt));
            if begun.elapsed() > beside::READER_WAITS {
                // That was work.
                waits_since = Instant::now();
            }
            let is_locked = matches!(&answer, Err(failure) if failure.exit == Exit::Locked);
            let secret = match &self.via {
                Via::Beside(beside, secret) if is_locked && may_repeat(beside, order) => {
                    secret.clone()
                }
                _ => return answer,
            };
            if waits_since.elapsed() > beside::READER_WAITS || interrupt.requested() {
                return answer;
            }
            tracing::info!("the session through which this one read has ended or refused");
            std::thread::sleep(beside::INTERVAL);
            *self = Self::open(self.settings.clone(), &secret, observer, interrupt)?;
        }
    }

    /// Unmounts, sends what is left, waits for the server's fsync and releases the lock. What an
    /// operation did counts only after this has returned `Ok`. An interrupt doesn't shorten it;
    /// a second one ends everything at once, and so does one while the line is down.
    pub fn close(
        self,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<ClosedReport, Failure> {
        let mut watch = Watch::new(observer, interrupt);
        let Via::Own(mut supervisor) = self.via else {
            return Ok(ClosedReport::default());
        };
        supervisor.detach(&mut watch)?;
        let closed = supervisor.close(&mut watch)?;
        supervisor.finish();
        tracing::info!(durable = closed.durable, "session closed");
        Ok(closed)
    }
}

/// Whether `order`, which the other session did not carry out because it ended or refused, may be sent again.
fn may_repeat(beside: &Beside, order: &WorkerOrder) -> bool {
    match order {
        WorkerOrder::List
        | WorkerOrder::ListFolder(_)
        | WorkerOrder::Find(_)
        | WorkerOrder::Versions(_)
        | WorkerOrder::Diff(_)
        | WorkerOrder::Analyze(_)
        | WorkerOrder::Size(_) => true,
        // Nothing of it was done. Otherwise its snapshot may no longer be the latest one.
        WorkerOrder::Restore(..) | WorkerOrder::Export(_) => beside.only_reads,
        // The others need a descriptor, which the other session has, or are never sent to one.
        _ => false,
    }
}

impl Via {
    fn own(&mut self) -> Result<&mut Supervisor, Failure> {
        match self {
            Self::Own(supervisor) => Ok(supervisor),
            Self::Beside(..) => Err(Failure::failed("internal error: a reader has no processes")),
        }
    }

    fn call<T: Answer>(
        &mut self,
        order: &WorkerOrder,
        watch: &mut Watch<'_>,
    ) -> Result<T, Failure> {
        match self {
            Self::Own(supervisor) => supervisor.call(order, watch),
            Self::Beside(beside, _) => beside.call(order, watch),
        }
    }

    /// Sends a descriptor, for the order that follows.
    fn give_worker(&self, descriptor: BorrowedFd<'_>) -> Result<(), Failure> {
        match self {
            Self::Own(supervisor) => supervisor.give_worker(descriptor),
            Self::Beside(beside, _) => beside.give(descriptor),
        }
    }

    fn stopped_for_room(&self) -> Option<u64> {
        match self {
            Self::Own(supervisor) => supervisor.stopped_for_room(),
            Self::Beside(..) => None,
        }
    }
}

/// Excludes from a snapshot what must never be in one: the container, and sprat's own files.
fn exclude_own(settings: &SessionSettings, spec: &mut SnapshotSpec) {
    spec.never_enter.extend(never_backed_up(settings));
    spec.containers = local_containers(settings);
}

/// Makes ssh reach the hosts of a job without a person. A host with another key than the one that is known
/// is not reached.
pub(crate) fn without_questions(spec: &mut SnapshotSpec) {
    let words: Vec<OsString> = spec.ssh_command.iter().map(OsString::from).collect();
    let mut words = unattended(&words, HOST_TIMEOUT);
    words.extend(["-o", "StrictHostKeyChecking=yes", "-o", "LogLevel=ERROR"].map(OsString::from));
    let words = words.into_iter().map(OsString::into_string);
    spec.ssh_command = words.filter_map(Result::ok).collect();
}

/// What never enters a snapshot.
fn never_backed_up(settings: &SessionSettings) -> Vec<PathBuf> {
    let mut folders = own_folders(settings).to_vec();
    // What a session notes of its lock is of no use later, and untrue. The hashes of large files change with each run,
    // and can be made again.
    folders.extend(["locks", paths::BLOCKS].map(|name| settings.state_dir.join(name)));
    folders
}

/// sprat's folders of which nothing is worth a backup, and which a running session needs.
fn own_folders(settings: &SessionSettings) -> [PathBuf; 2] {
    [settings.runtime_dir.clone(), settings.cache_dir.clone()]
}

/// The containers on this machine, which may lie in a source or a destination: this one, those of the
/// config, and those that this machine knows.
fn local_containers(settings: &SessionSettings) -> Vec<LocalContainer> {
    let named = [&settings.target].into_iter().chain(&settings.containers);
    let mut paths: Vec<PathBuf> = named.filter_map(Target::local_path).collect();
    paths.extend(identity::local_containers(settings.machine_state_dir()));
    paths.sort();
    paths.dedup();
    let endings = reserved_names::endings();
    let local = paths.into_iter().map(|path| LocalContainer {
        path,
        endings: endings.clone(),
    });
    local.collect()
}

/// The session ended in order before the server's disk was full.
fn no_room(available_bytes: u64) -> Failure {
    let available = text::bytes(available_bytes);
    Failure::failed(format!(
        "stopped safely: the server has only {available} of free space, which the unsent data may need"
    ))
    .with_hint(
        "finished snapshots are unharmed, and what was copied is kept. Free space on the server, or run \
         `sprat prune` and `sprat trim`. Then run the same command again: it continues where it stopped",
    )
    .for_lack_of_room(true)
}

/// What a private mount is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MountFor {
    Reading,
    Writing,
    /// Writing, and inode tables of new groups are written at leisure.
    Growing,
}

/// Mounts the volume where only the session's own processes see it. An interrupt waits until it is
/// mounted.
pub(crate) fn mount_privately(
    supervisor: &mut Supervisor,
    settings: &SessionSettings,
    purpose: MountFor,
    watch: &mut Watch<'_>,
) -> Result<(), Failure> {
    let at = settings.runtime_dir.join("volume");
    make_private_folder(&at)?;
    let order = WorkerOrder::Mount {
        file_system: supervisor.file_system,
        at: OsString::from(at),
        read_only: purpose == MountFor::Reading,
        browse: false,
        grow: purpose == MountFor::Growing,
        expected: supervisor.expected.clone(),
        remembered: supervisor.remembered.clone(),
    };
    supervisor.call::<()>(&order, watch)?;
    supervisor.may_send();
    Ok(())
}

/// Replays the journal and checks every structure of the file system, without mounting it. With
/// a read-only `access` nothing of it reaches the server.
pub fn check_file_system(
    settings: SessionSettings,
    secret: &Secret,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<FileSystemCheck, Failure> {
    let mut session = Session::attach(settings, secret, observer, interrupt)?;
    let check = session.check_attached(observer, interrupt);
    session.close(observer, interrupt)?;
    check
}
