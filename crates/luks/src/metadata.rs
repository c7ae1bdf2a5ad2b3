//! Reads the JSON metadata of a header strictly. All fields that user mode relies on must exist, once,
//! with legal values. Unknown fields are refused where they could matter. The format: "LUKS2 On-Disk
//! Format Specification", section 3.

use std::{collections::BTreeMap, ops::Range};

use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::Value;

use crate::{
    LuksError,
    allowed_ciphers::{OpenedBy, check_cipher},
    digest::{Digest, RawDigest},
    keyslot::{Keyslot, RawKeyslot},
    text::{number, shown},
};

/// Larger offsets don't occur. This limits the size of the file that libcryptsetup sees.
const PAYLOAD_OFFSET_MAX: u64 = 4 << 30;
/// `LUKS2_MAX_KEYSLOTS_SIZE` (cryptsetup: lib/luks2/luks2.h).
const KEYSLOTS_BYTES_MAX: u64 = 128 << 20;
/// `LUKS2_KEYSLOTS_MAX` (cryptsetup: lib/luks2/luks2.h).
const KEYSLOTS_MAX: usize = 32;
/// cryptsetup allows only multiples of this (lib/setup.c, `crypt_set_data_offset`).
const PAYLOAD_ALIGNMENT: u64 = 4096;

/// The encrypted part of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    pub offset_bytes: u64,
    pub iv_tweak: u64,
    pub sector_bytes: u32,
    /// The name as in dm-crypt.
    pub cipher: String,
}

/// The fields that user mode relies on.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    pub segment: Segment,
    pub digest: Digest,
    /// The slots that have the volume key, sorted by number. At least one.
    pub keyslots: Vec<Keyslot>,
    pub key_bytes: usize,
    /// The space for key slots, after the two copies.
    pub areas: Range<u64>,
    /// The areas of all key slots by number, including slots with another key.
    pub used: Vec<(u32, Range<u64>)>,
}

#[derive(Deserialize)]
struct Raw {
    keyslots: BTreeMap<String, RawKeyslot>,
    #[serde(rename = "tokens")]
    _tokens: BTreeMap<String, IgnoredAny>,
    segments: BTreeMap<String, RawSegment>,
    digests: BTreeMap<String, RawDigest>,
    config: RawConfig,
}

#[derive(Deserialize)]
struct RawSegment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    iv_tweak: Option<String>,
    encryption: Option<String>,
    sector_size: Option<u32>,
    integrity: Option<IgnoredAny>,
    flags: Option<Vec<String>>,
    #[serde(flatten)]
    other: BTreeMap<String, IgnoredAny>,
}

#[derive(Deserialize)]
struct RawConfig {
    json_size: String,
    keyslots_size: String,
    requirements: Option<RawRequirements>,
}

#[derive(Deserialize)]
struct RawRequirements {
    #[serde(default)]
    mandatory: Vec<String>,
    #[serde(flatten)]
    other: BTreeMap<String, IgnoredAny>,
}

impl Metadata {
    /// Checks parsed metadata of a header whose copies have `header_bytes` each.
    pub(crate) fn read(
        value: Value,
        header_bytes: u64,
        opened_by: OpenedBy,
    ) -> Result<Self, LuksError> {
        let raw: Raw = typed(value, "sections")?;
        check_requirements(raw.config.requirements.as_ref())?;
        let json_bytes = number(&raw.config.json_size, "json_size")?;
        if json_bytes != header_bytes - 4096 {
            return Err(LuksError::invalid(format!(
                "json_size is {json_bytes} in a header of {header_bytes} bytes"
            )));
        }
        let keyslots_bytes = number(&raw.config.keyslots_size, "keyslots_size")?;
        if keyslots_bytes > KEYSLOTS_BYTES_MAX || keyslots_bytes % 4096 != 0 {
            return Err(LuksError::invalid(format!(
                "keyslots_size is {keyslots_bytes}"
            )));
        }
        let areas = 2 * header_bytes..2 * header_bytes + keyslots_bytes;
        let segment = read_segment(&raw.segments, areas.end, opened_by)?;
        if raw.keyslots.len() > KEYSLOTS_MAX {
            return Err(LuksError::invalid(format!(
                "{} key slots",
                raw.keyslots.len()
            )));
        }
        let all = raw
            .keyslots
            .iter()
            .map(|(name, slot)| Keyslot::read(name, slot, &areas))
            .collect::<Result<Vec<_>, _>>()?;
        check_overlaps(&all)?;
        let digest = Digest::of_segment(&raw.digests, "0")?;
        let mut keyslots = digest
            .keyslots
            .iter()
            .map(|number| {
                all.iter()
                    .find(|slot| slot.number == *number)
                    .cloned()
                    .ok_or_else(|| {
                        LuksError::invalid(format!("key slot {number} is named, but missing"))
                    })
            })
            .collect::<Result<Vec<_>, _>>()?;
        keyslots.sort_by_key(|slot| slot.number);
        let key_bytes = common_key_size(&keyslots, opened_by)?;
        Ok(Self {
            segment,
            digest,
            keyslots,
            key_bytes,
            areas,
            used: all
                .into_iter()
                .map(|slot| (slot.number, slot.area))
                .collect(),
        })
    }
}

fn check_requirements(requirements: Option<&RawRequirements>) -> Result<(), LuksError> {
    let Some(requirements) = requirements else {
        return Ok(());
    };
    let first = requirements.mandatory.first();
    match first.or_else(|| requirements.other.keys().next()) {
        None => Ok(()),
        Some(name) if name.contains("reencrypt") => Err(LuksError::refused(format!(
            "an unfinished re-encryption ({})",
            shown(name)
        ))),
        Some(name) => Err(LuksError::refused(format!(
            "the unknown requirement {}",
            shown(name)
        ))),
    }
}

fn read_segment(
    segments: &BTreeMap<String, RawSegment>,
    areas_end: u64,
    opened_by: OpenedBy,
) -> Result<Segment, LuksError> {
    let segment = match segments.get("0") {
        Some(segment) if segments.len() == 1 => segment,
        _ => {
            return Err(LuksError::refused(format!(
                "{} segments where only segment 0 may be, as an unfinished re-encryption has",
                segments.len()
            )));
        }
    };
    if segment
        .flags
        .as_ref()
        .is_some_and(|flags| !flags.is_empty())
    {
        return Err(LuksError::refused(
            "segment flags, as an unfinished re-encryption has",
        ));
    }
    if segment.kind != "crypt" {
        return Err(LuksError::unsupported(format!(
            "a segment of type {}",
            shown(&segment.kind)
        )));
    }
    let cipher = segment.encryption.clone().unwrap_or_default();
    check_cipher(&cipher, opened_by)?;
    if segment.integrity.is_some() {
        return Err(LuksError::unsupported("a segment with integrity tags"));
    }
    if let Some(name) = segment.other.keys().next() {
        return Err(LuksError::unsupported(format!(
            "the segment property {}",
            shown(name)
        )));
    }
    if segment.size != "dynamic" {
        return Err(LuksError::unsupported(format!(
            "a segment of fixed size {}",
            shown(&segment.size)
        )));
    }
    let sector_bytes = segment
        .sector_size
        .filter(|bytes| matches!(bytes, 512 | 1024 | 2048 | 4096))
        .ok_or_else(|| {
            LuksError::invalid(format!("sector size {}", segment.sector_size.unwrap_or(0)))
        })?;
    let iv_tweak = number(segment.iv_tweak.as_deref().unwrap_or_default(), "iv_tweak")?;
    // linux/drivers/md/dm-crypt.c, crypt_ctr: "Invalid iv_offset sector".
    if !iv_tweak.is_multiple_of(u64::from(sector_bytes) / 512) {
        return Err(LuksError::invalid(format!(
            "iv_tweak {iv_tweak} with sectors of {sector_bytes} bytes"
        )));
    }
    let offset_bytes = number(&segment.offset, "offset")?;
    if offset_bytes < areas_end {
        return Err(LuksError::unsupported(format!(
            "a payload at offset {offset_bytes}, before the header's end at {areas_end} (a detached header)"
        )));
    }
    if offset_bytes > PAYLOAD_OFFSET_MAX || offset_bytes % PAYLOAD_ALIGNMENT != 0 {
        return Err(LuksError::unsupported(format!(
            "a payload at offset {offset_bytes}"
        )));
    }
    Ok(Segment {
        offset_bytes,
        iv_tweak,
        sector_bytes,
        cipher,
    })
}

fn check_overlaps(slots: &[Keyslot]) -> Result<(), LuksError> {
    let mut areas: Vec<_> = slots.iter().map(|slot| (&slot.area, slot.number)).collect();
    areas.sort_by_key(|(area, _)| area.start);
    for pair in areas.windows(2) {
        if pair[0].0.end > pair[1].0.start {
            return Err(LuksError::invalid(format!(
                "the areas of key slots {} and {} overlap",
                pair[0].1, pair[1].1
            )));
        }
    }
    Ok(())
}

/// LUKS2 stores the size of the volume key only in the slots.
fn common_key_size(slots: &[Keyslot], opened_by: OpenedBy) -> Result<usize, LuksError> {
    let Some(first) = slots.first() else {
        return Err(LuksError::invalid("no key slot has the volume key"));
    };
    if slots.iter().any(|slot| slot.key_bytes != first.key_bytes) {
        return Err(LuksError::invalid(
            "key slots disagree on the size of the volume key",
        ));
    }
    match (first.key_bytes, opened_by) {
        (32 | 64, _) | (16 | 24 | 48, OpenedBy::Kernel) => Ok(first.key_bytes as usize),
        (16 | 24 | 48, OpenedBy::Sprat) => Err(LuksError::KernelOnly {
            what: format!("a volume key of {} bits", first.key_bytes * 8),
        }),
        (bytes, _) => Err(LuksError::unsupported(format!(
            "a volume key of {} bits",
            u64::from(bytes) * 8
        ))),
    }
}

fn typed<T: DeserializeOwned>(value: Value, what: &str) -> Result<T, LuksError> {
    serde_json::from_value(value)
        .map_err(|error| LuksError::invalid(format!("{what}: {}", shown(&error.to_string()))))
}
