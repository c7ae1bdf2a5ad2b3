//! Many short losses over a long time.

use super::*;

/// An hour on a clock that is 1,000 times as fast: 20 random losses of a second each.
#[test]
fn many_short_losses_over_an_hour_end_no_session() {
    within(LIMIT, || {
        let mut dice = Dice::new(18);
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let options = VolumeOptions {
            reconnect_max: Duration::from_millis(900),
            read_cache_bytes_max: 0,
            ..tiny()
        };
        let open = |busy: bool| {
            let session = TestSession::new(&disk);
            let volume = Volume::open(
                session.connect(),
                geometry(LEN),
                session.clone(),
                options.clone(),
            );
            (busy, session, volume.unwrap())
        };
        let volumes = [open(true), open(false)];
        volumes[1].2.write_at(at(50), &stamped(5)).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut stamp = 0;
                while !stop.load(Ordering::SeqCst) {
                    stamp += 1;
                    volumes[0].2.write_at(at(3), &stamped(stamp)).unwrap();
                    volumes[0].2.flush(Flush::Durable).unwrap();
                    read_stamp(&volumes[0].2, 30).unwrap();
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(dice.below(360)));
                for (_, session, volume) in &volumes {
                    session.unreachable.store(true, Ordering::SeqCst);
                    volume.connection_lost(lost());
                }
                disk.lose_lines();
                std::thread::sleep(Duration::from_millis(3));
                for (_, session, _) in &volumes {
                    session.unreachable.store(false, Ordering::SeqCst);
                }
            }
            stop.store(true, Ordering::SeqCst);
            writing.join().unwrap();
        });
        for (busy, session, volume) in &volumes {
            assert!(volume.failure().is_none(), "{busy} {:?}", volume.failure());
            // After a connection on which nothing succeeded, the next attempt waits.
            let times = session.reconnects.load(Ordering::SeqCst);
            assert!(times >= if *busy { 10 } else { 1 }, "{busy} {times}");
            volume.close().unwrap();
        }
    });
}
