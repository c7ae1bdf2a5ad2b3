//! Large files that changed, in the subvolume `work` of a btrfs: only the blocks that differ are written. rsync would
//! send such a file whole.
//!
//! This happens before rsync's run, for files that are large on both sides and whose size or time differs:
//!
//! 1. A dry run of rsync, which enters only the folders above these files, lists those that the job includes.
//! 2. The path is noted in `.sprat/work.blocks`. The file gets another name, at the top of `work`. So no tree ever has
//!    a half-written file at its path. If the time of the source is not later, a clone of the file gets that name.
//! 3. The source is read to its end. Blocks that differ are written into the file. The old blocks are known from an
//!    index on this machine ([`index`]). Without one, the file on the volume is read.
//! 4. The file gets the attributes of the source, the time that the source had before it was read, and its name back.
//! 5. rsync's run neither sees nor deletes it. If the source has changed meanwhile, as that of a running virtual
//!    machine does, its time differs, and the next run begins at 1.
//! 6. After the snapshot, the new index replaces the old one. A large file that rsync sent whole gets one, too
//!    ([`whole`]).
//!
//! An interrupted run leaves no file at the path. The next one removes the file with the other name, and takes the file
//! of a snapshot back, which shares its content. What the interrupted run had sent is not sent again
//! ([`part`]). A source that can't be read has no file either: rsync's run reports it.

mod attributes;
mod index;
mod part;
mod update;
mod whole;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};

use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::job::{RunFolder, STATE_FOLDER, WORK_PATH, on_volume, replace_file};
use crate::long_path::{lstat, open_regular, size_and_time};
use crate::mounts::{pattern_for, pattern_with_ending};
use crate::name::SnapshotName;
use crate::progress::{Phase, Progress};
use crate::reflink;
use crate::rsync::{Ended, ITEM_FORMAT, ITEMS_MAX, Invocation, Lists, Outcome, Rsync, Side};
use crate::source_scan::NOWHERE;
use crate::sources::Sources;
use crate::spec::SnapshotSpec;
use crate::text::{escape_path, unescape_path};
use crate::unresponsive::{Waiting, ask};
use crate::walk::{folder_of, leads_within, names_in, open_folder_at};
use index::{Draft, Identity, Index, Key};
use part::{Known, Part, Parts, Rest};
use update::{Old, Stopped, Update, Updated};
use whole::{Making, NewIndex};

/// Smaller files are left to rsync. The dry run and the index cost less than such a file from this size on.
pub(crate) const BYTES_MIN: u64 = 32 << 20;
/// How many files one run updates, the largest first. Each costs rsync two rules.
const FILES_MAX: usize = 64;
/// A file whose pieces are smaller on average is written as a new one. Reading it would take too many requests.
const PIECE_BYTES_MIN: u64 = 8 << 10;
/// What a piece has in a file that rsync wrote: the compressed extents of btrfs.
const PIECE_BYTES_OF_NEW: u64 = 128 << 10;
/// How often a long update shows its progress.
const REPORT_BYTES: u64 = 16 << 20;
/// Holds the path of the file that is being written. If the file at that path was taken back from a snapshot, the next
/// line identifies it and the file of the snapshot.
const NOTE: &str = "work.blocks";
/// Of its name at the top of `work`.
const ENDING: &str = ".blocks";

/// Whether a file of `work` is large enough.
pub(crate) fn is_large(about: &Metadata) -> bool {
    about.is_file() && about.nlink() == 1 && about.len() >= BYTES_MIN
}

/// Whether a file at the top of `work` is what an interrupted update goes on with.
pub(crate) fn is_part_name(name: &OsStr) -> bool {
    part::is_clone(Path::new(name))
}

/// What an interrupted run has left.
#[derive(Default)]
pub(crate) struct Left {
    /// The absolute path of the file that `work` lacks because of it.
    pub(crate) lacking: Option<PathBuf>,
    /// The path of a file that a run before took back from a snapshot, and the snapshot's file.
    taken_back: Option<(PathBuf, Identity)>,
    /// By the path of the source.
    parts: BTreeMap<PathBuf, Part>,
}

/// Finds what an interrupted run left, and removes what is of no use.
pub(crate) fn recover(folder: &RunFolder, spec: &SnapshotSpec) -> Result<Left, SnapshotError> {
    let failed = || on_volume("clear", &WORK_PATH);
    let work = folder.job.path.join(WORK_PATH);
    let top = open_folder_at(&work).map_err(failed())?;
    let is_ours = |name: &Path| {
        let slot = name.to_str().and_then(|name| name.strip_suffix(ENDING));
        slot.is_some_and(|slot| SnapshotName::parse(slot).is_ok()) || part::is_clone(name)
    };
    let names = names_in(top.as_fd(), Path::new(".")).map_err(failed())?;
    let names = names.into_iter().map(|(name, _)| name);
    let names: Vec<PathBuf> = names.filter(|name| is_ours(name)).collect();
    let indexes = spec.blocks.as_deref();
    let parts = indexes.map(|indexes| part::found(&work, &names, indexes));
    let parts = parts.unwrap_or_default();
    let is_part = |name: &PathBuf| parts.values().any(|part| part.clone == *name);
    for name in names.iter().filter(|name| !is_part(name)) {
        let removed = reflink::keeping_time(&top, || Ok(unlinkat(&top, name, AtFlags::empty())?));
        removed.map_err(failed())?;
    }
    let note = folder.job.path.join(STATE_FOLDER).join(NOTE);
    let note = std::fs::read_to_string(note).unwrap_or_default();
    let mut left = Left {
        parts,
        ..Left::default()
    };
    let (path, kept) = note.split_once('\n').unwrap_or((&note, ""));
    let path = unescape_path(path);
    let below = path.strip_prefix("/").unwrap_or(&path);
    if note.is_empty() || !leads_within(&work, below) {
        return Ok(left);
    }
    match lstat(&work.join(below)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => left.lacking = Some(path),
        Ok(about) => {
            let kept: Option<(Identity, Identity)> = serde_json::from_str(kept).ok();
            let kept = kept.filter(|(kept, _)| *kept == Identity::of(&about));
            left.taken_back = kept.map(|(_, of)| (path, of));
        }
        Err(_) => {}
    }
    Ok(left)
}

/// Forgets the file that the last run was writing. A note of a file that has its name is ignored.
pub(crate) fn forget_note(folder: &RunFolder) {
    let _ = unlinkat(&folder.state, NOTE, AtFlags::empty());
}

/// Updates the large files of a run.
pub(crate) struct Updating<'a> {
    pub(crate) rsync: &'a Rsync,
    pub(crate) folder: &'a RunFolder,
    pub(crate) spec: &'a SnapshotSpec,
    pub(crate) sources: &'a Sources,
    pub(crate) name: SnapshotName,
    pub(crate) left: RefCell<Left>,
    /// The folder of the snapshot that the lacking file was taken back from, with an absolute path.
    pub(crate) lacking_from: Option<PathBuf>,
    /// See [`crate::recent::from_s`].
    pub(crate) recent_from_s: i64,
}

/// A large file of `work`, and its source.
struct Large {
    /// The absolute path of the source.
    path: PathBuf,
    bytes: u64,
}

/// A file that is up to date.
struct Done {
    path: PathBuf,
    updated: Updated,
    changed: bool,
    recent: bool,
    pieces: u64,
    draft: Option<Draft>,
}

/// The files that are up to date.
pub(crate) struct UpToDate {
    files: Vec<Done>,
    /// The indexes of other files. `None`: this machine keeps none.
    whole: Option<Making>,
}

impl UpToDate {
    pub(crate) fn has(&self, path: &Path) -> bool {
        self.files.iter().any(|done| done.path == path)
    }

    /// Begins the index of a file that rsync sent, if it is a large one. `about`: the file in `work`, of which the index
    /// then gets all content.
    pub(crate) fn begin_index(&self, path: &Path, about: &Metadata) -> Option<NewIndex> {
        let is_new = is_large(about) && !self.has(path);
        self.whole.as_ref().filter(|_| is_new)?.begin(path, about)
    }

    /// `file` is the file in `work`.
    pub(crate) fn end_index(&self, index: NewIndex, file: &File) {
        if let Some(making) = &self.whole {
            making.end(index, file);
        }
    }

    /// Makes rsync neither see nor delete them.
    pub(crate) fn leave_alone(&self, invocation: &mut Invocation) {
        for done in &self.files {
            for rule in ["--filter=H ", "--filter=P "] {
                let mut filter = OsString::from(rule);
                filter.push(pattern_for(&done.path, false));
                // The first matching rule counts.
                invocation.arguments.insert(0, filter);
            }
        }
    }

    /// Adds them to what rsync reported.
    pub(crate) fn add_to(&self, outcome: &mut Outcome) {
        for done in &self.files {
            let (bytes, written) = (done.updated.bytes, done.updated.written);
            let stats = &mut outcome.stats;
            stats.files += 1;
            stats.regular_files += 1;
            stats.bytes_total += bytes;
            if done.changed {
                stats.transferred += 1;
                stats.bytes_transferred += bytes;
                stats.bytes_literal += written;
                stats.bytes_matched += bytes - written;
            }
            if done.recent {
                let below = done.path.strip_prefix("/").unwrap_or(&done.path);
                outcome.recent.push_within(escape_path(below), ITEMS_MAX);
            }
        }
    }

    /// After the snapshot: this machine keeps the indexes. Without them the next run reads the files.
    pub(crate) fn keep_indexes(self, folder: &RunFolder, spec: &SnapshotSpec) {
        let Some(indexes) = &spec.blocks else { return };
        let work = folder.job.path.join(WORK_PATH);
        let file = |path: &Path| {
            let below = path.strip_prefix("/").unwrap_or(path);
            Some(Identity::of(&lstat(&work.join(below)).ok()?))
        };
        let kept = |finished: io::Result<()>| {
            if let Err(error) = finished {
                tracing::warn!(%error, "this machine can't keep the hashes of a large file");
            }
        };
        for done in self.files {
            if let (Some(draft), Some(file)) = (done.draft, file(&done.path)) {
                kept(draft.finish(indexes, &done.path, file, done.pieces));
            }
        }
        for made in self.whole.map(Making::made).unwrap_or_default() {
            if file(&made.path).as_ref() == Some(&made.file) {
                kept(made.index.put(indexes, &made.path));
            }
        }
        index::remove_others(indexes, &|path| file(&unescape_path(path)));
        part::remove_drafts(indexes);
    }
}

impl Updating<'_> {
    /// `found`: the large files of `work`, below it, with their metadata. `must_compare`: whether a file must be
    /// compared although size and time are equal.
    pub(crate) fn carry_out(
        &self,
        found: &[(PathBuf, Metadata)],
        must_compare: &dyn Fn(&Path) -> bool,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<UpToDate, SnapshotError> {
        let up_to_date = self.update_all(found, must_compare, progress, cancel)?;
        // No snapshot may have any of them.
        let failed = || on_volume("clear", &WORK_PATH);
        let top = open_folder_at(&self.folder.job.path.join(WORK_PATH)).map_err(failed())?;
        let names = names_in(top.as_fd(), Path::new(".")).map_err(failed())?;
        let names: Vec<PathBuf> = names.into_iter().map(|(name, _)| name).collect();
        part::remove_all(&top, &names, self.spec.blocks.as_deref()).map_err(failed())?;
        forget_note(self.folder);
        Ok(up_to_date)
    }

    fn update_all(
        &self,
        found: &[(PathBuf, Metadata)],
        must_compare: &dyn Fn(&Path) -> bool,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<UpToDate, SnapshotError> {
        let sources: Vec<PathBuf> = self
            .sources
            .list
            .iter()
            .map(|one| one.path.clone())
            .collect();
        let making = |indexes| Making::new(indexes, sources.clone());
        let mut up_to_date = UpToDate {
            files: Vec::new(),
            whole: self.spec.blocks.clone().map(making),
        };
        let is_source = |path: &Path| sources.iter().any(|one| path.starts_with(one));
        let found = found.iter().map(|(below, kept)| {
            let path = Path::new("/").join(below);
            let wanted = (!must_compare(below)).then(|| size_and_time(kept));
            (path, wanted)
        });
        let found: Vec<_> = found.filter(|(path, _)| is_source(path)).collect();
        if found.is_empty() {
            return Ok(up_to_date);
        }
        let mut files = ask(progress, cancel, move || changed(found))?;
        files.sort_by_key(|file| std::cmp::Reverse(file.bytes));
        files.truncate(FILES_MAX);
        if files.is_empty() {
            return Ok(up_to_date);
        }
        let included = self.included(&files, progress, cancel)?;
        files.retain(|file| included.contains(&escape_path(&file.path)));
        let mut bytes_before = 0;
        let progress = RefCell::new(progress);
        for file in &files {
            let copied = |bytes: u64, still_s: Option<u64>| {
                (progress.borrow_mut())(Progress {
                    bytes_done: bytes_before + bytes,
                    still_s,
                    ..Progress::begin(Phase::Copying)
                });
            };
            let done = self.update(file, &copied, cancel)?;
            bytes_before += file.bytes;
            up_to_date.files.extend(done);
        }
        Ok(up_to_date)
    }

    /// Which of the files the job includes, escaped. rsync is asked, because only rsync knows its patterns.
    fn included(
        &self,
        files: &[Large],
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Vec<String>, SnapshotError> {
        let mut arguments: Vec<OsString> = ["-nrlD", "--relative", ITEM_FORMAT, "--outbuf=L"]
            .map(OsString::from)
            .to_vec();
        arguments.extend(self.sources.arguments(self.spec));
        let rule = |rule: &str, pattern: OsString| {
            let mut rule = OsString::from(rule);
            rule.push(pattern);
            rule
        };
        let mut folders: Vec<&Path> = files
            .iter()
            .flat_map(|file| file.path.ancestors().skip(1))
            .filter(|folder| *folder != Path::new("/"))
            .collect();
        folders.sort();
        folders.dedup();
        // After the job's own patterns: the first matching rule counts.
        let folders = folders
            .iter()
            .map(|folder| rule("--include=", pattern_with_ending(folder, "/")));
        let names = files
            .iter()
            .map(|file| rule("--include=", pattern_for(&file.path, false)));
        let rules: Vec<OsString> = folders.chain(names).chain(["--exclude=*".into()]).collect();
        let at = arguments.iter().position(|one| one == "--");
        let at = at.unwrap_or(arguments.len());
        arguments.splice(at..at, rules);
        arguments.push(NOWHERE.into());
        let folder = &self.folder.job.path;
        let mut invocation = Invocation::new(arguments, folder, folder, Side::IntoVolume);
        invocation.input = self.sources.input();
        invocation.lists = Some(Lists {
            all: true,
            ..Lists::default()
        });
        let mut checking = |now: Progress| {
            progress(Progress {
                still_s: now.still_s,
                ..Progress::begin(Phase::Checking)
            });
        };
        let outcome = self.rsync.run(&invocation, &mut checking, cancel)?;
        match outcome.ended {
            Ended::Whole | Ended::WithUnread => Ok(outcome.listed.paths.unwrap_or_default()),
            Ended::Cancelled => Err(SnapshotError::Cancelled),
            // The run itself reports what is wrong.
            other => {
                tracing::warn!(ended = ?other, "large files are copied whole");
                Ok(Vec::new())
            }
        }
    }

    /// Updates one file. `None`: rsync's run copies it, or reports what is wrong with it.
    fn update(
        &self,
        file: &Large,
        copied: &dyn Fn(u64, Option<u64>),
        cancel: &Cancel,
    ) -> Result<Option<Done>, SnapshotError> {
        let object = escape_path(&file.path);
        let failed = || on_volume("update", &object);
        let bytes_done = Cell::new(0);
        let report = |still_s| copied(bytes_done.get(), still_s);
        let waiting = || Waiting::new(cancel, &report);
        let path = file.path.clone();
        let opened = waiting().ask(move || {
            let source = open_regular(&path).ok()?;
            let about = source.metadata().ok().filter(is_large)?;
            Some((source, about))
        })?;
        let Some((source, before)) = opened else {
            return Ok(None);
        };
        let below = file.path.strip_prefix("/").unwrap_or(&file.path);
        let top = open_folder_at(&self.folder.job.path.join(WORK_PATH)).map_err(failed())?;
        let (folder, name) = folder_of(top.as_fd(), below).map_err(failed())?;
        let kept = open_regular(&self.folder.job.path.join(WORK_PATH).join(below));
        let kept_file = kept.map_err(failed())?;
        let kept = kept_file.metadata().map_err(failed())?;
        let index = self.index_of(&file.path, &kept);
        let index_of = index.as_ref().map(|index| index.end.file.clone());
        let part = self.left.borrow_mut().parts.remove(&file.path);
        // It says what was written, not what is there.
        let part = part.filter(|_| !self.spec.checksum);
        let pieces_before = match (&part, &index) {
            (Some(part), _) => part.pieces(),
            (None, Some(index)) => index.end.pieces,
            (None, None) => kept.len() / PIECE_BYTES_OF_NEW,
        };
        let as_new = pieces_before > before.len() / PIECE_BYTES_MIN;
        let known = self.known(index, part, as_new)?;
        let clone = known
            .clone
            .as_ref()
            .map(|name| part::open_clone(top.as_fd(), name));
        let clone = clone.transpose().map_err(failed())?;
        let other_name = format!("{}{ENDING}", self.name);
        let mut note = format!("{}\n", escape_path(&file.path));
        if let Some(of) = index_of.filter(|of| *of != Identity::of(&kept)) {
            note += &serde_json::to_string(&(Identity::of(&kept), of)).unwrap_or_default();
        }
        replace_file(&self.folder.state, NOTE, note.as_bytes()).map_err(failed())?;
        // Checks take the same inode, size and time for the same content. An earlier time may have been used already.
        let is_later = time(&before) > time(&kept);
        let from = match (&clone, as_new, is_later) {
            (Some(clone), ..) => Aside::Cloned(clone),
            (None, true, _) => Aside::New,
            (None, false, true) => Aside::Moved(&folder, name),
            (None, false, false) => Aside::Cloned(&kept_file),
        };
        let to = open_aside(&top, &other_name, from).map_err(failed())?;
        let slot = self.spec.blocks.as_deref();
        let slot = slot.map_or(0, |indexes| part::free_draft(indexes, &file.path));
        let mut update = Update {
            to: &to,
            old: known.old,
            hasher: known.key.hasher().map_err(no_key())?,
            draft: self.draft(&file.path, slot, known.key),
        };
        let mut parts = self.spec.blocks.as_deref().map(|indexes| Parts {
            top: &top,
            run: self.name,
            file: &to,
            path: &file.path,
            folder: indexes,
            rest: known.rest,
            pieces_before: if as_new { 0 } else { pieces_before },
            draft: slot,
            blocks: known.blocks,
            clone: known.clone,
            last: (0, Instant::now()),
            every: self.spec.parts_every.unwrap_or(part::EVERY),
        });
        let mut so_far = |done: Updated, draft: Option<&mut Draft>| {
            if done.bytes >= bytes_done.get() + REPORT_BYTES {
                bytes_done.set(done.bytes);
                copied(done.bytes, None);
            }
            if let Some(parts) = &mut parts {
                parts.make_if_due(done, draft);
            }
        };
        let reader = source.try_clone().map_err(|source| SnapshotError::System {
            op: "open a file again",
            source,
        })?;
        // A source that grows must not be read for ever.
        let mut reading = waiting().read(reader, before.len())?;
        let updated = match update.carry_out(&mut reading, &mut so_far, cancel) {
            Ok(updated) => updated,
            Err(Stopped::Cancelled(done)) => {
                if let Some(parts) = &mut parts {
                    parts.make(done, update.draft.as_mut());
                }
                return Err(SnapshotError::Cancelled);
            }
            Err(Stopped::Volume(error)) => {
                // Its space is needed, also for pruning. The note stays: the next run takes the file back.
                let _ = remove_aside(&top, &other_name);
                let is_full = error.kind() == io::ErrorKind::StorageFull;
                if let Some(clone) = parts.and_then(|parts| parts.clone).filter(|_| is_full) {
                    let _ = remove_aside(&top, &clone);
                }
                return Err(failed()(error));
            }
            Err(Stopped::Source(error)) => {
                if let Some(failure) = reading.failure {
                    return Err(failure);
                }
                tracing::debug!(%error, "a large file can't be read");
                self.give_up(&top, &other_name).map_err(failed())?;
                return Ok(None);
            }
        };
        let is_part = clone.is_some();
        let is_changed = is_part || updated.pieces > 0 || updated.bytes != kept.len();
        let draft = update.draft.take();
        let done = |updated: Updated, pieces: u64, draft: Option<Draft>| Done {
            path: file.path.clone(),
            changed: is_changed,
            recent: before.mtime() >= self.recent_from_s,
            pieces,
            updated,
            draft,
        };
        let attributes = waiting().ask(move || attributes::all(&source))?;
        let give_to = |to: &File| {
            let attributes = attributes.as_ref().map_err(io::Error::kind)?;
            attributes::copy(attributes, &before, to)
        };
        let is_same = matches!(from, Aside::Cloned(_))
            && !is_changed
            && size_and_time(&before) == size_and_time(&kept);
        if is_same {
            // It is the same content, and stays the same file. With an earlier time it must not: an older snapshot may
            // have other content in this file, and that time.
            self.give_up(&top, &other_name).map_err(failed())?;
            let is_set = give_to(&kept_file).and_then(|()| {
                reflink::set_time(kept_file.as_fd(), before.mtime(), before.mtime_nsec())
            });
            // If not, rsync reports what is wrong.
            return Ok(is_set.is_ok().then(|| done(updated, pieces_before, draft)));
        }
        if let Err(error) = give_to(&to) {
            // rsync reports what is wrong with them.
            tracing::debug!(%error, "the attributes of a large file can't be copied");
            self.give_up(&top, &other_name).map_err(failed())?;
            return Ok(None);
        }
        reflink::set_time(to.as_fd(), before.mtime(), before.mtime_nsec()).map_err(failed())?;
        let renamed = reflink::keeping_time(&top, || {
            reflink::keeping_time(&folder, || Ok(renameat(&top, &other_name, &folder, name)?))
        });
        renamed.map_err(failed())?;
        forget_note(self.folder);
        if updated.written > 0 || is_part {
            self.spec.listener.copied(&escape_path(below));
        }
        // A new piece also divides an old one.
        let pieces = match as_new {
            true => updated.bytes / PIECE_BYTES_OF_NEW,
            false => pieces_before + 2 * updated.pieces,
        };
        Ok(Some(done(updated, pieces, draft)))
    }

    /// What is known of the file that the update begins with.
    fn known(
        &self,
        index: Option<Index>,
        part: Option<Part>,
        as_new: bool,
    ) -> Result<Known, SnapshotError> {
        if let Some(part) = part.filter(|_| !as_new) {
            return Ok(part.into_known(index));
        }
        let key = match &index {
            Some(index) => index.key(),
            None => Key::random().map_err(no_key())?,
        };
        let (old, rest) = match index {
            _ if as_new => (Old::New, Rest::None),
            // It says what was written, not what is there.
            Some(index) if !self.spec.checksum => {
                let file = index.end.file.clone();
                (Old::Index(Box::new(index)), Rest::Of(file))
            }
            _ => (Old::File, Rest::File),
        };
        Ok(Known {
            key,
            old,
            rest,
            blocks: 0,
            clone: None,
        })
    }

    /// The index of the file `kept` of `work`.
    fn index_of(&self, path: &Path, kept: &Metadata) -> Option<Index> {
        let index = Index::open(self.spec.blocks.as_deref()?, path)?;
        let is_it = |about: &Metadata| Identity::of(about) == index.end.file;
        let shared = || {
            let below = path.strip_prefix("/").unwrap_or(path);
            let of = self.lacking_from.as_ref()?.join(below);
            lstat(&of).ok().filter(is_it)
        };
        // A file that was taken back has the content of the snapshot's file.
        let left = self.left.borrow();
        let is_taken_back = match (&left.lacking, &left.taken_back) {
            (Some(lacking), _) if lacking == path => shared().is_some(),
            (_, Some((kept, of))) if kept == path => *of == index.end.file,
            _ => false,
        };
        drop(left);
        (is_it(kept) || is_taken_back).then_some(index)
    }

    fn draft(&self, path: &Path, slot: usize, key: Key) -> Option<Draft> {
        let indexes = self.spec.blocks.as_deref()?;
        let begun = Draft::begin(part::draft_path(indexes, path, slot), key);
        if let Err(error) = &begun {
            tracing::warn!(%error, "this machine can't keep the hashes of a large file");
        }
        begun.ok()
    }

    fn give_up(&self, top: &OwnedFd, other_name: &str) -> io::Result<()> {
        remove_aside(top, other_name)?;
        forget_note(self.folder);
        Ok(())
    }
}

/// What the file with the other name is made of.
#[derive(Clone, Copy)]
enum Aside<'a> {
    New,
    /// The file in this folder, which loses its own name.
    Moved(&'a OwnedFd, &'a Path),
    /// A new file with the content of this one.
    Cloned(&'a File),
}

/// Opens the file under its other name.
fn open_aside(top: &OwnedFd, other_name: &str, from: Aside<'_>) -> io::Result<File> {
    let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    reflink::keeping_time(top, || match from {
        Aside::Moved(folder, name) => {
            reflink::keeping_time(folder, || Ok(renameat(folder, name, top, other_name)?))
        }
        Aside::Cloned(file) => reflink::file(file, top.as_fd(), Path::new(other_name)),
        Aside::New => {
            flags |= OFlags::CREATE | OFlags::EXCL;
            Ok(())
        }
    })?;
    Ok(openat(top, other_name, flags, Mode::from(0o600))?.into())
}

fn remove_aside(top: &OwnedFd, other_name: impl AsRef<Path>) -> io::Result<()> {
    let name = other_name.as_ref();
    reflink::keeping_time(top, || Ok(unlinkat(top, name, AtFlags::empty())?))
}

/// A path of a source. The file is known to be unchanged if it has this size and time.
type Found = (PathBuf, Option<(u64, i64, i64)>);

/// The large ones that may have changed.
fn changed(found: Vec<Found>) -> Vec<Large> {
    let changed = |(path, unchanged): Found| {
        let source = lstat(&path).ok().filter(is_large)?;
        let bytes = source.len();
        (unchanged != Some(size_and_time(&source))).then_some(Large { path, bytes })
    };
    found.into_iter().filter_map(changed).collect()
}

fn no_key() -> impl Fn(io::Error) -> SnapshotError {
    |source| SnapshotError::System {
        op: "make a random key",
        source,
    }
}

/// The modification time.
fn time(about: &Metadata) -> (i64, i64) {
    (about.mtime(), about.mtime_nsec())
}
