//! Finds and checks the two copies of a LUKS2 header, and selects one.
//!
//! A copy is 4096 bytes of binary header, then the metadata (JSON, padded with zeros):
//!
//! | offset | bytes | field |
//! | ------ | ----- | ----- |
//! | 0      | 6     | magic: `LUKS\xba\xbe`, in the secondary copy `SKUL\xba\xbe` |
//! | 6      | 2     | version: 2 (all numbers are big endian) |
//! | 8      | 8     | size of the copy with its metadata; also the offset of the secondary |
//! | 16     | 8     | sequence: higher with each change |
//! | 24     | 48    | label |
//! | 72     | 32    | checksum algorithm |
//! | 104    | 64    | salt: makes the two copies' checksums differ |
//! | 168    | 40    | UUID |
//! | 208    | 48    | subsystem |
//! | 256    | 8     | the offset of this copy |
//! | 264    | 184   | zeros |
//! | 448    | 64    | checksum of the whole copy with this field zero |
//!
//! (cryptsetup: lib/luks2/luks2.h, `struct luks2_hdr_disk`.) Only the primary copy has the offset of the
//! secondary. If the primary is damaged, the nine legal offsets are tried, as in cryptsetup.

use std::{fmt, ops::Range};

use openssl::{hash::MessageDigest, rand::rand_bytes};
use serde_json::Value;

use crate::{
    LuksError,
    error::CopyFault,
    header_io::{HeaderRead, fetch_up_to},
    metadata_json::parse_area,
    text::{big_endian_u64, shown, text_until_nul},
};

const MAGIC_PRIMARY: &[u8; 6] = b"LUKS\xba\xbe";
const MAGIC_SECONDARY: &[u8; 6] = b"SKUL\xba\xbe";
const BINARY_BYTES: usize = 4096;
const SALT: Range<usize> = 104..168;
const CHECKSUM: Range<usize> = 448..512;
/// The legal sizes of a copy (cryptsetup: lib/luks2/luks2.h, `LUKS2_HDR2_OFFSETS`).
const SIZES: [u64; 9] = [
    16 << 10,
    32 << 10,
    64 << 10,
    128 << 10,
    256 << 10,
    512 << 10,
    1 << 20,
    2 << 20,
    4 << 20,
];

/// The highest sequence that is accepted. `turn.rs` explains how much a change of keys and a restore
/// add.
pub(crate) const SEQUENCE_MAX: u64 = 1 << 48;
/// The highest sequence of a header that is not yet known. The rest up to [`SEQUENCE_MAX`] is more than
/// a container ever needs.
pub(crate) const SEQUENCE_FIRST_MAX: u64 = 1 << 40;
/// The largest increase of a sequence between two openings on one machine.
pub(crate) const SEQUENCE_STEP_MAX: u64 = 1 << 32;

/// The state of one header copy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyState {
    /// Valid, with the newest sequence.
    Good,
    /// Valid, but older than the other copy: a change of keys was interrupted between the two.
    Stale {
        /// Its sequence.
        sequence_id: u64,
    },
    /// Valid, with the same sequence as the other copy and other content: two machines changed keys at
    /// the same time, one of which was asleep. The primary copy is used.
    Contradicts {
        /// The sequence of both.
        sequence_id: u64,
    },
    /// Not usable.
    Damaged(CopyFault),
}

impl fmt::Display for CopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Good => f.write_str("good"),
            Self::Stale { sequence_id } => write!(f, "out of date (sequence {sequence_id})"),
            Self::Contradicts { sequence_id } => {
                write!(f, "another one of the same sequence ({sequence_id})")
            }
            Self::Damaged(fault) => write!(f, "damaged ({fault})"),
        }
    }
}

/// Both header copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copies {
    /// The one at the file's beginning.
    pub primary: CopyState,
    /// The one after it.
    pub secondary: CopyState,
}

impl Copies {
    /// Whether neither needs a repair.
    #[must_use]
    pub fn both_good(&self) -> bool {
        self.primary == CopyState::Good && self.secondary == CopyState::Good
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Primary,
    Secondary,
}

/// A copy with a correct checksum and with metadata in strict JSON.
pub(crate) struct ValidCopy {
    /// All its bytes.
    pub bytes: Vec<u8>,
    pub sequence_id: u64,
    pub uuid: String,
    pub label: String,
    pub metadata: Value,
}

/// What lies at the place of a copy.
enum FoundCopy {
    Valid(ValidCopy),
    Faulty(CopyFault),
}

/// The selected copy, and the state of both.
pub(crate) struct SelectedCopy {
    pub copy: ValidCopy,
    pub copies: Copies,
}

/// Fetches both copies and selects one as cryptsetup does: the newer of two valid ones, or the only
/// valid one.
pub(crate) fn fetch(source: &dyn HeaderRead) -> Result<SelectedCopy, LuksError> {
    let file_len = source.len().map_err(|error| LuksError::Read {
        offset: 0,
        len: 0,
        source: error,
    })?;
    // One read gets all that nearly every container needs.
    let head = fetch_up_to(source, file_len, 0, 2 * SIZES[0])?;
    let primary = read_copy(source, file_len, &head, 0, Place::Primary)?;
    let secondary = match &primary {
        FoundCopy::Valid(copy) => {
            let offset = copy.bytes.len() as u64;
            read_copy(source, file_len, &head, offset, Place::Secondary)?
        }
        FoundCopy::Faulty(_) => search_secondary(source, file_len, &head)?,
    };
    select(primary, secondary, &head, file_len)
}

fn select(
    primary: FoundCopy,
    secondary: FoundCopy,
    head: &[u8],
    file_len: u64,
) -> Result<SelectedCopy, LuksError> {
    let good = |copy, primary, secondary| {
        Ok(SelectedCopy {
            copy,
            copies: Copies { primary, secondary },
        })
    };
    match (primary, secondary) {
        (FoundCopy::Valid(first), FoundCopy::Valid(second)) => {
            match first.sequence_id.cmp(&second.sequence_id) {
                std::cmp::Ordering::Equal if first.has_same_content(&second) => {
                    good(first, CopyState::Good, CopyState::Good)
                }
                // As cryptsetup does. The pins and slots that this machine knows are compared later.
                std::cmp::Ordering::Equal => {
                    let sequence_id = first.sequence_id;
                    let contradicts = CopyState::Contradicts { sequence_id };
                    good(first, CopyState::Good, contradicts)
                }
                std::cmp::Ordering::Greater => {
                    let sequence_id = second.sequence_id;
                    good(first, CopyState::Good, CopyState::Stale { sequence_id })
                }
                std::cmp::Ordering::Less => {
                    let sequence_id = first.sequence_id;
                    good(second, CopyState::Stale { sequence_id }, CopyState::Good)
                }
            }
        }
        (FoundCopy::Valid(first), FoundCopy::Faulty(fault)) => {
            good(first, CopyState::Good, CopyState::Damaged(fault))
        }
        (FoundCopy::Faulty(fault), FoundCopy::Valid(second)) => {
            good(second, CopyState::Damaged(fault), CopyState::Good)
        }
        (FoundCopy::Faulty(primary), FoundCopy::Faulty(secondary)) => {
            Err(no_good_copy(primary, secondary, head, file_len))
        }
    }
}

/// Distinguishes a damaged container from a file that is no container.
fn no_good_copy(primary: CopyFault, secondary: CopyFault, head: &[u8], file_len: u64) -> LuksError {
    if primary == CopyFault::Version(1) {
        return LuksError::Luks1;
    }
    let begins_as_luks = head.starts_with(MAGIC_PRIMARY);
    if !begins_as_luks && secondary == CopyFault::Magic {
        return LuksError::NotLuks;
    }
    let needed = 2 * SIZES[0];
    if begins_as_luks && file_len < needed {
        return LuksError::Truncated { file_len, needed };
    }
    LuksError::HeaderDamaged { primary, secondary }
}

/// Tries all legal offsets, as cryptsetup does if the primary copy is damaged.
fn search_secondary(
    source: &dyn HeaderRead,
    file_len: u64,
    head: &[u8],
) -> Result<FoundCopy, LuksError> {
    let mut last_fault = CopyFault::Magic;
    for offset in SIZES {
        match read_copy(source, file_len, head, offset, Place::Secondary)? {
            FoundCopy::Faulty(CopyFault::Magic | CopyFault::Truncated) => {}
            FoundCopy::Faulty(fault) => last_fault = fault,
            valid @ FoundCopy::Valid(_) => return Ok(valid),
        }
    }
    Ok(FoundCopy::Faulty(last_fault))
}

/// Reads the copy at `offset`. It fails only if the bytes can't be fetched.
fn read_copy(
    source: &dyn HeaderRead,
    file_len: u64,
    head: &[u8],
    offset: u64,
    place: Place,
) -> Result<FoundCopy, LuksError> {
    let begin = usize::try_from(offset).expect("at most 4 MiB");
    let binary = match head.get(begin..begin + BINARY_BYTES) {
        Some(binary) => binary.to_vec(),
        None => fetch_up_to(source, file_len, offset, BINARY_BYTES as u64)?,
    };
    let size = match check_binary(&binary, offset, place) {
        Ok(size) => size,
        Err(fault) => return Ok(FoundCopy::Faulty(fault)),
    };
    let end = begin + usize::try_from(size).expect("at most 4 MiB");
    let bytes = match head.get(begin..end) {
        Some(bytes) => bytes.to_vec(),
        None => fetch_up_to(source, file_len, offset, size)?,
    };
    if (bytes.len() as u64) < size {
        return Ok(FoundCopy::Faulty(CopyFault::Truncated));
    }
    Ok(match check_whole(bytes) {
        Ok(copy) => FoundCopy::Valid(copy),
        Err(fault) => FoundCopy::Faulty(fault),
    })
}

/// Checks what can be checked without the metadata. Returns the size of the copy.
fn check_binary(binary: &[u8], offset: u64, place: Place) -> Result<u64, CopyFault> {
    if binary.len() < BINARY_BYTES {
        return Err(if binary.starts_with(magic(place)) {
            CopyFault::Truncated
        } else {
            CopyFault::Magic
        });
    }
    if !binary.starts_with(magic(place)) {
        return Err(CopyFault::Magic);
    }
    let version = u16::from_be_bytes([binary[6], binary[7]]);
    if version != 2 {
        return Err(CopyFault::Version(version));
    }
    let stored = big_endian_u64(binary, 256);
    if stored != offset {
        return Err(CopyFault::Offset(stored));
    }
    let size = big_endian_u64(binary, 8);
    if !SIZES.contains(&size) || (place == Place::Secondary && size != offset) {
        return Err(CopyFault::Size(size));
    }
    Ok(size)
}

fn check_whole(bytes: Vec<u8>) -> Result<ValidCopy, CopyFault> {
    let kind = text_until_nul(&bytes[72..104]);
    let algorithm = checksum_kind(&kind).ok_or_else(|| CopyFault::ChecksumKind(shown(&kind)))?;
    let found = checksum(&bytes, algorithm).map_err(|_| CopyFault::Checksum)?;
    let (sum, rest) = bytes[CHECKSUM].split_at(found.len());
    if sum != found || rest.iter().any(|&byte| byte != 0) {
        return Err(CopyFault::Checksum);
    }
    let sequence_id = big_endian_u64(&bytes, 16);
    if sequence_id > SEQUENCE_MAX {
        return Err(CopyFault::Sequence(sequence_id));
    }
    let metadata = parse_area(&bytes[BINARY_BYTES..]).map_err(CopyFault::Metadata)?;
    Ok(ValidCopy {
        sequence_id,
        uuid: text_until_nul(&bytes[168..208]),
        label: text_until_nul(&bytes[24..72]),
        metadata,
        bytes,
    })
}

/// The bytes of a copy without the fields that always differ: magic, salt, offset and checksum. Other
/// bytes are returned unchanged.
pub(crate) fn plain(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let of_luks2 = [MAGIC_PRIMARY, MAGIC_SECONDARY]
        .iter()
        .any(|magic| bytes.starts_with(*magic) && bytes[magic.len()..].starts_with(&[0, 2]));
    if of_luks2 && bytes.len() >= BINARY_BYTES {
        bytes[..6].fill(0);
        bytes[SALT].fill(0);
        bytes[256..264].fill(0);
        bytes[CHECKSUM].fill(0);
    }
    bytes
}

impl ValidCopy {
    fn has_same_content(&self, other: &Self) -> bool {
        plain(&self.bytes) == plain(&other.bytes)
    }

    /// This header with another sequence and, if `json` is given, other metadata.
    pub(crate) fn changed(&self, sequence_id: u64, json: Option<&str>) -> Result<Self, LuksError> {
        let crypto = |source| LuksError::Crypto {
            op: "change a header copy",
            source,
        };
        let mut bytes = self.bytes.clone();
        bytes[16..24].copy_from_slice(&sequence_id.to_be_bytes());
        if let Some(json) = json {
            let area = &mut bytes[BINARY_BYTES..];
            if json.len() >= area.len() {
                return Err(LuksError::Argument {
                    what: "the changed metadata don't fit into the header".to_owned(),
                });
            }
            area.fill(0);
            area[..json.len()].copy_from_slice(json.as_bytes());
        }
        rand_bytes(&mut bytes[SALT]).map_err(crypto)?;
        let algorithm = checksum_kind(&text_until_nul(&bytes[72..104])).expect("checked when read");
        bytes[CHECKSUM].fill(0);
        let sum = checksum(&bytes, algorithm).map_err(crypto)?;
        bytes[CHECKSUM][..sum.len()].copy_from_slice(&sum);
        check_whole(bytes).map_err(|fault| LuksError::invalid(fault.to_string()))
    }

    /// This header as the copy for `place`. It gets a new salt unless it comes from that place.
    pub(crate) fn bytes_for(&self, place: Place) -> Result<Vec<u8>, LuksError> {
        let mut bytes = self.bytes.clone();
        if bytes.starts_with(magic(place)) {
            return Ok(bytes);
        }
        let crypto = |source| LuksError::Crypto {
            op: "rebuild a header copy",
            source,
        };
        let offset = match place {
            Place::Primary => 0,
            Place::Secondary => bytes.len() as u64,
        };
        bytes[..6].copy_from_slice(magic(place));
        bytes[256..264].copy_from_slice(&offset.to_be_bytes());
        rand_bytes(&mut bytes[SALT]).map_err(crypto)?;
        let algorithm = checksum_kind(&text_until_nul(&bytes[72..104])).expect("checked when read");
        let sum = checksum(&bytes, algorithm).map_err(crypto)?;
        bytes[CHECKSUM][..sum.len()].copy_from_slice(&sum);
        Ok(bytes)
    }
}

fn magic(place: Place) -> &'static [u8; 6] {
    match place {
        Place::Primary => MAGIC_PRIMARY,
        Place::Secondary => MAGIC_SECONDARY,
    }
}

fn checksum_kind(name: &str) -> Option<MessageDigest> {
    match name {
        "sha256" => Some(MessageDigest::sha256()),
        "sha384" => Some(MessageDigest::sha384()),
        "sha512" => Some(MessageDigest::sha512()),
        _ => None,
    }
}

fn checksum(bytes: &[u8], kind: MessageDigest) -> Result<Vec<u8>, openssl::error::ErrorStack> {
    let mut hasher = openssl::hash::Hasher::new(kind)?;
    hasher.update(&bytes[..CHECKSUM.start])?;
    hasher.update(&[0; CHECKSUM.end - CHECKSUM.start])?;
    hasher.update(&bytes[CHECKSUM.end..])?;
    Ok(hasher.finish()?.to_vec())
}
