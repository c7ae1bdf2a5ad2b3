//! Makes file trees for tests: one with everything odd that a backup must keep, and ordinary ones
//! of any size.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, chownat, lsetxattr,
    makedev, mknodat, utimensat,
};

use crate::dice::Dice;

/// Fills the folder `root`, which exists, with every kind of file, name and attribute. As root all
/// of them; else those that an ordinary user may make.
pub fn make_odd_tree(root: &Path) -> io::Result<()> {
    let as_root = rustix::process::geteuid().is_root();
    make_names(&root.join("names"))?;
    make_links(&root.join("links"))?;
    make_contents(&root.join("contents"))?;
    make_attributes(&root.join("attributes"), as_root)?;
    make_specials(&root.join("specials"), as_root)?;
    make_folders(&root.join("folders"))?;
    make_times(&root.join("times"))
}

fn make_names(at: &Path) -> io::Result<()> {
    fs::create_dir(at)?;
    let longest = "n".repeat(255);
    let names: [&[u8]; 20] = [
        b"plain",
        b"new\nline",
        b"not utf-8 \xff\xfe",
        b"-leading dash",
        b" space at both ends ",
        b"*",
        b"?[a-z]",
        b"back\\slash",
        b"\\#012",
        b"quote\"'`$(x)",
        b"tab\tescape\x1b[31m",
        "umlaut ü 日本".as_bytes(),
        "decomposed u\u{308}".as_bytes(),
        b"...",
        b".hidden",
        b"colon:name",
        b"host::module",
        b"~",
        b"!",
        longest.as_bytes(),
    ];
    for name in names {
        let name = OsStr::from_bytes(name);
        fs::write(at.join(name), name.as_bytes())?;
    }
    // The same as a folder's name.
    let folder = at.join(OsStr::from_bytes(b"folder\n\xff*"));
    fs::create_dir(&folder)?;
    fs::write(folder.join("-"), "in an odd folder")
}

fn make_links(at: &Path) -> io::Result<()> {
    fs::create_dir_all(at.join("a"))?;
    fs::create_dir_all(at.join("b"))?;
    fs::write(at.join("a/one"), "three names, two folders")?;
    fs::hard_link(at.join("a/one"), at.join("a/two"))?;
    fs::hard_link(at.join("a/one"), at.join("b/three"))?;
    fs::write(at.join("b/alone"), "three names, two folders")?;
    symlink("one", at.join("a/to one"))?;
    symlink("/no/such/place", at.join("dangling"))?;
    symlink("/etc/passwd", at.join("absolute"))?;
    symlink("..", at.join("up"))?;
    symlink("loop", at.join("loop"))?;
    symlink(OsStr::from_bytes(b"odd \xff\ntarget"), at.join("odd"))?;
    symlink("x".repeat(1000), at.join("long"))?;
    fs::hard_link(at.join("dangling"), at.join("b/dangling too"))
}

fn make_contents(at: &Path) -> io::Result<()> {
    fs::create_dir(at)?;
    fs::write(at.join("empty"), "")?;
    let mut dice = Dice::new(1);
    for len in [1, 511, 4095, 4096, 4097, 300_000] {
        fs::write(at.join(format!("{len} bytes")), bytes(&mut dice, len))?;
    }
    fs::write(at.join("zeros"), vec![0; 200_000])?;
    let sparse = |name: &str, pieces: &[(u64, &[u8])], len: u64| -> io::Result<()> {
        let file = File::create(at.join(name))?;
        for (offset, data) in pieces {
            file.write_all_at(data, *offset)?;
        }
        file.set_len(len)
    };
    sparse("hole only", &[], 8 << 20)?;
    sparse("hole first", &[(4 << 20, b"end")], (4 << 20) + 3)?;
    sparse("sparse tail", &[(0, b"begin")], 6 << 20)?;
    sparse(
        "holes between",
        &[(0, b"a"), (1 << 20, b"b"), (3 << 20, b"c")],
        (5 << 20) + 1234,
    )
}

fn make_attributes(at: &Path, as_root: bool) -> io::Result<()> {
    fs::create_dir(at)?;
    for mode in [
        0o000, 0o400, 0o111, 0o644, 0o777, 0o4755, 0o2755, 0o1644, 0o6711,
    ] {
        let path = at.join(format!("mode {mode:o}"));
        fs::write(&path, format!("{mode:o}"))?;
        set_mode(&path, mode)?;
    }
    for mode in [0o700, 0o1777, 0o2775, 0o555, 0o711] {
        let path = at.join(format!("folder {mode:o}"));
        fs::create_dir(&path)?;
        fs::write(path.join("inside"), "x")?;
        set_mode(&path, mode)?;
    }
    let path = at.join("user xattr");
    fs::write(&path, "x")?;
    set_xattr(&path, "user.plain", b"value")?;
    set_xattr(&path, "user.binary \u{fc}", b"\0\x01\xff\n")?;
    set_xattr(&path, "user.empty", b"")?;
    let folder = at.join("folder with xattr");
    fs::create_dir(&folder)?;
    set_xattr(&folder, "user.folder", &[7; 500])?;
    if !as_root {
        return Ok(());
    }
    set_xattr(&path, "trusted.secret", b"only root sees it")?;
    let program = at.join("capable");
    fs::write(&program, "#!/bin/sh\n")?;
    set_xattr(&program, "security.capability", &net_bind_capability())?;
    let link = at.join("link with xattr");
    symlink("capable", &link)?;
    set_xattr(&link, "trusted.link", b"on the link")?;
    for (name, id) in [("owner 1234", 1234), ("owner high", 4_000_000_000)] {
        let path = at.join(name);
        fs::write(&path, "x")?;
        set_owner(&path, id, id + 1)?;
    }
    symlink("x", at.join("owned link"))?;
    set_owner(&at.join("owned link"), 77, 78)?;
    make_acls(at)
}

fn make_acls(at: &Path) -> io::Result<()> {
    let file = at.join("acl file");
    fs::write(&file, "x")?;
    set_xattr(&file, "system.posix_acl_access", &acl(1000, 6))?;
    let folder = at.join("acl folder");
    fs::create_dir(&folder)?;
    set_xattr(&folder, "system.posix_acl_access", &acl(1001, 7))?;
    set_xattr(&folder, "system.posix_acl_default", &acl(1002, 5))?;
    // Made below a default ACL, so it has inherited one.
    fs::write(folder.join("heir"), "x")
}

fn make_specials(at: &Path, as_root: bool) -> io::Result<()> {
    fs::create_dir(at)?;
    let node = |name: &str, kind, mode: u32, device| -> io::Result<()> {
        let mode = Mode::from(mode);
        Ok(mknodat(CWD, at.join(name), kind, mode, device)?)
    };
    node("fifo", FileType::Fifo, 0o640, 0)?;
    fs::hard_link(at.join("fifo"), at.join("fifo's other name"))?;
    node("socket", FileType::Socket, 0o600, 0)?;
    if as_root {
        node("character", FileType::CharacterDevice, 0o666, makedev(1, 3))?;
        node("block", FileType::BlockDevice, 0o660, makedev(7, 1000))?;
        node("whiteout", FileType::CharacterDevice, 0o600, makedev(0, 0))?;
    }
    Ok(())
}

fn make_folders(at: &Path) -> io::Result<()> {
    fs::create_dir_all(at.join("empty"))?;
    fs::create_dir_all(at.join("only/empty/ones"))?;
    let mut deep = at.join("deep");
    for level in 0..40 {
        deep.push(format!("{level:0>30}"));
    }
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("bottom"), "x")?;
    let many = at.join("many");
    fs::create_dir(&many)?;
    for n in 0..500 {
        File::create(many.join(n.to_string()))?;
    }
    Ok(())
}

/// Times last: making something in a folder changes the folder's own.
fn make_times(at: &Path) -> io::Result<()> {
    fs::create_dir(at)?;
    for (name, seconds, nanoseconds) in [
        ("1901", -2_147_483_648, 0),
        ("1969", -1, 999_999_999),
        ("1970", 0, 0),
        ("one ns", 1_000_000_000, 1),
        ("2038", 2_147_483_648, 5),
        ("2100", 4_102_444_800, 123_456_789),
    ] {
        fs::write(at.join(name), name)?;
        set_time(&at.join(name), seconds, nanoseconds)?;
    }
    symlink("1970", at.join("link"))?;
    set_time(&at.join("link"), 12345, 678)?;
    fs::create_dir(at.join("folder"))?;
    set_time(&at.join("folder"), 54321, 987_654_321)?;
    set_time(at, 1_111_111_111, 1)
}

/// Sets the modification time, of a symbolic link itself too.
pub fn set_time(path: &Path, seconds: i64, nanoseconds: i64) -> io::Result<()> {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Sets the twelve mode bits.
pub fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// Sets owner and group, of a symbolic link itself too.
pub fn set_owner(path: &Path, user: u32, group: u32) -> io::Result<()> {
    let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(chownat(CWD, path, Some(user), Some(group), flags)?)
}

/// Sets an extended attribute, of a symbolic link itself too.
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    Ok(lsetxattr(path, name, value, XattrFlags::empty())?)
}

/// An ACL as the kernel keeps it (linux/posix_acl_xattr.h): version 2, then for each entry a tag, a
/// permission and an id. It gives one named user some rights.
#[must_use]
pub fn acl(user: u32, rights: u16) -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    let (owner, named, group, mask, other) = (0x01, 0x02, 0x04, 0x10, 0x20);
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, rights, id) in [
        (owner, 7, NO_ID),
        (named, rights, user),
        (group, 5, NO_ID),
        (mask, 7, NO_ID),
        (other, 0, NO_ID),
    ] {
        bytes.extend(u16::to_le_bytes(tag));
        bytes.extend(u16::to_le_bytes(rights));
        bytes.extend(u32::to_le_bytes(id));
    }
    bytes
}

/// `cap_net_bind_service=ep` (linux/capability.h, revision 2).
fn net_bind_capability() -> Vec<u8> {
    const REVISION_2_EFFECTIVE: u32 = 0x0200_0001;
    const NET_BIND_SERVICE: u32 = 1 << 10;
    [REVISION_2_EFFECTIVE, NET_BIND_SERVICE, 0, 0, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// An ordinary tree, the same for the same numbers.
#[derive(Debug, Clone, Copy)]
pub struct PlainTree {
    /// How many regular files.
    pub files: u64,
    /// How many bytes they have together, about.
    pub bytes: u64,
    /// How many files lie in a folder.
    pub files_per_folder: u64,
    /// What the content is made of.
    pub seed: u64,
}

impl PlainTree {
    /// Makes the tree in the folder `root`, which exists.
    pub fn make(&self, root: &Path) -> io::Result<()> {
        let mut dice = Dice::new(self.seed);
        let mean = (self.bytes / self.files.max(1)).max(1);
        for n in 0..self.files {
            let folder = root.join(self.folder(n));
            fs::create_dir_all(&folder)?;
            // Between nothing and twice the mean.
            let len = usize::try_from(dice.below(2 * mean + 1)).map_err(io::Error::other)?;
            let mut file = File::create(folder.join(format!("file {n}")))?;
            let mut left = len;
            while left > 0 {
                let piece = bytes(&mut dice, left.min(1 << 20));
                file.write_all(&piece)?;
                left -= piece.len();
            }
        }
        Ok(())
    }

    /// The path of the file with number `n` below the root.
    #[must_use]
    pub fn file(&self, n: u64) -> PathBuf {
        self.folder(n).join(format!("file {n}"))
    }

    fn folder(&self, n: u64) -> PathBuf {
        let folder = n / self.files_per_folder.max(1);
        [format!("part {}", folder / 50), format!("folder {folder}")]
            .iter()
            .map(OsString::from)
            .collect()
    }
}

/// Random bytes that don't compress.
#[must_use]
pub fn bytes(dice: &mut Dice, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&dice.any().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}
