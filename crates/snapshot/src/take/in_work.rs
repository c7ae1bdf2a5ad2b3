//! The run on a btrfs volume: prepares the subvolume `work`, runs rsync into it, and makes a snapshot of it.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{AtFlags, unlinkat};

use super::{Run, copied_nothing};
use crate::adopted;
use crate::cancel::Cancel;
use crate::completeness::source_of;
use crate::error::SnapshotError;
use crate::job::{Folder, RunFolder, WORK_PATH, on_volume};
use crate::long_path::{lstat, size_and_time};
use crate::name::SnapshotName;
use crate::progress::{Phase, Progress};
use crate::recent::{self, Recent};
use crate::record::{RunRecord, Warning};
use crate::reflink;
use crate::rsync::{Ended, Outcome};
use crate::spec::SnapshotReport;
use crate::subvolume_ops::Subvolumes;
use crate::suspects::Suspects;
use crate::text::unescape_path;
use crate::walk::open_folder_at;
use crate::work::{self, Work};

/// Reads which files of an interrupted run must be compared by content. Its own list may be missing.
pub(super) fn read_recent_of_interrupted(
    folder: &RunFolder,
    recent: &mut Recent,
) -> Result<(), SnapshotError> {
    let Some(name) = work::interrupted(&folder.job) else {
        return Ok(());
    };
    let tree =
        open_folder_at(&folder.job.path.join(WORK_PATH)).map_err(on_volume("open", &WORK_PATH))?;
    recent::list_again(&folder.state, name, &tree).map_err(on_volume("list", &WORK_PATH))?;
    recent.read(&folder.state, name);
    Ok(())
}

impl Run<'_> {
    pub(super) fn carry_out_in_work(
        &self,
        subvolumes: &dyn Subvolumes,
        mut warnings: Vec<Warning>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<SnapshotReport, SnapshotError> {
        let folder = Folder::Work(self.name);
        let tree = self.folder.job.path.join(WORK_PATH);
        let work = Work::new(&self.folder, subvolumes);
        work.go_on_with_deletions()?;
        let interrupted = work::interrupted(&self.folder.job);
        let began = Instant::now();
        work.begin(self.name, self.last(), cancel)?;
        self.prepare(&work, progress, cancel)?;
        let invocation = self.invocation(folder);
        let scout = self.scout();
        let mut followed = |now: Progress| {
            if let Some(scout) = &scout {
                scout.follow(now.files_done);
            }
            progress(now.expecting(self.disks.files_before));
        };
        let outcome = match self.sources.list.is_empty() {
            true => Ok(Outcome::default()),
            false => self.attempt(&invocation, folder, None, &mut followed, cancel),
        };
        drop(scout);
        let (outcome, plan) =
            outcome.and_then(|outcome| self.read_again(outcome, folder, progress, cancel))?;
        progress(Progress {
            phase: Phase::Syncing,
            ..outcome.progress
        });
        warnings.extend(outcome.warnings.iter().cloned());
        warnings.extend(self.unchanged_copied(&outcome, &tree));
        let mut record = self.record(&invocation, &outcome, warnings);
        plan.add_to_record(&mut record);
        record.ended = self
            .started
            .checked_add(began.elapsed())
            .unwrap_or(self.started);
        let checked = self
            .drop_unread(&work, &outcome, &tree, cancel)
            .and_then(|()| self.check_outcome(&outcome, folder));
        if let Err(stopped) = checked {
            self.sync_or_distrust(&work)?;
            let _ = self.note_recent(&outcome);
            record.finished_run = false;
            record.complete = false;
            record.stopped_by = Some(stopped.to_string());
            // A full volume may have no space for the record. The tree matters more.
            let _ = self.folder.write_record(&record);
            self.sync()?;
            return Err(stopped);
        }
        self.made(&outcome, folder).check(&mut record)?;
        let wrote = self.place_staged(&tree, &mut record)?;
        self.note_recent(&outcome)?;
        if wrote || !copied_nothing(&outcome) {
            self.sync_or_distrust(&work)?;
        }
        if let Some(before) = interrupted {
            self.folder.forget_record_of(before);
        }
        self.finish_in_work(&work, record, progress)
    }

    /// The snapshot that was made last.
    fn last(&self) -> Option<Folder> {
        let mut linked = self.linked_from.iter().map(|(folder, _)| *folder);
        linked.find(|folder| matches!(folder, Folder::Named(_)))
    }

    /// Makes the tree one from which rsync makes an exact copy.
    fn prepare(
        &self,
        work: &Work<'_>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let sources: Vec<PathBuf> = self
            .sources
            .list
            .iter()
            .map(|source| source.path.clone())
            .collect();
        work.keep_only(&sources, cancel)?;
        let suspects = self.spec.suspects.as_deref().map(Suspects::load);
        let before = self.newest_record();
        let unread = before.iter().flat_map(|(_, record)| &record.unread.names);
        let mounts = self.sources.mounts.iter().map(|mount| mount.path.clone());
        let mut wanted: Vec<PathBuf> = sources.iter().cloned().chain(mounts).collect();
        wanted.extend(unread.map(|name| unescape_path(name)));
        wanted.retain(|path| sources.iter().any(|source| path.starts_with(source)));
        let suspects = suspects.unwrap_or_default();
        work.take_back(&wanted, &suspects, cancel)?;
        for source in &sources {
            let known = |record: &RunRecord| work::covers(&record.sources, source);
            if before.as_ref().is_some_and(|(_, record)| !known(record)) {
                work.take_back_source(source, &suspects, cancel)?;
            }
        }
        if self.last().is_none() {
            self.take_from_copy(work, cancel)?;
        }
        let scout = self.scout();
        let mut walked = |entries| {
            if let Some(scout) = &scout {
                scout.follow(entries);
            }
        };
        progress(Progress::begin(Phase::Recovering));
        work.separate_links(&mut walked, cancel)?;
        match cancel.is_cancelled() {
            true => Err(SnapshotError::Cancelled),
            false => Ok(()),
        }
    }

    /// A first run begins with an adopted copy, if there is one.
    fn take_from_copy(&self, work: &Work<'_>, cancel: &Cancel) -> Result<(), SnapshotError> {
        let found = adopted::to_link_from(self.volume_root, &self.spec.job, &self.sources)?;
        let Some((copy, source)) = found else {
            return Ok(());
        };
        let to = work.in_tree(&source);
        let taken = std::fs::create_dir_all(&to)
            .and_then(|()| reflink::tree(&self.volume_root.join(copy), &to, &|_| true, cancel));
        taken
            .map(drop)
            .map_err(on_volume("take from a copy", &WORK_PATH))
    }

    /// Removes the files that rsync could not read, and those that vanished: the tree has them with their
    /// older content.
    fn drop_unread(
        &self,
        work: &Work<'_>,
        outcome: &Outcome,
        tree: &Path,
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
        Ok(())
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
