//! Nodes of block devices: opens a device, finds its number, checks whether it is dead.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::program;

/// How long a device may take for one block before it counts as slow. Then it does not count as dead.
const ANSWER_WAIT: Duration = Duration::from_secs(2);

/// Opens the node of a block device. Creates the node if `/dev` is not managed by the kernel.
pub(crate) fn open_node(path: &Path, major: u32, minor: u32) -> Result<OwnedFd, Errno> {
    let open = || rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    match open() {
        Err(Errno::NOENT) => {
            let node = rustix::fs::mknodat(
                rustix::fs::CWD,
                path,
                rustix::fs::FileType::BlockDevice,
                Mode::RUSR | Mode::WUSR,
                rustix::fs::makedev(major, minor),
            );
            match node {
                Ok(()) | Err(Errno::EXIST) => open(),
                Err(e) => Err(e),
            }
        }
        other => other,
    }
}

/// Major and minor number of the device with this folder in `/sys/block`.
pub(crate) fn device_number(block: &Path) -> Option<(u32, u32)> {
    let text = fs::read_to_string(block.join("dev")).ok()?;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Whether the device answers a read with an error. A device that doesn't answer in time is not dead:
/// its connection may be down.
///
/// A separate process does the read, and is left behind if the device doesn't answer. A process that
/// waits for a device can't be killed, and a process can't end while one of its threads does.
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
        // The receiver may be gone.
        let _ = answer.send(reader.wait_with_output());
    });
    if waiting.is_err() {
        return false;
    }
    // strerror(EIO) in glibc and in musl.
    let reports_eio = |message: &[u8]| {
        let message = String::from_utf8_lossy(message);
        message.contains("Input/output error") || message.contains("I/O error")
    };
    matches!(answered.recv_timeout(ANSWER_WAIT), Ok(Ok(read)) if reports_eio(&read.stderr))
}
