//! Compares a snapshot with its source as it is now.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, BufRead};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::{Tree, TreeFolder};
use sprat_snapshot::tree_changes::Part;
use sprat_snapshot::{Cancel, SnapshotError, unescape_name};

use crate::answer::{Place, escaped, go_on};
use crate::diff::{DiffReport, Side};
use crate::room::Room;
use sprat_snapshot::seen::{Change, Kind, Seen};

/// What to compare with its source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceDiffSpec {
    /// A snapshot, or a part of it.
    pub place: Place,
}

/// Compares a snapshot with the files of this machine. `listed` names all paths that a backup would copy now,
/// escaped, one a line. A path of the snapshot that is not among them, and is still there, is excluded now: it
/// is no difference. What came from other hosts and from commands is not compared.
///
/// # Errors
/// There is no such path on both sides, or the volume or the source can't be read.
pub fn diff_source(
    volume_root: &Path,
    spec: &SourceDiffSpec,
    listed: &mut dyn BufRead,
    cancel: &Cancel,
) -> Result<DiffReport, SnapshotError> {
    let tree = Tree::find(volume_root, &spec.place.job, &spec.place.snapshot)?;
    let base = spec.place.path();
    let before = Part {
        tree,
        path: base.clone(),
    };
    let after = Side {
        job: None,
        snapshot: None,
        kind: None,
        path: escaped(&base),
    };
    let mut compared = Compared {
        report: DiffReport::between(Side::of(&before), after),
        room: Room::new(),
        unmet: read_list(listed, &base)?,
        machine: Machine { last: None },
    };
    let tree = &before.tree;
    let mut waiting = vec![base.clone()];
    if base != Path::new("/") {
        let is_there = match tree.place(&base)? {
            Some((folder, name)) => compared.meet(tree, &folder, &name, &base)?.is_some(),
            None => false,
        };
        if !is_there && compared.unmet.is_empty() {
            return Err(tree.no_such(&base));
        }
    }
    while let Some(path) = waiting.pop() {
        go_on(cancel)?;
        let Some(folder) = tree.folder(&path)? else {
            continue;
        };
        let names = folder.entries();
        for entry in names.map_err(|error| tree.failed("list", &path, error))? {
            let below = path.join(&entry.name);
            if is_no_source(&below) {
                continue;
            }
            let kind = compared.meet(tree, &folder, &entry.name, &below)?;
            if kind == Some(Kind::Folder) {
                waiting.push(below);
            }
        }
    }
    compared.add_new(cancel)?;
    let mut report = compared.report;
    report
        .differences
        .sort_by(|one, other| one.path.cmp(&other.path));
    Ok(report)
}

/// Whether a path of a snapshot never was one of this machine: it begins with `/@`, and so do files from
/// other hosts and from commands.
fn is_no_source(path: &Path) -> bool {
    path.as_os_str().as_bytes().starts_with(b"/@") && std::fs::symlink_metadata(path).is_err()
}

/// The paths in or above which is compared.
fn read_list(listed: &mut dyn BufRead, base: &Path) -> Result<BTreeSet<PathBuf>, SnapshotError> {
    let mut paths = BTreeSet::new();
    for line in listed.lines() {
        let line = line.map_err(|source| SnapshotError::System {
            op: "read the list of the source",
            source,
        })?;
        let bytes = unescape_name(line.trim_end_matches('/'));
        let path = Path::new("/").join(OsStr::from_bytes(&bytes));
        if path.starts_with(base) && !is_no_source(&path) {
            paths.insert(path);
        }
    }
    // The top of a snapshot is no folder of the source.
    paths.remove(Path::new("/"));
    Ok(paths)
}

struct Compared {
    report: DiffReport,
    room: Room,
    /// Paths of the source that the walk has not met.
    unmet: BTreeSet<PathBuf>,
    machine: Machine,
}

impl Compared {
    /// Compares a path that the snapshot may have. Returns what it is there.
    fn meet(
        &mut self,
        tree: &Tree,
        folder: &TreeFolder,
        name: &Path,
        path: &Path,
    ) -> Result<Option<Kind>, SnapshotError> {
        let failed = |error| tree.failed("examine", path, error);
        let Some(old) = Seen::of(folder, name).map_err(failed)? else {
            return Ok(None);
        };
        let kind = old.found.kind;
        let is_copied = self.unmet.remove(path);
        let now = self.machine.place(path)?;
        let seen = match &now {
            Some((there, name)) => Seen::of(there, name).map_err(|error| unread(path, error))?,
            None => None,
        };
        let (seen, change) = match (seen, &now) {
            (Some(new), Some((there, its_name))) if is_copied => {
                let changed = old.change(&new, || folder.has_equal_xattrs(name, there, its_name));
                match changed {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        (None, Some(Change::Gone))
                    }
                    changed => (Some(new), changed.map_err(failed)?),
                }
            }
            (Some(new), _) => (Some(new), None),
            (None, _) => (None, Some(Change::Gone)),
        };
        if let Some(change) = change {
            let after = seen.map(|seen| seen.found);
            self.report
                .add(&mut self.room, path, change, Some(old.found), after);
        }
        Ok(Some(kind))
    }

    /// What the snapshot does not have.
    fn add_new(&mut self, cancel: &Cancel) -> Result<(), SnapshotError> {
        for path in std::mem::take(&mut self.unmet) {
            go_on(cancel)?;
            let Some((there, name)) = self.machine.place(&path)? else {
                continue;
            };
            let seen = Seen::of(there, &name).map_err(|error| unread(&path, error))?;
            if let Some(seen) = seen {
                self.report
                    .add(&mut self.room, &path, Change::New, None, Some(seen.found));
            }
        }
        Ok(())
    }
}

fn unread(path: &Path, source: io::Error) -> SnapshotError {
    SnapshotError::SourceUnreadable {
        path: escaped(path),
        source,
    }
}

/// The folders of this machine. The last one stays open: many names of one folder follow each other.
struct Machine {
    last: Option<(PathBuf, TreeFolder)>,
}

impl Machine {
    /// The folder that a path is in, and its last name. `None`: there is no such folder.
    fn place(&mut self, path: &Path) -> Result<Option<(&TreeFolder, PathBuf)>, SnapshotError> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Ok(None);
        };
        if self.last.as_ref().is_none_or(|(last, _)| last != parent) {
            let opened = TreeFolder::of_machine(parent);
            self.last = opened
                .map_err(|error| unread(parent, error))?
                .map(|folder| (parent.to_owned(), folder));
        }
        Ok(self
            .last
            .as_ref()
            .map(|(_, folder)| (folder, PathBuf::from(name))))
    }
}
