//! The server's disk becomes full while a backup runs, by another file or by itself: it stops in order before.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::{TestMachine, noise};
use sprat_testkit::running::Running;
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

const LIMIT: Duration = Duration::from_secs(120);

/// Sends a signal to every rsync below `session`, and returns their pids.
fn signal_rsync(session: u32, signal: Signal) -> Vec<u32> {
    let mut parents = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let about = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((head, tail)) = about.rsplit_once(") ") else {
            continue;
        };
        let (pid, name) = head.split_once(" (").unwrap();
        let parent: u32 = tail.split(' ').nth(1).unwrap().parse().unwrap();
        parents.push((pid.parse::<u32>().unwrap(), parent, name.to_owned()));
    }
    let parent_of = |of: u32| parents.iter().find(|(pid, ..)| *pid == of).map(|one| one.1);
    let below = |pid: u32| {
        std::iter::successors(Some(pid), |pid| parent_of(*pid)).any(|pid| pid == session)
    };
    let ours = parents
        .iter()
        .filter(|(pid, _, name)| name == "rsync" && below(*pid));
    ours.map(|(pid, ..)| *pid)
        .filter(|pid| {
            let pid = Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            kill_process(pid, signal).is_ok()
        })
        .collect()
}

/// The names in `store`, without the leases, which stay after their release.
fn without_leases(store: &Path) -> Vec<String> {
    let entries = fs::read_dir(store).unwrap().flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.retain(|name| !name.contains(".lock."));
    names
}

#[test]
fn backup_stops_before_another_file_fills_the_servers_disk() {
    requires!(openssh::missing(), needs::root());
    let machine = TestMachine::new();
    let store = machine.path("store");
    let _disk = Tmpfs::mount(&store, 400);
    machine.write("src/a", "alpha\n");
    let remote = RemoteMachine::with(machine, &OpenSshOptions::default());
    let machine = &remote.machine;
    remote.init();
    remote.backup().succeeded();
    machine.write("src/large", vec![7; 48 << 20]);
    let options = [
        "--reserve-bytes",
        "8388608",
        "--room-interval",
        "0.1",
        "--json",
    ];
    let arguments = ["backup", "TARGET", "--name", "home", "src"];
    let mut command = remote.command(&[&options[..], &arguments[..]].concat());
    let mut running = Running::start(&mut command);
    let began = Instant::now();
    while signal_rsync(running.child.id(), Signal::STOP).is_empty() {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(2));
    }
    // Another program uses all but 6 MiB. What rsync had written before it was stopped is on its way:
    // the other program gives back what that needs, until nothing moves any more.
    let send_what_is_written = || {
        for pid in signal_rsync(running.child.id(), Signal::STOP) {
            // The receiver works in the new snapshot. No other file system is waited for.
            if let Ok(folder) = fs::File::open(format!("/proc/{pid}/cwd")) {
                rustix::fs::syncfs(&folder).unwrap();
            }
        }
    };
    send_what_is_written();
    let mut others = fs::File::create(store.join("somebody-else's")).unwrap();
    let free_bytes = || {
        let free = rustix::fs::statvfs(&store).unwrap();
        free.f_bavail * free.f_frsize
    };
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < Duration::from_secs(2) {
        let (free, used) = (free_bytes(), others.metadata().unwrap().len());
        if free > 7 << 20 {
            others.write_all(&[7; 1 << 20]).unwrap();
        } else if free < 6 << 20 {
            others.set_len(used.saturating_sub(1 << 20)).unwrap();
            others.seek(SeekFrom::End(0)).unwrap();
        } else {
            send_what_is_written();
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        quiet_since = Instant::now();
    }
    drop(others);
    running.until(LIMIT, "that it stops", |seen| seen.phase == "stopping_full");
    signal_rsync(running.child.id(), Signal::CONT);
    let code = running.end(LIMIT);
    let said = running.said.join("\n");
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("stopped safely: the server has only "),
        "{said}"
    );
    assert!(said.contains("server_space_low"), "{said}");
    assert_eq!(
        without_leases(&store).len(),
        2,
        "the container, and the other file"
    );

    // What was there is there, what was begun is kept, and there is a way on.
    let listed = remote.sprat(&["snapshots", "TARGET", "--json"]).json();
    let kinds: Vec<_> = listed["snapshots"].as_array().unwrap().iter().collect();
    assert!(kinds.iter().any(|one| one["kind"] == "good"), "{listed}");
    fs::remove_file(machine.path("src/large")).unwrap();
    let ran = remote.sprat(&[&options[..], &arguments[..]].concat());
    assert_eq!(
        ran.code,
        0,
        "with so little left it ends where the disk ends: {}",
        ran.whole()
    );
    machine.nothing_is_left();
}

#[test]
fn backup_stops_before_a_local_disk_is_full() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let store = machine.path("store");
    // There is no reserve: only the order of the end makes a prune possible.
    let _disk = Tmpfs::mount(&store, 250);
    machine.init(&[sprat_testkit::machine::CONTAINER, "--size", "2G"]);
    machine.write("src/a", "alpha\n");
    let reserve = ["--reserve-bytes", "67108864"];
    machine.backup(&reserve).succeeded();
    for file in 0..8 {
        machine.write(&format!("src/large {file}"), noise(64 << 20, file));
    }
    let ran = machine.backup(&reserve);
    let said = ran.failed_with(1);
    assert!(
        said.contains("stopped safely: the server has only "),
        "{said}"
    );
    let names = without_leases(&store);
    assert_eq!(names.len(), 1, "no reserve: {names:?}");
    let free = rustix::fs::statvfs(&store).unwrap();
    assert!(free.f_bavail > 0, "it was stopped before");

    let prune = [
        "prune",
        sprat_testkit::machine::CONTAINER,
        "--job",
        "home",
        "--keep-last",
        "1",
    ];
    machine.ok(&[&prune[..], &["--drop-interrupted"]].concat());
    machine.ok(&["trim", sprat_testkit::machine::CONTAINER]);
    for file in 0..8 {
        fs::remove_file(machine.path(format!("src/large {file}"))).unwrap();
    }
    machine.backup(&reserve).succeeded();
    machine.nothing_is_left();
}

#[test]
fn doctor_reports_the_reserve_and_the_containers_size() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let look = |reserve: &str| {
        let ran = machine.sprat(&[
            "doctor",
            sprat_testkit::machine::CONTAINER,
            "--reserve-bytes",
            reserve,
        ]);
        ran.stdout
    };
    let said = look("1048576");
    assert!(
        said.contains("missing: on a full disk even `sprat prune` may not work"),
        "{said}"
    );
    assert!(said.contains("the container takes"), "{said}");
    machine.backup(&["--reserve-bytes", "1048576"]).succeeded();
    let said = look("1048576");
    assert!(
        said.contains("1.0 MiB are reserved, so that `sprat prune` works on a full disk"),
        "{said}"
    );
    let said = look("2097152");
    assert!(
        said.contains("only 1.0 MiB of 2.0 MiB are reserved"),
        "{said}"
    );
}

#[test]
fn volume_that_becomes_full_is_reported_before() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[sprat_testkit::machine::CONTAINER, "--size", "64M"]);
    machine.write("src/a", "alpha\n");
    let ran = machine.backup(&[]).succeeded();
    assert!(!ran.stderr.contains("nearly full"), "{}", ran.whole());
    let mounted = machine.path("mnt");
    fs::create_dir(&mounted).unwrap();
    let at = mounted.to_str().unwrap();
    machine.ok(&["mount", sprat_testkit::machine::CONTAINER, at, "--rw"]);
    let free = rustix::fs::statvfs(&mounted).unwrap();
    let bytes = free.f_bavail * free.f_frsize - free.f_blocks * free.f_frsize / 30;
    fs::write(
        mounted.join("filling"),
        vec![7; usize::try_from(bytes).unwrap()],
    )
    .unwrap();
    machine.ok(&["umount", at]);
    let ran = machine.backup(&["--quiet"]).succeeded();
    assert!(
        ran.stderr.contains("the volume is nearly full: "),
        "{}",
        ran.whole()
    );
}
