//! What a caller requests (snapshot, restore), and the report that it gets back.

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::census::{Census, CensusSpec};
use crate::choice::SnapshotChoice;
use crate::file_listener::FileListener;
use crate::name::{JobName, SnapshotName};
use crate::name_list::NameList;
use crate::own_places::LocalContainer;
use crate::page_cache::PageCache;
use crate::pulled_source::PulledSource;
use crate::record::{EntryKind, RunRecord, RunStats};
use crate::scan_rules::ScanRules;
use crate::staged_file::StagedFile;
use crate::text::{path_text, path_text_option, path_texts};

/// What to back up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSpec {
    /// The job, a folder at the top of the volume.
    pub job: JobName,
    /// Absolute paths of folders and files. They appear in the snapshot with their whole path.
    #[serde(with = "path_texts")]
    pub sources: Vec<PathBuf>,
    /// Sources on other hosts. They appear in the snapshot below `@HOST`.
    #[serde(default)]
    pub pulled: Vec<PulledSource>,
    /// The command that reaches other hosts, in words: ssh with its options.
    #[serde(default)]
    pub ssh_command: Vec<String>,
    /// What the login shell of a host runs as rsync.
    #[serde(default)]
    pub rsync_path: String,
    /// Patterns in rsync's pattern language, as its `--exclude` takes them.
    #[serde(default)]
    pub excludes: Vec<String>,
    /// Files with one such pattern in each line. Absolute paths.
    #[serde(default, with = "path_texts")]
    pub exclude_from: Vec<PathBuf>,
    /// What is excluded by what the sources have in them.
    #[serde(default)]
    pub scan: ScanRules,
    /// Count what is new before anything is copied.
    #[serde(default)]
    pub census: Option<CensusSpec>,
    /// Where this machine keeps copies of the lists of what the runs of this job changed; `None`: nowhere.
    #[serde(default, with = "path_text_option")]
    pub change_lists: Option<PathBuf>,
    /// Until then a person could change files in snapshots, see [`crate::Lists::edited`].
    #[serde(default)]
    pub edited: Option<Timestamp>,
    /// Where this machine keeps the hashes of the blocks of the large files of this job; `None`: nowhere.
    #[serde(default, with = "path_text_option")]
    pub blocks: Option<PathBuf>,
    /// How much work on a large file an interruption may cost; `None`: some minutes.
    #[serde(default)]
    pub parts_every: Option<Duration>,
    /// The digests of new content are computed from what is in memory.
    #[serde(default)]
    pub page_cache: PageCache,
    /// Files that come from no source. Their content waits on the volume.
    #[serde(default)]
    pub staged: Vec<StagedFile>,
    /// What must be in `staged`, relative to the snapshot. Without it no snapshot is made.
    #[serde(default, with = "path_texts")]
    pub required: Vec<PathBuf>,
    /// Files and folders that must never be in a snapshot, such as the runtime folder. They are excluded
    /// without a warning. The volume's own mount points need not be listed.
    #[serde(default, with = "path_texts")]
    pub never_enter: Vec<PathBuf>,
    /// The container itself, and the other containers on this machine. They are excluded, too, with all
    /// of sprat's files beside them.
    #[serde(default)]
    pub containers: Vec<LocalContainer>,
    /// Mount points whose disks are gone for good. They are no longer reported as not mounted.
    #[serde(default, with = "path_texts")]
    pub disks_gone: Vec<PathBuf>,
    /// Stay on the file system of each source (rsync's `--one-file-system`).
    #[serde(default)]
    pub one_file_system: bool,
    /// Compare the content of every file with the snapshot that it would be linked from (rsync's
    /// `--checksum`). This reads all of the source and of the snapshot.
    #[serde(default)]
    pub checksum: bool,
    /// The list of files whose content is wrong, see [`crate::CheckSpec::suspects`].
    #[serde(default, with = "path_text_option")]
    pub suspects: Option<PathBuf>,
    /// Accept sources that contain no file. Otherwise they are refused: an empty folder is most often a
    /// disk that is not mounted.
    #[serde(default)]
    pub allow_empty: bool,
    /// rsync: an absolute path, or a plain name that is searched for in the usual folders.
    #[serde(default = "rsync_name", with = "path_text")]
    pub rsync: PathBuf,
    /// Receives each file whose content is copied.
    #[serde(default)]
    pub listener: FileListener,
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
            pulled: Vec::new(),
            ssh_command: vec!["ssh".to_owned()],
            rsync_path: "rsync".to_owned(),
            excludes: Vec::new(),
            exclude_from: Vec::new(),
            scan: ScanRules::default(),
            census: None,
            change_lists: None,
            edited: None,
            blocks: None,
            parts_every: None,
            page_cache: PageCache::default(),
            staged: Vec::new(),
            required: Vec::new(),
            never_enter: Vec::new(),
            containers: Vec::new(),
            disks_gone: Vec::new(),
            one_file_system: false,
            checksum: false,
            suspects: None,
            allow_empty: false,
            rsync: rsync_name(),
            listener: FileListener::default(),
        }
    }
}

/// What a finished run made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The new snapshot.
    pub name: SnapshotName,
    /// The content of `.sprat/NAME.json`. `record.complete` is false if source files could not be read
    /// (exit code 3).
    pub record: RunRecord,
    /// How many finished snapshots the job has now; `None`: not known.
    #[serde(default)]
    pub snapshots: Option<u64>,
    /// What was new in the sources, if [`SnapshotSpec::census`] asked for it.
    #[serde(default)]
    pub census: Option<Census>,
}

/// What to restore, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreSpec {
    /// The job.
    pub job: JobName,
    /// The snapshot.
    #[serde(default)]
    pub snapshot: SnapshotChoice,
    /// One file or folder, by its absolute path in the source; it becomes `to/basename`. `None` or `/`:
    /// everything, with its whole path below `to`. With `to` = `/` that restores in place.
    #[serde(default, with = "path_text_option")]
    pub path: Option<PathBuf>,
    /// Several files or folders instead, by their absolute paths in the source. Each keeps its whole path
    /// below `to`. Not with `delete`.
    #[serde(default, with = "path_texts")]
    pub paths: Vec<PathBuf>,
    /// Absolute path of the destination folder. It is created if it is missing.
    #[serde(with = "path_text")]
    pub to: PathBuf,
    /// What becomes of files that are there already.
    #[serde(default)]
    pub existing: Existing,
    /// Give files to the users and groups of the same names here. By the snapshot's `/etc/passwd` and
    /// `/etc/group`. Otherwise, and without such a name, the numbers count.
    #[serde(default)]
    pub owner_by_name: bool,
    /// Only report what would be done.
    #[serde(default)]
    pub dry_run: bool,
    /// Delete what the snapshot doesn't have: within the restored folder if `path` is given, otherwise
    /// within each of the snapshot's sources. Never anything outside of them.
    #[serde(default)]
    pub delete: bool,
    /// With `delete`: delete, too, what the job's patterns excluded. It is then lost at the destination.
    #[serde(default)]
    pub delete_excluded: bool,
    /// Skip files of equal size and time without comparing their content. For continuing an interrupted
    /// restore.
    #[serde(default)]
    pub trust_times: bool,
    /// After the restore, compare all files of the snapshot with those at the destination.
    #[serde(default)]
    pub verify: bool,
    /// Paths that are neither overwritten nor deleted: the same as in [`SnapshotSpec::never_enter`].
    #[serde(default, with = "path_texts")]
    pub never_enter: Vec<PathBuf>,
    /// As in [`SnapshotSpec::containers`]. With `delete`, a restore into a folder that contains one is
    /// refused.
    #[serde(default)]
    pub containers: Vec<LocalContainer>,
    /// As in [`crate::PruneSpec::suspects`].
    #[serde(default, with = "path_text_option")]
    pub suspects: Option<PathBuf>,
    /// As in [`crate::CheckSpec::change_lists`].
    #[serde(default, with = "path_text_option")]
    pub change_lists: Option<PathBuf>,
    /// As in [`SnapshotSpec::rsync`].
    #[serde(default = "rsync_name", with = "path_text")]
    pub rsync: PathBuf,
}

impl RestoreSpec {
    /// Restores everything of the job's latest snapshot into `to`.
    #[must_use]
    pub fn new(job: JobName, to: PathBuf) -> Self {
        Self {
            job,
            snapshot: SnapshotChoice::Latest,
            path: None,
            paths: Vec::new(),
            to,
            existing: Existing::default(),
            owner_by_name: false,
            dry_run: false,
            delete: false,
            delete_excluded: false,
            trust_times: false,
            verify: false,
            never_enter: Vec::new(),
            containers: Vec::new(),
            suspects: None,
            change_lists: None,
            rsync: rsync_name(),
        }
    }
}

/// What a restore does with files that are at the destination already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Existing {
    /// Replaces those that differ.
    #[default]
    Overwrite,
    /// Keeps them all. Folders still get the attributes of the snapshot.
    Keep,
    /// Keeps those with a newer modification time.
    KeepNewer,
}

/// What a restore would do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Planned {
    /// Files and folders that would be created.
    pub new: u64,
    /// Regular files whose content would be replaced.
    pub replaced: u64,
    /// What is newer here, other than folders: with [`Existing::Overwrite`] they are among `replaced`, with
    /// [`Existing::KeepNewer`] they stay. `None`: all that is there stays.
    pub newer_here: Option<u64>,
    /// Files and folders that would be deleted.
    pub deleted: u64,
}

/// What a restore did, or with `dry_run` would do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RestoreReport {
    /// The folder that was restored from.
    pub snapshot: String,
    /// Its kind. The user must be warned if it isn't [`EntryKind::Complete`].
    pub kind: EntryKind,
    /// How many source files the snapshot lacks because they could not be read.
    pub unread_count: u64,
    /// How many of them are in the snapshot, and lack only attributes.
    #[serde(default)]
    pub without_attributes: u64,
    /// The newest complete snapshot, if it is another one.
    pub last_good: Option<SnapshotName>,
    /// rsync's counts.
    pub stats: RunStats,
    /// Files that were compared and skipped: size, time and content were equal.
    #[serde(default)]
    pub same: u64,
    /// Files that were written although size and time were equal: the content was different, or they
    /// were hard links to other files. Escaped, relative to the destination.
    #[serde(default)]
    pub unequal: NameList,
    /// Files that were restored with wrong content: a check found them damaged, or they differ from the list of changes
    /// of their run. Escaped, relative to the destination.
    #[serde(default)]
    pub damaged: NameList,
    /// Files with wrong content that were not restored: those of the destination have the same size and time. Escaped,
    /// relative to it.
    #[serde(default)]
    pub damaged_kept: NameList,
    /// With [`RestoreSpec::verify`]: how many files have the content of the snapshot.
    #[serde(default)]
    pub verified: Option<u64>,
    /// Folders of the snapshot that have no place on this machine, and were not restored in place.
    /// Escaped.
    #[serde(default)]
    pub left_out: Vec<String>,
    /// Folders of the snapshot that were not restored, because something else is in their place and stays. Escaped.
    #[serde(default)]
    pub kept_in_place: Vec<String>,
    /// With `dry_run`: the counts.
    #[serde(default)]
    pub planned: Option<Planned>,
    /// With `dry_run`: what would be written or deleted, one escaped line for each.
    pub changes: NameList,
    /// Messages of rsync that report no failure, escaped.
    pub messages: NameList,
}
