//! Finds what of a test is still mounted, looped or running on this machine.

use std::fs;

/// Whether `bytes` hold `marker` somewhere.
#[must_use]
pub fn contains(bytes: &[u8], marker: &[u8]) -> bool {
    let Some(first) = marker.first() else {
        return true;
    };
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        rest = &rest[at..];
        if rest.starts_with(marker) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// All processes of this machine.
pub fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The parent of a process (proc(5): the name in `stat` may hold blanks and parentheses).
#[must_use]
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let behind_name = stat.rsplit_once(')')?.1;
    behind_name.split_whitespace().nth(1)?.parse().ok()
}

/// Loop devices of `len_bytes`: the file's name says nothing, every volume's is the same.
#[must_use]
pub fn loops_of(len_bytes: u64) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let is_ours = |device: &fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(device.path().join(name)).ok();
        let sectors = read("size").and_then(|size| size.trim().parse().ok());
        read("loop/backing_file").is_some() && sectors == Some(len_bytes / 512)
    };
    let names = devices.filter(is_ours).map(|device| device.file_name());
    names
        .map(|name| format!("loop device {}", name.to_string_lossy()))
        .collect()
}

/// Mounts whose lines hold `marker`, in whatever namespace a process holds, as that one sees them.
#[must_use]
pub fn mounts_of(marker: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let mounts = fs::read(entry.path().join("mountinfo")).unwrap_or_default();
        let ours = mounts.split(|byte| *byte == b'\n');
        for mount in ours.filter(|mount| contains(mount, marker)) {
            let of = entry.file_name().to_string_lossy().into_owned();
            let line = String::from_utf8_lossy(mount);
            found.push(format!("mount in the eyes of {of}: {line}"));
        }
    }
    found
}
