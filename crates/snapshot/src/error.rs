//! What can go wrong with a snapshot or a restore, and how a caller tells the cases apart.

use std::io;

use serde::{Deserialize, Serialize};

use crate::name::NameError;
use crate::record::NameList;

fn waited_for(file: Option<&str>) -> String {
    match file {
        Some(file) => format!("it waited for {file}, whose file system doesn't answer"),
        None => "the kernel doesn't show what it waited for".to_owned(),
    }
}

/// A snapshot, a list or a restore failed. File names and messages in it are escaped and cut.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum SnapshotError {
    /// A job's or snapshot's name is no such name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The job has no source.
    #[error("job {job}: no sources are named")]
    NoSources { job: String },
    /// A source, or a file with patterns, is named in a way that is refused.
    #[error("source {path}: {why}")]
    SourceRefused { path: String, why: String },
    /// A source is not there.
    #[error("source {path}: there is no such file or folder")]
    SourceMissing { path: String },
    /// A source can't be looked at.
    #[error("source {path}: can't be read")]
    SourceUnreadable { path: String, source: io::Error },
    /// A source holds no file at all.
    #[error("source {path}: is empty; is its disk mounted?")]
    SourceEmpty { path: String },
    /// A source was mounted, unmounted or removed while it was copied.
    #[error("source {path}: was replaced or removed while it was being copied")]
    SourceChanged { path: String },
    /// A file with patterns can't be read.
    #[error("file with exclude patterns (exclude_from) {path}: can't be read")]
    PatternFile { path: String, source: io::Error },
    /// A pattern is refused.
    #[error("exclude pattern {pattern}: {why}")]
    PatternRefused { pattern: String, why: &'static str },
    /// A line of a file with patterns is refused.
    #[error("{path}, line {line}: exclude pattern {pattern}: {why}")]
    PatternLineRefused {
        path: String,
        line: usize,
        pattern: String,
        why: &'static str,
    },
    /// rsync isn't there.
    #[error("rsync was not found ({program})")]
    RsyncMissing { program: String },
    /// rsync is there but can't be used.
    #[error("{program}: {why}")]
    RsyncUnusable { program: String, why: String },
    /// rsync failed. What it copied is kept as `.partial`, and the next run goes on from there.
    #[error("rsync failed ({ended}): {first_message}")]
    RsyncFailed {
        /// Its exit code or signal in words.
        ended: String,
        /// Its first message that is a failure.
        first_message: String,
        /// All of its messages.
        messages: NameList,
    },
    /// rsync neither said nor did anything for so long that it was ended.
    #[error(
        "rsync did nothing for {} minutes and was stopped: {}",
        still_s / 60,
        waited_for(at.as_deref())
    )]
    StoodStill {
        /// For how many seconds nothing had moved.
        still_s: u64,
        /// The file that it waited for, where the kernel shows that.
        at: Option<String>,
    },
    /// The volume has no room left. Older snapshots are whole.
    #[error("{}", no_room("the volume", *kind, *free_bytes, object.as_deref()))]
    VolumeFull {
        kind: SpaceKind,
        free_bytes: u64,
        free_inodes: u64,
        /// The source file that found no room, where rsync tells.
        object: Option<String>,
    },
    /// The place restored to has no room left.
    #[error("{}", no_room(path, *kind, *free_bytes, None))]
    DestinationFull {
        path: String,
        kind: SpaceKind,
        free_bytes: u64,
        free_inodes: u64,
    },
    /// The mounted volume failed: what was written may not have arrived.
    #[error("{op} {object} on the volume")]
    Volume {
        op: &'static str,
        object: String,
        source: io::Error,
    },
    /// Something on the volume is not what it should be.
    #[error("{object} on the volume: {why}")]
    Layout { object: String, why: String },
    /// Another run is making a snapshot of this job on this mount.
    #[error("job {job}: another run is at work in its folder")]
    Busy { job: String },
    /// No such job.
    #[error("there is no job {job} on this volume")]
    NoSuchJob { job: String },
    /// No such snapshot.
    #[error("job {job} has no snapshot {snapshot}")]
    NoSuchSnapshot { job: String, snapshot: String },
    /// The snapshot has no such path.
    #[error("snapshot {snapshot} has no {path}")]
    NoSuchPath { snapshot: String, path: String },
    /// The path to restore is refused.
    #[error("{path}: {why}")]
    PathRefused { path: String, why: &'static str },
    /// The place to restore to can't be used.
    #[error("can't restore to {path}: {why}")]
    DestinationRefused { path: String, why: String },
    /// Folders stand where the snapshot has files.
    #[error(
        "can't restore to {path}: {} not empty where the snapshot has a file: {}",
        if folders.len() == 1 { "a folder is" } else { "folders are" },
        folders.join(", ")
    )]
    DestinationInTheWay { path: String, folders: Vec<String> },
    /// Deleting would take what the job kept out of the snapshot, or what was not there then.
    #[error(
        "can't restore to {path}: with --delete, files that the job left out of the snapshot (by its patterns, by one_file_system, or with a disk that was not mounted) would be lost"
    )]
    DeleteLosesExcluded { path: String },
    /// Deleting would take the container itself.
    #[error(
        "can't restore to {path}: with --delete, and the container {container} lies in what is restored; no snapshot has it"
    )]
    DeleteReachesContainer { path: String, container: String },
    /// Deleting would empty disks that the snapshot doesn't have.
    #[error(
        "can't restore to {path}: with --delete, and {} there whose files the snapshot doesn't have: {}",
        if mounts.len() == 1 { "another file system is mounted" } else { "other file systems are mounted" },
        some_of(mounts)
    )]
    DeleteReachesMounts { path: String, mounts: Vec<String> },
    /// With `delete`, another file system than the snapshot's is where files would be deleted.
    #[error(
        "can't restore to {path}: with --delete, and another disk than the snapshot's is there: {}",
        some_of(disks)
    )]
    DeleteReachesOtherDisk { path: String, disks: Vec<String> },
    /// What would be restored goes where sprat keeps something of its own.
    #[error("can't restore {path}: that place is sprat's own ({own})")]
    DestinationIsOwn { path: String, own: String },
    /// rsync failed while it restored. What it restored so far is there.
    #[error("restoring failed, rsync ended with {ended}: {first_message}")]
    RestoreFailed {
        /// Its exit code or signal in words.
        ended: String,
        /// Its first message that is a failure.
        first_message: String,
        /// All of its messages.
        messages: NameList,
    },
    /// A comparison after a restore found differences.
    #[error(
        "what was restored to {path} is not what the snapshot has, {} in all: {}",
        different.count,
        some_of(&different.names)
    )]
    RestoreDiffers { path: String, different: NameList },
    /// Somebody asked to stop a restore. What was restored so far is there.
    #[error("interrupted")]
    RestoreCancelled,
    /// Somebody asked to stop a prune. What was begun is gone on with by the next run or prune.
    #[error("interrupted")]
    PruneCancelled,
    /// Somebody asked to stop a check. What was read is noted.
    #[error("interrupted")]
    CheckCancelled,
    /// The machine failed (pipes, processes, memory).
    #[error("{op}")]
    System { op: &'static str, source: io::Error },
    /// Somebody asked to stop. What was copied is kept as `.partial`.
    #[error("interrupted")]
    Cancelled,
}

/// The first of `names`.
fn some_of(names: &[String]) -> String {
    const NAMED_MAX: usize = 10;
    let mut some = names[..names.len().min(NAMED_MAX)].join(", ");
    if names.len() > NAMED_MAX {
        some.push_str(&format!(" and {} more", names.len() - NAMED_MAX));
    }
    some
}

/// What is full, and how: a file may find no room where smaller ones would.
fn no_room(place: &str, kind: SpaceKind, free_bytes: u64, object: Option<&str>) -> String {
    let free = free_bytes >> 20;
    match (kind, object) {
        (SpaceKind::Inodes, _) => {
            format!("{place} is out of inodes: it can hold no more files ({free} MiB free)")
        }
        (SpaceKind::Blocks, None) => format!("{place} is out of space ({free} MiB free)"),
        (SpaceKind::Blocks, Some(object)) => {
            format!("{place} has no room for {object} ({free} MiB free)")
        }
    }
}

/// What a file system has run out of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpaceKind {
    /// Room for data.
    Blocks,
    /// Room for files and folders.
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

/// The cases that a caller chooses by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SnapshotErrorKind {
    /// The command line or config is wrong (exit 2).
    Usage,
    /// A source is missing, empty or changed under way.
    Source,
    /// rsync is missing or unusable.
    Rsync,
    /// rsync failed.
    RsyncFailed,
    /// The volume is full.
    VolumeFull,
    /// The mounted volume failed; ask the volume process why.
    Volume,
    /// A structure of the volume's file system is damaged (exit 13).
    Damaged,
    /// The job, snapshot or path is not there.
    NotFound,
    /// The place to restore to.
    Destination,
    /// Another run.
    Busy,
    /// Somebody asked to stop (exit 130).
    Cancelled,
    /// The machine.
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

/// An error as it crosses a process boundary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReport {
    /// The case.
    pub kind: SnapshotErrorKind,
    /// What happened.
    pub message: String,
    /// Because of what, nearest first.
    pub causes: Vec<String>,
    /// rsync's messages, if it was rsync.
    pub messages: NameList,
    /// What the user can do, and how the data stands.
    pub hint: Option<String>,
}

impl SnapshotError {
    /// Which case it is.
    #[must_use]
    pub fn kind(&self) -> SnapshotErrorKind {
        use SnapshotErrorKind as Kind;
        match self {
            Self::Name(_)
            | Self::NoSources { .. }
            | Self::SourceRefused { .. }
            | Self::PatternRefused { .. }
            | Self::PatternFile { .. }
            | Self::PatternLineRefused { .. }
            | Self::PathRefused { .. }
            | Self::DeleteReachesContainer { .. }
            | Self::DeleteReachesMounts { .. }
            | Self::DeleteReachesOtherDisk { .. }
            | Self::DestinationIsOwn { .. } => Kind::Usage,
            Self::SourceMissing { .. }
            | Self::SourceUnreadable { .. }
            | Self::SourceEmpty { .. }
            | Self::SourceChanged { .. } => Kind::Source,
            Self::RsyncMissing { .. } | Self::RsyncUnusable { .. } => Kind::Rsync,
            Self::RsyncFailed { .. } | Self::RestoreFailed { .. } | Self::StoodStill { .. } => {
                Kind::RsyncFailed
            }
            Self::VolumeFull { .. } => Kind::VolumeFull,
            Self::Volume { source, .. } if is_damage(source) => Kind::Damaged,
            Self::Volume { .. } | Self::Layout { .. } => Kind::Volume,
            Self::NoSuchJob { .. } | Self::NoSuchSnapshot { .. } | Self::NoSuchPath { .. } => {
                Kind::NotFound
            }
            Self::DestinationFull { .. }
            | Self::DestinationRefused { .. }
            | Self::DestinationInTheWay { .. }
            | Self::RestoreDiffers { .. }
            | Self::DeleteLosesExcluded { .. } => Kind::Destination,
            Self::Busy { .. } => Kind::Busy,
            Self::Cancelled
            | Self::RestoreCancelled
            | Self::PruneCancelled
            | Self::CheckCancelled => Kind::Cancelled,
            Self::System { .. } => Kind::System,
        }
    }

    /// What the user can do, and how the data stands.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::SourceEmpty { .. } => {
                "Mount it, or allow empty sources if that is how it should be. Nothing was changed."
            }
            Self::SourceMissing { .. } => {
                "Mount its disk, or take it out of the job. Nothing was changed."
            }
            Self::SourceChanged { .. } => {
                "No snapshot was made; older ones are whole. Run again when the source is in place."
            }
            Self::Volume { source, .. } if is_damage(source) => {
                "The file system in the container is damaged. Don't write to it; `sprat check --read-data` says \
                 what is damaged, and docs/recovery.md how to repair it."
            }
            Self::RsyncMissing { .. } => {
                "Install rsync (3.1.3 or newer) with your package manager."
            }
            Self::RsyncFailed { .. } => {
                "Older snapshots are whole. What was copied is kept, and the next run goes on from there."
            }
            Self::StoodStill { .. } => {
                "Snapshots are whole, and what was copied is kept. Bring that file system back or unmount it, or leave it out of the job; the next run goes on from there."
            }
            Self::VolumeFull { .. } => {
                "Older snapshots are whole, and what was copied is kept for the next run. Make the volume larger with `sprat grow`, or make room with `sprat prune`; where interrupted runs fill it, its --drop-interrupted removes what they copied."
            }
            Self::PatternRefused { .. } | Self::PatternLineRefused { .. } => {
                "Nothing was changed. A pattern begins with / for a whole path, or is a name, as in rsync's manual."
            }
            Self::PatternFile { .. } => {
                "Nothing was changed. Make it a readable file, or take it out of the job."
            }
            Self::DestinationInTheWay { .. } => {
                "The snapshot is untouched. Move the folder away, or restore to another place; --delete removes it."
            }
            Self::DeleteLosesExcluded { .. } => {
                "Nothing was changed. --delete-excluded says that they may go; with --dry-run it tells which. Or leave --delete out."
            }
            Self::DeleteReachesContainer { .. } => {
                "Nothing was changed. Leave --delete out, or restore parts that don't hold the container, with JOB:PATH."
            }
            Self::DeleteReachesOtherDisk { .. } => {
                "Nothing was changed. Mount the disk that the snapshot has. To restore onto the disk that is \
                 there now, leave --delete out: its other files stay, those of the same name are replaced."
            }
            Self::DeleteReachesMounts { .. } => {
                "Nothing was changed. Unmount them, leave --delete out, or restore parts that don't hold them, with JOB:PATH."
            }
            Self::DestinationIsOwn { .. } => "Nothing was changed. Restore it to another folder.",
            Self::NoSuchJob { .. } | Self::NoSuchSnapshot { .. } => {
                "Nothing was changed. `sprat snapshots` lists what there is."
            }
            Self::NoSuchPath { .. } => {
                "Nothing was changed. The path is the one in the source; `sprat mount` lets you look round."
            }
            Self::Cancelled => "What was copied is kept, and the next run goes on from there.",
            Self::CheckCancelled => {
                "Nothing was changed. What was read is noted; the same command goes on where this one stopped."
            }
            Self::PruneCancelled => {
                "What is to be kept is whole. What was begun is no snapshot any more; the next prune or backup removes the rest of it."
            }
            Self::RestoreFailed { .. } => {
                "The snapshot is untouched, and what was restored so far is there. Mend what the message tells of; then the same command does the rest."
            }
            Self::DestinationFull { .. } => {
                "The snapshot is untouched, and what was restored so far is there. Make room; then the same command does the rest."
            }
            Self::RestoreCancelled => {
                "The snapshot is untouched. The same command goes on where this one stopped; with --trust-times it doesn't compare what is restored already."
            }
            Self::RestoreDiffers { .. } => {
                "The snapshot is untouched. Either somebody changes these files, or the disk does not keep what is written to it. The same command restores them again."
            }
            _ => return None,
        })
    }

    /// The error as it crosses a process boundary.
    #[must_use]
    pub fn report(&self) -> ErrorReport {
        let mut causes = Vec::new();
        let mut cause = std::error::Error::source(self);
        while let Some(this) = cause {
            causes.push(this.to_string());
            cause = this.source();
        }
        let messages = match self {
            Self::RsyncFailed { messages, .. } | Self::RestoreFailed { messages, .. } => {
                messages.clone()
            }
            _ => NameList::default(),
        };
        ErrorReport {
            kind: self.kind(),
            message: self.to_string(),
            causes,
            messages,
            hint: self.hint().map(str::to_owned),
        }
    }
}
