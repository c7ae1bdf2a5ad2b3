//! What of a test is still mounted, looped or running on this machine.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The machine's FUSE connections and busy loop devices at one moment.
pub struct Machine {
    loops: BTreeSet<String>,
}

impl Machine {
    /// As it is now.
    pub fn now() -> Self {
        Self {
            loops: loops().into_iter().map(|(device, _)| device).collect(),
        }
    }
}

/// Busy loop devices with their files, as the kernel shows them.
fn loops() -> Vec<(String, String)> {
    let Ok(devices) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for device in devices.flatten() {
        let name = device.file_name().to_string_lossy().into_owned();
        if let Ok(file) = fs::read_to_string(device.path().join("loop/backing_file")) {
            found.push((name, file.trim().to_owned()));
        }
    }
    found
}

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
        let parent = parent(&file("stat"));
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

/// The parent in a process's `stat` (proc(5): the name before it may hold blanks and parentheses).
fn parent(stat: &[u8]) -> i32 {
    let stat = String::from_utf8_lossy(stat);
    let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let parent = behind_name.split_whitespace().nth(1);
    parent.and_then(|pid| pid.parse().ok()).unwrap_or(0)
}

/// One line for each thing that belongs to `stage` and is still there.
pub fn of(stage: &Path, before: &Machine) -> Vec<String> {
    let running = processes(stage).into_iter();
    let mut left: Vec<_> = running
        .map(|(pid, words)| format!("process {pid}: {}", words.join(" ")))
        .collect();
    let marker = stage.as_os_str().as_bytes();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        // A mount in a namespace that some process still holds, as that process sees it.
        let mounts = fs::read(entry.path().join("mountinfo")).unwrap_or_default();
        for mount in mounts
            .split(|byte| *byte == b'\n')
            .filter(|mount| contains(mount, marker))
        {
            let pid = entry.file_name().to_string_lossy().into_owned();
            left.push(format!(
                "mount of {pid}: {}",
                String::from_utf8_lossy(mount)
            ));
        }
    }
    for (device, file) in loops() {
        if !before.loops.contains(&device) && is_of(stage, &file) {
            left.push(format!("/dev/{device}: {file}"));
        }
    }
    left
}

/// Whether a loop device's file is, or may be, of `stage`.
fn is_of(stage: &Path, file: &str) -> bool {
    file.contains(&stage.display().to_string())
        || file.contains("sprat")
        || file.starts_with("/volume")
}

/// Whether `bytes` hold `marker` somewhere.
pub fn contains(bytes: &[u8], marker: &[u8]) -> bool {
    let Some(first) = marker.first() else {
        return true;
    };
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        if rest[at..].starts_with(marker) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}
