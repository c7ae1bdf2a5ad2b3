//! Takes a snapshot: recovers what an earlier run left, runs rsync, and gives the result its name.

mod acl_repair;
mod again;
mod arguments;
mod count;
mod in_work;
mod judge;
mod linked_copy;
mod list_changes;
mod new_record;
mod pull;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::aside::Aside;
use crate::attempts::{Attempts, InPlace};
use crate::automounts;
use crate::begun::Begun;
use crate::census::FileList;
use crate::checkpoint::{self, Checkpoints};
use crate::disks::Disks;
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, RunFolder, WORK_PATH};
use crate::name::{SnapshotName, choose_name};
use crate::name_list::NameList;
use crate::recent::{self, Recent};
use crate::record::{EntryKind, RunRecord, Warning};

use crate::cancel::Cancel;
use crate::completeness::{Made, source_of};
use crate::progress::{Phase, Progress};
use crate::pulled::{self, Reached};
use crate::rsync::{Ended, Guard, Invocation, Outcome, Rsync, volume_full_or};
use crate::scout::Scout;
use crate::source_scan;
use crate::sources::{self, Sources};
use crate::spec::{SnapshotReport, SnapshotSpec};
use crate::staged::Placing;
use crate::subvolume_ops::Subvolumes;
use crate::suspects::Suspects;
use crate::text::escape_path;
use crate::unfit::{self, Unfit};
use crate::unlinked;
use crate::unresponsive;
use crate::work;
pub use count::count;
use count::{counted, disks_of};
use linked_copy::LinkedCopy;

/// rsync does not report the mounts of a host. In `work`, files from before the mount would stay below a mount point.
const NO_MOUNTS_OF_HOSTS: &str = "one_file_system does not work for other hosts in a container with btrfs. Use patterns in exclude";

/// Takes a snapshot of `spec.sources` into the job's folder on the volume that is mounted at
/// `volume_root`.
///
/// If it returns `Ok`, the snapshot is complete (or, with `record.complete` false, lacks only source
/// files that could not be read), has its name, and was passed to the volume by `syncfs`. The caller
/// must not report success before the volume's durable flush. If it returns an error, no snapshot was
/// made, older snapshots are complete, and what was copied is kept for the next run.
///
/// The snapshot is named after `now`, the start of the run.
pub fn take(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<SnapshotReport, SnapshotError> {
    let how = How::Linked(checkpoint::INTERVAL);
    take_as(volume_root, spec, now, progress, cancel, how)
}

/// [`take`] on a btrfs volume: rsync writes into the subvolume `work` of the job, and the snapshot is a
/// read-only snapshot of it. When this returns `Ok`, the snapshot is committed.
pub fn take_into_subvolume(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    subvolumes: &dyn Subvolumes,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<SnapshotReport, SnapshotError> {
    let how = How::InWork(subvolumes);
    take_as(volume_root, spec, now, progress, cancel, how)
}

/// How the tree of a run is made.
#[derive(Clone, Copy)]
enum How<'a> {
    /// A new tree, which links to older ones. Checkpoints of it are made so often.
    Linked(Duration),
    /// The subvolume `work`.
    InWork(&'a dyn Subvolumes),
}

/// [`take`], in this way.
fn take_as(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
    how: How<'_>,
) -> Result<SnapshotReport, SnapshotError> {
    let mut take = || {
        let taken = take_or_fail(volume_root, spec, now, progress, cancel, how);
        taken.map_err(|error| volume_full_or(error, volume_root))
    };
    match (take(), how) {
        (Err(full @ SnapshotError::VolumeFull { .. }), How::InWork(subvolumes)) => {
            match work::make_space(volume_root, spec, subvolumes, cancel) {
                Ok(true) => take(),
                _ => Err(full),
            }
        }
        (taken, _) => taken,
    }
}

fn take_or_fail(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
    how: How<'_>,
) -> Result<SnapshotReport, SnapshotError> {
    let in_work = matches!(how, How::InWork(_));
    progress(Progress::begin(Phase::Checking));
    let has = |path: &PathBuf| spec.staged.iter().any(|file| file.path == *path);
    if let Some(path) = spec.required.iter().find(|path| !has(path)) {
        return Err(SnapshotError::StagedMissing {
            path: escape_path(path),
        });
    }
    let rsync = Rsync::find(&spec.rsync)?;
    let pulled = match in_work && spec.one_file_system {
        true => Reached::refused(spec, NO_MOUNTS_OF_HOSTS),
        false => pulled::reach(&rsync, spec, volume_root, progress, cancel)?,
    };
    let mut sources = {
        let (spec, volume_root) = (spec.clone(), volume_root.to_owned());
        let check = move || Sources::check_beside(&spec, &volume_root, pulled);
        unresponsive::ask(progress, cancel, check)??
    };
    let folder = JobFolder::open_for_run(volume_root, &spec.job)?;
    // Opened before the first write: syncfs reports errors that occurred since then.
    let sync = File::open(&folder.job.path).map_err(|source| SnapshotError::Volume {
        op: "open",
        object: spec.job.to_string(),
        source,
    })?;
    progress(Progress::begin(Phase::Recovering));
    let mut warnings = sources.warnings.clone();
    warnings.extend(folder.recover(!spec.staged.is_empty(), cancel)?);
    if cancel.is_cancelled() {
        return Err(SnapshotError::Cancelled);
    }
    if let Some(asked) = &spec.census {
        // The snapshot of an earlier one may not be durable.
        FileList::forget_new(&asked.list);
    }
    let at = &folder.job.path;
    source_scan::apply(&rsync, &mut sources, spec, at, progress, cancel)?;
    let chosen = choose_name(now, &folder.taken()?);
    warnings.extend(
        chosen
            .clock_behind
            .map(|newest| Warning::ClockBehind { newest }),
    );
    let linked_from = folder.link_sources(chosen.name)?;
    let disks = disks_of(&folder.job, &sources, spec, now)?;
    sources::forget_known_automounts(&mut warnings, &disks);
    let census = counted(&mut sources, &disks, spec)?;
    let mut recent = Recent::default();
    for (linked, _) in &linked_from {
        recent.read(&folder.state, linked.name());
    }
    if in_work {
        in_work::read_recent_in_work(&folder, &mut recent)?;
    }
    let first = !linked_from
        .iter()
        .any(|(folder, _)| matches!(folder, Folder::Named(_)));
    // Only a first run links from an adopted copy.
    let copy = match first && !in_work {
        true => LinkedCopy::find(volume_root, spec, &folder, &sources)?,
        false => None,
    };
    let mut run = Run {
        spec,
        name: chosen.name,
        started: now,
        volume_root,
        linked_from,
        recent,
        copy,
        folder,
        sync,
        rsync,
        sources,
        disks,
        in_work,
    };
    let mut report = match how {
        How::Linked(every) => run.carry_out(warnings, progress, cancel, every),
        How::InWork(by) => run.carry_out_in_work(by, warnings, progress, cancel),
    }?;
    if let (Some((census, list)), Some(asked)) = (census, &spec.census) {
        // Without it the next run counts nothing.
        if let Err(error) = list.write_new(&asked.list) {
            tracing::warn!(%error, "the list of the snapshot's files can't be kept");
            FileList::forget_new(&asked.list);
        }
        report.census = Some(census);
    }
    Ok(report)
}

struct Run<'a> {
    spec: &'a SnapshotSpec,
    name: SnapshotName,
    started: Timestamp,
    volume_root: &'a Path,
    linked_from: Vec<(Folder, EntryKind)>,
    /// Files to compare with their source.
    recent: Recent,
    copy: Option<LinkedCopy>,
    folder: RunFolder,
    /// For `syncfs`.
    sync: File,
    rsync: Rsync,
    sources: Sources,
    disks: Disks,
    /// The tree is the subvolume `work`.
    in_work: bool,
}

impl Run<'_> {
    fn carry_out(
        &self,
        mut warnings: Vec<Warning>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
        checkpoint_every: Duration,
    ) -> Result<SnapshotReport, SnapshotError> {
        let inflight = self.folder.make_inflight(self.name)?;
        let began = std::time::Instant::now();
        let need = checkpoint::Need::ForAll;
        let (begun, checkpoints) = self.begin_checkpoints(inflight, checkpoint_every, need)?;
        let mut invocation = self.invocation(inflight);
        // With `--checksum` rsync reads the older files anyway, and verifies what it copies.
        let tree = self.folder.job.path.join(inflight.to_string());
        let guard = (!self.recent.all && !self.spec.checksum)
            .then(|| Guard::begin(self.volume_root, &tree))
            .flatten();
        invocation.guarded = guard.is_some();
        // Only a symbolic link on the volume leads rsync to an adopted copy.
        invocation.no_links_on = self.copy.is_none().then(|| self.volume_root.to_owned());
        let newest = self.linked_from.first().map(|(folder, _)| *folder);
        let unfit = Unfit::find(
            &self.folder.job,
            newest,
            &self.sources,
            self.spec,
            progress,
            cancel,
        )?;
        unfit.leave_out_of(&mut invocation);
        let scout = self.scout();
        let mut followed = |now: Progress| {
            if let Some(scout) = &scout {
                scout.follow(now.files_done);
            }
            progress(now.expecting(self.disks.files_before));
        };
        let outcome = self.copy(&mut invocation, inflight, &begun, &mut followed, cancel);
        drop(scout);
        drop(guard);
        if self.copy.is_some() {
            self.folder.forget_link_to_copy(&Cancel::new());
        }
        let outcome = outcome.and_then(|mut outcome| {
            unfit.link(&self.folder.job, &tree, &mut outcome);
            unfit::report_times(&tree, &mut outcome);
            let (mut outcome, plan) = self.read_again(outcome, inflight, progress, cancel)?;
            let pulled = self.pull_all(&mut outcome, inflight, None, progress, cancel)?;
            Ok((outcome, plan, pulled))
        });
        let checkpointed = checkpoints.end();
        let (outcome, plan, pulled) = match outcome {
            Ok(outcome) => outcome,
            Err(e) => {
                if checkpointed.is_ok() {
                    self.keep_inflight();
                }
                return Err(e);
            }
        };
        progress(Progress {
            phase: Phase::Syncing,
            ..outcome.progress
        });
        warnings.extend(outcome.warnings.iter().cloned());
        warnings.extend(self.unchanged_copied(&outcome, &tree));
        let mut record = self.record(&invocation, &outcome, warnings);
        plan.add_to_record(&mut record);
        pulled.add_to_record(&mut record);
        // Measured on the monotonic clock, so that the end is never before the start.
        record.ended = self
            .started
            .checked_add(began.elapsed())
            .unwrap_or(self.started);
        let synced = checkpointed.map_err(|source| self.sync_failed(source));
        match self.check_outcome(&outcome, inflight) {
            Ok(()) => {
                self.made(&outcome, inflight).check(&mut record)?;
                let wrote = self.place_staged(&tree, &mut record)?;
                self.note_recent(&outcome)?;
                self.list_changes(inflight, None, progress, cancel, &mut record);
                begun.forget_all(&self.folder);
                // The record is written before the snapshot gets its name, so that every finished
                // snapshot has one. One sync makes the record and the tree durable.
                self.folder.write_record(&record)?;
                // After a failed sync `.inflight` stays, and nothing in it is trusted.
                synced?;
                if wrote || !copied_nothing(&outcome) {
                    self.sync()?;
                }
                self.finish(record, progress, cancel)
            }
            Err(stopped) => {
                if matches!(stopped, SnapshotError::VolumeFull { .. }) {
                    // Its space is needed, also for pruning.
                    begun.withdraw();
                }
                synced.and_then(|()| self.sync())?;
                begun.stopped();
                let _ = self.note_recent(&outcome);
                self.keep_partial(record, &stopped, cancel)?;
                Err(stopped)
            }
        }
    }

    fn begin_checkpoints(
        &self,
        inflight: Folder,
        every: Duration,
        need: checkpoint::Need,
    ) -> Result<(Arc<Begun>, Checkpoints), SnapshotError> {
        let begun = Begun::new(&self.folder, inflight, self.started);
        let begun = Arc::new(begun.map_err(|source| SnapshotError::Volume {
            op: "open",
            object: inflight.to_string(),
            source,
        })?);
        let checkpoints = Checkpoints::begin(
            &self.folder.state,
            self.name,
            every,
            Some(Arc::clone(&begun)),
            need,
        )
        .map_err(|source| SnapshotError::System {
            op: "start a thread",
            source,
        })?;
        Ok((begun, checkpoints))
    }

    /// Whether rsync copied files that it should have linked. Not checked after further attempts or a
    /// comparison by content, which copy for reasons of their own.
    fn unchanged_copied(&self, outcome: &Outcome, tree: &Path) -> Option<Warning> {
        if outcome.counts_unknown || self.recent.all || self.spec.checksum {
            return None;
        }
        let older = self.linked_from.iter();
        let older = older.map(|(folder, _)| self.folder.job.path.join(folder.to_string()));
        let files = unlinked::count(tree, &older.collect::<Vec<_>>(), &outcome.copied);
        (files > 0).then_some(Warning::UnchangedCopied { files })
    }

    /// Starts a scout for the trees that rsync compares the sources with.
    fn scout(&self) -> Option<Scout> {
        let root = crate::walk::open_folder_at(&self.folder.job.path).ok()?;
        let in_tree = |folder: &Folder| {
            let folder = PathBuf::from(folder.to_string());
            let below = |path: &Path| folder.join(path.strip_prefix("/").unwrap_or(path));
            let sources = self.sources.list.iter();
            sources
                .map(|source| below(&source.path))
                .collect::<Vec<_>>()
        };
        let linked_from = self.linked_from.iter().map(|(folder, _)| *folder);
        let compared: Vec<Folder> = match self.in_work {
            true => vec![Folder::Work(self.name)],
            false => linked_from.collect(),
        };
        let mut trees: Vec<PathBuf> = compared.iter().flat_map(in_tree).collect();
        let copy = self.copy.iter();
        trees.extend(copy.map(|copy| Path::new("..").join(&copy.copy)));
        (!trees.is_empty()).then(|| Scout::begin(root, trees, None))
    }

    /// Puts the files that come from no source into the tree. Returns whether any of them is new.
    fn place_staged(&self, tree: &Path, record: &mut RunRecord) -> Result<bool, SnapshotError> {
        let before = self.newest_record();
        let suspects = self.spec.suspects.as_deref().map(Suspects::load);
        let placing = Placing {
            folder: &self.folder,
            tree,
            files: &self.spec.staged,
            before: before.as_ref().map(|(folder, record)| (*folder, record)),
            suspects: suspects.unwrap_or_default(),
        };
        let placed = placing.carry_out(&mut record.stats)?;
        record.staged.clone_from(&self.spec.staged);
        record.warnings.extend(placed.warnings);
        Ok(placed.wrote)
    }

    /// The newest snapshot that is linked from: the one that was made last.
    fn last(&self) -> Option<Folder> {
        let mut linked = self.linked_from.iter().map(|(folder, _)| *folder);
        linked.find(|folder| matches!(folder, Folder::Named(_)))
    }

    /// Its record, too.
    fn newest_record(&self) -> Option<(Folder, RunRecord)> {
        let newest = self.last()?;
        Some((newest, self.folder.job.record(newest.name()).ok()?))
    }

    fn made<'m>(&'m self, outcome: &'m Outcome, inflight: Folder) -> Made<'m> {
        Made {
            sources: &self.sources,
            disks: &self.disks,
            outcome,
            tree: self.folder.job.path.join(inflight.to_string()),
        }
    }

    fn sync(&self) -> Result<(), SnapshotError> {
        rustix::fs::syncfs(&self.sync).map_err(|e| self.sync_failed(e.into()))
    }

    fn sync_failed(&self, source: std::io::Error) -> SnapshotError {
        SnapshotError::Volume {
            op: "sync",
            object: self.spec.job.to_string(),
            source,
        }
    }

    /// Gives the tree its name and points `latest` to it. The tree and its record are durable, or become
    /// durable before these changes, in the order of the journal ([`copied_nothing`]). The changes here
    /// become durable in their order, too. One sync at the end makes them durable and reports errors.
    /// Not more syncs: each one costs several of the volume's epochs, which a slow connection sends one
    /// by one.
    fn finish(
        &self,
        mut record: RunRecord,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<SnapshotReport, SnapshotError> {
        progress(Progress::begin(Phase::Naming));
        self.folder
            .inflight_becomes(self.name, Folder::Named(self.name))?;
        // The snapshot has its name. A failure from here on does not remove it.
        match self.folder.point_latest(self.name) {
            Ok(true) => {}
            Ok(false) => record.warnings.push(Warning::LatestLeftAlone),
            Err(e) => record.warnings.push(Warning::LatestNotMoved {
                reason: e.to_string(),
            }),
        }
        checkpoint::forget(&self.folder.state, self.name);
        self.sync()?;
        progress(Progress::begin(Phase::Removing));
        // A failure is treated as below.
        let partials = self.folder.partials().unwrap_or_default();
        for partial in &partials {
            // The snapshot is finished. What can't be removed now is removed by the next run.
            if let Err(e) = self.folder.remove(*partial, cancel) {
                record.warnings.push(Warning::LeftoverKept {
                    folder: partial.to_string(),
                    reason: e.to_string(),
                });
            }
        }
        if !partials.is_empty()
            && let Err(e) = self.sync()
        {
            record.warnings.push(Warning::LeftoverKept {
                folder: partials[0].to_string(),
                reason: e.to_string(),
            });
        }
        Ok(self.report(record))
    }

    /// The report of a snapshot that is finished.
    fn report(&self, record: RunRecord) -> SnapshotReport {
        let folders = self.folder.job.own_folders().ok();
        let finished = |folder: &&Folder| matches!(folder, Folder::Named(_));
        SnapshotReport {
            name: self.name,
            record,
            snapshots: folders.map(|all| all.iter().filter(finished).count() as u64),
            census: None,
        }
    }

    /// Keeps an interrupted tree for the next run. Its content is durable.
    fn keep_partial(
        &self,
        mut record: RunRecord,
        stopped: &SnapshotError,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        record.finished_run = false;
        record.complete = false;
        record.stopped_by = Some(stopped.to_string());
        if !self.remove_if_empty() {
            let inflight = Folder::Inflight(self.name);
            self.list_interrupted(inflight, stopped, None, cancel, &mut record);
            // A full volume may have no space for the record. The tree matters more.
            let _ = self.folder.write_record(&record);
            self.folder
                .inflight_becomes(self.name, Folder::Partial(self.name))?;
        }
        checkpoint::forget(&self.folder.state, self.name);
        self.sync()
    }

    /// Keeps the tree after an error that leaves nothing to record. The next run uses what was copied,
    /// and copies again what can't be made durable now.
    fn keep_inflight(&self) {
        if !self.remove_if_empty() {
            let _ = checkpoint::make(&self.folder.state, self.name);
        }
    }

    /// Removes the tree if nothing was copied. Returns whether it did.
    fn remove_if_empty(&self) -> bool {
        let inflight = Folder::Inflight(self.name).to_string();
        std::fs::remove_dir(self.folder.job.path.join(inflight)).is_ok()
    }

    /// Completes the large files that an interrupted run began, and runs rsync.
    fn copy(
        &self,
        invocation: &mut Invocation,
        inflight: Folder,
        begun: &Begun,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Outcome, SnapshotError> {
        if self.sources.list.is_empty() {
            return Ok(Outcome::default());
        }
        let aside = Aside::new(&self.folder, self.name, &self.sync);
        let aside = (!self.in_work).then_some(&aside);
        let is_wanted = |path: &Path| {
            let mut sources = self.sources.list.iter();
            sources.any(|source| path.starts_with(&source.path))
                && !automounts::is_clearly_excluded(self.spec, path)
        };
        let (before, any) = begun.append_rest(
            &self.folder,
            &self.rsync,
            invocation,
            &is_wanted,
            progress,
            cancel,
        )?;
        if let Some(before) = &before
            && matches!(before.ended, Ended::Cancelled | Ended::Full(_))
        {
            return Ok(before.clone());
        }
        if let Some(aside) = aside.filter(|_| any) {
            aside.begin_again(invocation, &NameList::default(), false)?;
        }
        let mut outcome = self.attempt(invocation, inflight, aside, progress, cancel)?;
        if let Some(before) = before {
            outcome.stats.add_copied(&before.stats);
            outcome.counts_unknown = true;
        }
        Ok(outcome)
    }

    /// Runs rsync into the new tree, and again after a single file made it fail.
    fn attempt(
        &self,
        invocation: &Invocation,
        inflight: Folder,
        aside: Option<&Aside<'_>>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Outcome, SnapshotError> {
        let tree = self.folder.job.path.join(inflight.to_string());
        let attempts = Attempts {
            rsync: &self.rsync,
            tree: &tree,
            source_of: &|path| source_of(&tree, path),
            aside,
            in_place: self.in_work.then(|| self.in_place()),
        };
        attempts.run(invocation, progress, cancel)
    }

    fn in_place(&self) -> InPlace {
        let is_split = |warning: &Warning| matches!(warning, Warning::LinksSplit { .. });
        let before = self.newest_record();
        InPlace {
            path: WORK_PATH,
            was_split: before.is_some_and(|(_, record)| record.warnings.iter().any(is_split)),
        }
    }

    /// Lists the files that the next run must compare by content.
    fn note_recent(&self, outcome: &Outcome) -> Result<(), SnapshotError> {
        recent::write(&self.folder.state, self.name, &outcome.recent).map_err(|source| {
            SnapshotError::Volume {
                op: "write",
                object: format!("{}.recent", self.name),
                source,
            }
        })
    }
}

/// Whether the tree consists only of folders, links and inodes, ACLs included. All of these are in the
/// journal, and after a power cut the journal never has a later change without the earlier ones: if the
/// name exists, the tree does. File content is not in the journal, and needs a sync before the name.
/// Without counts this is unknown, and the answer is no.
fn copied_nothing(outcome: &Outcome) -> bool {
    let stats = &outcome.stats;
    !outcome.counts_unknown
        && stats.files > 0
        && stats.transferred == 0
        && outcome.copied_from_older.is_empty()
}
