//! Merges the lists of runs that follow each other into one: what changed from the first to the last of them.
//!
//! All lists have their paths in one order, so that little of them is in memory at a time.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::reading::{self, ListLines};
use super::{Last, Line};
use crate::check::Key;
use crate::content::{Content, MaybeContent};
use crate::seen::Change;
use crate::text::unescape_path;

/// Lists that are read together, the oldest one first.
pub(super) struct Merging {
    lists: Vec<Ahead>,
    /// Digests of files that have none at their paths.
    lacking: HashMap<Key, Content>,
    /// Digests that the lists have without a path.
    without_path: Vec<Content>,
}

/// A list, and the path that comes next in it.
pub(super) struct Ahead {
    lines: ListLines,
    pub(super) next: Option<(PathBuf, Line)>,
}

impl Merging {
    /// `open` opens each of the lists.
    pub(super) fn begin(open: &dyn Fn() -> io::Result<Vec<File>>) -> io::Result<Self> {
        let mut merging = Self {
            lists: Vec::new(),
            lacking: lacking(open)?,
            without_path: Vec::new(),
        };
        for file in open()? {
            let lines = ListLines::begin(file)?;
            let list = Ahead::begin(lines, &mut merging.without_path)?;
            merging.lists.push(list);
        }
        Ok(merging)
    }

    /// When the last list was written.
    pub(super) fn written(&self) -> Option<Timestamp> {
        self.lists.last()?.lines.head.written
    }

    /// When the oldest of the comparisons was made. `None`: that is not known.
    pub(super) fn compared(&self) -> Option<Timestamp> {
        let made = self.lists.iter().map(|list| list.lines.head.made());
        made.min().flatten()
    }

    /// Whether the snapshot of the last list is complete.
    pub(super) fn complete(&self) -> Option<bool> {
        self.lists.last()?.lines.head.complete
    }

    /// Calls `write` with each line of the merged list, and returns its last one.
    pub(super) fn run(
        mut self,
        write: &mut dyn FnMut(&Line) -> io::Result<()>,
    ) -> io::Result<Last> {
        let mut last = Last {
            finished: true,
            ..Last::default()
        };
        let mut placed = HashSet::new();
        while let Some(path) = self.first_path() {
            let mut merged: Option<Line> = None;
            for list in &mut self.lists {
                if list.next.as_ref().is_none_or(|(next, _)| *next != path) {
                    continue;
                }
                if let Some(line) = list.advance(&mut self.without_path)? {
                    merged = Some(match merged {
                        Some(older) => older.then(line),
                        None => line,
                    });
                }
            }
            let Some(mut line) = merged else { continue };
            let Some(change) = line.change else { continue };
            if let Some(content) = &mut line.content
                && content.sha256.is_none()
                && let Some(known) = self.lacking.get(&content.file)
            {
                content.clone_from(known);
                placed.insert(content.file);
            }
            last.count(change);
            write(&line)?;
        }
        for content in self.without_path {
            // Once is enough.
            if placed.insert(content.file) {
                write(&Line::of(content))?;
            }
        }
        last.finished = self
            .lists
            .iter()
            .all(|list| list.lines.finished == Some(true));
        Ok(last)
    }

    fn first_path(&self) -> Option<PathBuf> {
        let paths = self.lists.iter().filter_map(|list| list.next.as_ref());
        paths
            .map(|(path, _)| path)
            .min_by(|one, other| order(one, other))
            .cloned()
    }
}

impl Ahead {
    pub(super) fn begin(lines: ListLines, without_path: &mut Vec<Content>) -> io::Result<Self> {
        let mut list = Self { lines, next: None };
        list.advance(without_path)?;
        Ok(list)
    }

    /// Returns the line of the next path, and reads the one after it.
    pub(super) fn advance(&mut self, without_path: &mut Vec<Content>) -> io::Result<Option<Line>> {
        let (before, line) = self.next.take().unzip();
        while let Some(line_after) = self.lines.next::<Line>()? {
            let Some(path) = &line_after.path else {
                without_path.extend(line_after.content);
                continue;
            };
            let path = unescape_path(path);
            if before.is_some_and(|before| order(&before, &path) != Ordering::Less) {
                let what = "the paths of the list are in no order";
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            self.next = Some((path, line_after));
            break;
        }
        Ok(line)
    }
}

impl Line {
    /// Separates the content from it.
    pub(super) fn with_content(mut self) -> Option<(Self, Content)> {
        let content = self.content.take()?;
        Some((self, content))
    }

    pub(super) fn of(content: Content) -> Self {
        Self {
            path: None,
            change: None,
            before: None,
            after: None,
            content: Some(content),
            read_by: None,
        }
    }

    /// This change, and the next one of the path. No change is left of a path that came and went.
    fn then(self, next: Self) -> Self {
        let read_by = match next.change {
            // The content is the older one.
            Some(Change::Attributes) => next.read_by.or(self.read_by),
            _ => next.read_by,
        };
        let is_content = [self.change, next.change].contains(&Some(Change::Content));
        let change = match (&self.before, &next.after) {
            (None, None) => None,
            (None, Some(_)) => Some(Change::New),
            (Some(_), None) => Some(Change::Gone),
            (Some(old), Some(new)) => Some(match old.change(new) {
                Some(change @ (Change::Kind | Change::Content)) => change,
                _ if is_content => Change::Content,
                _ => Change::Attributes,
            }),
        };
        Self {
            path: self.path,
            change,
            before: self.before,
            after: next.after,
            content: next.content,
            read_by,
        }
    }
}

/// The digests of files that one line has without them, and another one with them.
fn lacking(open: &dyn Fn() -> io::Result<Vec<File>>) -> io::Result<HashMap<Key, Content>> {
    let mut wanted: HashSet<Key> = HashSet::new();
    let mut known: HashMap<Key, Content> = HashMap::new();
    let has = |content: &Content| content.sha256.is_some();
    for file in open()? {
        reading::read(file, &mut |line: MaybeContent| {
            wanted.extend(line.content().filter(|one| !has(one)).map(|one| one.file));
        })?;
    }
    if wanted.is_empty() {
        return Ok(known);
    }
    for file in open()? {
        reading::read(file, &mut |line: MaybeContent| {
            let content = line.content().filter(has);
            if let Some(content) = content.filter(|one| wanted.contains(&one.file)) {
                known.entry(content.file).or_insert(content);
            }
        })?;
    }
    Ok(known)
}

/// The order of the paths in a list: a folder comes before what is in it, and all names of a folder before what is
/// below them.
#[must_use]
pub(crate) fn order(one: &Path, other: &Path) -> Ordering {
    let (mut ones, mut others) = (one.components().peekable(), other.components().peekable());
    loop {
        match (ones.next(), others.next()) {
            (None, None) => return Ordering::Equal,
            (None, Some(_)) => return Ordering::Less,
            (Some(_), None) => return Ordering::Greater,
            (Some(name), Some(its)) if name == its => {}
            (Some(name), Some(its)) => {
                let is_deep = [ones.peek().is_some(), others.peek().is_some()];
                return is_deep[0].cmp(&is_deep[1]).then(name.cmp(&its));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_folder_come_before_what_is_below_them() {
        let sorted = [
            "/a", "/b", "/b-c", "/a/x", "/a/y", "/a/x/1", "/b/a", "/b-c/a",
        ];
        for (at, one) in sorted.iter().enumerate() {
            for (other_at, other) in sorted.iter().enumerate() {
                let found = order(Path::new(one), Path::new(other));
                assert_eq!(found, at.cmp(&other_at), "{one} {other}");
            }
        }
    }
}
