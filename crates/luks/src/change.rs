//! Adds and removes key slots, as writes in an order in which a crash loses nothing.

use crate::{
    LuksError,
    copies::Place,
    format::{FormatOptions, SlotKind, kdf_for},
    header::Header,
    header_io::{Extent, HeaderWrite, Written, fetch},
    secret::{Secret, VolumeKey},
    turn::Turn,
};

impl Header {
    /// The writes, in order, that add a key slot. Each copy is durable before the other one is written,
    /// and a copy never points to a slot whose area isn't durable. The slot was opened once from these
    /// bytes.
    ///
    /// Both copies must be good ([`Header::repair`]), and nobody else may change the header meanwhile
    /// (the container's lease). Afterwards load the header again and store its pins: the sequence has
    /// increased. Of `options` only the costs are used. `turn` separates these writes from late ones of
    /// another session.
    pub fn add_slot(
        &self,
        key: &VolumeKey,
        secret: &Secret,
        kind: SlotKind,
        options: &FormatOptions,
        turn: Turn,
    ) -> Result<Vec<HeaderWrite>, LuksError> {
        self.check_changeable()?;
        if !self.holds(key)? {
            return Err(LuksError::Argument {
                what: "this volume key is not the container's".to_owned(),
            });
        }
        let mut reference = self.reference()?;
        let number = reference.add_slot(None, key, secret, &kdf_for(kind, options))?;
        let changed = Self::load_for(&reference, self.opened_by)?;
        let mut area = fetch(&reference, &changed.slot(number)?.area)?;
        // Only one `Reference` may exist at a time, and the proof needs its own.
        drop(reference);
        let len = area.bytes.len() as u64;
        let place = turn.place(&self.metadata.areas, &mut self.areas(), len)?;
        area.offset = place.unwrap_or(area.offset);
        let moved = [(number, area.offset)];
        let changed = changed.placed(&moved, self.sequence_id(), turn.sequence_step()?)?;
        let writes = changed.in_order(area)?;
        let written = Written::of(&writes, changed.pins().payload_offset_bytes);
        Self::load_for(&written, self.opened_by)?.unlock_slot(&written, secret, number)?;
        Ok(writes)
    }

    /// The writes, in order, that remove a key slot. Its area is overwritten first, so that a crash
    /// leaves at worst a slot that no key opens. The last slot can't be removed.
    ///
    /// If the server kept the old header and area, they can't be taken back. Otherwise as
    /// [`Header::add_slot`].
    pub fn remove_slot(&self, number: u32, turn: Turn) -> Result<Vec<HeaderWrite>, LuksError> {
        self.check_changeable()?;
        let slot = self.slot(number)?;
        if self.slots().len() == 1 {
            return Err(LuksError::Argument {
                what: format!("key slot {number} is the last one"),
            });
        }
        let mut reference = self.reference()?;
        reference.remove_slot(number)?;
        let area = fetch(&reference, &slot.area)?;
        let changed = Self::load_for(&reference, self.opened_by)?;
        drop(reference);
        assert!(changed.slot(number).is_err(), "slot {number} was removed");
        let changed = changed.placed(&[], self.sequence_id(), turn.sequence_step()?)?;
        changed.in_order(area)
    }

    pub(crate) fn check_changeable(&self) -> Result<(), LuksError> {
        if self.copies().both_good() {
            return Ok(());
        }
        Err(LuksError::Argument {
            what: "the header must be repaired before it is changed".to_owned(),
        })
    }

    fn in_order(&self, area: Extent) -> Result<Vec<HeaderWrite>, LuksError> {
        Ok(vec![
            HeaderWrite::Write(area),
            HeaderWrite::Barrier,
            HeaderWrite::Write(self.extent(Place::Secondary)?),
            HeaderWrite::Barrier,
            HeaderWrite::Write(self.extent(Place::Primary)?),
            HeaderWrite::Barrier,
        ])
    }
}
