//! A FUSE file system in which a file's name selects its failure: `open-13` can't be opened, with error
//! 13; `silent` never gets an answer.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEntry, ReplyOpen, Request,
};

/// The content of every readable file.
pub const CONTENT: &[u8] = b"hello\n";
/// The kernel caches nothing, so that each request reaches the file system.
const TTL: Duration = Duration::ZERO;

/// The names at the top. Folders below are empty.
pub struct FailingSource {
    names: Vec<String>,
    /// The error for listing the top folder.
    root: Option<i32>,
    silent: Silent,
}

/// Requests that wait for an answer. Dropping them answers with an error.
pub type Silent = Arc<Mutex<Vec<ReplyEntry>>>;

impl FailingSource {
    /// Mounts it at `at`, until the session is dropped.
    pub fn mount(at: &Path, names: Vec<String>) -> BackgroundSession {
        Self::mount_silent(at, names, Silent::default())
    }

    /// As [`mount`]. Requests for `silent` are put into `silent`.
    pub fn mount_silent(at: &Path, names: Vec<String>, silent: Silent) -> BackgroundSession {
        let root = None;
        Self {
            names,
            root,
            silent,
        }
        .spawn(at)
    }

    /// Mounts one whose top folder can't be listed, with error `errno`.
    pub fn mount_failing_root(at: &Path, errno: i32) -> BackgroundSession {
        Self {
            names: Vec::new(),
            root: Some(errno),
            silent: Silent::default(),
        }
        .spawn(at)
    }

    fn spawn(self, at: &Path) -> BackgroundSession {
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::FSName("failing".to_owned())];
        fuser::spawn_mount(self, at, &config).unwrap()
    }

    /// The error of the operation `what` on the file.
    fn error(&self, inode: INodeNo, what: &str) -> Option<Errno> {
        let name = self
            .names
            .get(usize::try_from(u64::from(inode)).ok()?.checked_sub(2)?)?;
        error_of(name, what)
    }

    fn attr(&self, inode: INodeNo) -> FileAttr {
        let folder = inode == INodeNo::ROOT || self.error(inode, "readdir").is_some();
        super::attributes(inode, folder, CONTENT.len() as u64, UNIX_EPOCH)
    }
}

fn error_of(name: &str, what: &str) -> Option<Errno> {
    let (operation, number) = name.split_once('-')?;
    (operation == what).then(|| Errno::from_i32(number.parse().unwrap()))
}

impl Filesystem for FailingSource {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if name == "silent" {
            return self.silent.lock().unwrap().push(reply);
        }
        let Some(index) = self.names.iter().position(|known| name == known.as_str()) else {
            return reply.error(Errno::ENOENT);
        };
        if let Some(error) = error_of(&self.names[index], "stat") {
            return reply.error(error);
        }
        let attr = self.attr(INodeNo(index as u64 + 2));
        reply.entry(&TTL, &attr, Generation(0));
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attr(inode));
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.error(inode, "open") {
            Some(error) => reply.error(error),
            // Direct I/O, because the page cache turns every error into EIO.
            None => reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO),
        }
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        _: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.error(inode, "read") {
            Some(error) => reply.error(error),
            None => {
                let from = usize::try_from(offset).unwrap().min(CONTENT.len());
                reply.data(&CONTENT[from..]);
            }
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
        let root = self.root.filter(|_| inode == INodeNo::ROOT);
        let error = root.map(Errno::from_i32);
        if let Some(error) = error.or_else(|| self.error(inode, "readdir")) {
            return reply.error(error);
        }
        let from = usize::try_from(offset).unwrap();
        for (index, name) in self.names.iter().enumerate().skip(from) {
            let at = index as u64;
            if reply.add(INodeNo(at + 2), at + 1, FileType::RegularFile, name) {
                break;
            }
        }
        reply.ok();
    }
}
