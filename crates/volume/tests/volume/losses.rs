//! What a lost connection, a failed fsync and an in-doubt write count for, in each order.

mod durable;
mod hour;

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::{
    BLOCK, LIMIT, TestSession, at, geometry, read_stamp, stamp_of, stamped, tiny,
};
use sprat_store::{FileStat, ReadClass, StoreError, StoreFile};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::dice::Dice;
use sprat_testkit::fault::{Fault, FaultPlan};
use sprat_testkit::watchdog::within;
use sprat_testkit::wrapped::WrappedFile;
use sprat_testkit::{needs, requires};
use sprat_volume::{Flush, Volume, VolumeError, VolumeOptions};

const LEN: usize = 64 * BLOCK;

/// The outcome of one fsync.
enum Fsync {
    /// The connection is lost before the fsync arrives.
    Lost,
    /// The server answers "failure".
    Fails,
    /// It succeeds, and then the old server's process writes this to block 0, late.
    ThenLate(u64),
}

/// A session whose next fsyncs end as scripted, on any connection; later ones succeed.
struct Scripted {
    session: Arc<TestSession>,
    disk: CrashDisk,
    fsyncs: Arc<Mutex<VecDeque<Fsync>>>,
}

impl Scripted {
    fn new(fsyncs: impl IntoIterator<Item = Fsync>) -> Self {
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let fsyncs = Arc::new(Mutex::new(fsyncs.into_iter().collect()));
        let (server, next) = (disk.clone(), Arc::clone(&fsyncs));
        let session = TestSession::wrapping(&disk, move |file| {
            let (server, next) = (server.clone(), Arc::clone(&next));
            let wrapped =
                WrappedFile::new(file).on_flush(move |below| fsync(below, &server, &next));
            Arc::new(wrapped)
        });
        Self {
            session,
            disk,
            fsyncs,
        }
    }

    fn open(&self, options: VolumeOptions) -> Result<Volume, VolumeError> {
        let file = self.session.connect();
        Volume::open(file, geometry(LEN), self.session.clone(), options)
    }

    fn left(&self) -> usize {
        self.fsyncs.lock().unwrap().len()
    }
}

/// The next fsync by the script.
fn fsync(
    below: &dyn StoreFile,
    server: &CrashDisk,
    script: &Mutex<VecDeque<Fsync>>,
) -> Result<(), StoreError> {
    let next = script.lock().unwrap().pop_front();
    match next {
        None => below.flush(),
        Some(Fsync::Lost) => {
            server.lose_lines();
            below.flush()
        }
        Some(Fsync::Fails) => Err(StoreError::Refused {
            op: "flush",
            object: "container".to_owned(),
            reason: "Failure".to_owned(),
        }),
        Some(Fsync::ThenLate(stamp)) => {
            below.flush()?;
            server.connect().write_at(0, &stamped(stamp))
        }
    }
}

/// Of the first connection and of one that was made again.
#[test]
fn write_that_waited_is_not_sent_once_the_lock_is_lost() {
    within(LIMIT, || {
        for again in [false, true] {
            let scripted = Scripted::new(again.then_some(Fsync::Lost));
            let volume = scripted.open(tiny()).unwrap();
            volume.write_at(0, &stamped(1)).unwrap();
            volume.flush(Flush::Durable).unwrap();
            let lost = &scripted.session.lost_while_waiting;
            lost.store(true, Ordering::SeqCst);
            volume.write_at(0, &stamped(2)).unwrap();
            let Err(VolumeError::Failed(cause)) = volume.flush(Flush::Durable) else {
                panic!("it was sent");
            };
            let chain = format!("{cause:?}");
            assert!(chain.contains("the lock is another's"), "{chain}");
            assert_eq!(stamp_of(&scripted.disk.durable()[..BLOCK]), 1);
        }
    });
}

#[test]
fn connections_lost_during_an_fsync_are_not_failed_fsyncs() {
    use Fsync::{Fails, Lost};
    within(LIMIT, || {
        let fsyncs = [Lost, Lost, Lost, Lost, Fails, Lost, Fails, Lost, Fails];
        let scripted = Scripted::new(fsyncs);
        let volume = scripted.open(tiny()).unwrap();
        volume.write_at(0, &stamped(1)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        assert_eq!(scripted.left(), 0);
        assert_eq!(stamp_of(&scripted.disk.durable()[..BLOCK]), 1);
        volume.close().unwrap();
        // One more in a row is one too many.
        let scripted = Scripted::new([Lost, Fails, Fails, Lost, Fails, Fails]);
        let volume = scripted.open(tiny()).unwrap();
        volume.write_at(0, &stamped(1)).unwrap();
        let ended = volume.flush(Flush::Durable);
        let Err(VolumeError::Failed(cause)) = ended else {
            panic!("{ended:?}");
        };
        assert!(matches!(*cause, VolumeError::Store { .. }), "{cause:?}");
    });
}

/// Writes an epoch that is larger than the buffer, without a flush from above.
fn write_a_long_epoch(volume: &Volume, blocks: Range<u64>) {
    for block in blocks {
        let bytes = stamped(block);
        volume.write_at(block * BLOCK as u64, &bytes).unwrap();
    }
}

#[test]
fn nothing_is_resolved_in_part_while_a_lost_write_may_arrive() {
    within(LIMIT, || {
        let scripted = Scripted::new([]);
        let session = &scripted.session;
        let options = VolumeOptions {
            quiet_time: Duration::from_secs(1000),
            ..tiny()
        };
        let volume = scripted.open(options).unwrap();
        scripted.disk.lose_lines();
        volume.write_at(0, &stamped(7)).unwrap();
        volume.flush(Flush::Durable).unwrap();
        let stats = volume.stats();
        assert_eq!((stats.in_doubt_blocks, stats.losses), (1, 1));
        write_a_long_epoch(&volume, 1..60);
        let behind = volume.stats().wire_flushes - stats.wire_flushes;
        assert_eq!(volume.stats().in_doubt_blocks, 1);
        assert!(behind > 0, "the epoch was not made durable in parts");
        assert_eq!(session.settlements_in_part.load(Ordering::SeqCst), 0);
        let noted: u64 = session.in_doubt().iter().map(|it| it.end - it.start).sum();
        assert!(noted >= behind * BLOCK as u64, "{noted}");
        drop(volume);
        // The same with nothing in doubt, to prove that the test above can fail.
        let scripted = Scripted::new([]);
        let volume = scripted.open(tiny()).unwrap();
        write_a_long_epoch(&volume, 1..60);
        let in_part = &scripted.session.settlements_in_part;
        assert!(in_part.load(Ordering::SeqCst) > 0);
    });
}

#[test]
fn recovered_blocks_of_a_dead_session_are_read_back() {
    within(LIMIT, || {
        // Later than the quiet time allows for: after the fsync of the recovery.
        let scripted = Scripted::new([Fsync::ThenLate(99)]);
        scripted.disk.connect().write_at(0, &stamped(5)).unwrap();
        let options = VolumeOptions {
            in_doubt: std::iter::once(0..BLOCK as u64).collect(),
            old_server_dead: true,
            ..tiny()
        };
        let ended = scripted.open(options).and_then(|volume| volume.close());
        let Err(VolumeError::Failed(cause)) = ended else {
            panic!("a late write was not detected: {ended:?}");
        };
        let foreign = VolumeError::ForeignWrite { offset: 0 };
        assert_eq!(format!("{cause:?}"), format!("{foreign:?}"));
        assert_eq!(scripted.left(), 0);
        assert_eq!(scripted.session.settlements.load(Ordering::SeqCst), 0);
    });
}

fn lost() -> StoreError {
    StoreError::Disconnected {
        op: "renew",
        object: "lock".into(),
        reason: "cut".into(),
    }
}

/// Two short losses, further apart than `reconnect_max`; with a block in the open epoch that no
/// flush was called for, and with reads in between.
#[test]
fn second_short_loss_long_after_the_first_is_a_new_outage() {
    within(LIMIT, || {
        for (unsealed, reads) in [(false, true), (true, false), (true, true)] {
            let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
            let session = TestSession::new(&disk);
            let options = VolumeOptions {
                reconnect_max: Duration::from_millis(400),
                early_send_bytes_min: 8 * BLOCK,
                read_cache_bytes_max: 0,
                read_ahead_bytes_max: 0,
                ..tiny()
            };
            let volume =
                Volume::open(session.connect(), geometry(LEN), session.clone(), options).unwrap();
            volume.write_at(at(1), &stamped(1)).unwrap();
            volume.flush(Flush::Durable).unwrap();
            if unsealed {
                volume.write_at(at(2), &stamped(2)).unwrap();
            }
            for loss in 1..=3 {
                disk.lose_lines();
                volume.connection_lost(lost());
                let until = Instant::now() + LIMIT;
                while session.reconnects.load(Ordering::SeqCst) < loss && Instant::now() < until {
                    std::thread::sleep(Duration::from_millis(5));
                }
                std::thread::sleep(Duration::from_millis(600));
                if reads {
                    read_stamp(&volume, 20).unwrap();
                }
                assert_eq!(session.reconnects.load(Ordering::SeqCst), loss);
                assert!(volume.failure().is_none(), "{:?}", volume.failure());
            }
            volume.close().unwrap();
        }
    });
}

/// No caller waits: the block is in the open epoch, and the server is away far longer than the
/// limit.
#[test]
fn block_without_a_flush_survives_any_outage() {
    within(LIMIT, || {
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let session = TestSession::new(&disk);
        let options = VolumeOptions {
            reconnect_max: Duration::from_millis(200),
            ..tiny()
        };
        let volume =
            Volume::open(session.connect(), geometry(LEN), session.clone(), options).unwrap();
        volume.write_at(at(2), &stamped(2)).unwrap();
        session.unreachable.store(true, Ordering::SeqCst);
        disk.lose_lines();
        volume.connection_lost(lost());
        std::thread::sleep(Duration::from_secs(1));
        assert!(volume.failure().is_none(), "{:?}", volume.failure());
        let stats = volume.stats();
        assert!(stats.reconnecting_since.is_some());
        assert!(stats.lost_because.unwrap().contains("refused"));
        // From now on a caller waits.
        let ended = volume.flush(Flush::Durable);
        let Err(VolumeError::Failed(cause)) = ended else {
            panic!("{ended:?}");
        };
        assert!(
            matches!(*cause, VolumeError::ConnectionLost { .. }),
            "{cause:?}"
        );
    });
}

/// A session in which reads fail on every connection where `refuses` returns their error.
fn picky(
    disk: &CrashDisk,
    refuses: impl Fn(u64) -> Option<StoreError> + Send + Sync + 'static,
) -> Arc<TestSession> {
    let refuses = Arc::new(refuses);
    TestSession::wrapping(disk, move |file| {
        let refuses = Arc::clone(&refuses);
        let wrapped =
            WrappedFile::new(file).on_read(move |below, offset, buf, class| {
                match refuses(offset) {
                    Some(error) => Err(error),
                    None => below.read_at(offset, buf, class),
                }
            });
        Arc::new(wrapped)
    })
}

/// The server answers all reads but one, on each connection. The session ends, although other reads
/// and flushes succeed.
#[test]
fn one_read_that_no_connection_answers_ends_the_volume() {
    let deaf = |offset: u64| {
        (offset == at(32)).then(|| {
            // As a store does after its time limit.
            std::thread::sleep(Duration::from_millis(100));
            lost()
        })
    };
    within(LIMIT, move || {
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let session = picky(&disk, deaf);
        let options = VolumeOptions {
            reconnect_max: Duration::from_millis(300),
            read_ahead_bytes_max: 0,
            ..tiny()
        };
        let volume = Volume::open(session.connect(), geometry(LEN), session, options).unwrap();
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| read_stamp(&volume, 32));
            let mut stamp = 0;
            while !reading.is_finished() {
                stamp += 1;
                let written = volume.write_at(at(1), &stamped(stamp));
                let _ = written.and_then(|()| volume.flush(Flush::Durable));
                let _ = read_stamp(&volume, 1);
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(reading.join().unwrap().is_err());
        });
        let cause = volume.failure().unwrap();
        assert!(
            matches!(*cause, VolumeError::ConnectionLost { .. }),
            "{cause:?}"
        );
    });
}

/// Each operation fails once with "failure", as on a server whose disk is away for a moment.
#[test]
fn failure_of_any_one_operation_is_retried_on_a_new_connection() {
    within(LIMIT, || {
        for nth in 1..20 {
            let disk = CrashDisk::new(LEN, nth, CrashOptions::default());
            let plan = FaultPlan::new(nth, false, Fault::Refused);
            let session = TestSession::with_faults(&disk, Some(plan));
            let volume =
                Volume::open(session.connect(), geometry(LEN), session.clone(), tiny()).unwrap();
            for block in 0..4 {
                volume
                    .write_at(at(block), &stamped(block as u64 + 1))
                    .unwrap();
                volume.flush(Flush::Durable).unwrap();
                assert_eq!(read_stamp(&volume, 40 + block).unwrap(), 0);
            }
            volume.close().unwrap();
            for block in 0..4 {
                let found = stamp_of(&disk.durable()[block * BLOCK..(block + 1) * BLOCK]);
                assert_eq!(found, block as u64 + 1, "operation {nth}");
            }
        }
        // An operation that fails for ever ends the session.
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        let plan = FaultPlan::new(1, true, Fault::Refused);
        let session = TestSession::with_faults(&disk, Some(plan));
        let volume =
            Volume::open(session.connect(), geometry(LEN), session.clone(), tiny()).unwrap();
        assert!(read_stamp(&volume, 3).is_err());
        assert!(session.reconnects.load(Ordering::SeqCst) >= 3);
    });
}

/// Reading an in-doubt block back is retried as writing is.
#[test]
fn failed_read_back_is_retried_on_a_new_connection() {
    within(LIMIT, || {
        for (failures, borne) in [(3, true), (100, false)] {
            let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
            let left = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&left);
            let moody = move |offset: u64| {
                let fail = |left: usize| left.checked_sub(1);
                let order = Ordering::SeqCst;
                let refused = offset == at(5) && counted.fetch_update(order, order, fail).is_ok();
                refused.then(|| StoreError::Refused {
                    op: "read",
                    object: "container".to_owned(),
                    reason: "Failure".to_owned(),
                })
            };
            let session = picky(&disk, moody);
            let volume = Volume::open(session.connect(), geometry(LEN), session, tiny()).unwrap();
            disk.lose_lines();
            volume.write_at(at(5), &stamped(7)).unwrap();
            left.store(failures, Ordering::SeqCst);
            volume.flush(Flush::Durable).unwrap();
            let closed = volume.close();
            assert_eq!(closed.is_ok(), borne, "{failures}: {closed:?}");
            assert_eq!(left.load(Ordering::SeqCst) == 0, borne);
            assert_eq!(stamp_of(&disk.durable()[5 * BLOCK..][..BLOCK]), 7);
        }
    });
}

/// Counts how many requests a takeover has under way at once, and its round trips.
#[derive(Default)]
struct Counted {
    blocks: Mutex<HashMap<u64, Vec<u8>>>,
    read_batches: AtomicUsize,
    read_blocks: AtomicUsize,
    written_blocks: AtomicUsize,
    write_batches: AtomicUsize,
}

const HUGE: u64 = 1 << 40;

impl StoreFile for Counted {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(HUGE)
    }
    fn stat(&self) -> Result<FileStat, StoreError> {
        Ok(FileStat {
            len: HUGE,
            modified_s: None,
            regular: true,
            allocated_bytes: None,
        })
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.read_parts_at(&mut [(offset, buf)], class)
    }
    fn read_parts_at(
        &self,
        parts: &mut [(u64, &mut [u8])],
        _: ReadClass,
    ) -> Result<(), StoreError> {
        self.read_batches.fetch_add(1, Ordering::SeqCst);
        let blocks = self.blocks.lock().unwrap();
        for (offset, buf) in parts {
            for (index, piece) in buf.chunks_exact_mut(BLOCK).enumerate() {
                self.read_blocks.fetch_add(1, Ordering::SeqCst);
                let block = *offset / BLOCK as u64 + index as u64;
                match blocks.get(&block) {
                    Some(bytes) => piece.copy_from_slice(bytes),
                    None => piece.fill(9),
                }
            }
        }
        Ok(())
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.write_parts_at(&[(offset, data)])
    }
    fn write_parts_at(&self, parts: &[(u64, &[u8])]) -> Result<(), StoreError> {
        self.write_batches.fetch_add(1, Ordering::SeqCst);
        let mut blocks = self.blocks.lock().unwrap();
        for (offset, data) in parts {
            for (index, piece) in data.chunks_exact(BLOCK).enumerate() {
                self.written_blocks.fetch_add(1, Ordering::SeqCst);
                blocks.insert(offset / BLOCK as u64 + index as u64, piece.to_vec());
            }
        }
        Ok(())
    }
    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), StoreError> {
        unreachable!()
    }
    fn resize(&self, _: u64) -> Result<(), StoreError> {
        unreachable!()
    }
}

#[test]
fn takeover_recovers_scattered_blocks_in_few_round_trips() {
    within(LIMIT, || {
        const IN_DOUBT: usize = 4000;
        let file = Arc::new(Counted::default());
        let session = TestSession::new(&CrashDisk::new(LEN, 1, CrashOptions::default()));
        let in_doubt: Vec<Range<u64>> = (0..IN_DOUBT as u64)
            .map(|n| n * 4096 * 1000..n * 4096 * 1000 + 4096)
            .collect();
        let options = VolumeOptions {
            in_doubt,
            old_server_dead: true,
            zeros_are_holes: true,
            ..VolumeOptions::default()
        };
        let len = usize::try_from(HUGE).unwrap();
        let volume = Volume::open(file.clone(), geometry(len), session, options).unwrap();
        volume.close().unwrap();
        let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
        // Each block is read, and read back once it is durable; plus a few samples.
        assert!(count(&file.read_blocks) <= 2 * IN_DOUBT + 200);
        assert_eq!(count(&file.written_blocks), IN_DOUBT);
        let (reads, writes) = (count(&file.read_batches), count(&file.write_batches));
        assert!(reads <= 12 && writes <= 8, "{reads} reads, {writes} writes");
    });
}

/// If this is set, a limit on memory leaves no space for the stack of one more thread. Its value
/// says whether the server has lost a block.
const THREADLESS: &str = "SPRAT_TEST_VOLUME_THREADLESS";

#[test]
fn volume_is_closed_and_compared_without_another_thread() {
    requires!(needs::program("prlimit"));
    let Some(lost) = std::env::var_os(THREADLESS) else {
        for lost in ["no", "yes"] {
            let output = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "losses::volume_is_closed_and_compared_without_another_thread",
                ])
                .arg("--test-threads=1")
                .env(THREADLESS, lost)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(
                output.status.success() && said.contains("1 passed"),
                "lost: {lost}: {output:?}"
            );
        }
        return;
    };
    let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
    let session = TestSession::new(&disk);
    let volume = Volume::open(session.connect(), geometry(LEN), session.clone(), tiny()).unwrap();
    volume.write_at(at(3), &stamped(7)).unwrap();
    volume.flush(Flush::Durable).unwrap();
    if lost == "yes" {
        disk.connect().write_at(at(3), &stamped(0)).unwrap();
    }
    wait_until_other_threads_sleep();
    limit_memory_until_no_thread_begins();
    let closed = volume.close();
    assert_eq!(closed.is_err(), lost == "yes", "{closed:?}");
}

/// On a busy machine a thread that was begun may not have run yet. It still allocates a stack for signals, and aborts
/// the process if it can't.
fn wait_until_other_threads_sleep() {
    let own = std::fs::read_link("/proc/thread-self").unwrap();
    let sleeps = |task: &std::fs::DirEntry| {
        // Its name, which is in parentheses, stands before the state. One that is gone needs nothing.
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ")
            .next()
            .is_none_or(|state| state.is_empty() || state.starts_with('S'))
    };
    let all_sleep = || {
        let mut tasks = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .map(Result::unwrap);
        tasks.all(|task| Some(&*task.file_name()) == own.file_name() || sleeps(&task))
    };
    while !all_sleep() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A thread of the volume that ended leaves its stack to the next one, so threads are begun, and stay, until one is
/// refused.
fn limit_memory_until_no_thread_begins() {
    for _ in 0..50 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.split("VmSize:").nth(1).unwrap();
        let kibibytes: u64 = size.split_whitespace().next().unwrap().parse().unwrap();
        let limited = Command::new("prlimit")
            .args(["--pid", &std::process::id().to_string()])
            // The heap may grow once more, by less than a stack.
            .arg(format!("--as={}:", (kibibytes + 192) * 1024))
            .status();
        assert!(limited.unwrap().success());
        let small = std::thread::Builder::new().stack_size(256 << 10);
        let stays = || {
            loop {
                std::thread::park();
            }
        };
        if small.spawn(stays).is_err() {
            return;
        }
    }
    panic!("a thread begins under each limit, so this proves nothing");
}
