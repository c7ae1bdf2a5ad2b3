//! Identifies the file system at a place: by UUID and such, not by where it is mounted.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::mounts::{Mount, holding, mounts};
use crate::paths::{joined, real_path};
use crate::text::{escape_name, escape_path, unescape_path};

/// File systems that report the same `f_fsid` at each mount. Others report a device number, which
/// changes with each start.
const STABLE_FSID: [&str; 6] = ["ext2", "ext3", "ext4", "btrfs", "bcachefs", "zfs"];

/// File systems in memory. Their content is lost when they are unmounted.
const VOLATILE: [&str; 3] = ["tmpfs", "ramfs", "rootfs"];

/// The folder in which udev lists devices by the UUID of their content.
const BY_UUID: &str = "/dev/disk/by-uuid";

/// A file system that a run found at a source, or mounted inside one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FileSystem {
    /// The place: the source's path, or the mount point inside it. Escaped.
    pub place: String,
    /// Its type, as `/proc/self/mountinfo` has it.
    pub kind: String,
    /// The UUID in its super block, as udev or blkid shows it.
    pub uuid: Option<String>,
    /// `f_fsid` of statvfs(3) in hexadecimal. Only for types that report the same one at each mount, and
    /// for tmpfs, where each mount has its own.
    pub fsid: Option<String>,
    /// What was mounted, if it is not a device: a server's share, a dataset, any word. Escaped.
    pub name: Option<String>,
    /// The folder or subvolume of it that is mounted at the place, `/` for all of it. Escaped.
    pub root: String,
    /// Whether it is mounted at the place itself. Otherwise it is mounted above it.
    pub mounted_here: bool,
    /// Whether the snapshot has all of it that the job includes.
    pub full: bool,
}

impl FileSystem {
    /// The file system of `mount`, whose real path `real` the job knows as `place`.
    pub(crate) fn at(mount: &Mount, place: &Path, real: &Path) -> Self {
        let below = real.strip_prefix(&mount.at).unwrap_or(Path::new(""));
        let fsid = (mount.kind == "tmpfs" || STABLE_FSID.contains(&&*mount.kind))
            .then(|| rustix::fs::statvfs(&mount.at).ok())
            .flatten()
            .map(|about| about.f_fsid)
            .filter(|fsid| *fsid != 0)
            .map(|fsid| format!("{fsid:016x}"));
        let is_device = mount.source.as_bytes().starts_with(b"/dev/");
        let uuid = is_device
            .then(|| uuid_of(mount).or_else(|| probe(mount).filter(|_| fsid.is_none())))
            .flatten();
        Self {
            place: escape_path(place),
            kind: mount.kind.clone(),
            uuid,
            fsid,
            name: (!is_device).then(|| escape_name(mount.source.as_bytes())),
            root: escape_path(&joined(&mount.root, below)),
            mounted_here: real == mount.at,
            full: false,
        }
    }

    /// The file system that holds `path` on this machine. The last parts of `path` need not exist.
    /// `None` if the table of mounts can't be read.
    #[must_use]
    pub fn holding(path: &Path) -> Option<Self> {
        let table = mounts().ok()?;
        let real = real_path(path);
        let mount = holding(&table, &real)?;
        Some(Self::at(mount, path, &real))
    }

    /// Whether it, or a part of it, is mounted at any path. True also where too little is known to
    /// say so.
    #[must_use]
    pub fn is_mounted(&self) -> bool {
        let Ok(table) = mounts() else { return true };
        let alike = |mount: &&Mount| family(&mount.kind) == family(&self.kind);
        let is_this = |mount: &Mount| {
            let found = Self {
                root: self.root.clone(),
                ..Self::at(mount, &mount.at, &mount.at)
            };
            self.is_same(&found) != Some(false)
        };
        self.is_unknown() || table.iter().filter(alike).any(is_this)
    }

    /// Whether it is mounted, and with it the folder of it that was at the place. False also where too
    /// little is known to say so.
    pub(crate) fn is_reachable(&self) -> bool {
        let root = unescape_path(&self.root);
        let holds = |mount: &&Mount| {
            family(&mount.kind) == family(&self.kind) && root.starts_with(&mount.root)
        };
        let is_this = |mount: &Mount| {
            let found = Self {
                root: self.root.clone(),
                ..Self::at(mount, &mount.at, &mount.at)
            };
            self.is_same(&found) == Some(true)
        };
        mounts().is_ok_and(|table| table.iter().filter(holds).any(is_this))
    }

    /// What names it at any place: its UUID or `f_fsid`. Empty: it has neither.
    pub(crate) fn identity(&self) -> &str {
        let uuid = self.uuid.as_deref().or(self.fsid.as_deref());
        uuid.unwrap_or_default()
    }

    /// A file system of which only the place is known, as in an older record.
    pub(crate) fn unknown_at(place: &str) -> Self {
        Self {
            place: place.to_owned(),
            ..Self::default()
        }
    }

    /// Whether nothing but its place is known.
    pub(crate) fn is_unknown(&self) -> bool {
        self.kind.is_empty()
    }

    fn is_volatile(&self) -> bool {
        VOLATILE.contains(&&*self.kind)
    }

    /// Whether both are the same part of the same file system, wherever it is mounted. `None` if too
    /// little is known.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> Option<bool> {
        if self.is_unknown() || other.is_unknown() {
            return None;
        }
        let equal =
            |one: &Option<String>, other: &Option<String>| Some(one.as_ref()? == other.as_ref()?);
        let same_uuid = equal(&self.uuid, &other.uuid);
        if self.root != other.root {
            // A system that boots from another snapshot of its root is still on the same disk.
            let system = self.place == "/" && other.place == "/" && self.kind == "btrfs";
            return Some(system && same_uuid == Some(true));
        }
        same_uuid
            .or_else(|| equal(&self.fsid, &other.fsid))
            .or_else(|| equal(&self.name, &other.name))
            .or_else(|| (family(&self.kind) != family(&other.kind)).then_some(false))
    }

    /// Whether `other`, at the same place, replaces this one without a loss: it is the same file system,
    /// or nothing shows a difference. A file system in memory never comes back, so a later one counts as
    /// the same.
    pub(crate) fn is_continued_by(&self, other: &Self) -> bool {
        (self.is_volatile() && other.is_volatile()) || self.is_same(other) != Some(false)
    }

    /// Its type and its name, as text for people.
    #[must_use]
    pub fn text(&self) -> String {
        let kind = if self.is_unknown() {
            "file system"
        } else {
            &self.kind
        };
        let name = self
            .uuid
            .as_ref()
            .or(self.name.as_ref())
            .or(self.fsid.as_ref());
        name.map_or_else(|| kind.to_owned(), |name| format!("{kind} {name}"))
    }
}

/// The common name of types that differ only by how they were mounted.
fn family(kind: &str) -> &str {
    match kind {
        "ext2" | "ext3" | "ext4" => "ext",
        "nfs" | "nfs4" => "nfs",
        "cifs" | "smb3" => "smb",
        "ntfs" | "ntfs3" | "fuseblk" => "ntfs",
        "vfat" | "msdos" => "fat",
        other => other,
    }
}

/// The UUID that udev lists for the device.
fn uuid_of(mount: &Mount) -> Option<String> {
    // btrfs reports a device number of its own, not that of its device.
    let devices = [
        Some(makedev(mount.device)),
        std::fs::metadata(&mount.source).ok().map(|m| m.rdev()),
    ];
    let entries = std::fs::read_dir(BY_UUID).ok()?;
    let of_device = |entry: &std::fs::DirEntry| {
        std::fs::metadata(entry.path()).is_ok_and(|device| devices.contains(&Some(device.rdev())))
    };
    let entry = entries.flatten().find(of_device)?;
    Some(escape_name(entry.file_name().as_bytes()))
}

/// The UUID in the super block, read by blkid, for a machine without udev.
fn probe(mount: &Mount) -> Option<String> {
    let blkid = ["/usr/sbin/blkid", "/sbin/blkid"]
        .into_iter()
        .find(|path| Path::new(path).exists())?;
    let output = Command::new(blkid)
        .args(["-p", "-s", "UUID", "-o", "value", "--"])
        .arg(&mount.source)
        .env_clear()
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let text = output.stdout.trim_ascii();
    (output.status.success() && !text.is_empty()).then(|| escape_name(text))
}

fn makedev((major, minor): (u32, u32)) -> u64 {
    rustix::fs::makedev(major, minor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(uuid: Option<&str>, fsid: Option<&str>, root: &str) -> FileSystem {
        FileSystem {
            place: "/p".into(),
            kind: "ext4".into(),
            uuid: uuid.map(Into::into),
            fsid: fsid.map(Into::into),
            name: None,
            root: root.into(),
            mounted_here: true,
            full: true,
        }
    }

    #[test]
    fn disks_are_compared_by_what_both_records_have() {
        let one = disk(Some("u1"), Some("f1"), "/");
        for (other, same) in [
            (disk(Some("u1"), None, "/"), Some(true)),
            (disk(Some("u2"), Some("f1"), "/"), Some(false)),
            (disk(None, Some("f1"), "/"), Some(true)),
            (disk(None, Some("f2"), "/"), Some(false)),
            (disk(None, None, "/"), None),
            (disk(Some("u1"), None, "/sub"), Some(false)),
            (FileSystem::unknown_at("/p"), None),
        ] {
            assert_eq!(one.is_same(&other), same, "{other:?}");
        }
        let xfs = FileSystem {
            kind: "xfs".into(),
            ..disk(None, None, "/")
        };
        assert_eq!(one.is_same(&xfs), Some(false));
    }

    #[test]
    fn a_later_memory_file_system_replaces_an_earlier_one() {
        let memory = |fsid| FileSystem {
            kind: "tmpfs".into(),
            ..disk(None, Some(fsid), "/")
        };
        assert_eq!(memory("1").is_same(&memory("2")), Some(false));
        assert!(memory("1").is_continued_by(&memory("2")));
        assert!(!memory("1").is_continued_by(&disk(None, Some("3"), "/")));
    }
}
