//! What is asked about, and the form of paths in an answer.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::{TreeFolder, is_a_folder};
use sprat_snapshot::{
    Cancel, JobName, Listed, SnapshotChoice, SnapshotError, escape_name, unescape_name,
};

/// A snapshot, or a part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The job.
    pub job: JobName,
    /// The snapshot.
    pub snapshot: SnapshotChoice,
    /// The path in the source, escaped; empty: everything.
    path: String,
}

impl Place {
    /// A path of a snapshot; `None`: everything.
    #[must_use]
    pub fn new(job: JobName, snapshot: SnapshotChoice, path: Option<&Path>) -> Self {
        let path = path.map(escaped).unwrap_or_default();
        Self {
            job,
            snapshot,
            path,
        }
    }

    /// The path in the source, without `.`, doubled or trailing slashes.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let path = unescape_name(&self.path);
        let path = Path::new("/").join(OsStr::from_bytes(&path));
        path.components().collect()
    }
}

/// A path as text for JSON and for a terminal.
pub(crate) fn escaped(path: &Path) -> String {
    escape_name(path.as_os_str().as_bytes())
}

pub(crate) fn go_on(cancel: &Cancel) -> Result<(), SnapshotError> {
    match cancel.is_cancelled() {
        true => Err(SnapshotError::ReadCancelled),
        false => Ok(()),
    }
}

/// Whether a listed name is a folder. Asks for the type where the file system did not report it.
pub(crate) fn leads_on(folder: &TreeFolder, entry: &Listed) -> std::io::Result<bool> {
    Ok(match entry.kind {
        FileType::Directory => true,
        FileType::Unknown => folder
            .stat(&entry.name)?
            .is_some_and(|stat| is_a_folder(&stat)),
        _ => false,
    })
}
