//! Compares the volume with a plain array: every read returns the newest write, and after close all
//! writes are on the disk.

use std::sync::Arc;
use std::time::Duration;

use crate::support::{BLOCK, LIMIT, TestSession, geometry, tiny};
use proptest::prelude::*;
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::dice::Dice;
use sprat_testkit::watchdog::within;
use sprat_volume::{Flush, Geometry, Volume, VolumeOptions};

const BLOCKS: usize = 96;

#[derive(Debug, Clone)]
enum Op {
    Write {
        block: usize,
        blocks: usize,
        byte: u8,
    },
    Read {
        block: usize,
        blocks: usize,
    },
    Flush(Flush),
}

fn range() -> impl Strategy<Value = (usize, usize)> {
    (0..BLOCKS, 1..40usize).prop_map(|(block, blocks)| (block, blocks.min(BLOCKS - block)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (range(), any::<u8>()).prop_map(|((block, blocks), byte)| Op::Write { block, blocks, byte }),
        6 => range().prop_map(|(block, blocks)| Op::Read { block, blocks }),
        2 => Just(Op::Flush(Flush::Ordered)),
        1 => Just(Op::Flush(Flush::Durable)),
    ]
}

fn run(ops: &[Op], options: VolumeOptions, seed: u64) {
    let delay_max = Duration::from_micros(150);
    let disk = CrashDisk::new(
        (BLOCKS + 2) * BLOCK,
        seed,
        CrashOptions {
            delay_max,
            ..CrashOptions::default()
        },
    );
    let session = TestSession::new(&disk);
    let lies = Geometry {
        offset_bytes: BLOCK as u64,
        len_bytes: (BLOCKS * BLOCK) as u64,
    };
    let limit = options.write_buffer_bytes_max as u64;
    let volume = Volume::open(session.connect(), lies, session.clone(), options).unwrap();
    let mut model = vec![0; BLOCKS * BLOCK];
    for op in ops {
        match op {
            Op::Write {
                block,
                blocks,
                byte,
            } => {
                let data: Vec<u8> = (0..blocks * BLOCK)
                    .map(|at| byte ^ (at / 7).to_le_bytes()[0])
                    .collect();
                volume.write_at((block * BLOCK) as u64, &data).unwrap();
                model[block * BLOCK..][..data.len()].copy_from_slice(&data);
            }
            Op::Read { block, blocks } => {
                let mut found = vec![0xee; blocks * BLOCK];
                volume.read_at((block * BLOCK) as u64, &mut found).unwrap();
                assert!(
                    found == model[block * BLOCK..][..found.len()],
                    "read at block {block}"
                );
            }
            Op::Flush(flush) => {
                volume.flush(*flush).unwrap();
                if *flush == Flush::Durable {
                    assert!(
                        disk.durable()[BLOCK..][..model.len()] == model,
                        "not durable"
                    );
                }
            }
        }
    }
    volume.close().unwrap();
    let durable = disk.durable();
    assert!(
        durable[BLOCK..][..model.len()] == model,
        "not on the disk after close"
    );
    assert!(
        durable[..BLOCK]
            .iter()
            .chain(&durable[BLOCK + model.len()..])
            .all(|byte| *byte == 0)
    );
    assert!(
        volume.stats().unsynced_bytes_peak <= limit,
        "held {:?}",
        volume.stats()
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_as_an_array_with_a_buffer_smaller_than_one_write(
        ops in prop::collection::vec(op(), 1..60),
        seed: u64,
    ) {
        within(LIMIT, move || run(&ops, tiny(), seed));
    }

    #[test]
    fn behaves_as_an_array_with_a_buffer_that_holds_everything(
        ops in prop::collection::vec(op(), 1..60),
        seed: u64,
    ) {
        let options = VolumeOptions { write_buffer_bytes_max: 4 << 20, ..tiny() };
        within(LIMIT, move || run(&ops, options, seed));
    }

    #[test]
    fn behaves_as_an_array_while_it_reads_ahead(
        ops in prop::collection::vec(op(), 1..60),
        seed: u64,
    ) {
        within(LIMIT, move || run(&ops, reading_ahead(), seed));
    }

    #[test]
    fn behaves_as_an_array_without_any_cache(
        ops in prop::collection::vec(op(), 1..60),
        seed: u64,
    ) {
        let options = VolumeOptions { read_cache_bytes_max: 0, writers: 1, ..tiny() };
        within(LIMIT, move || run(&ops, options, seed));
    }
}

/// Windows of several clusters, and requests that arrive in any order.
fn reading_ahead() -> VolumeOptions {
    VolumeOptions {
        read_cache_bytes_max: 4 * BLOCKS * BLOCK,
        read_ahead_bytes_max: BLOCKS * BLOCK,
        readers: 6,
        ..tiny()
    }
}

#[test]
fn many_threads_each_see_their_own_newest_bytes() {
    within(LIMIT, || {
        for seed in 0..6 {
            eprintln!("seed {seed}");
            let delay_max = Duration::from_micros(100);
            let options = CrashOptions {
                delay_max,
                ..CrashOptions::default()
            };
            let disk = CrashDisk::new(BLOCKS * BLOCK, seed, options);
            let session = TestSession::new(&disk);
            let lies = geometry(BLOCKS * BLOCK);
            let options = if seed % 2 == 0 {
                tiny()
            } else {
                reading_ahead()
            };
            let volume =
                Arc::new(Volume::open(session.connect(), lies, session.clone(), options).unwrap());
            let threads: Vec<_> = (0..6u64)
                .map(|thread| {
                    let volume = volume.clone();
                    // Every sixth block belongs to this thread, so that neighbours share clusters
                    // and runs.
                    std::thread::spawn(move || one_of_many(&volume, thread, seed))
                })
                .collect();
            let models: Vec<Vec<u8>> = threads.into_iter().map(|it| it.join().unwrap()).collect();
            volume.close().unwrap();
            let durable = disk.durable();
            for (block, bytes) in durable.chunks_exact(BLOCK).enumerate() {
                let expected = &models[block % 6][block * BLOCK..][..BLOCK];
                assert!(bytes == expected, "block {block}, seed {seed}");
            }
        }
    });
}

fn one_of_many(volume: &Volume, thread: u64, seed: u64) -> Vec<u8> {
    let mut dice = Dice::new(seed * 100 + thread);
    let mut model = vec![0; BLOCKS * BLOCK];
    for round in 0..400u64 {
        let block = usize::try_from(dice.below(BLOCKS as u64 / 6) * 6 + thread).unwrap();
        let at = (block * BLOCK) as u64;
        if dice.percent(50) {
            let data = (round << 8 | thread).to_le_bytes().repeat(BLOCK / 8);
            volume.write_at(at, &data).unwrap();
            model[block * BLOCK..][..BLOCK].copy_from_slice(&data);
        } else {
            let mut found = vec![0; BLOCK];
            volume.read_at(at, &mut found).unwrap();
            assert!(
                found == model[block * BLOCK..][..BLOCK],
                "block {block} round {round}"
            );
        }
        match dice.below(40) {
            0 => volume.flush(Flush::Durable).unwrap(),
            1..4 => volume.flush(Flush::Ordered).unwrap(),
            _ => {}
        }
    }
    model
}
