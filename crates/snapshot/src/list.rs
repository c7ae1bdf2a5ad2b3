//! Lists what a volume holds: every job's folders, ours and others'.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, statat};

use crate::by_hand::{Dated, is_copy, is_copy_in_job};
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder};
use crate::name::{JobName, SnapshotName};
use crate::record::{EntryKind, SnapshotEntry};
use crate::text::escape_path;
use crate::walk::{is_folder, names_in, open_folder_at};

/// Lists all folders of all jobs on the volume mounted at `volume_root`: jobs by name, and within a
/// job by time, newest last; folders of others come before ours. Copies that a person's own rsync
/// made at the top stand under the name before their date.
///
/// A damaged record never hides its snapshot.
pub fn list(volume_root: &Path) -> Result<Vec<SnapshotEntry>, SnapshotError> {
    let failed = |source: io::Error| SnapshotError::Volume {
        op: "list",
        object: "its root".to_owned(),
        source,
    };
    let root = open_folder_at(volume_root).map_err(failed)?;
    let mut jobs: Vec<_> = names_in(root.as_fd(), Path::new("."))
        .map_err(failed)?
        .into_iter()
        .filter(|(name, kind)| match kind {
            FileType::Directory => name != Path::new("lost+found"),
            FileType::Unknown => {
                statat(&root, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| is_folder(&stat))
            }
            _ => false,
        })
        .map(|(name, _)| name)
        .collect();
    jobs.sort();
    let mut entries = Vec::new();
    for job in jobs {
        if is_copy(&root, &job) {
            entries.push(copy_at_the_top(&job));
            continue;
        }
        list_job(&JobFolder::open(volume_root, &job)?, &job, &mut entries)?;
    }
    Ok(entries)
}

/// The newest finished snapshot of each job, by the job's name. Reads folders only.
pub fn newest(volume_root: &Path) -> Result<BTreeMap<String, String>, SnapshotError> {
    let failed = |source: io::Error| SnapshotError::Volume {
        op: "list",
        object: "its root".to_owned(),
        source,
    };
    let root = open_folder_at(volume_root).map_err(failed)?;
    let mut newest = BTreeMap::new();
    for (name, _) in names_in(root.as_fd(), Path::new(".")).map_err(failed)? {
        let Some(job) = name.to_str().filter(|job| JobName::new(job).is_ok()) else {
            continue;
        };
        let is_job = statat(&root, &name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| is_folder(&stat))
            && !is_copy(&root, &name);
        if !is_job {
            continue;
        }
        let folders = JobFolder::open(volume_root, &name)?.folders()?;
        let finished = folders
            .iter()
            .filter_map(|folder| match Folder::parse(folder.to_str()?)? {
                Folder::Named(name) => Some(name),
                _ => None,
            });
        if let Some(name) = finished.max() {
            newest.insert(job.to_owned(), name.to_string());
        }
    }
    Ok(newest)
}

/// Those of `expected`, snapshots by job as [`newest`] returns them, that are not in the volume.
/// What can't be asked counts as there.
#[must_use]
pub fn missing(volume_root: &Path, expected: &BTreeMap<String, String>) -> Vec<String> {
    let gone = expected.iter().filter(|(job, name)| {
        let path = volume_root.join(job).join(name);
        path.symlink_metadata()
            .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    });
    gone.map(|(job, name)| format!("{job}/{name}")).collect()
}

fn copy_at_the_top(name: &Path) -> SnapshotEntry {
    let dated = name.to_str().and_then(Dated::parse);
    let stem = dated.map_or("", |dated| dated.stem);
    let job = if stem.is_empty() {
        name
    } else {
        Path::new(stem)
    };
    SnapshotEntry {
        job: escape_path(job),
        folder: escape_path(name),
        kind: EntryKind::ByHand,
        name: None,
        is_latest: false,
        record: None,
        record_error: None,
    }
}

fn list_job(
    folder: &JobFolder,
    job: &Path,
    entries: &mut Vec<SnapshotEntry>,
) -> Result<(), SnapshotError> {
    let latest = folder.latest();
    let first = entries.len();
    for name in folder.folders()? {
        entries.push(entry(folder, job, &name, latest));
    }
    entries[first..].sort_by(|a, b| (a.name, &a.folder).cmp(&(b.name, &b.folder)));
    Ok(())
}

fn entry(
    folder: &JobFolder,
    job: &Path,
    name: &Path,
    latest: Option<SnapshotName>,
) -> SnapshotEntry {
    let ours = name.to_str().and_then(Folder::parse);
    let mut entry = SnapshotEntry {
        job: escape_path(job),
        folder: escape_path(name),
        kind: match name.to_str() {
            Some(name) if is_copy_in_job(name) => EntryKind::ByHand,
            _ => EntryKind::Foreign,
        },
        name: ours.map(Folder::name),
        is_latest: false,
        record: None,
        record_error: None,
    };
    if let Some(ours) = ours {
        let (kind, record) = folder.kind(ours);
        entry.kind = kind;
        entry.is_latest = latest.is_some_and(|latest| ours == Folder::Named(latest));
        match record {
            Ok(record) => entry.record = Some(record),
            Err(why) => entry.record_error = Some(why),
        }
    }
    entry
}
