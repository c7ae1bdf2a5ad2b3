//! A container's header: fetches and checks it, and opens its volume key.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};

use crate::{
    LuksError,
    allowed_ciphers::OpenedBy,
    copies::{self, Copies, CopyState, Place, ValidCopy},
    header_io::{Extent, HeaderRead, HeaderWrite, fetch},
    keyslot::Keyslot,
    metadata::Metadata,
    pins::Pins,
    reference::Reference,
    secret::{Secret, VolumeKey},
    text::{hex, shown},
    unlock::{Budget, UnlockOptions},
};

/// The block size of the volume. The payload has whole blocks.
const BLOCK_BYTES: u64 = 4096;

/// The position of the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// Its offset in the file, a multiple of 4096.
    pub offset_bytes: u64,
    /// Its length, rounded down to a multiple of 4096.
    pub len_bytes: u64,
    /// Encryption sector: 512, 1024, 2048 or 4096.
    pub sector_bytes: u32,
}

impl Payload {
    /// From `offset_bytes` to the end of the file, in whole blocks.
    pub(crate) fn new(
        offset_bytes: u64,
        sector_bytes: u32,
        file_len: u64,
    ) -> Result<Self, LuksError> {
        let needed = offset_bytes + BLOCK_BYTES;
        if file_len < needed {
            return Err(LuksError::Truncated { file_len, needed });
        }
        let len = file_len - offset_bytes;
        Ok(Self {
            offset_bytes,
            len_bytes: len - len % BLOCK_BYTES,
            sector_bytes,
        })
    }
}

/// A key slot that has the volume key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its number in the header, 0 to 31.
    pub number: u32,
    /// Its key derivation as text, such as `argon2id, 1048576 KiB, 4 passes, 4 threads`.
    pub kdf: String,
    /// Sixteen hexadecimal digits that identify the slot: no other slot, before or after, has the same.
    /// A hash of its random salt.
    pub mark: String,
}

/// A valid LUKS2 header that requests nothing that is refused.
pub struct Header {
    pub(crate) copy: ValidCopy,
    pub(crate) copies: Copies,
    pub(crate) metadata: Metadata,
    pub(crate) opened_by: OpenedBy,
}

impl Header {
    /// Fetches and checks both header copies: 32 KiB in one read if the metadata have their usual size,
    /// at most 8 MiB.
    ///
    /// A header with one good copy loads, and [`Header::copies`] shows which one is damaged. This needs
    /// no key. Call [`Header::check_pins`] on the result.
    pub fn load(source: &dyn HeaderRead) -> Result<Self, LuksError> {
        Self::load_for(source, OpenedBy::Sprat)
    }

    /// As [`Self::load`]. `opened_by` decides which ciphers are accepted.
    pub fn load_for(source: &dyn HeaderRead, opened_by: OpenedBy) -> Result<Self, LuksError> {
        let selected = copies::fetch(source)?;
        let header_bytes = selected.copy.bytes.len() as u64;
        let metadata = Metadata::read(selected.copy.metadata.clone(), header_bytes, opened_by)?;
        let uuid = &selected.copy.uuid;
        if uuid::Uuid::try_parse(uuid).map_or(true, |parsed| parsed.to_string() != *uuid) {
            return Err(LuksError::invalid(format!("the UUID is {}", shown(uuid))));
        }
        Ok(Self {
            copy: selected.copy,
            copies: selected.copies,
            metadata,
            opened_by,
        })
    }

    /// Which of the two copies are good.
    #[must_use]
    pub fn copies(&self) -> &Copies {
        &self.copies
    }

    /// The container's UUID, lower case with dashes.
    #[must_use]
    pub fn uuid(&self) -> &str {
        &self.copy.uuid
    }

    /// The container's label, empty by default. The server can read and change it.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.copy.label
    }

    /// Increases with each change of the header: cryptsetup adds 1, [`Turn`](crate::Turn) adds more.
    #[must_use]
    pub fn sequence_id(&self) -> u64 {
        self.copy.sequence_id
    }

    /// The pins to store for this header.
    #[must_use]
    pub fn pins(&self) -> Pins {
        let segment = &self.metadata.segment;
        Pins {
            cipher: segment.cipher.clone(),
            key_bits: u32::try_from(self.metadata.key_bytes * 8).expect("at most 512"),
            sector_bytes: segment.sector_bytes,
            payload_offset_bytes: segment.offset_bytes,
            iv_tweak: segment.iv_tweak,
            volume_key_digest: self.metadata.digest.fingerprint(),
            uuid: self.copy.uuid.clone(),
            sequence_id: self.copy.sequence_id,
        }
    }

    /// Compares this header with the pins of the container. Fails with [`LuksError::Pin`] or
    /// [`LuksError::OlderHeader`]. To be called before [`Header::unlock`].
    pub fn check_pins(&self, pins: &Pins) -> Result<(), LuksError> {
        pins.check(&self.pins())
    }

    /// Compares this header with a fingerprint that was typed from a recovery sheet.
    pub fn check_fingerprint(&self, typed: &str) -> Result<(), LuksError> {
        self.pins().check_typed(typed)
    }

    /// The position of the payload in a container file of `file_len` bytes. [`LuksError::Truncated`] if
    /// it has no complete block.
    pub fn geometry(&self, file_len: u64) -> Result<Payload, LuksError> {
        let segment = &self.metadata.segment;
        Payload::new(segment.offset_bytes, segment.sector_bytes, file_len)
    }

    /// A digest (SHA-256 in hexadecimal) of all metadata of each key slot: number, area, key derivation
    /// with its salt, and the digests that it belongs to. The content of the slot's area is not
    /// included.
    #[must_use]
    pub fn slot_digests(&self) -> BTreeMap<u32, String> {
        let facts = self.facts_of_slots().into_iter().map(|(number, facts)| {
            let slot = facts.get(0).unwrap_or(&Value::Null);
            let of = facts.get(1).unwrap_or(&Value::Null);
            let facts = json!([number.to_string(), slot, of]).to_string();
            (number, hex(&openssl::sha::sha256(facts.as_bytes())))
        });
        facts.collect()
    }

    /// For each key slot a list of two: its metadata, and the names of the digests that it belongs to.
    pub(crate) fn facts_of_slots(&self) -> Vec<(u32, Value)> {
        let json = &self.copy.metadata;
        let belongs = |digest: &Value, number: &str| {
            let slots = digest.get("keyslots").and_then(Value::as_array);
            slots.is_some_and(|slots| slots.iter().any(|slot| slot.as_str() == Some(number)))
        };
        let digests = json.get("digests").and_then(Value::as_object);
        let slots = json.get("keyslots").and_then(Value::as_object);
        let slots = slots.into_iter().flatten();
        let facts = slots.filter_map(|(number, slot)| {
            let all = digests.into_iter().flatten();
            let of: Vec<&String> = all
                .filter(|(_, digest)| belongs(digest, number))
                .map(|(name, _)| name)
                .collect();
            Some((number.parse().ok()?, json!([slot, of])))
        });
        facts.collect()
    }

    /// The key slots, sorted by number.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        self.metadata
            .keyslots
            .iter()
            .map(|slot| Slot {
                number: slot.number,
                kdf: slot.kdf.describe(),
                mark: slot.mark.clone(),
            })
            .collect()
    }

    /// Opens the volume key with `secret`. Tries the cheap slots first, and fetches the area of each
    /// slot that it tries (252 KiB).
    ///
    /// Time and memory depend on the slots' key derivations: seconds, and a gigabyte. All slots together
    /// cost at most the default of [`UnlockOptions`]. Slots that cost more than allowed are skipped, and
    /// reported if no other slot opens. [`LuksError::WrongSecret`] if no slot opens.
    pub fn unlock(&self, source: &dyn HeaderRead, secret: &Secret) -> Result<VolumeKey, LuksError> {
        Ok(self.unlock_by(source, secret)?.1)
    }

    /// As [`Header::unlock`], and returns the number of the slot.
    pub fn unlock_by(
        &self,
        source: &dyn HeaderRead,
        secret: &Secret,
    ) -> Result<(u32, VolumeKey), LuksError> {
        self.unlock_within(source, secret, &UnlockOptions::default())
    }

    /// As [`Header::unlock_by`], with the order and the limits of `options`. Also fails with
    /// [`LuksError::KdfBudget`], if slots were skipped because the budget was used up.
    pub fn unlock_within(
        &self,
        source: &dyn HeaderRead,
        secret: &Secret,
        options: &UnlockOptions,
    ) -> Result<(u32, VolumeKey), LuksError> {
        let mut slots: Vec<&Keyslot> = self.metadata.keyslots.iter().collect();
        let budget = Budget::new(options);
        budget.order(&mut slots, |slot| (slot.number, slot.kdf.cost()));
        self.unlock_with(source, secret, &slots, budget)
    }

    /// Opens the volume key with this slot only.
    pub fn unlock_slot(
        &self,
        source: &dyn HeaderRead,
        secret: &Secret,
        number: u32,
    ) -> Result<VolumeKey, LuksError> {
        let budget = Budget::new(&UnlockOptions::default());
        let opened = self.unlock_with(source, secret, &[self.slot(number)?], budget)?;
        Ok(opened.1)
    }

    fn unlock_with(
        &self,
        source: &dyn HeaderRead,
        secret: &Secret,
        slots: &[&Keyslot],
        mut budget: Budget,
    ) -> Result<(u32, VolumeKey), LuksError> {
        let mut reference = self.reference()?;
        for slot in slots {
            if let Some(reason) = slot.objection(self.opened_by) {
                budget.object(reason);
                continue;
            }
            if !budget.allows(slot.number, &slot.kdf) {
                continue;
            }
            reference.fill(&fetch(source, &slot.area)?)?;
            let opened = match reference.open_slot(slot.number, &slot.kdf, secret) {
                // Another slot may open.
                Err(error @ LuksError::NoMemory { .. }) => {
                    budget.object(error);
                    continue;
                }
                other => other?,
            };
            match opened {
                // A second check. libcryptsetup has compared the key with the digest in the header that
                // it was given, which is the one that was checked and pinned. That header has no other
                // digest: a header with two is refused.
                Some(key) if self.holds(&key)? => return Ok((slot.number, key)),
                Some(_) | None => {}
            }
        }
        Err(budget.failed())
    }

    /// Whether `key` is this container's volume key.
    pub(crate) fn holds(&self, key: &VolumeKey) -> Result<bool, LuksError> {
        Ok(key.bits() == self.metadata.key_bytes * 8 && self.metadata.digest.fits(key)?)
    }

    /// The writes that repair a damaged copy. Empty if both are good. The good copy is not written.
    pub fn repair(&self) -> Result<Vec<HeaderWrite>, LuksError> {
        let mut writes = Vec::new();
        for (place, state) in [
            (Place::Primary, &self.copies.primary),
            (Place::Secondary, &self.copies.secondary),
        ] {
            if *state != CopyState::Good {
                writes.push(HeaderWrite::Write(self.extent(place)?));
                writes.push(HeaderWrite::Barrier);
            }
        }
        Ok(writes)
    }

    pub(crate) fn slot(&self, number: u32) -> Result<&Keyslot, LuksError> {
        self.metadata
            .keyslots
            .iter()
            .find(|slot| slot.number == number)
            .ok_or_else(|| LuksError::Argument {
                what: format!("the container has no key slot {number}"),
            })
    }

    /// Both copies from the selected one, so that libcryptsetup sees only what was checked.
    pub(crate) fn reference(&self) -> Result<Reference, LuksError> {
        let header = [self.extent(Place::Primary)?, self.extent(Place::Secondary)?];
        Reference::load(&header, self.metadata.segment.offset_bytes)
    }

    pub(crate) fn extent(&self, place: Place) -> Result<Extent, LuksError> {
        Ok(Extent {
            offset: match place {
                Place::Primary => 0,
                Place::Secondary => self.copy.bytes.len() as u64,
            },
            bytes: self.copy.bytes_for(place)?,
        })
    }
}

impl fmt::Debug for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Header")
            .field("pins", &self.pins())
            .field("copies", &self.copies)
            .field("slots", &self.slots())
            .finish()
    }
}
