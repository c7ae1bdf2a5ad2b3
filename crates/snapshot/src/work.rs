//! The writable subvolume `.sprat/work` of a job on a btrfs volume. rsync writes into it, and each finished
//! snapshot is a read-only snapshot of it.
//!
//! rsync into an existing tree is not exact: what is here prepares the tree so that it becomes exact.
//! Nothing needs to be prepared for a crash: each commit of the volume is whole, so a run goes on in
//! what an interrupted one left.

mod hosts;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{FileType, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{AtFlags, Stat, renameat, statat, unlinkat};

use crate::begun;
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, RunFolder, STATE_FOLDER, WORK_PATH, on_volume, replace_file};
use crate::large_files;
use crate::long_path::{self, lstat};
use crate::name::SnapshotName;
use crate::progress::Progress;
use crate::pulled_source::host_folder;
use crate::recent;
use crate::reflink;
use crate::scout;
use crate::spec::SnapshotSpec;
use crate::subvolume_ops::Subvolumes;
use crate::subvolumes;
use crate::suspects::Suspects;
use crate::text::{escape_path, unescape_path};
use crate::unresponsive;
use crate::walk::{
    folder_of, is_folder, leads_within, open_folder, open_folder_at, remove_content,
};

pub(crate) use hosts::forget_held;

/// Holds the name of the run that last began. If there is no snapshot of that name, the run was
/// interrupted.
const LAST_RUN: &str = "work.run";
/// The beginning of the name of a file while its content is separated from its links.
const SEPARATED: &str = ".sprat-separated-";

/// The run that was interrupted in the job's `work`.
pub(crate) fn interrupted(job: &JobFolder) -> Option<SnapshotName> {
    let text = std::fs::read_to_string(job.path.join(STATE_FOLDER).join(LAST_RUN)).ok()?;
    let name = SnapshotName::parse(text.trim_end()).ok()?;
    let finished = Folder::Named(name).to_string();
    (!job.is_folder(Path::new(&finished)) && job.is_folder(Path::new(WORK_PATH))).then_some(name)
}

/// The runs that have left a list of recent files and no snapshot. Their files may still be in `work`: the run
/// that was interrupted last may have ended before it compared them.
pub(crate) fn unfinished(folder: &RunFolder) -> Result<Vec<SnapshotName>, SnapshotError> {
    let own = folder.job.own_folders()?;
    let named = recent::runs(&folder.state).map_err(on_volume("list", &WORK_PATH))?;
    Ok(named
        .into_iter()
        .filter(|name| !own.contains(&Folder::Named(*name)))
        .collect())
}

/// The subvolume of one run.
pub(crate) struct Work<'a> {
    folder: &'a RunFolder,
    subvolumes: &'a dyn Subvolumes,
    path: PathBuf,
    /// The folders of the hosts that the run pulls from.
    hosts: Vec<PathBuf>,
}

impl<'a> Work<'a> {
    pub(crate) fn new(
        folder: &'a RunFolder,
        subvolumes: &'a dyn Subvolumes,
        hosts: Vec<PathBuf>,
    ) -> Self {
        Self {
            folder,
            subvolumes,
            path: folder.job.path.join(WORK_PATH),
            hosts,
        }
    }

    /// Makes the kernel free the space of deleted subvolumes while the run goes on. An earlier session may
    /// have ended too early.
    pub(crate) fn go_on_with_deletions(&self) -> Result<(), SnapshotError> {
        let root = &self.folder.job.path;
        let failed = || on_volume("free the space of", &"deleted snapshots");
        match self.subvolumes.deletions_pending(root).map_err(failed())? {
            true => self.subvolumes.commit(root).map_err(failed()),
            false => Ok(()),
        }
    }

    /// Opens it for the run `name`. If there is none, makes it from the snapshot `last`.
    pub(crate) fn begin(
        &self,
        name: SnapshotName,
        last: Option<Folder>,
        suspects: &Suspects,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        if lstat(&self.path).is_ok() {
            let is_one = self.subvolumes.is_subvolume(&self.path);
            if !is_one.map_err(on_volume("inspect", &WORK_PATH))? {
                return Err(SnapshotError::Layout {
                    object: format!("{}/{WORK_PATH}", self.folder.job.job),
                    why: "is not a subvolume".to_owned(),
                });
            }
        } else {
            self.make(last, suspects, cancel)?;
        }
        let text = format!("{name}\n");
        replace_file(&self.folder.state, LAST_RUN, text.as_bytes())
            .map_err(on_volume("write", &LAST_RUN))
    }

    fn make(
        &self,
        last: Option<Folder>,
        suspects: &Suspects,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let failed = || on_volume("make", &WORK_PATH);
        let last = last.map(|folder| self.folder.job.path.join(folder.to_string()));
        if let Some(last) = &last
            && self.subvolumes.is_subvolume(last).map_err(failed())?
        {
            return self
                .subvolumes
                .snapshot(last, &self.path, false)
                .map_err(failed());
        }
        self.subvolumes.make(&self.path).map_err(failed())?;
        // A snapshot that somebody made by hand may be a plain folder.
        let is_right = |about: &Metadata| suspects.find(about).is_none();
        if let Some(last) = last
            && !reflink::tree(&last, &self.path, &is_right, cancel).map_err(failed())?
        {
            return Err(SnapshotError::Cancelled);
        }
        Ok(())
    }

    /// Makes the finished tree the read-only snapshot `name`. Everything is durable when this returns.
    pub(crate) fn becomes(&self, name: SnapshotName) -> Result<(), SnapshotError> {
        let to = self.folder.job.path.join(Folder::Named(name).to_string());
        self.subvolumes
            .snapshot(&self.path, &to, true)
            .map_err(on_volume("make the snapshot", &name))
    }

    /// Deletes it: its content can't be trusted.
    pub(crate) fn distrust(&self) {
        // If the volume is gone, the last commit counts, which is whole.
        let _ = self.subvolumes.delete(&self.path);
        let _ = self.subvolumes.commit(&self.folder.job.path);
    }

    /// Removes what belongs to none of the sources (absolute paths): rsync deletes only within a source. The folders
    /// of hosts are no part of the source `/`.
    pub(crate) fn keep_only(
        &self,
        sources: &[PathBuf],
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        self.keep_only_below(PathBuf::from("/"), sources, cancel)
    }

    /// Empties the folders whose source is on another file system than `all` the sources (absolute paths) above it:
    /// with `--one-file-system` rsync neither copies nor deletes what is in such a folder. What leads to
    /// another source stays.
    pub(crate) fn empty_mount_points(
        &self,
        all: &[PathBuf],
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let is_kept = |tree: &Path, path: &Path| {
            lstat(&in_tree(tree, path)).is_ok_and(|about| about.is_dir())
        };
        for source in all {
            let below = source.strip_prefix("/").unwrap_or(source);
            if !leads_within(&self.path, below) || !is_kept(&self.path, source) {
                continue;
            }
            let (source, tree) = (source.clone(), self.path.clone());
            let others = unresponsive::ask(progress, cancel, move || {
                subvolumes::on_other_devices(&source, &|path| is_kept(&tree, path))
            })?;
            for (path, _) in others {
                self.keep_only_below(path, all, cancel)?;
            }
        }
        Ok(())
    }

    fn keep_only_below(
        &self,
        top: PathBuf,
        sources: &[PathBuf],
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let failed = || on_volume("clear", &WORK_PATH);
        let mut todo = vec![top];
        while let Some(folder) = todo.pop() {
            if sources.contains(&folder) {
                if folder == Path::new("/") {
                    let hosts = self.hosts.iter().map(|host| folder.join(host));
                    todo.extend(hosts.filter(|host| lstat(&self.in_tree(host)).is_ok()));
                }
                continue;
            }
            let at = self.in_tree(&folder);
            let open = open_folder(rustix::fs::CWD, &at).map_err(failed())?;
            for name in long_path::names(&at).map_err(failed())? {
                let is_begun = begun::is_file_name(&name) || large_files::is_part_name(&name);
                if is_begun && folder == Path::new("/") {
                    continue;
                }
                let path = folder.join(&name);
                let leads_to_source = sources.iter().any(|source| source.starts_with(&path));
                if !leads_to_source {
                    remove(open.as_fd(), Path::new(&name), cancel).map_err(failed())?;
                } else if lstat(&self.in_tree(&path)).is_ok_and(|about| about.is_dir()) {
                    todo.push(path);
                }
            }
            if cancel.is_cancelled() {
                return Err(SnapshotError::Cancelled);
            }
        }
        Ok(())
    }

    /// Separates hard links that the source no longer has. rsync writes a changed file as a new one, but sets the
    /// attributes of an unchanged one in place, and that would change its other names, too.
    ///
    /// A file of `suspects` stays as it is: a copy would have its wrong content in another file, which no list
    /// names. All its names are read from the source after rsync's run.
    ///
    /// Returns the large files, relative to the tree, that are neither of `suspects` nor of another host, and how many
    /// entries the tree has. The kernel's caches have them all then.
    pub(crate) fn separate_links(
        &self,
        suspects: &Suspects,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(Vec<(PathBuf, Metadata)>, u64), SnapshotError> {
        let device = lstat(&self.path).map_err(on_volume("inspect", &WORK_PATH))?;
        let device = device.dev();
        let (special, entries) = self.linked_or_large(device, cancel)?;
        let mut large = Vec::new();
        let mut linked: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
        for below in special {
            let path = self.path.join(&below);
            let about = lstat(&path).map_err(on_volume("walk", &WORK_PATH))?;
            if about.dev() != device {
                return Err(SnapshotError::Layout {
                    object: format!("{}/{WORK_PATH}/{}", self.folder.job.job, escape_path(&below)),
                    why: "is a subvolume of its own, and no snapshot would have what is in it. Remove it with \
                          `sprat mount --rw` and `btrfs subvolume delete`"
                        .to_owned(),
                });
            }
            if about.is_dir() || suspects.find(&about).is_some() {
                continue;
            }
            if about.nlink() > 1 {
                linked.entry(about.ino()).or_default().push(path);
            } else if large_files::is_large(&about) && !self.is_of_host(&below) {
                large.push((below, about));
            }
        }
        let linked: Vec<Vec<PathBuf>> = linked.into_values().collect();
        let sources: Vec<Vec<PathBuf>> = linked.iter().map(|all| self.sources_of(all)).collect();
        let sources = unresponsive::ask(progress, cancel, move || {
            let identity =
                |path: &PathBuf| lstat(path).ok().map(|about| (about.dev(), about.ino()));
            let all = sources.iter();
            all.map(|paths| paths.iter().map(identity).collect())
                .collect::<Vec<Vec<_>>>()
        })?;
        for (names, sources) in linked.iter().zip(&sources) {
            if cancel.is_cancelled() {
                return Err(SnapshotError::Cancelled);
            }
            for path in no_longer_linked(names, sources) {
                self.separate(path)
                    .map_err(on_volume("separate", &WORK_PATH))?;
            }
        }
        Ok((large, entries))
    }

    /// The paths of all files that have several names or may be large, and of what is not in the subvolume `device`, sorted,
    /// and how many entries there are.
    fn linked_or_large(
        &self,
        device: u64,
        cancel: &Cancel,
    ) -> Result<(Vec<PathBuf>, u64), SnapshotError> {
        let failed = || on_volume("walk", &WORK_PATH);
        let root = open_folder_at(&self.path).map_err(failed())?;
        let found = Arc::new(Mutex::new(Ok(Vec::new())));
        let (to, cancel) = (Arc::clone(&found), cancel.clone());
        let meet = move |path: &Path, stat: io::Result<&Stat>| {
            let is_wanted = stat.as_ref().map_or(true, |stat| {
                let bytes = u64::try_from(stat.st_size).unwrap_or(0);
                stat.st_dev != device
                    || (!is_folder(stat) && (stat.st_nlink > 1 || bytes >= large_files::BYTES_MIN))
            });
            if is_wanted {
                let mut to = to.lock().unwrap_or_else(PoisonError::into_inner);
                match (stat, &mut *to) {
                    (Ok(_), Ok(paths)) => paths.push(path.to_owned()),
                    (Err(error), to @ Ok(_)) => *to = Err(error),
                    (_, Err(_)) => {}
                }
                return to.is_ok() && !cancel.is_cancelled();
            }
            !cancel.is_cancelled()
        };
        let entries = scout::each_at_once(root, Box::new(meet));
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        let mut paths: Vec<PathBuf> =
            std::mem::replace(&mut *found, Ok(Vec::new())).map_err(failed())?;
        paths.sort_unstable();
        Ok((paths, entries))
    }

    /// The sources of the names of one file. None if any of them is on another host: its files are not known here.
    fn sources_of(&self, names: &[PathBuf]) -> Vec<PathBuf> {
        let below = names
            .iter()
            .filter_map(|path| path.strip_prefix(&self.path).ok());
        if below.clone().any(|below| self.is_of_host(below)) {
            return Vec::new();
        }
        below.map(|below| Path::new("/").join(below)).collect()
    }

    /// Gives `path` a file of its own. rsync makes anything but a regular file again.
    fn separate(&self, path: &Path) -> io::Result<()> {
        let (folder, name) = reflink::in_folder(path)?;
        if !lstat(path)?.is_file() {
            return Ok(unlinkat(&folder, name, AtFlags::empty())?);
        }
        let file = long_path::open_regular(path)?;
        let mut number = 0_u64;
        loop {
            // A source may have such a name, too. rsync removes one that an interrupted run left.
            let copy = format!("{SEPARATED}{number}");
            match reflink::file(&file, folder.as_fd(), Path::new(&copy)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error),
                Ok(()) => return Ok(renameat(&folder, &copy, &folder, name)?),
            }
        }
    }

    /// Takes back from older snapshots what the tree lacks of `wanted` (absolute paths): a disk that is
    /// there again, a source that is back in the job, a folder that can be read again. Otherwise rsync
    /// would send all of it again. Never takes a file whose content is known to be wrong. `live` has
    /// what the source has there, if it is of this machine. Adds to `taken` the snapshots that it took from, and returns
    /// what it took from which one.
    pub(crate) fn take_back(
        &self,
        wanted: &[PathBuf],
        live: &BTreeMap<PathBuf, FileType>,
        suspects: &Suspects,
        taken: &mut BTreeSet<SnapshotName>,
        cancel: &Cancel,
    ) -> Result<Vec<(PathBuf, SnapshotName)>, SnapshotError> {
        let mut done = Vec::new();
        let mut snapshots: Option<Vec<Folder>> = None;
        for path in wanted {
            let to = self.in_tree(path);
            let below = path.strip_prefix("/").unwrap_or(path);
            if !leads_within(&self.path, below) || !lacks(&to) {
                continue;
            }
            if snapshots.is_none() {
                snapshots = Some(self.newest_first()?);
            }
            let has = |snapshot: &Folder| {
                let from = self.in_snapshot(*snapshot, below)?;
                let live = live.get(path);
                let same = |about: Metadata| live.is_none_or(|live| about.file_type() == *live);
                let same = lstat(&from).is_ok_and(same);
                (same && !lacks(&from)).then_some((snapshot.name(), from))
            };
            let found = snapshots.iter().flatten().find_map(has);
            let Some((name, from)) = found else { continue };
            taken.insert(name);
            self.take_from(&from, path, suspects, cancel)?;
            done.push((path.clone(), name));
        }
        Ok(done)
    }

    /// Takes back all that the tree lacks of a source (absolute path) that the last run did not have, or had
    /// only a part of. Adds to `taken` the snapshot that it took from.
    pub(crate) fn take_back_source(
        &self,
        source: &Path,
        suspects: &Suspects,
        taken: &mut BTreeSet<SnapshotName>,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let had_it = self.newest_first()?.into_iter().find(|folder| {
            let record = self.folder.job.record(folder.name());
            record.is_ok_and(|record| covers(&record.sources, source))
        });
        let Some(folder) = had_it else { return Ok(()) };
        let below = source.strip_prefix("/").unwrap_or(source);
        let from = self.in_snapshot(folder, below);
        let Some(from) = from.filter(|from| lstat(from).is_ok()) else {
            return Ok(());
        };
        taken.insert(folder.name());
        self.take_from(&from, source, suspects, cancel)
    }

    /// Copies what is at `from` on the volume and right to the absolute path `path` in the tree. What exists
    /// there stays, and an empty folder is filled.
    pub(crate) fn take_from(
        &self,
        from: &Path,
        path: &Path,
        suspects: &Suspects,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let below = path.strip_prefix("/").unwrap_or(path);
        if !leads_within(&self.path, below) {
            // rsync replaces what is in the way.
            return Ok(());
        }
        let is_right = |about: &Metadata| suspects.find(about).is_none();
        let copied = self
            .make_parents(path)
            .and_then(|()| reflink::tree(from, &self.in_tree(path), &is_right, cancel));
        match copied.map_err(on_volume("take back", &WORK_PATH))? {
            true => Ok(()),
            false => Err(SnapshotError::Cancelled),
        }
    }

    fn newest_first(&self) -> Result<Vec<Folder>, SnapshotError> {
        let own = self.folder.job.own_folders()?.into_iter().rev();
        Ok(own
            .filter(|folder| matches!(folder, Folder::Named(_)))
            .collect())
    }

    /// The path of `below` in a snapshot. `None`: a link on the way leads elsewhere.
    fn in_snapshot(&self, snapshot: Folder, below: &Path) -> Option<PathBuf> {
        let root = self.folder.job.path.join(snapshot.to_string());
        leads_within(&root, below).then(|| root.join(below))
    }

    /// Makes the folders above the absolute path `path` in the tree. rsync sets their attributes.
    fn make_parents(&self, path: &Path) -> io::Result<()> {
        let parent = path.parent().unwrap_or(path);
        std::fs::create_dir_all(self.in_tree(parent))
    }

    /// Removes the names of files (paths of the source, some without the slash at the beginning) that must not
    /// stay with their older content. Folders stay, and keep their time.
    ///
    /// The names are those of rsync's messages. None leads out of the tree.
    pub(crate) fn drop_files(&self, paths: &[PathBuf]) -> Result<(), SnapshotError> {
        let failed = || on_volume("remove", &WORK_PATH);
        let root = open_folder_at(&self.path).map_err(failed())?;
        for path in paths {
            let below = path.strip_prefix("/").unwrap_or(path);
            let Ok((folder, name)) = folder_of(root.as_fd(), below) else {
                // A part of the path is no folder: the tree has no such file.
                continue;
            };
            let about = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW);
            if about.is_ok_and(|about| !is_folder(&about)) {
                let removed = reflink::keeping_time(&folder, || {
                    Ok(unlinkat(&folder, name, AtFlags::empty())?)
                });
                removed.map_err(failed())?;
            }
        }
        Ok(())
    }

    /// Removes all files whose source is gone. Returns whether there were any.
    pub(crate) fn drop_vanished(&self, cancel: &Cancel) -> Result<bool, SnapshotError> {
        let mut gone = Vec::new();
        let mut failed = Ok(());
        long_path::each(&self.path, &mut |path, about| {
            match about {
                Ok(about) if !about.is_dir() => {
                    let below = path.strip_prefix(&self.path).unwrap_or(path);
                    let source = Path::new("/").join(below);
                    if !self.is_of_host(below)
                        && lstat(&source)
                            .is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
                    {
                        gone.push(source);
                    }
                }
                Ok(_) => {}
                Err(error) => failed = Err(error),
            }
            failed.is_ok() && !cancel.is_cancelled()
        });
        failed.map_err(on_volume("walk", &WORK_PATH))?;
        self.drop_files(&gone)?;
        Ok(!gone.is_empty())
    }

    pub(crate) fn in_tree(&self, path: &Path) -> PathBuf {
        in_tree(&self.path, path)
    }
}

/// The place of an absolute path of the source in the tree.
fn in_tree(tree: &Path, path: &Path) -> PathBuf {
    match path.strip_prefix("/") {
        Ok(below) if !below.as_os_str().is_empty() => tree.join(below),
        _ => tree.to_owned(),
    }
}

/// The names of one file whose source is another file than that of the first name. `sources` identifies their sources.
/// If it is empty, all but the first one: rsync links them again.
fn no_longer_linked<'n>(names: &'n [PathBuf], sources: &[Option<(u64, u64)>]) -> Vec<&'n PathBuf> {
    if sources.is_empty() {
        return names.iter().skip(1).collect();
    }
    // rsync deletes a name whose source is gone.
    let all = names.iter().zip(sources);
    let mut present = all.filter_map(|(path, source)| Some((path, (*source)?)));
    let Some((_, kept)) = present.next() else {
        return Vec::new();
    };
    present
        .filter(|(_, source)| *source != kept)
        .map(|(path, _)| path)
        .collect()
}

/// Whether one of the sources of a record (escaped paths) has `path` in it.
pub(crate) fn covers(sources: &[String], path: &Path) -> bool {
    let mut sources = sources.iter().map(|source| unescape_path(source));
    sources.any(|source| path.starts_with(source))
}

/// Whether there is nothing at `path`, or an empty folder.
fn lacks(path: &Path) -> bool {
    match lstat(path) {
        Ok(about) if about.is_dir() => long_path::names(path).is_ok_and(|names| names.is_empty()),
        Ok(_) => false,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn remove(folder: BorrowedFd<'_>, name: &Path, cancel: &Cancel) -> io::Result<()> {
    let about = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if !is_folder(&about) {
        return Ok(unlinkat(folder, name, AtFlags::empty())?);
    }
    let inside = open_folder(folder, name)?;
    if remove_content(inside.as_fd(), cancel)? {
        unlinkat(folder, name, AtFlags::REMOVEDIR)?;
    }
    Ok(())
}

/// After a run that found the volume full: removes from the job's `work` the files whose source is gone, which rsync
/// had no space to do. Space for metadata is needed for a deletion, too, but the kernel has a reserve for that.
/// Returns whether there is more space now.
pub(crate) fn make_space(
    volume_root: &Path,
    spec: &SnapshotSpec,
    subvolumes: &dyn Subvolumes,
    cancel: &Cancel,
) -> Result<bool, SnapshotError> {
    let folder = JobFolder::open_for_run(volume_root, &spec.job)?;
    let hosts = spec.pulled.iter();
    let hosts = hosts.map(|source| host_folder(&source.host)).collect();
    let work = Work::new(&folder, subvolumes, hosts);
    if interrupted(&folder.job).is_none() || !work.drop_vanished(cancel)? {
        return Ok(false);
    }
    let committed = subvolumes.commit(volume_root);
    committed.map_err(on_volume("free the space of", &WORK_PATH))?;
    Ok(true)
}

/// Deletes the job's `work`. Returns whether there was one.
pub(crate) fn delete(
    folder: &RunFolder,
    subvolumes: &dyn Subvolumes,
) -> Result<bool, SnapshotError> {
    let path = folder.job.path.join(WORK_PATH);
    let _ = unlinkat(&folder.state, LAST_RUN, AtFlags::empty());
    forget_held(folder, subvolumes, &[])?;
    match lstat(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        _ => subvolumes
            .delete(&path)
            .map_err(on_volume("delete", &WORK_PATH))?,
    }
    Ok(true)
}

/// Whether the next run may go on with files that the run `name` wrote, and that no run has compared since.
pub(crate) fn may_have_files_of(
    folder: &RunFolder,
    name: SnapshotName,
) -> Result<bool, SnapshotError> {
    let newest = folder.job.own_folders()?.into_iter();
    let newest = newest.filter(|folder| matches!(folder, Folder::Named(_)));
    let is_newest = newest.map(Folder::name).max() == Some(name);
    let has_work = folder.job.is_folder(Path::new(WORK_PATH));
    Ok(has_work && (is_newest || is_last_run(folder, name)))
}

fn is_last_run(folder: &RunFolder, name: SnapshotName) -> bool {
    let path = folder.job.path.join(STATE_FOLDER).join(LAST_RUN);
    std::fs::read_to_string(path).is_ok_and(|text| text.trim_end() == name.to_string())
}

/// Forgets the last run if it made the snapshot `name`, which is being removed.
pub(crate) fn forget_run(folder: &RunFolder, name: SnapshotName) {
    if is_last_run(folder, name) {
        let _ = unlinkat(&folder.state, LAST_RUN, AtFlags::empty());
    }
}
