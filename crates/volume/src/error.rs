//! Errors of a volume's calls.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use sprat_store::StoreError;

use crate::session_hooks::{Cause, Fenced};

/// A call on a volume failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "every field is named in its variant's message")]
pub enum VolumeError {
    /// Offset or length is not a multiple of the block size; nothing was done.
    #[error("{op} of {len} bytes at {offset} is not aligned to 4096 bytes")]
    Unaligned {
        op: &'static str,
        offset: u64,
        len: u64,
    },
    /// The range ends beyond the device; nothing was done.
    #[error("{op} of {len} bytes at {offset} reaches beyond the volume's {volume_bytes} bytes")]
    OutOfRange {
        op: &'static str,
        offset: u64,
        len: u64,
        volume_bytes: u64,
    },
    /// The geometry is empty or not aligned.
    #[error("a volume can't lie at {offset_bytes} with {len_bytes} bytes")]
    Geometry { offset_bytes: u64, len_bytes: u64 },
    /// The container file is shorter than its device.
    #[error("the container file has {file_bytes} bytes but its volume ends at {needed_bytes}")]
    Short { file_bytes: u64, needed_bytes: u64 },
    /// The lock was lost.
    #[error("stopped before sending more")]
    Fenced(#[source] Fenced),
    /// The server's disk or quota is full.
    #[error("the server's disk is full")]
    NoSpace(#[source] StoreError),
    /// The connection was lost and could not be restored in time.
    #[error("connection lost, and not restored in {} s", waited.as_secs())]
    ConnectionLost {
        waited: Duration,
        #[source]
        source: StoreError,
    },
    /// Reconnecting failed with an error that another attempt can't change.
    #[error("connection lost, and reconnecting refused")]
    NotReconnected(#[source] Cause),
    /// The store failed, and retrying does not help.
    #[error("{op} failed in the store")]
    Store {
        op: &'static str,
        #[source]
        source: StoreError,
    },
    /// A durable block holds other bytes than were written. Another program writes to the
    /// container, or a server's old process wrote after the quiet time.
    #[error("another program changed the container file at {offset}")]
    ForeignWrite { offset: u64 },
    /// A block that the server had reported as durable holds other bytes: the server was reset to
    /// an older state, or never stored the block.
    #[error("the server lost data that it had reported as durable, at {offset}")]
    LostDurable { offset: u64 },
    /// A block of the container differs from the persistent cache of the same state. Nothing was
    /// sent, and the cache was dropped.
    #[error("the container differs at {offset} from the data that this machine wrote")]
    CacheDiffers { offset: u64 },
    /// The local overlay of a read-only volume failed.
    #[error("{op} on the local overlay failed")]
    Overlay {
        op: &'static str,
        #[source]
        source: io::Error,
    },
    /// The local overlay of a read-only volume is full.
    #[error("the local overlay of {bytes_max} bytes is full")]
    OverlayFull { bytes_max: u64 },
    /// A read failed in the store; others may still succeed. Only on read-only volumes.
    #[error("read failed in the store")]
    ReadFailed(#[source] Arc<StoreError>),
    /// The persistent cache could not be marked as outdated.
    #[error("can't {op} the local cache")]
    Cache {
        op: &'static str,
        #[source]
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("can't start a thread")]
    Thread(#[source] io::Error),
    /// Discard needs a store that supports it, and no waiting writes.
    #[error("discard is not possible: {reason}")]
    Discard { reason: &'static str },
    /// A thread of the volume panicked: a bug in sprat.
    #[error("a thread of the volume ended by a panic; this is a defect of sprat")]
    Bug,
    /// [`Volume::abort`](crate::Volume::abort) was called.
    #[error("the session was aborted")]
    Aborted,
    /// [`Volume::close`](crate::Volume::close) was called.
    #[error("the volume is closed")]
    Closed,
    /// The volume failed earlier; every call fails until it is opened again.
    #[error("the volume failed earlier")]
    Failed(#[source] Arc<VolumeError>),
}
