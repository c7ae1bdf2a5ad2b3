//! A server that does not keep what is written into a lease.

use sprat_store::Access;

use super::second_check::{DisturbedStore, with_released_lease};
use super::*;

/// What a server with a bad disk or memory makes of a lease.
pub(super) fn garble(store: &MemoryStore, name: &FileName) {
    let file = store.open(name, Access::ReadWrite).unwrap();
    file.write_at(4095, b"K").unwrap();
}

#[track_caller]
fn assert_not_kept(result: Result<(), LockError>, file: &FileName, at_taking: bool) {
    match result {
        Err(error @ LockError::NotKept { unused, .. }) => {
            assert_eq!(unused, at_taking);
            assert!(error.to_string().contains(file.as_str()), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn garbled_new_lease_is_reported_and_released() {
    // The writes that release it may be garbled, too.
    for more in [0, 2] {
        let (store, state) = (with_released_lease(), host());
        store.after_making(|store| garble(store, &lock_file(FIRST + 1)));
        store.garbled.store(more, Ordering::SeqCst);
        let taken = take(&store, &record(state.path())).map(drop);
        assert_not_kept(taken, &lock_file(FIRST + 1), true);
        // Other sessions can go on.
        let lock = take(&store, &record(host().path())).unwrap();
        assert_eq!((lock.number(), lock.took_over()), (FIRST + 2, false));
    }
    // A session that came in between still has the lock.
    let (store, state) = (with_released_lease(), host());
    store.after_making(|store| {
        garble(store, &lock_file(FIRST + 1));
        take_over_on(store);
    });
    assert_held(take(&store, &record(state.path())), FIRST + 2);
}

fn take_over_on(store: &MemoryStore) {
    let there = record(host().path());
    drop(Lock::take_over(store, &container(), &there, owner()).unwrap());
}

#[test]
fn lease_garbled_later_stays_with_its_machine() {
    type Case = (
        &'static str,
        u64,
        fn(&DisturbedStore, &Lock) -> Result<(), LockError>,
    );
    let cases: [Case; 3] = [
        ("a check", 0, |store, lock| {
            garble(&store.below, &lock.file());
            lock.verify(store)
        }),
        ("a renewal", 0, |store, lock| {
            garble(&store.below, &lock.file());
            lock.renew(store)
        }),
        ("a reconnect", 1, |store, lock| {
            store.after_making(|store| garble(store, &lock_file(FIRST + 1)));
            lock.reacquire(store)
        }),
    ];
    for (what, next, find) in cases {
        let (store, here) = (DisturbedStore::default(), host());
        let mine = record(here.path());
        let lock = take(&store, &mine).unwrap();
        let found = find(&store, &lock);
        assert_not_kept(found, &lock_file(FIRST + next), false);
        assert!(!lock.answer(&store).unwrap(), "{what}: nobody took over");
        drop(lock);
        assert_held(take(&store, &record(host().path())), FIRST + next);
        assert!(held(&store).unwrap().token.is_some(), "{what}");
        let lock = take(&store, &mine).unwrap();
        assert!(lock.took_over(), "{what}");
        lock.release(&store).unwrap();
    }
}
