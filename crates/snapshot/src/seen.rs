//! One file or folder of a snapshot, and how it differs from the same path of another one.

use std::io;
use std::path::Path;

use jiff::Timestamp;
use rustix::fs::{FileType, Stat, major, minor};
use serde::{Deserialize, Serialize};

use crate::text::escape_path;
use crate::tree::TreeFolder;

/// The kind of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Kind {
    File,
    Folder,
    Link,
    BlockDevice,
    CharacterDevice,
    Fifo,
    Socket,
}

/// Attributes of an object, as a snapshot has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// What it is.
    pub kind: Kind,
    /// The size of a file; 0 for all else.
    pub bytes: u64,
    /// The twelve mode bits. In JSON as octal text: `"0644"`.
    #[serde(with = "octal")]
    pub mode: u32,
    /// The number of the owner.
    pub user: u32,
    /// The number of the group.
    pub group: u32,
    /// When its content was changed last.
    pub modified: Timestamp,
    /// What a symbolic link holds, escaped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<String>,
    /// The numbers of a device: `1:3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
}

impl Found {
    /// How `after` differs from this one. `None`: at most in extended attributes.
    #[must_use]
    pub fn change(&self, after: &Self) -> Option<Change> {
        let (old, new) = (self, after);
        if old.kind != new.kind {
            return Some(Change::Kind);
        }
        let is_same_content = match old.kind {
            Kind::File => (old.bytes, old.modified) == (new.bytes, new.modified),
            _ => (&old.link, &old.device) == (&new.link, &new.device),
        };
        if !is_same_content {
            return Some(Change::Content);
        }
        // The time of a folder follows the names in it, which are compared themselves.
        let is_same_time = old.kind == Kind::Folder || old.modified == new.modified;
        let is_same =
            is_same_time && (old.mode, old.user, old.group) == (new.mode, new.user, new.group);
        (!is_same).then_some(Change::Attributes)
    }
}

/// How a path of one snapshot differs from the same path of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The older one does not have it.
    New,
    /// The newer one does not have it.
    Gone,
    /// Its content was changed: size or time of a file, target of a link, numbers of a device.
    Content,
    /// Owner, mode, ACLs or other attributes were changed, and the content was not.
    Attributes,
    /// It is of another kind: a folder where a file was.
    Kind,
}

/// An object, and the file that it is on the volume.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Its attributes.
    pub found: Found,
    device: u64,
    /// The number of its inode.
    pub inode: u64,
    changed: (i64, i64),
}

impl Seen {
    /// Examines `name` of a folder. `None`: nothing has that name.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn of(folder: &TreeFolder, name: &Path) -> io::Result<Option<Self>> {
        let Some(stat) = folder.stat(name)? else {
            return Ok(None);
        };
        let kind = kind(&stat);
        let link = match kind {
            Kind::Link => match folder.link(name) {
                Ok(target) => Some(escape_path(&target)),
                // The files of a machine may go at any moment.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            },
            _ => None,
        };
        let is_device = matches!(kind, Kind::BlockDevice | Kind::CharacterDevice);
        let found = Found {
            kind,
            bytes: match kind {
                Kind::File => u64::try_from(stat.st_size).unwrap_or(0),
                _ => 0,
            },
            mode: stat.st_mode & 0o7777,
            user: stat.st_uid,
            group: stat.st_gid,
            modified: moment(&stat),
            link,
            device: is_device.then(|| format!("{}:{}", major(stat.st_rdev), minor(stat.st_rdev))),
        };
        Ok(Some(Self {
            found,
            device: stat.st_dev,
            inode: stat.st_ino,
            changed: (stat.st_ctime, nanoseconds(stat.st_ctime_nsec)),
        }))
    }

    /// What is the same in all snapshots that share this file, and changes with it: see
    /// [`Self::is_one_with`].
    pub(crate) fn version(&self) -> (u64, i64, i64) {
        (self.inode, self.changed.0, self.changed.1)
    }

    /// Whether both are one file. Two snapshots of a btrfs volume are two file systems for `stat`, and an
    /// unchanged file has the same number and the same time of its last change in both.
    fn is_one_with(&self, other: &Self) -> bool {
        if self.found.kind == Kind::Folder || self.inode != other.inode {
            return false;
        }
        self.device == other.device || (self.changed == other.changed && self.found == other.found)
    }

    /// How `after` differs from this one. `None`: not at all. Where nothing else differs, `has_equal_xattrs`
    /// is asked.
    ///
    /// # Errors
    /// `has_equal_xattrs` failed.
    pub fn change(
        &self,
        after: &Self,
        has_equal_xattrs: impl FnOnce() -> io::Result<bool>,
    ) -> io::Result<Option<Change>> {
        if self.is_one_with(after) {
            return Ok(None);
        }
        Ok(match self.found.change(&after.found) {
            None => (!has_equal_xattrs()?).then_some(Change::Attributes),
            change => change,
        })
    }
}

fn kind(stat: &Stat) -> Kind {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Folder,
        FileType::Symlink => Kind::Link,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::CharacterDevice => Kind::CharacterDevice,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::RegularFile | FileType::Unknown => Kind::File,
    }
}

/// A damaged or hostile inode may have any number there.
fn nanoseconds(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(0)
}

fn moment(stat: &Stat) -> Timestamp {
    let nanoseconds = i32::try_from(nanoseconds(stat.st_mtime_nsec)).unwrap_or(0);
    Timestamp::new(stat.st_mtime, nanoseconds).unwrap_or(match stat.st_mtime < 0 {
        true => Timestamp::MIN,
        false => Timestamp::MAX,
    })
}

/// serde: mode bits as octal text.
mod octal {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(mode: &u32, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{mode:04o}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
        let text = String::deserialize(from)?;
        u32::from_str_radix(&text, 8).map_err(serde::de::Error::custom)
    }
}
