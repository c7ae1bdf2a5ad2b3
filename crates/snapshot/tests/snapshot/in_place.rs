//! Restores over existing files: folders above the sources, links and conflicting folders.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;

use crate::folder::{Bench, job_name};
use sprat_snapshot::{LocalContainer, RestoreSpec, SnapshotError, SnapshotSpec};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;
use sprat_testkit::tree::{set_mode, set_owner, set_time};

/// A snapshot of `srv/data/www` only. The folders above it have particular modes and times.
fn www() -> (Bench, PathBuf) {
    let bench = Bench::new();
    let www = bench.path("srv/data/www");
    fs::create_dir_all(&www).unwrap();
    fs::write(www.join("index"), "x").unwrap();
    set_mode(&bench.path("srv/data"), 0o711).unwrap();
    set_time(&bench.path("srv/data"), 1_600_000_000, 0).unwrap();
    bench
        .try_take(&SnapshotSpec::new(job_name(), vec![www.clone()]))
        .unwrap();
    (bench, www)
}

fn to(place: PathBuf) -> RestoreSpec {
    RestoreSpec::new(job_name(), place)
}

#[test]
fn folders_above_the_sources_are_kept_or_created_as_they_were() {
    requires!(sprat_testkit::needs::root());
    let (bench, www) = www();
    let place = bench.path("place");
    bench.restore(&to(place.clone())).unwrap();
    let data = crate::folder::below(&place, &bench.path("srv/data"));
    let metadata = fs::metadata(&data).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o711);
    assert_eq!(metadata.mtime(), 1_600_000_000);
    assert_same(&www, &data.join("www"));

    set_mode(&data, 0o750).unwrap();
    set_owner(&data, 1234, 1235).unwrap();
    fs::remove_file(data.join("www/index")).unwrap();
    fs::write(data.join("beside"), "x").unwrap();
    for delete in [false, true] {
        let mut spec = to(place.clone());
        spec.delete = delete;
        bench.restore(&spec).unwrap();
        let metadata = fs::metadata(&data).unwrap();
        assert_eq!(metadata.mode() & 0o7777, 0o750);
        assert_eq!((metadata.uid(), metadata.gid()), (1234, 1235));
        assert_same(&www, &data.join("www"));
        assert!(data.join("beside").exists());
    }
}

#[test]
fn a_dry_run_reports_the_folders_it_would_create() {
    let (bench, _) = www();
    let place = bench.path("place");
    let mut spec = to(place.clone());
    spec.dry_run = true;
    let report = bench.restore(&spec).unwrap();
    let told = |end: &str| report.changes.names.iter().any(|line| line.ends_with(end));
    assert!(told("srv/data/"), "{:?}", report.changes);
    assert!(told("srv/data/www/index"), "{:?}", report.changes);
    assert!(!place.exists());
}

#[test]
fn a_link_in_place_of_a_folder_above_the_sources_is_never_replaced() {
    let (bench, www) = www();
    let data = bench.path("srv/data");
    let disk = bench.path("bigdisk");
    fs::rename(&data, &disk).unwrap();
    symlink(&disk, &data).unwrap();
    fs::write(disk.join("www/index"), "later, longer").unwrap();
    for delete in [false, true] {
        let mut spec = to("/".into());
        spec.delete = delete;
        let error = bench.restore(&spec).unwrap_err();
        assert!(
            error.to_string().contains("is a symbolic link to"),
            "{error}"
        );
        assert!(fs::symlink_metadata(&data).unwrap().is_symlink());
        assert_eq!(fs::read(disk.join("www/index")).unwrap(), b"later, longer");
    }
    // As the message suggests.
    let mut spec = to(disk.clone());
    spec.path = Some(www);
    bench.restore(&spec).unwrap();
    assert_eq!(fs::read(disk.join("www/index")).unwrap(), b"x");
}

#[test]
fn a_folder_in_place_of_a_hard_link_is_reported_before_any_write() {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir(source.join("deep")).unwrap();
    fs::write(source.join("deep/a"), "x").unwrap();
    fs::hard_link(source.join("deep/a"), source.join("deep/b")).unwrap();
    bench.take();
    let place = bench.path("place");
    let there = crate::folder::below(&place, &source).join("deep/b");
    fs::create_dir_all(there.join("holds something")).unwrap();
    for _ in 0..2 {
        let error = bench.restore(&to(place.clone())).unwrap_err();
        let SnapshotError::DestinationConflicts { folders, .. } = &error else {
            panic!("{error}")
        };
        assert_eq!(folders, &[there.display().to_string()]);
        assert!(!there.with_file_name("a").exists());
    }
    fs::remove_dir(there.join("holds something")).unwrap();
    bench.restore(&to(place.clone())).unwrap();
    assert_same(&source, &crate::folder::below(&place, &source));
}

#[test]
fn delete_reaches_only_the_sources() {
    let bench = Bench::new();
    let source = bench.source();
    for file in ["home/ann/a", "home/bob/b", "srv/s"] {
        fs::create_dir_all(source.join(file).parent().unwrap()).unwrap();
        fs::write(source.join(file), "x").unwrap();
    }
    let mut spec = bench.spec();
    spec.sources = vec![source.join("home/ann")];
    bench.try_take(&spec).unwrap();
    for later in ["home/ann/later", "home/later"] {
        fs::write(source.join(later), "x").unwrap();
    }
    let mut spec = to(source.clone());
    spec.delete = true;
    spec.path = Some(source.join("home"));
    bench.restore(&spec).unwrap();
    assert!(!source.join("home/ann/later").exists());
    assert!(source.join("home/ann/a").exists());
    for other in ["home/bob/b", "home/later"] {
        assert!(source.join(other).exists(), "{other}");
    }
    // A folder of the source, and one above it whose name is new at the destination.
    fs::write(source.join("home/ann/later"), "x").unwrap();
    spec.path = Some(source.join("home/ann"));
    spec.to = source.join("home");
    bench.restore(&spec).unwrap();
    assert!(!source.join("home/ann/later").exists());
    spec.path = Some(source.clone());
    spec.to = bench.path("place");
    bench.restore(&spec).unwrap();
    let place = bench.path("place").join(source.file_name().unwrap());
    assert_same(&source.join("home/ann"), &place.join("home/ann"));
}

/// The other name is written again: it has no other link, and a file of equal size and time.
#[test]
fn a_folder_in_place_of_a_hard_link_is_deleted_only_with_delete() {
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("a"), "x").unwrap();
    fs::hard_link(source.join("a"), source.join("b")).unwrap();
    fs::write(source.join("c"), "x").unwrap();
    bench.take();
    let place = bench.path("place");
    bench.restore(&to(place.clone())).unwrap();
    let there = crate::folder::below(&place, &source);
    fs::remove_file(there.join("b")).unwrap();
    rewrite(&there.join("a"), "y");
    fs::create_dir_all(there.join("b/holds something")).unwrap();
    fs::remove_file(there.join("c")).unwrap();
    let mut spec = to(place);
    spec.delete = true;
    for dry_run in [true, false, false] {
        spec.dry_run = dry_run;
        bench.restore(&spec).unwrap();
    }
    assert_same(&source, &there);
}

#[test]
fn a_folder_that_conflicts_later_ends_the_restore() {
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("a"), "x").unwrap();
    fs::hard_link(source.join("a"), source.join("b")).unwrap();
    bench.take();
    let place = bench.path("place");
    let there = crate::folder::below(&place, &source).join("b");
    let mut spec = to(place.clone());
    let line = format!("mkdir -p '{}/x'", there.display());
    spec.rsync = bench.rsync_script(&line, "rsync");
    let error = bench.restore(&spec).unwrap_err();
    assert!(
        matches!(error, SnapshotError::DestinationConflicts { .. }),
        "{error}"
    );
}

/// A restore for a machine with sprat's own files in `source`: a cache, and a container with a lock.
fn sparing(bench: &Bench, to: PathBuf, path: Option<PathBuf>) -> RestoreSpec {
    let mut spec = RestoreSpec::new(job_name(), to);
    spec.path = path;
    spec.never_enter = vec![bench.source().join("var/cache")];
    // Of the session, and another one.
    spec.containers = ["elsewhere/y.luks", "st/x.luks"]
        .map(|path| LocalContainer {
            path: bench.source().join(path),
            endings: vec![".lock.[0-9]".into()],
        })
        .into();
    spec
}

#[test]
fn protected_paths_are_neither_overwritten_nor_deleted() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let source = bench.source();
    let own = ["var/cache/block", "st/x.luks", "st/x.luks.lock.1"];
    for file in own.into_iter().chain(["st/kept", "var/kept"]) {
        fs::create_dir_all(source.join(file).parent().unwrap()).unwrap();
        fs::write(source.join(file), "old").unwrap();
    }
    // As snapshots were before these files were excluded.
    bench.take();
    let all_new = || {
        for file in own {
            fs::write(source.join(file), "newer").unwrap();
        }
        fs::write(source.join("var/cache/later"), "newer").unwrap();
        fs::write(source.join("var/later"), "newer").unwrap();
    };
    let var = source.join("var");
    for (to, path, delete) in [
        (PathBuf::from("/"), None, false),
        (bench.path(""), Some(source.clone()), false),
        (source.clone(), Some(var.clone()), false),
        (source.clone(), Some(var.clone()), true),
    ] {
        all_new();
        let mut spec = sparing(&bench, to, path);
        spec.delete = delete;
        bench.restore(&spec).unwrap();
        for file in own.into_iter().chain(["var/cache/later"]) {
            assert_eq!(fs::read(source.join(file)).unwrap(), b"newer", "{file}");
        }
        assert_eq!(var.join("later").exists(), !delete);
        assert_eq!(fs::read(source.join("st/kept")).unwrap(), b"old");
    }
    for (to, path) in [
        (PathBuf::from("/"), None),
        (bench.path(""), Some(source.clone())),
        (source.clone(), Some(source.join("st"))),
    ] {
        let mut spec = sparing(&bench, to, path);
        spec.delete = true;
        let error = bench.restore(&spec).unwrap_err();
        assert!(
            matches!(error, SnapshotError::DeleteReachesContainer { .. }),
            "{error}"
        );
    }
    for file in own {
        let path = source.join(file);
        let spec = sparing(
            &bench,
            path.parent().unwrap().to_owned(),
            Some(path.clone()),
        );
        let error = bench.restore(&spec).unwrap_err();
        assert!(
            matches!(error, SnapshotError::DestinationIsOwn { .. }),
            "{error}"
        );
        assert_eq!(fs::read(path).unwrap(), b"newer");
    }
    // At another place they are ordinary files.
    let mut spec = sparing(&bench, bench.path("place"), None);
    spec.delete = true;
    bench.restore(&spec).unwrap();
    let there = crate::folder::below(&bench.path("place"), &source);
    assert_eq!(fs::read(there.join("st/x.luks.lock.1")).unwrap(), b"old");
}

#[test]
fn sprats_own_files_stay_where_the_snapshot_differs() {
    requires!(sprat_testkit::needs::root());
    for in_the_way in [false, true] {
        let bench = Bench::new();
        let var = bench.source().join("var");
        fs::write(bench.source().join("kept"), "x").unwrap();
        if in_the_way {
            fs::write(&var, "a file").unwrap();
        }
        bench.take();
        if in_the_way {
            fs::remove_file(&var).unwrap();
        }
        fs::create_dir_all(var.join("cache")).unwrap();
        fs::write(var.join("cache/block"), "x").unwrap();
        let mut spec = sparing(&bench, "/".into(), None);
        spec.containers.clear();
        spec.delete = true;
        let restored = bench.restore(&spec);
        assert_eq!(restored.is_err(), in_the_way, "{restored:?}");
        assert!(var.join("cache/block").exists(), "{restored:?}");
    }
}

/// Changes the content of a file, and keeps its size and time.
fn rewrite(path: &std::path::Path, content: &str) {
    let about = fs::metadata(path).unwrap();
    assert_eq!(about.len(), content.len() as u64);
    let file = fs::File::options().write(true).open(path).unwrap();
    std::io::Write::write_all(&mut &file, content.as_bytes()).unwrap();
    file.set_modified(about.modified().unwrap()).unwrap();
}

#[test]
fn a_file_of_equal_size_and_time_is_written_if_its_content_differs() {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir_all(source.join("deep/er")).unwrap();
    for name in ["a", "b", "deep/er/c", "deep/d", "e"] {
        fs::write(source.join(name), "good").unwrap();
    }
    fs::hard_link(source.join("deep/d"), source.join("deep/er/d2")).unwrap();
    set_time(&source.join("deep"), 1_600_000_000, 0).unwrap();
    let name = bench.take().name;
    let untouched = crate::folder::inode(&source.join("a"));
    // Two names of one file in the snapshot. One of them is another file now, the other is right.
    fs::remove_file(source.join("deep/er/d2")).unwrap();
    fs::copy(source.join("deep/d"), source.join("deep/er/d2")).unwrap();
    let time = fs::metadata(source.join("deep/d"))
        .unwrap()
        .modified()
        .unwrap();
    let copy = fs::File::options()
        .write(true)
        .open(source.join("deep/er/d2"))
        .unwrap();
    copy.set_modified(time).unwrap();
    for name in ["b", "deep/er/c", "deep/d"] {
        rewrite(&source.join(name), "evil");
    }
    fs::remove_file(source.join("e")).unwrap();
    set_time(&source.join("deep"), 1_600_000_000, 0).unwrap();

    let mut spec = to("/".into());
    spec.dry_run = true;
    let report = bench.restore(&spec).unwrap();
    let lists = |end: &str| report.changes.names.iter().any(|line| line.ends_with(end));
    assert!(lists("deep/er/c") && lists("source/b") && lists("source/e"));
    assert!(!lists("source/a"), "{:?}", report.changes);
    assert_eq!(fs::read(source.join("b")).unwrap(), b"evil");

    // As for continuing an interrupted restore: existing files count by size and time.
    spec.dry_run = false;
    spec.trust_times = true;
    bench.restore(&spec).unwrap();
    assert_eq!(fs::read(source.join("b")).unwrap(), b"evil");
    spec.verify = true;
    let error = bench.restore(&spec).unwrap_err();
    let SnapshotError::RestoreDiffers { different, .. } = &error else {
        panic!("{error}")
    };
    let names = different.names.join("\n");
    assert!(names.contains("source/b: has other content"), "{names}");

    spec.trust_times = false;
    let report = bench.restore(&spec).unwrap();
    assert_same(&bench.in_snapshot(name), &source);
    assert_eq!(crate::folder::inode(&source.join("a")), untouched);
    assert_eq!(report.verified, Some(6));
    // b, c, and both names of d.
    assert_eq!(report.unequal.count, 4, "{:?}", report.unequal);
    let report = bench.restore(&spec).unwrap();
    assert_eq!((report.same, report.unequal.count), (6, 0));
}

#[test]
fn hard_links_that_the_snapshot_lacks_are_separated() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let source = bench.source();
    for (name, mode) in [("secret", 0o600), ("open", 0o644), ("own", 0o640)] {
        fs::write(source.join(name), "same").unwrap();
        set_time(&source.join(name), 1_600_000_000, 0).unwrap();
        set_mode(&source.join(name), mode).unwrap();
    }
    for (first, second) in [("own", "own too"), ("link", "link too")] {
        if first == "link" {
            symlink("open", source.join(first)).unwrap();
        }
        fs::hard_link(source.join(first), source.join(second)).unwrap();
    }
    let name = bench.take().name;
    // The two become one file, which has a third name outside.
    fs::remove_file(source.join("secret")).unwrap();
    fs::hard_link(source.join("open"), source.join("secret")).unwrap();
    let outside = bench.path("outside");
    fs::hard_link(source.join("own"), &outside).unwrap();
    set_mode(&outside, 0o666).unwrap();
    fs::hard_link(source.join("link"), bench.path("outside link")).unwrap();
    let outside_link = crate::folder::inode(&bench.path("outside link"));

    let report = bench.restore(&to("/".into())).unwrap();
    assert_same(&bench.in_snapshot(name), &source);
    assert_eq!(report.unequal.count, 6, "{:?}", report.unequal);
    // Equal, but written all the same.
    assert_eq!(report.same, 0);
    assert_eq!(fs::metadata(&outside).unwrap().mode() & 0o777, 0o666);
    assert_ne!(crate::folder::inode(&source.join("link")), outside_link);
    // Now nothing is left to do.
    let again = bench.restore(&to("/".into())).unwrap();
    assert_eq!((again.unequal.count, again.stats.transferred), (0, 0));
    assert_eq!(again.same, 4);
}

#[test]
fn a_verification_reports_missing_and_changed_files() {
    let bench = Bench::new();
    let source = bench.source();
    for name in ["a", "b", "c"] {
        fs::write(source.join(name), "good").unwrap();
    }
    symlink("a", source.join("link")).unwrap();
    bench.take();
    let place = bench.path("place");
    let there = crate::folder::below(&place, &source);
    let mut spec = to(place);
    spec.verify = true;
    assert_eq!(bench.restore(&spec).unwrap().verified, Some(3));
    // Another program changes files as soon as rsync has written them.
    let script = bench.path("rsync-script");
    let text = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && exec rsync --version\nrsync \"$@\" || exit\n\
         cd '{}' && rm b && echo longer > c && ln -sfn b link\n",
        there.display()
    );
    fs::write(&script, text).unwrap();
    set_mode(&script, 0o755).unwrap();
    spec.rsync = script;
    let error = bench.restore(&spec).unwrap_err();
    let SnapshotError::RestoreDiffers { different, .. } = &error else {
        panic!("{error}")
    };
    let told = different.names.join("\n");
    for wrong in [
        "b: is missing",
        "c: has another size",
        "link: points to another place",
    ] {
        assert!(told.contains(wrong), "{told}");
    }
    assert_eq!(different.count, 3, "{told}");
}

#[test]
fn nothing_is_written_through_a_link_in_place_of_a_folder() {
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir(source.join("sub")).unwrap();
    fs::write(source.join("a"), "good").unwrap();
    fs::hard_link(source.join("a"), source.join("sub/b")).unwrap();
    let name = bench.take().name;
    rewrite(&source.join("a"), "evil");
    let elsewhere = bench.path("elsewhere");
    fs::rename(source.join("sub"), &elsewhere).unwrap();
    fs::remove_file(elsewhere.join("b")).unwrap();
    symlink(&elsewhere, source.join("sub")).unwrap();
    bench.restore(&to("/".into())).unwrap();
    assert_same(&bench.in_snapshot(name), &source);
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
}
