//! Removes the snapshots that a person names.
//!
//! Everything is checked before the first one is removed. A pinned snapshot is never removed, and the
//! newest complete one only on request. The removal itself is that of a prune.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::choice::{self, SnapshotChoice};
use crate::disks::JobSources;
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, RunFolder};
use crate::keep::KeepReason;
use crate::keep_rules::KeepRules;
use crate::name::{JobName, SnapshotName};
use crate::old_content::{self, OldContent};
use crate::progress::{Phase, Progress};
use crate::prune::{PruneSpec, Removals, decided, free_bytes};
use crate::record::EntryKind;
use crate::subvolume_ops::Subvolumes;
use crate::suspects::Suspects;
use crate::wrong_dates::{finished_records, misdated};

/// What to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveSpec {
    /// The snapshots. Each must mean exactly one.
    pub snapshots: Vec<(JobName, SnapshotChoice)>,
    /// The newest complete snapshot of a job may go, too.
    #[serde(default)]
    pub allow_newest: bool,
    /// A snapshot may go that has the last undamaged copy of a file, or the newest copy of a disk or source
    /// that is missing today.
    #[serde(default)]
    pub allow_last_copy: bool,
    /// As in [`PruneSpec::sources`], for each job that is in the config.
    #[serde(default)]
    pub sources: Vec<(JobName, JobSources)>,
    /// As in [`PruneSpec::suspects`].
    #[serde(default, with = "crate::text::path_text_option")]
    pub suspects: Option<PathBuf>,
    /// As in [`PruneSpec::old_content`], for each job.
    #[serde(default)]
    pub old_content: Vec<(JobName, Vec<OldContent>)>,
    /// Only report what would be removed.
    #[serde(default)]
    pub dry_run: bool,
}

impl RemoveSpec {
    /// Removes these snapshots if nothing needs them. No source or file is known that does.
    #[must_use]
    pub fn new(snapshots: Vec<(JobName, SnapshotChoice)>) -> Self {
        Self {
            snapshots,
            allow_newest: false,
            allow_last_copy: false,
            sources: Vec::new(),
            suspects: None,
            old_content: Vec::new(),
            dry_run: false,
        }
    }
}

/// One snapshot that is to be removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// Its job.
    pub job: JobName,
    /// The snapshot.
    pub name: SnapshotName,
    /// Its kind.
    pub kind: EntryKind,
    /// How many files it has, if that is known.
    pub files: Option<u64>,
    /// The size of its files, most of which other snapshots may share; if that is known.
    pub bytes_total: Option<u64>,
    /// Why a prune would keep it, whatever its rules.
    pub needed: Vec<KeepReason>,
    /// An earlier removal of it was interrupted.
    pub begun_before: bool,
    /// It was removed.
    pub removed: bool,
}

/// The result of a removal.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveReport {
    /// The snapshots, by job and name.
    pub snapshots: Vec<Removal>,
    /// How many files and folders were removed.
    pub names_removed: u64,
    /// Free bytes of the volume before and after.
    pub free_bytes: [u64; 2],
}

/// Removes the snapshots of `spec` from the volume mounted at `volume_root`. The removals are durable
/// after the end of the session.
///
/// # Errors
/// One of them is not there, is not meant uniquely, is pinned, or is the newest complete one of its job
/// and `allow_newest` is not set: nothing is removed then.
pub fn remove(
    volume_root: &Path,
    spec: &RemoveSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<RemoveReport, SnapshotError> {
    remove_with(volume_root, spec, None, progress, cancel)
}

/// [`remove`] on a btrfs volume: see [`crate::prune_subvolumes`].
///
/// # Errors
/// As [`remove`].
pub fn remove_subvolumes(
    volume_root: &Path,
    spec: &RemoveSpec,
    subvolumes: &dyn Subvolumes,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<RemoveReport, SnapshotError> {
    remove_with(volume_root, spec, Some(subvolumes), progress, cancel)
}

fn remove_with(
    volume_root: &Path,
    spec: &RemoveSpec,
    subvolumes: Option<&dyn Subvolumes>,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<RemoveReport, SnapshotError> {
    progress(Progress::begin(Phase::Checking));
    let mut jobs: BTreeMap<JobName, Vec<&SnapshotChoice>> = BTreeMap::new();
    for (job, choice) in &spec.snapshots {
        jobs.entry(job.clone()).or_default().push(choice);
    }
    let mut plans = Vec::new();
    for (job, choices) in jobs {
        plans.push((job.clone(), plan(volume_root, &job, &choices, spec)?));
    }
    let before = free_bytes(volume_root);
    let mut report = RemoveReport {
        free_bytes: [before, before],
        ..RemoveReport::default()
    };
    if spec.dry_run {
        report.snapshots = plans.into_iter().flat_map(|(_, plan)| plan).collect();
        return Ok(report);
    }
    let mut removals = Removals::new(progress, subvolumes);
    for (job, mut plan) in plans {
        let run = JobFolder::open_for_run(volume_root, &job)?;
        let going: Vec<SnapshotName> = plan.iter().map(|one| one.name).collect();
        point_latest_elsewhere(&run, &going)?;
        for one in &mut plan {
            if cancel.is_cancelled() {
                return Err(SnapshotError::PruneCancelled);
            }
            if !one.begun_before {
                removals.remove_snapshot(&run, one.name, cancel)?;
            }
            one.removed = true;
        }
        for away in run.half_removed()? {
            removals.remove(&run, &away, cancel)?;
        }
        removals.end_of_job(&run)?;
        report.snapshots.extend(plan);
    }
    report.names_removed = removals.before;
    removals.end(volume_root, cancel)?;
    report.free_bytes[1] = free_bytes(volume_root);
    Ok(report)
}

/// The snapshots of one job that go, oldest first.
fn plan(
    volume_root: &Path,
    job: &JobName,
    choices: &[&SnapshotChoice],
    spec: &RemoveSpec,
) -> Result<Vec<Removal>, SnapshotError> {
    let folder = JobFolder::open(volume_root, Path::new(job.as_str()))?;
    let mut by_no_rule = PruneSpec::new(job.clone(), KeepRules::default());
    let in_config = spec.sources.iter().find(|(name, _)| name == job);
    by_no_rule.sources = in_config.map(|(_, sources)| sources.clone());
    let needed: BTreeMap<SnapshotName, Vec<KeepReason>> = decided(&folder, &by_no_rule)?
        .into_iter()
        .map(|decision| (decision.name, decision.keep))
        .collect();
    let all: Vec<SnapshotName> = needed.keys().copied().collect();
    let mut plan: BTreeMap<SnapshotName, Removal> = BTreeMap::new();
    for choice in choices {
        let (name, begun_before) = match choice::exactly(&folder, choice) {
            Err(missing @ SnapshotError::NoSuchSnapshot { .. }) => {
                (half_removed(&folder, choice).ok_or(missing)?, true)
            }
            found => (found?, false),
        };
        let (kind, record) = folder.kind(Folder::Named(name));
        let stats = record.ok().map(|record| record.stats);
        let one = Removal {
            job: job.clone(),
            name,
            kind,
            files: stats.and_then(|stats| stats.files_of_people()),
            bytes_total: stats.map(|stats| stats.bytes_total),
            needed: needed.get(&name).cloned().unwrap_or_default(),
            begun_before,
            removed: false,
        };
        check(&folder, &one, spec.allow_newest)?;
        plan.insert(name, one);
    }
    let texts = |goes: bool| -> Vec<String> {
        let chosen = all.iter().filter(|name| plan.contains_key(*name) == goes);
        chosen.map(ToString::to_string).collect()
    };
    let (staying, going) = (texts(false), texts(true));
    let right = spec.suspects.as_ref().map(|list| {
        Suspects::load(list).snapshots_to_keep(&folder.path, job.as_str(), &staying, &going)
    });
    let old = spec.old_content.iter().filter(|(of, _)| of == job);
    let old = old.flat_map(|(_, files)| {
        old_content::snapshots_to_keep(files, &folder.path, &staying, &going)
    });
    let old: BTreeSet<String> = old.collect();
    for one in plan.values_mut() {
        let name = one.name.to_string();
        if right.as_ref().is_some_and(|right| right.contains(&name)) {
            one.needed.push(KeepReason::RightContent);
        }
        if old.contains(&name) {
            one.needed.push(KeepReason::OldContent);
        }
    }
    if let Some(one) = plan.values().find(|one| one.is_last_copy())
        && !spec.allow_last_copy
    {
        return Err(refused(
            &folder,
            one,
            "has the last undamaged copy of a file, or the newest copy of a disk or source"
                .to_owned(),
        ));
    }
    Ok(plan.into_values().collect())
}

impl Removal {
    /// Whether content is lost with it that no other snapshot has.
    fn is_last_copy(&self) -> bool {
        let last = [
            KeepReason::MissingDisk,
            KeepReason::RightContent,
            KeepReason::OldContent,
        ];
        self.needed.iter().any(|reason| last.contains(reason))
    }
}

fn refused(folder: &JobFolder, one: &Removal, why: String) -> SnapshotError {
    SnapshotError::RemovalRefused {
        job: folder.job.clone(),
        snapshot: one.name.to_string(),
        why,
    }
}

fn check(folder: &JobFolder, one: &Removal, allow_newest: bool) -> Result<(), SnapshotError> {
    let refused = |why: String| refused(folder, one, why);
    if let Some(reason) = folder.pin(one.name) {
        return Err(refused(match reason.is_empty() {
            true => "is pinned".to_owned(),
            false => format!("is pinned: {reason}"),
        }));
    }
    // By the order of making: a clock that is behind makes every snapshot one of the future, for which no
    // rule counts.
    let newest = choice::matching(folder, &SnapshotChoice::LatestComplete)?;
    let is_newest = newest.contains(&one.name) || one.needed.contains(&KeepReason::LastGood);
    if is_newest && !allow_newest {
        return Err(refused("is the newest complete one of the job".to_owned()));
    }
    Ok(())
}

/// The snapshot of exactly that name, if an interrupted removal has left a part of it.
fn half_removed(folder: &JobFolder, choice: &SnapshotChoice) -> Option<SnapshotName> {
    let name = SnapshotName::parse(choice.name()?).ok()?;
    folder.is_being_removed(name).then_some(name)
}

/// Lets `latest` point to the newest snapshot that stays, if the one that it points to goes.
fn point_latest_elsewhere(run: &RunFolder, going: &[SnapshotName]) -> Result<(), SnapshotError> {
    let goes = |name: &SnapshotName| going.contains(name);
    // After a crash they may differ.
    let (linked, latest) = (run.job.linked(), run.job.latest());
    if !linked.iter().chain(&latest).any(goes) {
        return Ok(());
    }
    let own = run.job.own_folders()?.into_iter().rev();
    let staying: Vec<SnapshotName> = own
        .filter_map(|folder| match folder {
            Folder::Named(name) if !goes(&name) => Some(name),
            _ => None,
        })
        .collect();
    // A greater name than that of the latest one came from a wrong clock.
    let misdated = misdated(&finished_records(&run.job)?);
    let older = staying
        .iter()
        .find(|name| latest.is_none_or(|latest| **name <= latest) && !misdated.contains(name));
    match older.or(staying.first()) {
        Some(next) => run.point_latest(*next).map(|_| ()),
        None => run.forget_latest(),
    }
}
