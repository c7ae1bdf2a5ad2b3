//! Compares two trees on the volume by names, inode numbers and attributes. No content is read.
//!
//! Files that both trees share are not examined: the lists of the folders show the number of their inode. On a btrfs
//! volume the inodes of one tree are known at once (`shared_inodes`).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::error::SnapshotError;
use crate::seen::{Change, Found, Kind, Seen};
use crate::shared_inodes::SharedInodes;
use crate::sticky_acl;
use crate::tree::{Tree, TreeFolder};
use crate::walk::Listed;

/// A path of a snapshot, with all below it.
#[derive(Debug, Clone)]
pub struct Part {
    /// The snapshot.
    pub tree: Tree,
    /// The path in the source.
    pub path: PathBuf,
}

/// A path that differs.
#[derive(Debug)]
pub struct Changed<'a> {
    /// The path; of the newer side, unless it is gone there.
    pub path: PathBuf,
    /// How it differs.
    pub change: Change,
    /// What the older side has.
    pub before: Option<Found>,
    /// What the newer side has.
    pub after: Option<Found>,
    /// The folder of the newer side that it is in, and its name there.
    pub place: Option<(&'a TreeFolder, &'a Path)>,
}

/// Receives each path that differs, folders before what is in them. A path that was renamed is gone and new.
pub type OnChange<'c> = dyn FnMut(Changed<'_>) -> Result<(), SnapshotError> + 'c;

/// Compares two trees. Without `before`, everything is new. Files of equal size and time are equal, as they are for
/// rsync. `go_on` is asked at each folder. `shared`: the inodes of the snapshot of `before`.
///
/// # Errors
/// Neither has the path, the volume can't be read, or `go_on` or `on_change` failed.
pub fn changes(
    before: Option<&Part>,
    after: &Part,
    shared: Option<&SharedInodes>,
    go_on: &dyn Fn() -> Result<(), SnapshotError>,
    on_change: &mut OnChange<'_>,
) -> Result<(), SnapshotError> {
    changes_repairing(before, after, shared, go_on, &|_, _, _| {}, on_change)
}

/// Repairs the ACL of a folder or file: its path, the folder that it is in, and its name there.
pub(crate) type Repair<'c> = dyn Fn(&Path, &TreeFolder, &Path) + 'c;

/// As [`changes`]. `repair` is called before a folder or file of the newer side is compared whose ACL may be wrong.
pub(crate) fn changes_repairing(
    before: Option<&Part>,
    after: &Part,
    shared: Option<&SharedInodes>,
    go_on: &dyn Fn() -> Result<(), SnapshotError>,
    repair: &Repair<'_>,
    on_change: &mut OnChange<'_>,
) -> Result<(), SnapshotError> {
    let mut walk = Walk {
        before,
        after,
        shared,
        repair,
        waiting: Vec::new(),
        on_change,
    };
    walk.tops()?;
    while let Some(folders) = walk.waiting.pop() {
        go_on()?;
        walk.folders(&folders)?;
    }
    Ok(())
}

impl Part {
    fn at(&self, below: &Path) -> PathBuf {
        match below.as_os_str().is_empty() {
            true => self.path.clone(),
            false => self.path.join(below),
        }
    }

    /// The names in a folder; `None`: there is no folder.
    fn list(&self, below: &Path) -> Result<Option<(TreeFolder, Vec<Listed>)>, SnapshotError> {
        let path = self.at(below);
        let Some(folder) = self.tree.folder(&path)? else {
            return Ok(None);
        };
        let entries = folder.entries();
        let entries = entries.map_err(|error| self.tree.failed("list", &path, error))?;
        Ok(Some((folder, entries)))
    }
}

/// A folder below both paths. It is there on the sides that are true.
struct Folders {
    below: PathBuf,
    before: bool,
    after: bool,
}

/// One name on one side.
struct Named<'f> {
    folder: &'f TreeFolder,
    name: &'f Path,
}

impl Named<'_> {
    fn seen(&self) -> io::Result<Option<Seen>> {
        Seen::of(self.folder, self.name)
    }
}

/// Whether rsync may have left the ACL wrong ([`sticky_acl`]). It sets the setuid, setgid and sticky bits of what it
/// writes over after the ACL, too. That may be of an interrupted run, so each difference to the last snapshot counts.
fn may_have_wrong_acl(old: Option<&Seen>, new: &Seen) -> bool {
    match new.found.kind {
        Kind::Folder if sticky_acl::is_concerned(new.found.mode) => true,
        Kind::Folder | Kind::File => old.is_some_and(|old| old.found.mode != new.found.mode),
        _ => false,
    }
}

struct Walk<'a> {
    before: Option<&'a Part>,
    after: &'a Part,
    shared: Option<&'a SharedInodes>,
    waiting: Vec<Folders>,
    repair: &'a Repair<'a>,
    on_change: &'a mut OnChange<'a>,
}

impl Walk<'_> {
    /// Compares the two paths themselves.
    fn tops(&mut self) -> Result<(), SnapshotError> {
        let top = Path::new("/");
        if self.before.is_none_or(|part| part.path == top) && self.after.path == top {
            // The top of a snapshot is no folder of the source.
            self.waiting.push(Folders {
                below: PathBuf::new(),
                before: self.before.is_some(),
                after: true,
            });
            return Ok(());
        }
        let before = self.before.map(|part| part.tree.place(&part.path));
        let before = before.transpose()?.flatten();
        let after = self.after.tree.place(&self.after.path)?;
        let [before, after] = [&before, &after]
            .map(|place| place.as_ref().map(|(folder, name)| Named { folder, name }));
        match self.meet(Path::new(""), before.as_ref(), after.as_ref())? {
            true => Ok(()),
            false => Err(self.after.tree.no_such(&self.after.path)),
        }
    }

    /// Compares the names in a folder.
    fn folders(&mut self, folders: &Folders) -> Result<(), SnapshotError> {
        let before = match (self.before, folders.before) {
            (Some(part), true) => part.list(&folders.below)?,
            _ => None,
        };
        let after = match folders.after {
            true => self.after.list(&folders.below)?,
            false => None,
        };
        let is_one_file_system = match (&before, &after) {
            (Some((old, _)), Some((new, _))) => old
                .is_in_one_file_system(new)
                .map_err(|error| self.failed_after(&folders.below, error))?,
            _ => false,
        };
        let shared = match (self.shared, &before) {
            (Some(shared), Some((old, _))) if !is_one_file_system => shared
                .has_folder(old)
                .map_err(|error| self.failed_before(&folders.below, error))?
                .then_some(shared),
            _ => None,
        };
        // By their bytes, because paths are compared part by part.
        let mut names: BTreeMap<&OsStr, [Option<&Listed>; 2]> = BTreeMap::new();
        for (side, listed) in [&before, &after].into_iter().enumerate() {
            for entry in listed.iter().flat_map(|(_, entries)| entries) {
                names.entry(entry.name.as_os_str()).or_default()[side] = Some(entry);
            }
        }
        // What is below a folder comes after all names of the folder, and in their order.
        let first = self.waiting.len();
        for (name, listed) in names {
            let name = Path::new(name);
            if let ([Some(old), Some(new)], Some((folder, _))) = (listed, &after) {
                let is_one = match shared {
                    Some(shared) => shared
                        .has(old, new, folder)
                        .map_err(|error| self.failed_after(&folders.below.join(name), error))?,
                    None => is_one_file_system && is_one_file(old, new),
                };
                if is_one {
                    continue;
                }
            }
            let [before, after] =
                [(&before, listed[0]), (&after, listed[1])].map(|(side, listed)| {
                    let (folder, _) = side.as_ref()?;
                    listed.map(|_| Named { folder, name })
                });
            self.meet(&folders.below.join(name), before.as_ref(), after.as_ref())?;
        }
        self.waiting[first..].reverse();
        Ok(())
    }

    /// Compares one path. Returns whether any side has it.
    fn meet(
        &mut self,
        below: &Path,
        before: Option<&Named<'_>>,
        after: Option<&Named<'_>>,
    ) -> Result<bool, SnapshotError> {
        let old = before.map(Named::seen).transpose();
        let old = old
            .map_err(|error| self.failed_before(below, error))?
            .flatten();
        let new = after.map(Named::seen).transpose();
        let new = new
            .map_err(|error| self.failed_after(below, error))?
            .flatten();
        if let (Some(new), Some(after)) = (&new, after)
            && may_have_wrong_acl(old.as_ref(), new)
        {
            (self.repair)(&self.after.at(below), after.folder, after.name);
        }
        let change = match (&old, &new, before, after) {
            (None, None, ..) => return Ok(false),
            (None, Some(_), ..) => Some(Change::New),
            (Some(_), None, ..) => Some(Change::Gone),
            (Some(old), Some(new), Some(before), Some(after)) => old
                .change(new, || {
                    before
                        .folder
                        .has_equal_xattrs(before.name, after.folder, after.name)
                })
                .map_err(|error| self.failed_after(below, error))?,
            (Some(_), Some(_), ..) => None,
        };
        let is_folder =
            |seen: &Option<Seen>| seen.as_ref().is_some_and(|s| s.found.kind == Kind::Folder);
        let folders = Folders {
            below: below.to_owned(),
            before: is_folder(&old),
            after: is_folder(&new),
        };
        if let Some(change) = change {
            let path = match (change, self.before) {
                (Change::Gone, Some(before)) => before.at(below),
                _ => self.after.at(below),
            };
            (self.on_change)(Changed {
                path,
                change,
                before: old.map(|seen| seen.found),
                after: new.map(|seen| seen.found),
                place: after.map(|named| (named.folder, named.name)),
            })?;
        }
        if folders.before || folders.after {
            self.waiting.push(folders);
        }
        Ok(true)
    }

    fn failed_before(&self, below: &Path, error: io::Error) -> SnapshotError {
        let part = self.before.unwrap_or(self.after);
        part.tree.failed("examine", &part.at(below), error)
    }

    fn failed_after(&self, below: &Path, error: io::Error) -> SnapshotError {
        let after = self.after;
        after.tree.failed("examine", &after.at(below), error)
    }
}

/// Whether the lists of two folders of one file system show one file, so that nothing of it need be examined.
fn is_one_file(old: &Listed, new: &Listed) -> bool {
    let can_be = |entry: &Listed| !matches!(entry.kind, FileType::Directory | FileType::Unknown);
    old.inode == new.inode && can_be(old) && can_be(new)
}
