//! Removes the snapshots of a job that no rule keeps.
//!
//! A snapshot is renamed away first, into `.sprat/deleting-NAME`: from then on it is no snapshot
//! any more, whatever interrupts the removal, and the next run or prune goes on with it.
//! Interrupted trees (`.partial`, `.inflight`) go only where that is asked for, in the same way; folders
//! of others are left alone.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::disks::{holders, kept_for_disks};
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder};
use crate::keep::{Candidate, KeepReason, KeepRules, Verdict, decide};
use crate::name::JobName;
use crate::record::EntryKind;
use crate::spec::{Cancel, Phase, Progress};
use crate::suspects::Suspects;

/// What to prune.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneSpec {
    /// The job.
    pub job: JobName,
    /// What is kept. Without any rule nothing is removed.
    pub rules: KeepRules,
    /// The list of files whose content is wrong, see [`crate::CheckSpec::suspects`]: a snapshot with
    /// the last right content of one of them is kept.
    #[serde(default, with = "crate::text::path_text_option")]
    pub suspects: Option<PathBuf>,
    /// Also remove what interrupted runs copied: it would save the next run some work.
    #[serde(default)]
    pub drop_interrupted: bool,
    /// Only tell what would be done; works on a volume mounted read-only.
    #[serde(default)]
    pub dry_run: bool,
}

/// What came of one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// What was decided.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// It is gone.
    pub removed: bool,
}

/// A tree that an interrupted run left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupted {
    /// Its folder.
    pub folder: String,
    /// [`EntryKind::Partial`] or [`EntryKind::Inflight`].
    pub kind: EntryKind,
    /// Why the run stopped, where that is known.
    pub stopped_by: Option<String>,
    /// Bytes of files that it had copied, where that is known.
    pub bytes_copied: Option<u64>,
    /// It is gone.
    pub removed: bool,
}

/// What a prune did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneReport {
    /// Every finished snapshot of the job, oldest first.
    pub snapshots: Vec<Pruned>,
    /// What interrupted runs of the job left, oldest first.
    #[serde(default)]
    pub interrupted: Vec<Interrupted>,
    /// Files and folders removed, those of removals that were interrupted earlier included.
    pub names_removed: u64,
    /// Free bytes of the volume before and after; what is freed here is used again by later
    /// snapshots, the server gets nothing back by it.
    pub free_bytes: [u64; 2],
}

/// Prunes a job on the volume mounted at `volume_root`. What was removed is durable after the
/// session's end; an interruption loses nothing that is kept.
pub fn prune(
    volume_root: &Path,
    spec: &PruneSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<PruneReport, SnapshotError> {
    progress(Progress::begin(Phase::Checking));
    // A job that isn't there is not made.
    let job = JobFolder::open(volume_root, Path::new(spec.job.as_str()))?;
    let free = || free_bytes(volume_root);
    if spec.dry_run {
        let before = free();
        return Ok(PruneReport {
            snapshots: undone(decided(&job, spec)?),
            interrupted: interrupted(&job)?.into_iter().map(|(_, one)| one).collect(),
            names_removed: 0,
            free_bytes: [before, before],
        });
    }
    let run = JobFolder::open_for_run(volume_root, &spec.job)?;
    let mut report = PruneReport {
        free_bytes: [free(), 0],
        ..PruneReport::default()
    };
    report.snapshots = undone(decided(&run.job, spec)?);
    let mut told = Told {
        progress,
        before: 0,
        now: 0,
    };
    for away in run.half_removed()? {
        told.remove(&run, &away, cancel)?;
    }
    if !spec.rules.is_empty() {
        // The oldest first: stopped half way, the newest are left.
        for snapshot in &mut report.snapshots {
            if !snapshot.verdict.keep.is_empty() {
                continue;
            }
            if cancel.is_cancelled() {
                return Err(SnapshotError::PruneCancelled);
            }
            let away = run.take_away(Folder::Named(snapshot.verdict.name))?;
            told.remove(&run, &away, cancel)?;
            snapshot.removed = true;
        }
    }
    for (folder, mut one) in interrupted(&run.job)? {
        if spec.drop_interrupted {
            if cancel.is_cancelled() {
                return Err(SnapshotError::PruneCancelled);
            }
            let away = run.take_away(folder)?;
            told.remove(&run, &away, cancel)?;
            one.removed = true;
        }
        report.interrupted.push(one);
    }
    report.names_removed = told.before;
    report.free_bytes[1] = free();
    Ok(report)
}

/// Counts names over all trees.
struct Told<'t> {
    progress: &'t mut dyn FnMut(Progress),
    before: u64,
    now: u64,
}

impl Told<'_> {
    fn remove(
        &mut self,
        run: &crate::job::RunFolder,
        away: &Path,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        self.now = 0;
        run.remove_away(away, cancel, &mut |removed| {
            self.now = removed;
            let mut progress = Progress::begin(Phase::Removing);
            progress.files_done = self.before + removed;
            progress.files_found = progress.files_done;
            (self.progress)(progress);
        })?;
        self.before += self.now;
        run.forget_record(away);
        Ok(())
    }
}

fn decided(job: &JobFolder, spec: &PruneSpec) -> Result<Vec<Verdict>, SnapshotError> {
    let latest = job.latest();
    let now = jiff::Timestamp::now();
    let for_disks = kept_for_disks(&holders(job, now)?);
    let candidates: Vec<Candidate> = job
        .own_folders()?
        .into_iter()
        .filter(|folder| matches!(folder, Folder::Named(_)))
        .map(|folder| Candidate {
            name: folder.name(),
            kind: job.kind(folder).0,
            is_latest: latest == Some(folder.name()),
            pinned: job.is_pinned(folder.name()),
            has_missing_disk: for_disks.contains(&folder.name()),
        })
        .collect();
    let mut verdicts = decide(&candidates, &spec.rules, now);
    keep_right_content(job, spec, &mut verdicts);
    Ok(verdicts)
}

/// Keeps what would take the last right content of a damaged file away.
fn keep_right_content(job: &JobFolder, spec: &PruneSpec, verdicts: &mut [Verdict]) {
    let Some(list) = &spec.suspects else { return };
    let names = |kept: bool| -> Vec<String> {
        let chosen = verdicts.iter().filter(|one| one.keep.is_empty() != kept);
        chosen.map(|one| one.name.to_string()).collect()
    };
    let (kept, others) = (names(true), names(false));
    if others.is_empty() {
        return;
    }
    let keep = Suspects::load(list).snapshots_to_keep(&job.path, spec.job.as_str(), &kept, &others);
    for verdict in verdicts {
        if keep.contains(&verdict.name.to_string()) {
            verdict.keep.push(KeepReason::RightContent);
        }
    }
}

fn interrupted(job: &JobFolder) -> Result<Vec<(Folder, Interrupted)>, SnapshotError> {
    let own = job.own_folders()?.into_iter();
    Ok(own
        .filter(|folder| !matches!(folder, Folder::Named(_)))
        .map(|folder| {
            let (kind, record) = job.kind(folder);
            let record = record.ok();
            let one = Interrupted {
                folder: folder.to_string(),
                kind,
                bytes_copied: record
                    .as_ref()
                    .map(|record| record.stats.bytes_transferred)
                    // A run that was stopped has no counts.
                    .filter(|bytes| *bytes > 0),
                stopped_by: record.and_then(|record| record.stopped_by),
                removed: false,
            };
            (folder, one)
        })
        .collect())
}

fn undone(verdicts: Vec<Verdict>) -> Vec<Pruned> {
    let undone = |verdict| Pruned {
        verdict,
        removed: false,
    };
    verdicts.into_iter().map(undone).collect()
}

/// For people; 0 where it can't be told.
fn free_bytes(volume_root: &Path) -> u64 {
    rustix::fs::statvfs(volume_root).map_or(0, |about| about.f_bavail * about.f_frsize)
}
