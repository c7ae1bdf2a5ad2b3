//! What this machine saw of a container in its last sessions: the results of its jobs, and the free space.
//! For `sprat status` and for notices; no backup depends on it.
//!
//! In the state folder, `status/UUID-TARGET.json` ([`StatePaths`]): the server never learns it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sprat_snapshot::{SnapshotReport, Warning, local_file};

use crate::files;
use crate::state::paths::{self, StatePaths};
use crate::{Exit, Failure, VolumeRoom};

/// How many days' room is kept.
pub const DAYS_MAX: usize = 31;

/// One container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// Room in the volume when it was last mounted.
    pub room: Option<SeenRoom>,
    /// The last of each day, oldest first, at most [`DAYS_MAX`]: for the date when it is full.
    #[serde(default)]
    pub room_by_day: Vec<SeenRoom>,
    /// Free space on the server when it was last asked.
    #[serde(default)]
    pub server: Option<SeenServer>,
    /// Snapshots that this machine remembered and did not find, until a person accepts that.
    #[serde(default)]
    pub gone: Option<SeenGone>,
    /// By their names.
    pub jobs: BTreeMap<String, JobHistory>,
}

/// What was left in the volume at the end of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenRoom {
    /// When.
    pub at: Timestamp,
    #[serde(flatten)]
    /// How much.
    pub room: VolumeRoom,
}

/// Snapshots that were the newest when this machine last saw them, and that are not in the container any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenGone {
    /// When the last of them was missed.
    pub at: Timestamp,
    /// `JOB/SNAPSHOT`.
    pub snapshots: BTreeSet<String>,
}

/// What a server reported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenServer {
    /// When.
    pub at: Timestamp,
    /// Free for this account; `None`: the server does not report it.
    pub available_bytes: Option<u64>,
}

/// How a job went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobHistory {
    /// The last time that it ran, however it ended.
    pub last_run: Run,
    /// The last snapshot that it made.
    pub last_snapshot: Option<MadeSnapshot>,
}

/// One run of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Its end.
    pub at: Timestamp,
    /// How it ended.
    pub exit: Exit,
    /// What went wrong, in one line.
    pub failure: Option<String>,
}

/// A snapshot that was made, and is on the server's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeSnapshot {
    /// When its run ended.
    pub at: Timestamp,
    /// Its name.
    pub name: String,
    /// No source file was left unread.
    pub complete: bool,
    /// Disks that it lacks, or that another disk has replaced.
    #[serde(default)]
    pub missing: Vec<MissingPlace>,
}

impl MadeSnapshot {
    /// What `report` says, at `at`.
    #[must_use]
    pub fn of(at: Timestamp, report: &SnapshotReport) -> Self {
        let place = |warning: &Warning| match warning {
            Warning::NotMounted { path, before, disk }
            | Warning::OtherFileSystem {
                path, before, disk, ..
            } => Some(MissingPlace {
                path: path.clone(),
                kept_in: before.to_string(),
                disk: disk.clone(),
            }),
            _ => None,
        };
        Self {
            at,
            name: report.name.to_string(),
            complete: report.record.complete,
            missing: report.record.warnings.iter().filter_map(place).collect(),
        }
    }
}

/// A disk that a run did not find.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingPlace {
    /// Where it was mounted, escaped.
    pub path: String,
    /// The snapshot that has it.
    pub kept_in: String,
    /// Its identity; empty: not known.
    #[serde(default)]
    pub disk: String,
}

impl History {
    /// Reads the history. Empty if that fails: it is for people only.
    pub fn load(paths: &StatePaths) -> Self {
        files::read_json(&path(paths)).unwrap_or_default()
    }

    /// Reads the history. Empty if there is none.
    pub(crate) fn read(paths: &StatePaths) -> Result<Self, Failure> {
        files::read_json_if_there(&path(paths)).map(Option::unwrap_or_default)
    }

    /// Changes the history. Sessions that end at the same moment take turns.
    pub fn update(paths: &StatePaths, change: impl FnOnce(&mut Self)) -> std::io::Result<()> {
        let path = path(paths);
        let folder = path.parent().unwrap_or(Path::new("."));
        local_file::make_private_folder(folder)?;
        let turn = File::open(folder)?;
        flock(&turn, FlockOperation::LockExclusive)?;
        let mut history = Self::load(paths);
        change(&mut history);
        files::write_json(&path, &history)
    }

    /// Records the free space of the volume, if it was mounted.
    pub fn saw(&mut self, room: Option<VolumeRoom>) {
        if let Some(room) = room {
            self.saw_room(Timestamp::now(), room);
        }
    }

    /// Records the free space of the volume at `at`.
    pub fn saw_room(&mut self, at: Timestamp, room: VolumeRoom) {
        let seen = SeenRoom { at, room };
        let day = |seen: &SeenRoom| seen.at.as_second().div_euclid(86_400);
        // A clock that went back leaves no day ahead of this one.
        self.room_by_day.retain(|before| day(before) < day(&seen));
        self.room_by_day.push(seen.clone());
        let surplus = self.room_by_day.len().saturating_sub(DAYS_MAX);
        self.room_by_day.drain(..surplus);
        self.room = Some(seen);
    }

    /// Records the free space of the server at `at`.
    pub fn saw_server(&mut self, at: Timestamp, available_bytes: Option<u64>) {
        self.server = Some(SeenServer {
            at,
            available_bytes,
        });
    }

    /// Records at `at` which snapshots are gone.
    pub fn saw_gone(&mut self, at: Timestamp, snapshots: &[String]) {
        let before = self.gone.take();
        let before = before.map(|gone| gone.snapshots).unwrap_or_default();
        let snapshots = before.into_iter().chain(snapshots.iter().cloned());
        self.gone = Some(SeenGone {
            at,
            snapshots: snapshots.collect(),
        });
    }

    /// Notes how a job's run ended.
    pub fn ran(&mut self, job: &str, run: Run, made: Option<MadeSnapshot>) {
        let before = self.jobs.remove(job);
        let last_snapshot = made.or_else(|| before.and_then(|job| job.last_snapshot));
        let history = JobHistory {
            last_run: run,
            last_snapshot,
        };
        self.jobs.insert(job.to_owned(), history);
    }
}

fn path(paths: &StatePaths) -> PathBuf {
    paths.file(paths::STATUS, ".json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(second: i64, exit: Exit) -> Run {
        Run {
            at: Timestamp::from_second(second).unwrap(),
            exit,
            failure: (exit == Exit::Unreachable).then(|| "no line".to_owned()),
        }
    }

    #[test]
    fn a_failed_run_leaves_the_last_snapshot_known() {
        let folder = tempfile::tempdir().unwrap();
        let paths = &paths::tests::paths(folder.path(), "host:x.luks");
        assert_eq!(History::load(paths), History::default());
        let made = MadeSnapshot {
            at: Timestamp::from_second(7).unwrap(),
            name: "2026-11-23T13-21-01Z".to_owned(),
            complete: true,
            missing: Vec::new(),
        };
        let first = made.clone();
        History::update(paths, |known| {
            known.ran("home", run(7, Exit::Done), Some(first));
        })
        .unwrap();
        History::update(paths, |known| {
            known.ran("home", run(9, Exit::Unreachable), None);
            known.ran("www", run(9, Exit::Failed), None);
        })
        .unwrap();
        let known = History::load(paths);
        assert_eq!(known.jobs["home"].last_snapshot, Some(made));
        assert_eq!(known.jobs["home"].last_run, run(9, Exit::Unreachable));
        assert_eq!(known.jobs["www"].last_snapshot, None);
        std::fs::write(path(paths), "{").unwrap();
        assert_eq!(History::load(paths), History::default());
    }

    #[test]
    fn room_is_kept_once_a_day_for_a_month_and_never_ahead() {
        let mut known = History::default();
        let room = |free| VolumeRoom {
            total_bytes: 100,
            available_bytes: free,
            inodes: 10,
            free_inodes: 10,
            metadata: None,
        };
        let at = |hour: i64| Timestamp::from_second(hour * 3600).unwrap();
        for hour in 0..40 * 24 {
            known.saw_room(at(hour), room(1));
        }
        assert_eq!(known.room_by_day.len(), DAYS_MAX);
        assert_eq!(known.room_by_day[0].at, at(9 * 24 + 23));
        assert_eq!(known.room_by_day.last(), known.room.as_ref());
        known.saw_room(at(20 * 24), room(2));
        let days: Vec<_> = known.room_by_day.iter().map(|seen| seen.at).collect();
        assert_eq!(days.len(), 12);
        assert_eq!(days.last(), Some(&at(20 * 24)));
    }

    #[test]
    fn runs_that_end_at_once_are_all_noted() {
        let folder = tempfile::tempdir().unwrap();
        let paths = &paths::tests::paths(folder.path(), "host:x.luks");
        std::thread::scope(|scope| {
            for number in 0..8 {
                scope.spawn(move || {
                    let job = format!("job-{number}");
                    History::update(paths, |known| {
                        known.ran(&job, run(number, Exit::Done), None);
                    })
                    .unwrap();
                });
            }
        });
        assert_eq!(History::load(paths).jobs.len(), 8);
    }
}
