//! A volume that stays mounted in the background: read-only, read-write, ended in every way.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use sprat::{Exit, Failure};
use sprat_session as session;
use sprat_session::{Access, ClosedReport, Notice, Phase, Session};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::{agent_server, needs, requires};
use sprat_testkit_session::session_harness::{
    Observed, SessionHarness, assert_exit, fill, missing, never, ssh_missing,
};

fn mount(harness: &SessionHarness, access: Access) -> Result<(), Failure> {
    let mut options = harness.options(access);
    options.quiet_time = Duration::from_millis(200);
    session::mount(
        &options,
        &harness.secret,
        &harness.path("mnt"),
        &mut Observed::default(),
        &never(),
    )
    .map(drop)
}

fn unmount(harness: &SessionHarness) -> Result<ClosedReport, Failure> {
    session::unmount(
        &harness.path("run"),
        &harness.path("mnt"),
        &mut Observed::default(),
        &never(),
    )
}

fn with_a_snapshot(harness: SessionHarness) -> SessionHarness {
    harness.create();
    fill(&harness.path("source"), 5, 10_000, 21);
    harness.backup().unwrap();
    harness
}

#[test]
fn a_snapshot_is_read_through_a_mount_and_nothing_is_written() {
    requires!(ssh_missing());
    let harness = with_a_snapshot(SessionHarness::ssh());
    let before = fs::read(harness.container()).unwrap();
    mount(&harness, Access::ReadOnly).unwrap();
    let seen = harness
        .path("mnt/docs/latest")
        .join(harness.path("source").strip_prefix("/").unwrap());
    assert_eq!(
        fs::read(seen.join("d1/f1")).unwrap(),
        fs::read(harness.path("source/d1/f1")).unwrap()
    );
    assert!(fs::write(harness.path("mnt/x"), "x").is_err());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let ours = harness.path("mnt").display().to_string();
    let line = mounts.lines().find(|line| line.contains(&ours)).unwrap();
    assert!(line.contains("nosuid,nodev"), "{line}");
    assert_exit(mount(&harness, Access::ReadOnly), Exit::Usage);
    // As `ps` shows them.
    let pids = harness.processes().into_iter().map(|(pid, _)| pid);
    let title = |pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    let titles: Vec<String> = pids.map(title).collect();
    for wanted in ["sprat: volume\n", "sprat: mount\n"] {
        assert!(titles.iter().any(|title| title == wanted), "{titles:?}");
    }
    let closed = unmount(&harness).unwrap();
    assert_eq!(closed.volume.written_bytes, 0);
    harness.assert_nothing_remains();
    assert!(fs::read(harness.container()).unwrap() == before);
    assert_exit(unmount(&harness), Exit::Failed);
}

#[test]
fn what_is_written_through_a_mount_is_there_after_it_ended() {
    requires!(ssh_missing());
    let harness = with_a_snapshot(SessionHarness::ssh());
    mount(&harness, Access::ReadWrite).unwrap();
    fs::write(harness.path("mnt/by-hand"), "kept").unwrap();
    assert_exit(harness.open(Access::ReadWrite), Exit::Locked);
    let closed = unmount(&harness).unwrap();
    assert!(closed.durable);
    harness.assert_nothing_remains();
    assert_eq!(harness.server_files(), ["x.luks"]);
    // Ended by the stock command: the volume process closes in order all the same.
    mount(&harness, Access::ReadWrite).unwrap();
    assert_eq!(fs::read(harness.path("mnt/by-hand")).unwrap(), b"kept");
    fs::write(harness.path("mnt/more"), "kept too").unwrap();
    let plain = Command::new("umount")
        .arg(harness.path("mnt"))
        .status()
        .unwrap();
    assert!(plain.success());
    harness.assert_nothing_remains();
    assert_eq!(harness.server_files(), ["x.luks"]);
    mount(&harness, Access::ReadOnly).unwrap();
    assert_eq!(fs::read(harness.path("mnt/more")).unwrap(), b"kept too");
    unmount(&harness).unwrap();
    harness.assert_nothing_remains();
}

#[test]
fn a_mount_whose_process_is_killed_goes_away() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        mount(&harness, access).unwrap();
        if access == Access::ReadWrite {
            fs::write(harness.path("mnt/half"), vec![1; 1 << 20]).unwrap();
        }
        assert_eq!(harness.kill(&["volume-process"]), 1);
        harness.assert_nothing_remains();
        assert_exit(unmount(&harness), Exit::Failed);
        harness.assert_clean();
    }
    // Without its keeper it serves on, and ends in order.
    mount(&harness, Access::ReadWrite).unwrap();
    assert_eq!(harness.kill(&["mount-keeper"]), 1);
    fs::write(harness.path("mnt/kept"), "kept").unwrap();
    unmount(&harness).unwrap();
    harness.assert_nothing_remains();
    harness.backup().unwrap();
    harness.restore_and_compare();
}

#[test]
fn killed_writable_mount_is_not_blamed_on_another_machine() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    mount(&harness, Access::ReadWrite).unwrap();
    // A person may remove any snapshot there.
    let job = harness.path("mnt/docs");
    fs::remove_dir_all(fs::canonicalize(job.join("latest")).unwrap()).unwrap();
    fs::remove_file(job.join("latest")).unwrap();
    rustix::fs::syncfs(fs::File::open(&job).unwrap()).unwrap();
    assert_eq!(harness.kill(&["volume-process"]), 1);
    harness.assert_nothing_remains();
    let mut seen = Observed::default();
    let options = harness.options(Access::ReadWrite);
    let session = Session::open(options, &harness.secret, &mut seen, &never()).unwrap();
    session.close(&mut seen, &never()).unwrap();
    let elsewhere = |notice: &Notice| matches!(notice, Notice::WrittenElsewhere);
    assert!(!seen.notices.iter().any(elsewhere), "{:?}", seen.notices);
    harness.backup().unwrap();
    harness.restore_and_compare();
}

#[test]
fn doctor_ends_while_a_mounted_volume_does_not_answer() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    mount(&harness, Access::ReadOnly).unwrap();
    // Like a process whose connection is down.
    assert_eq!(harness.signal(&["volume-process"], Signal::STOP), 1);
    let mut doctor = harness.command(&["doctor", "--json"]);
    let mut doctor = doctor.stdout(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + LIMIT;
    let mut ended = false;
    while !ended && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
        ended = doctor.try_wait().unwrap().is_some();
    }
    harness.signal(&["volume-process"], Signal::CONT);
    let said = doctor.wait_with_output().unwrap().stdout;
    assert!(ended, "it waited for the volume");
    let said: serde_json::Value = serde_json::from_slice(&said).unwrap();
    let dir = harness.path("mnt").display().to_string();
    let found = said["findings"].as_array().unwrap().iter();
    let found = found
        .filter(|found| found["what"] == "mounted volumes")
        .find(|found| found["detail"].as_str().unwrap().contains(&dir));
    assert_eq!(found.unwrap()["state"], "fine", "{said}");
    unmount(&harness).unwrap();
    harness.assert_nothing_remains();
}

#[test]
fn read_only_mount_can_not_be_made_writable() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    mount(&harness, Access::ReadOnly).unwrap();
    let mounted = harness.path("mnt");
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
    unmount(&harness).unwrap();
    harness.assert_nothing_remains();
}

#[test]
fn every_umount_of_one_mount_gets_its_one_result() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    mount(&harness, Access::ReadWrite).unwrap();
    fs::write(harness.path("mnt/x"), vec![7; 3 << 20]).unwrap();
    // All have found the mount before the first one ends it.
    let user = fs::File::open(harness.path("mnt/x")).unwrap();
    let begun = std::sync::Arc::new(std::sync::Barrier::new(4));
    let one = || {
        let begun = std::sync::Arc::clone(&begun);
        let on_phase = move |phase| {
            if phase == Phase::Unmounting {
                begun.wait();
            }
        };
        let mut seen = Observed {
            on_phase: Some(Box::new(on_phase)),
            ..Observed::default()
        };
        let (run, dir) = (harness.path("run"), harness.path("mnt"));
        session::unmount(&run, &dir, &mut seen, &never())
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..3).map(|_| scope.spawn(one)).collect();
        begun.wait();
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
    harness.assert_nothing_remains();
    let none = assert_exit(unmount(&harness), Exit::Failed);
    assert!(none.what.starts_with("no container is mounted"), "{none}");
}

#[test]
fn umount_finds_its_mount_under_another_path_and_without_its_record() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    let folder = harness.path("folder");
    let end = |dir: &std::path::Path| {
        session::unmount(
            &harness.path("run"),
            dir,
            &mut Observed::default(),
            &never(),
        )
    };
    let begin = |dir: &std::path::Path| {
        fs::create_dir_all(dir).unwrap();
        let options = harness.options(Access::ReadWrite);
        session::mount(
            &options,
            &harness.secret,
            dir,
            &mut Observed::default(),
            &never(),
        )
        .unwrap();
        fs::write(dir.join("x"), "x").unwrap();
    };
    begin(&folder.join("mnt"));
    fs::rename(&folder, harness.path("renamed")).unwrap();
    assert!(end(&harness.path("renamed/mnt")).unwrap().durable);
    harness.assert_nothing_remains();

    begin(&harness.path("mnt"));
    fs::remove_dir_all(harness.path("run/mounts")).unwrap();
    assert!(end(&harness.path("mnt")).unwrap().durable);
    harness.assert_nothing_remains();
}

#[test]
fn umount_names_the_other_place_where_the_volume_is_mounted() {
    requires!(missing());
    let harness = with_a_snapshot(SessionHarness::local());
    mount(&harness, Access::ReadWrite).unwrap();
    let other = harness.path("other");
    fs::create_dir(&other).unwrap();
    let run = |program: &str, arguments: &[&std::path::Path]| {
        let ended = Command::new(program).args(arguments).status().unwrap();
        assert!(ended.success());
    };
    run("mount", &["--bind".as_ref(), &harness.path("mnt"), &other]);
    for _ in 0..2 {
        let begun = Instant::now();
        let failure = assert_exit(unmount(&harness), Exit::Failed);
        assert!(begun.elapsed() < LIMIT);
        let place = format!("mounted at {}", other.display());
        assert!(failure.what.contains(&place), "{failure}");
    }
    fs::write(other.join("x"), "kept").unwrap();
    run("umount", &[&other]);
    assert!(unmount(&harness).unwrap().durable);
    harness.assert_nothing_remains();
}

#[test]
fn umount_of_a_busy_mount_ends_while_a_network_mount_does_not_answer() {
    requires!(
        missing()
            .or_else(|| needs::program("sshfs"))
            .or_else(needs::sftp_server_missing)
    );
    let harness = with_a_snapshot(SessionHarness::local());
    mount(&harness, Access::ReadOnly).unwrap();
    let net = harness.path("net");
    fs::create_dir(&net).unwrap();
    fs::write(harness.path("out/f"), "hello").unwrap();
    let login = harness.path("login");
    let server = agent_server::sftp_server(&harness.path("out")).unwrap();
    fs::write(&login, format!("#!/bin/sh\nexec {}\n", server.display())).unwrap();
    fs::set_permissions(&login, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut sshfs = Command::new("sshfs")
        .arg(format!("host:{}", harness.path("out").display()))
        .arg(&net)
        .arg("-f")
        .args(["-o", &format!("ssh_command={}", login.display())])
        .spawn()
        .unwrap();
    let until = Instant::now() + LIMIT;
    while !net.join("f").exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    // Open in a process of its own: a child of this one would wait for the server at its exec.
    let mut foreign = Command::new("sleep")
        .arg("600")
        .stdin(fs::File::open(net.join("f")).unwrap())
        .spawn()
        .unwrap();
    let busy = fs::File::open(harness.path("mnt")).unwrap();
    let pid = rustix::process::Pid::from_child(&sshfs);
    rustix::process::kill_process(pid, Signal::STOP).unwrap();
    // Attributes are remembered for a second.
    std::thread::sleep(Duration::from_millis(1500));
    let mounted = harness.path("mnt").display().to_string();
    let mut umount = harness.command(&["umount", &mounted]);
    let mut umount = umount.stderr(Stdio::piped()).spawn().unwrap();
    let until = Instant::now() + LIMIT;
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
    unmount(&harness).unwrap();
    harness.assert_nothing_remains();
}
