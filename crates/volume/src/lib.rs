//! Turns one remote file into a block device that acknowledges writes from memory and keeps order.
//!
//! Above: the FUSE edge and the volume process in `cli`. Below: `store`.
//!
//! `plan` decides, without I/O (of `epoch`s and `portion`s); `send`, `conduct` (`together`, where
//! an epoch is small), `permit` and `read` are the threads that carry it out, over what they share in `engine`; `fetch`, `streams` and `pace`
//! say what is read, and how far ahead. `cache` keeps blocks over sessions: `slots` says which,
//! `cache_file` where, `sample` compares some of them. `settle` takes over from a dead session, `overlay` takes the writes of a
//! read-only volume, `proof` finds out a server that lost what it had called durable.
//!
//! Always true:
//! - The store sees epoch n+1 only after every write of epoch n was answered and its fsync
//!   returned; so whatever dies, the file is all epochs up to some k and a part of k+1.
//! - A write is kept in memory until it is durable, and these bytes are bounded.
//! - At most one write per block is under way.
//! - A read returns the newest write, or what the store holds; never anything older.
//! - What was under way when a line was lost is sent again first, newer bytes for it wait until the
//!   server's old process can't write any more, and it is read back before `close` succeeds.
//! - The persistent cache gives the bytes that the store would give, or none.
//! - After a failure nothing more is sent and every call fails; nobody waits for ever.
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
mod session;
mod slots;
mod streams;
mod threads;
mod volume;

pub use cache_file::remove_unused_caches;
pub use discard::Punch;
pub use error::VolumeError;
pub use options::{
    BLOCK_BYTES, CacheOptions, Flush, Geometry, ReadOnlyOptions, Seen, VolumeOptions, VolumeStats,
};
pub use session::{Cause, Fenced, ReconnectError, Session};
pub use volume::Volume;
