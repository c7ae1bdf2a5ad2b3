//! What must be true before something is done that can't be undone, on a local container.

mod rules;
mod takeover;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use sprat_luks::{Extent, FormatOptions, Header, HeaderWrite, OpenedBy, SlotKind, format};
use sprat_store::lock::LateUntil;
use sprat_store::{
    Access as StoreAccess, Capabilities, FileName, FileStat, FreeSpace, LocalStore, Lock,
    ReadClass, Store, StoreError, StoreFile,
};
use sprat_testkit::memory::MemoryStore;
use sprat_volume::{Fenced, ReconnectError, SessionHooks as _};

use crate::address::Target;
use crate::settings::SessionOptions;
use crate::state::reserved_names::HalfMade;
use crate::supervisor::{Shape, start_order};
use crate::volume_process::connection::{Connection, HeaderBytes, open_record, owner_note};
use crate::volume_process::header::edit;
use crate::volume_process::lease::LeaseParts;
use crate::volume_process::open::acquire;
use crate::volume_process::*;

const FILE_BYTES: u64 = 20 << 20;

/// A container that a session holds.
struct Held {
    folder: tempfile::TempDir,
    start: VolumeStart,
    lease: Arc<ContainerLease>,
    /// What the lease says of earlier sessions.
    door: Option<LateUntil>,
}

impl Held {
    fn new() -> Self {
        Self::on(|store| store)
    }

    /// On a store that `wrap` makes of the local one.
    fn on(wrap: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        std::fs::create_dir(&store).unwrap();
        make_container(&store.join("x.luks"));
        Self::in_folder(folder, wrap)
    }

    /// With the container and this machine's state as they are there.
    fn in_folder(
        folder: tempfile::TempDir,
        wrap: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>,
    ) -> Self {
        let (store, state) = (folder.path().join("store"), folder.path().join("state"));
        let path = store.join("x.luks").display().to_string();
        let target = Target::parse(&path, Path::new("/")).unwrap();
        let run = folder.path().join("run");
        let options = SessionOptions::new(target, Access::ReadWrite, state.clone(), run);
        let start = start_order(&options, OpenedBy::Sprat, Shape::Session, 1);
        let record = open_record(&state, &start.target, Access::ReadWrite).unwrap();
        let connection = Connection::new(&start, &record).unwrap();
        let store = connection.connect().unwrap();
        let name = start.target.name.clone();
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
            late_found: late::Found::default(),
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

    /// What the next session on this machine must wait for, once this one is gone.
    fn suspects_after(self) -> Vec<std::ops::Range<u64>> {
        drop(self.lease);
        let state = self.folder.path().join("state");
        let record = open_record(&state, &self.start.target, Access::ReadWrite);
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

/// What a file was asked for; and it may lose a write, or not answer it.
struct Recorded {
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

impl Recorded {
    fn note(&self, what: String) {
        self.asked.lock().unwrap().push(what);
    }
}

impl StoreFile for Recorded {
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

fn recorded(held: &Held, loses: Option<u64>) -> Recorded {
    let below = held
        .lease
        .store()
        .open(held.lease.file_name(), StoreAccess::ReadWrite);
    Recorded {
        below: below.unwrap(),
        asked: Arc::default(),
        loses,
        no_answer_at: None,
    }
}

/// A local store that notes what it was asked for, and may refuse a rename or not answer it.
struct Noted {
    below: Arc<dyn Store>,
    asked: Arc<Mutex<Vec<String>>>,
    rename: fn() -> Option<StoreError>,
    /// Nothing is opened.
    refused: Arc<AtomicBool>,
}

impl Noted {
    fn file(&self, below: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(Recorded {
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

impl Store for Noted {
    fn describe(&self) -> String {
        self.below.describe()
    }
    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }
    fn open(&self, name: &FileName, access: StoreAccess) -> Result<Arc<dyn StoreFile>, StoreError> {
        if self.refused.load(Ordering::SeqCst) {
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

/// A container on such a store, and what that was asked for.
fn noted(rename: fn() -> Option<StoreError>) -> (Held, Arc<Mutex<Vec<String>>>) {
    let asked: Arc<Mutex<Vec<String>>> = Arc::default();
    let log = Arc::clone(&asked);
    let held = Held::on(|below| {
        Arc::new(Noted {
            below,
            asked,
            rename,
            refused: Arc::default(),
        })
    });
    (held, log)
}

#[test]
fn one_header_copy_is_durable_before_the_other_is_written_and_both_are_read_back() {
    let held = Held::new();
    let file = recorded(&held, None);
    edit::write_in_order(&held.lease, &file, &header_writes()).unwrap();
    let asked = file.asked.lock().unwrap().clone();
    let order = ["write 16384", "flush", "write 0", "flush"];
    assert_eq!(asked[..4], order);
    assert_eq!(asked[4..], ["read 16384", "read 0"]);
    for loses in [0, 16384] {
        let held = Held::new();
        let file = recorded(&held, Some(loses));
        let lost = edit::write_in_order(&held.lease, &file, &header_writes());
        assert_eq!(lost.unwrap_err().exit, Exit::Damaged);
    }
}

#[test]
fn no_header_is_written_once_the_lock_is_lost() {
    let held = Held::new();
    let before = std::fs::read(held.path("x.luks")).unwrap();
    held.lose_the_lock();
    let file = recorded(&held, None);
    let refused = edit::write_in_order(&held.lease, &file, &header_writes());
    assert_eq!(refused.unwrap_err().exit, Exit::Locked);
    assert_eq!(*file.asked.lock().unwrap(), [""; 0]);
    assert!(std::fs::read(held.path("x.luks")).unwrap() == before);
}

#[test]
fn a_rewritten_container_takes_the_name_only_while_the_lock_is_ours() {
    for is_ours in [true, false] {
        let held = Held::new();
        let container = held.path("x.luks");
        let new_name = HalfMade::Rewritten.name(held.lease.file_name()).unwrap();
        let rewritten = held.path(new_name.as_str());
        std::fs::copy(&container, &rewritten).unwrap();
        let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
        let (old, new) = (inode(&container), inode(&rewritten));
        if !is_ours {
            held.lose_the_lock();
        }
        let swapped = rewrite::swap(&held.lease, &StopFlag::default(), &new_name);
        assert_eq!(swapped.is_ok(), is_ours, "{swapped:?}");
        assert_eq!(inode(&container), if is_ours { new } else { old });
    }
}

#[test]
fn a_file_of_another_length_is_refused_after_a_lost_connection() {
    let held = Held::new();
    let file = held.lease.reconnect(0);
    assert!(file.is_ok_and(|file| file.len().is_ok_and(|len| len == FILE_BYTES)));
    for file_bytes in [FILE_BYTES - 4096, FILE_BYTES + 4096] {
        let held = Held::new();
        let file = std::fs::File::options()
            .write(true)
            .open(held.path("x.luks"));
        file.unwrap().set_len(file_bytes).unwrap();
        let refused = held.lease.reconnect(0).map(drop);
        assert!(
            matches!(refused, Err(ReconnectError::GiveUp(_))),
            "{refused:?}"
        );
        let lost = held.lease.lost().unwrap();
        assert_eq!(lost.exit, Exit::Damaged, "{lost:?}");
        // And nothing may be sent by this session any more.
        assert!(held.lease.before_epoch().is_err());
    }
}

#[test]
fn the_reserve_is_given_up_only_without_room_and_by_who_may() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let events = EventSender(Sender::new(ours));
    let mut held = Held::new();
    held.start.reserve_bytes = 1000;
    let name = reserve::name(&held.start.target.name).unwrap();
    let cases = [
        (true, Some(1000), true),
        (true, Some(999), false),
        (true, None, true),
        (false, Some(999), true),
    ];
    for (may, available_bytes, stays) in cases {
        held.start.may_use_reserve = may;
        let store = MemoryStore::new();
        store.create_new(&name).unwrap();
        reserve::give_up(&held.start, &store, available_bytes, &events).unwrap();
        assert_eq!(
            store.stat(&name).is_ok(),
            stays,
            "{may} {available_bytes:?}"
        );
    }
}

#[test]
fn bytes_are_sent_only_by_a_look_at_the_lock_that_is_not_too_old() {
    let held = Held::new();
    let range = std::slice::from_ref(&(0..4096));
    held.lease.still_ours().unwrap();
    held.lease.looked_ago(Duration::from_secs(60));
    held.lease.before_send(range).unwrap();
    held.lease.looked_ago(Duration::from_secs(60));
    held.lose_the_lock();
    let refused = held.lease.before_send(range);
    assert!(matches!(refused, Err(Fenced::Lost(_))), "{refused:?}");
    assert_eq!(held.lease.lost().unwrap().exit, Exit::Locked);
    // And from then on at once.
    assert!(held.lease.before_epoch().is_err());
    assert!(!held.lease.release().unwrap());
}

#[test]
fn the_lock_is_given_back_only_with_everything_settled() {
    let held = Held::new();
    let is_free = || {
        let found = sprat_store::lock::inspect(&*held.lease.store(), held.lease.container(), None);
        found.unwrap().held.is_none()
    };
    held.lease
        .before_send(std::slice::from_ref(&(0..4096)))
        .unwrap();
    assert!(!held.lease.release().unwrap());
    assert!(!is_free());
    held.lease.all_settled().unwrap();
    assert!(held.lease.release().unwrap());
    assert!(is_free());
    // Nothing can be sent any more.
    let refused = held.lease.before_send(std::slice::from_ref(&(0..4096)));
    assert!(matches!(refused, Err(Fenced::Lost(_))), "{refused:?}");
}

#[test]
fn what_got_no_answer_stays_in_the_record_and_what_was_answered_does_not() {
    let held = Held::new();
    edit::write_in_order(&held.lease, &recorded(&held, None), &header_writes()).unwrap();
    assert_eq!(held.suspects_after(), []);
    let held = Held::new();
    let file = Recorded {
        no_answer_at: Some(0),
        ..recorded(&held, None)
    };
    edit::write_in_order(&held.lease, &file, &header_writes()).unwrap_err();
    assert_eq!(held.suspects_after(), std::slice::from_ref(&(0..32768)));

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
        let (held, _) = noted(rename);
        let new_name = HalfMade::Rewritten.name(held.lease.file_name()).unwrap();
        std::fs::copy(held.path("x.luks"), held.path(new_name.as_str())).unwrap();
        rewrite::swap(&held.lease, &StopFlag::default(), &new_name).unwrap_err();
        assert_eq!(held.suspects_after(), suspects);
    }
}

#[test]
fn another_container_never_takes_the_name() {
    let held = Held::new();
    let container = held.path("x.luks");
    let new_name = HalfMade::Rewritten.name(held.lease.file_name()).unwrap();
    make_container(&held.path(new_name.as_str()));
    let before = std::fs::metadata(&container).unwrap().ino();
    let refused = rewrite::swap(&held.lease, &StopFlag::default(), &new_name).unwrap_err();
    assert_eq!(refused.exit, Exit::Damaged);
    assert_eq!(std::fs::metadata(&container).unwrap().ino(), before);
}

#[test]
fn a_rewritten_container_is_durable_before_it_takes_the_name_and_the_name_afterwards() {
    let (held, asked) = noted(|| None);
    let file = std::fs::File::options()
        .write(true)
        .open(held.path("x.luks"));
    file.unwrap().write_all_at(&[7; 65536], 17 << 20).unwrap();
    let before = std::fs::read(held.path("x.luks")).unwrap();
    let rewrite = rewrite::Rewrite::new(FILE_BYTES, 16 << 20, std::iter::empty());
    rewrite::run(&held.lease, &StopFlag::default(), &rewrite, true).unwrap();
    let asked = asked.lock().unwrap().clone();
    let at = |what: &str| asked.iter().rposition(|one| one.starts_with(what)).unwrap();
    let flushed = asked.iter().rposition(|one| one == "flush").unwrap();
    let order = [at("write"), flushed, at("rename"), at("flush folder")];
    assert!(order.is_sorted(), "{asked:?}");
    assert!(std::fs::read(held.path("x.luks")).unwrap() == before);
    // Nothing of a rewrite that did not come to its end may take the name later.
    let leftover = HalfMade::Rewritten.name(held.lease.file_name()).unwrap();
    let leftover = held.path(leftover.as_str());
    std::fs::copy(held.path("x.luks"), &leftover).unwrap();
    rewrite::forestall_rename(&held.lease).unwrap();
    assert!(!leftover.exists());
}

#[test]
fn a_lock_that_was_lost_is_not_given_back() {
    let held = Held::new();
    held.lose_the_lock();
    assert!(held.lease.before_epoch().is_err());
    assert!(!held.lease.release().unwrap());
}

#[test]
fn before_the_machine_sleeps_all_is_answered_and_nothing_more_is_sent() {
    let held = Held::new();
    let lease = &held.lease;
    lease.notes_sent(late::Sent::new(late::some_key(1)));
    let range = std::slice::from_ref(&(0..4096));
    lease.before_send(range).unwrap();
    let number = lease.sends(0, &[1; 4096]);
    let moment = Duration::from_millis(100);
    std::thread::scope(|scope| {
        let falling = scope.spawn(|| lease.fall_asleep());
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
    // What is never answered does not keep the machine awake.
    lease.sends(0, &[1; 4096]);
    let begun = Instant::now();
    lease.fall_asleep();
    assert!((4..6).contains(&begun.elapsed().as_secs()));
    lease.wake();
}
