//! Whichever process of a session is killed, nothing stays behind, and the next run completes.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod session_bench;

use std::fs;
use std::time::{Duration, Instant};

use session_bench::{Bench, fill, missing, ssh_missing};
use sprat_testkit::requires;

/// Starts a backup as a process of its own, kills `roles` of it once bytes are on their way to the
/// server, and returns the exit code of the session process, if that was left alive.
fn kill_during_backup(bench: &Bench, roles: &[&str]) -> Option<i32> {
    let before = bench.allocated();
    let target = bench.target().to_string();
    let source = bench.path("source").display().to_string();
    let mut session = bench
        .command(&["backup", &target, "--name", "docs", &source])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let mut killed = 0;
    // rsync is done long before the last byte is sent, so it is killed as soon as it is seen.
    while if roles == ["rsync"] {
        killed = bench.kill(roles);
        killed == 0
    } else {
        bench.allocated() < before + (2 << 20)
    } {
        assert!(
            session.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60),
            "the backup ended before anything could be killed: {:?}",
            session.wait_with_output().unwrap()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    if killed == 0 {
        killed = bench.kill(roles);
    }
    let output = session.wait_with_output().unwrap();
    eprintln!(
        "killed {killed} of {roles:?} after {:?}: {} {}",
        begun.elapsed(),
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.status.code()
}

fn survive(bench: &Bench, kills: &[(&[&str], Option<i32>)]) {
    bench.create();
    fill(&bench.path("source"), 10, 50_000, 7);
    bench.backup().unwrap();
    for (round, (roles, exit)) in kills.iter().enumerate() {
        let seed = round as u64 + 100;
        let files = if *roles == ["rsync"] { 150 } else { 24 };
        fill(
            &bench.path("source").join(format!("r{round}")),
            files,
            1 << 20,
            seed,
        );
        let ended = kill_during_backup(bench, roles);
        bench.assert_nothing_remains();
        assert_eq!(ended, *exit, "{roles:?}");
        bench.assert_clean();
        std::thread::sleep(Duration::from_millis(1100));
        bench.backup().unwrap();
        bench.restore_and_compare();
        assert_eq!(bench.server_files(), ["x.luks"], "no lock is left");
        fs::remove_dir_all(bench.path("source").join(format!("r{round}"))).unwrap();
    }
    bench.assert_nothing_remains();
}

#[test]
fn any_process_of_a_local_session_may_be_killed() {
    requires!(missing());
    let mut bench = Bench::local();
    bench.size_bytes += 512 << 20;
    survive(
        &bench,
        &[
            (&["rsync"], Some(1)),
            (&["backup"], None),
            (&["volume-process"], Some(1)),
            (&["worker"], Some(1)),
            (&["backup", "volume-process", "worker", "rsync"], None),
        ],
    );
}

#[test]
fn any_process_of_a_session_over_ssh_may_be_killed() {
    requires!(ssh_missing());
    let mut bench = Bench::ssh();
    bench.size_bytes += 512 << 20;
    survive(
        &bench,
        &[
            (&["backup"], None),
            (&["volume-process"], Some(1)),
            // The line is lost with it, and a new one taken.
            (&["ssh"], Some(0)),
            (
                &["ssh", "volume-process", "worker", "backup", "rsync"],
                None,
            ),
        ],
    );
}
