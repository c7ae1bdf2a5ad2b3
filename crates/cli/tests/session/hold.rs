//! A container belongs to one session: against readers with another spelling of the target, and
//! against late writes of a dead session's server.

use std::path::Path;
use std::time::{Duration, Instant};

use sprat::Exit;
use sprat_session::address::Target;
use sprat_session::interrupt::Interrupt;
use sprat_session::{Access, Session};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::requires;
use sprat_testkit_session::session_harness::{
    Observed, SessionHarness, assert_exit, fill, never, ssh_missing,
};

#[test]
fn reader_with_another_spelling_respects_a_running_session() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    harness.create();
    let writing = harness.open(Access::ReadWrite).unwrap();
    let mut options = harness.options(Access::ReadOnly);
    let text = format!("ssh://root@some.host{}", harness.container().display());
    options.target = Target::parse(&text, Path::new("/")).unwrap();
    assert_ne!(options.target, harness.target());
    let reading = Session::open(
        options.clone(),
        &harness.secret,
        &mut Observed::default(),
        &never(),
    );
    let failure = assert_exit(reading, Exit::Locked);
    let what = "container x.luks is locked by this machine: ";
    assert!(failure.what.starts_with(what), "{failure:?}");
    assert!(failure.hint.unwrap().contains("under another name or path"));
    writing.close(&mut Observed::default(), &never()).unwrap();
    let reading =
        Session::open(options, &harness.secret, &mut Observed::default(), &never()).unwrap();
    reading.close(&mut Observed::default(), &never()).unwrap();
    harness.assert_nothing_remains();
}

/// Kills a whole session while it writes.
fn die_while_writing(harness: &SessionHarness) {
    fill(&harness.path("source"), 24, 1 << 20, 11);
    let before = harness.allocated();
    let target = harness.target().to_string();
    let source = harness.path("source").display().to_string();
    let mut session = harness
        .command(&["backup", &target, "--name", "docs", &source])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while harness.allocated() < before + (2 << 20) {
        assert!(begun.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(1));
    }
    harness.kill(&["ssh", "volume-process", "worker", "backup", "rsync"]);
    session.wait().unwrap();
    harness.assert_nothing_remains();
}

#[test]
fn takeover_waits_from_the_dead_sessions_end_and_is_interruptible() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    harness.create();
    die_while_writing(&harness);
    let quiet_time = Duration::from_secs(4);
    std::thread::sleep(quiet_time);
    // The time of the dead session's last send does not show when its ssh sent those bytes.
    let mut options = harness.options(Access::ReadWrite);
    options.quiet_time = Duration::from_secs(600);
    let interrupt = Interrupt::never().unwrap();
    let later = interrupt.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3));
        later.request();
    });
    let begun = Instant::now();
    let opened = Session::open(
        options.clone(),
        &harness.secret,
        &mut Observed::default(),
        &interrupt,
    );
    assert_exit(opened, Exit::Interrupted);
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    harness.assert_nothing_remains();
    options.quiet_time = quiet_time;
    let begun = Instant::now();
    let session =
        Session::open(options, &harness.secret, &mut Observed::default(), &never()).unwrap();
    assert!(begun.elapsed() >= quiet_time, "{:?}", begun.elapsed());
    session.close(&mut Observed::default(), &never()).unwrap();
    assert_eq!(harness.server_files(), ["x.luks"], "no lock is left");
    harness.assert_clean();
    harness.assert_nothing_remains();
}
