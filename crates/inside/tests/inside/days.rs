//! Thirty days of random changes: list, find, versions and diff agree with the model on every path.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use sprat_inside::{
    Change, DiffSpec, FindSpec, ListSpec, Place, SourceDiffSpec, Version, VersionsSpec, diff,
    diff_source, find, list, versions,
};
use sprat_snapshot::{Cancel, JobName, SnapshotChoice, SnapshotSpec, escape_name, take};
use sprat_testkit::dice::{Dice, seed};
use sprat_testkit::{needs, requires};

use crate::model::{self, Day};

const DAYS: usize = 30;

struct Bench {
    dir: tempfile::TempDir,
    job: JobName,
    /// The name of each snapshot, and what the source was then.
    days: Vec<(String, Day)>,
}

impl Bench {
    fn live(days: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut bench = Self {
            dir,
            job: JobName::new("home").unwrap(),
            days: Vec::new(),
        };
        fs::create_dir(bench.volume()).unwrap();
        fs::create_dir(bench.source()).unwrap();
        fs::write(bench.source().join("always"), "the same").unwrap();
        let mut dice = Dice::new(seed());
        let now = Timestamp::now();
        for day in 0..days {
            model::live_a_day(&bench.source(), &mut dice);
            let spec = SnapshotSpec::new(bench.job.clone(), vec![bench.source()]);
            let ago = i64::try_from(days - day).unwrap();
            let at = now - SignedDuration::from_hours(24 * ago);
            let cancel = Cancel::new();
            let taken = take(&bench.volume(), &spec, at, &mut |_| {}, &cancel).unwrap();
            assert!(taken.record.complete, "day {day}: {:?}", taken.record);
            bench
                .days
                .push((taken.name.to_string(), model::read(&bench.source())));
        }
        bench
    }

    fn volume(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    fn source(&self) -> PathBuf {
        self.dir.path().join("source")
    }

    fn place(&self, snapshot: &str, path: &Path) -> Place {
        Place::new(
            self.job.clone(),
            SnapshotChoice::parse(snapshot),
            Some(path),
        )
    }

    fn diff(&self, before: Option<usize>, after: usize) -> BTreeMap<String, Change> {
        let place = |day: usize| self.place(&self.days[day].0, &self.source());
        let spec = DiffSpec {
            before: before.map(place),
            after: place(after),
        };
        let report = diff(&self.volume(), &spec, &Cancel::new()).unwrap();
        let sums = report.sums;
        let counted = [
            sums.new,
            sums.gone,
            sums.content,
            sums.attributes,
            sums.kind,
        ];
        let counted: u64 = counted.iter().map(|sum| sum.paths).sum();
        assert_eq!(counted, u64::try_from(report.differences.len()).unwrap());
        let found = report.differences.into_iter();
        found.map(|found| (found.path, found.change)).collect()
    }

    fn expected_diff(&self, before: usize, after: usize) -> BTreeMap<String, Change> {
        expected_change(&self.days[before].1, &self.days[after].1)
    }

    /// The versions of a path: first and last snapshot, change, size, the snapshot that lacks it.
    fn expected_versions(&self, path: &Path) -> Vec<(String, String, Change, u64, Option<String>)> {
        let mut expected: Vec<(String, String, Change, u64, Option<String>)> = Vec::new();
        let mut before = None;
        for (name, day) in &self.days {
            let now = day.get(path);
            match (model::change(before, now), now) {
                (Some(Change::Gone), _) => expected.last_mut().unwrap().4 = Some(name.clone()),
                (Some(change), Some(now)) => {
                    expected.push((name.clone(), name.clone(), change, now.bytes, None));
                }
                (None, Some(_)) => expected.last_mut().unwrap().1.clone_from(name),
                (_, None) => {}
            }
            before = now;
        }
        expected
    }
}

fn expected_change(before: &Day, after: &Day) -> BTreeMap<String, Change> {
    let paths: BTreeSet<&PathBuf> = before.keys().chain(after.keys()).collect();
    let changed = paths.into_iter().filter_map(|path| {
        let change = model::change(before.get(path), after.get(path))?;
        Some((escaped(path), change))
    });
    changed.collect()
}

fn escaped(path: &Path) -> String {
    escape_name(path.as_os_str().as_encoded_bytes())
}

fn shown(versions: &[Version]) -> Vec<(String, String, Change, u64, Option<String>)> {
    let shown = versions.iter().map(|version| {
        let gone = version.gone.as_ref();
        assert!(gone.is_none_or(|gone| gone.complete));
        (
            version.first.clone(),
            version.last.clone(),
            version.change,
            version.found.bytes,
            gone.map(|gone| gone.snapshot.clone()),
        )
    });
    shown.collect()
}

#[test]
fn thirty_days_of_changes_agree_with_the_model_on_every_path() {
    requires!(needs::root());
    let bench = Bench::live(DAYS);
    let cancel = Cancel::new();

    for day in 1..DAYS {
        assert_eq!(
            bench.diff(None, day),
            bench.expected_diff(day - 1, day),
            "day {day}"
        );
    }
    let mut dice = Dice::new(7);
    for _ in 0..30 {
        let [one, other] =
            [(); 2].map(|()| usize::try_from(dice.below(u64::try_from(DAYS).unwrap())).unwrap());
        let expected = bench.expected_diff(one, other);
        assert_eq!(bench.diff(Some(one), other), expected, "{one} and {other}");
    }

    for (name, day) in &bench.days {
        let spec = ListSpec {
            place: bench.place(name, &bench.source()),
            recursive: true,
        };
        let listing = list(&bench.volume(), &spec, &cancel).unwrap();
        let found: BTreeMap<String, _> = listing
            .entries
            .into_iter()
            .map(|entry| {
                (
                    entry.path,
                    (entry.found.kind, entry.found.bytes, entry.found.mode),
                )
            })
            .collect();
        let expected: BTreeMap<String, _> = day
            .iter()
            .filter(|(path, _)| **path != bench.source())
            .map(|(path, state)| (escaped(path), (state.kind, state.bytes, state.mode)))
            .collect();
        assert_eq!(found, expected, "{name}");
    }

    // One more day, which no snapshot has.
    let mut today = Dice::new(8);
    model::live_a_day(&bench.source(), &mut today);
    let now = model::read(&bench.source());
    let excluded = bench.source().join("always");
    for exclude in [false, true] {
        if exclude {
            fs::write(&excluded, "changed, and excluded").unwrap();
        }
        let listed: String = now
            .keys()
            .filter(|path| !exclude || **path != excluded)
            .map(|path| format!("{}\n", escaped(path)))
            .collect();
        let spec = SourceDiffSpec {
            place: bench.place("latest", &bench.source()),
        };
        let report = diff_source(&bench.volume(), &spec, &mut listed.as_bytes(), &cancel);
        let found = report.unwrap().differences.into_iter();
        let found: BTreeMap<String, Change> =
            found.map(|found| (found.path, found.change)).collect();
        let expected = expected_change(&bench.days[DAYS - 1].1, &now);
        assert!(!expected.is_empty());
        assert_eq!(found, expected, "excluded: {exclude}");
    }

    let ever: BTreeSet<&PathBuf> = bench.days.iter().flat_map(|(_, day)| day.keys()).collect();
    assert!(ever.len() > 100, "the days were too quiet: {}", ever.len());
    for path in &ever {
        let spec = VersionsSpec {
            place: bench.place("latest", path),
        };
        let report = versions(&bench.volume(), &spec, &cancel).unwrap();
        assert_eq!(
            shown(&report.versions),
            bench.expected_versions(path),
            "{path:?}"
        );
    }

    let spec = FindSpec {
        job: None,
        pattern: format!("{}/**", bench.source().display()),
        ignore_case: false,
    };
    let found = find(&bench.volume(), &spec, &cancel).unwrap();
    let found: BTreeMap<String, _> = found
        .paths
        .iter()
        .map(|path| (path.path.clone(), shown(&path.versions)))
        .collect();
    let below = ever.iter().filter(|path| path.as_path() != bench.source());
    let expected: BTreeMap<String, _> = below
        .map(|path| (escaped(path), bench.expected_versions(path)))
        .collect();
    assert_eq!(found, expected);

    let spec = FindSpec {
        job: Some(bench.job.clone()),
        pattern: "*.TXT*".to_owned(),
        ignore_case: true,
    };
    let found = find(&bench.volume(), &spec, &cancel).unwrap();
    let found: BTreeSet<&str> = found.paths.iter().map(|path| &*path.path).collect();
    let texts: BTreeSet<String> = ever
        .iter()
        .filter(|path| path.file_name().unwrap().to_string_lossy().contains(".txt"))
        .map(|path| escaped(path))
        .collect();
    assert!(!texts.is_empty());
    assert_eq!(found, texts.iter().map(String::as_str).collect());
}
