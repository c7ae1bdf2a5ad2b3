//! A FUSE file system with one large file, `large`, whose reads may wait.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEntry, ReplyOpen, Request,
};

const BYTES: u64 = 33 << 20;
const FILE: INodeNo = INodeNo(2);
const TTL: Duration = Duration::ZERO;

/// What the file system and the test share.
#[derive(Clone, Default)]
pub struct SlowSource(Arc<(Mutex<State>, Condvar)>);

#[derive(Default)]
struct State {
    /// Each version has another time and other content.
    version: u8,
    silent: bool,
    /// Reads that wait, with their length.
    waiting: Vec<(ReplyData, u32)>,
}

impl SlowSource {
    /// Mounts it at `at`, until the session is dropped.
    pub fn mount(at: &Path) -> (Self, BackgroundSession) {
        let shared = Self::default();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("slow".to_owned())];
        let session = fuser::spawn_mount(shared.clone(), at, &config).unwrap();
        (shared, session)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap()
    }

    /// The file gets other content and a later time.
    pub fn change(&self) {
        self.state().version += 1;
    }

    /// Whether reads get answers. Those that wait get theirs, too.
    pub fn answer_reads(&self, answer: bool) {
        let mut state = self.state();
        state.silent = !answer;
        let version = state.version;
        for (reply, length) in state.waiting.drain(..) {
            reply.data(&vec![version; length as usize]);
        }
    }

    /// Returns when a read waits.
    pub fn wait_for_read(&self) {
        let waits = |state: &mut State| state.waiting.is_empty();
        drop(self.0.1.wait_while(self.state(), waits).unwrap());
    }

    fn attr(&self, inode: INodeNo) -> FileAttr {
        let folder = inode == INodeNo::ROOT;
        let time =
            UNIX_EPOCH + Duration::from_secs(1_500_000_000 + u64::from(self.state().version));
        super::attributes(inode, folder, BYTES, time)
    }
}

impl Filesystem for SlowSource {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == "large" {
            true => reply.entry(&TTL, &self.attr(FILE), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Each read reaches the file system.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = u32::try_from(BYTES.saturating_sub(offset)).unwrap();
        let length = length.min(left);
        let mut state = self.state();
        if state.silent {
            state.waiting.push((reply, length));
            self.0.1.notify_all();
            return;
        }
        reply.data(&vec![state.version; length as usize]);
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if offset == 0 {
            let _ = reply.add(FILE, 1, FileType::RegularFile, "large");
        }
        reply.ok();
    }
}
