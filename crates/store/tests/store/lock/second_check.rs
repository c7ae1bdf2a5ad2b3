//! What happens between two checks of a lease, what a listing doesn't show, and lease content that
//! we did not write.

use std::sync::Mutex;

use sprat_store::{
    Access, Applied, Capabilities, FileStat, FreeSpace, ReadClass, StoreError, StoreErrorKind,
    StoreFile,
};

use super::garbled::garble;
use super::*;

type Act = Box<dyn FnOnce(&MemoryStore) + Send>;
/// What happens to a lease's file (created and filled or not), and the answer.
type Fill = fn(&MemoryStore, &FileName, &[u8]) -> Result<Applied, StoreError>;

/// A store that others change at given moments, and whose listing may be wrong.
#[derive(Default)]
pub(super) struct DisturbedStore {
    pub(super) below: MemoryStore,
    /// Called right after a lease's file was created, before it is read again.
    after_making: Mutex<Option<Act>>,
    /// Called before a file is opened.
    before_opening: Mutex<Option<Act>>,
    stats: Arc<AtomicUsize>,
    fill: Mutex<Option<Fill>>,
    /// How many writes into leases by their names are garbled.
    pub(super) garbled: AtomicUsize,
    /// Writes fail with "disk full".
    full: AtomicBool,
    unlisted: Mutex<Vec<FileName>>,
    /// Listed although they don't exist.
    listed: Mutex<Vec<FileName>>,
    flushes: Arc<AtomicUsize>,
    removals: AtomicUsize,
}

impl DisturbedStore {
    pub(super) fn after_making(&self, act: impl FnOnce(&MemoryStore) + Send + 'static) {
        *self.after_making.lock().unwrap() = Some(Box::new(act));
    }

    fn before_opening(&self, act: impl FnOnce(&MemoryStore) + Send + 'static) {
        *self.before_opening.lock().unwrap() = Some(Box::new(act));
    }

    fn fill_by(&self, fill: Fill) {
        *self.fill.lock().unwrap() = Some(fill);
    }
}

fn no_space() -> StoreError {
    StoreError::NoSpace {
        op: "write",
        object: "x".to_owned(),
        available_bytes: 0,
    }
}

fn line_lost() -> StoreError {
    StoreError::Disconnected {
        op: "write",
        object: "x".to_owned(),
        reason: "cut".to_owned(),
    }
}

impl Store for DisturbedStore {
    fn describe(&self) -> String {
        self.below.describe()
    }
    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }
    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        let act = self.before_opening.lock().unwrap().take();
        if let Some(act) = act {
            act(&self.below);
        }
        let file = self.below.open(name, access)?;
        Ok(Arc::new(Flushed(file, Arc::clone(&self.flushes))))
    }
    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        self.below.create_new(name)
    }
    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        let stat = self.below.stat(name);
        self.stats.fetch_add(1, Ordering::SeqCst);
        stat
    }
    fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        self.below.rename(from, to)
    }
    fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        self.below.rename_new(from, to)
    }
    fn remove(&self, name: &FileName) -> Result<(), StoreError> {
        self.removals.fetch_add(1, Ordering::SeqCst);
        self.below.remove(name)
    }
    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        let mut names = self.below.list()?;
        let unlisted = self.unlisted.lock().unwrap();
        names.retain(|name| !unlisted.contains(name));
        names.extend(self.listed.lock().unwrap().clone());
        Ok(names)
    }
    fn flush_folder(&self) -> Result<(), StoreError> {
        self.below.flush_folder()
    }
    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        self.below.free_space()
    }
    fn create_filled(&self, name: &FileName, content: &[u8]) -> Result<Applied, StoreError> {
        let fill = self.fill.lock().unwrap().take();
        let filled = match fill {
            Some(fill) => fill(&self.below, name, content),
            None => self.below.create_filled(name, content),
        };
        let act = self.after_making.lock().unwrap().take();
        if let Some(act) = act {
            act(&self.below);
        }
        filled
    }
    fn overwrite_and_stat(
        &self,
        name: &FileName,
        content: &[u8],
        next: &FileName,
    ) -> Result<Option<FileStat>, StoreError> {
        if self.full.load(Ordering::SeqCst) {
            return Err(no_space());
        }
        let stat = self.below.overwrite_and_stat(name, content, next);
        let garbles = |left: usize| left.checked_sub(1);
        let order = Ordering::SeqCst;
        if self.garbled.fetch_update(order, order, garbles).is_ok() {
            garble(&self.below, name);
        }
        stat
    }
}

/// Counts what is made durable.
struct Flushed(Arc<dyn StoreFile>, Arc<AtomicUsize>);

impl StoreFile for Flushed {
    fn len(&self) -> Result<u64, StoreError> {
        self.0.len()
    }
    fn stat(&self) -> Result<FileStat, StoreError> {
        self.0.stat()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.0.read_at(offset, buf, class)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.0.write_at(offset, data)
    }
    fn flush(&self) -> Result<(), StoreError> {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.0.discard(offset, len)
    }
    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.0.resize(len)
    }
}

/// The JSON of a lease, without the padding and the checksum.
fn json_of(store: &dyn Store, number: u64) -> String {
    let (_, bytes) = store
        .read_small(&lock_file(number), Access::ReadOnly, 4096)
        .unwrap();
    let text = String::from_utf8(bytes).unwrap();
    text[..4087].trim_end().to_owned()
}

/// Changes the content of a lease, with a correct checksum.
fn change(store: &dyn Store, number: u64, from: &str, to: &str) {
    let json = json_of(store, number);
    assert!(json.contains(from), "{json}");
    put(store, number, &json.replacen(from, to, 1));
}

fn put(store: &dyn Store, number: u64, json: &str) {
    let file = match store.open(&lock_file(number), Access::ReadWrite) {
        Ok(file) => file,
        Err(_) => store.create_new(&lock_file(number)).unwrap(),
    };
    let text = format!("{json:<4087}");
    let checksum = crc32(text.as_bytes());
    let text = format!("{text}{checksum:08x}\n");
    file.write_at(0, text.as_bytes()).unwrap();
}

fn door(number: u64, until_s: Option<u64>, all_before: bool) -> String {
    let until_s = until_s.map_or("null".to_owned(), |until| until.to_string());
    format!("\"doors\":[{{\"number\":{number},\"until_s\":{until_s},\"all_before\":{all_before}}}]")
}

const NO_DOORS: &str = "\"doors\":[]";
/// A time in the far future.
const FAR: Option<u64> = Some(1 << 40);

/// A store with one lease, which is free.
pub(super) fn with_released_lease() -> DisturbedStore {
    let store = DisturbedStore::default();
    take(&store, &record(host().path()))
        .unwrap()
        .release(&store)
        .unwrap();
    store
}

#[test]
fn change_between_creation_and_second_check_is_detected() {
    fn make(store: &MemoryStore, number: u64) {
        store.create_new(&lock_file(number)).unwrap();
    }
    type Case = (&'static str, fn(&MemoryStore));
    let cases: [Case; 8] = [
        ("the next number", |store| make(store, FIRST + 2)),
        ("the next number, not listed yet", |store| {
            make(store, FIRST + 2);
        }),
        ("a number beyond the next", |store| make(store, FIRST + 3)),
        ("a lock of an older sprat", |store| make(store, 7)),
        ("another's content in our file", |store| {
            change(store, FIRST + 1, "\"attempt\":\"", "\"attempt\":\"0");
        }),
        ("our file is gone", |store| {
            store.remove(&lock_file(FIRST + 1)).unwrap();
        }),
        ("the lease below is gone", |store| {
            store.remove(&lock_file(FIRST)).unwrap();
        }),
        ("the lease below is in use again", |store| {
            change(store, FIRST, "\"free\":true", "\"free\":false");
        }),
    ];
    for (what, act) in cases {
        let (store, state) = (with_released_lease(), host());
        store.after_making(act);
        if what.contains("not listed") {
            store.unlisted.lock().unwrap().push(lock_file(FIRST + 2));
        }
        let refused = take(&store, &record(state.path()));
        assert!(
            matches!(refused, Err(LockError::HeldElsewhere { .. })),
            "{what}: {refused:?}"
        );
        if what.contains("below is gone") {
            // The same if that one belongs to a dead session of ours.
            let (store, state) = (DisturbedStore::default(), host());
            drop(take(&store, &record(state.path())).unwrap());
            store.after_making(act);
            let refused = take(&store, &record(state.path()));
            assert!(
                matches!(refused, Err(LockError::HeldElsewhere { .. })),
                "{what}: {refused:?}"
            );
        }
        if what.contains("in use again") {
            // The withdrawn lease must not hide it.
            assert_eq!(held(&store).unwrap().waits_for, [FIRST], "{what}");
        }
    }
}

#[test]
fn server_that_does_not_list_the_new_lease_is_refused() {
    let (store, state) = (with_released_lease(), host());
    store.unlisted.lock().unwrap().push(lock_file(FIRST + 1));
    let refused = take(&store, &record(state.path()));
    assert!(
        matches!(refused, Err(LockError::Unlisted { .. })),
        "{refused:?}"
    );
}

#[test]
fn predecessors_of_the_lease_below_count_at_the_second_check() {
    let (store, state) = (with_released_lease(), host());
    store.after_making(|store| change(store, FIRST, NO_DOORS, &door(7, FAR, false)));
    let lock = take(&store, &record(state.path())).unwrap();
    assert!(lock.may_arrive());
    lock.release(&store).unwrap();
    // The same with an open predecessor.
    let (store, state) = (with_released_lease(), host());
    store.after_making(|store| change(store, FIRST, NO_DOORS, &door(7, None, false)));
    let refused = take(&store, &record(state.path()));
    assert!(
        matches!(refused, Err(LockError::Waiting { .. })),
        "{refused:?}"
    );
    assert_eq!(held(&store).unwrap().waits_for, [7]);
}

#[test]
fn passed_empty_lease_is_a_predecessor_until_the_second_check() {
    let (store, state) = (DisturbedStore::default(), host());
    drop(take(&store, &record(state.path())).unwrap());
    let empty = store.open(&lock_file(FIRST), Access::ReadWrite).unwrap();
    empty.resize(0).unwrap();
    let seen = Arc::new(Mutex::new(String::new()));
    let see = Arc::clone(&seen);
    store.after_making(move |store| *see.lock().unwrap() = json_of(store, FIRST + 1));
    let lock = take(&store, &record(state.path())).unwrap();
    let said = seen.lock().unwrap().clone();
    assert!(said.contains(&door(FIRST, None, false)), "{said}");
    // Not any more afterwards, for other sessions, too.
    assert!(!lock.may_arrive());
    assert!(held(&store).unwrap().waits_for.is_empty());
    assert!(
        store.flushes.load(Ordering::SeqCst) > 0,
        "that was not made durable"
    );
}

/// The lease `number` is empty, and was so for long enough.
fn empty_for_long(store: &DisturbedStore, record: &WriteJournal, number: u64) -> lock::LeaseCheck {
    store.create_new(&lock_file(number)).unwrap();
    let first = Lock::check_leases(store, &container(), record).unwrap();
    std::thread::sleep(Duration::from_millis(250));
    first.again(store).unwrap()
}

#[test]
fn lease_with_content_decides_below_an_empty_one() {
    let (store, here, there) = (DisturbedStore::default(), host(), host());
    let theirs = take(&store, &record(there.path())).unwrap();
    let mine = record(here.path());
    let first = empty_for_long(&store, &mine, FIRST + 1);
    let refused = Lock::acquire_after(&first, &store, &mine, owner(), || {});
    assert_held(refused, FIRST);
    drop(theirs);
    // The same if that one belongs to a dead session of ours: a predecessor with an end time.
    let (store, state) = (DisturbedStore::default(), host());
    drop(take(&store, &record(state.path())).unwrap());
    let mine = record(state.path());
    let first = empty_for_long(&store, &mine, FIRST + 1);
    let lock = Lock::acquire_after(&first, &store, &mine, owner(), || {}).unwrap();
    assert_eq!((lock.number(), lock.may_arrive()), (FIRST + 2, true));
    assert!(lock.open_predecessors().is_empty());
}

#[test]
fn after_a_failed_fill_only_an_empty_last_file_is_removed() {
    type Case = (&'static str, Fill, u64);
    let cases: [Case; 4] = [
        (
            "empty",
            |store, name, _| {
                store.create_new(name)?;
                Ok(Applied::NotDurable(no_space()))
            },
            0,
        ),
        (
            "filled, and not made durable",
            |store, name, content| {
                store.create_new(name)?.write_at(0, content)?;
                Ok(Applied::NotDurable(no_space()))
            },
            1,
        ),
        (
            "not the last",
            |store, name, _| {
                store.create_new(name)?;
                store.create_new(&lock_file(FIRST + 1))?;
                Ok(Applied::NotDurable(no_space()))
            },
            2,
        ),
        // It may still be filled.
        (
            "of a lost line",
            |store, name, _| {
                store.create_new(name)?;
                Ok(Applied::NotDurable(line_lost()))
            },
            1,
        ),
    ];
    for (what, fill, left) in cases {
        let (store, state) = (DisturbedStore::default(), host());
        store.fill_by(fill);
        store.full.store(true, Ordering::SeqCst);
        let failed = take(&store, &record(state.path()));
        assert!(matches!(failed, Err(LockError::Store { .. })), "{failed:?}");
        assert_eq!(lock_files(&store).len() as u64, left, "{what}");
        let removals = store.removals.load(Ordering::SeqCst);
        assert_eq!(removals, usize::from(left == 0), "{what}");
    }
}

#[test]
fn dead_predecessor_counts_for_its_time_by_the_servers_clock() {
    let (store, state) = (MemoryStore::new(), host());
    drop(take(&store, &record(state.path())).unwrap());
    // The server's clock is far ahead of ours.
    store.let_pass(3 * lock::LATE_WRITE_S);
    let lock = take(&store, &record(state.path())).unwrap();
    assert!(lock.may_arrive());
    lock.release(&store).unwrap();
    store.let_pass(lock::LATE_WRITE_S - 60);
    let lock = take(&store, &record(state.path())).unwrap();
    assert!(lock.may_arrive());
    lock.release(&store).unwrap();
    store.let_pass(120);
    assert!(!take(&store, &record(state.path())).unwrap().may_arrive());
}

#[test]
fn lease_with_foreign_content_is_lost() {
    let changes = [
        ("\"token\":\"", "\"token\":\"0"),
        ("\"attempt\":\"", "\"attempt\":\"0"),
        ("\"free\":false", "\"free\":true"),
        ("\"renewed\":3", "\"renewed\":2"),
        ("\"renewed\":3", "\"renewed\":4"),
    ];
    for (from, to) in changes {
        let (store, state) = (MemoryStore::new(), host());
        let lock = take(&store, &record(state.path())).unwrap();
        for _ in 0..3 {
            lock.renew(&store).unwrap();
        }
        lock.verify(&store).unwrap();
        change(&store, FIRST, from, to);
        assert_lost(lock.verify(&store));
        let before = json_of(&store, FIRST);
        assert_lost(lock.renew(&store));
        assert_lost(lock.reacquire(&store));
        assert_eq!(json_of(&store, FIRST), before, "{to}: nothing is written");
        assert_eq!(lock_files(&store), [lock_file(FIRST)], "{to}");
    }
}

#[test]
fn release_fails_with_a_twins_or_unlisted_lease_above() {
    let (store, state) = (DisturbedStore::default(), host());
    let lock = take(&store, &record(state.path())).unwrap();
    // A copy of this process acquired the lease again, with the same token.
    let json = json_of(&store, FIRST);
    put(&store, FIRST + 1, &json);
    assert_lost(lock.release(&store));

    let (store, here, there) = (DisturbedStore::default(), host(), host());
    let lock = take(&store, &record(here.path())).unwrap();
    let theirs = record(there.path());
    let other = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
    other.close_by_word(lock::LATE_WRITE_S);
    other.confirm(&store).unwrap();
    store.unlisted.lock().unwrap().push(other.file());
    assert_lost(lock.release(&store));
}

#[test]
fn change_while_a_lease_is_reacquired_is_detected() {
    type Case = (&'static str, fn(&MemoryStore));
    let cases: [Case; 5] = [
        ("the number after the next", |store| {
            store.create_new(&lock_file(FIRST + 2)).unwrap();
        }),
        ("another's content in our file", |store| {
            change(store, FIRST + 1, "\"attempt\":\"", "\"attempt\":\"0");
        }),
        ("ours was renewed by another process", |store| {
            change(store, FIRST + 1, "\"renewed\":0", "\"renewed\":1");
        }),
        ("the one before was released", |store| {
            change(store, FIRST, "\"free\":false", "\"free\":true");
        }),
        ("the one before was renewed by a copy", |store| {
            change(store, FIRST, "\"renewed\":1", "\"renewed\":2");
        }),
    ];
    for (what, act) in cases {
        let (store, state) = (DisturbedStore::default(), host());
        let lock = take(&store, &record(state.path())).unwrap();
        lock.renew(&store).unwrap();
        store.after_making(act);
        let again = lock.reacquire(&store);
        assert!(
            matches!(again, Err(LockError::Lost { .. })),
            "{what}: {again:?}"
        );
    }
}

#[test]
fn lease_possibly_created_by_a_lost_connection_is_used() {
    let (store, state) = (DisturbedStore::default(), host());
    let lock = take(&store, &record(state.path())).unwrap();
    store.fill_by(|store, name, content| {
        store.create_filled(name, content)?.durable()?;
        Err(line_lost())
    });
    let failed = lock.reacquire(&store);
    assert!(matches!(failed, Err(LockError::Store { .. })), "{failed:?}");
    lock.reacquire(&store).unwrap();
    assert_eq!(lock.number(), FIRST + 2);
    lock.verify(&store).unwrap();
    drop(lock);
    // And this machine knows it after a kill.
    let lock = take(&store, &record(state.path())).unwrap();
    assert_eq!((lock.number(), lock.took_over()), (FIRST + 3, true));
    drop(lock);
    // A lease of the lost connection is not ours if another session has written it.
    let (store, state) = (DisturbedStore::default(), host());
    let lock = take(&store, &record(state.path())).unwrap();
    store.fill_by(|store, name, content| {
        store.create_filled(name, content)?.durable()?;
        change(store, FIRST + 1, "\"attempt\":\"", "\"attempt\":\"0");
        Err(line_lost())
    });
    lock.reacquire(&store).unwrap_err();
    assert_lost(lock.reacquire(&store));
}

#[test]
fn missing_or_oversized_listed_lease_counts_as_in_use() {
    let (store, state) = (with_released_lease(), host());
    store.listed.lock().unwrap().push(lock_file(FIRST + 4));
    assert_held(take(&store, &record(state.path())), FIRST + 4);
    let (store, state) = (with_released_lease(), host());
    let file = store.open(&lock_file(FIRST), Access::ReadWrite).unwrap();
    file.resize(5000).unwrap();
    assert_held(take(&store, &record(state.path())), FIRST);
}

#[test]
fn answer_closes_its_predecessor_and_adds_those_it_waited_for() {
    let (store, state) = (with_released_lease(), host());
    // A predecessor that stands for all leases before it, too.
    let free = json_of(&store, FIRST);
    put(&store, FIRST + 3, &free);
    put(
        &store,
        FIRST + 5,
        &free.replace(NO_DOORS, &door(FIRST + 3, None, true)),
    );
    let mine = record(state.path());
    let lock = Lock::take_over(&store, &container(), &mine, owner()).unwrap();
    let _ = lock.close_answered(&store).unwrap();
    assert_eq!(lock.open_predecessors(), [FIRST + 3]);

    let (store, here, there) = (DisturbedStore::default(), host(), host());
    let theirs = take(&store, &record(there.path())).unwrap();
    let mine = record(here.path());
    let lock = Lock::take_over(&store, &container(), &mine, owner()).unwrap();
    change(&store, FIRST, "\"free\":false", "\"free\":true");
    change(&store, FIRST, NO_DOORS, &door(9, FAR, false));
    assert_eq!(lock.close_answered(&store).unwrap(), [FIRST]);
    assert!(lock.may_arrive(), "what that one waited for was lost");
    let before = store.flushes.load(Ordering::SeqCst);
    lock.confirm(&store).unwrap();
    assert!(store.flushes.load(Ordering::SeqCst) > before);
    assert!(json_of(&store, FIRST + 1).contains(&door(9, FAR, false)[9..40]));
    drop(theirs);
}

/// A check on the older connection, which still answers, while the next lease is created on a new
/// one.
#[test]
fn check_during_a_reconnect_is_no_takeover() {
    fn assert_inconclusive(looked: &Result<(), LockError>) {
        let Err(LockError::Store { source, .. }) = looked else {
            panic!("{looked:?}");
        };
        assert_eq!(source.kind(), StoreErrorKind::Disconnected);
    }
    let (store, state) = (DisturbedStore::default(), host());
    let lock = Arc::new(take(&store, &record(state.path())).unwrap());
    lock.renew(&store).unwrap();
    let looking = Arc::clone(&lock);
    store.after_making(move |before| assert_inconclusive(&looking.verify(before)));
    lock.reacquire(&store).unwrap();
    lock.verify(&store).unwrap();
    lock.renew(&store).unwrap();
    // It was created, and that connection was lost before the answer.
    store.fill_by(|below, name, content| {
        below.create_filled(name, content)?.durable()?;
        Err(line_lost())
    });
    assert_inconclusive(&lock.reacquire(&store));
    assert_inconclusive(&lock.verify(&store));
    assert_inconclusive(&lock.renew(&store));
    lock.reacquire(&store).unwrap();
    lock.verify(&store).unwrap();
    assert!(!lock.has_twin());
    // A real takeover is still recognised.
    let theirs = record(host().path());
    let other = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
    assert_lost(lock.verify(&store));
    assert_lost(lock.reacquire(&store));
    assert!(lock.answer(&store).unwrap());
    assert_eq!(other.close_answered(&store).unwrap(), [other.number() - 1]);
}

/// The own lease is read after the reconnect, the next one before it.
#[test]
fn check_overtaken_by_a_reconnect_finds_no_copy_of_the_process() {
    let (store, state) = (DisturbedStore::default(), host());
    let lock = Arc::new(take(&store, &record(state.path())).unwrap());
    lock.renew(&store).unwrap();
    let looking = Arc::clone(&lock);
    let stats = Arc::clone(&store.stats);
    let before = stats.load(Ordering::SeqCst);
    store.before_opening(move |store| {
        while stats.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
        looking.reacquire(store).unwrap();
    });
    let looked = lock.verify(&store);
    assert!(!matches!(looked, Err(LockError::Lost { .. })), "{looked:?}");
    assert_eq!(lock.number(), FIRST + 1);
    assert!(!lock.has_twin());
    lock.verify(&store).unwrap();
}

/// Another session takes over while this one creates its next lease, and waits for the answer in
/// that lease.
#[test]
fn takeover_during_a_reconnect_gets_its_answer() {
    let (store, here, there) = (DisturbedStore::default(), host(), host());
    let lock = take(&store, &record(here.path())).unwrap();
    let theirs = record(there.path());
    let other = Arc::new(Mutex::new(None));
    let taking = Arc::clone(&other);
    store.after_making(move |store| {
        let taken = Lock::take_over(store, &container(), &theirs, owner()).unwrap();
        *taking.lock().unwrap() = Some(taken);
    });
    assert_lost(lock.reacquire(&store));
    let other = other.lock().unwrap().take().unwrap();
    assert_eq!(other.open_predecessors(), [FIRST + 1]);
    assert!(lock.answer(&store).unwrap());
    assert_eq!(other.close_answered(&store).unwrap(), [FIRST + 1]);
    assert!(other.open_predecessors().is_empty() && !other.may_arrive());
}
