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

/// The one file. Its folder is [`INodeNo::ROOT`].
const FILE: INodeNo = INodeNo(2);

/// Names and attributes never change, so the kernel need not ask again.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How many asynchronous requests may be unanswered before the kernel queues further ones, reads
/// included. A loop device has 128 requests, and alignment may split each into two.
const BACKGROUND_MAX: u16 = 256;

thread_local! {
    /// The buffer for this thread's reads. It has the size of the largest read so far, at most 1 MiB.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// How to serve.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ServeOptions {
    /// Threads that answer requests, one request each at a time. At least 2.
    ///
    /// A read of remote data occupies its thread for a round trip, a write only while the volume's
    /// buffer is full. At most half of the threads run writes. The number limits the parallel reads.
    /// Each thread has two buffers, of which at most 1 MiB each is ever used. The default of 32 allows
    /// 16 to 32 parallel reads and costs at most 64 MiB.
    pub threads: usize,
    /// How many bytes of writes may be queued in memory while the threads for writes are busy. Beyond
    /// that, reads wait for writes, too. The loop device has 128 requests of 512 KiB, so all of them fit
    /// into the default of 64 MiB. (If `/sys` is read-only they have 1.25 MiB.)
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
/// ([`Attachment::begin`](crate::Attachment::begin), before the descriptor is sent here). This process
/// must be the only owner of `fuse`, and must not be in the mount namespace in which the file system
/// above is mounted. Exception: a mount for browsing, which no part of this process uses.
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
    // The kernel admits only the mounting user. fuser's own check compares user ids, which the kernel's
    // own requests lack, so it would only refuse valid ones.
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
    /// Waits until the kernel has closed the connection: everything above is unmounted and no request is
    /// running.
    pub fn wait(self) -> Result<(), AttachError> {
        match self.thread.join() {
            // fuser treats only ENODEV as the end. This error means that a request was being read when
            // the connection closed (fs/fuse/dev.c).
            Ok(Err(e)) if e.raw_os_error() == Some(libc::ECONNABORTED) => Ok(()),
            Ok(ended) => ended.map_err(|source| AttachError::FuseSession { source }),
            Err(_) => Err(AttachError::FuseSession {
                source: io::Error::other("the serving thread panicked"),
            }),
        }
    }

    /// Whether the kernel has closed the connection, so that [`wait`](Self::wait) would return at once.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Answers all further requests with EIO. Running requests end when the device returns: abort the
    /// volume, too.
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

/// A queued write.
struct WaitingWrite {
    offset: u64,
    data: Vec<u8>,
    reply: ReplyWrite,
}

impl VolumeFile {
    /// Calls the device. Any failure, even a panic, becomes EIO. Other error numbers would have side
    /// effects: ENOSYS disables fsync permanently (fs/fuse/file.c), EOPNOTSUPP means a missing feature.
    fn ask(&self, request: impl FnOnce(&dyn BlockDevice) -> io::Result<()>) -> Result<(), Errno> {
        if self.aborted.load(Ordering::Acquire) {
            return Err(Errno::EIO);
        }
        match catch_unwind(AssertUnwindSafe(|| request(self.device.as_ref()))) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Errno::EIO),
            Err(_) => {
                // A thread that dies would never answer its request. A device that panicked is not
                // called again.
                self.aborted.store(true, Ordering::Release);
                Err(Errno::EIO)
            }
        }
    }

    /// Checks a range against the contract of [`BlockDevice`]. The loop device has blocks of 4096 bytes,
    /// so all its requests are aligned. Others are refused: there is no read-modify-write.
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
        // Without it each request of the loop device waits for the previous one. Every kernel with
        // LOOP_CONFIGURE has it.
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
        // Setting times is accepted and ignored. Anything that would change the device is refused.
        let changes = mode.is_some() || uid.is_some() || gid.is_some() || size.is_some();
        match self.attributes(ino) {
            Some(attributes) if !changes => reply.attr(&FOR_EVER, &attributes),
            Some(_) => reply.error(Errno::EPERM),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if ino == FILE {
            // No second page cache below that of the loop device, and writes that don't wait for the
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
            // All bytes or an error: the loop device would treat the missing end of a short read as
            // zeros.
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

    /// Called on close. fuser's default, ENOSYS, would end all later flushes.
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

    /// Called for each flush of the loop device. After ENOSYS the kernel would silently drop all later
    /// ones. While it runs, all later requests of the loop device wait.
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

    /// Refused with EOPNOTSUPP: ext4's zeroing of blocks arrives as the same request as a discard, and a
    /// hole in ciphertext is not zeros. After the refusal ext4 writes zeros.
    ///
    /// Only a device that collects unused ranges accepts it. It does that below a read-only file system,
    /// where nothing can be zeroed. Nothing is changed, and the request succeeds: after one refusal the
    /// loop device offers no discard any more (Linux 6.18).
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
