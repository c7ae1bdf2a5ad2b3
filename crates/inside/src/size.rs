//! Sums up how large a folder of a snapshot is, with all that is below it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::{Tree, is_a_folder};
use sprat_snapshot::{Cancel, SnapshotError};

use crate::answer::{Place, go_on};

/// What to sum up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SizeSpec {
    /// A folder.
    pub place: Place,
}

/// How large a folder is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderSize {
    /// The lengths of its files. A file with several names counts once.
    pub bytes: u64,
    /// What is below it and no folder.
    pub files: u64,
}

/// Sums up a folder. Lists every folder below it, and reads no content.
///
/// # Errors
/// There is no such folder, or the volume can't be read.
pub fn size(
    volume_root: &Path,
    spec: &SizeSpec,
    cancel: &Cancel,
) -> Result<FolderSize, SnapshotError> {
    let tree = Tree::find(volume_root, &spec.place.job, &spec.place.snapshot)?;
    let top = spec.place.path();
    if tree.folder(&top)?.is_none() {
        return Err(tree.no_such(&top));
    }
    let mut sum = FolderSize::default();
    let mut linked = HashSet::new();
    let mut listed = 0;
    let ahead = tree.ahead_below(&top);
    let mut waiting: Vec<PathBuf> = vec![top];
    while let Some(path) = waiting.pop() {
        go_on(cancel)?;
        let Some(folder) = tree.folder(&path)? else {
            continue;
        };
        let failed = |error| tree.failed("list", &path, error);
        for entry in folder.entries().map_err(failed)? {
            listed += 1;
            if let Some(ahead) = &ahead {
                ahead.follow(listed);
            }
            go_on(cancel)?;
            let Some(stat) = folder.stat(&entry.name).map_err(failed)? else {
                continue;
            };
            if is_a_folder(&stat) {
                waiting.push(path.join(&entry.name));
                continue;
            }
            sum.files += 1;
            let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
            if is_file && (stat.st_nlink <= 1 || linked.insert((stat.st_dev, stat.st_ino))) {
                sum.bytes = sum
                    .bytes
                    .saturating_add(u64::try_from(stat.st_size).unwrap_or(0));
            }
        }
    }
    Ok(sum)
}
