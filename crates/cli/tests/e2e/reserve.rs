//! A server's disk filled to its last byte by another program: what stops, and what frees space.

use std::fs;

use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::tmpfs::{LoopDisk, Tmpfs, fill};
use sprat_testkit::{agent_server, needs, requires};

/// With a small reserve: the disk is small, too.
fn with_reserve<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [
        &["--reserve-bytes", "4194304", "--quiet-time", "1"],
        arguments,
    ]
    .concat()
}

#[test]
fn full_disk_stops_backup_and_prune_frees_space() {
    requires!(openssh::missing(), needs::root());
    let machine = TestMachine::new();
    let _disk = Tmpfs::mount(&machine.path("store"), 80);
    gets_out_of_a_full_disk(
        machine,
        &OpenSshOptions::default(),
        agent_server::is_wanted(),
    );
}

#[test]
fn full_ext4_disk_stops_backup_and_prune_frees_space() {
    requires!(
        openssh::missing(),
        needs::root(),
        needs::program("mkfs.ext4")
    );
    let machine = TestMachine::new();
    let _disk = LoopDisk::mount(&machine.path("disk"), &machine.path("store"), 100);
    gets_out_of_a_full_disk(
        machine,
        &OpenSshOptions::default(),
        agent_server::is_wanted(),
    );
}

/// The agent needs space, too: for old content.
#[test]
fn full_disk_behind_the_agent_stops_backup_and_prune_frees_space() {
    requires!(openssh::missing(), needs::root(), agent_server::missing());
    let machine = TestMachine::new();
    let _disk = Tmpfs::mount(&machine.path("store"), 80);
    let options = OpenSshOptions::agent(&machine.path("store"));
    gets_out_of_a_full_disk(machine, &options, true);
}

fn gets_out_of_a_full_disk(machine: TestMachine, options: &OpenSshOptions, is_agent: bool) {
    let store = machine.path("store");
    let free = || {
        let about = rustix::fs::statvfs(&store).unwrap();
        about.f_bavail * about.f_frsize
    };
    let remote = RemoteMachine::with(machine, options);
    let reserve = store.join("x.luks.reserve");
    let init = ["init", "TARGET", "--size", "1G", "--cheap-kdf-for-tests"];
    remote.ok(&with_reserve(&init));
    assert_eq!(fs::metadata(&reserve).unwrap().len(), 4 << 20);
    let backup = ["backup", "TARGET", "--name", "home", "src"];
    for round in 1..4 {
        remote.machine.write("src/large", noise(4 << 20, round));
        remote.ok(&with_reserve(&backup));
    }
    fill(&store);
    remote.machine.write("src/large", noise(4 << 20, 9));
    let ran = remote.sprat(&with_reserve(&backup));
    let whole = ran.failed_with(1);
    assert!(
        whole.contains("no space left") && whole.contains("sprat prune"),
        "{whole}"
    );
    assert!(
        reserve.exists(),
        "a backup leaves the reserve to those that make room"
    );
    let snapshots = || {
        let ran = remote.ok(&with_reserve(&["snapshots", "TARGET", "--json"]));
        let said = ran.json();
        let kinds = said["snapshots"].as_array().unwrap().iter();
        kinds.filter(|one| one["kind"] == "good").count()
    };
    assert_eq!(snapshots(), 3);
    let prune = ["prune", "TARGET", "--job", "home", "--keep-last", "1"];
    // A reader does not use it, and neither does a run without a key.
    let mut dry_run = with_reserve(&prune);
    dry_run.push("--dry-run");
    remote.ok(&dry_run);
    remote.machine.write("wrong", noise(4096, 77));
    let mut wrong_key = with_reserve(&prune);
    wrong_key.extend(["--key-file", "wrong"]);
    let ran = remote.sprat(&wrong_key);
    assert_eq!(ran.code, 12, "{}", ran.whole());
    assert!(reserve.exists(), "{}", ran.whole());
    let ran = remote.ok(&with_reserve(&prune));
    assert!(ran.stderr.contains("the reserve"), "{}", ran.whole());
    assert!(!reserve.exists());
    assert_eq!(snapshots(), 1);
    // The file system may choose blocks that the server has never stored, so the released reserve must be enough.
    remote.machine.write("src/large", noise(1 << 20, 10));
    remote.ok(&with_reserve(&backup));
    assert_eq!(snapshots(), 2);
    assert!(!reserve.exists(), "there is no room for it yet");
    // The agent saves what a trim frees, so there it needs space.
    if !is_agent {
        let before = free();
        let ran = remote.ok(&with_reserve(&["trim", "TARGET", "--json"]));
        assert_eq!(ran.json()["trim"]["route"], "shell_punch");
        assert!(free() >= before + (4 << 20), "{before}, then {}", free());
    }
    fs::remove_file(store.join("somebody-else's")).unwrap();
    remote.ok(&with_reserve(&backup));
    assert_eq!(fs::metadata(&reserve).unwrap().len(), 4 << 20);
    if is_agent {
        let ran = remote.ok(&with_reserve(&["trim", "TARGET", "--json"]));
        assert_eq!(ran.json()["trim"]["route"], "agent_punch");
        agent_server::check(&store);
    }
    remote.machine.nothing_is_left();
}

#[test]
fn reserve_is_made_after_success_and_can_be_stopped() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let reserve = machine.path("store/x.luks.reserve");
    assert!(!reserve.exists());
    // Large enough to be under way for a moment.
    let size = 512 << 20;
    let free = rustix::fs::statvfs(machine.path("store")).unwrap();
    let needed = 5 * size;
    requires!(
        (free.f_bavail * free.f_frsize < needed)
            .then(|| format!("less than {needed} free bytes for test folders"))
    );
    let text = size.to_string();
    let backup = [
        "--reserve-bytes",
        &text,
        "backup",
        CONTAINER,
        "--name",
        "home",
        "src",
    ];
    let mut child = machine
        .command()
        .args(backup)
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let notes = std::io::BufReader::new(child.stderr.take().unwrap());
    let announced =
        std::io::BufRead::lines(notes).any(|line| line.unwrap().contains("the command is done"));
    assert!(announced);
    // Nothing is left to be lost: the lock is released, the snapshot whole, the result printed.
    assert!(!machine.path("store/x.luks.lock.1").exists());
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("home: snapshot"), "{said}");
    assert!(fs::metadata(&reserve).map_or(0, |about| about.len()) < size);
    machine.ok(&["status", CONTAINER]);
    // The next run makes it where it is missing.
    let _ = fs::remove_file(&reserve);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let again = [
        "--reserve-bytes",
        "4194304",
        "backup",
        CONTAINER,
        "--name",
        "home",
        "src",
    ];
    machine.ok(&again);
    assert_eq!(fs::metadata(&reserve).unwrap().len(), 4 << 20);
}
