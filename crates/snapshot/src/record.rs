//! What is known about a snapshot: the record `.sprat/NAME.json` beside it, and an entry of a list.
//!
//! The record is JSON so that a person with stock tools can read it. Unknown fields are ignored and
//! missing ones take their defaults, so that older and newer programs read each other's records.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::disks::GoneDisk;
use crate::file_system::FileSystem;
use crate::name::{JobName, SnapshotName};

/// The record's format. A higher number is still read, as far as its fields are known.
pub const RECORD_FORMAT: u32 = 1;

/// rsync's option, by which a record tells that the job left out what was mounted inside its sources.
pub(crate) const ONE_FILE_SYSTEM: &str = "--one-file-system";

/// How many names a list in a record keeps; further ones are only counted.
pub const NAMES_MAX: usize = 1000;

/// Some names or messages, as escaped text, and how many there were in all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NameList {
    /// How many there were.
    pub count: u64,
    /// The first of them.
    pub names: Vec<String>,
}

impl NameList {
    /// Counts `name`, and keeps it if there is room.
    pub(crate) fn push(&mut self, name: String) {
        self.push_within(name, NAMES_MAX);
    }

    /// As [`NameList::push`], unless it is the name that came last: rsync has a message for each
    /// attribute of a file, one after the other.
    pub(crate) fn push_new(&mut self, name: String) {
        if self.names.last() != Some(&name) {
            self.push(name);
        }
    }

    pub(crate) fn push_within(&mut self, name: String, names_max: usize) {
        self.count = self.count.saturating_add(1);
        if self.names.len() < names_max {
            self.names.push(name);
        }
    }

    /// The same list with each name changed.
    pub(crate) fn map(&self, change: impl FnMut(&String) -> String) -> Self {
        Self {
            count: self.count,
            names: self.names.iter().map(change).collect(),
        }
    }

    /// Adds what `other` has, up to `names_max` names.
    pub(crate) fn append_within(&mut self, other: &Self, names_max: usize) {
        let count = self.count.saturating_add(other.count);
        for name in &other.names {
            self.push_within(name.clone(), names_max);
        }
        self.count = count;
    }

    /// Adds what `other` has.
    pub(crate) fn append(&mut self, other: &Self) {
        self.append_within(other, NAMES_MAX);
    }

    /// Whether there was none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

/// rsync's own counts (`--stats`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunStats {
    /// Files of every kind, folders too.
    pub files: u64,
    /// Regular files among them.
    pub regular_files: u64,
    /// Entries made new. An unchanged file that became a hard link is not counted.
    pub created: u64,
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
    /// Bytes found in an older version of the file.
    pub bytes_matched: u64,
}

impl RunStats {
    /// Regular files, which is what people call files; folders are none. `None` where nothing was counted,
    /// as by a run that was interrupted. Records of early versions know of all kinds together only.
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

/// A tree whose unchanged files the new snapshot shares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkedFrom {
    /// The folder's name at the time of the run.
    pub folder: String,
    /// What it was.
    pub kind: EntryKind,
}

/// Something that did no harm to the snapshot, but that its owner should know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Warning {
    /// The clock says an earlier time than the newest snapshot's name.
    ClockBehind {
        /// That snapshot.
        newest: SnapshotName,
    },
    /// The volume lies inside a source; it was left out.
    OwnVolumeLeftOut {
        /// Where, escaped.
        path: String,
    },
    /// The kernel's own file systems (`/proc` and such) lie inside a source; they were left out.
    KernelFileSystemLeftOut {
        /// Where, escaped.
        path: String,
    },
    /// `latest` is something other than our symbolic link and was left alone.
    LatestLeftAlone,
    /// The previous run was stopped by a crash; this many files of it were not yet known to be
    /// durable and were copied again.
    CrashedRunSwept {
        /// Names removed from the interrupted tree.
        files: u64,
    },
    /// The interrupted tree could not be removed; the next run tries again.
    LeftoverKept {
        /// Its folder.
        folder: String,
        /// Why.
        reason: String,
    },
    /// A disk inside a source was unmounted, or another one mounted in its place, while the run went
    /// on: what lies in it may be missing, so the snapshot is not whole.
    UnmountedMeanwhile {
        /// Where, escaped.
        path: String,
    },
    /// A disk was mounted inside a source while the run went on: what lies in it, or below it, may be
    /// missing, so the snapshot is not whole.
    MountedMeanwhile {
        /// Where, escaped.
        path: String,
    },
    /// A finished snapshot has a disk there, and today none is mounted.
    NotMounted {
        /// Where, escaped.
        path: String,
        /// The newest snapshot that has the disk in full, else the newest that has it; `prune` keeps it.
        before: SnapshotName,
    },
    /// A finished snapshot has another file system there than is there today: this snapshot has the
    /// one of today.
    OtherFileSystem {
        /// Where, escaped.
        path: String,
        /// The newest snapshot that has the former one in full, else the newest that has it; `prune`
        /// keeps it.
        before: SnapshotName,
        /// What was there, for people.
        was: String,
        /// What is there, for people.
        now: String,
    },
    /// An automount point on which nothing could be mounted.
    AutomountEmpty {
        /// Where, escaped.
        path: String,
    },
    /// Folders were moved or removed while the run went on: what is in them may be missing, so the
    /// snapshot is not whole.
    FoldersVanished {
        /// How many folders.
        folders: u64,
    },
    /// So large a part of the source vanished while the run went on that the snapshot is not called
    /// whole.
    ManyVanished {
        /// How many files.
        files: u64,
    },
    /// Files have more or larger attributes than the volume's file system holds (ext4: one block for
    /// all of a file); their content is there, some attributes are not.
    AttributesTooLarge {
        /// How many files.
        files: u64,
    },
    /// A check had found these files damaged in an older snapshot: they were read from their source
    /// again, and are right in this one. [`RunRecord::healed`] names them.
    DamageHealed {
        /// How many files.
        files: u64,
    },
    /// These files had changed without a sign (equal size and time), which an older snapshot lacks;
    /// this one has the change. [`RunRecord::caught_up`] names them.
    MissedChangeCopied {
        /// How many files.
        files: u64,
    },
    /// `latest` could not be pointed to this snapshot.
    LatestNotMoved {
        /// Why.
        reason: String,
    },
    /// Files have attributes that the volume's file system refuses, such as `btrfs.compression`; their
    /// content is there, those attributes are not.
    AttributesRefused {
        /// How many files.
        files: u64,
    },
    /// A source is not there, empty or unreadable: the snapshot has the others.
    SourceLeftOut {
        /// The source, escaped.
        path: String,
        /// Why.
        why: String,
    },
    /// A file has more names (hard links) than the volume allows for one file, those in older snapshots
    /// included: in this snapshot it is a copy of its own, or several. No name is missing.
    LinksSplit {
        /// One of its names, escaped.
        path: String,
    },
    /// rsync copied files that are unchanged since an older snapshot, instead of linking them: they take
    /// their room again.
    UnchangedCopied {
        /// How many, of the first thousand that were copied.
        files: u64,
    },
    /// A file has much less data than it is long, and rsync reads its holes too.
    HolesRead {
        /// The file, escaped.
        path: String,
        /// Its length.
        bytes: u64,
        /// What it takes on its disk.
        data_bytes: u64,
    },
    /// Something of somebody else's lies where sprat keeps its own; it was left alone, or renamed.
    ForeignObject {
        /// Its path on the volume, escaped.
        path: String,
        /// What was done.
        done: String,
    },
    /// The job stays on one file system, and subvolumes of btrfs in its sources count as others: their
    /// folders are empty in the snapshot.
    SubvolumesLeftOut {
        /// The first of them, escaped.
        path: String,
        /// How many there are.
        subvolumes: u64,
    },
    /// One that a newer program wrote.
    #[serde(other)]
    Unknown,
}

/// What ran, and what came of it: the content of `.sprat/NAME.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// [`RECORD_FORMAT`].
    pub format: u32,
    /// The job.
    pub job: JobName,
    /// The snapshot.
    pub name: SnapshotName,
    /// Whether the snapshot holds every file that was asked for, with all that belongs to it.
    pub complete: bool,
    /// Whether the run came to its end; false beside a `.partial`.
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
    /// What was mounted inside the sources and is in the snapshot; escaped, at most 1000.
    #[serde(default)]
    pub mounts: Vec<String>,
    /// The file systems that the run met, at the sources and inside them; at most 1000. Empty in
    /// records of older programs.
    #[serde(default)]
    pub file_systems: Vec<FileSystem>,
    /// File systems of earlier snapshots that the user said to be gone.
    #[serde(default)]
    pub disks_gone: Vec<GoneDisk>,
    /// Places, escaped, of missing disks that the job's patterns leave out.
    #[serde(default)]
    pub disks_left_out: Vec<String>,
    /// When the run began.
    pub started: Timestamp,
    /// When the copying was over.
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
    /// Trees whose unchanged files are shared.
    #[serde(default)]
    pub linked_from: Vec<LinkedFrom>,
    /// Source files that could not be read, or not with all that belongs to them, escaped; also
    /// places whose disk came or went meanwhile.
    #[serde(default)]
    pub unread: NameList,
    /// Source files that were gone when rsync came to them: harmless, unless they are many.
    #[serde(default)]
    pub vanished: NameList,
    /// Files that an older snapshot has damaged and this one does not, escaped.
    #[serde(default)]
    pub healed: NameList,
    /// Files whose change an older snapshot missed, escaped.
    #[serde(default)]
    pub caught_up: NameList,
    /// rsync's messages, escaped and cut.
    #[serde(default)]
    pub messages: NameList,
    /// What its owner should know.
    #[serde(default)]
    pub warnings: Vec<Warning>,
    /// Why the run stopped, beside a `.partial`.
    #[serde(default)]
    pub stopped_by: Option<String>,
}

/// What a folder of a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum EntryKind {
    /// A snapshot that holds everything.
    Good,
    /// A snapshot that lacks source files which could not be read.
    Unread,
    /// A folder named like a snapshot whose record is missing or can't be read. Its content is
    /// there.
    Unrecorded,
    /// What an interrupted run made; the next run uses it up.
    Partial,
    /// A run that is going on, or was killed.
    Inflight,
    /// A dated folder that a person's own rsync filled; never touched.
    ByHand,
    /// Somebody else's folder; never touched.
    Foreign,
}

impl EntryKind {
    /// Whether it is a finished snapshot.
    #[must_use]
    pub fn is_snapshot(self) -> bool {
        matches!(self, Self::Good | Self::Unread | Self::Unrecorded)
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
    /// The moment in its name.
    pub name: Option<SnapshotName>,
    /// Whether `latest` points to it.
    pub is_latest: bool,
    /// Its record.
    pub record: Option<RunRecord>,
    /// Why there is no record although the name is a snapshot's.
    pub record_error: Option<String>,
}
