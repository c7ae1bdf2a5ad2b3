//! The errors of snapshots, restores, prunes and checks, and the kinds that a caller distinguishes.

use std::io;

use serde::{Deserialize, Serialize};

use crate::census::Census;
use crate::name::NameError;
use crate::name_list::NameList;
use crate::zone::ZoneError;

fn waited_for(file: Option<&str>) -> String {
    match file {
        Some(file) => format!("it waited for {file}: the file system of this file doesn't answer"),
        None => "the kernel doesn't show what it waited for".to_owned(),
    }
}

/// A snapshot, list, restore, prune or check failed. File names and messages in it are escaped, and
/// their length is limited.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The name of a job or a snapshot is not valid.
    #[error(transparent)]
    Name(#[from] NameError),
    /// There is no such time zone.
    #[error(transparent)]
    Zone(#[from] ZoneError),
    /// The job has no sources.
    #[error("job {job}: no sources given")]
    NoSources { job: String },
    /// The path of a source is not accepted.
    #[error("source {path}: {why}")]
    SourceRefused { path: String, why: String },
    /// A source does not exist.
    #[error("source {path}: there is no such file or folder")]
    SourceMissing { path: String },
    /// A source can't be examined.
    #[error("source {path}: can't be read")]
    SourceUnreadable { path: String, source: io::Error },
    /// A source contains no file.
    #[error("source {path}: is empty. Its disk may not be mounted")]
    SourceEmpty { path: String },
    /// None of the sources is there, and this one is on another host.
    #[error("source {path}: {why}")]
    HostsMissing {
        path: String,
        why: String,
        /// Whether any of the hosts was reached.
        reached: bool,
    },
    /// A source was mounted, unmounted or removed while it was copied.
    #[error("source {path}: was replaced or removed while it was being copied")]
    SourceChanged { path: String },
    /// A file with patterns can't be read.
    #[error("file with exclude patterns (exclude_from) {path}: can't be read")]
    PatternFile { path: String, source: io::Error },
    /// A pattern is not accepted.
    #[error("exclude pattern {pattern}: {why}")]
    PatternRefused { pattern: String, why: &'static str },
    /// A line of a file with patterns is not accepted.
    #[error("{path}, line {line}: exclude pattern {pattern}: {why}")]
    PatternLineRefused {
        path: String,
        line: usize,
        pattern: String,
        why: &'static str,
    },
    /// rsync is not installed.
    #[error("rsync was not found ({program})")]
    RsyncMissing { program: String },
    /// rsync is installed, but can't be used.
    #[error("{program}: {why}")]
    RsyncUnusable { program: String, why: String },
    /// rsync failed. What it copied is kept as `.partial`, and the next run continues from there.
    #[error("rsync failed ({ended}): {first_message}")]
    RsyncFailed {
        /// Its exit code or signal, as text.
        ended: String,
        /// Its first message that reports a failure.
        first_message: String,
        /// All of its messages.
        messages: NameList,
    },
    /// rsync printed nothing and transferred nothing for so long that it was stopped.
    #[error(
        "rsync did nothing for {} minutes and was stopped: {}",
        still_s / 60,
        waited_for(at.as_deref())
    )]
    StoodStill {
        /// How many seconds it had made no progress.
        still_s: u64,
        /// The file that it waited for, if the kernel shows that.
        at: Option<String>,
    },
    /// More is new in the sources than [`crate::CensusSpec`] allows. Nothing was copied.
    #[error("{} bytes are new or changed in the sources", census.bytes)]
    TooMuchNew { census: Box<Census> },
    /// The volume has no space left. Older snapshots are complete.
    #[error("{}", no_space("the volume", *kind, *free_bytes, object.as_deref()))]
    VolumeFull {
        kind: SpaceKind,
        free_bytes: u64,
        free_inodes: u64,
        /// The source file that did not fit, if rsync named it.
        object: Option<String>,
    },
    /// The destination of a restore has no space left.
    #[error("{}", no_space(path, *kind, *free_bytes, None))]
    DestinationFull {
        path: String,
        kind: SpaceKind,
        free_bytes: u64,
        free_inodes: u64,
    },
    /// The mounted volume failed. What was written may be lost.
    #[error("{op} {object} on the volume")]
    Volume {
        op: &'static str,
        object: String,
        source: io::Error,
    },
    /// Something on the volume is not of the expected kind.
    #[error("{object} on the volume: {why}")]
    Layout { object: String, why: String },
    /// A part of the job that comes from no source was not made.
    #[error("{path} is missing, and a snapshot without it would be no backup")]
    StagedMissing { path: String },
    /// Another run is making a snapshot of this job on this mount.
    #[error("job {job}: another run is using its folder")]
    Busy { job: String },
    /// There is no such job.
    #[error("there is no job {job} on this volume")]
    NoSuchJob { job: String },
    /// There is no such snapshot.
    #[error("job {job} has no snapshot {snapshot}")]
    NoSuchSnapshot { job: String, snapshot: String },
    /// The beginning of a name could mean several snapshots, and the operation must not guess.
    #[error("job {job}: several snapshots begin with {snapshot}: {}", names.join(", "))]
    SeveralSnapshots {
        job: String,
        snapshot: String,
        /// Oldest first.
        names: Vec<String>,
    },
    /// A snapshot must not be removed.
    #[error("snapshot {job}/{snapshot} {why}")]
    RemovalRefused {
        job: String,
        snapshot: String,
        /// What it is.
        why: String,
    },
    /// The snapshot has no such path.
    #[error("snapshot {snapshot} has no {path}")]
    NoSuchPath { snapshot: String, path: String },
    /// No snapshot of the job has such a path.
    #[error("no snapshot of job {job} has {path}")]
    NoSuchPathInJob { job: String, path: String },
    /// The lists of changes on this machine can't answer a question.
    #[error("the lists of changes on this machine can't answer: {list} of job {job} {why}")]
    ListUnusable {
        job: String,
        /// The list of this snapshot; `base.changes.zst`.
        list: String,
        why: &'static str,
    },
    /// They show several changes of a path one after the other, and not what these come to.
    #[error(
        "the lists of changes on this machine can't answer: {path} was changed several times between two \
         snapshots, and is as before in {job}/{snapshot}. Only the volume shows whether its extended \
         attributes are, too"
    )]
    ListsUnclear {
        job: String,
        snapshot: String,
        path: String,
    },
    /// The lists have no such question.
    #[error("the lists of changes on this machine can't answer: {what}")]
    NotInLists { what: String },
    /// The path to restore is not accepted.
    #[error("{path}: {why}")]
    PathRefused { path: String, why: &'static str },
    /// The destination can't be used.
    #[error("can't restore to {path}: {why}")]
    DestinationRefused { path: String, why: String },
    /// Another export writes to the same folder.
    #[error("another export to {path} is running")]
    DestinationBusy { path: String },
    /// The destination has folders where the snapshot has files.
    #[error(
        "can't restore to {path}: {} not empty where the snapshot has a file: {}",
        if folders.len() == 1 { "a folder is" } else { "folders are" },
        folders.join(", ")
    )]
    DestinationConflicts { path: String, folders: Vec<String> },
    /// Deleting would remove files that the snapshot never had: the job excluded them, or their disk was
    /// not mounted.
    #[error(
        "can't restore to {path}: --delete would delete files that the job excluded (by its patterns, \
         by one_file_system, or because a disk was not mounted)"
    )]
    DeleteLosesExcluded { path: String },
    /// Deleting would remove the container file itself.
    #[error(
        "can't restore to {path}: --delete would remove the container file {container}, which no snapshot has"
    )]
    DeleteReachesContainer { path: String, container: String },
    /// Deleting would empty file systems that the snapshot doesn't have.
    #[error(
        "can't restore to {path}: --delete would delete files that the snapshot doesn't have: {} there: \
         {}",
        if mounts.len() == 1 { "another file system is mounted" } else { "other file systems are mounted" },
        some_of(mounts)
    )]
    DeleteReachesMounts { path: String, mounts: Vec<String> },
    /// Deleting would remove files from another disk than the one in the snapshot.
    #[error(
        "can't restore to {path}: --delete would delete files on another disk than the one in the \
         snapshot: {}",
        some_of(disks)
    )]
    DeleteReachesOtherDisk { path: String, disks: Vec<String> },
    /// The restore would overwrite a file of sprat's own.
    #[error("can't restore {path}: {own} is one of sprat's own files")]
    DestinationIsOwn { path: String, own: String },
    /// rsync failed during a restore. What it restored so far stays.
    #[error("restore failed: rsync ended with {ended}: {first_message}")]
    RestoreFailed {
        /// Its exit code or signal, as text.
        ended: String,
        /// Its first message that reports a failure.
        first_message: String,
        /// The volume has files that can't be read as they were written. The messages name them.
        damaged: bool,
        /// All of its messages.
        messages: NameList,
    },
    /// The comparison after a restore found differences.
    #[error(
        "files in {path} differ from the snapshot after the restore, {} in all: {}{}",
        different.count,
        some_of(&different.names),
        also_damaged(damaged)
    )]
    RestoreDiffers {
        path: String,
        different: NameList,
        /// What is known to be damaged in the snapshot.
        damaged: NameList,
    },
    /// A restore was cancelled. What was restored so far stays.
    #[error("interrupted")]
    RestoreCancelled,
    /// A prune was cancelled. The next run or prune finishes the removal that had begun.
    #[error("interrupted")]
    PruneCancelled,
    /// A command that only reads was cancelled.
    #[error("interrupted")]
    ReadCancelled,
    /// A check was cancelled. What it read is recorded.
    #[error("interrupted")]
    CheckCancelled,
    /// A system call failed (pipes, processes, memory).
    #[error("{op}")]
    System { op: &'static str, source: io::Error },
    /// A run was cancelled. What was copied is kept as `.partial`.
    #[error("interrupted")]
    Cancelled,
}

/// The first few of `names`.
fn some_of(names: &[String]) -> String {
    const NAMED_MAX: usize = 10;
    let mut some = names[..names.len().min(NAMED_MAX)].join(", ");
    if names.len() > NAMED_MAX {
        some.push_str(&format!(" and {} more", names.len() - NAMED_MAX));
    }
    some
}

fn also_damaged(damaged: &NameList) -> String {
    match damaged.count {
        0 => String::new(),
        count => format!(
            ". DAMAGED in the snapshot, {count} in all: {}",
            some_of(&damaged.names)
        ),
    }
}

/// The message for a full file system. With free space left, one file may not fit while smaller ones would.
fn no_space(place: &str, kind: SpaceKind, free_bytes: u64, object: Option<&str>) -> String {
    let free = free_bytes >> 20;
    match (kind, object) {
        (SpaceKind::Inodes, _) => {
            format!("{place} has no inodes left for more files ({free} MiB free)")
        }
        (SpaceKind::Blocks, None) => format!("{place} is out of space ({free} MiB free)"),
        (SpaceKind::Blocks, Some(object)) => {
            format!("{place} has no space for {object} ({free} MiB free)")
        }
    }
}

/// What a file system has run out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpaceKind {
    /// Space for data.
    Blocks,
    /// Inodes, one for each file and folder.
    Inodes,
}

impl std::fmt::Display for SpaceKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Blocks => "space",
            Self::Inodes => "inodes",
        })
    }
}

/// The kinds of failure that a caller distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SnapshotErrorKind {
    /// The command line or config is wrong (exit 2).
    Usage,
    /// A source is missing or empty, or it changed during the run.
    Source,
    /// The hosts of all sources were not reached (exit 14).
    Unreachable,
    /// rsync is missing or unusable.
    Rsync,
    /// rsync failed.
    RsyncFailed,
    /// The volume is full.
    VolumeFull,
    /// The mounted volume failed. The volume process knows why.
    Volume,
    /// A structure of the volume's file system, or a file's content, is damaged (exit 13).
    Damaged,
    /// There is no such job, snapshot or path.
    NotFound,
    /// The destination of a restore can't be used.
    Destination,
    /// The lists of changes on this machine can't answer. The volume can.
    Lists,
    /// Another run uses the job's folder.
    Busy,
    /// The run was cancelled (exit 130).
    Cancelled,
    /// A system call failed.
    System,
}

/// ext4's errors for a damaged structure, and for a wrong checksum of one (fs/ext4/ext4.h:
/// `EFSCORRUPTED`, `EFSBADCRC`).
fn is_damage(error: &io::Error) -> bool {
    let errno = rustix::io::Errno::from_io_error(error);
    matches!(
        errno,
        Some(rustix::io::Errno::UCLEAN | rustix::io::Errno::BADMSG)
    )
}

impl SnapshotError {
    /// Whether the volume has too little room: a prune may help.
    #[must_use]
    pub fn lacks_room_in_volume(&self) -> bool {
        let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        match self {
            Self::VolumeFull { .. } => true,
            Self::Volume { source, .. } => kinds.contains(&source.kind()),
            _ => false,
        }
    }

    /// The kind of this failure.
    #[must_use]
    pub fn kind(&self) -> SnapshotErrorKind {
        use SnapshotErrorKind as Kind;
        match self {
            Self::Name(_)
            | Self::Zone(_)
            | Self::NoSources { .. }
            | Self::SourceRefused { .. }
            | Self::PatternRefused { .. }
            | Self::PatternFile { .. }
            | Self::PatternLineRefused { .. }
            | Self::PathRefused { .. }
            | Self::SeveralSnapshots { .. }
            | Self::RemovalRefused { .. }
            | Self::DeleteReachesContainer { .. }
            | Self::DeleteReachesMounts { .. }
            | Self::DeleteReachesOtherDisk { .. }
            | Self::DestinationIsOwn { .. } => Kind::Usage,
            Self::SourceMissing { .. }
            | Self::SourceUnreadable { .. }
            | Self::SourceEmpty { .. }
            | Self::SourceChanged { .. }
            | Self::HostsMissing { reached: true, .. } => Kind::Source,
            Self::HostsMissing { reached: false, .. } => Kind::Unreachable,
            Self::RsyncMissing { .. } | Self::RsyncUnusable { .. } => Kind::Rsync,
            Self::RestoreFailed { damaged: true, .. } => Kind::Damaged,
            Self::RsyncFailed { .. } | Self::RestoreFailed { .. } | Self::StoodStill { .. } => {
                Kind::RsyncFailed
            }
            Self::TooMuchNew { .. } => Kind::Source,
            Self::VolumeFull { .. } => Kind::VolumeFull,
            Self::Volume { source, .. } if is_damage(source) => Kind::Damaged,
            Self::RestoreDiffers { damaged, .. } if !damaged.is_empty() => Kind::Damaged,
            Self::Volume { .. } | Self::Layout { .. } => Kind::Volume,
            Self::NoSuchJob { .. }
            | Self::NoSuchSnapshot { .. }
            | Self::NoSuchPath { .. }
            | Self::NoSuchPathInJob { .. } => Kind::NotFound,
            Self::DestinationFull { .. }
            | Self::DestinationRefused { .. }
            | Self::DestinationConflicts { .. }
            | Self::RestoreDiffers { .. }
            | Self::DeleteLosesExcluded { .. } => Kind::Destination,
            Self::ListUnusable { .. } | Self::ListsUnclear { .. } | Self::NotInLists { .. } => {
                Kind::Lists
            }
            Self::Busy { .. } | Self::DestinationBusy { .. } => Kind::Busy,
            Self::Cancelled
            | Self::RestoreCancelled
            | Self::PruneCancelled
            | Self::ReadCancelled
            | Self::CheckCancelled => Kind::Cancelled,
            Self::System { .. } | Self::StagedMissing { .. } => Kind::System,
        }
    }

    /// rsync's messages, if rsync failed.
    #[must_use]
    pub fn messages(&self) -> &[String] {
        match self {
            Self::RsyncFailed { messages, .. } | Self::RestoreFailed { messages, .. } => {
                &messages.names
            }
            _ => &[],
        }
    }
}
