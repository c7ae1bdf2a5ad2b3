//! System calls for paths that are too long for one call. A path may have 4,095 bytes (`PATH_MAX`). The
//! path of a source file alone may have that many, and on the volume the mount point, the job and the
//! snapshot precede it.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, Mode, OFlags, openat, readlinkat};
use rustix::io::Errno;

/// How many bytes of a path are opened in one step.
const STEP_BYTES: usize = 2048;

/// Size and modification time of a file. rsync treats files as equal if these are equal.
pub(crate) fn size_and_time(about: &Metadata) -> (u64, i64, i64) {
    (about.len(), about.mtime(), about.mtime_nsec())
}

/// As [`fs::symlink_metadata`].
pub(crate) fn lstat(path: &Path) -> io::Result<Metadata> {
    match fs::symlink_metadata(path) {
        Err(error) if is_too_long(&error) => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            File::from(open_at(CWD, path, flags)?).metadata()
        }
        other => other,
    }
}

/// Opens a regular file for reading, and never anything else, not even for a moment: opening a pipe may
/// block, and opening a device may have side effects. The check is not done by name, because the name
/// may get another object before the open. Symbolic links are not followed.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    open_regular_at(CWD, path)
}

/// The same below a folder.
pub(crate) fn open_regular_at(at: BorrowedFd<'_>, path: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = File::from(open_at(at, path, flags)?);
    if !found.metadata()?.is_file() {
        let text = "it is no longer a regular file";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    match File::open(format!("/proc/self/fd/{}", found.as_raw_fd())) {
        // Without /proc: the flags prevent blocking and following links.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            Ok(File::from(open_at(at, path, flags)?))
        }
        opened => opened,
    }
}

/// As [`fs::read_link`].
pub(crate) fn read_link(path: &Path) -> io::Result<PathBuf> {
    match fs::read_link(path) {
        Err(error) if is_too_long(&error) => {
            let (at, rest) = reach(CWD, path)?;
            let target = match &at {
                Some(at) => readlinkat(at, rest, Vec::new())?,
                None => readlinkat(CWD, rest, Vec::new())?,
            };
            Ok(OsString::from_vec(target.into_bytes()).into())
        }
        other => other,
    }
}

/// The names in a folder, unsorted.
pub(crate) fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    match fs::read_dir(folder) {
        Err(error) if is_too_long(&error) => {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let mut names = Vec::new();
            for entry in Dir::read_from(open_at(CWD, folder, flags)?)? {
                let entry = entry?;
                let name = entry.file_name();
                if name != c"." && name != c".." {
                    names.push(OsString::from_vec(name.to_bytes().to_vec()));
                }
            }
            Ok(names)
        }
        other => other?.map(|entry| Ok(entry?.file_name())).collect(),
    }
}

/// Calls `meet` with everything below the folder `root`, until it returns false. What can't be examined
/// or listed is passed with its error.
pub(crate) fn each(root: &Path, meet: &mut dyn FnMut(&Path, io::Result<Metadata>) -> bool) {
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        let names = match names(&folder) {
            Ok(names) => names,
            Err(error) => match meet(&folder, Err(error)) {
                true => continue,
                false => return,
            },
        };
        for name in names {
            let path = folder.join(name);
            let about = lstat(&path);
            let is_folder = about.as_ref().is_ok_and(Metadata::is_dir);
            if !meet(&path, about) {
                return;
            }
            if is_folder {
                folders.push(path);
            }
        }
    }
}

/// As [`openat`].
pub(crate) fn open_at(
    at: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
) -> rustix::io::Result<OwnedFd> {
    match openat(at, path, flags, Mode::empty()) {
        Err(Errno::NAMETOOLONG) => {
            let (inner, rest) = reach(at, path)?;
            let at = inner.as_ref().map_or(at, |inner| inner.as_fd());
            openat(at, rest, flags, Mode::empty())
        }
        other => other,
    }
}

fn is_too_long(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NAMETOOLONG.raw_os_error())
}

/// Opens the folders of a long path in steps. Returns the last one, and the short rest of the path.
fn reach(at: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<(Option<OwnedFd>, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut reached = None::<OwnedFd>;
    let mut step = PathBuf::new();
    let mut parts = path.components().peekable();
    while let Some(part) = parts.next() {
        step.push(part);
        if step.as_os_str().len() >= STEP_BYTES && parts.peek().is_some() {
            let from = reached.as_ref().map_or(at, |folder| folder.as_fd());
            reached = Some(openat(from, &step, flags, Mode::empty())?);
            step = PathBuf::new();
        }
    }
    Ok((reached, step))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{mkdirat, symlinkat};
    use std::io::{Read, Write};

    #[test]
    fn only_regular_files_are_opened_for_reading() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "content").unwrap();
        std::os::unix::fs::symlink("file", at("link")).unwrap();
        fs::create_dir(at("folder")).unwrap();
        let mode = Mode::from(0o600);
        rustix::fs::mknodat(CWD, at("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let opened = io::read_to_string(open_regular(&at("file")).unwrap());
        assert_eq!(opened.unwrap(), "content");
        // Opening the pipe would block here for ever.
        for name in ["pipe", "folder", "link"] {
            let error = open_regular(&at(name)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
        }
        let device = open_regular(Path::new("/dev/zero")).unwrap_err();
        assert_eq!(device.kind(), io::ErrorKind::InvalidInput);
        let none = open_regular(&at("none")).unwrap_err();
        assert_eq!(none.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn paths_longer_than_path_max_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let mut at = crate::walk::open_folder_at(dir.path()).unwrap();
        let mut path = dir.path().to_owned();
        let name = "d".repeat(250);
        for _ in 0..20 {
            mkdirat(&at, &name, Mode::from(0o700)).unwrap();
            at = crate::walk::open_folder(at.as_fd(), Path::new(&name)).unwrap();
            path.push(&name);
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        let file = openat(&at, "file", flags, Mode::from(0o600)).unwrap();
        File::from(file).write_all(b"deep").unwrap();
        symlinkat("file", &at, "link").unwrap();
        assert!(is_too_long(
            &fs::symlink_metadata(path.join("file")).unwrap_err()
        ));

        assert_eq!(lstat(&path.join("file")).unwrap().len(), 4);
        assert!(lstat(&path.join("link")).unwrap().is_symlink());
        assert_eq!(read_link(&path.join("link")).unwrap(), Path::new("file"));
        let mut text = String::new();
        open_regular(&path.join("file"))
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "deep");
        let mut found = names(&path).unwrap();
        found.sort();
        assert_eq!(found, ["file", "link"]);
        let error = lstat(&path.join("gone")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        // A single name that is too long is still an error.
        assert!(is_too_long(
            &lstat(&path.join("n".repeat(300))).unwrap_err()
        ));
    }
}
