//! One job's folder on the volume: its entries, its lock, `latest`.
//!
//! | name in `/JOB` | what it is | how it gets there |
//! | --- | --- | --- |
//! | `NAME.inflight` | the tree of a running or killed run | mkdir; always new and empty |
//! | `NAME` | a finished snapshot | rename of `NAME.inflight`, after its record and `syncfs` (without `syncfs` if no file content was copied) |
//! | `latest` | relative symbolic link to a finished snapshot | rename over the old one |
//! | `NAME.partial` | an interrupted tree whose files are all durable | rename of `.inflight` |
//! | `.sprat/NAME.json` | the record | write, rename |
//! | `.sprat/NAME.changes.zst` | what the run changed, see `change_list` | write, rename |
//! | `.sprat/base.changes.zst` | what the runs of removed snapshots changed | write, rename |
//! | `.sprat/NAME.recent` | files that may have changed after they were read, see `recent` | write, rename |
//! | `.sprat/NAME.checkpoint` | what of `NAME.inflight` is durable | see `checkpoint` |
//! | `.sprat/deleting-*` | a tree being removed: a snapshot or an interrupted one | rename; the next run or prune finishes the removal |
//! | `.sprat/NAME.exporting` | what an interrupted export into this volume left, see `export` | rename of `NAME.inflight` |
//! | `.sprat/work` | on a btrfs volume, the tree that rsync fills: see `work` | a subvolume; each snapshot is a read-only snapshot of it |
//! | `.sprat/NAME.pin` | the snapshot is pinned; the content is the reason | write, rename; or a person makes it |

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, flock, fsync, mkdirat, open, openat, renameat,
    statat, unlinkat,
};

use crate::error::SnapshotError;
use crate::foreign;
use crate::name::{JobName, SnapshotName};
use crate::record::{EntryKind, RunRecord, Warning};
use crate::text::{escape_name, escape_path};
use crate::walk::{entry_is_folder, is_folder, names_in, open_folder, open_folder_at};

pub(crate) const STATE_FOLDER: &str = ".sprat";
/// The subvolume `work`, in the folder of the job.
pub(crate) const WORK_PATH: &str = ".sprat/work";
/// The ending of the name of a list of changes.
pub(crate) const LIST_SUFFIX: &str = ".changes.zst";
const INFLIGHT: &str = ".inflight";
const PARTIAL: &str = ".partial";
/// The size limit of a record. A record has some kilobytes, and about 300 with all its lists full.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// The size limit of the reason in a pin.
const PIN_BYTES_MAX: u64 = 4096;
/// The beginning of the name of a tree that is being removed.
pub(crate) const DELETING: &str = "deleting-";
/// How many temporary names are tried for `latest`.
const LATEST_NAMES: u32 = 10;

/// A folder in the job's folder that sprat made, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Folder {
    Named(SnapshotName),
    Inflight(SnapshotName),
    Partial(SnapshotName),
    /// On a btrfs volume, the tree of the run of that name.
    Work(SnapshotName),
}

impl Folder {
    pub(crate) fn parse(folder: &str) -> Option<Self> {
        if let Some(name) = folder.strip_suffix(INFLIGHT) {
            return SnapshotName::parse(name).ok().map(Self::Inflight);
        }
        if let Some(name) = folder.strip_suffix(PARTIAL) {
            return SnapshotName::parse(name).ok().map(Self::Partial);
        }
        SnapshotName::parse(folder).ok().map(Self::Named)
    }

    pub(crate) fn name(self) -> SnapshotName {
        match self {
            Self::Named(name) | Self::Inflight(name) | Self::Partial(name) | Self::Work(name) => {
                name
            }
        }
    }
}

impl std::fmt::Display for Folder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named(name) => write!(f, "{name}"),
            Self::Inflight(name) => write!(f, "{name}{INFLIGHT}"),
            Self::Partial(name) => write!(f, "{name}{PARTIAL}"),
            Self::Work(_) => f.write_str(WORK_PATH),
        }
    }
}

/// The open folder of a job.
#[derive(Debug)]
pub(crate) struct JobFolder {
    pub(crate) path: PathBuf,
    pub(crate) job: String,
    pub(crate) folder: OwnedFd,
}

/// The folder of a job, locked for one run. Dropping it releases the lock.
#[derive(Debug)]
pub(crate) struct RunFolder {
    pub(crate) job: JobFolder,
    /// The open folder `.sprat`; it carries the flock.
    pub(crate) state: OwnedFd,
    /// Warnings about foreign objects that had to be renamed because sprat needs their names.
    pub(crate) renamed: Vec<Warning>,
}

pub(crate) fn on_volume(
    op: &'static str,
    object: &dyn ToString,
) -> impl FnOnce(io::Error) -> SnapshotError {
    let object = object.to_string();
    move |source| SnapshotError::Volume { op, object, source }
}

impl JobFolder {
    /// Opens the folder of `job`. The name comes from the volume or from the user.
    pub(crate) fn open(volume_root: &Path, job: &Path) -> Result<Self, SnapshotError> {
        let path = volume_root.join(job);
        let name = escape_path(job);
        match open_folder_at(&path) {
            Ok(folder) => Ok(Self {
                path,
                job: name,
                folder,
            }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(SnapshotError::NoSuchJob { job: name })
            }
            Err(e) if e.kind() == io::ErrorKind::NotADirectory || is_loop(&e) => {
                Err(SnapshotError::Layout {
                    object: name,
                    why: "is not a folder".to_owned(),
                })
            }
            Err(e) => Err(on_volume("open", &name)(e)),
        }
    }

    /// Opens the folder of `job` for a run, creates what is missing, and locks it.
    pub(crate) fn open_for_run(
        volume_root: &Path,
        job: &JobName,
    ) -> Result<RunFolder, SnapshotError> {
        let root = open_folder_at(volume_root).map_err(on_volume("open", &"its root"))?;
        let mut renamed = Vec::new();
        renamed.extend(
            foreign::rename_if_no_folder(&root, "", job.as_str())
                .map_err(on_volume("rename", &job))?,
        );
        make_folder(&root, job.as_str(), 0o755).map_err(on_volume("make folder", &job))?;
        let this = Self::open(volume_root, Path::new(job.as_str()))?;
        renamed.extend(
            foreign::rename_if_no_folder(&this.folder, &format!("{job}/"), STATE_FOLDER)
                .map_err(on_volume("rename", &STATE_FOLDER))?,
        );
        // Only root may read it: it contains names of unread files.
        make_folder(&this.folder, STATE_FOLDER, 0o700)
            .map_err(on_volume("make folder", &STATE_FOLDER))?;
        let state = open_folder(this.folder.as_fd(), Path::new(STATE_FOLDER))
            .map_err(on_volume("open", &STATE_FOLDER))?;
        match flock(&state, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(RunFolder {
                job: this,
                state,
                renamed,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(SnapshotError::Busy {
                job: job.to_string(),
            }),
            Err(e) => Err(on_volume("lock", &STATE_FOLDER)(e.into())),
        }
    }

    /// The names of all folders in it except the state folder, including foreign ones.
    pub(crate) fn folders(&self) -> Result<Vec<PathBuf>, SnapshotError> {
        let names =
            names_in(self.folder.as_fd(), Path::new(".")).map_err(on_volume("list", &self.job))?;
        Ok(names
            .into_iter()
            .filter(|(name, kind)| {
                name != Path::new(STATE_FOLDER)
                    && entry_is_folder(self.folder.as_fd(), name, *kind).unwrap_or(false)
            })
            .map(|(name, _)| name)
            .collect())
    }

    pub(crate) fn is_folder(&self, name: &Path) -> bool {
        statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| is_folder(&stat))
    }

    /// The folders that sprat made, sorted by name.
    pub(crate) fn own_folders(&self) -> Result<Vec<Folder>, SnapshotError> {
        let mut own: Vec<Folder> = self
            .folders()?
            .iter()
            .filter_map(|path| Folder::parse(path.to_str()?))
            .collect();
        own.sort_by_key(|folder| (folder.name(), *folder));
        Ok(own)
    }

    /// The record of `name`, or why there is none.
    pub(crate) fn record(&self, name: SnapshotName) -> Result<RunRecord, String> {
        let path = self.path.join(STATE_FOLDER).join(format!("{name}.json"));
        let file = open_plain(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => "it has no record".to_owned(),
            _ => format!("its record can't be read: {e}"),
        })?;
        let mut text = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, RECORD_BYTES_MAX), &mut text)
            .map_err(|e| format!("its record can't be read: {e}"))?;
        let record: RunRecord =
            serde_json::from_slice(&text).map_err(|e| format!("its record is damaged: {e}"))?;
        if record.name == name {
            Ok(record)
        } else {
            Err(format!("its record is that of {}", record.name))
        }
    }

    /// The kind of `folder`, by its name and its record.
    pub(crate) fn kind(&self, folder: Folder) -> (EntryKind, Result<RunRecord, String>) {
        let record = self.record(folder.name());
        let kind = match (folder, &record) {
            (Folder::Inflight(_), _) => EntryKind::Inflight,
            (Folder::Partial(_) | Folder::Work(_), _) => EntryKind::Partial,
            (Folder::Named(_), Ok(record)) if record.finished_run && record.complete => {
                EntryKind::Complete
            }
            (Folder::Named(_), Ok(record)) if record.finished_run => EntryKind::Incomplete,
            (Folder::Named(_), _) => EntryKind::Unrecorded,
        };
        (kind, record)
    }

    /// Whether the snapshot is pinned: `.sprat/NAME.pin` exists. A pin that can't be looked up, because the
    /// disk fails, counts as one.
    pub(crate) fn is_pinned(&self, name: SnapshotName) -> bool {
        let pin = Path::new(STATE_FOLDER).join(Self::pin_name(name));
        let found = statat(&self.folder, &pin, AtFlags::SYMLINK_NOFOLLOW);
        !matches!(
            found,
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR)
        )
    }

    /// The name of the file in the state folder that pins a snapshot.
    pub(crate) fn pin_name(name: SnapshotName) -> String {
        format!("{name}.pin")
    }

    /// Why the snapshot is pinned, escaped: the content of its pin, which a person may have made and
    /// which may be empty. `None`: it is not pinned.
    pub(crate) fn pin(&self, name: SnapshotName) -> Option<String> {
        if !self.is_pinned(name) {
            return None;
        }
        let path = self.path.join(STATE_FOLDER).join(Self::pin_name(name));
        let mut text = Vec::new();
        if let Ok(file) = open_plain(&path) {
            let _ = io::Read::read_to_end(&mut io::Read::take(file, PIN_BYTES_MAX), &mut text);
        }
        Some(escape_name(
            String::from_utf8_lossy(&text).trim().as_bytes(),
        ))
    }

    /// Whether a removal of the snapshot was interrupted.
    pub(crate) fn is_being_removed(&self, name: SnapshotName) -> bool {
        self.is_folder(&Path::new(STATE_FOLDER).join(format!("{DELETING}{name}")))
    }

    /// The finished snapshot that was made last: the one that `latest` points to, or a later one whose
    /// run ended before it could update `latest`.
    pub(crate) fn latest(&self) -> Option<SnapshotName> {
        let named = self.linked()?;
        if !self.is_folder(Path::new(&named.to_string())) {
            return None;
        }
        let mut later: Vec<SnapshotName> = self
            .own_folders()
            .unwrap_or_default()
            .into_iter()
            .filter_map(|folder| match folder {
                Folder::Named(name) if name > named => Some(name),
                _ => None,
            })
            .collect();
        // A greater name may come from a clock that ran ahead. Each run records the snapshot that it
        // linked from, so the records prove the order.
        let mut last = named;
        while let Some(at) = later
            .iter()
            .position(|name| self.is_made_after(*name, last))
        {
            last = later.swap_remove(at);
        }
        Some(last)
    }

    /// The name that `latest` has in it, whether that snapshot is there or not.
    pub(crate) fn linked(&self) -> Option<SnapshotName> {
        let target = rustix::fs::readlinkat(&self.folder, "latest", Vec::new()).ok()?;
        SnapshotName::parse(target.to_str().ok()?).ok()
    }

    fn is_made_after(&self, name: SnapshotName, before: SnapshotName) -> bool {
        let before = before.to_string();
        self.record(name).is_ok_and(|record| {
            let from = record.linked_from.iter();
            record.finished_run && from.into_iter().any(|linked| linked.folder == before)
        })
    }
}

fn is_loop(e: &io::Error) -> bool {
    e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

/// Opens a regular file for reading. Never waits on a FIFO and never follows a symbolic link.
fn open_plain(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty())?);
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("not a regular file"))
    }
}

fn make_folder(at: &OwnedFd, name: &str, mode: u32) -> io::Result<()> {
    match mkdirat(at, name, Mode::from(mode)) {
        Ok(()) => Ok(fsync(at)?),
        Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

impl RunFolder {
    /// All names that a new snapshot must not get.
    pub(crate) fn taken(&self) -> Result<BTreeSet<SnapshotName>, SnapshotError> {
        let all = names_in(self.job.folder.as_fd(), Path::new("."))
            .map_err(on_volume("list", &self.job.job))?;
        let mut taken: BTreeSet<SnapshotName> = all
            .iter()
            .filter_map(|(name, _)| Folder::parse(name.to_str()?).map(Folder::name))
            .collect();
        for (name, _) in self.state_names()? {
            let stem = name.to_str().and_then(|name| name.split('.').next());
            taken.extend(stem.and_then(|stem| SnapshotName::parse(stem).ok()));
        }
        Ok(taken)
    }

    pub(crate) fn state_names(&self) -> Result<Vec<(PathBuf, FileType)>, SnapshotError> {
        names_in(self.state.as_fd(), Path::new(".")).map_err(on_volume("list", &STATE_FOLDER))
    }

    /// Makes the new, empty folder that rsync will fill.
    pub(crate) fn make_inflight(&self, name: SnapshotName) -> Result<Folder, SnapshotError> {
        let folder = Folder::Inflight(name);
        // mkdir fails if the folder exists, so rsync never writes into an existing folder.
        mkdirat(&self.job.folder, folder.to_string(), Mode::from(0o755))
            .map_err(|e| on_volume("make folder", &folder)(e.into()))?;
        Ok(folder)
    }

    /// Renames `NAME.inflight`, whose content is durable. The rename is durable after the next sync, and
    /// never before earlier changes.
    pub(crate) fn inflight_becomes(
        &self,
        name: SnapshotName,
        to: Folder,
    ) -> Result<(), SnapshotError> {
        let from = Folder::Inflight(name);
        // rename(2) replaces an existing folder if it is empty. A folder of ours with that name never
        // exists.
        if self.job.is_folder(Path::new(&to.to_string())) {
            return Err(SnapshotError::Layout {
                object: to.to_string(),
                why: "exists already".to_owned(),
            });
        }
        renameat(
            &self.job.folder,
            from.to_string(),
            &self.job.folder,
            to.to_string(),
        )
        .map_err(|e| on_volume("rename", &from)(e.into()))
    }

    /// All `.partial` folders, oldest first.
    pub(crate) fn partials(&self) -> Result<Vec<Folder>, SnapshotError> {
        let own = self.job.own_folders()?;
        Ok(own
            .into_iter()
            .filter(|folder| matches!(folder, Folder::Partial(_)))
            .collect())
    }

    /// Writes the record. After a crash it is complete or missing. It is durable after the next sync.
    pub(crate) fn write_record(&self, record: &RunRecord) -> Result<(), SnapshotError> {
        let name = format!("{}.json", record.name);
        let mut text = serde_json::to_vec_pretty(record)
            .map_err(|e| on_volume("write", &name)(io::Error::other(e)))?;
        text.push(b'\n');
        replace_file(&self.state, &name, &text).map_err(on_volume("write", &name))
    }

    /// Points `latest` to `name`. Returns false if `latest` exists and is not a symbolic link.
    pub(crate) fn point_latest(&self, name: SnapshotName) -> Result<bool, SnapshotError> {
        let there = statat(&self.job.folder, "latest", AtFlags::SYMLINK_NOFOLLOW);
        match there {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink => {
                return Ok(false);
            }
            _ => {}
        }
        let moved = (0..LATEST_NAMES).find_map(|number| {
            let fresh = format!("latest.new{number}");
            let _ = unlinkat(&self.state, &fresh, AtFlags::empty());
            match rustix::fs::symlinkat(name.to_string(), &self.state, &fresh) {
                // A foreign object has this name: try the next one.
                Err(rustix::io::Errno::EXIST) => None,
                other => Some(
                    other.and_then(|()| renameat(&self.state, &fresh, &self.job.folder, "latest")),
                ),
            }
        });
        if let Err(e) = moved.unwrap_or(Err(rustix::io::Errno::EXIST)) {
            // Without `latest` the newest name counts. An old `latest` would hide this snapshot.
            let _ = unlinkat(&self.job.folder, "latest", AtFlags::empty());
            return Err(on_volume("replace", &"latest")(e.into()));
        }
        Ok(true)
    }

    /// Removes `latest`, because no finished snapshot is left.
    pub(crate) fn forget_latest(&self) -> Result<(), SnapshotError> {
        match unlinkat(&self.job.folder, "latest", AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(e) => Err(on_volume("remove", &"latest")(e.into())),
        }
    }

    /// The trees to link unchanged files from, best first: the interrupted ones, newest first; then the
    /// snapshot that `latest` points to, which was made last whatever the clock said then. If that one
    /// is incomplete, the next one follows, and then the newest complete one. Nothing follows a complete
    /// snapshot: rsync uses a file of any of these trees whose size and time match, so a file could get
    /// the content of two snapshots ago.
    pub(crate) fn link_sources(
        &self,
        new: SnapshotName,
    ) -> Result<Vec<(Folder, EntryKind)>, SnapshotError> {
        let mut from: Vec<(Folder, EntryKind)> = self
            .partials()?
            .into_iter()
            .rev()
            .map(|folder| (folder, EntryKind::Partial))
            .collect();
        let mut snapshots: Vec<Folder> = self
            .job
            .own_folders()?
            .into_iter()
            .filter(|folder| matches!(folder, Folder::Named(_)))
            .collect();
        // Newest first. Those from a clock that ran ahead come last.
        snapshots.sort_by_key(|folder| (folder.name() > new, std::cmp::Reverse(folder.name())));
        if let Some(latest) = self.job.latest() {
            // The sort is stable: the others keep their order.
            snapshots.sort_by_key(|folder| folder.name() != latest);
        }
        for (position, folder) in snapshots.into_iter().enumerate() {
            let kind = self.job.kind(folder).0;
            let is_complete = kind == EntryKind::Complete;
            if position < 2 || is_complete {
                from.push((folder, kind));
            }
            if is_complete {
                break;
            }
        }
        Ok(from)
    }
}

/// Replaces the file `name` in `folder`. After a crash it is the old or the new file. The new one is
/// durable after the next sync: ext4's journal keeps the order of name changes, and with the volume's
/// mount options (`data=ordered`, `nodelalloc`) the data of a new file is written before its name
/// (Documentation/filesystems/ext4/journal.rst).
pub(crate) fn replace_file(folder: &OwnedFd, name: &str, content: &[u8]) -> io::Result<()> {
    let fill = |file: &mut File| io::Write::write_all(file, content);
    replace_with(folder, name, fill, |error| error).map(drop)
}

/// The same with what `fill` writes. Returns the open file. `failed` makes the error of another step.
pub(crate) fn replace_with<E>(
    folder: &OwnedFd,
    name: &str,
    fill: impl FnOnce(&mut File) -> Result<(), E>,
    failed: impl Fn(io::Error) -> E,
) -> Result<File, E> {
    let new = foreign::temporary_name(folder, &format!("{name}.new")).map_err(&failed)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(folder, &new, flags, Mode::from(0o600));
    let mut file = File::from(file.map_err(|error| failed(error.into()))?);
    let filled = fill(&mut file)
        .and_then(|()| renameat(folder, &new, folder, name).map_err(|error| failed(error.into())));
    if let Err(error) = filled {
        let _ = unlinkat(folder, &new, AtFlags::empty());
        return Err(error);
    }
    Ok(file)
}
