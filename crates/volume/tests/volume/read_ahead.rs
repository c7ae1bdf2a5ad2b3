//! Read-ahead: it saves requests, delays no other read, and never changes the bytes that are read.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use crate::support::{BLOCK, LIMIT, TestSession, geometry, stamp_of, stamped};
use sprat_store::ReadClass;
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::dice::Dice;
use sprat_testkit::watchdog::within;
use sprat_testkit::wrapped::WrappedFile;
use sprat_volume::{Volume, VolumeOptions, VolumeStats};

const BLOCKS: usize = 4096;

#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
}

impl Gate {
    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

/// A volume whose answers to read-ahead wait until the gate is open.
fn gated() -> (Arc<Gate>, Arc<Volume>) {
    let disk = CrashDisk::new(BLOCKS * BLOCK, 1, CrashOptions::default());
    let session = TestSession::new(&disk);
    let gate = Arc::new(Gate::default());
    let wait = gate.clone();
    let file = WrappedFile::new(session.connect()).on_read(move |below, offset, buf, class| {
        // The bytes are those of the moment of the request, however late they arrive.
        below.read_at(offset, buf, class)?;
        if class == ReadClass::Ahead {
            wait.pass();
        }
        Ok(())
    });
    let lies = geometry(BLOCKS * BLOCK);
    let volume = Volume::open(Arc::new(file), lies, session, VolumeOptions::default()).unwrap();
    (gate, Arc::new(volume))
}

fn read(volume: &Volume, block: usize) -> u64 {
    let mut bytes = vec![0; BLOCK];
    volume.read_at((block * BLOCK) as u64, &mut bytes).unwrap();
    stamp_of(&bytes)
}

/// Reads sequentially, one block in each cluster, until read-ahead is under way.
fn begin_stream(gate: &Gate, volume: &Volume) -> usize {
    for cluster in 0.. {
        assert!(cluster < 8, "a stream is recognised within some clusters");
        read(volume, cluster * 16);
        std::thread::sleep(Duration::from_millis(20));
        if gate.waiting.load(Ordering::SeqCst) > 0 {
            return cluster;
        }
    }
    unreachable!()
}

#[test]
fn demand_read_never_waits_for_read_ahead() {
    within(LIMIT, || {
        let (gate, volume) = gated();
        begin_stream(&gate, &volume);
        // Too far apart to be a stream.
        let readers: Vec<_> = (0..6)
            .map(|reader| {
                let volume = volume.clone();
                std::thread::spawn(move || {
                    for n in 0..3 {
                        read(&volume, (40 + (reader * 3 + n) * 12) * 16);
                    }
                })
            })
            .collect();
        for reader in readers {
            reader.join().unwrap();
        }
        gate.open();
    });
}

#[test]
fn read_ahead_never_replaces_bytes_written_meanwhile() {
    within(LIMIT, || {
        let (gate, volume) = gated();
        let cluster = begin_stream(&gate, &volume);
        let ahead = (cluster + 1) * 16..(cluster + 20) * 16;
        for block in ahead.clone() {
            volume
                .write_at((block * BLOCK) as u64, &stamped(block as u64))
                .unwrap();
        }
        // Durable, so that the block is not kept for sending when the old bytes arrive.
        volume.flush(sprat_volume::Flush::Durable).unwrap();
        gate.open();
        for block in ahead {
            assert_eq!(read(&volume, block), block as u64, "block {block}");
        }
        volume.close().unwrap();
    });
}

/// Small files side by side, read by several threads, as a walk ahead of rsync reads them: each
/// file from its start, with gaps, a little out of order. The round trip is 4 ms.
fn read_files_side_by_side(options: VolumeOptions) -> VolumeStats {
    let delay_max = Duration::from_millis(4);
    let disk_options = CrashOptions {
        delay_max,
        ..CrashOptions::default()
    };
    let disk = CrashDisk::new(BLOCKS * BLOCK, 1, disk_options);
    let session = TestSession::new(&disk);
    let volume = Volume::open(
        session.connect(),
        geometry(BLOCKS * BLOCK),
        session,
        options,
    );
    let volume = Arc::new(volume.unwrap());
    let mut dice = Dice::new(7);
    let mut files = Vec::new();
    let mut at = 0;
    while at + 32 < BLOCKS as u64 {
        let blocks = 1 + dice.below(16);
        files.push((at, blocks));
        at += blocks + dice.below(3);
    }
    let next = Arc::new(AtomicUsize::new(0));
    let files = Arc::new(files);
    let readers: Vec<_> = (0..6)
        .map(|_| {
            let (volume, next, files) = (volume.clone(), next.clone(), files.clone());
            std::thread::spawn(move || {
                while let Some((first, blocks)) = files.get(next.fetch_add(1, Ordering::SeqCst)) {
                    let mut bytes = vec![0; usize::try_from(*blocks).unwrap() * BLOCK];
                    volume.read_at(first * BLOCK as u64, &mut bytes).unwrap();
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
    volume.stats()
}

#[test]
fn reading_small_files_in_parallel_takes_few_long_requests() {
    within(LIMIT, || {
        let ahead = read_files_side_by_side(VolumeOptions::default());
        let without = read_files_side_by_side(VolumeOptions {
            read_ahead_bytes_max: 0,
            ..VolumeOptions::default()
        });
        assert!(
            ahead.wire_read_requests * 2 < without.wire_read_requests,
            "{ahead:?} {without:?}"
        );
        let len = (BLOCKS * BLOCK) as u64;
        assert!(
            ahead.wire_read_bytes <= len,
            "nothing is read twice: {ahead:?}"
        );
    });
}
