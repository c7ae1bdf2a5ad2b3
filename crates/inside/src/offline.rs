//! Answers from the lists of changes that this machine keeps. No container is opened.
//!
//! An answer is that of the volume, but for the time of a folder: it follows the names in the folder, and a list has
//! it only where something else of the folder was changed. Where the lists don't show all of an answer, there is none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sprat_snapshot::seen::{Change, Found, Kind};
use sprat_snapshot::tree::THROUGH_A_LINK;
use sprat_snapshot::{Cancel, JobName, ListChain, ListedChange, Lists, SnapshotError, path_order};

use crate::answer::{Place, escaped, go_on};
use crate::diff::{DiffReport, DiffSpec, Side};
use crate::find::{FindReport, FindSpec, SearchedJob, pattern_of};
use crate::room::Room;
use crate::versions::{Gone, Version, VersionsReport, VersionsSpec, no_versions};

/// As [`crate::find()`].
///
/// # Errors
/// The pattern is none, or the lists of a job don't show which paths match.
pub fn find_in_lists(
    lists: &Lists,
    spec: &FindSpec,
    cancel: &Cancel,
) -> Result<FindReport, SnapshotError> {
    let pattern = pattern_of(spec)?;
    let jobs = match &spec.job {
        Some(job) => vec![job.clone()],
        None => {
            let jobs = lists.snapshots.keys();
            jobs.filter_map(|job| JobName::new(job).ok()).collect()
        }
    };
    let mut report = FindReport::default();
    let mut room = Room::new();
    for job in jobs {
        let history = History::new(lists, &job)?;
        let count = history.chain.count();
        report.jobs.push(SearchedJob {
            job: job.to_string(),
            snapshots: count as u64,
        });
        let met = history.meet(0..count, &|path| pattern.matches(path), cancel)?;
        let first = report.paths.len();
        for (path, events) in in_order(&met) {
            go_on(cancel)?;
            let versions = history.versions(path, events, count)?;
            if !versions.is_empty() {
                report.add(&mut room, &job, path, versions);
            }
        }
        report.paths[first..].sort_by(|one, other| one.path.cmp(&other.path));
    }
    Ok(report)
}

/// As [`crate::versions()`].
///
/// # Errors
/// No snapshot has the path, or the lists of the job don't show which have it.
pub fn versions_in_lists(
    lists: &Lists,
    spec: &VersionsSpec,
    cancel: &Cancel,
) -> Result<VersionsReport, SnapshotError> {
    let path = spec.place.path();
    let history = History::new(lists, &spec.place.job)?;
    refuse_top(&path)?;
    let count = history.chain.count();
    let met = history.meet(0..count, &|other| path.starts_with(other), cancel)?;
    let report = VersionsReport {
        job: spec.place.job.to_string(),
        path: escaped(&path),
        snapshots: count as u64,
        versions: history.versions(&path, met.get(&path).map_or(&[], |events| events), count)?,
    };
    match report.versions.is_empty() {
        true => Err(no_versions(report, history.why_refused(&met, &path))),
        false => Ok(report),
    }
}

/// As [`crate::diff()`], of a snapshot and the one before it.
///
/// # Errors
/// The two snapshots don't follow each other, neither has the path, or the lists don't show how they differ.
pub fn diff_in_lists(
    lists: &Lists,
    spec: &DiffSpec,
    cancel: &Cancel,
) -> Result<DiffReport, SnapshotError> {
    let path = spec.after.path();
    let history = History::new(lists, &spec.after.job)?;
    let chain = &history.chain;
    let number = chain.find(&spec.after.snapshot)?;
    let follows = |place: &Place| {
        let is_here = place.job == spec.after.job && place.path() == path;
        Ok::<_, SnapshotError>(is_here && chain.find(&place.snapshot)? + 1 == number)
    };
    let is_next = spec.before.as_ref().map_or(Ok(number > 0), follows)?;
    let name = chain.snapshot(number);
    if !is_next {
        return Err(match &spec.before {
            None => SnapshotError::NoSuchSnapshot {
                job: spec.after.job.to_string(),
                snapshot: format!("before {name}"),
            },
            Some(_) => SnapshotError::NotInLists {
                what: "they compare a snapshot with the one before it, at one path".to_owned(),
            },
        });
    }
    let side = |number| Side {
        job: Some(spec.after.job.to_string()),
        snapshot: Some(chain.snapshot(number).to_string()),
        kind: Some(chain.kind(number)),
        path: escaped(&path),
    };
    let mut report = DiffReport::between(side(number - 1), side(number));
    let mut room = Room::new();
    let mut is_there = path == Path::new("/");
    if !is_there {
        let met = history.meet(0..number + 1, &|other| path.starts_with(other), cancel)?;
        let events = met.get(&path).map_or(&[][..], |events| events);
        let versions = history.versions(&path, events, number + 1)?;
        let last_two = [number - 1, number].map(|number| chain.snapshot(number).to_string());
        is_there = versions.iter().any(|one| last_two.contains(&one.last));
        if !is_there {
            return Err(history.why_refused(&met, &path).unwrap_or_else(|| {
                SnapshotError::NoSuchPath {
                    snapshot: name.to_string(),
                    path: escaped(&path),
                }
            }));
        }
    }
    if chain.is_exact(number) {
        chain.read(number, &mut |one| {
            go_on(cancel)?;
            if one.path.starts_with(&path) {
                report.add(&mut room, &one.path, one.change, one.before, one.after);
            }
            Ok(())
        })?;
        return Ok(report);
    }
    let met = history.meet(
        number..number + 1,
        &|other| other.starts_with(&path),
        cancel,
    )?;
    for (path, events) in in_order(&met) {
        let before = events.first().and_then(|event| event.before.clone());
        let after = events.last().and_then(|event| event.after.clone());
        if let Some(change) = history.became(number, path, before.is_some(), events)? {
            report.add(&mut room, path, change, before, after);
        }
    }
    Ok(report)
}

/// The top of a snapshot is no folder of the source, and in no list.
fn refuse_top(path: &Path) -> Result<(), SnapshotError> {
    match path == Path::new("/") {
        true => Err(SnapshotError::NotInLists {
            what: "they have no line for the top of a snapshot".to_owned(),
        }),
        false => Ok(()),
    }
}

/// What a run found changed.
struct Event {
    /// The number of the snapshot that has it.
    number: usize,
    change: Change,
    before: Option<Found>,
    after: Option<Found>,
}

/// By their paths. Those of one path are in the order of the runs.
type Events = BTreeMap<PathBuf, Vec<Event>>;

/// In the order in which a walk of the snapshots would meet the paths.
fn in_order(events: &Events) -> Vec<(&PathBuf, &Vec<Event>)> {
    let mut all: Vec<_> = events.iter().collect();
    all.sort_by(|(one, _), (other, _)| path_order(one, other));
    all
}

/// The snapshots of a job, as the lists show them.
struct History {
    job: String,
    chain: ListChain,
    /// Of the snapshots.
    names: Vec<String>,
}

impl History {
    fn new(lists: &Lists, job: &JobName) -> Result<Self, SnapshotError> {
        let chain = lists.chain(job)?;
        let numbers = 0..chain.count();
        Ok(Self {
            job: job.to_string(),
            names: numbers
                .map(|number| chain.snapshot(number).to_string())
                .collect(),
            chain,
        })
    }

    /// What happened to some paths until these snapshots.
    fn meet(
        &self,
        numbers: std::ops::Range<usize>,
        wanted: &dyn Fn(&Path) -> bool,
        cancel: &Cancel,
    ) -> Result<Events, SnapshotError> {
        let mut events = Events::new();
        for number in numbers {
            self.chain.read(number, &mut |one| {
                go_on(cancel)?;
                let ListedChange {
                    path,
                    change,
                    before,
                    after,
                } = one;
                if wanted(&path) {
                    events.entry(path).or_default().push(Event {
                        number,
                        change,
                        before,
                        after,
                    });
                }
                Ok(())
            })?;
        }
        Ok(events)
    }

    /// The versions of a path in so many snapshots, from the oldest one on.
    fn versions(
        &self,
        path: &Path,
        events: &[Event],
        count: usize,
    ) -> Result<Vec<Version>, SnapshotError> {
        let mut versions: Vec<Version> = Vec::new();
        let mut is_there = false;
        let mut left = events;
        for (number, name) in self.names[..count].iter().enumerate() {
            let count = left.iter().take_while(|one| one.number == number).count();
            let (its, later) = left.split_at(count);
            left = later;
            let change = self.became(number, path, is_there, its)?;
            let after = its.last().and_then(|event| event.after.clone());
            match (change, after, versions.last_mut()) {
                (Some(Change::Gone), _, Some(version)) => {
                    is_there = false;
                    version.gone = Some(Gone {
                        snapshot: name.clone(),
                        complete: self.chain.kind(number) == sprat_snapshot::EntryKind::Complete,
                    });
                }
                (Some(change), Some(found), _) => {
                    is_there = true;
                    versions.push(Version {
                        first: name.clone(),
                        last: name.clone(),
                        snapshots: 1,
                        change,
                        found,
                        gone: None,
                    });
                }
                (None, _, Some(version)) if is_there => {
                    version.last.clone_from(name);
                    version.snapshots += 1;
                }
                _ => {}
            }
        }
        Ok(versions)
    }

    /// How a snapshot differs from the one before at a path. `None`: not at all.
    fn became(
        &self,
        number: usize,
        path: &Path,
        was_there: bool,
        events: &[Event],
    ) -> Result<Option<Change>, SnapshotError> {
        let (Some(first), Some(last)) = (events.first(), events.last()) else {
            return Ok(None);
        };
        let follows = |pair: &[Event]| pair[0].after.is_some() == pair[1].before.is_some();
        if first.before.is_some() != was_there || !events.windows(2).all(follows) {
            return Err(self.chain.contradiction(number));
        }
        Ok(match (&first.before, &last.after) {
            (None, None) => None,
            (None, Some(_)) => Some(Change::New),
            (Some(_), None) => Some(Change::Gone),
            (Some(_), Some(_)) if self.chain.is_exact(number) && events.len() == 1 => {
                Some(first.change)
            }
            // Several runs. What they come to is what the two sides show, unless these are equal.
            (Some(before), Some(after)) => {
                let unclear = || SnapshotError::ListsUnclear {
                    job: self.job.clone(),
                    snapshot: self.names[number].clone(),
                    path: escaped(path),
                };
                Some(before.change(after).ok_or_else(unclear)?)
            }
        })
    }

    /// Why no snapshot has a path: it has `..` in it, or it leads through a symbolic link.
    fn why_refused(&self, met: &Events, path: &Path) -> Option<SnapshotError> {
        let refused = |why| SnapshotError::PathRefused {
            path: escaped(path),
            why,
        };
        if let Some(why) = sprat_snapshot::path_mistake(path) {
            return Some(refused(why));
        }
        let is_link = |above: &Path| {
            let found = met
                .get(above)
                .and_then(|events| events.last()?.after.as_ref());
            found.is_some_and(|found| found.kind == Kind::Link)
        };
        let link = path.ancestors().skip(1).any(is_link);
        link.then(|| refused(THROUGH_A_LINK))
    }
}
