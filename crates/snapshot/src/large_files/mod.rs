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
//! 6. After the snapshot, the new index replaces the old one.
//!
//! An interrupted run leaves no file at the path. The next one removes the file with the other name, and takes the file
//! of the newest snapshot back, which shares its content. A source that can't be read has no file either: rsync's run
//! reports it.

mod attributes;
mod index;
mod update;

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

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
use crate::walk::{folder_of, leads_within, names_in, open_folder_at};
use index::{Draft, Identity, Index, Key};
use update::{Old, Stopped, Update, Updated};

/// Smaller files are left to rsync. The dry run and the index cost less than such a file from this size on.
const BYTES_MIN: u64 = 32 << 20;
/// How many files one run updates, the largest first. Each costs rsync two rules.
const FILES_MAX: usize = 64;
/// A file whose pieces are smaller on average is written as a new one. Reading it would take too many requests.
const PIECE_BYTES_MIN: u64 = 8 << 10;
/// What a piece has in a file that rsync wrote: the compressed extents of btrfs.
const PIECE_BYTES_OF_NEW: u64 = 128 << 10;
/// How often a long update shows its progress.
const REPORT_BYTES: u64 = 16 << 20;
/// Holds the path of the file that is being written.
const NOTE: &str = "work.blocks";
/// Of its name at the top of `work`.
const ENDING: &str = ".blocks";

/// Whether a file of `work` is large enough.
pub(crate) fn is_large(about: &Metadata) -> bool {
    about.is_file() && about.nlink() == 1 && about.len() >= BYTES_MIN
}

/// Removes what an interrupted run left. Returns the absolute path of the file that `work` lacks because of it.
pub(crate) fn recover(folder: &RunFolder) -> Result<Option<PathBuf>, SnapshotError> {
    let failed = || on_volume("clear", &WORK_PATH);
    let work = folder.job.path.join(WORK_PATH);
    let top = open_folder_at(&work).map_err(failed())?;
    let is_ours = |name: &Path| {
        let slot = name.to_str().and_then(|name| name.strip_suffix(ENDING));
        slot.is_some_and(|slot| SnapshotName::parse(slot).is_ok())
    };
    let names = names_in(top.as_fd(), Path::new(".")).map_err(failed())?;
    for (name, _) in names.iter().filter(|(name, _)| is_ours(name)) {
        let removed = reflink::keeping_time(&top, || Ok(unlinkat(&top, name, AtFlags::empty())?));
        removed.map_err(failed())?;
    }
    let note = folder.job.path.join(STATE_FOLDER).join(NOTE);
    let Ok(path) = std::fs::read_to_string(note) else {
        return Ok(None);
    };
    let path = unescape_path(path.trim_end());
    let below = path.strip_prefix("/").unwrap_or(&path);
    let is_lacking = leads_within(&work, below)
        && lstat(&work.join(below)).is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
    Ok(is_lacking.then_some(path))
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
    /// The newest snapshot's folder, with an absolute path.
    pub(crate) last: Option<PathBuf>,
    /// The file that was taken back from that snapshot because of an interrupted update.
    pub(crate) taken_back: Option<PathBuf>,
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
#[derive(Default)]
pub(crate) struct UpToDate(Vec<Done>);

impl UpToDate {
    pub(crate) fn has(&self, path: &Path) -> bool {
        self.0.iter().any(|done| done.path == path)
    }

    /// Makes rsync neither see nor delete them.
    pub(crate) fn leave_alone(&self, invocation: &mut Invocation) {
        for done in &self.0 {
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
        for done in &self.0 {
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
        for done in self.0 {
            let (Some(draft), Some(file)) = (done.draft, file(&done.path)) else {
                continue;
            };
            if let Err(error) = draft.finish(indexes, &done.path, file, done.pieces) {
                tracing::warn!(%error, "this machine can't keep the hashes of a large file");
            }
        }
        index::remove_others(indexes, &|path| file(&unescape_path(path)));
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
        let mut up_to_date = UpToDate::default();
        let changed = |(below, kept): &(PathBuf, Metadata)| {
            let path = Path::new("/").join(below);
            let source = lstat(&path).ok().filter(is_large)?;
            let differs = size_and_time(&source) != size_and_time(kept) || must_compare(below);
            let is_source = self
                .sources
                .list
                .iter()
                .any(|one| path.starts_with(&one.path));
            (differs && is_source).then_some(Large {
                path,
                bytes: source.len(),
            })
        };
        let mut files: Vec<Large> = found.iter().filter_map(changed).collect();
        files.sort_by_key(|file| std::cmp::Reverse(file.bytes));
        files.truncate(FILES_MAX);
        if files.is_empty() {
            return Ok(up_to_date);
        }
        let included = self.included(&files, progress, cancel)?;
        files.retain(|file| included.contains(&escape_path(&file.path)));
        let mut bytes_before = 0;
        for file in &files {
            let mut copied = |bytes: u64| {
                progress(Progress {
                    bytes_done: bytes_before + bytes,
                    ..Progress::begin(Phase::Copying)
                });
            };
            let done = self.update(file, &mut copied, cancel)?;
            bytes_before += file.bytes;
            up_to_date.0.extend(done);
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
        copied: &mut dyn FnMut(u64),
        cancel: &Cancel,
    ) -> Result<Option<Done>, SnapshotError> {
        let object = escape_path(&file.path);
        let failed = || on_volume("update", &object);
        let Ok(source) = open_regular(&file.path) else {
            return Ok(None);
        };
        let Some(before) = source.metadata().ok().filter(is_large) else {
            return Ok(None);
        };
        let below = file.path.strip_prefix("/").unwrap_or(&file.path);
        let top = open_folder_at(&self.folder.job.path.join(WORK_PATH)).map_err(failed())?;
        let (folder, name) = folder_of(top.as_fd(), below).map_err(failed())?;
        let kept = open_regular(&self.folder.job.path.join(WORK_PATH).join(below));
        let kept_file = kept.map_err(failed())?;
        let kept = kept_file.metadata().map_err(failed())?;
        let index = self.index_of(&file.path, &kept);
        let pieces_before = match &index {
            Some(index) => index.end.pieces,
            None => kept.len() / PIECE_BYTES_OF_NEW,
        };
        let as_new = pieces_before > before.len() / PIECE_BYTES_MIN;
        let other_name = format!("{}{ENDING}", self.name);
        let note = format!("{}\n", escape_path(&file.path));
        replace_file(&self.folder.state, NOTE, note.as_bytes()).map_err(failed())?;
        // Checks take the same inode, size and time for the same content. An earlier time may have been used already.
        let is_later = time(&before) > time(&kept);
        let from = match (as_new, is_later) {
            (true, _) => Aside::New,
            (false, true) => Aside::Moved(&folder, name),
            (false, false) => Aside::Cloned(&kept_file),
        };
        let to = open_aside(&top, &other_name, from).map_err(failed())?;
        let key = match &index {
            Some(index) => index.key(),
            None => Key::random().map_err(|source| SnapshotError::System {
                op: "make a random key",
                source,
            })?,
        };
        let mut update = Update {
            to: &to,
            old: match index {
                _ if as_new => Old::New,
                // It says what was written, not what is there.
                Some(index) if !self.spec.checksum => Old::Index(Box::new(index)),
                _ => Old::File,
            },
            key,
            draft: self.draft(key),
        };
        let mut reported = 0;
        let mut report = |bytes: u64| {
            if bytes >= reported + REPORT_BYTES {
                reported = bytes;
                copied(bytes);
            }
        };
        // A source that grows must not be read for ever.
        let mut limited = io::Read::take(&source, before.len());
        let updated = match update.carry_out(&mut limited, &mut report, cancel) {
            Ok(updated) => updated,
            Err(Stopped::Cancelled) => return Err(SnapshotError::Cancelled),
            Err(Stopped::Volume(error)) => {
                // Its space is needed, also for pruning. The note stays: the next run takes the file back.
                let _ = remove_aside(&top, &other_name);
                return Err(failed()(error));
            }
            Err(Stopped::Source(error)) => {
                tracing::debug!(%error, "a large file can't be read");
                self.give_up(&top, &other_name).map_err(failed())?;
                return Ok(None);
            }
        };
        let draft = update.draft.take();
        let done = |updated: Updated, pieces: u64, draft: Option<Draft>| Done {
            path: file.path.clone(),
            changed: updated.pieces > 0 || updated.bytes != kept.len(),
            recent: before.mtime() >= self.recent_from_s,
            pieces,
            updated,
            draft,
        };
        let is_same = matches!(from, Aside::Cloned(_))
            && updated.pieces == 0
            && size_and_time(&before) == size_and_time(&kept)
            && updated.bytes == kept.len();
        if is_same {
            // It is the same content, and stays the same file. With an earlier time it must not: an older snapshot may
            // have other content in this file, and that time.
            self.give_up(&top, &other_name).map_err(failed())?;
            let is_set = attributes::copy(&source, &before, &kept_file).and_then(|()| {
                reflink::set_time(kept_file.as_fd(), before.mtime(), before.mtime_nsec())
            });
            // If not, rsync reports what is wrong.
            return Ok(is_set.is_ok().then(|| done(updated, pieces_before, draft)));
        }
        if let Err(error) = attributes::copy(&source, &before, &to) {
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
        if updated.written > 0 {
            self.spec.listener.copied(&escape_path(below));
        }
        // A new piece also divides an old one.
        let pieces = match as_new {
            true => updated.bytes / PIECE_BYTES_OF_NEW,
            false => pieces_before + 2 * updated.pieces,
        };
        Ok(Some(done(updated, pieces, draft)))
    }

    /// The index of the file `kept` of `work`.
    fn index_of(&self, path: &Path, kept: &Metadata) -> Option<Index> {
        let index = Index::open(self.spec.blocks.as_deref()?, path)?;
        let is_it = |about: &Metadata| Identity::of(about) == index.end.file;
        let shared = || {
            let below = path.strip_prefix("/").unwrap_or(path);
            let last = self.last.as_ref()?.join(below);
            lstat(&last).ok().filter(is_it)
        };
        // A file that was taken back has the content of the snapshot's file.
        let is_taken_back = self.taken_back.as_deref() == Some(path);
        (is_it(kept) || (is_taken_back && shared().is_some())).then_some(index)
    }

    fn draft(&self, key: Key) -> Option<Draft> {
        let begun = Draft::begin(self.spec.blocks.as_deref()?, key);
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

fn remove_aside(top: &OwnedFd, other_name: &str) -> io::Result<()> {
    reflink::keeping_time(top, || Ok(unlinkat(top, other_name, AtFlags::empty())?))
}

/// The modification time.
fn time(about: &Metadata) -> (i64, i64) {
    (about.mtime(), about.mtime_nsec())
}
