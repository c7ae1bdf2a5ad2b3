//! What others left beside a container: empty leases, locks of an older sprat, old leases.

use super::*;

#[test]
fn empty_lease_is_passed_at_once_by_its_creator_later_by_others() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    // Died between create and write: the journal has the number, the file is empty.
    drop(take(&store, &record(here.path())).unwrap());
    let empty = store
        .open(&lock_file(FIRST), sprat_store::Access::ReadWrite)
        .unwrap();
    empty.resize(0).unwrap();
    assert_held(take(&store, &record(there.path())), FIRST);
    let lock = take(&store, &record(here.path())).unwrap();
    assert_eq!((lock.number(), lock.may_arrive()), (FIRST + 1, false));
    lock.release(&store).unwrap();
    // One that was not created on this machine.
    store.create_new(&lock_file(FIRST + 2)).unwrap();
    let record = record(there.path());
    assert_held(take(&store, &record), FIRST + 2);
    let patience = Duration::from_millis(300);
    let first = Lock::check_leases(&store, &container(), &record).unwrap();
    let wait = first.wait_for_empty(&record, patience).unwrap();
    assert!(wait <= patience);
    std::thread::sleep(wait);
    let first = first.again(&store).unwrap();
    assert_eq!(first.wait_for_empty(&record, patience), None);
    let lock = Lock::acquire_after(&first, &store, &record, owner(), || {}).unwrap();
    assert_eq!((lock.number(), lock.may_arrive()), (FIRST + 3, false));
    lock.release(&store).unwrap();
}

#[test]
fn empty_lease_that_is_filled_meanwhile_stays_valid() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let made = store.create_new(&lock_file(FIRST)).unwrap();
    let record = record(here.path());
    let patience = Duration::from_millis(300);
    let first = Lock::check_leases(&store, &container(), &record).unwrap();
    std::thread::sleep(patience);
    let first = first.again(&store).unwrap();
    // Its creator was only slow.
    let other = MemoryStore::new();
    let theirs = take(&other, &self::record(there.path())).unwrap();
    let mut bytes = vec![0; 4096];
    let read = other.open(&theirs.file(), sprat_store::Access::ReadOnly);
    read.unwrap()
        .read_at(0, &mut bytes, sprat_store::ReadClass::Demand)
        .unwrap();
    made.write_at(0, &bytes).unwrap();
    let refused = Lock::acquire_after(&first, &store, &record, owner(), || {});
    assert!(matches!(refused, Err(LockError::HeldElsewhere { .. })));
    // The withdrawn lease hides it from no session.
    let after = take(&store, &self::record(host().path()));
    assert!(matches!(after, Err(LockError::Waiting { .. })), "{after:?}");
}

#[test]
fn old_lock_is_respected_and_followed_by_the_first_lease() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let json = r#"{"token":"00","host":"h","started_s":1,"renewed":2,"version":"0.1"}"#;
    let old = |number: u64| {
        let file = store.create_new(&lock_file(number)).unwrap();
        let text = format!("{json:<511}\n");
        file.write_at(0, text.as_bytes()).unwrap();
    };
    old(7);
    let mine = record(here.path());
    assert_held(take(&store, &mine), 7);
    let lock = Lock::take_over(&store, &container(), &mine, owner()).unwrap();
    assert_eq!((lock.number(), lock.open_predecessors()), (FIRST, vec![7]));
    // The old session checks its own file and the next number: one of the two shows "lost".
    assert_eq!(lock_files(&store), [lock_file(FIRST)]);
    lock.close_by_word(lock::LATE_WRITE_S);
    lock.confirm(&store).unwrap();
    lock.release(&store).unwrap();
    // An old lock beside a lease does not count.
    old(3);
    let lock = take(&store, &record(there.path())).unwrap();
    assert_eq!(lock.number(), FIRST + 1);
    lock.verify(&store).unwrap();
}

#[test]
fn old_leases_are_removed_after_an_hour_and_never_the_highest() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    for _ in 0..5 {
        take(&store, &record).unwrap().release(&store).unwrap();
    }
    let lock = take(&store, &record).unwrap();
    assert_eq!(lock.remove_old(&store).unwrap(), 5, "all are of just now");
    lock.reacquire(&store).unwrap();
    lock.release(&store).unwrap();
    store.let_pass(4000);
    let lock = take(&store, &record).unwrap();
    assert_eq!(lock.number(), FIRST + 7);
    assert_eq!(lock.remove_old(&store).unwrap(), 1);
    assert_eq!(
        lock_files(&store),
        [lock_file(FIRST + 6), lock_file(FIRST + 7)]
    );
    lock.verify(&store).unwrap();
}

/// A session with an older listing would treat the one below it as the highest.
#[test]
fn old_leases_stay_below_one_that_was_never_released() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    take(&store, &record).unwrap().release(&store).unwrap();
    drop(take(&store, &record).unwrap());
    store.let_pass(4000);
    let lock = take(&store, &record).unwrap();
    assert_eq!(lock.remove_old(&store).unwrap(), 2);
    assert_eq!(lock_files(&store).len(), 3);
}

#[test]
fn session_knows_whether_another_machine_had_the_lock_since() {
    let store = MemoryStore::new();
    let (here, there) = (host(), host());
    let (mine, theirs) = (record(here.path()), record(there.path()));
    let is_own = || {
        lock::inspect(&store, &container(), Some(&mine))
            .unwrap()
            .highest_is_own
    };
    assert!(!is_own());
    let lock = take(&store, &mine).unwrap();
    assert!(!lock.follows_own(), "no other machine had it");
    // It dies.
    drop(lock);
    assert!(is_own());
    let lock = take(&store, &mine).unwrap();
    assert!(lock.took_over() && lock.follows_own());
    lock.reacquire(&store).unwrap();
    lock.release(&store).unwrap();
    assert!(is_own());
    let lock = take(&store, &mine).unwrap();
    assert!(!lock.took_over() && lock.follows_own());
    drop(lock);
    // Another machine takes over, and ends again.
    let lock = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
    assert!(!lock.follows_own());
    lock.close_by_word(0);
    lock.confirm(&store).unwrap();
    lock.release(&store).unwrap();
    assert!(!is_own());
    let lock = take(&store, &mine).unwrap();
    assert!(!lock.follows_own());
    lock.release(&store).unwrap();
}
