//! What a dry run of rsync lists: counts, the largest files, and what each rule excludes.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::output::parse_entry;
use crate::name_list::NameList;
use crate::text::{escape_name, escape_path, unescape_name, unescape_path};

/// How many of the largest files are named.
const LARGEST_MAX: usize = 20;
/// How many paths are named for each rule.
const EXAMPLES_MAX: usize = 3;
/// The words of rsync for an object that a pattern excludes (exclude.c, `report_filter_result`).
const HIDING: &str = "[sender] hiding ";
const BECAUSE: &str = " because of pattern ";
/// rsync 3.5 prints this in place of a pattern from a file.
const FROM_FILE: &str = "<rule from a file";

/// What is listed.
#[derive(Debug, Clone, Default)]
pub(crate) struct Lists {
    /// Every path.
    pub(crate) all: bool,
    /// The folder that the paths are in, such as `/@web`; empty: the root.
    pub(crate) within: String,
    /// What a scan excluded. Neither these nor what lies directly in them is listed under a pattern.
    pub(crate) known: BTreeSet<PathBuf>,
}

/// What one rule excludes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Excluded {
    /// The pattern, or the name of the setting.
    pub rule: String,
    /// How many objects. What is inside an excluded folder is not counted.
    pub objects: u64,
    /// The first of them, escaped.
    pub examples: Vec<String>,
}

impl Excluded {
    pub(crate) fn add(&mut self, other: &Self) {
        self.objects += other.objects;
        let room = EXAMPLES_MAX.saturating_sub(self.examples.len());
        self.examples
            .extend(other.examples.iter().take(room).cloned());
    }
}

/// What the dry run has listed so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Listed {
    /// Regular files.
    pub(crate) files: u64,
    /// Other objects.
    pub(crate) others: u64,
    /// Size of the files.
    pub(crate) bytes: u64,
    /// Every path, escaped, if that was asked for.
    pub(crate) paths: Option<Vec<String>>,
    /// The smallest of the largest files on top.
    pub(crate) largest: BinaryHeap<Reverse<(u64, String)>>,
    pub(crate) excluded: BTreeMap<String, Excluded>,
}

impl Listed {
    /// Takes a line of rsync.
    pub(super) fn take(&mut self, line: &str, lists: &Lists) {
        if let Some(hidden) = line.strip_prefix(HIDING) {
            self.hide(hidden, lists);
            return;
        }
        let Some(entry) = parse_entry(line) else {
            return;
        };
        let within = &lists.within;
        let path = || format!("{within}/{}", escape_name(&unescape_name(entry.named.name)));
        if lists.all {
            self.paths.get_or_insert_default().push(path());
        }
        if !entry.is_file {
            self.others += 1;
            return;
        }
        let bytes = entry.named.bytes;
        self.files += 1;
        self.bytes += bytes;
        let is_large = self.largest.len() < LARGEST_MAX
            || self
                .largest
                .peek()
                .is_some_and(|Reverse((least, _))| bytes > *least);
        if is_large {
            self.largest.push(Reverse((bytes, path())));
            if self.largest.len() > LARGEST_MAX {
                self.largest.pop();
            }
        }
    }

    fn hide(&mut self, hidden: &str, lists: &Lists) {
        // A name may have these words in it, a pattern hardly.
        let Some((object, pattern)) = hidden.rsplit_once(BECAUSE) else {
            return;
        };
        let path = object.split_once(' ').map_or(object, |(_, path)| path);
        let known = |path: &Path| lists.known.contains(path);
        let place = unescape_path(path);
        if known(&place) || place.parent().is_some_and(known) {
            return;
        }
        let rule = match pattern.starts_with(FROM_FILE) {
            true => "exclude_from",
            false => pattern,
        };
        self.exclude(rule, &format!("{}{}", lists.within, escape_path(&place)));
    }

    fn exclude(&mut self, rule: &str, path: &str) {
        let excluded = self.excluded.entry(rule.to_owned());
        let excluded = excluded.or_insert_with(|| Excluded {
            rule: rule.to_owned(),
            objects: 0,
            examples: Vec::new(),
        });
        excluded.objects += 1;
        if excluded.examples.len() < EXAMPLES_MAX {
            excluded.examples.push(path.to_owned());
        }
    }

    /// Adds what another dry run has listed.
    pub(crate) fn add(&mut self, other: Self) {
        self.files += other.files;
        self.others += other.others;
        self.bytes += other.bytes;
        if let Some(paths) = other.paths {
            self.paths.get_or_insert_default().extend(paths);
        }
        for one in other.largest {
            self.largest.push(one);
            if self.largest.len() > LARGEST_MAX {
                self.largest.pop();
            }
        }
        for (rule, excluded) in other.excluded {
            self.excluded
                .entry(rule)
                .and_modify(|one| one.add(&excluded))
                .or_insert(excluded);
        }
    }

    /// Adds what a list names under a rule.
    pub(crate) fn exclude_all(&mut self, rule: &str, list: &NameList) {
        for path in &list.names {
            self.exclude(rule, path);
        }
        if let Some(excluded) = self.excluded.get_mut(rule) {
            excluded.objects += list.count - list.names.len() as u64;
        }
    }
}
