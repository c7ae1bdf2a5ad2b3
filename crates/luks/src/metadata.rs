//! Reads the JSON metadata of a header strictly: what user mode relies on must be there, once,
//! and legal; what it doesn't know is refused where it could matter.
//!
//! libcryptsetup's own parser (json-c) is laxer than this one: of two equal names it takes the
//! last, and it cuts names at NUL. Both are errors here, so that the two can't read one text in
//! two ways. The format: "LUKS2 On-Disk Format Specification", section 3.

use std::{collections::BTreeMap, fmt, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned, IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Number, Value};

use crate::{
    LuksError,
    digest::{Digest, RawDigest},
    error::shown,
    keyslot::{Keyslot, RawKeyslot},
};

/// The one cipher of user mode.
pub(crate) const CIPHER: &str = "aes-xts-plain64";
/// Block ciphers that dm-crypt has and that are sound; the rest of the kernel's list is not for
/// a server to choose from.
const KERNEL_CIPHERS: [&str; 8] = [
    "aes",
    "serpent",
    "twofish",
    "camellia",
    "aria",
    "sm4",
    "xchacha12,aes",
    "xchacha20,aes",
];
/// Modes with an IV of each sector's own (linux/drivers/md/dm-crypt.c).
const KERNEL_MODES: [&str; 7] = [
    "xts-plain64",
    "xts-plain",
    "cbc-plain64",
    "cbc-plain",
    "cbc-essiv:sha256",
    "cbc-essiv:sha512",
    "adiantum-plain64",
];

/// Who decrypts the sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenedBy {
    /// sprat itself: aes-xts-plain64 only.
    Sprat,
    /// The kernel's dm-crypt: any sound cipher that it has.
    Kernel,
}
/// Offsets beyond this don't occur; it bounds the size of the file that libcryptsetup sees.
const PAYLOAD_OFFSET_MAX: u64 = 4 << 30;
/// `LUKS2_MAX_KEYSLOTS_SIZE` (cryptsetup: lib/luks2/luks2.h).
const KEYSLOTS_BYTES_MAX: u64 = 128 << 20;
/// `LUKS2_KEYSLOTS_MAX` (cryptsetup: lib/luks2/luks2.h).
const KEYSLOTS_MAX: usize = 32;
/// cryptsetup sets offsets in multiples of this only (lib/setup.c, `crypt_set_data_offset`).
const PAYLOAD_ALIGNMENT: u64 = 4096;

/// The encrypted part of the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Segment {
    pub offset_bytes: u64,
    pub iv_tweak: u64,
    pub sector_bytes: u32,
    /// As dm-crypt names it.
    pub cipher: String,
}

/// What user mode relies on.
#[derive(Debug, Clone)]
pub(crate) struct Metadata {
    pub segment: Segment,
    pub digest: Digest,
    /// Slots that hold the volume key, by number; at least one.
    pub keyslots: Vec<Keyslot>,
    pub key_bytes: usize,
    /// Where key slots may lie, behind the two copies.
    pub areas: Range<u64>,
    /// The areas of all key slots, of those too that hold another key, by the slot's number.
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

/// Cuts the JSON text out of its area and parses it; the error says what is wrong with it.
///
/// Only form is judged here, so that it is a fault of this one copy; [`Metadata::read`] judges
/// what the metadata ask for.
pub(crate) fn parse_area(area: &[u8]) -> Result<Value, String> {
    let end = area
        .iter()
        .position(|&byte| byte == 0)
        .ok_or("metadata without an end")?;
    if area[end..].iter().any(|&byte| byte != 0) {
        return Err("bytes behind the end of the metadata".to_owned());
    }
    let text = str::from_utf8(&area[..end]).map_err(|_| "metadata are not UTF-8".to_owned())?;
    if !text.starts_with('{') {
        return Err("metadata are not a JSON object".to_owned());
    }
    serde_json::from_str::<Strict>(text)
        .map(|strict| strict.0)
        // Position only: serde's text may quote the input.
        .map_err(|error| format!("metadata are not strict JSON (column {})", error.column()))
}

impl Metadata {
    /// Judges parsed metadata of a header whose two copies take `header_bytes` each.
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

/// Judges a cipher in dm-crypt's words; what the kernel alone opens is said so.
pub(crate) fn check_cipher(encryption: &str, opened_by: OpenedBy) -> Result<(), LuksError> {
    let name = encryption.to_ascii_lowercase();
    let kernel_opens = encryption.split_once('-').is_some_and(|(cipher, mode)| {
        KERNEL_CIPHERS.contains(&cipher) && KERNEL_MODES.contains(&mode)
    });
    if encryption == CIPHER || (kernel_opens && opened_by == OpenedBy::Kernel) {
        Ok(())
    } else if kernel_opens {
        Err(LuksError::KernelOnly {
            what: format!("the cipher {}", shown(encryption)),
        })
    } else if name.is_empty() || name.contains("null") || name.contains("ecb") {
        Err(LuksError::refused(format!(
            "the cipher {}, which protects nothing",
            shown(encryption)
        )))
    } else {
        Err(LuksError::unsupported(format!(
            "the cipher {}",
            shown(encryption)
        )))
    }
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

/// LUKS2 keeps the size of the volume key only in the slots.
fn common_key_size(slots: &[Keyslot], opened_by: OpenedBy) -> Result<usize, LuksError> {
    let Some(first) = slots.first() else {
        return Err(LuksError::invalid("no key slot holds the volume key"));
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

/// Reads a number that LUKS2 keeps as decimal text.
pub(crate) fn number(text: &str, name: &str) -> Result<u64, LuksError> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse()
        .ok()
        .filter(|_| digits)
        .ok_or_else(|| LuksError::invalid(format!("{name} is {}", shown(text))))
}

fn typed<T: DeserializeOwned>(value: Value, what: &str) -> Result<T, LuksError> {
    serde_json::from_value(value)
        .map_err(|error| LuksError::invalid(format!("{what}: {}", shown(&error.to_string()))))
}

/// JSON in which no object has a name twice, and no name holds NUL.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Strict;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Strict, E> {
        Ok(Strict(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Strict, E> {
        Ok(Strict(Value::Number(value.into())))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Strict, E> {
        Ok(Strict(Value::Number(value.into())))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Strict, E> {
        Number::from_f64(value)
            .map(|number| Strict(Value::Number(number)))
            .ok_or_else(|| E::custom("not a number"))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Strict, E> {
        if value.contains('\0') {
            return Err(E::custom("NUL in a text"));
        }
        Ok(Strict(Value::String(value.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<Strict, E> {
        Ok(Strict(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Strict, A::Error> {
        let mut list = Vec::new();
        while let Some(Strict(value)) = access.next_element()? {
            list.push(value);
        }
        Ok(Strict(Value::Array(list)))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Strict, A::Error> {
        let mut map = Map::new();
        while let Some(name) = access.next_key::<String>()? {
            if name.contains('\0') {
                return Err(de::Error::custom("NUL in a name"));
            }
            let Strict(value) = access.next_value()?;
            if map.insert(name, value).is_some() {
                return Err(de::Error::custom("a name twice"));
            }
        }
        Ok(Strict(Value::Object(map)))
    }
}
