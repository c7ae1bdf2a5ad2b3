//! Turns one remote file into a block device that acknowledges writes from memory and keeps their
//! order.
//!
//! Above: the FUSE edge and the volume process in `session`. Below: `store`.
//!
//! - Deciding, without I/O: `plan`, with `epoch` and `flush_window`.
//! - Writing: `send` sends runs, `batched_flush` small epochs with their fsync, `flush` makes them
//!   durable, `lock_checks` and `lock_checker` check the lock ahead. `coordinator` runs all of
//!   this, `engine` holds what the threads share, `close` ends a volume in order.
//! - Reading: `read` and `fetch`; `streams` and `readahead_window` decide what is read ahead, and
//!   how far.
//! - The persistent cache: `slots` decides which blocks it holds, `cache_file` stores them,
//!   `cache_keeper` fills it, `sample` compares some of it with the server, `known` reads what it
//!   has at once for a session that compares all of it.
//! - After a crash: `recover` rewrites what a session that died left in doubt. `proof` and
//!   `proof_check` detect a server that lost data it had reported as durable.
//! - Read-only: `overlay` stores the writes of a read-only volume.
//!
//! Always true:
//! - The store sees epoch n+1 only after every write of epoch n was answered and its fsync
//!   returned. So after any crash the file holds all epochs up to some k and a part of k+1.
//! - A write is kept in memory until it is durable. The bytes kept are bounded.
//! - At most one write per block is under way.
//! - A read returns the newest write, or what the store holds; never anything older.
//! - A write that was under way when a connection was lost is sent again first. Newer bytes for
//!   that block wait until the server's old process can't write any more. The block is read back
//!   before `close` succeeds.
//! - The persistent cache returns the bytes that the store would return, or none.
//! - After a failure nothing more is sent and every call fails. No call waits for ever.
#![forbid(unsafe_code)]

mod batched_flush;
mod cache;
mod cache_file;
mod cache_keeper;
mod close;
mod coordinator;
mod discard;
mod engine;
mod epoch;
mod error;
mod fetch;
mod flush;
mod flush_window;
mod hole;
mod known;
mod lock_checker;
mod lock_checks;
mod options;
mod overlay;
mod plan;
mod proof;
mod proof_check;
mod read;
mod read_cache;
mod readahead_window;
mod recover;
mod sample;
mod send;
mod session_hooks;
mod slots;
mod streams;
mod threads;
mod upload_limit;
mod volume;

pub use cache_file::remove_unused_caches;
pub use cache_keeper::ClosedCache;
pub use discard::Punch;
pub use error::VolumeError;
pub use options::{
    BLOCK_BYTES, CacheOptions, CacheSample, Flush, Geometry, ReadOnlyOptions, Seen, UploadRate,
    VolumeOptions, VolumeStats,
};
pub use session_hooks::{Cause, Fenced, ReconnectError, SessionHooks};
pub use volume::Volume;
