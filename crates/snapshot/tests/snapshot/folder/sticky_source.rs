//! A FUSE file system with a folder, `shared`, that has the sticky bit and an ACL. rsync can read the ACL, this process
//! may not.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation,
    INodeNo, MountOption, ReplyAttr, ReplyDirectory, ReplyEntry, ReplyXattr, Request,
};

const SHARED: INodeNo = INodeNo(2);
const TTL: Duration = Duration::ZERO;

/// What the file system answers when this process reads the ACL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    Error,
    /// It never answers.
    Silent,
}

/// Requests that wait.
#[derive(Clone, Default)]
pub struct Waiting(Arc<(Mutex<Vec<ReplyXattr>>, Condvar)>);

impl Waiting {
    /// Returns when a request waits.
    pub fn wait(&self) {
        let requests = self.0.0.lock().unwrap();
        let is_empty = |requests: &mut Vec<ReplyXattr>| requests.is_empty();
        drop(self.0.1.wait_while(requests, is_empty).unwrap());
    }

    /// Answers them, with an error.
    pub fn end(&self) {
        self.0.0.lock().unwrap().clear();
    }
}

pub struct StickySource {
    acl: Vec<u8>,
    own: Own,
    waiting: Waiting,
}

impl StickySource {
    /// Mounts it at `at`, until the session is dropped.
    pub fn mount(at: &Path, acl: Vec<u8>, own: Own) -> (Waiting, BackgroundSession) {
        let waiting = Waiting::default();
        let this = Self {
            acl,
            own,
            waiting: waiting.clone(),
        };
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("sticky".to_owned())];
        (waiting, fuser::spawn_mount(this, at, &config).unwrap())
    }

    fn attr(inode: INodeNo) -> FileAttr {
        let perm = if inode == SHARED { 0o1770 } else { 0o755 };
        FileAttr {
            perm,
            ..super::attributes(inode, true, 0, UNIX_EPOCH)
        }
    }
}

impl Filesystem for StickySource {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match parent == INodeNo::ROOT && name == "shared" {
            true => reply.entry(&TTL, &Self::attr(SHARED), Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &Self::attr(inode));
    }

    fn getxattr(
        &self,
        request: &Request,
        inode: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        if inode != SHARED || name != "system.posix_acl_access" {
            return reply.error(Errno::NO_XATTR);
        }
        // The kernel names the thread.
        let thread = format!("/proc/self/task/{}", request.pid());
        match (Path::new(&thread).exists(), self.own) {
            (true, Own::Error) => reply.error(Errno::EIO),
            (true, Own::Silent) => {
                self.waiting.0.0.lock().unwrap().push(reply);
                self.waiting.0.1.notify_all();
            }
            (false, _) if size == 0 => reply.size(u32::try_from(self.acl.len()).unwrap()),
            (false, _) => reply.data(&self.acl),
        }
    }

    fn listxattr(&self, _: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let names: &[u8] = match inode == SHARED {
            true => b"system.posix_acl_access\0",
            false => b"",
        };
        match size {
            0 => reply.size(u32::try_from(names.len()).unwrap()),
            _ => reply.data(names),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if inode == INodeNo::ROOT && offset == 0 {
            let _ = reply.add(SHARED, 1, FileType::Directory, "shared");
        }
        reply.ok();
    }
}
