//! Removes the snapshots of a job that no rule keeps.
//!
//! A snapshot is first renamed to `.sprat/deleting-NAME`. From then on it is no longer a snapshot. If
//! the removal is interrupted, the next run or prune finishes it. Interrupted trees (`.partial`,
//! `.inflight`) are removed in the same way, but only on request. Foreign folders are never removed.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::disks::{JobSources, holders, kept_for_disks};
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, RunFolder, on_volume};
use crate::keep::{Candidate, KeepBy, KeepDecision, KeepReason, decide};
use crate::keep_rules::KeepRules;
use crate::name::{JobName, SnapshotName};
use crate::old_content::{self, OldContent};
use crate::progress::{Phase, Progress};
use crate::record::EntryKind;
use crate::subvolume_ops::Subvolumes;
use crate::suspects::Suspects;
use crate::work;
use crate::wrong_dates::{finished_records, misdated};
use crate::zone::{LOCAL_ZONE, time_zone};

/// What to prune.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneSpec {
    /// The job.
    pub job: JobName,
    /// Which snapshots are kept. Without any rule nothing is removed.
    pub rules: KeepRules,
    /// The zone of days, weeks, months and years: see [`crate::time_zone`].
    #[serde(default = "local_zone")]
    pub time_zone: String,
    /// See [`KeepBy::changed_at`](crate::KeepBy::changed_at).
    #[serde(default)]
    pub changed_at: Option<Timestamp>,
    /// The list of files whose content is wrong, see [`crate::CheckSpec::suspects`]. A snapshot with the
    /// last right content of one of them is kept.
    #[serde(default, with = "crate::text::path_text_option")]
    pub suspects: Option<PathBuf>,
    /// Files that changed silently in the source. A snapshot with their last copy is kept.
    #[serde(default)]
    pub old_content: Vec<OldContent>,
    /// What the config says of the job, if it is in the config: a disk or a source in it that the newest
    /// complete snapshot lacks is kept. Without this, the newest snapshot shows what the job includes.
    #[serde(default)]
    pub sources: Option<JobSources>,
    /// Also remove what interrupted runs copied. The next run could have used it.
    #[serde(default)]
    pub drop_interrupted: bool,
    /// Only report what would be done. Works on a volume that is mounted read-only.
    #[serde(default)]
    pub dry_run: bool,
}

impl PruneSpec {
    /// Prunes `job` by `rules` in the machine's time zone, and removes nothing else.
    #[must_use]
    pub fn new(job: JobName, rules: KeepRules) -> Self {
        Self {
            job,
            rules,
            time_zone: local_zone(),
            changed_at: None,
            suspects: None,
            old_content: Vec::new(),
            sources: None,
            drop_interrupted: false,
            dry_run: false,
        }
    }
}

fn local_zone() -> String {
    LOCAL_ZONE.to_owned()
}

/// The result for one snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// Whether it is kept, and why.
    #[serde(flatten)]
    pub decision: KeepDecision,
    /// It was removed.
    pub removed: bool,
}

/// The tree of an interrupted run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupted {
    /// Its folder.
    pub folder: String,
    /// [`EntryKind::Partial`] or [`EntryKind::Inflight`].
    pub kind: EntryKind,
    /// Why the run stopped, if known.
    pub stopped_by: Option<String>,
    /// Size of the files that it had copied, if known.
    pub bytes_copied: Option<u64>,
    /// It was removed.
    pub removed: bool,
}

/// The result of a prune.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PruneReport {
    /// Every finished snapshot of the job, oldest first.
    pub snapshots: Vec<Pruned>,
    /// Trees of interrupted runs of the job, oldest first.
    #[serde(default)]
    pub interrupted: Vec<Interrupted>,
    /// How many files and folders were removed, including those of removals that were interrupted
    /// earlier.
    pub names_removed: u64,
    /// Free bytes of the volume before and after. Later snapshots use the freed space; the server gets
    /// nothing back by this.
    pub free_bytes: [u64; 2],
}

/// Prunes a job on the volume mounted at `volume_root`. The removals are durable after the end of the
/// session. An interruption removes nothing that is to be kept.
pub fn prune(
    volume_root: &Path,
    spec: &PruneSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<PruneReport, SnapshotError> {
    prune_with(volume_root, spec, None, progress, cancel)
}

/// [`prune`] on a btrfs volume: a snapshot that is a subvolume is deleted as a whole. The kernel gives its
/// space back later.
pub fn prune_subvolumes(
    volume_root: &Path,
    spec: &PruneSpec,
    subvolumes: &dyn Subvolumes,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<PruneReport, SnapshotError> {
    prune_with(volume_root, spec, Some(subvolumes), progress, cancel)
}

fn prune_with(
    volume_root: &Path,
    spec: &PruneSpec,
    subvolumes: Option<&dyn Subvolumes>,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<PruneReport, SnapshotError> {
    progress(Progress::begin(Phase::Checking));
    // A job that does not exist must not be created.
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
    let mut removals = Removals::new(progress, subvolumes);
    for away in run.half_removed()? {
        removals.remove(&run, &away, cancel)?;
    }
    if !spec.rules.is_empty() {
        // Oldest first: if the prune is stopped, the newest are left.
        for snapshot in &mut report.snapshots {
            if !snapshot.decision.keep.is_empty() {
                continue;
            }
            if cancel.is_cancelled() {
                return Err(SnapshotError::PruneCancelled);
            }
            removals.remove_snapshot(&run, snapshot.decision.name, cancel)?;
            snapshot.removed = true;
        }
    }
    for (folder, mut one) in interrupted(&run.job)? {
        if spec.drop_interrupted {
            if cancel.is_cancelled() {
                return Err(SnapshotError::PruneCancelled);
            }
            match (folder, subvolumes) {
                (Folder::Work(_), Some(subvolumes)) => {
                    work::delete(&run, subvolumes)?;
                    run.forget_record_of(folder.name());
                }
                _ => {
                    let away = run.rename_away(folder)?;
                    removals.remove(&run, &away, cancel)?;
                }
            }
            one.removed = true;
        }
        report.interrupted.push(one);
    }
    report.names_removed = removals.before;
    removals.end(volume_root, cancel)?;
    report.free_bytes[1] = free();
    Ok(report)
}

/// How long a prune waits for the space of deleted subvolumes, and how often it
/// wakes the kernel and checks.
const SPACE_PATIENCE: Duration = Duration::from_secs(600);
const WAKE_INTERVAL: Duration = Duration::from_secs(10);
const SPACE_INTERVAL: Duration = Duration::from_millis(50);

/// Counts the removed names of all trees, and reports progress.
pub(crate) struct Removals<'t> {
    progress: &'t mut dyn FnMut(Progress),
    /// The names of the trees that are removed.
    pub(crate) before: u64,
    now: u64,
    subvolumes: Option<&'t dyn Subvolumes>,
    deleted: bool,
}

impl<'t> Removals<'t> {
    pub(crate) fn new(
        progress: &'t mut dyn FnMut(Progress),
        subvolumes: Option<&'t dyn Subvolumes>,
    ) -> Self {
        Self {
            progress,
            before: 0,
            now: 0,
            subvolumes,
            deleted: false,
        }
    }

    /// Removes a finished snapshot, and its record.
    pub(crate) fn remove_snapshot(
        &mut self,
        run: &RunFolder,
        name: SnapshotName,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let path = run.job.path.join(Folder::Named(name).to_string());
        if let Some(subvolumes) = self.subvolumes
            && subvolumes
                .is_subvolume(&path)
                .map_err(on_volume("inspect", &name))?
        {
            let next_run_compares = work::may_have_files_of(run, name)?;
            // A read-only subvolume can't be renamed first. It is gone at once, or not at all.
            subvolumes
                .delete(&path)
                .map_err(on_volume("delete", &name))?;
            self.deleted = true;
            work::forget_run(run, name);
            match next_run_compares {
                true => run.forget_all_but_recent(name),
                false => run.forget_snapshot(name),
            }
            return Ok(());
        }
        let away = run.rename_away(Folder::Named(name))?;
        self.remove(run, &away, cancel)
    }

    /// Deletes `work` if the job has no snapshot left: it would keep the space of the last one.
    pub(crate) fn end_of_job(&mut self, run: &RunFolder) -> Result<(), SnapshotError> {
        let Some(subvolumes) = self.subvolumes else {
            return Ok(());
        };
        let is_snapshot = |folder: &Folder| matches!(folder, Folder::Named(_));
        let needed =
            run.job.own_folders()?.iter().any(is_snapshot) || work::interrupted(&run.job).is_some();
        if !needed {
            self.deleted |= work::delete(run, subvolumes)?;
        }
        Ok(())
    }

    /// Waits until the kernel has given back the space of deleted subvolumes, also of those that an earlier
    /// session deleted. After [`SPACE_PATIENCE`] or a cancel the next session continues.
    pub(crate) fn end(&mut self, volume_root: &Path, cancel: &Cancel) -> Result<(), SnapshotError> {
        match self.subvolumes {
            Some(subvolumes) => await_space(volume_root, subvolumes, self.deleted, cancel),
            None => Ok(()),
        }
    }

    /// Removes a tree in the state folder, and its record.
    pub(crate) fn remove(
        &mut self,
        run: &RunFolder,
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

/// Waits until the kernel has given back the space of subvolumes that were deleted on a btrfs volume. After some
/// minutes or a cancel the next session continues.
pub fn finish_deletions(
    volume_root: &Path,
    subvolumes: &dyn Subvolumes,
    cancel: &Cancel,
) -> Result<(), SnapshotError> {
    await_space(volume_root, subvolumes, false, cancel)
}

fn await_space(
    volume_root: &Path,
    subvolumes: &dyn Subvolumes,
    deleted: bool,
    cancel: &Cancel,
) -> Result<(), SnapshotError> {
    let failed = || on_volume("free the space of", &"deleted snapshots");
    let began = Instant::now();
    let mut woken: Option<Instant> = None;
    while subvolumes
        .deletions_pending(volume_root)
        .map_err(failed())?
        && began.elapsed() < SPACE_PATIENCE
        && !cancel.is_cancelled()
    {
        // The kernel sleeps until a commit.
        if woken.is_none_or(|at| at.elapsed() > WAKE_INTERVAL) {
            subvolumes.commit(volume_root).map_err(failed())?;
            woken = Some(Instant::now());
        }
        std::thread::sleep(SPACE_INTERVAL);
    }
    // The space counts as free after the commit.
    match deleted || woken.is_some() {
        true => subvolumes.commit(volume_root).map_err(failed()),
        false => Ok(()),
    }
}

/// Decides about the finished snapshots of `job`.
pub(crate) fn decided(
    job: &JobFolder,
    spec: &PruneSpec,
) -> Result<Vec<KeepDecision>, SnapshotError> {
    let latest = job.latest();
    let zone = time_zone(&spec.time_zone)?;
    let now = Timestamp::now();
    let for_disks = kept_for_disks(&holders(job, now)?, spec.sources.as_ref());
    let misdated = misdated(&finished_records(job)?);
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
            is_misdated: misdated.contains(&folder.name()),
        })
        .collect();
    let by = KeepBy {
        rules: &spec.rules,
        zone: &zone,
        now,
        changed_at: spec.changed_at,
    };
    let mut decisions = decide(&candidates, &by);
    if let Some(list) = &spec.suspects {
        keep_also(&mut decisions, KeepReason::RightContent, |kept, others| {
            Suspects::load(list).snapshots_to_keep(&job.path, spec.job.as_str(), kept, others)
        });
    }
    keep_also(&mut decisions, KeepReason::OldContent, |kept, others| {
        old_content::snapshots_to_keep(&spec.old_content, &job.path, kept, others)
    });
    Ok(decisions)
}

/// Keeps more of the snapshots: `choose` gets the names of those that are kept, and of the others.
fn keep_also(
    decisions: &mut [KeepDecision],
    reason: KeepReason,
    choose: impl FnOnce(&[String], &[String]) -> BTreeSet<String>,
) {
    let names = |kept: bool| -> Vec<String> {
        let chosen = decisions.iter().filter(|one| one.keep.is_empty() != kept);
        chosen.map(|one| one.name.to_string()).collect()
    };
    let (kept, others) = (names(true), names(false));
    if others.is_empty() {
        return;
    }
    let keep = choose(&kept, &others);
    for decision in decisions {
        if keep.contains(&decision.name.to_string()) {
            decision.keep.push(reason);
        }
    }
}

fn interrupted(job: &JobFolder) -> Result<Vec<(Folder, Interrupted)>, SnapshotError> {
    let own = job.own_folders()?.into_iter();
    Ok(own
        .filter(|folder| !matches!(folder, Folder::Named(_)))
        .chain(work::interrupted(job).map(Folder::Work))
        .map(|folder| {
            let (kind, record) = job.kind(folder);
            let record = record.ok();
            let one = Interrupted {
                folder: folder.to_string(),
                kind,
                bytes_copied: record
                    .as_ref()
                    .map(|record| record.stats.bytes_transferred)
                    // A stopped run has no counts.
                    .filter(|bytes| *bytes > 0),
                stopped_by: record.and_then(|record| record.stopped_by),
                removed: false,
            };
            (folder, one)
        })
        .collect())
}

fn undone(decisions: Vec<KeepDecision>) -> Vec<Pruned> {
    let undone = |decision| Pruned {
        decision,
        removed: false,
    };
    decisions.into_iter().map(undone).collect()
}

/// For people. 0 if it is unknown.
pub(crate) fn free_bytes(volume_root: &Path) -> u64 {
    rustix::fs::statvfs(volume_root).map_or(0, |about| about.f_bavail * about.f_frsize)
}
