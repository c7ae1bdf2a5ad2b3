//! An adopted copy that a first run links from.

use std::path::{Path, PathBuf};

use crate::adopted;
use crate::error::SnapshotError;
use crate::job::RunFolder;
use crate::sources::Sources;
use crate::spec::SnapshotSpec;

/// An adopted copy that a first run links from.
pub(super) struct LinkedCopy {
    /// Its path on the volume.
    pub(super) copy: PathBuf,
    /// The folder that shows it under the path of its source, relative to the job's folder.
    pub(super) link_dest: PathBuf,
}

impl LinkedCopy {
    pub(super) fn find(
        volume_root: &Path,
        spec: &SnapshotSpec,
        folder: &RunFolder,
        sources: &Sources,
    ) -> Result<Option<Self>, SnapshotError> {
        let found = adopted::to_link_from(volume_root, &spec.job, sources)?;
        let Some((copy, source)) = found else {
            return Ok(None);
        };
        match folder.link_to_copy(&copy, &source) {
            Ok(link_dest) => Ok(Some(Self { copy, link_dest })),
            // A foreign object has the name of the folder for links. All files are copied.
            Err(SnapshotError::Volume { source, .. })
                if source.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
