//! Walks and removes trees on the volume, of any depth, without following symbolic links.
//!
//! Every path is relative to the tree's own folder. rsync works from within the tree, too, and refuses
//! paths longer than `PATH_MAX`, so every file that it made has such a path. Neither the stack nor the
//! number of open files grows with the depth.

use std::collections::{BTreeMap, HashSet};
use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat, openat, statat, unlinkat};
use rustix::io::Errno;

use crate::cancel::Cancel;

/// The longest value of an extended attribute, and the longest list of their names (linux/limits.h: `XATTR_SIZE_MAX`,
/// `XATTR_LIST_MAX`).
pub(crate) const XATTR_BYTES_MAX: usize = 64 << 10;
const LISTED_BYTES: usize = 32 << 10;
const INTERRUPTED_MAX: u32 = 3;

/// Opens a folder. Fails if the name is a symbolic link to one.
pub(crate) fn open_folder(at: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(at, path, flags, Mode::empty())?)
}

/// Opens the folder at `path`.
pub(crate) fn open_folder_at(path: &Path) -> io::Result<OwnedFd> {
    open_folder(rustix::fs::CWD, path)
}

/// Opens the folder `path` below `root`. No symbolic link on the way is followed: it could lead out of the tree, to the
/// files of this machine.
///
/// # Errors
/// A part of the path is no folder, or `path` is absolute or has `..` in it.
pub(crate) fn open_folder_below(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    let mut folder = open_folder(root, Path::new("."))?;
    for part in path.components() {
        folder = match part {
            Component::Normal(name) => open_folder(folder.as_fd(), Path::new(name))?,
            Component::CurDir => continue,
            _ => return Err(Errno::INVAL.into()),
        };
    }
    Ok(folder)
}

/// The folder that the name `path` of `root` is in, and the last part of `path`. See [`open_folder_below`].
pub(crate) fn folder_of<'p>(
    root: BorrowedFd<'_>,
    path: &'p Path,
) -> io::Result<(OwnedFd, &'p Path)> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => Ok((open_folder_below(root, parent)?, Path::new(name))),
        _ => Err(Errno::INVAL.into()),
    }
}

/// Whether no symbolic link is among the folders above `below` in the tree `root`. It could lead out of the
/// tree, to the files of this machine. Some of the folders may be missing.
pub(crate) fn leads_within(root: &Path, below: &Path) -> bool {
    let above = below.parent().unwrap_or(below);
    let opened = open_folder_at(root).and_then(|root| open_folder_below(root.as_fd(), above));
    match opened {
        Ok(_) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// What the file `path` of `root` is, if it is a regular one. See [`folder_of`].
pub(crate) fn regular_file(root: BorrowedFd<'_>, path: &Path) -> Option<Stat> {
    let (folder, name) = folder_of(root, path).ok()?;
    let about = statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    (FileType::from_raw_mode(about.st_mode) == FileType::RegularFile).then_some(about)
}

/// Removes the name `path` of `root`, which is not a folder. See [`folder_of`].
pub(crate) fn remove_name(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let (folder, name) = folder_of(root, path)?;
    Ok(unlinkat(&folder, name, AtFlags::empty())?)
}

/// The names in the folder `path` of `root`, without `.` and `..`, and their types if the file system
/// reports them.
pub(crate) fn names_in(root: BorrowedFd<'_>, path: &Path) -> io::Result<Vec<(PathBuf, FileType)>> {
    let listed = listed(open_folder(root, path)?.as_fd())?;
    Ok(listed
        .into_iter()
        .map(|entry| (entry.name, entry.kind))
        .collect())
}

/// A name in a folder, and what the folder itself shows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The name.
    pub name: PathBuf,
    /// The type, if the file system reports it.
    pub kind: FileType,
    /// The number of the inode.
    pub inode: u64,
}

/// All names in an open folder, without `.` and `..`.
pub(crate) fn listed(folder: BorrowedFd<'_>) -> io::Result<Vec<Listed>> {
    let mut names = Vec::new();
    let mut buffer = vec![MaybeUninit::<u8>::uninit(); LISTED_BYTES];
    let mut entries = RawDir::new(folder, &mut buffer);
    let mut interrupted = 0;
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Ok(entry) => entry,
            // The folder was removed meanwhile.
            Err(Errno::NOENT) => break,
            // Limited, because a FUSE file system may answer so each time.
            Err(Errno::INTR) if interrupted < INTERRUPTED_MAX => {
                interrupted += 1;
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(Listed {
                name: path_of(name),
                kind: entry.file_type(),
                inode: entry.ino(),
            });
        }
    }
    Ok(names)
}

/// A path for the extended attributes of a name in an open folder. There is no call for them, so it leads through that
/// descriptor.
pub(crate) fn path_through(folder: BorrowedFd<'_>, name: &Path) -> PathBuf {
    let folder = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string());
    folder.join(name)
}

pub(crate) fn path_of(name: &CStr) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    PathBuf::from(std::ffi::OsStr::from_bytes(name.to_bytes()))
}

pub(crate) fn is_folder(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Whether an entry of [`names_in`] at `path` is a folder. Asks for the type where the file system did
/// not report it.
pub(crate) fn entry_is_folder(
    root: BorrowedFd<'_>,
    path: &Path,
    kind: FileType,
) -> io::Result<bool> {
    Ok(match kind {
        FileType::Directory => true,
        FileType::Unknown => is_folder(&statat(root, path, AtFlags::SYMLINK_NOFOLLOW)?),
        _ => false,
    })
}

/// Removes everything below the folder `root`, not the folder itself. Stops when `cancel` is set, and
/// returns false then. A second call continues.
pub(crate) fn remove_content(root: BorrowedFd<'_>, cancel: &Cancel) -> io::Result<bool> {
    remove_content_reporting(root, cancel, &mut |_| {})
}

/// As [`remove_content`]. Reports after each folder how many names are removed so far.
pub(crate) fn remove_content_reporting(
    root: BorrowedFd<'_>,
    cancel: &Cancel,
    report: &mut dyn FnMut(u64),
) -> io::Result<bool> {
    let mut removed = 0_u64;
    // A folder is pushed again before its entries, so that it is empty when it is popped the second
    // time.
    let mut todo: Vec<(PathBuf, bool)> = vec![(PathBuf::from("."), false)];
    while let Some((path, emptied)) = todo.pop() {
        if cancel.is_cancelled() {
            return Ok(false);
        }
        if emptied {
            if path != Path::new(".") {
                unlinkat(root, &path, AtFlags::REMOVEDIR)?;
                removed += 1;
            }
            report(removed);
            continue;
        }
        let names = names_in(root, &path)?;
        todo.push((path.clone(), true));
        for (name, kind) in names {
            let below = path.join(name);
            if entry_is_folder(root, &below, kind)? {
                todo.push((below, false));
            } else {
                unlinkat(root, &below, AtFlags::empty())?;
                removed += 1;
            }
        }
    }
    Ok(true)
}

/// Removes from the tree below `root` the names of all regular files whose inode changed at or after
/// `from_ns` (nanoseconds since 1970, by the file system's own clock). Returns how many, or `None` if it
/// was cancelled.
///
/// Only names are removed. If such an inode has another name in an older snapshot, its content and
/// attributes stay as they are.
pub(crate) fn remove_files_changed_since(
    root: BorrowedFd<'_>,
    from_ns: i128,
    cancel: &Cancel,
) -> io::Result<Option<u64>> {
    let mut removed = 0;
    let mut todo = vec![PathBuf::from(".")];
    while let Some(path) = todo.pop() {
        if cancel.is_cancelled() {
            return Ok(None);
        }
        for (name, _) in names_in(root, &path)? {
            let below = path.join(name);
            let stat = statat(root, &below, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => todo.push(below),
                FileType::RegularFile if change_time_ns(&stat) >= from_ns => {
                    unlinkat(root, &below, AtFlags::empty())?;
                    removed += 1;
                }
                _ => {}
            }
        }
    }
    Ok(Some(removed))
}

/// Calls `meet` with each regular file below `root`, and its path relative to it.
pub(crate) fn each_file(root: &OwnedFd, meet: &mut dyn FnMut(&Path, &Stat)) -> io::Result<()> {
    let mut todo = vec![PathBuf::new()];
    while let Some(folder) = todo.pop() {
        let at = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &folder
        };
        for (name, _) in names_in(root.as_fd(), at)? {
            let below = folder.join(name);
            let stat = statat(root, &below, AtFlags::SYMLINK_NOFOLLOW)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => todo.push(below),
                FileType::RegularFile => meet(&below, &stat),
                _ => {}
            }
        }
    }
    Ok(())
}

/// The paths in the tree below `root` that are hard links to one file, by its inode. Folders are only listed.
pub(crate) fn hard_links(root: &OwnedFd) -> io::Result<BTreeMap<u64, Vec<PathBuf>>> {
    let (mut once, mut several) = (HashSet::new(), BTreeMap::new());
    each_listed(root, &mut |_, entry| {
        if !once.insert(entry.inode) {
            several.insert(entry.inode, Vec::new());
        }
    })?;
    drop(once);
    if !several.is_empty() {
        each_listed(root, &mut |path, entry| {
            if let Some(paths) = several.get_mut(&entry.inode) {
                paths.push(path.to_owned());
            }
        })?;
    }
    Ok(several)
}

/// Calls `meet` with each name below `root` that is not that of a folder, and its path relative to `root`.
fn each_listed(root: &OwnedFd, meet: &mut dyn FnMut(&Path, &Listed)) -> io::Result<()> {
    let mut todo = vec![PathBuf::new()];
    while let Some(folder) = todo.pop() {
        let at = Path::new(".").join(&folder);
        for entry in listed(open_folder(root.as_fd(), &at)?.as_fd())? {
            let below = folder.join(&entry.name);
            match entry_is_folder(root.as_fd(), &below, entry.kind)? {
                true => todo.push(below),
                false => meet(&below, &entry),
            }
        }
    }
    Ok(())
}

/// When the inode last changed, in nanoseconds since 1970.
pub(crate) fn change_time_ns(stat: &Stat) -> i128 {
    i128::from(stat.st_ctime) * 1_000_000_000 + i128::from(stat.st_ctime_nsec)
}

/// Whether the folder `root` contains anything but folders. Returns true, too, if it has more than
/// `folders_max` folders.
pub(crate) fn holds_a_file(root: &OwnedFd, folders_max: usize) -> io::Result<bool> {
    let mut todo = vec![PathBuf::from(".")];
    let mut folders = 0;
    while let Some(path) = todo.pop() {
        folders += 1;
        if folders > folders_max {
            return Ok(true);
        }
        let names = match names_in(root.as_fd(), &path) {
            Ok(names) => names,
            // rsync reports what can't be read.
            Err(_) => return Ok(true),
        };
        for (name, kind) in names {
            let below = path.join(name);
            if !entry_is_folder(root.as_fd(), &below, kind).unwrap_or(false) {
                return Ok(true);
            }
            todo.push(below);
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn remove_content_handles_deep_trees_and_follows_no_links() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        let top = dir.path().join("top");
        fs::create_dir(&top).unwrap();
        let root = open_folder_at(&top).unwrap();
        let mut deep = PathBuf::new();
        // 13 * 250 bytes within the tree; with the path of a temporary folder it may pass 4096.
        for _ in 0..15 {
            deep.push("d".repeat(250));
            rustix::fs::mkdirat(&root, &deep, Mode::from(0o700)).unwrap();
        }
        rustix::fs::symlinkat(&outside, &root, "link").unwrap();
        fs::write(top.join("file"), "x").unwrap();
        assert!(remove_content(root.as_fd(), &Cancel::new()).unwrap());
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
        assert!(outside.join("precious").exists());
    }

    #[test]
    fn names_below_a_link_or_out_of_the_tree_are_neither_found_nor_removed() {
        let dir = tempfile::tempdir().unwrap();
        let [outside, top] = ["outside", "top"].map(|name| dir.path().join(name));
        for folder in [&outside, &top.join("folder")] {
            fs::create_dir_all(folder).unwrap();
            fs::write(folder.join("file"), "x").unwrap();
        }
        let root = open_folder_at(&top).unwrap();
        rustix::fs::symlinkat(&outside, &root, "link").unwrap();
        rustix::fs::symlinkat(outside.join("file"), &root, "link to file").unwrap();
        let absolute = outside.join("file");
        let elsewhere = ["link/file", "../outside/file", "folder/../../outside/file"];
        for path in elsewhere.map(Path::new).into_iter().chain([&*absolute]) {
            assert!(regular_file(root.as_fd(), path).is_none(), "{path:?}");
            assert!(remove_name(root.as_fd(), path).is_err(), "{path:?}");
        }
        assert!(regular_file(root.as_fd(), Path::new("link to file")).is_none());
        assert!(regular_file(root.as_fd(), Path::new("folder")).is_none());
        assert!(outside.join("file").exists());
        let path = Path::new("folder/file");
        assert!(regular_file(root.as_fd(), path).is_some());
        remove_name(root.as_fd(), path).unwrap();
        assert!(!top.join(path).exists());
    }

    #[test]
    fn only_files_changed_since_the_checkpoint_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/old"), "x").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
        fs::write(dir.path().join("new"), "x").unwrap();
        let root = open_folder_at(dir.path()).unwrap();
        let stat = statat(&root, "new", AtFlags::SYMLINK_NOFOLLOW).unwrap();
        let removed =
            remove_files_changed_since(root.as_fd(), change_time_ns(&stat), &Cancel::new());
        assert_eq!(removed.unwrap(), Some(1));
        assert!(dir.path().join("sub/old").exists());
        assert!(!dir.path().join("new").exists());
    }
}
