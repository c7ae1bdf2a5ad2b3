//! The lock beside a container: never two sessions at once, and a dead one on this host is taken
//! over, whatever process or pid namespace it was in.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use sprat_store::lock;
use sprat_store::sftp::Wire;
use sprat_store::{
    FileName, LocalStore, Lock, LockError, OwnerNote, SftpStore, Store, WriteJournal,
};
use sprat_testkit::memory::MemoryStore;
use sprat_testkit::{agent_server, needs, requires};

mod agent;
mod garbled;
mod left_over;
mod lost_connections;
mod power_cut;
mod second_check;

fn container() -> FileName {
    FileName::new("box.luks").unwrap()
}

/// The first number of a chain.
const FIRST: u64 = 1_000_001;

fn lock_file(number: u64) -> FileName {
    FileName::new(&format!("box.luks.lock.{number}")).unwrap()
}

fn owner() -> OwnerNote {
    OwnerNote {
        host: "ab12".to_owned(),
        version: "0.1".to_owned(),
    }
}

fn record(state: &Path) -> WriteJournal {
    WriteJournal::open(state, "id").unwrap()
}

fn take(store: &dyn Store, record: &WriteJournal) -> Result<Lock, LockError> {
    Lock::acquire(store, &container(), record, owner())
}

fn held(store: &dyn Store) -> Option<sprat_store::LockInfo> {
    lock::inspect(store, &container(), None).unwrap().held
}

/// A state folder for each simulated host.
fn host() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn lock_files(store: &dyn Store) -> Vec<FileName> {
    let mut files = store.list().unwrap();
    files.retain(|file| file.as_str().contains(".lock."));
    files.sort();
    files
}

#[track_caller]
fn assert_held(result: Result<Lock, LockError>, number: u64) {
    match result {
        Err(LockError::HeldElsewhere { info, .. }) => assert_eq!(info.number, number, "{info}"),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
#[expect(
    clippy::needless_pass_by_value,
    reason = "reads better where it is called"
)]
fn assert_lost<T: std::fmt::Debug>(result: Result<T, LockError>) {
    assert!(matches!(result, Err(LockError::Lost { .. })), "{result:?}");
}

#[test]
fn lease_is_acquired_renewed_and_released_by_writing_free() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    let lock = take(&store, &record).unwrap();
    assert_eq!(
        (lock.number(), lock_files(&store)),
        (FIRST, vec![lock_file(FIRST)])
    );
    let first = held(&store).unwrap();
    assert_eq!(
        (first.host.as_str(), first.version.as_str(), first.renewed),
        ("ab12", "0.1", 0)
    );
    for _ in 0..3 {
        lock.renew(&store).unwrap();
        lock.verify(&store).unwrap();
    }
    let renewed = held(&store).unwrap();
    assert_eq!((renewed.renewed, &renewed.token), (3, &first.token));
    lock.release(&store).unwrap();
    assert_eq!(held(&store), None);
    let again = take(&store, &record).unwrap();
    assert_eq!(
        (again.number(), again.took_over(), again.may_arrive()),
        (FIRST + 1, false, false),
        "no number comes back"
    );
    assert_ne!(held(&store).unwrap().token, first.token);
    again.release(&store).unwrap();
}

#[test]
fn another_host_is_refused_with_the_owner_of_the_lock() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let (mine, theirs) = (record(here.path()), record(there.path()));
    let lock = take(&store, &mine).unwrap();
    assert_held(take(&store, &theirs), FIRST);
    assert_eq!(lock_files(&store), [lock_file(FIRST)]);
    lock.verify(&store).unwrap();
    lock.release(&store).unwrap();
    assert_eq!(take(&store, &theirs).unwrap().number(), FIRST + 1);
}

#[test]
fn dropped_lease_is_taken_over_only_on_its_host_with_an_end_time() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    drop(take(&store, &record(here.path())).unwrap());
    assert_held(take(&store, &record(there.path())), FIRST);
    let lock = take(&store, &record(here.path())).unwrap();
    assert_eq!(
        (lock.number(), lock.took_over(), lock.may_arrive()),
        (FIRST + 1, true, true)
    );
    assert!(lock.open_predecessors().is_empty());
    lock.verify(&store).unwrap();
    lock.release(&store).unwrap();
    // Passed on until its time is over, across several sessions and machines.
    for (state, after_s, may_arrive) in [
        (&there, 3600, true),
        (&here, 3600, true),
        (&there, 1000, false),
    ] {
        store.let_pass(after_s);
        let lock = take(&store, &record(state.path())).unwrap();
        assert_eq!(lock.may_arrive(), may_arrive, "after {after_s} s");
        lock.release(&store).unwrap();
    }
}

#[test]
fn lease_counts_as_dead_only_for_the_journal_that_acquired_it() {
    let (store, state) = (MemoryStore::new(), host());
    let lock = take(&store, &record(state.path())).unwrap();
    let info = || held(&store).unwrap();
    // The same host under another spelling of the target: its flock is free, which proves nothing.
    let other = WriteJournal::open(state.path(), "other").unwrap();
    assert!(!info().is_left_by(&other));
    drop(lock);
    assert!(info().is_left_by(&record(state.path())));
    assert!(!info().is_left_by(&other));
}

#[test]
fn one_journal_covers_one_lock_at_a_time() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    let lock = take(&store, &record).unwrap();
    assert!(matches!(
        take(&store, &record),
        Err(LockError::HeldHere { .. })
    ));
    lock.verify(&store).unwrap();
}

#[test]
fn lease_renewed_by_a_copy_of_the_machine_is_not_taken_over() {
    let (store, state) = (MemoryStore::new(), host());
    let copied = host();
    let lock = take(&store, &record(state.path())).unwrap();
    for _ in 0..20 {
        lock.renew(&store).unwrap();
    }
    drop(lock);
    // The disk of the machine was copied when the session had just begun.
    let record_of = |dir: &Path| dir.join("id.record");
    std::fs::copy(record_of(state.path()), record_of(copied.path())).unwrap();
    let at_first = {
        let (store, state) = (MemoryStore::new(), host());
        drop(take(&store, &record(state.path())).unwrap());
        std::fs::read(record_of(state.path())).unwrap()
    };
    assert!(at_first.len() < std::fs::read(record_of(copied.path())).unwrap().len());
    take(&store, &record(copied.path())).unwrap();
    let (store, state) = (MemoryStore::new(), host());
    let lock = take(&store, &record(state.path())).unwrap();
    std::fs::copy(record_of(state.path()), record_of(copied.path())).unwrap();
    for _ in 0..20 {
        lock.renew(&store).unwrap();
    }
    assert!(!held(&store).unwrap().is_left_by(&record(copied.path())));
    assert_held(take(&store, &record(copied.path())), FIRST);
}

/// The machine was reset to a snapshot of its memory, or was cloned with it.
#[test]
fn lease_renewed_by_a_copy_of_the_process_is_lost() {
    let (store, state) = (MemoryStore::new(), host());
    let ours = take(&store, &record(state.path())).unwrap();
    ours.renew(&store).unwrap();
    let file = store
        .open(&ours.file(), sprat_store::Access::ReadWrite)
        .unwrap();
    let mut bytes = vec![0; 4096];
    file.read_at(0, &mut bytes, sprat_store::ReadClass::Demand)
        .unwrap();
    // Meanwhile the copy renews six times.
    let text = String::from_utf8(bytes).unwrap();
    let text = text.replace("\"renewed\":1,", "\"renewed\":7,");
    let checksum = crc32(&text.as_bytes()[..4087]);
    let text = format!("{}{checksum:08x}\n", &text[..4087]);
    file.write_at(0, text.as_bytes()).unwrap();
    assert_eq!(held(&store).unwrap().renewed, 7);
    assert_lost(ours.verify(&store));
    assert_lost(ours.renew(&store));
    assert_lost(ours.reacquire(&store));
    assert_eq!(held(&store).unwrap().renewed, 7, "and nothing is written");
}

/// CRC-32 as in zlib.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg())
        })
    })
}

#[test]
fn reconnect_uses_the_next_number_and_a_late_renewal_is_harmless() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let (mine, theirs) = (record(here.path()), record(there.path()));
    let lock = take(&store, &mine).unwrap();
    lock.renew(&store).unwrap();
    let late = store
        .open(&lock_file(FIRST), sprat_store::Access::ReadWrite)
        .unwrap();
    let mut renewal = vec![0; 4096];
    late.read_at(0, &mut renewal, sprat_store::ReadClass::Demand)
        .unwrap();
    for number in [FIRST + 1, FIRST + 2] {
        lock.reacquire(&store).unwrap();
        assert_eq!(lock.number(), number);
        lock.verify(&store).unwrap();
        lock.renew(&store).unwrap();
    }
    lock.release(&store).unwrap();
    // A write of the first connection is carried out now.
    late.write_at(0, &renewal).unwrap();
    assert_eq!(held(&store), None);
    assert_eq!(take(&store, &theirs).unwrap().number(), FIRST + 3);
}

#[test]
fn session_that_was_taken_over_loses_its_lease_and_harms_no_other() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let mine = record(here.path());
    let lock = take(&store, &mine).unwrap();
    let theirs = record(there.path());
    let other = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
    assert_eq!(other.number(), FIRST + 1);
    assert_lost(lock.verify(&store));
    assert_lost(lock.renew(&store));
    assert_lost(lock.reacquire(&store));
    let before = held(&store);
    assert_eq!(other.open_predecessors(), [FIRST]);
    assert!(other.close_answered(&store).unwrap().is_empty());
    other.verify(&store).unwrap();
    drop(lock);
    // A session whose lease waits is refused, too: its own machine goes on only by another unlock.
    assert_held(take(&store, &mine), FIRST + 1);
    drop(other);
    assert!(matches!(
        take(&store, &theirs),
        Err(LockError::Waiting { .. })
    ));
    assert_eq!(held(&store), before, "a waiting lease is not changed");
}

#[test]
fn release_after_a_takeover_reports_no_success() {
    for by_word in [true, false] {
        let (store, here, there) = (MemoryStore::new(), host(), host());
        let lock = take(&store, &record(here.path())).unwrap();
        let theirs = record(there.path());
        let other = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
        if by_word {
            assert_eq!(other.close_by_word(lock::LATE_WRITE_S), [FIRST]);
            other.confirm(&store).unwrap();
            assert_lost(lock.release(&store));
        } else {
            // It still waits, so it starts after everything that was sent.
            lock.release(&store).unwrap();
            assert_eq!(other.close_answered(&store).unwrap(), [FIRST]);
            assert!(!other.may_arrive());
        }
        assert!(other.open_predecessors().is_empty());
        other.confirm(&store).unwrap();
        other.release(&store).unwrap();
        let next = take(&store, &theirs).unwrap();
        assert_eq!((next.took_over(), next.may_arrive()), (false, by_word));
    }
}

#[test]
fn session_that_lost_its_lease_answers_only_the_takeover() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let lock = take(&store, &record(here.path())).unwrap();
    assert!(!lock.answer(&store).unwrap(), "no takeover waits");
    lock.verify(&store).unwrap();
    let theirs = record(there.path());
    let other = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
    assert!(lock.answer(&store).unwrap());
    assert!(!lock.answer(&store).unwrap(), "it was answered already");
    assert_eq!(other.close_answered(&store).unwrap(), [FIRST]);
    other.confirm(&store).unwrap();
    assert!(!other.may_arrive(), "all of it was answered");
    // Its own machine acquires the next lease normally.
    other.release(&store).unwrap();
    drop(lock);
    assert!(!take(&store, &record(here.path())).unwrap().took_over());
}

#[test]
fn pending_comparison_is_passed_on_until_it_is_dropped() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let lock = take(&store, &record(here.path())).unwrap();
    let theirs = record(there.path());
    let other = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
    other.close_by_word(lock::LATE_WRITE_S);
    let late = other.late_until().unwrap();
    assert!(!late.own_only);
    other.record_comparison(&store, late.until_s).unwrap();
    let name = other.new_late_list_name().unwrap();
    store.create_new(&name).unwrap();
    other.release(&store).unwrap();
    drop(lock);
    let seen = lock::inspect(&store, &container(), None).unwrap();
    let tokens = |notes: &[lock::PendingComparison]| -> Vec<String> {
        notes.iter().map(|note| note.token.clone()).collect()
    };
    assert_eq!(
        (seen.late_lists, seen.pending_comparisons.len()),
        (vec![name.clone()], 1)
    );
    let token = seen.pending_comparisons[0].token.clone();
    let mine = record(here.path());
    let next = take(&store, &mine).unwrap();
    assert_eq!(
        (next.late_lists(), tokens(&next.pending_comparisons())),
        (vec![name], vec![token.clone()])
    );
    assert_eq!(next.late_until(), Some(late));
    store.let_pass(lock::LATE_WRITE_S + 1);
    next.drop_comparisons(&[token]);
    next.confirm(&store).unwrap();
    next.release(&store).unwrap();
    let seen = lock::inspect(&store, &container(), None).unwrap();
    assert!(seen.pending_comparisons.is_empty());
    assert_eq!(take(&store, &mine).unwrap().late_until(), None);
}

#[test]
fn own_dead_session_is_a_predecessor_that_the_journal_knows() {
    let (store, here) = (MemoryStore::new(), host());
    drop(take(&store, &record(here.path())).unwrap());
    let lock = take(&store, &record(here.path())).unwrap();
    assert!(lock.late_until().unwrap().own_only);
}

#[test]
fn silent_session_counts_as_dead_after_its_time_by_the_servers_clock() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let lock = take(&store, &record(here.path())).unwrap();
    lock.renew(&store).unwrap();
    store.let_pass(lock::LATE_WRITE_S / 2);
    let theirs = record(there.path());
    let other = Lock::take_over(&store, &container(), &theirs, owner()).unwrap();
    assert!(
        other
            .close_silent(&store, lock::LATE_WRITE_S)
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        other.close_silent(&store, lock::LATE_WRITE_S / 2).unwrap(),
        [FIRST]
    );
    assert!(other.may_arrive() && other.open_predecessors().is_empty());
}

#[test]
fn takeover_from_a_waiting_session_waits_for_both() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let third = host();
    let lock = take(&store, &record(here.path())).unwrap();
    let waits = Lock::take_over(&store, &container(), &record(there.path()), owner()).unwrap();
    let last = Lock::take_over(&store, &container(), &record(third.path()), owner()).unwrap();
    assert_eq!(last.open_predecessors(), [FIRST, FIRST + 1]);
    assert_lost(waits.confirm(&store));
    drop(lock);
}

#[test]
fn higher_number_means_lost_and_truncated_file_means_not_kept() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    let lock = take(&store, &record).unwrap();
    store.create_new(&lock_file(FIRST + 1)).unwrap();
    assert_lost(lock.verify(&store));
    store.remove(&lock_file(FIRST + 1)).unwrap();
    lock.verify(&store).unwrap();
    let file = store
        .open(&lock_file(FIRST), sprat_store::Access::ReadWrite)
        .unwrap();
    file.resize(100).unwrap();
    let renewed = lock.renew(&store);
    assert!(
        matches!(renewed, Err(LockError::NotKept { .. })),
        "{renewed:?}"
    );
}

#[test]
fn other_files_beside_the_container_are_not_locks() {
    let (store, state) = (MemoryStore::new(), host());
    for odd in [
        "box.luks",
        "box.luks.lock",
        "box.luks.lock.01",
        "box.luks.lock.x",
        "xbox.luks.lock.1",
    ] {
        store.create_new(&FileName::new(odd).unwrap()).unwrap();
    }
    let lock = take(&store, &record(state.path())).unwrap();
    assert_eq!(lock.number(), FIRST);
    lock.release(&store).unwrap();
    assert_eq!(store.list().unwrap().len(), 6);
}

/// Many hosts and many rounds: never two sessions with the lock at once.
fn race(store: &(dyn Store + Sync), rounds: usize, hosts: usize) {
    let states: Vec<_> = (0..hosts).map(|_| host()).collect();
    let holders = AtomicUsize::new(0);
    let taken = AtomicUsize::new(0);
    for round in 0..rounds {
        let start = Barrier::new(hosts);
        std::thread::scope(|scope| {
            for state in &states {
                scope.spawn(|| {
                    let record = record(state.path());
                    start.wait();
                    match take(store, &record) {
                        Ok(lock) => {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two holders");
                            taken.fetch_add(1, Ordering::SeqCst);
                            lock.verify(store).unwrap();
                            lock.renew(store).unwrap();
                            holders.fetch_sub(1, Ordering::SeqCst);
                            // Every other round it dies instead.
                            if round % 2 == 0 {
                                lock.release(store).unwrap();
                            } else {
                                drop(lock);
                            }
                        }
                        Err(LockError::HeldElsewhere { .. }) => {}
                        Err(error) => panic!("{error:?}"),
                    }
                });
            }
        });
    }
    assert!(taken.into_inner() > 0);
}

#[test]
fn racing_hosts_never_have_the_lock_at_once() {
    race(&MemoryStore::new(), 60, 4);
    let folder = tempfile::tempdir().unwrap();
    race(&LocalStore::open(folder.path()).unwrap(), 30, 3);
}

#[test]
fn racing_hosts_over_sftp_never_have_the_lock_at_once() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    let store = SftpStore::connect(crate::part::piped(folder.path(), &[])).unwrap();
    race(&store, 15, 3);
}

#[test]
fn full_disk_leaves_no_lock_that_blocks_everyone() {
    requires!(needs::root());
    let disk = sprat_testkit::tmpfs::SmallDisk::new("size=1m");
    let (store, state) = (LocalStore::open(disk.path()).unwrap(), host());
    let filler = store.create_new(&FileName::new("filler").unwrap()).unwrap();
    let mut at = 0;
    while filler.write_at(at, &[1; 4096]).is_ok() {
        at += 4096;
    }
    let record = record(state.path());
    let failed = take(&store, &record);
    assert!(matches!(failed, Err(LockError::Store { .. })), "{failed:?}");
    assert_eq!(lock_files(&store), []);
    filler.resize(0).unwrap();
    assert_eq!(take(&store, &record).unwrap().number(), FIRST);
}

#[test]
fn renewal_of_a_watched_lease_is_reported_at_once() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    let watch = |store: &MemoryStore, time: u64| {
        let (time, tick) = (Duration::from_secs(time), || Ok::<(), LockError>(()));
        lock::watch(store, &container(), time, tick).unwrap()
    };
    assert_eq!(watch(&store, 0), lock::Watched::Free);
    let lock = take(&store, &record).unwrap();
    assert!(matches!(watch(&store, 0), lock::Watched::Still(_)));
    std::thread::scope(|scope| {
        let watching = scope.spawn(|| (watch(&store, 20), Instant::now()));
        std::thread::sleep(Duration::from_millis(300));
        lock.renew(&store).unwrap();
        let renewed = Instant::now();
        let (watched, at) = watching.join().unwrap();
        assert!(matches!(watched, lock::Watched::Renewed(info) if info.renewed == 1));
        assert!(at.saturating_duration_since(renewed) < Duration::from_secs(10));
    });
    lock.release(&store).unwrap();
    assert_eq!(watch(&store, 0), lock::Watched::Free);
}

// Real processes. This binary runs itself as the session with the lock.

const CHILD: &str = "SPRAT_TEST_LOCK_CHILD";

/// Not a test: the process that the tests below start and kill.
#[test]
fn child_that_acquires_the_lock_and_waits() {
    let Some(place) = std::env::var_os(CHILD).map(PathBuf::from) else {
        return;
    };
    let store = LocalStore::open(&place.join("store")).unwrap();
    let record = record(&place.join("state"));
    let lock = take(&store, &record).unwrap();
    record.before_send(&[4096..8192]).unwrap();
    println!("\nHOLDING {}", lock.number());
    std::thread::sleep(Duration::from_secs(60));
}

/// If it is set, no thread can be started: the stacks would be too large.
const THREADLESS: &str = "SPRAT_TEST_LOCK_THREADLESS";

#[test]
fn lock_is_kept_if_no_thread_can_be_started() {
    if std::env::var_os(THREADLESS).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "lock::lock_is_kept_if_no_thread_can_be_started"])
            .arg("--test-threads=1")
            .env(THREADLESS, "1")
            .env("RUST_MIN_STACK", (1u64 << 46).to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    let thread = std::thread::Builder::new().spawn(|| ());
    assert!(thread.is_err(), "there are threads, so this proves nothing");
    let (store, host) = (MemoryStore::new(), host());
    let record = record(host.path());
    let mut called = false;
    let first = Lock::check_leases(&store, &container(), &record).unwrap();
    let lock = Lock::acquire_after(&first, &store, &record, owner(), || called = true).unwrap();
    assert!(called, "the other call must run, too");
    lock.verify(&store).unwrap();
    lock.renew(&store).unwrap();
    let next = store.create_new(&lock_file(FIRST + 1)).unwrap();
    assert_lost(lock.verify(&store));
    drop(next);
    store.remove(&lock_file(FIRST + 1)).unwrap();
    lock.release(&store).unwrap();
}

struct Holder(Child);

impl Holder {
    /// Runs the child, with `wrapper` in front.
    fn start(place: &Path, wrapper: &[&str]) -> Self {
        std::fs::create_dir_all(place.join("store")).unwrap();
        let mut argv: Vec<std::ffi::OsString> = wrapper.iter().map(Into::into).collect();
        argv.push(std::env::current_exe().unwrap().into());
        argv.extend(
            [
                "--exact",
                "lock::child_that_acquires_the_lock_and_waits",
                "--nocapture",
            ]
            .map(Into::into),
        );
        let mut child = Command::new(&argv[0])
            .args(&argv[1..])
            .env(CHILD, place)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let said = out
            .lines()
            .map_while(Result::ok)
            .find(|line| line.contains("HOLDING"));
        assert!(said.is_some(), "the child did not acquire the lock");
        Self(child)
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn a_living_process_is_refused_and_a_dead_one_taken_over(wrapper: &[&str]) {
    let place = tempfile::tempdir().unwrap();
    let state = place.path().join("state");
    let holder = Holder::start(place.path(), wrapper);
    let refused = WriteJournal::open(&state, "id");
    assert!(
        matches!(refused, Err(LockError::HeldHere { .. })),
        "{refused:?}"
    );
    holder.kill();
    let record = crate::part::eventually(|| WriteJournal::open(&state, "id").ok());
    assert_eq!(record.in_doubt(), [4096..8192]);
    let store = LocalStore::open(&place.path().join("store")).unwrap();
    let lock = take(&store, &record).unwrap();
    assert_eq!((lock.number(), lock.took_over()), (FIRST + 1, true));
}

#[test]
fn killed_process_is_taken_over_and_a_living_one_is_not() {
    a_living_process_is_refused_and_a_dead_one_taken_over(&[]);
}

#[test]
fn living_process_in_another_pid_namespace_is_respected() {
    requires!(needs::root(), needs::program("unshare"));
    let wrapper = ["unshare", "--pid", "--fork", "--kill-child"];
    a_living_process_is_refused_and_a_dead_one_taken_over(&wrapper);
}

#[test]
fn connection_that_outlives_its_session_keeps_the_journal_locked() {
    requires!(needs::sftp_server_missing());
    let (folder, state) = (tempfile::tempdir().unwrap(), host());
    let record = record(state.path());
    // Like an ssh that still has bytes to send: it ignores the end of its input.
    let server = agent_server::sftp_server(folder.path()).unwrap();
    let script = format!("trap '' TERM; {}; sleep 1", server.display());
    let mut options = crate::part::options(
        ["/bin/sh", "-c", script.as_str()].map(Into::into).to_vec(),
        folder.path(),
    );
    options.inherit_fds = vec![record.fd().try_clone_to_owned().unwrap()];
    let store = SftpStore::connect(options).unwrap();
    drop(record);
    let refused = WriteJournal::open(state.path(), "id");
    assert!(matches!(refused, Err(LockError::HeldHere { .. })));
    drop(store);
    WriteJournal::open(state.path(), "id").unwrap();
}
