//! Finds what a restore must leave out to keep what is at the destination, where rsync does not keep it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rustix::fs::Stat;

use super::{Restored, comparing, is_file, links_of, walk_both, walk_snapshot};
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::spec::Existing;
use crate::walk::is_folder;

/// What a restore leaves out.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    /// Paths; the folders are among them.
    pub(crate) paths: BTreeSet<PathBuf>,
    /// Folders of the snapshot with something else in their place at the destination.
    pub(crate) folders: Vec<PathBuf>,
    /// How many of all at the destination are newer, or with [`Existing::Keep`] are there.
    pub(crate) count: u64,
}

impl Restored<'_> {
    /// With [`Existing::KeepNewer`] what is newer here. rsync(1) on `--update`: it compares the times of two
    /// regular files only. With `--modify-window=-1`, a file is newer if it is so by two whole seconds
    /// (generator.c, recv_generator). And a file is linked to another name of it that rsync writes,
    /// whatever its own time is. With [`Existing::Keep`] folders only: rsync fails at what is in them.
    pub(crate) fn kept(&self, existing: Existing, cancel: &Cancel) -> Result<Kept, SnapshotError> {
        let mut kept = Kept::default();
        let (Some((snapshot, destination)), false) =
            (self.open()?, existing == Existing::Overwrite)
        else {
            return Ok(kept);
        };
        let sides = self.sides(&snapshot, &destination, None);
        // By inodes of the snapshot: how many of its names the restore has, and which are newer here.
        let mut linked: BTreeMap<u64, (u64, Vec<PathBuf>)> = BTreeMap::new();
        let mut meet = |path: &Path, ours: &Stat, theirs: Option<&Stat>| {
            let Some(theirs) = theirs else { return };
            if existing == Existing::KeepNewer && time(theirs) <= time(ours) {
                return;
            }
            kept.count += 1;
            if is_folder(ours) {
                kept.folders.push(path.to_owned());
            }
            if is_folder(ours) || existing == Existing::Keep {
                return;
            }
            let rsync_keeps = theirs.st_mtime.saturating_sub(ours.st_mtime) >= 2;
            if !is_file(ours) || !is_file(theirs) || !rsync_keeps {
                kept.paths.insert(path.to_owned());
            } else if links_of(ours) > 1 {
                linked
                    .entry(ours.st_ino)
                    .or_default()
                    .1
                    .push(path.to_owned());
            }
        };
        let whole = walk_both(&sides, cancel, &mut meet).map_err(comparing)?;
        let mut stopped = !whole;
        if whole && !linked.is_empty() {
            stopped = walk_snapshot(&sides, cancel, &mut |_, stat| {
                if let Some((names, _)) = linked.get_mut(&stat.st_ino) {
                    *names += 1;
                }
            })
            .map_err(comparing)?;
        }
        if stopped {
            return Err(SnapshotError::RestoreCancelled);
        }
        let of_several = linked.into_values().filter(|(names, _)| *names > 1);
        kept.paths.extend(of_several.flat_map(|(_, paths)| paths));
        kept.paths.extend(kept.folders.iter().cloned());
        Ok(kept)
    }
}

/// The modification time.
pub(crate) fn time(stat: &Stat) -> (i64, u64) {
    (stat.st_mtime, stat.st_mtime_nsec)
}
