//! The same for a btrfs. It has checksums: a damaged or older block is found without a cache, and is never
//! restored as content. Only its super blocks say how new it is.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use sprat_testkit::client_and_server::FileSystem;
use sprat_testkit::machine::strikes::{copy_sparse, dice};
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::program::system;
use sprat_testkit::{needs, requires};
use sprat_testkit_session::plain_volume::PlainVolume;

use super::{HEADER_BYTES, rounds};
use crate::damage::snapshots;

const BLOCK: usize = 4096;
/// In blocks: the super block, and its copy at 64 MiB (`BTRFS_SUPER_INFO_OFFSET`, `BTRFS_SUPER_MIRROR_SHIFT`).
const SUPER_BLOCKS: [u64; 2] = [16, 16 << 10];
const NODE_BYTES: u64 = 16 << 10;

fn at(block: u64) -> u64 {
    HEADER_BYTES + block * BLOCK as u64
}

/// Two snapshots, and `yesterday`, the container with the first one alone.
fn with_a_yesterday() -> TestMachine {
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "256M", "--file-system", "btrfs"]);
    for number in 0..40 {
        machine.write(&format!("src/{number}"), noise(20_000, number));
        machine.write(&format!("src/small/{number}"), noise(200, number));
    }
    machine.backup(&[]).succeeded();
    copy_sparse(&machine.path(CONTAINER), &machine.path("yesterday"));
    copy_sparse(&machine.path("src"), &machine.path("src-yesterday"));
    for number in 0..10 {
        machine.write(&format!("src/{number}"), noise(20_000, 100 + number));
        machine.write(&format!("src/small/{number}"), noise(200, 100 + number));
    }
    std::thread::sleep(std::time::Duration::from_millis(1100));
    machine.backup(&[]).succeeded();
    machine
}

/// The blocks that have a node or content, both copies of each.
fn used_blocks(machine: &TestMachine) -> Vec<u64> {
    let key = machine.path("config/keys/x.key");
    let image = machine.path("plain");
    let _plain = PlainVolume::export(&machine.path(CONTAINER), &key, &image);
    let tree = |name: &str| {
        let words = ["inspect-internal", "dump-tree", "-t", name].map(AsRef::as_ref);
        system("btrfs", &[&words[..], &[image.as_os_str()]].concat())
    };
    // Where each chunk begins, its length, and where its copies are on the disk.
    let mut chunks: BTreeMap<u64, (u64, Vec<u64>)> = BTreeMap::new();
    let mut chunk = 0;
    for line in tree("chunk").lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["item", _, "key", _, "CHUNK_ITEM", start, ..] => {
                chunk = start.trim_end_matches(')').parse().unwrap();
            }
            ["length", length, "owner", ..] => {
                chunks.insert(chunk, (length.parse().unwrap(), Vec::new()));
            }
            ["stripe", _, "devid", _, "offset", offset] => {
                let (_, copies) = chunks.get_mut(&chunk).unwrap();
                copies.push(offset.parse().unwrap());
            }
            _ => {}
        }
    }
    let mut used = Vec::new();
    for line in tree("extent").lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (start, length): (u64, u64) = match words[..] {
            ["item", _, "key", start, "EXTENT_ITEM", length, ..] => (
                start.trim_start_matches('(').parse().unwrap(),
                length.trim_end_matches(')').parse().unwrap(),
            ),
            ["item", _, "key", start, "METADATA_ITEM", ..] => {
                (start.trim_start_matches('(').parse().unwrap(), NODE_BYTES)
            }
            _ => continue,
        };
        let (first, (chunk_bytes, copies)) = chunks.range(..=start).next_back().unwrap();
        assert!(start - first + length <= *chunk_bytes, "{line}");
        for copy in copies {
            let from = (copy + start - first) / BLOCK as u64;
            used.extend(from..from + length / BLOCK as u64);
        }
    }
    used
}

/// Restores both snapshots, and compares each file that comes back.
fn nothing_is_silently_wrong(machine: &TestMachine, names: &[String], what: &str) {
    for (name, was) in names.iter().zip(["src-yesterday", "src"]) {
        let to = tempfile::tempdir_in(machine.folder()).unwrap();
        let to_text = to.path().to_str().unwrap();
        let restored = machine.sprat(&["restore", CONTAINER, name, "--to", to_text]);
        let is_damage = matches!(restored.code, 13);
        assert!(
            restored.code == 0 || is_damage,
            "{what}: {}",
            restored.whole()
        );
        let source = machine.path("src");
        let back = to.path().join(source.strip_prefix("/").unwrap());
        for number in 0..40 {
            for file in [format!("{number}"), format!("small/{number}")] {
                let should = fs::read(machine.path(was).join(&file)).unwrap();
                match fs::read(back.join(&file)) {
                    Ok(content) => assert!(content == should, "{what}: {name}/{file} is wrong"),
                    Err(error) => assert!(is_damage, "{what}: {name}/{file}: {error}"),
                }
            }
        }
    }
}

#[test]
fn damaged_or_older_block_of_a_btrfs_is_found_and_never_restored() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    let machine = with_a_yesterday();
    let names = snapshots(&machine);
    let names: Vec<String> = names.iter().map(|name| format!("home/{name}")).collect();
    assert_eq!(names.len(), 2);
    let used = used_blocks(&machine);
    let read = |file: &File, block: u64| {
        let mut content = vec![0; BLOCK];
        file.read_exact_at(&mut content, at(block)).unwrap();
        content
    };
    let container = File::options()
        .read(true)
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    let yesterday = File::open(machine.path("yesterday")).unwrap();
    let older: Vec<u64> = used
        .iter()
        .copied()
        .filter(|block| read(&container, *block) != read(&yesterday, *block))
        .collect();
    assert!(used.len() > 300 && older.len() > 50, "{}", older.len());
    copy_sparse(&machine.path("state"), &machine.path("state-kept"));
    let mut dice = dice();
    let mut pick = |among: &[u64]| among[usize::try_from(dice.below(among.len() as u64)).unwrap()];
    for round in 0..rounds(6, 100) {
        let block = if round % 2 == 0 {
            pick(&used)
        } else {
            pick(&older)
        };
        let whole = read(&container, block);
        let (how, damaged) = if round % 2 == 0 {
            // One bit of what is encrypted: 16 bytes of what is decrypted.
            let mut damaged = whole.clone();
            damaged[77 + usize::try_from(round).unwrap() * 16] ^= 1;
            ("garbled", damaged)
        } else {
            ("older", read(&yesterday, block))
        };
        container.write_all_at(&damaged, at(block)).unwrap();
        let what = format!("round {round}: block {block} is {how}");
        let checked = machine.sprat(&["check", CONTAINER, "--read-data"]);
        assert_eq!(checked.code, 13, "{what}: {}", checked.whole());
        nothing_is_silently_wrong(&machine, &names, &what);
        assert!(read(&container, block) == damaged, "{what}: it was written");
        container.write_all_at(&whole, at(block)).unwrap();
        // What a check found is remembered.
        fs::remove_dir_all(machine.path("state")).unwrap();
        copy_sparse(&machine.path("state-kept"), &machine.path("state"));
    }
    machine.ok(&["check", CONTAINER, "--read-data"]);
    machine.nothing_is_left();
}

#[test]
fn older_super_blocks_of_a_btrfs_are_refused() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    let machine = with_a_yesterday();
    let container = File::options()
        .read(true)
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    let yesterday = File::open(machine.path("yesterday")).unwrap();
    // The first one alone, and then the copy, too.
    for block in SUPER_BLOCKS {
        let mut content = vec![0; BLOCK];
        yesterday.read_exact_at(&mut content, at(block)).unwrap();
        container.write_all_at(&content, at(block)).unwrap();
        let before = fs::read(machine.path(CONTAINER)).unwrap();
        for command in [
            &["snapshots", CONTAINER][..],
            &["check", CONTAINER],
            &["restore", CONTAINER, "home", "--to", "back"],
            &["backup", CONTAINER, "--name", "home", "src"],
            &["prune", CONTAINER, "--job", "home", "--keep-last", "1"],
        ] {
            let text = machine.sprat(command).failed_with(13);
            assert!(text.contains("--accept-older-state"), "{text}");
        }
        assert!(fs::read(machine.path(CONTAINER)).unwrap() == before);
    }
    machine.nothing_is_left();
}
