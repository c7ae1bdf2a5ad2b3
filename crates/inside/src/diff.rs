//! Compares two snapshots, or parts of them.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::{Tree, TreeFolder};
use sprat_snapshot::{Cancel, EntryKind, Listed, SnapshotError};

use crate::answer::{Place, escaped, go_on};
use crate::found::{Change, Found, Kind, Seen};
use crate::room::Room;

/// What to compare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffSpec {
    /// The older one; `None`: the same path in the snapshot before `after`.
    pub before: Option<Place>,
    /// The newer one.
    pub after: Place,
}

/// One of the two that were compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Side {
    /// The job; `None`: the source as it is now.
    pub job: Option<String>,
    /// The snapshot's folder; `None`: the source as it is now.
    pub snapshot: Option<String>,
    /// What the snapshot is.
    pub kind: Option<EntryKind>,
    /// The path, escaped.
    pub path: String,
}

/// A path that differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// The path, escaped; of the newer side, unless it is gone there.
    pub path: String,
    /// How it differs.
    pub change: Change,
    /// What the older side has.
    pub before: Option<Found>,
    /// What the newer side has.
    pub after: Option<Found>,
}

/// How many paths differ in one way, and the sizes of the files among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// Paths of every kind.
    pub paths: u64,
    /// The sizes on the older side.
    pub before_bytes: u64,
    /// The sizes on the newer side.
    pub after_bytes: u64,
}

/// All that differs, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "as in Change")]
pub struct Sums {
    pub new: Sum,
    pub gone: Sum,
    pub content: Sum,
    pub attributes: Sum,
    pub kind: Sum,
}

/// How two snapshots differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiffReport {
    /// The older side.
    pub before: Side,
    /// The newer side.
    pub after: Side,
    /// The paths that differ, folders before what is in them. A path that was renamed is gone and new.
    pub differences: Vec<Difference>,
    /// How many more differ.
    pub more: u64,
    /// All of them, counted.
    pub sums: Sums,
}

/// Compares two snapshots by names, inode numbers and attributes. No content is read: files of equal size and
/// time are equal, as they are for rsync.
///
/// # Errors
/// There is no such snapshot, neither has the path, or the volume can't be read.
pub fn diff(
    volume_root: &Path,
    spec: &DiffSpec,
    cancel: &Cancel,
) -> Result<DiffReport, SnapshotError> {
    let find = |place: &Place| Tree::find(volume_root, &place.job, &place.snapshot);
    let after = Root::new(find(&spec.after)?, spec.after.path());
    let before = match &spec.before {
        Some(place) => Root::new(find(place)?, place.path()),
        None => {
            let tree = after.tree.before()?;
            let tree = tree.ok_or_else(|| SnapshotError::NoSuchSnapshot {
                job: after.tree.job.clone(),
                snapshot: format!("before {}", after.tree.folder),
            })?;
            Root::new(tree, spec.after.path())
        }
    };
    let mut compared = Compared {
        report: DiffReport::between(before.side(), after.side()),
        room: Room::new(),
        before,
        after,
        waiting: Vec::new(),
    };
    compared.tops()?;
    while let Some(folders) = compared.waiting.pop() {
        go_on(cancel)?;
        compared.folders(&folders)?;
    }
    Ok(compared.report)
}

/// A path of a snapshot, below which is compared.
pub(crate) struct Root {
    pub(crate) tree: Tree,
    path: PathBuf,
}

impl Root {
    pub(crate) fn new(tree: Tree, path: PathBuf) -> Self {
        Self { tree, path }
    }

    pub(crate) fn side(&self) -> Side {
        Side {
            job: Some(self.tree.job.clone()),
            snapshot: Some(self.tree.folder.clone()),
            kind: Some(self.tree.kind()),
            path: escaped(&self.path),
        }
    }

    fn at(&self, below: &Path) -> PathBuf {
        match below.as_os_str().is_empty() {
            true => self.path.clone(),
            false => self.path.join(below),
        }
    }

    /// The names in a folder; none where there is no folder.
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
    name: PathBuf,
    listed: Option<Listed>,
}

impl Named<'_> {
    fn seen(&self) -> io::Result<Option<Seen>> {
        Seen::of(self.folder, &self.name)
    }
}

struct Compared {
    before: Root,
    after: Root,
    waiting: Vec<Folders>,
    report: DiffReport,
    room: Room,
}

impl Compared {
    /// Compares the two paths themselves.
    fn tops(&mut self) -> Result<(), SnapshotError> {
        let top = Path::new("/");
        if self.before.path == top && self.after.path == top {
            // The top of a snapshot is no folder of the source.
            self.waiting.push(Folders {
                below: PathBuf::new(),
                before: true,
                after: true,
            });
            return Ok(());
        }
        let before = self.before.tree.place(&self.before.path)?;
        let after = self.after.tree.place(&self.after.path)?;
        let [before, after] = [&before, &after].map(|place| {
            place.as_ref().map(|(folder, name)| Named {
                folder,
                name: name.clone(),
                listed: None,
            })
        });
        let met = self.meet(Path::new(""), before.as_ref(), after.as_ref())?;
        match met {
            true => Ok(()),
            false => Err(self.after.tree.no_such(&self.after.path)),
        }
    }

    /// Compares the names in a folder.
    fn folders(&mut self, folders: &Folders) -> Result<(), SnapshotError> {
        let list = |root: &Root, wanted: bool| match wanted {
            true => root.list(&folders.below),
            false => Ok(None),
        };
        let before = list(&self.before, folders.before)?;
        let after = list(&self.after, folders.after)?;
        let mut names: BTreeMap<&Path, [Option<&Listed>; 2]> = BTreeMap::new();
        for (side, listed) in [&before, &after].into_iter().enumerate() {
            for entry in listed.iter().flat_map(|(_, entries)| entries) {
                names.entry(&entry.name).or_default()[side] = Some(entry);
            }
        }
        // What is below a folder comes after all names of the folder, and in their order.
        let first = self.waiting.len();
        for (name, listed) in names {
            let before = before.as_ref().zip(listed[0]);
            let after = after.as_ref().zip(listed[1]);
            let [before, after] = [before, after].map(|side| {
                side.map(|((folder, _), entry)| Named {
                    folder,
                    name: entry.name.clone(),
                    listed: Some(entry.clone()),
                })
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
        let on_before = |error| {
            self.before
                .tree
                .failed("examine", &self.before.at(below), error)
        };
        let on_after = |error| {
            self.after
                .tree
                .failed("examine", &self.after.at(below), error)
        };
        if let (Some(before), Some(after)) = (before, after)
            && is_one_file(before, after).map_err(on_after)?
        {
            return Ok(true);
        }
        let old = before.map(Named::seen).transpose().map_err(on_before)?;
        let new = after.map(Named::seen).transpose().map_err(on_after)?;
        let (old, new) = (old.flatten(), new.flatten());
        let change = match (&old, &new, before, after) {
            (None, None, ..) => return Ok(false),
            (None, Some(_), ..) => Some(Change::New),
            (Some(_), None, ..) => Some(Change::Gone),
            (Some(old), Some(new), Some(before), Some(after)) => old
                .change(new, || {
                    before
                        .folder
                        .has_equal_xattrs(&before.name, after.folder, &after.name)
                })
                .map_err(on_after)?,
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
            let (old, new) = (old.map(|seen| seen.found), new.map(|seen| seen.found));
            let path = match change {
                Change::Gone => self.before.at(below),
                _ => self.after.at(below),
            };
            self.report.add(&mut self.room, &path, change, old, new);
        }
        if folders.before || folders.after {
            self.waiting.push(folders);
        }
        Ok(true)
    }
}

impl DiffReport {
    /// Nothing differs yet.
    pub(crate) fn between(before: Side, after: Side) -> Self {
        Self {
            before,
            after,
            differences: Vec::new(),
            more: 0,
            sums: Sums::default(),
        }
    }

    /// Counts a difference, and names it if it fits.
    pub(crate) fn add(
        &mut self,
        room: &mut Room,
        path: &Path,
        change: Change,
        before: Option<Found>,
        after: Option<Found>,
    ) {
        let sum = match change {
            Change::New => &mut self.sums.new,
            Change::Gone => &mut self.sums.gone,
            Change::Content => &mut self.sums.content,
            Change::Attributes => &mut self.sums.attributes,
            Change::Kind => &mut self.sums.kind,
        };
        let bytes = |found: &Option<Found>| found.as_ref().map_or(0, |found| found.bytes);
        sum.paths += 1;
        sum.before_bytes += bytes(&before);
        sum.after_bytes += bytes(&after);
        let path = escaped(path);
        if !room.takes(&path, before.iter().chain(&after)) {
            self.more += 1;
            return;
        }
        self.differences.push(Difference {
            path,
            change,
            before,
            after,
        });
    }
}

/// Whether the lists of both folders show one file, so that nothing of it need be examined.
fn is_one_file(before: &Named<'_>, after: &Named<'_>) -> io::Result<bool> {
    let (Some(old), Some(new)) = (&before.listed, &after.listed) else {
        return Ok(false);
    };
    let can_be = |entry: &Listed| {
        !matches!(
            entry.kind,
            rustix::fs::FileType::Directory | rustix::fs::FileType::Unknown
        )
    };
    Ok(old.inode == new.inode
        && can_be(old)
        && can_be(new)
        && before.folder.is_in_one_file_system(after.folder)?)
}
