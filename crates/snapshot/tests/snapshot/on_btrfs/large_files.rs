//! Large files that are interrupted, and files with many names.

use std::fs::File;
use std::os::unix::fs::FileExt;

use sprat_snapshot::Warning;

use super::*;
use crate::interrupted::{BIG_BYTES, begun_bytes, files_ending, large_source, stop_beyond};

/// A run that is cancelled in the middle of the large file, when it has more than `from` bytes. Returns how many
/// bytes were kept.
fn stop(volume: &OnBtrfs, from: u64) -> u64 {
    let mut spec = volume.bench.spec();
    spec.rsync = volume.bench.rsync_script("", "rsync --bwlimit=16000");
    let cancel = Cancel::new();
    let folder = volume.work();
    let root = volume.bench.volume();
    sprat_snapshot::take_into_subvolume(
        &root,
        &spec,
        now(),
        &ByProgs,
        &mut stop_beyond(&folder, from + (2 << 20), &cancel),
        &cancel,
    )
    .unwrap_err();
    begun_bytes(&folder)
}

#[test]
fn next_run_copies_only_the_rest_of_a_large_file() {
    requires!(missing());
    let volume = OnBtrfs::new();
    // An older version is in the way.
    let file = volume.source("folder/vm.img");
    fs::create_dir(file.parent().unwrap()).unwrap();
    fs::write(&file, "old content").unwrap();
    let first = volume.take();
    large_source(&volume.bench);
    let kept = stop(&volume, 16 << 20);
    assert!(kept > 16 << 20 && kept < BIG_BYTES, "{kept}");
    // As after kill -9: rsync has left its temporary file, with more than what is sure.
    let begun = files_ending(&volume.work(), ".begun").remove(0);
    let folder = below(&volume.work(), file.parent().unwrap());
    fs::hard_link(&begun, folder.join(".vm.img.a1B2c3")).unwrap();
    let writer = File::options().write(true).open(&begun).unwrap();
    writer.write_all_at(&[9; 1 << 20], kept).unwrap();
    let again = stop(&volume, kept);
    assert!(again >= kept, "{again} {kept}");
    assert!(!folder.join("vm.img").exists());
    let report = volume.take();
    assert!(report.record.complete, "{:?}", report.record);
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(report.name),
    );
    // The last byte that is not zero is copied again.
    assert_eq!(report.record.stats.bytes_literal, BIG_BYTES - (again - 1));
    let tree = volume.bench.job().join(report.name.to_string());
    assert!(files_ending(&tree, ".begun").is_empty());
    let notes = files_ending(&volume.bench.job().join(".sprat"), ".begun.json");
    assert!(notes.is_empty(), "{notes:?}");
    assert_eq!(
        fs::read(volume.kept(&first, "folder/vm.img")).unwrap(),
        b"old content"
    );
}

#[test]
fn begun_file_is_not_used_for_another_version_of_it() {
    requires!(missing());
    let volume = OnBtrfs::new();
    let file = large_source(&volume.bench);
    stop(&volume, 16 << 20);
    let time = fs::metadata(&file).unwrap().modified().unwrap();
    let writer = File::options().write(true).open(&file).unwrap();
    writer.write_all_at(b"changed", 0).unwrap();
    writer.set_modified(time).unwrap();
    let report = volume.take();
    assert_eq!(report.record.stats.bytes_literal, BIG_BYTES);
    assert_same(
        &volume.bench.source(),
        &volume.bench.in_snapshot(report.name),
    );
}

/// Of the file with many names.
const BYTES: usize = 64 << 10;

/// btrfs allows 65,535 names for one file. The content is sent once.
#[test]
fn file_with_more_names_than_btrfs_allows_is_split() {
    requires!(missing());
    let volume = OnBtrfs::new();
    // The names of one file may be on a file system with a higher limit.
    let source = volume.source("tmpfs");
    fs::create_dir(&source).unwrap();
    run("mount", &["-t", "tmpfs", "many", source.to_str().unwrap()]);
    let _mounted = Mounted(source.clone());
    let name = |number: u32| source.join(format!("{number:05}"));
    let write = |byte: u8| {
        fs::write(name(0), vec![byte; BYTES]).unwrap();
        set_time(&name(0), 1_600_000_000, 0).unwrap();
    };
    write(7);
    for number in 1..65_600 {
        fs::hard_link(name(0), name(number)).unwrap();
    }
    fs::write(source.join("a"), "content").unwrap();
    fs::hard_link(source.join("a"), source.join("b")).unwrap();
    // In the last one the file has other content with its size and time.
    for (content, byte) in [("content", 7), ("new content", 7), ("new content", 8)] {
        fs::write(source.join("a"), content).unwrap();
        let mut spec = volume.bench.spec();
        if byte == 8 {
            write(byte);
            spec.checksum = true;
        }
        let report = volume.try_take(&spec).unwrap();
        assert!(report.record.complete, "{:?}", report.record);
        let kept =
            |name: &str| fs::metadata(volume.kept(&report, &format!("tmpfs/{name}"))).unwrap();
        assert_eq!(kept("00000").nlink() + kept("65599").nlink(), 65_600);
        for name in ["00000", "65599"] {
            assert_eq!(
                (kept(name).len(), kept(name).mtime()),
                (BYTES as u64, 1_600_000_000)
            );
            let kept = fs::read(volume.kept(&report, &format!("tmpfs/{name}"))).unwrap();
            assert!(kept == vec![byte; BYTES], "{name}");
        }
        assert_eq!(kept("a").ino(), kept("b").ino());
        assert_eq!(
            fs::read_to_string(volume.kept(&report, "tmpfs/b")).unwrap(),
            content
        );
        assert!(
            report.record.stats.bytes_literal < 2 * BYTES as u64,
            "{:?}",
            report.record.stats
        );
        assert!(
            report
                .record
                .warnings
                .iter()
                .any(|one| matches!(one, Warning::LinksSplit { .. })),
            "{:?}",
            report.record.warnings
        );
    }
}
