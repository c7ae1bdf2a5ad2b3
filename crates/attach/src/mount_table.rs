//! Reads the kernel's list of mounts (`/proc/PID/mountinfo`).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::AttachError;

/// The fields of a line of `/proc/PID/mountinfo` that are needed here.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct MountLine {
    /// The mount's number, which is also `mnt_id` in `/proc/PID/fdinfo/N`.
    pub(crate) id: u32,
    /// The number of the mount below it.
    pub(crate) parent: u32,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) mount_point: PathBuf,
    pub(crate) kind: Vec<u8>,
    /// The device, as the file system names it.
    pub(crate) source: Vec<u8>,
}

impl MountLine {
    /// The number of the device that the file system is on. `None`: not known.
    pub(crate) fn device(&self) -> Option<(u32, u32)> {
        // The number in the table is one of btrfs's own.
        match &self.kind[..] {
            b"btrfs" => device_at(&self.source),
            _ => Some((self.major, self.minor)),
        }
    }
}

/// The number of the device at a path.
fn device_at(source: &[u8]) -> Option<(u32, u32)> {
    let about = rustix::fs::stat(OsStr::from_bytes(source)).ok()?;
    let is_block = rustix::fs::FileType::from_raw_mode(about.st_mode).is_block_device();
    is_block.then(|| {
        (
            rustix::fs::major(about.st_rdev),
            rustix::fs::minor(about.st_rdev),
        )
    })
}

pub(crate) fn read_mounts() -> Result<Vec<MountLine>, AttachError> {
    // That of this thread: a thread may be in its own namespace.
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

/// Parses `36 35 98:0 /root /mount/point rw,noatime - ext4 /dev/x rw` (proc(5)). There may be optional
/// fields before the dash.
fn parse_mount_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|&b| b == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let device = std::str::from_utf8(fields.next()?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mount_point = unescape(fields.nth(1)?);
    let mut behind = fields.skip_while(|&field| field != b"-").skip(1);
    let (kind, source) = (behind.next()?, behind.next()?);
    Some(MountLine {
        id,
        parent,
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        mount_point: OsString::from_vec(mount_point).into(),
        kind: kind.to_owned(),
        source: unescape(source),
    })
}

/// Decodes the kernel's `\040` for space, tab, newline and backslash.
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

/// `dir` as the kernel lists it. A dead mount point can't always be resolved itself.
pub(crate) fn resolve(dir: &Path) -> PathBuf {
    fs::canonicalize(dir).unwrap_or_else(|_| {
        match (dir.parent().map(fs::canonicalize), dir.file_name()) {
            (Some(Ok(parent)), Some(name)) => parent.join(name),
            _ => dir.to_owned(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_lines_with_escapes_and_optional_fields_are_parsed() {
        let line =
            b"36 35 7:12 / /mnt/a\\040b\\134c rw,noatime shared:1 master:2 - ext4 /dev/loop12 rw";
        let expected = MountLine {
            id: 36,
            parent: 35,
            major: 7,
            minor: 12,
            mount_point: "/mnt/a b\\c".into(),
            kind: b"ext4".to_vec(),
            source: b"/dev/loop12".to_vec(),
        };
        assert_eq!(parse_mount_line(line), Some(expected));
    }

    #[test]
    fn invalid_mountinfo_lines_are_skipped() {
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
