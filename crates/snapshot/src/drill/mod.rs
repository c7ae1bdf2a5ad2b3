//! A drill: restores a sample of files into a scratch folder, and compares them.
//!
//! A backup is good if files come back from it. The sample always has some of the biggest, oldest and newest
//! files, and some of an older snapshot. A restored file is compared with the digest that its backup noted or the
//! checksum that an earlier check saved, and with its source if that is unchanged.

mod compare;
mod sample;

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::check::Known;
use crate::choice::SnapshotChoice;
use crate::error::SnapshotError;
use crate::listed::Listed;
use crate::name::JobName;
use crate::name_list::NameList;
use crate::progress::Progress;
use crate::restore::restore;
use crate::spec::RestoreSpec;
use crate::suspects::Suspects;
use crate::text::{escape_path, path_text};
use sample::{Sample, Sampled};

/// So many files are restored by one run of rsync. Between the runs the time limit is checked.
const BATCH: usize = 10;
const RESTORE_SAMPLE: &str =
    "the drill can't restore into the cache folder; free or mend that disk";

/// What to restore, and with what to compare it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrillSpec {
    /// An empty folder of this machine that only this user may enter. It is empty again afterwards.
    #[serde(with = "path_text")]
    pub scratch: PathBuf,
    /// The file on this machine with the checksums of the last check of all data.
    #[serde(with = "path_text")]
    pub known: PathBuf,
    /// As in [`crate::CheckSpec::change_lists`].
    #[serde(default, with = "crate::text::path_text_option")]
    pub change_lists: Option<PathBuf>,
    /// As in [`crate::CheckSpec::suspects`].
    #[serde(with = "path_text")]
    pub suspects: PathBuf,
    /// The jobs whose sources are on this machine.
    pub jobs_here: Vec<JobName>,
    /// Restore so many files at most.
    pub files_max: usize,
    /// Restore so many bytes at most. A file of more than half of it is read in parts.
    pub bytes_max: u64,
    /// After this time no further file is restored. A few are restored whatever the time.
    pub duration_max: Duration,
    /// Chooses the sample.
    pub seed: u64,
}

/// The result. Names are `JOB/SNAPSHOT/path`, escaped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DrillReport {
    /// The snapshots, and how much of each was restored.
    pub snapshots: Vec<DrilledSnapshot>,
    /// Files that were restored.
    pub files: u64,
    /// Their bytes. Of large files, the bytes of the parts.
    pub bytes: u64,
    /// How many of the files were large: only their beginning, a part of the middle and their end were read.
    pub in_parts: u64,
    /// Files that were compared with the digest of their backup, or the checksum of an earlier check. Of large
    /// files, one piece.
    pub compared_with_checksum: u64,
    /// Files that were compared with their unchanged source.
    pub compared_with_source: u64,
    /// Files with neither a checksum nor an unchanged source: they are readable, and nothing else is known.
    pub not_compared: u64,
    /// Files of the sample that were not restored, because the time was over.
    pub left: u64,
    /// Whether all folders were listed before the sample was chosen. Otherwise the time did not suffice.
    pub listed_all: bool,
    /// Files and folders that can't be read.
    pub unreadable: NameList,
    /// Files that came back with other content or attributes, or not at all.
    pub damaged: NameList,
    /// As [`crate::CheckReport::missed`].
    pub missed: NameList,
    /// Files on this machine that could not be written, and why.
    pub not_saved: Vec<String>,
}

/// What was restored of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrilledSnapshot {
    /// The job.
    pub job: String,
    /// The snapshot.
    pub snapshot: String,
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl DrillReport {
    /// Whether something did not come back as it was.
    #[must_use]
    pub fn is_damaged(&self) -> bool {
        !self.unreadable.is_empty() || !self.damaged.is_empty()
    }
}

/// Restores a sample from the volume that is mounted at `volume_root`. Nothing may write to it meanwhile.
///
/// # Errors
/// The volume, the scratch folder or the checksums can't be used. Damage is no error.
pub fn drill(
    volume_root: &Path,
    spec: &DrillSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<DrillReport, SnapshotError> {
    let begun = Instant::now();
    let known = Known::load(&spec.known).map_err(|source| SnapshotError::System {
        op: "read the saved checksums",
        source,
    })?;
    let listed = Listed::load(volume_root, spec.change_lists.as_deref());
    let mut report = DrillReport::default();
    let mut suspects = Suspects::load(&spec.suspects);
    let Sample { files, jobs } =
        sample::choose(volume_root, spec, &suspects, &mut report, begun, cancel)?;
    let mut proof = compare::Proof {
        root: volume_root,
        spec,
        known: &known,
        listed: &listed,
        jobs: &jobs,
        report,
        suspects: Vec::new(),
        cancel,
    };
    let mut left: &[Sampled] = &files;
    let mut batches = 0_u64;
    while let Some(first) = left.first() {
        if batches > 0 && begun.elapsed() >= spec.duration_max {
            break;
        }
        let one_kind = |file: &&Sampled| {
            (file.job, file.snapshot, file.in_parts) == (first.job, first.snapshot, first.in_parts)
        };
        let length = left.iter().take(BATCH).take_while(one_kind).count();
        let (batch, rest) = left.split_at(length);
        left = rest;
        let to = spec.scratch.join(batches.to_string());
        batches += 1;
        match first.in_parts {
            true => proof.read_parts(batch)?,
            false => {
                restore_batch(volume_root, &proof, batch, &to, progress)?;
                proof.compare(batch, &to)?;
                std::fs::remove_dir_all(&to).map_err(|source| SnapshotError::System {
                    op: "empty the scratch folder",
                    source,
                })?;
            }
        }
    }
    let mut report = proof.report;
    report.left = left.len() as u64;
    if !proof.suspects.is_empty() {
        for suspect in proof.suspects {
            suspects.note(volume_root, suspect);
        }
        if let Err(error) = suspects.save(&spec.suspects) {
            let path = escape_path(&spec.suspects);
            report.not_saved.push(format!("{path}: {error}"));
        }
    }
    Ok(report)
}

fn restore_batch(
    volume_root: &Path,
    proof: &compare::Proof<'_>,
    batch: &[Sampled],
    to: &Path,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), SnapshotError> {
    let Some(first) = batch.first() else {
        return Ok(());
    };
    let job = &proof.jobs[first.job];
    let mut restored = RestoreSpec::new(job.name.clone(), to.to_owned());
    restored.snapshot = SnapshotChoice::Named(first.snapshot.to_string());
    let paths = batch.iter().map(|file| Path::new("/").join(&file.path));
    restored.paths = paths.collect();
    match restore(volume_root, &restored, progress, proof.cancel) {
        Err(SnapshotError::RestoreCancelled) => Err(SnapshotError::ReadCancelled),
        // The hints of a restore say how to get the rest of the files.
        Err(SnapshotError::DestinationFull { .. }) => Err(SnapshotError::System {
            op: RESTORE_SAMPLE,
            source: io::ErrorKind::StorageFull.into(),
        }),
        Err(SnapshotError::RestoreFailed {
            damaged: false,
            first_message,
            ..
        }) => Err(SnapshotError::System {
            op: RESTORE_SAMPLE,
            source: io::Error::other(first_message),
        }),
        restored => restored.map(drop),
    }
}
