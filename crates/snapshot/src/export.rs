//! Exports snapshots to a folder: each as the tree that it is, files that they share as hard links.
//!
//! The folder gets the layout of a volume (see `job`): a snapshot has its name there only after everything of
//! it was compared with the original and is durable. What an interrupted export leaves is `.sprat/NAME.exporting`.
//! The next export links its files where size and time are equal, and compares them like all others. A backup
//! never links from it: the folder may be another container, and after a crash its files may be torn.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{Advice, FlockOperation, fadvise, flock, renameat, syncfs};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::cancel::Cancel;
use crate::choice::{self, SnapshotChoice};
use crate::compare::{Unread, same_content};
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, RunFolder, STATE_FOLDER, replace_file};
use crate::long_path;
use crate::name::{JobName, SnapshotName};
use crate::name_list::NameList;
use crate::paths::{plain_path, real_path};
use crate::progress::{Phase, Progress};
use crate::restore::judge;
use crate::rsync::{Ended, Invocation, Rsync, Side};
use crate::seen::{Kind, Seen};
use crate::sources::argument;
use crate::sticky_acl;
use crate::suspects::Suspects;
use crate::text::escape_path;
use crate::tree::{Tree, TreeFolder};
use crate::walk::{each_file, open_folder_at};

/// What goes with a snapshot, beside its record: what its run changed, and files that may have changed after
/// they were read. Not its pin: that belongs to the place.
const BESIDE: [&str; 3] = ["json", "changes.zst", "recent"];
/// So many files are remembered as compared. Others are read again for each snapshot that has them.
const COMPARED_MAX: usize = 2_000_000;
/// Trees at the destination to link from: rsync accepts 20.
const LINKED_MAX: usize = 16;
/// The ending of the name of what an interrupted export left, in the state folder.
const EXPORTING: &str = ".exporting";

/// What to export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportSpec {
    /// The snapshots. Each must mean exactly one.
    pub snapshots: Vec<(JobName, SnapshotChoice)>,
    /// Jobs of which all finished snapshots are exported that began before a time.
    pub older: Vec<(JobName, Timestamp)>,
    /// The folder. It must exist: an empty mount point is not the disk that belongs there.
    #[serde(with = "crate::text::path_text")]
    pub to: PathBuf,
    /// rsync.
    #[serde(with = "crate::text::path_text")]
    pub rsync: PathBuf,
    /// Only report what would be exported.
    pub dry_run: bool,
    /// Compare those, too, that an earlier export has finished.
    pub compare_all: bool,
    /// As in [`crate::PruneSpec::suspects`].
    #[serde(default, with = "crate::text::path_text_option")]
    pub suspects: Option<PathBuf>,
}

/// A snapshot that is at the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// Its job.
    pub job: JobName,
    /// The snapshot.
    pub name: SnapshotName,
    /// An earlier export has finished it.
    pub was_there: bool,
    /// How many files, folders and other objects were compared.
    pub compared: u64,
    /// Bytes that were copied. The rest is hard links to what was there.
    pub copied_bytes: u64,
    /// Files whose content is wrong, as a check found. Escaped, within the snapshot.
    #[serde(default)]
    pub damaged: NameList,
}

/// The result of an export.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportReport {
    /// By job and name.
    pub snapshots: Vec<Exported>,
}

/// Exports snapshots of the volume that is mounted at `volume_root`, which may be read-only.
///
/// # Errors
/// A snapshot is not there or not meant uniquely, the destination can't be used or is full, or what is there
/// differs from the snapshot. Snapshots that are finished stay.
pub fn export(
    volume_root: &Path,
    spec: &ExportSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<ExportReport, SnapshotError> {
    progress(Progress::begin(Phase::Checking));
    let rsync = Rsync::find(&spec.rsync)?;
    let to = destination(volume_root, &spec.to)?;
    let _lock = match spec.dry_run {
        true => None,
        false => lock(&to)?,
    };
    let suspects = spec.suspects.as_deref().map(Suspects::load);
    let suspects = suspects.unwrap_or_default();
    let mut report = ExportReport::default();
    for (job, names) in chosen(volume_root, spec)? {
        let from = JobFolder::open(volume_root, Path::new(job.as_str()))?;
        if spec.dry_run {
            report
                .snapshots
                .extend(names.into_iter().map(|name| Exported {
                    was_there: to.join(job.as_str()).join(name.to_string()).is_dir(),
                    job: job.clone(),
                    name,
                    compared: 0,
                    copied_bytes: 0,
                    damaged: NameList::default(),
                }));
            continue;
        }
        refuse_no_folders(&to, &job)?;
        let run =
            JobFolder::open_for_run(&to, &job).map_err(|error| at_destination(&to, &error))?;
        let mut job = Job {
            volume_root,
            name: &job,
            from: &from,
            run: &run,
            to: &to,
            rsync: &rsync,
            compared: HashSet::new(),
        };
        job.recover(cancel)?;
        for name in names {
            job.set_aside(name, cancel)?;
            let mut exported = job
                .export(name, spec.compare_all, progress, cancel)
                .map_err(|mut error| {
                    if let SnapshotError::RestoreDiffers { damaged, .. } = &mut error {
                        *damaged = job.damaged(name, &suspects, cancel);
                    }
                    error
                })?;
            exported.damaged = job.damaged(name, &suspects, cancel);
            if cancel.is_cancelled() {
                return Err(SnapshotError::RestoreCancelled);
            }
            report.snapshots.push(exported);
        }
    }
    Ok(report)
}

/// Checks the destination.
fn destination(volume_root: &Path, to: &Path) -> Result<PathBuf, SnapshotError> {
    let refused = |why: String| SnapshotError::DestinationRefused {
        path: escape_path(to),
        why,
    };
    let plain = plain_path(to).map_err(|why| refused(why.to_owned()))?;
    let about = std::fs::metadata(&plain).map_err(|error| refused(error.to_string()))?;
    if !about.is_dir() {
        return Err(refused("it is not a folder".to_owned()));
    }
    let real = real_path(&plain);
    if real.starts_with(real_path(volume_root)) {
        return Err(refused("it is in the volume itself".to_owned()));
    }
    Ok(real)
}

/// Refuses a link or a file of the user where a folder is needed. In a volume such an object is renamed.
fn refuse_no_folders(to: &Path, job: &JobName) -> Result<(), SnapshotError> {
    let folder = Path::new(job.as_str());
    for folder in [folder.to_owned(), folder.join(STATE_FOLDER)] {
        let about = long_path::lstat(&to.join(&folder));
        if about.is_ok_and(|about| !about.is_dir()) {
            return Err(SnapshotError::DestinationRefused {
                path: escape_path(to),
                why: format!("{} in it is not a folder", escape_path(&folder)),
            });
        }
    }
    Ok(())
}

/// Locks the destination for one export. `None`: its file system has no such locks. Each job's folder there has a
/// lock of its own.
fn lock(to: &Path) -> Result<Option<OwnedFd>, SnapshotError> {
    let refused = |error: io::Error| SnapshotError::DestinationRefused {
        path: escape_path(to),
        why: error.to_string(),
    };
    let folder = open_folder_at(to).map_err(refused)?;
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(folder)),
        Err(Errno::WOULDBLOCK) => Err(SnapshotError::DestinationBusy {
            path: escape_path(to),
        }),
        // NFS locks no folder that is open for reading (flock(2)).
        Err(_) => Ok(None),
    }
}

/// A failure at the destination, in words of the destination.
fn at_destination(to: &Path, error: &SnapshotError) -> SnapshotError {
    if matches!(error, SnapshotError::Busy { .. }) {
        return SnapshotError::DestinationBusy {
            path: escape_path(to),
        };
    }
    SnapshotError::DestinationRefused {
        path: escape_path(to),
        why: match error {
            SnapshotError::Volume { op, object, source } => format!("{op} {object}: {source}"),
            other => other.to_string(),
        },
    }
}

/// The snapshots of each job, oldest first.
fn chosen(
    volume_root: &Path,
    spec: &ExportSpec,
) -> Result<BTreeMap<JobName, BTreeSet<SnapshotName>>, SnapshotError> {
    let mut all: BTreeMap<JobName, BTreeSet<SnapshotName>> = BTreeMap::new();
    for (job, choice) in &spec.snapshots {
        let folder = JobFolder::open(volume_root, Path::new(job.as_str()))?;
        let name = choice::exactly(&folder, choice)?;
        all.entry(job.clone()).or_default().insert(name);
    }
    for (job, before) in &spec.older {
        let folder = JobFolder::open(volume_root, Path::new(job.as_str()))?;
        let own = folder.own_folders()?.into_iter();
        let older = own.filter_map(|folder| match folder {
            Folder::Named(name) if name.moment() < *before => Some(name),
            _ => None,
        });
        all.entry(job.clone()).or_default().extend(older);
    }
    all.retain(|_, names| !names.is_empty());
    Ok(all)
}

/// The export of one job.
struct Job<'e> {
    volume_root: &'e Path,
    name: &'e JobName,
    from: &'e JobFolder,
    /// At the destination.
    run: &'e RunFolder,
    to: &'e Path,
    rsync: &'e Rsync,
    /// Files whose content is known to be equal: the version here, and the inode there.
    compared: HashSet<((u64, i64, i64), u64)>,
}

/// What a comparison found.
#[derive(Debug, Default)]
struct Comparison {
    compared: u64,
    different: NameList,
}

impl Job<'_> {
    fn export(
        &mut self,
        name: SnapshotName,
        compare_there: bool,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Exported, SnapshotError> {
        let mut exported = Exported {
            job: self.name.clone(),
            name,
            was_there: false,
            compared: 0,
            copied_bytes: 0,
            damaged: NameList::default(),
        };
        let finished = Folder::Named(name);
        if self.run.job.is_folder(Path::new(&finished.to_string())) {
            exported.was_there = true;
            // Another machine may have a job and a snapshot of the same names.
            let is_same = match (self.run.job.record(name), self.from.record(name)) {
                (Ok(there), Ok(here)) => there == here,
                _ => false,
            };
            if compare_there || !is_same {
                let found = self.compare(name, finished, progress, cancel)?;
                self.no_difference(&found)?;
                exported.compared = found.compared;
            }
            // An interrupted export may have named it.
            self.sync()?;
            self.discard_kept(name, cancel)?;
            return Ok(exported);
        }
        // With equal size and time, the content may differ all the same. Then all is read.
        for by_content in [false, true] {
            self.run
                .make_inflight(name)
                .map_err(|error| at_destination(self.to, &error))?;
            let copied = self.copy(name, by_content, progress, cancel);
            let compared = copied.and_then(|bytes| {
                exported.copied_bytes += bytes;
                self.sync()?;
                self.compare(name, Folder::Inflight(name), progress, cancel)
            });
            let found = compared.inspect_err(|_| {
                // What fails here fails again at the next export, which reports it.
                let _ = self.set_aside(name, &Cancel::new());
            })?;
            exported.compared = found.compared;
            if found.different.is_empty() {
                break;
            }
            self.discard(Folder::Inflight(name), cancel)?;
            // New files may get the numbers of those that are gone.
            self.compared.clear();
            if by_content {
                self.no_difference(&found)?;
            }
        }
        self.finish(name, cancel)?;
        Ok(exported)
    }

    /// The files of a snapshot that a check found damaged.
    fn damaged(&self, name: SnapshotName, suspects: &Suspects, cancel: &Cancel) -> NameList {
        let tree = self.from.path.join(name.to_string());
        let mut paths = BTreeSet::new();
        let tops = [tree.clone()];
        suspects.each_damaged(self.volume_root, &tree, &tops, cancel, &mut |path, _, _| {
            paths.extend(path.strip_prefix(&tree).map(Path::to_owned));
        });
        let paths = paths.iter().map(|path| Path::new("/").join(path));
        paths.map(|path| escape_path(&path)).collect()
    }

    /// Fills `NAME.inflight`. Returns how many bytes were copied.
    fn copy(
        &self,
        name: SnapshotName,
        by_content: bool,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<u64, SnapshotError> {
        let mut arguments: Vec<OsString> = [
            "-aHAXXS",
            "--numeric-ids",
            "--modify-window=-1",
            "--no-human-readable",
            "--info=progress2,stats2,flist0,name0",
            "--outbuf=L",
        ]
        .map(OsString::from)
        .to_vec();
        if by_content {
            arguments.push("--checksum".into());
        }
        for folder in self.linked(name)? {
            // Relative to the destination.
            let folder = Path::new("..").join(folder);
            arguments.push(argument("--link-dest=", folder.as_os_str()));
        }
        arguments.extend(["--".into(), format!("./{name}/").into()]);
        let into = self.run.job.path.join(Folder::Inflight(name).to_string());
        let mut into = into.into_os_string();
        into.push("/");
        arguments.push(into);
        let invocation = Invocation::new(
            arguments,
            &self.from.path,
            &self.run.job.path,
            Side::OutOfVolume,
        );
        let outcome = self.rsync.run(&invocation, progress, cancel)?;
        judge(&outcome, self.to)?;
        if outcome.ended == Ended::WithUnread {
            return Err(SnapshotError::RestoreFailed {
                ended: "could not read files".to_owned(),
                first_message: outcome.unread.names.first().cloned().unwrap_or_default(),
                damaged: false,
                messages: outcome.unread,
            });
        }
        Ok(outcome.stats.bytes_transferred)
    }

    /// The trees at the destination to link from: the snapshots around this one, the nearest first, and interrupted
    /// ones.
    fn linked(&self, name: SnapshotName) -> Result<Vec<PathBuf>, SnapshotError> {
        let own = self.run.job.own_folders()?;
        let (mut older, mut newer, mut partial) = (Vec::new(), Vec::new(), Vec::new());
        for folder in own {
            match folder {
                Folder::Partial(_) => partial.push(folder),
                Folder::Named(other) if other < name => older.push(folder),
                Folder::Named(_) => newer.push(folder),
                Folder::Inflight(_) | Folder::Work(_) => {}
            }
        }
        let around = older.pop().into_iter().chain(newer.into_iter().take(1));
        let mut linked: Vec<PathBuf> = around.map(|one| one.to_string().into()).collect();
        linked.extend(self.run.job.is_folder(&kept(name)).then(|| kept(name)));
        linked.extend(partial.into_iter().rev().map(|one| one.to_string().into()));
        linked.truncate(LINKED_MAX);
        Ok(linked)
    }

    /// Compares all of a snapshot with what is at the destination.
    fn compare(
        &mut self,
        name: SnapshotName,
        there: Folder,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Comparison, SnapshotError> {
        let ours = Tree::of_job(self.volume_root, self.from, Folder::Named(name));
        let theirs = Tree::of_job(self.to, &self.run.job, there);
        let ahead = ours.ahead();
        let mut found = Comparison::default();
        let mut state = Progress::begin(Phase::Comparing);
        let mut waiting = vec![PathBuf::from("/")];
        let top = Path::new("/");
        if let (Some((here, name)), Some((copy, _))) = (ours.place(top)?, theirs.place(top)?) {
            let pair = [&here, &copy];
            self.compare_object(&ours, pair, &name, top, &mut found, &mut state, cancel)?;
        }
        while let Some(path) = waiting.pop() {
            let (Some(here), Some(copy)) = (ours.folder(&path)?, theirs.folder(&path)?) else {
                found.different.push(escape_path(&path));
                continue;
            };
            let failed = |error| ours.failed("list", &path, error);
            let names = |folder: &TreeFolder| -> io::Result<BTreeSet<PathBuf>> {
                let entries = folder.entries()?.into_iter();
                Ok(entries.map(|entry| entry.name).collect())
            };
            let there = names(&copy).map_err(|error| self.refused(&error))?;
            let all = names(&here).map_err(failed)?;
            for extra in there.difference(&all) {
                found.different.push(escape_path(&path.join(extra)));
            }
            for name in all {
                let path = path.join(&name);
                let pair = [&here, &copy];
                if self.compare_object(&ours, pair, &name, &path, &mut found, &mut state, cancel)? {
                    waiting.push(path);
                }
                if let Some(ahead) = &ahead {
                    ahead.follow(found.compared);
                }
            }
            state.files_done = found.compared;
            progress(state);
        }
        Ok(found)
    }

    /// Compares one object, `name` of a folder here and there. Returns whether it is a folder in both.
    #[allow(clippy::too_many_arguments, reason = "each is another thing")]
    fn compare_object(
        &mut self,
        ours: &Tree,
        [here, there]: [&TreeFolder; 2],
        name: &Path,
        path: &Path,
        found: &mut Comparison,
        state: &mut Progress,
        cancel: &Cancel,
    ) -> Result<bool, SnapshotError> {
        if cancel.is_cancelled() {
            return Err(SnapshotError::RestoreCancelled);
        }
        found.compared += 1;
        let failed = |error| ours.failed("compare", path, error);
        let kept = Seen::of(here, name).map_err(failed)?;
        let copy = Seen::of(there, name).map_err(|error| self.refused(&error))?;
        let (Some(kept), Some(copy)) = (kept, copy) else {
            found.different.push(escape_path(path));
            return Ok(false);
        };
        if kept.found.kind == Kind::Folder && sticky_acl::is_concerned(kept.found.mode) {
            let repaired = sticky_acl::repair(here.at(name), there.at(name));
            repaired.map_err(|error| self.refused(&error))?;
        }
        let equal_xattrs = || here.has_equal_xattrs(name, there, name);
        if kept.change(&copy, equal_xattrs).map_err(failed)?.is_some() {
            found.different.push(escape_path(path));
            return Ok(false);
        }
        if kept.found.kind != Kind::File {
            return Ok(kept.found.kind == Kind::Folder);
        }
        let pair = (kept.version(), copy.inode);
        if kept.found.bytes == 0 || self.compared.contains(&pair) {
            return Ok(false);
        }
        let mut ours = here.open(name).map_err(failed)?;
        let mut theirs = there.open(name).map_err(|error| self.refused(&error))?;
        // Not what was written, but what the disk has. Fails only if there is no cache.
        let _ = fadvise(&theirs, 0, None, Advice::DontNeed);
        let mut go_on = |read: &[u8]| {
            state.bytes_done += read.len() as u64;
            !cancel.is_cancelled()
        };
        match same_content(&mut ours, &mut theirs, &mut go_on) {
            Ok(Some(true)) if self.compared.len() < COMPARED_MAX => {
                self.compared.insert(pair);
            }
            Ok(Some(true)) => {}
            Ok(Some(false)) => found.different.push(escape_path(path)),
            Ok(None) => return Err(SnapshotError::RestoreCancelled),
            Err(Unread::Kept(error)) => return Err(failed(error)),
            Err(Unread::Live(error)) => return Err(self.refused(&error)),
        }
        Ok(false)
    }

    fn no_difference(&self, found: &Comparison) -> Result<(), SnapshotError> {
        match found.different.is_empty() {
            true => Ok(()),
            false => Err(SnapshotError::RestoreDiffers {
                path: escape_path(self.to),
                different: found.different.clone(),
                damaged: NameList::default(),
            }),
        }
    }

    /// Gives the snapshot its name, with what lies beside it.
    fn finish(&self, name: SnapshotName, cancel: &Cancel) -> Result<(), SnapshotError> {
        for ending in BESIDE {
            let file = format!("{name}.{ending}");
            let content = match std::fs::read(self.from.path.join(STATE_FOLDER).join(&file)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                read => read.map_err(crate::job::on_volume("read", &file))?,
            };
            replace_file(&self.run.state, &file, &content)
                .map_err(|source| self.refused(&source))?;
        }
        self.sync()?;
        self.run
            .inflight_becomes(name, Folder::Named(name))
            .map_err(|error| at_destination(self.to, &error))?;
        let newest = self.run.job.own_folders()?.into_iter().rev();
        let newest = newest.into_iter().find_map(|folder| match folder {
            Folder::Named(name) => Some(name),
            _ => None,
        });
        if let Some(newest) = newest {
            self.run
                .point_latest(newest)
                .map_err(|error| at_destination(self.to, &error))?;
        }
        self.sync()?;
        // Its files are in the snapshot now.
        self.discard_kept(name, cancel)
    }

    /// Finishes the removals of an earlier export. What a backup left in a container is not touched.
    fn recover(&self, cancel: &Cancel) -> Result<(), SnapshotError> {
        for away in self.run.half_removed()? {
            self.run.remove_away(&away, cancel, &mut |_| {})?;
        }
        Ok(())
    }

    /// What was copied so far of this snapshot serves the next export. Of two interrupted ones, that with more files
    /// stays.
    fn set_aside(&self, name: SnapshotName, cancel: &Cancel) -> Result<(), SnapshotError> {
        let (inflight, kept) = (
            PathBuf::from(Folder::Inflight(name).to_string()),
            kept(name),
        );
        let Some(files) = self.files_in(&inflight)? else {
            return Ok(());
        };
        if self.files_in(&kept)?.is_some_and(|before| before >= files) {
            return self.discard(Folder::Inflight(name), cancel);
        }
        self.discard_kept(name, cancel)?;
        renameat(&self.run.job.folder, &inflight, &self.run.job.folder, &kept)
            .map_err(|error| self.refused(&error.into()))
    }

    /// How many files a tree of the job has. `None`: there is no such tree.
    fn files_in(&self, tree: &Path) -> Result<Option<u64>, SnapshotError> {
        if !self.run.job.is_folder(tree) {
            return Ok(None);
        }
        let mut files = 0;
        open_folder_at(&self.run.job.path.join(tree))
            .and_then(|root| each_file(&root, &mut |_, _| files += 1))
            .map_err(|error| self.refused(&error))?;
        Ok(Some(files))
    }

    /// Removes what earlier exports of this snapshot left.
    fn discard_kept(&self, name: SnapshotName, cancel: &Cancel) -> Result<(), SnapshotError> {
        let kept = kept(name);
        match (self.run.job.is_folder(&kept), kept.file_name()) {
            (true, Some(kept)) => self.run.remove_away(Path::new(kept), cancel, &mut |_| {}),
            _ => Ok(()),
        }
    }

    /// Removes a tree that is no finished snapshot, if it is there. The record of that name stays.
    fn discard(&self, folder: Folder, cancel: &Cancel) -> Result<(), SnapshotError> {
        if !self.run.job.is_folder(Path::new(&folder.to_string())) {
            return Ok(());
        }
        let away = self.run.rename_away(folder)?;
        self.run.remove_away(&away, cancel, &mut |_| {})
    }

    /// The job's folder may be on a disk of its own.
    fn sync(&self) -> Result<(), SnapshotError> {
        let folder = open_folder_at(&self.run.job.path).map_err(|error| self.refused(&error))?;
        syncfs(folder.as_fd()).map_err(|error| self.refused(&error.into()))
    }

    fn refused(&self, error: &io::Error) -> SnapshotError {
        SnapshotError::DestinationRefused {
            path: escape_path(self.to),
            why: error.to_string(),
        }
    }
}

/// Where an interrupted export of a snapshot is kept, in the job's folder.
fn kept(name: SnapshotName) -> PathBuf {
    Path::new(STATE_FOLDER).join(format!("{name}{EXPORTING}"))
}
