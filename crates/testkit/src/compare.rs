//! Compares two file trees in everything that a backup must keep.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{lgetxattr, llistxattr};

/// More differences than this are not listed.
const DIFFERENCES_MAX: usize = 50;
/// How much more room a copy of a sparse file may take: a file system's own rounding.
const SPARSE_SLACK_BYTES: u64 = 128 << 10;

/// Lists how `b` differs from `a`: names, types, modes, owners, sizes, times to the nanosecond,
/// contents, extended attributes and ACLs, device numbers, link targets, which names are the same
/// file, and whether holes stayed holes. Both roots count too, but not what they are called.
pub fn differences(a: &Path, b: &Path) -> io::Result<Vec<String>> {
    let mut comparison = Comparison {
        a_root: a,
        b_root: b,
        a_first: HashMap::new(),
        b_first: HashMap::new(),
        found: Vec::new(),
    };
    let mut todo = vec![PathBuf::new()];
    while let Some(path) = todo.pop() {
        if comparison.found.len() >= DIFFERENCES_MAX {
            comparison.found.push("… and maybe more".to_owned());
            break;
        }
        comparison.compare(&path, &mut todo)?;
    }
    Ok(comparison.found)
}

/// Panics with the differences of two trees, if there are any.
///
/// # Panics
/// If the trees differ or can't be read.
pub fn assert_same(a: &Path, b: &Path) {
    match differences(a, b) {
        Ok(found) if found.is_empty() => {}
        Ok(found) => panic!(
            "{} and {} differ:\n{}",
            a.display(),
            b.display(),
            found.join("\n")
        ),
        Err(e) => panic!("{} and {} can't be compared: {e}", a.display(), b.display()),
    }
}

struct Comparison<'a> {
    a_root: &'a Path,
    b_root: &'a Path,
    /// The first name under which each file with several names was met.
    a_first: HashMap<(u64, u64), PathBuf>,
    b_first: HashMap<(u64, u64), PathBuf>,
    found: Vec<String>,
}

impl Comparison<'_> {
    fn compare(&mut self, path: &Path, todo: &mut Vec<PathBuf>) -> io::Result<()> {
        let a_path = trimmed(&self.a_root.join(path));
        let b_path = trimmed(&self.b_root.join(path));
        let a = fs::symlink_metadata(&a_path)?;
        let b = fs::symlink_metadata(&b_path)?;
        self.same(path, "type", a.mode() >> 12, b.mode() >> 12);
        if a.mode() >> 12 != b.mode() >> 12 {
            return Ok(());
        }
        self.same(
            path,
            "mode",
            format!("{:o}", a.mode()),
            format!("{:o}", b.mode()),
        );
        self.same(path, "owner", (a.uid(), a.gid()), (b.uid(), b.gid()));
        self.same(
            path,
            "time",
            (a.mtime(), a.mtime_nsec()),
            (b.mtime(), b.mtime_nsec()),
        );
        let attributes = (xattrs(&a_path)?, xattrs(&b_path)?);
        self.same(path, "attributes", attributes.0, attributes.1);
        let kind = a.file_type();
        if kind.is_block_device() || kind.is_char_device() {
            self.same(path, "device", a.rdev(), b.rdev());
        }
        if kind.is_symlink() {
            let targets = (fs::read_link(&a_path)?, fs::read_link(&b_path)?);
            self.same(path, "target", targets.0, targets.1);
        }
        if kind.is_dir() {
            return self.compare_names(path, todo);
        }
        self.compare_links(path, &a, &b);
        if kind.is_file() {
            self.same(path, "size", a.len(), b.len());
            if a.len() == b.len() && !same_content(&a_path, &b_path)? {
                self.found.push(format!("{}: content", path.display()));
            }
            let (a_used, b_used) = (a.blocks() * 512, b.blocks() * 512);
            if b_used > a_used + SPARSE_SLACK_BYTES {
                self.found.push(format!(
                    "{}: takes {b_used} bytes instead of {a_used}",
                    path.display()
                ));
            }
        }
        Ok(())
    }

    #[expect(clippy::needless_pass_by_value, reason = "fresh values at every call")]
    fn same<T: PartialEq + std::fmt::Debug>(&mut self, path: &Path, what: &str, a: T, b: T) {
        if a != b {
            self.found
                .push(format!("{}: {what}: {a:?} became {b:?}", path.display()));
        }
    }

    fn compare_names(&mut self, path: &Path, todo: &mut Vec<PathBuf>) -> io::Result<()> {
        let a = names(&self.a_root.join(path))?;
        let b = names(&self.b_root.join(path))?;
        for name in &a {
            if b.binary_search(name).is_ok() {
                todo.push(path.join(name));
            } else {
                self.found.push(format!("{:?} is missing", path.join(name)));
            }
        }
        for name in b.iter().filter(|name| a.binary_search(name).is_err()) {
            self.found
                .push(format!("{:?} is there too much", path.join(name)));
        }
        Ok(())
    }

    /// Two names are one file in `b` exactly if they are one in `a`.
    fn compare_links(&mut self, path: &Path, a: &Metadata, b: &Metadata) {
        let first = |map: &mut HashMap<(u64, u64), PathBuf>, file: &Metadata| {
            map.entry((file.dev(), file.ino()))
                .or_insert_with(|| path.to_owned())
                .clone()
        };
        let a_first = first(&mut self.a_first, a);
        let b_first = first(&mut self.b_first, b);
        self.same(path, "same file as", a_first, b_first);
    }
}

/// `join` of an empty path leaves a slash behind, which would follow a symbolic link.
fn trimmed(path: &Path) -> PathBuf {
    path.components().collect()
}

fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    let mut names = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Extended attributes, ACLs among them. Not SELinux's labels, which the machine's policy sets.
fn xattrs(path: &Path) -> io::Result<Vec<(OsString, Vec<u8>)>> {
    let mut list = vec![0; 64 << 10];
    let used = match llistxattr(path, &mut list[..]) {
        Ok(used) => used,
        Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    let mut attributes = Vec::new();
    for name in list[..used].split(|b| *b == 0).filter(|n| !n.is_empty()) {
        if name == b"security.selinux" {
            continue;
        }
        let name = OsString::from(std::ffi::OsStr::from_bytes(name));
        let mut value = vec![0; 64 << 10];
        let len = lgetxattr(path, &name, &mut value[..])?;
        value.truncate(len);
        attributes.push((name, value));
    }
    attributes.sort();
    Ok(attributes)
}

fn same_content(a: &Path, b: &Path) -> io::Result<bool> {
    let (mut a, mut b) = (File::open(a)?, File::open(b)?);
    let (mut a_piece, mut b_piece) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let a_len = fill(&mut a, &mut a_piece)?;
        let b_len = fill(&mut b, &mut b_piece)?;
        if a_piece[..a_len] != b_piece[..b_len] {
            return Ok(false);
        }
        if a_len == 0 {
            return Ok(true);
        }
    }
}

fn fill(file: &mut File, piece: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < piece.len() {
        match file.read(&mut piece[len..])? {
            0 => break,
            more => len += more,
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{make_odd_tree, set_mode, set_time, set_xattr};

    /// Each single change to a tree is found.
    #[test]
    fn every_kind_of_difference_is_found() {
        type Change = fn(&Path) -> io::Result<()>;
        let changes: [(&str, Change); 9] = [
            ("mode", |t| set_mode(&t.join("attributes/mode 644"), 0o640)),
            ("time", |t| {
                set_time(&t.join("times/one ns"), 1_000_000_000, 2)
            }),
            ("content", |t| {
                let path = t.join("contents/4096 bytes");
                let mut bytes = fs::read(&path)?;
                bytes[4095] ^= 1;
                fs::write(&path, bytes)
            }),
            ("attributes", |t| {
                set_xattr(&t.join("attributes/user xattr"), "user.plain", b"other")
            }),
            ("missing", |t| fs::remove_file(t.join("names/plain"))),
            ("too much", |t| fs::write(t.join("names/more"), "")),
            ("same file", |t| {
                fs::remove_file(t.join("links/a/two"))?;
                fs::write(t.join("links/a/two"), "three names, two folders")
            }),
            ("takes", |t| {
                fs::write(t.join("contents/hole only"), vec![0; 8 << 20])
            }),
            ("type", |t| {
                fs::remove_file(t.join("links/up"))?;
                fs::write(t.join("links/up"), "")
            }),
        ];
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        fs::create_dir(&a).unwrap();
        make_odd_tree(&a).unwrap();
        for (what, change) in changes {
            let copied = std::process::Command::new("cp")
                .args(["-a", "--sparse=always"])
                .args([&a, &b])
                .status()
                .unwrap();
            assert!(copied.success());
            assert_same(&a, &b);
            change(&b).unwrap();
            let found = differences(&a, &b).unwrap();
            assert!(found.iter().any(|f| f.contains(what)), "{what}: {found:?}");
            fs::remove_dir_all(&b).unwrap();
        }
    }
}
