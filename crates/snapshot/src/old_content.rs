//! Content that a source no longer has although nobody changed it: the snapshots that still have it are kept.

use std::collections::BTreeSet;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::change_list::ListedFile;
use crate::check::Key;
use crate::long_path;
use crate::text::unescape_path;

/// A file as the snapshots of a job have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OldContent {
    /// Its path in the source, escaped.
    pub path: String,
    bytes: u64,
    modified: Timestamp,
    /// The file of the volume.
    #[serde(with = "crate::check::key_text")]
    file: Key,
}

impl OldContent {
    pub(crate) fn of(path: String, file: &ListedFile) -> Self {
        Self {
            path,
            bytes: file.bytes,
            modified: file.modified,
            file: file.content.file,
        }
    }

    /// Whether the file in another container has the same size and time.
    pub(crate) fn is_version_of(&self, other: &ListedFile) -> bool {
        (self.bytes, self.modified) == (other.bytes, other.modified)
    }

    fn is_in(&self, snapshot: &Path) -> bool {
        let path = unescape_path(&self.path);
        let below = path.strip_prefix("/").unwrap_or(&path);
        let about = long_path::lstat(&snapshot.join(below));
        about.is_ok_and(|about| Key::of(&about) == self.file)
    }
}

/// Which of the snapshots `others` must be kept: for each file the newest one that has it, unless one of `kept` has
/// it. Both are names in `job_folder`, the oldest one first.
pub(crate) fn snapshots_to_keep(
    files: &[OldContent],
    job_folder: &Path,
    kept: &[String],
    others: &[String],
) -> BTreeSet<String> {
    let mut keep = BTreeSet::new();
    for file in files {
        let has = |name: &&String| file.is_in(&job_folder.join(name));
        let is_kept = kept.iter().rev().chain(&keep).any(|name| has(&name));
        if !is_kept {
            keep.extend(others.iter().rev().find(has).cloned());
        }
    }
    keep
}
