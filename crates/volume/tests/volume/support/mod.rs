//! Shared by the volume's tests: a session over a crashing disk, and stamped blocks.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod oracle;

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sprat_store::{StoreError, StoreFile};
use sprat_testkit::crash::CrashDisk;
use sprat_testkit::fault::{FaultFile, FaultPlan};
use sprat_testkit::wrapped::WrappedFile;
use sprat_volume::{
    Fenced, Geometry, ReconnectError, SessionHooks, Volume, VolumeError, VolumeOptions,
};

pub const BLOCK: usize = 4096;

/// The longest time for any one test body: a hang is a failure.
pub const LIMIT: Duration = Duration::from_secs(100);

/// What a test makes of each connection's file.
pub type Wrap = dyn Fn(Arc<dyn StoreFile>) -> Arc<dyn StoreFile> + Send + Sync;

/// A session over a [`CrashDisk`] that checks what the volume promises to it.
pub struct TestSession {
    disk: CrashDisk,
    faults: Option<Arc<FaultPlan>>,
    wrap: Option<Box<Wrap>>,
    noted: Arc<Mutex<BTreeSet<u64>>>,
    pub lock_checks: AtomicU64,
    pub reconnects: AtomicU64,
    pub settlements: AtomicU64,
    pub settlements_in_part: AtomicU64,
    pub fenced: AtomicBool,
    /// The lock was lost while a write waited for the connection.
    pub lost_while_waiting: AtomicBool,
    pub unreachable: AtomicBool,
    pub server_dead: AtomicBool,
}

impl TestSession {
    pub fn new(disk: &CrashDisk) -> Arc<Self> {
        Self::with_faults(disk, None)
    }

    pub fn with_faults(disk: &CrashDisk, faults: Option<Arc<FaultPlan>>) -> Arc<Self> {
        Self::with(disk, faults, None)
    }

    /// A session that wraps the file of each connection.
    pub fn wrapping(
        disk: &CrashDisk,
        wrap: impl Fn(Arc<dyn StoreFile>) -> Arc<dyn StoreFile> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Self::with(disk, None, Some(Box::new(wrap)))
    }

    fn with(
        disk: &CrashDisk,
        faults: Option<Arc<FaultPlan>>,
        wrap: Option<Box<Wrap>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            disk: disk.clone(),
            faults,
            wrap,
            noted: Arc::default(),
            lock_checks: AtomicU64::new(0),
            reconnects: AtomicU64::new(0),
            settlements: AtomicU64::new(0),
            settlements_in_part: AtomicU64::new(0),
            fenced: AtomicBool::new(false),
            lost_while_waiting: AtomicBool::new(false),
            unreachable: AtomicBool::new(false),
            server_dead: AtomicBool::new(false),
        })
    }

    pub fn connect(&self) -> Arc<dyn StoreFile> {
        let below = self.disk.connect();
        let below = match &self.faults {
            Some(plan) => Arc::new(FaultFile::new(below, plan.clone())),
            None => below,
        };
        let noted = self.noted.clone();
        let checked = WrappedFile::new(below).on_write(move |below, offset, data| {
            let first = offset / BLOCK as u64;
            let mut blocks = first..first + (data.len() / BLOCK) as u64;
            {
                let noted = noted.lock().unwrap();
                assert!(
                    blocks.all(|block| noted.contains(&block)),
                    "{} bytes at {offset} are not noted",
                    data.len()
                );
            }
            below.write_at(offset, data)
        });
        match &self.wrap {
            Some(wrap) => wrap(Arc::new(checked)),
            None => Arc::new(checked),
        }
    }

    /// The byte ranges that were recorded and not resolved since.
    pub fn in_doubt(&self) -> Vec<Range<u64>> {
        let block = BLOCK as u64;
        self.noted
            .lock()
            .unwrap()
            .iter()
            .map(|at| at * block..(at + 1) * block)
            .collect()
    }
}

impl SessionHooks for TestSession {
    fn before_epoch(&self) -> Result<(), Fenced> {
        self.lock_checks.fetch_add(1, Ordering::SeqCst);
        if self.fenced.load(Ordering::SeqCst) {
            return Err(Fenced::Lost("the lock is another's".into()));
        }
        Ok(())
    }

    fn may_send(&self) -> bool {
        !self.lost_while_waiting.load(Ordering::SeqCst)
    }

    fn check_to_send(&self, _: u32) -> Result<(), Fenced> {
        Err(Fenced::Lost("the lock is another's".into()))
    }

    fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), Fenced> {
        let mut noted = self.noted.lock().unwrap();
        for range in ranges {
            noted.extend(range.start / BLOCK as u64..range.end / BLOCK as u64);
        }
        Ok(())
    }

    fn resolved(&self) {
        self.settlements.fetch_add(1, Ordering::SeqCst);
        self.noted.lock().unwrap().clear();
    }

    fn resolved_in_part(&self, ranges: &[Range<u64>]) {
        self.settlements_in_part.fetch_add(1, Ordering::SeqCst);
        let mut noted = self.noted.lock().unwrap();
        for range in ranges {
            for block in range.start / BLOCK as u64..range.end / BLOCK as u64 {
                noted.remove(&block);
            }
        }
    }

    fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        if self.unreachable.load(Ordering::SeqCst) {
            let (host, reason) = ("test".to_owned(), "refused".to_owned());
            return Err(ReconnectError::Retry(StoreError::Unreachable {
                host,
                reason,
            }));
        }
        self.reconnects.fetch_add(1, Ordering::SeqCst);
        Ok(self.connect())
    }

    fn old_server_dead(&self) -> bool {
        self.server_dead.load(Ordering::SeqCst)
    }
}

/// A block that contains, in every word, the number of the write it comes from.
pub fn stamped(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(BLOCK / 8)
}

/// The stamp of a block; panics if the block has more than one.
pub fn stamp_of(block: &[u8]) -> u64 {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let stamp = word(&block[..8]);
    assert!(
        block.chunks_exact(8).all(|bytes| word(bytes) == stamp),
        "a block is torn"
    );
    stamp
}

pub fn geometry(len: usize) -> Geometry {
    Geometry {
        offset_bytes: 0,
        len_bytes: len as u64,
    }
}

/// The same, but most epochs wait until they are sealed and are sent in one batch with their fsync.
pub fn batching() -> VolumeOptions {
    VolumeOptions {
        early_send_bytes_min: 8 * BLOCK,
        batched_flush_bytes_max: 8 * BLOCK,
        ..tiny()
    }
}

/// One or the other.
pub fn by_seed(seed: u64) -> VolumeOptions {
    if (seed / 4).is_multiple_of(2) {
        tiny()
    } else {
        batching()
    }
}

/// Tiny limits: an ordinary journal transaction is larger than this buffer.
pub fn tiny() -> VolumeOptions {
    VolumeOptions {
        write_buffer_bytes_max: 16 * BLOCK,
        read_cache_bytes_max: 32 * BLOCK,
        writers: 4,
        readers: 2,
        run_bytes_max: 4 * BLOCK,
        read_ahead_bytes_max: 16 * BLOCK,
        early_send_bytes_min: 2 * BLOCK,
        batched_flush_bytes_max: 2 * BLOCK,
        flush_behind_bytes_max: 4 * BLOCK,
        reconnect_max: Duration::from_secs(20),
        reconnect_delay: Duration::from_millis(1),
        quiet_time: Duration::from_millis(20),
        ..VolumeOptions::default()
    }
}

/// The offset of a block.
pub fn at(block: usize) -> u64 {
    (block * BLOCK) as u64
}

/// The stamp of a block.
pub fn read_stamp(volume: &Volume, block: usize) -> Result<u64, VolumeError> {
    let mut found = vec![0; BLOCK];
    volume.read_at(at(block), &mut found)?;
    Ok(stamp_of(&found))
}
