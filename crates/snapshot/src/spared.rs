//! What lies at a restore's destination and must survive it: sprat's own files, and with `delete` the
//! file systems that the snapshot knows nothing of.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::error::SnapshotError;
use crate::mounts::{Mount, mounts};
use crate::own_places::{OwnPlaces, joined, real_path};
use crate::record::RunRecord;
use crate::spec::RestoreSpec;
use crate::text::escape_path;

/// Where a restore goes.
pub(crate) struct Destination<'a> {
    /// What the restore's paths are relative to, as the caller names it.
    pub(crate) to: &'a Path,
    /// The same place in the source: `/`, or the folder above the one path that is restored.
    pub(crate) in_source: PathBuf,
    /// What is restored, relative to both.
    pub(crate) trees: &'a [PathBuf],
}

/// Looks at the destination before anything is written. Returns rsync patterns for what must neither be
/// written over nor deleted there.
pub(crate) fn look(
    destination: &Destination<'_>,
    record: Option<&RunRecord>,
    spec: &RestoreSpec,
) -> Result<Vec<OsString>, SnapshotError> {
    let table = mounts().map_err(|source| SnapshotError::System {
        op: "read /proc/self/mountinfo",
        source,
    })?;
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
    }
    Ok(patterns)
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
