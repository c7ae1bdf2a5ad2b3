//! Copies within a btrfs volume that share their content with the original, also between subvolumes, where
//! a hard link or a rename is not possible.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, fstat, futimens, ioctl_ficlone,
    mkdirat, openat, unlinkat,
};
use rustix::io::Errno;

use crate::cancel::Cancel;
use crate::long_path;

/// Makes the file `name` in `folder`, with content and time of the regular file `from`. rsync then finds
/// it unchanged, and sets the other attributes. After a failure there is no such file.
pub(crate) fn file(from: &File, folder: BorrowedFd<'_>, name: &Path) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let to = openat(folder, name, flags, Mode::from(0o600))?;
    let done = ioctl_ficlone(&to, from)
        .map_err(io::Error::from)
        .and_then(|()| {
            let about = from.metadata()?;
            set_time(to.as_fd(), about.mtime(), about.mtime_nsec())
        });
    if done.is_err() {
        let _ = unlinkat(folder, name, AtFlags::empty());
    }
    done
}

/// Does `change` to the names in `folder`, which keeps its time.
pub(crate) fn keeping_time(
    folder: &OwnedFd,
    change: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let about = fstat(folder)?;
    change()?;
    set_time(
        folder.as_fd(),
        about.st_mtime,
        i64::try_from(about.st_mtime_nsec).unwrap_or(0),
    )
}

pub(crate) fn set_time(file: BorrowedFd<'_>, second: i64, nanosecond: i64) -> io::Result<()> {
    let times = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: second,
            tv_nsec: nanosecond,
        },
    };
    Ok(futimens(file, &times)?)
}

/// Copies what is at `from` to `to`: a regular file, or the folders and regular files of a tree. What
/// exists at `to` stays. `is_wanted` returns whether a file may be copied. False if it was cancelled.
pub(crate) fn tree(
    from: &Path,
    to: &Path,
    is_wanted: &dyn Fn(&Metadata) -> bool,
    cancel: &Cancel,
) -> io::Result<bool> {
    let mut todo = vec![PathBuf::new()];
    while let Some(below) = todo.pop() {
        if cancel.is_cancelled() {
            return Ok(false);
        }
        let (from, to) = (joined(from, &below), joined(to, &below));
        let about = long_path::lstat(&from)?;
        if about.is_dir() {
            make_folder(&to)?;
            if !long_path::lstat(&to)?.is_dir() {
                continue;
            }
            let names = long_path::names(&from)?;
            todo.extend(names.into_iter().map(|name| below.join(name)));
        } else if about.is_file() && is_wanted(&about) {
            let source = long_path::open_regular(&from)?;
            let (folder, name) = in_folder(&to)?;
            match file(&source, folder.as_fd(), name) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
        }
    }
    Ok(true)
}

fn joined(path: &Path, below: &Path) -> PathBuf {
    match below.as_os_str().is_empty() {
        true => path.to_owned(),
        false => path.join(below),
    }
}

fn make_folder(path: &Path) -> io::Result<()> {
    let (folder, name) = in_folder(path)?;
    match mkdirat(&folder, name, Mode::from(0o700)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The open folder that `path` is in, and its name there.
pub(crate) fn in_folder(path: &Path) -> io::Result<(OwnedFd, &Path)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok((long_path::open_at(CWD, parent, flags)?, Path::new(name)))
}
