//! Opens an existing container: store, lease, header, pins, key, volume.

pub(crate) mod acquire;
pub(crate) mod length_check;
pub(crate) mod prefetch;
mod stamp_block;
mod stat;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use sprat_luks::{AnyHeader, CopyState, OpenedBy, Payload, Pins, Secret, SectorCipher, VolumeKey};
use sprat_store::{IgnorePoison, LeaseCheck, Lock, Question, Store, StoreFile, WriteJournal};
use sprat_volume::{Flush, Geometry, ReadOnlyOptions, Seen, Volume, VolumeOptions};

use crate::Failure;
use crate::connect::Connection;
use crate::file_system::FileSystemKind;
use crate::protocol::messages::VolumeStart;
use crate::protocol::reports::{ContainerFacts, Notice, Phase};
use crate::settings::{Access, IdentityPolicy};
use crate::state::journal::open_journal;
use crate::state::paths::StatePaths;
use crate::state::{headers, reserved_names};
use crate::volume_process::cache::cache_options;
use crate::volume_process::extend_file::extend_file;
use crate::volume_process::knowledge::Knowledge;
use crate::volume_process::late::{self, DigestKey};
use crate::volume_process::lease::{ContainerLease, keep_renewing};
use crate::volume_process::open::acquire::{Meanwhile, acquire_making_space};
use crate::volume_process::open::length_check::check_not_truncated;
use crate::volume_process::open::prefetch::{InspectedFile, Prefetch, Unlocked, joined};
use crate::volume_process::open::stamp_block::shown_to_the_kernel;
use crate::volume_process::rewrite::prevent_late_rename;
use crate::volume_process::shutdown::{EventSender, StopFlag};
use crate::volume_process::{reserve, space_monitor};

pub(crate) use crate::volume_process::open::acquire::{acquire, acquire_lock, wait_for_quiet};
pub(crate) use crate::volume_process::open::stat::stat_container;

/// A container that is ready to be served.
pub(crate) struct Opened {
    pub lease: Arc<ContainerLease>,
    pub volume: Arc<Volume>,
    pub decryption: Decryption,
    pub facts: ContainerFacts,
    /// The kind of flush that answers a flush from above.
    pub flush: Flush,
    /// A durable flush includes the server's fsync.
    pub durable: bool,
    /// Free space on the server when a session that writes begins, if the server reports it.
    pub available_bytes: Option<u64>,
    /// This machine's state about the container.
    pub knowledge: Knowledge,
}

/// Where decryption takes place.
pub(crate) enum Decryption {
    /// In this process.
    InProcess(SectorCipher),
    /// In the kernel, which gets this key.
    InKernel(VolumeKey),
}

impl Decryption {
    pub(crate) fn new(
        opened_by: OpenedBy,
        key: VolumeKey,
        cipher: Option<SectorCipher>,
    ) -> Result<Self, Failure> {
        match (opened_by, cipher) {
            (OpenedBy::Kernel, _) => Ok(Self::InKernel(key)),
            (OpenedBy::Sprat, Some(cipher)) => Ok(Self::InProcess(cipher)),
            (OpenedBy::Sprat, None) => Err(Failure::failed("a cipher that sprat does not have")),
        }
    }
}

pub(crate) fn opened_by(start: &VolumeStart) -> OpenedBy {
    if start.kernel {
        OpenedBy::Kernel
    } else {
        OpenedBy::Sprat
    }
}

/// Opens the container. After a failure no lease is left, unless a dead session's writes are
/// unresolved. The head of `prefetch` says which steps overlap and which must not.
pub(crate) fn open(
    start: &VolumeStart,
    secret: &Secret,
    stop: &Arc<StopFlag>,
    events: &EventSender,
) -> Result<Opened, Failure> {
    events.phase(Phase::Connecting);
    let (record, connection) = journal_and_connection(start)?;
    let store = connection.connect_asking(first_questions(start, &record)?)?;
    stop.check()?;
    let given_up = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reading = Arc::clone(&store);
        let mut prefetch = PrefetchThread::by(scope.spawn(|| {
            let reading = reading;
            Prefetch::read(start, secret, &*reading, &given_up)
        }));
        let opened = check_container(start, &*store, &record, events).and_then(
            |(available_bytes, first)| {
                let reached = ConnectedStore {
                    record,
                    connection,
                    store,
                    first,
                };
                let (lease, inspected) =
                    acquire_and_inspect(start, reached, &mut prefetch, stop, events)?;
                let opened = open_held(
                    start,
                    secret,
                    &lease,
                    (prefetch, inspected),
                    available_bytes,
                    stop,
                    events,
                );
                if opened.is_err() {
                    // If this fails too, the next session of this host takes the lease over.
                    let _ = lease.release();
                }
                opened
            },
        );
        given_up.store(true, Ordering::SeqCst);
        // What was asked ahead and not used would be out of date.
        if let Ok(opened) = &opened {
            opened.lease.store().forget_ahead();
        }
        opened
    })
}

/// The prefetch, on its own thread.
struct PrefetchThread<'scope> {
    thread: Option<ScopedJoinHandle<'scope, Option<Prefetch>>>,
    found: Option<Prefetch>,
}

impl<'scope> PrefetchThread<'scope> {
    fn by(thread: ScopedJoinHandle<'scope, Option<Prefetch>>) -> Self {
        Self {
            thread: Some(thread),
            found: None,
        }
    }

    /// Waits for the result.
    fn wait(&mut self) -> Option<&Prefetch> {
        if let Some(thread) = self.thread.take() {
            self.found = thread.join().ok().flatten();
        }
        self.found.as_ref()
    }

    fn end(mut self) -> Option<Prefetch> {
        self.wait();
        self.found
    }
}

/// Opens a container that this session has acquired.
fn open_held(
    start: &VolumeStart,
    secret: &Secret,
    lease: &Arc<ContainerLease>,
    (prefetch, mut inspected): (PrefetchThread<'_>, Option<InspectedFile>),
    available_bytes: Option<u64>,
    stop: &Arc<StopFlag>,
    events: &EventSender,
) -> Result<Opened, Failure> {
    keep_renewing(lease, stop)?;
    let may_come_late = lease.record().may_arrive();
    wait_for_quiet(start, lease, stop, events)?;
    if start.settings.access == Access::ReadWrite
        && (may_come_late || lease.late_requests_may_arrive())
    {
        prevent_late_rename(lease)?;
        // A rename may have happened in between.
        inspected = None;
    }
    let mut opened = unlock(
        start,
        secret,
        lease,
        prefetch.end(),
        inspected,
        stop,
        events,
    )?;
    if let Some(size_bytes) = start.grow_to {
        report_overcommit(available_bytes, size_bytes, events);
    }
    reserve::give_up(start, &*lease.store(), available_bytes, events)?;
    opened.facts.available_bytes = available_bytes;
    opened.facts.server_ahead_s = lease.server_ahead_s();
    opened.available_bytes = available_bytes;
    Ok(opened)
}

/// Sends all questions at once. If a lease will be acquired, this includes which leases there are.
fn check_container(
    start: &VolumeStart,
    store: &dyn Store,
    record: &WriteJournal,
    events: &EventSender,
) -> Result<(Option<u64>, Option<LeaseCheck>), Failure> {
    let takes_lock = start.settings.access == Access::ReadWrite;
    let (writable, found, locks) = std::thread::scope(|scope| {
        let found = scope.spawn(|| stat_container(start, store));
        let look = || Lock::check_leases(store, &start.settings.target.name, record);
        let locks = takes_lock.then(|| scope.spawn(look));
        let writable = check_writable(start, store, events);
        (writable, joined(found), locks.map(joined))
    });
    let available_bytes = writable?;
    found?;
    Ok((available_bytes, locks.transpose()?))
}

/// A connected store, and what is needed to acquire a container in it.
pub(crate) struct ConnectedStore {
    pub record: WriteJournal,
    pub connection: Connection,
    pub store: Arc<dyn Store>,
    /// The leases that were just read, if they were.
    pub first: Option<LeaseCheck>,
}

/// What every opening asks first. None of it depends on another answer.
fn first_questions(start: &VolumeStart, record: &WriteJournal) -> Result<Vec<Question>, Failure> {
    let name = &start.settings.target.name;
    let mut questions = Lock::questions(name, record)?;
    questions.push(Question::Stat(name.clone()));
    if start.settings.access == Access::ReadWrite {
        questions.push(Question::FreeSpace);
    }
    // Last: at a FIFO an open blocks the server (fifo(7)). So only a container that this machine
    // knows is opened before its answer to the stat is there.
    if matches!(start.settings.pins, IdentityPolicy::Known(_)) {
        questions.push(Question::Open(name.clone(), sprat_store::Access::ReadOnly));
    }
    Ok(questions)
}

/// Acquires the local record and connects.
pub(crate) fn connect_store(
    start: &VolumeStart,
) -> Result<(WriteJournal, Connection, Arc<dyn Store>), Failure> {
    let (record, connection) = journal_and_connection(start)?;
    let store = connection.connect()?;
    Ok((record, connection, store))
}

fn journal_and_connection(start: &VolumeStart) -> Result<(WriteJournal, Connection), Failure> {
    let record = open_journal(
        &start.settings.state_dir,
        &start.settings.target,
        start.settings.access,
    )?;
    let connection = Connection::new(&start.settings, &record)?;
    Ok((record, connection))
}

/// Warns if the server has less space than the container may need.
pub(crate) fn report_overcommit(
    available_bytes: Option<u64>,
    size_bytes: u64,
    events: &EventSender,
) {
    if let Some(available_bytes) = available_bytes.filter(|bytes| *bytes < size_bytes) {
        events.notice(Notice::MoreThanServerHas {
            available_bytes,
            size_bytes,
        });
    }
}

/// Refuses to write if nothing can be made durable. Returns the free space there, for a session
/// that writes, if the server reports it.
pub(crate) fn check_writable(
    start: &VolumeStart,
    store: &dyn Store,
    events: &EventSender,
) -> Result<Option<u64>, Failure> {
    if start.settings.access == Access::ReadOnly {
        return Ok(None);
    }
    if !store.capabilities().durable_flush {
        if reserved_names::may_not_remove(store, &start.settings.target.name) {
            return Err(read_only_account(store));
        }
        if !start.settings.allow_no_fsync {
            return Err(Failure::failed(format!(
                "{} can't make data durable: it has no fsync@openssh.com",
                store.describe()
            ))
            .with_hint(
                "nothing was changed. Use an OpenSSH server. With --allow-no-fsync sprat writes anyway, \
                 but a crash of the server can destroy the whole container",
            ));
        }
        events.notice(Notice::NoDurableFlush);
    }
    // A server that can't report its free space will report a full disk.
    let Ok(space) = store.free_space() else {
        return Ok(None);
    };
    if space.read_only {
        return Err(Failure::failed(format!(
            "{} is on a read-only file system",
            store.describe()
        ))
        .with_hint("nothing was changed. `restore` and `mount` still work"));
    }
    if space.available_bytes < space_monitor::LOW_BYTES {
        events.notice(Notice::ServerSpaceLow {
            available_bytes: space.available_bytes,
        });
    }
    Ok(Some(space.available_bytes))
}

/// A server that limits an account to reading offers it no fsync either (`sftp-server -R`).
pub(crate) fn read_only_account(store: &dyn Store) -> Failure {
    Failure::failed(format!(
        "the account on {} seems to be read-only: the server offers no fsync and refuses to remove files",
        store.describe()
    ))
    .with_hint(
        "nothing was changed. `restore` and `mount` still work. For backups the account needs the right \
         to write",
    )
}

/// Acquires the container, and reads from it while the lease is being confirmed. Behind a dead
/// session it reads nothing, because that session's writes may still arrive.
fn acquire_and_inspect(
    start: &VolumeStart,
    reached: ConnectedStore,
    prefetch: &mut PrefetchThread<'_>,
    stop: &StopFlag,
    events: &EventSender,
) -> Result<(Arc<ContainerLease>, Option<InspectedFile>), Failure> {
    let quiet = !reached.record.may_arrive();
    let reading = Arc::clone(&reached.store);
    let mut inspected = None;
    let mut taken_later = false;
    // For a disk that has no space for the lease file either. The server may report that in another
    // way (a quota, or no inodes left), so the reserve is tried.
    let mut make_space = || {
        taken_later = true;
        match prefetch.wait().map(Prefetch::refusal) {
            Some(None) => reserve::remove(start, &*reading, events),
            Some(Some(failure)) => Err(failure.clone()),
            None => Ok(false),
        }
    };
    let name = &start.settings.target.name;
    let questions = match (quiet, start.settings.access) {
        (true, Access::ReadWrite) => {
            vec![Question::Open(name.clone(), sprat_store::Access::ReadWrite)]
        }
        _ => Vec::new(),
    };
    let inspecting = Meanwhile {
        questions: &questions,
        act: || {
            if quiet {
                // What can't be read is requested again, and that error is reported.
                inspected = InspectedFile::open(&*reading, name, start).ok();
            }
        },
    };
    let lease = acquire_making_space(start, reached, stop, events, &mut make_space, inspecting)?;
    lease.use_second_check();
    // If the lease was broken meanwhile, the prefetched data may be stale: drop it.
    Ok((lease, inspected.filter(|_| !taken_later)))
}

/// Header, pins, key, and the volume behind them.
fn unlock(
    start: &VolumeStart,
    secret: &Secret,
    lease: &Arc<ContainerLease>,
    prefetch: Option<Prefetch>,
    inspected: Option<InspectedFile>,
    stop: &StopFlag,
    events: &EventSender,
) -> Result<Opened, Failure> {
    stop.check()?;
    events.phase(Phase::Unlocking);
    let store = lease.store();
    let inspected = match inspected {
        Some(inspected) => inspected,
        None => inspect(start, lease, prefetch.as_ref())?,
    };
    let unlocked = inspected.unlocked(prefetch, start, secret)?;
    let mut knowledge = Knowledge::new(start, lease, &unlocked)?;
    let Unlocked { header, key, .. } = unlocked;
    report_copies(&header, events);
    if start.settings.verify_cache {
        report_slot_areas(start, &header, &inspected, events)?;
    }
    if let IdentityPolicy::TrustOnce = &start.settings.pins {
        events.notice(Notice::TrustedOnce {
            fingerprint: header.pins().fingerprint(),
        });
    }
    let mut file_bytes = inspected.file_bytes;
    let mut payload = header.geometry(file_bytes)?;
    let pins = header.pins();
    let cipher = SectorCipher::of_pins(&key, &pins)?;
    // Without the cipher the mount checks the length.
    let stamp = match &cipher {
        Some(cipher) => check_not_truncated(&inspected, &payload, cipher)?,
        None => None,
    };
    let kind = stamp
        .as_ref()
        .map_or(FileSystemKind::DEFAULT, |stamp| stamp.kind);
    if start.settings.access == Access::ReadWrite {
        kind.check_order(store.capabilities().durable_flush)?;
    }
    let stamp_block = stamp.as_ref().map(|stamp| &stamp.block[..]);
    if stamp.as_ref().is_some_and(|stamp| stamp.restored) {
        events.notice(Notice::SuperBlockRestored);
    }
    let shown = shown_to_the_kernel(start, stamp.as_ref(), cipher.as_ref())?;
    let digests = (DigestKey::of(&key)?, payload.offset_bytes);
    if let Err(failure) = knowledge.compare(start, stamp_block, file_bytes, events) {
        return Err(match knowledge.found_older() {
            true => late::explain_older(failure, start, lease, &*inspected.file, digests, kind),
            false => failure,
        });
    }
    let late = late::begin(start, lease, &*inspected.file, digests, &knowledge, events)?;
    let decryption = Decryption::new(opened_by(start), key, cipher)?;
    stop.check()?;
    let mut hole_from_bytes = u64::MAX;
    if let Some(wanted_bytes) = start.grow_to {
        check_may_grow(kind)?;
        extend_file(&*inspected.file, lease, file_bytes, wanted_bytes)?;
        if wanted_bytes > file_bytes {
            hole_from_bytes = payload.len_bytes;
        }
        file_bytes = wanted_bytes;
        payload = header.geometry(file_bytes)?;
    }
    lease.learn(pins.clone(), file_bytes);
    if start.settings.access == Access::ReadWrite {
        knowledge.begin_writing()?;
    }
    note_initial_state(start, lease, &inspected, file_bytes, &payload, kind);
    let seen = inspected.seen(payload.offset_bytes, kind);
    let known = VolumeHints {
        seen: seen.filter(|_| start.grow_to.is_none()),
        hole_from_bytes,
        kind,
    };
    report_recovery(lease, events);
    if let AnyHeader::Luks2(header) = header
        && !start.settings.is_past()
    {
        knowledge.found_header(header, &inspected);
    }
    let volume = open_volume(start, lease, inspected.file, payload, known)?;
    if let Some(block) = shown {
        volume.write_at(kind.stamp_range().start, &block)?;
    }
    if volume.cache_was_outdated() {
        events.notice(Notice::CacheOutdated);
    } else if knowledge.written_elsewhere() {
        events.notice(Notice::WrittenElsewhere);
    }
    stop.reaches(&volume);
    Ok(Opened {
        lease: Arc::clone(lease),
        volume,
        decryption,
        facts: ContainerFacts {
            newest_known: knowledge.expected(start),
            newest_remembered: knowledge.uncertain(),
            costs_hold: knowledge.costs_hold(),
            file_system_errors: knowledge.errors(),
            overwritten: late.overwritten,
            not_compared: late.not_compared,
            ..facts(pins, file_bytes, payload, kind)
        },
        knowledge,
        flush: crate::volume_process::flush_kind(start),
        durable: start.settings.access == Access::ReadWrite && store.capabilities().durable_flush,
        available_bytes: None,
    })
}

/// Refuses before the file is extended: without this capability the kernel refuses the last step.
fn check_may_grow(kind: FileSystemKind) -> Result<(), Failure> {
    if kind.may_grow() {
        return Ok(());
    }
    Err(Failure::failed(
        "a mounted file system can't be grown here: sprat has no CAP_SYS_RESOURCE",
    )
    .with_hint(
        "nothing was changed. Run the command as root outside of Docker and the like, or give that \
         environment CAP_SYS_RESOURCE. Any machine that has the key and reaches the server can do this",
    ))
}

/// Opens the file and reads what a session needs first.
fn inspect(
    start: &VolumeStart,
    lease: &ContainerLease,
    prefetch: Option<&Prefetch>,
) -> Result<InspectedFile, Failure> {
    Ok(match (prefetch, start.settings.access) {
        (Some(prefetch), Access::ReadOnly) => InspectedFile::again(prefetch, start)?,
        _ => InspectedFile::open(&*lease.store(), lease.file_name(), start)?,
    })
}

/// Records the state with which a read-only session begins.
fn note_initial_state(
    start: &VolumeStart,
    lease: &ContainerLease,
    inspected: &InspectedFile,
    file_bytes: u64,
    payload: &Payload,
    kind: FileSystemKind,
) {
    // With --ignore-lock the data may change while we read; nothing checks consistency.
    if start.settings.access == Access::ReadOnly
        && !start.settings.ignore_lock
        && let Ok(stamp_block) = inspected.stamp_block(payload.offset_bytes, kind)
    {
        let stamp_at = payload.offset_bytes + kind.stamp_range().start;
        lease.begin_reading(file_bytes, stamp_at, stamp_block);
    }
}

/// Reports the progress of the recovery of a dead session's writes, every few seconds.
fn report_recovery(lease: &ContainerLease, events: &EventSender) {
    let events = events.clone();
    let reported_at = Mutex::new(Instant::now());
    lease.on_recovery_progress(move |done_bytes, whole_bytes| {
        let mut reported_at = reported_at.lock().ignore_poison();
        if reported_at.elapsed() >= RECOVERY_REPORT_INTERVAL {
            *reported_at = Instant::now();
            events.notice(Notice::Settling {
                done_bytes,
                whole_bytes,
            });
        }
    });
}

/// How often a takeover reports its progress.
const RECOVERY_REPORT_INTERVAL: Duration = Duration::from_secs(5);

pub(crate) fn facts(
    pins: Pins,
    file_bytes: u64,
    payload: Payload,
    file_system: FileSystemKind,
) -> ContainerFacts {
    ContainerFacts {
        file_system,
        uuid: pins.uuid.clone(),
        pins,
        file_bytes,
        volume_bytes: payload.len_bytes,
        newest_known: std::collections::BTreeMap::new(),
        newest_remembered: std::collections::BTreeMap::new(),
        costs_hold: false,
        file_system_errors: None,
        overwritten: Vec::new(),
        not_compared: Vec::new(),
        available_bytes: None,
        server_ahead_s: None,
    }
}

fn report_copies(header: &AnyHeader, events: &EventSender) {
    let Some(copies) = header.copies() else {
        return;
    };
    for (which, state) in [("first", &copies.primary), ("second", &copies.secondary)] {
        let what = match state {
            CopyState::Damaged(fault) => format!("{which}: {fault}"),
            CopyState::Stale { sequence_id } => {
                format!("{which}: older than the other copy (sequence number {sequence_id})")
            }
            CopyState::Contradicts { sequence_id } => format!(
                "{which}: same sequence number as the other copy ({sequence_id}), but other content: \
                 two machines changed keys at the same time. Check which keys open the container: \
                 `sprat key list`, `sprat key rehearse`"
            ),
            _ => continue,
        };
        events.notice(Notice::HeaderCopyDamaged { copy: what });
    }
}

/// A change of keys that arrived late may have overwritten the area of a slot, which no metadata
/// show.
fn report_slot_areas(
    start: &VolumeStart,
    header: &AnyHeader,
    inspected: &InspectedFile,
    events: &EventSender,
) -> Result<(), Failure> {
    let AnyHeader::Luks2(header) = header else {
        return Ok(());
    };
    let paths = StatePaths::new(
        &start.settings.state_dir,
        header.uuid(),
        &start.settings.target,
    );
    let slots = headers::differing_slots(&paths, header, inspected)?;
    if !slots.is_empty() {
        events.notice(Notice::SlotAreasDiffer { slots });
    }
    Ok(())
}

/// What is known of a container before its volume is opened.
pub(crate) struct VolumeHints {
    /// Its current state, if it was read under the lease.
    pub seen: Option<Seen>,
    /// As in [`VolumeOptions`].
    pub hole_from_bytes: u64,
    pub kind: FileSystemKind,
}

impl Default for VolumeHints {
    fn default() -> Self {
        Self {
            seen: None,
            hole_from_bytes: u64::MAX,
            kind: FileSystemKind::DEFAULT,
        }
    }
}

pub(crate) fn open_volume(
    start: &VolumeStart,
    lease: &Arc<ContainerLease>,
    file: Arc<dyn StoreFile>,
    payload: Payload,
    known: VolumeHints,
) -> Result<Arc<Volume>, Failure> {
    let geometry = Geometry {
        offset_bytes: payload.offset_bytes,
        len_bytes: payload.len_bytes,
    };
    let reconnect_max = start.settings.reconnect_max;
    let session: Arc<dyn sprat_volume::SessionHooks> = Arc::clone(lease) as _;
    if start.settings.expects_much {
        file.expect_much();
    }
    let volume = match start.settings.access {
        Access::ReadOnly => {
            // On a disk, not in memory: a journal may be large.
            let mut options = ReadOnlyOptions::new(start.settings.state_dir.clone());
            options.reconnect_max = reconnect_max;
            options.cache = cache_options(start, lease, known.seen, known.kind);
            Volume::open_read_only(file, geometry, session, options)?
        }
        Access::ReadWrite => {
            let options = VolumeOptions {
                write_buffer_bytes_max: start.settings.write_buffer_bytes_max,
                reconnect_max,
                cache: cache_options(start, lease, known.seen, known.kind),
                quiet_time: start.settings.quiet_time,
                in_doubt: lease.record().in_doubt(),
                old_server_dead: true,
                zeros_are_holes: true,
                hole_from_bytes: known.hole_from_bytes,
                // All other sessions mount the volume, and check that the expected snapshots are
                // there before anything is sent.
                hold_back: start.create.is_none() && start.change.is_none(),
                upload_rate: start.settings.upload_rates.rate(),
                ..VolumeOptions::default()
            };
            Volume::open(file, geometry, session, options)?
        }
    };
    Ok(Arc::new(volume))
}
