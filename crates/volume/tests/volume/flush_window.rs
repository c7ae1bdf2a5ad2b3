//! Long epochs: they become durable in parts while they are sent, even on connections that break
//! again and again.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{BLOCK, LIMIT, TestSession, geometry, stamped, tiny};
use sprat_store::{FileStat, ReadClass, StoreError, StoreFile};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::watchdog::within;
use sprat_volume::{Fenced, Flush, ReconnectError, SessionHooks, Volume, VolumeOptions};

/// A connection that is lost after a given number of written bytes, each time again.
struct Flapping {
    session: Arc<TestSession>,
    disk: CrashDisk,
    bytes_max: usize,
}

impl Flapping {
    fn wrap(&self, below: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(FlappingFile {
            below,
            disk: self.disk.clone(),
            bytes: AtomicUsize::new(0),
            bytes_max: self.bytes_max,
        })
    }
}

impl SessionHooks for Flapping {
    fn before_epoch(&self) -> Result<(), Fenced> {
        self.session.before_epoch()
    }
    fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), Fenced> {
        self.session.before_send(ranges)
    }
    fn resolved(&self) {
        self.session.resolved();
    }
    fn resolved_in_part(&self, ranges: &[Range<u64>]) {
        self.session.resolved_in_part(ranges);
    }
    fn reconnect(&self, attempt: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        Ok(self.wrap(self.session.reconnect(attempt)?))
    }
}

struct FlappingFile {
    below: Arc<dyn StoreFile>,
    disk: CrashDisk,
    bytes: AtomicUsize,
    bytes_max: usize,
}

impl StoreFile for FlappingFile {
    fn len(&self) -> Result<u64, StoreError> {
        self.below.len()
    }
    fn stat(&self) -> Result<FileStat, StoreError> {
        self.below.stat()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.below.read_at(offset, buf, class)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let before = self.bytes.fetch_add(data.len(), Ordering::SeqCst);
        if before <= self.bytes_max && before + data.len() > self.bytes_max {
            self.disk.lose_lines();
        }
        self.below.write_at(offset, data)
    }
    fn flush(&self) -> Result<(), StoreError> {
        self.below.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.below.discard(offset, len)
    }
    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.below.resize(len)
    }
}

const BLOCKS: u64 = 4096;

/// One epoch of 16 MiB.
fn write_one_epoch(volume: &Volume) {
    for first in (0..BLOCKS).step_by(64) {
        let data: Vec<u8> = (first..first + 64).flat_map(stamped).collect();
        volume.write_at(first * BLOCK as u64, &data).unwrap();
    }
}

fn assert_on_disk(disk: &CrashDisk) {
    for (index, block) in (0..).zip(disk.durable().chunks_exact(BLOCK)) {
        assert!(block == stamped(index), "block {index}");
    }
}

fn roomy() -> VolumeOptions {
    VolumeOptions {
        write_buffer_bytes_max: 16 << 20,
        flush_behind_bytes_max: 4 << 20,
        run_bytes_max: 128 << 10,
        ..tiny()
    }
}

#[test]
fn epoch_completes_on_connections_that_carry_less_than_a_tenth() {
    within(LIMIT, || {
        let len = usize::try_from(BLOCKS).unwrap() * BLOCK;
        let disk = CrashDisk::new(len, 1, CrashOptions::default());
        let session = Arc::new(Flapping {
            session: TestSession::new(&disk),
            disk: disk.clone(),
            bytes_max: 3 << 19,
        });
        let file = session.wrap(session.session.connect());
        let volume = Volume::open(file, geometry(len), session.clone(), roomy()).unwrap();
        write_one_epoch(&volume);
        volume.flush(Flush::Durable).unwrap();
        assert_on_disk(&disk);
        volume.close().unwrap();
        assert!(
            volume.stats().losses >= 10,
            "the connection did break: {:?}",
            volume.stats()
        );
    });
}

#[test]
fn stream_without_a_flush_needs_little_memory_and_leaves_little_in_doubt() {
    within(LIMIT, || {
        let len = usize::try_from(BLOCKS).unwrap() * BLOCK;
        let delay_max = Duration::from_micros(100);
        let options = CrashOptions {
            delay_max,
            ..CrashOptions::default()
        };
        let disk = CrashDisk::new(len, 1, options);
        let session = TestSession::new(&disk);
        let buffer = 2 << 20;
        let options = VolumeOptions {
            write_buffer_bytes_max: buffer,
            ..roomy()
        };
        let volume =
            Volume::open(session.connect(), geometry(len), session.clone(), options).unwrap();
        write_one_epoch(&volume);
        let stats = volume.stats();
        assert_eq!(stats.open_epoch, 1, "no flush was called");
        assert!(stats.unsynced_bytes_peak <= buffer as u64, "{stats:?}");
        assert!(session.settlements_in_part.load(Ordering::SeqCst) > 0);
        // A takeover recovers no more than what was not durable.
        let in_doubt: u64 = session.in_doubt().iter().map(|it| it.end - it.start).sum();
        assert!(in_doubt <= 2 * buffer as u64, "{in_doubt} bytes of {len}");
        volume.close().unwrap();
        assert_on_disk(&disk);
    });
}
