//! A takeover whose loser gets its answers late, and one whose server is away.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use std::{fs, thread};

use rustix::process::{Pid, Signal, kill_process};
use sprat::{Exit, Failure};
use sprat_session::address::Target;
use sprat_session::{Access, DoorWay, Session, UnlockWish, Unlocked, unlock};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::{leases, requires};

use sprat_testkit_session::session_harness::{
    Observed, SessionHarness, assert_exit, fill, never, ssh_missing,
};

/// How long the server leaves writes unanswered after the takeover. By default a moment; `SPRAT_LATE_ANSWERS=15`
/// is longer than an abort may take otherwise.
fn late_answers() -> Duration {
    let set = std::env::var("SPRAT_LATE_ANSWERS").ok();
    Duration::from_secs(set.and_then(|set| set.parse().ok()).unwrap_or(1))
}

#[test]
fn lost_lease_publishes_its_list_before_answers_and_free_after() {
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    harness.create();
    fill(&harness.path("source"), 10, 8 << 20, 53);
    let mut options = harness.options(Access::ReadWrite);
    options.write_buffer_bytes_max = 32 << 20;
    let mut first =
        Session::open(options, &harness.secret, &mut Observed::default(), &never()).unwrap();
    let lease = leases::held(&harness.path("store")).pop().unwrap();
    let taken = |harness: &SessionHarness| {
        fs::metadata(harness.container())
            .map(|about| about.blocks())
            .unwrap()
    };
    let before = taken(&harness);
    let spec = harness.spec();
    let sending = thread::spawn(move || {
        let taken = first.take_snapshot(spec, &mut Observed::default(), &never());
        let closed = first.close(&mut Observed::default(), &never());
        taken.map(drop).and(closed.map(drop))
    });
    let enough = before + (4 << 20) / 512;
    // On a busy machine the further connections come up late.
    while taken(&harness) < enough || harness.sshd().sftp_server_pids().len() < 2 {
        assert!(!sending.is_finished(), "it ended too early");
        thread::sleep(Duration::from_millis(10));
    }
    // They carry all writes once one has opened the file.
    let more = taken(&harness) + (12 << 20) / 512;
    while taken(&harness) < more {
        assert!(!sending.is_finished(), "it ended too early");
        thread::sleep(Duration::from_millis(10));
    }
    // All but the first one, which leases are read through.
    let mut data = harness.sshd().sftp_server_pids();
    data.sort_unstable();
    let data = data.split_off(1);
    let signal = |signal| {
        for pid in &data {
            let _ = kill_process(Pid::from_raw(*pid).unwrap(), signal);
        }
    };
    signal(Signal::STOP);
    // What is sent from now on gets no answer.
    thread::sleep(Duration::from_millis(500));
    let store = harness.path("store");
    let mut elsewhere = harness.options(Access::ReadWrite);
    elsewhere.state_dir = harness.path("other-state");
    elsewhere.target =
        Target::parse(&harness.container().display().to_string(), Path::new("/")).unwrap();
    let wish = UnlockWish {
        force: true,
        is_off: true,
        watch: Duration::ZERO,
        answer_wait: Duration::ZERO,
        ..UnlockWish::default()
    };
    unlock(&elsewhere, &wish, &never(), &mut |_| ()).unwrap();
    let lists = || {
        let names = fs::read_dir(&store).unwrap().flatten();
        names
            .filter(|entry| entry.file_name().to_string_lossy().contains(".late-"))
            .count()
    };
    let is_free = || fs::read_to_string(&lease).is_ok_and(|text| text.contains("\"free\":true"));
    let begun = Instant::now();
    while lists() == 0 {
        assert!(begun.elapsed() < LIMIT, "no list");
        assert!(!sending.is_finished(), "it ended without a list");
        thread::sleep(Duration::from_millis(20));
    }
    thread::sleep(late_answers());
    assert!(!is_free() && !sending.is_finished());
    signal(Signal::CONT);
    assert_exit(sending.join().unwrap(), Exit::Locked);
    assert!(is_free(), "all is answered");
    harness.assert_nothing_remains();
}

/// A lease of a machine that is gone.
fn held_by_another(harness: &SessionHarness, host: &str) {
    let store = sprat_store::LocalStore::open(&harness.path("store")).unwrap();
    let state = harness.path("out").join(host);
    fs::create_dir(&state).unwrap();
    let record = sprat_store::WriteJournal::open(&state, "id").unwrap();
    let owner = sprat_store::OwnerNote {
        host: host.to_owned(),
        version: "0".to_owned(),
    };
    let name = sprat_store::FileName::new("x.luks").unwrap();
    // Dropped, and not released.
    sprat_store::Lock::acquire(&store, &name, &record, owner).unwrap();
}

/// An unlock on another thread, and its messages.
struct Unlocking {
    thread: thread::JoinHandle<Result<Unlocked, Failure>>,
    said: Arc<Mutex<Vec<String>>>,
}

impl Unlocking {
    fn count(&self, what: &str) -> usize {
        let said = self.said.lock().unwrap();
        said.iter().filter(|said| said.contains(what)).count()
    }

    fn wait_for(&self, what: &str) {
        let begun = Instant::now();
        while self.count(what) == 0 {
            assert!(begun.elapsed() < LIMIT, "not said: {what}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn start_unlock(harness: &SessionHarness, silence_s: u64, reconnect_max: Duration) -> Unlocking {
    let mut options = harness.options(Access::ReadWrite);
    options.reconnect_max = reconnect_max;
    let wish = UnlockWish {
        watch: Duration::ZERO,
        answer_wait: Duration::from_millis(100),
        silence_s,
        ..UnlockWish::default()
    };
    let said = Arc::new(Mutex::new(Vec::new()));
    let saying = Arc::clone(&said);
    let thread = thread::spawn(move || {
        unlock(&options, &wish, &never(), &mut |text| {
            saying.lock().unwrap().push(text.to_owned());
        })
    });
    Unlocking { thread, said }
}

#[test]
fn waiting_unlock_that_loses_its_lease_answers_the_new_owner() {
    requires!(sprat_testkit_session::session_harness::missing());
    let harness = SessionHarness::local();
    harness.create();
    // Otherwise the kernel reports at once that there is no writer.
    let _open = harness.container_file();
    held_by_another(&harness, "one");
    let waits = start_unlock(&harness, 600, Duration::ZERO);
    waits.wait_for("no answer from the session");
    let lease = leases::held(&harness.path("store")).pop().unwrap();
    let mut elsewhere = harness.options(Access::ReadWrite);
    elsewhere.state_dir = harness.path("other-state");
    let wish = UnlockWish {
        force: true,
        is_off: true,
        watch: Duration::ZERO,
        answer_wait: Duration::from_secs(4),
        ..UnlockWish::default()
    };
    let done = unlock(&elsewhere, &wish, &never(), &mut |_| ()).unwrap();
    assert_exit(waits.thread.join().unwrap(), Exit::Locked);
    let text = fs::read_to_string(&lease).unwrap();
    assert!(text.contains("\"free\":true"), "{text}");
    let ways: Vec<DoorWay> = done.ways.iter().map(|(_, way)| *way).collect();
    // What the other one waited for is waited for by this one.
    assert_eq!(ways, [DoorWay::Answered, DoorWay::Off], "{:?}", done.ways);
}

#[test]
fn waiting_unlock_survives_lost_connections_and_server_outage() {
    requires!(ssh_missing());
    let mut harness = SessionHarness::ssh();
    harness.create();
    // Otherwise the server's kernel reports at once that there is no writer.
    let _open = harness.container_file();
    held_by_another(&harness, "one");
    let unlocking = start_unlock(&harness, 8, Duration::from_secs(60));
    unlocking.wait_for("took over the lock");
    for _ in 0..8 {
        harness.sshd().kill_sessions();
        thread::sleep(Duration::from_millis(150));
    }
    harness.sshd().stop();
    thread::sleep(Duration::from_secs(2));
    harness.sshd().restart().unwrap();
    unlocking.wait_for("answers again");
    // Once for each reason, not for each attempt.
    assert!((1..12).contains(&unlocking.count("does not answer")));
    assert!(unlocking.count("no answer from the session") <= 1);
    let done = unlocking.thread.join().unwrap().unwrap();
    assert_eq!(done.ways[0].1, DoorWay::Silent);
    // One that stays away ends it; the lease stays.
    held_by_another(&harness, "two");
    let unlocking = start_unlock(&harness, 600, Duration::from_secs(2));
    unlocking.wait_for("took over the lock");
    harness.sshd().stop();
    let begun = Instant::now();
    let failure = unlocking.thread.join().unwrap().unwrap_err();
    assert!(begun.elapsed() < LIMIT);
    assert_eq!(failure.exit, Exit::Unreachable, "{failure:?}");
    assert!(failure.hint.unwrap().contains("Run `sprat unlock` again"));
    let store = sprat_store::LocalStore::open(&harness.path("store")).unwrap();
    let name = sprat_store::FileName::new("x.luks").unwrap();
    let left = sprat_store::lock::inspect(&store, &name, None).unwrap();
    assert_eq!(left.held.unwrap().waits_for.len(), 1, "it stays taken over");
}
