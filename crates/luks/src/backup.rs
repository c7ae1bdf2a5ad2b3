//! Backups of a header, and the restore of one. At each moment of a restore some key opens the
//! container.
//!
//! A backup file is what `cryptsetup luksHeaderBackup` writes and `luksHeaderRestore` reads: the two
//! header copies and the key slots' areas at their offsets, and holes elsewhere.

use std::ops::Range;

use openssl::{rand::rand_bytes, sha::Sha256};
use serde_json::Value;

use crate::{
    LuksError,
    copies::{Copies, CopyState, Place, plain},
    header::Header,
    header_io::{Extent, HeaderRead, HeaderWrite, Written, fetch},
    metadata::Metadata,
    secret::Secret,
    turn::{SEQUENCE_JUMP, Turn, overlap},
};

/// The bytes of a header backup, for a file of [`HeaderBackup::len_bytes`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderBackup {
    /// The ranges with data. All else is zeros.
    pub extents: Vec<Extent>,
    /// Length of the file: up to the end of the space for key slots.
    pub len_bytes: u64,
}

impl HeaderBackup {
    /// A hash of the content, which is the same for each backup of one header. The salts are left out: a
    /// copy that is rebuilt from the other one gets a new salt each time.
    #[must_use]
    pub fn content_hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for extent in &self.extents {
            hash.update(&extent.offset.to_le_bytes());
            hash.update(&plain(&extent.bytes));
        }
        hash.finish()
    }
}

impl Header {
    /// Makes a backup of this header: both copies (a damaged one is rebuilt from the other) and the
    /// areas of all key slots, about half a megabyte for two.
    ///
    /// Such a backup always opens the container with the keys of today, even with those that are removed
    /// later.
    pub fn backup(&self, source: &dyn HeaderRead) -> Result<HeaderBackup, LuksError> {
        let mut extents = vec![self.extent(Place::Primary)?, self.extent(Place::Secondary)?];
        for (_, area) in &self.metadata.used {
            extents.push(fetch(source, area)?);
        }
        Ok(HeaderBackup {
            extents,
            len_bytes: self.metadata.areas.end,
        })
    }

    /// The areas that a backup reads: offset and length of each key slot's, in bytes.
    pub fn slot_areas(&self) -> impl Iterator<Item = (u64, usize)> {
        let areas = self.metadata.used.iter();
        areas.filter_map(|(_, area)| {
            let len = usize::try_from(area.end - area.start).ok()?;
            Some((area.start, len))
        })
    }

    /// The numbers of the slots whose areas in `now`, a backup of this header, differ from the same
    /// slots' areas in `earlier`, which is stored in `source`. A slot's area never changes, so one of
    /// the two is damaged.
    pub fn slots_that_differ(
        &self,
        now: &HeaderBackup,
        earlier: &Self,
        source: &dyn HeaderRead,
    ) -> Result<Vec<u32>, LuksError> {
        let now = Written::new(&now.extents, now.len_bytes);
        let mut differ = Vec::new();
        for slot in &self.metadata.keyslots {
            let slots = earlier.metadata.keyslots.iter();
            let Some(before) = slots.into_iter().find(|before| before.mark == slot.mark) else {
                continue;
            };
            if fetch(&now, &slot.area)?.bytes != fetch(source, &before.area)?.bytes {
                differ.push(slot.number);
            }
        }
        Ok(differ)
    }

    /// The key slots of `earlier` that this header lacks, or has with other metadata. Number and offset
    /// of a slot don't count: a restore may change them.
    #[must_use]
    pub fn slots_missing_of(&self, earlier: &Self) -> Vec<u32> {
        let now = self.slot_facts();
        let before = earlier.slot_facts().into_iter();
        before
            .filter(|(_, facts)| !now.iter().any(|(_, now)| now == facts))
            .map(|(number, _)| number)
            .collect()
    }

    /// The metadata of each key slot, without the offset of its area.
    fn slot_facts(&self) -> Vec<(u32, Value)> {
        let mut all = self.facts_of_slots();
        for (_, facts) in &mut all {
            let area = facts.pointer_mut("/0/area").and_then(Value::as_object_mut);
            if let Some(area) = area {
                area.remove("offset");
            }
        }
        all
    }

    /// The areas of this header's key slots in the file.
    #[must_use]
    pub fn areas(&self) -> Vec<Range<u64>> {
        let used = self.metadata.used.iter();
        used.map(|(_, area)| area.clone()).collect()
    }

    /// The writes, in order, that restore this header, which is stored in `kept`, over `present`.
    /// `None`: the container has no readable header.
    ///
    /// At each moment the container opens with the keys of one of the two headers. Areas that the
    /// present header uses stay until both copies point to other areas. They are overwritten last,
    /// together with the areas in `gone`, which belonged to an earlier header that was being replaced.
    /// The new sequence is above that of both headers and above `sequence_known`, and far above them if
    /// a newer one may have been lost, so that every machine accepts it. `proof` must open a slot of the
    /// restored header.
    ///
    /// Both headers must be of the same container, otherwise [`LuksError::Pin`]. Nobody else may change
    /// the header meanwhile (the container's lease). `turn` separates these writes from late ones of
    /// another session.
    pub fn restore(
        &self,
        kept: &dyn HeaderRead,
        present: Option<(&Self, &dyn HeaderRead)>,
        sequence_known: u64,
        proof: &Secret,
        gone: &[Range<u64>],
        turn: Turn,
    ) -> Result<Vec<HeaderWrite>, LuksError> {
        let known = self.sequence_id().max(sequence_known);
        let (newest, may_be_older) = match present {
            Some((there, _)) => {
                self.check_sibling(there)?;
                let newest = there.sequence_id();
                (newest.max(known), newest < known)
            }
            None => (known, true),
        };
        let step = turn.sequence_step()?;
        let jump = may_be_older && !turn.after_takeover;
        let step = step + if jump { SEQUENCE_JUMP } else { 0 };
        let areas = self.place_areas(kept, present, turn)?;
        let moved: Vec<(u32, u64)> = areas
            .iter()
            .filter(|area| !area.stays)
            .map(|area| (area.slot, area.extent.offset))
            .collect();
        let restored = self.placed(&moved, newest, step)?;
        let mut all: Vec<Extent> = areas.iter().map(|area| area.extent.clone()).collect();
        let first = first_to_write(present.map(|(there, _)| there.copies()));
        let copies = [restored.extent(first)?, restored.extent(other(first))?];
        all.extend(copies.iter().cloned());
        let written = Written::new(&all, self.metadata.segment.offset_bytes);
        let loaded = Self::load_for(&written, self.opened_by)?;
        assert!(loaded.copies().both_good(), "just made");
        loaded.unlock(&written, proof)?;
        let mut before = gone.to_vec();
        if let Some((there, _)) = present {
            before.extend(there.areas());
        }
        in_order(areas, copies, &restored, &before)
    }

    /// Checks that two headers are of the same container, whatever their keys.
    fn check_sibling(&self, there: &Self) -> Result<(), LuksError> {
        let mut pins = there.pins();
        pins.sequence_id = 0;
        self.check_pins(&pins)?;
        if self.copy.bytes.len() != there.copy.bytes.len()
            || self.metadata.areas != there.metadata.areas
        {
            return Err(LuksError::Argument {
                what: "the saved header has another layout than the present one".to_owned(),
            });
        }
        Ok(())
    }

    /// Finds a place for each area: its own if that is safe, otherwise a free one.
    fn place_areas(
        &self,
        kept: &dyn HeaderRead,
        present: Option<(&Self, &dyn HeaderRead)>,
        turn: Turn,
    ) -> Result<Vec<Area>, LuksError> {
        let in_use: &[(u32, Range<u64>)] = present.map_or(&[], |(there, _)| &there.metadata.used);
        let mut areas = Vec::new();
        for (slot, range) in &self.metadata.used {
            let extent = fetch(kept, range)?;
            let may_be_hit = turn.after_takeover && !turn.owns(&self.metadata.areas, range);
            let free = !may_be_hit && !in_use.iter().any(|(_, used)| overlap(used, range));
            let is_there = match present {
                Some((_, source)) => fetch(source, range)?.bytes == extent.bytes,
                None => false,
            };
            areas.push(Area {
                slot: *slot,
                extent,
                is_there,
                stays: free || is_there,
            });
        }
        let mut taken: Vec<Range<u64>> = in_use.iter().map(|(_, used)| used.clone()).collect();
        let staying = areas.iter().filter(|area| area.stays);
        taken.extend(staying.map(Area::range));
        for area in areas.iter_mut().filter(|area| !area.stays) {
            let len = area.extent.bytes.len() as u64;
            let offset = turn.place(&self.metadata.areas, &mut taken, len)?;
            let offset = offset.ok_or_else(|| LuksError::Argument {
                what:
                    "the space for key slots is too full to restore the header safely: remove a key \
                       slot first"
                        .to_owned(),
            })?;
            area.extent.offset = offset;
            taken.push(area.range());
        }
        Ok(areas)
    }

    /// This header with the areas of these slots at these offsets, and with a sequence `step` above
    /// `newest`.
    pub(crate) fn placed(
        &self,
        moved: &[(u32, u64)],
        newest: u64,
        step: u64,
    ) -> Result<Self, LuksError> {
        let sequence_id = newest
            .checked_add(step)
            .ok_or_else(|| LuksError::invalid(format!("the sequence is {newest}")))?;
        let mut json = self.copy.metadata.clone();
        for (slot, offset) in moved {
            let place = json
                .get_mut("keyslots")
                .and_then(|slots| slots.get_mut(slot.to_string()))
                .and_then(|slot| slot.get_mut("area"))
                .and_then(|area| area.get_mut("offset"));
            *place.expect("read from there") = Value::from(offset.to_string());
        }
        let json = (!moved.is_empty()).then(|| json.to_string());
        let copy = self.copy.changed(sequence_id, json.as_deref())?;
        let header_bytes = copy.bytes.len() as u64;
        let metadata = Metadata::read(copy.metadata.clone(), header_bytes, self.opened_by)?;
        Ok(Self {
            copy,
            copies: Copies {
                primary: CopyState::Good,
                secondary: CopyState::Good,
            },
            metadata,
            opened_by: self.opened_by,
        })
    }
}

/// The area of a key slot that is being restored.
struct Area {
    slot: u32,
    extent: Extent,
    /// The container has these bytes at this place already.
    is_there: bool,
    /// It keeps its offset.
    stays: bool,
}

impl Area {
    fn range(&self) -> Range<u64> {
        self.extent.offset..self.extent.offset + self.extent.bytes.len() as u64
    }
}

/// A bad copy is written first. The good one stays until the other is good, too.
fn first_to_write(present: Option<&Copies>) -> Place {
    match present {
        Some(copies) if copies.primary != CopyState::Good => Place::Primary,
        _ => Place::Secondary,
    }
}

fn other(place: Place) -> Place {
    match place {
        Place::Primary => Place::Secondary,
        Place::Secondary => Place::Primary,
    }
}

fn in_order(
    areas: Vec<Area>,
    copies: [Extent; 2],
    restored: &Header,
    before: &[Range<u64>],
) -> Result<Vec<HeaderWrite>, LuksError> {
    let mut writes = Vec::new();
    for area in areas.into_iter().filter(|area| !area.is_there) {
        writes.push(HeaderWrite::Write(area.extent));
    }
    writes.push(HeaderWrite::Barrier);
    for copy in copies {
        writes.push(HeaderWrite::Write(copy));
        writes.push(HeaderWrite::Barrier);
    }
    // Areas that no copy points to must not open anything either.
    let space = &restored.metadata.areas;
    let mut done: Vec<&Range<u64>> = Vec::new();
    for area in before {
        let used = &restored.metadata.used;
        let outside = area.start < space.start || area.end > space.end;
        if outside || done.contains(&area) || used.iter().any(|(_, used)| overlap(used, area)) {
            continue;
        }
        done.push(area);
        let len = usize::try_from(area.end - area.start).expect("bounded when read");
        let mut noise = vec![0; len];
        rand_bytes(&mut noise).map_err(|source| LuksError::Crypto {
            op: "overwrite a key slot",
            source,
        })?;
        writes.push(HeaderWrite::Write(Extent {
            offset: area.start,
            bytes: noise,
        }));
        writes.push(HeaderWrite::Barrier);
    }
    Ok(writes)
}
