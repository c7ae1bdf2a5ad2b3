//! Files that sprat keeps on this machine: written whole or not at all, durable, readable for this user only.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

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
    make_private_folder(folder_of(path))?;
    remove_old_parts(folder_of(path));
    let part = filled(path, fill)?;
    part.persist(path).map_err(|error| error.error)?;
    File::open(folder_of(path))?.sync_all()
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
    let part = filled(path, fill)?;
    part.persist_noclobber(path).map_err(|error| error.error)?;
    File::open(folder_of(path))?.sync_all()
}

/// A file beside `path` with mode 0600. Its name shows that it is no file of its own.
fn filled(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<NamedTempFile> {
    let mut part = tempfile::Builder::new()
        .prefix(PART_PREFIX)
        .suffix(PART_SUFFIX)
        .rand_bytes(PART_RANDOM)
        .tempfile_in(folder_of(path))
        .map_err(without_path)?;
    fill(part.as_file_mut())?;
    part.as_file().sync_all()?;
    Ok(part)
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

#[cfg(test)]
mod tests {
    use std::io::Write;

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
        let names = std::fs::read_dir(folder.path()).unwrap();
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
}
