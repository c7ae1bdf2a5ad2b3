//! Long epochs: they become durable in parts while they are sent, even on connections that break
//! again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::support::{BLOCK, LIMIT, TestSession, geometry, stamped, tiny};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::watchdog::within;
use sprat_testkit::wrapped::WrappedFile;
use sprat_volume::{Flush, Volume, VolumeOptions};

/// A session whose connections are each lost after `bytes_max` written bytes.
fn flapping(disk: &CrashDisk, bytes_max: usize) -> Arc<TestSession> {
    let server = disk.clone();
    TestSession::wrapping(disk, move |file| {
        let (server, bytes) = (server.clone(), AtomicUsize::new(0));
        let wrapped = WrappedFile::new(file).on_write(move |below, offset, data| {
            let before = bytes.fetch_add(data.len(), Ordering::SeqCst);
            if before <= bytes_max && before + data.len() > bytes_max {
                server.lose_lines();
            }
            below.write_at(offset, data)
        });
        Arc::new(wrapped)
    })
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
        let session = flapping(&disk, 3 << 19);
        let file = session.connect();
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
