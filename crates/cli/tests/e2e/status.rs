//! `sprat status`: its report on a container on a server, and on a missing one.

use std::fs::File;
use std::os::unix::fs::FileExt;

use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::{CHEAP, CONTAINER, TestMachine};
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::{needs, requires};

#[test]
fn status_reports_space_jobs_and_lock_without_a_key() {
    requires!(openssh::missing(), needs::root(), needs::program("perl"));
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.init();
    remote.backup().succeeded();
    // A run that fails leaves the snapshot before it known.
    std::fs::remove_dir_all(remote.machine.path("src")).unwrap();
    assert_eq!(remote.backup().code, 1);
    // There is no key in the expected place.
    let key = remote.machine.path("elsewhere.key");
    std::fs::rename(remote.machine.path("config/keys/x.key"), &key).unwrap();

    // A monitor hears of the job that failed.
    let ran = remote.sprat(&["status", "TARGET", "--json"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    let said = ran.json();
    let found = &said["containers"][0];
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let (server, volume) = (&found["server"], &found["volume"]);
    assert!(number(&server["available_bytes"]) > 0, "{said}");
    assert!(number(&server["available_bytes"]) <= number(&server["total_bytes"]));
    assert_eq!(number(&server["container_bytes"]), 1 << 30);
    let file = std::fs::metadata(remote.machine.path("store/x.luks")).unwrap();
    let allocated = std::os::unix::fs::MetadataExt::blocks(&file) * 512;
    let printed = number(&server["allocated_bytes"]);
    assert!(
        printed.abs_diff(allocated) < 1 << 20,
        "{printed}, {allocated}"
    );
    assert!(server["locked"].is_null(), "{said}");
    assert!(number(&volume["available_bytes"]) < number(&volume["total_bytes"]));
    assert!(number(&volume["free_inodes"]) < number(&volume["inodes"]));
    let job = &found["jobs"]["home"];
    assert_eq!(job["last_snapshot"]["complete"], true, "{said}");
    assert_eq!(job["last_run"]["exit"], "failed", "{said}");

    std::fs::copy(&key, remote.machine.path("key")).unwrap();
    remote.ok(&["check", "TARGET", "--key-file", "key"]);
    let text = remote.sprat(&["status", "TARGET"]);
    assert!(text.stdout.contains("quick: no damage"), "{}", text.whole());
    assert!(text.stdout.contains("last run FAILED"), "{}", text.whole());
    let doctor = remote.sprat(&["doctor", "TARGET", "--connections", "3"]);
    let printed = "1; up to 3 when there is much data to send or read";
    assert!(doctor.stdout.contains(printed), "{}", doctor.whole());
    let offline = remote.sprat(&["status", "TARGET", "--offline"]);
    assert!(offline.stdout.contains("not asked"), "{}", offline.whole());
    assert_eq!(offline.code, 1);
}

#[test]
fn status_reports_missing_containers_and_shows_the_rest() {
    let machine = TestMachine::with_container();
    let ran = machine.sprat(&["status", "store/nothing.luks", CONTAINER]);
    let said = ran.failed_with(10);
    assert!(said.contains("there is no container"), "{said}");
    assert!(ran.stdout.contains("may grow to 1.0 GiB"), "{said}");
    let away = ["--ssh-command", "false", "status", "ssh://nobody/x.luks"];
    machine.sprat(&away).failed_with(14);
    let none = machine.sprat(&["status"]).failed_with(2);
    assert!(none.contains("the config has no container"), "{none}");
}

#[test]
fn a_mount_point_without_its_disk_gets_no_second_container() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let [disk, away] = ["store", "away"].map(|name| machine.path(name));
    std::fs::rename(&disk, &away).unwrap();
    std::fs::create_dir(&disk).unwrap();
    let said = machine.backup(&[]).failed_with(10);
    assert!(said.contains("last saw a container"), "{said}");
    assert!(!said.contains("sprat init"), "{said}");
    let said = machine.sprat(&["init", CHEAP, CONTAINER]).failed_with(1);
    assert!(said.contains("last saw a container"), "{said}");
    // Fails if anything is in it.
    std::fs::remove_dir(&disk).unwrap();
    std::fs::rename(&away, &disk).unwrap();
    let said = machine.sprat(&["init", CHEAP, CONTAINER]).failed_with(1);
    assert!(said.contains("exists already"), "{said}");
    machine.backup(&[]).succeeded();
    machine.nothing_is_left();
}

#[test]
fn copy_has_its_own_status() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    machine.ok(&["copy", CONTAINER, "store/c.luks"]);
    let of = |target: &str| {
        let ran = machine.sprat(&["status", target, "--offline", "--json"]);
        assert!([0, 13].contains(&ran.code), "{}", ran.whole());
        ran.json()["containers"][0].clone()
    };
    let check = |target: &str| {
        let with = ["--key-file", "config/keys/x.key"];
        machine
            .sprat(&[&["check", target], &with[..]].concat())
            .code
    };
    let copy = of("store/c.luks");
    assert!(
        copy["uuid"].is_string() && copy["volume"].is_null(),
        "{copy}"
    );
    assert_eq!(copy["jobs"], serde_json::json!({}), "{copy}");
    assert!(of(CONTAINER)["jobs"]["home"].is_object());
    let file = File::options()
        .write(true)
        .open(machine.path("store/c.luks"));
    // In the second copy of the header.
    file.unwrap().write_all_at(&[0; 64], 20_490).unwrap();
    assert_eq!((check("store/c.luks"), check(CONTAINER)), (13, 0));
    let said = |target| of(target)["checks"]["quick"]["result"]["exit"].clone();
    assert_eq!(said("store/c.luks"), "damaged");
    assert_eq!(said(CONTAINER), "done");
    let damaged = ["status", "--offline", CONTAINER, "store/c.luks"];
    machine.sprat(&damaged).failed_with(13);
    // Another copy under that name is not the one that was damaged.
    std::fs::remove_file(machine.path("store/c.luks")).unwrap();
    machine.ok(&["copy", CONTAINER, "store/c.luks"]);
    assert_eq!(of("store/c.luks")["checks"], serde_json::json!({}));
    machine.nothing_is_left();
}

#[test]
fn unusable_identity_file_hides_no_other_container() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let with = ["store/y.luks", "--size", "64M"];
    machine.init(&with);
    let pins = std::fs::read_dir(machine.path("state/containers")).unwrap();
    for entry in pins {
        let path = entry.unwrap().path();
        if std::fs::read_to_string(&path).unwrap().contains("y.luks") {
            std::fs::write(&path, "{").unwrap();
        }
    }
    let status = ["status", "store/y.luks", CONTAINER];
    let ran = machine.sprat(&status);
    let said = ran.failed_with(1);
    assert!(said.contains("the saved identity of the container can't be read"));
    assert!(ran.stdout.contains("x: [DIR]/store/x.luks"), "{said}");
    let json = machine.sprat(&[&status[..], &["--json"]].concat()).json();
    let containers = &json["containers"];
    assert_eq!(containers[0]["failure"]["exit"], "failed", "{json}");
    assert!(containers[0]["server"].is_object(), "{json}");
    assert!(containers[1]["uuid"].is_string(), "{json}");
    assert!(containers[1]["failure"].is_null(), "{json}");
    // Of several codes the worst counts.
    let ran = machine.sprat(&[&status[..], &["store/nothing.luks"]].concat());
    ran.failed_with(10);
    let two = ["status", "store/nothing.luks", "--ssh-command", "false"];
    machine.sprat(&two).failed_with(10);
    let two = [&two[..], &["ssh://nobody/x.luks", CONTAINER]].concat();
    machine.sprat(&two).failed_with(10);
}

#[test]
fn status_and_unlock_report_what_is_no_container() {
    requires!(needs::root());
    let machine = TestMachine::new();
    std::fs::create_dir(machine.path("store/folder.luks")).unwrap();
    machine.write("store/empty.luks", b"");
    machine.write("store/zeros.luks", vec![0; 1 << 20]);
    machine.write("store/text.luks", "no container\n");
    let fifo = machine.path("store/fifo.luks");
    let mode = rustix::fs::Mode::RUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    for name in [
        "folder",
        "empty",
        "zeros",
        "text",
        "fifo",
        "nowhere/missing",
    ] {
        let target = format!("store/{name}.luks");
        for command in ["status", "unlock"] {
            let said = machine.sprat(&[command, &target]).failed_with(10);
            assert!(!said.contains("Run the command again"), "{said}");
        }
    }
}

#[test]
fn runs_that_overlap_and_mistyped_names_leave_no_failure() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    std::fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt"]);
    // Another run has the container.
    machine.backup(&[]).failed_with(11);
    machine.ok(&["umount", "mnt"]);
    // A name that never had a snapshot.
    let mistyped = ["backup", CONTAINER, "--name", "hmoe", "nothing-there"];
    assert_ne!(machine.sprat(&mistyped).code, 0);
    let ran = machine.ok(&["status", CONTAINER]);
    assert!(
        !ran.stdout.contains("hmoe") && !ran.stdout.contains("FAILED"),
        "{}",
        ran.whole()
    );
}

#[test]
fn options_that_open_a_container_are_refused_by_a_status() {
    let machine = TestMachine::new();
    for option in [
        ["--key-file", "key"],
        ["--passphrase-file", "key"],
        ["--passphrase-command", "cat key"],
        ["--fingerprint", "0000-0000-0000-0000-0000"],
    ] {
        let all = [&["status", CONTAINER], &option[..]].concat();
        let said = machine.sprat(&all).failed_with(2);
        assert!(said.contains(option[0]), "{said}");
        assert!(said.contains("nothing was done"), "{said}");
    }
}
