//! Restores a snapshot, or files and folders of it, to a folder of the machine.

mod damaged;
mod transfer;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Stat, statat};

use crate::cancel::Cancel;
use crate::choice::{self, SnapshotChoice};
use crate::chosen::{Chosen, choose};
use crate::compare::{Restored, Unequal, time};
use crate::conflicts::conflicts;
use crate::error::SnapshotError;
use crate::job::JobFolder;
use crate::listed::Listed;
use crate::mounts::pattern_for;
use crate::owner_names;
use crate::paths::{plain_path, real_path};
use crate::progress::{Phase, Progress};
use crate::protected_paths::{self, Destination, ProtectedPaths};
use crate::record::{EntryKind, ONE_FILE_SYSTEM, RunRecord, Warning};
use crate::rsync::Rsync;
use crate::scout::{Copied, Scout};
use crate::spec::{Existing, RestoreReport, RestoreSpec};
use crate::sticky_acl;
use crate::subvolumes::inline_bytes_max;
use crate::text::{escape_path, unescape_path};
use crate::walk::{is_folder, names_in, open_folder};
use crate::without_place;
use damaged::Damaged;
pub(crate) use transfer::judge;
use transfer::{Excludes, Transfer};

/// Restores what `spec` selects from the volume that is mounted at `volume_root`, which may be
/// read-only.
///
/// Files at the destination are overwritten, even newer ones. Files of equal size and time are compared
/// by content, and skipped only if that is equal, too (not with `spec.trust_times`). A file with known
/// damage is not written over one of equal size and time. A file that is a hard link to something else
/// is written as a new file. Nothing else at the destination changes unless
/// `spec.delete` is set. The destination folder keeps its owner, mode and times, and so do existing
/// folders between it and the snapshot's sources. If one of these is a symbolic link, the restore is
/// refused.
pub fn restore(
    volume_root: &Path,
    spec: &RestoreSpec,
    progress: &mut dyn FnMut(Progress),
    cancel: &Cancel,
) -> Result<RestoreReport, SnapshotError> {
    progress(Progress::begin(Phase::Checking));
    let rsync = Rsync::find(&spec.rsync)?;
    let (folder, chosen) = choose(volume_root, &spec.job, &spec.snapshot)?;
    let what = chosen.what(&folder, spec)?;
    let to = plain_path(&spec.to).map_err(|why| SnapshotError::DestinationRefused {
        path: escape_path(&spec.to),
        why: why.to_owned(),
    })?;
    check_destination(&to, volume_root, &folder, &what, spec)?;
    let destination = Destination {
        to: &to,
        in_source: Path::new("/")
            .join(what.base.strip_prefix(&chosen.folder).unwrap_or(&what.base)),
        trees: &what.paths,
    };
    let mut protected =
        protected_paths::check_destination(&destination, chosen.record.as_ref(), spec)?;
    let mut damaged = Damaged::find(
        volume_root,
        &folder,
        &chosen.folder,
        &what,
        &to,
        spec,
        cancel,
    )?;
    protected.keep(&damaged.kept);
    if !spec.dry_run {
        std::fs::create_dir_all(&to).map_err(|e| refused(&to, e.to_string()))?;
    }
    let transfer = Transfer {
        rsync: &rsync,
        job: &folder.path,
        to: &to,
        what: &what,
        owners: match spec.owner_by_name {
            true => owner_names::arguments(&folder.path.join(&chosen.folder))?,
            false => Vec::new(),
        },
        spec,
    };
    let parents = what.missing_parents(&to);
    let mut changes = transfer.create_parents(&parents, cancel)?;
    let mut unequal = if spec.trust_times || spec.existing == Existing::Keep {
        Unequal::default()
    } else {
        what.compared(&folder, &to, &protected)
            .before(progress, cancel)?
    };
    let base = folder.path.join(&what.base);
    damaged.add_unequal(volume_root, &base, &unequal, &to, spec, cancel)?;
    protected.keep(&damaged.kept);
    unequal.leave(&damaged.kept);
    let compared = what.compared(&folder, &to, &protected);
    let kept = compared.kept(spec.existing, cancel)?;
    unequal.leave(&kept.paths);
    let left_alone = kept.paths.iter();
    let left_alone = left_alone.map(|path| pattern_for(&Path::new("/").join(path), false));
    let left_alone: Vec<_> = protected
        .patterns
        .iter()
        .cloned()
        .chain(left_alone)
        .collect();
    let excludes = Excludes::new(&left_alone)?;
    let written = transfer.rewrite(&unequal, &excludes, &mut changes, progress, cancel)?;
    let invocation = transfer.invocation(&excludes, spec.existing);
    let scout = what.scout(&folder, &to, spec);
    let mut followed = |now: Progress| {
        if let Some(scout) = &scout {
            scout.follow(now.files_done);
        }
        progress(now);
    };
    let mut outcome = rsync.run(&invocation, &mut followed, cancel)?;
    drop(scout);
    judge(&outcome, &to)?;
    changes.append(&outcome.changes);
    let planned = match spec.dry_run {
        true => {
            let newer_here = match spec.existing {
                Existing::Keep => None,
                Existing::KeepNewer => Some(kept.count),
                Existing::Overwrite => Some(compared.kept(Existing::KeepNewer, cancel)?.count),
            };
            Some(transfer.planned(&outcome, written.as_ref(), newer_here))
        }
        false => None,
    };
    if let Some(written) = written {
        outcome.add(written);
        judge(&outcome, &to)?;
    }
    if !spec.dry_run {
        let from = folder.path.join(&what.base);
        for path in parents.iter().filter(|path| !what.paths.contains(path)) {
            sticky_acl::repair_one(&from, &to, path).map_err(|e| refused(&to, e.to_string()))?;
        }
        let stays = |path: &Path, ours: &Stat, theirs: &Stat| {
            let here = match spec.existing {
                Existing::Overwrite => false,
                Existing::Keep => true,
                Existing::KeepNewer => time(theirs) > time(ours),
            };
            protected.holds(path) || kept.paths.contains(path) || here && !is_folder(ours)
        };
        for path in &what.paths {
            sticky_acl::repair_below(&from, &to, path, &stays)
                .map_err(|e| refused(&to, e.to_string()))?;
        }
        what.restore_folder_times(&folder, &to, &parents);
    }
    let verified = if spec.verify && !spec.dry_run {
        let listed = Listed::load(volume_root, spec.change_lists.as_deref());
        let verified = compared.after(&listed, &mut damaged.restored, progress, cancel);
        Some(verified.map_err(|error| damaged.named_in(error))?)
    } else {
        None
    };
    let last_good = choice::matching(&folder, &SnapshotChoice::LatestComplete)?.pop();
    let name = |path: &PathBuf| escape_path(path);
    let files = unequal.files.iter().chain(&unequal.others);
    let escaped = |paths: &[PathBuf]| paths.iter().map(|path| escape_path(path)).collect();
    Ok(RestoreReport {
        last_good: last_good.filter(|good| good.to_string() != chosen.folder_text()),
        snapshot: chosen.folder_text(),
        unread_count: chosen.record.as_ref().map_or(0, |r| r.unread.count),
        without_attributes: chosen
            .record
            .as_ref()
            .map_or(0, RunRecord::without_attributes),
        kind: chosen.kind,
        stats: outcome.stats,
        same: unequal.same,
        unequal: files.map(name).collect(),
        damaged: damaged.restored.iter().map(name).collect(),
        damaged_kept: damaged.kept.iter().map(name).collect(),
        verified,
        planned,
        left_out: escaped(&what.left_out),
        kept_in_place: escaped(&kept.folders),
        changes,
        messages: outcome.messages,
    })
}

impl What {
    fn compared<'a>(
        &'a self,
        job: &'a JobFolder,
        to: &'a Path,
        protected: &'a ProtectedPaths,
    ) -> Restored<'a> {
        Restored {
            job: &job.path,
            base: &self.base,
            trees: &self.paths,
            to,
            protected,
        }
    }

    /// Starts a scout, except for a single file.
    fn scout(&self, job: &JobFolder, to: &Path, spec: &RestoreSpec) -> Option<Scout> {
        let trees: Vec<PathBuf> = self.paths.iter().map(|path| self.base.join(path)).collect();
        let root = crate::walk::open_folder_at(&job.path).ok()?;
        let is_file = |path: &PathBuf| {
            statat(&root, path, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| !is_folder(&stat))
        };
        if trees.iter().all(is_file) {
            return None;
        }
        let copied = Copied {
            to: to.to_owned(),
            base: self.base.clone(),
            inline_bytes_max: inline_bytes_max(&job.path),
        };
        Some(Scout::begin(root, trees, (!spec.dry_run).then_some(copied)))
    }
}

/// What is restored of it: paths relative to `base`, which is relative to the job's folder.
struct What {
    base: PathBuf,
    /// Each exists in the snapshot, unless `delete` is set.
    paths: Vec<PathBuf>,
    /// Folders of the snapshot that have no place on this machine.
    left_out: Vec<PathBuf>,
}

impl What {
    /// The folders above `paths` that are missing at the destination, outer ones first.
    fn missing_parents(&self, to: &Path) -> Vec<PathBuf> {
        let mut parents: Vec<PathBuf> = self
            .paths
            .iter()
            .flat_map(|path| path.ancestors().skip(1))
            .filter(|parent| !parent.as_os_str().is_empty())
            .filter(|parent| crate::long_path::lstat(&to.join(parent)).is_err())
            .map(Path::to_owned)
            .collect();
        parents.sort();
        parents.dedup();
        parents
    }

    /// Sets the times of folders that this restore created, again: the files written into them have
    /// changed these.
    fn restore_folder_times(&self, job: &JobFolder, to: &Path, parents: &[PathBuf]) {
        for parent in parents {
            let in_snapshot = job.path.join(&self.base).join(parent);
            let modified = crate::long_path::lstat(&in_snapshot).and_then(|m| m.modified());
            // A time that can't be set is not worth a failure.
            if let (Ok(modified), Ok(folder)) =
                (modified, crate::walk::open_folder_at(&to.join(parent)))
            {
                let _ = std::fs::File::from(folder).set_modified(modified);
            }
        }
    }
}

impl Chosen {
    fn what(&self, job: &JobFolder, spec: &RestoreSpec) -> Result<What, SnapshotError> {
        if spec.delete {
            self.check_delete(spec)?;
        }
        let tree_path = job.path.join(&self.folder);
        let tree =
            crate::walk::open_folder_at(&tree_path).map_err(|source| SnapshotError::Volume {
                op: "open",
                object: self.folder_text(),
                source,
            })?;
        let path = match spec.path.as_deref().map(plain_path).transpose() {
            Ok(path) => path.filter(|path| path != Path::new("/")),
            Err(why) => {
                return Err(SnapshotError::PathRefused {
                    path: spec.path.as_deref().map(escape_path).unwrap_or_default(),
                    why,
                });
            }
        };
        let in_place = spec.to == Path::new("/");
        let tops = self.record.iter();
        let staged: Vec<PathBuf> = tops.flat_map(without_place::tops).collect();
        if !spec.paths.is_empty() {
            return self.several_paths(tree.as_fd(), &spec.paths, in_place.then_some(&staged));
        }
        if let Some(path) = path {
            let is_staged = staged.iter().any(|top| Path::new("/").join(top) == path);
            if in_place && is_staged {
                return Err(no_place(&path));
            }
            let mut what = self.one_path(tree.as_fd(), &path)?;
            if spec.delete {
                what.paths = self.within_sources(&path)?;
            }
            return Ok(what);
        }
        let mut paths: Vec<PathBuf> = match &self.record {
            // Only the sources belong to the snapshot. What lies above them stays as it is, and only
            // within them may anything be deleted.
            Some(record) if spec.delete || has_sources_below_root(record) => record
                .sources
                .iter()
                .map(|text| unescape_path(text.trim_start_matches('/')))
                // A source may have been unreadable, or the run ended before it.
                .filter(|path| {
                    spec.delete || crate::long_path::lstat(&tree_path.join(path)).is_ok()
                })
                .collect(),
            _ => names_in(tree.as_fd(), Path::new("."))
                .map_err(|source| SnapshotError::Volume {
                    op: "list",
                    object: self.folder_text(),
                    source,
                })?
                .into_iter()
                .map(|(name, _)| name)
                .collect(),
        };
        paths.retain(|path| !staged.contains(path));
        if in_place && paths.is_empty() && !staged.is_empty() {
            return Err(no_place(&Path::new("/").join(&staged[0])));
        }
        let mut left_out = Vec::new();
        match (in_place, &self.record) {
            (true, _) => left_out = staged,
            (false, Some(record)) if spec.delete => paths.extend(without_place::sources(record)),
            (false, _) => paths.extend(staged),
        }
        Ok(What {
            base: self.folder.clone(),
            paths,
            left_out,
        })
    }

    /// The parts of `path` that belong to the job's sources, relative to the folder that `path` is in. Only within them
    /// may anything be deleted.
    fn within_sources(&self, path: &Path) -> Result<Vec<PathBuf>, SnapshotError> {
        let below = path.strip_prefix("/").unwrap_or(path);
        let mut sources = Vec::new();
        if let Some(record) = &self.record {
            sources = without_place::sources(record);
            let mut tops = without_place::tops(record).into_iter();
            if !tops.any(|top| below.starts_with(top)) {
                let here = record.sources.iter();
                sources.extend(here.map(|text| unescape_path(text.trim_start_matches('/'))));
            }
        }
        let within: Vec<&Path> = match sources.iter().any(|source| below.starts_with(source)) {
            true => vec![below],
            false => sources
                .iter()
                .filter(|source| source.starts_with(below))
                .map(PathBuf::as_path)
                .collect(),
        };
        if within.is_empty() {
            return Err(SnapshotError::PathRefused {
                path: escape_path(path),
                why: "is in no source of the snapshot, so nothing may be deleted there; leave out --delete",
            });
        }
        let parent = below.parent().unwrap_or(Path::new(""));
        let paths = within.into_iter().map(|path| path.strip_prefix(parent));
        Ok(paths.flatten().map(Path::to_owned).collect())
    }

    /// Finds one path in the snapshot.
    fn one_path(&self, tree: BorrowedFd<'_>, path: &Path) -> Result<What, SnapshotError> {
        let below = self.find(tree, path)?;
        let (parent, name) = (below.parent(), below.file_name());
        Ok(What {
            base: self.folder.join(parent.unwrap_or(Path::new(""))),
            paths: name.map(PathBuf::from).into_iter().collect(),
            left_out: Vec::new(),
        })
    }

    /// Finds several paths in the snapshot. `staged`: what has no place there, if that is left out.
    fn several_paths(
        &self,
        tree: BorrowedFd<'_>,
        wanted: &[PathBuf],
        staged: Option<&Vec<PathBuf>>,
    ) -> Result<What, SnapshotError> {
        let mut what = What {
            base: self.folder.clone(),
            paths: Vec::new(),
            left_out: Vec::new(),
        };
        for path in wanted {
            let below = self.find(tree, path)?;
            let has_no_place = |top: &PathBuf| below.starts_with(top);
            match staged.is_some_and(|tops| tops.iter().any(has_no_place)) {
                true => what.left_out.push(below),
                false => what.paths.push(below),
            }
        }
        // A folder comes before what is in it, which is restored with it.
        what.paths.sort();
        what.paths.dedup_by(|path, before| path.starts_with(before));
        match (what.paths.first(), what.left_out.first()) {
            (None, Some(top)) => Err(no_place(&Path::new("/").join(top))),
            _ => Ok(what),
        }
    }

    /// The path below the snapshot's folder. It is followed step by step, so that no symbolic link leads
    /// outside.
    fn find(&self, tree: BorrowedFd<'_>, path: &Path) -> Result<PathBuf, SnapshotError> {
        let missing = || SnapshotError::NoSuchPath {
            snapshot: self.folder_text(),
            path: escape_path(path),
        };
        let below = path.strip_prefix("/").unwrap_or(path);
        let (Some(parent), Some(name)) = (below.parent(), below.file_name()) else {
            return Err(missing());
        };
        let mut at = tree
            .try_clone_to_owned()
            .map_err(|source| SnapshotError::System {
                op: "copy a file descriptor",
                source,
            })?;
        for step in parent.components() {
            let step = Path::new(step.as_os_str());
            let stat = statat(&at, step, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| missing())?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
                return Err(SnapshotError::PathRefused {
                    path: escape_path(path),
                    why: "leads through a symbolic link in the snapshot; use the real path",
                });
            }
            at = open_folder(at.as_fd(), step).map_err(|_| missing())?;
        }
        statat(&at, name, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| missing())?;
        Ok(below.to_owned())
    }

    /// Deleting is allowed only if the snapshot is known to have everything that existed then.
    fn check_delete(&self, spec: &RestoreSpec) -> Result<(), SnapshotError> {
        let refuse = |why: &str| {
            Err(SnapshotError::DestinationRefused {
                path: escape_path(&spec.to),
                why: format!("with --delete, {why}"),
            })
        };
        let Some(record) = self
            .record
            .as_ref()
            .filter(|_| self.kind == EntryKind::Complete)
        else {
            return refuse("files that this snapshot is missing would be lost");
        };
        let left_out = |warning: &Warning| {
            matches!(
                warning,
                Warning::OwnVolumeLeftOut { .. }
                    | Warning::KernelFileSystemLeftOut { .. }
                    | Warning::NotMounted { .. }
                    | Warning::AutomountEmpty { .. }
            )
        };
        let lacks = !record.excludes.is_empty()
            || !record.exclude_from.is_empty()
            || !record.scan.is_empty()
            || record
                .rsync_arguments
                .iter()
                .any(|argument| argument == ONE_FILE_SYSTEM)
            || record.warnings.iter().any(left_out);
        if lacks && !spec.delete_excluded && !spec.dry_run {
            return Err(SnapshotError::DeleteLosesExcluded {
                path: escape_path(&spec.to),
            });
        }
        Ok(())
    }
}

/// A tree that was never on this machine can't be put back where it was.
fn no_place(path: &Path) -> SnapshotError {
    SnapshotError::DestinationRefused {
        path: "/".to_owned(),
        why: format!(
            "{} has no place of its own on this machine: it comes from a command or another host. \
             Restore it to another folder",
            escape_path(path)
        ),
    }
}

/// Whether the record lists the sources, and none of them is `/`.
fn has_sources_below_root(record: &RunRecord) -> bool {
    !record.sources.is_empty() && record.sources.iter().all(|source| source != "/")
}

fn refused(path: &Path, why: String) -> SnapshotError {
    SnapshotError::DestinationRefused {
        path: escape_path(path),
        why,
    }
}

/// Checks the destination. It must be a folder outside the volume. There must be no symbolic link where
/// a source of the snapshot or a folder above it goes: rsync would replace it with a folder, and its
/// owner meant the target. There must be no folder where a file goes.
fn check_destination(
    to: &Path,
    volume_root: &Path,
    job: &JobFolder,
    what: &What,
    spec: &RestoreSpec,
) -> Result<(), SnapshotError> {
    match std::fs::metadata(to) {
        Ok(metadata) if !metadata.is_dir() => {
            return Err(refused(to, "it is not a folder".to_owned()));
        }
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(refused(to, e.to_string())),
    }
    let volume = std::fs::canonicalize(volume_root).map_err(|source| SnapshotError::Volume {
        op: "resolve",
        object: escape_path(volume_root),
        source,
    })?;
    let real = real_path(to);
    if real.starts_with(&volume) {
        return Err(refused(to, "it is in the volume itself".to_owned()));
    }
    for path in &what.paths {
        if spec.delete && volume.starts_with(real.join(path)) {
            return Err(refused(
                to,
                "the mounted volume is in it, and --delete would reach it".to_owned(),
            ));
        }
        let mut at = to.to_owned();
        for step in path.components() {
            at.push(step);
            if let Ok(target) = std::fs::read_link(&at)
                && is_folder_in(job, what, to, &at)
            {
                let link = escape_path(&at);
                let target = escape_path(&target);
                let why = format!(
                    "{link} is a symbolic link to {target}, but the snapshot has a folder there; \
                     restore to the path that the link points to"
                );
                return Err(refused(to, why));
            }
        }
        if !spec.delete {
            let snapshot = job.path.join(&what.base).join(path);
            let folders = conflicts(&snapshot, &to.join(path));
            if !folders.is_empty() {
                return Err(SnapshotError::DestinationConflicts {
                    path: escape_path(to),
                    folders: folders.iter().map(|folder| escape_path(folder)).collect(),
                });
            }
        }
    }
    Ok(())
}

/// Whether the snapshot has a folder for `at`.
fn is_folder_in(job: &JobFolder, what: &What, to: &Path, at: &Path) -> bool {
    let below = at.strip_prefix(to).unwrap_or(at);
    let in_snapshot = job.path.join(&what.base).join(below);
    rustix::fs::lstat(&in_snapshot).is_ok_and(|stat| is_folder(&stat))
}
