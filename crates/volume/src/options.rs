//! What a caller chooses when it opens a volume, and the counters it can watch.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use sprat_store::FileStat;

/// Bytes of one block: the unit of every offset and length of this crate's calls, and the size that
/// is never torn. It is the sector size of the containers that sprat creates, and ext4's block
/// size.
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

/// Where a container's persistent cache is stored on this machine, and how it is used.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// A folder for this container only; created if it is missing. It holds ciphertext.
    pub dir: PathBuf,
    /// Most bytes of blocks in the cache. Zero: the cache is not used; a session that may write
    /// still removes its clean marker, because the session outdates the cache.
    pub bytes_max: u64,
    /// The state of the container file, if the caller has read it already: after it got the lock,
    /// and before anything is written. `None`: the volume reads it.
    pub seen: Option<Seen>,
    /// Read everything from the store and compare it with the cache
    /// ([`Volume::differing_blocks`](crate::Volume::differing_blocks)).
    pub only_compare: bool,
    /// Offset in the device, in bytes, of the stamp block: the block that every session that writes
    /// changes. The cache is valid for one content of this block.
    pub stamp_offset_bytes: u64,
}

/// The state of a container file.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Attributes of the open file.
    pub stat: FileStat,
    /// The device's stamp block ([`CacheOptions::stamp_offset_bytes`]), as stored in the file.
    pub stamp_block: Vec<u8>,
    /// Blocks of the cache that were read after the lock was got, to be compared. `None`: the
    /// volume reads some.
    pub sample: Option<CacheSample>,
}

/// Blocks of a persistent cache, to be read together with the state of the container and compared
/// when the volume is opened.
#[derive(Debug, Clone)]
pub struct CacheSample {
    /// The digest of each block in the cache, by its number.
    pub(crate) digests: BTreeMap<u64, u64>,
    /// The blocks as the container has them, one after another.
    pub(crate) bytes: Vec<u8>,
}

/// Reports how many bytes per second may be sent now; `None`: as many as possible. It is asked for each write,
/// so it must answer at once.
#[derive(Clone)]
pub struct UploadRate(Arc<dyn Fn() -> Option<u64> + Send + Sync>);

impl UploadRate {
    /// A rate that `now` reports.
    pub fn new(now: impl Fn() -> Option<u64> + Send + Sync + 'static) -> Self {
        Self(Arc::new(now))
    }

    /// Bytes per second; `None`: no limit.
    pub(crate) fn now(&self) -> Option<u64> {
        (self.0)()
    }
}

impl fmt::Debug for UploadRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UploadRate")
    }
}

/// Limits and times of a writable volume.
#[derive(Debug, Clone)]
pub struct VolumeOptions {
    /// Most bytes of blocks that are kept until they are durable; beyond it writers wait. At least
    /// 8 blocks are always allowed.
    pub write_buffer_bytes_max: usize,
    /// Most bytes of unmodified blocks that are kept for reading.
    pub read_cache_bytes_max: usize,
    /// Most write requests on the wire at one time. Each has a thread of its own. Small requests
    /// need many of them to fill a slow connection.
    pub writers: usize,
    /// Most bytes of write requests on the wire at one time. They are copies, in addition to the
    /// buffer.
    pub in_flight_bytes_max: usize,
    /// Most read requests on the wire at one time. Each has a thread of its own and up to
    /// `run_bytes_max` of memory. At most half of them are read-ahead.
    pub readers: usize,
    /// Longest single write or read on the wire.
    pub run_bytes_max: usize,
    /// How far sequential reading is read ahead, at most; zero switches it off.
    pub read_ahead_bytes_max: usize,
    /// The open epoch is sent before it is sealed once it has this many unsent bytes.
    pub early_send_bytes_min: usize,
    /// A sealed epoch of at most this size, of which nothing was sent yet, is sent in one batch
    /// with its fsync. At most `early_send_bytes_min`; zero: never.
    pub batched_flush_bytes_max: usize,
    /// While the rest of an epoch is sent, answered writes are made durable once they reach this
    /// size; at most a quarter of the buffer. On a slow or unreliable connection this happens
    /// earlier.
    pub flush_behind_bytes_max: usize,
    /// Longest time without progress after a lost connection. Zero: the first loss ends the
    /// session.
    pub reconnect_max: Duration,
    /// First delay between two attempts to reconnect; it doubles up to 30 s, with jitter.
    pub reconnect_delay: Duration,
    /// How long after a loss the server's old process may still carry out a write that was under
    /// way.
    pub quiet_time: Duration,
    /// Byte ranges of the container file that are in doubt: a session that died had sent them, and
    /// did not see them durable. [`Volume::open`](crate::Volume::open) recovers them before it
    /// returns.
    pub in_doubt: Vec<Range<u64>>,
    /// The server's processes of that session can't write any more. If false,
    /// [`Volume::open`](crate::Volume::open) waits the quiet time first.
    pub old_server_dead: bool,
    /// No block of zeros is ever written, because only ciphertext is written. An in-doubt block
    /// that reads as zeros is then a hole and stays one: on a full disk there is no space to fill
    /// holes.
    pub zeros_are_holes: bool,
    /// From this byte on the device is a hole that was never written to, such as the part by which
    /// the file was just extended. It reads as zeros without a request. Default: no part.
    pub hole_from_bytes: u64,
    /// Send nothing before [`Volume::may_send`](crate::Volume::may_send), unless the writes exceed
    /// the buffer. Until then a durable flush only orders.
    pub hold_back: bool,
    /// How fast blocks may be sent; `None`: no limit.
    pub upload_rate: Option<UploadRate>,
    /// The persistent cache. `None` only if this container never has one.
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
            batched_flush_bytes_max: 4 << 20,
            flush_behind_bytes_max: 32 << 20,
            reconnect_max: Duration::from_secs(15 * 60),
            reconnect_delay: Duration::from_millis(500),
            quiet_time: Duration::from_secs(60),
            in_doubt: Vec::new(),
            old_server_dead: false,
            hole_from_bytes: u64::MAX,
            zeros_are_holes: false,
            hold_back: false,
            upload_rate: None,
            cache: None,
        }
    }
}

/// Limits and paths of a volume whose container is never written to.
#[derive(Debug, Clone)]
pub struct ReadOnlyOptions {
    /// Folder for the overlay file, which stores writes (a journal replay). The file is unlinked at
    /// once.
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
    /// As in [`VolumeOptions`]; the cache is read and not changed.
    pub cache: Option<CacheOptions>,
}

impl ReadOnlyOptions {
    /// The default limits with the overlay in `overlay_dir`: 1 GiB of overlay, the rest as in
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

/// Counters of a volume at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumeStats {
    /// Bytes accepted from above and not yet answered by the server (unsent or under way).
    pub dirty_bytes: u64,
    /// Bytes accepted from above and not yet known to be on the server's disk; includes
    /// `dirty_bytes`.
    pub unsynced_bytes: u64,
    /// The highest value that `unsynced_bytes` ever had.
    pub unsynced_bytes_peak: u64,
    /// Number of the epoch that new writes enter.
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
    /// Lost connections so far, failed flushes of the server included.
    pub losses: u64,
    /// When the connection was lost; `None` while it is up.
    pub reconnecting_since: Option<SystemTime>,
    /// Why the connection is down or could not be restored; `None` while it is up.
    pub lost_because: Option<String>,
    /// In-doubt blocks: the server's old process might still overwrite them, or they are not yet
    /// read back.
    pub in_doubt_blocks: u64,
    /// Blocks that were read from the persistent cache instead of the wire.
    pub cache_read_blocks: u64,
    /// Round-trip time of the smallest requests, smoothed.
    pub round_trip: Option<Duration>,
}
