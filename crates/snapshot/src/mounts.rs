//! The mount table, as far as a snapshot must know it: what lies inside a source and doesn't belong
//! into a backup.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// File systems that hold the kernel's state and no files.
const KERNEL_FILE_SYSTEMS: [&[u8]; 20] = [
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
    b"autofs",
    b"rpc_pipefs",
    b"nsfs",
    b"efivarfs",
    b"fusectl",
];

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    /// The kernel's number of it, which another mount may get once it is gone.
    pub(crate) id: u32,
    pub(crate) at: PathBuf,
    /// The path in the file system of what is shown at `at`.
    pub(crate) root: PathBuf,
    /// `major:minor`, as `st_dev` has them.
    pub(crate) device: (u32, u32),
    pub(crate) kernel: bool,
}

/// The mounts of this process's mount namespace.
pub(crate) fn mounts() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// Reads mountinfo (`Documentation/filesystems/proc.rst`, 3.5); lines that are none are left out.
fn parse(table: &[u8]) -> Vec<Mount> {
    table
        .split(|b| *b == b'\n')
        .filter_map(|line| {
            let mut words = line.split(|b| *b == b' ');
            let id = std::str::from_utf8(words.next()?).ok()?;
            let device = std::str::from_utf8(words.nth(1)?).ok()?;
            let (major, minor) = device.split_once(':')?;
            let root = words.next()?;
            let at = words.next()?;
            let kind = words.skip_while(|word| *word != b"-").nth(1)?;
            Some(Mount {
                id: id.parse().ok()?,
                at: PathBuf::from(OsString::from_vec(without_octal(at))),
                root: PathBuf::from(OsString::from_vec(without_octal(root))),
                device: (major.parse().ok()?, minor.parse().ok()?),
                kernel: KERNEL_FILE_SYSTEMS.contains(&kind),
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
/// `content_only` what lies in it.
pub(crate) fn pattern_for(path: &Path, content_only: bool) -> OsString {
    let ending = match (content_only, path.as_os_str().as_bytes()) {
        (false, _) => "",
        (true, b"/") => "*",
        (true, _) => "/*",
    };
    pattern_with_ending(path, ending)
}

/// An rsync pattern for the path, followed by what `ending` stands for, itself a pattern.
pub(crate) fn pattern_with_ending(path: &Path, ending: &str) -> OsString {
    let bytes = path.as_os_str().as_bytes();
    // rsync takes a backslash for an escape only in a pattern that has a wildcard in it.
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
    fn mounts_are_read_with_their_odd_names() {
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
        assert!(mounts().unwrap().iter().any(|m| m.at == Path::new("/")));
    }

    #[test]
    fn patterns_match_names_with_wildcards_literally() {
        assert_eq!(pattern_for(Path::new("/a*b"), false), "/a\\*b");
        assert_eq!(pattern_for(Path::new("/a\\b"), false), "/a\\b");
        assert_eq!(pattern_for(Path::new("/a\\b"), true), "/a\\\\b/*");
        assert_eq!(pattern_for(Path::new("/"), true), "/*");
    }
}
