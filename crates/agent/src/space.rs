//! How much the root uses, and whether the quota and the disk have room for more.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType};

use crate::clock::reading;
use crate::disk::{folder_in, if_there, list_in};
use crate::generation::{IMAGE, blocks_of_clone};
use crate::policy::Policy;
use crate::ranges::BLOCK;

/// The root is counted again after so long, or after so many bytes.
const RECOUNT_S: i64 = 30;
const RECOUNT_BYTES: u64 = 64 << 20;
/// Saving old contents may exceed the quota by this: a full container can still be pruned.
const OVERWRITE_RESERVE: u64 = 256 << 20;

/// The space of a root, for one process.
#[derive(Debug)]
pub struct Space {
    root: OwnedFd,
    policy: Rc<Policy>,
    used: Cell<Option<(u64, i64)>>,
    since: Cell<u64>,
    /// The last check failed: then there is no space, however little was missing.
    full: Cell<bool>,
}

impl Space {
    pub fn new(root: &OwnedFd, policy: &Rc<Policy>) -> io::Result<Self> {
        Ok(Self {
            root: root.try_clone()?,
            policy: Rc::clone(policy),
            used: Cell::new(None),
            since: Cell::new(0),
            full: Cell::new(false),
        })
    }

    /// Bytes that all files of the root take on the disk.
    pub fn used(&self) -> io::Result<u64> {
        let now_s = reading("").up_s;
        let counted = match self.used.get() {
            Some((used, at_s)) if now_s - at_s < RECOUNT_S && self.since.get() < RECOUNT_BYTES => {
                used
            }
            _ => {
                let used = bytes_in(self.root.as_fd())?;
                self.used.set(Some((used, now_s)));
                self.since.set(0);
                used
            }
        };
        Ok(counted + self.since.get())
    }

    /// Bytes that may still be used, and the most that may be used.
    pub fn available(&self) -> io::Result<(u64, u64)> {
        let disk = rustix::fs::fstatvfs(&self.root)?;
        let total = disk.f_blocks.saturating_mul(disk.f_frsize);
        let kept_free = total / 100 * self.policy.free_min_percent;
        let free = disk
            .f_bavail
            .saturating_mul(disk.f_frsize)
            .saturating_sub(kept_free);
        Ok(match self.policy.quota {
            Some(quota) => (free.min(quota.saturating_sub(self.used()?)), quota),
            None => (free, total),
        })
    }

    /// The same for the client: nothing after a refusal.
    pub fn shown(&self) -> io::Result<(u64, u64)> {
        let (available, total) = self.available()?;
        Ok((if self.full.get() { 0 } else { available }, total))
    }

    /// Refuses what there is no room for: `new` bytes of new content, `saved` bytes of old content.
    pub fn check(&self, new: u64, saved: u64) -> io::Result<()> {
        let has_room = |available: u64| match (new, saved) {
            (0, saved) => saved <= available.saturating_add(OVERWRITE_RESERVE),
            (new, saved) => new + saved <= available,
        };
        let mut fits = has_room(self.available()?.0);
        if !fits && self.used.take().is_some() {
            // What was written again took no space, and others may have removed something: count before anything is
            // refused.
            fits = has_room(self.available()?.0);
        }
        self.full.set(!fits);
        if !fits {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.since.set(self.since.get() + new + saved);
        Ok(())
    }
}

/// A clone shares its blocks with others. It needs those that were overwritten after it was made.
fn bytes_in(folder: impl AsFd) -> io::Result<u64> {
    let mut bytes = 0;
    for name in list_in(&folder)? {
        match rustix::fs::statat(&folder, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode).is_dir() => {
                if let Some(inner) = if_there(folder_in(&folder, &name))? {
                    bytes += bytes_in(&inner)?;
                }
            }
            Ok(found) if name == IMAGE => {
                // No checksum protects this number.
                let most = u64::try_from(found.st_size).unwrap_or(0).div_ceil(BLOCK);
                bytes += blocks_of_clone(&folder)?.min(most) * BLOCK;
            }
            Ok(found) => bytes += u64::try_from(found.st_blocks).unwrap_or(0) * 512,
            Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(bytes)
}
