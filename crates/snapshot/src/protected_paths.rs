//! What a restore must not overwrite or delete at its destination: sprat's own files, and with `delete`
//! the file systems that are not in the snapshot.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::automounts;
use crate::error::SnapshotError;
use crate::file_system::FileSystem;
use crate::mounts::{Mount, holding, mounts, pattern_for};
use crate::own_places::OwnPlaces;
use crate::paths::{joined, real_path};
use crate::record::RunRecord;
use crate::spec::RestoreSpec;
use crate::text::{escape_path, unescape_path};

/// The destination of a restore.
pub(crate) struct Destination<'a> {
    /// The folder that the paths of the restore are relative to, as the caller gave it.
    pub(crate) to: &'a Path,
    /// The same folder in the source: `/`, or the parent of the one path that is restored.
    pub(crate) in_source: PathBuf,
    /// What is restored, relative to both folders.
    pub(crate) trees: &'a [PathBuf],
}

/// Paths that are neither overwritten nor deleted.
pub(crate) struct ProtectedPaths {
    /// The same paths as rsync patterns.
    pub(crate) patterns: Vec<OsString>,
    own: OwnPlaces,
    /// Files, relative to the destination.
    kept: BTreeSet<PathBuf>,
    /// The real path of the destination.
    real: PathBuf,
}

impl ProtectedPaths {
    /// Whether `path`, relative to the destination, is such a path or lies in one.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        self.kept.contains(path) || self.own.holding(&joined(&self.real, path)).is_some()
    }

    /// Protects these files, too, relative to the destination.
    pub(crate) fn keep(&mut self, files: &BTreeSet<PathBuf>) {
        let patterns = files.iter().filter(|path| !self.kept.contains(*path));
        let patterns = patterns.map(|path| pattern_for(&Path::new("/").join(path), false));
        self.patterns.extend(patterns);
        self.kept.extend(files.iter().cloned());
    }
}

/// Checks the destination before anything is written.
pub(crate) fn check_destination(
    destination: &Destination<'_>,
    record: Option<&RunRecord>,
    spec: &RestoreSpec,
) -> Result<ProtectedPaths, SnapshotError> {
    let table = mount_table(destination, spec)?;
    let own = OwnPlaces::find(&spec.never_enter, &spec.containers, &table);
    let real = real_path(destination.to);
    let path = escape_path(destination.to);
    let patterns = own.patterns_in(&real, Path::new("/"));
    for tree in destination.trees {
        let at = joined(&real, tree);
        // The patterns would exclude it without a warning.
        if let Some(own) = own.holding(&at) {
            return Err(SnapshotError::DestinationIsOwn {
                path: escape_path(&at),
                own: escape_path(own),
            });
        }
        if !spec.delete {
            continue;
        }
        if let Some(container) = own.container_in(&at) {
            return Err(SnapshotError::DeleteReachesContainer {
                path,
                container: escape_path(container),
            });
        }
    }
    if spec.delete {
        let others: Vec<String> = other_file_systems(destination, &real, record, &table)
            .iter()
            .map(|at| escape_path(at))
            .collect();
        if !others.is_empty() {
            return Err(SnapshotError::DeleteReachesMounts {
                path,
                mounts: others,
            });
        }
        let disks = other_disks(destination, &real, record, &table);
        if !disks.is_empty() {
            return Err(SnapshotError::DeleteReachesOtherDisk { path, disks });
        }
    }
    Ok(ProtectedPaths {
        patterns,
        own,
        kept: BTreeSet::new(),
        real,
    })
}

/// The mounts at the destination. With `delete`, uses its automount points first.
fn mount_table(
    destination: &Destination<'_>,
    spec: &RestoreSpec,
) -> Result<Vec<Mount>, SnapshotError> {
    let read = || {
        mounts().map_err(|source| SnapshotError::System {
            op: "read /proc/self/mountinfo",
            source,
        })
    };
    let table = read()?;
    if spec.delete {
        // The restore would mount a disk on an automount point, and empty it. So it is mounted first, to
        // be found.
        let real = real_path(destination.to);
        let is_reached = |at: &Path| {
            let tree = |tree: &PathBuf| {
                let root = joined(&real, tree);
                at.starts_with(&root) || root.starts_with(at)
            };
            destination.trees.iter().any(tree)
        };
        if automounts::mount_all(&table, &is_reached) {
            return read();
        }
    }
    Ok(table)
}

/// The places where another file system is mounted than the snapshot has, as text for people. A file
/// must not be deleted because it is missing in a snapshot of another disk.
fn other_disks(
    destination: &Destination<'_>,
    real: &Path,
    record: Option<&RunRecord>,
    table: &[Mount],
) -> Vec<String> {
    let had = record.map_or(&[][..], |record| &record.file_systems);
    let mut others = Vec::new();
    for tree in destination.trees {
        let source = joined(&destination.in_source, tree);
        let target = joined(real, tree);
        // Restored to another place, the snapshot's root goes onto whatever disk the user chose.
        let in_place = real_path(&source) == target;
        let mut expected: Vec<FileSystem> = had
            .iter()
            .filter(|one| unescape_path(&one.place).starts_with(&source))
            .cloned()
            .collect();
        let is_there = |one: &FileSystem| unescape_path(&one.place) == source;
        if !expected.iter().any(is_there) {
            expected.extend(holding_in_snapshot(had, &source));
        }
        for one in expected {
            let place = unescape_path(&one.place);
            let at = joined(
                &target,
                place.strip_prefix(&source).unwrap_or(Path::new("")),
            );
            let Some(mount) = holding(table, &at) else {
                continue;
            };
            // At another place a disk counts only if one is mounted at its mount point.
            if !in_place && (mount.at != at || at == real) {
                continue;
            }
            let now = FileSystem::at(mount, &place, &at);
            // An automount point can't contain files.
            let in_danger = mount.empty_automount || holds_anything(&at);
            if one.is_same(&now) == Some(false) && in_danger {
                others.push(format!(
                    "{}: the snapshot has {}, today it is {}",
                    escape_path(&at),
                    one.text(),
                    now.text()
                ));
            }
        }
    }
    others.sort();
    others.dedup();
    others
}

/// The file system of the snapshot that contains `path`, described for `path` itself.
fn holding_in_snapshot(had: &[FileSystem], path: &Path) -> Option<FileSystem> {
    let above = had
        .iter()
        .filter(|one| path.starts_with(unescape_path(&one.place)));
    let holding = above.max_by_key(|one| one.place.len())?;
    let place = unescape_path(&holding.place);
    let below = path.strip_prefix(&place).ok()?;
    Some(FileSystem {
        place: escape_path(path),
        root: escape_path(&joined(&unescape_path(&holding.root), below)),
        ..holding.clone()
    })
}

/// Whether there is anything to delete.
fn holds_anything(at: &Path) -> bool {
    match std::fs::read_dir(at) {
        Ok(mut names) => names.next().is_some(),
        // A file is replaced, not deleted. A folder that can't be read counts as not empty.
        Err(e) => !matches!(
            e.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
        ),
    }
}

/// The mounts where files would be deleted, except for those that the snapshot has, with the disk that
/// was mounted then. A disk that was missing then, or excluded, would be emptied.
fn other_file_systems(
    destination: &Destination<'_>,
    real: &Path,
    record: Option<&RunRecord>,
    table: &[Mount],
) -> Vec<PathBuf> {
    let known = |at: &Path| {
        let below = at.strip_prefix(real).unwrap_or(at);
        let in_source = escape_path(&joined(&destination.in_source, below));
        record.is_some_and(|record| {
            record.mounts.contains(&in_source) || record.sources.contains(&in_source)
        })
    };
    let mut others: Vec<PathBuf> = table
        .iter()
        .map(|mount| &mount.at)
        // The user chose what is mounted at the destination itself.
        .filter(|at| *at != real)
        .filter(|at| {
            let trees = &mut destination.trees.iter();
            trees.any(|tree| at.starts_with(joined(real, tree)))
        })
        .filter(|at| !known(at))
        .cloned()
        .collect();
    others.sort();
    others.dedup();
    others
}
