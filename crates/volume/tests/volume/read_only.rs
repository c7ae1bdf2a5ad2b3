//! Read-only volumes: the overlay, lost connections, and a disk with unreadable blocks.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::{BLOCK, LIMIT, TestSession, at, geometry, read_stamp, stamp_of, stamped};
use sprat_store::{Access, FileName, FileStat, ReadClass, Store, StoreError, StoreFile};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::dice::Dice;
use sprat_testkit::memory::MemoryStore;
use sprat_testkit::watchdog::within;
use sprat_testkit::wrapped::WrappedFile;
use sprat_volume::{
    Fenced, Flush, ReadOnlyOptions, ReconnectError, SessionHooks, Volume, VolumeError,
};

const LEN: usize = 64 * BLOCK;

fn kind_disk() -> CrashDisk {
    CrashDisk::new(LEN, 1, CrashOptions::default())
}

fn read_only(overlay_blocks: u64) -> (Arc<dyn StoreFile>, Volume, tempfile::TempDir) {
    let store = MemoryStore::new();
    let name = FileName::new("x.luks").unwrap();
    let file = store.create_new(&name).unwrap();
    file.write_at(0, &stamped(7).repeat(64)).unwrap();
    let session = TestSession::new(&kind_disk());
    let dir = tempfile::tempdir().unwrap();
    let options = ReadOnlyOptions {
        overlay_bytes_max: overlay_blocks * BLOCK as u64,
        ..ReadOnlyOptions::new(dir.path().to_owned())
    };
    let below = store.open(&name, Access::ReadOnly).unwrap();
    let volume = Volume::open_read_only(below, geometry(LEN), session, options).unwrap();
    (file, volume, dir)
}

#[test]
fn read_only_volume_never_writes_to_the_store() {
    within(LIMIT, || {
        let (file, volume, dir) = read_only(8);
        volume
            .write_at(at(3), &[stamped(1), stamped(2)].concat())
            .unwrap();
        volume.write_at(at(4), &stamped(3)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        let mut found = vec![0; 8 * BLOCK];
        volume.read_at(at(0), &mut found).unwrap();
        let stamps: Vec<u64> = found.chunks_exact(BLOCK).map(stamp_of).collect();
        assert_eq!(stamps, [7, 7, 7, 1, 3, 7, 7, 7]);
        assert_eq!(
            std::fs::read_dir(dir.path()).unwrap().count(),
            0,
            "the overlay has no name"
        );
        volume.close().unwrap();
        let mut below = vec![0; LEN];
        file.read_at(0, &mut below, ReadClass::Demand).unwrap();
        assert_eq!(below, stamped(7).repeat(64));
        assert_eq!(volume.stats().wire_write_requests, 0);
    });
}

#[test]
fn overlay_of_a_read_only_volume_is_bounded() {
    within(LIMIT, || {
        let (_, volume, _dir) = read_only(4);
        for block in 0..4 {
            volume.write_at(at(block), &stamped(1)).unwrap();
        }
        volume.write_at(at(2), &stamped(2)).unwrap();
        assert_eq!(read_stamp(&volume, 2).unwrap(), 2);
        assert_eq!(read_stamp(&volume, 9).unwrap(), 7);
        assert!(matches!(
            volume.discard(0, 4096),
            Err(VolumeError::Discard { .. })
        ));
        // An overlay that lacks a write is a state that must not be read any more.
        volume.write_at(at(9), &stamped(1)).unwrap_err();
        let cause = volume.failure().unwrap();
        assert!(
            matches!(*cause, VolumeError::OverlayFull { bytes_max: 16384 }),
            "{cause}"
        );
        read_stamp(&volume, 2).unwrap_err();
        volume.close().unwrap_err();
    });
}

#[test]
fn unreadable_block_does_not_affect_others() {
    within(LIMIT, || {
        let store = MemoryStore::new();
        let name = FileName::new("x.luks").unwrap();
        let file = store.create_new(&name).unwrap();
        file.write_at(0, &stamped(7).repeat(64)).unwrap();
        let reads = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&reads);
        let bad = WrappedFile::new(file).on_read(move |below, offset, buf, class| {
            counter.fetch_add(1, Ordering::SeqCst);
            let read = offset..offset + buf.len() as u64;
            if [5, 38].iter().any(|block| read.contains(&at(*block))) {
                return Err(StoreError::Refused {
                    op: "read",
                    object: "x.luks".to_owned(),
                    reason: "Failure".to_owned(),
                });
            }
            below.read_at(offset, buf, class)
        });
        let session = TestSession::new(&kind_disk());
        let dir = tempfile::tempdir().unwrap();
        // The session's other connections lead to an intact disk.
        let options = ReadOnlyOptions {
            reconnect_max: Duration::ZERO,
            ..ReadOnlyOptions::new(dir.path().to_owned())
        };
        let volume =
            Volume::open_read_only(Arc::new(bad), geometry(LEN), session, options).unwrap();
        // As the kernel does: a large read first, then the failed part again in the smallest
        // pieces.
        let all = volume.read_at(0, &mut vec![0; LEN]);
        assert!(matches!(all, Err(VolumeError::ReadFailed(_))), "{all:?}");
        for round in 0..2 {
            for block in 0..64 {
                let read = read_stamp(&volume, block);
                match block {
                    5 | 38 => assert!(matches!(read, Err(VolumeError::ReadFailed(_))), "{block}"),
                    _ => assert_eq!(read.unwrap(), 7, "{block}"),
                }
            }
            // Blocks that are known to fail are not asked for again.
            if round == 0 {
                reads.store(0, Ordering::SeqCst);
            }
        }
        assert_eq!(reads.load(Ordering::SeqCst), 0);
        volume.write_at(at(5), &stamped(8)).unwrap();
        assert_eq!(read_stamp(&volume, 5).unwrap(), 8);
        volume.close().unwrap();
    });
}

#[test]
fn read_only_volume_reconnects_and_reads_on() {
    within(LIMIT, || {
        let disk = CrashDisk::new(
            LEN,
            5,
            CrashOptions {
                lose_line_per_1000: 200,
                ..CrashOptions::default()
            },
        );
        let session = TestSession::new(&disk);
        let dir = tempfile::tempdir().unwrap();
        let options = ReadOnlyOptions {
            reconnect_delay: Duration::from_millis(1),
            // So that each read is a request.
            read_cache_bytes_max: 0,
            read_ahead_bytes_max: 0,
            ..ReadOnlyOptions::new(dir.path().to_owned())
        };
        let volume =
            Volume::open_read_only(session.connect(), geometry(LEN), session.clone(), options);
        let volume = volume.unwrap();
        for round in 0..100 {
            assert_eq!(read_stamp(&volume, round % 64).unwrap(), 0);
        }
        assert!(session.reconnects.load(Ordering::SeqCst) > 3);
        volume.close().unwrap();
        assert_eq!(session.settlements.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn unused_volume_survives_an_outage_of_any_length() {
    within(LIMIT, || {
        let disk = kind_disk();
        let session = TestSession::new(&disk);
        let dir = tempfile::tempdir().unwrap();
        let longest = Duration::from_millis(200);
        let options = ReadOnlyOptions {
            reconnect_delay: Duration::from_millis(1),
            reconnect_max: longest,
            read_cache_bytes_max: 0,
            ..ReadOnlyOptions::new(dir.path().to_owned())
        };
        let file = session.connect();
        let volume =
            Volume::open_read_only(file.clone(), geometry(LEN), session.clone(), options).unwrap();
        session.unreachable.store(true, Ordering::SeqCst);
        disk.lose_lines();
        let mut block = vec![0; BLOCK];
        let lost = file.read_at(0, &mut block, ReadClass::Demand).unwrap_err();
        volume.connection_lost(lost);
        std::thread::sleep(longest * 4);
        assert!(volume.failure().is_none());
        session.unreachable.store(false, Ordering::SeqCst);
        assert_eq!(read_stamp(&volume, 3).unwrap(), 0);

        // Once a caller waits, the time limit runs.
        session.unreachable.store(true, Ordering::SeqCst);
        disk.lose_lines();
        read_stamp(&volume, 4).unwrap_err();
        assert!(matches!(
            *volume.failure().unwrap(),
            VolumeError::ConnectionLost { .. }
        ));
    });
}

/// Its read-ahead stays under way for as long as the connection lives.
struct Ahead {
    up: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
}

fn cut() -> StoreError {
    StoreError::Disconnected {
        op: "read",
        object: "container".into(),
        reason: "reset".into(),
    }
}

impl StoreFile for Ahead {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(4096 * BLOCK as u64)
    }
    fn stat(&self) -> Result<FileStat, StoreError> {
        Ok(FileStat {
            len: self.len()?,
            modified_s: None,
            regular: true,
            allocated_bytes: None,
        })
    }
    fn read_at(&self, _: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        if class == ReadClass::Ahead {
            self.asked.fetch_add(1, Ordering::SeqCst);
            while self.up.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if !self.up.load(Ordering::SeqCst) {
            return Err(cut());
        }
        buf.fill(7);
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[u8]) -> Result<(), StoreError> {
        unreachable!()
    }
    fn flush(&self) -> Result<(), StoreError> {
        unreachable!()
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), StoreError> {
        unreachable!()
    }
    fn resize(&self, _: u64) -> Result<(), StoreError> {
        unreachable!()
    }
}

/// No caller waits for read-ahead that was under way at the loss.
#[test]
fn read_only_volume_without_readers_survives_any_outage() {
    within(LIMIT, || {
        for with_ahead in [false, true] {
            let up = Arc::new(AtomicBool::new(true));
            let asked = Arc::new(AtomicU64::new(0));
            let file = Arc::new(Ahead {
                up: up.clone(),
                asked: asked.clone(),
            });
            let session = TestSession::new(&kind_disk());
            session.unreachable.store(true, Ordering::SeqCst);
            let options = ReadOnlyOptions {
                reconnect_max: Duration::from_millis(200),
                reconnect_delay: Duration::from_millis(5),
                ..ReadOnlyOptions::new(std::env::temp_dir())
            };
            let volume =
                Volume::open_read_only(file, geometry(4096 * BLOCK), session, options).unwrap();
            let mut bytes = vec![0; BLOCK];
            for cluster in 0..if with_ahead { 6 } else { 1 } {
                if asked.load(Ordering::SeqCst) > 0 {
                    break;
                }
                volume.read_at(at(cluster * 16), &mut bytes).unwrap();
                std::thread::sleep(Duration::from_millis(30));
            }
            assert_eq!(asked.load(Ordering::SeqCst) > 0, with_ahead);
            up.store(false, Ordering::SeqCst);
            volume.connection_lost(cut());
            std::thread::sleep(Duration::from_secs(1));
            assert!(volume.failure().is_none(), "{:?}", volume.failure());
        }
    });
}

/// Makes a new [`Ahead`] for each connection, unless the server is away.
struct Returning {
    up: Mutex<Arc<AtomicBool>>,
    asked: Arc<AtomicU64>,
    away: AtomicBool,
    reconnects: AtomicU64,
}

impl Returning {
    fn connect(&self) -> Arc<dyn StoreFile> {
        let up = Arc::new(AtomicBool::new(true));
        *self.up.lock().unwrap() = Arc::clone(&up);
        let asked = Arc::clone(&self.asked);
        Arc::new(Ahead { up, asked })
    }
}

impl SessionHooks for Returning {
    fn before_epoch(&self) -> Result<(), Fenced> {
        unreachable!("nothing is written")
    }
    fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
        unreachable!("nothing is written")
    }
    fn resolved(&self) {}
    fn resolved_in_part(&self, _: &[Range<u64>]) {}
    fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        if self.away.load(Ordering::SeqCst) {
            return Err(ReconnectError::Retry(cut()));
        }
        self.reconnects.fetch_add(1, Ordering::SeqCst);
        Ok(self.connect())
    }
}

/// An hour on a clock that is 1,000 times as fast: 20 random losses of a second each, most of them
/// with read-ahead under way, and a limit of 15 minutes.
#[test]
fn many_short_losses_during_read_ahead_end_no_read_only_volume() {
    within(LIMIT, || {
        let mut dice = Dice::new(21);
        let session = Arc::new(Returning {
            up: Mutex::default(),
            asked: Arc::default(),
            away: AtomicBool::new(false),
            reconnects: AtomicU64::new(0),
        });
        let options = ReadOnlyOptions {
            reconnect_max: Duration::from_millis(900),
            reconnect_delay: Duration::from_millis(1),
            ..ReadOnlyOptions::new(std::env::temp_dir())
        };
        let blocks = geometry(4096 * BLOCK);
        let file = session.connect();
        let volume = Volume::open_read_only(file, blocks, session.clone(), options).unwrap();
        let (mut bytes, mut under_way) = (vec![0; BLOCK], 0);
        for loss in 0..20 {
            std::thread::sleep(Duration::from_millis(dice.below(260)));
            session.asked.store(0, Ordering::SeqCst);
            for cluster in 0..10 {
                if session.asked.load(Ordering::SeqCst) > 0 {
                    break;
                }
                let block = (loss * 10 + cluster) * 16;
                volume.read_at(at(block), &mut bytes).unwrap();
                std::thread::sleep(Duration::from_millis(10));
            }
            under_way += usize::from(session.asked.load(Ordering::SeqCst) > 0);
            session.away.store(true, Ordering::SeqCst);
            session.up.lock().unwrap().store(false, Ordering::SeqCst);
            volume.connection_lost(cut());
            std::thread::sleep(Duration::from_millis(3));
            session.away.store(false, Ordering::SeqCst);
            volume.read_at(at(3300 + loss * 30), &mut bytes).unwrap();
            assert_eq!(bytes, [7; BLOCK]);
        }
        assert!(
            under_way >= 10,
            "{under_way} times something was read ahead"
        );
        assert_eq!(session.reconnects.load(Ordering::SeqCst), 20);
        // Until the connection ends.
        session.up.lock().unwrap().store(false, Ordering::SeqCst);
        volume.close().unwrap();
    });
}
