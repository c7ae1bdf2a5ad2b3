//! A container's header as fetched, judged, and unlocked.

use std::{collections::BTreeMap, fmt};

use serde_json::{Value, json};

use crate::{
    LuksError,
    allowed_ciphers::OpenedBy,
    copies::{self, Copies, CopyState, Place, WholeCopy},
    header_io::{Extent, HeaderRead, HeaderWrite, fetch},
    keyslot::Keyslot,
    metadata::Metadata,
    pins::Pins,
    reference::Reference,
    secret::{Secret, VolumeKey},
    text::{hex, shown},
    unlock::{Budget, UnlockOptions},
};

/// Blocks of the volume above; the payload counts in whole ones.
const BLOCK_BYTES: u64 = 4096;

/// Where the payload lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// Where it begins in the file; a multiple of 4096.
    pub offset_bytes: u64,
    /// Its length, cut to a multiple of 4096.
    pub len_bytes: u64,
    /// Encryption sector: 512, 1024, 2048 or 4096.
    pub sector_bytes: u32,
}

impl Payload {
    /// The whole blocks from `offset_bytes` to the end of the file.
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

/// A key slot that holds the volume key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// Its number in the header, 0 to 31.
    pub number: u32,
    /// Its key derivation in words, such as `argon2id, 1048576 KiB, 4 passes, 4 threads`.
    pub kdf: String,
    /// Sixteen hexadecimal digits that tell it from any other slot of that number, before or
    /// after: a hash of its random salt.
    pub mark: String,
}

/// A LUKS2 header that is whole and asks for nothing that user mode refuses.
pub struct Header {
    pub(crate) copy: WholeCopy,
    pub(crate) copies: Copies,
    pub(crate) metadata: Metadata,
    pub(crate) opened_by: OpenedBy,
}

impl Header {
    /// Fetches and judges both header copies: 32 KiB in one read where the metadata have their
    /// usual size, at most 8 MiB.
    ///
    /// A header with one good copy loads; [`Header::copies`] says which is damaged. Nothing is
    /// secret yet and no key is needed: call [`Header::check_pins`] on the result.
    pub fn load(source: &dyn HeaderRead) -> Result<Self, LuksError> {
        Self::load_for(source, OpenedBy::Sprat)
    }

    /// As [`Self::load`]; what may stand in it hangs on who decrypts.
    pub fn load_for(source: &dyn HeaderRead, opened_by: OpenedBy) -> Result<Self, LuksError> {
        let judged = copies::fetch(source)?;
        let header_bytes = judged.copy.bytes.len() as u64;
        let metadata = Metadata::read(judged.copy.metadata.clone(), header_bytes, opened_by)?;
        let uuid = &judged.copy.uuid;
        if uuid::Uuid::try_parse(uuid).map_or(true, |parsed| parsed.to_string() != *uuid) {
            return Err(LuksError::invalid(format!("the UUID is {}", shown(uuid))));
        }
        Ok(Self {
            copy: judged.copy,
            copies: judged.copies,
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

    /// Higher with each change of the header: cryptsetup adds 1, [`Turn`](crate::Turn) more.
    #[must_use]
    pub fn sequence_id(&self) -> u64 {
        self.copy.sequence_id
    }

    /// What to remember of this header.
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

    /// Compares this header with what is known of the container: [`LuksError::Pin`] or
    /// [`LuksError::OlderHeader`]. To be called before [`Header::unlock`].
    pub fn check_pins(&self, pins: &Pins) -> Result<(), LuksError> {
        pins.check(&self.pins())
    }

    /// Compares this header with the fingerprint typed from a recovery sheet.
    pub fn check_fingerprint(&self, typed: &str) -> Result<(), LuksError> {
        self.pins().check_typed(typed)
    }

    /// Where the payload lies in a container file of `file_len` bytes; [`LuksError::Truncated`]
    /// where not one block of it is there.
    pub fn geometry(&self, file_len: u64) -> Result<Payload, LuksError> {
        let segment = &self.metadata.segment;
        Payload::new(segment.offset_bytes, segment.sector_bytes, file_len)
    }

    /// A digest (SHA-256, hexadecimal digits) of all that the metadata say of each key slot, its
    /// number included: area, key derivation with its salt, and the digests that it belongs to.
    /// What lies in the slot's area is not part of it.
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

    /// Of each key slot: its metadata, and the names of the digests that it belongs to, as a list of
    /// two.
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

    /// The key slots, by number.
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

    /// Opens the volume key with `secret`, trying the cheap slots first. Fetches the area of each
    /// slot that it tries (252 KiB).
    ///
    /// Takes as long as the slots' key derivations ask for, and as much memory: seconds, and a
    /// gigabyte; all slots together take no more than the default of [`UnlockOptions`].
    /// [`LuksError::WrongSecret`] where no slot opens. Slots that ask for more than the bounds are
    /// left out, and reported if no other opens.
    pub fn unlock(&self, source: &dyn HeaderRead, secret: &Secret) -> Result<VolumeKey, LuksError> {
        Ok(self.unlock_by(source, secret)?.1)
    }

    /// As [`Header::unlock`], and says by which slot.
    pub fn unlock_by(
        &self,
        source: &dyn HeaderRead,
        secret: &Secret,
    ) -> Result<(u32, VolumeKey), LuksError> {
        self.unlock_within(source, secret, &UnlockOptions::default())
    }

    /// As [`Header::unlock_by`], with the order and the limits of `options`. Errors as there, and
    /// [`LuksError::KdfBudget`] where slots were left out because of the work of those before.
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

    /// Opens the volume key by that slot and no other.
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
                // Another slot may do.
                Err(error @ LuksError::NoMemory { .. }) => {
                    budget.object(error);
                    continue;
                }
                other => other?,
            };
            match opened {
                // The second belt: libcryptsetup has compared the key with the digest in the header
                // that it was given, which is the one that was judged and pinned. There is no other
                // digest in it: a header with two is refused when it is read.
                Some(key) if self.holds(&key)? => return Ok((slot.number, key)),
                Some(_) | None => {}
            }
        }
        Err(budget.failed())
    }

    /// Says whether `key` is this container's volume key.
    pub(crate) fn holds(&self, key: &VolumeKey) -> Result<bool, LuksError> {
        Ok(key.bits() == self.metadata.key_bytes * 8 && self.metadata.digest.fits(key)?)
    }

    /// The writes that make both copies good again; empty where they are. The good copy is not
    /// touched.
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

    /// Both copies as this one says, so that libcryptsetup sees what was judged and nothing else.
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
