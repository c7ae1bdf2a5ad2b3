//! Mounted volumes: finds them, checks whether they are alive, and unmounts them.

use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::device_node::is_dead;
use crate::loop_name::{self, LoopName};
use crate::mount_table::{MountLine, read_mounts, resolve};
use crate::{AttachError, crypt_map, loop_device, users};

/// How long an unmount waits for the last user. A shell that has just left the folder is gone by then.
const BUSY_WAIT_MAX: Duration = Duration::from_millis(500);

/// The state of a mount point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MountState {
    /// No volume of sprat is mounted there.
    NotMounted,
    /// A volume is mounted and answers, or is slow (a slow or lost connection).
    Alive,
    /// A volume is mounted, but its volume process is gone. Everything that isn't cached returns EIO.
    Dead,
}

/// The state of the mount point `dir`. Reads one block without a cache, for at most 2 s.
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

/// Unmounts the volume at `dir`. Waits at most 10 s until its loop device is free, which ends its volume
/// process.
///
/// # Errors
///
/// `NotMounted` if no volume of sprat is there; `Busy` with the users if it is in use; `StillHeld` if
/// another mount namespace or a process has the device open.
pub fn unmount_at(dir: &Path) -> Result<(), AttachError> {
    let volume = volume_at(dir)?.ok_or_else(|| AttachError::NotMounted { dir: dir.into() })?;
    unmount_patiently(&volume.mount_point, BUSY_WAIT_MAX)?;
    loop_device::wait_until_free(&volume.device, volume.name)
}

/// Unmounts the volume at `dir` and returns at once. Its volume process ends when nothing else uses the
/// device ([`holders_of`](crate::holders_of)).
///
/// # Errors
///
/// `NotMounted` if no volume of sprat is there; `Busy` with the users if it is in use.
pub fn unmount_only(dir: &Path) -> Result<(), AttachError> {
    let volume = volume_at(dir)?.ok_or_else(|| AttachError::NotMounted { dir: dir.into() })?;
    unmount_patiently(&volume.mount_point, BUSY_WAIT_MAX)
}

/// Identifies the volume that is mounted at `dir`: the random, unique name of its loop device. It stays
/// the same if the mount point gets another path. `None` if no volume of sprat is there.
pub fn volume_id(dir: &Path) -> Result<Option<String>, AttachError> {
    Ok(volume_at(dir)?.map(|volume| volume.name.text()))
}

/// Detaches the mount at `dir` at once, even if files are open in it. For a mount that is
/// [`MountState::Dead`]. It is freed when its last user ends.
pub fn unmount_dead(dir: &Path) -> Result<(), AttachError> {
    let volume = volume_at(dir)?.ok_or_else(|| AttachError::NotMounted { dir: dir.into() })?;
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    rustix::mount::unmount(&volume.mount_point, flags)
        .map_err(|e| AttachError::io("detach", dir.display().to_string(), e))
}

/// Unmounts. Retries for `patience` while something uses the mount.
pub(crate) fn unmount_patiently(dir: &Path, patience: Duration) -> Result<(), AttachError> {
    let started = Instant::now();
    loop {
        match rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) if started.elapsed() < patience => sleep(Duration::from_millis(20)),
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

/// Fails with `Busy` if something is mounted on `dir` itself.
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

/// A volume of sprat that is mounted in this namespace.
#[derive(Debug)]
pub(crate) struct MountedVolume {
    pub(crate) mount_point: PathBuf,
    /// Its loop device. In kernel mode that is the one below the map.
    pub(crate) device: PathBuf,
    name: LoopName,
}

/// All volumes of sprat that are mounted in this namespace.
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
    // The last one in the list is on top.
    let top = read_mounts()?
        .into_iter()
        .rfind(|mount| mount.mount_point == there);
    top.map_or(Ok(None), as_volume)
}

fn as_volume(mount: MountLine) -> Result<Option<MountedVolume>, AttachError> {
    let (b"ext4" | b"btrfs", Some((major, minor))) = (&mount.kind[..], mount.device()) else {
        return Ok(None);
    };
    let device = if major == loop_name::LOOP_MAJOR {
        PathBuf::from(format!("/dev/loop{minor}"))
    } else if let Some(device) = crypt_map::loop_below(major, minor) {
        device
    } else {
        return Ok(None);
    };
    let name = loop_name::name_at(&device)
        .map_err(|e| AttachError::io("check", device.display().to_string(), e))?;
    Ok(name.map(|name| MountedVolume {
        mount_point: mount.mount_point,
        device,
        name,
    }))
}
