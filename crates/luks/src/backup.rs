//! A header kept elsewhere, and put back without a moment in which nothing opens.
//!
//! Such a file is what `cryptsetup luksHeaderBackup` makes and `luksHeaderRestore` takes: the two
//! header copies and the key slots' space, at their own offsets, with holes where nothing is.

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

/// A header's bytes, to be kept in a file of [`HeaderBackup::len_bytes`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderBackup {
    /// What lies where; all else is zeros.
    pub extents: Vec<Extent>,
    /// Length of the file: up to the end of the key slots' space.
    pub len_bytes: u64,
}

impl HeaderBackup {
    /// A hash of what it holds, the same for each backup of one header: a copy that is made good
    /// from the other one has another salt each time, and that is left out.
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
    /// What is to be kept of this header: both copies (a damaged one made good from the other) and
    /// the areas of all key slots, about half a megabyte for two.
    ///
    /// Such a copy opens the container with the keys of today for ever, also with those that are
    /// removed tomorrow.
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

    /// The slots, by number, whose areas in `now`, a backup of this header, hold other bytes than
    /// the same slots' areas in `earlier`, which lie in `source`. A slot's area never changes in
    /// its life, so one of the two is damaged.
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

    /// Key slots of `earlier` that this header does not have, or of which it says something else.
    /// Number and place of a slot's area do not count: a restore moves areas.
    #[must_use]
    pub fn slots_that_went(&self, earlier: &Self) -> Vec<u32> {
        let now = self.slot_facts();
        let before = earlier.slot_facts().into_iter();
        before
            .filter(|(_, facts)| !now.iter().any(|(_, now)| now == facts))
            .map(|(number, _)| number)
            .collect()
    }

    /// What the metadata say of each key slot, without the place of its area.
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

    /// Where this header's key slots have their areas in the file.
    #[must_use]
    pub fn areas(&self) -> Vec<Range<u64>> {
        let used = self.metadata.used.iter();
        used.map(|(_, area)| area.clone()).collect()
    }

    /// The writes that put this header, a kept one that lies in `kept`, back in the place of
    /// `present`, in order. `None`: what lies there is no header any more.
    ///
    /// At every instant the container opens with the keys of the one or of the other: areas that
    /// the present header uses stay until both copies name others, and are overwritten last; with
    /// them those in `gone`, which an earlier header had that was about to be replaced. The new
    /// sequence is above that of both and above `sequence_known`, and far above them where a newer
    /// one may have been lost, so that every machine accepts it. `proof` must open a slot of what
    /// is put back.
    ///
    /// Both must be of one container: [`LuksError::Pin`] where they are not. Nobody else may
    /// change the header meanwhile (the container's lock); what one sends late who did is kept apart by
    /// `turn`.
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
        let put_back = self.placed(&moved, newest, step)?;
        let mut all: Vec<Extent> = areas.iter().map(|area| area.extent.clone()).collect();
        let first = first_to_write(present.map(|(there, _)| there.copies()));
        let copies = [put_back.extent(first)?, put_back.extent(other(first))?];
        all.extend(copies.iter().cloned());
        let written = Written::new(&all, self.metadata.segment.offset_bytes);
        let loaded = Self::load_for(&written, self.opened_by)?;
        assert!(loaded.copies().both_good(), "just made");
        loaded.unlock(&written, proof)?;
        let mut before = gone.to_vec();
        if let Some((there, _)) = present {
            before.extend(there.areas());
        }
        in_order(areas, copies, &put_back, &before)
    }

    /// Whether two headers are of one container, whatever their keys.
    fn check_sibling(&self, there: &Self) -> Result<(), LuksError> {
        let mut pins = there.pins();
        pins.sequence_id = 0;
        self.check_pins(&pins)?;
        if self.copy.bytes.len() != there.copy.bytes.len()
            || self.metadata.areas != there.metadata.areas
        {
            return Err(LuksError::Argument {
                what: "the kept header has another layout than the present one".to_owned(),
            });
        }
        Ok(())
    }

    /// Finds a place for each area: its own where that harms nothing, else a free one.
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
                    "the key slots' space is too full to put the header back safely: remove a key \
                       slot first"
                        .to_owned(),
            })?;
            area.extent.offset = offset;
            taken.push(area.range());
        }
        Ok(areas)
    }

    /// This header with the areas of these slots at these offsets, and a sequence that is by `step`
    /// above `newest`.
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

/// One key slot's area on its way back.
struct Area {
    slot: u32,
    extent: Extent,
    /// These bytes lie there already.
    is_there: bool,
    /// It keeps its place.
    stays: bool,
}

impl Area {
    fn range(&self) -> Range<u64> {
        self.extent.offset..self.extent.offset + self.extent.bytes.len() as u64
    }
}

/// A bad copy is written first: the good one stays until the other is good too.
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
    put_back: &Header,
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
    // What nobody names any more must not open anything either.
    let space = &put_back.metadata.areas;
    let mut done: Vec<&Range<u64>> = Vec::new();
    for area in before {
        let used = &put_back.metadata.used;
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
