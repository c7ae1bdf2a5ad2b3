//! What `sprat check` finds in containers that were damaged on purpose.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;
mod stage;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use machine::{CONTAINER, Machine, Ran};
use sprat_testkit::{needs, requires};
use stage::plain::PlainVolume;

/// Where the payload of the containers that sprat makes begins.
const PAYLOAD_BYTES: u64 = 16 << 20;

/// Two snapshots of `src`, with a file of some blocks.
fn with_two_snapshots() -> Machine {
    let machine = Machine::new();
    machine.init(&[CONTAINER, "--size", "256M"]);
    machine.write("src/a", "alpha\n");
    machine.write("src/folder/victim", vec![b'v'; 100_000]);
    machine.write("src/folder/other", vec![b'o'; 50_000]);
    for _ in 0..2 {
        assert_eq!(machine.backup(&[]).code, 0);
        std::thread::sleep(std::time::Duration::from_millis(1100));
    }
    machine
}

/// Asks debugfs for the first block of something in the volume, decrypted offline.
fn first_block(machine: &Machine, request: &str) -> u64 {
    let image = machine.path("plain");
    let key = machine.path("config/keys/x.key");
    let plain = PlainVolume::export(&machine.path(CONTAINER), &key, &image);
    let asked = Command::new("debugfs")
        .args(["-R", request])
        .arg(&image)
        .output()
        .unwrap();
    drop(plain);
    let answer = String::from_utf8_lossy(&asked.stdout).into_owned();
    let block = answer.split_whitespace().find_map(|word| word.parse().ok());
    block.unwrap_or_else(|| panic!("{request}: {answer}"))
}

/// Flips some bytes of a block, as a disk does that forgets.
fn flip(container: &Path, block: u64) {
    let file = File::options()
        .read(true)
        .write(true)
        .open(container)
        .unwrap();
    let at = PAYLOAD_BYTES + block * 4096 + 512;
    let mut bytes = [0; 16];
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes.iter_mut().for_each(|byte| *byte ^= 0x55);
    file.write_all_at(&bytes, at).unwrap();
}

fn snapshots(machine: &Machine) -> Vec<String> {
    let listed = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    let all = listed["snapshots"].as_array().unwrap().iter();
    all.map(|entry| entry["folder"].as_str().unwrap().to_owned())
        .collect()
}

fn check(machine: &Machine, more: &[&str]) -> Ran {
    let mut all = vec!["check", CONTAINER, "--json"];
    all.extend(more);
    machine.sprat(&all)
}

fn first_name(list: &serde_json::Value) -> String {
    list["names"][0].as_str().unwrap_or_default().to_owned()
}

/// The name of a file of `src` within a snapshot.
fn inside(machine: &Machine, name: &str) -> String {
    format!("{}/{name}", machine.path("src").display())
}

#[test]
fn a_whole_container_checks_clean_and_is_not_written_to() {
    requires!(stage::missing());
    let machine = with_two_snapshots();
    let before = fs::metadata(machine.path(CONTAINER))
        .unwrap()
        .modified()
        .unwrap();
    let quick = check(&machine, &[]);
    assert_eq!(quick.code, 0, "{}", quick.whole());
    assert_eq!(quick.json()["file_system"]["clean"], true);
    let read = check(&machine, &["--read-data"]);
    assert_eq!(read.code, 0, "{}", read.whole());
    let files = &read.json()["files"];
    // Each file once, however many snapshots link it: a, other, victim, two records.
    assert_eq!(
        (&files["files_read"], &files["finished"]),
        (&5.into(), &true.into())
    );
    assert_eq!(files["files_known"], 0);
    let again = check(&machine, &["--read-data"]).json();
    assert_eq!(again["files"]["files_known"], 5);
    let source = check(&machine, &["--against-source", "home"]);
    assert_eq!(source.code, 0, "{}", source.whole());
    assert_eq!(source.json()["files"]["same"], 3);
    let after = fs::metadata(machine.path(CONTAINER))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(before, after);
    let shown = machine.sprat(&["check", CONTAINER]);
    assert!(
        shown.stdout.contains("file system: clean"),
        "{}",
        shown.whole()
    );
    assert_eq!(
        machine
            .sprat(&["check", CONTAINER, "--against-source", "nojob"])
            .code,
        1
    );
    machine.nothing_is_left();
}

#[test]
fn a_flipped_block_of_a_file_is_found_and_named_in_each_snapshot() {
    requires!(stage::missing(), needs::program("debugfs"));
    let machine = with_two_snapshots();
    let names = snapshots(&machine);
    assert_eq!(check(&machine, &["--read-data"]).code, 0);
    let victim = inside(&machine, "folder/victim");
    let block = first_block(&machine, &format!("blocks \"/home/{}{victim}\"", names[0]));
    flip(&machine.path(CONTAINER), block);

    // The disk gives it back without a word, and no structure of ext4 is concerned.
    assert_eq!(check(&machine, &[]).code, 0);
    let read = check(&machine, &["--read-data"]);
    assert_eq!(read.code, 13, "{}", read.whole());
    let files = read.json()["files"].clone();
    assert_eq!(files["damaged"]["count"], 1);
    assert!(
        first_name(&files["damaged"]).contains("folder/victim"),
        "{files}"
    );
    let expected: Vec<String> = names
        .iter()
        .map(|name| format!("home/{name}[DIR]/src/folder/victim"))
        .collect();
    assert_eq!(files["affected"]["names"], serde_json::json!(expected));

    // A file that was changed since is told from one that was damaged.
    machine.write("src/folder/other", vec![b'n'; 50_000]);
    fs::remove_file(machine.path("src/a")).unwrap();
    let source = check(&machine, &["--against-source", "home"]);
    assert_eq!(source.code, 13, "{}", source.whole());
    let files = source.json()["files"].clone();
    assert_eq!(files["damaged"]["count"], 1);
    assert!(
        first_name(&files["damaged"]).contains("folder/victim"),
        "{files}"
    );
    assert!(
        first_name(&files["changed"]).ends_with("folder/other"),
        "{files}"
    );
    assert!(first_name(&files["gone"]).ends_with("/a"), "{files}");
    let shown = machine.sprat(&["check", CONTAINER, "--read-data"]);
    assert!(shown.stdout.contains("What to do"), "{}", shown.whole());
    machine.nothing_is_left();
}

#[test]
fn a_folder_that_can_not_be_read_is_named() {
    requires!(stage::missing(), needs::program("debugfs"));
    let machine = with_two_snapshots();
    let name = snapshots(&machine)[0].clone();
    let folder = inside(&machine, "folder");
    let block = first_block(&machine, &format!("blocks \"/home/{name}{folder}\""));
    flip(&machine.path(CONTAINER), block);
    let read = check(&machine, &["--read-data"]);
    assert_eq!(read.code, 13, "{}", read.whole());
    let said = read.json();
    assert_eq!(said["file_system"]["clean"], false);
    let unreadable = first_name(&said["files"]["unreadable"]);
    assert!(
        unreadable.starts_with(&format!("home/{name}[DIR]/src/folder: ")),
        "{unreadable}"
    );
    machine.nothing_is_left();
}

#[test]
fn a_damaged_header_copy_and_a_cut_file_are_told() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    let file = File::options()
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    file.write_all_at(&[0; 64], 16384 + 4096 + 10).unwrap();
    let damaged = check(&machine, &[]);
    assert_eq!(damaged.code, 13, "{}", damaged.whole());
    let copies = damaged.json()["header_copies_damaged"].clone();
    assert!(
        copies[0].as_str().unwrap().starts_with("second"),
        "{copies}"
    );
    file.set_len(100 << 20).unwrap();
    let cut = check(&machine, &[]).failed_with(13);
    assert!(cut.contains("cut short"), "{cut}");
}

#[test]
fn a_check_that_ran_out_of_time_goes_on_at_the_next() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    let none = check(&machine, &["--read-data", "--max-duration", "0"]).json();
    assert_eq!(none["files"]["finished"], false);
    assert_eq!(none["files"]["files_read"], 0);
    let all = check(&machine, &["--read-data"]).json();
    assert_eq!(all["files"]["finished"], true);
    let kept = fs::read_dir(machine.path("state/checks")).unwrap().count();
    assert_eq!(kept, 2, "checksums, and the last result");
}
