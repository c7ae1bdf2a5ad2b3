//! Finds folders at a restore's destination where the snapshot has a file. rsync doesn't remove a folder
//! that is not empty, and if the file is a hard link, rsync waits for ever.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};

/// How many folders at the destination are compared. Each costs a lookup on the volume, perhaps over a
/// slow connection. If there are more conflicts, rsync finds them and is stopped.
const FOLDERS_MAX: usize = 5_000;
/// How many conflicts are reported.
const NAMED_MAX: usize = 10;

/// The folders at or below `destination` that are not empty and where the tree at `snapshot` has
/// something else. The nearest come first.
pub(crate) fn conflicts(snapshot: &Path, destination: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = VecDeque::from([PathBuf::new()]);
    let mut compared = 0;
    while let Some(below) = todo.pop_front() {
        let here = destination.join(&below);
        if !fs::symlink_metadata(&here).is_ok_and(|metadata| metadata.is_dir()) {
            continue;
        }
        compared += 1;
        if compared > FOLDERS_MAX || found.len() >= NAMED_MAX {
            break;
        }
        match fs::symlink_metadata(snapshot.join(&below)) {
            Ok(metadata) if metadata.is_dir() => todo.extend(folders_in(&here, &below)),
            Ok(_) if fs::read_dir(&here).is_ok_and(|mut names| names.next().is_some()) => {
                found.push(here);
            }
            // It is empty, or not in the snapshot.
            _ => {}
        }
    }
    found
}

/// The folders in `here`, as paths relative to the destination.
fn folders_in(here: &Path, below: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(here) else {
        return Vec::new();
    };
    entries
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| below.join(entry.file_name()))
        .collect()
}
