//! What a session owes before it sends or gives anything back: the wait after a dead one of this machine,
//! renewals that succeed, and the user's snapshots.

use sprat_luks::Payload;
use sprat_volume::Flush;

use crate::volume_process::lease::Renewed;
use crate::volume_process::tests::rules::events;
use crate::volume_process::tests::*;

/// Of the sessions here.
const QUIET_TIME: Duration = Duration::from_millis(250);

/// A session of this machine was killed while it sent something, and this is the next one. Its
/// container lies on a server as far as it knows: what was sent may arrive later.
fn after_a_kill_on_a_server() -> Held {
    let first = Held::new();
    let range = std::slice::from_ref(&(0..4096));
    first.lease.before_send(range).unwrap();
    let Held {
        folder,
        mut start,
        lease,
        ..
    } = first;
    drop(lease);
    let record = open_record(
        &folder.path().join("state"),
        &start.target,
        Access::ReadWrite,
    );
    let record = record.unwrap();
    let here = Connection::new(&start, &record).unwrap();
    let store = here.connect().unwrap();
    let owner = owner_note(&folder.path().join("state")).unwrap();
    let lock = Lock::acquire(&*store, &start.target.name, &record, owner).unwrap();
    start.quiet_time_ms = u64::try_from(QUIET_TIME.as_millis()).unwrap();
    start.target = Target::parse("ssh://no.host/srv/x.luks", Path::new("/")).unwrap();
    let name = start.target.name.clone();
    let lease = Arc::new(ContainerLease::new(LeaseParts {
        connection: Connection::new(&start, &record).unwrap(),
        record,
        container: name.clone(),
        file_name: name,
        access: StoreAccess::ReadWrite,
        opened_by: OpenedBy::Sprat,
        store,
        lock: Some(lock),
        stale_lock: None,
        highest: None,
        highest_is_own: false,
        late_found: late::Found::default(),
    }));
    Held {
        folder,
        start,
        lease,
        door: None,
    }
}

#[test]
fn a_takeover_waits_two_quiet_times_and_gives_nothing_back_before() {
    let held = after_a_kill_on_a_server();
    let lease = &held.lease;
    assert!(lease.record().owes_quiet());
    // Also where all that is known to be under way was settled by other means: more may be.
    lease.all_settled().unwrap();
    assert!(!lease.release().unwrap(), "the wait is owed");
    let stop = StopFlag::default();
    stop.request();
    acquire::wait_for_quiet(&held.start, lease, &stop, &events()).unwrap_err();
    assert!(!lease.release().unwrap(), "a wait that was cut short");
    acquire::wait_for_quiet(&held.start, lease, &StopFlag::default(), &events()).unwrap();
    let waited = lease.held_since().elapsed();
    assert!(waited >= 2 * QUIET_TIME, "{waited:?}");
    assert!(!lease.record().owes_quiet());
    assert!(lease.release().unwrap());
}

#[test]
fn who_waited_leaves_no_wait_to_the_next_session() {
    let held = after_a_kill_on_a_server();
    acquire::wait_for_quiet(&held.start, &held.lease, &StopFlag::default(), &events()).unwrap();
    drop(held.lease);
    let local = held.folder.path().join("store/x.luks");
    let target = Target::parse(&local.display().to_string(), Path::new("/")).unwrap();
    let state = held.folder.path().join("state");
    let next = open_record(&state, &target, Access::ReadWrite).unwrap();
    assert!(!next.may_arrive());
}

#[test]
fn three_renewals_that_fail_in_a_row_end_the_session_and_fewer_do_not() {
    let refused = Arc::new(AtomicBool::new(false));
    let refuses = Arc::clone(&refused);
    let held = Held::on(|below| {
        Arc::new(Noted {
            below,
            asked: Arc::default(),
            rename: || None,
            refused: refuses,
        })
    });
    let renew = |fails: bool| {
        refused.store(fails, Ordering::SeqCst);
        matches!(held.lease.renew(), Renewed::Held)
    };
    for _ in 0..2 {
        assert!(renew(true) && renew(true), "it may be over in a moment");
        assert!(renew(false), "and then they count from the beginning");
    }
    assert!(renew(true) && renew(true));
    assert!(held.lease.lost().is_none());
    assert!(!renew(true));
    let failure = held.lease.lost().unwrap();
    assert_eq!(failure.exit, Exit::Failed, "{failure:?}");
    refused.store(false, Ordering::SeqCst);
    let range = std::slice::from_ref(&(0..4096));
    assert!(held.lease.before_epoch().is_err() && !held.lease.release().unwrap());
    held.lease.looked_ago(Duration::from_secs(60));
    assert!(held.lease.before_send(range).is_err());
}

#[test]
fn nothing_is_sent_before_the_snapshots_were_looked_for() {
    let held = Held::new();
    let offset_bytes = 16 << 20;
    let payload = Payload {
        offset_bytes,
        len_bytes: FILE_BYTES - offset_bytes,
        sector_bytes: 4096,
    };
    let file = held
        .lease
        .store()
        .open(held.lease.file_name(), StoreAccess::ReadWrite)
        .unwrap();
    let known = open::Known::default();
    let volume = open::open_volume(&held.start, &held.lease, file, payload, known).unwrap();
    let on_the_server = || {
        let mut block = [0; 4096];
        let file = std::fs::File::open(held.path("x.luks")).unwrap();
        file.read_exact_at(&mut block, offset_bytes).unwrap();
        block
    };
    // As a journal that is replayed.
    volume.write_at(0, &[7; 4096]).unwrap();
    volume.flush(Flush::Durable).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(on_the_server() == [0; 4096], "it was sent at once");
    volume.may_send();
    volume.flush(Flush::Durable).unwrap();
    assert!(on_the_server() == [7; 4096], "it is still held back");
    volume.close().unwrap();
}

#[test]
fn a_change_of_keys_that_lost_its_lease_answers_once_all_it_sent_is_durable() {
    let held = Held::new();
    let lease = held.path("x.luks.lock.1000001");
    let is_free = || {
        let text = std::fs::read_to_string(&lease).unwrap();
        text.contains("\"free\":true")
    };
    let range = std::slice::from_ref(&(0..4096));
    held.lease.before_send(range).unwrap();
    held.lose_the_lock();
    assert!(held.lease.before_epoch().is_err());
    assert!(!held.lease.release().unwrap());
    assert!(!is_free(), "something may still arrive");
    held.lease.all_settled().unwrap();
    assert!(!held.lease.release().unwrap());
    assert!(is_free());
    // Nothing follows it, however fresh the last look was.
    assert!(held.lease.before_send(range).is_err());
}
