//! What a session must do before it sends or frees anything: wait after a dead session of this
//! machine, renew successfully, and check the user's snapshots.

use sprat_luks::Payload;
use sprat_volume::Flush;

use crate::volume_process::lease::Renewal;
use crate::volume_process::tests::rules::events;
use crate::volume_process::tests::*;

/// Of the sessions here.
const QUIET_TIME: Duration = Duration::from_millis(250);

/// The session after one of this machine that was killed while it sent something. Its container
/// counts as being on a server: what was sent may arrive later.
fn after_a_kill_on_a_server() -> TestSession {
    let first = TestSession::new();
    let range = std::slice::from_ref(&(0..4096));
    first.lease.before_send(range).unwrap();
    let TestSession {
        folder,
        start,
        lease,
        ..
    } = first;
    drop(lease);
    let target = Target::parse("ssh://no.host/srv/x.luks", Path::new("/")).unwrap();
    next_session(folder, start, target)
}

/// The next session of this machine, which takes over the lease beside the first one's container. To `target`.
fn next_session(folder: tempfile::TempDir, mut start: VolumeStart, target: Target) -> TestSession {
    let state = folder.path().join("state");
    let record = open_journal(&state, &start.settings.target, Access::ReadWrite).unwrap();
    let here = Connection::new(&start.settings, &record).unwrap();
    let store = here.connect().unwrap();
    let owner = owner_note(&state).unwrap();
    let lock = Lock::acquire(&*store, &start.settings.target.name, &record, owner).unwrap();
    start.settings.quiet_time = QUIET_TIME;
    start.settings.target = target;
    let name = start.settings.target.name.clone();
    let lease = Arc::new(ContainerLease::new(LeaseParts {
        connection: Connection::new(&start.settings, &record).unwrap(),
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
        late_records: lease::LateRecords::default(),
    }));
    TestSession {
        folder,
        start,
        lease,
        door: None,
    }
}

/// A living session is taken over for a dead one, because a person removed its lock file. Until the quiet time is over
/// it has noticed that. What it left in doubt is compared with all that is written now.
#[test]
fn session_without_its_lock_file_may_live_and_is_waited_for_on_a_local_disk() {
    let TestSession {
        folder,
        start,
        lease: living,
        ..
    } = TestSession::new();
    let target = start.settings.target.clone();
    let path = living.record().path().with_extension("lock");
    std::fs::remove_file(path).unwrap();
    let session = next_session(folder, start, target);
    let lease = &session.lease;
    assert!(!lease.server_outlives_us() && lease.record().owes_quiet());
    acquire::wait_for_quiet(&session.start, lease, &StopFlag::default(), &events()).unwrap();
    let waited = lease.held_since().elapsed();
    assert!(waited >= 2 * QUIET_TIME, "{waited:?}");
    let late = lease.late_until().unwrap();
    assert!(!late.own_only, "nobody knows what it wrote");
    drop(living);
}

#[test]
fn takeover_waits_two_quiet_times_before_any_release() {
    let session = after_a_kill_on_a_server();
    let lease = &session.lease;
    assert!(lease.record().owes_quiet());
    // Also if all known pending writes were recovered by other means: there may be more.
    lease.all_resolved().unwrap();
    assert!(!lease.release().unwrap(), "the wait is owed");
    let stop = StopFlag::default();
    stop.request();
    acquire::wait_for_quiet(&session.start, lease, &stop, &events()).unwrap_err();
    assert!(!lease.release().unwrap(), "a wait that was cut short");
    acquire::wait_for_quiet(&session.start, lease, &StopFlag::default(), &events()).unwrap();
    let waited = lease.held_since().elapsed();
    assert!(waited >= 2 * QUIET_TIME, "{waited:?}");
    assert!(!lease.record().owes_quiet());
    assert!(lease.release().unwrap());
}

#[test]
fn completed_wait_is_not_due_in_the_next_session() {
    let session = after_a_kill_on_a_server();
    acquire::wait_for_quiet(
        &session.start,
        &session.lease,
        &StopFlag::default(),
        &events(),
    )
    .unwrap();
    drop(session.lease);
    let local = session.folder.path().join("store/x.luks");
    let target = Target::parse(&local.display().to_string(), Path::new("/")).unwrap();
    let state = session.folder.path().join("state");
    let next = open_journal(&state, &target, Access::ReadWrite).unwrap();
    assert!(!next.may_arrive());
}

#[test]
fn three_failed_renewals_in_a_row_end_the_session() {
    let refused = Arc::new(AtomicBool::new(false));
    let refuses = Arc::clone(&refused);
    let session = TestSession::on(|below| {
        Arc::new(RecordingStore {
            below,
            asked: Arc::default(),
            rename: || None,
            refused: refuses,
            cut: Arc::default(),
        })
    });
    let renew = |fails: bool| {
        refused.store(fails, Ordering::SeqCst);
        matches!(session.lease.renew(), Renewal::Ours)
    };
    for _ in 0..2 {
        assert!(renew(true) && renew(true), "it may be over in a moment");
        assert!(renew(false), "and then they count from the beginning");
    }
    assert!(renew(true) && renew(true));
    assert!(session.lease.lost().is_none());
    assert!(!renew(true));
    let failure = session.lease.lost().unwrap();
    assert_eq!(failure.exit, Exit::Failed, "{failure:?}");
    refused.store(false, Ordering::SeqCst);
    let range = std::slice::from_ref(&(0..4096));
    assert!(session.lease.before_epoch().is_err() && !session.lease.release().unwrap());
    session.lease.set_last_check_age(Duration::from_secs(60));
    assert!(session.lease.before_send(range).is_err());
}

#[test]
fn nothing_is_sent_before_the_snapshots_were_checked() {
    let session = TestSession::new();
    let offset_bytes = 16 << 20;
    let payload = Payload {
        offset_bytes,
        len_bytes: FILE_BYTES - offset_bytes,
        sector_bytes: 4096,
    };
    let file = session
        .lease
        .store()
        .open(session.lease.file_name(), StoreAccess::ReadWrite)
        .unwrap();
    let known = open::VolumeHints::default();
    let volume = open::open_volume(&session.start, &session.lease, file, payload, known).unwrap();
    let on_the_server = || {
        let mut block = [0; 4096];
        let file = std::fs::File::open(session.path("x.luks")).unwrap();
        file.read_exact_at(&mut block, offset_bytes).unwrap();
        block
    };
    // As a journal replay does.
    volume.write_at(0, &[7; 4096]).unwrap();
    volume.flush(Flush::Durable).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(on_the_server() == [0; 4096], "it was sent at once");
    volume.may_send();
    volume.flush(Flush::Durable).unwrap();
    assert!(on_the_server() == [7; 4096], "it is still session back");
    volume.close().unwrap();
}

/// The check behind "free" is the last one, and all that was sent since the one before may have
/// arrived over what another session wrote.
#[test]
fn release_that_finds_the_lease_lost_leaves_the_late_write_list() {
    for told in [true, false] {
        let session = TestSession::new();
        let lease = &session.lease;
        lease.notes_sent(late::Sent::new(late::some_key(1)));
        let range = std::slice::from_ref(&(0..4096));
        lease.before_send(range).unwrap();
        lease.answered(lease.sends(0, &[1; 4096]));
        lease.all_resolved().unwrap();
        // A user confirms that this machine is off, so the other one writes at once.
        let (other, store) = session.taken_over_by_another();
        assert_eq!(other.close_by_word(3600), [1_000_001]);
        other.confirm(&*store).unwrap();
        let lists = || {
            let names = store.list().unwrap().into_iter();
            names
                .filter(|name| name.as_str().contains(".late-"))
                .count()
        };
        if told {
            let released = lease.release();
            assert!(
                matches!(released, Err(LockError::Lost { .. })),
                "{released:?}"
            );
        }
        assert!(!lease.give_up(&events()));
        assert_eq!(lists(), 1, "{told}");
        assert_eq!(lease.lost().unwrap().exit, Exit::Locked);
        // Nothing is sent after it, however recent the last check was.
        assert!(lease.before_send(range).is_err());
    }
}

/// A lost answer to "free" is no answer about who came before.
#[test]
fn release_is_checked_on_a_new_connection_if_the_answer_is_lost() {
    let session_on = |cut: &Arc<AtomicBool>, refused: &Arc<AtomicBool>| {
        let (cut, refused) = (Arc::clone(cut), Arc::clone(refused));
        TestSession::on(|below| {
            Arc::new(RecordingStore {
                below,
                asked: Arc::default(),
                rename: || None,
                refused,
                cut,
            })
        })
    };
    let is_free = |session: &TestSession| {
        let store = LocalStore::open(&session.folder.path().join("store")).unwrap();
        let name = &session.start.settings.target.name;
        sprat_store::lock::inspect(&store, name, None)
            .unwrap()
            .held
            .is_none()
    };
    let flags = || {
        (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicBool::new(false)),
        )
    };
    let (cut, refused) = flags();
    let session = session_on(&cut, &refused);
    cut.store(true, Ordering::SeqCst);
    assert!(session.lease.release().unwrap());
    assert!(is_free(&session) && session.lease.left_locked().is_none());

    // Another machine took over, and writes at once.
    let (cut, refused) = flags();
    let session = session_on(&cut, &refused);
    let (other, store) = session.taken_over_by_another();
    other.close_by_word(3600);
    other.confirm(&*store).unwrap();
    cut.store(true, Ordering::SeqCst);
    let released = session.lease.release();
    assert!(
        matches!(released, Err(LockError::Lost { .. })),
        "{released:?}"
    );

    // Without a connection nothing is known, and the lease stays.
    let (cut, refused) = flags();
    let session = session_on(&cut, &refused);
    cut.store(true, Ordering::SeqCst);
    let folder = session.folder.path().join("store");
    let away = session.folder.path().join("away");
    std::fs::rename(&folder, &away).unwrap();
    let released = session.lease.release();
    assert!(
        matches!(released, Err(LockError::Store { .. })),
        "{released:?}"
    );
    std::fs::rename(&away, &folder).unwrap();
    assert!(session.lease.release().unwrap());
    assert!(is_free(&session));

    // The server refuses the write: nobody came, so it is a success, and the lock is left.
    let (cut, refused) = flags();
    let session = session_on(&cut, &refused);
    refused.store(true, Ordering::SeqCst);
    assert!(session.lease.release().unwrap());
    assert!(session.lease.left_locked().is_some() && !is_free(&session));
}

#[test]
fn key_change_that_lost_its_lease_answers_once_all_is_durable() {
    let session = TestSession::new();
    let lease = session.path("x.luks.lock.1000001");
    let is_free = || {
        let text = std::fs::read_to_string(&lease).unwrap();
        text.contains("\"free\":true")
    };
    let range = std::slice::from_ref(&(0..4096));
    session.lease.before_send(range).unwrap();
    session.lose_the_lock();
    assert!(session.lease.check_lock_now().is_err());
    assert!(!session.lease.release().unwrap());
    assert!(!is_free(), "something may still arrive");
    session.lease.all_resolved().unwrap();
    assert!(!session.lease.release().unwrap());
    assert!(is_free());
    // Nothing is sent after it, however recent the last check was.
    assert!(session.lease.before_send(range).is_err());
}
