//! A server that lost what it had called durable.

use super::*;

/// Epochs that were answered as durable are gone after the reconnect: 100 of 100 times it is noticed,
/// before anything more is sent, whatever part of them is gone.
#[test]
fn a_server_that_lost_what_it_had_called_durable_is_found_out_at_the_reconnect() {
    within(LIMIT, || {
        for seed in 0..100 {
            let mut dice = Dice::new(seed);
            let disk = CrashDisk::new(LEN, seed, CrashOptions::default());
            let session = TestSession::new(&disk);
            let volume =
                Volume::open(session.connect(), geometry(LEN), session.clone(), tiny()).unwrap();
            let epochs = 2 + dice.below(12);
            let kept = dice.below(epochs);
            let mut image = disk.durable();
            for epoch in 0..epochs {
                if epoch == kept {
                    image = disk.durable();
                }
                for _ in 0..=dice.below(3) {
                    let block = usize::try_from(dice.below(60)).unwrap();
                    volume.write_at(at(block), &stamped(100 + epoch)).unwrap();
                }
                volume.flush(Flush::Durable).unwrap();
            }
            disk.go_back_to(&image);
            volume.write_at(at(62), &stamped(7)).unwrap();
            let flushed = volume.flush(Flush::Durable);
            let Err(VolumeError::Failed(cause)) = flushed else {
                panic!("seed {seed}: {flushed:?}");
            };
            assert!(
                matches!(*cause, VolumeError::LostDurable { .. }),
                "seed {seed}: {cause:?}"
            );
            // What was on its way when the connection was lost may have arrived.
            let sent = |bytes: Vec<u8>| [&bytes[..62 * BLOCK], &bytes[63 * BLOCK..]].concat();
            assert!(
                sent(disk.present()) == sent(image),
                "seed {seed}: something was sent"
            );
        }
    });
}

/// Of an epoch that is larger than the buffer parts are durable before its end.
#[test]
fn what_was_durable_in_parts_is_missed_too_where_the_server_lost_it() {
    within(LIMIT, || {
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let session = TestSession::new(&disk);
        let volume =
            Volume::open(session.connect(), geometry(LEN), session.clone(), tiny()).unwrap();
        let image = disk.durable();
        write_a_long_epoch(&volume, 0..60);
        assert!(volume.stats().wire_flushes > 0);
        disk.go_back_to(&image);
        misses_what_was_durable(&volume);
    });
}

#[test]
fn what_was_durable_is_missed_too_where_the_file_ends_before_it() {
    within(LIMIT, || {
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let session = TestSession::new(&disk);
        let volume =
            Volume::open(session.connect(), geometry(LEN), session.clone(), tiny()).unwrap();
        volume.write_at(at(50), &stamped(1)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        disk.go_back_to(&disk.durable()[..40 * BLOCK]);
        misses_what_was_durable(&volume);
    });
}

#[track_caller]
fn misses_what_was_durable(volume: &Volume) {
    let written = volume.write_at(at(3), &stamped(7));
    let flushed = written.and_then(|()| volume.flush(Flush::Durable));
    let Err(VolumeError::Failed(cause)) = flushed else {
        panic!("{flushed:?}");
    };
    assert!(
        matches!(*cause, VolumeError::LostDurable { .. }),
        "{cause:?}"
    );
}

/// The same where no connection was lost: it is found out at the close.
#[test]
fn a_server_that_lost_what_it_had_called_durable_is_found_out_at_the_close() {
    within(LIMIT, || {
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let session = TestSession::new(&disk);
        let volume =
            Volume::open(session.connect(), geometry(LEN), session.clone(), tiny()).unwrap();
        for block in 0..8 {
            volume.write_at(at(block), &stamped(100)).unwrap();
            volume.flush(Flush::Durable).unwrap();
        }
        disk.connect().write_at(at(7), &stamped(0)).unwrap();
        let closed = volume.close();
        let Err(VolumeError::Failed(cause)) = closed else {
            panic!("{closed:?}");
        };
        let lost_at = VolumeError::LostDurable { offset: at(7) };
        assert_eq!(format!("{cause:?}"), format!("{lost_at:?}"));
    });
}
