//! Finds every name of the damaged files: a file has a name in each snapshot that links it, or, on a
//! btrfs, shares it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::known::Key;
use crate::long_path;
use crate::name_list::NameList;
use crate::subvolumes;
use crate::text::escape_path;

/// How many damaged files are searched for by their path in each snapshot, which is quick. With more of
/// them a walk over everything is needed anyway.
const BY_PATH_MAX: usize = 1000;

/// The names that were found, and how many links have names that were not found.
#[derive(Debug, Default)]
pub(super) struct Affected {
    pub(super) names: NameList,
    pub(super) links_left: u64,
}

/// Finds the names of `bad` (files with one name each) below `root`. A file has the same path in each
/// snapshot, unless the source had several names for it. Only for such files is everything walked, until
/// `stop` returns true.
pub(super) fn find(root: &Path, bad: &BTreeMap<Key, PathBuf>, stop: &dyn Fn() -> bool) -> Affected {
    let mut search = Search::begin(root, bad);
    for (key, path) in bad.iter().take(BY_PATH_MAX) {
        // Its own name is known, even if it can't be examined.
        search.meet(path, *key);
        for other in same_path_elsewhere(root, path) {
            if long_path::lstat(&other).is_ok_and(|about| Key::of(&about) == *key) {
                search.meet(&other, *key);
            }
        }
    }
    if bad.len() <= BY_PATH_MAX {
        search.all_paths_tried();
    }
    search.walk(root, stop);
    let mut names = NameList::default();
    for path in &search.found {
        names.push(escape_path(path.strip_prefix(root).unwrap_or(path)));
    }
    Affected {
        names,
        links_left: search.left.values().sum(),
    }
}

struct Search {
    found: BTreeSet<PathBuf>,
    /// How many names of each file were not found yet. With subvolumes only whether it has others: the
    /// number of links counts the names in one snapshot.
    left: BTreeMap<Key, u64>,
    by_subvolumes: bool,
    /// The files that have several names in one snapshot.
    several: BTreeSet<Key>,
    /// The inode numbers of all files that are searched for: a cheap test before the key.
    inodes: BTreeSet<u64>,
}

impl Search {
    fn begin(root: &Path, bad: &BTreeMap<Key, PathBuf>) -> Self {
        let mut search = Self {
            found: BTreeSet::new(),
            left: BTreeMap::new(),
            by_subvolumes: subvolumes::is_btrfs(root),
            several: BTreeSet::new(),
            inodes: BTreeSet::new(),
        };
        for (key, path) in bad {
            let about = long_path::lstat(path).ok();
            let links = about.as_ref().map_or(1, Metadata::nlink);
            search.inodes.extend(about.map(|about| about.ino()));
            if links > 1 {
                search.several.insert(*key);
            }
            let left = if search.by_subvolumes { 1 } else { links };
            search.left.insert(*key, left);
        }
        search
    }

    fn meet(&mut self, path: &Path, key: Key) {
        let Some(links) = self.left.get_mut(&key) else {
            return;
        };
        if self.found.insert(path.to_owned()) && !self.by_subvolumes {
            *links -= 1;
            if *links == 0 {
                self.left.remove(&key);
            }
        }
    }

    /// With subvolumes, a file with one name in its snapshot has the same path in each.
    fn all_paths_tried(&mut self) {
        if self.by_subvolumes {
            self.left.retain(|key, _| self.several.contains(key));
        }
    }

    fn walk(&mut self, root: &Path, stop: &dyn Fn() -> bool) {
        if self.left.is_empty() || stop() {
            return;
        }
        let mut stopped = false;
        long_path::each(root, &mut |path, about| {
            if let Ok(about) = about
                && !about.is_dir()
                && self.inodes.contains(&about.ino())
            {
                self.meet(path, Key::of(&about));
            }
            stopped = stop();
            !self.left.is_empty() && !stopped
        });
        if self.by_subvolumes && !stopped {
            self.left.clear();
        }
    }
}

/// `JOB/SNAPSHOT/path` in all folders of the job.
pub(crate) fn same_path_elsewhere(root: &Path, path: &Path) -> Vec<PathBuf> {
    let Ok(inside) = path.strip_prefix(root) else {
        return Vec::new();
    };
    let mut parts = inside.components();
    let (Some(job), Some(_)) = (parts.next(), parts.next()) else {
        return Vec::new();
    };
    let rest = parts.as_path();
    let folders = fs::read_dir(root.join(job)).into_iter().flatten().flatten();
    // `latest` is a link, and is skipped.
    folders
        .filter(|folder| folder.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|folder| folder.path().join(rest))
        .collect()
}
