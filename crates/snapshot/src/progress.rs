//! The progress of a run, as it is reported to the caller.

use serde::{Deserialize, Serialize};

/// The progress of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Bytes of file content that were copied or found unchanged so far.
    pub bytes_done: u64,
    /// The share of the known bytes that is done, in percent. It can fall while more files are found.
    pub percent: Option<u8>,
    /// As rsync measures it.
    pub bytes_per_s: Option<u64>,
    /// Files and folders checked so far.
    pub files_done: u64,
    /// Files and folders found so far.
    pub files_found: u64,
    /// Whether all files were found, so that `files_found` is final.
    pub all_found: bool,
    /// For how many seconds rsync has made no progress, if that is long: it hangs.
    #[serde(default)]
    pub still_s: Option<u64>,
    /// Files and folders of the job's newest finished snapshot. About as many are expected.
    #[serde(default)]
    pub files_expected: Option<u64>,
}

impl Default for Progress {
    fn default() -> Self {
        Self::begin(Phase::Checking)
    }
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

    /// Adds the number of files in the previous snapshot.
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
    /// Checks the sources.
    Checking,
    /// Recovers what an earlier run left.
    Recovering,
    /// rsync runs.
    Copying,
    /// Waits until everything is durable.
    Syncing,
    /// Compares files of a restore with those at the destination.
    Comparing,
    /// Gives the snapshot its name.
    Naming,
    /// Removes the interrupted tree that is no longer needed. The snapshot is finished.
    Removing,
}
