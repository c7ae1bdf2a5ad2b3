//! The folders of the newest snapshot of each job, by what is in them.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::answer::escaped;

/// What is in one folder and all folders below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FolderCost {
    /// The job.
    pub job: String,
    /// The path in the source, escaped.
    pub path: String,
    /// Names of what is no folder.
    pub files: u64,
    /// What is in it takes this, with the folders. A file with several names counts once.
    pub bytes: u64,
}

/// The folders of one snapshot.
#[derive(Debug, Default)]
pub(super) struct Folders {
    all: HashMap<PathBuf, (u64, u64)>,
}

impl Folders {
    /// Something takes `bytes` in this folder.
    pub(super) fn add(&mut self, folder: &Path, files: u64, bytes: u64) {
        let own = self.all.entry(folder.to_owned()).or_default();
        *own = (own.0 + files, own.1 + bytes);
    }

    /// The biggest, each with all that is below it. A folder comes before those in it.
    pub(super) fn biggest(mut self, job: &str, most: usize) -> Vec<FolderCost> {
        let mut paths: Vec<PathBuf> = self.all.keys().cloned().collect();
        // The deepest first, so that all below a folder is in its sum when it is added to the one above.
        paths.sort_unstable_by_key(|path| Reverse(path.components().count()));
        for path in &paths {
            let (Some(own), Some(parent)) = (self.all.get(path).copied(), path.parent()) else {
                continue;
            };
            let above = self.all.entry(parent.to_owned()).or_default();
            *above = (above.0 + own.0, above.1 + own.1);
        }
        let mut all: Vec<(PathBuf, (u64, u64))> = self.all.into_iter().collect();
        all.sort_unstable_by(|(path, own), (other, its)| {
            // Equal sums: by name, and so a folder before those in it.
            its.1.cmp(&own.1).then_with(|| path.cmp(other))
        });
        all.truncate(most);
        let costs = all.into_iter().map(|(path, (files, bytes))| FolderCost {
            job: job.to_owned(),
            path: escaped(&path),
            files,
            bytes,
        });
        costs.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_has_all_that_is_below_it_and_comes_before_it() {
        let mut folders = Folders::default();
        for (path, files, bytes) in [("/", 0, 1), ("/a", 0, 1), ("/a/b", 2, 50), ("/c", 1, 9)] {
            folders.add(Path::new(path), files, bytes);
        }
        let found = folders.biggest("home", 3);
        let found: Vec<_> = found
            .iter()
            .map(|one| (&*one.path, one.files, one.bytes))
            .collect();
        assert_eq!(found, [("/", 3, 61), ("/a", 2, 51), ("/a/b", 2, 50)]);
    }
}
