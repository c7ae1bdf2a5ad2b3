//! The lock beside a container: two sessions never meet, and a dead one on this host is taken
//! over, whatever process or pid namespace it was in.
#![allow(clippy::unwrap_used, reason = "a test fails where it unwraps")]
#![allow(
    clippy::single_range_in_vec_init,
    reason = "a list of one range is meant"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use sprat_store::lock::{self, Broken};
use sprat_store::sftp::Wire;
use sprat_store::{
    FileName, LocalRecord, LocalStore, Lock, LockError, MemoryStore, OwnerNote, SftpStore, Store,
};
use sprat_testkit::{needs, requires};

mod part;

fn container() -> FileName {
    FileName::new("box.luks").unwrap()
}

fn lock_file(number: u64) -> FileName {
    FileName::new(&format!("box.luks.lock.{number}")).unwrap()
}

fn owner() -> OwnerNote {
    OwnerNote {
        host: "ab12".to_owned(),
        version: "0.1".to_owned(),
    }
}

fn record(state: &Path) -> LocalRecord {
    LocalRecord::open(state, "id").unwrap()
}

fn take(store: &dyn Store, record: &LocalRecord) -> Result<Lock, LockError> {
    Lock::acquire(store, &container(), record, owner())
}

/// A state folder for each host that is played.
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
fn assert_lost(result: Result<(), LockError>) {
    assert!(matches!(result, Err(LockError::Lost { .. })), "{result:?}");
}

#[test]
fn a_lock_is_taken_renewed_and_given_back() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    let lock = take(&store, &record).unwrap();
    assert_eq!((lock.number(), lock_files(&store)), (1, vec![lock_file(1)]));
    let first = lock::inspect(&store, &container()).unwrap().unwrap();
    assert_eq!(
        (first.host.as_str(), first.version.as_str(), first.renewed),
        ("ab12", "0.1", 0)
    );
    for _ in 0..3 {
        lock.renew(&store).unwrap();
        lock.verify(&store).unwrap();
    }
    let renewed = lock::inspect(&store, &container()).unwrap().unwrap();
    assert_eq!((renewed.renewed, &renewed.token), (3, &first.token));
    lock.release(&store).unwrap();
    assert_eq!(lock::inspect(&store, &container()).unwrap(), None);
    let again = take(&store, &record).unwrap();
    let token = lock::inspect(&store, &container()).unwrap().unwrap().token;
    assert_ne!(token, first.token);
    again.release(&store).unwrap();
}

#[test]
fn another_host_is_refused_and_told_who_holds_it() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let (mine, theirs) = (record(here.path()), record(there.path()));
    let lock = take(&store, &mine).unwrap();
    assert_held(take(&store, &theirs), 1);
    assert_eq!(lock_files(&store), [lock_file(1)]);
    lock.verify(&store).unwrap();
    lock.release(&store).unwrap();
    take(&store, &theirs).unwrap();
}

#[test]
fn a_dropped_lock_is_taken_over_on_its_host_only() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    drop(take(&store, &record(here.path())).unwrap());
    assert_held(take(&store, &record(there.path())), 1);
    let lock = take(&store, &record(here.path())).unwrap();
    assert_eq!((lock.number(), lock_files(&store)), (2, vec![lock_file(2)]));
    lock.verify(&store).unwrap();
}

#[test]
fn a_lock_is_a_dead_sessions_only_by_the_record_that_took_it() {
    let (store, state) = (MemoryStore::new(), host());
    let lock = take(&store, &record(state.path())).unwrap();
    let info = || lock::inspect(&store, &container()).unwrap().unwrap();
    // The same host under another spelling of the target: its flock is free, and says nothing.
    let other = LocalRecord::open(state.path(), "other").unwrap();
    assert!(!info().is_left_by(&other));
    drop(lock);
    assert!(info().is_left_by(&record(state.path())));
    assert!(!info().is_left_by(&other));
}

#[test]
fn one_record_carries_one_lock_at_a_time() {
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
fn a_holder_that_comes_back_after_a_takeover_finds_its_lock_lost() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    let mine = record(here.path());
    let lock = take(&store, &mine).unwrap();
    // Broken by hand while its line was down, and taken by another host under the same number.
    lock::break_lock(&store, &container(), false, Duration::ZERO).unwrap();
    assert_lost(lock.verify(&store));
    let theirs = record(there.path());
    let other = take(&store, &theirs).unwrap();
    assert_eq!(other.number(), lock.number());
    let before = lock::inspect(&store, &container()).unwrap();
    assert_lost(lock.verify(&store));
    assert_lost(lock.renew(&store));
    assert_lost(lock.release(&store));
    assert_eq!(
        lock::inspect(&store, &container()).unwrap(),
        before,
        "the other's is untouched"
    );
    other.verify(&store).unwrap();
    assert_held(take(&store, &mine), 1);
}

#[test]
fn a_higher_number_or_a_cut_file_means_lost() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    let lock = take(&store, &record).unwrap();
    store.create_new(&lock_file(2)).unwrap();
    assert_lost(lock.verify(&store));
    store.remove(&lock_file(2)).unwrap();
    lock.verify(&store).unwrap();
    let file = store
        .open(&lock_file(1), sprat_store::Access::ReadWrite)
        .unwrap();
    file.resize(100).unwrap();
    assert_lost(lock.renew(&store));
}

#[test]
fn an_empty_lock_file_is_dead_only_where_this_host_was_taking_that_number() {
    let (store, here, there) = (MemoryStore::new(), host(), host());
    // Died between create and write: the record knows the number, the file says nothing.
    drop(take(&store, &record(here.path())).unwrap());
    store
        .open(&lock_file(1), sprat_store::Access::ReadWrite)
        .unwrap()
        .resize(0)
        .unwrap();
    assert_held(take(&store, &record(there.path())), 1);
    let lock = take(&store, &record(here.path())).unwrap();
    assert_eq!(lock.number(), 2);
    lock.release(&store).unwrap();
    // One that nobody here made.
    store.create_new(&lock_file(7)).unwrap();
    assert_held(take(&store, &record(here.path())), 7);
}

#[test]
fn of_a_dead_one_of_ours_and_one_of_another_host_the_other_wins() {
    let (store, here) = (MemoryStore::new(), host());
    drop(take(&store, &record(here.path())).unwrap());
    store.create_new(&lock_file(2)).unwrap();
    assert_held(take(&store, &record(here.path())), 2);
    assert_eq!(lock_files(&store), [lock_file(1), lock_file(2)]);
}

#[test]
fn other_files_beside_the_container_are_no_locks() {
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
    assert_eq!(lock.number(), 1);
    lock.release(&store).unwrap();
    assert_eq!(store.list().unwrap().len(), 5);
}

/// Many hosts and many rounds: never two holders at once.
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
fn racing_hosts_never_hold_the_lock_together() {
    race(&MemoryStore::new(), 60, 4);
    let folder = tempfile::tempdir().unwrap();
    race(&LocalStore::open(folder.path()).unwrap(), 30, 3);
}

#[test]
fn racing_hosts_over_sftp_never_hold_the_lock_together() {
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    let store = SftpStore::connect(part::piped(folder.path(), &[])).unwrap();
    race(&store, 15, 3);
}

#[test]
fn a_full_disk_leaves_no_lock_that_nobody_can_take() {
    requires!(needs::root());
    let disk = part::SmallDisk::mount(1 << 20);
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
    take(&store, &record).unwrap();
}

#[test]
fn break_lock_watches_and_spares_a_renewed_lock() {
    let (store, state) = (MemoryStore::new(), host());
    let record = record(state.path());
    let nothing = lock::break_lock(&store, &container(), false, Duration::ZERO).unwrap();
    assert_eq!(
        nothing,
        Broken {
            lock: None,
            was_renewed: false
        }
    );
    let lock = take(&store, &record).unwrap();
    std::thread::scope(|scope| {
        for force in [false, true] {
            let breaking = store.clone();
            let breaker = scope.spawn(move || {
                let watch = Duration::from_secs(5);
                (
                    force,
                    lock::break_lock(&breaking, &container(), force, watch),
                )
            });
            std::thread::sleep(Duration::from_millis(300));
            lock.renew(&store).unwrap();
            let begun = Instant::now();
            match breaker.join().unwrap() {
                (false, Err(LockError::Renewed { .. })) => lock.verify(&store).unwrap(),
                (
                    true,
                    Ok(Broken {
                        lock: Some(_),
                        was_renewed: true,
                    }),
                ) => {}
                other => panic!("{other:?}"),
            }
            assert!(
                begun.elapsed() < Duration::from_secs(4),
                "told as soon as it was renewed"
            );
        }
    });
    assert_lost(lock.verify(&store));
    assert_eq!(lock_files(&store), []);
}

// Real processes. This binary runs itself as the holder.

const CHILD: &str = "SPRAT_TEST_LOCK_CHILD";

/// Not a test: the holder that the tests below start and kill.
#[test]
fn child_that_takes_the_lock_and_waits() {
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

/// Where it says so no thread can be made: the stacks would be too large.
const THREADLESS: &str = "SPRAT_TEST_LOCK_THREADLESS";

#[test]
fn a_lock_is_kept_where_no_thread_can_be_made() {
    if std::env::var_os(THREADLESS).is_none() {
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_lock_is_kept_where_no_thread_can_be_made"])
            .arg("--test-threads=1")
            .env(THREADLESS, "1")
            .env("RUST_MIN_STACK", (1u64 << 46).to_string())
            .status();
        assert!(status.unwrap().success());
        return;
    }
    let thread = std::thread::Builder::new().spawn(|| ());
    assert!(thread.is_err(), "there are threads, so this shows nothing");
    let (store, host) = (MemoryStore::new(), host());
    let record = record(host.path());
    let mut called = false;
    let first = Lock::first_look(&store, &container()).unwrap();
    let lock = Lock::acquire_after(first, &store, &record, owner(), || called = true).unwrap();
    assert!(called, "what goes on meanwhile goes on all the same");
    lock.verify(&store).unwrap();
    lock.renew(&store).unwrap();
    let next = store.create_new(&lock_file(2)).unwrap();
    assert_lost(lock.verify(&store));
    drop(next);
    store.remove(&lock_file(2)).unwrap();
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
                "child_that_takes_the_lock_and_waits",
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
        assert!(said.is_some(), "the child did not take the lock");
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
    let refused = LocalRecord::open(&state, "id");
    assert!(
        matches!(refused, Err(LockError::HeldHere { .. })),
        "{refused:?}"
    );
    holder.kill();
    let record = part::eventually(|| LocalRecord::open(&state, "id").ok());
    assert_eq!(record.suspects(), [4096..8192]);
    let store = LocalStore::open(&place.path().join("store")).unwrap();
    let lock = take(&store, &record).unwrap();
    assert_eq!((lock.number(), lock_files(&store)), (2, vec![lock_file(2)]));
}

#[test]
fn a_killed_process_is_taken_over_a_living_one_is_not() {
    a_living_process_is_refused_and_a_dead_one_taken_over(&[]);
}

#[test]
fn another_pid_namespace_hides_no_living_process() {
    requires!(needs::root(), needs::program("unshare"));
    let wrapper = ["unshare", "--pid", "--fork", "--kill-child"];
    a_living_process_is_refused_and_a_dead_one_taken_over(&wrapper);
}

#[test]
fn a_connection_that_outlives_its_session_keeps_the_record_locked() {
    requires!(needs::sftp_server_missing());
    let (folder, state) = (tempfile::tempdir().unwrap(), host());
    let record = record(state.path());
    // Like an ssh that still has bytes to send: it ignores the end of its input.
    let server = needs::sftp_server().unwrap().display().to_string();
    let script = format!("trap '' TERM; {server}; sleep 1");
    let mut options = part::options(
        ["/bin/sh", "-c", script.as_str()].map(Into::into).to_vec(),
        folder.path(),
    );
    options.inherit_fds = vec![record.fd().try_clone_to_owned().unwrap()];
    let store = SftpStore::connect(options).unwrap();
    drop(record);
    let refused = LocalRecord::open(state.path(), "id");
    assert!(matches!(refused, Err(LockError::HeldHere { .. })));
    drop(store);
    LocalRecord::open(state.path(), "id").unwrap();
}

/// What becomes of a line at a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line {
    Goes,
    /// Before the request arrives.
    EndsBefore,
    /// The request may be carried out, and its answer is lost.
    EndsAfter,
}

/// A server over a socket; `at` is asked about each request that it is sent.
fn behind(folder: &Path, at: impl Fn(&[u8]) -> Line + Send + Sync + 'static) -> SftpStore {
    let at = Arc::new(at);
    let dial = move || {
        let (here, mut there) = UnixStream::pair().unwrap();
        let mut server = Command::new(needs::sftp_server().unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut answers = server.stdout.take().unwrap();
        let mut back = there.try_clone().unwrap();
        std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
        let at = Arc::clone(&at);
        std::thread::spawn(move || {
            let mut requests = server.stdin.take().unwrap();
            let mut head = [0; 4];
            while there.read_exact(&mut head).is_ok() {
                let mut body = vec![0; u32::from_be_bytes(head) as usize];
                there.read_exact(&mut body).unwrap();
                let line = at(&body);
                if line != Line::Goes {
                    there.shutdown(Shutdown::Both).unwrap();
                }
                if line == Line::EndsBefore
                    || requests.write_all(&[&head[..], &body].concat()).is_err()
                {
                    break;
                }
                if line == Line::EndsAfter {
                    // At its end sftp-server carries nothing more out.
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
            drop(requests);
            server.wait().unwrap();
        });
        Ok(Wire::over_socket(here).unwrap())
    };
    let options = part::piped(folder, &[]);
    SftpStore::connect_over(Box::new(dial), options).unwrap()
}

/// A server, and the requests that it was sent and that somebody waits for: not those that close.
fn counted(folder: &Path) -> (SftpStore, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&count);
    let store = behind(folder, move |body| {
        counting.fetch_add(usize::from(body[0] != 4), Ordering::SeqCst);
        Line::Goes
    });
    (store, count)
}

#[test]
fn a_lock_that_could_not_be_given_back_is_its_hosts_to_take_over() {
    requires!(needs::sftp_server_missing());
    let removes = |body: &[u8]| body[0] == 13;
    // Of the folder, behind the removal.
    let flushes = |body: &[u8]| body[9..].starts_with(b"fsync@openssh.com");
    for (ends, end) in [
        (removes as fn(&[u8]) -> bool, Line::EndsBefore),
        (removes, Line::EndsAfter),
        (flushes, Line::EndsBefore),
        (flushes, Line::EndsAfter),
    ] {
        let (folder, here, there) = (host(), host(), host());
        let (mine, theirs) = (record(here.path()), record(there.path()));
        let armed = Arc::new(AtomicBool::new(false));
        let arming = Arc::clone(&armed);
        let store = behind(folder.path(), move |body| {
            if arming.load(Ordering::SeqCst) && body.len() > 9 && ends(body) {
                return end;
            }
            Line::Goes
        });
        let lock = take(&store, &mine).unwrap();
        armed.store(true, Ordering::SeqCst);
        let failed = lock.release(&store);
        assert!(matches!(failed, Err(LockError::Store { .. })), "{failed:?}");
        drop(store);

        let store = behind(folder.path(), |_| Line::Goes);
        let is_left = !lock_files(&store).is_empty();
        assert!(is_left || (end, ends(&[13; 20])) != (Line::EndsBefore, true));
        if is_left {
            assert_held(take(&store, &theirs), 1);
        }
        let lock = take(&store, &mine).unwrap();
        assert_eq!(lock.number(), 1 + u64::from(is_left), "{end:?}");
        lock.verify(&store).unwrap();
        lock.release(&store).unwrap();
        assert_eq!(lock_files(&store), []);
        take(&store, &theirs).unwrap();
    }
}

#[test]
fn a_lock_costs_no_request_twice() {
    requires!(needs::sftp_server_missing());
    let (folder, state) = (host(), host());
    let (store, count) = counted(folder.path());
    // All together: nobody waits for the answer to a close, so it may be counted with what follows.
    let mut bound = count.load(Ordering::SeqCst);
    let mut asked = |what: &str, at_most: usize| {
        bound += at_most;
        let now = count.load(Ordering::SeqCst);
        assert!(now <= bound, "{what}: {} requests too many", now - bound);
    };
    let lock = take(&store, &record(state.path())).unwrap();
    // Two looks at the folder, one of them with the own lock in it; a file and a folder that are
    // opened and flushed; the content.
    asked("taking", 3 + 7 + 5);
    lock.verify(&store).unwrap();
    asked("looking at it again", 2 + 3);
    lock.release_verified(&store).unwrap();
    asked("giving it back", 3);
}
