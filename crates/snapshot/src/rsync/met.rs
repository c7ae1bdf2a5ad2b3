//! What a dry run of rsync meets of the files that a job's rules are about.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::output::Entry;
use crate::census::Walk;
use crate::scan_rules::ScanRules;
use crate::text::unescape_path;

/// The file that marks a folder as a cache (<https://bford.info/cachedir/>).
const CACHE_TAG: &str = "CACHEDIR.TAG";

/// What a dry run met that a rule is about. Absolute paths.
#[derive(Debug, Clone, Default)]
pub(crate) struct Met {
    pub(crate) tags: BTreeSet<PathBuf>,
    pub(crate) markers: BTreeSet<PathBuf>,
    pub(crate) large: BTreeSet<PathBuf>,
    /// Counts the files, if that was asked for.
    pub(crate) walk: Option<Walk>,
}

impl Met {
    /// Notes what a listed object means for `rules`.
    pub(super) fn meet(&mut self, rules: &ScanRules, entry: &Entry<'_>) {
        if let Some(walk) = &mut self.walk {
            walk.meet(entry);
        }
        let path = || Path::new("/").join(unescape_path(entry.named.name));
        if entry.is_file && rules.larger_than.is_some_and(|max| entry.named.bytes > max) {
            self.large.insert(path());
        }
        let name = entry.named.name.trim_end_matches('/');
        let name = name.rsplit('/').next().unwrap_or_default();
        // Without an escape in its name, it is the name itself.
        let is_marker = || {
            let path = path();
            let name = path.file_name().unwrap_or_default().as_bytes().to_owned();
            rules.if_present.iter().any(|one| one.as_bytes() == name)
        };
        if !rules.if_present.is_empty() && is_marker() {
            self.markers.insert(path());
        } else if rules.caches && entry.is_file && name == CACHE_TAG {
            self.tags.insert(path());
        }
    }
}
