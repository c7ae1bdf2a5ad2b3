//! Detects an rsync that copies files which it should link. Some distributions' back-ports of rsync's
//! fixes of 2026 ignore `--link-dest` without an error (RsyncProject/rsync issue 915). Each run copies
//! every file again then, and the disk is soon full.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::file_times;
use crate::name_list::NameList;
use crate::text::unescape_path;

/// How many of the files that a run copied are compared.
const COMPARED_MAX: usize = 1000;
/// How many files are named whose time the volume may not be able to store.
const ODD_TIMES_MAX: usize = 100_000;
/// Fewer prove nothing: there may have been a reason to copy them.
const UNCHANGED_MIN: u64 = 3;
/// One in so many must be such a file.
const UNCHANGED_SHARE: u64 = 10;
/// A file with almost as many names as ext4 allows can't be linked.
const NAMES_MAX: u64 = 64_000;

/// Files that a run copied. Escaped names, relative to the root.
#[derive(Debug, Clone, Default)]
pub(crate) struct CopiedFiles {
    /// The first of them.
    compared: NameList,
    /// Those whose time the volume may not be able to store. rsync copies them in each run, because the source has
    /// another time.
    pub(crate) odd_times: NameList,
}

impl CopiedFiles {
    /// Adds a file, with its time in rsync's `%M`.
    pub(crate) fn add(&mut self, name: &str, modified: &str) {
        let (list, most) = match file_times::may_be_beyond(modified) {
            true => (&mut self.odd_times, ODD_TIMES_MAX),
            false => (&mut self.compared, COMPARED_MAX),
        };
        list.push_within(name.to_owned(), most);
    }
}

/// How many of the files in `copied` an older tree beside `tree` has, unchanged; 0 where they are few.
pub(crate) fn count(tree: &Path, older: &[PathBuf], copied: &CopiedFiles) -> u64 {
    let mut compared = 0;
    let mut unchanged = 0;
    for name in &copied.compared.names {
        let name = unescape_path(name);
        let Ok(new) = std::fs::symlink_metadata(tree.join(&name)) else {
            continue;
        };
        compared += 1;
        let has = |folder: &PathBuf| {
            let path = folder.join(&name);
            std::fs::symlink_metadata(&path).is_ok_and(|old| {
                could_be_linked(&new, &old) && attributes(&path) == attributes(&tree.join(&name))
            })
        };
        unchanged += u64::from(older.iter().any(has));
    }
    if unchanged >= UNCHANGED_MIN && unchanged * UNCHANGED_SHARE >= compared {
        unchanged
    } else {
        0
    }
}

fn could_be_linked(new: &Metadata, old: &Metadata) -> bool {
    let facts = |about: &Metadata| {
        let times = (about.mtime(), about.mtime_nsec());
        (about.len(), times, about.mode(), about.uid(), about.gid())
    };
    new.is_file()
        && old.is_file()
        && new.ino() != old.ino()
        && facts(new) == facts(old)
        && old.nlink() < NAMES_MAX
}

/// The extended attributes, ACLs included. `None` where they can't be read, which is equal to nothing.
fn attributes(path: &Path) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0; 64 << 10];
    let bytes = rustix::fs::llistxattr(path, &mut names[..]).ok()?;
    let mut value = vec![0; 64 << 10];
    let mut all = Vec::new();
    for name in names[..bytes]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let bytes = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
        all.push((name.to_owned(), value[..bytes].to_owned()));
    }
    all.sort();
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_whose_time_may_not_be_stored_do_not_hide_that_others_are_copied_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = |tree: &str, name: &str| dir.path().join(tree).join(name);
        for tree in ["older", "tree"] {
            std::fs::create_dir(dir.path().join(tree)).unwrap();
        }
        let mut copied = CopiedFiles::default();
        for n in 0..COMPARED_MAX {
            let name = format!("archived {n}");
            std::fs::write(at("tree", &name), "").unwrap();
            copied.add(&name, "1601/01/01-00:00:00");
        }
        for n in 0..UNCHANGED_MIN {
            let name = format!("file {n}");
            let new = std::fs::File::create(at("tree", &name)).unwrap();
            let old = std::fs::File::create(at("older", &name)).unwrap();
            let time = new.metadata().unwrap().modified().unwrap();
            old.set_modified(time).unwrap();
            copied.add(&name, "2026/11/30-08:00:00");
        }
        let older = [dir.path().join("older")];
        let tree = dir.path().join("tree");
        assert_eq!(count(&tree, &older, &copied), UNCHANGED_MIN);
    }
}
