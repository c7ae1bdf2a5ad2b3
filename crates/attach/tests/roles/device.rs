//! The device that the role `volume` serves: a sparse file, with counters, delays and failures.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use sprat_attach::BlockDevice;

pub struct FileDevice {
    file: File,
    len_bytes: u64,
    /// Written blocks, if the file itself must not change.
    overlay: Option<Mutex<HashMap<u64, Vec<u8>>>>,
    reads: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    /// The number of running writes, and the largest number so far.
    writing: AtomicU64,
    writing_max: AtomicU64,
    flushes: AtomicU64,
    slow_reads: Mutex<(Range<u64>, Duration)>,
    slow_writes_ms: AtomicU64,
    failing: AtomicBool,
    panicking: AtomicBool,
}

impl FileDevice {
    pub fn open(path: &Path, overlay: bool) -> Self {
        let file = File::options()
            .read(true)
            .write(!overlay)
            .open(path)
            .unwrap();
        let len_bytes = file.metadata().unwrap().len();
        Self {
            file,
            len_bytes,
            overlay: overlay.then(Mutex::default),
            reads: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            writing: AtomicU64::new(0),
            writing_max: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            slow_reads: Mutex::new((0..0, Duration::ZERO)),
            slow_writes_ms: AtomicU64::new(0),
            failing: AtomicBool::new(false),
            panicking: AtomicBool::new(false),
        }
    }

    pub fn statistics(&self) -> String {
        format!(
            "reads={} writes={} written_bytes={} writing_max={} flushes={}",
            self.reads.load(Ordering::Relaxed),
            self.writes.load(Ordering::Relaxed),
            self.written_bytes.load(Ordering::Relaxed),
            self.writing_max.load(Ordering::Relaxed),
            self.flushes.load(Ordering::Relaxed),
        )
    }

    pub fn slow_reads(&self, offsets: Range<u64>, delay: Duration) {
        *self.slow_reads.lock().unwrap() = (offsets, delay);
    }

    pub fn slow_writes(&self, delay: Duration) {
        let ms = u64::try_from(delay.as_millis()).unwrap();
        self.slow_writes_ms.store(ms, Ordering::Relaxed);
    }

    pub fn fail(&self) {
        self.failing.store(true, Ordering::Relaxed);
    }

    pub fn panic_from_now_on(&self) {
        self.panicking.store(true, Ordering::Relaxed);
    }

    /// ENOSYS on purpose: if it were passed on, the kernel would drop all later flushes.
    fn healthy(&self) -> io::Result<()> {
        assert!(!self.panicking.load(Ordering::Relaxed), "as told");
        if self.failing.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(38));
        }
        Ok(())
    }
}

impl BlockDevice for FileDevice {
    fn len(&self) -> u64 {
        self.len_bytes
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.healthy()?;
        self.reads.fetch_add(1, Ordering::Relaxed);
        let (offsets, delay) = self.slow_reads.lock().unwrap().clone();
        if offsets.contains(&offset) {
            std::thread::sleep(delay);
        }
        self.file.read_exact_at(buf, offset)?;
        if let Some(overlay) = &self.overlay {
            let overlay = overlay.lock().unwrap();
            for (block, place) in (offset / 4096..).zip(buf.chunks_mut(4096)) {
                if let Some(data) = overlay.get(&block) {
                    place.copy_from_slice(data);
                }
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.healthy()?;
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.written_bytes
            .fetch_add(data.len() as u64, Ordering::Relaxed);
        let writing = self.writing.fetch_add(1, Ordering::Relaxed) + 1;
        self.writing_max.fetch_max(writing, Ordering::Relaxed);
        let ms = self.slow_writes_ms.load(Ordering::Relaxed);
        if ms > 0 {
            std::thread::sleep(Duration::from_millis(ms));
        }
        let written = match &self.overlay {
            None => self.file.write_all_at(data, offset),
            Some(overlay) => {
                let blocks = (offset / 4096..).zip(data.chunks(4096).map(<[u8]>::to_vec));
                overlay.lock().unwrap().extend(blocks);
                Ok(())
            }
        };
        self.writing.fetch_sub(1, Ordering::Relaxed);
        written
    }

    fn flush(&self) -> io::Result<()> {
        self.healthy()?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
