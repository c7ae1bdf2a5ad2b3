//! Requests that no loop device sends, and a device that can't be trusted: tested on the FUSE file
//! itself.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use sprat_testkit::{needs, requires};

use super::*;
use crate::fuse_file::{DetachedMount, open_fuse};

const LEN: u64 = 1 << 20;

#[derive(Default)]
struct Counting {
    asked: Mutex<Vec<&'static str>>,
    panics: AtomicBool,
}

impl Counting {
    fn ask(&self, what: &'static str) -> io::Result<()> {
        self.asked.lock().unwrap().push(what);
        assert!(!self.panics.load(Ordering::SeqCst), "as a test wants it");
        Ok(())
    }

    /// Without flushes: each forked process closes the file, too.
    fn calls(&self) -> Vec<&'static str> {
        let mut asked = self.asked.lock().unwrap().clone();
        asked.retain(|what| *what != "flush");
        asked
    }
}

impl BlockDevice for Counting {
    fn len(&self) -> u64 {
        LEN
    }
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(7);
        self.ask("read")
    }
    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        self.ask("write")
    }
    fn flush(&self) -> io::Result<()> {
        self.ask("flush")
    }
}

/// The file is dropped first, then its file system, while it is still served.
struct Opened {
    file: File,
    #[expect(dead_code, reason = "held, not read")]
    mount: DetachedMount,
    serving: Serving,
    device: Arc<Counting>,
}

fn opened() -> Opened {
    let device = Arc::new(Counting::default());
    let fuse = open_fuse().unwrap();
    let mount = DetachedMount::new(fuse.as_fd()).unwrap();
    let options = ServeOptions {
        threads: 4,
        ..ServeOptions::default()
    };
    let serving = serve(fuse, device.clone(), &options).unwrap();
    let file = File::from(mount.open_file().unwrap());
    Opened {
        file,
        mount,
        serving,
        device,
    }
}

fn fuse_missing() -> Option<String> {
    let missing = !std::path::Path::new("/dev/fuse").exists();
    missing.then(|| "no /dev/fuse".to_owned())
}

fn errno<T: std::fmt::Debug>(refused: io::Result<T>) -> Option<i32> {
    refused.unwrap_err().raw_os_error()
}

#[test]
fn unaligned_requests_never_reach_the_device() {
    requires!(needs::root(), fuse_missing());
    let opened = opened();
    let (file, device) = (&opened.file, &opened.device);
    let mut block = [0; 4096];
    file.read_exact_at(&mut block, LEN - 4096).unwrap();
    assert_eq!(block, [7; 4096]);
    file.write_all_at(&block, LEN - 4096).unwrap();
    let before = device.calls();
    assert_eq!(before, ["read", "write"]);
    // They begin or end within a block, or are beyond the end.
    let cases = [
        (1, 4096),
        (0, 100),
        (512, 512),
        (4096, 5000),
        (LEN, 4096),
        (LEN - 4096, 8192),
        (LEN + (1 << 40), 4096),
    ];
    for (offset, len) in cases {
        let mut data = vec![1; len];
        let read = file.read_at(&mut data, offset);
        assert_eq!(errno(read), Some(libc::EINVAL), "read {len} at {offset}");
        let written = file.write_at(&data, offset);
        assert_eq!(
            errno(written),
            Some(libc::EINVAL),
            "write {len} at {offset}"
        );
    }
    assert_eq!(device.calls(), before);
}

#[test]
fn after_an_abort_all_is_eio_and_the_device_is_not_called() {
    requires!(needs::root(), fuse_missing());
    let opened = opened();
    opened.serving.abort();
    assert_all_is_eio(&opened.file);
    assert_eq!(opened.device.calls(), [""; 0]);
}

#[test]
fn a_device_that_panicked_is_not_called_again() {
    requires!(needs::root(), fuse_missing());
    let opened = opened();
    opened.device.panics.store(true, Ordering::SeqCst);
    let read = opened.file.read_at(&mut [0; 4096], 0);
    assert_eq!(errno(read), Some(libc::EIO));
    opened.device.panics.store(false, Ordering::SeqCst);
    assert_all_is_eio(&opened.file);
    assert_eq!(opened.device.calls(), ["read"]);
}

fn assert_all_is_eio(file: &File) {
    let block = &mut [0; 4096];
    for _ in 0..2 {
        assert_eq!(errno(file.read_at(block, 0)), Some(libc::EIO));
        assert_eq!(errno(file.write_at(block, 4096)), Some(libc::EIO));
        assert_eq!(errno(file.sync_all()), Some(libc::EIO));
    }
}
