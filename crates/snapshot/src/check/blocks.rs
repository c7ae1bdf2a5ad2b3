//! Which files of a volume have content in given places of its device.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::affected;
use super::known::Key;
use crate::record::NameList;
use crate::spec::Cancel;
use crate::suspects::{Suspect, Suspects};

/// The files that were found.
#[derive(Debug, Clone, Default)]
pub struct FilesOn {
    /// Under each name in each snapshot, `JOB/SNAPSHOT/path`, escaped.
    pub names: NameList,
    /// The list for backups could not be written.
    pub not_saved: Option<String>,
}

/// Finds the files of the volume at `root` that have content in `places`, byte ranges of its device
/// in order, and notes them in the list `suspects`: backups read them from their source again.
/// `extents` tells where a file's content lies. Where a cancel ends the search, what it found by then
/// is returned.
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
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if cancel.is_cancelled() {
                break;
            }
            let Ok(about) = entry.metadata() else {
                continue;
            };
            if about.is_dir() {
                folders.push(entry.path());
                continue;
            }
            let again = about.nlink() > 1 && !seen.insert(about.ino());
            if about.is_file() && !again && lies_in(&entry.path(), places, extents) {
                list.note(root, suspect(&about, entry.path()));
                found.insert(about.ino(), entry.path());
            }
        }
    }
    let names = affected::find(root, &found, &|| cancel.is_cancelled()).names;
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
) -> bool {
    let mut options = File::options();
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = options
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path);
    let Ok(Ok(parts)) = opened.map(|file| extents(&file)) else {
        return false;
    };
    parts.iter().any(|part| {
        let behind = places.partition_point(|place| place.end <= part.start);
        places
            .get(behind)
            .is_some_and(|place| place.start < part.end)
    })
}
