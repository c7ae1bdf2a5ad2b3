//! The folders of other hosts in `work`, see [`crate::pulled`].
//!
//! A run that does not get all of a host leaves files of the run before in its folder. They must not be in the
//! snapshot. But the next run needs them, and what this one got: it would pull all of it again. So the
//! subvolume `.sprat/held@HOST` keeps the tree, and the folder leaves `work` until the host is reached again.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::{Work, lacks, remove};
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::job::{Folder, RunFolder, STATE_FOLDER, WORK_PATH, on_volume};
use crate::long_path::lstat;
use crate::name::SnapshotName;
use crate::pulled_source::{PulledSource, host_folder};
use crate::subvolume_ops::Subvolumes;
use crate::suspects::Suspects;
use crate::walk::{leads_within, open_folder_at};

const HELD: &str = "held";

impl Work<'_> {
    /// Whether the path in the tree is in the folder of a host.
    pub(super) fn is_of_host(&self, below: &Path) -> bool {
        self.hosts.iter().any(|host| below.starts_with(host))
    }

    fn held(&self, host: &Path) -> PathBuf {
        let name = format!("{HELD}{}", host.display());
        self.folder.job.path.join(STATE_FOLDER).join(name)
    }

    /// Whether the content of `host` waits beside the tree.
    pub(crate) fn is_held(&self, host: &Path) -> bool {
        lstat(&self.held(host)).is_ok()
    }

    /// Takes the folder of a host out of the tree, and keeps it for the next run that reaches the host.
    pub(crate) fn hold_back(&self, host: &Path, cancel: &Cancel) -> Result<(), SnapshotError> {
        let shown = host.display();
        let failed = || on_volume("keep what was pulled from", &shown);
        if lacks(&self.path.join(host)) {
            return Ok(());
        }
        let held = self.held(host);
        if self.is_held(host) {
            self.subvolumes.delete(&held).map_err(failed())?;
        }
        let kept = self.subvolumes.snapshot(&self.path, &held, true);
        kept.map_err(failed())?;
        self.empty(host, cancel)
    }

    /// Removes what is at a path in the tree.
    pub(crate) fn empty(&self, below: &Path, cancel: &Cancel) -> Result<(), SnapshotError> {
        if !leads_within(&self.path, below) || lstat(&self.path.join(below)).is_err() {
            return Ok(());
        }
        let root = open_folder_at(&self.path);
        let removed = root.and_then(|root| remove(root.as_fd(), below, cancel));
        removed.map_err(on_volume("clear", &WORK_PATH))?;
        match cancel.is_cancelled() {
            true => Err(SnapshotError::Cancelled),
            false => Ok(()),
        }
    }

    /// Takes back the tree of a host that waited for this run.
    pub(crate) fn take_back_held(
        &self,
        host: &Path,
        suspects: &Suspects,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let held = self.held(host);
        if !self.is_held(host) {
            return Ok(());
        }
        let from = held.join(host);
        if lstat(&from).is_ok() {
            self.take_from(&from, &Path::new("/").join(host), suspects, cancel)?;
        }
        let deleted = self.subvolumes.delete(&held);
        deleted.map_err(on_volume("delete", &host.display()))
    }

    /// Takes back from older snapshots what the tree lacks of a host's source. Adds to `taken` the snapshot that
    /// it took from.
    pub(crate) fn take_back_pulled(
        &self,
        source: &PulledSource,
        suspects: &Suspects,
        taken: &mut BTreeSet<SnapshotName>,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        let below = source.place();
        if !leads_within(&self.path, &below) || !lacks(&self.path.join(&below)) {
            return Ok(());
        }
        let all = self.newest_first()?;
        let has = |folder: &&Folder| {
            let from = self.in_snapshot(**folder, &below);
            from.is_some_and(|from| !lacks(&from))
        };
        let is_full = |folder: &&Folder| {
            let record = self.folder.job.record(folder.name());
            record.is_ok_and(|record| {
                let mut parts = record.pulled.iter();
                parts.any(|part| part.full && part.source.place() == below)
            })
        };
        let with_it: Vec<&Folder> = all.iter().filter(has).collect();
        let full = with_it.iter().find(|folder| is_full(folder));
        let Some(folder) = full.or_else(|| with_it.first()) else {
            return Ok(());
        };
        let Some(from) = self.in_snapshot(**folder, &below) else {
            return Ok(());
        };
        taken.insert(folder.name());
        self.take_from(&from, &Path::new("/").join(&below), suspects, cancel)
    }
}

/// Deletes the held content of all hosts but these.
pub(crate) fn forget_held(
    folder: &RunFolder,
    subvolumes: &dyn Subvolumes,
    but: &[PulledSource],
) -> Result<(), SnapshotError> {
    let is_needed = |name: &str| {
        let mut hosts = but.iter().map(|source| host_folder(&source.host));
        hosts.any(|host| Path::new(name) == host)
    };
    for (name, _) in folder.state_names()? {
        let host = name.to_str().and_then(|name| name.strip_prefix(HELD));
        if host.is_none_or(|host| !host.starts_with('@') || is_needed(host)) {
            continue;
        }
        let path = folder.job.path.join(STATE_FOLDER).join(&name);
        if subvolumes.is_subvolume(&path).unwrap_or(false) {
            subvolumes
                .delete(&path)
                .map_err(on_volume("delete", &name.display()))?;
        }
    }
    Ok(())
}
