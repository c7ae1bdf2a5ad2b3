//! A header kept elsewhere, and put back without a moment in which nothing opens.
//!
//! Such a file is what `cryptsetup luksHeaderBackup` makes and `luksHeaderRestore` takes: the two
//! header copies and the key slots' space, at their own offsets, with holes where nothing is.

use std::ops::Range;

use openssl::{rand::rand_bytes, sha::Sha256};
use serde_json::Value;

use crate::{
    Copies, CopyState, Extent, Header, HeaderRead, HeaderWrite, LuksError, Secret,
    change::Written,
    copies::{Place, plain},
    header::fetch,
    metadata::Metadata,
};

/// Areas begin at multiples of this (cryptsetup: lib/luks2/luks2_json_metadata.c,
/// `LUKS2_find_area_gap`).
const AREA_ALIGNMENT: u64 = 4096;

/// How far the sequence rises where a header is put back that may not be the newest: further than
/// keys are ever changed, so that no machine knows a newer one.
const SEQUENCE_JUMP: u64 = 1 << 20;

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
    /// change the header meanwhile (the container's lock).
    pub fn restore(
        &self,
        kept: &dyn HeaderRead,
        present: Option<(&Self, &dyn HeaderRead)>,
        sequence_known: u64,
        proof: &Secret,
        gone: &[Range<u64>],
    ) -> Result<Vec<HeaderWrite>, LuksError> {
        let known = self.sequence_id().max(sequence_known);
        let (newest, step) = match present {
            Some((there, _)) => {
                self.check_sibling(there)?;
                let newest = there.sequence_id();
                (
                    newest.max(known),
                    if newest < known { SEQUENCE_JUMP } else { 1 },
                )
            }
            None => (known, SEQUENCE_JUMP),
        };
        let sequence_id = newest
            .checked_add(step)
            .ok_or_else(|| LuksError::invalid(format!("the sequence is {newest}")))?;
        let areas = self.place_areas(kept, present)?;
        let put_back = self.moved(&areas, sequence_id)?;
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
    ) -> Result<Vec<Area>, LuksError> {
        let in_use: &[(u32, Range<u64>)] = present.map_or(&[], |(there, _)| &there.metadata.used);
        let mut areas = Vec::new();
        for (slot, range) in &self.metadata.used {
            let extent = fetch(kept, range)?;
            let free = !in_use.iter().any(|(_, used)| overlap(used, range));
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
            let offset =
                gap(&self.metadata.areas, &mut taken, len).ok_or_else(|| LuksError::Argument {
                    what: "the key slots' space is too full to put the header back safely: remove \
                           a key slot first"
                        .to_owned(),
                })?;
            area.extent.offset = offset;
            taken.push(area.range());
        }
        Ok(areas)
    }

    /// This header with its areas at those places.
    fn moved(&self, areas: &[Area], sequence_id: u64) -> Result<Self, LuksError> {
        let mut json = self.copy.metadata.clone();
        for area in areas.iter().filter(|area| !area.stays) {
            let offset = json
                .get_mut("keyslots")
                .and_then(|slots| slots.get_mut(area.slot.to_string()))
                .and_then(|slot| slot.get_mut("area"))
                .and_then(|area| area.get_mut("offset"));
            *offset.expect("read from there") = Value::from(area.extent.offset.to_string());
        }
        let unmoved = areas.iter().all(|area| area.stays);
        let json = (!unmoved).then(|| json.to_string());
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

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// The first free run of `len` bytes; sorts `taken`.
fn gap(space: &Range<u64>, taken: &mut [Range<u64>], len: u64) -> Option<u64> {
    taken.sort_by_key(|range| range.start);
    let mut at = space.start;
    for range in taken.iter() {
        if range.start.saturating_sub(at) >= len {
            return Some(at);
        }
        at = at.max(range.end).next_multiple_of(AREA_ALIGNMENT);
    }
    (space.end.saturating_sub(at) >= len).then_some(at)
}
