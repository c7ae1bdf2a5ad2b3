//! Adopted copies: dated folders that the user's own rsync made. They are recognised by their names and
//! never changed.
//!
//! A user's `rsync --link-dest` fills folders such as `home.2026-11-21` at the top of the volume, or
//! `home/2026-11-21`, with the content of one source, without its path. They are listed, and can be
//! restored as they are. The first run of a job with that name links unchanged files to the newest of
//! them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, statat};

use crate::error::SnapshotError;
use crate::job::{Folder, STATE_FOLDER};
use crate::name::JobName;
use crate::sources::Sources;
use crate::walk::{entry_is_folder, is_folder, names_in, open_folder, open_folder_at};

/// The characters that may separate the name from the date.
const SEPARATORS: [char; 5] = ['.', '-', '_', '@', ' '];
/// The characters of a time of day that may follow the date.
const TIME_CHARACTERS: &str = "0123456789Tthms:.-_+Zz ";

/// A folder's name with a date at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dated<'a> {
    /// The part before the date. May be empty.
    pub(crate) stem: &'a str,
    date: &'a str,
}

impl<'a> Dated<'a> {
    /// Parses a name such as `home.2026-11-21`, `home-20261121-1030` or `2026-11-21_10:30`.
    pub(crate) fn parse(name: &'a str) -> Option<Self> {
        let begins = |at: usize| {
            let (before, date) = (name.get(..at)?, name.get(at..)?);
            let stem = match before.strip_suffix(SEPARATORS) {
                Some(stem) => stem,
                None if before.is_empty() => before,
                None => return None,
            };
            let end = date_bytes(date)?;
            let time = |c| TIME_CHARACTERS.contains(c);
            date[end..].chars().all(time).then_some(Self { stem, date })
        };
        (0..name.len()).find_map(begins)
    }

    /// A key that sorts names by date, whatever the spelling.
    fn order(&self) -> String {
        self.date.chars().filter(char::is_ascii_digit).collect()
    }
}

/// The length of the date at the beginning of `text`: `2026-11-21` or `20261121`.
fn date_bytes(text: &str) -> Option<usize> {
    let number = |from: usize, to: usize| {
        let digits = text.get(from..to)?;
        let all = digits.bytes().all(|byte| byte.is_ascii_digit());
        all.then(|| digits.parse::<u16>().ok()).flatten()
    };
    let dash = |at| text.get(at..at + 1) == Some("-");
    let (month, day, len) = if dash(4) && dash(7) {
        (number(5, 7)?, number(8, 10)?, 10)
    } else {
        (number(4, 6)?, number(6, 8)?, 8)
    };
    let plausible = (1970..=9999).contains(&number(0, 4)?)
        && (1..=12).contains(&month)
        && (1..=31).contains(&day);
    plausible.then_some(len)
}

/// Whether the folder `name` at the top of the volume, opened as `root`, is an adopted copy and not a
/// job.
pub(crate) fn is_copy(root: &OwnedFd, name: &Path) -> bool {
    let dated = name
        .to_str()
        .is_some_and(|name| Dated::parse(name).is_some());
    let state = name.join(STATE_FOLDER);
    dated && statat(root, &state, AtFlags::SYMLINK_NOFOLLOW).is_err()
}

/// Whether the folder `name` in a job's folder is an adopted copy.
pub(crate) fn is_copy_in_job(name: &str) -> bool {
    Folder::parse(name).is_none() && Dated::parse(name).is_some()
}

/// The adopted copies of `job`, as paths on the volume, oldest first.
pub(crate) fn copies_of(volume_root: &Path, job: &str) -> Result<Vec<PathBuf>, SnapshotError> {
    let root = open_folder_at(volume_root).map_err(root_unlisted)?;
    let mut found = Vec::new();
    for name in folders_in(&root).map_err(root_unlisted)? {
        let dated = Dated::parse(&name).filter(|dated| dated.stem == job);
        if let Some(dated) = dated.filter(|_| is_copy(&root, Path::new(&name))) {
            found.push((dated.order(), PathBuf::from(&name)));
        }
    }
    // A missing or unreadable job folder has none.
    let inner = open_folder(root.as_fd(), Path::new(job)).and_then(|folder| folders_in(&folder));
    for name in inner.unwrap_or_default() {
        let dated = Dated::parse(&name).filter(|_| is_copy_in_job(&name));
        if let Some(dated) = dated.filter(|dated| dated.stem.is_empty() || dated.stem == job) {
            found.push((dated.order(), Path::new(job).join(&name)));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

pub(crate) fn root_unlisted(source: io::Error) -> SnapshotError {
    SnapshotError::Volume {
        op: "list",
        object: "its root".to_owned(),
        source,
    }
}

/// The names of the folders in `folder`. Names that are not UTF-8 are skipped.
fn folders_in(folder: &OwnedFd) -> io::Result<Vec<String>> {
    let names = names_in(folder.as_fd(), Path::new("."))?;
    let is_one = |name: &Path, kind| entry_is_folder(folder.as_fd(), name, kind).unwrap_or(false);
    let folders = names.into_iter().filter(|(name, kind)| is_one(name, *kind));
    Ok(folders
        .filter_map(|(name, _)| Some(name.to_str()?.to_owned()))
        .collect())
}

/// The adopted copy to restore for `job` (and `snapshot`) if sprat made no such snapshot, as a path on
/// the volume.
pub(crate) fn chosen(
    volume_root: &Path,
    job: &JobName,
    snapshot: Option<&str>,
) -> Result<Option<PathBuf>, SnapshotError> {
    let copies = copies_of(volume_root, job.as_str())?;
    if let Some(snapshot) = snapshot {
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| name == snapshot);
        return Ok(copies.into_iter().find(named));
    }
    // The job's name may be that of a copy itself.
    let itself = Path::new(job.as_str());
    let root = open_folder_at(volume_root);
    let is_itself = root.is_ok_and(|root| {
        is_copy(&root, itself)
            && statat(&root, itself, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| is_folder(&stat))
    });
    if is_itself {
        return Ok(Some(itself.to_owned()));
    }
    Ok(copies.into_iter().next_back())
}

/// The newest adopted copy that the first run of `job` may link from, and the source of that copy. A
/// copy doesn't have its source's path, so the job must have exactly one source. The copy is named after
/// the job or the source. If it is a copy of something else, no file is equal, and all files are copied.
pub(crate) fn to_link_from(
    volume_root: &Path,
    job: &JobName,
    sources: &Sources,
) -> Result<Option<(PathBuf, PathBuf)>, SnapshotError> {
    let [source] = &sources.list[..] else {
        return Ok(None);
    };
    if !source.folder {
        return Ok(None);
    }
    let mut newest = copies_of(volume_root, job.as_str())?.pop();
    let name = source.path.file_name().and_then(|name| name.to_str());
    if let Some(name) = name.filter(|_| newest.is_none()) {
        newest = copies_of(volume_root, name)?.pop();
    }
    Ok(newest.map(|copy| (copy, source.path.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_end_with_a_date_are_recognised_in_any_spelling() {
        for (name, stem) in [
            ("home.2026-11-21", "home"),
            ("home-20261121", "home"),
            ("my.host_2026-11-21_10:30:00", "my.host"),
            ("backup 2026-11-21T10-30", "backup"),
            ("2026-11-21", ""),
            ("20261121-1030", ""),
        ] {
            assert_eq!(
                Dated::parse(name).map(|dated| dated.stem),
                Some(stem),
                "{name}"
            );
        }
        for name in [
            "home",
            "home.2026",
            "home2026-11-21",
            "home.2026-13-21",
            "home.2026-11-21.partial",
            "2026-11-21-home",
            "12345678",
            "home.1026-11-21",
            "",
            "é.2026-11-2é",
        ] {
            assert_eq!(Dated::parse(name), None, "{name}");
        }
    }

    #[test]
    fn names_sort_by_their_dates() {
        let order = |name| Dated::parse(name).unwrap().order();
        assert!(order("home.2026-11-21") < order("home-20261122"));
        assert!(order("home.2026-11-21") < order("home.2026-11-21_10"));
    }

    proptest! {
        #[test]
        fn no_name_makes_the_parser_panic(name in ".{0,30}") {
            let _ = Dated::parse(&name);
        }
    }
}
