//! Containers that are damaged on purpose, and the reports of `sprat check`, for its tests.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each test file uses a part of it, and a test may panic"
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Where the payload of the containers that sprat makes begins.
pub const PAYLOAD_BYTES: u64 = 16 << 20;

/// Two snapshots of `src`, with a file of some blocks.
pub fn with_two_snapshots() -> TestMachine {
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "256M"]);
    machine.write_old("src/a", "alpha\n");
    machine.write_old("src/folder/victim", vec![b'v'; 100_000]);
    machine.write_old("src/folder/other", vec![b'o'; 50_000]);
    for _ in 0..2 {
        // A snapshot's name is a whole second: a change within that second can't be detected.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        machine.backup(&[]).succeeded();
    }
    machine
}

/// Asks debugfs about the volume, decrypted offline.
pub fn debugfs(machine: &TestMachine, request: &str) -> String {
    let image = machine.path("plain");
    let key = machine.path("config/keys/x.key");
    let plain = PlainVolume::export(&machine.path(CONTAINER), &key, &image);
    let asked = Command::new("debugfs")
        .args(["-R", request])
        .arg(&image)
        .output()
        .unwrap();
    drop(plain);
    String::from_utf8_lossy(&asked.stdout).into_owned()
}

/// Asks debugfs for the first block of something in the volume, decrypted offline.
pub fn first_block(machine: &TestMachine, request: &str) -> u64 {
    let answer = debugfs(machine, request);
    let block = answer.split_whitespace().find_map(|word| word.parse().ok());
    block.unwrap_or_else(|| panic!("{request}: {answer}"))
}

/// Flips some bytes of a block, as a disk does that forgets.
pub fn flip(container: &Path, block: u64) {
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

pub fn snapshots(machine: &TestMachine) -> Vec<String> {
    let listed = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    let all = listed["snapshots"].as_array().unwrap().iter();
    all.map(|entry| entry["folder"].as_str().unwrap().to_owned())
        .collect()
}

pub fn check(machine: &TestMachine, more: &[&str]) -> Ran {
    let mut all = vec!["check", CONTAINER, "--json"];
    all.extend(more);
    machine.sprat(&all)
}

pub fn first_name(list: &serde_json::Value) -> String {
    list["names"][0].as_str().unwrap_or_default().to_owned()
}

/// The name of a file of `src` within a snapshot.
pub fn inside(machine: &TestMachine, name: &str) -> String {
    format!("{}/{name}", machine.path("src").display())
}

/// What this machine keeps of its checks of the one container.
pub fn kept(machine: &TestMachine) -> serde_json::Value {
    let files = std::fs::read_dir(machine.path("state/checks")).unwrap();
    let mut files = files.map(|entry| entry.unwrap().path());
    // Beside it: the files that a check named, which the next backup reads from the source.
    let json = files.find(|path| {
        let name = path.to_string_lossy();
        name.ends_with(".json") && !name.ends_with(".suspects.json")
    });
    serde_json::from_slice(&std::fs::read(json.unwrap()).unwrap()).unwrap()
}
