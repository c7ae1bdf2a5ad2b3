//! The snapshot that a person means, to read from.

use std::path::{Path, PathBuf};

use crate::adopted;
use crate::choice::{self, SnapshotChoice};
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder};
use crate::name::JobName;
use crate::record::{EntryKind, RunRecord};
use crate::text::escape_path;

/// The snapshot to read from.
pub(crate) struct Chosen {
    pub(crate) folder: PathBuf,
    pub(crate) kind: EntryKind,
    pub(crate) record: Option<RunRecord>,
}

impl Chosen {
    pub(crate) fn folder_text(&self) -> String {
        escape_path(&self.folder)
    }
}

/// Finds the snapshot. If sprat made none of that name, finds the adopted copy.
pub(crate) fn choose(
    volume_root: &Path,
    job: &JobName,
    snapshot: &SnapshotChoice,
) -> Result<(JobFolder, Chosen), SnapshotError> {
    let folder = JobFolder::open(volume_root, Path::new(job.as_str()));
    let found = folder.and_then(|folder| {
        let chosen = choose_in(&folder, snapshot)?;
        Ok((folder, chosen))
    });
    let missing = match found {
        Err(
            missing @ (SnapshotError::NoSuchJob { .. }
            | SnapshotError::NoSuchSnapshot { .. }
            | SnapshotError::Layout { .. }),
        ) => missing,
        other => return other,
    };
    let copy = match snapshot {
        SnapshotChoice::Latest => adopted::chosen(volume_root, job, None)?,
        SnapshotChoice::Named(name) => adopted::chosen(volume_root, job, Some(name))?,
        // It is unknown when one began, and whether it is complete.
        SnapshotChoice::LatestComplete | SnapshotChoice::At(_) => None,
    };
    let folder = copy.ok_or(missing)?;
    let chosen = Chosen {
        folder,
        kind: EntryKind::Adopted,
        record: None,
    };
    Ok((JobFolder::open(volume_root, Path::new("."))?, chosen))
}

fn choose_in(folder: &JobFolder, choice: &SnapshotChoice) -> Result<Chosen, SnapshotError> {
    let name =
        choice::folder_to_read(folder, choice)?.ok_or_else(|| choice::no_such(folder, choice))?;
    let own = name.to_str().and_then(Folder::parse);
    let theirs = match name.to_str() {
        Some(name) if adopted::is_copy_in_job(name) => EntryKind::Adopted,
        _ => EntryKind::Foreign,
    };
    let (kind, record) = own.map_or((theirs, None), |own| {
        let (kind, record) = folder.kind(own);
        (kind, record.ok())
    });
    Ok(Chosen {
        folder: name,
        kind,
        record,
    })
}
