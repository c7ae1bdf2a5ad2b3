//! The nth operation of the store fails, once or for ever after, for n = 1, 2, … until no operation
//! fails. The volume must never report success for what is not durable, return a wrong byte, or
//! hang.

use std::sync::Arc;
use std::time::Duration;

use crate::support::oracle::Oracle;
use crate::support::{BLOCK, LIMIT, TestSession, batching, geometry, stamp_of, stamped, tiny};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::dice::Dice;
use sprat_testkit::fault::{Fault, FaultPlan};
use sprat_testkit::watchdog::within;
use sprat_volume::{Flush, Volume, VolumeError, VolumeOptions};

const BLOCKS: u64 = 40;
const LEN: usize = 40 * BLOCK;

/// A short but complete session: writes, overwrites, reads, flushes of both kinds.
fn life(volume: &Volume, oracle: &Oracle) -> Result<(), VolumeError> {
    let mut dice = Dice::new(7);
    for round in 0..24 {
        let block = dice.below(BLOCKS - 4);
        let blocks = 1 + dice.below(4);
        let data: Vec<u8> = (block..block + blocks)
            .flat_map(|at| stamped(oracle.write(at)))
            .collect();
        volume.write_at(block * BLOCK as u64, &data)?;
        let block = dice.below(BLOCKS);
        let mut found = vec![0; BLOCK];
        volume.read_at(block * BLOCK as u64, &mut found)?;
        assert_eq!(
            stamp_of(&found),
            oracle.newest(block),
            "a wrong byte in block {block}"
        );
        if round % 4 == 3 {
            let group = oracle.flush();
            let flush = if round % 8 == 7 {
                Flush::Durable
            } else {
                Flush::Ordered
            };
            volume.flush(flush)?;
            if flush == Flush::Durable {
                oracle.durable(group);
            }
        }
    }
    Ok(())
}

/// Returns whether the fault occurred at all.
fn one(nth: u64, for_ever: bool, fault: Fault, options: VolumeOptions) -> bool {
    let case = format!("operation {nth}, for ever: {for_ever}, {fault:?}, {options:?}");
    let disk = CrashDisk::new(LEN, nth, CrashOptions::default());
    let faults = FaultPlan::new(nth, for_ever, fault);
    let session = TestSession::with_faults(&disk, Some(faults.clone()));
    let may_end_well = options.reconnect_max > Duration::ZERO && !for_ever;
    let volume = Volume::open(session.connect(), geometry(LEN), session.clone(), options).unwrap();
    let oracle = Oracle::default();
    let lived = life(&volume, &oracle);
    let group = oracle.flush();
    let ended = lived.and_then(|()| volume.close());
    match &ended {
        Ok(()) => {
            oracle.durable(group);
            assert!(volume.failure().is_none(), "{case}");
            assert_eq!(volume.stats().unsynced_bytes, 0, "{case}");
        }
        Err(error) => {
            assert!(faults.struck(), "failed without a fault: {error:?}, {case}");
            let failure = volume.failure();
            assert!(
                failure.is_some(),
                "failed without a cause: {error:?}, {case}"
            );
            let first = volume.flush(Flush::Durable);
            assert!(
                matches!(first, Err(VolumeError::Failed(_))),
                "worked after failing: {case}"
            );
            assert!(
                !(may_end_well && fault.loses_line()),
                "{failure:?} after one loss, {case}"
            );
            let kind_fits = match fault {
                Fault::NoSpace => matches!(failure.as_deref(), Some(VolumeError::NoSpace(_))),
                Fault::LostBefore | Fault::LostAfter => {
                    matches!(failure.as_deref(), Some(VolumeError::ConnectionLost { .. }))
                }
                Fault::Refused | Fault::Protocol => {
                    matches!(failure.as_deref(), Some(VolumeError::Store { .. }))
                }
            };
            assert!(kind_fits || for_ever, "{failure:?}: {case}");
        }
    }
    drop(volume);
    for crash in 0..4 {
        let legal = oracle.check(&disk.crash_image(crash), oracle.durable_group());
        assert_eq!(legal, Ok(()), "{case}");
    }
    faults.struck()
}

fn every(for_ever: bool, options: &VolumeOptions) {
    for fault in Fault::ALL {
        let options = options.clone();
        let clean = within(LIMIT, move || {
            (1..600).find(|nth| !one(*nth, for_ever, fault, options.clone()))
        });
        let clean = clean.unwrap_or_else(|| panic!("{fault:?} still strikes at operation 600"));
        assert!(clean > 20, "{fault:?}: only {clean} operations were tried");
    }
}

/// One sender, so that the operations come in nearly the same order each time.
fn in_order() -> VolumeOptions {
    one_sender(tiny())
}

fn one_sender(options: VolumeOptions) -> VolumeOptions {
    VolumeOptions {
        writers: 1,
        quiet_time: Duration::from_millis(2),
        read_ahead_bytes_max: 0,
        reconnect_max: Duration::from_millis(12),
        ..options
    }
}

#[test]
fn operation_that_fails_once_loses_no_durable_byte() {
    every(
        false,
        &VolumeOptions {
            reconnect_max: Duration::from_secs(20),
            ..in_order()
        },
    );
}

#[test]
fn operation_that_fails_once_in_batched_epochs_loses_no_durable_byte() {
    every(
        false,
        &VolumeOptions {
            reconnect_max: Duration::from_secs(20),
            ..one_sender(batching())
        },
    );
}

#[test]
fn operations_that_fail_for_ever_end_the_volume_cleanly() {
    every(true, &in_order());
}

#[test]
fn without_reconnecting_the_first_loss_ends_the_volume_cleanly() {
    every(
        false,
        &VolumeOptions {
            reconnect_max: Duration::ZERO,
            ..in_order()
        },
    );
}

#[test]
fn failed_flush_sends_everything_again_on_a_new_connection() {
    within(LIMIT, || {
        let options = CrashOptions {
            fail_flush_per_1000: 1000,
            ..CrashOptions::default()
        };
        let disk = CrashDisk::new(LEN, 1, options);
        let session = TestSession::new(&disk);
        let options = VolumeOptions {
            reconnect_delay: Duration::from_millis(300),
            ..tiny()
        };
        let volume =
            Volume::open(session.connect(), geometry(LEN), session.clone(), options).unwrap();
        volume.write_at(0, &stamped(1)).unwrap();
        volume.write_at(8 * BLOCK as u64, &stamped(2)).unwrap();
        volume.flush(Flush::Ordered).unwrap();
        let volume = Arc::new(volume);
        while volume.stats().losses == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        disk.be_kind();
        volume.close().unwrap();
        assert_eq!(stamp_of(&disk.durable()[..BLOCK]), 1);
        assert_eq!(stamp_of(&disk.durable()[8 * BLOCK..9 * BLOCK]), 2);
        let stats = volume.stats();
        assert!(
            stats.wire_write_requests >= 4,
            "both blocks were sent twice: {stats:?}"
        );
        assert!(stats.losses <= 3, "{stats:?}");
    });
}
