//! Runs libcryptsetup on a header in memory.
//!
//! libcryptsetup needs a file as long as the payload's offset. It reads and writes only the two header
//! copies and the slots' areas in it. The file is anonymous (`memfd_create`) and sparse, with the path
//! `/proc/self/fd/N`, so nothing is left behind when the process dies. It never contains a key.
//!
//! libcryptsetup is not thread-safe (libcryptsetup-rs: README, "Note on thread-safety"; cryptsetup issue
//! 710). Only one `Reference` exists at a time in a process.

use std::{
    ffi::c_void,
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        raw::{c_char, c_int},
        unix::fs::FileExt,
    },
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use libcryptsetup_rs::{
    CryptDevice, CryptInit, CryptParamsLuks2, CryptParamsLuks2Ref, CryptPbkdfType, Either,
    LibcryptErr,
    consts::{
        flags::{CryptPbkdf, CryptVolumeKey},
        vals::{CryptKdf, EncryptionFormat},
    },
};
use rustix::{
    fs::{MemfdFlags, memfd_create},
    io::Errno,
};
use zeroize::Zeroizing;

use crate::{
    LuksError,
    header_io::{Extent, HeaderRead},
    keyslot::Kdf,
    secret::{Secret, VolumeKey},
};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A header in memory that libcryptsetup works on.
pub(crate) struct Reference {
    // They are dropped in this order.
    device: CryptDevice,
    file: File,
    _turn: MutexGuard<'static, ()>,
}

/// The fields of a new header.
pub(crate) struct NewHeader<'a> {
    pub uuid: Option<uuid::Uuid>,
    pub label: Option<&'a str>,
    pub sector_bytes: u32,
    pub cipher: (&'a str, &'a str),
}

impl Reference {
    /// Loads a header that was checked before.
    pub(crate) fn load(header: &[Extent], payload_offset: u64) -> Result<Self, LuksError> {
        Self::load_as(EncryptionFormat::Luks2, header, payload_offset)
    }

    /// The same for LUKS1.
    pub(crate) fn load_luks1(header: &Extent, payload_offset: u64) -> Result<Self, LuksError> {
        let header = std::slice::from_ref(header);
        Self::load_as(EncryptionFormat::Luks1, header, payload_offset)
    }

    fn load_as(
        format: EncryptionFormat,
        header: &[Extent],
        payload_offset: u64,
    ) -> Result<Self, LuksError> {
        let mut reference = Self::open(header, payload_offset)?;
        reference
            .device
            .context_handle()
            .load::<()>(Some(format), None)
            .map_err(library("load the header"))?;
        Ok(reference)
    }

    /// Makes a header without key slots. The digest of `key` gets the minimum of rounds: the key is
    /// random, and each unlock computes the digest.
    pub(crate) fn format(
        new: &NewHeader<'_>,
        payload_offset: u64,
        key: &VolumeKey,
    ) -> Result<Self, LuksError> {
        let mut reference = Self::open(&[], payload_offset)?;
        let device = &mut reference.device;
        let op = "make the header";
        device
            .set_data_offset(payload_offset / 512)
            .map_err(library(op))?;
        let params = CryptParamsLuks2 {
            pbkdf: Some(pbkdf(&Kdf::Pbkdf2 {
                hash: "sha256".to_owned(),
                rounds: 1000,
            })),
            integrity: None,
            integrity_params: None,
            data_alignment: 0,
            data_device: None,
            sector_size: new.sector_bytes,
            label: new.label.map(str::to_owned),
            subsystem: None,
        };
        let mut params: CryptParamsLuks2Ref<'_> = (&params).try_into().map_err(library(op))?;
        device
            .context_handle()
            .format(
                EncryptionFormat::Luks2,
                new.cipher,
                new.uuid,
                Either::Left(key.expose()),
                Some(&mut params),
            )
            .map_err(library(op))?;
        Ok(reference)
    }

    fn open(header: &[Extent], payload_offset: u64) -> Result<Self, LuksError> {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a callback libcryptsetup prints to stdout and stderr.
        libcryptsetup_rs::set_log_callback::<()>(Some(swallow), None);
        let file = anonymous_file().map_err(scratch("make"))?;
        file.set_len(payload_offset).map_err(scratch("make"))?;
        for extent in header {
            file.write_all_at(&extent.bytes, extent.offset)
                .map_err(scratch("fill"))?;
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut device = CryptInit::init(Path::new(&path)).map_err(library("begin"))?;
        // The lock files in /run/cryptsetup are for devices that other programs may open, too.
        device
            .settings_handle()
            .metadata_locking(false)
            .map_err(library("begin"))?;
        Ok(Self {
            device,
            file,
            _turn: turn,
        })
    }

    /// Writes the area of a key slot into the file.
    pub(crate) fn fill(&self, extent: &Extent) -> Result<(), LuksError> {
        self.file
            .write_all_at(&extent.bytes, extent.offset)
            .map_err(scratch("fill"))
    }

    /// Opens one slot. `None` if the secret is not that of the slot.
    pub(crate) fn open_slot(
        &mut self,
        slot: u32,
        kdf: &Kdf,
        secret: &Secret,
    ) -> Result<Option<VolumeKey>, LuksError> {
        let mut buffer = Zeroizing::new([0; VolumeKey::LEN_MAX]);
        let opened =
            self.device
                .volume_key_handle()
                .get(Some(slot), &mut *buffer, Some(secret.expose()));
        match opened {
            Ok((_, len)) if (16..=VolumeKey::LEN_MAX).contains(&len) => {
                Ok(Some(VolumeKey::copy_of(&buffer[..len])))
            }
            Ok((_, len)) => Err(LuksError::invalid(format!(
                "key slot {slot} has a key of {len} bytes"
            ))),
            Err(LibcryptErr::IOError(error)) if error.kind() == io::ErrorKind::PermissionDenied => {
                Ok(None)
            }
            Err(LibcryptErr::IOError(error)) if error.kind() == io::ErrorKind::OutOfMemory => {
                Err(LuksError::NoMemory {
                    slot,
                    memory_kib: kdf.memory_kib(),
                })
            }
            Err(source) => Err(library("open a key slot")(source)),
        }
    }

    /// Adds a slot. Returns its number.
    pub(crate) fn add_slot(
        &mut self,
        slot: Option<u32>,
        key: &VolumeKey,
        secret: &Secret,
        kdf: &Kdf,
    ) -> Result<u32, LuksError> {
        let op = "add a key slot";
        self.device
            .settings_handle()
            .set_pbkdf_type(&pbkdf(kdf))
            .map_err(library(op))?;
        self.device
            .keyslot_handle()
            .add_by_key(
                slot,
                Some(Either::Left(key.expose())),
                secret.expose(),
                CryptVolumeKey::empty(),
            )
            .map_err(library(op))
    }

    /// Removes a slot: overwrites its area and removes its entry.
    pub(crate) fn remove_slot(&mut self, slot: u32) -> Result<(), LuksError> {
        self.device
            .keyslot_handle()
            .destroy(slot)
            .map_err(library("remove a key slot"))
    }
}

/// The header as libcryptsetup has written it.
impl HeaderRead for Reference {
    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

fn anonymous_file() -> io::Result<File> {
    let make = |flags| memfd_create("sprat-luks2-header", flags | MemfdFlags::CLOEXEC);
    match make(MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 doesn't know the flag. Later versions may require it (vm.memfd_noexec).
        Err(Errno::INVAL) => Ok(make(MemfdFlags::empty())?.into()),
        other => Ok(other?.into()),
    }
}

/// libcryptsetup's messages are meant for its own command line, and may quote the header.
extern "C" fn swallow(_level: c_int, _message: *const c_char, _context: *mut c_void) {}

fn pbkdf(kdf: &Kdf) -> CryptPbkdfType {
    // Time is used only by the benchmark, which is off.
    let flags = CryptPbkdf::NO_BENCHMARK;
    match kdf {
        Kdf::Pbkdf2 { hash, rounds } => CryptPbkdfType {
            type_: CryptKdf::Pbkdf2,
            hash: Some(hash.clone()),
            time_ms: 0,
            iterations: *rounds,
            max_memory_kb: 0,
            parallel_threads: 0,
            flags,
        },
        Kdf::Argon2 {
            kind,
            passes,
            memory_kib,
            threads,
        } => CryptPbkdfType {
            type_: match kind.as_str() {
                "argon2i" => CryptKdf::Argon2I,
                _ => CryptKdf::Argon2Id,
            },
            hash: Some("sha256".to_owned()),
            time_ms: 0,
            iterations: *passes,
            max_memory_kb: *memory_kib,
            parallel_threads: *threads,
            flags,
        },
    }
}

fn library(op: &'static str) -> impl Fn(LibcryptErr) -> LuksError {
    move |source| LuksError::Library { op, source }
}

fn scratch(op: &'static str) -> impl Fn(io::Error) -> LuksError {
    move |source| LuksError::Scratch { op, source }
}
