//! Takes a snapshot: recovers what an earlier run left, runs rsync, and gives the result its name.

mod again;
mod arguments;

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::aside::Aside;
use crate::attempts::Attempts;
use crate::automounts;
use crate::begun::{self, Begun};
use crate::by_hand;
use crate::checkpoint::{self, Checkpoints};
use crate::disks::{self, Disks};
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, RunFolder};
use crate::name::{SnapshotName, choose_name};
use crate::recent::{self, Recent};
use crate::record::{EntryKind, LinkedFrom, NameList, RECORD_FORMAT, RunRecord, Warning};

use crate::rsync::{Ended, Guard, Invocation, Outcome, Rsync, room_at};
use crate::scout::Scout;
use crate::sources::{self, Source, Sources};
use crate::spec::{Cancel, Phase, Progress, SnapshotReport, SnapshotSpec};
use crate::text::{escape_name, escape_path, unescape_path};
use crate::unfit::Unfit;
use crate::unlinked;
use crate::wholeness::{Made, source_of};

/// Takes a snapshot of `spec.sources` into the job's folder on the volume that is mounted at
/// `volume_root`.
///
/// When it returns `Ok`, the snapshot is whole (or, with `record.complete` false, lacks only source
/// files that could not be read), named, and handed to the volume by `syncfs`; the caller reports
/// success only after the volume's durable flush. When it returns an error, no snapshot was made,
/// older ones are whole, and what was copied is kept for the next run.
///
/// `now` is the run's moment; the snapshot is named after it.
pub fn take(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<SnapshotReport, SnapshotError> {
    take_with(
        volume_root,
        spec,
        now,
        progress,
        cancel,
        checkpoint::INTERVAL,
    )
}

/// [`take`] with a checkpoint every `checkpoint_every`.
pub(crate) fn take_with(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
    checkpoint_every: Duration,
) -> Result<SnapshotReport, SnapshotError> {
    take_or_fail(volume_root, spec, now, progress, cancel, checkpoint_every)
        .map_err(|error| full_if_so(error, volume_root))
}

/// Tells a volume without room from one that fails: our own files, not only rsync's, need room.
fn full_if_so(error: SnapshotError, volume_root: &Path) -> SnapshotError {
    let SnapshotError::Volume { source, .. } = &error else {
        return error;
    };
    let no_room = [rustix::io::Errno::NOSPC, rustix::io::Errno::DQUOT]
        .iter()
        .any(|errno| source.raw_os_error() == Some(errno.raw_os_error()));
    match room_at(volume_root).filter(|_| no_room) {
        Some(full) => SnapshotError::VolumeFull {
            kind: full.kind,
            free_bytes: full.free_bytes,
            free_inodes: full.free_inodes,
            object: None,
        },
        None => error,
    }
}

fn take_or_fail(
    volume_root: &Path,
    spec: &SnapshotSpec,
    now: Timestamp,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
    checkpoint_every: Duration,
) -> Result<SnapshotReport, SnapshotError> {
    progress(Progress::begin(Phase::Checking));
    let rsync = Rsync::find(&spec.rsync)?;
    let sources = Sources::look(spec, volume_root)?;
    let folder = JobFolder::open_for_run(volume_root, &spec.job)?;
    // Opened before the first write: syncfs reports the errors since then.
    let sync = File::open(&folder.job.path).map_err(|source| SnapshotError::Volume {
        op: "open",
        object: spec.job.to_string(),
        source,
    })?;
    progress(Progress::begin(Phase::Recovering));
    let mut warnings = sources.warnings.clone();
    warnings.extend(folder.recover(cancel)?);
    if cancel.is_cancelled() {
        return Err(SnapshotError::Cancelled);
    }
    let chosen = choose_name(now, &folder.taken()?);
    warnings.extend(
        chosen
            .clock_behind
            .map(|newest| Warning::ClockBehind { newest }),
    );
    let linked_from = folder.link_sources(chosen.name)?;
    let list = sources.list.iter().map(|source| source.path.clone());
    let missing = sources.missing.iter().map(|one| unescape_path(one));
    let paths: Vec<PathBuf> = list.chain(missing).collect();
    let held = disks::holders(&folder.job, now)?;
    let disks = Disks::find(&held, &sources.file_systems, &paths, spec);
    sources::forget_known_automounts(&mut warnings, &disks);
    let mut recent = Recent::default();
    for (linked, _) in &linked_from {
        recent.read(&folder.state, linked.name());
    }
    let first = !linked_from
        .iter()
        .any(|(folder, _)| matches!(folder, Folder::Named(_)));
    // Later runs need no look at the volume for one.
    let copy = if first {
        by_hand::to_link_from(volume_root, &spec.job, &sources)?
    } else {
        None
    };
    let copy = match copy {
        Some((copy, source)) => match folder.link_to_copy(&copy, &source) {
            Ok(link_dest) => Some(LinkedCopy { link_dest, copy }),
            // Somebody else's object has the place of the links: all is copied.
            Err(SnapshotError::Volume { source, .. })
                if source.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                None
            }
            Err(error) => return Err(error),
        },
        None => None,
    };
    let run = Run {
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
    };
    run.carry_out(warnings, progress, cancel, checkpoint_every)
}

/// A copy made by hand, from which a first run links.
struct LinkedCopy {
    /// Its path on the volume.
    copy: PathBuf,
    /// Relative to the job's folder: what shows it with its source's path.
    link_dest: PathBuf,
}

struct Run<'a> {
    spec: &'a SnapshotSpec,
    name: SnapshotName,
    started: Timestamp,
    volume_root: &'a Path,
    linked_from: Vec<(Folder, EntryKind)>,
    /// What is to be compared with its source.
    recent: Recent,
    copy: Option<LinkedCopy>,
    folder: RunFolder,
    /// For `syncfs`.
    sync: File,
    rsync: Rsync,
    sources: Sources,
    disks: Disks,
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
        let begun = Begun::new(&self.folder, self.name, self.started);
        let begun = Arc::new(begun.map_err(|source| SnapshotError::Volume {
            op: "open",
            object: inflight.to_string(),
            source,
        })?);
        let checkpoints = Checkpoints::begin(
            &self.folder.state,
            self.name,
            checkpoint_every,
            Some(Arc::clone(&begun)),
        )
        .map_err(|source| SnapshotError::System {
            op: "start a thread",
            source,
        })?;
        let mut invocation = self.invocation(inflight);
        // With `--checksum` rsync has to read the older files, and proves what it copies.
        let tree = self.folder.job.path.join(inflight.to_string());
        let guard = (!self.recent.all && !self.spec.checksum)
            .then(|| Guard::begin(self.volume_root, &tree))
            .flatten();
        invocation.guarded = guard.is_some();
        let newest = self.linked_from.first().map(|(folder, _)| *folder);
        let unfit = Unfit::find(&self.folder.job, newest, &self.sources, self.spec);
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
            self.read_again(outcome, inflight, progress, cancel)
        });
        let checkpointed = checkpoints.end();
        let (outcome, plan) = match outcome {
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
        plan.note_in(&mut record);
        // By the clock that nobody sets, so that it never lies before the start.
        record.ended = self
            .started
            .checked_add(began.elapsed())
            .unwrap_or(self.started);
        let synced = checkpointed.map_err(|source| self.sync_failed(source));
        match self.verdict(&outcome, inflight) {
            Ok(()) => {
                self.made(&outcome, inflight).look_for_gaps(&mut record)?;
                self.note_recent(&outcome)?;
                begun::forget_all(&self.folder);
                // The record comes before the name, so that no finished snapshot is ever without
                // one; one sync makes both it and the tree durable.
                self.folder.write_record(&record)?;
                // A failed sync leaves `.inflight` behind, of which nothing is trusted.
                synced?;
                if !copied_nothing(&outcome) {
                    self.sync()?;
                }
                self.finish(record, progress, cancel)
            }
            Err(stopped) => {
                if matches!(stopped, SnapshotError::VolumeFull { .. }) {
                    // Its room is needed more, also for pruning.
                    begun.withdraw();
                }
                synced.and_then(|()| self.sync())?;
                begun.stopped();
                record.finished_run = false;
                record.complete = false;
                record.stopped_by = Some(stopped.to_string());
                let _ = self.note_recent(&outcome);
                self.keep_partial(&record)?;
                Err(stopped)
            }
        }
    }

    /// Whether rsync copied what it should have linked. Further attempts and comparisons by content have
    /// reasons of their own.
    fn unchanged_copied(&self, outcome: &Outcome, tree: &Path) -> Option<Warning> {
        if outcome.counts_unknown || self.recent.all || self.spec.checksum {
            return None;
        }
        let older = self.linked_from.iter();
        let older = older.map(|(folder, _)| self.folder.job.path.join(folder.to_string()));
        let files = unlinked::count(tree, &older.collect::<Vec<_>>(), &outcome.copied);
        (files > 0).then_some(Warning::UnchangedCopied { files })
    }

    /// Walks ahead of rsync in the trees that it links from.
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
        let mut trees: Vec<PathBuf> = self
            .linked_from
            .iter()
            .flat_map(|(folder, _)| in_tree(folder))
            .collect();
        let copy = self.copy.iter();
        trees.extend(copy.map(|copy| Path::new("..").join(&copy.copy)));
        (!trees.is_empty()).then(|| Scout::begin(root, trees, None))
    }

    fn made<'m>(&'m self, outcome: &'m Outcome, inflight: Folder) -> Made<'m> {
        Made {
            sources: &self.sources,
            disks: &self.disks,
            outcome,
            tree: self.folder.job.path.join(inflight.to_string()),
        }
    }

    /// Whether what rsync made deserves a name.
    fn verdict(&self, outcome: &Outcome, inflight: Folder) -> Result<(), SnapshotError> {
        match &outcome.ended {
            Ended::Whole | Ended::WithUnread => {}
            Ended::Cancelled => return Err(SnapshotError::Cancelled),
            Ended::Full(full) => {
                return Err(SnapshotError::VolumeFull {
                    kind: full.kind,
                    free_bytes: full.free_bytes,
                    free_inodes: full.free_inodes,
                    object: self.made(outcome, inflight).no_room_for(),
                });
            }
            Ended::Because(_) => {
                return Err(SnapshotError::RsyncFailed {
                    ended: "stopped".to_owned(),
                    first_message: outcome.messages.names.first().cloned().unwrap_or_default(),
                    messages: outcome.messages.clone(),
                });
            }
            Ended::InTheWay(folder) => {
                return Err(SnapshotError::RsyncFailed {
                    ended: "stopped".to_owned(),
                    first_message: format!("the folder {folder} is in the way"),
                    messages: outcome.messages.clone(),
                });
            }
            Ended::Failed { ended, message } => {
                // The reason behind the reason, where there is one.
                self.sources.check_again()?;
                return Err(SnapshotError::RsyncFailed {
                    ended: ended.clone(),
                    first_message: message.clone(),
                    messages: outcome.messages.clone(),
                });
            }
        }
        self.sources.check_again()?;
        let tree = self.folder.job.path.join(inflight.to_string());
        let is_there = |source: &Source| {
            let below = source.path.strip_prefix("/").unwrap_or(&source.path);
            crate::long_path::lstat(&tree.join(below)).is_ok()
        };
        // A folder that could not be listed is there, and empty.
        let has_some = |source: &Source| {
            let below = source.path.strip_prefix("/").unwrap_or(&source.path);
            let path = escape_path(&source.path);
            let is_empty =
                || std::fs::read_dir(tree.join(below)).is_ok_and(|mut all| all.next().is_none());
            is_there(source) && !(outcome.unread.names.contains(&path) && is_empty())
        };
        if outcome.ended == Ended::WithUnread && !self.sources.list.iter().any(has_some) {
            // A snapshot of nothing would look like one.
            return Err(SnapshotError::RsyncFailed {
                ended: "nothing was copied".to_owned(),
                first_message: outcome.messages.names.first().cloned().unwrap_or_default(),
                messages: outcome.messages.clone(),
            });
        }
        for source in &self.sources.list {
            let there = is_there(source);
            // One that could not be read is named as that.
            let unread = &outcome.unread;
            let mut names = unread.names.iter().map(|name| unescape_path(name));
            let is_unread = names.any(|name| name.starts_with(&source.path))
                || unread.count > unread.names.len() as u64;
            if !there && !is_unread {
                return Err(SnapshotError::SourceRefused {
                    path: escape_path(&source.path),
                    why: "the job's own patterns leave all of it out".to_owned(),
                });
            }
        }
        Ok(())
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

    /// The tree and its record are durable, or become so in the journal's order before what is done
    /// here ([`copied_nothing`]): names it and points `latest` to it. What is done here
    /// becomes durable in its order, by the journal; one sync at the end makes it so and tells of
    /// errors. Each sync costs several of the volume's epochs, which a slow line carries one by
    /// one.
    fn finish(
        &self,
        mut record: RunRecord,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<SnapshotReport, SnapshotError> {
        progress(Progress::begin(Phase::Naming));
        self.folder
            .inflight_becomes(self.name, Folder::Named(self.name))?;
        // The snapshot has its name: what fails from here on takes nothing of it back.
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
        // As below.
        let partials = self.folder.partials().unwrap_or_default();
        for partial in &partials {
            // The snapshot is made; what can't be removed now is removed by the next run.
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
        Ok(SnapshotReport {
            name: self.name,
            record,
        })
    }

    /// Keeps an interrupted tree for the next run. Its content is durable.
    fn keep_partial(&self, record: &RunRecord) -> Result<(), SnapshotError> {
        if !self.remove_if_empty() {
            // On a full volume there may be no room for it; the tree matters more.
            let _ = self.folder.write_record(record);
            self.folder
                .inflight_becomes(self.name, Folder::Partial(self.name))?;
        }
        checkpoint::forget(&self.folder.state, self.name);
        self.sync()
    }

    /// After an error that leaves nothing to be recorded: the next run takes up what was copied. What can't be
    /// made durable now it copies again.
    fn keep_inflight(&self) {
        if !self.remove_if_empty() {
            let _ = checkpoint::make(&self.folder.state, self.name);
        }
    }

    /// Succeeds only if nothing was copied.
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
        let aside = Aside::new(&self.folder, self.name, &self.sync);
        let is_wanted = |path: &Path| {
            let mut sources = self.sources.list.iter();
            sources.any(|source| path.starts_with(&source.path))
                && !automounts::is_plainly_left_out(self.spec, path)
        };
        let (before, any) = begun.go_on(
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
        if any {
            aside.begin_again(invocation, &NameList::default(), false)?;
        }
        let mut outcome = self.attempt(invocation, inflight, Some(&aside), progress, cancel)?;
        if let Some(before) = before {
            outcome.stats.add_copied(&before.stats);
            outcome.counts_unknown = true;
        }
        Ok(outcome)
    }

    /// Runs rsync into the new tree, again where one file ended it.
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
        };
        attempts.run(invocation, progress, cancel)
    }

    /// Lists the files that the next run must compare.
    fn note_recent(&self, outcome: &Outcome) -> Result<(), SnapshotError> {
        recent::write(&self.folder.state, self.name, &outcome.recent).map_err(|source| {
            SnapshotError::Volume {
                op: "write",
                object: format!("{}.recent", self.name),
                source,
            }
        })
    }

    fn record(
        &self,
        invocation: &Invocation,
        outcome: &Outcome,
        warnings: Vec<Warning>,
    ) -> RunRecord {
        let texts = |paths: &[PathBuf]| paths.iter().map(|path| escape_path(path)).collect();
        RunRecord {
            format: RECORD_FORMAT,
            job: self.spec.job.clone(),
            name: self.name,
            complete: outcome.ended == Ended::Whole,
            finished_run: true,
            sources: self
                .sources
                .list
                .iter()
                .map(|source| escape_path(&source.path))
                .collect(),
            excludes: self.spec.excludes.clone(),
            exclude_from: texts(&self.spec.exclude_from),
            started: self.started,
            ended: self.started,
            rsync_version: self.rsync.version.clone(),
            rsync_arguments: invocation
                .arguments
                .iter()
                .map(|argument| escape_name(argument.as_bytes()))
                .collect(),
            rsync_exit: outcome.exit,
            stats: outcome.stats,
            linked_from: self
                .linked_from
                .iter()
                .map(|(folder, kind)| LinkedFrom {
                    folder: folder.to_string(),
                    kind: *kind,
                })
                .chain(self.copy.iter().map(|copy| LinkedFrom {
                    folder: escape_path(&copy.copy),
                    kind: EntryKind::ByHand,
                }))
                .collect(),
            mounts: Vec::new(),
            file_systems: Vec::new(),
            disks_gone: Vec::new(),
            disks_left_out: Vec::new(),
            unread: outcome.unread.clone(),
            vanished: outcome.vanished.clone(),
            healed: NameList::default(),
            caught_up: NameList::default(),
            messages: outcome.messages.clone(),
            warnings,
            stopped_by: None,
        }
    }
}

/// Whether the tree is folders, links and inodes alone. All of these are in the journal, of which no
/// power cut ever leaves a later part without the earlier: a name that is there has its tree. The
/// content of files is not in it, and needs a sync before the name. Without counts nothing is known.
fn copied_nothing(outcome: &Outcome) -> bool {
    let stats = &outcome.stats;
    !outcome.counts_unknown
        && stats.files > 0
        && stats.transferred == 0
        && outcome.copied_from_older.is_empty()
}
