//! Recognises sprat's loop devices by the name that each of them has.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::AttachError;
use crate::loop_info::LoopInfo64;
use crate::sys;

/// The block major number of loop devices (Documentation/admin-guide/devices.txt).
pub(crate) const LOOP_MAJOR: u32 = 7;

/// The prefix of the name. A random token follows, so that a device that was freed and is used by
/// another program is not mistaken for ours.
const NAME_PREFIX: &[u8] = b"sprat-";

/// The name of one attachment's loop device (`lo_file_name`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LoopName(pub(crate) [u8; 64]);

impl LoopName {
    pub(crate) fn random() -> Result<Self, AttachError> {
        let mut token = [0_u8; 12];
        rustix::rand::getrandom(&mut token, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| AttachError::io("draw", "a random token", e))?;
        let mut name = [0_u8; 64];
        let text = NAME_PREFIX
            .iter()
            .copied()
            .chain(token.iter().flat_map(|b| [hex(b >> 4), hex(b & 15)]));
        for (slot, byte) in name.iter_mut().zip(text) {
            *slot = byte;
        }
        Ok(Self(name))
    }

    /// The name as text.
    pub(crate) fn text(&self) -> String {
        let bytes: Vec<u8> = self.0.iter().copied().take_while(|&b| b != 0).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn of(info: &LoopInfo64) -> Option<Self> {
        info.file_name
            .starts_with(NAME_PREFIX)
            .then_some(Self(info.file_name))
    }
}

fn hex(digit: u8) -> u8 {
    match digit {
        0..=9 => b'0' + digit,
        _ => b'a' + digit - 10,
    }
}

/// The name of the loop device at `path`, if it is one of sprat's.
pub(crate) fn name_at(path: &Path) -> io::Result<Option<LoopName>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let device = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(device) => device,
        Err(Errno::NXIO | Errno::NOENT | Errno::NODEV) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    match sys::loop_status(device.as_fd()) {
        Ok(info) => Ok(LoopName::of(&info)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The nodes of all of sprat's loop devices, mounted or not, in any namespace.
pub(crate) fn all_ours() -> Vec<PathBuf> {
    let Ok(devices) = std::fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    devices
        .flatten()
        .filter(|entry| entry.path().join("loop").exists())
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .filter(|path| name_at(path).is_ok_and(|name| name.is_some()))
        .collect()
}

/// Whether `path` is the node of a loop device.
pub(crate) fn is_loop_device(path: &Path) -> bool {
    rustix::fs::stat(path).is_ok_and(|stat| rustix::fs::major(stat.st_rdev) == LOOP_MAJOR)
}
