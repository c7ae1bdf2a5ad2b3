//! A store in a local folder: USB disk, NFS mount, or a folder for tests.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    Advice, AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, SeekFrom,
    StatVfsMountFlags, Uid,
};
use rustix::io::Errno;

use crate::contract::{Access, Capabilities, FileStat, FreeSpace, ReadClass, Store, StoreFile};
use crate::{FileName, StoreError};

/// Longest allowed list of a folder; containers and their locks are few.
pub(crate) const LIST_ENTRIES_MAX: usize = 100_000;

/// A local folder that is kept open: renaming the folder or mounting over its path changes nothing.
#[derive(Debug)]
pub struct LocalStore {
    folder: Arc<OwnedFd>,
    path: PathBuf,
}

#[derive(Debug)]
struct LocalFile {
    file: File,
    folder: Arc<OwnedFd>,
    object: String,
    flush_failed: AtomicBool,
}

impl LocalStore {
    /// Opens the folder at `folder`, which must exist. The path itself may contain symbolic links
    /// (the user chose it); names in the folder must not be links.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(folder, flags, Mode::empty())
            .map_err(|errno| error("open folder", &folder.display().to_string(), errno, None))?;
        Ok(Self {
            folder: Arc::new(fd),
            path: folder.to_owned(),
        })
    }

    fn object(&self, name: &FileName) -> String {
        self.path.join(name.as_str()).display().to_string()
    }

    fn error(&self, op: &'static str, name: &FileName, errno: Errno) -> StoreError {
        error(op, &self.object(name), errno, Some(&self.folder))
    }

    fn open_with(
        &self,
        op: &'static str,
        name: &FileName,
        flags: OFlags,
    ) -> Result<Arc<dyn StoreFile>, StoreError> {
        // NONBLOCK: otherwise opening a FIFO for reading would wait for a writer. It changes
        // nothing for regular files.
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let mode = Mode::RUSR | Mode::WUSR;
        let fd = rustix::fs::openat(&self.folder, name.as_str(), flags, mode).map_err(|errno| {
            match errno {
                // The error of O_NOFOLLOW at a link, and of opening a folder for writing.
                Errno::LOOP | Errno::ISDIR | Errno::NXIO => StoreError::NotRegular {
                    op,
                    object: self.object(name),
                },
                errno => self.error(op, name, errno),
            }
        })?;
        let file = LocalFile {
            file: File::from(fd),
            folder: Arc::clone(&self.folder),
            object: self.object(name),
            flush_failed: AtomicBool::new(false),
        };
        if !file.stat()?.regular {
            return Err(StoreError::NotRegular {
                op,
                object: file.object,
            });
        }
        Ok(Arc::new(file))
    }
}

impl Store for LocalStore {
    fn describe(&self) -> String {
        self.path.display().to_string()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            durable_flush: true,
            discard: true,
            free_space: true,
            atomic_replace: true,
        }
    }

    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        let flags = match access {
            Access::ReadOnly => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        self.open_with("open", name, flags)
    }

    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        self.open_with("create", name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        let stat = rustix::fs::statat(&self.folder, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.error("stat", name, errno))?;
        Ok(FileStat {
            len: u64::try_from(stat.st_size).unwrap_or(0),
            modified_s: u64::try_from(stat.st_mtime).ok(),
            regular: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
            allocated_bytes: u64::try_from(stat.st_blocks)
                .ok()
                .map(|blocks| blocks * 512),
        })
    }

    fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        rustix::fs::renameat(&self.folder, from.as_str(), &self.folder, to.as_str())
            .map_err(|errno| self.error("rename", from, errno))
    }

    fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        let (old, new) = (from.as_str(), to.as_str());
        let folder = &self.folder;
        match rustix::fs::renameat_with(folder, old, folder, new, RenameFlags::NOREPLACE) {
            Ok(()) => Ok(()),
            // A file system without RENAME_NOREPLACE (NFS): link(2) refuses to replace, too.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(folder, old, folder, new, AtFlags::empty())
                    .map_err(|errno| self.error("rename", to, errno))?;
                rustix::fs::unlinkat(folder, old, AtFlags::empty())
                    .map_err(|errno| self.error("rename", from, errno))
            }
            Err(Errno::EXIST) => Err(self.error("rename", to, Errno::EXIST)),
            Err(errno) => Err(self.error("rename", from, errno)),
        }
    }

    fn remove(&self, name: &FileName) -> Result<(), StoreError> {
        rustix::fs::unlinkat(&self.folder, name.as_str(), AtFlags::empty())
            .map_err(|errno| self.error("remove", name, errno))
    }

    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        let object = self.describe();
        let failed = |errno| error("list", &object, errno, None);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if let Ok(Ok(name)) = entry.file_name().to_str().map(FileName::new) {
                names.push(name);
            }
            if names.len() > LIST_ENTRIES_MAX {
                return Err(failed(Errno::TOOBIG));
            }
        }
        Ok(names)
    }

    fn flush_folder(&self) -> Result<(), StoreError> {
        rustix::fs::fsync(&self.folder)
            .map_err(|errno| error("flush folder", &self.describe(), errno, Some(&self.folder)))
    }

    fn copy_owner_and_mode(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        let stat = rustix::fs::statat(&self.folder, from.as_str(), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| self.error("stat", from, errno))?;
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&self.folder, to.as_str(), flags, Mode::empty())
            .map_err(|errno| self.error("open", to, errno))?;
        let (owner, group) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::fchown(&file, Some(owner), Some(group))
            .and_then(|()| rustix::fs::fchmod(&file, Mode::from_raw_mode(stat.st_mode & 0o7777)))
            .map_err(|errno| self.error("set owner and mode of", to, errno))
    }

    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        free_space(&self.folder).map_err(|errno| error("free space", &self.describe(), errno, None))
    }
}

fn free_space(folder: impl AsFd) -> Result<FreeSpace, Errno> {
    let space = rustix::fs::fstatvfs(folder)?;
    Ok(FreeSpace {
        available_bytes: space.f_bavail.saturating_mul(space.f_frsize),
        total_bytes: space.f_blocks.saturating_mul(space.f_frsize),
        read_only: space.f_flag.contains(StatVfsMountFlags::RDONLY),
    })
}

fn error(op: &'static str, object: &str, errno: Errno, folder: Option<&OwnedFd>) -> StoreError {
    let object = object.to_owned();
    match errno {
        Errno::NOENT => StoreError::NotFound { op, object },
        Errno::EXIST => StoreError::AlreadyExists { op, object },
        Errno::ACCESS | Errno::PERM => StoreError::PermissionDenied { op, object },
        Errno::ROFS => StoreError::ReadOnly { op, object },
        Errno::NOSPC | Errno::DQUOT => StoreError::NoSpace {
            op,
            object,
            available_bytes: folder
                .and_then(|folder| free_space(folder).ok())
                .map_or(0, |space| space.available_bytes),
        },
        errno => StoreError::Io {
            op,
            object,
            source: io::Error::from(errno),
        },
    }
}

impl LocalFile {
    fn failed(&self, op: &'static str, error_: &io::Error) -> StoreError {
        let errno = Errno::from_io_error(error_).unwrap_or(Errno::IO);
        error(op, &self.object, errno, Some(&self.folder))
    }
}

impl StoreFile for LocalFile {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(self.stat()?.len)
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        let found = self
            .file
            .metadata()
            .map_err(|error| self.failed("stat", &error))?;
        Ok(FileStat {
            len: found.len(),
            modified_s: u64::try_from(found.mtime()).ok(),
            regular: found.is_file(),
            allocated_bytes: Some(found.blocks() * 512),
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], _class: ReadClass) -> Result<(), StoreError> {
        let mut done = 0;
        while done < buf.len() {
            match self
                .file
                .read_at(&mut buf[done..], offset.saturating_add(done as u64))
            {
                Ok(0) => {
                    return Err(StoreError::Truncated {
                        op: "read",
                        object: self.object.clone(),
                        offset,
                        asked: buf.len() as u64,
                        got: done as u64,
                    });
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed("read", &error)),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.file
            .write_all_at(data, offset)
            .map_err(|error| self.failed("write", &error))
    }

    fn flush(&self) -> Result<(), StoreError> {
        // The kernel reports a failed write-back once and then calls the pages clean: a second
        // fsync would return success (https://wiki.postgresql.org/wiki/Fsync_Errors).
        if self.flush_failed.load(Ordering::SeqCst) {
            return Err(self.failed("flush", &io::Error::from(Errno::IO)));
        }
        self.file.sync_all().map_err(|error| {
            self.flush_failed.store(true, Ordering::SeqCst);
            self.failed("flush", &error)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Err(StoreError::Unsupported {
                op: "discard",
                object: self.object.clone(),
                reason: "the file system can't punch holes".to_owned(),
            }),
            Err(errno) => Err(self.failed("discard", &errno.into())),
        }
    }

    fn data_ranges(&self, report: &mut dyn FnMut(Range<u64>)) -> Result<(), StoreError> {
        let failed = |errno: Errno| self.failed("find the holes of", &errno.into());
        let mut at = 0;
        // The position belongs to this handle, and nothing else uses it.
        loop {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) => start,
                // The rest is a hole, or this is the end.
                Err(Errno::NXIO) => return Ok(()),
                Err(errno) => return Err(failed(errno)),
            };
            at = rustix::fs::seek(&self.file, SeekFrom::Hole(start)).map_err(failed)?;
            report(start..at);
        }
    }

    fn forget_cached(&self) {
        // Advice only: what can't be dropped is read from memory.
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
    }

    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.file
            .set_len(len)
            .map_err(|error| self.failed("resize", &error))
    }
}
