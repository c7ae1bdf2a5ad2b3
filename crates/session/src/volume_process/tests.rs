//! Tests with a local container: what must be true before a step that can't be undone.

mod rules;
mod takeover;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use sprat_luks::{Extent, FormatOptions, Header, HeaderWrite, OpenedBy, SlotKind, format};
use sprat_store::lock::LateUntil;
use sprat_store::{
    Access as StoreAccess, Capabilities, FileName, FileStat, FreeSpace, LocalStore, Lock,
    ReadClass, Store, StoreError, StoreFile,
};
use sprat_testkit::memory::MemoryStore;
use sprat_volume::{Fenced, ReconnectError, SessionHooks as _};

use crate::address::Target;
use crate::connect::{Connection, HeaderBytes};
use crate::settings::SessionSettings;
use crate::state::journal::{open_journal, owner_note};
use crate::state::reserved_names::HalfMade;
use crate::supervisor::{Shape, start_order};
use crate::volume_process::header::edit;
use crate::volume_process::lease::LeaseParts;
use crate::volume_process::open::acquire;
use crate::volume_process::*;

const FILE_BYTES: u64 = 20 << 20;

/// A container that a session has acquired.
struct TestSession {
    folder: tempfile::TempDir,
    start: VolumeStart,
    lease: Arc<ContainerLease>,
    /// What the lease says about earlier sessions.
    door: Option<LateUntil>,
}

impl TestSession {
    fn new() -> Self {
        Self::on(|store| store)
    }

    /// On the store that `wrap` makes from the local one.
    fn on(wrap: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        std::fs::create_dir(&store).unwrap();
        make_container(&store.join("x.luks"));
        Self::in_folder(folder, wrap)
    }

    /// With the container and this machine's state in this folder.
    fn in_folder(
        folder: tempfile::TempDir,
        wrap: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>,
    ) -> Self {
        let (store, state) = (folder.path().join("store"), folder.path().join("state"));
        let path = store.join("x.luks").display().to_string();
        let target = Target::parse(&path, Path::new("/")).unwrap();
        let run = folder.path().join("run");
        let settings = SessionSettings::new(target, Access::ReadWrite, state.clone(), run);
        let start = start_order(&settings, OpenedBy::Sprat, Shape::Session, 1);
        let record = open_journal(&state, &start.settings.target, Access::ReadWrite).unwrap();
        let connection = Connection::new(&start.settings, &record).unwrap();
        let store = connection.connect().unwrap();
        let name = start.settings.target.name.clone();
        let owner = owner_note(&state).unwrap();
        let lock = Lock::acquire(&*store, &name, &record, owner).unwrap();
        let door = lock.late_until();
        let file = store.open(&name, StoreAccess::ReadWrite).unwrap();
        let header = Header::load(&HeaderBytes(&*file)).unwrap();
        let lease = Arc::new(ContainerLease::new(LeaseParts {
            connection,
            record,
            container: name.clone(),
            file_name: name,
            access: StoreAccess::ReadWrite,
            opened_by: OpenedBy::Sprat,
            store: wrap(store),
            lock: Some(lock),
            stale_lock: None,
            highest: None,
            highest_is_own: false,
            late_records: lease::LateRecords::default(),
        }));
        lease.learn(header.pins(), FILE_BYTES);
        Self {
            folder,
            start,
            lease,
            door,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("store").join(name)
    }

    /// The ranges that the next session on this machine must wait for, once this session is gone.
    fn suspects_after(self) -> Vec<std::ops::Range<u64>> {
        drop(self.lease);
        let state = self.folder.path().join("state");
        let record = open_journal(&state, &self.start.settings.target, Access::ReadWrite);
        record.unwrap().in_doubt()
    }

    /// Another machine takes the container over.
    fn lose_the_lock(&self) {
        let store = LocalStore::open(&self.folder.path().join("store")).unwrap();
        let numbers = store.list().unwrap().into_iter().filter_map(|name| {
            let number = name.as_str().strip_prefix("x.luks.lock.")?;
            number.parse::<u64>().ok()
        });
        let next = numbers.max().unwrap() + 1;
        let name = format!("x.luks.lock.{next}");
        store.create_new(&FileName::new(&name).unwrap()).unwrap();
    }
}

pub(crate) fn make_container(path: &Path) {
    let secret = Secret::key_file(vec![7; 4096]);
    let options = FormatOptions {
        fast_kdf_for_tests: true,
        ..FormatOptions::default()
    };
    let made = format(&[(secret, SlotKind::KeyFile)], &options).unwrap();
    let file = std::fs::File::create_new(path).unwrap();
    for extent in &made.header {
        file.write_all_at(&extent.bytes, extent.offset).unwrap();
    }
    file.set_len(FILE_BYTES).unwrap();
}

/// The requests that a file got. It can lose a write, or not answer it.
struct RecordingFile {
    below: Arc<dyn StoreFile>,
    asked: Arc<Mutex<Vec<String>>>,
    loses: Option<u64>,
    no_answer_at: Option<u64>,
}

fn no_answer() -> StoreError {
    StoreError::Disconnected {
        op: "write",
        object: "x.luks".to_owned(),
        reason: "no answer".to_owned(),
    }
}

impl RecordingFile {
    fn note(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }
}

impl StoreFile for RecordingFile {
    fn len(&self) -> Result<u64, StoreError> {
        self.below.len()
    }
    fn stat(&self) -> Result<FileStat, StoreError> {
        self.below.stat()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.note(format!("read {offset}"));
        self.below.read_at(offset, buf, class)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.note(format!("write {offset}"));
        match (self.loses, self.no_answer_at) {
            (_, Some(at)) if at == offset => Err(no_answer()),
            (Some(lost), _) if lost == offset => Ok(()),
            _ => self.below.write_at(offset, data),
        }
    }
    fn flush(&self) -> Result<(), StoreError> {
        self.note("flush".to_owned());
        self.below.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.below.discard(offset, len)
    }
    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.below.resize(len)
    }
}

/// Both copies, one after the other.
fn header_writes() -> [HeaderWrite; 4] {
    let write = |offset, byte| {
        let bytes = vec![byte; 16384];
        HeaderWrite::Write(Extent { offset, bytes })
    };
    [
        write(16384, 1),
        HeaderWrite::Barrier,
        write(0, 2),
        HeaderWrite::Barrier,
    ]
}

fn recording_file(session: &TestSession, loses: Option<u64>) -> RecordingFile {
    let below = session
        .lease
        .store()
        .open(session.lease.file_name(), StoreAccess::ReadWrite);
    RecordingFile {
        below: below.unwrap(),
        asked: Arc::default(),
        loses,
        no_answer_at: None,
    }
}

/// A local store that records its requests. It can refuse a rename, or not answer it.
struct RecordingStore {
    below: Arc<dyn Store>,
    asked: Arc<Mutex<Vec<String>>>,
    rename: fn() -> Option<StoreError>,
    /// Every open of a file for writing is refused.
    refused: Arc<AtomicBool>,
    /// The connection is lost.
    cut: Arc<AtomicBool>,
}

impl RecordingStore {
    fn file(&self, below: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(RecordingFile {
            below,
            asked: Arc::clone(&self.asked),
            loses: None,
            no_answer_at: None,
        })
    }
    fn note(&self, what: &str) {
        self.asked.lock().unwrap().push(what.to_owned());
    }
}

impl Store for RecordingStore {
    fn describe(&self) -> String {
        self.below.describe()
    }
    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }
    fn open(&self, name: &FileName, access: StoreAccess) -> Result<Arc<dyn StoreFile>, StoreError> {
        if self.cut.load(Ordering::SeqCst) {
            return Err(no_answer());
        }
        let is_there = || self.below.stat(name).is_ok();
        if self.refused.load(Ordering::SeqCst) && access == StoreAccess::ReadWrite && is_there() {
            return Err(StoreError::NoSpace {
                op: "open",
                object: name.to_string(),
                available_bytes: 0,
            });
        }
        Ok(self.file(self.below.open(name, access)?))
    }
    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        Ok(self.file(self.below.create_new(name)?))
    }
    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        self.below.stat(name)
    }
    fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        self.note("rename");
        match (self.rename)() {
            Some(error) => Err(error),
            None => self.below.rename(from, to),
        }
    }
    fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        self.below.rename_new(from, to)
    }
    fn remove(&self, name: &FileName) -> Result<(), StoreError> {
        self.note("remove");
        self.below.remove(name)
    }
    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        self.below.list()
    }
    fn flush_folder(&self) -> Result<(), StoreError> {
        self.note("flush folder");
        self.below.flush_folder()
    }
    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        self.below.free_space()
    }
    fn copy_owner_and_mode(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        self.below.copy_owner_and_mode(from, to)
    }
}

/// A container on such a store, and the requests of the store.
fn recording_store(rename: fn() -> Option<StoreError>) -> (TestSession, Arc<Mutex<Vec<String>>>) {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = Arc::clone(&asked);
    let session = TestSession::on(|below| {
        Arc::new(RecordingStore {
            below,
            asked,
            rename,
            refused: Arc::default(),
            cut: Arc::default(),
        })
    });
    (session, log)
}

#[test]
fn first_header_copy_is_durable_before_the_second_is_written() {
    let session = TestSession::new();
    let file = recording_file(&session, None);
    edit::write_in_order(&session.lease, &file, &header_writes()).unwrap();
    let asked = file.asked.lock().unwrap().clone();
    let order = ["write 16384", "flush", "write 0", "flush"];
    assert_eq!(asked[..4], order);
    assert_eq!(asked[4..], ["read 16384", "read 0"]);
    for loses in [0, 16384] {
        let session = TestSession::new();
        let file = recording_file(&session, Some(loses));
        let lost = edit::write_in_order(&session.lease, &file, &header_writes());
        assert_eq!(lost.unwrap_err().exit, Exit::Damaged);
    }
}

#[test]
fn no_header_is_written_after_the_lease_is_lost() {
    let session = TestSession::new();
    let before = std::fs::read(session.path("x.luks")).unwrap();
    session.lose_the_lock();
    let file = recording_file(&session, None);
    let refused = edit::write_in_order(&session.lease, &file, &header_writes());
    assert_eq!(refused.unwrap_err().exit, Exit::Locked);
    assert_eq!(*file.asked.lock().unwrap(), [""; 0]);
    assert!(std::fs::read(session.path("x.luks")).unwrap() == before);
}

#[test]
fn rewritten_container_gets_its_name_only_with_the_lease() {
    for is_ours in [true, false] {
        let session = TestSession::new();
        let container = session.path("x.luks");
        let new_name = HalfMade::Rewritten.name(session.lease.file_name()).unwrap();
        let rewritten = session.path(new_name.as_str());
        std::fs::copy(&container, &rewritten).unwrap();
        let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
        let (old, new) = (inode(&container), inode(&rewritten));
        if !is_ours {
            session.lose_the_lock();
        }
        let swapped = rewrite::swap(&session.lease, &StopFlag::default(), &new_name);
        assert_eq!(swapped.is_ok(), is_ours, "{swapped:?}");
        assert_eq!(inode(&container), if is_ours { new } else { old });
    }
}

#[test]
fn reconnect_refuses_a_file_of_another_length() {
    let session = TestSession::new();
    let file = session.lease.reconnect(0);
    assert!(file.is_ok_and(|file| file.len().is_ok_and(|len| len == FILE_BYTES)));
    for file_bytes in [FILE_BYTES - 4096, FILE_BYTES + 4096] {
        let session = TestSession::new();
        let file = std::fs::File::options()
            .write(true)
            .open(session.path("x.luks"));
        file.unwrap().set_len(file_bytes).unwrap();
        let refused = session.lease.reconnect(0).map(drop);
        assert!(
            matches!(refused, Err(ReconnectError::GiveUp(_))),
            "{refused:?}"
        );
        let lost = session.lease.lost().unwrap();
        assert_eq!(lost.exit, Exit::Damaged, "{lost:?}");
        // The session may not send anything any more.
        assert!(session.lease.before_epoch().is_err());
    }
}

#[test]
fn reserve_is_freed_only_on_a_full_disk_and_if_allowed() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let events = EventSender(Sender::new(ours));
    let mut session = TestSession::new();
    session.start.settings.reserve_bytes = 1000;
    let name = reserve::name(&session.start.settings.target.name).unwrap();
    let cases = [
        (true, Some(1000), true),
        (true, Some(999), false),
        (true, None, true),
        (false, Some(999), true),
    ];
    for (may, available_bytes, stays) in cases {
        session.start.settings.may_use_reserve = may;
        let store = MemoryStore::new();
        store.create_new(&name).unwrap();
        reserve::give_up(&session.start, &store, available_bytes, &events).unwrap();
        assert_eq!(
            store.stat(&name).is_ok(),
            stays,
            "{may} {available_bytes:?}"
        );
    }
}

#[test]
fn writes_need_a_recent_lease_check() {
    let session = TestSession::new();
    let range = std::slice::from_ref(&(0..4096));
    session.lease.verify().unwrap();
    session.lease.set_last_check_age(Duration::from_secs(60));
    session.lease.before_send(range).unwrap();
    session.lease.set_last_check_age(Duration::from_secs(60));
    session.lose_the_lock();
    let refused = session.lease.before_send(range);
    assert!(matches!(refused, Err(Fenced::Lost(_))), "{refused:?}");
    assert_eq!(session.lease.lost().unwrap().exit, Exit::Locked);
    // From then on the session fails at once.
    assert!(session.lease.before_epoch().is_err());
    assert!(!session.lease.release().unwrap());
}

/// A write may wait for space in a slow connection for longer than a check counts.
#[test]
fn write_that_waited_needs_a_recent_check_and_none_is_sent_after_a_loss() {
    let session = TestSession::new();
    let lease = &session.lease;
    lease.verify().unwrap();
    assert!(lease.may_send());
    lease.set_last_check_age(Duration::from_secs(60));
    assert!(!lease.may_send());
    lease.check_to_send(2).unwrap();
    assert!(lease.may_send());
    // However often it was checked: a result that came too late proves nothing.
    lease.set_last_check_age(Duration::from_secs(60));
    let slow = lease.check_to_send(3);
    assert!(matches!(slow, Err(Fenced::Disconnected(_))), "{slow:?}");
    assert!(!lease.may_send());
    session.lose_the_lock();
    assert!(lease.before_epoch().is_err());
    for checks in [0, 3] {
        assert!(!lease.may_send());
        let lost = lease.check_to_send(checks);
        assert!(matches!(lost, Err(Fenced::Lost(_))), "{lost:?}");
    }
}

#[test]
fn lease_is_released_only_with_all_writes_resolved() {
    let session = TestSession::new();
    let is_free = || {
        let found =
            sprat_store::lock::inspect(&*session.lease.store(), session.lease.container(), None);
        found.unwrap().held.is_none()
    };
    session
        .lease
        .before_send(std::slice::from_ref(&(0..4096)))
        .unwrap();
    assert!(!session.lease.release().unwrap());
    assert!(!is_free());
    session.lease.all_resolved().unwrap();
    assert!(session.lease.release().unwrap());
    assert!(is_free());
    // Nothing can be sent any more.
    let refused = session.lease.before_send(std::slice::from_ref(&(0..4096)));
    assert!(matches!(refused, Err(Fenced::Lost(_))), "{refused:?}");
}

#[test]
fn record_keeps_only_writes_without_an_answer() {
    let session = TestSession::new();
    edit::write_in_order(
        &session.lease,
        &recording_file(&session, None),
        &header_writes(),
    )
    .unwrap();
    assert_eq!(session.suspects_after(), []);
    let session = TestSession::new();
    let file = RecordingFile {
        no_answer_at: Some(0),
        ..recording_file(&session, None)
    };
    edit::write_in_order(&session.lease, &file, &header_writes()).unwrap_err();
    assert_eq!(session.suspects_after(), std::slice::from_ref(&(0..32768)));

    // A rename that is carried out late would bring an old container back.
    let refused = || {
        Some(StoreError::PermissionDenied {
            op: "rename",
            object: "x.luks".to_owned(),
        })
    };
    let first_block = std::iter::once(0..4096).collect();
    type Rename = fn() -> Option<StoreError>;
    let unanswered: Rename = || Some(no_answer());
    for (rename, suspects) in [(unanswered, first_block), (refused as Rename, Vec::new())] {
        let (session, _) = recording_store(rename);
        let new_name = HalfMade::Rewritten.name(session.lease.file_name()).unwrap();
        std::fs::copy(session.path("x.luks"), session.path(new_name.as_str())).unwrap();
        rewrite::swap(&session.lease, &StopFlag::default(), &new_name).unwrap_err();
        assert_eq!(session.suspects_after(), suspects);
    }
}

#[test]
fn another_container_never_gets_the_name() {
    let session = TestSession::new();
    let container = session.path("x.luks");
    let new_name = HalfMade::Rewritten.name(session.lease.file_name()).unwrap();
    make_container(&session.path(new_name.as_str()));
    let before = std::fs::metadata(&container).unwrap().ino();
    let refused = rewrite::swap(&session.lease, &StopFlag::default(), &new_name).unwrap_err();
    assert_eq!(refused.exit, Exit::Damaged);
    assert_eq!(std::fs::metadata(&container).unwrap().ino(), before);
}

#[test]
fn rewritten_container_is_durable_before_its_name_is() {
    let (session, asked) = recording_store(|| None);
    let file = std::fs::File::options()
        .write(true)
        .open(session.path("x.luks"));
    file.unwrap().write_all_at(&[7; 65536], 17 << 20).unwrap();
    let before = std::fs::read(session.path("x.luks")).unwrap();
    let rewrite = rewrite::Rewrite::new(FILE_BYTES, 16 << 20, std::iter::empty());
    rewrite::run(&session.lease, &StopFlag::default(), &rewrite, true).unwrap();
    let asked = asked.lock().unwrap().clone();
    let at = |what: &str| asked.iter().rposition(|one| one.starts_with(what)).unwrap();
    let flushed = asked.iter().rposition(|one| one == "flush").unwrap();
    let order = [at("write"), flushed, at("rename"), at("flush folder")];
    assert!(order.is_sorted(), "{asked:?}");
    assert!(std::fs::read(session.path("x.luks")).unwrap() == before);
    // Nothing of a rewrite that did not complete may take the name later.
    let leftover = HalfMade::Rewritten.name(session.lease.file_name()).unwrap();
    let leftover = session.path(leftover.as_str());
    std::fs::copy(session.path("x.luks"), &leftover).unwrap();
    rewrite::prevent_late_rename(&session.lease).unwrap();
    assert!(!leftover.exists());
}

#[test]
fn lost_lease_is_not_released() {
    let session = TestSession::new();
    session.lose_the_lock();
    assert!(session.lease.before_epoch().is_err());
    assert!(!session.lease.release().unwrap());
}

#[test]
fn before_sleep_all_is_answered_and_nothing_more_is_sent() {
    let session = TestSession::new();
    let lease = &session.lease;
    lease.notes_sent(late::Sent::new(late::some_key(1)));
    let range = std::slice::from_ref(&(0..4096));
    lease.before_send(range).unwrap();
    let number = lease.sends(0, &[1; 4096]);
    let moment = Duration::from_millis(100);
    std::thread::scope(|scope| {
        let falling = scope.spawn(|| lease.prepare_for_sleep());
        std::thread::sleep(moment);
        let sending = scope.spawn(|| lease.before_send(range));
        let connecting = scope.spawn(|| lease.reconnect(0).is_ok());
        std::thread::sleep(moment);
        assert!(!falling.is_finished(), "something has no answer yet");
        lease.answered(number);
        falling.join().unwrap();
        std::thread::sleep(moment);
        assert!(!sending.is_finished() && !connecting.is_finished());
        lease.wake();
        sending.join().unwrap().unwrap();
        assert!(connecting.join().unwrap());
    });
    // A request that is never answered does not keep the machine awake.
    lease.sends(0, &[1; 4096]);
    let begun = Instant::now();
    lease.prepare_for_sleep();
    assert!(begun.elapsed() >= Duration::from_secs(4));
    lease.wake();
}
