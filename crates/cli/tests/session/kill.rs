//! Whichever process of a session is killed, nothing stays behind, and the next run completes.

use std::fs;
use std::time::{Duration, Instant};

use crate::bench::{Bench, fill, missing, ssh_missing};
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

#[test]
fn an_init_that_was_killed_leaves_nothing_that_the_next_one_does_not_clear() {
    requires!(ssh_missing());
    let bench = Bench::ssh();
    let target = bench.target().to_string();
    for roles in [
        &["init"][..],
        &["volume-process"],
        &["worker"],
        &["init", "volume-process"],
    ] {
        let mut init = bench
            .command(&["init", &target, "--size", "1G", "--cheap-kdf-for-tests"])
            .spawn()
            .unwrap();
        let is_begun = |name: &String| name.starts_with("x.luks.new-");
        while !bench.server_files().iter().any(is_begun) {
            assert!(
                init.try_wait().unwrap().is_none(),
                "{:?}",
                init.wait_with_output()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        let killed = bench.kill(roles);
        let output = init.wait_with_output().unwrap();
        eprintln!(
            "killed {killed} of {roles:?}: {output:?}; {:?}",
            bench.server_files()
        );
        assert!(!output.status.success() || bench.server_files() == ["x.luks"]);
        bench.assert_nothing_remains();
        let _ = fs::remove_file(bench.container());
    }
    bench.create();
    assert_eq!(bench.server_files(), ["x.luks"]);
    fill(&bench.path("source"), 3, 1000, 31);
    bench.backup().unwrap();
    bench.restore_and_compare();
}

#[test]
fn a_mount_command_that_is_killed_leaves_a_whole_mount_or_none() {
    requires!(missing());
    let bench = Bench::local();
    bench.create();
    fill(&bench.path("source"), 3, 1000, 32);
    bench.backup().unwrap();
    let (target, dir) = (bench.target().to_string(), bench.path("mnt"));
    let dir_text = dir.display().to_string();
    for pause_ms in [5, 20, 40, 60, 80, 100, 130, 160] {
        let mut mount = bench
            .command(&["mount", &target, &dir_text, "--rw"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(pause_ms));
        let _ = mount.kill();
        mount.wait().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        let whole = dir.join("docs").exists();
        eprintln!("killed after {pause_ms} ms: mounted {whole}");
        if whole {
            fs::write(dir.join("by-hand"), "kept").unwrap();
            let done = bench.command(&["umount", &dir_text]).output().unwrap();
            assert!(done.status.success(), "{done:?}");
        }
        bench.assert_nothing_remains();
    }
    bench.backup().unwrap();
    bench.restore_and_compare();
    bench.assert_clean();
}

/// As a service manager does at a shutdown.
#[test]
fn a_sigterm_to_every_process_ends_the_session_in_order() {
    requires!(ssh_missing());
    for bench in [Bench::local(), Bench::ssh()] {
        bench.create();
        fill(&bench.path("source"), 150, 1 << 20, 41);
        let target = bench.target().to_string();
        let source = bench.path("source").display().to_string();
        let session = bench
            .command(&["backup", &target, "--name", "docs", &source])
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !bench.processes().iter().any(|(_, role)| role == "rsync") {
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
        let roles = ["backup", "volume-process", "worker", "rsync", "ssh"];
        bench.signal(&roles, rustix::process::Signal::TERM);
        let output = session.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        bench.assert_nothing_remains();
        assert_eq!(bench.server_files(), ["x.luks"], "the lock is given back");
        bench.assert_clean();
        bench.backup().unwrap();
        bench.restore_and_compare();
    }
}
