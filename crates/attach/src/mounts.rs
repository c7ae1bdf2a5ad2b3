//! What is mounted where, and how a mount that outlives its maker is ended (`sprat umount`).

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::device_node::is_dead;
use crate::loop_name::{self, LoopName};
use crate::mount_table::{MountLine, read_mounts, resolve};
use crate::{AttachError, crypt_map, loop_device, users};

/// How long an unmount waits for the last user; a shell that just left is gone by then.
const BUSY_WAIT_MAX: Duration = Duration::from_millis(500);

/// What lies at a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MountState {
    /// No volume of ours is mounted there.
    NotMounted,
    /// A volume is mounted and answers, or takes its time (a slow or broken line).
    Alive,
    /// A volume is mounted, but its volume process is gone: all that isn't cached is EIO.
    Dead,
}

/// Finds out what lies at `dir`: reads one block past all caches, for at most 2 s.
pub fn mount_state(dir: &Path) -> Result<MountState, AttachError> {
    let Some(volume) = volume_at(dir)? else {
        return Ok(MountState::NotMounted);
    };
    Ok(if is_dead(&volume.device) {
        MountState::Dead
    } else {
        MountState::Alive
    })
}

/// Unmounts the volume at `dir`, and waits until its loop device is free (at most 10 s) and so
/// until its volume process has been told to end.
///
/// # Errors
/// `NotMounted` if no volume of ours is there; `Busy`, naming the users, if it is in use;
/// `StillHeld` if another mount namespace or process keeps the device.
pub fn unmount_at(dir: &Path) -> Result<(), AttachError> {
    let volume = volume_at(dir)?.ok_or_else(|| AttachError::NotMounted { dir: dir.into() })?;
    unmount_patiently(&volume.mount_point, BUSY_WAIT_MAX)?;
    loop_device::wait_until_free(&volume.device, volume.name)
}

/// Unmounts the volume at `dir` and returns at once. Its volume process ends when nothing else holds
/// the device ([`holders_of`](crate::holders_of)).
///
/// # Errors
/// `NotMounted` if no volume of ours is there; `Busy`, naming the users, if it is in use.
pub fn unmount_only(dir: &Path) -> Result<(), AttachError> {
    let volume = volume_at(dir)?.ok_or_else(|| AttachError::NotMounted { dir: dir.into() })?;
    unmount_patiently(&volume.mount_point, BUSY_WAIT_MAX)
}

/// Which volume is mounted at `dir`: the name of its loop device, random and unlike any other. It
/// stays the same where the mount point gets another path. `None` if no volume of ours is there.
pub fn volume_id(dir: &Path) -> Result<Option<String>, AttachError> {
    Ok(volume_at(dir)?.map(|volume| volume.name.text()))
}

/// Takes a mount away from `dir` at once, though files may be open in it; for one that is
/// [`MountState::Dead`]. What it holds is freed when its last user ends.
pub fn unmount_dead(dir: &Path) -> Result<(), AttachError> {
    let volume = volume_at(dir)?.ok_or_else(|| AttachError::NotMounted { dir: dir.into() })?;
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    rustix::mount::unmount(&volume.mount_point, flags)
        .map_err(|e| AttachError::io("detach", dir.display().to_string(), e))
}

/// Unmounts, trying again for `patience` while something is using it.
pub(crate) fn unmount_patiently(dir: &Path, patience: Duration) -> Result<(), AttachError> {
    let begun = Instant::now();
    loop {
        match rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) if begun.elapsed() < patience => sleep(Duration::from_millis(20)),
            Err(Errno::BUSY) => {
                return Err(AttachError::Busy {
                    op: "unmount",
                    dir: dir.into(),
                    users: users::users_of(dir),
                });
            }
            Err(Errno::INVAL) => return Err(AttachError::NotMounted { dir: dir.into() }),
            Err(e) => return Err(AttachError::io("unmount", dir.display().to_string(), e)),
        }
    }
}

/// Fails with `Busy` if anything is mounted on `dir` itself.
pub(crate) fn require_unmounted(dir: &Path) -> Result<(), AttachError> {
    let there = resolve(dir);
    if read_mounts()?.iter().any(|m| m.mount_point == there) {
        return Err(AttachError::Busy {
            op: "mount on",
            dir: dir.into(),
            users: vec!["another mount".into()],
        });
    }
    Ok(())
}

/// A volume of ours that is mounted in this namespace.
#[derive(Debug)]
pub(crate) struct MountedVolume {
    pub(crate) mount_point: PathBuf,
    /// Its loop device, in kernel mode the one below the map.
    pub(crate) device: PathBuf,
    name: LoopName,
}

/// All volumes of ours that are mounted in this namespace.
pub(crate) fn mounted_volumes() -> Result<Vec<MountedVolume>, AttachError> {
    let mut volumes = Vec::new();
    for mount in read_mounts()? {
        if let Some(volume) = as_volume(mount)? {
            volumes.push(volume);
        }
    }
    Ok(volumes)
}

fn volume_at(dir: &Path) -> Result<Option<MountedVolume>, AttachError> {
    let there = resolve(dir);
    // The last one listed lies on top.
    let top = read_mounts()?
        .into_iter()
        .rfind(|mount| mount.mount_point == there);
    top.map_or(Ok(None), as_volume)
}

fn as_volume(mount: MountLine) -> Result<Option<MountedVolume>, AttachError> {
    if mount.kind != b"ext4" {
        return Ok(None);
    }
    let device = if mount.major == loop_name::LOOP_MAJOR {
        PathBuf::from(format!("/dev/loop{}", mount.minor))
    } else if let Some(device) = crypt_map::loop_below(mount.major, mount.minor) {
        device
    } else {
        return Ok(None);
    };
    let name = loop_name::name_at(&device)
        .map_err(|e| AttachError::io("look at", device.display().to_string(), e))?;
    Ok(name.map(|name| MountedVolume {
        mount_point: mount.mount_point,
        device,
        name,
    }))
}
