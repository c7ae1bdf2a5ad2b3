//! The clone that is made at the end of a session, for the generation that the next one begins with.

use std::fs::File;
use std::io;

use super::Keeper;
use crate::disk;
use crate::generation::{HALF_CLONE, IMAGE, LEFT_CLONE};
use crate::state::{FileId, read_state};

impl Keeper {
    /// Clones the container as the last session left it, for the generation that the next one begins with. It may
    /// take minutes, and nobody waits: if another session begins meanwhile, this clone is dropped.
    pub fn clone_left(&self, file: &File) -> io::Result<()> {
        let left = || {
            let state = read_state(&self.slots)?;
            let is_left = !state.writing && state.file == Some(FileId::of(file)?);
            io::Result::Ok(is_left.then_some(state))
        };
        if !self.policy.clones {
            return Ok(());
        }
        let _tidy = self.locks.tidy.exclusive()?;
        let before = left()?;
        if before.is_none() || disk::exists_in(&self.folder, LEFT_CLONE)? {
            return Ok(());
        }
        disk::remove_folder_in(&self.folder, HALF_CLONE)?;
        let half = disk::make_folder_in(&self.folder, HALF_CLONE)?;
        disk::clone_in(&half, IMAGE, file)?;
        let gate = self.locks.gate.exclusive()?;
        if left()? == before {
            rustix::fs::renameat(&self.folder, HALF_CLONE, &self.folder, LEFT_CLONE)?;
        }
        // To remove it may take as long as to make it.
        drop(gate);
        disk::remove_folder_in(&self.folder, HALF_CLONE)
    }

    /// Durable when it returns: the container may be written then.
    pub(super) fn drop_left_clone(&self) -> io::Result<()> {
        if disk::exists_in(&self.folder, LEFT_CLONE)? {
            disk::remove_folder_in(&self.folder, LEFT_CLONE)?;
            disk::sync_folder(&self.folder)?;
        }
        Ok(())
    }
}
