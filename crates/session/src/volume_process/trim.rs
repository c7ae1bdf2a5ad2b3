//! Gives back the blocks that a read-only mount reported as unneeded, by the first method that
//! works.

use std::ops::Range;
use std::sync::Arc;

use sprat_attach::BlockDevice as _;
use sprat_store::{Puncher, ReadClass, StoreError, StoreFile};
use sprat_volume::{Flush, VolumeError};

use crate::file_system::{FreeIsTrusted, SuperBlock};
use crate::protocol::messages::TrimHow;
use crate::protocol::reports::{Measure, TrimReport, TrimRoute};
use crate::protocol::reports::{Notice, Phase};
use crate::volume_process::Served;
use crate::volume_process::crypt_device::CryptDevice;
use crate::volume_process::lease::PunchError;
use crate::volume_process::rewrite::{self, Rewrite};
use crate::{Exit, Failure, text};

/// Holes between two checks of the lease. A request to stop is checked then, too.
const BATCH_RANGES: usize = 2048;

impl Served {
    /// Nothing is mounted: makes everything durable, and begins to collect unneeded ranges.
    pub(super) fn collect(&mut self) -> Result<(), Failure> {
        self.wait_until_unmounted()?;
        self.events.phase(Phase::Syncing);
        // So the volume itself can punch the holes: it refuses them while a write waits. A rewrite
        // closes the volume before.
        self.volume.flush(Flush::Durable)?;
        let trusted = FreeIsTrusted::check(&read_super(&self.device)?)?;
        self.device.begin_collecting(&trusted);
        Ok(())
    }

    /// Nothing is mounted any more: gives back the collected ranges.
    pub(super) fn trim(&mut self, how: TrimHow) -> Result<TrimReport, Failure> {
        self.wait_until_unmounted()?;
        self.check_may_give_back("nothing was changed")?;
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
            TrimHow::PunchIf(worthwhile) => {
                let needed = self.plan_rewrite(&free)?.kept_behind_header_bytes();
                let allocated = self.allocated().map(|(bytes, _)| bytes);
                if !allocated.is_some_and(|bytes| worthwhile.is_reached(bytes, needed)) {
                    return Ok(report(TrimRoute::NotWorthwhile, None, None));
                }
                let (route, measure) = self.punch(&free)?;
                Ok(report(route, measure, None))
            }
            TrimHow::Rewrite | TrimHow::RewriteThroughClient => {
                if self.lease.store().agent().is_some() {
                    return Err(replaces_container());
                }
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

    /// Blocks that are given back read as zeros, or not at all, and would count as overwritten.
    pub(super) fn check_may_give_back(&self, state: &str) -> Result<(), Failure> {
        match self.lease.may_give_back() {
            true => Ok(()),
            false => Err(Failure::new(
                Exit::Locked,
                "the lock of the container was taken over less than 2 h 15 min ago",
            )
            .with_hint(format!(
                "{state}. For 2 h 15 min the previous session can overwrite new data, so sprat checks new data \
                 until then. Run the command again later"
            ))),
        }
    }

    /// What the container occupies on its disk, and what measured it. `None` if that can't be found
    /// out. The free space of the server's disk is no measure: others write there too.
    fn allocated(&self) -> Option<(u64, &'static str)> {
        let store = self.lease.store();
        if store.capabilities().discard {
            let bytes = store.stat(self.lease.file_name()).ok()?.allocated_bytes?;
            return Some((bytes, "stat"));
        }
        let mut puncher = self.lease.puncher().ok().flatten()?;
        Some((puncher.allocated_bytes().ok()?, "du on the server"))
    }

    pub(super) fn wait_until_unmounted(&mut self) -> Result<(), Failure> {
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
            let punched = self.punch_by(free, &mut |file, ranges| file.discard_ranges(ranges));
            let route = match store.agent() {
                Some(_) => TrimRoute::AgentPunch,
                None => TrimRoute::LocalPunch,
            };
            match punched {
                Ok(()) => return Ok((route, measure(before, allocated(), "stat"))),
                Err(error) => skip_route(&mut reasons, error)?,
            }
        }
        match self.punch_in_shell(free) {
            Ok(measure) => {
                for reason in reasons {
                    self.events.notice(Notice::TrimRoutePassed { reason });
                }
                return Ok((TrimRoute::ShellPunch, measure));
            }
            Err(error) => skip_route(&mut reasons, error)?,
        }
        let needed_bytes = self.plan_rewrite(free)?.kept_bytes();
        let available = store.free_space().ok().map(|space| space.available_bytes);
        Err(no_method(&reasons, needed_bytes, available))
    }

    /// Punches through a shell on the server, and measures what that gave back.
    fn punch_in_shell(&self, free: &[Range<u64>]) -> Result<Option<Measure>, PunchError> {
        let puncher = self.lease.puncher()?;
        let mut puncher = puncher.ok_or_else(|| PunchError::Unavailable(String::new()))?;
        let before = puncher.allocated_bytes().ok();
        self.events.phase(Phase::Punching);
        self.punch_by_shell(free, &mut puncher)?;
        let after = puncher.allocated_bytes().ok();
        Ok(measure(before, after, "du on the server"))
    }

    fn punch_by_shell(&self, free: &[Range<u64>], puncher: &mut Puncher) -> Result<(), PunchError> {
        let mut is_seen = false;
        self.punch_by(free, &mut |file, ranges| {
            if is_seen {
                puncher.punch(ranges)?;
            } else if let Some((first, rest)) = ranges.split_first() {
                // SFTP must see the first hole. If not, the shell has another file.
                puncher.punch(std::slice::from_ref(first))?;
                check_hole_visible(file, first)?;
                is_seen = true;
                puncher.punch(rest)?;
            }
            file.changed_elsewhere();
            Ok(())
        })
    }

    /// Punches all ranges in batches. If the method is not available, nothing has changed.
    fn punch_by(
        &self,
        free: &[Range<u64>],
        punch: &mut sprat_volume::Punch<'_>,
    ) -> Result<(), PunchError> {
        for batch in free.chunks(BATCH_RANGES) {
            self.stop.check()?;
            match self.volume.discard_by(batch, punch) {
                Ok(()) => {}
                Err(VolumeError::Store {
                    source: StoreError::Unsupported { reason, .. },
                    ..
                }) => return Err(PunchError::Unavailable(reason)),
                Err(error) => return Err(self.unfinished(&error).into()),
            }
        }
        Ok(())
    }

    fn unfinished(&self, error: &VolumeError) -> Failure {
        let failure = self.lease.lost().unwrap_or_else(|| Failure::from(error));
        match failure.hint {
            Some(_) => failure,
            None => failure.with_hint(
                "no snapshot is harmed: only blocks that the file system does not use were changed. Run \
                 the command again for the rest",
            ),
        }
    }

    fn plan_rewrite(&self, free: &[Range<u64>]) -> Result<Rewrite, Failure> {
        let found = read_super(&self.device)?;
        let disposable = found
            .disposable_ranges(&mut reader(&self.device))
            .map_err(|what| Failure::new(Exit::Damaged, what))?;
        Ok(Rewrite::new(
            self.facts.file_bytes,
            self.facts.pins.payload_offset_bytes,
            free.iter().cloned().chain(disposable),
        ))
    }
}

fn replaces_container() -> Failure {
    Failure::failed("sprat-agent on the server lets no client replace the container").with_hint(
        "nothing was changed. Run `sprat trim` without --rewrite: the agent makes holes in the container",
    )
}

fn nothing_to_gain(allocated_bytes: u64, rewrite: &Rewrite) -> Failure {
    Failure::failed(format!(
        "a rewrite would free nothing: the container takes {} on its disk, and {} of these are in use",
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

fn check_hole_visible(file: &dyn StoreFile, hole: &Range<u64>) -> Result<(), StoreError> {
    let mut block = [1; 4096];
    file.read_at(hole.start, &mut block, ReadClass::Demand)?;
    if block.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    Err(StoreError::Refused {
        op: "punch",
        object: format!("the range at {}", hole.start),
        reason: "SFTP does not show the hole that the shell made".to_owned(),
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

pub(super) fn read_super(device: &Arc<CryptDevice>) -> Result<SuperBlock, Failure> {
    SuperBlock::read(&mut reader(device)).map_err(Failure::failed)
}

/// No method can make holes here. The hint names the method that could free the space.
/// Notes why a method is not available. A failure of the method itself is returned.
fn skip_route(reasons: &mut Vec<String>, error: PunchError) -> Result<(), Failure> {
    match error {
        PunchError::Unavailable(reason) if reason.is_empty() => {}
        PunchError::Unavailable(reason) => reasons.push(reason),
        PunchError::Failed(failure) => return Err(failure),
    }
    Ok(())
}

fn no_method(reasons: &[String], needed_bytes: u64, available: Option<u64>) -> Failure {
    let mut failure = Failure::new(
        Exit::Failed,
        "no holes can be made in the container at its place",
    );
    for reason in reasons {
        failure = failure.because(reason);
    }
    let needed = text::bytes(needed_bytes);
    failure.with_hint(match available {
        Some(available) if available < needed_bytes => format!(
            "nothing was changed. A rewrite (`sprat trim --rewrite`) needs {needed} of free space \
             there, but only {} are free. `sprat copy` to another server copies only the used data",
            text::bytes(available)
        ),
        available => format!(
            "nothing was changed. Run `sprat trim --rewrite`: the server then rewrites the container. \
             That needs {needed} of free space{}",
            available.map_or_else(String::new, |available| format!(
                ", and {} are free there",
                text::bytes(available)
            ))
        ),
    })
}

#[cfg(test)]
mod tests {
    use sprat_store::{FileName, Store};
    use sprat_testkit::memory::MemoryStore;

    use super::*;

    #[test]
    fn hole_that_sftp_does_not_show_is_in_another_file() {
        let store = MemoryStore::new();
        let file = store.create_new(&FileName::new("x.luks").unwrap()).unwrap();
        file.resize(3 * 4096).unwrap();
        file.write_at(2 * 4096 - 1, &[1]).unwrap();
        check_hole_visible(&*file, &(0..4096)).unwrap();
        let refused = check_hole_visible(&*file, &(4096..3 * 4096));
        assert!(matches!(refused, Err(StoreError::Refused { .. })));
    }
}
