//! What of a test is still mounted, looped or running on this machine.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Loop devices of `len_bytes`: the file's name says nothing, every volume's is the same.
fn loops_of(len_bytes: u64) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let is_ours = |device: &fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(device.path().join(name)).ok();
        let sectors = read("size").and_then(|size| size.trim().parse().ok());
        read("loop/backing_file").is_some() && sectors == Some(len_bytes / 512)
    };
    let names = devices.filter(is_ours).map(|device| device.file_name());
    names
        .map(|name| format!("/dev/{}", name.to_string_lossy()))
        .collect()
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

/// One line for each thing that belongs to `stage`, with its volume of `volume_bytes`, and is still
/// there.
pub fn of(stage: &Path, volume_bytes: u64) -> Vec<String> {
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
    left.extend(loops_of(volume_bytes));
    left
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
