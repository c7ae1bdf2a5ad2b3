//! Counts, before a run copies anything, what is new in the sources: by the walk of the sources, and by a list
//! of the files of the last snapshot, which this machine keeps. Reads nothing of the volume.

mod file_list;
mod walk;

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::text::path_text;

pub(crate) use file_list::FileList;
pub(crate) use walk::Walk;

/// What a run counts before it copies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CensusSpec {
    /// The list of the files of the last snapshot, on this machine. If it is missing, nothing is known of
    /// that snapshot. A run that makes a snapshot writes the list of it beside this one: [`keep_list`].
    #[serde(with = "path_text")]
    pub list: PathBuf,
    /// Copy nothing if the new content is larger than this.
    pub stop_over_bytes: Option<u64>,
}

/// What is new in the sources since the last snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// Files in the sources, without those that are excluded. A file with several names counts for each.
    pub files: u64,
    /// Files of the last snapshot; `None`: not known, so every file counts as new.
    pub files_before: Option<u64>,
    /// Files that the last snapshot lacks.
    pub new: u64,
    /// Files whose size or time is another one.
    pub changed: u64,
    /// Files that are no longer there. If a source, a disk or a folder was missing: at most as many as are new.
    pub gone: u64,
    /// Size of the new and changed files.
    pub bytes: u64,
    /// The folders that have most of these bytes, the largest first: escaped path and size.
    pub folders: Vec<(String, u64)>,
    /// The largest new and changed files, the largest first: escaped path and size.
    pub largest: Vec<(String, u64)>,
}

/// The list that a run has written beside `list` gets its place, because the snapshot is durable now. Without
/// one nothing is known of the last snapshot.
///
/// # Errors
/// The list is as it was.
pub fn keep_list(list: &Path) -> io::Result<()> {
    match std::fs::rename(file_list::new_list(list), list) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match std::fs::remove_file(list) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        },
        renamed => renamed,
    }
}
