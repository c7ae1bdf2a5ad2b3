//! The run on a btrfs volume: prepares the subvolume `work`, runs rsync into it, and makes a snapshot of it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::FileType;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{AtFlags, unlinkat};

use super::pull::Pulled;
use super::{Run, copied_nothing};
use crate::adopted;
use crate::automounts::is_clearly_excluded;
use crate::begun;
use crate::cancel::Cancel;
use crate::checkpoint;
use crate::completeness::source_of;
use crate::error::SnapshotError;
use crate::job::{Folder, RunFolder, WORK_PATH, on_volume};
use crate::large_files::{self, UpToDate, Updating};
use crate::long_path::{lstat, size_and_time};
use crate::name::SnapshotName;
use crate::progress::{Phase, Progress};
use crate::pulled::Host;
use crate::pulled_source::{PulledSource, host_folder};
use crate::recent::{self, Recent};
use crate::record::{RunRecord, Warning};
use crate::rsync::{Ended, ITEMS_MAX, Outcome};
use crate::scout;
use crate::spec::SnapshotReport;
use crate::subvolume_ops::Subvolumes;
use crate::suspects::Suspects;
use crate::text::{escape_path, unescape_path};
use crate::unresponsive;
use crate::walk::open_folder_at;
use crate::work::{self, Work};

/// Reads which files of `work` must be compared by content, of runs that have no snapshot: they were interrupted, or their
/// snapshot was removed. The list of an interrupted one may be missing.
pub(super) fn read_recent_in_work(
    folder: &RunFolder,
    recent: &mut Recent,
) -> Result<(), SnapshotError> {
    if let Some(name) = work::interrupted(&folder.job) {
        let tree = folder.job.path.join(WORK_PATH);
        let tree = open_folder_at(&tree).map_err(on_volume("open", &WORK_PATH))?;
        recent::list_again(&folder.state, name, &tree).map_err(on_volume("list", &WORK_PATH))?;
    }
    for name in work::unfinished(folder)? {
        recent.read(&folder.state, name);
    }
    let is_begun = |path: &PathBuf| begun::is_file_name(path.as_os_str());
    recent.paths.retain(|path| !is_begun(path));
    Ok(())
}

impl Run<'_> {
    pub(super) fn carry_out_in_work(
        &mut self,
        subvolumes: &dyn Subvolumes,
        mut warnings: Vec<Warning>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<SnapshotReport, SnapshotError> {
        let folder = Folder::Work(self.name);
        let tree = self.folder.job.path.join(WORK_PATH);
        let hosts = self.sources.pulled.hosts.iter().map(Host::folder).collect();
        let work = Work::new(&self.folder, subvolumes, hosts);
        self.refuse_sources_at_hosts()?;
        work.go_on_with_deletions()?;
        let interrupted = work::interrupted(&self.folder.job);
        let unfinished = work::unfinished(&self.folder)?;
        let began = Instant::now();
        let suspects = self.spec.suspects.as_deref().map(Suspects::load);
        let suspects = suspects.unwrap_or_default();
        work.begin(self.name, self.last(), &suspects, cancel)?;
        work::forget_held(&self.folder, subvolumes, &self.spec.pulled)?;
        if interrupted.is_some() {
            // No snapshot has what the interrupted run pulled from them.
            for host in self.hosts_away() {
                work.hold_back(&host, cancel)?;
            }
        }
        let (taken, large, entries) = self.prepare(&work, &suspects, progress, cancel)?;
        for taken_from in taken {
            self.recent.read(&self.folder.state, taken_from);
        }
        // They were compared with their source.
        let recent = &mut self.recent.paths;
        recent.retain(|path| !large.has(&Path::new("/").join(path)));
        let mut invocation = self.invocation(folder);
        large.leave_alone(&mut invocation);
        let need = checkpoint::Need::ForLargeFiles;
        let (begun, checkpoints) = self.begin_checkpoints(folder, checkpoint::INTERVAL, need)?;
        // The preparation has left everything in the kernel's caches, unless the tree is too large for them.
        let scout = match entries > scout::entries_in_memory() {
            true => self.scout(),
            false => None,
        };
        let mut followed = |now: Progress| {
            if let Some(scout) = &scout {
                scout.follow(now.files_done);
            }
            progress(now.expecting(self.disks.files_before));
        };
        let outcome = self.copy(&mut invocation, folder, &begun, &mut followed, cancel);
        drop(scout);
        let (mut outcome, plan) =
            outcome.and_then(|outcome| self.read_again(outcome, folder, progress, cancel))?;
        large.add_to(&mut outcome);
        let dropped = self.drop_unread(&work, &outcome, &tree, progress, cancel);
        let pulled = match dropped.is_ok() {
            true => self.pull_all(&mut outcome, folder, Some(&work), progress, cancel)?,
            false => Pulled::default(),
        };
        self.keep_recent_of_held(&work, &mut outcome);
        if let Err(error) = checkpoints.end() {
            work.distrust();
            return Err(self.sync_failed(error));
        }
        progress(Progress {
            phase: Phase::Syncing,
            ..outcome.progress
        });
        warnings.extend(outcome.warnings.iter().cloned());
        warnings.extend(self.unchanged_copied(&outcome, &tree));
        let mut record = self.record(&invocation, &outcome, warnings);
        plan.add_to_record(&mut record);
        pulled.add_to_record(&mut record);
        record.ended = self
            .started
            .checked_add(began.elapsed())
            .unwrap_or(self.started);
        let checked = dropped.and_then(|()| self.check_outcome(&outcome, folder));
        if let Err(stopped) = checked {
            if matches!(stopped, SnapshotError::VolumeFull { .. }) {
                // Its space is needed, also for pruning.
                begun.withdraw();
            }
            self.sync_or_distrust(&work)?;
            begun.stopped();
            let _ = self.note_recent(&outcome);
            record.finished_run = false;
            record.complete = false;
            record.stopped_by = Some(stopped.to_string());
            let work_list = Some((subvolumes, &large));
            self.list_interrupted(folder, &stopped, work_list, cancel, &mut record);
            // A full volume may have no space for the record. The tree matters more.
            let _ = self.folder.write_record(&record);
            self.sync()?;
            // The next run goes on in `work`, which has what they describe.
            large.keep_indexes(&self.folder, self.spec);
            return Err(stopped);
        }
        self.made(&outcome, folder).check(&mut record)?;
        let wrote = self.place_staged(&tree, &mut record)?;
        self.note_recent(&outcome)?;
        // Before the list: these names are not in the snapshot, and each changes the time of its file.
        begun.forget_all(&self.folder);
        let work_list = Some((subvolumes, &large));
        self.list_changes(folder, work_list, progress, cancel, &mut record);
        checkpoint::forget(&self.folder.state, self.name);
        if wrote || !copied_nothing(&outcome) {
            self.sync_or_distrust(&work)?;
        }
        for before in interrupted.into_iter().chain(unfinished) {
            self.folder.forget_record_of(before);
        }
        let report = self.finish_in_work(&work, record, progress)?;
        large.keep_indexes(&self.folder, self.spec);
        Ok(report)
    }

    /// Makes the tree one from which rsync makes an exact copy. Returns the snapshots that parts of it were taken
    /// from, the large files that need no rsync, and how many entries the tree has.
    fn prepare(
        &self,
        work: &Work<'_>,
        suspects: &Suspects,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(BTreeSet<SnapshotName>, UpToDate, u64), SnapshotError> {
        let left = large_files::recover(&self.folder, self.spec)?;
        let sources: Vec<PathBuf> = self
            .sources
            .list
            .iter()
            .map(|source| source.path.clone())
            .collect();
        let pulled = self.sources.pulled.hosts.iter();
        let pulled: Vec<&PulledSource> = pulled.flat_map(|host| &host.sources).collect();
        let hosts = self.sources.pulled.hosts.iter();
        for host in hosts.clone() {
            work.take_back_held(&host.folder(), suspects, cancel)?;
        }
        let places = pulled
            .iter()
            .map(|source| Path::new("/").join(source.place()));
        let all: Vec<PathBuf> = sources.iter().cloned().chain(places.clone()).collect();
        work.keep_only(&all, cancel)?;
        let before = self.newest_record();
        let unread = before.iter().flat_map(|(_, record)| &record.unread.names);
        let unread = unread.map(|name| unescape_path(name));
        let (of_hosts, unread): (Vec<PathBuf>, Vec<PathBuf>) =
            unread.partition(|path| places.clone().any(|place| path.starts_with(place)));
        let mounts = self.sources.mounts.iter().map(|mount| mount.path.clone());
        let mut wanted: Vec<PathBuf> = sources.iter().cloned().chain(mounts).collect();
        wanted.extend(unread);
        wanted.extend(left.lacking.clone());
        wanted.retain(|path| sources.iter().any(|source| path.starts_with(source)));
        let mut taken = BTreeSet::new();
        let live: BTreeMap<PathBuf, FileType> = unresponsive::ask(progress, cancel, move || {
            let live = wanted.into_iter().filter_map(|path| {
                let kind = lstat(&path).ok()?.file_type();
                Some((path, kind))
            });
            live.collect()
        })?;
        let mut wanted: Vec<PathBuf> = live.keys().cloned().collect();
        for source in pulled {
            work.take_back_pulled(source, suspects, &mut taken, cancel)?;
        }
        wanted.extend(of_hosts);
        let back = work.take_back(&wanted, &live, suspects, &mut taken, cancel)?;
        // Not always from the latest one: a newer name may come from a clock that ran ahead.
        let lacking_from = left.lacking.as_ref().and_then(|lacking| {
            let (_, name) = back.iter().rfind(|(path, _)| lacking.starts_with(path))?;
            Some(self.folder.job.path.join(name.to_string()))
        });
        for source in &sources {
            let known = |record: &RunRecord| work::covers(&record.sources, source);
            if before.as_ref().is_some_and(|(_, record)| !known(record)) {
                work.take_back_source(source, suspects, &mut taken, cancel)?;
            }
        }
        if self.last().is_none() {
            self.take_from_copy(work, suspects, cancel)?;
        }
        self.empty_mount_points(work, progress, cancel)?;
        progress(Progress::begin(Phase::Recovering));
        let (large, entries) = work.separate_links(suspects, progress, cancel)?;
        if cancel.is_cancelled() {
            return Err(SnapshotError::Cancelled);
        }
        let updating = Updating {
            rsync: &self.rsync,
            folder: &self.folder,
            spec: self.spec,
            sources: &self.sources,
            name: self.name,
            lacking_from,
            left: RefCell::new(left),
            recent_from_s: recent::from_s(self.started),
        };
        let must_compare = |path: &Path| self.recent.paths.iter().any(|recent| recent == path);
        let large = updating.carry_out(&large, &must_compare, progress, cancel)?;
        Ok((taken, large, entries))
    }

    /// Refuses a source here whose place in the snapshot is that of a host.
    fn refuse_sources_at_hosts(&self) -> Result<(), SnapshotError> {
        for host in &self.sources.pulled.hosts {
            let place = Path::new("/").join(host.folder());
            let mut sources = self.sources.list.iter();
            let is_here = sources
                .any(|source| place.starts_with(&source.path) || source.path.starts_with(&place));
            if is_here && lstat(&place).is_ok() && !is_clearly_excluded(self.spec, &place) {
                return Err(host.refuse_place());
            }
        }
        Ok(())
    }

    /// The folders of the job's hosts that the run does not pull from.
    fn hosts_away(&self) -> BTreeSet<PathBuf> {
        let all = self.spec.pulled.iter();
        let mut folders: BTreeSet<PathBuf> = all.map(|source| host_folder(&source.host)).collect();
        for host in &self.sources.pulled.hosts {
            folders.remove(&host.folder());
        }
        folders
    }

    /// No run has compared the recent files of a host whose tree waits for its next run.
    fn keep_recent_of_held(&self, work: &Work<'_>, outcome: &mut Outcome) {
        let hosts = self.spec.pulled.iter();
        let hosts: BTreeSet<PathBuf> = hosts.map(|source| host_folder(&source.host)).collect();
        for host in hosts.iter().filter(|host| work.is_held(host)) {
            let paths = self.recent.paths.iter();
            for path in paths.filter(|path| path.starts_with(host)) {
                outcome.recent.push_within(escape_path(path), ITEMS_MAX);
            }
            // A list that lacks some means all files.
            outcome.recent.count += u64::from(self.recent.all);
        }
    }

    /// Removes what is below a mount point that the job does not enter: rsync leaves it as an earlier run saved it.
    fn empty_mount_points(
        &self,
        work: &Work<'_>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        if !self.spec.one_file_system {
            return Ok(());
        }
        let sources = self.sources.list.iter();
        let sources: Vec<PathBuf> = sources.map(|source| source.path.clone()).collect();
        work.empty_mount_points(&sources, progress, cancel)
    }

    /// A first run begins with an adopted copy, if there is one.
    fn take_from_copy(
        &self,
        work: &Work<'_>,
        suspects: &Suspects,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let found = adopted::to_link_from(self.volume_root, &self.spec.job, &self.sources)?;
        match found {
            Some((copy, source)) => {
                work.take_from(&self.volume_root.join(copy), &source, suspects, cancel)
            }
            None => Ok(()),
        }
    }

    /// Removes the files that rsync could not read, those that vanished, and those below a new mount point: the
    /// tree has them with their older content.
    fn drop_unread(
        &self,
        work: &Work<'_>,
        outcome: &Outcome,
        tree: &Path,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        if !matches!(outcome.ended, Ended::Whole | Ended::WithUnread) {
            return Ok(());
        }
        for list in [&outcome.unread, &outcome.unwritten] {
            if list.count > list.names.len() as u64 {
                return Err(SnapshotError::RsyncFailed {
                    ended: format!("{} files could not be copied", list.count),
                    first_message: list.names.first().cloned().unwrap_or_default(),
                    messages: outcome.messages.clone(),
                });
            }
        }
        let names = outcome.unread.names.iter().chain(&outcome.vanished.names);
        let mut paths: Vec<PathBuf> = names.map(|name| unescape_path(name)).collect();
        let unwritten = outcome
            .unwritten
            .names
            .iter()
            .map(|name| unescape_path(name));
        paths.extend(unwritten.map(|path| source_of(tree, &path)).filter(|path| {
            let both = (lstat(path), lstat(&work.in_tree(path)));
            !matches!(both, (Ok(source), Ok(kept))
                if size_and_time(&source) == size_and_time(&kept))
        }));
        work.drop_files(&paths)?;
        if outcome.vanished.count > outcome.vanished.names.len() as u64 {
            work.drop_vanished(cancel)?;
        }
        self.empty_mount_points(work, progress, cancel)
    }

    /// A write that failed is reported here, and only once. Then the tree has files with the right size and
    /// time and wrong content.
    fn sync_or_distrust(&self, work: &Work<'_>) -> Result<(), SnapshotError> {
        let synced = self.sync();
        if synced.is_err() {
            work.distrust();
        }
        synced
    }

    /// Writes the record and `latest`. The snapshot comes last: its commit makes all of it durable.
    fn finish_in_work(
        &self,
        work: &Work<'_>,
        mut record: RunRecord,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<SnapshotReport, SnapshotError> {
        progress(Progress::begin(Phase::Naming));
        self.folder.write_record(&record)?;
        match self.folder.point_latest(self.name) {
            Ok(true) => {}
            Ok(false) => record.warnings.push(Warning::LatestLeftAlone),
            Err(e) => record.warnings.push(Warning::LatestNotMoved {
                reason: e.to_string(),
            }),
        }
        if let Err(error) = work.becomes(self.name) {
            self.undo_name(self.name);
            return Err(error);
        }
        Ok(self.report(record))
    }

    /// There is no snapshot of that name. Best effort: without this the next run puts `latest` right.
    fn undo_name(&self, name: SnapshotName) {
        let _ = match self.last() {
            Some(last) => self.folder.point_latest(last.name()).map(drop),
            None => self.folder.forget_latest(),
        };
        let record = format!("{name}.json");
        let _ = unlinkat(&self.folder.state, record, AtFlags::empty());
    }
}
