//! What a scan found in the sources, and the patterns that exclude it.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::long_path::open_regular;
use crate::mounts::pattern_for;
use crate::name_list::NameList;
use crate::record::RunRecord;
use crate::rsync::{Met, within};
use crate::text::escape_path;

/// What a cache tag begins with. A file without it is no tag.
const CACHE_SIGNATURE: &[u8] = b"Signature: 8a477f597d28d172789f06886806bc55";
/// How long a source may take to show the first bytes of one such file.
const TAG_PATIENCE: Duration = Duration::from_secs(10);
/// rsync drops longer lines (exclude.c, `parse_filter_file`). A path with that many wildcards is copied.
const PATTERN_BYTES_MAX: usize = 4096;

/// What the rules exclude.
#[derive(Debug, Clone, Default)]
pub(crate) struct Found {
    /// Marked folders, escaped.
    pub(crate) folders: NameList,
    /// Large files, escaped.
    pub(crate) large: NameList,
    /// Every path that is excluded: of a marked folder the folder, of a large file the file.
    pub(crate) paths: BTreeSet<PathBuf>,
    /// rsync's rules, one in each line, for `--exclude-from`.
    pub(crate) lines: Vec<u8>,
    /// Rules with a line break, which need an option of their own.
    pub(crate) options: Vec<OsString>,
}

impl Found {
    /// `is_valid`: whether a tag has the signature of a cache tag.
    pub(crate) fn of(met: Met, is_valid: &dyn Fn(&Path) -> bool) -> Self {
        let mut found = Self::default();
        let valid_tags = met.tags.into_iter().filter(|tag| is_valid(tag));
        let marks: BTreeSet<PathBuf> = valid_tags.chain(met.markers).collect();
        let mut folders: Vec<&Path> = Vec::new();
        for mark in &marks {
            found.add(b"+ ", &pattern_for(mark, false));
            folders.extend(mark.parent());
        }
        folders.sort_unstable();
        folders.dedup();
        let mut inner: Option<&Path> = None;
        for folder in folders {
            // A marked folder in a marked folder is excluded with it.
            if inner.is_some_and(|outer| folder.starts_with(outer)) {
                continue;
            }
            inner = Some(folder);
            found.add(b"", &pattern_for(folder, true));
            found.folders.push(escape_path(folder));
            found.paths.insert(folder.to_owned());
        }
        for file in &met.large {
            found.add(b"", &pattern_for(file, false));
            found.large.push(escape_path(file));
            found.paths.insert(file.clone());
        }
        found
    }

    /// The large files that the run before did not exclude. Its record keeps no more names than
    /// [`crate::name_list::NAMES_MAX`]; a file that it may only have counted is not called new.
    pub(crate) fn newly_large(&self, before: Option<&RunRecord>) -> NameList {
        let Some(before) = before.map(|record| &record.too_large) else {
            return self.large.clone();
        };
        let mut new = NameList::default();
        if before.count <= before.names.len() as u64 {
            for name in self
                .large
                .names
                .iter()
                .filter(|one| !before.names.contains(one))
            {
                new.push(name.clone());
            }
        }
        new
    }

    fn add(&mut self, prefix: &[u8], pattern: &OsString) {
        let pattern = pattern.as_bytes();
        if pattern.len() > PATTERN_BYTES_MAX {
            return;
        }
        // In a file, rsync ends a rule at either character.
        if pattern.contains(&b'\n') || pattern.contains(&b'\r') {
            let rule = [b"--exclude=", prefix, pattern].concat();
            let rule = std::ffi::OsStr::from_bytes(&rule);
            self.options.push(rule.to_owned());
        } else {
            self.lines.extend_from_slice(prefix);
            self.lines.extend_from_slice(pattern);
            self.lines.push(b'\n');
        }
    }
}

/// Whether the file has the signature of a cache tag. A file that can't be read has none: the folder is
/// then in the snapshot.
pub(crate) fn is_cache_tag(path: &Path) -> bool {
    let path = path.to_owned();
    let read = move || {
        let mut first = [0; CACHE_SIGNATURE.len()];
        let read = open_regular(&path).and_then(|mut file| file.read_exact(&mut first));
        read.is_ok() && first == CACHE_SIGNATURE
    };
    within(TAG_PATIENCE, read).unwrap_or(false)
}
