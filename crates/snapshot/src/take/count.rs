//! Counts what is new in the sources: for a run before it copies, and where no run is made.

use std::path::{Path, PathBuf};

use jiff::Timestamp;

use crate::cancel::Cancel;
use crate::census::{Census, FileList};
use crate::disks::{self, Disks};
use crate::error::SnapshotError;
use crate::job::JobFolder;
use crate::progress::Progress;
use crate::rsync::Rsync;
use crate::source_scan;
use crate::sources::Sources;
use crate::spec::SnapshotSpec;
use crate::text::unescape_path;
use crate::unresponsive;

/// Counts what [`take`](super::take) would count before it copies, and copies nothing. What comes from a
/// command or from another host is not counted. `None`: the sources can't be walked.
///
/// # Errors
/// As [`take`](super::take) before it copies.
pub fn count(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<Option<Census>, SnapshotError> {
    if spec.sources.is_empty() {
        return Ok(Some(Census::default()));
    }
    let spec = SnapshotSpec {
        pulled: Vec::new(),
        staged: Vec::new(),
        required: Vec::new(),
        ..spec.clone()
    };
    let rsync = Rsync::find(&spec.rsync)?;
    let mut sources = {
        let (spec, volume_root) = (spec.clone(), volume_root.to_owned());
        let check = move || Sources::check(&spec, &volume_root);
        unresponsive::ask(progress, cancel, check)??
    };
    let job = JobFolder::open(volume_root, Path::new(spec.job.as_str()))?;
    source_scan::apply(&rsync, &mut sources, &spec, &job.path, progress, cancel)?;
    let disks = disks_of(&job, &sources, &spec, now)?;
    let counted = counted(&mut sources, &disks, &spec)?;
    Ok(counted.map(|(census, _)| census))
}

/// The disks of the job, and which of them are missing now.
pub(super) fn disks_of(
    job: &JobFolder,
    sources: &Sources,
    spec: &SnapshotSpec,
    now: Timestamp,
) -> Result<Disks, SnapshotError> {
    let list = sources.list.iter().map(|source| source.path.clone());
    let missing = sources.missing.iter().map(|one| unescape_path(one));
    let paths: Vec<PathBuf> = list.chain(missing).collect();
    let holders = disks::holders(job, now)?;
    Ok(Disks::find(&holders, &sources.file_systems, &paths, spec))
}

/// What is new in the sources, if the scan counted it.
///
/// # Errors
/// It is more than `spec` allows.
pub(super) fn counted(
    sources: &mut Sources,
    disks: &Disks,
    spec: &SnapshotSpec,
) -> Result<Option<(Census, FileList)>, SnapshotError> {
    let Some(walk) = sources.walk.take() else {
        return Ok(None);
    };
    let partly = sources.walked_partly || !sources.missing.is_empty() || !disks.missing.is_empty();
    let (census, list) = walk.finish(&sources.found.paths, partly);
    let max = spec.census.as_ref().and_then(|asked| asked.stop_over_bytes);
    match max {
        // Without a list of the last snapshot every file counts as new.
        Some(max) if census.files_before.is_some() && census.bytes > max => {
            Err(SnapshotError::TooMuchNew {
                census: Box::new(census),
            })
        }
        _ => Ok(Some((census, list))),
    }
}
