//! What a caller asks for (snapshot, restore), how it follows and stops it, and what it gets back.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::name::{JobName, SnapshotName};
use crate::record::{EntryKind, NameList, RunRecord, RunStats};
use crate::text::{path_text, path_text_option, path_texts};

/// The container, where it lies on this machine, and sprat's own files beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalContainer {
    /// Its absolute path.
    #[serde(with = "path_text")]
    pub path: PathBuf,
    /// What follows its name in the names of the files beside it; each is plain text and the classes
    /// `[0-9]` and `[0-9a-f]`, as rsync's patterns have them.
    pub endings: Vec<String>,
}

/// What to back up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSpec {
    /// The job, a folder at the top of the volume.
    pub job: JobName,
    /// Absolute paths of folders and files. They appear in the snapshot with their whole path.
    #[serde(with = "path_texts")]
    pub sources: Vec<PathBuf>,
    /// Patterns in rsync's pattern language, as its `--exclude` takes them.
    #[serde(default)]
    pub excludes: Vec<String>,
    /// Files with one such pattern a line. Absolute paths.
    #[serde(default, with = "path_texts")]
    pub exclude_from: Vec<PathBuf>,
    /// Files and folders that never belong into a snapshot, such as the run-time folder; they are
    /// left out without a word. The volume's own mount points need not be named.
    #[serde(default, with = "path_texts")]
    pub never_enter: Vec<PathBuf>,
    /// The container itself, left out in the same way with all that is beside it.
    #[serde(default)]
    pub container: Option<LocalContainer>,
    /// Places whose disks are gone for good: that they aren't mounted is told no more.
    #[serde(default, with = "path_texts")]
    pub disks_gone: Vec<PathBuf>,
    /// Stay on the file system of each source (rsync's `--one-file-system`).
    #[serde(default)]
    pub one_file_system: bool,
    /// Compare the content of every file with the snapshot that it would be linked from (rsync's
    /// `--checksum`): reads all of both.
    #[serde(default)]
    pub checksum: bool,
    /// The list of files whose content is wrong, see [`crate::CheckSpec::suspects`].
    #[serde(default, with = "path_text_option")]
    pub suspects: Option<PathBuf>,
    /// Accept sources that hold no file at all. Else they are refused: an empty folder is most
    /// often one whose disk is not mounted.
    #[serde(default)]
    pub allow_empty: bool,
    /// The program: an absolute path, or a plain name that is looked for in the usual folders.
    #[serde(default = "rsync_name", with = "path_text")]
    pub rsync: PathBuf,
}

fn rsync_name() -> PathBuf {
    PathBuf::from("rsync")
}

impl SnapshotSpec {
    /// A job with these sources and nothing excluded.
    #[must_use]
    pub fn new(job: JobName, sources: Vec<PathBuf>) -> Self {
        Self {
            job,
            sources,
            excludes: Vec::new(),
            exclude_from: Vec::new(),
            never_enter: Vec::new(),
            container: None,
            disks_gone: Vec::new(),
            one_file_system: false,
            checksum: false,
            suspects: None,
            allow_empty: false,
            rsync: rsync_name(),
        }
    }
}

/// What a finished run made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The new snapshot.
    pub name: SnapshotName,
    /// The same as lies beside it in `.sprat/NAME.json`; `record.complete` is false where source
    /// files could not be read (exit code 3).
    pub record: RunRecord,
}

/// What to bring back, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// The job.
    pub job: JobName,
    /// The folder's name as [`crate::list()`] tells it. `None` or `latest`: what `latest` points to,
    /// else the newest finished one.
    #[serde(default)]
    pub snapshot: Option<String>,
    /// One file or folder, by its absolute path in the source; it becomes `to/basename`. `None`
    /// (or `/`): everything, with its whole path below `to`, so that `/` restores in place.
    #[serde(default, with = "path_text_option")]
    pub path: Option<PathBuf>,
    /// Absolute path of the folder that receives it; made if it is missing.
    #[serde(with = "path_text")]
    pub to: PathBuf,
    /// Only tell what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// Remove what the snapshot doesn't have: within the restored folder where `path` is given,
    /// else within each of the snapshot's sources. Never anything beside them.
    #[serde(default)]
    pub delete: bool,
    /// With `delete`: also where the job left files out by patterns, which are then lost at the
    /// destination.
    #[serde(default)]
    pub delete_excluded: bool,
    /// Leave files whose size and time are equal as they are, without comparing their content: for
    /// going on with a restore that was interrupted.
    #[serde(default)]
    pub trust_times: bool,
    /// Compare all that is in the snapshot with what is at the destination when everything is written.
    #[serde(default)]
    pub verify: bool,
    /// What no snapshot ever holds is neither written over nor deleted: the same places as in
    /// [`SnapshotSpec::never_enter`].
    #[serde(default, with = "path_texts")]
    pub never_enter: Vec<PathBuf>,
    /// As in [`SnapshotSpec::container`]; with `delete` nothing is restored where it lies.
    #[serde(default)]
    pub container: Option<LocalContainer>,
    /// As in [`SnapshotSpec::rsync`].
    #[serde(default = "rsync_name", with = "path_text")]
    pub rsync: PathBuf,
}

impl RestoreSpec {
    /// Everything of the job's latest snapshot, into `to`.
    #[must_use]
    pub fn new(job: JobName, to: PathBuf) -> Self {
        Self {
            job,
            snapshot: None,
            path: None,
            to,
            dry_run: false,
            delete: false,
            delete_excluded: false,
            trust_times: false,
            verify: false,
            never_enter: Vec::new(),
            container: None,
            rsync: rsync_name(),
        }
    }
}

/// What a restore did, or with `dry_run` would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The folder that was restored from.
    pub snapshot: String,
    /// Its kind: where it isn't [`EntryKind::Good`], the user should be told.
    pub kind: EntryKind,
    /// How many source files that snapshot is missing because they could not be read.
    pub unread_count: u64,
    /// The newest snapshot without unread files, where that is another one.
    pub last_good: Option<SnapshotName>,
    /// rsync's counts.
    pub stats: RunStats,
    /// Files that were compared and left as they are: size, time and content were equal.
    #[serde(default)]
    pub same: u64,
    /// Files that were written although size and time were equal: their content was another one, or
    /// they were hard links to something else. Escaped, relative to the destination.
    #[serde(default)]
    pub unequal: NameList,
    /// With [`RestoreSpec::verify`]: files whose content was compared afterwards, and is the snapshot's.
    #[serde(default)]
    pub verified: Option<u64>,
    /// With `dry_run`: what would be written or deleted, one escaped line each.
    pub changes: NameList,
    /// Messages of rsync that were no failure, escaped.
    pub messages: NameList,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of file content that were copied or found unchanged so far.
    pub bytes_done: u64,
    /// Part of the known bytes that is done, 0 to 100. It can fall while more is being found.
    pub percent: Option<u8>,
    /// As rsync measures it.
    pub bytes_per_s: Option<u64>,
    /// Files and folders looked at so far.
    pub files_done: u64,
    /// Files and folders found so far.
    pub files_found: u64,
    /// Whether `files_found` is all there is.
    pub all_found: bool,
    /// For how many seconds rsync has said nothing and moved no byte, where that is long: something
    /// hangs.
    #[serde(default)]
    pub still_s: Option<u64>,
    /// Files and folders of the job's newest finished snapshot: about as many are to be expected.
    #[serde(default)]
    pub files_expected: Option<u64>,
}

impl Progress {
    /// The beginning of `phase`.
    #[must_use]
    pub fn begin(phase: Phase) -> Self {
        Self {
            phase,
            bytes_done: 0,
            percent: None,
            bytes_per_s: None,
            files_done: 0,
            files_found: 0,
            all_found: false,
            still_s: None,
            files_expected: None,
        }
    }

    /// The same with what the snapshot before says of the number of files.
    pub(crate) fn expecting(self, files_expected: Option<u64>) -> Self {
        Self {
            files_expected,
            ..self
        }
    }
}

/// The steps of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Phase {
    /// Looks at the sources.
    Checking,
    /// Takes up what an earlier run left.
    Recovering,
    /// rsync runs.
    Copying,
    /// Waits until everything is written.
    Syncing,
    /// Compares files of a restore with those that are there.
    Comparing,
    /// Gives the snapshot its name.
    Naming,
    /// Removes the interrupted tree that is no longer needed. The snapshot is finished.
    Removing,
}

/// A wish to stop, shared between threads. rsync gets SIGTERM, and SIGKILL some seconds later.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Nobody wishes to stop yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the run to stop. May be called at any time, and twice.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether somebody did.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
