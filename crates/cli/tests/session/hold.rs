//! What keeps a container one session's own: against readers who spell it otherwise, and against
//! what a dead session's server may still write.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::bench::{Bench, Seen, assert_exit, fill, never, ssh_missing};
use sprat::Exit;
use sprat_session::address::Target;
use sprat_session::interrupt::Interrupt;
use sprat_session::{Access, Session};
use sprat_testkit::requires;

#[test]
fn a_reader_who_spells_the_target_otherwise_respects_a_living_session() {
    requires!(ssh_missing());
    let bench = Bench::ssh();
    bench.create();
    let writing = bench.open(Access::ReadWrite).unwrap();
    let mut options = bench.options(Access::ReadOnly);
    let text = format!("ssh://root@some.host{}", bench.container().display());
    options.target = Target::parse(&text, Path::new("/")).unwrap();
    assert_ne!(options.target, bench.target());
    let reading = Session::open(
        options.clone(),
        &bench.secret,
        &mut Seen::default(),
        &never(),
    );
    assert_exit(reading, Exit::Locked);
    writing.close(&mut Seen::default(), &never()).unwrap();
    let reading = Session::open(options, &bench.secret, &mut Seen::default(), &never()).unwrap();
    reading.close(&mut Seen::default(), &never()).unwrap();
    bench.assert_nothing_remains();
}

/// Kills a whole session while it writes.
fn die_while_writing(bench: &Bench) {
    fill(&bench.path("source"), 24, 1 << 20, 11);
    let before = bench.allocated();
    let target = bench.target().to_string();
    let source = bench.path("source").display().to_string();
    let mut session = bench
        .command(&["backup", &target, "--name", "docs", &source])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while bench.allocated() < before + (2 << 20) {
        assert!(begun.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    bench.kill(&["ssh", "volume-process", "worker", "backup", "rsync"]);
    session.wait().unwrap();
    bench.assert_nothing_remains();
}

#[test]
fn a_takeover_waits_from_when_all_of_the_dead_session_was_gone_and_can_be_interrupted() {
    requires!(ssh_missing());
    let bench = Bench::ssh();
    bench.create();
    die_while_writing(&bench);
    let quiet_time = Duration::from_secs(4);
    std::thread::sleep(quiet_time);
    // How long ago the dead session sent last says nothing of when its ssh sent that.
    let mut options = bench.options(Access::ReadWrite);
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
        &bench.secret,
        &mut Seen::default(),
        &interrupt,
    );
    assert_exit(opened, Exit::Interrupted);
    assert!(
        begun.elapsed() < Duration::from_secs(8),
        "{:?}",
        begun.elapsed()
    );
    bench.assert_nothing_remains();
    options.quiet_time = quiet_time;
    let begun = Instant::now();
    let session = Session::open(options, &bench.secret, &mut Seen::default(), &never()).unwrap();
    assert!(begun.elapsed() >= quiet_time, "{:?}", begun.elapsed());
    session.close(&mut Seen::default(), &never()).unwrap();
    assert_eq!(bench.server_files(), ["x.luks"], "no lock is left");
    bench.assert_clean();
    bench.assert_nothing_remains();
}
