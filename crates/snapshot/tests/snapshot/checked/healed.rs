//! The next backup heals what a check found, and the last right content is kept.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sprat_snapshot::{Cancel, CheckWhat, KeepCount, KeepReason, KeepRules, PruneSpec, Warning};
use sprat_testkit::compare::assert_same;
use sprat_testkit::requires;

use super::{against_source, next_second, read_all, rewrite, spec, try_check};
use crate::folder::{Bench, job_name};

/// A job on its own volume. Its source has one file, which a check has read.
fn checked_once(bench: &Bench) -> (String, PathBuf) {
    for (name, content) in [("file", b"alpha"), ("other", b"other")] {
        let path = bench.source().join(name);
        fs::write(&path, content).unwrap();
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(hour_ago).unwrap();
    }
    next_second();
    let first = bench.take().name.to_string();
    assert!(!read_all(bench).is_damaged());
    let kept = bench.in_snapshot(&first).join("file");
    (first, kept)
}

fn with_suspects(bench: &Bench) -> sprat_snapshot::SnapshotSpec {
    let mut spec = bench.spec();
    spec.suspects = Some(bench.path("suspects.json"));
    spec
}

fn prune_to(bench: &Bench, last: u32) -> sprat_snapshot::PruneReport {
    let rules = KeepRules {
        last: KeepCount::new(last),
        ..KeepRules::default()
    };
    let mut spec = PruneSpec::new(job_name(), rules);
    spec.suspects = Some(bench.path("suspects.json"));
    sprat_snapshot::prune(&bench.volume(), &spec, &mut |_| {}, &Cancel::new()).unwrap()
}

#[test]
fn the_next_backup_reads_damaged_files_from_the_source() {
    use std::os::unix::fs::PermissionsExt;
    for only_damaged in [true, false] {
        let bench = Bench::new();
        let (_, kept) = checked_once(&bench);
        rewrite(&kept, b"noise");
        assert_eq!(read_all(&bench).damaged.count, 1);
        if !only_damaged {
            let mode = fs::Permissions::from_mode(0o600);
            fs::set_permissions(bench.source().join("file"), mode).unwrap();
        }
        let second = bench.try_take(&with_suspects(&bench)).unwrap();
        assert!(second.record.complete);
        let in_second = bench.in_snapshot(second.name);
        assert_same(&bench.source(), &in_second);
        let named = escaped(&bench.source().join("file"));
        assert_eq!(second.record.healed.names, [named]);
        assert!(
            second
                .record
                .warnings
                .contains(&Warning::DamageHealed { files: 1 })
        );
        // The older snapshot is unchanged, and its file is still known as damaged.
        assert_eq!(fs::read(&kept).unwrap(), b"noise");
        assert_eq!(read_all(&bench).damaged.count, 1);
        // The third one links to the right file, and reports nothing.
        let third = bench.try_take(&with_suspects(&bench)).unwrap();
        let in_third = bench.in_snapshot(third.name);
        assert_eq!(
            crate::folder::inode(&in_third.join("file")),
            crate::folder::inode(&in_second.join("file"))
        );
        assert!(third.record.healed.is_empty(), "{:?}", third.record);
        // Three runs in two seconds: the newest name is ahead of the clock.
        let mut warnings = third.record.warnings.iter();
        assert!(
            warnings.all(|warning| matches!(warning, Warning::ClockBehind { .. })),
            "{:?}",
            third.record
        );
        // When the damaged file is gone, it is no longer listed.
        prune_to(&bench, 1);
        assert!(!read_all(&bench).is_damaged());
        assert!(!bench.path("suspects.json").exists());
    }
}

fn escaped(path: &Path) -> String {
    sprat_snapshot::escape_name(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))
}

#[test]
fn every_name_of_a_damaged_file_is_healed() {
    let bench = Bench::new();
    let (_, kept) = checked_once(&bench);
    let (one, two) = (bench.source().join("file"), bench.source().join("sub/two"));
    fs::create_dir(bench.source().join("sub")).unwrap();
    fs::hard_link(&one, &two).unwrap();
    let second = bench.take();
    assert_eq!(
        crate::folder::inode(&bench.in_snapshot(second.name).join("sub/two")),
        crate::folder::inode(&kept)
    );
    assert!(!read_all(&bench).is_damaged());
    rewrite(&kept, b"noise");
    assert_eq!(read_all(&bench).damaged.count, 1);
    let third = bench.try_take(&with_suspects(&bench)).unwrap();
    let tree = bench.in_snapshot(third.name);
    assert_same(&bench.source(), &tree);
    assert_eq!(
        crate::folder::inode(&tree.join("file")),
        crate::folder::inode(&tree.join("sub/two"))
    );
    assert_eq!(third.record.healed.count, 2);
}

#[test]
fn a_change_that_backups_missed_is_copied_after_a_comparison_with_the_source() {
    let bench = Bench::new();
    checked_once(&bench);
    next_second();
    rewrite(&bench.source().join("file"), b"omega");
    let report = against_source(&bench);
    assert_eq!((report.missed.count, report.damaged.count), (1, 0));
    let second = bench.try_take(&with_suspects(&bench)).unwrap();
    assert_same(&bench.source(), &bench.in_snapshot(second.name));
    assert!(
        second
            .record
            .warnings
            .contains(&Warning::MissedChangeCopied { files: 1 })
    );
    let report = against_source(&bench);
    assert!(report.missed.is_empty(), "{report:?}");
}

#[test]
fn checksum_finds_changes_with_equal_size_and_time() {
    let bench = Bench::new();
    let (_, kept) = checked_once(&bench);
    rewrite(&kept, b"noise");
    rewrite(&bench.source().join("other"), b"OTHER");
    let plain = bench.take();
    assert_eq!(
        fs::read(bench.in_snapshot(plain.name).join("file")).unwrap(),
        b"noise"
    );
    let mut spec = bench.spec();
    spec.checksum = true;
    let second = bench.try_take(&spec).unwrap();
    assert!(second.record.complete);
    assert_same(&bench.source(), &bench.in_snapshot(second.name));
    assert_eq!(second.record.stats.transferred, 2);
    let third = bench.try_take(&spec).unwrap();
    assert_eq!(third.record.stats.transferred, 0);
}

#[test]
fn prune_keeps_the_last_right_content_of_a_damaged_file() {
    let bench = Bench::new();
    let (first, _) = checked_once(&bench);
    // Another inode with the same version of the content: its mode changed.
    use std::os::unix::fs::PermissionsExt;
    let file = bench.source().join("file");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let second = bench.take();
    assert!(!read_all(&bench).is_damaged());
    rewrite(&bench.in_snapshot(second.name).join("file"), b"noise");
    assert_eq!(read_all(&bench).damaged.count, 1);
    let report = prune_to(&bench, 1);
    let why = |name: &str| {
        let of = |one: &&sprat_snapshot::Pruned| one.decision.name.to_string() == name;
        report
            .snapshots
            .iter()
            .find(of)
            .unwrap()
            .decision
            .keep
            .clone()
    };
    assert_eq!(why(&first), [KeepReason::RightContent]);
    // The next backup heals it. Then the older snapshots may be removed.
    bench.try_take(&with_suspects(&bench)).unwrap();
    prune_to(&bench, 1);
    assert!(!read_all(&bench).is_damaged());
    assert_eq!(bench.list().len(), 1);
}

#[test]
fn damage_in_a_random_file_and_block_is_healed_every_time() {
    let rounds: u64 = std::env::var("SPRAT_TORTURE_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(5);
    let mut dice = sprat_testkit::dice::Dice::new(9);
    let bench = Bench::new();
    for number in 0..20u64 {
        let content: Vec<u8> = (0..10_000 + number * 977)
            .map(|_| u8::try_from(dice.below(256)).unwrap())
            .collect();
        fs::write(bench.source().join(format!("{number}")), content).unwrap();
    }
    next_second();
    let mut newest = bench.take();
    for round in 0..rounds {
        assert!(!read_all(&bench).is_damaged(), "round {round}");
        let kept = bench
            .in_snapshot(newest.name)
            .join(format!("{}", dice.below(20)));
        let mut content = fs::read(&kept).unwrap();
        let block = usize::try_from(dice.below(content.len() as u64)).unwrap() / 4096 * 4096;
        let end = content.len().min(block + 4096);
        content[block..end]
            .iter_mut()
            .for_each(|byte| *byte ^= 0x55);
        rewrite(&kept, &content);
        assert_eq!(read_all(&bench).damaged.count, 1, "round {round}");
        newest = bench.try_take(&with_suspects(&bench)).unwrap();
        assert_same(&bench.source(), &bench.in_snapshot(newest.name));
        prune_to(&bench, 1);
    }
}

/// The file in each snapshot that has it, by inode.
fn inodes_of(bench: &Bench, file: &str) -> BTreeMap<u64, PathBuf> {
    let entries = bench.list();
    let trees = entries.iter().map(|entry| bench.in_snapshot(&entry.folder));
    trees
        .map(|tree| tree.join(file))
        .map(|path| (fs::metadata(&path).unwrap().ino(), path))
        .collect()
}

#[test]
fn prune_before_the_heal_never_removes_the_last_right_content() {
    const FILES: [&str; 3] = ["a", "b", "c"];
    let rounds: u64 = std::env::var("SPRAT_TORTURE_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(4);
    let mut dice = sprat_testkit::dice::Dice::new(11);
    for round in 0..rounds {
        let bench = Bench::new();
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        for name in FILES {
            let path = bench.source().join(name);
            fs::write(&path, vec![b'x'; 9000]).unwrap();
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(hour_ago).unwrap();
        }
        next_second();
        for _ in 0..2 + dice.below(4) {
            bench.take();
            // Another inode with the same version in the next snapshot.
            let name = FILES[usize::try_from(dice.below(3)).unwrap()];
            let mode = 0o400 + u32::try_from(dice.below(0o400)).unwrap();
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            fs::set_permissions(bench.source().join(name), permissions).unwrap();
        }
        assert!(!read_all(&bench).is_damaged(), "round {round}");
        let mut damaged = BTreeSet::new();
        for name in FILES {
            for (inode, path) in inodes_of(&bench, name) {
                if dice.percent(50) {
                    let mut content = fs::read(&path).unwrap();
                    let at = usize::try_from(dice.below(9000)).unwrap();
                    content[at] ^= 0x55;
                    rewrite(&path, &content);
                    damaged.insert(inode);
                }
            }
        }
        assert_eq!(
            read_all(&bench).damaged.count,
            damaged.len() as u64,
            "round {round}"
        );
        let has_right = |name: &str| {
            inodes_of(&bench, name)
                .keys()
                .any(|inode| !damaged.contains(inode))
        };
        let had_right = FILES.map(has_right);
        prune_to(&bench, 1 + u32::try_from(dice.below(2)).unwrap());
        for (name, had_right) in FILES.iter().zip(had_right) {
            let is_damaged = inodes_of(&bench, name)
                .keys()
                .any(|inode| damaged.contains(inode));
            assert!(
                !(is_damaged && had_right) || has_right(name),
                "round {round}: the last right content of {name} is gone"
            );
        }
        let newest = bench.try_take(&with_suspects(&bench)).unwrap();
        assert_same(&bench.source(), &bench.in_snapshot(newest.name));
        // Then the older ones may be removed.
        prune_to(&bench, 1);
        assert_eq!(bench.list().len(), 1, "round {round}");
        assert!(!read_all(&bench).is_damaged(), "round {round}");
    }
}

#[test]
fn a_check_that_cannot_save_its_sums_reports_what_it_found() {
    requires!(sprat_testkit::needs::root());
    let bench = Bench::new();
    let (_, kept) = checked_once(&bench);
    rewrite(&kept, b"noise");
    let mut one = spec(&bench, CheckWhat::Everything);
    // A file that is a mount point can be read, and not replaced.
    let run = |command: &str, arguments: &[&Path]| {
        let ran = Command::new(command).args(arguments).status().unwrap();
        assert!(ran.success(), "{command}");
    };
    run("mount", &[Path::new("--bind"), &one.known, &one.known]);
    one.suspects = bench.path("suspects.json");
    let report = try_check(&bench, &one, &Cancel::new());
    run("umount", &[&one.known]);
    let report = report.unwrap();
    assert_eq!(report.damaged.count, 1);
    assert_eq!(report.not_saved.len(), 1, "{:?}", report.not_saved);
    // Backups use the list all the same.
    let second = bench.try_take(&with_suspects(&bench)).unwrap();
    assert_same(&bench.source(), &bench.in_snapshot(second.name));
}

#[test]
fn a_change_within_the_step_of_a_files_time_is_copied_by_the_next_run() {
    let bench = Bench::new();
    let file = bench.source().join("file");
    let long_ago = std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    fs::write(bench.source().join("old"), b"old").unwrap();
    File::options()
        .write(true)
        .open(bench.source().join("old"))
        .unwrap()
        .set_modified(long_ago)
        .unwrap();
    fs::write(&file, b"alpha").unwrap();
    let first = bench.take();
    // Within one step of a coarse file time: the same time, the same length.
    rewrite(&file, b"omega");
    let second = bench.take();
    assert_same(&bench.source(), &bench.in_snapshot(second.name));
    let named = escaped(&file);
    assert_eq!(second.record.caught_up.names, [named]);
    assert_eq!(
        fs::read(bench.in_snapshot(first.name).join("file")).unwrap(),
        b"alpha"
    );
    // After some seconds its time proves that it is unchanged.
    std::thread::sleep(Duration::from_secs(4));
    let third = bench.take();
    assert!(third.record.caught_up.is_empty());
    let lists = || {
        let names = fs::read_dir(bench.job().join(".sprat")).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.ends_with(".recent")).count()
    };
    assert_eq!(lists(), 2, "those of the first two");
}

#[test]
fn a_path_as_long_as_one_can_be_is_read_compared_and_healed() {
    use rustix::fs::{Mode, OFlags, mkdirat, openat};
    let bench = Bench::new();
    // Relative to each folder: the whole path is as long as the kernel accepts.
    let mut at = openat(
        rustix::fs::CWD,
        bench.source(),
        OFlags::RDONLY | OFlags::DIRECTORY,
        Mode::empty(),
    )
    .unwrap();
    let mut path = bench.source();
    while path.as_os_str().len() + 301 < 4090 {
        let name = "d".repeat(200);
        mkdirat(&at, &name, Mode::from(0o755)).unwrap();
        at = openat(
            &at,
            &name,
            OFlags::RDONLY | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        path.push(name);
    }
    let name = "f".repeat((4089 - path.as_os_str().len()).min(250));
    let file = path.join(&name);
    fs::write(&file, b"right").unwrap();
    std::os::unix::fs::symlink("nowhere", path.join("link")).unwrap();
    next_second();
    let first = bench.take();
    let kept = bench.in_snapshot(first.name);
    let deep = path.strip_prefix(bench.source()).unwrap();
    assert!(
        kept.join(deep).join(&name).as_os_str().len() > 4095,
        "the test's path is too short"
    );
    for report in [read_all(&bench), against_source(&bench)] {
        assert!(!report.is_damaged(), "{report:?}");
        assert!(report.finished);
    }
    assert_eq!(against_source(&bench).same, 1);
    // When it is damaged, it is reported, and the next backup reads it from the source.
    let mut at = openat(
        rustix::fs::CWD,
        &kept,
        OFlags::RDONLY | OFlags::DIRECTORY,
        Mode::empty(),
    )
    .unwrap();
    for part in deep.components() {
        at = openat(
            &at,
            part.as_os_str(),
            OFlags::RDONLY | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
    }
    let mut file = File::from(openat(&at, &name, OFlags::RDWR, Mode::empty()).unwrap());
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all(b"noise").unwrap();
    file.set_times(FileTimes::new().set_modified(time)).unwrap();
    drop(file);
    let report = read_all(&bench);
    assert_eq!(
        (report.damaged.count, report.affected.count),
        (1, 1),
        "{report:?}"
    );
    let second = bench.try_take(&with_suspects(&bench)).unwrap();
    assert_eq!(second.record.healed.count, 1);
    assert!(!against_source(&bench).is_damaged());
}
