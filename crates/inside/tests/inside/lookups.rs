//! Single lookups: what is not there, incomplete snapshots, one file, interrupts.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::{SignedDuration, Timestamp};
use sprat_inside::{
    CatSpec, Change, DiffSpec, FindSpec, ListSpec, Place, SizeSpec, SourceDiffSpec, VersionsSpec,
    cat, diff, diff_source, find, list, size, versions,
};
use sprat_snapshot::{Cancel, JobName, SnapshotChoice, SnapshotError, SnapshotSpec, take};

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        fs::create_dir(bench.volume()).unwrap();
        fs::create_dir(bench.source()).unwrap();
        bench
    }

    fn volume(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn write(&self, name: &str, content: &str) {
        fs::write(self.source().join(name), content).unwrap();
    }

    fn take(&self, days_ago: i64) -> String {
        let spec = SnapshotSpec::new(job(), vec![self.source()]);
        let at = Timestamp::now() - SignedDuration::from_hours(24 * days_ago);
        let taken = take(&self.volume(), &spec, at, &mut |_| {}, &Cancel::new());
        taken.unwrap().name.to_string()
    }

    fn place(&self, snapshot: &str, name: &str) -> Place {
        let path = self.source().join(name);
        Place::new(job(), SnapshotChoice::parse(snapshot), Some(&path))
    }

    fn record(&self, snapshot: &str) -> PathBuf {
        self.volume().join(format!("home/.sprat/{snapshot}.json"))
    }
}

fn job() -> JobName {
    JobName::new("home").unwrap()
}

#[test]
fn cat_writes_the_bytes_of_each_version() {
    let bench = Bench::new();
    let long = "0123456789".repeat(100_000);
    bench.write("file", &long);
    bench.take(2);
    bench.write("file", "short");
    bench.take(1);
    let beginning = |snapshot: &str, name: &str, bytes_max| {
        let (mut near, far) = std::io::pipe().unwrap();
        let spec = CatSpec {
            place: bench.place(snapshot, name),
            bytes_max,
        };
        let volume = bench.volume();
        let writing =
            std::thread::spawn(move || cat(&volume, &spec, OwnedFd::from(far), &Cancel::new()));
        let mut text = String::new();
        near.read_to_string(&mut text).unwrap();
        (text, writing.join().unwrap())
    };
    let content = |snapshot: &str, name: &str| beginning(snapshot, name, None);
    let oldest = fs::read_dir(bench.volume().join("home"))
        .unwrap()
        .filter_map(|name| name.unwrap().file_name().into_string().ok())
        .filter(|name| name.starts_with('2'))
        .min()
        .unwrap();
    let (text, written) = content(&oldest, "file");
    assert_eq!((&text, written.unwrap()), (&long, 1_000_000));
    let (text, written) = beginning(&oldest, "file", Some(300_000));
    assert_eq!((&*text, written.unwrap()), (&long[..300_000], 300_000));
    let (text, written) = content("latest", "file");
    assert_eq!((&*text, written.unwrap()), ("short", 5));
    let (_, missing) = content("latest", "none");
    assert!(matches!(missing, Err(SnapshotError::NoSuchPath { .. })));
    let (_, folder) = content("latest", "");
    assert!(matches!(folder, Err(SnapshotError::PathRefused { .. })));
}

#[test]
fn cat_ends_where_its_reader_ends_and_can_be_cancelled() {
    let bench = Bench::new();
    bench.write("file", &"x".repeat(1 << 20));
    bench.take(1);
    let spec = CatSpec {
        place: bench.place("latest", "file"),
        bytes_max: None,
    };
    let (near, far) = std::io::pipe().unwrap();
    drop(near);
    cat(&bench.volume(), &spec, OwnedFd::from(far), &Cancel::new()).unwrap();

    // Nobody reads: without the cancel it would wait for ever.
    let (near, far) = std::io::pipe().unwrap();
    let (volume, cancel) = (bench.volume(), Cancel::new());
    let asked = cancel.clone();
    let writing = std::thread::spawn(move || cat(&volume, &spec, OwnedFd::from(far), &asked));
    cancel.cancel();
    let ended = writing.join().unwrap();
    assert!(
        matches!(ended, Err(SnapshotError::ReadCancelled)),
        "{ended:?}"
    );
    drop(near);
}

#[test]
fn paths_that_no_snapshot_has_are_reported() {
    let bench = Bench::new();
    bench.write("file", "x");
    bench.take(1);
    let cancel = Cancel::new();
    let volume = bench.volume();
    let place = || bench.place("latest", "none");
    let listed = list(
        &volume,
        &ListSpec {
            place: place(),
            recursive: false,
        },
        &cancel,
    );
    assert!(matches!(listed, Err(SnapshotError::NoSuchPath { .. })));
    let found = versions(&volume, &VersionsSpec { place: place() }, &cancel);
    let text = found.unwrap_err().to_string();
    assert!(text.contains("source/none"), "{text}");
    let spec = DiffSpec {
        before: Some(place()),
        after: place(),
    };
    assert!(matches!(
        diff(&volume, &spec, &cancel),
        Err(SnapshotError::NoSuchPath { .. })
    ));
    // The first snapshot has none before it.
    let first = DiffSpec {
        before: None,
        after: bench.place("latest", "file"),
    };
    let text = diff(&volume, &first, &cancel).unwrap_err().to_string();
    assert!(text.contains("no snapshot before"), "{text}");
    let nothing = FindSpec {
        job: None,
        pattern: "none".to_owned(),
        ignore_case: false,
    };
    let found = find(&volume, &nothing, &cancel).unwrap();
    assert!(found.paths.is_empty());
    assert_eq!(found.jobs[0].snapshots, 1);
    let no_pattern = FindSpec {
        pattern: "[a".to_owned(),
        ..nothing
    };
    assert!(matches!(
        find(&volume, &no_pattern, &cancel),
        Err(SnapshotError::PathRefused { .. })
    ));
}

#[test]
fn path_that_an_incomplete_snapshot_lacks_may_only_be_unread() {
    let bench = Bench::new();
    bench.write("file", "x");
    bench.write("other", "x");
    bench.take(3);
    fs::remove_file(bench.source().join("file")).unwrap();
    let second = bench.take(2);
    let record = fs::read_to_string(bench.record(&second)).unwrap();
    let incomplete = record.replacen("\"complete\":true", "\"complete\":false", 1);
    let incomplete = incomplete.replacen("\"complete\": true", "\"complete\": false", 1);
    assert_ne!(record, incomplete);
    fs::write(bench.record(&second), incomplete).unwrap();
    bench.write("file", "again");
    bench.take(1);
    let spec = VersionsSpec {
        place: bench.place("latest", "file"),
    };
    let found = versions(&bench.volume(), &spec, &Cancel::new()).unwrap();
    let changes: Vec<Change> = found.versions.iter().map(|one| one.change).collect();
    assert_eq!(changes, [Change::New, Change::New]);
    let gone = found.versions[0].gone.as_ref().unwrap();
    assert_eq!((&gone.snapshot, gone.complete), (&second, false));
    assert!(found.versions[1].gone.is_none());
}

#[test]
fn one_file_is_listed_and_compared_by_itself() {
    let bench = Bench::new();
    bench.write("file", "old");
    let first = bench.take(2);
    bench.write("file", "newer");
    bench.write("other", "x");
    let second = bench.take(1);
    let cancel = Cancel::new();
    let spec = ListSpec {
        place: bench.place(&first, "file"),
        recursive: false,
    };
    let listing = list(&bench.volume(), &spec, &cancel).unwrap();
    assert_eq!(listing.entries.len(), 1);
    assert_eq!(listing.entries[0].found.bytes, 3);
    assert!(listing.entries[0].path.ends_with("/source/file"));
    let spec = DiffSpec {
        before: Some(bench.place(&first, "file")),
        after: bench.place(&second, "file"),
    };
    let report = diff(&bench.volume(), &spec, &cancel).unwrap();
    assert_eq!(report.differences.len(), 1);
    assert_eq!(
        (
            report.sums.content.before_bytes,
            report.sums.content.after_bytes
        ),
        (3, 5)
    );
    // A slash at the end, as the completion of a shell leaves it.
    let spec = ListSpec {
        place: bench.place("latest", ""),
        recursive: false,
    };
    let listing = list(&bench.volume(), &spec, &cancel).unwrap();
    assert_eq!(Path::new(&listing.path), bench.source());
    assert!(!listing.path.ends_with('/'));
    // Everything, from the top: the folders above the source are listed, too.
    let spec = ListSpec {
        place: Place::new(job(), SnapshotChoice::Latest, None),
        recursive: false,
    };
    let listing = list(&bench.volume(), &spec, &cancel).unwrap();
    assert_eq!(listing.path, "/");
    let top = bench.source();
    let top = top.components().nth(1).unwrap();
    let top = Path::new("/").join(top.as_os_str());
    assert_eq!(Path::new(&listing.entries[0].path), top);
}

#[test]
fn a_search_and_a_list_can_be_cancelled() {
    let bench = Bench::new();
    bench.write("file", "x");
    bench.take(1);
    let cancel = Cancel::new();
    cancel.cancel();
    let spec = FindSpec {
        job: Some(job()),
        pattern: "*".to_owned(),
        ignore_case: false,
    };
    assert!(matches!(
        find(&bench.volume(), &spec, &cancel),
        Err(SnapshotError::ReadCancelled)
    ));
    let spec = ListSpec {
        place: bench.place("latest", ""),
        recursive: true,
    };
    assert!(matches!(
        list(&bench.volume(), &spec, &cancel),
        Err(SnapshotError::ReadCancelled)
    ));
}

#[test]
fn patterns_select_the_topmost_paths_that_match() {
    let bench = Bench::new();
    for folder in ["a/kept/deep", "b"] {
        fs::create_dir_all(bench.source().join(folder)).unwrap();
    }
    for name in ["a/kept/deep/kept", "a/one.odt", "b/two.odt", "b/kept"] {
        bench.write(name, "x");
    }
    std::os::unix::fs::symlink("a", bench.source().join("link")).unwrap();
    bench.take(1);
    let found = |top: &str, patterns: &[&str]| {
        let patterns: Vec<String> = patterns.iter().map(ToString::to_string).collect();
        let place = bench.place("latest", top);
        let found = sprat_inside::matching(&bench.volume(), &place, &patterns, &Cancel::new())?;
        let source = bench.source();
        let inside = found
            .iter()
            .map(|path| path.strip_prefix(&source).unwrap().display());
        Ok::<_, SnapshotError>(inside.map(|path| path.to_string()).collect::<Vec<_>>())
    };
    assert_eq!(found("", &["kept"]).unwrap(), ["a/kept", "b/kept"]);
    assert_eq!(found("b", &["kept"]).unwrap(), ["b/kept"]);
    assert_eq!(
        found("", &["*.odt", "kept"]).unwrap(),
        ["a/kept", "a/one.odt", "b/kept", "b/two.odt"]
    );
    assert_eq!(found("", &["a/**/kept"]).unwrap(), ["a/kept"]);
    assert_eq!(found("b/two.odt", &["*.odt"]).unwrap(), ["b/two.odt"]);
    // No link is followed.
    assert_eq!(found("", &["l*"]).unwrap(), ["link"]);
    let missing = |result| matches!(result, Err(SnapshotError::NoSuchPath { .. }));
    assert!(missing(found("", &["none"])));
    assert!(missing(found("none", &["*"])));
}

#[test]
fn file_that_vanishes_while_it_is_compared_with_its_source_is_gone() {
    let bench = Bench::new();
    let names: Vec<PathBuf> = (0..20)
        .map(|n| bench.source().join(format!("f{n}")))
        .collect();
    let links: Vec<PathBuf> = (0..20)
        .map(|n| bench.source().join(format!("l{n}")))
        .collect();
    for (file, link) in names.iter().zip(&links) {
        fs::write(file, "content").unwrap();
        std::os::unix::fs::symlink("content", link).unwrap();
    }
    bench.take(1);
    let all: Vec<&PathBuf> = names.iter().chain(&links).collect();
    let listed: Vec<String> = all
        .iter()
        .map(|path| format!("{}\n", path.display()))
        .collect();
    let listed = listed.concat();
    let away = bench.dir.path().join("away");
    fs::create_dir(&away).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                for path in &all {
                    let away = away.join(path.file_name().unwrap());
                    fs::rename(path, &away).unwrap();
                    fs::rename(&away, path).unwrap();
                }
            }
        });
        let spec = SourceDiffSpec {
            place: bench.place("latest", ""),
        };
        for _ in 0..1000 {
            let compared = diff_source(
                &bench.volume(),
                &spec,
                &mut listed.as_bytes(),
                &Cancel::new(),
            );
            let is_gone = |change: Change| change == Change::Gone;
            let failed = compared.map(|report| report.differences);
            let failed = failed.map(|all| all.iter().all(|one| is_gone(one.change)));
            if !matches!(failed, Ok(true)) {
                ended.store(true, Ordering::Relaxed);
                panic!("{failed:?}");
            }
        }
        ended.store(true, Ordering::Relaxed);
    });
}

#[test]
fn size_of_a_folder_counts_a_file_with_two_names_once_and_can_be_stopped() {
    let bench = Bench::new();
    fs::create_dir_all(bench.source().join("folder/below")).unwrap();
    bench.write("folder/one", "12345");
    bench.write("folder/below/two", "123");
    bench.write("other", "1");
    let linked = bench.source().join("folder/below/again");
    fs::hard_link(bench.source().join("folder/one"), linked).unwrap();
    std::os::unix::fs::symlink("/", bench.source().join("folder/link")).unwrap();
    bench.take(1);
    let sized = |name: &str, cancel: &Cancel| {
        let place = bench.place("latest", name);
        size(&bench.volume(), &SizeSpec { place }, cancel)
    };
    let sum = sized("folder", &Cancel::new()).unwrap();
    assert_eq!((sum.bytes, sum.files), (5 + 3, 4));
    assert_eq!(sized("", &Cancel::new()).unwrap().bytes, 9);
    for name in ["other", "none", "folder/link"] {
        assert!(sized(name, &Cancel::new()).is_err(), "{name}");
    }
    let stopped = Cancel::new();
    stopped.cancel_current();
    let ended = sized("folder", &stopped);
    assert!(matches!(ended, Err(SnapshotError::ReadCancelled)));
}
