//! The lease files beside a container, as a server's admin sees them.

use std::fs;
use std::path::{Path, PathBuf};

/// The names in `folder`, sorted, without free leases and without late-write lists, which stay for
/// hours. A lease is free when it is not its container's highest one, or was released.
///
/// # Panics
/// Where the folder can't be read.
#[must_use]
pub fn names_but_free(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("the folder can be read");
    let names: Vec<String> = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let is_highest = |name: &str, number: u64| {
        let container = &name[..name.rfind('.').unwrap_or(0)];
        let of_it = names.iter().filter(|other| {
            let rest = other
                .strip_prefix(container)
                .and_then(|rest| rest.strip_prefix('.'));
            rest.is_some_and(|rest| rest.parse::<u64>().is_ok_and(|other| other > number))
        });
        of_it.count() == 0
    };
    let mut left: Vec<String> = names
        .iter()
        .filter(|name| !name.contains(".late-"))
        .filter(|name| {
            number(name).is_none_or(|number| {
                is_highest(name, number) && !is_free(&folder.join(name.as_str()))
            })
        })
        .cloned()
        .collect();
    left.sort();
    left
}

/// The leases in `folder` that are not free.
#[must_use]
pub fn held(folder: &Path) -> Vec<PathBuf> {
    let names = names_but_free(folder);
    let leases = names.iter().filter(|name| name.contains(".lock."));
    leases.map(|name| folder.join(name)).collect()
}

/// Removes all leases, which sprat never does: the numbers begin again.
///
/// # Panics
/// Where one can't be removed.
pub fn remove_all(folder: &Path) {
    let entries = fs::read_dir(folder).expect("the folder can be read");
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().contains(".lock.") {
            fs::remove_file(entry.path()).expect("a lease can be removed");
        }
    }
}

fn number(name: &str) -> Option<u64> {
    name.rsplit_once(".lock.")?.1.parse().ok()
}

fn is_free(file: &Path) -> bool {
    fs::read_to_string(file).is_ok_and(|text| text.contains("\"free\":true"))
}
