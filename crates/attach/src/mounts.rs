//! What is mounted where, and how a mount that outlives its maker is ended (`sprat umount`).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::loop_device::{self, LoopName};
use crate::{AttachError, crypt_map, program, users};

/// How long a device that is asked for one block may take before it counts as slow, not dead.
const ANSWER_WAIT: Duration = Duration::from_secs(2);

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
    let device = if mount.major == loop_device::LOOP_MAJOR {
        PathBuf::from(format!("/dev/loop{}", mount.minor))
    } else if let Some(device) = crypt_map::loop_below(mount.major, mount.minor) {
        device
    } else {
        return Ok(None);
    };
    let name = loop_device::name_at(&device)
        .map_err(|e| AttachError::io("look at", device.display().to_string(), e))?;
    Ok(name.map(|name| MountedVolume {
        mount_point: mount.mount_point,
        device,
        name,
    }))
}

/// Whether the device answers a read with an error. One that doesn't answer in time isn't dead:
/// its line may be down.
///
/// The read is another process's, which is left behind then: one that waits for a device can't be
/// killed, and neither ends a process one of whose threads does.
pub(crate) fn is_dead(device: &Path) -> bool {
    let Ok(mut reader) = program::command("dd") else {
        return false;
    };
    let started = reader
        .arg(format!("if={}", device.display()))
        .args(["of=/dev/null", "bs=4096", "count=1", "iflag=direct"])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(reader) = started else { return false };
    let (answer, answered) = mpsc::channel();
    let waiting = std::thread::Builder::new().spawn(move || {
        // Nobody may be listening any more.
        let _ = answer.send(reader.wait_with_output());
    });
    if waiting.is_err() {
        return false;
    }
    // strerror(EIO) of glibc, and of musl.
    let tells_eio = |said: &[u8]| {
        let said = String::from_utf8_lossy(said);
        said.contains("Input/output error") || said.contains("I/O error")
    };
    matches!(answered.recv_timeout(ANSWER_WAIT), Ok(Ok(read)) if tells_eio(&read.stderr))
}

/// `dir` as the kernel lists it; a dead mount point can't always be resolved itself.
pub(crate) fn resolve(dir: &Path) -> PathBuf {
    fs::canonicalize(dir).unwrap_or_else(|_| {
        match (dir.parent().map(fs::canonicalize), dir.file_name()) {
            (Some(Ok(parent)), Some(name)) => parent.join(name),
            _ => dir.to_owned(),
        }
    })
}

/// One line of `/proc/PID/mountinfo`, as far as it matters here.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MountLine {
    /// The mount's number; `mnt_id` of `/proc/PID/fdinfo/N` is the same.
    pub(crate) id: u32,
    /// The number of the mount that it lies on.
    pub(crate) parent: u32,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) mount_point: PathBuf,
    pub(crate) kind: Vec<u8>,
}

pub(crate) fn read_mounts() -> Result<Vec<MountLine>, AttachError> {
    // Of this thread: one may be in a namespace of its own.
    let path = "/proc/thread-self/mountinfo";
    read_mounts_of(Path::new(path)).map_err(|e| AttachError::io("read", path, e))
}

/// All mounts that a `mountinfo` file of `/proc` lists.
pub(crate) fn read_mounts_of(mountinfo: &Path) -> std::io::Result<Vec<MountLine>> {
    let text = fs::read(mountinfo)?;
    Ok(text
        .split(|&b| b == b'\n')
        .filter_map(parse_mount_line)
        .collect())
}

/// Parses `36 35 98:0 /root /mount/point rw,noatime - ext4 /dev/x rw` (proc(5)); optional fields
/// may come before the dash.
fn parse_mount_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|&b| b == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let device = std::str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mount_point = unescape(fields.nth(1)?);
    let kind = fields.skip_while(|&field| field != b"-").nth(1)?;
    Some(MountLine {
        id,
        parent,
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        mount_point: OsString::from_vec(mount_point).into(),
        kind: kind.to_owned(),
    })
}

/// Undoes the kernel's `\040` for blanks, tabs, newlines and backslashes.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                out.push(first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_are_read_with_escapes_and_optional_fields() {
        let line =
            b"36 35 7:12 / /mnt/a\\040b\\134c rw,noatime shared:1 master:2 - ext4 /dev/loop12 rw";
        let expected = MountLine {
            id: 36,
            parent: 35,
            major: 7,
            minor: 12,
            mount_point: "/mnt/a b\\c".into(),
            kind: b"ext4".to_vec(),
        };
        assert_eq!(parse_mount_line(line), Some(expected));
    }

    #[test]
    fn mountinfo_lines_that_make_no_sense_are_skipped() {
        for line in [
            &b""[..],
            b"36 35",
            b"1 2 x:y / /m rw - ext4 d rw",
            b"1 2 7:1 / /m rw",
        ] {
            assert_eq!(parse_mount_line(line), None, "{line:?}");
        }
    }
}
