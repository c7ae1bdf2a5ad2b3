//! Finds every name of the damaged files: a file has a name in each snapshot that links it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::long_path;
use crate::name_list::NameList;
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

/// Finds the names of `bad` (inodes with one name each) below `root`. A file has the same path in each
/// snapshot, unless the source had several names for it. Only for such files is everything walked, until
/// `stop` returns true.
pub(super) fn find(root: &Path, bad: &BTreeMap<u64, PathBuf>, stop: &dyn Fn() -> bool) -> Affected {
    let mut found = BTreeSet::new();
    let mut left = BTreeMap::new();
    for (inode, path) in bad {
        let links = long_path::lstat(path).map_or(1, |stat| stat.nlink());
        left.insert(*inode, links);
    }
    for (inode, path) in bad.iter().take(BY_PATH_MAX) {
        // Its own name is known, even if it can't be examined.
        meet(path, *inode, &mut found, &mut left);
        for other in same_path_elsewhere(root, path) {
            if long_path::lstat(&other).is_ok_and(|stat| stat.ino() == *inode) {
                meet(&other, *inode, &mut found, &mut left);
            }
        }
    }
    walk(root, &mut found, &mut left, stop);
    let mut names = NameList::default();
    for path in &found {
        names.push(escape_path(path.strip_prefix(root).unwrap_or(path)));
    }
    Affected {
        names,
        links_left: left.values().sum(),
    }
}

fn meet(path: &Path, inode: u64, found: &mut BTreeSet<PathBuf>, left: &mut BTreeMap<u64, u64>) {
    if let Some(links) = left.get_mut(&inode)
        && found.insert(path.to_owned())
    {
        *links -= 1;
        if *links == 0 {
            left.remove(&inode);
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

fn walk(
    root: &Path,
    found: &mut BTreeSet<PathBuf>,
    left: &mut BTreeMap<u64, u64>,
    stop: &dyn Fn() -> bool,
) {
    let goes_on = |left: &BTreeMap<u64, u64>| !left.is_empty() && !stop();
    if !goes_on(left) {
        return;
    }
    long_path::each(root, &mut |path, about| {
        if let Ok(about) = about
            && !about.is_dir()
        {
            meet(path, about.ino(), found, left);
        }
        goes_on(left)
    });
}
