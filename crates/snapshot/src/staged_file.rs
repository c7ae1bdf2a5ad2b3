//! A file of a snapshot that comes from no source.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::text::path_text;

/// A file whose content waits on the volume, or is in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagedFile {
    /// Relative to the snapshot. It begins with a folder whose name begins with `@`.
    #[serde(with = "path_text")]
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Of its content, in hexadecimal.
    pub sha256: String,
}
