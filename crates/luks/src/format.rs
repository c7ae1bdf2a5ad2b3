//! Makes the header of a new container.

use openssl::rand::rand_priv_bytes;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{
    LuksError,
    copies::Place,
    header::Header,
    header_io::{Extent, Written, fetch},
    keyslot::Kdf,
    pins::Pins,
    reference::{NewHeader, Reference},
    secret::{Secret, VolumeKey},
};

/// cryptsetup's default. The headers and key slots are before it.
const PAYLOAD_OFFSET_BYTES: u64 = 16 << 20;
const SECTOR_BYTES: u32 = 4096;
const KEY_BYTES: usize = 64;
/// cryptsetup's maximum. Its benchmark for two seconds reaches it on every present machine.
const ARGON2_MEMORY_KIB: u64 = 1 << 20;
const RECOVERY_MEMORY_KIB: u64 = 64 << 10;
const ARGON2_PASSES: u32 = 4;
const ARGON2_THREADS_MAX: usize = 4;
/// `LUKS2_LABEL_L` less the NUL (cryptsetup: lib/luks2/luks2.h).
const LABEL_BYTES_MAX: usize = 47;

/// The kind of a secret. It decides how expensive guessing is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotKind {
    /// Thousands of random bytes: pbkdf2 with 1000 rounds, so that opening is fast.
    KeyFile,
    /// Chosen by a person: argon2id with 1 GiB (at most half of this machine's memory).
    Passphrase,
    /// A [`crate::RecoveryKey`]: argon2id with 64 MiB. 160 random bits need no more, and it must open on
    /// any machine after a disaster.
    Recovery,
}

/// How to make a container.
#[derive(Debug, Clone, Default)]
pub struct FormatOptions {
    /// The UUID. Random by default.
    pub uuid: Option<String>,
    /// The LUKS2 label, at most 47 bytes. The server can read it.
    pub label: Option<String>,
    /// Use the lowest costs that LUKS2 allows. Never for real containers.
    pub fast_kdf_for_tests: bool,
}

/// A new container, not yet written anywhere.
#[derive(Debug)]
pub struct NewContainer {
    /// The used ranges of the header (less than 1 MiB for three slots), in the order in which they must
    /// be written to a new, empty file: key slots, secondary copy, primary copy. The rest up to the
    /// payload is a hole. The file is no container until the last one is written.
    pub header: Vec<Extent>,
    /// The offset of the payload.
    pub payload_offset_bytes: u64,
    /// The pins to store.
    pub pins: Pins,
    /// Its volume key.
    pub volume_key: VolumeKey,
}

/// Makes a header with a slot for each secret, in this order. Key files should come first: they open
/// fastest.
///
/// aes-xts-plain64 with a 512-bit key, 4096-byte sectors, payload at 16 MiB: cryptsetup's defaults. Each
/// slot was opened once from the returned bytes, so this takes two derivations for each slot: some
/// seconds and a gigabyte for a passphrase, less than a second for the others.
pub fn format(
    secrets: &[(Secret, SlotKind)],
    options: &FormatOptions,
) -> Result<NewContainer, LuksError> {
    check(secrets, options)?;
    let volume_key = random_key()?;
    let uuid = options
        .uuid
        .as_deref()
        .map(uuid::Uuid::try_parse)
        .transpose()
        .map_err(|_| LuksError::Argument {
            what: "the UUID is not one".to_owned(),
        })?;
    let new = NewHeader {
        uuid,
        label: options.label.as_deref(),
        sector_bytes: SECTOR_BYTES,
        cipher: ("aes", "xts-plain64"),
    };
    let mut reference = Reference::format(&new, PAYLOAD_OFFSET_BYTES, &volume_key)?;
    for (index, (secret, kind)) in (0_u32..).zip(secrets) {
        let kdf = kdf_for(*kind, options);
        reference.add_slot(Some(index), &volume_key, secret, &kdf)?;
    }
    let made = Header::load(&reference)?;
    let mut header = Vec::new();
    for slot in made.slots() {
        header.push(fetch(&reference, &made.slot(slot.number)?.area)?);
    }
    // Only one `Reference` may exist at a time, and the proof needs its own.
    drop(reference);
    header.push(made.extent(Place::Secondary)?);
    header.push(made.extent(Place::Primary)?);
    prove(&header, secrets, &volume_key)?;
    Ok(NewContainer {
        header,
        payload_offset_bytes: PAYLOAD_OFFSET_BYTES,
        pins: made.pins(),
        volume_key,
    })
}

/// Proves that the header opens with each secret, from these bytes alone.
fn prove(
    header: &[Extent],
    secrets: &[(Secret, SlotKind)],
    volume_key: &VolumeKey,
) -> Result<(), LuksError> {
    let written = Written::new(header, PAYLOAD_OFFSET_BYTES);
    let loaded = Header::load(&written)?;
    assert!(loaded.copies().both_good(), "just made");
    for (index, (secret, _)) in (0_u32..).zip(secrets) {
        let opened = loaded.unlock_slot(&written, secret, index)?;
        if !openssl::memcmp::eq(opened.expose(), volume_key.expose()) {
            return Err(LuksError::invalid(format!(
                "the new key slot {index} has another key"
            )));
        }
    }
    Ok(())
}

fn check(secrets: &[(Secret, SlotKind)], options: &FormatOptions) -> Result<(), LuksError> {
    let argument = |what: &str| {
        Err(LuksError::Argument {
            what: what.to_owned(),
        })
    };
    if secrets.is_empty() || secrets.len() > 32 {
        return argument("a container has 1 to 32 keys");
    }
    for (secret, _) in secrets {
        match secret.expose().len() {
            0 => return argument("an empty key or passphrase protects nothing"),
            len if len > Secret::LEN_MAX => return argument("a key file has at most 8 MiB"),
            _ => {}
        }
    }
    let label = options.label.as_deref().unwrap_or_default();
    if label.len() > LABEL_BYTES_MAX || label.contains('\0') {
        return argument("a label has at most 47 bytes");
    }
    Ok(())
}

fn random_key() -> Result<VolumeKey, LuksError> {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    rand_priv_bytes(&mut *bytes).map_err(|source| LuksError::Crypto {
        op: "make a volume key",
        source,
    })?;
    Ok(VolumeKey::copy_of(&*bytes))
}

/// The key derivation for a kind of secret. The costs are fixed: cryptsetup's benchmark takes ten
/// seconds or more and finds similar ones.
pub(crate) fn kdf_for(kind: SlotKind, options: &FormatOptions) -> Kdf {
    match kind {
        SlotKind::KeyFile => Kdf::Pbkdf2 {
            hash: "sha256".to_owned(),
            rounds: 1000,
        },
        SlotKind::Passphrase | SlotKind::Recovery if options.fast_kdf_for_tests => Kdf::Argon2 {
            kind: "argon2id".to_owned(),
            // The minimum of libcryptsetup (`crypt_pbkdf_get_limits`).
            passes: 4,
            memory_kib: 32,
            threads: 1,
        },
        SlotKind::Passphrase | SlotKind::Recovery => {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            let memory_kib = match kind {
                SlotKind::Recovery => RECOVERY_MEMORY_KIB,
                _ => argon2_memory_kib(),
            };
            Kdf::Argon2 {
                kind: "argon2id".to_owned(),
                passes: ARGON2_PASSES,
                memory_kib: u32::try_from(memory_kib).expect("at most 1 GiB"),
                threads: u32::try_from(threads.min(ARGON2_THREADS_MAX)).expect("at most 4"),
            }
        }
    }
}

/// At most half of the machine's memory, as in cryptsetup.
fn argon2_memory_kib() -> u64 {
    let info = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion, reason = "has 32 bits on 32-bit machines")]
    let total_bytes = u64::from(info.totalram) * u64::from(info.mem_unit);
    (total_bytes / 1024 / 2).clamp(RECOVERY_MEMORY_KIB, ARGON2_MEMORY_KIB)
}
