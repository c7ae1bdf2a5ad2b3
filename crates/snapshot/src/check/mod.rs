//! Reads the files of a mounted volume, each inode once, and compares them with known checksums or with
//! their source.
//!
//! A disk reports a block that it can't read, and ext4's own structures have checksums. Neither detects
//! a block of a file that silently changed: the cipher decrypts it to noise. So each file is compared with
//! the digest that its backup noted in the list of changes, and its checksum is kept from one check to the
//! next (a file in a snapshot never changes). Or the files are compared with the live source.

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

use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::name::JobName;
use crate::name_list::NameList;
use crate::own_places::LocalContainer;
use crate::progress::Progress;
use crate::text::{escape_path, path_text, path_texts};
pub(crate) use affected::same_path_elsewhere;
pub use blocks::{FilesOn, files_on};
pub use known::begin_known_from;
pub(crate) use known::{Key, Known, key_text};
use read::{Task, read_tasks};
pub(crate) use source::{
    Compared, Source, compare as compare_with_source, of_difference as is_of_source, read_after,
};
use walk::Run;

/// How many files are read at once. On a slow connection most of the time for a small file is waiting.
const READERS: usize = 8;
/// How many files may wait to be read.
const QUEUE: usize = 64;

/// What to check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckSpec {
    /// All files, or those of one job's newest snapshot, compared with their source.
    pub what: CheckWhat,
    /// The file on this machine that keeps the checksums.
    #[serde(with = "path_text")]
    pub known: PathBuf,
    /// This machine's copies of the lists of changes, in a folder for each job. They have the digests of the
    /// backups; `None`: only the volume has them.
    #[serde(default, with = "crate::text::path_text_option")]
    pub change_lists: Option<PathBuf>,
    /// The list of suspects on this machine: files whose content is wrong. Backups read them from their
    /// source.
    #[serde(with = "path_text")]
    pub suspects: PathBuf,
    /// After this time no further file is begun. The next check continues there. So that there is
    /// progress with any limit, at least one unread file is begun, and from then on files are read for
    /// at least a tenth of this time.
    pub duration_max: Option<Duration>,
    /// After so many bytes no further file is begun. Files that are known as damaged do not count: each run
    /// reads them again.
    #[serde(default)]
    pub bytes_max: Option<u64>,
    /// How much of that time has passed already: for opening, and for the check of the file system.
    pub duration_over: Duration,
    /// How often the checksums are written to `known`. A lost connection costs no more than this.
    pub note_interval: Duration,
    /// For a comparison with the source: as in [`crate::SnapshotSpec::never_enter`].
    #[serde(default, with = "path_texts")]
    pub never_enter: Vec<PathBuf>,
    /// For a comparison with the source: as in [`crate::SnapshotSpec::containers`].
    #[serde(default)]
    pub containers: Vec<LocalContainer>,
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

/// The result. Names are `JOB/SNAPSHOT/path`, escaped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CheckReport {
    /// Files read by this run. A file with several links counts once.
    pub files_read: u64,
    /// Their bytes.
    pub bytes_read: u64,
    /// Files that earlier runs of this check had read.
    pub files_before: u64,
    /// Files with a checksum of an earlier check.
    pub files_known: u64,
    /// Files with a digest that the backup noted, or an earlier check beside it.
    pub files_listed: u64,
    /// Whether everything was checked. Otherwise the next run continues.
    pub finished: bool,
    /// Files and folders that can't be read.
    pub unreadable: NameList,
    /// Files whose content differs from an earlier check, or from a source that is unchanged since.
    pub damaged: NameList,
    /// Every name of these files in each snapshot.
    pub affected: NameList,
    /// How many further names they have that were not found in time.
    pub affected_left: u64,
    /// Compared with the source: files with the same content.
    pub same: u64,
    /// Compared with the source: files that changed after the snapshot.
    pub changed: NameList,
    /// Compared with the source: files whose content differs although size and time are equal, and whose
    /// source was touched since they were copied. Backups don't copy them again.
    pub missed: NameList,
    /// Compared with the source: files that no longer exist there.
    pub gone: NameList,
    /// Compared with the source: files and folders that can't be read there.
    pub source_unreadable: NameList,
    /// Compared with the source: files, folders and links that the snapshot lacks although they existed
    /// when it was begun, by their paths in the source. Sources and patterns are those of the snapshot's
    /// run.
    pub lacking: NameList,
    /// Compared with the source: what the snapshot lacks and what may have been created, moved or
    /// mounted after its run.
    pub new_since: NameList,
    /// Compared with the source: why it is unknown what the snapshot lacks.
    pub lacking_unknown: Option<String>,
    /// Files on this machine that could not be written, and why. Later checks and backups don't know
    /// what this check read and found.
    pub not_saved: Vec<String>,
}

impl CheckReport {
    /// Whether the volume is damaged.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        !self.unreadable.is_empty() || !self.damaged.is_empty()
    }
}

/// Checks the volume mounted at `volume_root`. Nothing may write to it meanwhile.
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
            scope.spawn(move || read_tasks(tasks, &done_to, cancel));
        }
        drop(done_to);
        let walked = match &spec.what {
            CheckWhat::Everything => run.walk_all(&tasks_to, &done),
            CheckWhat::AgainstSource(job) => run.walk_job(job, &tasks_to, &done),
        };
        drop(tasks_to);
        for (task, outcome) in &done {
            run.handle(&task, outcome);
        }
        walked
    });
    let finished = walked? && !run.left_any;
    run.report.finished = finished;
    if let (CheckWhat::AgainstSource(job), true) = (&spec.what, finished) {
        run.report_lacking(job);
    }
    if !cancel.is_cancelled() {
        run.report_affected();
    }
    // The suspects first: they are worth more than the checksums.
    let noted = run.save_suspects();
    let saved = run.known.save(&spec.known, finished);
    let computed = run.save_computed();
    let lists = spec.change_lists.as_ref().unwrap_or(&spec.known);
    run.report.not_saved = [
        (&spec.suspects, noted),
        (&spec.known, saved),
        (lists, computed),
    ]
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
