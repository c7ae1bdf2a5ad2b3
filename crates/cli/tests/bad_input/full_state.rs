//! A state folder whose disk is full: copies are made, notices are sent, and the run names what was not kept.

use std::fs;

use sprat_testkit::machine::{CONTAINER, Ran, TestMachine, noise};
use sprat_testkit::tmpfs::{LoopDisk, Tmpfs, fill};
use sprat_testkit::{needs, requires};

fn run(machine: &TestMachine) -> Ran {
    machine.sprat(&["run", "--now"])
}

/// A machine whose state folder is on a small disk, with a copy of before it is full.
fn full_after_a_copy(machine: &TestMachine) {
    let at = machine.folder().display();
    machine.write("src/a", "alpha\n");
    machine.init(&[CONTAINER, "--size", "128M"]);
    machine.write(
        "config/sprat.toml",
        format!(
            "[container.nas]\ntarget = \"{}\"\nkey_file = \"{}\"\ncheck_every = \"never\"\n\
             [job.home]\ncontainer = \"nas\"\nsources = \"{at}/src\"\n\
             [notify]\ncommand = \"sh -c 'cat >> {at}/notices'\"\n",
            machine.path(CONTAINER).display(),
            machine.path("config/keys/x.key").display(),
        ),
    );
    run(machine).succeeded();
    fill(&machine.path("state"));
}

fn copies_go_on(machine: &TestMachine) {
    let snapshots = || {
        let listed = machine.ok(&["snapshots", "nas", "--json"]).json();
        let all = listed["snapshots"].as_array().unwrap().iter();
        all.filter(|one| one["kind"] == "good").count()
    };
    // So many that what is kept of them no longer fits into the blocks that there are.
    let mut codes = Vec::new();
    for round in 0..4 {
        machine.write("src/noise", noise(8 << 20, round));
        let ran = run(machine);
        codes.push(ran.code);
        let unkept = ran.stderr.contains("No space left on device");
        assert_eq!(
            (ran.code, unkept),
            (i32::from(unkept), unkept),
            "{}",
            ran.whole()
        );
    }
    assert!(codes.contains(&1), "{codes:?}");
    assert_eq!(snapshots(), 5);
    // A session that dies on the full disk is recovered on the full disk.
    machine.write("src/noise", noise(64 << 20, 9));
    let mut command = machine.command();
    let mut killed = command.args(["run", "--now"]).spawn().unwrap();
    let file = machine.path(CONTAINER);
    let written = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&file).unwrap());
    let before = written();
    while written() < before + (8 << 11) {
        assert!(killed.try_wait().unwrap().is_none(), "it ended");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    machine.kill_all();
    let _ = killed.kill();
    killed.wait().unwrap();
    machine.write("src/noise", noise(4 << 20, 10));
    let ran = run(machine);
    assert!([0, 1].contains(&ran.code), "{}", ran.whole());
    assert_eq!(snapshots(), 6, "{}", ran.whole());
    machine.ok(&["check", "nas", "--read-data"]);
    // A notice of a problem comes, though nothing keeps that it came.
    fs::rename(machine.path("src"), machine.path("away")).unwrap();
    let ran = run(machine);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    let notices = fs::read_to_string(machine.path("notices")).unwrap();
    assert!(
        notices.contains(r#""kind":"failure","state":"opened""#),
        "{notices}"
    );
}

#[test]
fn full_ext4_below_the_state_folder_stops_no_copy_and_no_notice() {
    requires!(needs::root(), needs::devices(), needs::program("mkfs.ext4"));
    let machine = TestMachine::new();
    fs::create_dir_all(machine.path("state")).unwrap();
    let disk = LoopDisk::mount(&machine.path("disk"), &machine.path("state"), 48);
    full_after_a_copy(&machine);
    copies_go_on(&machine);
    drop(disk);
    machine.nothing_is_left();
}

#[test]
fn full_tmpfs_below_the_state_folder_stops_no_copy_and_no_notice() {
    requires!(needs::root(), needs::devices());
    let machine = TestMachine::new();
    fs::create_dir_all(machine.path("state")).unwrap();
    let disk = Tmpfs::mount(&machine.path("state"), 32);
    full_after_a_copy(&machine);
    copies_go_on(&machine);
    drop(disk);
    machine.nothing_is_left();
}
