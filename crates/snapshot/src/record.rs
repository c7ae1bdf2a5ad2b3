//! The record `.sprat/NAME.json` beside a snapshot, and an entry of a list.
//!
//! The record is JSON so that it can be read with standard tools. Unknown fields are ignored and missing
//! ones get defaults, so that older and newer programs read each other's records.

use jiff::Timestamp;

use serde::{Deserialize, Serialize};

use crate::file_system::FileSystem;
use crate::name::{JobName, SnapshotName};
use crate::name_list::NameList;
use crate::pulled_source::PulledPart;
use crate::scan_rules::ScanRules;
use crate::staged_file::StagedFile;

/// The record's format. A higher number is still read, as far as its fields are known.
pub const RECORD_FORMAT: u32 = 1;

/// The rsync option by which a record shows that the job excluded what is mounted inside its sources.
pub(crate) const ONE_FILE_SYSTEM: &str = "--one-file-system";

/// rsync's own counts (`--stats`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunStats {
    /// Files of every kind, including folders.
    pub files: u64,
    /// Regular files among them.
    pub regular_files: u64,
    /// New entries. An unchanged file that became a hard link is not counted.
    pub created: u64,
    /// Regular files among them.
    pub created_regular: u64,
    /// Entries removed (restore with `delete`).
    pub deleted: u64,
    /// Regular files whose content was copied.
    pub transferred: u64,
    /// Size of all files.
    pub bytes_total: u64,
    /// Size of those whose content was copied.
    pub bytes_transferred: u64,
    /// Bytes sent as they are.
    pub bytes_literal: u64,
    /// Bytes found in an older version of the file, and not sent.
    pub bytes_matched: u64,
}

impl RunStats {
    /// The number of regular files, without folders. `None` if nothing was counted, as in an interrupted
    /// run. Records of early versions have only the number of all kinds.
    #[must_use]
    pub fn files_of_people(&self) -> Option<u64> {
        match (self.files, self.regular_files) {
            (0, _) => None,
            (all, 0) if self.bytes_total > 0 => Some(all),
            (_, regular) => Some(regular),
        }
    }

    /// Adds what another run into the same snapshot copied.
    pub(crate) fn add_copied(&mut self, other: &Self) {
        self.transferred += other.transferred;
        self.bytes_transferred += other.bytes_transferred;
        self.bytes_literal += other.bytes_literal;
        self.bytes_matched += other.bytes_matched;
    }
}

/// A tree that the new snapshot shares unchanged files with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkedFrom {
    /// The folder's name at the time of the run.
    pub folder: String,
    /// Its kind at that time.
    pub kind: EntryKind,
}

/// Something that did not prevent the snapshot, but that the user should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Warning {
    /// The clock shows an earlier time than the name of the newest snapshot.
    ClockBehind {
        /// That snapshot.
        newest: SnapshotName,
    },
    /// The volume lies inside a source. It was excluded.
    OwnVolumeLeftOut {
        /// Where, escaped.
        path: String,
    },
    /// Kernel file systems (`/proc` and such) lie inside a source. They were excluded.
    KernelFileSystemLeftOut {
        /// Where, escaped.
        path: String,
    },
    /// `latest` is not a symbolic link made by sprat. It was left unchanged.
    LatestLeftAlone,
    /// A crash stopped the previous run. These files of it were not known to be durable; they were
    /// copied again.
    CrashedRunSwept {
        /// Names removed from the interrupted tree.
        files: u64,
    },
    /// What the run changed could not be listed. The snapshot is as good as without it.
    ChangesNotListed {
        /// Why.
        reason: String,
    },
    /// The interrupted tree could not be removed; the next run tries again.
    LeftoverKept {
        /// Its folder.
        folder: String,
        /// Why.
        reason: String,
    },
    /// During the run, a disk inside a source was unmounted or replaced by another one. Files on it may
    /// be missing, so the snapshot is incomplete.
    UnmountedMeanwhile {
        /// Where, escaped.
        path: String,
    },
    /// During the run, a disk was mounted inside a source. Files on it or below its mount point may be
    /// missing, so the snapshot is incomplete.
    MountedMeanwhile {
        /// Where, escaped.
        path: String,
    },
    /// An earlier snapshot has a disk at this place. No disk is mounted there now.
    NotMounted {
        /// Where, escaped.
        path: String,
        /// The newest snapshot that has all of the disk, or else the newest that has some of it. `prune`
        /// keeps it.
        before: SnapshotName,
        /// The disk's identity; empty: not known.
        #[serde(default)]
        disk: String,
    },
    /// An earlier snapshot has another file system at this place. This snapshot has the present one.
    OtherFileSystem {
        /// Where, escaped.
        path: String,
        /// The newest snapshot that has all of the former file system, or else the newest that has some
        /// of it. `prune` keeps it.
        before: SnapshotName,
        /// The former file system, as text for people.
        was: String,
        /// The present file system, as text for people.
        now: String,
        /// The former one's identity; empty: not known.
        #[serde(default)]
        disk: String,
    },
    /// Nothing could be mounted on an automount point.
    AutomountEmpty {
        /// Where, escaped.
        path: String,
    },
    /// Folders were moved or removed during the run. Files in them may be missing, so the snapshot is
    /// incomplete.
    FoldersVanished {
        /// How many folders.
        folders: u64,
    },
    /// So many files vanished during the run that the snapshot counts as incomplete.
    ManyVanished {
        /// How many files.
        files: u64,
    },
    /// Files have more or larger attributes than the volume's file system can store (ext4: one block for
    /// each file). Their content is in the snapshot, some attributes are not.
    AttributesTooLarge {
        /// How many files.
        files: u64,
    },
    /// A check had found these files damaged in an older snapshot. They were read from the source again
    /// and are correct in this snapshot. [`RunRecord::healed`] lists them.
    DamageHealed {
        /// How many files.
        files: u64,
    },
    /// These files had changed with equal size and time, and an older snapshot lacks the change. This
    /// snapshot has it. [`RunRecord::caught_up`] lists them.
    MissedChangeCopied {
        /// How many files.
        files: u64,
    },
    /// `latest` could not be changed to point to this snapshot.
    LatestNotMoved {
        /// Why.
        reason: String,
    },
    /// The volume's file system refuses some attributes of files, such as `btrfs.compression`. Their
    /// content is in the snapshot, those attributes are not.
    AttributesRefused {
        /// How many files.
        files: u64,
    },
    /// Folders have the sticky bit and an ACL. In the snapshot their owning group has no rights, and the source could not
    /// be asked whether it has any, or they could not be set.
    GroupRightsUnknown {
        /// How many folders.
        folders: u64,
    },
    /// A source is missing, empty or unreadable. The snapshot has the other sources.
    SourceLeftOut {
        /// The source, escaped.
        path: String,
        /// Why.
        why: String,
    },
    /// A file has more hard links than the volume allows for one file, counting those in older
    /// snapshots. In this snapshot it is split into one or more separate copies. No name is missing.
    LinksSplit {
        /// One of its names, escaped.
        path: String,
    },
    /// rsync copied files that are unchanged since an older snapshot, instead of linking them. They use
    /// their space a second time.
    UnchangedCopied {
        /// How many, of the first thousand that were copied.
        files: u64,
    },
    /// A file is sparse, with much less data than its length. rsync reads the holes, too.
    HolesRead {
        /// The file, escaped.
        path: String,
        /// Its length.
        bytes: u64,
        /// The space that it uses on its disk.
        data_bytes: u64,
    },
    /// A foreign object has a name that sprat uses. It was left unchanged, or renamed.
    ForeignObject {
        /// Its path on the volume, escaped.
        path: String,
        /// What was done.
        done: String,
    },
    /// The job stays on one file system, and btrfs subvolumes in its sources count as other file
    /// systems. Their folders are empty in the snapshot.
    SubvolumesLeftOut {
        /// The first of them, escaped.
        path: String,
        /// How many there are.
        subvolumes: u64,
    },
    /// Files are excluded because of their size that the snapshot before did not exclude.
    /// [`RunRecord::too_large_new`] lists them.
    NewTooLarge {
        /// The first of them, escaped.
        path: String,
        /// How many there are.
        files: u64,
        /// The job's limit.
        larger_than: u64,
    },
    /// The output of a command has less than half of the bytes that the snapshot before has of it.
    DumpShrank {
        /// The file, relative to the snapshot, escaped.
        path: String,
        /// Its length.
        bytes: u64,
        /// Its length in the snapshot before.
        before_bytes: u64,
    },
    /// A warning that a newer version wrote.
    #[serde(other)]
    Unknown,
}

/// A file system that the user declared gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoneDisk {
    /// The file system, as the snapshots recorded it.
    pub file_system: FileSystem,
    /// The snapshots that are no longer kept because of it.
    pub snapshots: Vec<SnapshotName>,
}

impl GoneDisk {
    /// Whether it is about this file system.
    pub(crate) fn is_about(&self, disk: &FileSystem) -> bool {
        let gone = &self.file_system;
        gone.is_same(disk)
            .unwrap_or(gone.place == disk.place && gone.kind == disk.kind)
    }
}

/// The content of `.sprat/NAME.json`: what ran, and the result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// [`RECORD_FORMAT`].
    pub format: u32,
    /// The job.
    pub job: JobName,
    /// The snapshot.
    pub name: SnapshotName,
    /// Whether the snapshot has every requested file, with all attributes.
    pub complete: bool,
    /// Whether the run finished. False beside a `.partial`.
    #[serde(default)]
    pub finished_run: bool,
    /// Source paths, escaped.
    #[serde(default)]
    pub sources: Vec<String>,
    /// Patterns that were excluded.
    #[serde(default)]
    pub excludes: Vec<String>,
    /// Files with further such patterns, escaped.
    #[serde(default)]
    pub exclude_from: Vec<String>,
    /// What was excluded by what the sources had in them.
    #[serde(default)]
    pub scan: ScanRules,
    /// Folders whose content was excluded by `scan`, escaped.
    #[serde(default)]
    pub marked: NameList,
    /// Files that were excluded because of their size, escaped.
    #[serde(default)]
    pub too_large: NameList,
    /// Those of them that the snapshot before did not exclude, escaped.
    #[serde(default)]
    pub too_large_new: NameList,
    /// Mount points inside the sources that are in the snapshot. Escaped, at most 1000.
    #[serde(default)]
    pub mounts: Vec<String>,
    /// The file systems of the sources, and those mounted inside them. At most 1000. Empty in records of
    /// older versions.
    #[serde(default)]
    pub file_systems: Vec<FileSystem>,
    /// File systems of earlier snapshots that the user declared gone.
    #[serde(default)]
    pub disks_gone: Vec<GoneDisk>,
    /// Mount points of missing disks that the job's patterns exclude, escaped.
    #[serde(default)]
    pub disks_left_out: Vec<String>,
    /// When the run began.
    pub started: Timestamp,
    /// When the copying ended.
    pub ended: Timestamp,
    /// rsync's version.
    #[serde(default)]
    pub rsync_version: String,
    /// rsync's arguments, escaped.
    #[serde(default)]
    pub rsync_arguments: Vec<String>,
    /// rsync's exit code; `None` if a signal ended it.
    #[serde(default)]
    pub rsync_exit: Option<i32>,
    /// rsync's counts.
    #[serde(default)]
    pub stats: RunStats,
    /// Files of the snapshot that come from no source: the output of a command, the state of the system.
    #[serde(default)]
    pub staged: Vec<StagedFile>,
    /// Sources on other hosts that the snapshot has.
    #[serde(default)]
    pub pulled: Vec<PulledPart>,
    /// Trees that the snapshot shares unchanged files with.
    #[serde(default)]
    pub linked_from: Vec<LinkedFrom>,
    /// Source files that could not be read completely, attributes included. Also mount points whose disk
    /// came or went during the run. Escaped.
    #[serde(default)]
    pub unread: NameList,
    /// Source files that were removed before rsync read them. Harmless, unless they are many.
    #[serde(default)]
    pub vanished: NameList,
    /// Files that are damaged in an older snapshot and correct in this one, escaped.
    #[serde(default)]
    pub healed: NameList,
    /// Files whose change an older snapshot lacks and this one has, escaped.
    #[serde(default)]
    pub caught_up: NameList,
    /// rsync's messages, escaped and shortened.
    #[serde(default)]
    pub messages: NameList,
    /// What the user should know.
    #[serde(default)]
    pub warnings: Vec<Warning>,
    /// Why the run stopped, if it is a `.partial`.
    #[serde(default)]
    pub stopped_by: Option<String>,
}

/// The kind of a folder in a job's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EntryKind {
    /// A complete snapshot.
    #[serde(rename = "good")]
    Complete,
    /// An incomplete snapshot: some source files could not be read.
    #[serde(rename = "unread")]
    Incomplete,
    /// A folder with the name of a snapshot whose record is missing or unreadable. Its files are there.
    Unrecorded,
    /// The tree of an interrupted run. The next run uses it.
    Partial,
    /// The tree of a running or killed run.
    Inflight,
    /// A dated folder that the user's own rsync made. It is never changed.
    #[serde(rename = "by_hand")]
    Adopted,
    /// A foreign folder. It is never changed.
    Foreign,
}

impl EntryKind {
    /// Whether it is a finished snapshot.
    #[must_use]
    pub fn is_snapshot(self) -> bool {
        matches!(self, Self::Complete | Self::Incomplete | Self::Unrecorded)
    }
}

/// One folder of a job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotEntry {
    /// The job's folder, escaped.
    pub job: String,
    /// The folder's name, escaped.
    pub folder: String,
    /// What it is.
    pub kind: EntryKind,
    /// The moment in the folder's name.
    pub name: Option<SnapshotName>,
    /// Whether `latest` points to it.
    pub is_latest: bool,
    /// Why it is pinned, which may be empty; `None`: it is not pinned.
    #[serde(default)]
    pub pin: Option<String>,
    /// Its record.
    pub record: Option<RunRecord>,
    /// Why there is no record, although the folder has the name of a snapshot.
    pub record_error: Option<String>,
}

impl RunRecord {
    /// The sources on this machine that the snapshot lacks, escaped.
    pub(crate) fn left_out_here(&self) -> impl Iterator<Item = &String> {
        self.warnings.iter().filter_map(|warning| match warning {
            // Those on other hosts are no paths.
            Warning::SourceLeftOut { path, .. } if path.starts_with('/') => Some(path),
            _ => None,
        })
    }
}
