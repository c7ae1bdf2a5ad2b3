//! After rsync's run: files of the new tree whose content must not come from an older snapshot are
//! read from their source, by a second rsync.
//!
//! Those are files that a check named ([`Suspects`]), files that may have changed once more after the
//! last run had read them ([`Recent`]), and, where no guard could watch the volume, files that
//! rsync copied out of an older snapshot. Their names in the new tree are removed first, and only
//! those: older snapshots keep theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, OFlags, unlinkat};

use crate::long_path;
use crate::recent::{self, Recent};
use crate::record::{NameList, RunRecord, Warning};
use crate::rsync::Invocation;
use crate::spec::Cancel;
use crate::suspects::{Suspects, name_of};
use crate::walk::each_file;

/// Why a file is read from its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Why {
    /// rsync copied it out of an older snapshot, for its attributes.
    FromOlder,
    /// It changed after it had been read.
    Recent,
    /// A comparison with the source found that it changed without a sign.
    Missed,
    /// A check found it damaged.
    Damaged,
}

/// What is to be read from the source.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    paths: BTreeMap<PathBuf, Why>,
    /// Damaged files that rsync itself has read from the source, for their attributes.
    healed: BTreeSet<PathBuf>,
    /// Files that seem unchanged and whose time still proves nothing.
    pub(crate) still_recent: NameList,
}

/// What is looked through.
pub(crate) struct Tree<'t> {
    /// The new tree.
    pub(crate) root: &'t OwnedFd,
    pub(crate) job: &'t str,
    /// It has links to a copy that a person's own rsync made.
    pub(crate) links_to_copy: bool,
    /// See [`recent::from_s`].
    pub(crate) recent_from_s: i64,
    /// The tree beside it that unchanged files were linked from first.
    pub(crate) linked_first: Option<String>,
}

impl Plan {
    /// Looks which files of the new tree have a content that must not be.
    pub(crate) fn make(
        tree: &Tree<'_>,
        suspects: &Suspects,
        recent: &Recent,
        copied_from_older: &NameList,
        cancel: &Cancel,
    ) -> io::Result<Self> {
        let mut plan = Self::default();
        // Inodes of which every name in the tree is needed.
        let mut inodes = BTreeMap::new();
        for name in &copied_from_older.names {
            let path = crate::text::unescape_path(name);
            if let Some((_, about)) = open(tree.root, &path)? {
                plan.add(path, &about, Why::FromOlder, &mut inodes);
            }
        }
        for path in &recent.paths {
            let Some((mut file, about)) = open(tree.root, path)? else {
                continue;
            };
            if cancel.is_cancelled() {
                // Not compared: the tree must not keep it.
                plan.add(path.clone(), &about, Why::Recent, &mut inodes);
                continue;
            }
            match recent::differs(&mut file, &Path::new("/").join(path)) {
                Ok(Some(true)) => plan.add(path.clone(), &about, Why::Recent, &mut inodes),
                // The volume can't read it: the source can.
                Err(_) => plan.add(path.clone(), &about, Why::Damaged, &mut inodes),
                Ok(_) if about.mtime() >= tree.recent_from_s => {
                    let name = crate::text::escape_path(path);
                    plan.still_recent.push_within(name, crate::rsync::ITEMS_MAX);
                }
                Ok(_) => {}
            }
        }
        for suspect in suspects.files.values() {
            let why = if suspect.damaged {
                Why::Damaged
            } else {
                Why::Missed
            };
            if suspect.several || tree.links_to_copy {
                inodes.insert(suspect.inode, why);
            } else if let Some(path) = suspect.below(tree.job)
                && let Some((_, about)) = open(tree.root, path)?
            {
                if suspects.is(&about).is_some() {
                    plan.add(path.to_owned(), &about, why, &mut inodes);
                } else if suspect.damaged && was_suspect(tree, path, &about, suspects)? {
                    plan.healed.insert(path.to_owned());
                }
            }
        }
        if !inodes.is_empty() {
            plan.add_names_of(tree.root, &inodes, suspects)?;
        }
        Ok(plan)
    }

    fn add(&mut self, path: PathBuf, about: &Metadata, why: Why, inodes: &mut BTreeMap<u64, Why>) {
        // A link in another snapshot looks like one in this tree. Only the source can tell.
        let source = std::fs::symlink_metadata(Path::new("/").join(&path));
        if source.is_ok_and(|source| source.nlink() > 1) {
            inodes.insert(about.ino(), why);
        }
        let known = self.paths.entry(path).or_insert(why);
        *known = why.max(*known);
    }

    fn add_names_of(
        &mut self,
        root: &OwnedFd,
        inodes: &BTreeMap<u64, Why>,
        suspects: &Suspects,
    ) -> io::Result<()> {
        let chosen: BTreeSet<PathBuf> = self.paths.keys().cloned().collect();
        let mut failed = Ok(());
        each_file(root, &mut |path, stat| {
            let Some(why) = inodes.get(&stat.st_ino) else {
                return;
            };
            if chosen.contains(path) {
                return;
            }
            // The inode may be another file's by now.
            let is_suspect = match open(root, path) {
                Ok(Some((_, about))) => suspects.is(&about).is_some(),
                Ok(None) => false,
                Err(error) => {
                    failed = Err(error);
                    return;
                }
            };
            if is_suspect || !suspects.files.contains_key(&stat.st_ino) {
                self.paths.insert(path.to_owned(), *why);
            }
        })?;
        failed
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// What the second rsync copies: paths relative to the root.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.paths.keys().map(PathBuf::as_path)
    }

    /// After the second rsync: the files that are in the source and neither in the tree nor in `unread`. They
    /// were not read, whatever rsync says.
    pub(crate) fn missing(&self, root: &OwnedFd, unread: &NameList) -> Vec<String> {
        let is_file = |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|one| one.is_file());
        let paths = self.paths.keys().filter(|path| {
            matches!(open(root, path), Ok(None)) && is_file(&Path::new("/").join(path))
        });
        let names = paths.map(|path| name_of(path));
        names.filter(|name| !unread.names.contains(name)).collect()
    }

    /// Removes the names from the new tree.
    pub(crate) fn prepare(&self, root: &OwnedFd) -> io::Result<()> {
        for path in self.paths.keys() {
            unlinkat(root, path, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Names in `record` what was read again because its content was wrong. What could not be read
    /// is among the unread files there.
    pub(crate) fn note_in(&self, record: &mut RunRecord) {
        let unread: BTreeSet<&String> = record.unread.names.iter().collect();
        let mut of = [NameList::default(), NameList::default()];
        for (path, why) in &self.paths {
            let name = name_of(path);
            match why {
                Why::FromOlder => {}
                // Named below.
                _ if self.healed.contains(path) => {}
                _ if unread.contains(&name) => {}
                Why::Damaged => of[0].push(name),
                Why::Missed | Why::Recent => of[1].push(name),
            }
        }
        self.healed
            .iter()
            .for_each(|path| of[0].push(name_of(path)));
        [record.healed, record.caught_up] = of;
        let (healed, caught_up) = (record.healed.count, record.caught_up.count);
        if healed > 0 {
            record
                .warnings
                .push(Warning::DamageHealed { files: healed });
        }
        if caught_up > 0 {
            record
                .warnings
                .push(Warning::MissedChangeCopied { files: caught_up });
        }
    }
}

/// Whether the snapshot before has the same version of the file in a damaged inode.
fn was_suspect(
    tree: &Tree<'_>,
    path: &Path,
    now: &Metadata,
    suspects: &Suspects,
) -> io::Result<bool> {
    let Some(linked) = &tree.linked_first else {
        return Ok(false);
    };
    let before = open(tree.root, &Path::new("..").join(linked).join(path))?;
    let version = |about: &Metadata| (about.len(), about.mtime(), about.mtime_nsec());
    Ok(before.is_some_and(|(_, before)| {
        suspects.is(&before).is_some() && version(&before) == version(now)
    }))
}

/// Opens a regular file of the tree; `None` where there is none. A file that can't be opened fails.
fn open(root: &OwnedFd, path: &Path) -> io::Result<Option<(File, Metadata)>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match long_path::open_at(root.as_fd(), path, flags) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let about = file.metadata()?;
    Ok(about.is_file().then_some((file, about)))
}

/// As `run`, which runs in the job's folder, but copies `names` alone, each with its path from the root,
/// into the tree `to`.
pub(crate) fn copying<'p>(
    run: &Invocation,
    names: impl Iterator<Item = &'p Path>,
    to: &str,
    more: &[OsString],
) -> Invocation {
    let mut arguments: Vec<OsString> = [
        crate::attempts::OPTIONS,
        "--numeric-ids",
        "--relative",
        "--modify-window=-1",
        "--no-human-readable",
        "--info=progress2,stats2,flist0,name0",
        crate::rsync::ITEM_FORMAT,
        "--outbuf=L",
        "--from0",
        "--files-from=-",
    ]
    .map(OsString::from)
    .to_vec();
    arguments.extend_from_slice(more);
    arguments.extend(["--", "/", &format!("./{to}/")].map(OsString::from));
    let mut copying = run.clone();
    copying.arguments = arguments;
    copying.names_from(names);
    copying
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_a_cancelled_run_did_not_compare_does_not_stay_in_the_tree() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        std::fs::write(&source, "new").unwrap();
        let path = source.strip_prefix("/").unwrap().to_owned();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join(path.parent().unwrap())).unwrap();
        std::fs::copy(&source, tree.join(&path)).unwrap();
        let about = Tree {
            root: &crate::walk::open_folder_at(&tree).unwrap(),
            job: "home",
            links_to_copy: false,
            recent_from_s: i64::MAX,
            linked_first: None,
        };
        let recent = Recent {
            paths: vec![path.clone()],
            all: false,
        };
        let make = |cancel: &Cancel| {
            let none = (Suspects::default(), NameList::default());
            Plan::make(&about, &none.0, &recent, &none.1, cancel).unwrap()
        };
        let cancel = Cancel::new();
        assert!(make(&cancel).is_empty());
        cancel.cancel();
        let plan = make(&cancel);
        assert_eq!(plan.paths.keys().collect::<Vec<_>>(), [&path]);
        // It is there until its name is removed; then it is missing, unless it is named as unread.
        let none = NameList::default();
        assert!(plan.missing(about.root, &none).is_empty());
        std::fs::remove_file(tree.join(&path)).unwrap();
        assert_eq!(plan.missing(about.root, &none), [name_of(&path)]);
        let mut unread = NameList::default();
        unread.push(name_of(&path));
        assert!(plan.missing(about.root, &unread).is_empty());
    }
}
