//! What a lost line, a failed fsync and a suspect may count for, and what not; moment by moment.

#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sprat_store::{FileStat, ReadClass, StoreError, StoreFile};
use sprat_testkit::crash::{CrashDisk, CrashOptions};
use sprat_testkit::watchdog::within;
use sprat_volume::{Fenced, Flush, ReconnectError, Session, Volume, VolumeError, VolumeOptions};
use support::{BLOCK, LIMIT, TestSession, geometry, stamp_of, stamped, tiny};

const LEN: usize = 64 * BLOCK;

/// What becomes of one fsync.
enum Fsync {
    /// The line is lost before it arrives.
    Lost,
    /// The server answers "failure".
    Fails,
    /// It is done, and then the old server's process writes this block 0, late.
    ThenLate(u64),
}

/// A session whose next fsyncs go as told, on whatever connection; those behind them go well.
struct Scripted {
    session: Arc<TestSession>,
    disk: CrashDisk,
    fsyncs: Arc<Mutex<VecDeque<Fsync>>>,
}

impl Scripted {
    fn new(fsyncs: impl IntoIterator<Item = Fsync>) -> Arc<Self> {
        let disk = CrashDisk::new(LEN, 1, CrashOptions::default());
        Arc::new(Self {
            session: TestSession::new(&disk),
            disk,
            fsyncs: Arc::new(Mutex::new(fsyncs.into_iter().collect())),
        })
    }

    fn wrap(&self, below: Arc<dyn StoreFile>) -> Arc<dyn StoreFile> {
        Arc::new(ScriptedFile {
            below,
            disk: self.disk.clone(),
            fsyncs: self.fsyncs.clone(),
        })
    }

    fn open(self: &Arc<Self>, options: VolumeOptions) -> Result<Volume, VolumeError> {
        let file = self.wrap(self.session.connect());
        Volume::open(file, geometry(LEN), self.clone(), options)
    }

    fn left(&self) -> usize {
        self.fsyncs.lock().unwrap().len()
    }
}

impl Session for Scripted {
    fn before_epoch(&self) -> Result<(), Fenced> {
        self.session.before_epoch()
    }
    fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), Fenced> {
        self.session.before_send(ranges)
    }
    fn settled(&self) {
        self.session.settled();
    }
    fn settled_in_part(&self, ranges: &[Range<u64>]) {
        self.session.settled_in_part(ranges);
    }
    fn reconnect(&self, attempt: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        Ok(self.wrap(self.session.reconnect(attempt)?))
    }
}

struct ScriptedFile {
    below: Arc<dyn StoreFile>,
    disk: CrashDisk,
    fsyncs: Arc<Mutex<VecDeque<Fsync>>>,
}

impl StoreFile for ScriptedFile {
    fn len(&self) -> Result<u64, StoreError> {
        self.below.len()
    }
    fn stat(&self) -> Result<FileStat, StoreError> {
        self.below.stat()
    }
    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.below.read_at(offset, buf, class)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.below.write_at(offset, data)
    }
    fn flush(&self) -> Result<(), StoreError> {
        let next = self.fsyncs.lock().unwrap().pop_front();
        match next {
            None => self.below.flush(),
            Some(Fsync::Lost) => {
                self.disk.lose_lines();
                self.below.flush()
            }
            Some(Fsync::Fails) => Err(StoreError::Refused {
                op: "flush",
                object: "container".to_owned(),
                reason: "Failure".to_owned(),
            }),
            Some(Fsync::ThenLate(stamp)) => {
                self.below.flush()?;
                self.disk.connect().write_at(0, &stamped(stamp))
            }
        }
    }
    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.below.discard(offset, len)
    }
    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.below.resize(len)
    }
}

#[test]
fn lines_lost_during_an_fsync_do_not_count_as_failed_fsyncs() {
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

/// Written without a flush from above, in an epoch that is larger than the buffer.
fn write_a_long_epoch(volume: &Volume, blocks: Range<u64>) {
    for block in blocks {
        let bytes = stamped(block);
        volume.write_at(block * BLOCK as u64, &bytes).unwrap();
    }
}

#[test]
fn nothing_is_settled_in_part_while_a_lost_write_may_still_arrive() {
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
        assert_eq!((stats.suspect_blocks, stats.losses), (1, 1));
        write_a_long_epoch(&volume, 1..60);
        let behind = volume.stats().wire_flushes - stats.wire_flushes;
        assert_eq!(volume.stats().suspect_blocks, 1);
        assert!(behind > 0, "the epoch was not made durable in parts");
        assert_eq!(session.settlements_in_part.load(Ordering::SeqCst), 0);
        let noted: u64 = session.suspects().iter().map(|it| it.end - it.start).sum();
        assert!(noted >= behind * BLOCK as u64, "{noted}");
        drop(volume);
        // The same without a suspect, so that the above shows something.
        let scripted = Scripted::new([]);
        let volume = scripted.open(tiny()).unwrap();
        write_a_long_epoch(&volume, 1..60);
        let in_part = &scripted.session.settlements_in_part;
        assert!(in_part.load(Ordering::SeqCst) > 0);
    });
}

#[test]
fn what_a_dead_session_left_is_read_back_after_it_was_settled() {
    within(LIMIT, || {
        // Later than its server was believed to be able to: behind the fsync that settles.
        let scripted = Scripted::new([Fsync::ThenLate(99)]);
        scripted.disk.connect().write_at(0, &stamped(5)).unwrap();
        let options = VolumeOptions {
            suspects: std::iter::once(0..BLOCK as u64).collect(),
            suspects_quiet: true,
            ..tiny()
        };
        let ended = scripted.open(options).and_then(|volume| volume.close());
        let Err(VolumeError::Failed(cause)) = ended else {
            panic!("a late write went unnoticed: {ended:?}");
        };
        let foreign = VolumeError::ForeignWrite { offset: 0 };
        assert_eq!(format!("{cause:?}"), format!("{foreign:?}"));
        assert_eq!(scripted.left(), 0);
        assert_eq!(scripted.session.settlements.load(Ordering::SeqCst), 0);
    });
}
