//! What of a test is still mounted, looped or running on this machine.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub use sprat_testkit::leftovers::contains;
use sprat_testkit::leftovers::{loops_of, mounts_of, parent};

/// The processes of `stage`, with the words of their command lines, oldest first: those that
/// inherited the session's environment, which names the stage's state folder; those that were told
/// to work in the stage; and what these started, rsync with its bare environment among them.
pub fn processes(stage: &Path) -> Vec<(i32, Vec<String>)> {
    let marker = stage.as_os_str().as_bytes();
    let me = i32::try_from(std::process::id()).expect("a pid");
    let mut others = Vec::new();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if pid == me {
            continue;
        }
        let file = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let line = file("cmdline");
        let ours = contains(&file("environ"), marker) || contains(&line, marker);
        let words = line
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty());
        let words: Vec<_> = words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let parent = parent(pid).unwrap_or(0);
        if ours {
            found.push((pid, words));
        } else {
            others.push((pid, parent, words));
        }
    }
    while let Some(at) = others
        .iter()
        .position(|(_, parent, _)| found.iter().any(|(pid, _)| pid == parent))
    {
        let (pid, _, words) = others.swap_remove(at);
        found.push((pid, words));
    }
    found.sort();
    found
}

/// One line for each thing that belongs to `stage`, with its volume of `volume_bytes`, and is still
/// there.
pub fn of(stage: &Path, volume_bytes: u64) -> Vec<String> {
    let running = processes(stage).into_iter();
    let mut left: Vec<_> = running
        .map(|(pid, words)| format!("process {pid}: {}", words.join(" ")))
        .collect();
    left.extend(mounts_of(stage.as_os_str().as_bytes()));
    left.extend(loops_of(volume_bytes));
    left
}
