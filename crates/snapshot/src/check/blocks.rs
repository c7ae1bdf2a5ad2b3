//! Finds the files of a volume that have content in given byte ranges of its device.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, OFlags};

use super::affected;
use super::known::Key;
use crate::cancel::Cancel;
use crate::long_path;
use crate::name_list::NameList;
use crate::subvolumes;
use crate::suspects::{Suspect, Suspects};
use crate::text::escape_path;

/// The files that were found.
#[derive(Debug, Clone, Default)]
pub struct FilesOn {
    /// Every name in each snapshot, `JOB/SNAPSHOT/path`, escaped. Folders that can't be listed and files
    /// whose extents are unknown are here, too, each with the error after its path: they may have
    /// content in the ranges.
    pub names: NameList,
    /// Why the list of suspects could not be written.
    pub not_saved: Option<String>,
}

/// Finds the files of the volume at `root` that have content in `places` (sorted byte ranges of its
/// device), and adds them to the list `suspects`: backups then read them from their source. `extents`
/// returns where a file's content lies. A file for which it fails counts as found. If the search is
/// cancelled, returns what it has found.
pub fn files_on(
    root: &Path,
    places: &[Range<u64>],
    extents: &dyn Fn(&File) -> io::Result<Vec<Range<u64>>>,
    suspects: &Path,
    cancel: &Cancel,
) -> FilesOn {
    let mut found = BTreeMap::new();
    let mut list = Suspects::load(suspects);
    let mut seen = HashSet::new();
    let by_subvolumes = subvolumes::is_btrfs(root);
    let mut is_new = |about: &fs::Metadata| {
        (about.nlink() == 1 && !by_subvolumes) || seen.insert(Key::of(about))
    };
    let mut unknown = NameList::default();
    let mut unreadable = |path: &Path, error: &io::Error| {
        let name = escape_path(path.strip_prefix(root).unwrap_or(path));
        unknown.push(format!("{name}: {error}"));
    };
    long_path::each(root, &mut |path, about| {
        match about {
            Err(error) => unreadable(path, &error),
            Ok(about) if about.is_file() && is_new(&about) => {
                let lies = lies_in(path, places, extents);
                if let Err(error) = &lies {
                    unreadable(path, error);
                }
                if lies.unwrap_or(true) {
                    list.note(root, suspect(&about, path.to_owned()));
                    found.insert(Key::of(&about), path.to_owned());
                }
            }
            Ok(_) => {}
        }
        !cancel.is_cancelled()
    });
    let mut names = affected::find(root, &found, &|| cancel.is_cancelled()).names;
    names.append(&unknown);
    let saved = match found.is_empty() {
        true => Ok(()),
        false => list.save(suspects),
    };
    FilesOn {
        names,
        not_saved: saved.err().map(|error| error.to_string()),
    }
}

fn suspect(about: &fs::Metadata, path: PathBuf) -> Suspect {
    Suspect {
        inode: about.ino(),
        key: Key::of(about),
        path,
        several: false,
        damaged: true,
        by_source: false,
    }
}

fn lies_in(
    path: &Path,
    places: &[Range<u64>],
    extents: &dyn Fn(&File) -> io::Result<Vec<Range<u64>>>,
) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(long_path::open_at(CWD, path, flags)?);
    Ok(extents(&file)?.iter().any(|part| {
        let behind = places.partition_point(|place| place.end <= part.start);
        places
            .get(behind)
            .is_some_and(|place| place.start < part.end)
    }))
}
