//! Seeded crashes, lost connections, late writes and failed flushes. After any of them the disk
//! holds all groups up to some k and a part of k+1.
//!
//! `SPRAT_CRASH_SEEDS=FIRST..END` runs other seeds; a failure prints its own.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::oracle::Oracle;
use crate::support::{BLOCK, LIMIT, TestSession, by_seed, geometry, stamp_of, stamped, tiny};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::dice::Dice;
use sprat_testkit::watchdog::within;
use sprat_volume::{Flush, Volume, VolumeError, VolumeOptions};

const BLOCKS: u64 = 48;
const LEN: usize = 48 * BLOCK;

fn seeds(usual: u64) -> std::ops::Range<u64> {
    match std::env::var("SPRAT_CRASH_SEEDS") {
        Ok(range) => {
            let (first, end) = range.split_once("..").unwrap();
            first.parse().unwrap()..end.parse().unwrap()
        }
        Err(_) => 0..usual,
    }
}

/// Runs `body` for each seed, two at a time, and prints the seed of the first failure.
fn each_seed(usual: u64, body: fn(u64)) {
    within(LIMIT, move || {
        let range = seeds(usual);
        let next = Arc::new(AtomicU64::new(range.start));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (next, end) = (next.clone(), range.end);
                std::thread::spawn(move || {
                    loop {
                        let seed = next.fetch_add(1, Ordering::SeqCst);
                        if seed >= end {
                            return;
                        }
                        let said = std::panic::catch_unwind(|| body(seed));
                        assert!(
                            said.is_ok(),
                            "seed {seed}: SPRAT_CRASH_SEEDS={seed}..{}",
                            seed + 1
                        );
                    }
                })
            })
            .collect();
        let failed = workers.into_iter().map(std::thread::JoinHandle::join);
        assert!(
            failed.filter(Result::is_err).count() == 0,
            "a seed failed: see above"
        );
    });
}

/// What the observer of a disk has seen.
#[derive(Default)]
struct Seen {
    images: AtomicU64,
    first_wrong: Mutex<Option<String>>,
}

/// A disk whose every write and flush is a possible crash, checked by `oracle`.
fn watched_disk(
    oracle: &Arc<Oracle>,
    seen: &Arc<Seen>,
    seed: u64,
    options: CrashOptions,
) -> CrashDisk {
    let (oracle, seen) = (oracle.clone(), seen.clone());
    CrashDisk::new(LEN, seed, options).watched(move |image| {
        for _ in 0..2 {
            let durable = oracle.durable_group();
            let image = image();
            seen.images.fetch_add(1, Ordering::SeqCst);
            if let Err(wrong) = oracle.check(&image, durable) {
                seen.first_wrong.lock().unwrap().get_or_insert(wrong);
            }
        }
    })
}

/// Random writes, reads and flushes; stops when the volume fails.
fn work(volume: &Volume, oracle: &Oracle, dice: &mut Dice, rounds: u64) -> Result<(), VolumeError> {
    for _ in 0..rounds {
        match dice.below(20) {
            0 => {
                let group = oracle.flush();
                volume.flush(Flush::Durable)?;
                oracle.durable(group);
            }
            1..4 => {
                oracle.flush();
                volume.flush(Flush::Ordered)?;
            }
            4..8 => {
                let block = dice.below(BLOCKS);
                let mut found = vec![0; BLOCK];
                volume.read_at(block * BLOCK as u64, &mut found)?;
                assert_eq!(
                    stamp_of(&found),
                    oracle.newest(block),
                    "read of block {block}"
                );
            }
            _ => {
                // Some blocks are written often.
                let block = if dice.percent(30) {
                    dice.below(3)
                } else {
                    dice.below(BLOCKS)
                };
                let blocks = (1 + dice.below(3)).min(BLOCKS - block);
                let data: Vec<u8> = (block..block + blocks)
                    .flat_map(|at| stamped(oracle.write(at)))
                    .collect();
                volume.write_at(block * BLOCK as u64, &data)?;
            }
        }
    }
    Ok(())
}

/// After a close no crash may change anything any more.
fn assert_final(disk: &CrashDisk, oracle: &Oracle, seed: u64) {
    for crash in 0..8 {
        let image = disk.crash_image(crash);
        for (block, bytes) in (0..).zip(image.chunks_exact(BLOCK)) {
            assert_eq!(
                stamp_of(bytes),
                oracle.newest(block),
                "block {block}, seed {seed}"
            );
        }
    }
}

fn session_over(
    seed: u64,
    options: CrashOptions,
    volume_options: VolumeOptions,
) -> (u64, u64, u64) {
    let mut dice = Dice::new(seed ^ 0x5eed);
    let (oracle, seen) = (Arc::new(Oracle::default()), Arc::new(Seen::default()));
    let disk = watched_disk(&oracle, &seen, seed, options);
    let session = TestSession::new(&disk);
    let volume = Volume::open(
        session.connect(),
        geometry(LEN),
        session.clone(),
        volume_options,
    )
    .unwrap();
    let worked = work(&volume, &oracle, &mut dice, 150);
    let group = oracle.flush();
    let ended = worked.and_then(|()| volume.close());
    assert_eq!(*seen.first_wrong.lock().unwrap(), None, "seed {seed}");
    assert!(seen.images.load(Ordering::SeqCst) > 10);
    if let Err(error) = ended {
        // The only failure that chance may cause: one flush after another fails.
        let failure = volume.failure().unwrap();
        let flushes_fail = matches!(*failure, VolumeError::Store { op: "flush", .. });
        assert!(
            flushes_fail && options.fail_flush_per_1000 > 0,
            "seed {seed}: {error:?}"
        );
        return disk.events();
    }
    oracle.durable(group);
    assert_final(&disk, &oracle, seed);
    assert!(session.in_doubt().is_empty());
    disk.events()
}

#[test]
fn crash_leaves_complete_groups_and_part_of_the_next() {
    each_seed(60, |seed| {
        let delay_max = Duration::from_micros(100);
        let options = CrashOptions {
            delay_max,
            ..CrashOptions::default()
        };
        let buffer = [8, 16, 64, 1024][usize::try_from(seed % 4).unwrap()];
        let tiny = VolumeOptions {
            write_buffer_bytes_max: buffer * BLOCK,
            ..by_seed(seed)
        };
        session_over(seed, options, tiny);
    });
}

#[test]
fn nothing_is_lost_by_lost_connections_and_late_writes() {
    static LATE: AtomicU64 = AtomicU64::new(0);
    each_seed(150, |seed| {
        let options = CrashOptions {
            delay_max: Duration::from_micros(100),
            lose_line_per_1000: 20,
            late_max: Duration::from_millis(10),
            ..CrashOptions::default()
        };
        let (_, _, late) = session_over(seed, options, by_seed(seed));
        LATE.fetch_add(late, Ordering::SeqCst);
    });
    assert!(
        LATE.load(Ordering::SeqCst) > 0,
        "no write came late: the test proves nothing"
    );
}

#[test]
fn nothing_durable_is_lost_by_repeated_power_cuts() {
    static CUTS: AtomicU64 = AtomicU64::new(0);
    each_seed(150, |seed| {
        let options = CrashOptions {
            delay_max: Duration::from_micros(50),
            lose_line_per_1000: 5,
            power_cut_per_1000: 20,
            fail_flush_per_1000: 50,
            late_max: Duration::from_millis(10),
        };
        let (_, cuts, _) = session_over(seed, options, by_seed(seed));
        CUTS.fetch_add(cuts, Ordering::SeqCst);
    });
    assert!(
        CUTS.load(Ordering::SeqCst) > 0,
        "no power cut: the test proves nothing"
    );
}

/// The session dies with writes under way. The next one takes over, with the journal of these
/// writes, while the old server's process is still writing. Then it dies as well, and so on.
fn takeovers(seed: u64) {
    let mut dice = Dice::new(seed ^ 0x7a6e);
    let oracle = Oracle::default();
    let options = CrashOptions {
        delay_max: Duration::from_micros(200),
        lose_line_per_1000: 4,
        late_max: Duration::from_millis(10),
        ..CrashOptions::default()
    };
    let disk = CrashDisk::new(LEN, seed, options);
    let mut in_doubt = Vec::new();
    for round in 0..4 {
        let session = TestSession::new(&disk);
        let options = VolumeOptions {
            in_doubt: in_doubt.clone(),
            ..tiny()
        };
        let volume = Volume::open(session.connect(), geometry(LEN), session.clone(), options);
        let volume = volume.unwrap();
        // Only now is it known which of the dead session's writes have survived.
        let seen: Vec<u64> = read_stamps(&volume);
        let stamps = overwrite(&volume, &oracle, &mut dice);
        if round == 3 {
            volume.close().unwrap();
            for crash in 0..8 {
                let image = disk.crash_image(crash);
                for (block, bytes) in image.chunks_exact(BLOCK).enumerate() {
                    let expected = stamps.get(&block).copied().unwrap_or(seen[block]);
                    assert_eq!(stamp_of(bytes), expected, "block {block}, seed {seed}");
                }
            }
            return;
        }
        // The connection is lost, and the session is killed before it can reconnect.
        session.unreachable.store(true, Ordering::SeqCst);
        disk.lose_lines();
        drop(volume);
        in_doubt = session.in_doubt();
    }
}

fn read_stamps(volume: &Volume) -> Vec<u64> {
    let mut found = vec![0; LEN];
    volume.read_at(0, &mut found).unwrap();
    found.chunks_exact(BLOCK).map(stamp_of).collect()
}

fn overwrite(
    volume: &Volume,
    oracle: &Oracle,
    dice: &mut Dice,
) -> std::collections::HashMap<usize, u64> {
    let mut stamps = std::collections::HashMap::new();
    for _ in 0..60 {
        let block = dice.below(BLOCKS);
        let stamp = oracle.write(block);
        volume
            .write_at(block * BLOCK as u64, &stamped(stamp))
            .unwrap();
        stamps.insert(usize::try_from(block).unwrap(), stamp);
        if dice.percent(10) {
            volume.flush(Flush::Ordered).unwrap();
        }
    }
    stamps
}

#[test]
fn late_writes_of_a_dead_session_do_not_undo_a_takeover() {
    each_seed(100, takeovers);
}
