//! Rules whose violation causes no immediate failure: what a dead session of this machine leaves,
//! what a reader must notice, and what is recorded at the end.

use sprat_store::lock;

use crate::file_system::{FileSystemKind, FileSystemState, stamp_block};
use crate::protocol::messages::ChangeStart;
use crate::settings::IdentityPolicy;
use crate::state::paths::StatePaths;
use crate::state::{Finding, KnownState, headers};
use crate::volume_process::tests::*;

/// Where the volume of [`make_container`] begins.
const OFFSET: u64 = 16 << 20;

pub(super) fn events() -> EventSender {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Nobody reads these events.
    std::mem::forget(theirs);
    EventSender(Sender::new(ours))
}

impl TestSession {
    /// This session is killed, and the next one of this machine acquires the container.
    fn killed_and_taken_again(self) -> Self {
        drop(self.lease);
        Self::in_folder(self.folder, |store| store)
    }

    fn header(&self) -> Header {
        let store = self.lease.store();
        let file = store.open(self.lease.file_name(), StoreAccess::ReadOnly);
        Header::load(&HeaderBytes(&*file.unwrap())).unwrap()
    }

    /// A read-only session on the container, which nobody has acquired now.
    fn reader(&self) -> ContainerLease {
        assert!(self.lease.release().unwrap());
        let state = self.folder.path().join("reader");
        let record = open_journal(&state, &self.start.settings.target, Access::ReadOnly).unwrap();
        let connection = Connection::new(&self.start.settings, &record).unwrap();
        let store = connection.connect().unwrap();
        let container = self.start.settings.target.name.clone();
        let seen = lock::inspect(&*store, &container, None).unwrap();
        assert!(seen.held.is_none());
        let lease = ContainerLease::new(LeaseParts {
            connection,
            record,
            file_name: container.clone(),
            container,
            access: StoreAccess::ReadOnly,
            opened_by: OpenedBy::Sprat,
            store,
            lock: None,
            stale_lock: None,
            highest: seen.highest,
            highest_is_own: false,
            late_records: lease::LateRecords::default(),
        });
        lease.learn(self.header().pins(), FILE_BYTES);
        lease.begin_reading(FILE_BYTES, OFFSET, vec![0; 4096]);
        lease
    }

    /// Another machine acquires the lease.
    fn taken_by_another(&self) -> (Lock, Arc<dyn Store>) {
        let state = self.folder.path().join("other");
        let record = open_journal(&state, &self.start.settings.target, Access::ReadWrite).unwrap();
        let store: Arc<dyn Store> =
            Arc::new(LocalStore::open(&self.folder.path().join("store")).unwrap());
        let owner = owner_note(&state).unwrap();
        let lock =
            Lock::acquire(&*store, &self.start.settings.target.name, &record, owner).unwrap();
        (lock, store)
    }

    /// Another machine takes the container over.
    pub(super) fn taken_over_by_another(&self) -> (Lock, Arc<dyn Store>) {
        let state = self.folder.path().join("other");
        let record = open_journal(&state, &self.start.settings.target, Access::ReadWrite).unwrap();
        let store: Arc<dyn Store> =
            Arc::new(LocalStore::open(&self.folder.path().join("store")).unwrap());
        let owner = owner_note(&state).unwrap();
        let name = &self.start.settings.target.name;
        let lock = Lock::take_over(&*store, name, &record, owner).unwrap();
        (lock, store)
    }

    /// Keeps the header as it is, and returns the order that restores it.
    fn kept_to_be_put_back(&self) -> ChangeStart {
        let header = self.header();
        let file = std::fs::File::open(self.path("x.luks")).unwrap();
        let kept = headers::keep_newest(&self.paths(), &header, &file, None).unwrap();
        ChangeStart::Restore {
            kept: kept.path.into_os_string(),
            shown: Some(header.sequence_id()),
        }
    }

    fn paths(&self) -> StatePaths {
        let state = self.folder.path().join("state");
        StatePaths::new(&state, self.header().uuid(), &self.start.settings.target)
    }

    /// Gives both copies of the header another sequence, as later changes do that leave the keys
    /// unchanged. Layout: the LUKS2 On-Disk Format Specification, 2.1.
    fn set_sequence(&self, sequence: u64) {
        let path = self.path("x.luks");
        let bytes = std::fs::read(&path).unwrap();
        let len = usize::try_from(u64::from_be_bytes(bytes[8..16].try_into().unwrap())).unwrap();
        for at in [0, len] {
            let mut copy = bytes[at..at + len].to_vec();
            copy[16..24].copy_from_slice(&sequence.to_be_bytes());
            copy[448..512].fill(0);
            let checksum = openssl::sha::sha256(&copy);
            copy[448..480].copy_from_slice(&checksum);
            self.container().write_all_at(&copy, at as u64).unwrap();
        }
    }

    fn container(&self) -> std::fs::File {
        let file = std::fs::File::options()
            .write(true)
            .open(self.path("x.luks"));
        file.unwrap()
    }
}

/// A change that adds a key, with the current key and the new one.
fn another_key() -> (ChangeStart, [Secret; 2]) {
    let add = ChangeStart::Add {
        kind: SlotKind::KeyFile,
        fast_kdf_for_tests: true,
    };
    (add, [7, 8].map(|byte| Secret::key_file(vec![byte; 4096])))
}

#[test]
fn no_wait_for_a_killed_session_on_a_local_disk() {
    let session = TestSession::new();
    let range = std::slice::from_ref(&(0..4096));
    session.lease.before_send(range).unwrap();
    let next = session.killed_and_taken_again();
    // On a server a write might still arrive.
    assert!(next.door.unwrap().own_only);
    assert_eq!(next.lease.late_until(), None);
    assert!(next.lease.may_give_back());
}

#[test]
fn session_that_got_every_answer_leaves_no_wait() {
    let block = [1; 4096];
    let allow = |lease: &ContainerLease| {
        lease.before_send(std::slice::from_ref(&(0..4096))).unwrap();
    };
    let case = |what: &str, send: &dyn Fn(&ContainerLease), waits: bool| {
        let session = TestSession::new();
        let lease = &session.lease;
        lease.notes_sent(late::Sent::new(late::some_key(1)));
        allow(lease);
        let number = lease.sends(0, &block);
        lease.answered(number);
        send(lease);
        assert!(!lease.release().unwrap(), "{what}: a write is in doubt");
        let next = session.killed_and_taken_again();
        let record = next.lease.record();
        assert_eq!(
            record.in_doubt(),
            std::slice::from_ref(&(0..4096)),
            "{what}"
        );
        assert_eq!(record.may_arrive(), waits, "{what}");
        assert_eq!(next.door.is_some(), waits, "{what}");
    };
    case("all are answered", &|_| (), false);
    case(
        "one is not answered",
        &|lease| {
            allow(lease);
            lease.sends(0, &block);
        },
        true,
    );
    case("a thread is about to send", &allow, true);
}

#[test]
fn key_change_recovers_writes_of_a_killed_session() {
    let session = TestSession::new();
    session
        .lease
        .before_send(std::slice::from_ref(&(OFFSET..OFFSET + 4096)))
        .unwrap();
    let leftover = HalfMade::Rewritten.name(session.lease.file_name()).unwrap();
    let leftover = session.path(leftover.as_str());
    std::fs::copy(session.path("x.luks"), &leftover).unwrap();
    let before = session.header();
    let TestSession {
        folder,
        mut start,
        lease,
        ..
    } = session;
    drop(lease);
    start.settings.pins = IdentityPolicy::Known(before.pins());
    let (add, secrets) = another_key();
    let stop = Arc::new(StopFlag::default());
    let changed = edit::change(&start, &add, &secrets, &stop, &events()).unwrap();
    // A late rename finds no source.
    assert!(!leftover.exists());
    assert_eq!(changed.lock_left, None);
    let path = folder.path().join("store").join("x.luks");
    let file = std::fs::File::open(&path).unwrap();
    let after = Header::load(&file).unwrap();
    assert!(after.copies().both_good());
    assert!(after.sequence_id() > before.sequence_id());
    assert_eq!(changed.facts.pins.sequence_id, after.sequence_id());
    for secret in &secrets {
        after.unlock_by(&file, secret).unwrap();
    }
}

#[test]
fn pending_writes_are_recovered_before_a_header_is_written() {
    for restores in [false, true] {
        let session = TestSession::new();
        let under_way = OFFSET + (1 << 20);
        let range = under_way..under_way + 4096;
        session
            .lease
            .before_send(std::slice::from_ref(&range))
            .unwrap();
        drop(session.lease);
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let log = Arc::clone(&asked);
        let mut session = TestSession::in_folder(session.folder, |below| {
            Arc::new(RecordingStore {
                below,
                asked,
                rename: || None,
                refused: Arc::default(),
                cut: Arc::default(),
            })
        });
        session.start.settings.pins = IdentityPolicy::Known(session.header().pins());
        let (add, secrets) = another_key();
        let what = match restores {
            true => session.kept_to_be_put_back(),
            false => add,
        };
        let (stop, events) = (StopFlag::default(), events());
        let work = edit::HeaderEdit::begin(&session.start, &session.lease, &stop, &events).unwrap();
        log.lock().unwrap().clear();
        work.carry_out(&what, &secrets).unwrap();
        let log = log.lock().unwrap().clone();
        let resolved = log
            .iter()
            .position(|one| *one == format!("read {under_way}"));
        let is_header = |one: &String| {
            let at = one.strip_prefix("write ");
            at.is_some_and(|at| at.parse::<u64>().unwrap() < OFFSET)
        };
        let written = log.iter().position(is_header).unwrap();
        assert!(
            resolved.is_some_and(|resolved| resolved < written),
            "{log:?}"
        );
    }
}

#[test]
fn key_change_reports_a_session_that_came_before_its_release() {
    for taken_over in [false, true] {
        let mut session = TestSession::new();
        session.start.settings.pins = IdentityPolicy::Known(session.header().pins());
        let (add, secrets) = another_key();
        let (stop, events) = (StopFlag::default(), events());
        let work = edit::HeaderEdit::begin(&session.start, &session.lease, &stop, &events).unwrap();
        let mut changed = work.carry_out(&add, &secrets);
        if taken_over {
            let (other, store) = session.taken_over_by_another();
            other.close_by_word(3600);
            other.confirm(&*store).unwrap();
        }
        edit::release(&session.lease, &mut changed);
        let changed = changed.unwrap();
        assert_eq!(changed.taken_over.is_some(), taken_over);
        let exit = [Exit::Done, Exit::Locked][usize::from(taken_over)];
        assert_eq!(changed.exit(), exit);
        assert_eq!(changed.lock_left, None);
    }
}

#[test]
fn kept_header_is_restored_only_over_the_shown_one() {
    let mut session = TestSession::new();
    let what = session.kept_to_be_put_back();
    session.start.settings.pins = IdentityPolicy::Known(session.header().pins());
    let (_, secrets) = another_key();
    // Another machine changes the keys while a person decides.
    session.set_sequence(session.header().sequence_id() + 3);
    let before = std::fs::read(session.path("x.luks")).unwrap();
    let (stop, events) = (StopFlag::default(), events());
    let work = edit::HeaderEdit::begin(&session.start, &session.lease, &stop, &events).unwrap();
    let refused = work.carry_out(&what, &secrets).unwrap_err();
    assert!(refused.what.contains("in the meantime"), "{refused:?}");
    assert!(std::fs::read(session.path("x.luks")).unwrap() == before);
}

/// Rule: what is sent needs a check that is at most some seconds old.
#[test]
fn second_check_of_the_opening_counts_for_epochs_while_it_is_young() {
    let session = TestSession::new();
    session.lease.use_second_check();
    let (_other, _store) = session.taken_over_by_another();
    session.lease.before_epoch().unwrap();
    session.lease.before_epoch().unwrap();
    session.lease.set_last_check_age(Duration::from_secs(6));
    session.lease.before_epoch().unwrap_err();
    // Without it the first epoch has a check of its own.
    let session = TestSession::new();
    let (_other, _store) = session.taken_over_by_another();
    session.lease.before_epoch().unwrap_err();
}

/// What can't be undone does not rely on an earlier check.
#[test]
fn check_of_now_reads_the_lease_however_young_the_last_check_is() {
    let session = TestSession::new();
    session.lease.use_second_check();
    let (_other, _store) = session.taken_over_by_another();
    session.lease.before_epoch().unwrap();
    session.lease.check_lock_now().unwrap_err();
    session.lease.before_epoch().unwrap_err();
}

/// The persistent cache is kept only then.
#[test]
fn release_tells_whether_another_session_came_before() {
    let session = TestSession::new();
    session.lease.prepare_release();
    assert!(!session.lease.was_released_alone(), "it is not released");
    assert!(session.lease.release().unwrap());
    assert!(session.lease.was_released_alone());
    let session = TestSession::new();
    session.lease.prepare_release();
    let (_other, _store) = session.taken_over_by_another();
    // It still waits for this session, and so nothing is lost.
    assert!(session.lease.release().unwrap());
    assert!(!session.lease.was_released_alone());
}

fn assert_disturbed(reader: &ContainerLease) {
    let noticed = reader.was_undisturbed().unwrap_err();
    assert_eq!(noticed.exit, Exit::Locked);
    assert!(
        noticed.what.contains("another session wrote"),
        "{noticed:?}"
    );
}

/// The check before may be some seconds old, and another machine may have written since.
#[test]
fn reader_whose_last_check_fails_reports_no_success() {
    let session = TestSession::new();
    let reader = session.reader();
    let (path, aside) = (session.path("x.luks"), session.path("aside"));
    std::fs::rename(&path, &aside).unwrap();
    let failed = reader.was_undisturbed().unwrap_err();
    std::fs::rename(&aside, &path).unwrap();
    assert!(failed.what.contains("the last check"), "{failed:?}");
    assert!(failed.hint.unwrap().contains("mixture"));
    reader.was_undisturbed().unwrap();
}

#[test]
fn undisturbed_reader_has_seen_one_state() {
    let session = TestSession::new();
    session.reader().was_undisturbed().unwrap();
}

#[test]
fn reader_notices_a_session_that_came_and_went() {
    let session = TestSession::new();
    let reader = session.reader();
    let (lock, store) = session.taken_by_another();
    lock.release(&*store).unwrap();
    assert_disturbed(&reader);
}

#[test]
fn reader_notices_a_lease_that_was_acquired_meanwhile() {
    let session = TestSession::new();
    let reader = session.reader();
    let (_lock, _store) = session.taken_by_another();
    let noticed = reader.was_undisturbed().unwrap_err();
    assert_eq!(noticed.exit, Exit::Locked);
    assert!(noticed.what.contains("locked container"), "{noticed:?}");
}

/// Also without a lease that this reader can see.
#[test]
fn reader_notices_changed_stamp_block_or_length() {
    let session = TestSession::new();
    let reader = session.reader();
    session
        .container()
        .write_all_at(&[1], OFFSET + 4095)
        .unwrap();
    assert_disturbed(&reader);
    let session = TestSession::new();
    let reader = session.reader();
    session.container().set_len(FILE_BYTES - 4096).unwrap();
    assert_disturbed(&reader);
}

/// The file system's stamp block with this counter.
fn stamped(counter: u64) -> Vec<u8> {
    stamp_block(counter, 0, 0)
}

#[test]
fn session_records_its_final_state_even_if_it_wrote_no_stamp_block() {
    let session = TestSession::new();
    let header = session.header();
    let paths = session.paths();
    let stamp = |counter: u64, bytes: u64| {
        FileSystemState::read(&stamped(counter), bytes)
            .unwrap()
            .stamp
    };
    let now = |counter, bytes| KnownState::load(&paths).compare(Some(&stamp(counter, bytes)), true);
    let mut knowledge = Knowledge::of_new(&session.start, &header, None);
    knowledge
        .compare(&session.start, Some(&stamped(5)), FILE_BYTES, &events())
        .unwrap();
    knowledge
        .end_writing(None, FILE_BYTES, None, &events())
        .unwrap();
    assert_eq!(now(5, FILE_BYTES), Finding::Same);
    assert_eq!(now(6, FILE_BYTES), Finding::WrittenElsewhere);
    assert!(matches!(now(4, FILE_BYTES), Finding::Older { .. }));
    // What a killed session of this machine wrote counts as this machine's.
    knowledge.begin_writing().unwrap();
    assert_eq!(now(6, FILE_BYTES), Finding::OwnInterrupted);
    let longer = FILE_BYTES + 4096;
    knowledge
        .end_writing(
            Some((FileSystemKind::DEFAULT, stamped(6))),
            longer,
            None,
            &events(),
        )
        .unwrap();
    assert_eq!(now(6, longer), Finding::Same);
    assert_eq!(now(7, longer), Finding::WrittenElsewhere);
    assert!(matches!(now(6, FILE_BYTES), Finding::Older { .. }));
}

#[test]
fn kept_header_is_not_replaced_by_an_older_one() {
    let session = TestSession::new();
    let (paths, before) = (session.paths(), session.header().sequence_id());
    let keep = |sequence| {
        session.set_sequence(sequence);
        let header = session.header();
        assert_eq!(header.sequence_id(), sequence);
        let file = std::fs::File::open(session.path("x.luks")).unwrap();
        let kept = headers::keep_newest(&paths, &header, &file, None).unwrap();
        assert!(kept.aside.is_none());
    };
    keep(before + 4);
    keep(before + 5);
    assert!(headers::others(&paths).is_empty());
    // A server that shows an older header must not end a newer one that alone may still open.
    keep(before + 3);
    let [other] = &headers::others(&paths)[..] else {
        panic!("the newer one is gone");
    };
    let newer = headers::load(&headers::open(other).unwrap(), other).unwrap();
    assert_eq!(newer.sequence_id(), before + 5);
}

#[test]
fn a_newer_header_is_kept_unless_a_slot_of_it_is_damaged() {
    let session = TestSession::new();
    let (paths, before) = (session.paths(), session.header().sequence_id());
    let newer = || {
        let file = std::fs::File::open(session.path("x.luks")).unwrap();
        headers::newer(&paths, &session.header(), &file).unwrap()
    };
    let first = newer().expect("nothing is kept yet");
    assert!(
        headers::keep_newer(&paths, &session.header(), &first)
            .unwrap()
            .is_some()
    );
    assert!(newer().is_none(), "the same header again");
    session.set_sequence(before + 1);
    assert!(newer().is_some());
    let (area, _) = session.header().slot_areas().next().unwrap();
    session
        .container()
        .write_all_at(&[0xa5; 512], area)
        .unwrap();
    assert!(newer().is_none(), "the kept one may be the only good copy");
}
