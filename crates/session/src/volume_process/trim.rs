//! Gives back what a read-only mount said that it doesn't need, by the first way that exists.

use std::ops::Range;
use std::sync::Arc;

use sprat_attach::BlockDevice as _;
use sprat_store::{Puncher, ReadClass, StoreError, StoreErrorKind, StoreFile};
use sprat_volume::{Flush, VolumeError};

use crate::file_system::ext4::Super;
use crate::settings::{Notice, Phase};
use crate::supervisor::trim::{Measure, TrimHow, TrimReport, TrimRoute, no_way};
use crate::volume_process::Served;
use crate::volume_process::crypt_device::CryptDevice;
use crate::volume_process::rewrite::{self, Rewrite};
use crate::{Exit, Failure, text};

/// Holes between two looks at the lock, and two chances to stop.
const BATCH_RANGES: usize = 2048;

impl Served {
    /// Nothing is mounted: makes everything durable, and begins to take note.
    pub(super) fn collect(&mut self) -> Result<(), Failure> {
        self.wait_until_unmounted()?;
        self.events.phase(Phase::Syncing);
        // So that the holes are taken by the volume, which refuses them while a write waits; a rewrite
        // closes it before.
        self.volume.flush(Flush::Durable)?;
        let in_order = InOrder::check(&read_super(&self.device)?)?;
        self.device.begin_collecting(&in_order);
        Ok(())
    }

    /// Nothing is mounted any more: gives back what was noted.
    pub(super) fn trim(&mut self, how: TrimHow) -> Result<TrimReport, Failure> {
        self.wait_until_unmounted()?;
        // What is given back reads as zeros, and would count as overwritten.
        if !self.lease.may_give_back() {
            return Err(Failure::new(
                Exit::Locked,
                "the container was taken over less than 2:15 h ago",
            )
            .with_hint(
                "nothing was changed. Until then what is written is compared, as the session before \
                 may overwrite it; trim later",
            ));
        }
        let free = self
            .device
            .take_collected()
            .ok_or_else(|| Failure::failed("the volume process was ordered out of turn"))?;
        let report =
            |route: TrimRoute, measure: Option<Measure>, kept_bytes: Option<u64>| TrimReport {
                route,
                unneeded_bytes: free.iter().map(|range| range.end - range.start).sum(),
                ranges: free.len() as u64,
                measure,
                kept_bytes,
            };
        match how {
            TrimHow::Punch => {
                let (route, measure) = self.punch(&free)?;
                Ok(report(route, measure, None))
            }
            TrimHow::Rewrite | TrimHow::RewriteThroughClient => {
                let rewrite = self.plan_rewrite(&free)?;
                self.close_volume()?;
                let before = self.allocated();
                if let Some((bytes, _)) = before
                    && rewrite.kept_behind_header_bytes() >= bytes
                {
                    return Err(nothing_to_gain(bytes, &rewrite));
                }
                self.events.phase(Phase::Rewriting);
                let through = how == TrimHow::RewriteThroughClient;
                let route = rewrite::run(&self.lease, &self.stop, &rewrite, through)?;
                let after = before.and_then(|_| self.allocated());
                let by = before.map_or("", |(_, by)| by);
                let bytes = |found: Option<(u64, &str)>| found.map(|(bytes, _)| bytes);
                let measure = measure(bytes(before), bytes(after), by);
                Ok(report(route, measure, Some(rewrite.kept_bytes())))
            }
        }
    }

    /// What the container takes on its disk, and what measured it; `None` where that can't be
    /// found out. The free space of the server's disk says nothing: others write there too.
    fn allocated(&self) -> Option<(u64, &'static str)> {
        let store = self.lease.store();
        if store.capabilities().discard {
            let bytes = store.stat(self.lease.file_name()).ok()?.allocated_bytes?;
            return Some((bytes, "stat"));
        }
        let mut puncher = self.lease.puncher().ok().flatten()?;
        Some((puncher.allocated_bytes().ok()?, "du on the server"))
    }

    fn wait_until_unmounted(&mut self) -> Result<(), Failure> {
        if let Some(serving) = self.serving.take() {
            serving.wait()?;
        }
        match self.failure() {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    fn punch(&self, free: &[Range<u64>]) -> Result<(TrimRoute, Option<Measure>), Failure> {
        rewrite::remove_leftover(&self.lease)?;
        let mut reasons = Vec::new();
        let store = self.lease.store();
        if store.capabilities().discard {
            let allocated = || store.stat(self.lease.file_name()).ok()?.allocated_bytes;
            let before = allocated();
            self.events.phase(Phase::Punching);
            let punched = self.punch_by(free, &mut |file, ranges| {
                ranges
                    .iter()
                    .try_for_each(|range| file.discard(range.start, range.end - range.start))
            })?;
            match punched {
                Ok(()) => return Ok((TrimRoute::LocalPunch, measure(before, allocated(), "stat"))),
                Err(reason) => self.pass_over(&mut reasons, reason),
            }
        }
        match self.start_puncher()? {
            Ok(mut puncher) => {
                let before = puncher.allocated_bytes().ok();
                self.events.phase(Phase::Punching);
                match self.punch_by_shell(free, &mut puncher)? {
                    Ok(()) => {
                        let after = puncher.allocated_bytes().ok();
                        let measure = measure(before, after, "du on the server");
                        return Ok((TrimRoute::ShellPunch, measure));
                    }
                    Err(reason) => self.pass_over(&mut reasons, reason),
                }
            }
            Err(reason) => self.pass_over(&mut reasons, reason),
        }
        let needed_bytes = self.plan_rewrite(free)?.kept_bytes();
        let available = store.free_space().ok().map(|space| space.available_bytes);
        Err(no_way(&reasons, needed_bytes, available))
    }

    fn pass_over(&self, reasons: &mut Vec<String>, reason: String) {
        if reason.is_empty() {
            return;
        }
        self.events.notice(Notice::TrimRoutePassed {
            reason: reason.clone(),
        });
        reasons.push(reason);
    }

    /// The inner error says why this way does not exist.
    fn start_puncher(&self) -> Result<Result<Puncher, String>, Failure> {
        match self.lease.puncher() {
            Ok(Some(puncher)) => Ok(Ok(puncher)),
            Ok(None) => Ok(Err(String::new())),
            Err(Way::Missing(reason)) => Ok(Err(reason)),
            Err(Way::Failed(failure)) => Err(failure),
        }
    }

    fn punch_by_shell(
        &self,
        free: &[Range<u64>],
        puncher: &mut Puncher,
    ) -> Result<Result<(), String>, Failure> {
        let mut looked = false;
        self.punch_by(free, &mut |file, ranges| {
            if looked {
                puncher.punch(ranges)?;
            } else if let Some((first, rest)) = ranges.split_first() {
                // SFTP must see the first hole, or the shell has another file.
                puncher.punch(std::slice::from_ref(first))?;
                see_hole(file, first)?;
                looked = true;
                puncher.punch(rest)?;
            }
            file.changed_elsewhere();
            Ok(())
        })
    }

    /// The inner error says why this way does not exist; nothing has changed then.
    fn punch_by(
        &self,
        free: &[Range<u64>],
        punch: &mut sprat_volume::Punch<'_>,
    ) -> Result<Result<(), String>, Failure> {
        for batch in free.chunks(BATCH_RANGES) {
            self.stop.check()?;
            match self.volume.discard_by(batch, punch) {
                Ok(()) => {}
                Err(VolumeError::Store { source, .. })
                    if source.kind() == StoreErrorKind::Unsupported =>
                {
                    return Ok(Err(source.to_string()));
                }
                Err(error) => return Err(self.unfinished(&error)),
            }
        }
        Ok(Ok(()))
    }

    fn unfinished(&self, error: &VolumeError) -> Failure {
        let failure = self.lease.lost().unwrap_or_else(|| Failure::from(error));
        match failure.hint {
            Some(_) => failure,
            None => failure.with_hint(
                "no snapshot is harmed: only what the file system does not use was touched. Run \
                 it again for the rest",
            ),
        }
    }

    fn plan_rewrite(&self, free: &[Range<u64>]) -> Result<Rewrite, Failure> {
        let found = read_super(&self.device)?;
        let hollow = found
            .hollow(&mut reader(&self.device))
            .map_err(|what| Failure::new(Exit::Damaged, what))?;
        Ok(Rewrite::new(
            self.facts.file_bytes,
            self.facts.pins.payload_offset_bytes,
            free.iter().cloned().chain(hollow),
        ))
    }
}

/// Proof that what the file system calls free is free.
pub(super) struct InOrder(());

impl InOrder {
    fn check(found: &Super) -> Result<Self, Failure> {
        if found.has_errors() {
            return Err(Failure::new(
                Exit::Damaged,
                "the file system in the container is marked as damaged",
            )
            .with_hint(
                "nothing was given back: what a damaged file system calls free may be in use. \
                 Restore what you need, then have it repaired",
            ));
        }
        // The mount before this has replayed the journal, or failed: it is checked all the same.
        if found.needs_recovery() {
            return Err(Failure::failed(
                "the journal was not replayed by the mount before",
            ));
        }
        Ok(Self(()))
    }
}

/// Why there is no puncher.
pub(crate) enum Way {
    /// This way does not exist here.
    Missing(String),
    /// It can't be told.
    Failed(Failure),
}

impl From<StoreError> for Way {
    fn from(error: StoreError) -> Self {
        match error.kind() {
            StoreErrorKind::Unsupported => Self::Missing(error.to_string()),
            _ => Self::Failed(Failure::from(&error)),
        }
    }
}

fn nothing_to_gain(allocated_bytes: u64, rewrite: &Rewrite) -> Failure {
    Failure::failed(format!(
        "a rewrite would give nothing back: the container takes {} on its disk, and {} of it are in \
         use",
        text::bytes(allocated_bytes),
        text::bytes(rewrite.kept_behind_header_bytes()),
    ))
    .with_hint("nothing was changed. To free space, remove snapshots first: sprat prune")
}

fn measure(before: Option<u64>, after: Option<u64>, by: &str) -> Option<Measure> {
    Some(Measure {
        given_back_bytes: before?.saturating_sub(after?),
        by: by.to_owned(),
    })
}

fn see_hole(file: &dyn StoreFile, hole: &Range<u64>) -> Result<(), StoreError> {
    let mut block = [1; 4096];
    file.read_at(hole.start, &mut block, ReadClass::Demand)?;
    if block.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(StoreError::Refused {
        op: "punch",
        object: format!("the range at {}", hole.start),
        reason: "the hole that the shell made is not seen over SFTP".to_owned(),
    })
}

fn reader(device: &Arc<CryptDevice>) -> impl FnMut(u64, &mut [u8]) -> Result<(), String> + use<> {
    let device = Arc::clone(device);
    move |offset, buf| {
        if offset
            .checked_add(buf.len() as u64)
            .is_none_or(|end| end > device.len())
        {
            return Err("the file system points beyond the volume".to_owned());
        }
        device
            .read_at(offset, buf)
            .map_err(|error| error.to_string())
    }
}

fn read_super(device: &Arc<CryptDevice>) -> Result<Super, Failure> {
    Super::read(&mut reader(device)).map_err(Failure::failed)
}

#[cfg(test)]
mod tests {
    use sprat_store::{FileName, Store};
    use sprat_testkit::memory::MemoryStore;

    use super::*;

    /// A super block with `value` at `at`.
    fn found(at: usize, value: u8) -> Super {
        Super::read(&mut |_, buf| {
            buf[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xEF]);
            buf[1024 + at] = value;
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn only_a_file_system_in_order_says_what_is_free() {
        let check = |at, value| InOrder::check(&found(at, value)).map(drop);
        check(0x3a, 1).unwrap();
        assert_eq!(check(0x3a, 3).unwrap_err().exit, Exit::Damaged);
        assert_eq!(check(0x60, 4).unwrap_err().exit, Exit::Failed);
    }

    #[test]
    fn a_hole_that_is_not_seen_over_sftp_is_one_in_another_file() {
        let store = MemoryStore::new();
        let file = store.create_new(&FileName::new("x.luks").unwrap()).unwrap();
        file.resize(3 * 4096).unwrap();
        file.write_at(2 * 4096 - 1, &[1]).unwrap();
        see_hole(&*file, &(0..4096)).unwrap();
        let refused = see_hole(&*file, &(4096..3 * 4096));
        assert!(matches!(refused, Err(StoreError::Refused { .. })));
    }
}
