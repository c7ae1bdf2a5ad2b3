//! A block of a file is changed on the server: the disk returns it without an error, and every structure of the file
//! system is right. The first check of all data finds it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use sprat_testkit::client_and_server::FileSystem;
use sprat_testkit::dice::{self, Dice};
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::{needs, requires};

use sprat_testkit_session::plain_volume::PlainVolume;

use crate::damage::{PAYLOAD_BYTES, check, snapshots};

/// Each has its own content, in several blocks, and one of them many.
const FILES: u64 = 6;
const BLOCK_BYTES: usize = 4096;

fn content(file: u64) -> Vec<u8> {
    noise(40_000 + 300_000 * usize::from(file == 0), 100 + file)
}

/// Two snapshots that share all files, made with a cache that stays on this machine.
fn backed_up(file_system: &str) -> TestMachine {
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "256M", "--file-system", file_system]);
    for file in 0..FILES {
        machine.write_old(&format!("src/folder/{file}"), content(file));
    }
    for _ in 0..2 {
        std::thread::sleep(std::time::Duration::from_millis(1100));
        machine.backup(&[]).succeeded();
    }
    machine
}

/// Changes one random place after the other, and puts it right again.
fn damage_is_found(file_system: &str) {
    let rounds = dice::number("SPRAT_TORTURE_ROUNDS").unwrap_or(5);
    let machine = backed_up(file_system);
    let whole = check(&machine, &["--read-data"]).succeeded();
    let files = whole.json()["files"].clone();
    assert!(files["files_listed"].as_u64().unwrap() >= FILES, "{files}");
    let names = snapshots(&machine);
    let image = machine.path("plain");
    let key = machine.path("config/keys/x.key");
    let plain = PlainVolume::export(&machine.path(CONTAINER), &key, &image);
    let volume = fs::read(&image).unwrap();
    drop(plain);
    let mut dice = Dice::new(14);
    let container = File::options()
        .read(true)
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    let modified = container.metadata().unwrap().modified().unwrap();
    for round in 0..rounds {
        let file = dice.below(FILES);
        let content = content(file);
        let in_file = usize::try_from(dice.below(content.len() as u64 - 4096)).unwrap();
        let block = in_file / BLOCK_BYTES * BLOCK_BYTES;
        let at = PAYLOAD_BYTES + place_of(&volume, &content[block..]) + (in_file - block) as u64;
        let mut bytes = [0; 1];
        container.read_exact_at(&mut bytes, at).unwrap();
        let flip = |bytes: [u8; 1]| {
            container.write_all_at(&bytes, at).unwrap();
            container.set_modified(modified).unwrap();
        };
        flip([bytes[0] ^ (1 << dice.below(8))]);
        // This machine has made no check before.
        fs::remove_dir_all(machine.path("state/checks")).unwrap();
        let ran = check(&machine, &["--read-data"]);
        assert_eq!(ran.code, 13, "round {round}: {}", ran.whole());
        let files = ran.json()["files"].clone();
        let expected: Vec<String> = names
            .iter()
            .map(|name| format!("home/{name}[DIR]/src/folder/{file}"))
            .collect();
        assert_eq!(files["affected"]["names"], serde_json::json!(expected));
        flip(bytes);
    }
    fs::remove_dir_all(machine.path("state/checks")).unwrap();
    check(&machine, &["--read-data"]).succeeded();
    machine.nothing_is_left();
}

/// Where the block is that begins as this does.
fn place_of(volume: &[u8], content: &[u8]) -> u64 {
    let mut blocks = volume.chunks(BLOCK_BYTES);
    let block = blocks.position(|block| block.starts_with(&content[..64]));
    (block.unwrap() * BLOCK_BYTES) as u64
}

#[test]
fn flipped_bit_on_ext4_is_found_by_the_first_check_of_all_data() {
    requires!(needs::root());
    damage_is_found("ext4");
}

#[test]
fn flipped_bit_on_btrfs_is_found_by_the_first_check_of_all_data() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    damage_is_found("btrfs");
}
