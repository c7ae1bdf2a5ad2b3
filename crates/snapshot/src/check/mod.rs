//! Reads the files of a mounted volume, each inode once, and compares them with what is known.
//!
//! A disk that can't give a block back says so, and ext4's own structures have checksums. A block
//! of a file that silently became another is seen by neither: the cipher decrypts it to noise. So
//! a checksum of every file is remembered from one check to the next (a file in a snapshot never
//! changes), or the files are compared with the live source.

mod affected;
mod blocks;
mod known;
mod lacking;
mod read;
mod source;
mod walk;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::SnapshotError;
use crate::name::JobName;
use crate::record::NameList;
use crate::spec::{Cancel, LocalContainer, Progress};
use crate::text::{escape_path, path_text, path_texts};
pub(crate) use affected::same_path_elsewhere;
pub use blocks::{FilesOn, files_on};
pub(crate) use known::Key;
use known::Known;
pub use known::begin_known_from;
use read::{Stop, Task, read_tasks};
use walk::Run;

/// Files that are read at a time: on a slow line most of a small file's time is waiting.
const READERS: usize = 8;
/// Files that wait to be read.
const QUEUE: usize = 64;

/// What is to be looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSpec {
    /// All files, or the files of one job's newest snapshot beside their sources.
    pub what: CheckWhat,
    /// The file on this host that keeps checksums from one check to the next.
    #[serde(with = "path_text")]
    pub known: PathBuf,
    /// The file on this host that lists the files whose content is wrong. Backups read those from
    /// their source.
    #[serde(with = "path_text")]
    pub suspects: PathBuf,
    /// After so long nothing more is begun; the next check goes on there. So that it gets on however
    /// short this is, one file at least is begun that wasn't read yet, and files are for at least a
    /// tenth of it from then on.
    pub duration_max: Option<Duration>,
    /// So much of it is over already: opening, and the file system's check.
    pub duration_over: Duration,
    /// How often what was read is written to `known`, so that a lost line loses no more than this.
    pub note_interval: Duration,
    /// Against a source: as in [`crate::SnapshotSpec::never_enter`].
    #[serde(default, with = "path_texts")]
    pub never_enter: Vec<PathBuf>,
    /// Against a source: as in [`crate::SnapshotSpec::container`].
    #[serde(default)]
    pub container: Option<LocalContainer>,
}

/// See [`CheckSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckWhat {
    /// Every file in the volume, those of the newest snapshots first.
    Everything,
    /// The latest snapshot of this job, compared with the files it was made from.
    AgainstSource(JobName),
}

/// What was found. Names are `JOB/SNAPSHOT/path`, escaped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckReport {
    /// Files read by this run; one of many links counts once.
    pub files_read: u64,
    /// Their bytes.
    pub bytes_read: u64,
    /// Files that this check's earlier runs had read.
    pub files_before: u64,
    /// Files of which a checksum was known from an earlier check.
    pub files_known: u64,
    /// Everything was looked at; else the next run goes on.
    pub finished: bool,
    /// Files and folders that can't be read.
    pub unreadable: NameList,
    /// Files whose content is not what it was at an earlier check, or not that of a source that
    /// hasn't changed since.
    pub damaged: NameList,
    /// The same files, under each name in each snapshot.
    pub affected: NameList,
    /// Names that they also have, for which time was too short.
    pub affected_left: u64,
    /// Against a source: files that are the same there.
    pub same: u64,
    /// Against a source: files that have changed there since the snapshot.
    pub changed: NameList,
    /// Against a source: files that differ without size or time telling, where the source was
    /// touched since they were copied. Backups don't copy them again.
    pub missed: NameList,
    /// Against a source: files that are no longer there.
    pub gone: NameList,
    /// Against a source: files and folders that can't be read there.
    pub source_unreadable: NameList,
    /// Against a source: files, folders and links that were there when the snapshot was begun, and that
    /// it lacks, by their paths there. The sources and patterns are those of the snapshot's run.
    pub lacking: NameList,
    /// Against a source: what the snapshot lacks, too, and what may have been made, moved or mounted
    /// there since.
    pub new_since: NameList,
    /// Against a source: why it is not known what the snapshot lacks.
    pub lacking_unknown: Option<String>,
    /// Files on this machine that could not be written, and why: later checks and backups don't know
    /// what this check read and found.
    pub not_saved: Vec<String>,
}

impl CheckReport {
    /// Whether anything in the volume is not as it should be.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        !self.unreadable.is_empty() || !self.damaged.is_empty()
    }
}

/// Looks at the volume mounted at `volume_root`, which nobody writes to.
pub fn check(
    volume_root: &Path,
    spec: &CheckSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<CheckReport, SnapshotError> {
    let known = Known::load(&spec.known).map_err(|source| volume("read", &spec.known, source))?;
    let (tasks_to, tasks) = mpsc::sync_channel::<Task>(QUEUE);
    let (done_to, done) = mpsc::channel();
    let tasks = Mutex::new(tasks);
    let mut run = Run::begin(volume_root, spec, known, progress, cancel);
    let walked = std::thread::scope(|scope| {
        for _ in 0..READERS {
            let done_to = done_to.clone();
            let tasks = &tasks;
            scope.spawn(move || read_tasks(tasks, &done_to, &Stop(cancel)));
        }
        drop(done_to);
        let walked = match &spec.what {
            CheckWhat::Everything => run.walk_all(&tasks_to, &done),
            CheckWhat::AgainstSource(job) => run.walk_job(job, &tasks_to, &done),
        };
        drop(tasks_to);
        for (task, outcome) in &done {
            run.take(&task, outcome);
        }
        walked
    });
    let finished = walked? && !run.left_any;
    run.report.finished = finished;
    if let (CheckWhat::AgainstSource(job), true) = (&spec.what, finished) {
        run.name_lacking(job);
    }
    if !cancel.is_cancelled() {
        run.name_affected();
    }
    // First: what was found is worth more than what need not be read again.
    let noted = run.note_suspects();
    let saved = run.known.save(&spec.known, finished);
    run.report.not_saved = [(&spec.suspects, noted), (&spec.known, saved)]
        .into_iter()
        .filter_map(|(path, result)| Some(format!("{}: {}", escape_path(path), result.err()?)))
        .collect();
    if cancel.is_cancelled() {
        return Err(SnapshotError::CheckCancelled);
    }
    Ok(run.report)
}

fn volume(op: &'static str, path: &Path, source: io::Error) -> SnapshotError {
    SnapshotError::Volume {
        op,
        object: escape_path(path),
        source,
    }
}
