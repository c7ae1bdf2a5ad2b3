//! Loop devices: sets a free one on the FUSE file, tunes it, and waits until it is free again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::AttachError;
use crate::device::BLOCK_BYTES_U32;
use crate::device_node::open_node;
use crate::loop_info::{LoopConfig, LoopInfo64};
use crate::loop_name::{LOOP_MAJOR, LoopName, name_at};
use crate::sys;
use crate::users::{holders_of, holders_text};

// include/uapi/linux/loop.h
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// The largest request of the loop device in KiB. FUSE would split requests of the default size, 1280.
const REQUEST_KIB_MAX: &str = "512";

/// How many bytes of dirty pages the page cache may have before writers must wait. The kernel begins to
/// write at about half of that. By default it would wait until a tenth of the memory is dirty or until
/// the journal's next commit, and the connection would be idle for seconds.
pub const DIRTY_BYTES_MAX: u64 = 128 << 20;

/// How often another process may use the free device before we do.
const ATTEMPTS_MAX: u32 = 64;

/// How long to wait until the kernel, and programs that inspect new devices such as udev, have closed
/// the device.
const RELEASE_WAIT_MAX: Duration = Duration::from_secs(10);

/// A loop device that this process has open. The kernel frees it (autoclear) when the last user, this or
/// a mount, closes it.
pub(crate) struct LoopDevice {
    holder: OwnedFd,
    path: PathBuf,
    name: LoopName,
    /// The device's previous read-ahead in sectors. The device keeps its read-ahead after the
    /// attachment.
    read_ahead_before: Option<libc::c_ulong>,
    /// Settings in sysfs and their previous values. The device keeps them, too.
    settings_before: Vec<(PathBuf, String)>,
}

impl LoopDevice {
    /// Sets a free loop device on `file`.
    pub(crate) fn attach(file: BorrowedFd<'_>) -> Result<Self, AttachError> {
        let control = open_control()?;
        let name = LoopName::random()?;
        for _ in 0..ATTEMPTS_MAX {
            let number =
                sys::loop_free_number(control.as_fd()).map_err(|source| AttachError::NoLoop {
                    reason: "the kernel has none free",
                    source,
                })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let holder = open_device(&path, number)?;
            match configure(holder.as_fd(), file, name) {
                Ok(()) => {
                    return Ok(Self {
                        holder,
                        path,
                        name,
                        read_ahead_before: None,
                        settings_before: Vec::new(),
                    });
                }
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(AttachError::NoLoop {
                        reason: "LOOP_CONFIGURE refused; Linux 5.8 is needed",
                        source: e,
                    });
                }
                Err(e) => return Err(AttachError::io("set up", path.display().to_string(), e)),
            }
        }
        Err(AttachError::NoLoop {
            reason: "other processes use each free one first",
            source: io::Error::from_raw_os_error(libc::EBUSY),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Sets the read-ahead of the device and of a file system that is mounted on it later.
    pub(crate) fn set_read_ahead(&mut self, bytes: u64) -> Result<(), AttachError> {
        let sectors = libc::c_ulong::try_from(bytes / 512).unwrap_or(libc::c_ulong::MAX);
        if self.read_ahead_before.is_none() {
            self.read_ahead_before = sys::read_ahead(self.holder.as_fd()).ok();
        }
        sys::set_read_ahead(self.holder.as_fd(), sectors)
            .map_err(|e| AttachError::io("set read-ahead of", self.path.display().to_string(), e))
    }

    /// Limits requests to [`REQUEST_KIB_MAX`], if `/sys` is writable (in containers it often isn't).
    /// Then the 128 requests of the device have at most 64 MiB. The volume process can set that much
    /// aside while its buffer is full, so that reads don't wait behind writes.
    pub(crate) fn limit_requests(&mut self) {
        self.set("queue/max_sectors_kb", REQUEST_KIB_MAX);
    }

    /// Makes the kernel write dirty pages early and limits their number ([`DIRTY_BYTES_MAX`]), if
    /// possible (Linux 6.2, and a writable `/sys`).
    pub(crate) fn limit_dirty(&mut self) {
        reset_leftover_limits(&self.path);
        // Without `strict_limit` the other setting has no effect until the whole machine has too many
        // dirty pages.
        if self.set("bdi/max_bytes", &DIRTY_BYTES_MAX.to_string()) {
            self.set("bdi/strict_limit", "1");
        }
        // The kernel stores `max_bytes` as a share of a changing threshold, so the value read before may
        // be wrong. The share itself is restored.
        for (setting, before) in &mut self.settings_before {
            if setting.ends_with("bdi/max_bytes") {
                setting.set_file_name("max_ratio");
                "100".clone_into(before);
            }
        }
    }

    /// Changes a setting in sysfs until the release. False if that is not possible.
    fn set(&mut self, setting: &str, value: &str) -> bool {
        let Some(name) = self.path.file_name() else {
            return false;
        };
        let setting = Path::new("/sys/block").join(name).join(setting);
        let Ok(before) = std::fs::read_to_string(&setting) else {
            return false;
        };
        let done = std::fs::write(&setting, value).is_ok();
        if done {
            self.settings_before.push((setting, before));
        }
        done
    }

    /// Closes the device, and waits until nothing uses it.
    pub(crate) fn release(self) -> Result<(), AttachError> {
        // Restores the settings for the next user of this device.
        if let Some(sectors) = self.read_ahead_before {
            let _ = sys::set_read_ahead(self.holder.as_fd(), sectors);
        }
        for (setting, before) in self.settings_before.iter().rev() {
            let _ = std::fs::write(setting, before.trim());
        }
        let Self {
            holder, path, name, ..
        } = self;
        drop(holder);
        wait_until_free(&path, name)
    }
}

impl std::fmt::Debug for LoopDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoopDevice")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

/// Resets the limits on dirty pages of `ours`, which no other session uses now, and of every free loop
/// device: after kill -9 of a session its device keeps them. The kernel itself sets `strict_limit` on no
/// loop device (mm/backing-dev.c).
fn reset_leftover_limits(ours: &Path) {
    let Ok(devices) = std::fs::read_dir("/sys/block") else {
        return;
    };
    for entry in devices.flatten() {
        let (device, name) = (entry.path(), entry.file_name());
        let is_loop = name.as_encoded_bytes().starts_with(b"loop");
        let is_free = !device.join("loop/backing_file").exists();
        let strict = device.join("bdi/strict_limit");
        let is_strict = || std::fs::read_to_string(&strict).is_ok_and(|text| text.trim() == "1");
        if is_loop && (is_free || ours.file_name() == Some(&name)) && is_strict() {
            let _ = std::fs::write(&strict, "0");
            let _ = std::fs::write(device.join("bdi/max_ratio"), "100");
        }
    }
}

/// The nodes of all loop devices that no file is set on.
pub(crate) fn free_devices() -> Vec<PathBuf> {
    let Ok(devices) = std::fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let names = devices.flatten().filter(|entry| {
        let is_loop = entry.file_name().as_encoded_bytes().starts_with(b"loop");
        is_loop && !entry.path().join("loop/backing_file").exists()
    });
    names
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect()
}

/// Waits until the loop device at `path` no longer has `name`.
pub(crate) fn wait_until_free(path: &Path, name: LoopName) -> Result<(), AttachError> {
    let started = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        let seen =
            name_at(path).map_err(|e| AttachError::io("check", path.display().to_string(), e))?;
        if seen != Some(name) {
            return Ok(());
        }
        if started.elapsed() > RELEASE_WAIT_MAX {
            return Err(AttachError::StillHeld {
                device: path.display().to_string(),
                waited_s: started.elapsed().as_secs(),
                holder: holders_text(&holders_of(&name.text())),
            });
        }
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// Sets up a loop device on `file` briefly, to check whether that works.
pub(crate) fn probe(file: BorrowedFd<'_>) -> Result<PathBuf, AttachError> {
    let device = LoopDevice::attach(file)?;
    let path = device.path().to_owned();
    device.release()?;
    Ok(path)
}

fn configure(device: BorrowedFd<'_>, file: BorrowedFd<'_>, name: LoopName) -> io::Result<()> {
    let config = LoopConfig {
        fd: file.as_raw_fd().cast_unsigned(),
        block_size: BLOCK_BYTES_U32,
        info: LoopInfo64 {
            flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO,
            file_name: name.0,
            ..LoopInfo64::EMPTY
        },
        reserved: [0; 8],
    };
    sys::loop_configure(device, &config)
}

fn open_control() -> Result<OwnedFd, AttachError> {
    let path = "/dev/loop-control";
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| {
        let reason = match e {
            Errno::NOENT => "/dev/loop-control doesn't exist (module loop not loaded, or a container without it)",
            Errno::PERM | Errno::ACCESS => "this user or container may not open /dev/loop-control",
            _ => "/dev/loop-control can't be opened",
        };
        AttachError::NoLoop {
            reason,
            source: e.into(),
        }
    })
}

/// Opens the device node. Creates it if the kernel doesn't manage `/dev`, as in many containers.
fn open_device(path: &Path, number: u32) -> Result<OwnedFd, AttachError> {
    open_node(path, LOOP_MAJOR, number).map_err(|e| match e {
        Errno::PERM | Errno::ACCESS => AttachError::NoLoop {
            reason: "this container may not open loop devices, or make their nodes in /dev",
            source: e.into(),
        },
        e => AttachError::io("open", path.display().to_string(), e),
    })
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;
    use sprat_testkit::{needs, requires};

    use super::*;

    fn file() -> OwnedFd {
        let file = rustix::fs::memfd_create("sprat-test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 1 << 20).unwrap();
        file
    }

    #[test]
    fn only_a_device_with_the_name_is_waited_for() {
        let missing = !Path::new("/dev/loop-control").exists();
        requires!(needs::root(), missing.then(|| "no loop".to_owned()));
        let file = file();
        let device = LoopDevice::attach(file.as_fd()).unwrap();
        assert_eq!(name_at(device.path()).unwrap(), Some(device.name));
        // As if it had been freed, and another session used it now.
        let started = Instant::now();
        wait_until_free(device.path(), LoopName::random().unwrap()).unwrap();
        assert!(started.elapsed() < RELEASE_WAIT_MAX / 2);
        // The release waits while the device is open.
        let path = device.path().to_owned();
        let opened = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let release = std::thread::spawn(move || device.release());
        sleep(Duration::from_millis(300));
        assert!(!release.is_finished());
        drop(opened);
        release.join().unwrap().unwrap();
    }
}
