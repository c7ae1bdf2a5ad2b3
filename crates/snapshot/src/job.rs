//! One job's folder on the volume: its entries, its lock, the recovery of what a run left, `latest`.
//!
//! | name in `/JOB` | is | gets there by |
//! | --- | --- | --- |
//! | `NAME.inflight` | a run at work, or killed | mkdir; always new and empty |
//! | `NAME` | a finished snapshot | rename of the former, after its record and `syncfs` (without where no file's content was copied) |
//! | `latest` | relative symbolic link to a finished snapshot | rename over the old one |
//! | `NAME.partial` | an interrupted tree whose files are all durable | rename of `.inflight` |
//! | `.sprat/NAME.json` | the record | write, rename |
//! | `.sprat/NAME.recent` | files that may have changed after they had been read, see `recent` | write, rename |
//! | `.sprat/NAME.checkpoint` | what of `NAME.inflight` is durable | see `checkpoint` |
//! | `.sprat/deleting-*` | a tree being removed, a snapshot's or an interrupted one | rename; the next run or prune goes on removing |
//! | `.sprat/NAME.pin` | somebody wants the snapshot kept; content and owner don't matter | – |

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, flock, fsync, mkdirat, renameat, statat,
};

use crate::begun;
use crate::checkpoint;
use crate::error::SnapshotError;
use crate::foreign;
use crate::name::{JobName, SnapshotName};
use crate::recent;
use crate::record::{EntryKind, RunRecord, Warning};
use crate::rsync::ends_run;
use crate::scout::Scout;
use crate::spec::Cancel;
use crate::text::escape_path;
use crate::walk::{
    is_folder, names_in, open_folder, open_folder_at, remove_content, remove_content_telling,
};

pub(crate) const STATE_FOLDER: &str = ".sprat";
const DELETING: &str = "deleting-";
/// Begins as what the next run goes on removing.
const LINKS_TO_COPY: &str = "deleting-links-to-copy";
/// Before a number, where somebody else's object has the name.
const NUMBERED: char = '~';
/// So many names are tried where somebody else's objects have those before.
const NAMES_TRIED_MAX: u32 = 100;
const INFLIGHT: &str = ".inflight";
const PARTIAL: &str = ".partial";
/// A record is some kilobytes, with all its lists full about 300; more is not ours.
const RECORD_BYTES_MAX: u64 = 16 << 20;
/// Names that `latest` may have before it gets its own.
const LATEST_NAMES: u32 = 10;
/// rsync takes 20 `--link-dest`; the snapshots (at most 4) and a copy need some too.
pub(crate) const PARTIALS_MAX: usize = 10;

/// A folder of the job, by what its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Folder {
    Named(SnapshotName),
    Inflight(SnapshotName),
    Partial(SnapshotName),
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
            Self::Named(name) | Self::Inflight(name) | Self::Partial(name) => name,
        }
    }
}

impl std::fmt::Display for Folder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named(name) => write!(f, "{name}"),
            Self::Inflight(name) => write!(f, "{name}{INFLIGHT}"),
            Self::Partial(name) => write!(f, "{name}{PARTIAL}"),
        }
    }
}

/// A job's folder, opened.
#[derive(Debug)]
pub(crate) struct JobFolder {
    pub(crate) path: PathBuf,
    job: String,
    folder: OwnedFd,
}

/// A job's folder, locked for one run. Dropping it unlocks.
#[derive(Debug)]
pub(crate) struct RunFolder {
    pub(crate) job: JobFolder,
    /// `.sprat`; carries the flock.
    pub(crate) state: OwnedFd,
    /// What lay where the folders belong and was renamed.
    renamed: Vec<Warning>,
}

fn on_volume(op: &'static str, object: &dyn ToString) -> impl FnOnce(io::Error) -> SnapshotError {
    let object = object.to_string();
    move |source| SnapshotError::Volume { op, object, source }
}

impl JobFolder {
    /// Opens the folder of `job`; `job` is a name found on the volume or given by the user.
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

    /// Opens the folder of `job` for a run, makes what is missing, and locks it.
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
        // Only root reads it: names of unread files stand in it.
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

    /// The names of all folders in it, ours and others', without the state folder.
    pub(crate) fn folders(&self) -> Result<Vec<PathBuf>, SnapshotError> {
        let names =
            names_in(self.folder.as_fd(), Path::new(".")).map_err(on_volume("list", &self.job))?;
        Ok(names
            .into_iter()
            .filter(|(name, kind)| match kind {
                FileType::Directory => name != Path::new(STATE_FOLDER),
                FileType::Unknown => self.is_folder(name),
                _ => false,
            })
            .map(|(name, _)| name)
            .collect())
    }

    pub(crate) fn is_folder(&self, name: &Path) -> bool {
        statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| is_folder(&stat))
    }

    /// Our own folders, in the order of their names.
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

    /// What `folder` is, by its name and record.
    pub(crate) fn kind(&self, folder: Folder) -> (EntryKind, Result<RunRecord, String>) {
        let record = self.record(folder.name());
        let kind = match (folder, &record) {
            (Folder::Inflight(_), _) => EntryKind::Inflight,
            (Folder::Partial(_), _) => EntryKind::Partial,
            (Folder::Named(_), Ok(record)) if record.finished_run && record.complete => {
                EntryKind::Good
            }
            (Folder::Named(_), Ok(record)) if record.finished_run => EntryKind::Unread,
            (Folder::Named(_), _) => EntryKind::Unrecorded,
        };
        (kind, record)
    }

    /// The record of the newest snapshot that is whole.
    pub(crate) fn last_good(&self) -> Result<Option<RunRecord>, SnapshotError> {
        let own = self.own_folders()?.into_iter().rev();
        Ok(own
            .filter(|own| matches!(own, Folder::Named(_)))
            .map(|own| self.kind(own))
            .find(|(kind, _)| *kind == EntryKind::Good)
            .and_then(|(_, record)| record.ok()))
    }

    /// Whether somebody pinned it: `.sprat/NAME.pin` is there.
    pub(crate) fn is_pinned(&self, name: SnapshotName) -> bool {
        let pin = format!("{STATE_FOLDER}/{name}.pin");
        statat(&self.folder, pin, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// The finished snapshot that was made last: the one that `latest` points to, or one after it
    /// whose run ended before it could point there.
    pub(crate) fn latest(&self) -> Option<SnapshotName> {
        let target = rustix::fs::readlinkat(&self.folder, "latest", Vec::new()).ok()?;
        let named = SnapshotName::parse(target.to_str().ok()?).ok()?;
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
        // A greater name may be that of a clock that ran ahead. A run links from the last snapshot
        // before it, so its record proves the order.
        let mut last = named;
        while let Some(at) = later
            .iter()
            .position(|name| self.is_made_after(*name, last))
        {
            last = later.swap_remove(at);
        }
        Some(last)
    }

    fn is_made_after(&self, name: SnapshotName, before: SnapshotName) -> bool {
        let before = before.to_string();
        self.record(name).is_ok_and(|record| {
            let from = record.linked_from.iter();
            record.finished_run && from.into_iter().any(|linked| linked.folder == before)
        })
    }
}

/// The warning of a tree that can't be removed. What concerns the whole volume is an error.
fn kept(folder: &Path, error: SnapshotError) -> Result<Warning, SnapshotError> {
    match &error {
        SnapshotError::Volume { source, .. }
            if source.raw_os_error().is_some_and(|errno| !ends_run(errno)) =>
        {
            Ok(Warning::LeftoverKept {
                folder: escape_path(folder),
                reason: format!("{error}: {source}"),
            })
        }
        _ => Err(error),
    }
}

fn is_loop(e: &io::Error) -> bool {
    e.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

/// Opens a regular file for reading; never waits on a fifo, never follows a symbolic link.
fn open_plain(path: &Path) -> io::Result<std::fs::File> {
    use rustix::fs::{OFlags, open};
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = std::fs::File::from(open(path, flags, Mode::empty())?);
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
    /// Every name that a new snapshot must not get.
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

    fn state_names(&self) -> Result<Vec<(PathBuf, FileType)>, SnapshotError> {
        names_in(self.state.as_fd(), Path::new(".")).map_err(on_volume("list", &STATE_FOLDER))
    }

    /// Makes the new, empty folder that rsync will fill.
    pub(crate) fn make_inflight(&self, name: SnapshotName) -> Result<Folder, SnapshotError> {
        let folder = Folder::Inflight(name);
        // Exclusive: never into a folder that is there already.
        mkdirat(&self.job.folder, folder.to_string(), Mode::from(0o755))
            .map_err(|e| on_volume("make folder", &folder)(e.into()))?;
        Ok(folder)
    }

    /// Takes up what earlier runs left: goes on removing what was being removed, and makes each
    /// leftover `.inflight` a `.partial` of which only durable files are left.
    pub(crate) fn recover(&self, cancel: &Cancel) -> Result<Vec<Warning>, SnapshotError> {
        let mut warnings = Vec::new();
        for (name, _) in self.state_names()? {
            let deleting = name.to_str().is_some_and(|name| name.starts_with(DELETING));
            if !deleting {
                continue;
            }
            let path = Path::new(STATE_FOLDER).join(&name);
            if !self.job.is_folder(&path) {
                // Never made by sprat.
                warnings.push(Warning::ForeignObject {
                    path: format!("{}/{}", self.job.job, escape_path(&path)),
                    done: "left alone".to_owned(),
                });
            } else if let Err(error) = self.finish_removal(&name, cancel) {
                warnings.push(kept(&path, error)?);
            } else {
                self.forget_record(&name);
            }
        }
        warnings.extend(self.renamed.iter().cloned());
        for folder in self.job.own_folders()? {
            if let Folder::Inflight(name) = folder {
                warnings.extend(self.recover_inflight(name, cancel)?);
            }
        }
        let partials = self.partials()?;
        if partials.len() > PARTIALS_MAX {
            // The newest may have been stopped early, the oldest was the first and maybe longest.
            for partial in &partials[1..=partials.len() - PARTIALS_MAX] {
                if let Err(error) = self.remove(*partial, cancel) {
                    warnings.push(kept(Path::new(&partial.to_string()), error)?);
                }
            }
        }
        Ok(warnings)
    }

    fn recover_inflight(
        &self,
        name: SnapshotName,
        cancel: &Cancel,
    ) -> Result<Option<Warning>, SnapshotError> {
        let folder = Folder::Inflight(name);
        let tree = open_folder(self.job.folder.as_fd(), Path::new(&folder.to_string()))
            .map_err(on_volume("open", &folder))?;
        let Some(durable_before_ns) = checkpoint::read(&self.state, name) else {
            // Nothing in it can be trusted. Its links are in older snapshots anyway.
            return match self.remove(folder, cancel) {
                Ok(()) => Ok(None),
                Err(error) => kept(Path::new(&folder.to_string()), error).map(Some),
            };
        };
        let partial = Folder::Partial(name).to_string();
        if statat(&self.job.folder, &partial, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            // Somebody else's: what was copied can't get its name.
            self.remove(folder, cancel)?;
            return Ok(Some(Warning::ForeignObject {
                path: format!("{}/{partial}", self.job.job),
                done: "left alone, and the interrupted run of that name was removed".to_owned(),
            }));
        }
        let swept =
            crate::walk::remove_files_changed_since(tree.as_fd(), durable_before_ns, cancel)
                .map_err(on_volume("sweep", &folder))?;
        let Some(files) = swept else {
            return Err(SnapshotError::Cancelled);
        };
        recent::list_again(&self.state, name, &tree).map_err(on_volume("list", &folder))?;
        self.inflight_becomes(name, Folder::Partial(name))?;
        checkpoint::forget(&self.state, name);
        Ok((files > 0).then_some(Warning::CrashedRunSwept { files }))
    }

    /// Renames `NAME.inflight`, whose content is durable. The new name is so after the next sync,
    /// and never before what was done earlier.
    pub(crate) fn inflight_becomes(
        &self,
        name: SnapshotName,
        to: Folder,
    ) -> Result<(), SnapshotError> {
        let from = Folder::Inflight(name);
        // A rename onto a folder replaces it only if it is empty; ours never exists.
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

    /// All `.partial`, oldest first.
    pub(crate) fn partials(&self) -> Result<Vec<Folder>, SnapshotError> {
        let own = self.job.own_folders()?;
        Ok(own
            .into_iter()
            .filter(|folder| matches!(folder, Folder::Partial(_)))
            .collect())
    }

    /// Removes one of our interrupted trees, and its record. Once this has begun, each later run
    /// goes on with it.
    pub(crate) fn remove(&self, folder: Folder, cancel: &Cancel) -> Result<(), SnapshotError> {
        assert!(
            !matches!(folder, Folder::Named(_)),
            "finished snapshots are not removed here"
        );
        let away = self.rename_away(folder)?;
        checkpoint::forget(&self.state, folder.name());
        recent::forget(&self.state, folder.name());
        begun::forget(&self.state, folder.name());
        let record = format!("{}.json", folder.name());
        let _ = rustix::fs::unlinkat(&self.state, record, AtFlags::empty());
        self.finish_removal(&away, cancel)
    }

    /// Renames a tree into the state folder, to a name that is free. Returns that.
    fn rename_away(&self, folder: Folder) -> Result<PathBuf, SnapshotError> {
        let first = format!("{DELETING}{folder}");
        let others = (2..=NAMES_TRIED_MAX).map(|n| format!("{first}{NUMBERED}{n}"));
        let is_free = |name: &String| statat(&self.state, name, AtFlags::SYMLINK_NOFOLLOW).is_err();
        let away = std::iter::once(first.clone())
            .chain(others)
            .find(is_free)
            .unwrap_or(first);
        renameat(&self.job.folder, folder.to_string(), &self.state, &away)
            .map_err(|e| on_volume("rename", &folder)(e.into()))?;
        Ok(PathBuf::from(away))
    }

    /// The trees that earlier runs began to remove, by their names in the state folder.
    pub(crate) fn half_removed(&self) -> Result<Vec<PathBuf>, SnapshotError> {
        let names = self.state_names()?.into_iter().map(|(name, _)| name);
        let deleting =
            |name: &PathBuf| name.to_str().is_some_and(|name| name.starts_with(DELETING));
        let folder = |name: &PathBuf| self.job.is_folder(&Path::new(STATE_FOLDER).join(name));
        Ok(names.filter(deleting).filter(folder).collect())
    }

    /// Takes a snapshot or an interrupted tree away from where they are, into the state folder; its
    /// record stays until its files are gone, so that its name is not given anew. Returns where it is.
    pub(crate) fn take_away(&self, folder: Folder) -> Result<PathBuf, SnapshotError> {
        self.rename_away(folder)
    }

    /// Forgets the record of a tree whose files are gone.
    pub(crate) fn forget_record(&self, away: &Path) {
        let folder = away.to_str().and_then(|name| name.strip_prefix(DELETING));
        let folder = folder.map(|name| name.split(NUMBERED).next().unwrap_or(name));
        let Some(folder) = folder.and_then(Folder::parse) else {
            return;
        };
        let name = folder.name();
        checkpoint::forget(&self.state, name);
        recent::forget(&self.state, name);
        begun::forget(&self.state, name);
        // A record without a snapshot harms nobody.
        let _ = rustix::fs::unlinkat(&self.state, format!("{name}.json"), AtFlags::empty());
    }

    /// Removes one tree in the state folder, telling how many names are gone so far.
    pub(crate) fn remove_away(
        &self,
        name: &Path,
        cancel: &Cancel,
        tell: &mut dyn FnMut(u64),
    ) -> Result<(), SnapshotError> {
        let object = escape_path(name);
        let tree = open_folder(self.state.as_fd(), name).map_err(on_volume("open", &object))?;
        // One name after the other would cost a round trip each on a slow line.
        let ahead = open_folder(self.state.as_fd(), name).map_err(on_volume("open", &object))?;
        let scout = Scout::begin(ahead, vec![PathBuf::from(".")], None);
        let done = remove_content_telling(tree.as_fd(), cancel, &mut |removed| {
            scout.follow(removed);
            tell(removed);
        });
        drop(scout);
        if !done.map_err(on_volume("remove", &object))? {
            return Err(SnapshotError::PruneCancelled);
        }
        rustix::fs::unlinkat(&self.state, name, AtFlags::REMOVEDIR)
            .map_err(|e| on_volume("remove", &object)(e.into()))
    }

    fn finish_removal(&self, name: &Path, cancel: &Cancel) -> Result<(), SnapshotError> {
        let object = escape_path(name);
        let tree = open_folder(self.state.as_fd(), name).map_err(on_volume("open", &object))?;
        let done = remove_content(tree.as_fd(), cancel).map_err(on_volume("remove", &object))?;
        if !done {
            return Err(SnapshotError::Cancelled);
        }
        rustix::fs::unlinkat(&self.state, name, AtFlags::REMOVEDIR)
            .map_err(|e| on_volume("remove", &object)(e.into()))
    }

    /// Makes the tree of links by which a copy that a person's own rsync made, at `copy` on the
    /// volume, appears with the path of its source, as `--link-dest` needs it; returns its name
    /// relative to the job's folder. Whatever is left of it the next run removes.
    pub(crate) fn link_to_copy(
        &self,
        copy: &Path,
        source: &Path,
    ) -> Result<PathBuf, SnapshotError> {
        let source = source.strip_prefix("/").unwrap_or(source);
        let Some(above) = source.parent() else {
            return Ok(Path::new("..").join(copy));
        };
        let object = escape_path(copy);
        let failed = on_volume("link to", &object);
        let tree = Path::new(STATE_FOLDER).join(LINKS_TO_COPY);
        if std::fs::symlink_metadata(self.job.path.join(&tree)).is_ok() {
            // Never through somebody else's symbolic link.
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        let mut to = PathBuf::from("../../..");
        to.extend(above.components().map(|_| ".."));
        to.push(copy);
        let parents = self.job.path.join(&tree).join(above);
        std::fs::create_dir_all(&parents)
            .and_then(|()| std::os::unix::fs::symlink(to, self.job.path.join(&tree).join(source)))
            .map_err(failed)?;
        Ok(tree)
    }

    /// Removes what [`RunFolder::link_to_copy`] made; what can't be removed the next run removes.
    pub(crate) fn forget_link_to_copy(&self, cancel: &Cancel) {
        let _ = self.finish_removal(Path::new(LINKS_TO_COPY), cancel);
    }

    /// Writes the record so that it is whole or absent; durable after the next sync.
    pub(crate) fn write_record(&self, record: &RunRecord) -> Result<(), SnapshotError> {
        let name = format!("{}.json", record.name);
        let mut text = serde_json::to_vec_pretty(record)
            .map_err(|e| on_volume("write", &name)(io::Error::other(e)))?;
        text.push(b'\n');
        replace_file(&self.state, &name, &text).map_err(on_volume("write", &name))
    }

    /// Points `latest` to `name`. Returns false where `latest` is something of somebody else's.
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
            let _ = rustix::fs::unlinkat(&self.state, &fresh, AtFlags::empty());
            match rustix::fs::symlinkat(name.to_string(), &self.state, &fresh) {
                // Something else stands there: the next name.
                Err(rustix::io::Errno::EXIST) => None,
                other => Some(
                    other.and_then(|()| renameat(&self.state, &fresh, &self.job.folder, "latest")),
                ),
            }
        });
        if let Err(e) = moved.unwrap_or(Err(rustix::io::Errno::EXIST)) {
            // Without it the newest name counts; an old one would hide this snapshot.
            let _ = rustix::fs::unlinkat(&self.job.folder, "latest", AtFlags::empty());
            return Err(on_volume("replace", &"latest")(e.into()));
        }
        Ok(true)
    }

    /// The trees to link unchanged files from, best first: interrupted ones, newest first, then the
    /// snapshot before: the one that `latest` points to was made last, whatever the clock said then.
    /// Only where that one is incomplete, others follow, of which one is whole if there is any whole
    /// one: rsync takes a file of any of them whose size and time fit, so behind a whole one a file
    /// could come back as it was two snapshots ago.
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
        // Newest first; those of a clock that ran ahead come last.
        snapshots.sort_by_key(|folder| (folder.name() > new, std::cmp::Reverse(folder.name())));
        if let Some(latest) = self.job.latest() {
            // A stable sort: the others keep their order.
            snapshots.sort_by_key(|folder| folder.name() != latest);
        }
        for (place, folder) in snapshots.into_iter().enumerate() {
            let kind = self.job.kind(folder).0;
            let is_whole = kind == EntryKind::Good;
            if place < 2 || is_whole {
                from.push((folder, kind));
            }
            if is_whole {
                break;
            }
        }
        Ok(from)
    }
}

/// Replaces the file `name` in `folder` so that it is the old or the new one, also after a crash.
/// Durable after the next sync: ext4 keeps the order of names in its journal, and, as the volume is
/// mounted (`data=ordered`, `nodelalloc`), writes the data of a new file before the names that
/// lead to it (Documentation/filesystems/ext4/journal.rst).
pub(crate) fn replace_file(folder: &OwnedFd, name: &str, content: &[u8]) -> io::Result<()> {
    use rustix::fs::{OFlags, openat};
    let new = foreign::temporary_name(folder, &format!("{name}.new"))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut file = std::fs::File::from(openat(folder, &new, flags, Mode::from(0o600))?);
    io::Write::write_all(&mut file, content)?;
    Ok(renameat(folder, &new, folder, name)?)
}
