//! The chain of attachments in the worker: FUSE file, loop device, dm-crypt map, mounted file system.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};

use crate::crypt_map::CryptMap;
use crate::fuse_file::DetachedMount;
use crate::loop_device::LoopDevice;
use crate::{AttachError, BLOCK_BYTES, CryptMapping, MountOptions, btrfs, ext4, mounts, sys};

/// How long an unmount waits for the last user of the file system. A program that was just killed is
/// still closing its files.
const BUSY_WAIT_MAX: Duration = Duration::from_secs(2);

/// How to attach.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AttachOptions {
    /// Read-ahead of the loop device in bytes. The file system on it uses the same. With the kernel's
    /// default of 128 KiB a sequential read of a remote volume would cost one round trip for each 128
    /// KiB.
    pub read_ahead_bytes: u64,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            read_ahead_bytes: 4 << 20,
        }
    }
}

/// The attachment of a volume, as the worker makes it.
///
/// The order of calls: [`begin`](Self::begin); then send the FUSE descriptor to the volume process and
/// close our copy; [`attach_loop`](Self::attach_loop); in kernel mode [`map`](Self::map); then
/// `make_file_system` or [`mount`](Self::mount); finally [`unmount`](Self::unmount) or
/// [`leave_mounted`](Self::leave_mounted). If this is dropped, or its process killed, before the mount,
/// everything is removed. After the mount, the mount keeps the rest alive until it ends, with its
/// namespace or before.
#[derive(Debug)]
pub struct Attachment {
    options: AttachOptions,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The FUSE file system exists. It need not be served yet.
    Begun(DetachedMount),
    /// The loop device has the FUSE file open, which keeps the FUSE file system alive.
    Looped {
        device: LoopDevice,
        map: Option<CryptMap>,
        mounted_on: Option<PathBuf>,
    },
}

impl Attachment {
    /// Creates a FUSE mount over `fuse` that no path leads to. Doesn't wait for the server.
    pub fn begin(fuse: BorrowedFd<'_>, options: AttachOptions) -> Result<Self, AttachError> {
        let stage = Stage::Begun(DetachedMount::new(fuse)?);
        Ok(Self { options, stage })
    }

    /// Sets a loop device with blocks of 4096 bytes and direct I/O on the FUSE file. Waits until the
    /// volume process serves it.
    ///
    /// This process's copy of the FUSE descriptor must be closed before. While it is open, the kernel
    /// doesn't notice the death of the volume process, and this call hangs.
    ///
    /// # Errors
    ///
    /// `ServerGone` if the volume process is dead, `NoLoop` if no loop device is available.
    pub fn attach_loop(&mut self) -> Result<(), AttachError> {
        let Stage::Begun(mount) = &self.stage else {
            return Err(AttachError::OutOfOrder {
                op: "attach_loop",
                reason: "the loop device is there already",
            });
        };
        let file = mount.open_file()?;
        let mut device = LoopDevice::attach(file.as_fd())?;
        device.limit_requests();
        device.limit_dirty();
        device.set_read_ahead(self.options.read_ahead_bytes)?;
        // From here on only the loop device keeps the FUSE file system alive: the detached mount is
        // dropped.
        self.stage = Stage::Looped {
            device,
            map: None,
            mounted_on: None,
        };
        Ok(())
    }

    /// Kernel mode: lets dm-crypt decrypt what the FUSE file serves. Waits until the volume process
    /// answers. The map ends with this attachment and its mount, whatever process dies.
    ///
    /// # Errors
    ///
    /// `NoDmCrypt`, or `CryptMap` if the kernel lacks the cipher.
    pub fn map(&mut self, mapping: &CryptMapping, key: &[u8]) -> Result<(), AttachError> {
        let Stage::Looped {
            device,
            map: map @ None,
            mounted_on: None,
        } = &mut self.stage
        else {
            return Err(AttachError::OutOfOrder {
                op: "map",
                reason: "there is no loop device yet, or it is mapped or mounted already",
            });
        };
        let made = CryptMap::make(device.path(), mapping, key)?;
        made.set_read_ahead(self.options.read_ahead_bytes)?;
        *map = Some(made);
        Ok(())
    }

    /// Sets the read-ahead of the device that is attached, and of a file system that is mounted on it later.
    pub fn set_read_ahead(&mut self, bytes: u64) -> Result<(), AttachError> {
        self.options.read_ahead_bytes = bytes;
        match &mut self.stage {
            Stage::Begun(_) => Ok(()),
            Stage::Looped { device, map, .. } => {
                device.set_read_ahead(bytes)?;
                map.as_ref().map_or(Ok(()), |map| map.set_read_ahead(bytes))
            }
        }
    }

    /// The block device with the file system: `/dev/loopN`, in kernel mode `/dev/dm-N`.
    ///
    /// # Panics
    /// Before [`attach_loop`](Self::attach_loop).
    #[must_use]
    pub fn device(&self) -> &Path {
        match &self.stage {
            Stage::Looped { map: Some(map), .. } => map.path(),
            Stage::Looped { device, .. } => device.path(),
            Stage::Begun(_) => panic!("the device is asked for before attach_loop"),
        }
    }

    /// Mounts the ext4 file system on `dir`, an existing folder on which nothing is mounted yet.
    pub fn mount(&mut self, dir: &Path, options: &MountOptions) -> Result<(), AttachError> {
        self.mount_by(dir, |device| ext4::mount(device, dir, options))
    }

    /// Mounts the btrfs on `dir`, an existing folder on which nothing is mounted yet.
    pub fn mount_btrfs(&mut self, dir: &Path, options: &MountOptions) -> Result<(), AttachError> {
        self.mount_by(dir, |device| btrfs::mount(device, dir, options))
    }

    fn mount_by(
        &mut self,
        dir: &Path,
        mount: impl FnOnce(&Path) -> Result<(), AttachError>,
    ) -> Result<(), AttachError> {
        let Stage::Looped {
            device,
            map,
            mounted_on: mounted_on @ None,
        } = &mut self.stage
        else {
            return Err(AttachError::OutOfOrder {
                op: "mount",
                reason: "there is no loop device yet, or it is mounted already",
            });
        };
        mounts::require_unmounted(dir)?;
        let device = map.as_ref().map_or(device.path(), CryptMap::path);
        mount(device)?;
        *mounted_on = Some(dir.into());
        Ok(())
    }

    /// Lets the mounted file system report to the device all ranges that it doesn't use
    /// ([`BlockDevice::note_unneeded`](crate::BlockDevice::note_unneeded)). Works on a read-only mount,
    /// too. Returns the number of bytes.
    pub fn trim(&self) -> Result<u64, AttachError> {
        let (folder, shown) = self.mounted_folder("trim")?;
        sys::trim(folder.as_fd(), 0).map_err(|e| AttachError::io("trim", shown, e))
    }

    /// Grows the mounted file system to `bytes`, rounded down to blocks of 4096. Needs
    /// `CAP_SYS_RESOURCE` ([`may_grow`](crate::may_grow)) and [`MountOptions::grow`]. If it is
    /// interrupted at any moment, the journal repairs the file system.
    pub fn grow(&self, bytes: u64) -> Result<(), AttachError> {
        let (folder, shown) = self.mounted_folder("grow")?;
        sys::resize_ext4(folder.as_fd(), bytes / BLOCK_BYTES)
            .map_err(|e| AttachError::io("grow", shown, e))
    }

    /// Grows or shrinks the mounted btrfs to `bytes`. A crash at any moment leaves the old or the new size. What lies
    /// behind the new end is moved first, which may take long.
    pub fn resize_btrfs(&self, bytes: u64) -> Result<(), AttachError> {
        let (folder, shown) = self.mounted_folder("resize")?;
        btrfs::resize(folder.as_fd(), bytes).map_err(|e| AttachError::io("resize", shown, e))
    }

    fn mounted_folder(&self, op: &'static str) -> Result<(OwnedFd, String), AttachError> {
        let Stage::Looped {
            mounted_on: Some(dir),
            ..
        } = &self.stage
        else {
            return Err(AttachError::OutOfOrder {
                op,
                reason: "nothing is mounted",
            });
        };
        let shown = dir.display().to_string();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(dir, flags, Mode::empty()) {
            Ok(folder) => Ok((folder, shown)),
            Err(e) => Err(AttachError::io("open", shown, e)),
        }
    }

    /// Unmounts (if mounted) and waits, up to 10 s, until the loop device is free. The FUSE file system
    /// ends with it, which the volume process notices as the end of `Serving::wait`.
    ///
    /// The unmount itself takes as long as it takes to write back dirty data.
    ///
    /// # Errors
    ///
    /// `Busy` if something still uses the file system after 2 s; `StillHeld` if the loop device isn't
    /// free in time. In both cases our own handles are closed.
    pub fn unmount(self) -> Result<(), AttachError> {
        let Stage::Looped {
            device,
            map,
            mounted_on,
        } = self.stage
        else {
            return Ok(());
        };
        if let Some(dir) = mounted_on {
            mounts::unmount_patiently(&dir, BUSY_WAIT_MAX)?;
        }
        drop(map);
        device.release()
    }

    /// Unmounts the file system, and keeps the device.
    pub fn unmount_file_system(&mut self) -> Result<(), AttachError> {
        if let Stage::Looped { mounted_on, .. } = &mut self.stage
            && let Some(dir) = mounted_on
        {
            mounts::unmount_patiently(dir, BUSY_WAIT_MAX)?;
            *mounted_on = None;
        }
        Ok(())
    }

    /// Closes our handles and leaves the file system mounted. [`unmount_at`](crate::unmount_at) unmounts
    /// it.
    pub fn leave_mounted(self) -> Result<(), AttachError> {
        match self.stage {
            Stage::Looped {
                mounted_on: Some(_),
                ..
            } => Ok(()),
            _ => Err(AttachError::OutOfOrder {
                op: "leave_mounted",
                reason: "nothing is mounted",
            }),
        }
    }
}
