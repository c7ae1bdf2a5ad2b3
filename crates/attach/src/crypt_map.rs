//! The dm-crypt map of kernel mode, on the loop device. The kernel removes it with its last user.
//!
//! It is a *plain* mapping: cipher, key, sector size and IV come from the caller, who has checked them.
//! No header on the device is read here, so the server can't influence the map.

use std::ffi::{c_char, c_int, c_void};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libcryptsetup_rs::consts::flags::{CryptActivate, CryptDeactivate};
use libcryptsetup_rs::consts::vals::EncryptionFormat;
use libcryptsetup_rs::{
    CryptInit, CryptParamsPlain, CryptParamsPlainRef, Either, LibcryptErr, set_log_callback,
};
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::device_node::{device_number, is_dead, open_node};
use crate::loop_name::is_loop_device;
use crate::{AttachError, sys};

/// The prefix of the name of each map. The container's UUID follows.
const NAME_PREFIX: &str = "sprat-";

/// How many containers with the same UUID (copies of each other) may be open on a machine at once.
const SAME_UUID_MAX: u32 = 16;

/// libcryptsetup is not thread-safe (cryptsetup issue 710).
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How dm-crypt encrypts the sectors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CryptMapping {
    /// The container's UUID. The map is called `sprat-UUID`.
    pub uuid: String,
    /// Cipher, mode and IV as dm-crypt names them, such as `aes-xts-plain64`.
    pub cipher: String,
    /// Encryption sector: 512, 1024, 2048 or 4096 bytes.
    pub sector_bytes: u32,
    /// Added to each sector's number, in units of 512 bytes.
    pub iv_tweak: u64,
}

/// Checks whether this machine has dm-crypt and permits its use. Loads the kernel module if there is
/// one.
///
/// # Errors
///
/// `NoDmCrypt` with the reason.
pub fn kernel_mode_works() -> Result<(), AttachError> {
    let control = rustix::fs::open(
        "/dev/mapper/control",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    );
    let control = control.map_err(|e| AttachError::NoDmCrypt {
        reason: "/dev/mapper/control can't be opened",
        source: e.into(),
    })?;
    sys::dm_target_version(control.as_fd(), "crypt").map_err(|source| AttachError::NoDmCrypt {
        reason: "the kernel has no target crypt (module dm-crypt), or doesn't let us use it",
        source,
    })
}

/// A map that this process has open. The kernel removes it when its last user, this or a mount, closes
/// it.
#[derive(Debug)]
pub(crate) struct CryptMap {
    holder: OwnedFd,
    path: PathBuf,
}

impl CryptMap {
    /// Creates a map over the whole of `device`. When this returns, the removal of the map is scheduled
    /// already, so that it can't outlive this process and the mounts. First removes a map that a killed
    /// process left before that point.
    pub(crate) fn make(
        device: &Path,
        mapping: &CryptMapping,
        key: &[u8],
    ) -> Result<Self, AttachError> {
        let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a callback libcryptsetup prints to stdout and stderr.
        set_log_callback::<()>(Some(swallow), None);
        let name = free_name(&mapping.uuid)?;
        let failed = |op| failed(op, &name);
        let (cipher, mode) = mapping.cipher.split_once('-').unwrap_or_default();
        let params = CryptParamsPlain {
            // Only passphrases are hashed, and there is none.
            hash: "sha256".to_owned(),
            offset: 0,
            sector_size: mapping.sector_bytes,
            size: 0,
            skip: mapping.iv_tweak,
        };
        let mut params: CryptParamsPlainRef<'_> = (&params).try_into().map_err(failed("set up"))?;
        let mut crypt = CryptInit::init(device).map_err(failed("begin"))?;
        crypt
            .context_handle()
            .format(
                EncryptionFormat::Plain,
                (cipher, mode),
                None,
                Either::Right(key.len()),
                Some(&mut params),
            )
            .map_err(failed("set up"))?;
        crypt
            .activate_handle()
            .activate_by_volume_key(Some(&name), Some(key), CryptActivate::PRIVATE)
            .map_err(failed("make"))?;
        let opened = open_map(&name);
        // Deferred: the map is removed when its last user closes it. Until the mount, that is `opened`. If
        // the map could not be opened, it is removed at once.
        let removal = crypt
            .activate_handle()
            .deactivate(&name, CryptDeactivate::DEFERRED)
            .map_err(failed("order the removal of"));
        let map = opened?;
        removal?;
        Ok(map)
    }

    /// The block device, `/dev/dm-N`.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Sets the read-ahead of the device and of the file system that is mounted on it later.
    pub(crate) fn set_read_ahead(&self, bytes: u64) -> Result<(), AttachError> {
        let sectors = libc::c_ulong::try_from(bytes / 512).unwrap_or(libc::c_ulong::MAX);
        sys::set_read_ahead(self.holder.as_fd(), sectors)
            .map_err(|e| AttachError::io("set read-ahead of", self.path.display().to_string(), e))
    }
}

/// Opens the map's device. libdevmapper has also created a node in `/dev/mapper`. Nothing needs it, and
/// nobody would remove it with the map.
fn open_map(name: &str) -> Result<CryptMap, AttachError> {
    let node = Path::new("/dev/mapper").join(name);
    let number = number_of(name);
    let _ = fs::remove_file(node);
    let (major, minor) = number.ok_or(AttachError::NoDmCrypt {
        reason: "the map was made, but /sys/block doesn't show it",
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    let path = PathBuf::from(format!("/dev/dm-{minor}"));
    let holder = open_node(&path, major, minor)
        .map_err(|e| AttachError::io("open", path.display().to_string(), e))?;
    Ok(CryptMap { holder, path })
}

/// A name that no map has. Removes a map of that name that a killed process left.
fn free_name(uuid: &str) -> Result<String, AttachError> {
    for count in 0..SAME_UUID_MAX {
        let name = match count {
            0 => format!("{NAME_PREFIX}{uuid}"),
            _ => format!("{NAME_PREFIX}{uuid}-{count}"),
        };
        let Some((_, minor)) = number_of(&name) else {
            return Ok(name);
        };
        if is_leftover(minor) {
            remove(&name)?;
            // If it is open in another namespace, it is removed when it is closed there.
            if number_of(&name).is_none() {
                return Ok(name);
            }
        }
    }
    Err(AttachError::NoDmCrypt {
        reason: "too many containers with this UUID are open here",
        source: std::io::ErrorKind::AlreadyExists.into(),
    })
}

/// Whether the map's volume process is gone: then the device below it answers only with errors.
fn is_leftover(minor: u32) -> bool {
    below(minor).is_none_or(|device| is_dead(&device))
}

fn remove(name: &str) -> Result<(), AttachError> {
    let mut crypt = CryptInit::init_by_name_and_header(name, None)
        .map_err(failed("open the leftover", name))?;
    crypt
        .activate_handle()
        .deactivate(name, CryptDeactivate::DEFERRED)
        .map_err(failed("remove the leftover", name))
}

/// The loop device below the map with this minor number.
fn below(minor: u32) -> Option<PathBuf> {
    let slaves = fs::read_dir(format!("/sys/block/dm-{minor}/slaves")).ok()?;
    let slave = slaves.flatten().next()?;
    Some(Path::new("/dev").join(slave.file_name()))
}

/// The loop device below the map with this device number, if it is one of sprat's maps.
pub(crate) fn loop_below(major: u32, minor: u32) -> Option<PathBuf> {
    let name = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/dm/name")).ok()?;
    let device = name
        .starts_with(NAME_PREFIX)
        .then(|| below(minor))
        .flatten()?;
    is_loop_device(&device).then_some(device)
}

/// Major and minor number of the map with this name.
fn number_of(name: &str) -> Option<(u32, u32)> {
    fs::read_dir("/sys/block")
        .ok()?
        .flatten()
        .find_map(|entry| {
            let found = fs::read_to_string(entry.path().join("dm/name")).ok()?;
            if found.trim_end() != name {
                return None;
            }
            device_number(&entry.path())
        })
}

fn failed<'n>(op: &'static str, name: &'n str) -> impl Fn(LibcryptErr) -> AttachError + use<'n> {
    move |source| AttachError::CryptMap {
        op,
        name: name.to_owned(),
        source,
    }
}

/// libcryptsetup's messages are meant for the user of its own command line.
extern "C" fn swallow(_level: c_int, _message: *const c_char, _context: *mut c_void) {}
