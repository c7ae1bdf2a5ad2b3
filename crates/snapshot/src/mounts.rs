//! The table of mounts, as far as a snapshot needs it: what lies inside a source and must not be in a
//! backup.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// File systems that have the kernel's state and no files.
const KERNEL_FILE_SYSTEMS: [&[u8]; 19] = [
    b"proc",
    b"sysfs",
    b"devtmpfs",
    b"devpts",
    b"cgroup",
    b"cgroup2",
    b"debugfs",
    b"tracefs",
    b"securityfs",
    b"pstore",
    b"bpf",
    b"configfs",
    b"mqueue",
    b"hugetlbfs",
    b"binfmt_misc",
    b"rpc_pipefs",
    b"nsfs",
    b"efivarfs",
    b"fusectl",
];

/// The type of an automount point: on first use, a daemon mounts something on it.
const AUTOFS: &str = "autofs";

/// One mount.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The mount's number. Another mount may get it after an unmount.
    pub(crate) id: u32,
    /// The number of the mount below this one.
    pub(crate) parent: u32,
    pub(crate) at: PathBuf,
    /// The folder of the file system that is mounted at `at`.
    pub(crate) root: PathBuf,
    /// `major:minor`, as `st_dev` has them.
    pub(crate) device: (u32, u32),
    /// The file system's type.
    pub(crate) kind: String,
    /// What was mounted: a device, a server's share, or any word.
    pub(crate) source: OsString,
    pub(crate) kernel: bool,
    /// An automount point with nothing mounted on it.
    pub(crate) empty_automount: bool,
    /// It lies on an automount point: it is unmounted when idle, and mounted on use.
    pub(crate) on_automount: bool,
}

/// The visible mounts of this thread's mount namespace. A mount that another one hides is left out: no
/// path leads to its files.
pub(crate) fn mounts() -> io::Result<Vec<Mount>> {
    Ok(visible(&parse(&std::fs::read(
        "/proc/thread-self/mountinfo",
    )?)))
}

/// The mount of `table` ([`mounts`]) that contains the real path `path`.
pub(crate) fn holding<'t>(table: &'t [Mount], path: &Path) -> Option<&'t Mount> {
    let above = table.iter().filter(|mount| path.starts_with(&mount.at));
    above.max_by_key(|mount| mount.at.as_os_str().len())
}

/// Finds the visible mounts. It follows each mount point as the kernel resolves a path: from mount to
/// mount, at each step to the topmost one.
fn visible(table: &[Mount]) -> Vec<Mount> {
    let ids: std::collections::HashSet<u32> = table.iter().map(|mount| mount.id).collect();
    // The walk begins at a mount whose parent is not listed.
    let parent = |mount: &Mount| {
        let listed = mount.parent != mount.id && ids.contains(&mount.parent);
        listed.then_some(mount.parent)
    };
    let mut on: HashMap<(Option<u32>, &Path), &Mount> = HashMap::new();
    for mount in table {
        on.insert((parent(mount), &mount.at), mount);
    }
    let top = |path: &Path| {
        let (mut at, mut on_automount) = (None::<&Mount>, false);
        let mut steps: Vec<&Path> = path.ancestors().collect();
        steps.reverse();
        for step in steps {
            on_automount = false;
            let mut next = on.get(&(None, step));
            if let Some(at) = at {
                next = on.get(&(Some(at.id), step)).or(next);
            }
            // Each mount lies on one that was mounted before it, so this ends. The limit is for a table
            // that contradicts itself.
            for _ in 0..table.len() {
                let Some(mount) = next else { break };
                on_automount |= at.is_some_and(|below| below.at == step && below.kind == AUTOFS);
                at = Some(mount);
                next = on.get(&(Some(mount.id), step));
            }
        }
        at.map(|mount| (mount.id, on_automount))
    };
    let tops: Vec<_> = table.iter().map(|mount| top(&mount.at)).collect();
    let mut seen = Vec::new();
    for (mut mount, top) in table.iter().cloned().zip(tops) {
        if let Some((id, on_automount)) = top
            && id == mount.id
        {
            mount.on_automount = on_automount;
            seen.push(mount);
        }
    }
    seen
}

/// Parses mountinfo (`Documentation/filesystems/proc.rst`, 3.5). Invalid lines are skipped.
fn parse(table: &[u8]) -> Vec<Mount> {
    table
        .split(|b| *b == b'\n')
        .filter_map(|line| {
            let mut words = line.split(|b| *b == b' ');
            let mut number = || std::str::from_utf8(words.next()?).ok()?.parse().ok();
            let (id, parent) = (number()?, number()?);
            let device = std::str::from_utf8(words.next()?).ok()?;
            let (major, minor) = device.split_once(':')?;
            let root = words.next()?;
            let at = words.next()?;
            let mut words = words.skip_while(|word| *word != b"-").skip(1);
            let kind = words.next()?;
            let source = words.next().unwrap_or_default();
            let options = words.next().unwrap_or_default();
            let path = |text| OsString::from_vec(without_octal(text));
            // An indirect automount point is a folder of mount points.
            let indirect = options
                .split(|b| *b == b',')
                .any(|word| word == b"indirect");
            Some(Mount {
                id,
                parent,
                at: path(at).into(),
                root: path(root).into(),
                device: (major.parse().ok()?, minor.parse().ok()?),
                kind: String::from_utf8_lossy(kind).into_owned(),
                source: path(source),
                kernel: KERNEL_FILE_SYSTEMS.contains(&kind),
                empty_automount: kind == AUTOFS.as_bytes() && !indirect,
                on_automount: false,
            })
        })
        .collect()
}

/// mountinfo writes space, tab, newline and backslash as `\ooo`.
fn without_octal(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let digits = text.get(at + 1..at + 4);
        let value = digits
            .filter(|_| text[at] == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(value.unwrap_or(text[at]));
        at += if value.is_some() { 4 } else { 1 };
    }
    out
}

/// An rsync pattern that matches exactly `path` (absolute; the transfer's root is `/`), or with
/// `content_only` all that is in it.
pub(crate) fn pattern_for(path: &Path, content_only: bool) -> OsString {
    let ending = match (content_only, path.as_os_str().as_bytes()) {
        (false, _) => "",
        (true, b"/") => "*",
        (true, _) => "/*",
    };
    pattern_with_ending(path, ending)
}

/// An rsync pattern for `path` followed by `ending`, which is a pattern itself.
pub(crate) fn pattern_with_ending(path: &Path, ending: &str) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    // rsync treats a backslash as an escape only in a pattern with a wildcard.
    let wild = [bytes, ending.as_bytes()]
        .concat()
        .iter()
        .any(|b| b"*?[".contains(b));
    let mut pattern = Vec::with_capacity(bytes.len() + ending.len());
    for byte in bytes {
        if wild && b"*?[\\".contains(byte) {
            pattern.push(b'\\');
        }
        pattern.push(*byte);
    }
    pattern.extend_from_slice(ending.as_bytes());
    OsString::from_vec(pattern)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_with_unusual_names_are_parsed() {
        let table = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            50 27 7:3 / /mnt/a\\040b\\134 rw shared:1 master:2 - ext4 /dev/loop3 rw\n\
            garbage\n1 2 x:y / / rw - ext4 a rw\n";
        let found = parse(table);
        assert_eq!(found.len(), 2);
        assert!(found[0].kernel);
        assert_eq!(found[1].at, Path::new("/mnt/a b\\"));
        assert_eq!((found[1].id, found[1].device), (50, (7, 3)));
        assert_eq!(found[1].root, Path::new("/"));
        assert!(!found[1].kernel);
        assert_eq!((found[1].parent, &*found[1].kind), (27, "ext4"));
        assert_eq!(found[1].source, "/dev/loop3");
        assert!(mounts().unwrap().iter().any(|m| m.at == Path::new("/")));
    }

    #[test]
    fn hidden_mounts_are_left_out() {
        let table = b"1 0 8:1 / / rw - ext4 /dev/sda1 rw\n\
            2 1 8:2 / /a rw - ext4 /dev/sda2 rw\n\
            3 2 8:3 / /a/b rw - ext4 /dev/sda3 rw\n\
            4 2 8:4 / /a rw - ext4 /dev/sda4 rw\n\
            5 1 0:9 / /auto rw - autofs systemd-1 rw,fd=3,direct\n\
            6 5 8:5 / /auto rw - ext4 /dev/sda5 rw\n\
            7 1 0:8 / /empty rw - autofs systemd-1 rw,fd=3,direct\n\
            8 1 0:7 / /net rw - autofs auto.net rw,fd=3,indirect\n\
            9 4 8:6 / /a/c rw - ext4 /dev/sda6 rw\n";
        let seen = visible(&parse(table));
        let ids: Vec<_> = seen.iter().map(|mount| mount.id).collect();
        assert_eq!(ids, [1, 4, 6, 7, 8, 9]);
        let automounts: Vec<_> = seen.iter().filter(|mount| mount.on_automount).collect();
        assert_eq!(automounts.len(), 1);
        assert_eq!(automounts[0].id, 6);
        let empty: Vec<_> = seen.iter().filter(|mount| mount.empty_automount).collect();
        assert_eq!((empty.len(), empty[0].id), (1, 7));
        assert_eq!(holding(&seen, Path::new("/a/b/x")).unwrap().id, 4);
        assert_eq!(holding(&seen, Path::new("/ab")).unwrap().id, 1);
    }

    #[test]
    fn patterns_match_names_with_wildcards_literally() {
        assert_eq!(pattern_for(Path::new("/a*b"), false), "/a\\*b");
        assert_eq!(pattern_for(Path::new("/a\\b"), false), "/a\\b");
        assert_eq!(pattern_for(Path::new("/a\\b"), true), "/a\\\\b/*");
        assert_eq!(pattern_for(Path::new("/"), true), "/*");
    }
}
