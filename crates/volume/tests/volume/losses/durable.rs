//! A server that lost data it had reported as durable.

use super::*;

/// Epochs that were reported as durable are gone after a reconnect. This is detected 100 of 100
/// times, before anything more is sent, whatever part of them is gone.
#[test]
fn reconnect_detects_a_server_that_lost_durable_data() {
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
            // What was under way when the connection was lost may have arrived.
            let sent = |bytes: Vec<u8>| [&bytes[..62 * BLOCK], &bytes[63 * BLOCK..]].concat();
            assert!(
                sent(disk.present()) == sent(image),
                "seed {seed}: something was sent"
            );
        }
    });
}

/// Parts of an epoch that is larger than the buffer are durable before its end.
#[test]
fn reconnect_detects_loss_of_a_durable_part_of_an_epoch() {
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
fn reconnect_detects_a_file_that_ends_before_durable_data() {
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

/// The same without a lost connection: the close detects it.
#[test]
fn close_detects_a_server_that_lost_durable_data() {
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
