//! The reserve beside a container: space that is given up where a full disk would keep even pruning
//! from working, and taken again once there is room.
//!
//! Deleting needs space, too: the lock's 512 bytes, and blocks of ext4's journal that were never
//! written, which are at most as many as the journal has (mkfs makes one of half the reserve). The
//! file is random bytes, so that no server's compression makes it smaller than it says.

use std::sync::Arc;

use sprat_store::{FileName, Store, StoreErrorKind, StoreFile};

use crate::Failure;
use crate::protocol::messages::VolumeStart;
use crate::settings::{Access, Notice};
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::EventSender;

/// The reserve is made only where so many times its size is free: it must not be what fills a disk.
pub const FREE_TIMES: u64 = 4;
const PIECE_BYTES: usize = 252 << 10;
const WRITERS: usize = 8;

/// The reserve's name beside `container`.
pub fn name(container: &FileName) -> Result<FileName, Failure> {
    container
        .with_suffix(".reserve")
        .map_err(|error| Failure::usage(format!("{error}")))
}

/// Gives the reserve up where less than its size is free and this session may use it. The key has
/// opened the container, and the lock is ours or can't be had without: nobody else's word does it.
pub(super) fn give_up(
    start: &VolumeStart,
    store: &dyn Store,
    available_bytes: Option<u64>,
    events: &EventSender,
) -> Result<(), Failure> {
    // A server that doesn't tell what is free is found out by trying.
    if available_bytes.is_none_or(|bytes| bytes >= start.reserve_bytes) {
        return Ok(());
    }
    remove(start, store, events).map(|_| ())
}

/// Removes the reserve, if this session may; false where it may not, or there is none.
pub(super) fn remove(
    start: &VolumeStart,
    store: &dyn Store,
    events: &EventSender,
) -> Result<bool, Failure> {
    if !start.may_use_reserve || start.access != Access::ReadWrite {
        return Ok(false);
    }
    let removed = store.remove_if_there(&name(&start.target.name)?)?;
    if removed {
        events.notice(Notice::ReserveGivenUp);
    }
    Ok(removed)
}

/// Whether the reserve lies there whole; false also where the server doesn't say.
pub(super) fn is_there(bytes: u64, lease: &ContainerLease) -> bool {
    let there = || lease.store().stat(&name(lease.container()).ok()?).ok();
    there().is_some_and(|stat| stat.len >= bytes)
}

/// Makes the reserve where there is room. The session is over by then: all is durable, the lock is
/// released, and success was reported. So this may be killed at any moment, and that it can't be made
/// is no failure; the next session tries again. Another session may make it at the same time: only
/// one of them creates the file.
pub(super) fn make_if_missing(bytes: u64, lease: &Arc<ContainerLease>) {
    if bytes > 0 {
        let _ = make(bytes, lease);
    }
}

fn make(bytes: u64, lease: &Arc<ContainerLease>) -> Result<(), Failure> {
    let store = lease.store();
    let name = name(lease.container())?;
    match store.stat(&name) {
        Ok(stat) if stat.len >= bytes => return Ok(()),
        // Left by a session that died while it made it.
        Ok(_) => store.remove(&name)?,
        Err(error) if error.kind() == StoreErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    if store.free_space()?.available_bytes < bytes.saturating_mul(FREE_TIMES) {
        return Ok(());
    }
    let file = store.create_new(&name)?;
    let made = fill(&*store, &*file, bytes);
    if made.is_err() {
        let _ = store.remove(&name);
    }
    made
}

fn fill(store: &dyn Store, file: &dyn StoreFile, bytes: u64) -> Result<(), Failure> {
    // Several at a time: a slow line would make each of them wait for its answer.
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|first| scope.spawn(move || fill_pieces(file, bytes, first)))
            .collect();
        writers
            .into_iter()
            .try_for_each(|writer| match writer.join() {
                Ok(done) => done,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })?;
    file.flush()?;
    store.try_flush_folder()?;
    Ok(())
}

/// Every [`WRITERS`]th piece, from number `first` on.
fn fill_pieces(file: &dyn StoreFile, bytes: u64, first: usize) -> Result<(), Failure> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut at = (first * PIECE_BYTES) as u64;
    while at < bytes {
        let len = usize::try_from(bytes - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        openssl::rand::rand_bytes(&mut piece[..len])
            .map_err(|error| Failure::failed("can't make random bytes").caused_by(&error))?;
        file.write_at(at, &piece[..len])?;
        at += (WRITERS * PIECE_BYTES) as u64;
    }
    Ok(())
}
