//! What is asked about, and how large an answer may be.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::{TreeFolder, is_a_folder};
use sprat_snapshot::{
    Cancel, JobName, Listed, SnapshotChoice, SnapshotError, escape_name, unescape_name,
};

/// How many paths an answer names.
pub const ANSWER_ENTRIES_MAX: usize = 200_000;
/// How long their names may be together. The processes of a session exchange at most 256 MiB at once.
const ANSWER_BYTES_MAX: usize = 32 << 20;

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

    /// The path in the source.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        let path = unescape_name(&self.path);
        Path::new("/").join(OsStr::from_bytes(&path))
    }
}

/// A path as text for JSON and for a terminal.
pub(crate) fn escaped(path: &Path) -> String {
    escape_name(path.as_os_str().as_bytes())
}

/// How much more an answer may name.
#[derive(Debug)]
pub(crate) struct Room {
    entries: usize,
    bytes: usize,
}

impl Room {
    pub(crate) fn new() -> Self {
        Self {
            entries: ANSWER_ENTRIES_MAX,
            bytes: ANSWER_BYTES_MAX,
        }
    }

    /// Whether one more name of this length fits.
    pub(crate) fn takes(&mut self, name: &str) -> bool {
        let fits = self.entries > 0 && self.bytes >= name.len();
        if fits {
            self.entries -= 1;
            self.bytes -= name.len();
        } else {
            // Nothing shorter may follow: a list with gaps would mislead.
            self.entries = 0;
        }
        fits
    }
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
