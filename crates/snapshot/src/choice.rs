//! Which snapshot of a job is meant: a name or its beginning, a word, or a time.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, STATE_FOLDER};
use crate::keep::is_future;
use crate::name::SnapshotName;
use crate::record::EntryKind;
use crate::text::{escape_path, unescape_path};
use crate::wrong_dates::{finished_records, misdated};

/// Which snapshot is meant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotChoice {
    /// The one that was made last: `latest` points to it.
    #[default]
    Latest,
    /// The complete one that was made last.
    LatestComplete,
    /// A folder's name as [`crate::list()`] returns it, or the beginning of a finished snapshot's name.
    Named(String),
    /// The newest finished one that began at this time or before.
    At(Timestamp),
}

impl SnapshotChoice {
    /// Reads the SNAPSHOT of `JOB/SNAPSHOT`: `latest`, `latest-complete`, or a name or its beginning.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "latest" => Self::Latest,
            "latest-complete" => Self::LatestComplete,
            name => Self::Named(name.to_owned()),
        }
    }

    /// The name, as long as it is one.
    pub(crate) fn name(&self) -> Option<&str> {
        match self {
            Self::Named(name) => Some(name),
            Self::Latest | Self::LatestComplete | Self::At(_) => None,
        }
    }
}

impl fmt::Display for SnapshotChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::LatestComplete => f.write_str("latest-complete"),
            Self::Named(name) => f.write_str(name),
            Self::At(time) => write!(f, "from {} or before", SnapshotName::at(*time)),
        }
    }
}

/// The finished snapshots of a job.
struct Finished<'a> {
    /// Oldest first.
    names: Vec<SnapshotName>,
    latest: Option<SnapshotName>,
    now: Timestamp,
    /// Those whose names came from a clock that ran ahead, as their records prove. May read all records.
    misdated: &'a dyn Fn() -> BTreeSet<SnapshotName>,
    /// Whether one is complete. May read its record.
    is_complete: &'a dyn Fn(SnapshotName) -> bool,
}

impl Finished<'_> {
    /// All that `choice` may mean: several only for the beginning of a name. What is most likely meant
    /// comes last.
    fn matching(&self, choice: &SnapshotChoice) -> Vec<SnapshotName> {
        let one = |name: Option<SnapshotName>| name.into_iter().collect();
        match choice {
            SnapshotChoice::Latest if self.latest.is_some() => one(self.latest),
            SnapshotChoice::Latest => one(self.by_age().next_back()),
            // Nothing was made after it, so no other record needs to be read.
            SnapshotChoice::LatestComplete if self.latest.is_some_and(self.is_complete) => {
                one(self.latest)
            }
            SnapshotChoice::LatestComplete => {
                one(self.by_age().rfind(|name| (self.is_complete)(*name)))
            }
            SnapshotChoice::At(time) => one(self.by_age().rfind(|name| name.moment() <= *time)),
            // No name is no beginning of one.
            SnapshotChoice::Named(begin) if begin.is_empty() => Vec::new(),
            SnapshotChoice::Named(begin) => {
                let begins = |name: &SnapshotName| name.to_string().starts_with(begin);
                self.by_age().filter(begins).collect()
            }
        }
    }

    /// Oldest first, but those with a name from a wrong clock before all others. Without `latest` no
    /// snapshot of the future counts as the one that was made last.
    fn by_age(&self) -> impl DoubleEndedIterator<Item = SnapshotName> {
        let misdated = (self.misdated)();
        let is_late = |name: &SnapshotName| {
            let ahead = match self.latest {
                Some(latest) => *name > latest,
                None => is_future(*name, self.now),
            };
            ahead || misdated.contains(name)
        };
        let (late, real): (Vec<SnapshotName>, _) =
            self.names.iter().partition(|name| is_late(name));
        [late, real].concat().into_iter()
    }
}

/// Finds all finished snapshots that `choice` may mean. What is most likely meant comes last.
pub(crate) fn matching(
    job: &JobFolder,
    choice: &SnapshotChoice,
) -> Result<Vec<SnapshotName>, SnapshotError> {
    let finished = |folder: Folder| match folder {
        Folder::Named(name) => Some(name),
        Folder::Inflight(_) | Folder::Partial(_) | Folder::Work(_) => None,
    };
    let is_complete = |name| job.kind(Folder::Named(name)).0 == EntryKind::Complete;
    let finished = Finished {
        names: job
            .own_folders()?
            .into_iter()
            .filter_map(finished)
            .collect(),
        latest: job.latest(),
        now: Timestamp::now(),
        misdated: &|| misdated(&finished_records(job).unwrap_or_default()),
        is_complete: &is_complete,
    };
    Ok(finished.matching(choice))
}

/// The newest of these names that `choice` may mean, all of which were made in their order.
pub(crate) fn among(
    names: Vec<SnapshotName>,
    choice: &SnapshotChoice,
    is_complete: &dyn Fn(SnapshotName) -> bool,
) -> Option<SnapshotName> {
    let finished = Finished {
        latest: names.last().copied(),
        names,
        now: Timestamp::now(),
        misdated: &BTreeSet::new,
        is_complete,
    };
    finished.matching(choice).pop()
}

/// Finds the folder to read from: the folder of that name, whatever it is, or else the newest finished
/// snapshot that `choice` may mean.
pub(crate) fn folder_to_read(
    job: &JobFolder,
    choice: &SnapshotChoice,
) -> Result<Option<PathBuf>, SnapshotError> {
    if let Some(name) = choice.name().map(unescape_path) {
        let is_one = name.components().count() == 1 && name.file_name() == Some(name.as_os_str());
        if is_one && job.is_folder(&name) && name != Path::new(STATE_FOLDER) {
            return Ok(Some(name));
        }
    }
    let newest = matching(job, choice)?.pop();
    Ok(newest.map(|name| name.to_string().into()))
}

/// Finds the one finished snapshot that `choice` means.
///
/// # Errors
/// There is none, or it is the beginning of several names: what changes a snapshot must not guess.
pub(crate) fn exactly(
    job: &JobFolder,
    choice: &SnapshotChoice,
) -> Result<SnapshotName, SnapshotError> {
    match matching(job, choice)?[..] {
        [name] => Ok(name),
        [] => Err(no_such(job, choice)),
        ref several => Err(SnapshotError::SeveralSnapshots {
            job: job.job.clone(),
            snapshot: shown(choice),
            names: several.iter().map(ToString::to_string).collect(),
        }),
    }
}

pub(crate) fn no_such(job: &JobFolder, choice: &SnapshotChoice) -> SnapshotError {
    SnapshotError::NoSuchSnapshot {
        job: job.job.clone(),
        snapshot: shown(choice),
    }
}

/// For messages.
pub(crate) fn shown(choice: &SnapshotChoice) -> String {
    match choice.name() {
        Some(name) => escape_path(&unescape_path(name)),
        None => choice.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 5] = [
        "2026-11-26T10-00-00Z",
        "2026-11-27T10-00-00Z",
        "2026-11-27T22-30-00Z",
        "2026-11-28T01-30-00Z",
        // From a clock that ran ahead.
        "2027-03-01T00-00-00Z",
    ];

    fn found(choice: &SnapshotChoice, latest: Option<usize>, incomplete: &[usize]) -> Vec<usize> {
        found_beside(choice, latest, incomplete, &[])
    }

    fn found_beside(
        choice: &SnapshotChoice,
        latest: Option<usize>,
        incomplete: &[usize],
        misdated: &[usize],
    ) -> Vec<usize> {
        let names = NAMES.map(|name| SnapshotName::parse(name).unwrap());
        let position = |name| names.iter().position(|one| *one == name).unwrap();
        let finished = Finished {
            names: names.to_vec(),
            latest: latest.map(|at| names[at]),
            now: "2026-11-29T00:00:00Z".parse().unwrap(),
            misdated: &|| misdated.iter().map(|at| names[*at]).collect(),
            is_complete: &|name| !incomplete.contains(&position(name)),
        };
        finished
            .matching(choice)
            .into_iter()
            .map(position)
            .collect()
    }

    #[test]
    fn snapshots_are_found_by_name_beginning_and_word() {
        for (text, latest, incomplete, expected) in [
            ("latest", Some(3), &[][..], &[3][..]),
            ("latest", None, &[], &[3]),
            ("latest-complete", None, &[3], &[2]),
            ("latest-complete", None, &[0, 1, 2, 3], &[4]),
            ("latest-complete", Some(3), &[], &[3]),
            ("latest-complete", Some(3), &[3], &[2]),
            // Better one from a wrong clock than none.
            ("latest-complete", Some(3), &[0, 1, 2, 3], &[4]),
            ("latest-complete", Some(3), &[0, 1, 2, 3, 4], &[]),
            ("2026-11-27T22-30-00Z", Some(3), &[], &[2]),
            ("2026-11-27", Some(3), &[], &[1, 2]),
            ("2026-11-28T", Some(3), &[], &[3]),
            ("2026-11-27T22-30-00Z.partial", Some(3), &[], &[]),
            ("2025", Some(3), &[], &[]),
            ("11-27", Some(3), &[], &[]),
            ("", Some(3), &[], &[]),
        ] {
            let choice = SnapshotChoice::parse(text);
            assert_eq!(found(&choice, latest, incomplete), expected, "{text}");
        }
    }

    #[test]
    fn a_time_means_the_newest_that_began_at_it_or_before() {
        for (time, expected) in [
            ("2026-11-26T09:59:59Z", &[][..]),
            ("2026-11-26T10:00:00Z", &[0]),
            ("2026-11-27T22:29:59Z", &[1]),
            ("2026-11-29T00:00:00Z", &[3]),
            // Better what was made last than what was made before under a later date.
            ("2027-03-01T00:00:00Z", &[3]),
        ] {
            let choice = SnapshotChoice::At(time.parse().unwrap());
            assert_eq!(found(&choice, Some(3), &[]), expected, "{time}");
        }
    }

    #[test]
    fn misdated_snapshot_is_meant_only_where_no_other_is() {
        // 22:30 of the 27th was made by a clock that ran ahead, before the 26th.
        let found = |text: &str| {
            let choice = SnapshotChoice::parse(text);
            found_beside(&choice, Some(3), &[3], &[2])
        };
        assert_eq!(found("latest-complete"), [1]);
        assert_eq!(found("2026-11-27"), [2, 1], "the last one counts");
        assert_eq!(found("2026-11-27T22-30-00Z"), [2]);
        let at = |time: &str| {
            let choice = SnapshotChoice::At(time.parse().unwrap());
            found_beside(&choice, Some(3), &[], &[2])
        };
        assert_eq!(at("2026-11-27T23:00:00Z"), [1]);
    }
}
