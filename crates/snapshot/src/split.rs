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
//!
//! In the subvolume `work` of a btrfs (65,535 names, and no older snapshot has any of them) there is no tree of
//! links: the parts of a file are made in `work` itself, and share their content.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::aside::LINK_DEST;
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::job::on_volume;
use crate::long_path::{lstat, open_regular, size_and_time};
use crate::progress::Progress;
use crate::recent;
use crate::record::Warning;
use crate::reflink;
use crate::reread::copying;
use crate::rsync::{Ended, ITEMS_MAX, Invocation, Outcome, Rsync, SeveralNames, TRANSFER_OPTIONS};
use crate::source_scan::NOWHERE;
use crate::text::escape_path;
use crate::walk::leads_within;

const CHECKSUM: &str = "--checksum";
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
            lstat(&tree.join(below)).is_err() && lstat(path).is_ok_and(|about| !about.is_dir())
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
    /// The tree, relative to the job's folder, if it is the subvolume `work`: there is no tree of links, and the last
    /// run goes on in it.
    pub(crate) in_place: Option<&'static str>,
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
        if let Some(to) = listing
            .arguments
            .last_mut()
            .filter(|_| self.in_place.is_some())
        {
            // rsync lists a file only if the destination lacks it.
            *to = NOWHERE.into();
        }
        listing.lists_names = true;
        let mut done = self.rsync.run(&listing, progress, cancel)?;
        if !goes_on(&done) {
            return Ok((done, None));
        }
        let plan = Plan::make(
            std::mem::take(&mut done.several_names),
            match self.in_place {
                // The tree of links has each name, too.
                None => self.limit / 2,
                Some(_) => self.limit,
            },
            &|name| self.names_elsewhere(&link_dests, name),
        );
        // The last run reports them again.
        (done.messages, done.unread, done.vanished) = Default::default();
        let by_content =
            self.in_place.is_some() && invocation.arguments.iter().any(|a| a == CHECKSUM);
        let filters = invocation.arguments.iter();
        let filters = filters.filter(|argument| is_attribute_filter(argument));
        let filters: Vec<OsString> = filters
            .cloned()
            .chain(by_content.then(|| CHECKSUM.into()))
            .collect();
        let linked = [&link_dests[..], &filters].concat();
        if let Some(tree) = self.in_place {
            self.part(&plan).map_err(on_volume("separate", &tree))?;
        }
        let runs = std::iter::once((&plan.linked, &linked));
        let copied = plan.copied.iter().map(|names| (names, &filters));
        for (index, (names, more)) in runs.chain(copied).enumerate() {
            if names.is_empty() {
                continue;
            }
            let to = match self.in_place {
                Some(to) => to.into(),
                None => self.tree.file_name().unwrap_or_default().to_string_lossy(),
            };
            // The first list of names is linked, the next one has the first part of each file.
            if self.in_place.is_some() && index > 1 {
                let shared = self.share_content(&plan, index - 1, by_content);
                shared.map_err(on_volume("copy a file of", &to))?;
            }
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

    fn in_tree(&self, path: &Path) -> PathBuf {
        self.tree.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn inode(&self, path: &Path) -> Option<u64> {
        lstat(&self.in_tree(path)).ok().map(|about| about.ino())
    }

    /// Removes the names of further parts that are links to a file of an earlier part.
    fn part(&self, plan: &Plan) -> io::Result<()> {
        for parts in &plan.parts {
            let mut earlier = BTreeSet::new();
            for part in parts {
                let inodes: Vec<Option<u64>> = part.iter().map(|path| self.inode(path)).collect();
                for (path, inode) in part.iter().zip(&inodes) {
                    if inode.is_some_and(|inode| earlier.contains(&inode)) {
                        self.remove(path)?;
                    }
                }
                earlier.extend(inodes.into_iter().flatten());
            }
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let path = self.in_tree(path);
        match lstat(&path)?.is_dir() {
            // rsync replaces it.
            true => Ok(()),
            false => std::fs::remove_file(path),
        }
    }

    /// Gives the further part number `index` of each file a file of its own, which shares the content of the first
    /// part, and makes its names. rsync would send the content again. `by_content`: files with equal size and time may
    /// have other content.
    fn share_content(&self, plan: &Plan, index: usize, by_content: bool) -> io::Result<()> {
        for parts in &plan.parts {
            let (Some(first), Some(part)) = (parts[0].first(), parts.get(index)) else {
                continue;
            };
            let Ok(content) = open_regular(&self.in_tree(first)) else {
                continue;
            };
            let wanted = size_and_time(&content.metadata()?);
            let mut kept: Option<PathBuf> = None;
            let mut compared = BTreeMap::new();
            let mut has_content = |to: &Path, inode: u64| {
                !by_content
                    || *compared
                        .entry(inode)
                        .or_insert_with(|| has_content_of(to, &self.in_tree(first)))
            };
            for path in part {
                let to = self.in_tree(path);
                let below = path.strip_prefix("/").unwrap_or(path);
                if !leads_within(self.tree, below) {
                    continue;
                }
                let made = match lstat(&to) {
                    Ok(about) if about.is_dir() => continue,
                    Ok(about)
                        if about.is_file()
                            && size_and_time(&about) == wanted
                            && has_content(&to, about.ino()) =>
                    {
                        kept.get_or_insert(to);
                        continue;
                    }
                    Ok(_) => std::fs::remove_file(&to),
                    Err(_) => Ok(()),
                };
                made?;
                std::fs::create_dir_all(to.parent().unwrap_or(&to))?;
                match &kept {
                    Some(kept) => std::fs::hard_link(kept, &to)?,
                    None => {
                        let (folder, name) = reflink::in_folder(&to)?;
                        reflink::file(&content, folder.as_fd(), name)?;
                        kept = Some(to);
                    }
                }
            }
        }
        Ok(())
    }

    /// How many names the older files have that rsync could link `name` to.
    fn names_elsewhere(&self, link_dests: &[OsString], name: &Path) -> u64 {
        let below = name.strip_prefix("/").unwrap_or(name);
        let trees = link_dests
            .iter()
            .filter_map(|argument| argument.as_bytes().strip_prefix(LINK_DEST.as_bytes()));
        let names = trees.filter_map(|tree| {
            let path = self.tree.join(OsStr::from_bytes(tree)).join(below);
            Some(lstat(&path).ok()?.nlink())
        });
        names.max().unwrap_or(0)
    }
}

/// Whether two files of equal size and time have the same content.
fn has_content_of(one: &Path, other: &Path) -> bool {
    let compared = open_regular(one).and_then(|mut one| recent::differs(&mut one, other));
    matches!(compared, Ok(Some(false)))
}

/// Whether the last run may follow. It reports what is wrong with single files.
fn goes_on(outcome: &Outcome) -> bool {
    matches!(
        outcome.ended,
        Ended::Whole | Ended::WithUnread | Ended::Because(_)
    )
}

/// Whether it is one of [`mod@super::take`]'s filters of attributes. They concern every run into the volume.
fn is_attribute_filter(argument: &OsStr) -> bool {
    let argument = argument.as_bytes();
    argument.starts_with(b"--filter=Hx ") || argument.starts_with(b"--filter=Px ")
}

/// Which names are linked and which are copied.
#[derive(Debug, Default)]
struct Plan {
    linked: Vec<PathBuf>,
    /// Of each file that is split: the names of each part.
    parts: Vec<Vec<Vec<PathBuf>>>,
    /// One list for each run of rsync. No list has more names of one file than half of the limit.
    copied: Vec<Vec<PathBuf>>,
    links: Links,
}

impl Plan {
    /// No copy gets more than `chunk` names. `names_elsewhere` returns how many names the older files have that this
    /// name could be linked to.
    fn make(several: SeveralNames, chunk: u64, names_elsewhere: &dyn Fn(&Path) -> u64) -> Self {
        let mut plan = Self::default();
        let names_max = chunk;
        let chunk = usize::try_from(chunk).unwrap_or(1).max(1);
        for mut names in several.into_values().filter(|names| names.len() > 1) {
            // Each run makes the same parts.
            names.sort();
            let elsewhere = names.iter().map(|name| names_elsewhere(name)).max();
            plan.links.names.extend_from_slice(&names);
            if elsewhere.unwrap_or(0).div_ceil(2) + names.len() as u64 <= names_max {
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
            plan.parts
                .push(names.chunks(chunk).map(<[_]>::to_vec).collect());
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let plan = Plan::make(several, 10, &|name| {
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
