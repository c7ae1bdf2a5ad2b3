//! The results of runs: unread and vanished source files, a full volume, invalid sources.

mod one_file;

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use crate::folder::{Bench, SmallExt4, inode, job_name, loop_missing, take_into, wait_for};
use sprat_snapshot::{EntryKind, SnapshotError, SnapshotSpec, SpaceKind, Warning};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;
use sprat_testkit::tree::{PlainTree, set_mode, set_owner};

/// rsync as root, but without the right to read everything.
const WITHOUT_READ_CAPABILITY: &str =
    "setpriv --bounding-set=-dac_override,-dac_read_search --inh-caps=-all rsync";

fn setpriv_missing() -> Option<String> {
    sprat_testkit::needs::root().or_else(|| sprat_testkit::needs::program("setpriv"))
}

#[test]
fn unreadable_files_and_folders_give_a_snapshot_that_lists_them() {
    requires!(setpriv_missing());
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("good"), "x").unwrap();
    let good = bench.take();

    fs::write(source.join("secret\nfile"), "x").unwrap();
    fs::create_dir(source.join("closed")).unwrap();
    fs::write(source.join("closed/inside"), "x").unwrap();
    set_mode(&source.join("secret\nfile"), 0).unwrap();
    set_mode(&source.join("closed"), 0).unwrap();
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script("", WITHOUT_READ_CAPABILITY);
    let report = bench.try_take(&spec).unwrap();
    assert!(!report.record.complete);
    assert_eq!(report.record.rsync_exit, Some(23));
    let mut unread = report.record.unread.names.clone();
    unread.sort();
    let path = |name: &str| format!("{}/{name}", source.display());
    assert_eq!(unread, [path("closed"), path("secret\\#012file")]);
    assert_eq!(bench.kinds(), [EntryKind::Complete, EntryKind::Incomplete]);

    // Neither is the only tree to link from. The next run has the files that were missing.
    let next = bench.take();
    assert!(next.record.complete);
    let from: Vec<_> = next
        .record
        .linked_from
        .iter()
        .map(|f| f.folder.clone())
        .collect();
    assert_eq!(from, [report.name.to_string(), good.name.to_string()]);
    assert_same(&source, &bench.in_snapshot(next.name));
}

#[test]
fn folder_in_the_place_of_another_users_link_is_copied() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let source = bench.source();
    fs::create_dir(source.join("real")).unwrap();
    fs::write(source.join("real/file"), "x").unwrap();
    symlink("real", source.join("place")).unwrap();
    set_owner(&source.join("place"), 1000, 1000).unwrap();
    bench.take();

    // rsync 3.5 looks for place/file in the older snapshot, and refuses to follow the link there.
    fs::remove_file(source.join("place")).unwrap();
    fs::create_dir(source.join("place")).unwrap();
    fs::write(source.join("place/file"), "y").unwrap();
    let report = bench.take();
    assert!(report.record.complete);
    assert_same(&source, &bench.in_snapshot(report.name));
}

#[test]
fn the_last_complete_snapshot_is_linked_from_after_incomplete_ones() {
    requires!(setpriv_missing());
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let good = bench.take();
    fs::write(bench.source().join("secret"), "x").unwrap();
    set_mode(&bench.source().join("secret"), 0).unwrap();
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script("", WITHOUT_READ_CAPABILITY);
    for _ in 0..3 {
        bench.try_take(&spec).unwrap();
    }
    let last = bench.try_take(&spec).unwrap();
    assert_eq!(last.record.linked_from.len(), 3);
    assert_eq!(last.record.linked_from[2].folder, good.name.to_string());
}

#[test]
fn a_file_that_vanishes_during_the_run_is_harmless() {
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("aaa"), vec![7; 4 << 20]).unwrap();
    fs::write(source.join("zzz"), "x").unwrap();
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script("", "rsync --bwlimit=4000");
    let volume = bench.volume();
    let run = std::thread::spawn(move || take_into(&volume, &spec));
    let job = bench.job();
    wait_for("rsync's temporary file", || {
        walk_finds(&job, &|name| name.starts_with(".aaa."))
    });
    fs::remove_file(source.join("zzz")).unwrap();
    let report = run.join().unwrap().unwrap();
    assert_eq!(report.record.rsync_exit, Some(24));
    assert_eq!(
        report.record.vanished.names,
        [format!("{}/zzz", source.display())]
    );
    assert!(report.record.complete);
}

#[test]
fn a_run_in_which_a_large_part_vanished_is_incomplete() {
    let bench = Bench::new();
    let source = bench.source();
    fs::write(source.join("aaa"), vec![7; 4 << 20]).unwrap();
    for n in 0..150 {
        fs::write(source.join(format!("z{n}")), "x").unwrap();
    }
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script("", "rsync --bwlimit=4000");
    let volume = bench.volume();
    let run = std::thread::spawn(move || take_into(&volume, &spec));
    let job = bench.job();
    wait_for("rsync's temporary file", || {
        walk_finds(&job, &|name| name.starts_with(".aaa."))
    });
    for n in 0..150 {
        fs::remove_file(source.join(format!("z{n}"))).unwrap();
    }
    let record = run.join().unwrap().unwrap().record;
    assert_eq!((record.rsync_exit, record.vanished.count), (Some(24), 150));
    assert!(!record.complete);
    assert_eq!(record.warnings, [Warning::ManyVanished { files: 150 }]);
    assert_eq!(bench.kinds(), [EntryKind::Incomplete]);
}

#[test]
fn too_large_attributes_make_a_file_incomplete_and_fail_no_run() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &[]);
    // tmpfs can store attributes that don't fit into one block of ext4.
    let source = bench.path("large");
    fs::create_dir(&source).unwrap();
    crate::folder::run("mount", &["-t", "tmpfs", "large", source.to_str().unwrap()]);
    fs::write(source.join("file"), "content").unwrap();
    fs::write(source.join("good"), "x").unwrap();
    for n in 0..3 {
        let name = format!("user.n{n}");
        sprat_testkit::tree::set_xattr(&source.join("file"), &name, &[b'x'; 3000]).unwrap();
    }
    let spec = SnapshotSpec::new(job_name(), vec![source.clone()]);
    let taken = take_into(&disk.at, &spec);
    let again = take_into(&disk.at, &spec);
    crate::folder::run("umount", &[source.to_str().unwrap()]);
    for report in [taken.unwrap(), again.unwrap()] {
        let record = &report.record;
        assert!(!record.complete);
        assert_eq!(record.unread.names, [format!("{}/file", source.display())]);
        assert_eq!(record.warnings, [Warning::AttributesTooLarge { files: 1 }]);
        let tree = disk.at.join("home").join(report.name.to_string());
        let there = crate::folder::below(&tree, &source);
        assert_eq!(fs::read(there.join("file")).unwrap(), b"content");
        assert_eq!(fs::read(there.join("good")).unwrap(), b"x");
    }
}

#[test]
fn a_file_that_does_not_fit_is_reported() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "24M", &[]);
    fs::write(bench.source().join("large"), vec![7; 30 << 20]).unwrap();
    let error = take_into(&disk.at, &bench.spec()).unwrap_err();
    let name = format!("has no space for {}/large (", bench.source().display());
    assert!(error.to_string().contains(&name), "{error}");
}

fn walk_finds(at: &Path, wanted: &dyn Fn(&str) -> bool) -> bool {
    let Ok(entries) = fs::read_dir(at) else {
        return false;
    };
    entries.filter_map(Result::ok).any(|entry| {
        wanted(&entry.file_name().to_string_lossy())
            || entry.file_type().is_ok_and(|t| t.is_dir()) && walk_finds(&entry.path(), wanted)
    })
}

#[test]
fn a_full_volume_ends_the_run_and_harms_nothing_older() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "24M", &["-O", "^has_journal"]);
    fs::write(bench.source().join("small"), "x").unwrap();
    let old = take_into(&disk.at, &bench.spec()).unwrap();
    let tree = PlainTree {
        files: 40,
        bytes: 40 << 20,
        files_per_folder: 10,
        seed: 6,
    };
    tree.make(&bench.source()).unwrap();
    let error = take_into(&disk.at, &bench.spec()).unwrap_err();
    let SnapshotError::VolumeFull { kind, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*kind, SpaceKind::Blocks);
    let kinds: Vec<_> = sprat_snapshot::list(&disk.at)
        .unwrap()
        .iter()
        .map(|e| e.kind)
        .collect();
    assert_eq!(kinds, [EntryKind::Complete, EntryKind::Partial]);
    // With less to store the next run succeeds, and uses what was copied.
    for n in 10..40 {
        fs::remove_file(bench.source().join(tree.file(n))).unwrap();
    }
    let new = take_into(&disk.at, &bench.spec()).unwrap();
    let job = disk.at.join("home");
    assert_same(
        &bench.source(),
        &crate::folder::below(&job.join(new.name.to_string()), &bench.source()),
    );
    let small =
        crate::folder::below(&job.join(old.name.to_string()), &bench.source()).join("small");
    assert_eq!(fs::read(small).unwrap(), b"x");
}

#[test]
fn a_volume_without_inodes_is_reported() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "32M", &["-N", "100"]);
    let tree = PlainTree {
        files: 300,
        bytes: 3000,
        files_per_folder: 50,
        seed: 6,
    };
    tree.make(&bench.source()).unwrap();
    let error = take_into(&disk.at, &bench.spec()).unwrap_err();
    let SnapshotError::VolumeFull {
        kind, free_inodes, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!((*kind, *free_inodes), (SpaceKind::Inodes, 0));

    // The next run has no inode for its own folder.
    let error = take_into(&disk.at, &bench.spec()).unwrap_err();
    assert!(
        matches!(
            error,
            SnapshotError::VolumeFull {
                kind: SpaceKind::Inodes,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_file_with_too_many_links_is_copied_instead() {
    requires!(loop_missing());
    let bench = Bench::new();
    let disk = SmallExt4::new(&bench, "64M", &[]);
    fs::write(bench.source().join("file"), "content").unwrap();
    let first = take_into(&disk.at, &bench.spec()).unwrap();
    let file = |name: &dyn std::fmt::Display| {
        let job = disk.at.join("home").join(name.to_string());
        crate::folder::below(&job, &bench.source()).join("file")
    };
    let kept = file(&first.name);
    let names = disk.at.join("names");
    fs::create_dir(&names).unwrap();
    // ext4 allows 65,000 (EXT4_LINK_MAX).
    for n in fs::metadata(&kept).unwrap().nlink()..65_000 {
        fs::hard_link(&kept, names.join(n.to_string())).unwrap();
    }
    let second = take_into(&disk.at, &bench.spec()).unwrap();
    assert!(second.record.complete, "{:?}", second.record.messages);
    assert_ne!(inode(&file(&second.name)), inode(&kept));
    assert_eq!(fs::read(file(&second.name)).unwrap(), b"content");
    // From then on the copy is linked.
    let third = take_into(&disk.at, &bench.spec()).unwrap();
    assert_eq!(inode(&file(&third.name)), inode(&file(&second.name)));
}

#[test]
fn invalid_sources_are_refused_before_anything_is_written() {
    let bench = Bench::new();
    let source = bench.source();
    let refused = |change: &dyn Fn(&mut SnapshotSpec)| {
        let mut spec = bench.spec();
        change(&mut spec);
        let error = bench.try_take(&spec).unwrap_err();
        assert!(!bench.job().exists(), "{error}");
        error
    };
    assert!(matches!(
        refused(&|_| {}),
        SnapshotError::SourceEmpty { .. }
    ));
    fs::create_dir_all(source.join("only/folders")).unwrap();
    assert!(matches!(
        refused(&|_| {}),
        SnapshotError::SourceEmpty { .. }
    ));
    fs::write(source.join("file"), "x").unwrap();
    fs::write(bench.volume().join("file"), "x").unwrap();
    symlink("source", bench.path("link")).unwrap();
    type Case<'a> = &'a dyn Fn(&mut SnapshotSpec);
    let cases: [(Case<'_>, &str); 9] = [
        (&|s| s.sources.clear(), "no sources"),
        (&|s| s.sources = vec!["relative".into()], "absolute"),
        (&|s| s.sources = vec!["/tmp/../etc".into()], "'..'"),
        (
            &|s| s.sources = vec!["/no/such/place".into()],
            "no such file",
        ),
        (
            &|s| s.sources = vec![bench.path("link")],
            "symbolic link to source",
        ),
        (&|s| s.sources.push(bench.volume()), "is in the volume"),
        (&|s| s.excludes.push("!".into()), "clear the list"),
        (
            &|s| s.exclude_from.push("/no/such/file".into()),
            "/no/such/file",
        ),
        (&|s| s.rsync = "/no/such/rsync".into(), "not found"),
    ];
    for (change, text) in cases {
        let error = refused(change);
        assert!(error.to_string().contains(text), "{error}");
    }
    let mut spec = bench.spec();
    fs::remove_file(source.join("file")).unwrap();
    spec.allow_empty = true;
    let report = bench.try_take(&spec).unwrap();
    assert_same(&source, &bench.in_snapshot(report.name));
}

#[test]
fn an_excluded_or_vanished_source_makes_no_snapshot() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let mut spec = bench.spec();
    spec.excludes = vec!["source".into()];
    let error = bench.try_take(&spec).unwrap_err();
    assert!(
        error.to_string().contains("patterns exclude all of it"),
        "{error}"
    );

    let mut spec = bench.spec();
    let source = bench.source().display().to_string();
    spec.rsync = bench.rsync_script(
        &format!("mv {source} {source}.away; mkdir {source}"),
        "rsync",
    );
    let error = bench.try_take(&spec).unwrap_err();
    assert!(
        matches!(error, SnapshotError::SourceChanged { .. }),
        "{error}"
    );
    assert!(!bench.kinds().contains(&EntryKind::Complete));
}

#[test]
fn patterns_work_as_in_rsync() {
    let bench = Bench::new();
    for name in ["keep", "a.tmp", "cache", "from-file"] {
        fs::write(bench.source().join(name), "x").unwrap();
    }
    fs::write(bench.path("patterns"), "# comment\nfrom-file\n").unwrap();
    let mut spec = bench.spec();
    spec.excludes = vec![
        "*.tmp".into(),
        format!("{}/cache", bench.source().display()),
    ];
    spec.exclude_from = vec![bench.path("patterns")];
    let report = bench.try_take(&spec).unwrap();
    let names: Vec<_> = fs::read_dir(bench.in_snapshot(report.name))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(names, ["keep"]);
}

#[test]
fn a_volume_inside_the_source_is_excluded_whatever_the_patterns() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    fs::write(bench.path("never"), "x").unwrap();
    let mut spec = SnapshotSpec::new(job_name(), vec![bench.path("")]);
    spec.exclude_from = vec![bench.path("patterns")];
    spec.never_enter = vec![bench.path("never")];
    // A line that clears the list would clear sprat's own patterns.
    for clears in ["!\n", "!\n+ *\n", "# all\r\n!\r\n+ *\r\n", "a\n!"] {
        fs::write(bench.path("patterns"), clears).unwrap();
        let refused = bench.try_take(&spec).unwrap_err().to_string();
        assert!(refused.contains("would clear the list"), "{refused}");
        assert_eq!(sprat_snapshot::mistakes(&spec).len(), 1);
    }
    assert!(bench.kinds().is_empty());
    fs::write(bench.path("patterns"), "+ *\n! \n!x\n").unwrap();
    assert!(sprat_snapshot::mistakes(&spec).is_empty());
    let report = bench.try_take(&spec).unwrap();
    let tree = crate::folder::below(&bench.job().join(report.name.to_string()), &bench.path(""));
    assert!(tree.join("source/file").exists());
    assert!(!tree.join("volume").exists());
    assert!(!tree.join("never").exists());
    let left_out = Warning::OwnVolumeLeftOut {
        path: bench.volume().display().to_string(),
    };
    assert_eq!(report.record.warnings, [left_out]);
}

#[test]
fn the_root_folder_is_backed_up_without_kernel_file_systems() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let mut spec = SnapshotSpec::new(job_name(), vec!["/".into()]);
    // Only the path to the source, and the mount points themselves.
    let source = bench.source();
    let mut ways: Vec<String> = source
        .ancestors()
        .filter(|a| a.parent().is_some())
        .map(|a| format!("+ {}", a.display()))
        .collect();
    ways.reverse();
    spec.excludes = ways;
    spec.excludes.push(format!("+ {}/**", source.display()));
    spec.excludes.push("+ /proc".into());
    spec.excludes.push("- *".into());
    let report = bench.try_take(&spec).unwrap();
    assert_same(&source, &bench.in_snapshot(report.name));
    let proc = bench.job().join(report.name.to_string()).join("proc");
    assert_eq!(fs::read_dir(proc).unwrap().count(), 0);
    let out = Warning::KernelFileSystemLeftOut {
        path: "/proc".into(),
    };
    assert!(report.record.warnings.contains(&out));
}

#[test]
fn a_folder_that_vanishes_during_the_run_makes_it_incomplete() {
    let bench = Bench::new();
    let source = bench.source();
    // rsync prints one line for a folder that it was about to read, and one for each file of a folder
    // that it had read before.
    for (gone, vanished) in [
        ("z", "directory has vanished: \\\"SOURCE/z\\\""),
        ("z", "file has vanished: \\\"SOURCE/z/1\\\""),
    ] {
        fs::create_dir_all(source.join(gone)).unwrap();
        fs::write(source.join("z/1"), "x").unwrap();
        fs::write(source.join("file"), "x").unwrap();
        let text = vanished.replace("SOURCE", source.to_str().unwrap());
        let after = format!(
            "rsync \"$@\"; rm -r '{}'; echo \"{text}\" >&2; exit 24",
            source.join(gone).display()
        );
        let mut spec = bench.spec();
        spec.rsync = bench.rsync_script(&after, "rsync");
        let report = bench.try_take(&spec).unwrap();
        assert!(!report.record.complete, "{vanished}");
        assert_eq!(
            report.record.unread.names,
            [source.join(gone).display().to_string()]
        );
        assert!(
            report
                .record
                .warnings
                .contains(&Warning::FoldersVanished { folders: 1 })
        );
    }
}

#[test]
fn a_clock_that_was_set_back_copies_nothing_again() {
    let bench = Bench::new();
    let at = |days: i64| {
        let now = crate::folder::now() - jiff::SignedDuration::from_hours(24 * days);
        let cancel = sprat_snapshot::Cancel::new();
        sprat_snapshot::take(&bench.volume(), &bench.spec(), now, &mut |_| {}, &cancel).unwrap()
    };
    fs::write(bench.source().join("old"), "x").unwrap();
    at(30);
    at(29);
    at(28);
    fs::write(bench.source().join("new"), "x").unwrap();
    assert_eq!(at(0).record.stats.transferred, 1);
    assert_eq!(at(10).record.stats.transferred, 0);
}

#[test]
fn an_excluded_source_is_reported_even_with_unread_files() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "x").unwrap();
    let other = bench.path("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("file"), "x").unwrap();
    let mut spec = bench.spec();
    spec.sources.push(other);
    spec.excludes = vec!["other".into()];
    let line = "rsync: [sender] send_files failed to open \\\"/x\\\": Permission denied (13)";
    spec.rsync = bench.rsync_script(&format!("echo \"{line}\" >&2"), "rsync");
    let error = bench.try_take(&spec).unwrap_err();
    assert!(
        matches!(error, SnapshotError::SourceRefused { .. }),
        "{error}"
    );
}

#[test]
fn an_rsync_that_copies_what_did_not_change_is_reported() {
    let bench = Bench::new();
    for n in 0..20 {
        fs::write(bench.source().join(format!("file {n}")), "unchanged").unwrap();
    }
    let reported = |report: &sprat_snapshot::SnapshotReport| {
        report
            .record
            .warnings
            .iter()
            .find_map(|warning| match warning {
                Warning::UnchangedCopied { files } => Some(*files),
                _ => None,
            })
    };
    assert_eq!(reported(&bench.take()), None);
    assert_eq!(reported(&bench.take()), None);
    // Like the back-ports of 2026.
    let without =
        "for a do shift; case $a in --link-dest=*) ;; *) set -- \"$@\" \"$a\";; esac; done";
    let mut spec = bench.spec();
    spec.rsync = bench.rsync_script(without, "rsync");
    let report = bench.try_take(&spec).unwrap();
    assert_eq!(reported(&report), Some(20));
    assert!(report.record.complete);
    // Changed files don't count.
    for n in 0..20 {
        fs::write(bench.source().join(format!("file {n}")), "changed!!").unwrap();
    }
    assert_eq!(reported(&bench.take()), None);
}

#[test]
fn a_file_with_long_holes_is_reported() {
    let bench = Bench::new();
    let file = fs::File::create(bench.source().join("lastlog")).unwrap();
    // rsync reads all of it. A shorter one gets no warning.
    file.set_len(9 << 30).unwrap();
    fs::File::create(bench.source().join("short"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let report = bench.take();
    let named = Warning::HolesRead {
        path: bench.source().join("lastlog").display().to_string(),
        bytes: 9 << 30,
        data_bytes: 0,
    };
    assert_eq!(report.record.warnings, [named]);
}
