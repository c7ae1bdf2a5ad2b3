//! Files of a snapshot that come from no source: staged before the run, and put into its tree at its end.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use sprat_snapshot::{
    Cancel, RestoreSpec, SnapshotError, SnapshotSpec, StagedFile, Warning, stage, unstage,
};

use crate::checked::against_source;
use crate::folder::{Bench, inode, job_name};

/// The end of a pipe with this content.
fn content(text: &[u8]) -> OwnedFd {
    let (from, mut to) = std::io::pipe().unwrap();
    to.write_all(text).unwrap();
    from.into()
}

fn staged(bench: &Bench, name: &str, text: &[u8], first: bool) -> StagedFile {
    let path = Path::new("@dump").join(name);
    stage(
        &bench.volume(),
        &job_name(),
        &path,
        first,
        content(text),
        &Cancel::new(),
    )
    .unwrap()
}

fn with(bench: &Bench, files: &[StagedFile]) -> SnapshotSpec {
    SnapshotSpec {
        staged: files.to_vec(),
        required: vec!["@dump/db".into()],
        ..bench.spec()
    }
}

#[test]
fn equal_content_is_linked_and_other_content_is_not() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "of a source").unwrap();
    let first = bench.try_take(&with(&bench, &[staged(&bench, "db", b"0123456789", true)]));
    let first = first.unwrap();
    let at = |name: &sprat_snapshot::SnapshotName| bench.job().join(format!("{name}/@dump/db"));
    let about = fs::metadata(at(&first.name)).unwrap();
    assert_eq!(about.permissions().mode() & 0o7777, 0o600);
    let folder = fs::metadata(at(&first.name).parent().unwrap()).unwrap();
    assert_eq!(folder.permissions().mode() & 0o7777, 0o700);
    let second = bench.try_take(&with(&bench, &[staged(&bench, "db", b"0123456789", true)]));
    let second = second.unwrap();
    assert_eq!(inode(&at(&second.name)), inode(&at(&first.name)));
    assert_eq!(about.nlink(), 1, "metadata from before the link");
    let third = bench.try_take(&with(&bench, &[staged(&bench, "db", b"012345678X", true)]));
    let third = third.unwrap();
    assert_eq!(fs::read(at(&third.name)).unwrap(), b"012345678X");
    assert_eq!(fs::read(at(&second.name)).unwrap(), b"0123456789");
    let shrank = |report: &sprat_snapshot::SnapshotReport| {
        let mut warnings = report.record.warnings.iter();
        warnings.any(|warning| {
            matches!(
                warning,
                Warning::DumpShrank {
                    bytes: 4,
                    before_bytes: 10,
                    ..
                }
            )
        })
    };
    let fourth = bench.try_take(&with(&bench, &[staged(&bench, "db", b"0123", true)]));
    assert!(shrank(&fourth.unwrap()) && !shrank(&third));
    assert!(!bench.job().join(".sprat/deleting-staged").exists());
    // It has no source, so it is not "gone" there.
    let checked = against_source(&bench);
    assert_eq!((checked.gone.count, checked.lacking.count), (0, 0));
    assert_eq!(checked.lacking_unknown, None);
}

#[test]
fn a_job_of_a_command_alone_needs_no_source() {
    let bench = Bench::new();
    let file = staged(&bench, "db", b"content", true);
    let spec = SnapshotSpec {
        staged: vec![file],
        ..SnapshotSpec::new(job_name(), Vec::new())
    };
    let report = bench.try_take(&spec).unwrap();
    assert!(report.record.complete);
    assert_eq!(
        (
            report.record.stats.regular_files,
            report.record.stats.bytes_total
        ),
        (1, 7)
    );
    assert_eq!(against_source(&bench).lacking_unknown, None);
    let to = bench.path("out");
    bench
        .restore(&RestoreSpec::new(job_name(), to.clone()))
        .unwrap();
    assert_eq!(fs::read(to.join("@dump/db")).unwrap(), b"content");
    // It was never at a place of this machine.
    for path in [None, Some("/@dump")] {
        let mut in_place = RestoreSpec::new(job_name(), "/".into());
        in_place.path = path.map(Into::into);
        let refused = bench.restore(&in_place).unwrap_err();
        assert!(
            refused.to_string().contains("comes from a command"),
            "{refused}"
        );
    }
}

#[test]
fn a_restore_in_place_names_what_has_no_place() {
    let bench = Bench::new();
    let file = bench.source().join("file");
    fs::write(&file, "of a source").unwrap();
    bench
        .try_take(&with(&bench, &[staged(&bench, "db", b"x", true)]))
        .unwrap();
    fs::remove_file(&file).unwrap();
    let report = bench.restore(&RestoreSpec::new(job_name(), "/".into()));
    assert_eq!(report.unwrap().left_out, ["@dump"]);
    assert_eq!(fs::read(&file).unwrap(), b"of a source");
    assert!(!Path::new("/@dump").exists());
    let to = RestoreSpec::new(job_name(), bench.path("out"));
    assert!(bench.restore(&to).unwrap().left_out.is_empty());
}

#[test]
fn what_was_not_staged_in_this_run_is_in_no_snapshot() {
    let bench = Bench::new();
    fs::write(bench.source().join("file"), "of a source").unwrap();
    staged(&bench, "db", b"a part of it", true);
    // Its command failed, so it is not in the list.
    let refused = bench.try_take(&with(&bench, &[])).unwrap_err();
    assert!(
        matches!(refused, SnapshotError::StagedMissing { .. }),
        "{refused}"
    );
    assert!(bench.kinds().is_empty());
    let report = bench.take();
    assert!(!bench.job().join(format!("{}/@dump", report.name)).exists());
    assert!(!bench.job().join(".sprat/deleting-staged").exists());
    // The next run begins without what an earlier one left.
    staged(&bench, "left", b"x", true);
    let report = bench
        .try_take(&with(&bench, &[staged(&bench, "db", b"new", true)]))
        .unwrap();
    let tree = bench.job().join(format!("{}/@dump", report.name));
    assert!(tree.join("db").exists() && !tree.join("left").exists());
    staged(&bench, "left", b"x", true);
    unstage(&bench.volume(), &job_name()).unwrap();
    assert!(!bench.job().join(".sprat/deleting-staged").exists());
    // A request to stop ends it although the command writes nothing.
    let (from, _to) = std::io::pipe().unwrap();
    let cancel = Cancel::new();
    cancel.cancel();
    let path = Path::new("@dump/db");
    let cancelled = stage(
        &bench.volume(),
        &job_name(),
        path,
        true,
        from.into(),
        &cancel,
    );
    assert!(matches!(cancelled, Err(SnapshotError::Cancelled)));
    for path in ["db", "@dump", "@dump/../x", "/@dump/x", "x/@dump/y"] {
        let path = Path::new(path);
        let refused = stage(
            &bench.volume(),
            &job_name(),
            path,
            true,
            content(b""),
            &Cancel::new(),
        );
        assert!(
            matches!(refused, Err(SnapshotError::PathRefused { .. })),
            "{path:?}"
        );
    }
}
