//! S drives the processes of a session. While it waits for one, it watches all of them, and the
//! interrupt.

pub(crate) mod background;
pub(crate) mod calls;
pub(crate) mod create;
pub(crate) mod keys;
pub(crate) mod mount;
pub(crate) mod reserves;
pub(crate) mod resize;
mod teardown;
pub(crate) mod trim;
pub(crate) mod unlock;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use sprat_luks::{OpenedBy, Secret};

use crate::file_system::FileSystemKind;
use crate::interrupt::Interrupt;
use crate::protocol::messages::{
    AbortReport, ChangeStart, CreateStart, VolumeOrder, VolumeReply, VolumeStart, WorkerOrder,
    WorkerReply,
};
use crate::protocol::reports::{
    ClosedReport, ContainerFacts, Finished, HeaderChanged, Newest, Notice, Observer, Phase,
    SessionProgress, VolumeRoom,
};
use crate::protocol::spawn::{Child, Role};
use crate::settings::{Access, SessionSettings};
use crate::state::history::History;
use crate::state::journal::journal_id;
use crate::state::paths::StatePaths;
use crate::supervisor::calls::{Answer, OnInterrupt, Order, Reply};
use crate::{Exit, Failure};

pub use crate::supervisor::reserves::make_reserves;

/// How long the orderly end may take after the first interrupt. Then everything is torn down. The next
/// run sends what is not on the server by then.
const ORDERLY_LIMIT: Duration = Duration::from_secs(7);

/// How long a killed process may take to end.
const DEATH_LIMIT: Duration = Duration::from_secs(20);

/// If the worker fails because the volume failed, the volume's own failure arrives within this time.
const VOLUME_WORD_LIMIT: Duration = Duration::from_secs(1);

/// If the connection has been down for so long, an interrupt no longer waits for it.
const DOWN_MS_MAX: u64 = 3000;

/// What it means that a session ended before everything was sent.
const LEFT_OUT: &str = "finished snapshots are unharmed. Data that was not yet on the server is lost; \
                        the next run sends it again";

/// What arrives in S.
enum Event {
    Volume(Option<VolumeReply>),
    /// From the worker with that number. Messages of an earlier worker may arrive late, its end, too.
    Worker(u32, Option<WorkerReply>),
    /// An order could not be sent, so its reply never arrives.
    Unsent(Failure),
    Interrupt,
}

/// Receives reports, and can interrupt, while S waits.
pub(crate) struct Watch<'a> {
    pub observer: &'a mut dyn Observer,
    pub interrupt: &'a Interrupt,
}

impl<'a> Watch<'a> {
    pub(crate) fn new(observer: &'a mut dyn Observer, interrupt: &'a Interrupt) -> Self {
        Self {
            observer,
            interrupt,
        }
    }
}

/// V, and W once there is one.
pub(crate) struct Supervisor {
    program: PathBuf,
    /// The container's journal: this machine has it open once.
    container: String,
    /// The container as `ps` shows it.
    shown_name: String,
    volume: Child,
    worker: Option<Child>,
    opened_by: OpenedBy,
    worker_number: u32,
    queue: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    progress: SessionProgress,
    /// Their control sockets have ended.
    volume_gone: bool,
    worker_gone: bool,
    /// The interrupt of the order under way, if S acted on it.
    interrupted: Option<Interrupt>,
    /// The server was asked to give a new container its name.
    naming: bool,
    /// The server's space runs out: how much is left, and whether S has acted on that.
    room: Option<(u64, bool)>,
    /// Everything is torn down, because of this.
    over: Option<Failure>,
    aborted: AbortReport,
    /// What was left in the volume when it was unmounted, and the finished snapshots of each job.
    unmounted: (Option<VolumeRoom>, Option<Finished>),
    /// It is closed, and V waits for the order to make the reserve.
    reserve_missing: bool,
    /// The snapshots that must be there when the volume is mounted.
    pub(crate) expected: Newest,
    /// The snapshots whose absence is reported when the volume is mounted.
    pub(crate) remembered: Newest,
    /// Those that were absent. `None`: this could not be noted.
    gone: Option<Vec<String>>,
    /// This machine's state about the container.
    state: Option<StatePaths>,
    /// The kind of file system in the volume.
    pub(crate) file_system: FileSystemKind,
}

impl std::fmt::Debug for Supervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Supervisor")
            .field("volume", &self.volume)
            .field("worker", &self.worker)
            .field("over", &self.over)
            .finish_non_exhaustive()
    }
}

impl Supervisor {
    /// Starts V and waits until the container is open.
    pub(crate) fn start(
        settings: &SessionSettings,
        shape: Shape,
        secrets: &[&Secret],
        watch: &mut Watch<'_>,
    ) -> Result<(Self, ContainerFacts), Failure> {
        let mut supervisor = Self::launch(settings, shape, secrets, watch)?;
        let facts: ContainerFacts = supervisor.wait(watch, OnInterrupt::GiveUp)?;
        supervisor.expected.clone_from(&facts.newest_known);
        supervisor.remembered.clone_from(&facts.newest_remembered);
        // What a person accepts is not noted.
        supervisor.state = (!settings.accept_older_state)
            .then(|| StatePaths::new(&settings.state_dir, &facts.uuid, &settings.target));
        supervisor.file_system = facts.file_system;
        Ok((supervisor, facts))
    }

    /// Starts V and sends it the start order.
    fn launch(
        settings: &SessionSettings,
        shape: Shape,
        secrets: &[&Secret],
        watch: &mut Watch<'_>,
    ) -> Result<Self, Failure> {
        watch.interrupt.check()?;
        let opened_by = settings.mode.opened_by()?;
        let container = journal_id(&settings.target);
        reserves::give_way(&container);
        let (queue, events) = mpsc::channel();
        let role = match shape {
            Shape::Session | Shape::Create(_) | Shape::Change(_) | Shape::Grow(_) => Role::Volume,
            Shape::Background => Role::BackgroundVolume,
        };
        let hears = queue.clone();
        let shown_name = settings.target.shown_name();
        let volume = Child::spawn(&settings.program, role, &shown_name, move |reply| {
            let _ = hears.send(Event::Volume(reply));
        })?;
        let wakes = queue.clone();
        watch.interrupt.on_request(move |_| {
            let _ = wakes.send(Event::Interrupt);
        });
        let start = start_order(settings, opened_by, shape, secrets.len());
        let supervisor = Self {
            program: settings.program.clone(),
            container,
            shown_name,
            volume,
            worker: None,
            opened_by,
            worker_number: 0,
            queue,
            events,
            progress: SessionProgress::default(),
            volume_gone: false,
            worker_gone: false,
            interrupted: None,
            naming: false,
            room: None,
            over: None,
            aborted: AbortReport::default(),
            unmounted: (None, None),
            reserve_missing: false,
            expected: Newest::new(),
            remembered: Newest::new(),
            gone: Some(Vec::new()),
            state: None,
            file_system: FileSystemKind::DEFAULT,
        };
        // A failure drops `supervisor`, which ends V.
        supervisor
            .volume
            .send(&VolumeOrder::Start(Box::new(start)))?;
        for secret in secrets {
            supervisor.volume.send_secret(secret.expose())?;
        }
        Ok(supervisor)
    }

    /// Has V change the header; it ends by itself.
    pub(crate) fn change(
        settings: &SessionSettings,
        change: ChangeStart,
        secrets: &[&Secret],
        watch: &mut Watch<'_>,
    ) -> Result<HeaderChanged, Failure> {
        let mut supervisor = Self::launch(settings, Shape::Change(change), secrets, watch)?;
        let changed = supervisor.wait(watch, OnInterrupt::Ask);
        // If V has nothing to release yet, it ends at once, without a reply.
        let ended_at_once = supervisor.interrupted.is_some() && supervisor.volume_gone;
        let changed = changed.map_err(|failure| match ended_at_once {
            true => Failure::interrupted(),
            false => failure,
        })?;
        if !supervisor.volume.wait(DEATH_LIMIT) {
            supervisor.volume.kill();
        }
        supervisor.over = Some(Failure::failed("the session is closed"));
        Ok(changed)
    }

    /// Starts W (or the keeper), mounts FUSE in it, has V serve it, and attaches the loop device.
    pub(crate) fn attach(&mut self, role: Role, watch: &mut Watch<'_>) -> Result<(), Failure> {
        watch.observer.phase(Phase::Mounting);
        let hears = self.queue.clone();
        self.worker_number += 1;
        let number = self.worker_number;
        let worker = Child::spawn(&self.program, role, &self.shown_name, move |reply| {
            let _ = hears.send(Event::Worker(number, reply));
        });
        self.worker = Some(worker.map_err(|failure| self.fail(failure))?);
        self.call::<()>(&WorkerOrder::Begin, watch)?;
        self.hand_over_fuse()
            .map_err(|failure| self.fail(failure))?;
        self.call::<()>(&VolumeOrder::Serve, watch)?;
        self.call::<()>(&WorkerOrder::Attach, watch)?;
        if self.opened_by == OpenedBy::Kernel {
            self.map(watch)?;
        }
        Ok(())
    }

    /// The volume key goes from V to W, which hands it to dm-crypt. This process only passes the pipe on.
    /// V can't do it: a process that waits for a device which it serves itself can't be killed.
    fn map(&mut self, watch: &mut Watch<'_>) -> Result<(), Failure> {
        let mapping = self.call(&VolumeOrder::GiveKey, watch)?;
        self.hand_over_key().map_err(|failure| self.fail(failure))?;
        self.call(&WorkerOrder::Map(mapping), watch)
    }

    fn hand_over_key(&self) -> Result<(), Failure> {
        let key = sprat_attach::receive_fd(self.volume.descriptors())?;
        if let Some(worker) = &self.worker {
            sprat_attach::send_fd(worker.descriptors(), key.as_fd())?;
        }
        Ok(())
    }

    /// Sends a descriptor to W, for the order that follows.
    pub(crate) fn give_worker(&self, descriptor: BorrowedFd<'_>) -> Result<(), Failure> {
        let Some(worker) = &self.worker else {
            return Err(Failure::failed("there is no worker"));
        };
        sprat_attach::send_fd(worker.descriptors(), descriptor)?;
        Ok(())
    }

    /// Closes this process's copy: only V may have it open.
    fn hand_over_fuse(&mut self) -> Result<(), Failure> {
        let worker = self
            .worker
            .as_ref()
            .ok_or_else(|| Failure::failed("there is no worker"))?;
        let fuse = sprat_attach::receive_fd(worker.descriptors())?;
        sprat_attach::send_fd(self.volume.descriptors(), fuse.as_fd())?;
        Ok(())
    }

    /// Sends an order. If it can't be sent, the wait for its reply fails.
    pub(crate) fn order<O: Order>(&self, order: &O) {
        if let Some(child) = O::recipient(&self.volume, self.worker.as_ref())
            && let Err(failure) = child.send(order)
        {
            // The receiver lives as long as this does.
            let _ = self.queue.send(Event::Unsent(failure));
        }
    }

    /// Sends an order and waits for its reply, as [`Self::wait`].
    pub(crate) fn call<T: Answer>(
        &mut self,
        order: &impl Order,
        watch: &mut Watch<'_>,
    ) -> Result<T, Failure> {
        self.order(order);
        self.wait(watch, order.on_interrupt())
    }

    /// Whether everything is torn down, or closed: each call fails.
    pub(crate) fn is_over(&self) -> bool {
        self.over.is_some()
    }

    /// V, for what only background mounts need.
    pub(crate) fn volume(&self) -> &Child {
        &self.volume
    }

    /// W or the keeper.
    pub(crate) fn worker(&self) -> Option<&Child> {
        self.worker.as_ref()
    }

    /// Waits for a reply that carries a `T`. A failure of the worker leaves the session open. Any other
    /// failure ends the session, and every later call returns the same failure.
    fn wait<T: Answer>(
        &mut self,
        watch: &mut Watch<'_>,
        on_interrupt: OnInterrupt,
    ) -> Result<T, Failure> {
        if let Some(failure) = &self.over {
            return Err(failure.clone());
        }
        // An interrupt of one order does not end the next one.
        if !watch.interrupt.requested() {
            self.interrupted = None;
        }
        loop {
            self.heed_interrupt(watch, on_interrupt)?;
            self.heed_room(watch, on_interrupt);
            // An interrupt wakes this wait. The limit is for the check of the connection.
            let event = match self.events.recv_timeout(Duration::from_secs(1)) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.fail(Failure::failed(
                        "internal error: both helper processes closed their channels",
                    )));
                }
            };
            let reply = match event {
                Event::Interrupt => continue,
                Event::Unsent(failure) => return Err(self.fail(failure)),
                Event::Volume(None) => return Err(self.volume_died()),
                Event::Worker(number, _) if number != self.worker_number => continue,
                Event::Worker(_, None) if self.worker.is_none() => continue,
                Event::Worker(_, None) => return Err(self.worker_died()),
                Event::Volume(Some(reply)) => match self.pass_on(reply, watch) {
                    Some(VolumeReply::Failed(failure)) => return Err(self.fail(failure)),
                    Some(reply) => Reply::Volume(reply),
                    None => continue,
                },
                Event::Worker(_, Some(WorkerReply::Failed(failure))) => {
                    let failure = self.worker_failed(failure);
                    return Err(if self.worker_gone && self.over.is_none() {
                        self.fail(failure)
                    } else {
                        failure
                    });
                }
                Event::Worker(_, Some(WorkerReply::Progress(progress))) => {
                    self.progress.rsync = Some(progress);
                    watch.observer.progress(&self.progress);
                    continue;
                }
                Event::Worker(_, Some(WorkerReply::Copied(path))) => {
                    watch.observer.copied(&path);
                    continue;
                }
                Event::Worker(_, Some(WorkerReply::Notice(notice))) => {
                    self.note(&notice);
                    watch.observer.notice(notice);
                    continue;
                }
                Event::Worker(_, Some(reply)) => Reply::Worker(reply),
            };
            if let Some(answer) = T::of(reply) {
                return Ok(answer);
            }
        }
    }

    /// Notes for `sprat status` what must be known after this session, too.
    fn note(&mut self, notice: &Notice) {
        let Notice::SnapshotsGone { snapshots } = notice else {
            return;
        };
        let noted = match &self.state {
            Some(state) => History::update(state, |history| {
                history.saw_gone(Timestamp::now(), snapshots);
            }),
            None => Ok(()),
        };
        self.gone = match noted {
            Ok(()) => Some(snapshots.clone()),
            Err(error) => {
                tracing::warn!(%error, "this machine can't note which snapshots are gone");
                None
            }
        };
    }

    /// The volume is mounted, and is the container as this machine knows it.
    pub(crate) fn may_send(&mut self) {
        let gone = self.gone.clone();
        self.order(&VolumeOrder::MaySend { gone });
    }

    fn heed_interrupt(
        &mut self,
        watch: &mut Watch<'_>,
        on_interrupt: OnInterrupt,
    ) -> Result<(), Failure> {
        if !watch.interrupt.requested() {
            return Ok(());
        }
        let is_down = self
            .progress
            .volume
            .reconnecting_ms
            .is_some_and(|ms| ms > DOWN_MS_MAX);
        if watch.interrupt.hard() || is_down {
            watch.observer.phase(Phase::Stopping);
            let why = if is_down {
                "interrupted while the connection was down"
            } else {
                "interrupted twice: ended at once"
            };
            return Err(self.fail(Failure::new(Exit::Interrupted, why).with_hint(LEFT_OUT)));
        }
        if self.interrupted.is_some() {
            if !watch.interrupt.time_left(ORDERLY_LIMIT).is_zero() {
                return Ok(());
            }
            let why = "interrupted, and the server took too long for a clean end";
            return Err(self.fail(Failure::new(Exit::Interrupted, why).with_hint(LEFT_OUT)));
        }
        self.interrupted = Some(watch.interrupt.clone());
        watch.observer.phase(Phase::Stopping);
        match on_interrupt {
            OnInterrupt::GiveUp => Err(self.fail(Failure::interrupted())),
            OnInterrupt::Cancel => {
                self.order(&WorkerOrder::Cancel);
                Ok(())
            }
            OnInterrupt::Ask => {
                self.order(&VolumeOrder::Abort);
                Ok(())
            }
            OnInterrupt::Finish => Ok(()),
        }
    }

    /// If the server's space runs out, cancels an order as an interrupt does. Short orders go on.
    fn heed_room(&mut self, watch: &mut Watch<'_>, on_interrupt: OnInterrupt) {
        if let (Some((_, heeded @ false)), OnInterrupt::Cancel) = (&mut self.room, on_interrupt) {
            *heeded = true;
            watch.observer.phase(Phase::StoppingFull);
            self.order(&WorkerOrder::Cancel);
        }
    }

    /// Bytes that were left on the server when the order was cancelled for lack of space.
    pub(crate) fn stopped_for_room(&self) -> Option<u64> {
        self.room
            .and_then(|(available_bytes, heeded)| heeded.then_some(available_bytes))
    }

    /// Passes on a report of V. Returns a reply to an order.
    fn pass_on(&mut self, reply: VolumeReply, watch: &mut Watch<'_>) -> Option<VolumeReply> {
        match reply {
            VolumeReply::Phase(phase) => watch.observer.phase(phase),
            VolumeReply::Notice(notice) => watch.observer.notice(notice),
            VolumeReply::Naming(naming) => self.naming = naming,
            VolumeReply::RoomRunsOut { available_bytes } => {
                self.room.get_or_insert((available_bytes, false));
            }
            VolumeReply::Figures(figures) => {
                self.progress.volume = figures;
                watch.observer.progress(&self.progress);
            }
            other => return Some(other),
        }
        None
    }

    /// The worker's failure, or the volume's failure if that was its cause.
    fn worker_failed(&mut self, failure: Failure) -> Failure {
        if failure.exit == Exit::Interrupted || failure.exit == Exit::Usage {
            return failure;
        }
        let deadline = Instant::now() + VOLUME_WORD_LIMIT;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.events.recv_timeout(left) {
                Ok(Event::Volume(Some(VolumeReply::Failed(cause)))) => return self.fail(cause),
                Ok(Event::Volume(None)) => return self.volume_died(),
                Ok(Event::Worker(number, None)) if number == self.worker_number => {
                    self.worker_gone = true;
                }
                Ok(Event::Volume(Some(VolumeReply::Figures(figures)))) => {
                    self.progress.volume = figures;
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        failure
    }

    fn volume_died(&mut self) -> Failure {
        self.volume_gone = true;
        let how = self.volume.end();
        self.fail(Failure::failed(how).with_hint(
            "finished snapshots are unharmed. Run the same command again: it takes over the lock and \
             continues where this one stopped",
        ))
    }

    fn worker_died(&mut self) -> Failure {
        self.worker_gone = true;
        let how = self
            .worker
            .as_mut()
            .map_or_else(|| "the worker ended".to_owned(), Child::end);
        self.fail(Failure::failed(how).with_hint(
            "finished snapshots are unharmed. Run the same command again: it continues where this one \
             stopped",
        ))
    }

    /// Tears everything down because of `failure`.
    pub(crate) fn fail(&mut self, failure: Failure) -> Failure {
        self.tear_down();
        self.over = Some(failure.clone());
        failure
    }

    /// What the volume process left behind when it was torn down.
    pub(crate) fn aborted(&self) -> AbortReport {
        self.aborted
    }

    /// Whether a new container may have its name: the server was asked, and no answer arrived.
    pub(crate) fn may_be_named(&self) -> bool {
        self.naming && !self.aborted.removed
    }

    /// Everything is unmounted in order; W ends by itself.
    pub(crate) fn detach(&mut self, watch: &mut Watch<'_>) -> Result<(), Failure> {
        if let Some(failure) = &self.over {
            return Err(failure.clone());
        }
        watch.observer.phase(Phase::Unmounting);
        self.unmounted = self
            .call(&WorkerOrder::Unmount, watch)
            .map_err(|failure| self.fail(failure))?;
        if let Some(mut worker) = self.worker.take()
            && !worker.wait(DEATH_LIMIT)
        {
            worker.kill();
        }
        Ok(())
    }

    /// V sends the rest, waits for the server's fsync, releases the lease and ends.
    pub(crate) fn close(&mut self, watch: &mut Watch<'_>) -> Result<ClosedReport, Failure> {
        let close = VolumeOrder::Close(self.unmounted.1.clone());
        let report: ClosedReport;
        (report, self.reserve_missing) = self.call(&close, watch)?;
        if !self.reserve_missing && !self.volume.wait(DEATH_LIMIT) {
            self.volume.kill();
        }
        self.over = Some(Failure::failed("the session is closed"));
        Ok(ClosedReport {
            room: self.unmounted.0,
            ..report
        })
    }

    /// Leaves both processes running in the background.
    pub(crate) fn leave(mut self) {
        self.over = Some(Failure::failed("the session was left in the background"));
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.tear_down();
    }
}

/// What the processes are for.
pub(crate) enum Shape {
    Session,
    Create(CreateStart),
    Change(ChangeStart),
    Background,
    /// The container file gets this length while it is opened.
    Grow(u64),
}

pub(crate) fn start_order(
    settings: &SessionSettings,
    opened_by: OpenedBy,
    shape: Shape,
    secrets: usize,
) -> VolumeStart {
    let background = matches!(shape, Shape::Background);
    let (mut create, mut change, mut grow_to) = (None, None, None);
    match shape {
        Shape::Create(start) => create = Some(start),
        Shape::Change(start) => change = Some(start),
        Shape::Grow(file_bytes) => grow_to = Some(file_bytes),
        Shape::Session | Shape::Background => {}
    }
    VolumeStart {
        settings: settings.clone(),
        kernel: opened_by == OpenedBy::Kernel,
        // A user of a mount expects that fsync is durable. A backup waits once, at its end.
        durable_flush: background && settings.access == Access::ReadWrite,
        create,
        change,
        grow_to,
        secrets,
    }
}
