//! The lease files beside a container, as a server's admin sees them.

use std::fs;
use std::path::{Path, PathBuf};

pub use sprat_store::lock::LATE_WRITE_S;

/// A lease with entries, as sprat writes it and `sprat-agent` reads it. Each has code of its own for the format: the
/// unit tests of both compare it with this text.
pub const WRITTEN_BY_SPRAT: &str = r#"{"token":"000102030405060708090a0b0c0d0e0f","free":false,"attempt":"101112131415161718191a1b1c1d1e1f","renewed":3,"host":"laptop","started_s":1795831511,"version":"0.9.0","doors":[{"number":7,"until_s":1795839611,"all_before":true,"own":true},{"number":1000004,"until_s":null,"all_before":false}],"watch":[{"host":"desk.home","token":"2021222324252627","until_s":1795839612}],"agent":"0123456789abcdef","flight":true}"#;

/// A lease that `sprat-agent unlock` released with the same entries, as sprat reads it. The open entry has an end now.
pub const RELEASED_BY_AGENT: &str = r#"{"token":"000102030405060708090a0b0c0d0e0f","free":true,"attempt":"101112131415161718191a1b1c1d1e1f","renewed":0,"host":"sprat-agent","started_s":1795831511,"version":"0.9.0","doors":[{"number":7,"until_s":1795839611,"all_before":true},{"number":1000004,"until_s":1795839613,"all_before":false}],"watch":[{"host":"desk.home","token":"2021222324252627","until_s":1795839612}],"agent":null,"flight":false}"#;

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
