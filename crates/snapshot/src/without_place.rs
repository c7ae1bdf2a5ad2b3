//! What of a snapshot has no place on this machine.

use std::path::PathBuf;

use crate::record::RunRecord;
use crate::{pulled_source, staged};

/// The folders at the top of a snapshot that have no place on this machine.
pub(crate) fn tops(record: &RunRecord) -> Vec<PathBuf> {
    [
        staged::tops(&record.staged),
        pulled_source::tops(&record.pulled),
    ]
    .concat()
}
