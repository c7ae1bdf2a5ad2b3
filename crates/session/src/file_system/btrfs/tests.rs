//! Tests of the super block and of a real mkfs.btrfs.

use std::process::Command;

use sprat_attach::ChunkSpace;
use sprat_testkit::{needs, requires};

use super::*;
use crate::file_system::stamp::Age;

/// A super block with this generation. Its checksum matches.
pub(crate) fn super_block(generation: u64) -> Vec<u8> {
    let mut block = vec![0; STAMP_BLOCK_BYTES];
    for (at, number) in [
        (0x30, SUPER_BLOCK_AT),
        (0x48, generation),
        (0x70, 1 << 30),
        (0x78, 5 << 20),
        (0x88, 1),
        (0xb4, COMPAT_RO_MADE),
        (0xbc, INCOMPAT_MADE),
    ] {
        put(&mut block, at, &number.to_le_bytes());
    }
    put(&mut block, 0x40, MAGIC);
    put(&mut block, 0x90, &SECTOR_BYTES.to_le_bytes());
    put(&mut block, 0x94, &NODE_BYTES.to_le_bytes());
    put(&mut block, 0xc4, &CHECKSUM_XXHASH.to_le_bytes());
    seal(&mut block);
    block
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn seal(block: &mut [u8]) {
    let checksum = xxhash64(&block[CHECKSUM_BYTES..]);
    put(block, 0, &checksum.to_le_bytes());
}

/// The super block with other bytes at one place.
fn with(generation: u64, at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut block = super_block(generation);
    put(&mut block, at, bytes);
    seal(&mut block);
    block
}

fn state(block: &[u8]) -> FileSystemState {
    FileSystemState::read(block, 1 << 31).unwrap()
}

#[test]
fn age_follows_from_generation_digest_and_log() {
    let known = state(&super_block(7)).stamp;
    let age = |block: &[u8]| state(block).stamp.age(&known);
    assert_eq!(age(&super_block(7)), Age::Same);
    assert_eq!(age(&super_block(8)), Age::Newer);
    assert_eq!(age(&super_block(6)), Age::Older);
    // The same generation with other content: the server mixes states.
    assert_eq!(age(&with(7, 0x78, &1_u64.to_le_bytes())), Age::Older);
    // An fsync of a program that has mounted it by hand.
    assert_eq!(age(&with(7, 0x60, &1_u64.to_le_bytes())), Age::Newer);
    let cut = FileSystemState::read(&super_block(7), 1 << 30).unwrap();
    assert_eq!(cut.stamp.age(&known), Age::Older);
    assert_eq!(known.life_bytes(), None);
    assert_eq!(known.written(), "as generation 7");
}

#[test]
fn volume_with_full_metadata_has_no_room() {
    let mib = |mebibytes: u64| mebibytes << 20;
    let chunks = |total, used| ChunkSpace {
        total_bytes: mib(total),
        used_bytes: mib(used),
    };
    let mut space = BtrfsSpace {
        data: chunks(400, 100),
        metadata: chunks(100, 20),
        unallocated_bytes: mib(600),
    };
    let room = room_of(&space);
    assert_eq!(room.available_bytes, mib(900));
    assert!(!room.is_low() && room.files_left().is_none());
    let metadata = room.metadata.unwrap();
    assert_eq!(
        [metadata.total_bytes, metadata.available_bytes],
        [mib(400), mib(380)]
    );
    assert_eq!(room.free_text(), "900 MiB and 380 MiB for metadata");
    // 50 MiB are wanted, and 20 are free: 30 more take 60.
    space.metadata.used_bytes = mib(80);
    assert_eq!(room_of(&space).available_bytes, mib(840));
    space.unallocated_bytes = mib(10);
    space.metadata.used_bytes = mib(99);
    assert!(room_of(&space).is_full() && room_of(&space).is_low());
    assert!(!room_of(&space).metadata_is_low());
    space.unallocated_bytes = mib(2);
    assert!(room_of(&space).metadata_is_low());
}

#[test]
fn damaged_super_block_has_no_state() {
    let mut block = super_block(7);
    block[0x800] ^= 1;
    assert!(SuperBlock::parse(&block).is_some());
    assert_eq!(FileSystemState::read(&block, 1 << 31), None);
    // A copy at another place, and no btrfs at all.
    assert!(SuperBlock::parse(&with(7, 0x30, &(64_u64 << 20).to_le_bytes())).is_none());
    assert!(SuperBlock::parse(&[0; STAMP_BLOCK_BYTES]).is_none());
    assert!(SuperBlock::parse(&super_block(7)[..4095]).is_none());
}

#[test]
fn unknown_features_are_named() {
    let reason = |at, number: u64| state(&with(7, at, &number.to_le_bytes())).unsupported;
    assert_eq!(state(&super_block(7)).unsupported, None);
    // What the kernel adds by itself, and a default subvolume that was set by hand.
    assert_eq!(reason(0xbc, INCOMPAT_MADE | 0x3a), None);
    assert_eq!(reason(0xb4, 0xb), None);
    assert!(
        reason(0xbc, INCOMPAT_MADE | 0x80)
            .unwrap()
            .contains("raid56")
    );
    assert!(reason(0xbc, 1 << 40).unwrap().contains("0x10000000000"));
    assert!(reason(0xb4, 0x10).unwrap().contains("compat_ro 0x10"));
    assert_eq!(reason(0x88, 2).unwrap(), "it has 2 devices");
}

pub(in crate::file_system::btrfs) fn run(program: &str, arguments: &[&Path]) {
    let done = Command::new(program).args(arguments).output().unwrap();
    assert!(done.status.success(), "{program}: {done:?}");
}

/// The content of the file that [`filled`] has.
pub(in crate::file_system::btrfs) fn content() -> Vec<u8> {
    sprat_testkit::tree::bytes(&mut sprat_testkit::dice::Dice::new(9), 40 << 20)
}

/// An image that was used: what was deleted lies before what is kept.
pub(in crate::file_system::btrfs) fn filled(
    folder: &Path,
    bytes: u64,
    at: &Path,
) -> std::path::PathBuf {
    let image = image(folder, bytes);
    make(&image, None).unwrap();
    run("mount", &[Path::new("-oloop"), &image, at]);
    std::fs::write(at.join("deleted"), content()).unwrap();
    std::fs::write(at.join("file"), content()).unwrap();
    std::fs::remove_file(at.join("deleted")).unwrap();
    // A mount namespace of another process may keep it mounted.
    run("sync", &[Path::new("-f"), at]);
    run("umount", &[at]);
    image
}

pub(in crate::file_system::btrfs) fn image(folder: &Path, bytes: u64) -> std::path::PathBuf {
    let path = folder.join("image");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

pub(in crate::file_system::btrfs) fn super_block_of(image: &Path) -> SuperBlock {
    let mut block = vec![0; STAMP_BLOCK_BYTES];
    let file = File::open(image).unwrap();
    file.read_exact_at(&mut block, SUPER_BLOCK_AT).unwrap();
    SuperBlock::parse(&block).unwrap()
}

#[test]
fn new_file_system_has_the_wanted_features() {
    requires!(needs::program("mkfs.btrfs"));
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 256 << 20);
    make(&image, Some("home")).unwrap();
    let found = super_block_of(&image);
    assert_eq!(found.checksum_fits(), Some(true));
    assert_eq!(found.len_bytes(), 256 << 20);
    assert_eq!(&found.block[0x12b..0x130], b"home\0");
    let state = found.state(1 << 30).unwrap();
    assert_eq!(state.unsupported, None);
    assert!(state.stamp.counter > 0 && !state.stamp.open);
}

#[test]
fn session_that_reads_sees_a_valid_file_system_with_another_id() {
    requires!(
        needs::program("mkfs.btrfs"),
        needs::program("btrfs"),
        needs::root()
    );
    let folder = sprat_testkit::test_folder::TestFolder::new("sprat-btrfs-");
    let image = image(folder.path(), 256 << 20);
    make(&image, None).unwrap();
    let before = super_block_of(&image);
    let block = before.with_own_id([7; 16]).unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&block, SUPER_BLOCK_AT).unwrap();
    let after = super_block_of(&image);
    assert_eq!(after.checksum_fits(), Some(true));
    assert_eq!(after.block[FSID], [7; 16]);
    assert_eq!(
        after.block[METADATA_UUID_AT..METADATA_UUID_AT + 16],
        before.block[FSID]
    );
    assert_eq!(after.unsupported(), None);
    // The kernel finds the trees by their own ID.
    let at = folder.path().join("mounted");
    std::fs::create_dir(&at).unwrap();
    run("mount", &[Path::new("-oloop,ro"), &image, &at]);
    run("umount", &[&at]);
    // A second change keeps the ID of the trees.
    let again = after.with_own_id([8; 16]).unwrap();
    assert_eq!(
        again[METADATA_UUID_AT..METADATA_UUID_AT + 16],
        before.block[FSID]
    );
}

#[test]
fn other_checksums_are_verified_and_other_features_refused() {
    requires!(needs::program("mkfs.btrfs"));
    let folder = tempfile::tempdir().unwrap();
    for (checksum, fits) in [
        ("crc32c", Some(true)),
        ("sha256", Some(true)),
        ("blake2", None),
    ] {
        let image = image(folder.path(), 256 << 20);
        let made = Command::new("mkfs.btrfs")
            .args(["-q", "-f", "--csum", checksum])
            .arg(&image)
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .output()
            .unwrap();
        assert!(made.status.success());
        let mut found = super_block_of(&image);
        assert_eq!(found.checksum_fits(), fits, "{checksum}");
        assert!(found.differs_from_wanted().is_some(), "{checksum}");
        if fits.is_some() {
            found.block[0xfff] ^= 1;
            assert_eq!(found.checksum_fits(), Some(false), "{checksum}");
        }
    }
}
