//! A volume attached with the kernel's real btrfs: mount options, subvolumes, space and growing.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use sprat_attach::{BtrfsInode, ChunkMap, MountState, ScrubWhat, btrfs_space};
use sprat_testkit::dice::Dice;
use sprat_testkit::needs;

use crate::chain::{Chain, ChainOptions};
use crate::support::{Place, can_attach, run};

/// mkfs.btrfs makes none below 109 MiB.
const MIB: u64 = 256;

fn can_use_btrfs() -> bool {
    let missing = || {
        needs::program("mkfs.btrfs").or_else(|| {
            (!sprat_attach::kernel_has_btrfs()).then(|| "the kernel has no btrfs".to_owned())
        })
    };
    can_attach() && !needs::skip(missing())
}

/// A chain with a mount that this process sees, too.
fn attached(place: &Place) -> Chain {
    let options = ChainOptions {
        private: false,
        ..ChainOptions::default()
    };
    let mut chain = Chain::start(&place.image, &options);
    chain.attach().unwrap();
    chain
}

/// A chain with a new file system, mounted. Another test's volume may be mounted meanwhile, and mkfs.btrfs
/// must not see it: that is so in a private worker only.
fn mounted(place: &Place) -> Chain {
    let mut chain = Chain::start(&place.image, &ChainOptions::default());
    chain.attach().unwrap();
    chain.ask_worker("mkfs-btrfs test").unwrap();
    assert!(chain.end().success());
    let mut chain = attached(place);
    mount(&mut chain, place);
    chain
}

fn mount(chain: &mut Chain, place: &Place) {
    let order = format!("mount-btrfs {}", place.dir.display());
    chain.ask_worker(&order).unwrap();
}

fn end(chain: Chain, place: &Place) {
    assert!(chain.end().success());
    place.assert_nothing_remains("after the session");
    run("btrfs", &["check", place.image.to_str().unwrap()]);
}

fn options_of(place: &Place) -> String {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let dir = place.dir.to_str().unwrap();
    let line = mounts.lines().find(|line| line.contains(dir)).unwrap();
    line.split(' ').nth(3).unwrap().to_owned()
}

#[test]
fn btrfs_volume_has_the_mount_options_and_is_recognised_as_ours() {
    if !can_use_btrfs() {
        return;
    }
    let place = Place::new(MIB);
    let mut chain = mounted(&place);
    let options = options_of(&place);
    for option in [
        "noatime",
        "compress=zstd:3",
        "flushoncommit",
        "notreelog",
        "skip_balance",
        "ssd",
        "subvolid=5",
    ] {
        assert!(
            options.split(',').any(|found| found == option),
            "no {option} in {options}"
        );
    }
    assert!(!options.contains("discard=async"), "{options}");
    assert_eq!(
        sprat_attach::mount_state(&place.dir).unwrap(),
        MountState::Alive
    );
    let id = sprat_attach::volume_id(&place.dir).unwrap().unwrap();
    let holders = sprat_attach::holders_of(&id);
    assert!(holders[0].contains("it is mounted at"), "{holders:?}");
    let taken = format!("mount-btrfs {}", place.dir.display());
    chain.ask_worker(&taken).unwrap_err();
    end(chain, &place);
}

#[test]
fn snapshot_keeps_its_content_and_is_deleted_although_it_is_read_only() {
    if !can_use_btrfs() {
        return;
    }
    let place = Place::new(MIB);
    let chain = mounted(&place);
    let (work, shot) = (
        place.dir.join("work"),
        place.dir.join("2026-01-01T00-00-00Z"),
    );
    sprat_attach::make_subvolume(&work).unwrap();
    fs::write(work.join("file"), "first").unwrap();
    sprat_attach::snapshot_subvolume(&work, &shot, true).unwrap();
    fs::write(work.join("file"), "second").unwrap();
    assert_eq!(fs::read_to_string(shot.join("file")).unwrap(), "first");
    let refused = fs::write(shot.join("file"), "x").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    let read_only = |path: &Path| sprat_attach::subvolume_is_read_only(path).unwrap();
    assert_eq!(read_only(&shot), Some(true));
    assert_eq!(read_only(&work), Some(false));
    fs::create_dir(work.join("folder")).unwrap();
    assert_eq!(read_only(&work.join("folder")), None);
    // A name that exists is refused, and so is the deletion of a plain folder.
    sprat_attach::snapshot_subvolume(&work, &shot, true).unwrap_err();
    sprat_attach::make_subvolume(&work).unwrap_err();
    sprat_attach::delete_subvolume(&work.join("folder")).unwrap_err();
    sprat_attach::delete_subvolume(&shot).unwrap();
    assert!(!shot.exists());
    // A writable one of a finished snapshot is how the next work begins.
    sprat_attach::snapshot_subvolume(&work, &shot, true).unwrap();
    sprat_attach::delete_subvolume(&work).unwrap();
    sprat_attach::snapshot_subvolume(&shot, &work, false).unwrap();
    fs::write(work.join("file"), "third").unwrap();
    assert_eq!(fs::read_to_string(shot.join("file")).unwrap(), "second");
    sprat_attach::commit_btrfs(&place.dir).unwrap();
    end(chain, &place);
}

#[test]
fn inodes_of_a_snapshot_are_those_of_its_files() {
    if !can_use_btrfs() {
        return;
    }
    let place = Place::new(MIB);
    let chain = mounted(&place);
    let (work, shot) = (place.dir.join("work"), place.dir.join("shot"));
    sprat_attach::make_subvolume(&work).unwrap();
    // More than one answer of the kernel.
    for number in 0..200 {
        fs::write(work.join(number.to_string()), vec![7; number * 10]).unwrap();
    }
    // More extents than one answer has.
    let large = fs::File::create(work.join("large")).unwrap();
    for number in 0..1500 {
        large.write_all_at(b"data", number * 8192).unwrap();
    }
    drop(large);
    std::os::unix::fs::symlink("1", work.join("link")).unwrap();
    std::os::unix::fs::lchown(work.join("2"), Some(17), Some(18)).unwrap();
    fs::set_permissions(work.join("3"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::remove_file(work.join("4")).unwrap();
    sprat_attach::snapshot_subvolume(&work, &shot, true).unwrap();
    let mut found = Vec::new();
    let mut meet = |inode| {
        found.push(inode);
        true
    };
    sprat_attach::each_btrfs_inode(&shot, &mut meet).unwrap();
    let files = fs::read_dir(&shot)
        .unwrap()
        .map(|file| file.unwrap().path());
    let mut wanted: Vec<BtrfsInode> = files
        .chain([shot.clone()])
        .map(|path| {
            let about = fs::symlink_metadata(path).unwrap();
            let time = |seconds, nanoseconds| (seconds, u32::try_from(nanoseconds).unwrap());
            BtrfsInode {
                number: about.ino(),
                bytes: about.size(),
                mode: about.mode(),
                user: about.uid(),
                group: about.gid(),
                modified: time(about.mtime(), about.mtime_nsec()),
                changed: time(about.ctime(), about.ctime_nsec()),
            }
        })
        .collect();
    wanted.sort_by_key(|inode| inode.number);
    assert_eq!(found, wanted);
    let mut met = 0;
    let mut stop = |_| {
        met += 1;
        met < 5
    };
    sprat_attach::each_btrfs_inode(&shot, &mut stop).unwrap();
    assert_eq!(met, 5);
    end(chain, &place);
}

#[test]
fn snapshot_alone_makes_everything_durable() {
    if !can_use_btrfs() {
        return;
    }
    let place = Place::new(MIB);
    let mut chain = mounted(&place);
    let (work, shot) = (place.dir.join("work"), place.dir.join("shot"));
    sprat_attach::make_subvolume(&work).unwrap();
    fs::write(work.join("file"), vec![7; 3 << 20]).unwrap();
    fs::write(place.dir.join("record"), "record").unwrap();
    sprat_attach::snapshot_subvolume(&work, &shot, true).unwrap();
    // As after a power cut: the image as it is now.
    let copy = place.folder.path().join("copy");
    fs::copy(&place.image, &copy).unwrap();
    assert!(chain.count("flushes") > 0);
    end(chain, &place);
    fs::rename(&copy, &place.image).unwrap();
    let mut chain = attached(&place);
    mount(&mut chain, &place);
    assert_eq!(fs::read(shot.join("file")).unwrap(), vec![7; 3 << 20]);
    let record = fs::read_to_string(place.dir.join("record")).unwrap();
    assert_eq!(record, "record");
    end(chain, &place);
}

#[test]
fn btrfs_grows_to_the_length_of_the_device() {
    if !can_use_btrfs() {
        return;
    }
    let mut place = Place::new(MIB);
    let chain = mounted(&place);
    let before = btrfs_space(&place.dir).unwrap();
    assert!(before.unallocated_bytes > 0 && before.metadata.total_bytes > 0);
    end(chain, &place);
    place.len_bytes *= 4;
    let image = fs::File::options().write(true).open(&place.image).unwrap();
    image.set_len(place.len_bytes).unwrap();
    let mut chain = attached(&place);
    mount(&mut chain, &place);
    let order = format!("grow-btrfs {}", place.len_bytes);
    chain.ask_worker(&order).unwrap();
    let after = btrfs_space(&place.dir).unwrap();
    let grown = after.unallocated_bytes - before.unallocated_bytes;
    assert_eq!(grown, place.len_bytes / 4 * 3);
    end(chain, &place);
}

/// Before Linux 6.7 the kernel refuses it unless it was made to forget the newer one.
#[test]
fn older_copy_is_mounted_after_the_newer_one() {
    if !can_use_btrfs() {
        return;
    }
    let place = Place::new(MIB);
    let chain = mounted(&place);
    fs::write(place.dir.join("old"), "").unwrap();
    end(chain, &place);
    let copy = place.folder.path().join("copy");
    fs::copy(&place.image, &copy).unwrap();
    let mut chain = attached(&place);
    mount(&mut chain, &place);
    fs::write(place.dir.join("new"), "").unwrap();
    end(chain, &place);
    fs::rename(&copy, &place.image).unwrap();
    let mut chain = attached(&place);
    mount(&mut chain, &place);
    assert!(place.dir.join("old").exists() && !place.dir.join("new").exists());
    end(chain, &place);
}

#[test]
fn mount_of_no_btrfs_is_refused() {
    if !can_use_btrfs() {
        return;
    }
    let place = Place::new(MIB);
    let mut chain = attached(&place);
    let order = format!("mount-btrfs {}", place.dir.display());
    let refused = chain.ask_worker(&order).unwrap_err();
    assert!(refused.contains("no btrfs is on the volume"), "{refused}");
    assert!(chain.end().success());
}

/// Where these bytes lie in the image.
fn places(place: &Place, bytes: &[u8]) -> Vec<usize> {
    let image = fs::read(&place.image).unwrap();
    let mut finds = Vec::new();
    let mut from = 0;
    while let Some(at) = image[from..]
        .windows(bytes.len())
        .position(|part| part == bytes)
    {
        finds.push(from + at);
        from += at + bytes.len();
    }
    finds
}

fn garble(place: &Place, at: usize) {
    let image = fs::File::options().write(true).open(&place.image).unwrap();
    image.write_all_at(&[0x55; 16], at as u64).unwrap();
}

#[test]
fn scrub_finds_garbled_metadata_and_content_and_can_be_cancelled() {
    if !can_use_btrfs() {
        return;
    }
    let place = Place::new(MIB);
    let chain = mounted(&place);
    let name = "a-name-that-is-nowhere-else-0123456789";
    fs::write(place.dir.join(name), "small").unwrap();
    // Not compressible.
    let content = sprat_testkit::tree::bytes(&mut Dice::new(7), 1 << 20);
    fs::write(place.dir.join("content"), &content).unwrap();
    sprat_attach::commit_btrfs(&place.dir).unwrap();
    let scrub = |what| sprat_attach::scrub_btrfs(&place.dir, what, &|| true).unwrap();
    let found = scrub(ScrubWhat::Everything).unwrap();
    assert!(found.is_clean() && found.bytes > 1 << 20, "{found:?}");
    let stopped = sprat_attach::scrub_btrfs(&place.dir, ScrubWhat::Everything, &|| false);
    assert_eq!(stopped.unwrap(), None);
    let map = ChunkMap::read(&place.dir).unwrap();
    let lies = |name| {
        map.extents(&fs::File::open(place.dir.join(name)).unwrap())
            .unwrap()
    };
    let extents = lies("content");
    // The content of a small file is in the trees.
    assert_eq!(lies(name), []);
    end(chain, &place);
    let image = fs::File::open(&place.image).unwrap();
    let mut found = Vec::new();
    for extent in extents {
        let mut part = vec![0; usize::try_from(extent.end - extent.start).unwrap()];
        image.read_exact_at(&mut part, extent.start).unwrap();
        found.extend(part);
    }
    assert!(found == content, "{} bytes", found.len());

    // The first copy of each node that ever had the name. The second copies lie behind all of them.
    let names = places(&place, name.as_bytes());
    assert!(
        names.len().is_multiple_of(2) && names.len() > 1,
        "{names:?}"
    );
    for at in &names[..names.len() / 2] {
        garble(&place, *at);
    }
    let mut chain = attached(&place);
    let read_only = format!("mount-btrfs-ro {}", place.dir.display());
    chain.ask_worker(&read_only).unwrap();
    let found = scrub(ScrubWhat::Metadata).unwrap();
    assert!(found.wrong > 0 && found.lost == 0, "{found:?}");
    assert!(chain.end().success());

    let at = places(&place, &content[500_000..500_100]);
    garble(&place, at[0]);
    let mut chain = attached(&place);
    chain.ask_worker(&read_only).unwrap();
    let found = scrub(ScrubWhat::Everything).unwrap();
    assert!(found.lost > 0, "{found:?}");
    assert!(chain.end().success());
}
