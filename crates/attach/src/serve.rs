//! Serves a block device as the one file of a FUSE file system.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session, SessionACL,
    TimeOrNow, WriteFlags,
};

use crate::device::BLOCK_BYTES_U32;
use crate::fuse_file::{FILE_NAME, REQUEST_BYTES_MAX};
use crate::write_queue::WriteQueue;
use crate::{AttachError, BLOCK_BYTES, BlockDevice};

/// The one file; its folder is [`INodeNo::ROOT`].
const FILE: INodeNo = INodeNo(2);

/// Names and attributes never change: the kernel need not ask twice.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How many asynchronous requests the kernel lets us owe before it keeps further ones (reads too)
/// in its own queue. A loop device has 128 requests, a request may be cut in two by its alignment.
const BACKGROUND_MAX: u16 = 256;

thread_local! {
    /// Where this thread's reads are put together; as large as the largest so far, at most 1 MiB.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How to serve.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServeOptions {
    /// Threads that answer, each one request at a time, at least 2.
    ///
    /// A read of remote data holds its thread for a round trip, a write only while the volume's
    /// buffer is full. Half of the threads at most run writes. The number bounds the reads under
    /// way; each thread has two buffers, of which at most 1 MiB each is ever touched. The default
    /// of 32 keeps 16 to 32 reads in flight and costs at most 64 MiB.
    pub threads: usize,
    /// How many bytes of writes may be set aside in memory while the threads for writes are busy.
    /// Beyond it reads, too, wait for writes. The loop device has 128 requests of 512 KiB, so the
    /// default of 64 MiB holds them all. (Where `/sys` is read-only they are of 1.25 MiB.)
    pub waiting_bytes_max: usize,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            threads: 32,
            waiting_bytes_max: 64 << 20,
        }
    }
}

/// A device that is being served.
#[derive(Debug)]
pub struct Serving {
    thread: JoinHandle<io::Result<()>>,
    aborted: Arc<AtomicBool>,
}

/// Serves `device` over `fuse` until the kernel closes the connection.
///
/// Waits for the kernel's first message, so `fuse` must be mounted already
/// ([`Attachment::begin`](crate::Attachment::begin), before the descriptor is sent here). This
/// process must be the only holder of `fuse`, and must not live in the mount namespace in which the
/// file system above is mounted (`sprat mount` excepted: there nothing of this process touches it).
pub fn serve(
    fuse: OwnedFd,
    device: Arc<dyn BlockDevice>,
    options: &ServeOptions,
) -> Result<Serving, AttachError> {
    let len_bytes = device.len();
    if len_bytes == 0 || !len_bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(AttachError::DeviceLength { len_bytes });
    }
    let aborted = Arc::new(AtomicBool::new(false));
    let threads = options.threads.max(2);
    let file = VolumeFile {
        device,
        len_bytes,
        aborted: Arc::clone(&aborted),
        writes: WriteQueue::new(threads / 2, options.waiting_bytes_max),
    };
    let mut config = Config::default();
    config.n_threads = Some(threads);
    // The kernel lets only the mounting user in; fuser's own check, which compares user ids that
    // the kernel leaves out of requests of its own, adds nothing but refusals.
    config.acl = SessionACL::All;
    let session = Session::from_fd(file, fuse, config.acl, config)
        .map_err(|source| AttachError::FuseSession { source })?;
    let thread = std::thread::Builder::new()
        .name("fuse".into())
        .spawn(move || session.run())
        .map_err(|e| AttachError::io("start thread", "fuse", e))?;
    Ok(Serving { thread, aborted })
}

impl Serving {
    /// Waits until the kernel has closed the connection: everything above is down and no request
    /// is under way.
    pub fn wait(self) -> Result<(), AttachError> {
        match self.thread.join() {
            // Besides ENODEV, which fuser takes for the end: a request was being read when the
            // connection closed (fs/fuse/dev.c).
            Ok(Err(e)) if e.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
            Ok(ended) => ended.map_err(|source| AttachError::FuseSession { source }),
            Err(_) => Err(AttachError::FuseSession {
                source: io::Error::other("the serving thread panicked"),
            }),
        }
    }

    /// Whether the kernel has closed the connection, as [`wait`](Self::wait) would tell.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Answers everything that still comes with EIO. Requests under way end when the device lets
    /// them: abort the volume too.
    pub fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
    }
}

struct VolumeFile {
    device: Arc<dyn BlockDevice>,
    len_bytes: u64,
    aborted: Arc<AtomicBool>,
    writes: WriteQueue<WaitingWrite>,
}

/// A write that was set aside.
struct WaitingWrite {
    offset: u64,
    data: Vec<u8>,
    reply: ReplyWrite,
}

impl VolumeFile {
    /// Calls the device; any failure, even a panic, becomes EIO. Other errnos would mislead: ENOSYS
    /// switches fsync off for good (fs/fuse/file.c), EOPNOTSUPP is taken for a missing feature.
    fn ask(&self, request: impl FnOnce(&dyn BlockDevice) -> io::Result<()>) -> Result<(), Errno> {
        if self.aborted.load(Ordering::Acquire) {
            return Err(Errno::EIO);
        }
        match catch_unwind(AssertUnwindSafe(|| request(self.device.as_ref()))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Errno::EIO),
            Err(_) => {
                // A thread that dies leaves its request unanswered, for ever. A device that
                // panicked can't be trusted with more.
                self.aborted.store(true, Ordering::Release);
                Err(Errno::EIO)
            }
        }
    }

    /// Checks a range against the contract of [`BlockDevice`]. The loop device has blocks of 4096
    /// bytes, so nothing else comes; whatever does gets no read-modify-write.
    fn check(&self, ino: INodeNo, offset: u64, len: u64) -> Result<(), Errno> {
        let aligned = offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES);
        let inside = offset
            .checked_add(len)
            .is_some_and(|end| end <= self.len_bytes);
        if ino == FILE && aligned && inside {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }

    fn attributes(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size, nlink) = match ino {
            INodeNo::ROOT => (FileType::Directory, 0o500, 0, 2),
            FILE => (FileType::RegularFile, 0o600, self.len_bytes, 1),
            _ => return None,
        };
        Some(FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind,
            perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES_U32,
            flags: 0,
        })
    }

    fn write_and_answer(&self, offset: u64, data: &[u8], reply: ReplyWrite) {
        let written = self
            .ask(|device| device.write_at(offset, data))
            .and_then(|()| u32::try_from(data.len()).map_err(|_| Errno::EIO));
        match written {
            Ok(len) => reply.written(len),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush_device(&self, ino: INodeNo, reply: ReplyEmpty) {
        if ino != FILE {
            return reply.ok();
        }
        match self.ask(BlockDevice::flush) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }
}

impl Filesystem for VolumeFile {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it each request of the loop device waits for the one before. Older than any
        // kernel with LOOP_CONFIGURE.
        let missing = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).is_err();
        if missing {
            return Err(io::Error::from_raw_os_error(libc::EPROTO));
        }
        let refused = config.set_max_write(REQUEST_BYTES_MAX).is_err()
            || config.set_max_background(BACKGROUND_MAX).is_err();
        assert!(!refused, "both lie within what fuser allows");
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(attributes) if parent == INodeNo::ROOT && name == FILE_NAME => {
                reply.entry(&FOR_EVER, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        // Times may be "set" (nothing remembers them); what would change the device may not.
        let changes = mode.is_some() || uid.is_some() || gid.is_some() || size.is_some();
        match self.attributes(ino) {
            Some(attributes) if !changes => reply.attr(&FOR_EVER, &attributes),
            Some(_) => reply.error(Errno::EPERM),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if ino == FILE {
            // No page cache below the loop device's own, and writes that don't queue for the
            // inode's lock.
            let flags = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
            reply.opened(FileHandle(0), flags);
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        if size > REQUEST_BYTES_MAX {
            return reply.error(Errno::EINVAL);
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            let len = size as usize;
            if buffer.len() < len {
                buffer.resize(len, 0);
            }
            let data = &mut buffer[..len];
            // Whole or an error: loop takes the missing tail of a short read for zeros.
            let read = self
                .check(ino, offset, u64::from(size))
                .and_then(|()| self.ask(|device| device.read_at(offset, data)));
            match read {
                Ok(()) => reply.data(data),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if let Err(errno) = self.check(ino, offset, data.len() as u64) {
            return reply.error(errno);
        }
        self.writes.submit(
            data.len(),
            reply,
            |reply| self.write_and_answer(offset, data, reply),
            |reply| WaitingWrite {
                offset,
                data: data.to_vec(),
                reply,
            },
            |waited| self.write_and_answer(waited.offset, &waited.data, waited.reply),
        );
    }

    /// On close. An ENOSYS here, fuser's default, would end all later flushes.
    fn flush(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.flush_device(ino, reply);
    }

    /// Each flush of the loop device. An ENOSYS here would make the kernel drop all later ones in
    /// silence. Holds up every later request of the loop device while it lasts.
    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.flush_device(ino, reply);
    }

    /// Refused with EOPNOTSUPP: ext4's zeroing of blocks arrives as the same request as a
    /// discard, and a punched hole in ciphertext is not zeros. Refused, ext4 writes zeros instead.
    ///
    /// Only a device that collects what is unneeded takes it, which it does while nothing can be
    /// zeroed: below a file system that is mounted read-only. Nothing is done, and it is answered as
    /// done: after one refusal the loop device offers discard no more (Linux 6.18).
    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let discards = mode == libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        if discards
            && self.check(ino, offset, length).is_ok()
            && self.device.note_unneeded(offset, length)
        {
            reply.ok();
        } else {
            reply.error(Errno::EOPNOTSUPP);
        }
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let blocks = self.len_bytes / BLOCK_BYTES;
        reply.statfs(blocks, 0, 0, 2, 0, BLOCK_BYTES_U32, 255, BLOCK_BYTES_U32);
    }
}

#[cfg(test)]
mod tests;
