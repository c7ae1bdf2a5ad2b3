//! Rewrites the container into a new file beside it, without unneeded blocks, and swaps the two.
//!
//! The steps: create `NAME.luks.trim-TOKEN`; set owner, mode and length; copy the used ranges;
//! fsync; compare; give the new file the container's name by one atomic rename; fsync the folder.
//! Until the rename the old file is the container and is unchanged. The next trim removes a
//! leftover.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use sprat_luks::Header;
use sprat_store::{Access, FileName, IgnorePoison, ReadClass, Store, StoreErrorKind, StoreFile};
use sprat_volume::SessionHooks as _;

use crate::connect::HeaderBytes;
use crate::protocol::reports::TrimRoute;
use crate::state::reserved_names::HalfMade;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::StopFlag;
use crate::{Exit, Failure, text};

/// Bytes that are copied between two checks of the lease.
const GROUP_BYTES: u64 = 1 << 30;
/// Ranges that are copied between two checks of the lease.
const GROUP_RANGES: usize = 4096;
/// One transfer through this machine.
const CHUNK_BYTES: u64 = 1 << 20;
/// How many threads copy through this machine, or compare. Most pieces are small, and each waits
/// for its round trips.
const THREADS: usize = 32;
/// Blocks that are compared after a copy: half of them at the ends of ranges, half anywhere.
const SAMPLES: u64 = 1024;
/// The new file needs this part more than its bytes, for the server's file system: 1/256.
const MARGIN: u64 = 256;
const BLOCK: u64 = 4096;

/// What the new file contains.
#[derive(Debug)]
pub(super) struct Rewrite {
    file_bytes: u64,
    offset_bytes: u64,
    kept: Vec<Range<u64>>,
}

impl Rewrite {
    /// All of the file except `unneeded`, which are ranges of the volume.
    pub(super) fn new(
        file_bytes: u64,
        offset_bytes: u64,
        unneeded: impl Iterator<Item = Range<u64>>,
    ) -> Self {
        let mut unneeded: Vec<Range<u64>> = unneeded
            .map(|range| range.start + offset_bytes..range.end + offset_bytes)
            .collect();
        unneeded.sort_unstable_by_key(|range| range.start);
        let mut kept = Vec::new();
        let mut at = 0;
        for range in unneeded {
            if at < range.start {
                kept.push(at..range.start);
            }
            at = at.max(range.end);
        }
        if at < file_bytes {
            kept.push(at..file_bytes);
        }
        Self {
            file_bytes,
            offset_bytes,
            kept,
        }
    }

    pub(super) fn kept_bytes(&self) -> u64 {
        self.kept.iter().map(|range| range.end - range.start).sum()
    }

    /// The part of these bytes that lies behind the header. The header's 16 MiB are nearly all
    /// holes.
    pub(super) fn kept_behind_header_bytes(&self) -> u64 {
        let behind =
            |range: &Range<u64>| range.end.saturating_sub(range.start.max(self.offset_bytes));
        self.kept.iter().map(behind).sum()
    }

    /// The ranges behind the header, in groups. The lease is checked after each group.
    fn groups(&self) -> Vec<Vec<Range<u64>>> {
        let mut groups = vec![Vec::new()];
        let mut bytes = 0;
        for range in cut(&self.kept, GROUP_BYTES) {
            let range = range.start.max(self.offset_bytes)..range.end;
            if range.is_empty() {
                continue;
            }
            let len = range.end - range.start;
            let full = groups.last().is_some_and(|group: &Vec<_>| {
                bytes + len > GROUP_BYTES || group.len() >= GROUP_RANGES
            });
            if full {
                groups.push(Vec::new());
                bytes = 0;
            }
            bytes += len;
            if let Some(group) = groups.last_mut() {
                group.push(range);
            }
        }
        groups
    }
}

/// Cuts ranges into pieces that end at multiples of `max`.
fn cut(ranges: &[Range<u64>], max: u64) -> Vec<Range<u64>> {
    let mut pieces = Vec::new();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / max + 1) * max);
            pieces.push(at..end);
            at = end;
        }
    }
    pieces
}

/// Removes the files of earlier rewrites that did not complete.
pub(super) fn remove_leftover(lease: &ContainerLease) -> Result<(), Failure> {
    HalfMade::Rewritten
        .remove_all(&*lease.store(), lease.file_name())
        .map_err(|error| Failure::from(&error))?;
    Ok(())
}

/// Prevents a late rename, before a session that took over from a dead one opens the file. The dead
/// session's last request may have been the rename. Its server may carry that out late, over what
/// was written since. It can't without the source file.
pub(super) fn prevent_late_rename(lease: &ContainerLease) -> Result<(), Failure> {
    let store = lease.store();
    let removed = HalfMade::Rewritten.remove_all(&*store, lease.file_name())?;
    if removed.is_empty() {
        return Ok(());
    }
    store.try_flush_folder()?;
    Ok(())
}

/// Rewrites the container. The volume is closed: everything is durable and resolved.
pub(super) fn run(
    lease: &ContainerLease,
    stop: &StopFlag,
    rewrite: &Rewrite,
    through_client: bool,
) -> Result<TrimRoute, Failure> {
    let store = lease.store();
    remove_leftover(lease)?;
    check_room(&*store, rewrite)?;
    if !store.capabilities().atomic_replace {
        return Err(Failure::failed(format!(
            "{} can't replace a file in one step",
            store.describe()
        ))
        .with_hint("nothing was changed"));
    }
    stop.check()?;
    let new_name = HalfMade::Rewritten.name(lease.file_name())?;
    let made = make(lease, stop, rewrite, &new_name, through_client);
    let swapped = made.and_then(|route| swap(lease, stop, &new_name).map(|()| route));
    swapped.map_err(|failure| {
        let state = match remove_leftover(lease) {
            Ok(()) => "the container is as it was",
            Err(_) => {
                "the container is unchanged. The next trim removes the unfinished file beside it"
            }
        };
        match &failure.hint {
            Some(_) => failure.with_state(state),
            None => failure.with_hint(format!("{state}. Run the command again")),
        }
    })
}

fn check_room(store: &dyn Store, rewrite: &Rewrite) -> Result<(), Failure> {
    let needed = rewrite.kept_bytes() + rewrite.kept_bytes() / MARGIN;
    match store.free_space() {
        Ok(space) if space.available_bytes < needed => Err(Failure::failed(format!(
            "the server's disk has no space for a second, temporary copy of the container: it needs {}, \
             but only {} are free",
            text::bytes(needed),
            text::bytes(space.available_bytes)
        ))
        .with_hint(
            "nothing was changed. Free space on the server, or allow sprat to punch holes there (a \
             shell with fallocate)",
        )),
        _ => Ok(()),
    }
}

fn make(
    lease: &ContainerLease,
    stop: &StopFlag,
    rewrite: &Rewrite,
    new_name: &FileName,
    through_client: bool,
) -> Result<TrimRoute, Failure> {
    let store = lease.store();
    let old_name = lease.file_name();
    let old = store.open(old_name, Access::ReadOnly)?;
    if old.len()? != rewrite.file_bytes {
        return Err(Failure::new(
            Exit::Damaged,
            "the container's length changed while it was locked",
        ));
    }
    let new = store.create_new(new_name)?;
    store
        .copy_owner_and_mode(old_name, new_name)
        .map_err(|error| Failure::from(&error).context("can't set the new file's owner"))?;
    new.resize(rewrite.file_bytes)?;
    // A local store has no server: the bytes pass through this machine anyway.
    let mut local = store.capabilities().discard;
    // The header's 16 MiB are nearly all holes, which the server would fill.
    let header = 0..rewrite.offset_bytes;
    copy_through(&*old, &*new, std::slice::from_ref(&header), stop)?;
    for group in rewrite.groups() {
        stop.check()?;
        // In addition to the check in `swap`: a session that lost its lease ends here already.
        lease.verify()?;
        if !through_client && !local {
            match store.copy_ranges(old_name, new_name, &group) {
                Ok(()) => continue,
                Err(error) if error.kind() == StoreErrorKind::Unsupported => {
                    return Err(Failure::from(&error).with_hint(
                        "with --through-client sprat copies the data through this machine (it is \
                         transferred twice)",
                    ));
                }
                Err(error) => return Err(Failure::from(&error)),
            }
        }
        local |= !through_client;
        copy_through(&*old, &*new, &group, stop)?;
    }
    new.flush()?;
    compare(&*old, &*new, rewrite, stop)?;
    Ok(match through_client {
        false if !local => TrimRoute::Rewrite,
        _ => TrimRoute::RewriteThroughClient,
    })
}

/// Copies everything that is not zero. Ciphertext is never zero, and holes stay holes.
fn copy_through(
    old: &dyn StoreFile,
    new: &dyn StoreFile,
    group: &[Range<u64>],
    stop: &StopFlag,
) -> Result<(), Failure> {
    in_threads(cut(group, CHUNK_BYTES), |range, buffer| {
        stop.check()?;
        let len = usize::try_from(range.end - range.start).unwrap_or_default();
        buffer.resize(len, 0);
        old.read_at(range.start, buffer, ReadClass::Ahead)?;
        let mut at = 0;
        while at < len {
            let is_zero = |at: usize| {
                let end = len.min(at + 4096);
                buffer[at..end].iter().all(|byte| *byte == 0)
            };
            let zero = is_zero(at);
            let mut end = len.min(at + 4096);
            while end < len && is_zero(end) == zero {
                end = len.min(end + 4096);
            }
            if !zero {
                new.write_at(range.start + at as u64, &buffer[at..end])?;
            }
            at = end;
        }
        Ok(())
    })
}

/// Reads back all of the header, and sample blocks all over the rest.
fn compare(
    old: &dyn StoreFile,
    new: &dyn StoreFile,
    rewrite: &Rewrite,
    stop: &StopFlag,
) -> Result<(), Failure> {
    if new.len()? != rewrite.file_bytes {
        return Err(different(rewrite.file_bytes));
    }
    let mut ranges = samples(&rewrite.kept);
    ranges.push(0..CHUNK_BYTES.min(rewrite.file_bytes));
    in_threads(ranges, |range, buffer| {
        stop.check()?;
        let len = usize::try_from(range.end - range.start).unwrap_or_default();
        buffer.resize(2 * len, 0);
        let (was, is) = buffer.split_at_mut(len);
        old.read_at(range.start, was, ReadClass::Ahead)?;
        new.read_at(range.start, is, ReadClass::Ahead)?;
        if was == is {
            Ok(())
        } else {
            Err(different(range.start))
        }
    })
}

fn different(at: u64) -> Failure {
    Failure::new(
        Exit::Damaged,
        format!("the copy on the server differs from the container at {at}"),
    )
    .with_hint("check the server's disk")
}

/// The first and last blocks of ranges all over the file, and blocks from within them.
fn samples(kept: &[Range<u64>]) -> Vec<Range<u64>> {
    let block = |at: u64, range: &Range<u64>| {
        let start = (at / BLOCK * BLOCK).max(range.start);
        start..(start + BLOCK).min(range.end)
    };
    let step = (kept.len() as u64 / (SAMPLES / 4)).max(1);
    let mut found: Vec<Range<u64>> = Vec::new();
    for range in kept.iter().step_by(usize::try_from(step).unwrap_or(1)) {
        found.push(block(range.start, range));
        found.push(block(range.end - 1, range));
    }
    let total: u64 = kept.iter().map(|range| range.end - range.start).sum();
    let step = (total / (SAMPLES / 2)).max(BLOCK);
    // Where the next sample lies, counted in kept bytes. The step is not round on purpose.
    let (mut next, mut passed) = (step / 3, 0);
    for range in kept {
        let len = range.end - range.start;
        while next < passed + len {
            found.push(block(range.start + (next - passed), range));
            next += step;
        }
        passed += len;
    }
    found
}

/// Calls `work` for each range, several at a time. The first failure ends it.
fn in_threads(
    ranges: Vec<Range<u64>>,
    work: impl Fn(Range<u64>, &mut Vec<u8>) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let ranges = Mutex::new(ranges.into_iter());
    let over = AtomicBool::new(false);
    let run = || {
        let mut buffer = Vec::new();
        loop {
            let next = ranges.lock().ignore_poison().next();
            let Some(range) = next.filter(|_| !over.load(Ordering::SeqCst)) else {
                return Ok(());
            };
            if let Err(failure) = work(range, &mut buffer) {
                over.store(true, Ordering::SeqCst);
                return Err(failure);
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(run)).collect();
        let mut outcome = Ok(());
        for thread in threads {
            let ended = thread
                .join()
                .unwrap_or_else(|_| Err(Failure::failed("a thread ended by a panic")));
            outcome = outcome.and(ended);
        }
        outcome
    })
}

/// Gives the new file the container's name, if it is the same container and still ours.
pub(super) fn swap(
    lease: &ContainerLease,
    stop: &StopFlag,
    new_name: &FileName,
) -> Result<(), Failure> {
    let store = lease.store();
    let new = store.open(new_name, Access::ReadOnly)?;
    let header = Header::load(&HeaderBytes(&*new))?;
    lease.check_known(&header)?;
    drop(new);
    stop.check()?;
    lease.verify()?;
    // If the answer is lost, the server may rename late, over a container that another session has
    // begun to write. The record makes that session wait. The first block stands for the rename, as
    // it is no part of the volume.
    lease
        .before_send(std::slice::from_ref(&(0..BLOCK)))
        .map_err(|fenced| Failure::failed(fenced.to_string()))?;
    let renamed = store.rename(new_name, lease.file_name());
    if let Err(error) = &renamed
        && error.was_answered()
    {
        lease.all_resolved()?;
    }
    renamed?;
    check_renamed(&*store, new_name, lease)?;
    store.try_flush_folder()?;
    lease.all_resolved()?;
    Ok(())
}

/// Checks that the rename took place. A server may only answer that it renamed.
fn check_renamed(
    store: &dyn Store,
    new_name: &FileName,
    lease: &ContainerLease,
) -> Result<(), Failure> {
    match store.stat(new_name) {
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => {
            lease.all_resolved()?;
            Err(Failure::new(
                Exit::Damaged,
                format!(
                    "the server confirmed that the rewritten file replaced {}, but did not do it",
                    lease.file_name()
                ),
            )
            .with_hint("The server is not reliable: check its disk and its software"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewrite_keeps_all_needed_ranges() {
        let rewrite = Rewrite::new(
            100_000,
            4096,
            [8192..12288, 0..4096, 4096..8192].into_iter(),
        );
        assert_eq!(rewrite.kept, [0..4096, 16384..100_000]);
        assert_eq!(rewrite.kept_bytes(), 4096 + 83_616);
        let all = Rewrite::new(8192, 4096, std::iter::once(0..1 << 40));
        assert_eq!(all.kept, std::slice::from_ref(&(0..4096)));
    }

    #[test]
    fn groups_contain_every_byte_once_and_are_bounded() {
        let unneeded = (0..20_000).map(|n| n * 8192..n * 8192 + 4096);
        let rewrite = Rewrite::new(5 << 30, 16 << 20, unneeded);
        let groups = rewrite.groups();
        assert!(groups.iter().all(|group| group.len() <= GROUP_RANGES));
        let bytes = |group: &Vec<Range<u64>>| -> u64 {
            group.iter().map(|range| range.end - range.start).sum()
        };
        assert!(groups.iter().all(|group| bytes(group) <= GROUP_BYTES));
        let sum: u64 = groups.iter().map(bytes).sum();
        assert_eq!(sum, rewrite.kept_bytes() - (16 << 20));
    }

    #[test]
    fn samples_lie_in_kept_ranges_and_are_bounded() {
        let unneeded = (0..300_000_u64).map(|n| n * 12288..n * 12288 + 4096);
        let rewrite = Rewrite::new(5 << 30, 16 << 20, unneeded);
        let found = samples(&rewrite.kept);
        assert!(found.len() as u64 <= 2 * SAMPLES, "{}", found.len());
        let inside = |sample: &Range<u64>| {
            let behind = rewrite
                .kept
                .partition_point(|range| range.end <= sample.start);
            rewrite.kept[behind].start <= sample.start && sample.end <= rewrite.kept[behind].end
        };
        assert!(found.iter().all(inside));
        assert!(!samples(std::slice::from_ref(&(0..1))).is_empty());
    }
}
