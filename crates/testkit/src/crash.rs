//! A server's disk that forgets: unsynced writes may be kept, lost or torn, and a lost connection may
//! write late.
//!
//! Blocks of 4096 bytes are never torn; a write of several may be torn between them. A flush makes
//! durable what was answered before it on its own connection, and nothing else. After a failed flush
//! its writes stay readable but are never durable, as on Linux (wiki.postgresql.org/wiki/Fsync_Errors).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use sprat_store::{FileStat, IgnorePoison, ReadClass, StoreError, StoreFile};

use crate::dice::Dice;

const BLOCK: usize = 4096;

/// What a [`CrashDisk`] does by chance.
#[derive(Debug, Clone, Copy, Default)]
pub struct CrashOptions {
    /// Longest delay of an operation, before and again after it is carried out: reorders them.
    pub delay_max: Duration,
    /// Operations, in 1000, at which the connection is lost.
    pub lose_line_per_1000: u64,
    /// Operations, in 1000, at which the machine loses power: the disk keeps what is durable and
    /// any part of the rest, and every connection is lost.
    pub power_cut_per_1000: u64,
    /// Flushes, in 1000, that fail.
    pub fail_flush_per_1000: u64,
    /// Writes in flight at a loss may still be done for this long.
    pub late_max: Duration,
}

#[derive(Debug)]
struct Unsynced {
    block: usize,
    bytes: Vec<u8>,
    connection: u64,
    answered: bool,
    write: u64,
    /// A flush that covered it failed: no later flush makes it durable.
    doomed: bool,
}

#[derive(Debug)]
struct Late {
    due: Instant,
    first: usize,
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Disk {
    durable: Vec<u8>,
    present: Vec<u8>,
    unsynced: Vec<Unsynced>,
    late: Vec<Late>,
    alive_from: u64,
    next_connection: u64,
    next_write: u64,
    dice: Dice,
    losses: u64,
    power_cuts: u64,
    late_writes: u64,
}

type Watcher = dyn Fn(&mut dyn FnMut() -> Vec<u8>) + Send + Sync;

/// See the module. Clones share the disk.
#[derive(Clone)]
pub struct CrashDisk {
    options: CrashOptions,
    disk: Arc<Mutex<Disk>>,
    watcher: Option<Arc<Watcher>>,
    quiet: Arc<AtomicU64>,
}

impl CrashDisk {
    /// A disk of zeros; `len` is a multiple of 4096.
    #[must_use]
    pub fn new(len: usize, seed: u64, options: CrashOptions) -> Self {
        assert!(len.is_multiple_of(BLOCK));
        let disk = Disk {
            durable: vec![0; len],
            present: vec![0; len],
            unsynced: Vec::new(),
            late: Vec::new(),
            alive_from: 1,
            next_connection: 1,
            next_write: 1,
            dice: Dice::new(seed),
            losses: 0,
            power_cuts: 0,
            late_writes: 0,
        };
        Self {
            options,
            disk: Arc::new(Mutex::new(disk)),
            watcher: None,
            quiet: Arc::new(AtomicU64::new(0)),
        }
    }

    /// Calls `watcher` before each write and flush, with a function that returns what the disk could
    /// contain after a crash at this moment: a different possibility at each call.
    #[must_use]
    pub fn watched(
        mut self,
        watcher: impl Fn(&mut dyn FnMut() -> Vec<u8>) + Send + Sync + 'static,
    ) -> Self {
        self.watcher = Some(Arc::new(watcher));
        self
    }

    /// A new connection to the file.
    #[must_use]
    pub fn connect(&self) -> Arc<dyn StoreFile> {
        let mut disk = self.disk();
        let connection = disk.next_connection;
        disk.next_connection += 1;
        Arc::new(CrashFile {
            server: self.clone(),
            connection,
        })
    }

    /// From now on nothing fails by chance; late writes may still come.
    pub fn be_kind(&self) {
        self.quiet.store(1, Ordering::SeqCst);
    }

    /// What is on the disk after a crash now, by `seed`.
    #[must_use]
    pub fn crash_image(&self, seed: u64) -> Vec<u8> {
        self.disk().image(&mut Dice::new(seed))
    }

    /// What readers see now.
    #[must_use]
    pub fn present(&self) -> Vec<u8> {
        self.disk().present.clone()
    }

    /// What is durable now.
    #[must_use]
    pub fn durable(&self) -> Vec<u8> {
        self.disk().durable.clone()
    }

    /// Lost connections, power cuts among them, and writes that came late.
    #[must_use]
    pub fn events(&self) -> (u64, u64, u64) {
        let disk = self.disk();
        (disk.losses, disk.power_cuts, disk.late_writes)
    }

    /// Cuts the power now.
    pub fn cut_power(&self) {
        self.disk().cut_power();
    }

    /// The server comes back with an older state, whatever it had called durable since; every
    /// connection is lost.
    pub fn go_back_to(&self, image: &[u8]) {
        let mut disk = self.disk();
        disk.durable = image.to_vec();
        disk.present = image.to_vec();
        disk.unsynced.clear();
        disk.late.clear();
        disk.alive_from = disk.next_connection;
        disk.losses += 1;
    }

    /// Loses every connection now.
    pub fn lose_lines(&self) {
        let mut disk = self.disk();
        disk.alive_from = disk.next_connection;
        disk.losses += 1;
    }

    fn disk(&self) -> MutexGuard<'_, Disk> {
        let mut disk = self.disk.lock().ignore_poison();
        disk.write_late();
        disk
    }

    fn chance(&self, disk: &mut Disk, per_1000: u64) -> bool {
        self.quiet.load(Ordering::SeqCst) == 0 && disk.dice.below(1000) < per_1000
    }

    fn delay(&self) {
        let max = u64::try_from(self.options.delay_max.as_micros()).unwrap_or(u64::MAX);
        if max > 0 {
            let delay = self.disk().dice.below(max);
            thread::sleep(Duration::from_micros(delay));
        }
    }

    fn watch(&self) {
        if let Some(watcher) = &self.watcher {
            watcher(&mut || {
                let mut disk = self.disk();
                let mut dice = Dice::new(disk.dice.any());
                disk.image(&mut dice)
            });
        }
    }
}

impl Disk {
    fn write_late(&mut self) {
        let now = Instant::now();
        // In the order of their sending, as one server process would.
        while let Some(at) = self.late.iter().position(|late| late.due <= now) {
            let late = self.late.remove(at);
            self.late_writes += 1;
            let torn = self.dice.percent(30);
            self.apply(late.first, &late.bytes, 0, torn);
        }
    }

    fn apply(&mut self, first: usize, bytes: &[u8], connection: u64, torn: bool) -> u64 {
        let write = self.next_write;
        self.next_write += 1;
        for (block, bytes) in (first..).zip(bytes.chunks_exact(BLOCK)) {
            if torn && self.dice.percent(50) {
                continue;
            }
            self.present[block * BLOCK..][..BLOCK].copy_from_slice(bytes);
            let bytes = bytes.to_vec();
            let (answered, doomed) = (false, false);
            self.unsynced.push(Unsynced {
                block,
                bytes,
                connection,
                answered,
                write,
                doomed,
            });
        }
        write
    }

    fn image(&self, dice: &mut Dice) -> Vec<u8> {
        let mut image = self.durable.clone();
        let keep_percent = [0, 20, 50, 80, 100][usize::try_from(dice.below(5)).unwrap_or(0)];
        for unsynced in &self.unsynced {
            if dice.percent(keep_percent) {
                image[unsynced.block * BLOCK..][..BLOCK].copy_from_slice(&unsynced.bytes);
            }
        }
        image
    }

    fn cut_power(&mut self) {
        let mut dice = Dice::new(self.dice.any());
        self.durable = self.image(&mut dice);
        self.present.clone_from(&self.durable);
        self.unsynced.clear();
        self.late.clear();
        self.alive_from = self.next_connection;
        self.losses += 1;
        self.power_cuts += 1;
    }

    fn sync(&mut self, connection: u64, before: u64) {
        let Self {
            unsynced, durable, ..
        } = self;
        let mut newest = std::collections::HashMap::new();
        for entry in unsynced.iter() {
            let covered = entry.connection == connection
                && entry.answered
                && entry.write < before
                && !entry.doomed;
            if covered {
                durable[entry.block * BLOCK..][..BLOCK].copy_from_slice(&entry.bytes);
                newest.insert(entry.block, entry.write);
            }
        }
        // A page never returns to a version before the synced one.
        unsynced.retain(|entry| newest.get(&entry.block).is_none_or(|at| entry.write > *at));
    }
}

/// One connection's handle.
struct CrashFile {
    server: CrashDisk,
    connection: u64,
}

impl CrashFile {
    fn lost(op: &'static str) -> StoreError {
        let reason = "injected".to_owned();
        StoreError::Disconnected {
            op,
            object: "container".to_owned(),
            reason,
        }
    }

    fn is_dead(&self, disk: &Disk) -> bool {
        self.connection < disk.alive_from
    }

    /// Whether the connection is dead or dies now.
    fn dies(&self, disk: &mut Disk) -> bool {
        if self.is_dead(disk) {
            return true;
        }
        let options = self.server.options;
        if self.server.chance(disk, options.power_cut_per_1000) {
            disk.cut_power();
            return true;
        }
        if self.server.chance(disk, options.lose_line_per_1000) {
            disk.alive_from = disk.next_connection;
            disk.losses += 1;
            return true;
        }
        false
    }

    /// A write in flight when the connection was lost: it is done never, partly, now or late.
    fn abandon(&self, disk: &mut Disk, first: usize, data: &[u8]) {
        let late_max = u64::try_from(self.server.options.late_max.as_micros()).unwrap_or(0);
        match disk.dice.below(4) {
            0 => {}
            1 => drop(disk.apply(first, data, 0, true)),
            2 => drop(disk.apply(first, data, 0, false)),
            _ if late_max == 0 => {}
            _ => {
                let due = Instant::now() + Duration::from_micros(disk.dice.below(late_max));
                disk.late.push(Late {
                    due,
                    first,
                    bytes: data.to_vec(),
                });
            }
        }
    }
}

impl StoreFile for CrashFile {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(self.server.disk().present.len() as u64)
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        let len = self.len()?;
        Ok(FileStat {
            len,
            modified_s: None,
            regular: true,
            allocated_bytes: None,
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.read_parts_at(&mut [(offset, buf)], class)
    }

    /// One operation, as it is one round trip.
    fn read_parts_at(
        &self,
        parts: &mut [(u64, &mut [u8])],
        _: ReadClass,
    ) -> Result<(), StoreError> {
        self.server.delay();
        let mut disk = self.server.disk();
        if self.dies(&mut disk) {
            return Err(Self::lost("read"));
        }
        let have = disk.present.len() as u64;
        for (offset, buf) in parts {
            let (offset, asked) = (*offset, buf.len() as u64);
            if offset + asked > have {
                let (op, object) = ("read", "container".to_owned());
                let got = have.saturating_sub(offset).min(asked);
                return Err(StoreError::Truncated {
                    op,
                    object,
                    offset,
                    asked,
                    got,
                });
            }
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            buf.copy_from_slice(&disk.present[start..start + buf.len()]);
        }
        drop(disk);
        self.server.delay();
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        assert!(offset.is_multiple_of(BLOCK) && data.len().is_multiple_of(BLOCK));
        let first = offset / BLOCK;
        self.server.watch();
        self.server.delay();
        let mut disk = self.server.disk();
        if self.is_dead(&disk) || self.dies(&mut disk) {
            self.abandon(&mut disk, first, data);
            return Err(Self::lost("write"));
        }
        let write = disk.apply(first, data, self.connection, false);
        drop(disk);
        self.server.delay();
        let mut disk = self.server.disk();
        if self.dies(&mut disk) {
            return Err(Self::lost("write"));
        }
        for entry in disk
            .unsynced
            .iter_mut()
            .filter(|entry| entry.write == write)
        {
            entry.answered = true;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.server.watch();
        let before = self.server.disk().next_write;
        self.server.delay();
        let mut disk = self.server.disk();
        if self.dies(&mut disk) {
            return Err(Self::lost("flush"));
        }
        if self
            .server
            .chance(&mut disk, self.server.options.fail_flush_per_1000)
        {
            disk.unsynced
                .iter_mut()
                .for_each(|entry| entry.doomed = true);
            let (op, object) = ("flush", "container".to_owned());
            return Err(StoreError::Refused {
                op,
                object,
                reason: "Failure".to_owned(),
            });
        }
        disk.sync(self.connection, before);
        drop(disk);
        self.server.delay();
        let mut disk = self.server.disk();
        if self.dies(&mut disk) {
            Err(Self::lost("flush"))
        } else {
            Ok(())
        }
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let zeros = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.write_at(offset, &zeros)
    }

    fn resize(&self, _: u64) -> Result<(), StoreError> {
        let (op, object) = ("resize", "container".to_owned());
        Err(StoreError::Unsupported {
            op,
            object,
            reason: "a disk of fixed size".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(byte: u8) -> Vec<u8> {
        vec![byte; BLOCK]
    }

    fn images(disk: &CrashDisk) -> Vec<(u8, u8)> {
        let mut seen: Vec<_> = (0..64)
            .map(|seed| disk.crash_image(seed))
            .map(|image| (image[0], image[BLOCK]))
            .collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn unsynced_write_is_kept_lost_or_torn_and_a_synced_one_stays() {
        let disk = CrashDisk::new(2 * BLOCK, 1, CrashOptions::default());
        let file = disk.connect();
        file.write_at(0, &[block(1), block(2)].concat()).unwrap();
        assert_eq!(images(&disk), [(0, 0), (0, 2), (1, 0), (1, 2)]);
        file.flush().unwrap();
        assert_eq!(images(&disk), [(1, 2)]);
    }

    #[test]
    fn a_flush_does_not_cover_what_another_connection_wrote() {
        let disk = CrashDisk::new(2 * BLOCK, 1, CrashOptions::default());
        disk.connect().write_at(0, &block(1)).unwrap();
        disk.connect().flush().unwrap();
        assert_eq!(images(&disk), [(0, 0), (1, 0)]);
    }

    #[test]
    fn after_a_failed_flush_no_later_one_makes_its_writes_durable() {
        let options = CrashOptions {
            fail_flush_per_1000: 1000,
            ..CrashOptions::default()
        };
        let disk = CrashDisk::new(2 * BLOCK, 1, options);
        let file = disk.connect();
        file.write_at(0, &block(1)).unwrap();
        assert!(file.flush().is_err());
        disk.be_kind();
        file.flush().unwrap();
        assert_eq!(images(&disk), [(0, 0), (1, 0)]);
        assert_eq!(disk.present()[0], 1, "readers see it all the same");
    }

    #[test]
    fn a_lost_connection_stays_lost_and_a_new_one_works() {
        let disk = CrashDisk::new(2 * BLOCK, 1, CrashOptions::default());
        let file = disk.connect();
        disk.lose_lines();
        assert!(file.write_at(0, &block(1)).is_err());
        assert!(file.flush().is_err());
        disk.connect().write_at(0, &block(1)).unwrap();
    }
}
