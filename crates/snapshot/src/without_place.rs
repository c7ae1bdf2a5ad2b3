//! What of a snapshot has no place on this machine.

use std::path::PathBuf;

use crate::record::RunRecord;
use crate::{pulled_source, staged};

/// The places of those sources in it.
pub(crate) fn sources(record: &RunRecord) -> Vec<PathBuf> {
    let pulled = record.pulled.iter().map(|part| part.source.place());
    let staged = staged::tops(&record.staged);
    staged.into_iter().chain(pulled).collect()
}

/// The folders at the top of a snapshot that have no place on this machine.
pub(crate) fn tops(record: &RunRecord) -> Vec<PathBuf> {
    [
        staged::tops(&record.staged),
        pulled_source::tops(&record.pulled),
    ]
    .concat()
}
