//! Large files that an interrupted run had copied in part: the next run copies only the rest.
//!
//! rsync writes a file under a temporary name, from beginning to end, and removes it when it is
//! interrupted. So during a run the file that rsync is writing gets a second name, `.sprat/NAME.begun`.
//! Beside it `.sprat/NAME.begun.json` records how many of its bytes are durable: the length that the
//! file had before a `syncfs`, written after that `syncfs` ([`crate::checkpoint`]).
//!
//! The rest must begin with a byte that is not zero. If it begins with zeros, rsync with `--append` and `--sparse`
//! writes these zeros over the beginning of the file, and ends with an error (rsync's fileio.c, `write_sparse`:
//! `sparse_past_write` is 0 before the first write). rsync does not write zeros before it knows what follows them, so
//! the rest often begins with zeros. So the last byte that is not zero is copied again.
//!
//! The next run uses it if the source is unchanged: inode, size, time and change time are equal, and
//! none of them is younger than the run that began to copy it. So the source had this content all the
//! time. The run cuts the file to its durable length and lets rsync append the rest in a separate tree,
//! which it then links from. A file with any other name on the volume is never used.
//!
//! In the subvolume `work` of a btrfs the second name is at the top of `work`, because no link leads out of a
//! subvolume, and rsync appends the rest in place. The time of such a file is that of the last write until
//! it is whole, so no run takes it for unchanged.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{AtFlags, Mode, OFlags, linkat, openat, statat, unlinkat};
use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::completeness::final_name;
use crate::error::SnapshotError;
use crate::job::{Folder, RunFolder, replace_file};
use crate::name::SnapshotName;
use crate::paths::plain_path;
use crate::progress::Progress;
use crate::reflink;
use crate::reread::copying;
use crate::rsync::{Ended, Invocation, Outcome, Rsync, within, written_in};
use crate::text::{escape_path, unescape_path};
use crate::unresponsive;
use crate::walk::{folder_of, leads_within, listed, names_in, open_folder_at};

/// Smaller files are copied again from the beginning.
const BIG_BYTES: u64 = 16 << 20;
/// NAME_MAX less what rsync adds to a temporary name, and less one character that it would not split.
const NAME_BYTES_UNCUT: usize = 240;
const FILE: &str = ".begun";
const NOTE: &str = ".begun.json";
const NOTE_BYTES_MAX: u64 = 64 << 10;
/// rsync leaves out zeros of 1 KiB or more (rsync.h, `SPARSE_WRITE_SIZE`), so fewer are at the end of a begun file.
const END_BYTES: u64 = 64 << 10;
/// How long the source may take to answer: the end of the run waits for it.
const SOURCE_PATIENCE: Duration = Duration::from_secs(3);
/// How many begun files one run uses. Each needs an rsync of its own.
const FILES_MAX: usize = 8;
/// For a local file system whose times have nanoseconds. Its clock is at most 10 ms late.
const MARGIN_NS: i128 = 50_000_000;
/// For any other: FAT's steps of two seconds, and one second for the clock of a file server.
const MARGIN_COARSE_NS: i128 = 3_000_000_000;
/// The magic numbers (linux/magic.h) of local file systems: ext, xfs, btrfs, tmpfs, zfs, f2fs, overlay.
const LOCAL: [u64; 7] = [
    0xEF53,
    0x5846_5342,
    0x9123_683E,
    0x0102_1994,
    0x2FC1_2FC1,
    0xF2F5_2010,
    0x794C_7630,
];

/// Identifies a source file and one state of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    inode: u64,
    bytes: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Identity {
    /// `None` unless it is a regular file with one name.
    fn of(source: &Path) -> Option<Self> {
        let about = std::fs::symlink_metadata(source).ok()?;
        let ns = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        (about.is_file() && about.nlink() == 1).then(|| Self {
            inode: about.ino(),
            bytes: about.len(),
            modified_ns: ns(about.mtime(), about.mtime_nsec()),
            changed_ns: ns(about.ctime(), about.ctime_nsec()),
        })
    }

    /// Whether it is certainly older than `started_ns`.
    fn is_older(&self, source: &Path, started_ns: i128) -> bool {
        let is_local = rustix::fs::statfs(source).is_ok_and(|about| {
            #[allow(
                clippy::cast_sign_loss,
                reason = "a number of 32 bits, signed on some machines"
            )]
            let kind = about.f_type as u64 & 0xFFFF_FFFF;
            LOCAL.contains(&kind)
        });
        let has_ns = self.changed_ns % 1_000_000_000 != 0;
        let margin = if is_local && has_ns {
            MARGIN_NS
        } else {
            MARGIN_COARSE_NS
        };
        self.changed_ns.max(self.modified_ns) < started_ns - margin
    }
}

/// The content of `NAME.begun.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Note {
    /// The path in the source, escaped. The path in the snapshot is the same below its root.
    path: String,
    /// The inode of `NAME.begun`.
    inode: u64,
    /// How many bytes of it are durable.
    bytes: u64,
    source: Identity,
}

/// The file that rsync is writing.
struct Current {
    /// The run that began it. Its files are named after this run.
    slot: SnapshotName,
    note: Note,
    /// It already has its final name in the tree: rsync appends to a begun file.
    in_place: bool,
}

/// Follows which large file rsync is writing.
pub(crate) struct Begun {
    state: OwnedFd,
    /// The folder with the second names.
    files: OwnedFd,
    name: SnapshotName,
    /// The new tree, relative to the job's folder.
    to: Folder,
    /// The new tree, as the kernel names it.
    tree: PathBuf,
    started_ns: i128,
    current: Mutex<Option<Current>>,
    /// The source did not answer in time once, and is not asked again.
    silent: AtomicBool,
}

impl Begun {
    pub(crate) fn new(folder: &RunFolder, to: Folder, started: Timestamp) -> io::Result<Self> {
        let tree = folder.job.path.join(to.to_string());
        Ok(Self {
            state: folder.state.try_clone()?,
            files: match to {
                Folder::Work(_) => open_folder_at(&tree)?,
                _ => folder.state.try_clone()?,
            },
            name: to.name(),
            to,
            tree: std::fs::canonicalize(tree)?,
            started_ns: started.as_nanosecond(),
            current: Mutex::default(),
            silent: AtomicBool::new(false),
        })
    }

    fn current(&self) -> std::sync::MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Links the file that rsync is writing now to its second name, if it is large enough.
    pub(crate) fn link_file_in_progress(&self) {
        let mut current = self.current();
        for path in written_in(&self.tree) {
            let inode = std::fs::symlink_metadata(&path).map(|about| about.ino());
            let known = current.as_ref().map(|known| known.note.inode);
            if inode.is_ok_and(|inode| known == Some(inode)) {
                return;
            }
            let Some((found, inode)) = self.describe(&path) else {
                continue;
            };
            let slot = format!("{}{FILE}", self.name);
            self.forget(self.name);
            if linkat(rustix::fs::CWD, &path, &self.files, &slot, AtFlags::empty()).is_ok() {
                *current = Some(Current {
                    slot: self.name,
                    note: Note {
                        inode,
                        bytes: 0,
                        ..found
                    },
                    in_place: false,
                });
            }
            return;
        }
    }

    fn describe(&self, path: &Path) -> Option<(Note, u64)> {
        let about = std::fs::symlink_metadata(path).ok()?;
        // The source is checked last, because its file system may not answer.
        if !about.is_file() || about.nlink() > 2 || about.len() < BIG_BYTES {
            return None;
        }
        // rsync shortens longer names for its temporary file (receiver.c, get_tmpname). The shortened
        // name may be that of another file.
        let name = final_name(path.file_name()?).filter(|name| name.len() < NAME_BYTES_UNCUT)?;
        let below = path.strip_prefix(&self.tree).ok()?.with_file_name(name);
        let source = Path::new("/").join(below);
        let identity = self.older_source(&source)?;
        (about.len() <= identity.bytes).then(|| {
            let note = Note {
                path: escape_path(&source),
                inode: about.ino(),
                bytes: 0,
                source: identity,
            };
            (note, about.ino())
        })
    }

    /// The identity of the file `source`, if it is older than the run. Its file system may not answer,
    /// and the run must end all the same.
    fn older_source(&self, source: &Path) -> Option<Identity> {
        if self.silent.load(Ordering::Relaxed) {
            return None;
        }
        let (path, started_ns) = (source.to_owned(), self.started_ns);
        let older = within(SOURCE_PATIENCE, move || {
            Identity::of(&path).filter(|identity| identity.is_older(&path, started_ns))
        });
        if older.is_none() {
            self.silent.store(true, Ordering::Relaxed);
        }
        older.flatten()
    }

    /// The inode and the length of the file that is being written. That length is durable after the next
    /// `syncfs`.
    pub(crate) fn written(&self) -> Option<(u64, u64)> {
        let current = self.current();
        let current = current.as_ref()?;
        let slot = format!("{}{FILE}", current.slot);
        let stat = statat(&self.files, slot, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some((stat.st_ino, u64::try_from(stat.st_size).ok()?))
    }

    /// Records what [`Begun::written`] returned, after a `syncfs`.
    pub(crate) fn note(&self, written: Option<(u64, u64)>) -> io::Result<()> {
        let mut current = self.current();
        let (Some((inode, bytes)), Some(current)) = (written, current.as_mut()) else {
            return Ok(());
        };
        if current.note.inode != inode {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = format!("{}{FILE}", current.slot);
        let file = openat(&self.files, file, flags, Mode::empty())?;
        let last = last_written(&file.into(), bytes)?;
        let Some(bytes) = last.filter(|bytes| *bytes >= BIG_BYTES) else {
            return Ok(());
        };
        current.note.bytes = bytes;
        let text = serde_json::to_vec(&current.note)?;
        replace_file(&self.state, &format!("{}{NOTE}", current.slot), &text)
    }

    /// Drops the begun file, because the clock was set back (times prove nothing then) or the volume is
    /// full.
    pub(crate) fn withdraw(&self) {
        let Some(current) = self.current().take() else {
            return;
        };
        let in_tree = self.in_tree(&current.note);
        let is_part = std::fs::symlink_metadata(&in_tree).is_ok_and(|about| {
            about.ino() == current.note.inode && about.len() < current.note.source.bytes
        });
        if current.in_place && is_part {
            let _ = std::fs::remove_file(in_tree);
        }
        self.forget(current.slot);
    }

    /// Removes the begun file of the run `slot`.
    fn forget(&self, slot: SnapshotName) {
        let _ = unlinkat(&self.files, format!("{slot}{FILE}"), AtFlags::empty());
        forget(&self.state, slot);
    }

    /// Removes the begun files of all runs: a finished snapshot has all files.
    pub(crate) fn forget_all(&self, folder: &RunFolder) {
        // The folder is the root of the snapshot's tree.
        let _ = reflink::keeping_time(&self.files, || {
            for (slot, _) in slots(folder, &self.files).unwrap_or_default() {
                self.forget(slot);
            }
            Ok(())
        });
    }

    /// The run has stopped, and all that it wrote is durable.
    pub(crate) fn stopped(&self) {
        let (in_tree, in_place) = match self.current().as_ref() {
            Some(current) => (self.in_tree(&current.note), current.in_place),
            None => return,
        };
        let Some((inode, bytes)) = self.written() else {
            return;
        };
        let has_its_name =
            std::fs::symlink_metadata(&in_tree).is_ok_and(|about| about.ino() == inode);
        if has_its_name && !in_place {
            return self.withdraw();
        }
        if has_its_name {
            let _ = std::fs::remove_file(&in_tree);
        }
        if self.note(Some((inode, bytes))).is_err() {
            self.withdraw();
        }
    }

    fn in_tree(&self, note: &Note) -> PathBuf {
        let path = unescape_path(&note.path);
        self.tree.join(path.strip_prefix("/").unwrap_or(&path))
    }

    /// Appends the rest to the files that earlier runs began. `is_wanted` returns whether the job still
    /// includes a file. Returns the outcome of these runs of rsync, and whether the tree has any such
    /// file.
    pub(crate) fn append_rest(
        &self,
        folder: &RunFolder,
        rsync: &Rsync,
        invocation: &Invocation,
        is_wanted: &dyn Fn(&Path) -> bool,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(Option<Outcome>, bool), SnapshotError> {
        let mut done: Option<Outcome> = None;
        let mut any = false;
        for (slot, note) in self.usable(folder, progress, cancel)? {
            if cancel.is_cancelled() {
                break;
            }
            let path = unescape_path(&note.path);
            let in_tree = self.in_tree(&note);
            let is_folder = std::fs::symlink_metadata(&in_tree).is_ok_and(|about| about.is_dir());
            if !is_wanted(&path) || is_folder || !leads_within(&self.tree, below(&path)) {
                self.forget(slot);
                continue;
            }
            self.put_in_tree(slot, &note, &in_tree).map_err(failed)?;
            let options = ["--append", "--no-whole-file"].map(Into::into);
            let names = std::iter::once(path.as_path());
            let appending = copying(invocation, names, &self.to.to_string(), &options);
            let outcome = rsync.run(&appending, progress, cancel)?;
            let stops = matches!(outcome.ended, Ended::Cancelled | Ended::Full(_));
            let whole = outcome.ended == Ended::Whole
                && Identity::of(&path).as_ref() == Some(&note.source)
                && is_whole(&in_tree, &note);
            match &mut done {
                Some(done) => done.add(outcome),
                None => done = Some(outcome),
            }
            if stops {
                return Ok((done, any));
            }
            if !whole {
                // The main run copies it again and reports what is wrong with it.
                std::fs::remove_file(&in_tree).map_err(failed)?;
            }
            self.withdraw();
            any |= whole;
        }
        Ok((done, any))
    }

    fn put_in_tree(&self, slot: SnapshotName, note: &Note, in_tree: &Path) -> io::Result<()> {
        let mut current = self.current();
        let name = format!("{slot}{FILE}");
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.files, &name, flags, Mode::empty())?;
        // rsync skips a file that already has the full length.
        let bytes = note.bytes.min(note.source.bytes.saturating_sub(1));
        rustix::fs::ftruncate(&file, bytes)?;
        if let Some(above) = in_tree.parent() {
            std::fs::create_dir_all(above)?;
        }
        // In `work`: the file of an older snapshot.
        match std::fs::remove_file(in_tree) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        linkat(
            &self.files,
            &name,
            rustix::fs::CWD,
            in_tree,
            AtFlags::empty(),
        )?;
        *current = Some(Current {
            slot,
            note: Note {
                bytes,
                ..note.clone()
            },
            in_place: true,
        });
        Ok(())
    }
}

fn is_whole(in_tree: &Path, note: &Note) -> bool {
    std::fs::symlink_metadata(in_tree).is_ok_and(|about| {
        let modified_ns =
            i128::from(about.mtime()) * 1_000_000_000 + i128::from(about.mtime_nsec());
        about.ino() == note.inode
            && about.len() == note.source.bytes
            && modified_ns == note.source.modified_ns
    })
}

/// Where the last byte is that is not zero, near the end of the first `bytes` of a file. `None` if there is none:
/// rsync lengthens a file by zeros only when it is complete.
fn last_written(file: &File, bytes: u64) -> io::Result<Option<u64>> {
    let length = bytes.min(END_BYTES);
    let from = bytes - length;
    let mut end = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    file.read_exact_at(&mut end, from)?;
    let at = end.iter().rposition(|byte| *byte != 0);
    Ok(at.map(|at| from + at as u64))
}

/// Removes the begun file of the run `name`, if it is in the state folder, and its note.
pub(crate) fn forget(state: &OwnedFd, name: SnapshotName) {
    for ending in [NOTE, FILE] {
        let _ = unlinkat(state, format!("{name}{ending}"), AtFlags::empty());
    }
}

/// Whether the name at the top of `work` is that of a begun file.
pub(crate) fn is_file_name(name: &OsStr) -> bool {
    let slot = name.to_str().and_then(|name| name.strip_suffix(FILE));
    slot.is_some_and(|slot| SnapshotName::parse(slot).is_ok())
}

fn failed(source: io::Error) -> SnapshotError {
    SnapshotError::Volume {
        op: "use",
        object: FILE.to_owned(),
        source,
    }
}

fn below(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// The runs that have begun files, and whether each has a note.
fn slots(folder: &RunFolder, files: &OwnedFd) -> io::Result<Vec<(SnapshotName, bool)>> {
    let mut names = names_in(folder.state.as_fd(), Path::new("."))?;
    names.extend(names_in(files.as_fd(), Path::new("."))?);
    let names: Vec<String> = names
        .into_iter()
        .filter_map(|(name, _)| name.into_os_string().into_string().ok())
        .collect();
    let files = names.iter().filter_map(|name| {
        let stem = name
            .strip_suffix(FILE)
            .or_else(|| name.strip_suffix(NOTE))?;
        SnapshotName::parse(stem).ok()
    });
    let mut slots: Vec<SnapshotName> = files.collect();
    slots.sort();
    slots.dedup();
    Ok(slots
        .into_iter()
        .map(|slot| (slot, names.contains(&format!("{slot}{NOTE}"))))
        .collect())
}

impl Begun {
    /// The begun files that can be used, longest first. All others are removed.
    fn usable(
        &self,
        folder: &RunFolder,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Vec<(SnapshotName, Note)>, SnapshotError> {
        let slots = slots(folder, &self.files).map_err(failed)?;
        let notes = slots.iter().map(|(slot, has_note)| {
            let note = has_note.then(|| self.read_note(*slot)).flatten();
            (*slot, note)
        });
        let notes: Vec<(SnapshotName, Option<(Note, PathBuf)>)> = notes.collect();
        let paths: Vec<PathBuf> = notes
            .iter()
            .filter_map(|(_, note)| Some(note.as_ref()?.1.clone()))
            .collect();
        let sources: BTreeMap<PathBuf, Option<Identity>> =
            unresponsive::ask(progress, cancel, move || {
                let found = paths.into_iter().map(|path| {
                    let identity = Identity::of(&path);
                    (path, identity)
                });
                found.collect()
            })?;
        let mut usable = Vec::new();
        for (slot, note) in notes {
            let note = note.filter(|(note, path)| {
                let source = sources.get(path).and_then(Option::as_ref);
                source == Some(&note.source) && self.check(folder, slot, note, path)
            });
            match note {
                Some((note, _)) => usable.push((slot, note)),
                None => self.forget(slot),
            }
        }
        usable.sort_by_key(|(_, note)| std::cmp::Reverse(note.bytes));
        for (slot, _) in usable.iter().skip(FILES_MAX) {
            self.forget(*slot);
        }
        usable.truncate(FILES_MAX);
        Ok(usable)
    }

    /// Reads a note. Returns also the path of the source.
    fn read_note(&self, slot: SnapshotName) -> Option<(Note, PathBuf)> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.state, format!("{slot}{NOTE}"), flags, Mode::empty()).ok()?;
        let mut text = Vec::new();
        let file = File::from(file);
        file.take(NOTE_BYTES_MAX).read_to_end(&mut text).ok()?;
        let note: Note = serde_json::from_slice(&text).ok()?;
        let path = plain_path(&unescape_path(&note.path)).ok()?;
        (note.bytes >= BIG_BYTES).then_some((note, path))
    }

    /// Whether a note describes the present file.
    fn check(&self, folder: &RunFolder, slot: SnapshotName, note: &Note, path: &Path) -> bool {
        let about = || {
            let file = format!("{slot}{FILE}");
            statat(&self.files, file, AtFlags::SYMLINK_NOFOLLOW)
        };
        let has_others = about().is_ok_and(|about| about.st_nlink > 1);
        if has_others && self.remove_other_names(folder, path, note).is_err() {
            return false;
        }
        about().is_ok_and(|about| {
            let is_file = rustix::fs::FileType::from_raw_mode(about.st_mode).is_file();
            let long_enough = u64::try_from(about.st_size).is_ok_and(|bytes| bytes >= note.bytes);
            is_file && about.st_ino == note.inode && about.st_nlink == 1 && long_enough
        })
    }

    /// After a crash the file may also have its name in the tree in which rsync appended to it. In `work` it may
    /// have a temporary name, too.
    fn remove_other_names(&self, folder: &RunFolder, path: &Path, note: &Note) -> io::Result<()> {
        if let Folder::Work(_) = self.to {
            let (inside, _) = folder_of(self.files.as_fd(), below(path))?;
            for entry in listed(inside.as_fd())? {
                if entry.inode == note.inode {
                    unlinkat(&inside, &entry.name, AtFlags::empty())?;
                }
            }
            return Ok(());
        }
        for partial in folder.partials().map_err(io::Error::other)? {
            let tree = folder.job.path.join(partial.to_string());
            let in_tree = tree.join(below(path));
            let is_same = std::fs::symlink_metadata(&in_tree)
                .is_ok_and(|about| about.ino() == note.inode && about.len() < note.source.bytes);
            if is_same {
                std::fs::remove_file(&in_tree)?;
            }
        }
        Ok(())
    }
}
