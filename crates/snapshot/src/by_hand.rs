//! Dated folders that a person's own rsync made: known by their names, and never written to.
//!
//! `rsync --link-dest` by hand fills folders such as `home.2026-11-21` at the top of the volume, or
//! `home/2026-11-21`: the content of one source, without its path. They are listed, restored as they
//! are, and the first run of a job of that name links unchanged files to the newest of them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, statat};

use crate::error::SnapshotError;
use crate::job::{Folder, STATE_FOLDER};
use crate::name::JobName;
use crate::sources::Sources;
use crate::walk::{is_folder, names_in, open_folder, open_folder_at};

/// What stands between a name and its date.
const SEPARATORS: [char; 5] = ['.', '-', '_', '@', ' '];
/// What may follow a date: a time of day, in any of the usual spellings.
const TIME_CHARACTERS: &str = "0123456789Tthms:.-_+Zz ";

/// A folder's name with a date at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Dated<'a> {
    /// What stands before the date; may be empty.
    pub(crate) stem: &'a str,
    date: &'a str,
}

impl<'a> Dated<'a> {
    /// Reads a name such as `home.2026-11-21`, `home-20261121-1030` or `2026-11-21_10:30`.
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

    /// Sorts as the dates do, however they are spelled.
    fn order(&self) -> String {
        self.date.chars().filter(char::is_ascii_digit).collect()
    }
}

/// The length of the date that `text` begins with: `2026-11-21` or `20261121`.
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

/// Whether the folder `name` at the volume's top, opened as `root`, is such a copy, and no job.
pub(crate) fn is_copy(root: &OwnedFd, name: &Path) -> bool {
    let dated = name
        .to_str()
        .is_some_and(|name| Dated::parse(name).is_some());
    let state = name.join(STATE_FOLDER);
    dated && statat(root, &state, AtFlags::SYMLINK_NOFOLLOW).is_err()
}

/// Whether the folder `name` in a job's folder is such a copy.
pub(crate) fn is_copy_in_job(name: &str) -> bool {
    Folder::parse(name).is_none() && Dated::parse(name).is_some()
}

/// The copies that count as those of `job`, by their paths on the volume, the oldest first.
pub(crate) fn copies_of(volume_root: &Path, job: &str) -> Result<Vec<PathBuf>, SnapshotError> {
    let failed = |source: io::Error| SnapshotError::Volume {
        op: "list",
        object: "its root".to_owned(),
        source,
    };
    let root = open_folder_at(volume_root).map_err(failed)?;
    let mut found = Vec::new();
    for name in folders_in(&root).map_err(failed)? {
        let dated = Dated::parse(&name).filter(|dated| dated.stem == job);
        if let Some(dated) = dated.filter(|_| is_copy(&root, Path::new(&name))) {
            found.push((dated.order(), PathBuf::from(&name)));
        }
    }
    // A job's folder that is none, or can't be read, has none.
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

/// The names of the folders in `folder` that are text.
fn folders_in(folder: &OwnedFd) -> io::Result<Vec<String>> {
    let names = names_in(folder.as_fd(), Path::new("."))?;
    let is_one = |name: &Path, kind| match kind {
        FileType::Directory => true,
        FileType::Unknown => {
            statat(folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| is_folder(&stat))
        }
        _ => false,
    };
    let folders = names.into_iter().filter(|(name, kind)| is_one(name, *kind));
    Ok(folders
        .filter_map(|(name, _)| Some(name.to_str()?.to_owned()))
        .collect())
}

/// The copy that a restore of `job` (and, in it, `snapshot`) means where sprat made no such
/// snapshot; its path on the volume.
pub(crate) fn chosen(
    volume_root: &Path,
    job: &JobName,
    snapshot: Option<&str>,
) -> Result<Option<PathBuf>, SnapshotError> {
    let copies = copies_of(volume_root, job.as_str())?;
    if let Some(snapshot) = snapshot.filter(|name| *name != "latest") {
        let named = |path: &PathBuf| path.file_name().is_some_and(|name| name == snapshot);
        return Ok(copies.into_iter().find(named));
    }
    // A copy may be named itself.
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

/// The newest copy that the first run of `job` may link from, and the source it is a copy of: that
/// must be the only one, since a copy doesn't tell its source's path. It is named after the job or
/// the source. Where it is a copy of something else, nothing in it is equal, and all is copied.
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
    fn names_with_a_date_at_their_end_are_known_however_it_is_spelled() {
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
    fn dates_sort_as_their_days_do() {
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
