//! Restores.
use crate::{Cancel, Progress, RestoreReport, RestoreSpec, SnapshotError};
use std::path::Path;
/// Restores.
pub fn restore(
    _volume_root: &Path,
    _spec: &RestoreSpec,
    _progress: &mut dyn FnMut(Progress),
    _cancel: &Cancel,
) -> Result<RestoreReport, SnapshotError> {
    Err(SnapshotError::Cancelled)
}
