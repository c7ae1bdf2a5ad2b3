//! A volume that stays mounted in the background: read-only, read-write, ended in every way.

#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

mod session_bench;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use session_bench::{Bench, Seen, assert_exit, fill, missing, never, ssh_missing};
use sprat::session::{self, Access, ClosedReport};
use sprat::{Exit, Failure};
use sprat_testkit::requires;

fn mount(bench: &Bench, access: Access) -> Result<(), Failure> {
    let mut options = bench.options(access);
    options.quiet_time = Duration::from_millis(200);
    session::mount(
        options,
        &bench.secret,
        &bench.path("mnt"),
        &mut Seen::default(),
        &never(),
    )
    .map(drop)
}

fn unmount(bench: &Bench) -> Result<ClosedReport, Failure> {
    session::unmount(
        &bench.path("run"),
        &bench.path("mnt"),
        &mut Seen::default(),
        &never(),
    )
}

fn with_a_snapshot(bench: Bench) -> Bench {
    bench.create();
    fill(&bench.path("source"), 5, 10_000, 21);
    bench.backup().unwrap();
    bench
}

#[test]
fn a_snapshot_is_read_through_a_mount_and_nothing_is_written() {
    requires!(ssh_missing());
    let bench = with_a_snapshot(Bench::ssh());
    let before = fs::read(bench.container()).unwrap();
    mount(&bench, Access::ReadOnly).unwrap();
    let seen = bench
        .path("mnt/docs/latest")
        .join(bench.path("source").strip_prefix("/").unwrap());
    assert_eq!(
        fs::read(seen.join("d1/f1")).unwrap(),
        fs::read(bench.path("source/d1/f1")).unwrap()
    );
    assert!(fs::write(bench.path("mnt/x"), "x").is_err());
    assert_exit(mount(&bench, Access::ReadOnly), Exit::Usage);
    let closed = unmount(&bench).unwrap();
    assert_eq!(closed.volume.written_bytes, 0);
    bench.assert_nothing_remains();
    assert!(fs::read(bench.container()).unwrap() == before);
    assert_exit(unmount(&bench), Exit::Failed);
}

#[test]
fn what_is_written_through_a_mount_is_there_after_it_ended() {
    requires!(ssh_missing());
    let bench = with_a_snapshot(Bench::ssh());
    mount(&bench, Access::ReadWrite).unwrap();
    fs::write(bench.path("mnt/by-hand"), "kept").unwrap();
    assert_exit(bench.open(Access::ReadWrite), Exit::Locked);
    let closed = unmount(&bench).unwrap();
    assert!(closed.durable);
    bench.assert_nothing_remains();
    assert_eq!(bench.server_files(), ["x.luks"]);
    // Ended by the stock command: the volume process closes in order all the same.
    mount(&bench, Access::ReadWrite).unwrap();
    assert_eq!(fs::read(bench.path("mnt/by-hand")).unwrap(), b"kept");
    fs::write(bench.path("mnt/more"), "kept too").unwrap();
    let plain = Command::new("umount")
        .arg(bench.path("mnt"))
        .status()
        .unwrap();
    assert!(plain.success());
    bench.assert_nothing_remains();
    assert_eq!(bench.server_files(), ["x.luks"]);
    mount(&bench, Access::ReadOnly).unwrap();
    assert_eq!(fs::read(bench.path("mnt/more")).unwrap(), b"kept too");
    unmount(&bench).unwrap();
    bench.assert_nothing_remains();
}

#[test]
fn a_mount_whose_process_is_killed_goes_away() {
    requires!(missing());
    let bench = with_a_snapshot(Bench::local());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        mount(&bench, access).unwrap();
        if access == Access::ReadWrite {
            fs::write(bench.path("mnt/half"), vec![1; 1 << 20]).unwrap();
        }
        assert_eq!(bench.kill(&["volume-process"]), 1);
        bench.assert_nothing_remains();
        assert_exit(unmount(&bench), Exit::Failed);
        bench.assert_clean();
    }
    // Without its keeper it serves on, and ends in order.
    mount(&bench, Access::ReadWrite).unwrap();
    assert_eq!(bench.kill(&["mount-keeper"]), 1);
    fs::write(bench.path("mnt/kept"), "kept").unwrap();
    unmount(&bench).unwrap();
    bench.assert_nothing_remains();
    bench.backup().unwrap();
    bench.restore_and_compare();
}

#[test]
fn doctor_ends_while_a_mounted_volume_does_not_answer() {
    requires!(missing());
    let bench = with_a_snapshot(Bench::local());
    mount(&bench, Access::ReadOnly).unwrap();
    // As one whose line is down.
    assert_eq!(bench.signal(&["volume-process"], Signal::STOP), 1);
    let mut doctor = bench.command(&["doctor", "--json"]);
    let mut doctor = doctor.stdout(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    let mut ended = false;
    while !ended && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
        ended = doctor.try_wait().unwrap().is_some();
    }
    bench.signal(&["volume-process"], Signal::CONT);
    let said = doctor.wait_with_output().unwrap().stdout;
    assert!(ended, "it waited for the volume");
    let said: serde_json::Value = serde_json::from_slice(&said).unwrap();
    let dir = bench.path("mnt").display().to_string();
    let found = said["findings"].as_array().unwrap().iter();
    let found = found
        .filter(|found| found["what"] == "mounted volumes")
        .find(|found| found["detail"].as_str().unwrap().contains(&dir));
    assert_eq!(found.unwrap()["state"], "fine", "{said}");
    unmount(&bench).unwrap();
    bench.assert_nothing_remains();
}
