//! Finds folders at a restore's destination that stand where the snapshot has a file: rsync removes
//! none that holds something, and where the file is a hard link it waits for ever.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};

/// So many folders at the destination are compared: each costs a look at the volume, maybe over a
/// slow line. What lies beyond them rsync meets, and is stopped then.
const FOLDERS_MAX: usize = 5_000;
/// So many are named.
const NAMED_MAX: usize = 10;

/// The folders at or below `destination` that stand where the tree at `snapshot` has something else,
/// and are not empty; the nearest first.
pub(crate) fn in_the_way(snapshot: &Path, destination: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = VecDeque::from([PathBuf::new()]);
    let mut looked_at = 0;
    while let Some(below) = todo.pop_front() {
        let here = destination.join(&below);
        if !fs::symlink_metadata(&here).is_ok_and(|metadata| metadata.is_dir()) {
            continue;
        }
        looked_at += 1;
        if looked_at > FOLDERS_MAX || found.len() >= NAMED_MAX {
            break;
        }
        match fs::symlink_metadata(snapshot.join(&below)) {
            Ok(metadata) if metadata.is_dir() => todo.extend(folders_in(&here, &below)),
            Ok(_) if fs::read_dir(&here).is_ok_and(|mut names| names.next().is_some()) => {
                found.push(here);
            }
            // Empty, or nothing that the snapshot has.
            _ => {}
        }
    }
    found
}

/// The folders in `here`, as paths below the destination.
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
