//! Restores of several paths, over files that are there, and to owners by name.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use crate::folder::{Bench, below, job_name};
use sprat_snapshot::{Existing, RestoreReport, RestoreSpec, SnapshotChoice, SnapshotError};
use sprat_testkit::compare::assert_same;
use sprat_testkit::tree::{set_owner, set_time};
use sprat_testkit::{needs, requires};

const DAY: i64 = 86_400;
const LONG_AGO: i64 = 1_600_000_000;

#[test]
fn many_paths_are_restored_with_their_folders_and_links() {
    let bench = Bench::new();
    for number in 0..150 {
        let folder = bench.source().join(format!("folder{number}"));
        fs::create_dir_all(folder.join("inner")).unwrap();
        fs::write(folder.join("inner/file"), number.to_string()).unwrap();
        fs::write(folder.join("beside"), "x").unwrap();
    }
    fs::hard_link(
        bench.source().join("folder1/beside"),
        bench.source().join("folder2/link"),
    )
    .unwrap();
    bench.take();
    let mut spec = RestoreSpec::new(job_name(), bench.path("place"));
    let path = |name: String| bench.source().join(name);
    spec.paths = (0..150)
        .map(|number| path(format!("folder{number}/inner")))
        .collect();
    // The one is in the other.
    spec.paths
        .extend(["folder1/beside", "folder2", "folder2/link"].map(|name| path(name.to_owned())));
    bench.restore(&spec).unwrap();
    let place = below(&bench.path("place"), &bench.source());
    for number in 0..150 {
        let folder = format!("folder{number}");
        assert_same(
            &bench.source().join(&folder).join("inner"),
            &place.join(&folder).join("inner"),
        );
        assert_eq!(
            place.join(&folder).join("beside").exists(),
            number == 1 || number == 2
        );
    }
    let inode = |name: &str| fs::metadata(place.join(name)).unwrap().ino();
    assert_eq!(inode("folder1/beside"), inode("folder2/link"));
    spec.paths = vec![path("folder3".to_owned()), path("none".to_owned())];
    assert!(matches!(
        bench.restore(&spec),
        Err(SnapshotError::NoSuchPath { .. })
    ));
}

/// A snapshot, and a folder in which each file has another state.
fn changed() -> (Bench, PathBuf) {
    let bench = Bench::new();
    for name in ["same", "older here", "newer here", "missing here"] {
        fs::write(bench.source().join(name), "of the snapshot").unwrap();
        set_time(&bench.source().join(name), LONG_AGO, 0).unwrap();
    }
    bench.take();
    let place = bench.path("place");
    bench
        .restore(&RestoreSpec::new(job_name(), place.clone()))
        .unwrap();
    let inside = below(&place, &bench.source());
    fs::remove_file(inside.join("missing here")).unwrap();
    for (name, seconds) in [("older here", -DAY), ("newer here", DAY)] {
        fs::write(inside.join(name), "of this machine").unwrap();
        set_time(&inside.join(name), LONG_AGO + seconds, 0).unwrap();
    }
    (bench, inside)
}

fn restored(bench: &Bench, existing: Existing, dry_run: bool) -> RestoreReport {
    let mut spec = RestoreSpec::new(job_name(), bench.path("place"));
    spec.existing = existing;
    spec.dry_run = dry_run;
    bench.restore(&spec).unwrap()
}

#[test]
fn files_that_are_there_are_overwritten_or_kept_and_a_dry_run_counts_them() {
    for (existing, kept, counts) in [
        (Existing::Overwrite, &[][..], (1, 2, Some(1))),
        (Existing::KeepNewer, &["newer here"][..], (1, 1, Some(1))),
        (
            Existing::Keep,
            &["newer here", "older here"][..],
            (1, 0, None),
        ),
    ] {
        let (bench, inside) = changed();
        let planned = restored(&bench, existing, true).planned.unwrap();
        assert_eq!(
            (planned.new, planned.replaced, planned.newer_here),
            counts,
            "{existing:?}"
        );
        assert_eq!(planned.deleted, 0);
        assert!(!inside.join("missing here").exists());
        assert!(restored(&bench, existing, false).planned.is_none());
        for name in ["same", "older here", "newer here", "missing here"] {
            let expected = match kept.contains(&name) {
                true => "of this machine",
                false => "of the snapshot",
            };
            let content = fs::read_to_string(inside.join(name)).unwrap();
            assert_eq!(content, expected, "{name} {existing:?}");
        }
    }
}

/// rsync's own `--update` heeds the times of regular files alone, and relinks their other names.
#[test]
fn whatever_is_newer_here_is_kept_also_links_and_what_is_of_another_kind() {
    let newer = ["second", "link", "was link", "was folder", "was file"];
    for existing in [Existing::KeepNewer, Existing::Keep] {
        let bench = Bench::new();
        let source = bench.source();
        for name in ["first", "was file", "equal"] {
            fs::write(source.join(name), "of the snapshot").unwrap();
            set_time(&source.join(name), LONG_AGO, 0).unwrap();
        }
        fs::create_dir(source.join("was folder")).unwrap();
        fs::write(source.join("was folder/in"), "of the snapshot").unwrap();
        fs::create_dir(source.join("elsewhere")).unwrap();
        fs::write(source.join("elsewhere/in"), "of the snapshot").unwrap();
        for name in ["was folder", "elsewhere"] {
            set_time(&source.join(name), LONG_AGO, 0).unwrap();
        }
        for (link, to) in [("second", "first"), ("equal two", "equal")] {
            fs::hard_link(source.join(to), source.join(link)).unwrap();
        }
        for name in ["link", "was link"] {
            symlink("of the snapshot", source.join(name)).unwrap();
        }
        bench.take();
        let place = bench.path("place");
        let spec = RestoreSpec::new(job_name(), place.clone());
        bench.restore(&spec).unwrap();
        let inside = below(&place, &source);
        fs::remove_dir_all(inside.join("was folder")).unwrap();
        for name in [
            "first",
            "equal",
            "equal two",
            "second",
            "link",
            "was link",
            "was file",
        ] {
            fs::remove_file(inside.join(name)).unwrap();
        }
        // "first" is restored, and "second" is another name of it in the snapshot.
        // Nothing may be written through a link.
        fs::remove_dir_all(inside.join("elsewhere")).unwrap();
        fs::create_dir(bench.path("outside")).unwrap();
        symlink(bench.path("outside"), inside.join("elsewhere")).unwrap();
        for name in ["second", "was link", "was folder", "equal two"] {
            fs::write(inside.join(name), "of this machine").unwrap();
        }
        for name in ["link", "was file"] {
            symlink("of this machine", inside.join(name)).unwrap();
        }
        // Of equal size and time, but damaged: it is written again with its names, but for newer ones.
        fs::write(inside.join("equal"), "damaged in here").unwrap();
        set_time(&inside.join("equal"), LONG_AGO, 0).unwrap();
        if existing == Existing::KeepNewer {
            assert_eq!(
                restored(&bench, existing, true).planned.unwrap().newer_here,
                Some(7)
            );
        }
        let report = restored(&bench, existing, false);
        assert!(report.left_out.is_empty());
        let names: Vec<_> = report
            .kept_in_place
            .iter()
            .map(|path| path.rsplit('/').next().unwrap())
            .collect();
        assert_eq!(names, ["elsewhere", "was folder"]);
        assert_eq!(fs::read_dir(bench.path("outside")).unwrap().count(), 0);
        for name in newer.iter().chain(&["equal two"]) {
            let path = inside.join(name);
            let content = fs::read_link(&path).map_or_else(
                |_| fs::read_to_string(&path).unwrap(),
                |target| target.to_string_lossy().into_owned(),
            );
            assert_eq!(content, "of this machine", "{name} {existing:?}");
        }
        let read = |name: &str| fs::read_to_string(inside.join(name)).unwrap();
        assert_eq!(read("first"), "of the snapshot");
        assert_eq!(
            read("equal") == "of the snapshot",
            existing == Existing::KeepNewer
        );
    }
}

#[test]
fn file_that_is_newer_by_less_than_two_seconds_is_kept() {
    let bench = Bench::new();
    let newer = [(0, 1), (0, 999_999_999), (1, 0), (1, 999_999_999), (2, 0)];
    for number in 0..=newer.len() {
        let file = bench.source().join(number.to_string());
        fs::write(&file, "of the snapshot").unwrap();
        set_time(&file, LONG_AGO, 0).unwrap();
    }
    bench.take();
    let place = bench.path("place");
    bench
        .restore(&RestoreSpec::new(job_name(), place.clone()))
        .unwrap();
    let inside = below(&place, &bench.source());
    let same_time = [(0, 0)];
    for (number, (seconds, nanoseconds)) in newer.iter().chain(&same_time).enumerate() {
        let file = inside.join(number.to_string());
        fs::write(&file, "of this machine").unwrap();
        set_time(&file, LONG_AGO + seconds, *nanoseconds).unwrap();
    }
    for existing in [Existing::Overwrite, Existing::KeepNewer] {
        let planned = restored(&bench, existing, true).planned.unwrap();
        assert_eq!(planned.newer_here, Some(5), "{existing:?}");
    }
    restored(&bench, Existing::KeepNewer, false);
    let content = |number: usize| fs::read_to_string(inside.join(number.to_string())).unwrap();
    for (number, by) in newer.iter().enumerate() {
        assert_eq!(content(number), "of this machine", "{by:?}");
    }
    assert_eq!(content(newer.len()), "of the snapshot");
}

/// Too many for arguments, and of odd names.
#[test]
fn many_links_that_are_newer_here_are_kept() {
    let bench = Bench::new();
    let names: Vec<String> = (0..150).map(|number| format!("#{number}\n* ")).collect();
    for name in &names {
        symlink("old", bench.source().join(name)).unwrap();
    }
    fs::write(bench.source().join("file"), "content").unwrap();
    bench.take();
    let place = bench.path("place");
    bench
        .restore(&RestoreSpec::new(job_name(), place.clone()))
        .unwrap();
    let place = below(&place, &bench.source());
    for name in &names {
        fs::remove_file(place.join(name)).unwrap();
        symlink("new", place.join(name)).unwrap();
    }
    fs::remove_file(place.join("file")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let report = restored(&bench, Existing::KeepNewer, false);
    for name in &names {
        let link = fs::read_link(place.join(name)).unwrap();
        assert_eq!(link, Path::new("new"), "{name:?}: {report:?}");
    }
    assert!(place.join("file").exists());
}

#[test]
fn file_of_equal_size_and_time_is_kept_only_if_all_are() {
    for (existing, kept) in [
        (Existing::Overwrite, false),
        (Existing::KeepNewer, false),
        (Existing::Keep, true),
    ] {
        let (bench, inside) = changed();
        fs::write(inside.join("same"), "OF THE SNAPSHOT").unwrap();
        set_time(&inside.join("same"), LONG_AGO, 0).unwrap();
        let replaced = restored(&bench, existing, true).planned.unwrap().replaced;
        assert_eq!(
            replaced,
            match existing {
                Existing::Overwrite => 3,
                Existing::KeepNewer => 2,
                Existing::Keep => 0,
            }
        );
        restored(&bench, existing, false);
        let content = fs::read_to_string(inside.join("same")).unwrap();
        assert_eq!(content == "OF THE SNAPSHOT", kept, "{existing:?}");
    }
}

#[test]
fn owners_follow_their_names() {
    requires!(needs::root());
    let name = "2026-01-01T00-00-00Z";
    let bench = Bench::new();
    let tree = bench.job().join(name);
    fs::create_dir_all(tree.join("etc")).unwrap();
    fs::create_dir_all(tree.join("srv")).unwrap();
    fs::write(tree.join("srv/file"), "x").unwrap();
    set_owner(&tree.join("srv/file"), 4000, 4001).unwrap();
    fs::write(tree.join("srv/unknown"), "x").unwrap();
    set_owner(&tree.join("srv/unknown"), 4002, 4003).unwrap();
    let owner = |path: &Path| {
        let about = fs::metadata(path).unwrap();
        (about.uid(), about.gid())
    };
    let mut spec = RestoreSpec::new(job_name(), bench.path("place"));
    spec.snapshot = SnapshotChoice::Named(name.to_owned());
    spec.path = Some("/srv".into());
    spec.owner_by_name = true;
    // It has no names.
    assert!(bench.restore(&spec).is_err());
    fs::write(
        tree.join("etc/passwd"),
        "daemon:x:4000:4001::/:/bin/sh\nnobody-here:x:4002:1::/:/\n",
    )
    .unwrap();
    fs::write(tree.join("etc/group"), "daemon:x:4001:\n").unwrap();
    bench.restore(&spec).unwrap();
    let daemon = fs::read_to_string("/etc/passwd").unwrap();
    let daemon = daemon
        .lines()
        .find(|line| line.starts_with("daemon:"))
        .unwrap();
    let mut numbers = daemon
        .split(':')
        .skip(2)
        .map(|number| number.parse().unwrap());
    let (user, group) = (numbers.next().unwrap(), numbers.next().unwrap());
    assert_eq!(owner(&bench.path("place/srv/file")), (user, group));
    assert_eq!(owner(&bench.path("place/srv/unknown")), (4002, 4003));
    spec.owner_by_name = false;
    bench.restore(&spec).unwrap();
    assert_eq!(owner(&bench.path("place/srv/file")), (4000, 4001));
}
