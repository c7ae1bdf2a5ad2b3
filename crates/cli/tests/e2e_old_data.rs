//! A server that answers with what it held yesterday: what is noticed, and what is not
//! (docs/threat-model.md).

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and tells its seed"
)]

mod machine;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use machine::strikes::{copy_sparse, dice};
use machine::{CONTAINER, Machine};
use sprat_testkit::{needs, requires};

const HEADER_BYTES: u64 = 16 << 20;

/// A container of two snapshots, `yesterday` with the first alone, and `src-yesterday`, its source.
fn with_a_yesterday() -> Machine {
    let machine = Machine::new();
    machine.init(&[CONTAINER, "--size", "64M"]);
    for (name, byte) in [("kept", 1), ("changed", 2)] {
        machine.write(&format!("src/{name}"), vec![byte; 300_000]);
    }
    assert_eq!(machine.backup(&[]).code, 0);
    copy_sparse(&machine.path(CONTAINER), &machine.path("yesterday"));
    copy_sparse(&machine.path("src"), &machine.path("src-yesterday"));
    machine.write("src/changed", vec![3; 300_000]);
    machine.write("src/new", vec![4; 300_000]);
    assert_eq!(machine.backup(&[]).code, 0);
    machine
}

/// The server shows yesterday's container, with the length and times of today's.
fn roll_back(machine: &Machine) {
    let container = machine.path(CONTAINER);
    let shown = File::open(&container).unwrap().metadata().unwrap();
    fs::remove_file(&container).unwrap();
    copy_sparse(&machine.path("yesterday"), &container);
    let file = File::options().write(true).open(&container).unwrap();
    file.set_modified(shown.modified().unwrap()).unwrap();
}

#[test]
fn yesterdays_container_is_whole_and_never_mixed_with_todays_cache() {
    requires!(needs::root());
    let machine = with_a_yesterday();
    // The cache is full of today's blocks.
    machine.restores_whole(&[]);
    roll_back(&machine);
    // Not noticed: sprat keeps no count of snapshots or blocks that the server can't forge.
    let listed = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 1);
    fs::rename(machine.path("src"), machine.path("src-today")).unwrap();
    copy_sparse(&machine.path("src-yesterday"), &machine.path("src"));
    machine.restores_whole(&[]);
    let checked = machine.sprat(&["check", CONTAINER]);
    assert_eq!(checked.code, 0, "{}", checked.whole());
    // And life goes on from there.
    fs::remove_dir_all(machine.path("src")).unwrap();
    fs::rename(machine.path("src-today"), machine.path("src")).unwrap();
    assert_eq!(machine.backup(&[]).code, 0);
    machine.restores_whole(&[]);
}

#[test]
fn a_header_of_yesterday_is_refused_before_a_key_is_used() {
    requires!(needs::root());
    let machine = with_a_yesterday();
    machine.write("pass", "correct horse battery");
    let add = ["key", "add", CONTAINER, "--new-passphrase-file", "pass"];
    let ran = machine.sprat(&[&["--cheap-kdf-for-tests"][..], &add].concat());
    assert_eq!(ran.code, 0, "{}", ran.whole());
    roll_back(&machine);
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    for arguments in [&["snapshots", CONTAINER][..], &["check", CONTAINER]] {
        machine.sprat(arguments).failed_with(13);
    }
    machine.backup(&[]).failed_with(13);
    assert!(fs::read(machine.path(CONTAINER)).unwrap() == before);
}

/// Some blocks of yesterday among today's: XTS can't tell. What sprat does promise is to end, with
/// a code that is documented, and to write nothing where it only reads.
#[test]
fn some_blocks_of_yesterday_harm_nothing_but_what_is_in_them() {
    requires!(needs::root());
    let machine = with_a_yesterday();
    let mut dice = dice();
    copy_sparse(&machine.path(CONTAINER), &machine.path("today"));
    let [yesterday, today] =
        ["yesterday", "today"].map(|name| fs::read(machine.path(name)).unwrap());
    let header = usize::try_from(HEADER_BYTES).unwrap();
    let differing: Vec<usize> = (header..today.len())
        .step_by(4096)
        .filter(|at| today[*at..*at + 4096] != yesterday[*at..*at + 4096])
        .collect();
    for round in 0..4 {
        let file = File::options().write(true).open(machine.path(CONTAINER));
        let file = file.unwrap();
        let mut old = 0;
        for at in &differing {
            let shown = if dice.percent([10, 30, 50, 90][round]) {
                old += 1;
                &yesterday
            } else {
                &today
            };
            let block = &shown[*at..*at + 4096];
            file.write_all_at(block, *at as u64).unwrap();
        }
        let before = fs::read(machine.path(CONTAINER)).unwrap();
        let to = tempfile::tempdir_in(machine.folder()).unwrap();
        let to = to.path().to_str().unwrap();
        let restore = ["restore", CONTAINER, "home", "--to", to];
        for arguments in [&["check", CONTAINER][..], &restore] {
            let ran = machine.sprat(arguments);
            println!(
                "{old} of {} blocks old: {arguments:?}: {}",
                differing.len(),
                ran.code
            );
            assert!(matches!(ran.code, 0 | 1 | 3 | 13), "{}", ran.whole());
            assert!(!ran.stderr.contains("panicked"), "{}", ran.whole());
        }
        machine.nothing_is_left();
        assert!(before == fs::read(machine.path(CONTAINER)).unwrap());
    }
    fs::write(machine.path(CONTAINER), &today).unwrap();
    machine.restores_whole(&[]);
}
