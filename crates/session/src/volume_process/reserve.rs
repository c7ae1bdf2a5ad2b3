//! The reserve beside a container: space that a session frees if a full disk would stop even
//! pruning, and allocates again once there is space.
//!
//! Deleting needs space, too: 512 bytes for the lease, and blocks of the file system's journal that
//! were never written. There are at most as many of those as the journal has blocks, and mkfs makes
//! a journal of half the reserve. The file is random bytes, so that no compression on the server
//! makes it smaller.

use std::sync::Arc;

use sprat_store::{FileName, Store, StoreErrorKind, StoreFile};

use crate::Failure;
use crate::protocol::messages::VolumeStart;
use crate::protocol::reports::Notice;
use crate::settings::Access;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::EventSender;

/// The reserve is made only if so many times its size is free. It must not be the file that fills a
/// disk.
pub const FREE_TIMES: u64 = 4;
const PIECE_BYTES: usize = 252 << 10;
const WRITERS: usize = 8;

/// The reserve's name beside `container`.
pub fn name(container: &FileName) -> Result<FileName, Failure> {
    container
        .with_suffix(".reserve")
        .map_err(|error| Failure::usage(format!("{error}")))
}

/// Frees the reserve if less than its size is free and this session may use it. The key has opened
/// the container, and the lease is ours or can't be had without this. No other condition is enough.
pub(super) fn give_up(
    start: &VolumeStart,
    store: &dyn Store,
    available_bytes: Option<u64>,
    events: &EventSender,
) -> Result<(), Failure> {
    // If a server does not report its free space, only an attempt shows it.
    if available_bytes.is_none_or(|bytes| bytes >= start.settings.reserve_bytes) {
        return Ok(());
    }
    remove(start, store, events).map(|_| ())
}

/// Removes the reserve if this session may do so. False: it may not, or there is no reserve.
pub(super) fn remove(
    start: &VolumeStart,
    store: &dyn Store,
    events: &EventSender,
) -> Result<bool, Failure> {
    if !start.settings.may_use_reserve || start.settings.access != Access::ReadWrite {
        return Ok(false);
    }
    let removed = store.remove_if_there(&name(&start.settings.target.name)?)?;
    if removed {
        events.notice(Notice::ReserveGivenUp);
    }
    Ok(removed)
}

/// Whether the complete reserve is there. Also false if the server does not answer.
pub(super) fn is_there(bytes: u64, lease: &ContainerLease) -> bool {
    let there = || lease.store().stat(&name(lease.container()).ok()?).ok();
    there().is_some_and(|stat| stat.len >= bytes)
}

/// Makes the reserve if there is space. The session is over by then: everything is durable, the
/// lease is released, and success was reported. So this may be killed at any moment, and a failure
/// is ignored: the next session tries again. Another session may make the reserve at the same time;
/// only one of them creates the file.
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
        // A session that died while it made the reserve has left this file.
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
    // Several writes at a time: on a slow connection each of them waits for its answer.
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

/// Writes every [`WRITERS`]th piece, from number `first` on.
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
