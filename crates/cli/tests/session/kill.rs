//! Whichever process of a session is killed, nothing stays behind, and the next run completes.

use std::fs;
use std::time::{Duration, Instant};

use sprat_testkit::requires;
use sprat_testkit_session::session_harness::{SessionHarness, fill, missing, ssh_missing};

/// Starts a backup as a process of its own, kills `roles` of it once bytes are on their way to the
/// server, and returns the exit code of the session process, if that was left alive.
fn kill_during_backup(harness: &SessionHarness, roles: &[&str]) -> Option<i32> {
    let before = harness.allocated();
    let target = harness.target().to_string();
    let source = harness.path("source").display().to_string();
    let mut session = harness
        .command(&["backup", &target, "--name", "docs", &source])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let mut killed = 0;
    // rsync is done long before the last byte is sent, so it is killed as soon as it is seen.
    while if roles == ["rsync"] {
        killed = harness.kill(roles);
        killed == 0
    } else {
        harness.allocated() < before + (2 << 20)
    } {
        assert!(
            session.try_wait().unwrap().is_none() && begun.elapsed() < Duration::from_secs(60),
            "the backup ended before anything could be killed: {:?}",
            session.wait_with_output().unwrap()
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    if killed == 0 {
        killed = harness.kill(roles);
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

fn survive(harness: &SessionHarness, kills: &[(&[&str], Option<i32>)]) {
    harness.create();
    fill(&harness.path("source"), 10, 50_000, 7);
    harness.backup().unwrap();
    for (round, (roles, exit)) in kills.iter().enumerate() {
        let seed = round as u64 + 100;
        let files = if *roles == ["rsync"] { 150 } else { 24 };
        fill(
            &harness.path("source").join(format!("r{round}")),
            files,
            1 << 20,
            seed,
        );
        let ended = kill_during_backup(harness, roles);
        harness.assert_nothing_remains();
        assert_eq!(ended, *exit, "{roles:?}");
        harness.assert_clean();
        std::thread::sleep(Duration::from_millis(1100));
        harness.backup().unwrap();
        harness.restore_and_compare();
        assert_eq!(harness.server_files(), ["x.luks"], "no lock is left");
        fs::remove_dir_all(harness.path("source").join(format!("r{round}"))).unwrap();
    }
    harness.assert_nothing_remains();
}

#[test]
fn any_process_of_a_local_session_may_be_killed() {
    requires!(missing());
    let mut harness = SessionHarness::local();
    harness.size_bytes += 512 << 20;
    survive(
        &harness,
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
    let mut harness = SessionHarness::ssh();
    harness.size_bytes += 512 << 20;
    survive(
        &harness,
        &[
            (&["backup"], None),
            (&["volume-process"], Some(1)),
            // The connection is lost with it, and a new one opened.
            (&["ssh"], Some(0)),
            (
                &["ssh", "volume-process", "worker", "backup", "rsync"],
                None,
            ),
        ],
    );
}

#[test]
fn next_init_removes_files_of_a_killed_init() {
    requires!(ssh_missing());
    let harness = SessionHarness::ssh();
    let target = harness.target().to_string();
    for roles in [
        &["init"][..],
        &["volume-process"],
        &["worker"],
        &["init", "volume-process"],
    ] {
        let mut init = harness
            .command(&["init", &target, "--size", "1G", "--cheap-kdf-for-tests"])
            .spawn()
            .unwrap();
        let is_begun = |name: &String| name.starts_with("x.luks.new-");
        while !harness.server_files().iter().any(is_begun) {
            assert!(
                init.try_wait().unwrap().is_none(),
                "{:?}",
                init.wait_with_output()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        let killed = harness.kill(roles);
        let output = init.wait_with_output().unwrap();
        eprintln!(
            "killed {killed} of {roles:?}: {output:?}; {:?}",
            harness.server_files()
        );
        assert!(!output.status.success() || harness.server_files() == ["x.luks"]);
        harness.assert_nothing_remains();
        let _ = fs::remove_file(harness.container());
        // Where a container is known no other one is made.
        let _ = fs::remove_dir_all(harness.path("state/containers"));
    }
    harness.create();
    assert_eq!(harness.server_files(), ["x.luks"]);
    fill(&harness.path("source"), 3, 1000, 31);
    harness.backup().unwrap();
    harness.restore_and_compare();
}

#[test]
fn killed_mount_command_leaves_a_complete_mount_or_none() {
    requires!(missing());
    let harness = SessionHarness::local();
    harness.create();
    fill(&harness.path("source"), 3, 1000, 32);
    harness.backup().unwrap();
    let (target, dir) = (harness.target().to_string(), harness.path("mnt"));
    let dir_text = dir.display().to_string();
    for pause_ms in [5, 20, 40, 60, 80, 100, 130, 160] {
        let mut mount = harness
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
            let done = harness.command(&["umount", &dir_text]).output().unwrap();
            assert!(done.status.success(), "{done:?}");
        }
        harness.assert_nothing_remains();
    }
    harness.backup().unwrap();
    harness.restore_and_compare();
    harness.assert_clean();
}

/// As a service manager does at a shutdown.
#[test]
fn a_sigterm_to_every_process_ends_the_session_in_order() {
    requires!(ssh_missing());
    for harness in [SessionHarness::local(), SessionHarness::ssh()] {
        harness.create();
        fill(&harness.path("source"), 150, 1 << 20, 41);
        let target = harness.target().to_string();
        let source = harness.path("source").display().to_string();
        let session = harness
            .command(&["backup", &target, "--name", "docs", &source])
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !harness.processes().iter().any(|(_, role)| role == "rsync") {
            assert!(begun.elapsed() < Duration::from_secs(60));
        }
        let roles = ["backup", "volume-process", "worker", "rsync", "ssh"];
        harness.signal(&roles, rustix::process::Signal::TERM);
        let output = session.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        harness.assert_nothing_remains();
        assert_eq!(harness.server_files(), ["x.luks"], "the lock is given back");
        harness.assert_clean();
        harness.backup().unwrap();
        harness.restore_and_compare();
    }
}
