//! Files with more names (hard links) than the volume allows for one file.
//!
//! rsync fails if it can't make a link, for whatever reason, so it must never try to make too many. ext4
//! allows 65,000 names for a file, counting those in older snapshots. Once rsync has failed at such a file:
//!
//! 1. A dry run lists all names that the job includes of each file with several names.
//! 2. A work tree gets those names, and nothing else. If the file of the older snapshots would get too many
//!    names, the file is copied again, with at most half of the allowed names for each copy.
//! 3. rsync makes the snapshot in a new tree, without `--hard-links`, but with links to the work tree. So
//!    each name is a link to the same file as there. This run is as complete as any other: it walks the
//!    sources, and copies what it can't link.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::aside::LINK_DEST;
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::progress::Progress;
use crate::record::Warning;
use crate::reread::copying;
use crate::rsync::{Ended, ITEMS_MAX, Invocation, Outcome, Rsync, SeveralNames, TRANSFER_OPTIONS};
use crate::text::escape_path;

const OPTIONS_WITHOUT_LINKS: &str = "-aAXXS";
/// fs/ext4/ext4.h, `EXT4_LINK_MAX`.
pub(crate) const LINKS_MAX: u64 = 65_000;
/// How many files get a warning.
const WARNINGS_MAX: usize = 20;

/// How many names a file of the volume can have. `first` is a path in `tree` whose file got no further
/// name.
pub(crate) fn limit(tree: &Path, first: &[u8]) -> u64 {
    let about = std::fs::symlink_metadata(tree.join(OsStr::from_bytes(first)));
    let names = about.map_or(LINKS_MAX, |about| about.nlink());
    names.clamp(2, LINKS_MAX)
}

/// Changes the arguments for the last run.
pub(crate) fn without_links(invocation: &mut Invocation) {
    for argument in &mut invocation.arguments {
        if argument == TRANSFER_OPTIONS[0] {
            *argument = OPTIONS_WITHOUT_LINKS.into();
        }
    }
}

/// The files in the work tree.
#[derive(Debug, Default)]
pub(crate) struct Links {
    names: Vec<PathBuf>,
    split: Vec<PathBuf>,
}

impl Links {
    /// Names that the source has and the tree lacks.
    pub(crate) fn missing_in(&self, tree: &Path) -> Vec<PathBuf> {
        let lacks = |path: &&PathBuf| {
            let below = path.strip_prefix("/").unwrap_or(path);
            crate::long_path::lstat(&tree.join(below)).is_err()
                && crate::long_path::lstat(path).is_ok_and(|about| !about.is_dir())
        };
        self.names.iter().filter(lacks).cloned().collect()
    }

    pub(crate) fn warnings(&self) -> impl Iterator<Item = Warning> {
        let split = self.split.iter().take(WARNINGS_MAX);
        split.map(|path| Warning::LinksSplit {
            path: escape_path(path),
        })
    }
}

/// Makes the work tree.
pub(crate) struct Work<'a> {
    pub(crate) rsync: &'a Rsync,
    /// Its absolute path. The tree is empty.
    pub(crate) tree: &'a Path,
    /// See [`limit`].
    pub(crate) limit: u64,
}

impl Work<'_> {
    /// Fills the work tree for the run that `invocation` describes. Returns what its own runs copied.
    /// The second part is `None` if one of them stopped the whole run.
    pub(crate) fn carry_out(
        &self,
        invocation: &Invocation,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(Outcome, Option<Links>), SnapshotError> {
        let mut listing = invocation.clone();
        let is_link = |argument: &OsString| argument.as_bytes().starts_with(LINK_DEST.as_bytes());
        let link_dests: Vec<OsString> = invocation
            .arguments
            .iter()
            .filter(|a| is_link(a))
            .cloned()
            .collect();
        listing.arguments.retain(|argument| !is_link(argument));
        listing.arguments.insert(0, "--dry-run".into());
        listing.lists_names = true;
        let mut done = self.rsync.run(&listing, progress, cancel)?;
        if !goes_on(&done) {
            return Ok((done, None));
        }
        let plan = Plan::make(
            std::mem::take(&mut done.several_names),
            self.limit,
            &|name| self.names_elsewhere(&link_dests, name),
        );
        // The last run reports them again.
        (done.messages, done.unread, done.vanished) = Default::default();
        let runs = std::iter::once((&plan.linked, &link_dests[..]));
        for (names, more) in runs.chain(plan.copied.iter().map(|names| (names, &[][..]))) {
            if names.is_empty() {
                continue;
            }
            let to = self.tree.file_name().unwrap_or_default().to_string_lossy();
            let names = names.iter().map(PathBuf::as_path);
            let run = copying(invocation, names, &to, more);
            let outcome = self.rsync.run(&run, progress, cancel)?;
            if !goes_on(&outcome) {
                return Ok((outcome, None));
            }
            done.recent.append_within(&outcome.recent, ITEMS_MAX);
            done.copied_from_older
                .append_within(&outcome.copied_from_older, ITEMS_MAX);
            done.stats.add_copied(&outcome.stats);
        }
        Ok((done, Some(plan.links)))
    }

    /// How many names the older files have that rsync could link `name` to.
    fn names_elsewhere(&self, link_dests: &[OsString], name: &Path) -> u64 {
        let below = name.strip_prefix("/").unwrap_or(name);
        let trees = link_dests
            .iter()
            .filter_map(|argument| argument.as_bytes().strip_prefix(LINK_DEST.as_bytes()));
        let names = trees.filter_map(|tree| {
            let path = self.tree.join(OsStr::from_bytes(tree)).join(below);
            Some(crate::long_path::lstat(&path).ok()?.nlink())
        });
        names.max().unwrap_or(0)
    }
}

/// Whether the last run may follow. It reports what is wrong with single files.
fn goes_on(outcome: &Outcome) -> bool {
    matches!(
        outcome.ended,
        Ended::Whole | Ended::WithUnread | Ended::Because(_)
    )
}

/// Which names are linked and which are copied.
#[derive(Debug, Default)]
struct Plan {
    linked: Vec<PathBuf>,
    /// One list for each run of rsync. No list has more names of one file than half of the limit.
    copied: Vec<Vec<PathBuf>>,
    links: Links,
}

impl Plan {
    /// `names_elsewhere` returns how many names the older files have that this name could be linked to.
    fn make(several: SeveralNames, limit: u64, names_elsewhere: &dyn Fn(&Path) -> u64) -> Self {
        let mut plan = Self::default();
        // Each name is in the work tree and in the snapshot.
        let chunk = usize::try_from(limit / 2).unwrap_or(1).max(1);
        for names in several.into_values().filter(|names| names.len() > 1) {
            let elsewhere = names.iter().map(|name| names_elsewhere(name)).max();
            plan.links.names.extend_from_slice(&names);
            if elsewhere.unwrap_or(0) + 2 * names.len() as u64 <= limit {
                plan.linked.extend(names);
                continue;
            }
            plan.links.split.extend(names.first().cloned());
            for (index, chunk) in names.chunks(chunk).enumerate() {
                if plan.copied.len() == index {
                    plan.copied.push(Vec::new());
                }
                plan.copied[index].extend_from_slice(chunk);
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn no_copy_gets_more_than_half_of_the_allowed_names() {
        let names = |prefix: &str, count: usize| -> Vec<PathBuf> {
            (0..count)
                .map(|n| PathBuf::from(format!("/{prefix}{n}")))
                .collect()
        };
        let several: SeveralNames = BTreeMap::from([
            ((1, 1), names("few", 3)),
            ((1, 2), names("many", 23)),
            ((1, 3), names("full", 3)),
            ((1, 4), names("single", 1)),
        ]);
        let plan = Plan::make(several, 20, &|name| {
            if name.starts_with("/full2") { 15 } else { 0 }
        });
        assert_eq!(plan.linked, names("few", 3));
        let copied: Vec<usize> = plan.copied.iter().map(Vec::len).collect();
        assert_eq!(copied, [10 + 3, 10, 3]);
        let mut all: Vec<PathBuf> = plan.copied.concat();
        all.extend(plan.linked);
        all.sort();
        let mut listed = plan.links.names.clone();
        listed.sort();
        assert_eq!(all, listed);
        assert_eq!(plan.links.split, [PathBuf::from("/many0"), "/full0".into()]);
    }
}
