//! Single behaviours of a volume: waiting, ending, limits, in-doubt writes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::support::{
    BLOCK, LIMIT, TestSession, at, batching, geometry, read_stamp, stamp_of, stamped, tiny,
};
use sprat_store::StoreError;
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::watchdog::within;
use sprat_volume::{Flush, Geometry, Volume, VolumeError, VolumeOptions};

const LEN: usize = 64 * BLOCK;

fn kind_disk() -> CrashDisk {
    CrashDisk::new(LEN, 1, CrashOptions::default())
}

fn open(disk: &CrashDisk, options: VolumeOptions) -> (Arc<TestSession>, Arc<Volume>) {
    let session = TestSession::new(disk);
    let volume = Volume::open(session.connect(), geometry(LEN), session.clone(), options);
    (session, Arc::new(volume.unwrap()))
}

/// The same with a quiet time after a lost connection.
fn open_quiet(disk: &CrashDisk, quiet_time: Duration) -> (Arc<TestSession>, Arc<Volume>) {
    let options = VolumeOptions {
        quiet_time,
        ..tiny()
    };
    open(disk, options)
}

/// Takes the connection down; nothing gets through until `unreachable` is cleared.
fn take_connection_down(session: &TestSession, disk: &CrashDisk) {
    session.unreachable.store(true, Ordering::SeqCst);
    disk.lose_lines();
}

fn wait_until(what: &str, mut reached: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !reached() {
        assert!(begun.elapsed() < LIMIT, "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn unaligned_and_out_of_range_calls_are_refused() {
    within(LIMIT, || {
        let (_, volume) = open(&kind_disk(), tiny());
        let unaligned = volume.write_at(1, &stamped(1));
        assert!(matches!(unaligned, Err(VolumeError::Unaligned { .. })));
        let unaligned = volume.read_at(0, &mut [0; 100]);
        assert!(matches!(unaligned, Err(VolumeError::Unaligned { .. })));
        let outside = volume.write_at(at(64), &stamped(1));
        assert!(matches!(outside, Err(VolumeError::OutOfRange { .. })));
        let outside = volume.read_at(u64::MAX - 4095, &mut [0; BLOCK]);
        assert!(matches!(outside, Err(VolumeError::OutOfRange { .. })));
        assert!(volume.failure().is_none());
    });
}

#[test]
fn open_refuses_a_file_shorter_than_the_volume() {
    let disk = kind_disk();
    let session = TestSession::new(&disk);
    let lies = Geometry {
        offset_bytes: 4096,
        len_bytes: LEN as u64,
    };
    let short = Volume::open(session.connect(), lies, session.clone(), tiny());
    assert!(matches!(short.err(), Some(VolumeError::Short { .. })));
}

#[test]
fn ordered_flush_returns_while_disconnected_and_durable_one_waits() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (session, volume) = open(&disk, tiny());
        take_connection_down(&session, &disk);
        volume.write_at(0, &stamped(1)).unwrap();
        volume.flush(Flush::Ordered).unwrap();
        let waiting = volume.clone();
        let durable = std::thread::spawn(move || waiting.flush(Flush::Durable));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!durable.is_finished());
        assert!(volume.stats().reconnecting_since.is_some());
        session.unreachable.store(false, Ordering::SeqCst);
        durable.join().unwrap().unwrap();
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 1);
        assert!(volume.stats().reconnecting_since.is_none());
    });
}

fn held_back() -> VolumeOptions {
    VolumeOptions {
        hold_back: true,
        ..tiny()
    }
}

#[test]
fn held_back_writes_are_not_sent_before_may_send() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (_, volume) = open(&disk, held_back());
        for block in 0..8 {
            volume.write_at(at(block), &stamped(7)).unwrap();
        }
        // A journal replay flushes, and must not wait.
        volume.flush(Flush::Durable).unwrap();
        volume.write_at(at(8), &stamped(7)).unwrap();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(volume.stats().wire_write_requests, 0);
        assert_eq!(read_stamp(&volume, 8).unwrap(), 7);
        volume.may_send();
        volume.flush(Flush::Durable).unwrap();
        for block in 0..9 {
            assert_eq!(stamp_of(&disk.durable()[block * BLOCK..][..BLOCK]), 7);
        }
    });
}

#[test]
fn held_back_writes_are_sent_by_close_and_never_after_abort() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (_, volume) = open(&disk, held_back());
        volume.write_at(0, &stamped(7)).unwrap();
        volume.flush(Flush::Ordered).unwrap();
        volume.abort();
        drop(volume);
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 0);
        let (_, volume) = open(&disk, held_back());
        volume.write_at(0, &stamped(8)).unwrap();
        volume.close().unwrap();
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 8);
    });
}

#[test]
fn held_back_writes_beyond_the_buffer_are_sent() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (_, volume) = open(&disk, held_back());
        for block in 0..40 {
            volume.write_at(at(block), &stamped(7)).unwrap();
        }
        assert!(volume.stats().wire_write_requests > 0);
        volume.close().unwrap();
    });
}

#[test]
fn writer_waits_at_the_limit_until_an_epoch_is_durable() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (session, volume) = open(&disk, tiny());
        volume.write_at(0, &stamped(1)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        take_connection_down(&session, &disk);
        let writing = volume.clone();
        let writer = std::thread::spawn(move || {
            (0..60).try_for_each(|block| writing.write_at(at(block), &stamped(block as u64 + 1)))
        });
        wait_until("the buffer is full", || {
            // Writes that may arrive late count, too.
            let stats = volume.stats();
            stats.unsynced_bytes / BLOCK as u64 + stats.in_doubt_blocks >= 16
        });
        std::thread::sleep(Duration::from_millis(30));
        assert!(!writer.is_finished());
        assert!(volume.stats().unsynced_bytes <= 16 * BLOCK as u64);
        session.unreachable.store(false, Ordering::SeqCst);
        writer.join().unwrap().unwrap();
        volume.close().unwrap();
        assert!(volume.stats().unsynced_bytes_peak <= 16 * BLOCK as u64);
        assert!((0..60).all(|block| {
            stamp_of(&disk.durable()[block * BLOCK..][..BLOCK]) == block as u64 + 1
        }));
    });
}

#[test]
fn durable_flush_returns_while_others_keep_writing() {
    within(LIMIT, || {
        let delay_max = Duration::from_micros(200);
        let disk = CrashDisk::new(
            LEN,
            3,
            CrashOptions {
                delay_max,
                ..CrashOptions::default()
            },
        );
        let (_, volume) = open(&disk, tiny());
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (writing, stopped) = (volume.clone(), stop.clone());
        let writer = std::thread::spawn(move || {
            let mut stamp = 1u64;
            while !stopped.load(Ordering::SeqCst) {
                writing
                    .write_at(stamp % 4 * BLOCK as u64, &stamped(stamp))
                    .unwrap();
                stamp += 1;
            }
        });
        for _ in 0..20 {
            volume.flush(Flush::Durable).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap();
    });
}

type Call = fn(&Volume) -> Result<(), VolumeError>;

#[test]
fn abort_ends_all_waiting_calls() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (session, volume) = open(&disk, tiny());
        take_connection_down(&session, &disk);
        let calls: [Call; 4] = [
            |volume| read_stamp(volume, 50).map(drop),
            |volume| (0..64).try_for_each(|block| volume.write_at(at(block), &stamped(9))),
            |volume| {
                volume
                    .write_at(0, &stamped(1))
                    .and_then(|()| volume.flush(Flush::Durable))
            },
            |volume| {
                volume
                    .write_at(0, &stamped(1))
                    .and_then(|()| volume.close())
            },
        ];
        let waiting: Vec<_> = calls
            .into_iter()
            .map(|call| {
                let volume = volume.clone();
                std::thread::spawn(move || call(&volume))
            })
            .collect();
        std::thread::sleep(Duration::from_millis(50));
        assert!(waiting.iter().all(|call| !call.is_finished()));
        volume.abort();
        for call in waiting {
            assert!(matches!(call.join().unwrap(), Err(VolumeError::Failed(_))));
        }
        assert!(matches!(
            volume.failure().as_deref(),
            Some(VolumeError::Aborted)
        ));
    });
}

#[test]
fn volume_fails_with_connection_lost_after_the_reconnect_limit() {
    within(LIMIT, || {
        let disk = kind_disk();
        let limit = Duration::from_millis(100);
        let (session, volume) = open(
            &disk,
            VolumeOptions {
                reconnect_max: limit,
                ..tiny()
            },
        );
        take_connection_down(&session, &disk);
        volume.write_at(0, &stamped(1)).unwrap();
        let flush = volume.flush(Flush::Durable);
        assert!(matches!(flush, Err(VolumeError::Failed(_))));
        let failure = volume.failure().unwrap();
        assert!(
            matches!(&*failure, VolumeError::ConnectionLost { waited, .. } if *waited >= limit),
            "{failure:?}"
        );
    });
}

#[test]
fn lost_lock_stops_the_volume_before_the_epoch_is_sent() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (session, volume) = open(&disk, tiny());
        session.fenced.store(true, Ordering::SeqCst);
        volume.write_at(0, &stamped(1)).unwrap();
        assert!(volume.flush(Flush::Durable).is_err());
        assert!(matches!(
            volume.failure().as_deref(),
            Some(VolumeError::Fenced(_))
        ));
        assert!(disk.present().iter().all(|byte| *byte == 0));
        assert_eq!(volume.stats().wire_write_requests, 0);
    });
}

#[test]
fn each_epoch_with_writes_checks_the_lock() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (session, volume) = open(&disk, tiny());
        for round in 1..=5 {
            volume.write_at(0, &stamped(round)).unwrap();
            for _ in 0..3 {
                volume.flush(Flush::Durable).unwrap();
            }
            assert_eq!(session.lock_checks.load(Ordering::SeqCst), round);
            assert_eq!(volume.stats().wire_flushes, round);
            assert_eq!(session.settlements.load(Ordering::SeqCst), round);
        }
        assert_eq!(volume.stats().durable_epoch, 5);
    });
}

#[test]
fn sequential_reading_takes_few_large_requests() {
    within(LIMIT, || {
        let len = 1024 * BLOCK;
        let disk = CrashDisk::new(len, 1, CrashOptions::default());
        let session = TestSession::new(&disk);
        let options = VolumeOptions::default();
        let volume = Volume::open(session.connect(), geometry(len), session.clone(), options);
        let volume = volume.unwrap();
        for block in 0..1024 {
            assert_eq!(read_stamp(&volume, block).unwrap(), 0);
        }
        let stats = volume.stats();
        assert!(stats.wire_read_requests < 40, "{stats:?}");
        assert!(
            stats.wire_read_bytes <= len as u64,
            "nothing is read twice: {stats:?}"
        );
    });
}

#[test]
fn hole_is_read_locally_except_what_was_written_into_it() {
    within(LIMIT, || {
        let len = 1024 * BLOCK;
        let disk = CrashDisk::new(len, 1, CrashOptions::default());
        let session = TestSession::new(&disk);
        let options = VolumeOptions {
            hole_from_bytes: at(500),
            read_cache_bytes_max: 4 * BLOCK,
            ..VolumeOptions::default()
        };
        let volume = Volume::open(session.connect(), geometry(len), session.clone(), options);
        let volume = volume.unwrap();
        for block in (500..1024).step_by(37) {
            assert_eq!(read_stamp(&volume, block).unwrap(), 0);
        }
        assert_eq!(volume.stats().wire_read_requests, 0);
        for block in [499, 500, 700] {
            volume.write_at(at(block), &stamped(block as u64)).unwrap();
        }
        volume.flush(Flush::Durable).unwrap();
        // Across the border of the hole, and with too little memory to have kept it.
        for block in [499, 500, 700, 498, 501, 1023] {
            let expected = if [499, 500, 700].contains(&block) {
                block as u64
            } else {
                0
            };
            assert_eq!(read_stamp(&volume, block).unwrap(), expected);
        }
        let mut run = vec![1; 4 * BLOCK];
        volume.read_at(at(498), &mut run).unwrap();
        let stamps: Vec<u64> = run.chunks_exact(BLOCK).map(stamp_of).collect();
        assert_eq!(stamps, [0, 499, 500, 0]);
        assert!(volume.stats().wire_read_requests > 0);
    });
}

#[test]
fn hundred_readers_of_one_block_cause_one_request() {
    within(LIMIT, || {
        let delay_max = Duration::from_millis(20);
        let disk = CrashDisk::new(
            LEN,
            3,
            CrashOptions {
                delay_max,
                ..CrashOptions::default()
            },
        );
        let (_, volume) = open(
            &disk,
            VolumeOptions {
                read_ahead_bytes_max: 0,
                ..tiny()
            },
        );
        let readers: Vec<_> = (0..100)
            .map(|_| {
                let volume = volume.clone();
                std::thread::spawn(move || read_stamp(&volume, 5).unwrap())
            })
            .collect();
        for reader in readers {
            reader.join().unwrap();
        }
        assert_eq!(volume.stats().wire_read_requests, 1);
    });
}

/// A disk whose connection is lost with a write of `stamp` to block 0 under way.
fn lose_a_write(session: &TestSession, disk: &CrashDisk, volume: &Volume, stamp: u64) {
    disk.lose_lines();
    let before = session.reconnects.load(Ordering::SeqCst);
    volume.write_at(0, &stamped(stamp)).unwrap();
    volume.flush(Flush::Ordered).unwrap();
    wait_until("reconnected", || {
        session.reconnects.load(Ordering::SeqCst) > before
    });
}

#[test]
fn newer_bytes_of_an_in_doubt_block_wait_for_the_quiet_time() {
    within(LIMIT, || {
        let disk = kind_disk();
        let quiet_time = Duration::from_secs(4);
        let (session, volume) = open_quiet(&disk, quiet_time);
        let begun = Instant::now();
        lose_a_write(&session, &disk, &volume, 1);
        volume.flush(Flush::Durable).unwrap();
        assert!(
            begun.elapsed() < quiet_time,
            "sending the same bytes again does not wait"
        );
        assert_eq!(volume.stats().in_doubt_blocks, 1);
        volume.write_at(at(20), &stamped(3)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        assert!(begun.elapsed() < quiet_time, "other blocks do not wait");
        volume.write_at(0, &stamped(2)).unwrap();
        assert_eq!(read_stamp(&volume, 0).unwrap(), 2);
        volume.flush(Flush::Durable).unwrap();
        assert!(
            begun.elapsed() >= quiet_time,
            "newer bytes were sent too early"
        );
    });
}

#[test]
fn newer_bytes_do_not_wait_if_the_old_server_is_known_dead() {
    within(LIMIT, || {
        let disk = kind_disk();
        let quiet_time = Duration::from_secs(1000);
        let (session, volume) = open_quiet(&disk, quiet_time);
        session.server_dead.store(true, Ordering::SeqCst);
        lose_a_write(&session, &disk, &volume, 1);
        volume.write_at(0, &stamped(2)).unwrap();
        volume.close().unwrap();
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 2);
    });
}

#[test]
fn close_waits_for_the_quiet_time_and_reads_in_doubt_blocks_back() {
    within(LIMIT, || {
        let disk = kind_disk();
        let quiet_time = Duration::from_millis(200);
        let (session, volume) = open_quiet(&disk, quiet_time);
        let begun = Instant::now();
        lose_a_write(&session, &disk, &volume, 1);
        volume.flush(Flush::Durable).unwrap();
        assert!(
            !session.in_doubt().is_empty(),
            "resolved while the old server may still write"
        );
        // The old server undoes the rewrite, later than the quiet time allows for.
        disk.connect().write_at(0, &stamped(99)).unwrap();
        volume.close().unwrap();
        assert!(begun.elapsed() >= quiet_time);
        assert_eq!(
            stamp_of(&disk.durable()[..BLOCK]),
            1,
            "written again when it was detected"
        );
        assert!(session.in_doubt().is_empty());
    });
}

#[test]
fn late_writes_of_an_old_server_are_never_read_or_cached() {
    within(LIMIT, || {
        let disk = kind_disk();
        let quiet_time = Duration::from_millis(300);
        let (session, volume) = open_quiet(&disk, quiet_time);
        lose_a_write(&session, &disk, &volume, 1);
        volume.flush(Flush::Durable).unwrap();
        disk.connect().write_at(0, &stamped(99)).unwrap();
        assert_eq!(read_stamp(&volume, 0).unwrap(), 1, "before it is detected");
        wait_until("read back and written again", || {
            volume.flush(Flush::Durable).unwrap();
            volume.stats().in_doubt_blocks == 0
        });
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 1);
        assert_eq!(read_stamp(&volume, 0).unwrap(), 1, "after it was corrected");
        volume.close().unwrap();
    });
}

#[test]
fn open_waits_for_in_doubt_writes_and_recovers_them() {
    within(LIMIT, || {
        let disk = kind_disk();
        disk.connect().write_at(0, &stamped(5)).unwrap();
        assert_eq!(
            stamp_of(&disk.durable()[..BLOCK]),
            0,
            "not synced by the dead session"
        );
        let quiet_time = Duration::from_millis(600);
        let options = VolumeOptions {
            quiet_time,
            in_doubt: vec![0..4096, 2048..10_000, at(20)..at(2000)],
            ..tiny()
        };
        // The dead session's server writes once more, late.
        let server = disk.connect();
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(200));
            server.write_at(0, &stamped(6)).unwrap();
        });
        let begun = Instant::now();
        let (session, volume) = open(&disk, options);
        let waited = begun.elapsed();
        assert!(waited >= quiet_time && waited < LIMIT);
        late.join().unwrap();
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 6, "one final value");
        assert_eq!(
            session.settlements.load(Ordering::SeqCst),
            0,
            "nothing is resolved half-way"
        );
        volume.close().unwrap();
        assert!(session.in_doubt().is_empty());
    });
}

#[test]
fn in_doubt_writes_that_never_arrived_stay_holes() {
    within(LIMIT, || {
        let disk = kind_disk();
        disk.connect().write_at(0, &stamped(5)).unwrap();
        let options = VolumeOptions {
            in_doubt: std::iter::once(at(0)..at(100)).collect(),
            old_server_dead: true,
            zeros_are_holes: true,
            ..tiny()
        };
        let (session, volume) = open(&disk, options);
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 5);
        assert_eq!(volume.stats().wire_written_bytes, BLOCK as u64);
        volume.close().unwrap();
        assert!(session.in_doubt().is_empty());
        // If plaintext is written, zeros may be bytes of a dead session that are not durable.
        let disk = kind_disk();
        let written = disk.connect();
        written.write_at(0, &stamped(5)).unwrap();
        written.flush().unwrap();
        written.write_at(0, &stamped(0)).unwrap();
        let options = VolumeOptions {
            in_doubt: std::iter::once(at(0)..at(1)).collect(),
            old_server_dead: true,
            ..tiny()
        };
        let (_, volume) = open(&disk, options);
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 0);
        volume.close().unwrap();
    });
}

#[test]
fn dropping_a_volume_ends_all_threads() {
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    within(LIMIT, move || {
        let before = threads();
        for _ in 0..3 {
            let disk = kind_disk();
            let (session, volume) = open(&disk, VolumeOptions::default());
            take_connection_down(&session, &disk);
            volume.write_at(0, &stamped(1)).unwrap();
            volume.flush(Flush::Ordered).unwrap();
            assert!(threads() > before + 20);
            drop(volume);
            wait_until("threads are gone", || threads() <= before);
        }
    });
}

#[test]
fn discarded_range_reads_as_zeros_and_waits_for_no_writes() {
    within(LIMIT, || {
        let disk = kind_disk();
        // Nothing is sent, and so nothing becomes durable, before a flush.
        let options = VolumeOptions {
            early_send_bytes_min: 8 * BLOCK,
            ..tiny()
        };
        let (_, volume) = open(&disk, options);
        volume.write_at(0, &stamped(1).repeat(4)).unwrap();
        let early = volume.discard(0, 4096);
        assert!(matches!(early, Err(VolumeError::Discard { .. })));
        volume.flush(Flush::Durable).unwrap();
        assert_eq!(read_stamp(&volume, 1).unwrap(), 1);
        volume.discard(at(1), 2 * BLOCK as u64).unwrap();
        let stamps: Vec<u64> = (0..4)
            .map(|block| read_stamp(&volume, block).unwrap())
            .collect();
        assert_eq!(stamps, [1, 0, 0, 1]);
        assert_eq!(stamp_of(&disk.durable()[BLOCK..2 * BLOCK]), 0);
        // What the server reported as durable and has discarded since is not missed.
        volume.close().unwrap();
    });
}

#[test]
fn reads_during_a_discard_are_not_cached() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (_, volume) = open(&disk, tiny());
        volume.write_at(0, &stamped(1).repeat(4)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        let hole = at(1)..at(3);
        let made = volume.discard_by(std::slice::from_ref(&hole), &mut |file, _| {
            assert_eq!(read_stamp(&volume, 1).unwrap(), 1);
            file.discard(at(1), at(2))
        });
        made.unwrap();
        assert_eq!(read_stamp(&volume, 1).unwrap(), 0);
        volume.close().unwrap();
    });
}

#[test]
fn journal_records_a_discard_while_it_is_under_way() {
    within(LIMIT, || {
        let disk = kind_disk();
        let (session, volume) = open(&disk, tiny());
        let holes = [at(1)..at(3), at(9)..at(10)];
        let in_record = || !session.in_doubt().is_empty();
        assert!(!in_record());
        let made = volume.discard_by(&holes, &mut |_, _| {
            assert!(in_record());
            Ok(())
        });
        made.unwrap();
        assert!(!in_record());
        // The connection is lost in the middle of it.
        let lost = volume.discard_by(&holes, &mut |_, _| {
            Err(StoreError::Disconnected {
                op: "punch",
                object: "container".to_owned(),
                reason: "cut".to_owned(),
            })
        });
        lost.unwrap_err();
        assert!(in_record());
        drop(volume);
        // Nothing is punched once the lock is lost.
        let (session, volume) = open(&disk, tiny());
        session.fenced.store(true, Ordering::SeqCst);
        let refused = volume.discard_by(&holes, &mut |_, _| panic!("holes without the lock"));
        refused.unwrap_err();
    });
}

#[test]
fn nothing_counts_as_resolved_while_in_doubt_writes_are_recovered() {
    within(LIMIT, || {
        for options in [tiny(), batching()] {
            let disk = kind_disk();
            let session = TestSession::new(&disk);
            let options = VolumeOptions {
                in_doubt: std::iter::once(0..at(40)).collect(),
                old_server_dead: true,
                ..options
            };
            let volume = Volume::open(session.connect(), geometry(LEN), session.clone(), options);
            let volume = volume.unwrap();
            assert_eq!(session.settlements.load(Ordering::SeqCst), 0);
            assert_eq!(session.settlements_in_part.load(Ordering::SeqCst), 0);
            volume.close().unwrap();
            assert!(session.settlements.load(Ordering::SeqCst) > 0);
        }
    });
}
