//! What a caller chooses when it opens a volume, and what it can watch.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use sprat_store::FileStat;

/// Bytes of one block: the unit of every offset and length at this edge, and the size that is
/// never torn. It is the sector size of the containers that sprat makes and ext4's block size.
pub const BLOCK_BYTES: usize = 4096;

/// Where the device lies in the container file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// First byte of the device in the container file; a multiple of [`BLOCK_BYTES`].
    pub offset_bytes: u64,
    /// Length of the device; a multiple of [`BLOCK_BYTES`], not zero.
    pub len_bytes: u64,
}

/// How far a flush goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// Everything written before is ordered before everything written after; returns at once.
    Ordered,
    /// As `Ordered`, and returns only when everything written before is on the server's disk.
    Durable,
}

/// Where a container's persistent cache lies on this machine.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// A folder of this container's own; made where it is missing. What lies in it is ciphertext.
    pub dir: PathBuf,
    /// Most bytes of blocks in it. Zero: nothing of it is used, but a session that may write
    /// still takes its mark away, as it outdates it.
    pub bytes_max: u64,
    /// What the caller has seen of the container file since nobody else may write to it and before
    /// anything is written; `None`: it is asked for.
    pub seen: Option<Seen>,
    /// Read everything from the store, and compare it with the cache
    /// ([`Volume::differing_blocks`](crate::Volume::differing_blocks)).
    pub only_compare: bool,
}

/// The state of a container file.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Of the open file.
    pub stat: FileStat,
    /// The device's first block, as it lies there.
    pub first_block: Vec<u8>,
}

/// Limits and times of a volume that is written to.
#[derive(Debug, Clone)]
pub struct VolumeOptions {
    /// Most bytes of blocks that are kept until they are durable; writers wait beyond it. At
    /// least 8 blocks are always allowed.
    pub write_buffer_bytes_max: usize,
    /// Most bytes of clean blocks kept for reading.
    pub read_cache_bytes_max: usize,
    /// Write requests on the wire at one time, each with a thread of its own: small requests need
    /// many of them to fill a slow line.
    pub writers: usize,
    /// Bytes of write requests on the wire at one time; they are copies, held besides the buffer.
    pub in_flight_bytes_max: usize,
    /// Read requests on the wire at one time, each with a thread of its own and up to
    /// `run_bytes_max` of memory; at most half of them are read-ahead.
    pub readers: usize,
    /// Longest single write or read on the wire.
    pub run_bytes_max: usize,
    /// Furthest that sequential reading is run ahead of; zero switches it off.
    pub read_ahead_bytes_max: usize,
    /// The open epoch is sent before it is sealed once this many unsent bytes lie in it.
    pub early_send_bytes_min: usize,
    /// A sealed epoch of at most this much, of which nothing was sent yet, goes out together with its
    /// fsync; at most `early_send_bytes_min`. Zero: never.
    pub together_bytes_max: usize,
    /// While more of an epoch is sent, what was answered is made durable once it is this much, at
    /// most a quarter of the buffer; sooner on a line that is slow or breaks.
    pub flush_behind_bytes_max: usize,
    /// Longest time without progress after a lost line; zero: the first loss ends the session.
    pub reconnect_max: Duration,
    /// First delay between two attempts to reconnect; it doubles up to 30 s, with jitter.
    pub reconnect_delay: Duration,
    /// How long a server's old process may write late what was under way at a loss.
    pub quiet_time: Duration,
    /// Byte ranges of the container file that a dead session had sent and not seen durable.
    /// [`Volume::open`](crate::Volume::open) settles them before it returns.
    pub suspects: Vec<Range<u64>>,
    /// The server's processes of that session can't write any more; else
    /// [`Volume::open`](crate::Volume::open) waits the quiet time first.
    pub suspects_quiet: bool,
    /// No block of zeros is ever written, for what is written is ciphertext: a suspect that reads as
    /// zeros is a hole, and stays one. On a full disk there is no room to fill holes.
    pub zeros_are_holes: bool,
    /// The device from this byte on is a hole that nobody has written to, such as the part by which the
    /// file was just made longer: it reads as zeros without a look. Default: none of it.
    pub hole_from_bytes: u64,
    /// Nothing that is written from above is sent before
    /// [`Volume::may_send`](crate::Volume::may_send), unless it is more than the buffer takes; until
    /// then a durable flush only orders.
    pub hold_back: bool,
    /// The persistent cache; `None` only where there never is one for this container.
    pub cache: Option<CacheOptions>,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        Self {
            write_buffer_bytes_max: 128 << 20,
            read_cache_bytes_max: 64 << 20,
            writers: 64,
            in_flight_bytes_max: 16 << 20,
            readers: 16,
            run_bytes_max: 1 << 20,
            read_ahead_bytes_max: 8 << 20,
            early_send_bytes_min: 4 << 20,
            together_bytes_max: 4 << 20,
            flush_behind_bytes_max: 32 << 20,
            reconnect_max: Duration::from_secs(15 * 60),
            reconnect_delay: Duration::from_millis(500),
            quiet_time: Duration::from_secs(60),
            suspects: Vec::new(),
            suspects_quiet: false,
            hole_from_bytes: u64::MAX,
            zeros_are_holes: false,
            hold_back: false,
            cache: None,
        }
    }
}

/// Limits and places of a volume whose container is never written to.
#[derive(Debug, Clone)]
pub struct ReadOnlyOptions {
    /// Folder for the overlay file that takes writes (a journal replay); it is unlinked at once.
    pub overlay_dir: PathBuf,
    /// Most bytes of the overlay; a write beyond it fails.
    pub overlay_bytes_max: u64,
    /// As in [`VolumeOptions`].
    pub read_cache_bytes_max: usize,
    /// As in [`VolumeOptions`].
    pub readers: usize,
    /// As in [`VolumeOptions`].
    pub read_ahead_bytes_max: usize,
    /// As in [`VolumeOptions`].
    pub reconnect_max: Duration,
    /// As in [`VolumeOptions`].
    pub reconnect_delay: Duration,
    /// As in [`VolumeOptions`]; it is read, and nothing of it is changed.
    pub cache: Option<CacheOptions>,
}

impl ReadOnlyOptions {
    /// The usual limits with the overlay in `overlay_dir`: 1 GiB of overlay, else as
    /// [`VolumeOptions::default`].
    #[must_use]
    pub fn new(overlay_dir: PathBuf) -> Self {
        let usual = VolumeOptions::default();
        Self {
            overlay_dir,
            overlay_bytes_max: 1 << 30,
            read_cache_bytes_max: usual.read_cache_bytes_max,
            readers: usual.readers,
            read_ahead_bytes_max: usual.read_ahead_bytes_max,
            reconnect_max: usual.reconnect_max,
            reconnect_delay: usual.reconnect_delay,
            cache: None,
        }
    }
}

/// What a volume has done and holds at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumeStats {
    /// Bytes accepted from above and not yet answered by the server (unsent or under way).
    pub dirty_bytes: u64,
    /// Bytes accepted from above and not yet known to be on the server's disk; includes
    /// `dirty_bytes`.
    pub unsynced_bytes: u64,
    /// Most bytes ever held for writing at one time.
    pub unsynced_bytes_peak: u64,
    /// Number of the epoch that takes writes now.
    pub open_epoch: u64,
    /// Highest epoch number that is durable together with all before it.
    pub durable_epoch: u64,
    /// Bytes of answered writes.
    pub wire_written_bytes: u64,
    /// Answered write requests.
    pub wire_write_requests: u64,
    /// Bytes of answered reads, read-ahead included.
    pub wire_read_bytes: u64,
    /// Answered read requests, read-ahead included.
    pub wire_read_requests: u64,
    /// Flushes answered by the server.
    pub wire_flushes: u64,
    /// Lost connections so far, refused server flushes included.
    pub losses: u64,
    /// Since when the line has been down; `None` while it is up.
    pub reconnecting_since: Option<SystemTime>,
    /// Why the connection is down, or could not be made again; `None` while it is up.
    pub lost_because: Option<String>,
    /// Blocks that a server's old process might still overwrite, or that are not yet read back.
    pub suspect_blocks: u64,
    /// Blocks that were read from the persistent cache instead of the wire.
    pub cache_read_blocks: u64,
    /// Smoothed time of the smallest requests.
    pub round_trip: Option<Duration>,
}
