//! What others left beside a container: empty leases, locks of an older sprat, old leases.

use super::*;

#[test]
fn an_empty_lease_is_stepped_over_at_once_by_its_maker_and_later_by_others() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    // Died between create and write: the record knows the number, the file says nothing.
    drop(take(&store, &record(here.path())).unwrap());
    let empty = store
        .open(&lock_file(FIRST), sprat_store::Access::ReadWrite)
        .unwrap();
    empty.resize(0).unwrap();
    assert_held(take(&store, &record(there.path())), FIRST);
    let lock = take(&store, &record(here.path())).unwrap();
    assert_eq!((lock.number(), lock.may_arrive()), (FIRST + 1, false));
    lock.release(&store).unwrap();
    // One that nobody here made.
    store.create_new(&lock_file(FIRST + 2)).unwrap();
    let record = record(there.path());
    assert_held(take(&store, &record), FIRST + 2);
    let patience = Duration::from_millis(300);
    let first = Lock::first_look(&store, &container(), &record).unwrap();
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
fn an_empty_lease_that_is_filled_while_it_is_stepped_over_is_not_thrown_out() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let made = store.create_new(&lock_file(FIRST)).unwrap();
    let record = record(here.path());
    let patience = Duration::from_millis(300);
    let first = Lock::first_look(&store, &container(), &record).unwrap();
    std::thread::sleep(patience);
    let first = first.again(&store).unwrap();
    // Its maker was only slow.
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
    // The one that was withdrawn hides it from nobody.
    let after = take(&store, &self::record(host().path()));
    assert!(matches!(after, Err(LockError::Waiting { .. })), "{after:?}");
}

#[test]
fn a_lock_of_an_older_sprat_is_held_and_what_follows_it_is_the_first_lease() {
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
    assert_eq!((lock.number(), lock.open_doors()), (FIRST, vec![7]));
    // The old session looks for its own file and the next number: one of the two says "lost".
    assert_eq!(lock_files(&store), [lock_file(FIRST)]);
    lock.close_by_word(lock::DOOR_S);
    lock.confirm(&store).unwrap();
    lock.release(&store).unwrap();
    // One that lies there beside a lease counts for nothing.
    old(3);
    let lock = take(&store, &record(there.path())).unwrap();
    assert_eq!(lock.number(), FIRST + 1);
    lock.verify(&store).unwrap();
}

#[test]
fn old_leases_go_once_a_later_one_was_free_for_an_hour_and_never_the_highest() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    for _ in 0..5 {
        take(&store, &record).unwrap().release(&store).unwrap();
    }
    let lock = take(&store, &record).unwrap();
    assert_eq!(lock.remove_old(&store).unwrap(), 5, "all are of just now");
    lock.take_again(&store).unwrap();
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

/// Who sees an older listing would take the one below it for the highest.
#[test]
fn old_leases_stay_below_one_that_was_never_given_back() {
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
fn a_session_knows_whether_another_machine_held_the_container_since_its_own_last_one() {
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
    assert!(!lock.follows_own(), "nobody was there");
    // It dies.
    drop(lock);
    assert!(is_own());
    let lock = take(&store, &mine).unwrap();
    assert!(lock.took_over() && lock.follows_own());
    lock.take_again(&store).unwrap();
    lock.release(&store).unwrap();
    assert!(is_own());
    let lock = take(&store, &mine).unwrap();
    assert!(!lock.took_over() && lock.follows_own());
    drop(lock);
    // Another machine takes over, and is gone again.
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
