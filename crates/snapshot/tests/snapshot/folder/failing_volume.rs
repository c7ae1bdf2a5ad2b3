//! A FUSE volume in memory in which a file's name selects the operation that fails: `mkdir-13` can't be
//! created, with error 13. The number of names of a file is limited.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem,
    FopenFlags, Generation, INodeNo, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};

const TTL: Duration = Duration::ZERO;
const BLOCK: u32 = 4096;
const ROOT: u64 = 1;

struct Node {
    attr: FileAttr,
    content: Vec<u8>,
    names: BTreeMap<OsString, u64>,
    attributes: BTreeMap<OsString, Vec<u8>>,
    /// The name that it was created with, or renamed to.
    known_as: OsString,
}

/// The operations. A file's name begins with one of them, followed by an error number.
pub const OPERATIONS: [&str; 9] = [
    "mkdir", "create", "mknod", "symlink", "link", "rename", "write", "setattr", "setxattr",
];

pub struct FailingVolume {
    nodes: Mutex<BTreeMap<u64, Node>>,
    links_max: u32,
}

impl FailingVolume {
    /// Mounts it at `at` until the session is dropped. `links_max`: the most names of one file.
    pub fn mount(at: &Path, links_max: u32) -> BackgroundSession {
        let this = Self {
            nodes: Mutex::default(),
            links_max,
        };
        this.add(ROOT, OsStr::new(""), FileType::Directory, 0o755, 0);
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("failing-volume".to_owned()),
            MountOption::Dev,
            MountOption::Suid,
        ];
        fuser::spawn_mount(this, at, &config).unwrap()
    }

    fn add(&self, inode: u64, name: &OsStr, kind: FileType, mode: u32, rdev: u32) -> FileAttr {
        let now = SystemTime::now();
        let attr = FileAttr {
            ino: INodeNo(inode),
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            crtime: now,
            kind,
            perm: u16::try_from(mode & 0o7777).unwrap(),
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev,
            flags: 0,
            blksize: BLOCK,
        };
        let node = Node {
            attr,
            content: Vec::new(),
            names: BTreeMap::new(),
            attributes: BTreeMap::new(),
            known_as: name.to_owned(),
        };
        self.nodes.lock().unwrap().insert(inode, node);
        attr
    }

    fn make(
        &self,
        parent: INodeNo,
        name: &OsStr,
        (kind, mode, rdev): (FileType, u32, u32),
        operation: &str,
    ) -> Result<FileAttr, Errno> {
        refused(name, operation)?;
        let inode = {
            let nodes = self.nodes.lock().unwrap();
            let folder = nodes.get(&parent.into()).ok_or(Errno::ENOENT)?;
            if folder.names.contains_key(name) {
                return Err(Errno::EEXIST);
            }
            nodes.keys().max().unwrap() + 1
        };
        let attr = self.add(inode, name, kind, mode, rdev);
        let mut nodes = self.nodes.lock().unwrap();
        let folder = nodes.get_mut(&parent.into()).unwrap();
        folder.names.insert(name.to_owned(), inode);
        Ok(attr)
    }

    fn with<T>(
        &self,
        inode: INodeNo,
        act: impl FnOnce(&mut Node) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let mut nodes = self.nodes.lock().unwrap();
        act(nodes.get_mut(&inode.into()).ok_or(Errno::ENOENT)?)
    }

    fn remove(&self, parent: INodeNo, name: &OsStr, folder: bool) -> Result<(), Errno> {
        let mut nodes = self.nodes.lock().unwrap();
        let above = nodes.get(&parent.into()).ok_or(Errno::ENOENT)?;
        let inode = *above.names.get(name).ok_or(Errno::ENOENT)?;
        let node = nodes.get_mut(&inode).ok_or(Errno::ENOENT)?;
        if folder && !node.names.is_empty() {
            return Err(Errno::ENOTEMPTY);
        }
        node.attr.nlink -= 1;
        let above = nodes.get_mut(&parent.into()).unwrap();
        above.names.remove(name);
        Ok(())
    }
}

/// The error of `operation` for a file of this name or of rsync's temporary name for it.
fn refused(name: &OsStr, operation: &str) -> Result<(), Errno> {
    let name = name.to_string_lossy();
    let name = name.trim_start_matches('.');
    let Some(rest) = name
        .strip_prefix(operation)
        .and_then(|rest| rest.strip_prefix('-'))
    else {
        return Ok(());
    };
    let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
    number
        .parse()
        .map_or(Ok(()), |number| Err(Errno::from_i32(number)))
}

fn kind_of(mode: u32) -> FileType {
    match mode & 0o170_000 {
        0o010_000 => FileType::NamedPipe,
        0o020_000 => FileType::CharDevice,
        0o060_000 => FileType::BlockDevice,
        0o140_000 => FileType::Socket,
        _ => FileType::RegularFile,
    }
}

fn moment(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

fn entry(reply: ReplyEntry, made: Result<FileAttr, Errno>) {
    match made {
        Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
        Err(error) => reply.error(error),
    }
}

fn empty(reply: ReplyEmpty, done: Result<(), Errno>) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

impl Filesystem for FailingVolume {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let nodes = self.nodes.lock().unwrap();
        let inode = nodes
            .get(&parent.into())
            .and_then(|folder| folder.names.get(name));
        let found = inode.and_then(|inode| nodes.get(inode));
        entry(reply, found.map(|node| node.attr).ok_or(Errno::ENOENT));
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.with(inode, |node| Ok(node.attr)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = self.with(inode, |node| {
            if size.is_none() {
                refused(&node.known_as, "setattr")?;
            }
            let attr = &mut node.attr;
            attr.perm = mode.map_or(attr.perm, |mode| u16::try_from(mode & 0o7777).unwrap());
            attr.uid = uid.unwrap_or(attr.uid);
            attr.gid = gid.unwrap_or(attr.gid);
            attr.atime = atime.map_or(attr.atime, moment);
            attr.mtime = mtime.map_or(attr.mtime, moment);
            attr.ctime = SystemTime::now();
            if let Some(size) = size {
                node.content.resize(usize::try_from(size).unwrap(), 0);
                attr.size = size;
                attr.blocks = size.div_ceil(512);
            }
            Ok(*attr)
        });
        match set {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        match self.with(inode, |node| Ok(node.content.clone())) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        }
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let made = self.make(parent, name, (kind_of(mode), mode, rdev), "mknod");
        entry(reply, made);
    }

    fn mkdir(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        entry(
            reply,
            self.make(parent, name, (FileType::Directory, mode, 0), "mkdir"),
        );
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.remove(parent, name, false));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        empty(reply, self.remove(parent, name, true));
    }

    fn symlink(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let made = self.make(parent, name, (FileType::Symlink, 0o777, 0), "symlink");
        let made = made.and_then(|attr| {
            self.with(attr.ino, |node| {
                node.content = target.as_os_str().as_bytes().to_vec();
                node.attr.size = node.content.len() as u64;
                Ok(node.attr)
            })
        });
        entry(reply, made);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let done = (|| {
            refused(new_name, "rename")?;
            let mut nodes = self.nodes.lock().unwrap();
            let from = nodes.get_mut(&parent.into()).ok_or(Errno::ENOENT)?;
            let inode = from.names.remove(name).ok_or(Errno::ENOENT)?;
            new_name.clone_into(&mut nodes.get_mut(&inode).unwrap().known_as);
            let to = nodes.get_mut(&new_parent.into()).ok_or(Errno::ENOENT)?;
            let replaced = to.names.insert(new_name.to_owned(), inode);
            if let Some(old) = replaced.and_then(|old| nodes.get_mut(&old)) {
                old.attr.nlink -= 1;
            }
            Ok(())
        })();
        empty(reply, done);
    }

    fn link(&self, _: &Request, inode: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let done = (|| {
            refused(name, "link")?;
            let mut nodes = self.nodes.lock().unwrap();
            let node = nodes.get_mut(&inode.into()).ok_or(Errno::ENOENT)?;
            if node.attr.nlink >= self.links_max {
                return Err(Errno::EMLINK);
            }
            node.attr.nlink += 1;
            node.attr.ctime = SystemTime::now();
            let attr = node.attr;
            let folder = nodes.get_mut(&parent.into()).ok_or(Errno::ENOENT)?;
            folder.names.insert(name.to_owned(), inode.into());
            Ok(attr)
        })();
        entry(reply, done);
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // Direct I/O, so that each write gets its own answer.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.with(inode, |node| {
            let from = usize::try_from(offset).unwrap().min(node.content.len());
            let to = (from + size as usize).min(node.content.len());
            Ok(node.content[from..to].to_vec())
        });
        match read {
            Ok(data) => reply.data(&data),
            Err(error) => reply.error(error),
        }
    }

    fn write(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let written = self.with(inode, |node| {
            refused(&node.known_as, "write")?;
            let from = usize::try_from(offset).unwrap();
            let end = (from + data.len()).max(node.content.len());
            node.content.resize(end, 0);
            node.content[from..from + data.len()].copy_from_slice(data);
            node.attr.size = end as u64;
            node.attr.blocks = node.attr.size.div_ceil(512);
            let now = SystemTime::now();
            (node.attr.mtime, node.attr.ctime) = (now, now);
            Ok(u32::try_from(data.len()).unwrap())
        });
        match written {
            Ok(bytes) => reply.written(bytes),
            Err(error) => reply.error(error),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        match self.make(parent, name, (FileType::RegularFile, mode, 0), "create") {
            Ok(attr) => reply.created(
                &TTL,
                &attr,
                Generation(0),
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO,
            ),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn readdir(
        &self,
        _: &Request,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let nodes = self.nodes.lock().unwrap();
        let Some(folder) = nodes.get(&inode.into()) else {
            return reply.error(Errno::ENOENT);
        };
        for (at, (name, inode)) in (1..)
            .zip(&folder.names)
            .skip(usize::try_from(offset).unwrap())
        {
            let kind = nodes[inode].attr.kind;
            if reply.add(INodeNo(*inode), at, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(
            1 << 20,
            1 << 20,
            1 << 20,
            1 << 20,
            1 << 20,
            BLOCK,
            255,
            BLOCK,
        );
    }

    fn setxattr(
        &self,
        _: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        let set = self.with(inode, |node| {
            refused(&node.known_as, "setxattr")?;
            node.attributes.insert(name.to_owned(), value.to_owned());
            Ok(())
        });
        empty(reply, set);
    }

    fn getxattr(&self, _: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let value = self.with(inode, |node| {
            node.attributes.get(name).cloned().ok_or(Errno::ENODATA)
        });
        match value {
            Ok(value) if size == 0 => reply.size(u32::try_from(value.len()).unwrap()),
            Ok(value) => reply.data(&value),
            Err(error) => reply.error(error),
        }
    }

    fn listxattr(&self, _: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let list = self.with(inode, |node| {
            let names = node.attributes.keys();
            Ok(names
                .flat_map(|name| [name.as_bytes(), b"\0"].concat())
                .collect::<Vec<u8>>())
        });
        match list {
            Ok(list) if size == 0 => reply.size(u32::try_from(list.len()).unwrap()),
            Ok(list) => reply.data(&list),
            Err(error) => reply.error(error),
        }
    }
}
