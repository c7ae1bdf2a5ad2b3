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

/// One line for each thing that belongs to `stage` and is still there.
pub fn of(stage: &Path, before: &Machine) -> Vec<String> {
    let mut left = Vec::new();
    let marker = stage.as_os_str().as_bytes();
    let me = std::process::id().to_string();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) || pid == me {
            continue;
        }
        let file = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        // What a session starts inherits its environment, which names the stage's state folder.
        if contains(&file("environ"), marker) {
            let line = String::from_utf8_lossy(&file("cmdline")).replace('\0', " ");
            left.push(format!("process {pid}: {line}"));
        }
        // A mount in a namespace that some process still holds, as that process sees it.
        let mounts = file("mountinfo");
        for mount in mounts.split(|byte| *byte == b'\n') {
            if contains(mount, marker) {
                left.push(format!(
                    "mount of {pid}: {}",
                    String::from_utf8_lossy(mount)
                ));
            }
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
