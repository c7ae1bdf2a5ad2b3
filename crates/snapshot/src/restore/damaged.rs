//! Files and symbolic links of a restore whose content is known to be wrong: a check of this machine found that, or they differ from the
//! lists of changes.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::What;
use crate::cancel::Cancel;
use crate::check::Key;
use crate::compare::{Unequal, same_content};
use crate::content::{ContentHash, Sums};
use crate::error::SnapshotError;
use crate::job::JobFolder;
use crate::listed::Listed;
use crate::long_path::{lstat, open_regular, read_link, size_and_time};
use crate::paths::real_path;
use crate::spec::{Existing, RestoreSpec};
use crate::suspects::{Suspect, Suspects};
use crate::text::escape_path;
use crate::walk::leads_within;

const BUFFER_BYTES: usize = 256 << 10;

/// Such files, relative to the destination.
#[derive(Debug, Default)]
pub(super) struct Damaged {
    /// Their wrong content is restored.
    pub(super) restored: BTreeSet<PathBuf>,
    /// The destination has a file of the same size and time with other content. It stays as it is.
    pub(super) kept: BTreeSet<PathBuf>,
}

impl Damaged {
    /// Finds them before anything is restored.
    pub(super) fn find(
        volume_root: &Path,
        job: &JobFolder,
        folder: &Path,
        what: &What,
        to: &Path,
        spec: &RestoreSpec,
        cancel: &Cancel,
    ) -> Result<Self, SnapshotError> {
        let suspects = spec.suspects.as_deref().map(Suspects::load);
        let mut listed = None;
        // The volume may be repaired since the check, or its reading of one file failed only then. After a comparison
        // with the source the digest may be that of the wrong content, too.
        let mut is_right_again = |at: &Path, about: &Metadata, suspect: &Suspect| {
            if suspect.by_source {
                return false;
            }
            let lists = || Listed::load(volume_root, spec.change_lists.as_deref());
            let listed = listed.get_or_insert_with(lists);
            let sums = sums(at, about, cancel);
            sums.is_ok_and(|sums| listed.compare(Key::of(about), &sums) == Some(true))
        };
        let base = job.path.join(&what.base);
        let tops: Vec<PathBuf> = what.paths.iter().map(|path| base.join(path)).collect();
        let mut found = Self::default();
        let mut meet = |at: &Path, about: &Metadata, suspect: &Suspect| {
            if let Ok(path) = at.strip_prefix(&base)
                && what.paths.iter().any(|top| path.starts_with(top))
                && !cancel.is_cancelled()
                && !is_right_again(at, about, suspect)
            {
                found.add(path, (at, about), to, spec.existing, cancel);
            }
        };
        let tree = job.path.join(folder);
        suspects
            .unwrap_or_default()
            .each_damaged(volume_root, &tree, &tops, cancel, &mut meet);
        match cancel.is_cancelled() {
            true => Err(SnapshotError::RestoreCancelled),
            false => Ok(found),
        }
    }

    /// Adds those of `unequal` whose content is not what the lists have of their backup: no check has read them since.
    pub(super) fn add_unequal(
        &mut self,
        volume_root: &Path,
        base: &Path,
        unequal: &Unequal,
        to: &Path,
        spec: &RestoreSpec,
        cancel: &Cancel,
    ) -> Result<(), SnapshotError> {
        if unequal.files.is_empty() {
            return Ok(());
        }
        let listed = Listed::load(volume_root, spec.change_lists.as_deref());
        for path in &unequal.files {
            let at = base.join(path);
            // rsync reports what can't be read.
            let Ok(about) = lstat(&at) else { continue };
            let Ok(sums) = sums(&at, &about, cancel) else {
                continue;
            };
            if cancel.is_cancelled() {
                return Err(SnapshotError::RestoreCancelled);
            }
            if listed.compare(Key::of(&about), &sums) == Some(false) {
                self.add(path, (&at, &about), to, spec.existing, cancel);
            }
        }
        Ok(())
    }

    /// A verification that has failed names what is damaged, too.
    pub(super) fn named_in(&self, mut error: SnapshotError) -> SnapshotError {
        if let SnapshotError::RestoreDiffers { damaged, .. } = &mut error {
            let both = self.restored.iter().chain(&self.kept);
            *damaged = both.map(|path| escape_path(path)).collect();
        }
        error
    }

    fn add(
        &mut self,
        path: &Path,
        kept: (&Path, &Metadata),
        to: &Path,
        existing: Existing,
        cancel: &Cancel,
    ) {
        let (at, about) = kept;
        // The user may have given a symbolic link.
        let to = real_path(to);
        let live = to.join(path);
        let here = match leads_within(&to, path) {
            true => lstat(&live).ok(),
            false => None,
        };
        let stays = |here: &Metadata| match existing {
            Existing::Overwrite => false,
            Existing::Keep => true,
            Existing::KeepNewer => here.modified().ok() > about.modified().ok(),
        };
        let may_be_right = |here: &Metadata| {
            let is_same = match about.is_symlink() {
                true => here.is_symlink().then(|| is_same_link(at, &live)),
                false => here.is_file().then(|| is_same(at, &live, cancel)),
            };
            size_and_time(here) == size_and_time(about)
                && is_same.is_some_and(|same| !same.unwrap_or(false))
        };
        if here.as_ref().is_some_and(may_be_right) {
            self.kept.insert(path.to_owned());
        } else if !here.as_ref().is_some_and(stays) {
            self.restored.insert(path.to_owned());
        }
    }
}

/// Whether an earlier restore has written the wrong content here.
fn is_same(kept: &Path, live: &Path, cancel: &Cancel) -> io::Result<bool> {
    let (mut kept, mut live) = (open_regular(kept)?, open_regular(live)?);
    let same = same_content(&mut kept, &mut live, &mut |_| !cancel.is_cancelled());
    Ok(matches!(same, Ok(Some(true))))
}

fn is_same_link(kept: &Path, live: &Path) -> io::Result<bool> {
    Ok(read_link(kept)? == read_link(live)?)
}

fn sums(path: &Path, about: &Metadata, cancel: &Cancel) -> io::Result<Sums> {
    if about.is_symlink() {
        let target = read_link(path)?;
        let target = target.as_os_str().as_bytes();
        let mut hash = ContentHash::new(target.len() as u64);
        hash.update(target);
        return Ok(hash.finish());
    }
    let mut file = open_regular(path)?;
    let mut hash = ContentHash::new(about.len());
    let mut buffer = vec![0; BUFFER_BYTES];
    while !cancel.is_cancelled() {
        match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(some) => hash.update(&buffer[..some]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hash.finish())
}
