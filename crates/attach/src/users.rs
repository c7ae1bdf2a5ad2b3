//! Finds in `/proc` which processes use a mount or a device, without accessing any other file system.
//!
//! Nothing here calls stat(2) on files that a process has open: a network mount that is down would not
//! answer, and this would hang.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::device_node::device_number;
use crate::loop_name;
use crate::mount_table::{self, MountLine};
use crate::text::printable;

/// How many users are reported.
const USERS_MAX: usize = 5;

/// Some of the users of the mount at `dir`: processes with a working folder, root or open file there, as
/// `name (pid)`, and mounts on it.
pub(crate) fn users_of(dir: &Path) -> Vec<String> {
    let there = mount_table::resolve(dir);
    let Ok(lines) = mount_table::read_mounts() else {
        return Vec::new();
    };
    let Some(mount) = lines.iter().rfind(|line| line.mount_point == there) else {
        return Vec::new();
    };
    let upon = lines
        .iter()
        .filter(|line| line.parent == mount.id && line.id != mount.id)
        .map(|line| format!("a mount at {}", line.mount_point.display()));
    let using = processes()
        .into_iter()
        .filter(|process| uses(process, mount))
        .map(|process| name_and_pid(&process));
    upon.chain(using).take(USERS_MAX).collect()
}

/// Some of the users of the volume with this id ([`volume_id`](crate::volume_id)): mount points in this
/// namespace, and processes in whose mount namespace it is mounted.
#[must_use]
pub fn holders_of(volume_id: &str) -> Vec<String> {
    let devices = devices_of(volume_id);
    let holds = |line: &MountLine| line.device().is_some_and(|it| devices.contains(&it));
    let here = mount_table::read_mounts().unwrap_or_default();
    let mut holders: Vec<String> = here
        .iter()
        .filter(|line| holds(line))
        .map(|line| format!("it is mounted at {}", line.mount_point.display()))
        .collect();
    // Namespaces that follow this one have the same mounts, so they add nothing.
    if !holders.is_empty() {
        holders.truncate(USERS_MAX);
        return holders;
    }
    let mut seen = BTreeSet::from([namespace_of(Path::new("/proc/thread-self"))]);
    for process in processes() {
        if holders.len() >= USERS_MAX {
            break;
        }
        // One process of each namespace is enough.
        if !seen.insert(namespace_of(&process)) {
            continue;
        }
        let there = mount_table::read_mounts_of(&process.join("mountinfo")).unwrap_or_default();
        if let Some(line) = there.iter().find(|line| holds(line)) {
            let (name, dir) = (name_and_pid(&process), line.mount_point.display());
            holders.push(format!("the mount namespace of {name} has it at {dir}"));
        }
    }
    holders.truncate(USERS_MAX);
    holders
}

/// The users as a part of a message.
pub(crate) fn holders_text(holders: &[String]) -> String {
    if holders.is_empty() {
        "a process that has the device open".to_owned()
    } else {
        holders.join(", ")
    }
}

/// The device numbers of the loop device with this name, and of the map on it.
fn devices_of(volume_id: &str) -> Vec<(u32, u32)> {
    let mut devices = Vec::new();
    for path in loop_name::all_ours() {
        let carries = loop_name::name_at(&path)
            .is_ok_and(|name| name.is_some_and(|name| name.text() == volume_id));
        let Some(name) = path.file_name().filter(|_| carries) else {
            continue;
        };
        let block = Path::new("/sys/block").join(name);
        let maps = fs::read_dir(block.join("holders"));
        let maps = maps.into_iter().flatten().flatten();
        let maps = maps.map(|map| Path::new("/sys/block").join(map.file_name()));
        devices.extend(
            std::iter::once(block.clone())
                .chain(maps)
                .filter_map(|device| device_number(&device)),
        );
    }
    devices
}

fn processes() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().as_bytes().iter().all(u8::is_ascii_digit))
        .map(|entry| entry.path())
        .collect()
}

fn name_and_pid(process: &Path) -> String {
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let pid = process.file_name().unwrap_or_else(|| OsStr::new("?"));
    format!("{} ({})", printable(&name), pid.to_string_lossy())
}

/// The text of the link, `mnt:[NUMBER]`. Empty if it can't be read.
fn namespace_of(process: &Path) -> PathBuf {
    fs::read_link(process.join("ns/mnt")).unwrap_or_default()
}

fn uses(process: &Path, mount: &MountLine) -> bool {
    // For folders, only the path is known without asking their file system. The kernel shows it as this
    // process would see it, so a path below the mount point is on the mount.
    let below = |link: &str| {
        fs::read_link(process.join(link)).is_ok_and(|path| path.starts_with(&mount.mount_point))
    };
    if below("cwd") || below("root") {
        return true;
    }
    let Ok(files) = fs::read_dir(process.join("fdinfo")) else {
        return false;
    };
    files.flatten().any(|file| {
        let text = fs::read_to_string(file.path()).unwrap_or_default();
        mount_id(&text) == Some(mount.id)
    })
}

/// The number in the line `mnt_id:` of a file in `/proc/PID/fdinfo` (proc(5)).
fn mount_id(fdinfo: &str) -> Option<u32> {
    let line = fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("mnt_id:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_id_is_read_from_fdinfo() {
        let text = "pos:\t0\nflags:\t0100000\nmnt_id:\t1234\nino:\t7\n";
        assert_eq!(mount_id(text), Some(1234));
        assert_eq!(mount_id("pos:\t0\n"), None);
    }
}
