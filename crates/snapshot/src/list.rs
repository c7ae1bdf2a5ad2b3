//! Lists the folders of all jobs on a volume, including foreign ones.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, statat};

use crate::adopted::{Dated, is_copy, is_copy_in_job, root_unlisted};
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, STATE_FOLDER, WORK_PATH};
use crate::name::{JobName, SnapshotName};
use crate::record::{EntryKind, SnapshotEntry};
use crate::text::escape_path;
use crate::walk::{entry_is_folder, is_folder, names_in, open_folder_at};
use crate::work;
use crate::wrong_dates::finished_records;

/// Lists all folders of all jobs on the volume mounted at `volume_root`: jobs by name, and within a job
/// by time, newest last. Foreign folders come before ours. An adopted copy at the top is listed under
/// the name before its date.
///
/// A snapshot with a damaged record is listed, too.
pub fn list(volume_root: &Path) -> Result<Vec<SnapshotEntry>, SnapshotError> {
    let root = open_folder_at(volume_root).map_err(root_unlisted)?;
    let mut jobs: Vec<_> = names_in(root.as_fd(), Path::new("."))
        .map_err(root_unlisted)?
        .into_iter()
        .filter(|(name, kind)| {
            name != Path::new("lost+found")
                && entry_is_folder(root.as_fd(), name, *kind).unwrap_or(false)
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

/// The newest finished snapshot of each job, by the job's name. Reads no records.
pub fn newest(volume_root: &Path) -> Result<BTreeMap<String, String>, SnapshotError> {
    let finished = finished(volume_root)?.into_iter();
    Ok(finished
        .filter_map(|(job, names)| Some((job, names.last()?.to_string())))
        .collect())
}

/// The finished snapshots of each job that has any, oldest first, by the job's name. Reads no records.
pub fn finished(volume_root: &Path) -> Result<BTreeMap<String, Vec<SnapshotName>>, SnapshotError> {
    let root = open_folder_at(volume_root).map_err(root_unlisted)?;
    let mut finished = BTreeMap::new();
    for (name, _) in names_in(root.as_fd(), Path::new(".")).map_err(root_unlisted)? {
        let Some(job) = name.to_str().filter(|job| JobName::new(job).is_ok()) else {
            continue;
        };
        let is_job = statat(&root, &name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| is_folder(&stat))
            && !is_copy(&root, &name);
        if !is_job {
            continue;
        }
        let own = JobFolder::open(volume_root, &name)?.own_folders()?;
        let names: Vec<SnapshotName> = own
            .into_iter()
            .filter_map(|folder| match folder {
                Folder::Named(name) => Some(name),
                _ => None,
            })
            .collect();
        if !names.is_empty() {
            finished.insert(job.to_owned(), names);
        }
    }
    Ok(finished)
}

/// Whether a file of a finished snapshot can have names in finished snapshots only: there is nothing else that has
/// files of people.
pub fn has_only_finished(volume_root: &Path) -> Result<bool, SnapshotError> {
    let root = open_folder_at(volume_root).map_err(root_unlisted)?;
    let jobs = finished(volume_root)?;
    for (name, _) in names_in(root.as_fd(), Path::new(".")).map_err(root_unlisted)? {
        let text = name.to_str().unwrap_or_default();
        if text == STATE_FOLDER || text == "lost+found" {
            continue;
        }
        if !jobs.contains_key(text) {
            return Ok(false);
        }
        let job = JobFolder::open(volume_root, &name)?;
        let failed = |error| crate::job::on_volume("list", &text)(error);
        for (name, kind) in names_in(job.folder.as_fd(), Path::new(".")).map_err(failed)? {
            let text = name.to_str().unwrap_or_default();
            let is_known = match Folder::parse(text) {
                Some(folder) => matches!(folder, Folder::Named(_)),
                None => text == STATE_FOLDER || (text == "latest" && kind == FileType::Symlink),
            };
            if !is_known {
                return Ok(false);
            }
        }
        // Interrupted removals and such have their trees there.
        let state = Path::new(STATE_FOLDER);
        for (_, kind) in names_in(job.folder.as_fd(), state).map_err(failed)? {
            if kind != FileType::RegularFile {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The snapshots of `expected` (by job, as [`newest`] returns them) that are not on the volume. If that
/// can't be determined, a snapshot counts as present.
#[must_use]
pub fn missing(volume_root: &Path, expected: &BTreeMap<String, String>) -> Vec<String> {
    let gone = expected.iter().filter(|(job, name)| {
        let path = volume_root.join(job).join(name);
        path.symlink_metadata()
            .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    });
    gone.map(|(job, name)| format!("{job}/{name}")).collect()
}

/// The snapshots of `remembered` that are not on the volume, without those that were removed in order. These have a
/// trace: a run of their job was linked from them, or from a later snapshot that is gone, too.
#[must_use]
pub fn gone_without_trace(
    volume_root: &Path,
    remembered: &BTreeMap<String, String>,
) -> Vec<String> {
    let was_found = |name: &str| {
        let (job, snapshot) = name.split_once('/').unwrap_or_default();
        let Ok(snapshot) = SnapshotName::parse(snapshot) else {
            return false;
        };
        let records =
            JobFolder::open(volume_root, Path::new(job)).and_then(|job| finished_records(&job));
        let records = records.unwrap_or_default();
        let linked = records.iter().flat_map(|record| &record.linked_from);
        let mut linked = linked.filter_map(|linked| SnapshotName::parse(&linked.folder).ok());
        // In another copy of the container each later snapshot leads to an earlier one that is there.
        let is_gone = |one: SnapshotName| {
            !missing(
                volume_root,
                &BTreeMap::from([(job.to_owned(), one.to_string())]),
            )
            .is_empty()
        };
        linked.any(|one| one >= snapshot && is_gone(one))
    };
    let mut gone = missing(volume_root, remembered);
    gone.retain(|name| !was_found(name));
    gone
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
        kind: EntryKind::Adopted,
        name: None,
        is_latest: false,
        pin: None,
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
    if let Some(begun) = work::interrupted(folder) {
        let (kind, record) = folder.kind(Folder::Work(begun));
        entries.push(SnapshotEntry {
            job: escape_path(job),
            folder: WORK_PATH.to_owned(),
            kind,
            name: Some(begun),
            is_latest: false,
            pin: None,
            record_error: record.as_ref().err().cloned(),
            record: record.ok(),
        });
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
            Some(name) if is_copy_in_job(name) => EntryKind::Adopted,
            _ => EntryKind::Foreign,
        },
        name: ours.map(Folder::name),
        is_latest: false,
        pin: None,
        record: None,
        record_error: None,
    };
    if let Some(ours) = ours {
        let (kind, record) = folder.kind(ours);
        entry.kind = kind;
        if let Folder::Named(name) = ours {
            entry.pin = folder.pin(name);
        }
        entry.is_latest = latest.is_some_and(|latest| ours == Folder::Named(latest));
        match record {
            Ok(record) => entry.record = Some(record),
            Err(why) => entry.record_error = Some(why),
        }
    }
    entry
}
