//! The tests of logs once more: with clones, and with a keeper that changes all the time, on a btrfs and on an XFS.

use std::fs;
use std::process::Command;
use std::time::Instant;

use sprat_testkit::{dice, needs, requires};

use crate::client::{EAGER, RESTLESS, agent};
use crate::clones::{BTRFS, CLONE, Disk, XFS, is_clone, missing, on_both};
use crate::watched::fuzz_until;
use crate::{expiry, full, interleaved, kills, mangled, storm};

/// The same policy with logs and with clones.
fn both(policy: &str) -> [String; 2] {
    [policy.to_owned(), format!("{policy}{CLONE}")]
}

fn storm_on(mkfs: &[&str], kills: u64, policies: &[String]) {
    let policies: Vec<&str> = policies.iter().map(String::as_str).collect();
    storm::past_states_stay_exact(&Disk::new(mkfs).served(RESTLESS), kills, &policies);
}

#[test]
fn past_states_stay_exact_on_btrfs_while_everything_goes_on_at_once() {
    requires!(missing());
    storm_on(BTRFS, 15, &both(RESTLESS)[1..]);
}

#[test]
fn past_states_stay_exact_on_xfs_while_everything_goes_on_at_once() {
    requires!(missing());
    storm_on(XFS, 15, &both(RESTLESS)[1..]);
}

#[test]
fn past_states_stay_exact_on_btrfs_while_the_keeper_changes() {
    requires!(missing());
    storm_on(BTRFS, 8, &both(RESTLESS));
}

#[test]
fn past_states_stay_exact_on_xfs_while_the_keeper_changes() {
    requires!(missing());
    storm_on(XFS, 8, &both(RESTLESS));
}

#[test]
fn killed_writers_of_the_same_blocks_leave_every_state_exact() {
    requires!(missing());
    let [log, clone] = both(EAGER);
    let policies = [&*log, &*clone];
    on_both(|disk, _| {
        for first in [1, 0] {
            let served = disk.served(EAGER);
            kills::every_generation_is_exact_after_kills(&served, 3, &policies[first..]);
            assert!(first == 0 || is_clone(&served, 1));
        }
    });
}

#[test]
fn a_clone_that_begins_between_writes_has_a_state_of_one_moment() {
    requires!(missing());
    on_both(|disk, _| kills::every_state_is_of_one_moment(&disk.served(RESTLESS), 3));
}

#[test]
fn killed_at_each_step_of_a_session_every_clone_stays_exact() {
    requires!(missing());
    // What a log does not do, too; all others in turn are in kills.rs.
    let steps = "ioctl,fsync,mkdirat,renameat,renameat2,unlinkat";
    kills::killed_at_each_step_of_a_session(&Disk::new(XFS).served(EAGER), steps);
}

#[test]
fn killed_at_each_step_a_revert_to_a_clone_loses_nothing() {
    requires!(missing());
    let steps = "ioctl,renameat,renameat2,unlinkat";
    kills::killed_at_each_step_of_a_revert(&Disk::new(BTRFS).served(EAGER), steps, 5);
}

#[test]
fn killed_at_each_step_expiry_of_clones_loses_nothing_and_ends_the_next_time() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let killed = expiry::killed_at_each_step(&disk.served(EAGER), "renameat,unlinkat");
    assert!(killed > 10, "only {killed} steps");
}

#[test]
fn a_clone_that_fails_at_any_call_is_repeated_before_anything_is_written() {
    requires!(missing());
    let calls = match dice::number("SPRAT_TORTURE_ROUNDS") {
        Some(_) => "ioctl,mkdirat,fsync,ftruncate,renameat,renameat2",
        None => "ioctl,renameat,renameat2",
    };
    on_both(|disk, _| {
        full::nothing_is_written_before_the_generation_has_begun(&disk.served(EAGER), calls);
    });
}

#[test]
fn idle_connections_find_the_clones_that_were_begun() {
    requires!(missing());
    let disk = Disk::new(XFS);
    interleaved::an_idle_connection_saves_for_the_newest_generation(&disk.served(EAGER));
    let [log, clone] = both(EAGER);
    let served = disk.served(EAGER);
    served.set_policy(&log);
    interleaved::an_idle_reader_finds_every_generation(&served, &clone);
    assert!(is_clone(&served, 3) && !is_clone(&served, 2));
}

/// In the short form each file once.
#[test]
fn mangled_files_beside_clones_are_an_error_and_never_other_content() {
    requires!(missing(), needs::program("strace"));
    let until = match dice::number("SPRAT_TORTURE_ROUNDS") {
        Some(_) => fuzz_until(),
        None => Instant::now(),
    };
    let [log, clone] = both(EAGER);
    mangled::never_other_content(&Disk::new(XFS).served(EAGER), &[&log, &clone], until);
}

/// Whatever was left half made, the next `tidy` removes it, also if no clone is made any more.
#[test]
fn what_a_killed_process_was_making_goes_with_the_next_tidy() {
    requires!(missing());
    let disk = Disk::new(BTRFS);
    let served = disk.served(EAGER);
    kills::make_container(&served);
    for (call, name) in [("ioctl", "half.clone"), ("renameat2", "new")] {
        served.set_policy(&both(EAGER)[1]);
        let before = served.live();
        // The second clone is the one at the end of the session.
        let step = if call == "ioctl" { 2 } else { 1 };
        let inject = format!("inject={call}:signal=KILL:when={step}");
        let mut client = kills::traced(&served, &["-o", "/dev/null", "-e", &inject]);
        let _ = kills::session(&mut client, 1);
        client.end_anyhow();
        let left = served.path(&format!(".sprat-agent/x.luks/{name}"));
        assert!(
            left.join("image").exists() || call == "ioctl" && left.exists(),
            "{name}"
        );
        served.set_policy(EAGER);
        let trace = served.path("trace");
        let mut tidy = Command::new("strace");
        tidy.args(["-qq", "-y", "-e", "trace=flock,unlinkat", "-o"])
            .arg(&trace)
            .arg(agent())
            .args(["tidy", "--root"])
            .arg(served.path(""));
        assert!(tidy.status().unwrap().success());
        assert!(!left.exists(), "{name}");
        // To remove an image may take long: no write waits for that.
        let (mut removed, mut closed) = (0, false);
        for line in fs::read_to_string(trace).unwrap().lines() {
            if line.contains("flock(") && line.contains("/gate>") && line.ends_with("= 0") {
                closed = line.contains("LOCK_EX");
            } else if line.contains("unlinkat(") && line.contains("\"image\"") {
                assert!(!closed, "{line}");
                removed += 1;
            }
        }
        assert!(call == "ioctl" || removed == 1, "{removed}");
        let all = fs::read_dir(served.path(".sprat-agent/x.luks")).unwrap();
        let mut names = all.map(|entry| entry.unwrap().file_name());
        assert!(!names.any(|name| name.as_encoded_bytes().starts_with(b"dead")));
        assert!(call == "ioctl" || served.live() == before);
    }
}
