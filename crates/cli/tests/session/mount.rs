//! A volume that stays mounted in the background: read-only, read-write, ended in every way.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bench::{Bench, Seen, assert_exit, fill, missing, never, ssh_missing};
use rustix::process::Signal;
use sprat::{Exit, Failure};
use sprat_session as session;
use sprat_session::{Access, ClosedReport, Notice, Session};
use sprat_testkit::{needs, requires};

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
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let ours = bench.path("mnt").display().to_string();
    let line = mounts.lines().find(|line| line.contains(&ours)).unwrap();
    assert!(line.contains("nosuid,nodev"), "{line}");
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
fn after_a_mount_for_writing_that_was_killed_nobody_is_accused() {
    requires!(missing());
    let bench = with_a_snapshot(Bench::local());
    mount(&bench, Access::ReadWrite).unwrap();
    // A person may remove any snapshot there.
    let job = bench.path("mnt/docs");
    fs::remove_dir_all(fs::canonicalize(job.join("latest")).unwrap()).unwrap();
    fs::remove_file(job.join("latest")).unwrap();
    rustix::fs::syncfs(fs::File::open(&job).unwrap()).unwrap();
    assert_eq!(bench.kill(&["volume-process"]), 1);
    bench.assert_nothing_remains();
    let mut seen = Seen::default();
    let options = bench.options(Access::ReadWrite);
    let session = Session::open(options, &bench.secret, &mut seen, &never()).unwrap();
    session.close(&mut seen, &never()).unwrap();
    let elsewhere = |notice: &Notice| matches!(notice, Notice::WrittenElsewhere);
    assert!(!seen.notices.iter().any(elsewhere), "{:?}", seen.notices);
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

#[test]
fn read_only_mount_can_not_be_made_writable() {
    requires!(missing());
    let bench = with_a_snapshot(Bench::local());
    mount(&bench, Access::ReadOnly).unwrap();
    let mounted = bench.path("mnt");
    let remounted = Command::new("mount")
        .args(["-o", "remount,rw"])
        .arg(&mounted)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    let kept = fs::write(mounted.join("x"), "lost")
        .and_then(|()| fs::File::open(mounted.join("x"))?.sync_all());
    assert!(kept.is_err(), "a write succeeded; remount: {remounted}");
    // What is there can still be read.
    assert!(mounted.join("docs/latest").exists());
    unmount(&bench).unwrap();
    bench.assert_nothing_remains();
}

#[test]
fn every_umount_of_one_mount_gets_its_one_result() {
    requires!(missing());
    let bench = with_a_snapshot(Bench::local());
    mount(&bench, Access::ReadWrite).unwrap();
    fs::write(bench.path("mnt/x"), vec![7; 3 << 20]).unwrap();
    // All have found the mount before the first one ends it.
    let user = fs::File::open(bench.path("mnt/x")).unwrap();
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..3).map(|_| scope.spawn(|| unmount(&bench))).collect();
        std::thread::sleep(Duration::from_millis(250));
        drop(user);
        for one in all {
            let closed = one.join().unwrap().unwrap();
            assert!(
                closed.durable && closed.volume.written_bytes > 3 << 20,
                "{closed:?}"
            );
        }
    });
    bench.assert_nothing_remains();
    let none = assert_exit(unmount(&bench), Exit::Failed);
    assert!(none.what.starts_with("no container is mounted"), "{none}");
}

#[test]
fn umount_finds_its_mount_under_another_path_and_without_its_record() {
    requires!(missing());
    let bench = with_a_snapshot(Bench::local());
    let folder = bench.path("folder");
    let end = |dir: &std::path::Path| {
        session::unmount(&bench.path("run"), dir, &mut Seen::default(), &never())
    };
    let begin = |dir: &std::path::Path| {
        fs::create_dir_all(dir).unwrap();
        let options = bench.options(Access::ReadWrite);
        session::mount(options, &bench.secret, dir, &mut Seen::default(), &never()).unwrap();
        fs::write(dir.join("x"), "x").unwrap();
    };
    begin(&folder.join("mnt"));
    fs::rename(&folder, bench.path("renamed")).unwrap();
    assert!(end(&bench.path("renamed/mnt")).unwrap().durable);
    bench.assert_nothing_remains();

    begin(&bench.path("mnt"));
    fs::remove_dir_all(bench.path("run/mounts")).unwrap();
    assert!(end(&bench.path("mnt")).unwrap().durable);
    bench.assert_nothing_remains();
}

#[test]
fn umount_names_the_other_place_where_the_volume_is_mounted() {
    requires!(missing());
    let bench = with_a_snapshot(Bench::local());
    mount(&bench, Access::ReadWrite).unwrap();
    let other = bench.path("other");
    fs::create_dir(&other).unwrap();
    let run = |program: &str, arguments: &[&std::path::Path]| {
        let ended = Command::new(program).args(arguments).status().unwrap();
        assert!(ended.success());
    };
    run("mount", &["--bind".as_ref(), &bench.path("mnt"), &other]);
    for _ in 0..2 {
        let begun = Instant::now();
        let failure = assert_exit(unmount(&bench), Exit::Failed);
        assert!(begun.elapsed() < Duration::from_secs(30));
        let place = format!("mounted at {}", other.display());
        assert!(failure.what.contains(&place), "{failure}");
    }
    fs::write(other.join("x"), "kept").unwrap();
    run("umount", &[&other]);
    assert!(unmount(&bench).unwrap().durable);
    bench.assert_nothing_remains();
}

#[test]
fn umount_of_a_busy_mount_ends_while_a_network_mount_does_not_answer() {
    requires!(
        missing()
            .or_else(|| needs::program("sshfs"))
            .or_else(needs::sftp_server_missing)
    );
    let bench = with_a_snapshot(Bench::local());
    mount(&bench, Access::ReadOnly).unwrap();
    let net = bench.path("net");
    fs::create_dir(&net).unwrap();
    fs::write(bench.path("out/f"), "hello").unwrap();
    let login = bench.path("login");
    let server = needs::sftp_server().unwrap();
    fs::write(&login, format!("#!/bin/sh\nexec {}\n", server.display())).unwrap();
    fs::set_permissions(&login, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut sshfs = Command::new("sshfs")
        .arg(format!("host:{}", bench.path("out").display()))
        .arg(&net)
        .arg("-f")
        .args(["-o", &format!("ssh_command={}", login.display())])
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    while !net.join("f").exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    // Open in a process of its own: a child of this one would wait for the server at its exec.
    let mut foreign = Command::new("sleep")
        .arg("60")
        .stdin(fs::File::open(net.join("f")).unwrap())
        .spawn()
        .unwrap();
    let busy = fs::File::open(bench.path("mnt")).unwrap();
    let pid = rustix::process::Pid::from_child(&sshfs);
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    // Attributes are remembered for a second.
    std::thread::sleep(Duration::from_millis(1500));
    let mounted = bench.path("mnt").display().to_string();
    let mut umount = bench.command(&["umount", &mounted]);
    let mut umount = umount.stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let mut ended = None;
    while ended.is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
        ended = umount.try_wait().unwrap();
    }
    rustix::process::kill_process(pid, Signal::CONT).unwrap();
    foreign.kill().unwrap();
    foreign.wait().unwrap();
    let output = umount.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let _ = Command::new("umount").arg(&net).status();
    let _ = sshfs.wait();
    assert_eq!(ended.and_then(|ended| ended.code()), Some(1), "{said}");
    assert!(
        said.contains(&format!("({})", std::process::id())),
        "{said}"
    );
    drop(busy);
    unmount(&bench).unwrap();
    bench.assert_nothing_remains();
}
