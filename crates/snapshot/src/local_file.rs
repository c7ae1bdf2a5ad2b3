//! Files that sprat keeps on this machine: written whole or not at all, durable, readable for this user only.

use std::fs::{DirBuilder, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use tempfile::NamedTempFile;

const PART_PREFIX: &str = ".";
const PART_SUFFIX: &str = ".part";
/// Letters and digits between the two.
const PART_RANDOM: usize = 6;
/// A file that is being written is younger than this.
const PART_AGE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Makes a folder, and the folders above it, that only this user may enter.
pub fn make_private_folder(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)
}

/// Replaces the file at `path` by what `fill` writes. Makes its folder if that is missing. After an error or
/// a crash the file has the old or the new content. The new content is durable when this returns.
pub fn replace(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut part = part(path)?;
    fill(part.as_file_mut())?;
    finish(part, path)
}

/// Begins a file that [`finish`] gives its name.
pub(crate) fn part(path: &Path) -> io::Result<NamedTempFile> {
    make_private_folder(folder_of(path))?;
    remove_old_parts(folder_of(path));
    empty_part(path)
}

/// Replaces the file at `path`. As [`replace`].
pub(crate) fn finish(part: NamedTempFile, path: &Path) -> io::Result<()> {
    part.as_file().sync_all()?;
    part.persist(path).map_err(|error| error.error)?;
    File::open(folder_of(path))?.sync_all()
}

/// As [`replace`], for text that blanks may follow. If the disk is full, the text goes into the blocks that the
/// file has, if they suffice. A crash while that is done may leave a part of it: only for text that counts as
/// not known then.
pub fn replace_even_if_full(path: &Path, text: &[u8]) -> io::Result<()> {
    match replace(path, |file| file.write_all(text)) {
        Err(error) if is_full(&error) => overwrite(path, text).map_err(|_| error),
        replaced => replaced,
    }
}

/// Whether the disk has no space left.
#[must_use]
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// Overwrites a file without new blocks.
fn overwrite(path: &Path, text: &[u8]) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    let about = file.metadata()?;
    let mut text = text.to_vec();
    // One write: the end of the text before must not follow this one.
    let len = usize::try_from(about.len()).map_err(io::Error::other)?;
    text.resize(text.len().max(len), b' ');
    if text.len() as u64 > about.blocks() * 512 {
        return Err(io::ErrorKind::StorageFull.into());
    }
    file.write_all_at(&text, 0)?;
    file.sync_all()
}

/// Removes what killed processes left of files that they were writing.
fn remove_old_parts(folder: &Path) {
    let is_part = |name: &str| {
        let random = name.strip_prefix(PART_PREFIX);
        let random = random.and_then(|rest| rest.strip_suffix(PART_SUFFIX));
        random.is_some_and(|random| {
            random.len() == PART_RANDOM && random.bytes().all(|byte| byte.is_ascii_alphanumeric())
        })
    };
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let parts = names.filter(|entry| entry.file_name().to_str().is_some_and(is_part));
    let old: Vec<PathBuf> = parts
        .filter(|entry| {
            let modified = entry.metadata().and_then(|about| about.modified());
            // With a clock that went back, nobody knows its age.
            let age = modified.map(|at| SystemTime::now().duration_since(at));
            matches!(age, Ok(Ok(age)) if age > PART_AGE_MAX)
        })
        .map(|entry| entry.path())
        .collect();
    for path in old {
        // Another process may remove it at the same time.
        let _ = std::fs::remove_file(path);
    }
}

/// Writes a new file, as [`replace`] does, into a folder that exists. Fails with
/// [`io::ErrorKind::AlreadyExists`] if there is something at `path`.
pub fn create(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    if path.symlink_metadata().is_ok() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    let mut part = empty_part(path)?;
    fill(part.as_file_mut())?;
    part.as_file().sync_all()?;
    part.persist_noclobber(path).map_err(|error| error.error)?;
    File::open(folder_of(path))?.sync_all()
}

/// Renames a file within its folder, durably. Fails with [`io::ErrorKind::AlreadyExists`] if there is something at
/// `to`.
pub fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        // A file system without RENAME_NOREPLACE (NFS): link(2) refuses to replace, too.
        Err(Errno::INVAL | Errno::NOSYS) => {
            std::fs::hard_link(from, to)?;
            std::fs::remove_file(from)?;
        }
        Err(errno) => return Err(errno.into()),
    }
    File::open(folder_of(to))?.sync_all()
}

/// A file beside `path` with mode 0600. Its name shows that it is no file of its own.
fn empty_part(path: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new()
        .prefix(PART_PREFIX)
        .suffix(PART_SUFFIX)
        .rand_bytes(PART_RANDOM)
        .tempfile_in(folder_of(path))
        .map_err(without_path)
}

/// The error without the part's name. That differs each time, so with it one failure looks like many.
fn without_path(error: io::Error) -> io::Error {
    match error.to_string().split_once(" at path ") {
        Some((what, _)) => io::Error::new(error.kind(), what.to_owned()),
        None => error,
    }
}

fn folder_of(path: &Path) -> &Path {
    let folder = path.parent().filter(|folder| *folder != Path::new(""));
    folder.unwrap_or(Path::new("."))
}

/// Who but root and this user can change what lies at `path`: the file itself, or a folder above it.
/// `None`: nobody. In a folder with the sticky bit, such as `/tmp`, others can't replace a file.
pub fn writable_by_others(path: &Path) -> io::Result<Option<String>> {
    let me = rustix::process::geteuid().as_raw();
    let real = path.canonicalize()?;
    // A symbolic link can be replaced as well as what it leads to.
    let named = path.ancestors().skip(1);
    for (at, place) in std::iter::once(real.as_path())
        .chain(real.ancestors().skip(1))
        .chain(named)
        .enumerate()
        .filter(|(_, place)| !place.as_os_str().is_empty())
    {
        let about = place.metadata()?;
        let what = if at == 0 { "it" } else { "the folder" };
        let shown = if at == 0 {
            String::new()
        } else {
            format!(" {}", place.display())
        };
        if about.uid() != 0 && about.uid() != me {
            return Ok(Some(format!(
                "{what}{shown} belongs to another user (UID {})",
                about.uid()
            )));
        }
        let sticky = about.is_dir() && about.mode() & 0o1000 != 0;
        if about.mode() & 0o022 != 0 && !sticky {
            return Ok(Some(format!(
                "others can write to {what}{shown} (mode {:04o})",
                about.mode() & 0o7777
            )));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn old_parts_of_killed_processes_go_and_nothing_else_does() {
        let folder = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * PART_AGE_MAX;
        for name in [".aB3xyz.part", ".notes.part", "aB3xyz.part", ".aB3xyz.json"] {
            let file = File::create(folder.path().join(name)).unwrap();
            file.set_modified(old).unwrap();
        }
        File::create(folder.path().join(".young1.part")).unwrap();
        replace(&folder.path().join("state"), |file| file.write_all(b"x")).unwrap();
        let names = fs::read_dir(folder.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let left = [
            ".aB3xyz.json",
            ".notes.part",
            ".young1.part",
            "aB3xyz.part",
            "state",
        ];
        assert_eq!(names, left);
    }

    #[test]
    fn text_goes_into_the_blocks_of_its_file_on_a_full_disk() {
        sprat_testkit::requires!(sprat_testkit::needs::root());
        let disk = sprat_testkit::tmpfs::SmallDisk::new("size=1m");
        let path = disk.path().join("state");
        let read = || fs::read_to_string(&path).unwrap();
        replace_even_if_full(&path, b"[1, 2, 3]").unwrap();
        sprat_testkit::tmpfs::fill(disk.path());
        replace_even_if_full(&path, b"[1]").unwrap();
        assert_eq!(read(), "[1]      ");
        let long = "1".repeat(4096);
        replace_even_if_full(&path, long.as_bytes()).unwrap();
        assert_eq!(read(), long);
        // More than a block: nothing is written at all.
        let longer = "2".repeat(4097);
        let error = replace_even_if_full(&path, longer.as_bytes()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(read(), long);
        // Other content is replaced as a whole, or not at all.
        replace(&path, |file| file.write_all(b"[4]")).unwrap_err();
        assert_eq!(read(), long);
        let new = replace_even_if_full(&disk.path().join("new"), b"x").unwrap_err();
        assert_eq!(new.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn the_same_failure_has_the_same_words_each_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("gone/state");
        let failed = || {
            let error = create(&path, |file| file.write_all(b"x")).unwrap_err();
            (error.kind(), error.to_string())
        };
        let first = failed();
        assert_eq!(first.0, io::ErrorKind::NotFound);
        assert!(!first.1.contains(PART_SUFFIX), "{}", first.1);
        assert_eq!(first, failed());
    }

    fn mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn file_and_every_folder_above_it_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let file = inner.join("file");
        fs::write(&file, "x").unwrap();
        mode(&file, 0o600);
        mode(&inner, 0o755);
        assert_eq!(writable_by_others(&file).unwrap(), None);
        mode(&inner, 0o1777);
        assert_eq!(writable_by_others(&file).unwrap(), None);
        mode(&inner, 0o777);
        let why = writable_by_others(&file).unwrap().unwrap();
        assert!(why.contains("inner"), "{why}");
        mode(&inner, 0o700);
        mode(&file, 0o620);
        assert!(writable_by_others(&file).unwrap().is_some());
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(writable_by_others(&link).unwrap().is_some());
    }
}
