//! The files that a dry run of rsync meets in the sources, and what is new among them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Census;
use super::file_list::{FileList, Listed, hash};
use crate::rsync::Entry;
use crate::text::{escape_path, unescape_path};

/// How many of the largest files are remembered; those that turn out to be excluded go.
const LARGE_MAX: usize = 200;
/// How many files and folders are named.
const NAMED_MAX: usize = 5;

/// What was met so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Walk {
    before: Option<Arc<FileList>>,
    /// Larger files are excluded.
    larger_than: Option<u64>,
    /// As rsync prints them, relative to the root.
    folders: Vec<String>,
    index: HashMap<String, usize>,
    last: Option<usize>,
    files: Vec<Met>,
    /// Of new and changed files: size, name, and number of the folder.
    large: BinaryHeap<Reverse<(u64, String, usize)>>,
}

/// A file in the sources.
#[derive(Debug, Clone, Copy)]
struct Met {
    path: u64,
    stamp: u64,
    bytes: u64,
    folder: usize,
}

impl Walk {
    /// Compares with the files of the last snapshot.
    pub(crate) fn new(before: Option<FileList>, larger_than: Option<u64>) -> Self {
        Self {
            before: before.map(Arc::new),
            larger_than,
            ..Self::default()
        }
    }

    /// Notes an object of the sources.
    pub(crate) fn meet(&mut self, entry: &Entry<'_>) {
        let named = &entry.named;
        if !entry.is_file || self.larger_than.is_some_and(|max| named.bytes > max) {
            return;
        }
        let folder = named.name.rsplit_once('/').map_or("", |(folder, _)| folder);
        let met = Met {
            path: hash(named.name.as_bytes()),
            stamp: hash(format!("{} {}", named.modified, named.bytes).as_bytes()),
            bytes: named.bytes,
            folder: self.folder(folder),
        };
        if self.is_new(&met) {
            self.note_large(named.name, &met);
        }
        self.files.push(met);
    }

    /// The number of a folder. rsync lists the files of one folder one after the other.
    fn folder(&mut self, folder: &str) -> usize {
        if let Some(last) = self.last.filter(|last| self.folders[*last] == folder) {
            return last;
        }
        let number = match self.index.get(folder) {
            Some(number) => *number,
            None => {
                self.folders.push(folder.to_owned());
                let number = self.folders.len() - 1;
                self.index.insert(folder.to_owned(), number);
                number
            }
        };
        self.last = Some(number);
        number
    }

    fn is_new(&self, met: &Met) -> bool {
        let before = self.before.as_ref();
        before.and_then(|before| before.stamp(met.path)) != Some(met.stamp)
    }

    fn note_large(&mut self, name: &str, met: &Met) {
        let smallest = self.large.peek().map_or(0, |Reverse((bytes, ..))| *bytes);
        if self.large.len() < LARGE_MAX || met.bytes > smallest {
            self.large
                .push(Reverse((met.bytes, name.to_owned(), met.folder)));
            if self.large.len() > LARGE_MAX {
                self.large.pop();
            }
        }
    }

    /// What is new, and the list of the files for the next run. `partly`: something of the sources could not
    /// be walked, so what was not met may still be there. `excluded` names the folders that the walk found to be
    /// excluded.
    pub(crate) fn finish(
        mut self,
        excluded: &BTreeSet<PathBuf>,
        partly: bool,
    ) -> (Census, FileList) {
        let excluded = self.excluded(excluded);
        self.files.retain(|met| !excluded[met.folder]);
        let mut census = Census {
            files: self.files.len() as u64,
            files_before: self.before.as_ref().map(|before| before.len() as u64),
            ..Census::default()
        };
        let mut by_folder = vec![0; self.folders.len()];
        let mut known = 0;
        for met in &self.files {
            let stamp = self
                .before
                .as_ref()
                .and_then(|before| before.stamp(met.path));
            known += u64::from(stamp.is_some());
            if stamp == Some(met.stamp) {
                continue;
            }
            match stamp {
                None => census.new += 1,
                Some(_) => census.changed += 1,
            }
            census.bytes += met.bytes;
            by_folder[met.folder] += met.bytes;
        }
        let largest = self.large.into_sorted_vec().into_iter();
        let largest = largest.filter(|Reverse((.., folder))| !excluded[*folder]);
        census.largest = largest
            .take(NAMED_MAX)
            .map(|Reverse((bytes, name, _))| (shown(&name), bytes))
            .collect();
        census.folders = top_folders(&self.folders, &by_folder);
        let mut list: Vec<Listed> = self.files.iter().map(|met| (met.path, met.stamp)).collect();
        let before = self.before.iter().flat_map(|before| before.iter());
        let not_met = census.files_before.unwrap_or(0).saturating_sub(known);
        // Renamed files are new, too: what encrypts all files gives them new names.
        census.gone = match partly {
            true => not_met.min(census.new),
            false => not_met,
        };
        if partly {
            // What was met comes first, and counts.
            let met = FileList::of(list.clone());
            list.extend(before.filter(|(path, _)| met.stamp(*path).is_none()));
        }
        (census, FileList::of(list))
    }

    /// Whether each folder is excluded, because of what the walk met.
    fn excluded(&self, paths: &BTreeSet<PathBuf>) -> Vec<bool> {
        let is_in = |folder: &String| {
            let path = Path::new("/").join(unescape_path(folder));
            !paths.is_empty() && path.ancestors().any(|above| paths.contains(above))
        };
        self.folders.iter().map(is_in).collect()
    }
}

/// For people.
fn shown(name: &str) -> String {
    escape_path(&Path::new("/").join(unescape_path(name)))
}

/// Folders with at least a tenth of all bytes, without those of which one folder inside has nearly all.
fn top_folders(folders: &[String], bytes: &[u64]) -> Vec<(String, u64)> {
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    for (folder, bytes) in folders.iter().zip(bytes).filter(|(_, bytes)| **bytes > 0) {
        let mut folder = folder.as_str();
        loop {
            *sums.entry(folder).or_default() += bytes;
            match folder.rsplit_once('/') {
                Some((above, _)) => folder = above,
                None => break,
            }
        }
    }
    let all: u64 = bytes.iter().sum();
    let is_inside = |inner: &str, outer: &str| {
        inner
            .strip_prefix(outer)
            .is_some_and(|rest| rest.starts_with('/'))
    };
    let large = sums.iter().filter(|(_, sum)| **sum * 10 >= all);
    let large: Vec<(&str, u64)> = large.map(|(folder, sum)| (*folder, *sum)).collect();
    let has_more = |(outer, sum): &&(&str, u64)| {
        let mut inner = large.iter().filter(|(inner, _)| is_inside(inner, outer));
        !inner.any(|(_, part)| part * 10 >= sum * 8)
    };
    let mut top: Vec<_> = large.iter().filter(has_more).collect();
    top.sort_by_key(|(_, sum)| Reverse(*sum));
    top.iter()
        .take(NAMED_MAX)
        .map(|(folder, sum)| (shown(folder), *sum))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rsync::parse_entry;

    fn walk(before: Option<FileList>, lines: &[(&str, u64, u32)]) -> Walk {
        let mut walk = Walk::new(before, Some(1000));
        for (name, bytes, second) in lines {
            let line = format!(">f+++++++++ 2026/11/28-15:28:{second:02} {bytes} /{name}");
            walk.meet(&parse_entry(&line).unwrap());
        }
        walk
    }

    fn count(census: &Census) -> [u64; 5] {
        let Census {
            files,
            new,
            changed,
            gone,
            bytes,
            ..
        } = census;
        [*files, *new, *changed, *gone, *bytes]
    }

    #[test]
    fn new_changed_and_gone_files_are_counted() {
        let nothing = BTreeSet::new();
        let first = [
            ("a/x", 10, 1),
            ("a/y", 20, 1),
            ("b/z", 30, 1),
            ("big", 1001, 1),
        ];
        let (census, list) = walk(None, &first).finish(&nothing, false);
        assert_eq!(count(&census), [3, 3, 0, 0, 60]);
        assert_eq!(census.files_before, None);
        let second = [("a/x", 10, 1), ("a/y", 20, 2), ("c/n", 40, 1)];
        let (census, next) = walk(Some(list.clone()), &second).finish(&nothing, false);
        assert_eq!(count(&census), [3, 1, 1, 1, 60]);
        assert_eq!(census.files_before, Some(3));
        assert_eq!(
            census.largest,
            [("/c/n".to_owned(), 40), ("/a/y".to_owned(), 20)]
        );
        assert_eq!(
            census.folders,
            [("/c".to_owned(), 40), ("/a".to_owned(), 20)]
        );
        let (census, _) = walk(Some(next), &second).finish(&nothing, false);
        assert_eq!(count(&census), [3, 0, 0, 0, 0]);
        // A disk that is away is not gone, and is no news when it is back.
        let (census, next) = walk(Some(list), &first[..2]).finish(&nothing, true);
        assert_eq!(count(&census), [2, 0, 0, 0, 0]);
        let (census, _) = walk(Some(next), &first).finish(&nothing, false);
        assert_eq!(count(&census), [3, 0, 0, 0, 0]);
    }

    #[test]
    fn renamed_files_are_gone_although_a_folder_was_not_walked() {
        let nothing = BTreeSet::new();
        let names: Vec<String> = (0..9).map(|number| format!("home/{number}")).collect();
        let files: Vec<_> = names.iter().map(|name| (&**name, 1, 1)).collect();
        let (_, list) = walk(None, &files).finish(&nothing, false);
        let renamed = ["home/a.locked", "home/b.locked", "home/c.locked"].map(|name| (name, 1, 1));
        let now = [&renamed[..], &files[3..6]].concat();
        for (partly, gone) in [(true, 3), (false, 6)] {
            let (census, _) = walk(Some(list.clone()), &now).finish(&nothing, partly);
            assert_eq!(count(&census), [6, 3, 0, gone, 3], "{partly}");
        }
    }

    #[test]
    fn what_a_mark_excludes_is_not_counted() {
        let found = BTreeSet::from([PathBuf::from("/a/cache")]);
        let lines = [
            ("a/cache/p", 500, 1),
            ("a/cache/deep/q", 400, 1),
            ("a/x", 1, 1),
        ];
        let (census, _) = walk(None, &lines).finish(&found, false);
        assert_eq!(count(&census), [1, 1, 0, 0, 1]);
        assert_eq!(census.largest, [("/a/x".to_owned(), 1)]);
    }

    #[test]
    fn folders_are_named_where_the_bytes_are() {
        let lines = [
            ("home/anna/Videos/2026/a", 700, 1),
            ("home/anna/Videos/2026/b", 700, 1),
            ("home/anna/Mail/c", 300, 1),
            ("home/bob/d", 20, 1),
        ];
        let (census, _) = walk(None, &lines).finish(&BTreeSet::new(), false);
        let names: Vec<&str> = census.folders.iter().map(|(name, _)| &**name).collect();
        assert_eq!(names, ["/home/anna/Videos/2026", "/home/anna/Mail"]);
    }
}
