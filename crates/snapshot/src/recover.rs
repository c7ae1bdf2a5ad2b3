//! Recovers what earlier runs left in a job's folder, and removes trees.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, renameat, statat};

use crate::begun;
use crate::cancel::Cancel;
use crate::change_list;
use crate::checkpoint;
use crate::error::SnapshotError;
use crate::job::{DELETING, Folder, RunFolder, STATE_FOLDER, on_volume};
use crate::name::SnapshotName;
use crate::recent;
use crate::record::Warning;
use crate::rsync::ends_run;
use crate::scout::Scout;
use crate::staged;
use crate::text::escape_path;
use crate::walk::{
    open_folder, remove_content, remove_content_reporting, remove_files_changed_since,
};

/// Has the prefix `DELETING`, so that the next run removes it.
const LINKS_TO_COPY: &str = "deleting-links-to-copy";
/// Separates a number from a name that a foreign object has already.
const NUMBERED: char = '~';
/// How many numbers are tried.
const NAMES_TRIED_MAX: u32 = 100;
/// The most interrupted trees to link from. rsync accepts 20 `--link-dest`; up to 4 snapshots and a copy
/// need some of them.
pub(crate) const PARTIALS_MAX: usize = 10;

impl RunFolder {
    /// Recovers what earlier runs left: finishes removals, and turns each leftover `.inflight` into a
    /// `.partial` that has only durable files. `keep_staged`: what is staged is of this run.
    pub(crate) fn recover(
        &self,
        keep_staged: bool,
        cancel: &Cancel,
    ) -> Result<Vec<Warning>, SnapshotError> {
        let mut warnings = Vec::new();
        for (name, _) in self.state_names()? {
            let deleting = name.to_str().is_some_and(|name| name.starts_with(DELETING));
            if !deleting || (keep_staged && name == Path::new(&staged::waiting_name())) {
                continue;
            }
            let path = Path::new(STATE_FOLDER).join(&name);
            if !self.job.is_folder(&path) {
                // sprat makes only folders with such names.
                warnings.push(Warning::ForeignObject {
                    path: format!("{}/{}", self.job.job, escape_path(&path)),
                    done: "left alone".to_owned(),
                });
            } else if let Err(error) = self.finish_removal(&name, cancel) {
                warnings.push(leftover_warning(&path, error)?);
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
            // The oldest is kept, because it was the first and perhaps the longest run. So are the
            // newest ones.
            for partial in &partials[1..=partials.len() - PARTIALS_MAX] {
                if let Err(error) = self.remove(*partial, cancel) {
                    warnings.push(leftover_warning(Path::new(&partial.to_string()), error)?);
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
            // Nothing in it is known to be durable. What it links is in older snapshots anyway.
            return match self.remove(folder, cancel) {
                Ok(()) => Ok(None),
                Err(error) => leftover_warning(Path::new(&folder.to_string()), error).map(Some),
            };
        };
        let partial = Folder::Partial(name).to_string();
        if statat(&self.job.folder, &partial, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            // A foreign folder has the name that the interrupted tree would get.
            self.remove(folder, cancel)?;
            return Ok(Some(Warning::ForeignObject {
                path: format!("{}/{partial}", self.job.job),
                done: "left alone, and the interrupted run of that name was removed".to_owned(),
            }));
        }
        let swept = remove_files_changed_since(tree.as_fd(), durable_before_ns, cancel)
            .map_err(on_volume("sweep", &folder))?;
        let Some(files) = swept else {
            return Err(SnapshotError::Cancelled);
        };
        recent::list_again(&self.state, name, &tree).map_err(on_volume("list", &folder))?;
        self.inflight_becomes(name, Folder::Partial(name))?;
        checkpoint::forget(&self.state, name);
        Ok((files > 0).then_some(Warning::CrashedRunSwept { files }))
    }

    /// Removes one of our interrupted trees and its record. If this is interrupted, the next run
    /// finishes it.
    pub(crate) fn remove(&self, folder: Folder, cancel: &Cancel) -> Result<(), SnapshotError> {
        assert!(
            !matches!(folder, Folder::Named(_)),
            "finished snapshots are not removed here"
        );
        let away = self.rename_away(folder)?;
        checkpoint::forget(&self.state, folder.name());
        recent::forget(&self.state, folder.name());
        begun::forget(&self.state, folder.name());
        change_list::forget(&self.state, folder.name());
        let record = format!("{}.json", folder.name());
        let _ = rustix::fs::unlinkat(&self.state, record, AtFlags::empty());
        self.finish_removal(&away, cancel)
    }

    /// Moves a snapshot or an interrupted tree into the state folder, under a free name, and returns that
    /// name. The record stays until all files are gone, so that no new snapshot gets the name.
    pub(crate) fn rename_away(&self, folder: Folder) -> Result<PathBuf, SnapshotError> {
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

    /// The trees whose removal earlier runs began, by their names in the state folder.
    pub(crate) fn half_removed(&self) -> Result<Vec<PathBuf>, SnapshotError> {
        let names = self.state_names()?.into_iter().map(|(name, _)| name);
        let deleting =
            |name: &PathBuf| name.to_str().is_some_and(|name| name.starts_with(DELETING));
        let folder = |name: &PathBuf| self.job.is_folder(&Path::new(STATE_FOLDER).join(name));
        Ok(names.filter(deleting).filter(folder).collect())
    }

    /// Removes the record of a tree whose files are gone.
    pub(crate) fn forget_record(&self, away: &Path) {
        let folder = away.to_str().and_then(|name| name.strip_prefix(DELETING));
        let folder = folder.map(|name| name.split(NUMBERED).next().unwrap_or(name));
        match folder.and_then(Folder::parse) {
            Some(Folder::Named(name)) => self.forget_snapshot(name),
            Some(folder) => self.forget_record_of(folder.name()),
            None => {}
        }
    }

    /// The same of a finished snapshot. Its list of changes stays: later snapshots share its files.
    pub(crate) fn forget_snapshot(&self, name: SnapshotName) {
        recent::forget(&self.state, name);
        self.forget_all_but_recent(name);
    }

    /// The same, but its recent files are still to be compared with their source.
    pub(crate) fn forget_all_but_recent(&self, name: SnapshotName) {
        checkpoint::forget(&self.state, name);
        begun::forget(&self.state, name);
        // A record without a snapshot does no harm.
        let _ = rustix::fs::unlinkat(&self.state, format!("{name}.json"), AtFlags::empty());
    }

    /// Removes what the state folder has of a run whose tree is gone.
    pub(crate) fn forget_record_of(&self, name: SnapshotName) {
        change_list::forget(&self.state, name);
        self.forget_snapshot(name);
    }

    /// Removes one tree in the state folder. Reports how many names are removed so far.
    pub(crate) fn remove_away(
        &self,
        name: &Path,
        cancel: &Cancel,
        report: &mut dyn FnMut(u64),
    ) -> Result<(), SnapshotError> {
        let object = escape_path(name);
        let tree = open_folder(self.state.as_fd(), name).map_err(on_volume("open", &object))?;
        // Without the scout, each name would cost a round trip on a slow connection.
        let ahead = open_folder(self.state.as_fd(), name).map_err(on_volume("open", &object))?;
        let scout = Scout::begin(ahead, vec![PathBuf::from(".")], None);
        let done = remove_content_reporting(tree.as_fd(), cancel, &mut |removed| {
            scout.follow(removed);
            report(removed);
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

    /// Makes a folder with a symbolic link by which rsync's `--link-dest` finds the adopted copy at
    /// `copy` (a path on the volume) under the path of its source. Returns the folder's name relative to
    /// the job's folder. If it is left behind, the next run removes it.
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
            // Don't follow a foreign symbolic link.
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

    /// Removes what [`RunFolder::link_to_copy`] made. What can't be removed now is removed by the next
    /// run.
    pub(crate) fn forget_link_to_copy(&self, cancel: &Cancel) {
        let _ = self.finish_removal(Path::new(LINKS_TO_COPY), cancel);
    }
}

/// The warning for a tree that can't be removed. A failure of the whole volume stays an error.
fn leftover_warning(folder: &Path, error: SnapshotError) -> Result<Warning, SnapshotError> {
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
