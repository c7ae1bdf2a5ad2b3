//! After rsync's run, a second rsync reads some files from their source: those whose content must not
//! come from an older snapshot.
//!
//! These are files that a check found ([`Suspects`]), files that may have changed after the last run had
//! read them ([`Recent`]), and, if no guard could watch the volume, files that rsync copied from an
//! older snapshot. Their names are removed from the new tree first. Older snapshots keep theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::cancel::Cancel;
use crate::long_path::{self, size_and_time};
use crate::name_list::NameList;
use crate::recent::{self, Recent};
use crate::record::{RunRecord, Warning};
use crate::rsync::{Invocation, TRANSFER_OPTIONS};
use crate::suspects::{Suspects, name_of};
use crate::walk::{each_file, folder_of, hard_links, open_folder, remove_name};

/// Why a file is read from its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Why {
    /// rsync copied it from an older snapshot, because its attributes differ.
    FromOlder,
    /// It changed after it had been read.
    Recent,
    /// A comparison with the source found that it changed with equal size and time.
    Missed,
    /// A check found it damaged.
    Damaged,
}

/// The files to read from the source.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    paths: BTreeMap<PathBuf, Why>,
    /// Damaged files that rsync itself has read from the source, because their attributes differ.
    healed: BTreeSet<PathBuf>,
    /// Files that are unchanged so far, and whose time still proves nothing.
    pub(crate) still_recent: NameList,
}

/// The new tree, and what it was made from.
pub(crate) struct Tree<'t> {
    /// The open folder of the new tree.
    pub(crate) root: &'t OwnedFd,
    pub(crate) job: &'t str,
    /// It has links to an adopted copy.
    pub(crate) links_to_copy: bool,
    /// See [`recent::from_s`].
    pub(crate) recent_from_s: i64,
    /// The folders in it that are pulled from other hosts, which have runs of their own.
    pub(crate) hosts: Vec<PathBuf>,
    /// The tree beside it that unchanged files were linked from first.
    pub(crate) linked_first: Option<String>,
    /// rsync may have linked its files to those of older snapshots.
    pub(crate) has_older_links: bool,
}

impl Tree<'_> {
    fn is_of_host(&self, path: &Path) -> bool {
        self.hosts.iter().any(|host| path.starts_with(host))
    }
}

impl Plan {
    /// Finds the files of the new tree whose content may be wrong.
    pub(crate) fn make(
        tree: &Tree<'_>,
        suspects: &Suspects,
        recent: &Recent,
        copied_from_older: &NameList,
        cancel: &Cancel,
    ) -> io::Result<Self> {
        let mut plan = Self::default();
        // Inodes whose names in the tree are all needed. Those of suspects may be files of other
        // snapshots.
        let mut inodes = BTreeMap::new();
        let mut of_suspects = BTreeMap::new();
        for name in &copied_from_older.names {
            let path = crate::text::unescape_path(name);
            if let Some((_, about)) = open(tree.root.as_fd(), &path)? {
                plan.add(path, &about, Why::FromOlder, &mut inodes);
            }
        }
        for path in recent.paths.iter().filter(|path| !tree.is_of_host(path)) {
            let Some((mut file, about)) = open(tree.root.as_fd(), path)? else {
                continue;
            };
            if cancel.is_cancelled() {
                // It was not compared, so the tree must not keep it.
                plan.add(path.clone(), &about, Why::Recent, &mut inodes);
                continue;
            }
            match recent::differs(&mut file, &Path::new("/").join(path)) {
                Ok(Some(true)) => plan.add(path.clone(), &about, Why::Recent, &mut inodes),
                // The volume can't read it. The source can.
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
                of_suspects.insert(suspect.inode, why);
            } else if let Some(path) = suspect.below(tree.job)
                && !tree.is_of_host(path)
                && let Some((_, about)) = open(tree.root.as_fd(), path)?
            {
                if suspects.find(&about).is_some() {
                    plan.add(path.to_owned(), &about, why, &mut inodes);
                } else if suspect.damaged && was_suspect(tree, path, &about, suspects)? {
                    plan.healed.insert(path.to_owned());
                }
            }
        }
        if tree.has_older_links {
            plan.add_wrong_links(tree)?;
        }
        if !inodes.is_empty() || !of_suspects.is_empty() {
            plan.add_names_of(tree, &inodes, &of_suspects, suspects)?;
        }
        Ok(plan)
    }

    fn add(&mut self, path: PathBuf, about: &Metadata, why: Why, inodes: &mut BTreeMap<u64, Why>) {
        // The link count includes the names in older snapshots. Only the source shows whether the file
        // has several names.
        let source = std::fs::symlink_metadata(Path::new("/").join(&path));
        if source.is_ok_and(|source| source.nlink() > 1) {
            inodes.insert(about.ino(), why);
        }
        let known = self.paths.entry(path).or_insert(why);
        *known = why.max(*known);
    }

    /// Adds names that rsync linked to one file of an older snapshot, and that have several files in the source now: of
    /// equal content and attributes, so rsync did not notice.
    fn add_wrong_links(&mut self, tree: &Tree<'_>) -> io::Result<()> {
        for paths in hard_links(tree.root)?.into_values() {
            let mut kept = None;
            for path in paths.into_iter().filter(|path| !tree.is_of_host(path)) {
                let Ok(source) = std::fs::symlink_metadata(Path::new("/").join(&path)) else {
                    continue;
                };
                let file = (source.dev(), source.ino());
                if *kept.get_or_insert(file) != file {
                    self.paths.entry(path).or_insert(Why::FromOlder);
                }
            }
        }
        Ok(())
    }

    fn add_names_of(
        &mut self,
        tree: &Tree<'_>,
        inodes: &BTreeMap<u64, Why>,
        of_suspects: &BTreeMap<u64, Why>,
        suspects: &Suspects,
    ) -> io::Result<()> {
        let chosen: BTreeSet<PathBuf> = self.paths.keys().cloned().collect();
        let mut failed = Ok(());
        let root = tree.root;
        each_file(root, &mut |path, stat| {
            let known = inodes.get(&stat.st_ino);
            let Some(why) = known.or_else(|| of_suspects.get(&stat.st_ino)) else {
                return;
            };
            if chosen.contains(path) || tree.is_of_host(path) {
                return;
            }
            // Another file may have got the inode meanwhile.
            let is_it = known.is_some()
                || match open(root.as_fd(), path) {
                    Ok(Some((_, about))) => suspects.find(&about).is_some(),
                    Ok(None) => false,
                    Err(error) => {
                        failed = Err(error);
                        return;
                    }
                };
            if is_it {
                self.paths.insert(path.to_owned(), *why);
            }
        })?;
        failed
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.paths.is_empty()
    }

    /// The paths that the second rsync copies, relative to the root.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.paths.keys().map(PathBuf::as_path)
    }

    /// After the second rsync: files that exist in the source and are missing both in the tree and in
    /// `unread`. They were not read, whatever rsync reported.
    pub(crate) fn missing(&self, root: &OwnedFd, unread: &NameList) -> Vec<String> {
        let is_file = |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|one| one.is_file());
        let paths = self.paths.keys().filter(|path| {
            matches!(open(root.as_fd(), path), Ok(None)) && is_file(&Path::new("/").join(path))
        });
        let names = paths.map(|path| name_of(path));
        names.filter(|name| !unread.names.contains(name)).collect()
    }

    /// Removes the names of these files from the new tree.
    pub(crate) fn prepare(&self, root: &OwnedFd) -> io::Result<()> {
        for path in self.paths.keys() {
            remove_name(root.as_fd(), path)?;
        }
        Ok(())
    }

    /// Adds to `record` which files were read again because their content was wrong. Those that could
    /// not be read are among its unread files.
    pub(crate) fn add_to_record(&self, record: &mut RunRecord) {
        let unread: BTreeSet<&String> = record.unread.names.iter().collect();
        let mut of = [NameList::default(), NameList::default()];
        for (path, why) in &self.paths {
            let name = name_of(path);
            match why {
                Why::FromOlder => {}
                // Added below.
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

/// Whether the previous snapshot has the same version of the file in a damaged inode.
fn was_suspect(
    tree: &Tree<'_>,
    path: &Path,
    now: &Metadata,
    suspects: &Suspects,
) -> io::Result<bool> {
    let Some(linked) = &tree.linked_first else {
        return Ok(false);
    };
    let before = match open_folder(tree.root.as_fd(), &Path::new("..").join(linked)) {
        Err(error) if is_no_file(&error) => return Ok(false),
        folder => open(folder?.as_fd(), path)?,
    };
    Ok(before.is_some_and(|(_, before)| {
        suspects.find(&before).is_some() && size_and_time(&before) == size_and_time(now)
    }))
}

/// Opens a regular file of the tree. `None` if there is none: a link, a socket or a device may have its place now, or
/// that of a folder above it. None of those is opened or followed. Fails if the file can't be opened.
fn open(root: BorrowedFd<'_>, path: &Path) -> io::Result<Option<(File, Metadata)>> {
    let (folder, name) = match folder_of(root, path) {
        Ok(found) => found,
        Err(error) if is_no_file(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    match long_path::open_regular_at(folder.as_fd(), name) {
        Ok(file) => {
            let about = file.metadata()?;
            Ok(Some((file, about)))
        }
        Err(error) if is_no_file(&error) || error.kind() == io::ErrorKind::InvalidInput => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_no_file(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP))
}

/// Derives from `run`, which runs in the job's folder, an invocation that copies only `names`, each with
/// its whole path, into the tree `to`.
pub(crate) fn copying<'p>(
    run: &Invocation,
    names: impl Iterator<Item = &'p Path>,
    to: &str,
    more: &[OsString],
) -> Invocation {
    let mut arguments = TRANSFER_OPTIONS.map(OsString::from).to_vec();
    arguments.extend(["--from0", "--files-from=-"].map(OsString::from));
    arguments.extend_from_slice(more);
    arguments.extend(["--", "/", &format!("./{to}/")].map(OsString::from));
    let mut copying = run.clone();
    copying.arguments = arguments;
    copying.no_links_on = None;
    copying.names_from(names);
    copying
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_not_compared_because_of_a_cancel_leaves_the_tree() {
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
            hosts: Vec::new(),
            linked_first: None,
            has_older_links: false,
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
        // It is not missing until its name is removed. Then it is, unless it is listed as unread.
        let none = NameList::default();
        assert!(plan.missing(about.root, &none).is_empty());
        std::fs::remove_file(tree.join(&path)).unwrap();
        assert_eq!(plan.missing(about.root, &none), [name_of(&path)]);
        let mut unread = NameList::default();
        unread.push(name_of(&path));
        assert!(plan.missing(about.root, &unread).is_empty());
    }
}
