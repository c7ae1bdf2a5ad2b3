//! Everything is preserved: in the snapshot, in the next one with hard links, and after a restore.

mod attributes;
pub(crate) mod modes;
mod sticky;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::folder::{Bench, SmallExt4, below, inode, job_name, loop_missing, take_into};
use sprat_snapshot::{RestoreSpec, SnapshotReport};
use sprat_testkit::compare::assert_same;
use sprat_testkit::dice::Dice;
use sprat_testkit::requires;
use sprat_testkit::tree::{PlainTree, acl, make_odd_tree, set_mode, set_time, set_xattr};

#[test]
fn an_unusual_tree_is_equal_in_the_snapshot_and_after_a_restore() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    let report = bench.take();
    assert!(report.record.complete, "{:?}", report.record.messages);
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
    assert_same(&bench.source(), &bench.in_snapshot("latest"));

    let to = bench.path("restored");
    let restored = bench
        .restore(&RestoreSpec::new(job_name(), to.clone()))
        .unwrap();
    assert_eq!(restored.snapshot, report.name.to_string());
    assert_same(&bench.source(), &below(&to, &bench.source()));
    // The first snapshot is unchanged.
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

#[test]
fn a_second_run_links_unchanged_files_and_copies_changed_ones() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    let first = bench.take();
    let changed = "contents/4096 bytes";
    fs::write(bench.source().join(changed), "new").unwrap();
    let second = bench.take();
    assert!(second.name > first.name);
    assert_same(&bench.source(), &bench.in_snapshot(second.name));
    assert_eq!(second.record.stats.transferred, 1);
    let (a, b) = (
        bench.in_snapshot(first.name),
        bench.in_snapshot(second.name),
    );
    for same in [
        "names/plain",
        "links/a/one",
        "attributes/acl file",
        "contents/sparse tail",
        "links/dangling",
    ] {
        assert_eq!(inode(&a.join(same)), inode(&b.join(same)), "{same}");
    }
    assert_ne!(inode(&a.join(changed)), inode(&b.join(changed)));
    assert_ne!(fs::read(a.join(changed)).unwrap(), b"new");
    // A third, unchanged run links everything and copies nothing.
    let third = bench.take();
    assert_eq!(third.record.stats.transferred, 0);
    assert_same(&bench.source(), &bench.in_snapshot(third.name));
}

#[test]
fn a_file_never_gets_the_content_of_two_snapshots_ago() {
    let bench = Bench::new();
    let file = bench.source().join("file");
    let write = |text: &str, seconds: u64| {
        fs::write(&file, text).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        File::options()
            .write(true)
            .open(&file)
            .and_then(|file| file.set_modified(time))
            .unwrap();
    };
    let kept = |name| fs::read_to_string(bench.in_snapshot(name).join("file")).unwrap();
    let mut names = Vec::new();
    // The third version has the size and time of the first.
    for (text, seconds) in [
        ("AAAA", 1_000_000),
        ("BBBB", 2_000_000),
        ("CCCC", 1_000_000),
    ] {
        write(text, seconds);
        names.push(bench.take().name);
        assert_eq!(kept(names[names.len() - 1]), text);
    }
    assert_eq!(kept(names[0]), "AAAA");
}

/// Changes the content of a file, and keeps its size and times.
fn change_content(path: &Path, content: &str) {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    fs::write(path, content).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(modified).unwrap();
}

/// rsync treats such a name in a list of files as a comment.
#[test]
fn a_file_whose_path_looks_like_a_comment_is_read_again_and_restored() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let top = tempfile::Builder::new()
        .prefix("#sprat-")
        .tempdir_in("/")
        .unwrap();
    fs::create_dir(top.path().join(";sub")).unwrap();
    let files = [top.path().join("#a"), top.path().join(";sub/b")];
    for file in &files {
        fs::write(file, "old").unwrap();
    }
    let mut spec = bench.spec();
    spec.sources = vec![top.path().to_owned()];
    bench.try_take(&spec).unwrap();
    // They are younger than the run, so the next one compares them.
    for file in &files {
        change_content(file, "new");
    }
    let report = bench.try_take(&spec).unwrap();
    let tree = bench.job().join(report.name.to_string());
    for file in &files {
        assert_eq!(fs::read(below(&tree, file)).unwrap(), b"new");
    }
    let mut restore = RestoreSpec::new(job_name(), bench.path("back"));
    restore.path = Some(top.path().to_owned());
    bench.restore(&restore).unwrap();
    let back = bench.path("back").join(top.path().file_name().unwrap());
    for name in ["#a", ";sub/b"] {
        change_content(&back.join(name), "bad");
    }
    bench.restore(&restore).unwrap();
    for name in ["#a", ";sub/b"] {
        assert_eq!(fs::read(back.join(name)).unwrap(), b"new", "{name}");
    }
}

#[test]
fn a_recent_file_is_compared_by_its_remaining_name() {
    for kept in ["a", "b", "c"] {
        let bench = Bench::new();
        let at = |name: &str| bench.source().join(name);
        fs::write(at("a"), "good").unwrap();
        fs::hard_link(at("a"), at("b")).unwrap();
        fs::hard_link(at("a"), at("c")).unwrap();
        bench.take();
        change_content(&at("a"), "next");
        for name in ["a", "b", "c"] {
            if name != kept {
                fs::remove_file(at(name)).unwrap();
            }
        }
        let report = bench.take();
        let file = bench.in_snapshot(report.name).join(kept);
        assert_eq!(fs::read_to_string(file).unwrap(), "next", "{kept}");
    }
}

/// As programs do with their sockets.
#[test]
fn a_recent_file_is_not_opened_when_something_else_has_its_place() {
    let bench = Bench::new();
    let at = |name: &str| bench.source().join(name);
    fs::create_dir(at("folder")).unwrap();
    for name in ["socket", "link", "folder/file"] {
        fs::write(at(name), "good").unwrap();
    }
    bench.take();
    fs::remove_file(at("socket")).unwrap();
    drop(UnixListener::bind(at("socket")).unwrap());
    fs::remove_file(at("link")).unwrap();
    symlink("socket", at("link")).unwrap();
    // Nothing can be opened below this link: its name is too long.
    fs::remove_dir_all(at("folder")).unwrap();
    symlink("x".repeat(300), at("folder")).unwrap();
    for _ in 0..2 {
        let report = bench.take();
        assert!(report.record.complete, "{:?}", report.record);
        assert_same(&bench.source(), &bench.in_snapshot(report.name));
    }
}

/// rsync links all of them to the one file of the older snapshot: size, time and attributes are equal.
#[test]
fn hard_links_that_became_files_of_their_own_are_not_linked() {
    let bench = Bench::new();
    let at = |name: &str| bench.source().join(name);
    fs::create_dir(at("sub")).unwrap();
    let names = ["a", "sub/b", "c", "sub/d"];
    fs::write(at("a"), "content").unwrap();
    symlink("target", at("link")).unwrap();
    for name in &names[1..] {
        fs::hard_link(at("a"), at(name)).unwrap();
    }
    fs::hard_link(at("link"), at("link 2")).unwrap();
    bench.take();
    // Two files now, of two names each.
    let modified = fs::metadata(at("a")).unwrap().modified().unwrap();
    for name in &names[2..] {
        fs::remove_file(at(name)).unwrap();
    }
    fs::write(at("c"), "content").unwrap();
    fs::hard_link(at("c"), at("sub/d")).unwrap();
    let file = File::options().write(true).open(at("c")).unwrap();
    file.set_modified(modified).unwrap();
    for _ in 0..2 {
        let report = bench.take();
        assert!(report.record.complete, "{:?}", report.record);
        assert_same(&bench.source(), &bench.in_snapshot(report.name));
    }
}

#[test]
fn hard_links_across_sources_and_nested_and_repeated_sources_are_kept_once() {
    let bench = Bench::new();
    let (one, two) = (bench.source().join("one"), bench.source().join("two"));
    fs::create_dir_all(one.join("inner")).unwrap();
    fs::create_dir(&two).unwrap();
    fs::write(one.join("file"), "x").unwrap();
    fs::hard_link(one.join("file"), two.join("other name")).unwrap();
    fs::write(one.join("inner/deep"), "y").unwrap();
    fs::write(bench.source().join("single"), "a file as a source").unwrap();
    let mut spec = bench.spec();
    spec.sources = vec![
        one.clone(),
        two.join("."),
        one.join("inner"),
        one.clone(),
        bench.source().join("single"),
    ];
    let report = bench.try_take(&spec).unwrap();
    // Every file of the source is in one of the sources here.
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

#[test]
fn one_file_or_folder_is_restored_by_its_path() {
    let bench = Bench::new();
    make_odd_tree(&bench.source()).unwrap();
    bench.take();
    let to = bench.path("restored");
    let mut spec = RestoreSpec::new(job_name(), to.clone());
    for name in [
        "links",
        "contents/sparse tail",
        "links/dangling",
        "names/new\nline",
        "specials",
    ] {
        spec.path = Some(bench.source().join(name));
        bench.restore(&spec).unwrap();
        let base = Path::new(name).file_name().unwrap();
        assert_same(&bench.source().join(name), &to.join(base));
    }
    let names = fs::read_dir(&to).unwrap().count();
    assert_eq!(names, 5);
}

#[test]
fn many_files_are_preserved() {
    let bench = Bench::new();
    let tree = PlainTree {
        files: 3000,
        bytes: 20 << 20,
        files_per_folder: 40,
        seed: 7,
    };
    tree.make(&bench.source()).unwrap();
    let mut last = None;
    let report = sprat_snapshot::take(
        &bench.volume(),
        &bench.spec(),
        crate::folder::now(),
        &mut |p| last = Some(p),
        &sprat_snapshot::Cancel::new(),
    )
    .unwrap();
    assert_eq!(report.record.stats.regular_files, 3000);
    assert!(last.is_some());
    assert_same(&bench.source(), &bench.in_snapshot(report.name));
}

fn sparse(path: &Path, bytes: u64, tail: &[u8]) {
    let mut file = File::create(path).unwrap();
    file.set_len(bytes).unwrap();
    std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).unwrap();
    file.write_all(tail).unwrap();
}

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn free_bytes(at: &Path) -> u64 {
    let about = rustix::fs::statvfs(at).unwrap();
    about.f_bfree * about.f_frsize
}

/// The next snapshot of the bench's source on `disk`, made in another second.
fn next(bench: &Bench, disk: &SmallExt4) -> (SnapshotReport, PathBuf) {
    let report = take_into(&disk.at, &bench.spec()).unwrap();
    let tree = disk.at.join("home").join(report.name.to_string());
    (report, below(&tree, &bench.source()))
}

#[test]
fn a_sparse_file_larger_than_the_volume_keeps_its_holes_when_only_its_mode_changes() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &[]);
    let file = bench.source().join("sparse");
    sparse(&file, 600 << 20, b"tail");
    let twin = bench.source().join("twin");
    fs::hard_link(&file, &twin).unwrap();
    let (first, before) = next(&bench, &disk);
    chmod(&file, 0o600);
    let (second, after) = next(&bench, &disk);
    assert!(second.record.complete, "{:?}", second.record.messages);
    assert_same(&bench.source(), &after);
    assert_eq!(inode(&after.join("sparse")), inode(&after.join("twin")));
    let blocks = fs::metadata(after.join("sparse")).unwrap().blocks();
    assert!(blocks <= 16, "{blocks} blocks");
    // The file counts as what it is, and the older snapshot is unchanged.
    assert_eq!(second.record.stats.transferred, 1);
    let older = fs::metadata(before.join("sparse")).unwrap();
    assert_eq!((older.mode() & 0o777, older.nlink()), (0o644, 2));
    assert_eq!(first.record.stats.transferred, 1);
    assert!(second.record.messages.is_empty(), "{:?}", second.record);
    drop(disk);
}

#[test]
fn content_of_a_file_with_new_attributes_comes_from_the_source() {
    requires!(loop_missing());
    // With a guard, and in a folder that is not a mount, where there is none.
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &[]);
    let file = bench.source().join("file");
    fs::write(&file, "right").unwrap();
    fs::create_dir(bench.source().join("folder")).unwrap();
    let inner = bench.source().join("folder/inner");
    sparse(&inner, 8 << 20, b"tail");
    for volume in [disk.at.clone(), bench.volume()] {
        chmod(&file, 0o644);
        chmod(&inner, 0o644);
        let first = take_into(&volume, &bench.spec()).unwrap();
        let tree = |report: &SnapshotReport| {
            let tree = volume.join("home").join(report.name.to_string());
            below(&tree, &bench.source())
        };
        let old = tree(&first).join("file");
        let time = fs::metadata(&old).unwrap().modified().unwrap();
        fs::write(&old, "wrong").unwrap();
        File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .set_modified(time)
            .unwrap();
        chmod(&file, 0o600);
        chmod(&inner, 0o600);
        let second = take_into(&volume, &bench.spec()).unwrap();
        assert!(second.record.complete);
        assert_same(&bench.source(), &tree(&second));
        assert!(
            fs::metadata(tree(&second).join("folder/inner"))
                .unwrap()
                .blocks()
                <= 16
        );
        // The second rsync leaves nothing beside the snapshots.
        assert!(!volume.join("home/.sprat/read-again").exists());
        assert_eq!(fs::read(&old).unwrap(), b"wrong");
    }
}

/// Changes a random attribute of a file. Returns whether it did.
fn change_attribute(dice: &mut Dice, path: &Path) {
    match dice.below(4) {
        0 => chmod(path, 0o600 + u32::try_from(dice.below(0o177)).unwrap()),
        1 => {
            let owner = u32::try_from(dice.below(5000)).unwrap();
            std::os::unix::fs::lchown(path, Some(owner), Some(owner + 1)).unwrap();
        }
        2 => {
            let value = format!("{}", dice.below(1 << 30));
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::lsetxattr(path, "user.sprat", value.as_bytes(), flags).unwrap();
        }
        _ => {
            let entry = format!("u:{}:rw", 1 + dice.below(5000));
            crate::folder::run("setfacl", &["-m", &entry, path.to_str().unwrap()]);
        }
    }
}

#[test]
fn random_attribute_changes_cost_no_holes_and_change_no_older_snapshot() {
    requires!(loop_missing(), sprat_testkit::needs::program("setfacl"));
    let rounds = std::env::var("SPRAT_TORTURE_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse::<usize>().ok());
    let (files, sparse_mib) = if rounds.is_some() {
        (10_000, 64)
    } else {
        (200, 8)
    };
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, if rounds.is_some() { "512M" } else { "48M" }, &[]);
    let mut dice = Dice::new(19);
    let mut paths = Vec::new();
    for number in 0..files {
        let folder = bench.source().join(format!("{}", number % 23));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join(format!("{number}"));
        match dice.below(10) {
            // More than the volume's size in all.
            0 => sparse(&path, (1 + dice.below(sparse_mib)) << 20, b"tail"),
            1 if number > 0 => {
                let other: &PathBuf = &paths[usize::try_from(dice.below(number)).unwrap()];
                fs::hard_link(other, &path).unwrap();
            }
            2 => sparse(&path, dice.below(1 << 20), b""),
            _ => fs::write(&path, vec![7; usize::try_from(dice.below(9000)).unwrap()]).unwrap(),
        }
        paths.push(path);
    }
    symlink("nowhere", bench.source().join("link")).unwrap();
    let (_, mut before) = next(&bench, &disk);
    assert_same(&bench.source(), &before);
    let copy = bench.path("as it was");
    for round in 0..3 {
        // The present state of the snapshot, to compare with later.
        let _ = fs::remove_dir_all(&copy);
        let arguments = ["-a", "--sparse=always", before.to_str().unwrap()];
        crate::folder::run("cp", &[&arguments[..], &[copy.to_str().unwrap()]].concat());
        let times = fs::metadata(&before).unwrap().modified().unwrap();
        File::open(&copy).unwrap().set_modified(times).unwrap();
        let mut allocated = 0;
        for path in &paths {
            if dice.below(10) == 0 {
                change_attribute(&mut dice, path);
            }
        }
        let free = free_bytes(&disk.at);
        let (report, after) = next(&bench, &disk);
        assert!(report.record.complete, "round {round}");
        assert_same(&bench.source(), &after);
        assert_same(&copy, &before);
        for path in &paths {
            let ours =
                fs::metadata(after.join(path.strip_prefix(bench.source()).unwrap())).unwrap();
            let theirs = fs::metadata(path).unwrap();
            // Rounded to a block at each end of the data.
            let more = ours.blocks().saturating_sub(theirs.blocks());
            assert!(more <= 16, "{}: {more} sectors more", path.display());
            if ours.nlink() == theirs.nlink() {
                allocated += ours.blocks() * 512;
            }
        }
        let used = free.saturating_sub(free_bytes(&disk.at));
        // New data, the folders, and the journal's share.
        let most = allocated + files * 512 + (2 << 20);
        assert!(used <= most, "round {round}: {used} of {most} bytes");
        before = after;
    }
}

#[test]
fn attributes_that_rsync_uses_itself_are_preserved() {
    let bench = Bench::new();
    let file = bench.source().join("file");
    fs::write(&file, "x").unwrap();
    let value = b"100644 0,0 1000:1000";
    let flags = rustix::fs::XattrFlags::empty();
    let name = "user.rsync.%stat";
    let set = rustix::fs::lsetxattr(&file, name, value, flags);
    requires!(set.err().map(|error| format!("user attributes: {error}")));
    let of = |path: &Path| {
        let mut buffer = [0; 100];
        let bytes = rustix::fs::lgetxattr(path, name, &mut buffer).unwrap();
        buffer[..bytes].to_vec()
    };
    let report = bench.take();
    assert_eq!(of(&bench.in_snapshot(report.name).join("file")), value);
    let to = bench.path("restored");
    bench
        .restore(&RestoreSpec::new(job_name(), to.clone()))
        .unwrap();
    assert_eq!(of(&below(&to, &bench.source()).join("file")), value);
}

#[test]
fn owning_group_of_a_sticky_folder_with_an_acl_keeps_its_rights() {
    let bench = Bench::new();
    requires!(make_sticky_folder(&bench.source().join("shared/inner")));
    for _ in 0..2 {
        let report = bench.take();
        assert!(report.record.warnings.is_empty());
        assert_same(&bench.source(), &bench.in_snapshot(report.name));
    }
    let mut whole = RestoreSpec::new(job_name(), bench.path("whole"));
    bench.restore(&whole).unwrap();
    assert_same(&bench.source(), &below(&whole.to, &bench.source()));
    whole.to = bench.path("part");
    whole.path = Some(bench.source().join("shared"));
    bench.restore(&whole).unwrap();
    assert_same(&bench.source().join("shared"), &whole.to.join("shared"));
    // Its parents are created like those of the snapshot.
    whole.path = None;
    whole.to = bench.path("several");
    whole.paths = vec![bench.source().join("shared/inner/file")];
    bench.restore(&whole).unwrap();
    let restored = below(&whole.to, &bench.source());
    assert_same(&bench.source().join("shared"), &restored.join("shared"));
}

/// A folder with the sticky bit and an ACL in which the owning group has all rights of the mask, and a file in it. Returns
/// why there can be none.
pub(crate) fn make_sticky_folder(path: &Path) -> Option<String> {
    fs::create_dir_all(path).unwrap();
    fs::write(path.join("file"), "x").unwrap();
    let missing = set_acl_like_mask(path, 0o1770);
    set_time(path, 1_700_000_000, 0).unwrap();
    missing
}

/// Gives a path an ACL in which the owning group has all rights of the mask, with `mode`, which has those. Returns why
/// there are no ACLs.
pub(crate) fn set_acl_like_mask(path: &Path, mode: u32) -> Option<String> {
    let mut acl = acl(1234, 5);
    // The third entry is that of the owning group.
    acl[4 + 2 * 8 + 2] = 7;
    let set = set_xattr(path, "system.posix_acl_access", &acl);
    // The mask, too.
    set_mode(path, mode).unwrap();
    set.err().map(|error| format!("ACLs: {error}"))
}
