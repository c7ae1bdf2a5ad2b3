//! A list of everything in a tree: two equal manifests mean a perfect copy.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// One entry of a tree, without what no copy can have: change and access times, inode numbers, and
/// the sizes and link counts of folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
    modified: (i64, i64),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode, where the tree has several.
    same_as: Option<PathBuf>,
    /// Takes less than half of its length on the disk.
    sparse: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Folder,
    File { len: u64, sha256: [u8; 32] },
    Link { to: OsString },
    Device { number: u64, block: bool },
    Fifo,
    Socket,
}

/// All entries of a tree by their path in it; the root's own is the empty path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest(BTreeMap<PathBuf, Entry>);

impl Manifest {
    /// Reads the whole tree.
    ///
    /// # Panics
    /// When a part of it can't be read.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        let mut found = BTreeMap::new();
        let mut first_paths = HashMap::new();
        let mut waiting = vec![PathBuf::new()];
        // Depth first in a fixed order, so that "the first path" is the same in every copy.
        while let Some(path) = waiting.pop() {
            let full = if path.as_os_str().is_empty() {
                root.to_owned()
            } else {
                root.join(&path)
            };
            let meta = fs::symlink_metadata(&full)
                .unwrap_or_else(|error| panic!("{}: {error}", full.display()));
            let mut entry = Entry::of(&full, &meta);
            if meta.is_dir() {
                let children = fs::read_dir(&full).expect("a folder can be listed");
                let mut children: Vec<_> = children
                    .map(|child| path.join(child.expect("a folder can be listed").file_name()))
                    .collect();
                children.sort_by(|one, other| other.cmp(one));
                waiting.extend(children);
            } else if meta.nlink() > 1 {
                let inode = (meta.dev(), meta.ino());
                let first: &PathBuf = first_paths.entry(inode).or_insert_with(|| path.clone());
                entry.same_as = (*first != path).then(|| first.clone());
            }
            found.insert(path, entry);
        }
        Self(found)
    }

    /// How many entries the tree has, with its root.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "the root is always there")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// How many regular files it has, and their bytes.
    #[must_use]
    pub fn files(&self) -> (usize, u64) {
        let lens = self.0.values().filter_map(|entry| match entry.kind {
            Kind::File { len, .. } => Some(len),
            _ => None,
        });
        lens.fold((0, 0), |(files, bytes), len| (files + 1, bytes + len))
    }

    /// How many entries have xattrs, are further names of one inode, are sparse.
    #[must_use]
    pub fn specials(&self) -> (usize, usize, usize) {
        let count = |is: fn(&Entry) -> bool| self.0.values().filter(|entry| is(entry)).count();
        (
            count(|entry| !entry.xattrs.is_empty()),
            count(|entry| entry.same_as.is_some()),
            count(|entry| entry.sparse),
        )
    }

    /// The files that rsync would take for those of `source`, because size and time are equal, and whose content
    /// is another one.
    #[must_use]
    pub fn mistaken_for(&self, source: &Self) -> Vec<&Path> {
        let is_mistaken = |path: &Path, found: &Entry| {
            let (Some(wanted), Kind::File { len, sha256 }) = (source.0.get(path), &found.kind)
            else {
                return false;
            };
            let same = matches!(&wanted.kind, Kind::File { len: of, sha256: other }
                if of == len && other != sha256);
            same && wanted.modified == found.modified
        };
        let files = self
            .0
            .iter()
            .filter(|(path, found)| is_mistaken(path, found));
        files.map(|(path, _)| path.as_path()).collect()
    }

    /// The differences, one line each, at most twenty; empty if the trees are equal.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut lines = Vec::new();
        for (path, entry) in &self.0 {
            match other.0.get(path) {
                None => lines.push(format!("{}: missing", path.display())),
                Some(found) if found != entry => {
                    lines.push(format!(
                        "{}: {found:?}\n    should be {entry:?}",
                        path.display()
                    ));
                }
                Some(_) => {}
            }
        }
        for path in other.0.keys().filter(|path| !self.0.contains_key(*path)) {
            lines.push(format!("{}: should not be there", path.display()));
        }
        lines.truncate(20);
        lines
    }
}

/// Checks that `tree` is as it should be.
///
/// # Panics
/// With the differences, if there are any.
#[track_caller]
pub fn assert_same(should: &Manifest, tree: &Path, what: &str) {
    let differences = should.differences(&Manifest::of(tree));
    assert!(
        differences.is_empty(),
        "{what}:\n  {}",
        differences.join("\n  ")
    );
}

impl Entry {
    fn of(path: &Path, meta: &fs::Metadata) -> Self {
        let kind = match meta.file_type() {
            kind if kind.is_dir() => Kind::Folder,
            kind if kind.is_file() => Kind::File {
                len: meta.len(),
                sha256: sha256(path),
            },
            kind if kind.is_symlink() => Kind::Link {
                to: fs::read_link(path)
                    .expect("a link can be read")
                    .into_os_string(),
            },
            kind if kind.is_fifo() => Kind::Fifo,
            kind if kind.is_socket() => Kind::Socket,
            kind => Kind::Device {
                number: meta.rdev(),
                block: kind.is_block_device(),
            },
        };
        Self {
            sparse: meta.is_file() && meta.len() > 1 << 20 && meta.blocks() * 512 < meta.len() / 2,
            kind,
            mode: meta.mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            xattrs: xattrs(path),
            same_as: None,
        }
    }
}

fn sha256(path: &Path) -> [u8; 32] {
    let mut file =
        fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut hash = openssl::sha::Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let got = file
            .read(&mut buffer)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if got == 0 {
            return hash.finish();
        }
        hash.update(&buffer[..got]);
    }
}

/// All extended attributes, POSIX ACLs among them.
fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let mut found = BTreeMap::new();
    for name in names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
    {
        let mut value = vec![0; 65_536];
        let len = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(name), &mut value)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        value.truncate(len);
        found.insert(name.to_vec(), value);
    }
    found
}

#[cfg(test)]
mod tests;
