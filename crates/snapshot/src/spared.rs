//! What lies at a restore's destination and must survive it: sprat's own files, and with `delete` the
//! file systems that the snapshot knows nothing of.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::automounts;
use crate::error::SnapshotError;
use crate::file_system::FileSystem;
use crate::mounts::{Mount, holding, mounts};
use crate::own_places::{OwnPlaces, joined, real_path};
use crate::record::RunRecord;
use crate::spec::RestoreSpec;
use crate::text::{escape_path, unescape_path};

/// Where a restore goes.
pub(crate) struct Destination<'a> {
    /// What the restore's paths are relative to, as the caller names it.
    pub(crate) to: &'a Path,
    /// The same place in the source: `/`, or the folder above the one path that is restored.
    pub(crate) in_source: PathBuf,
    /// What is restored, relative to both.
    pub(crate) trees: &'a [PathBuf],
}

/// What must neither be written over nor deleted.
pub(crate) struct Spared {
    /// The same as rsync patterns.
    pub(crate) patterns: Vec<OsString>,
    own: OwnPlaces,
    /// The destination, without symbolic links.
    real: PathBuf,
}

impl Spared {
    /// Whether `path`, relative to the destination, is such a place or lies in one.
    pub(crate) fn holds(&self, path: &Path) -> bool {
        self.own.holding(&joined(&self.real, path)).is_some()
    }
}

/// Looks at the destination before anything is written.
pub(crate) fn look(
    destination: &Destination<'_>,
    record: Option<&RunRecord>,
    spec: &RestoreSpec,
) -> Result<Spared, SnapshotError> {
    let read = || {
        mounts().map_err(|source| SnapshotError::System {
            op: "read /proc/self/mountinfo",
            source,
        })
    };
    let mut table = read()?;
    if spec.delete {
        // A disk that is mounted on first use would be mounted by the restore, and emptied.
        let real = real_path(destination.to);
        let is_reached = |at: &Path| {
            let tree = |tree: &PathBuf| {
                let root = joined(&real, tree);
                at.starts_with(&root) || root.starts_with(at)
            };
            destination.trees.iter().any(tree)
        };
        if automounts::mount_all(&table, &is_reached) {
            table = read()?;
        }
    }
    let own = OwnPlaces::find(&spec.never_enter, spec.container.as_ref(), &table);
    let real = real_path(destination.to);
    let path = escape_path(destination.to);
    let patterns = own.patterns_in(&real, Path::new("/"));
    for tree in destination.trees {
        let at = joined(&real, tree);
        // The patterns would leave it out without a word.
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
    Ok(Spared {
        patterns,
        own,
        real,
    })
}

/// The places of the snapshot's file systems where another one is today, for people. Files of the
/// one must not be deleted because the other doesn't have them.
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
        // In another place than its own, the snapshot's root lies on whatever disk the user chose.
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
            // Elsewhere a disk counts only where one is mounted for it.
            if !in_place && (mount.at != at || at == real) {
                continue;
            }
            let now = FileSystem::at(mount, &place, &at);
            // An automount point takes no file.
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

/// What the snapshot has at `path`, which is no source or mount point of its own, but lies in one.
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

/// Whether a file could be deleted there.
fn holds_anything(at: &Path) -> bool {
    match std::fs::read_dir(at) {
        Ok(mut names) => names.next().is_some(),
        // A file is replaced, not deleted; what can't be read is not known to be empty.
        Err(e) => !matches!(
            e.kind(),
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
        ),
    }
}

/// What is mounted where files would be deleted, but for what is in the snapshot with the disk that it
/// was then. A disk that lacked, or was left out, would be emptied.
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
        // What is mounted at the destination itself was chosen by whoever named it.
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
