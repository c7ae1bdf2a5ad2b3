//! A snapshot's files, opened for reading: folders, attributes and content by path.
//!
//! A path is one of the source, and starts at the top of the snapshot. No symbolic link in a snapshot is
//! followed: it could lead out of the volume, to the files of this machine.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, OFlags, Stat, fstat, lgetxattr, llistxattr, readlinkat, statat,
};
use rustix::io::Errno;

use crate::choice::SnapshotChoice;
use crate::chosen;
use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder, LIST_SUFFIX, STATE_FOLDER};
use crate::long_path::{open_at, open_regular_at};
use crate::name::{JobName, SnapshotName};
use crate::paths::plain_path;
use crate::record::EntryKind;
pub use crate::scout::KnownInodes;
use crate::scout::Scout;
use crate::text::{escape_path, unescape_path};
use crate::walk::{
    Listed, XATTR_BYTES_MAX, is_folder, listed, open_folder_at, open_folder_below, path_through,
};

/// Why a path is refused that leads through a symbolic link.
pub const THROUGH_A_LINK: &str = "leads through a symbolic link in the snapshot; use the real path";

/// The files of one snapshot.
#[derive(Debug, Clone)]
pub struct Tree {
    /// The job, escaped.
    pub job: String,
    /// The snapshot's folder, escaped.
    pub folder: String,
    volume: PathBuf,
    /// Its folder.
    path: PathBuf,
}

/// One folder of a snapshot.
#[derive(Debug)]
pub struct TreeFolder {
    fd: OwnedFd,
}

/// See [`Tree::ahead`].
#[derive(Debug)]
pub struct Ahead {
    scout: Scout,
}

impl Tree {
    /// Finds the snapshot that `choice` means, as a restore does. The volume is mounted at `volume_root`.
    ///
    /// # Errors
    /// There is no such job or snapshot, or the volume can't be read.
    pub fn find(
        volume_root: &Path,
        job: &JobName,
        choice: &SnapshotChoice,
    ) -> Result<Self, SnapshotError> {
        let (folder, found) = chosen::choose(volume_root, job, choice)?;
        Ok(Self {
            job: job.as_str().to_owned(),
            folder: found.folder_text(),
            volume: volume_root.to_owned(),
            path: folder.path.join(&found.folder),
        })
    }

    /// All finished snapshots of a job, oldest first. No record is read.
    ///
    /// # Errors
    /// There is no such job, or the volume can't be read.
    pub fn finished(volume_root: &Path, job: &JobName) -> Result<Vec<Self>, SnapshotError> {
        let folder = JobFolder::open(volume_root, Path::new(job.as_str()))?;
        let named = folder.own_folders()?.into_iter();
        Ok(named
            .filter(|own| matches!(own, Folder::Named(_)))
            .map(|own| Self {
                job: job.as_str().to_owned(),
                folder: own.to_string(),
                volume: volume_root.to_owned(),
                path: folder.path.join(own.to_string()),
            })
            .collect())
    }

    /// A tree of a job that sprat makes or has made.
    pub(crate) fn of_job(volume_root: &Path, job: &JobFolder, folder: Folder) -> Self {
        Self {
            job: job.job.clone(),
            folder: folder.to_string(),
            volume: volume_root.to_owned(),
            path: job.path.join(folder.to_string()),
        }
    }

    /// What it is. Reads its record.
    #[must_use]
    pub fn kind(&self) -> EntryKind {
        let job = JobFolder::open(&self.volume, Path::new(&self.job));
        match (job, Folder::parse(&self.folder)) {
            (Ok(job), Some(own)) => job.kind(own).0,
            _ => EntryKind::Adopted,
        }
    }

    /// The finished snapshot of the job that comes before this one by its name.
    ///
    /// # Errors
    /// As [`Self::finished`].
    pub fn before(&self) -> Result<Option<Self>, SnapshotError> {
        let (Ok(job), Ok(name)) = (JobName::new(&self.job), SnapshotName::parse(&self.folder))
        else {
            return Ok(None);
        };
        let finished = Self::finished(&self.volume, &job)?;
        let is_before = |tree: &Self| SnapshotName::parse(&tree.folder).is_ok_and(|n| n < name);
        Ok(finished.into_iter().rfind(is_before))
    }

    /// Opens a folder. `None`: there is no folder of that path in the snapshot.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn folder(&self, path: &Path) -> Result<Option<TreeFolder>, SnapshotError> {
        if has_parent_step(path) {
            return Ok(None);
        }
        let top = open_folder_at(&self.path).map_err(|error| self.failed("open", path, error))?;
        let below: PathBuf = steps(path).collect();
        match open_folder_below(top.as_fd(), &below) {
            Ok(fd) => Ok(Some(TreeFolder { fd })),
            Err(error) if is_absence(&error) => Ok(None),
            Err(error) => Err(self.failed("open", path, error)),
        }
    }

    /// The attributes of what lies beside the snapshot and goes with it: its record.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn beside(&self) -> Result<Vec<Stat>, SnapshotError> {
        let path = Path::new(STATE_FOLDER);
        let failed = |error| self.failed("list", path, error);
        let Some(job) = self.path.parent() else {
            return Ok(Vec::new());
        };
        let state = TreeFolder::of_machine(&job.join(path)).map_err(failed)?;
        let Some(state) = state else {
            return Ok(Vec::new());
        };
        let begin = format!("{}.", self.folder);
        let mut found = Vec::new();
        for entry in state.entries().map_err(failed)? {
            let is_its = entry
                .name
                .to_str()
                // The list of changes stays.
                .is_some_and(|name| name.starts_with(&begin) && !name.ends_with(LIST_SUFFIX));
            if is_its && let Some(stat) = state.stat(&entry.name).map_err(failed)? {
                found.push(stat);
            }
        }
        Ok(found)
    }

    /// Where the snapshot is: the inode of its job's folder, and its name there.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn place_in_volume(&self) -> io::Result<(u64, OsString)> {
        let (Some(job), Some(name)) = (self.path.parent(), self.path.file_name()) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        Ok((fstat(open_folder_at(job)?)?.st_ino, name.to_owned()))
    }

    /// Lists all folders ahead of a caller that lists them, too, as long as the answer lives. `None`: that
    /// can't be done, and the caller waits longer for a slow connection.
    #[must_use]
    pub fn ahead(&self) -> Option<Ahead> {
        self.ahead_of(Path::new("/"), None)
    }

    /// As [`Self::ahead`], without the inodes of files that are `known`.
    #[must_use]
    pub fn ahead_without(&self, known: Option<KnownInodes>) -> Option<Ahead> {
        self.ahead_of(Path::new("/"), known)
    }

    /// As [`Self::ahead`], of all folders at and below `path`.
    #[must_use]
    pub fn ahead_below(&self, path: &Path) -> Option<Ahead> {
        self.ahead_of(path, None)
    }

    fn ahead_of(&self, path: &Path, known: Option<KnownInodes>) -> Option<Ahead> {
        if has_parent_step(path) {
            return None;
        }
        let (folder, name) = (self.path.parent()?, self.path.file_name()?);
        let root = open_folder_at(folder).ok()?;
        let top = [Path::new(name)].into_iter().chain(steps(path)).collect();
        Some(Ahead {
            scout: Scout::begin_without(root, vec![top], None, known),
        })
    }

    /// The attributes of what has this path. `None`: nothing has.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn stat(&self, path: &Path) -> Result<Option<Stat>, SnapshotError> {
        let Some((folder, name)) = self.place(path)? else {
            return Ok(None);
        };
        let stat = folder.stat(&name);
        stat.map_err(|error| self.failed("examine", path, error))
    }

    /// The folder that a path is in, and the last part of the path: `.` for the top of the snapshot. `None`:
    /// there is no such folder.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn place(&self, path: &Path) -> Result<Option<(TreeFolder, PathBuf)>, SnapshotError> {
        if has_parent_step(path) {
            return Ok(None);
        }
        let mut parents: Vec<&Path> = steps(path).collect();
        let name = parents.pop().unwrap_or(Path::new(".")).to_owned();
        let parent: PathBuf = parents.into_iter().collect();
        Ok(self.folder(&parent)?.map(|folder| (folder, name)))
    }

    /// Why a path can't be used: nothing has it, it has `..` in it, or it leads through a symbolic link.
    #[must_use]
    pub fn no_such(&self, path: &Path) -> SnapshotError {
        if let Err(why) = plain_path(path) {
            return SnapshotError::PathRefused {
                path: escape_path(path),
                why,
            };
        }
        let link = path.ancestors().skip(1).find(|above| {
            let stat = self.stat(above).ok().flatten();
            stat.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
        });
        match link {
            Some(_) => SnapshotError::PathRefused {
                path: escape_path(path),
                why: THROUGH_A_LINK,
            },
            None => SnapshotError::NoSuchPath {
                snapshot: self.folder.clone(),
                path: escape_path(path),
            },
        }
    }

    /// The failure to read something of this snapshot.
    pub fn failed(&self, op: &'static str, path: &Path, source: io::Error) -> SnapshotError {
        let below: PathBuf = steps(path).collect();
        let object = Path::new(&self.job)
            .join(unescape_path(&self.folder))
            .join(below);
        SnapshotError::Volume {
            op,
            object: escape_path(&object),
            source,
        }
    }
}

impl Ahead {
    /// So many names were listed.
    pub fn follow(&self, listed: u64) {
        self.scout.follow(listed);
    }
}

impl TreeFolder {
    /// The number of the file system. Inodes of different ones may have the same number.
    ///
    /// # Errors
    /// The volume can't be read.
    #[allow(
        clippy::useless_conversion,
        reason = "the field has 32 bits on some machines"
    )]
    pub fn device(&self) -> io::Result<u64> {
        Ok(fstat(&self.fd)?.st_dev.into())
    }

    /// Opens a folder of this machine, to compare with. `None`: there is none.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn of_machine(path: &Path) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match open_at(CWD, path, flags) {
            Ok(fd) => Ok(Some(Self { fd })),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// All names in it.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn entries(&self) -> io::Result<Vec<Listed>> {
        listed(self.fd.as_fd())
    }

    /// The attributes of what has this name. `None`: nothing has.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn stat(&self, name: &Path) -> io::Result<Option<Stat>> {
        match statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether a number of an inode means the same file in both.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn is_in_one_file_system(&self, other: &Self) -> io::Result<bool> {
        Ok(fstat(&self.fd)?.st_dev == fstat(&other.fd)?.st_dev)
    }

    /// What a symbolic link holds.
    ///
    /// # Errors
    /// It is no symbolic link, or the volume can't be read.
    pub fn link(&self, name: &Path) -> io::Result<PathBuf> {
        let target = readlinkat(&self.fd, name, Vec::new())?;
        Ok(crate::walk::path_of(&target))
    }

    /// Opens a regular file, and nothing else.
    ///
    /// # Errors
    /// It is no regular file, or the volume can't be read.
    pub fn open(&self, name: &Path) -> io::Result<File> {
        open_regular_at(self.fd.as_fd(), name)
    }

    /// Whether the extended attributes, ACLs included, of two names in two folders are equal.
    ///
    /// # Errors
    /// The volume can't be read.
    pub fn has_equal_xattrs(&self, name: &Path, other: &Self, its_name: &Path) -> io::Result<bool> {
        Ok(self.xattrs(name)? == other.xattrs(its_name)?)
    }

    /// A name in it.
    pub(crate) fn at<'n>(&'n self, name: &'n Path) -> (BorrowedFd<'n>, &'n Path) {
        (self.fd.as_fd(), name)
    }

    /// Names and values, sorted.
    fn xattrs(&self, name: &Path) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let path = path_through(self.fd.as_fd(), name);
        let mut buffer = vec![0_u8; XATTR_BYTES_MAX];
        let length = match llistxattr(&path, &mut buffer[..]) {
            Err(Errno::OPNOTSUPP) => 0,
            listed => listed?,
        };
        let mut names: Vec<Vec<u8>> = buffer[..length]
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .map(<[u8]>::to_vec)
            .collect();
        names.sort();
        let mut all = Vec::new();
        for name in names {
            let length = match lgetxattr(&path, name.as_slice(), &mut buffer[..]) {
                Err(Errno::NODATA) => continue,
                got => got?,
            };
            all.push((name, buffer[..length].to_vec()));
        }
        Ok(all)
    }
}

/// Whether attributes are those of a folder.
#[must_use]
pub fn is_a_folder(stat: &Stat) -> bool {
    is_folder(stat)
}

/// The names in a path.
fn steps(path: &Path) -> impl Iterator<Item = &Path> {
    path.components().filter_map(|step| match step {
        Component::Normal(name) => Some(Path::new(name)),
        _ => None,
    })
}

/// No folder has a name `..`. Without that step, the path would be one of another file.
fn has_parent_step(path: &Path) -> bool {
    path.components().any(|step| step == Component::ParentDir)
}

/// Nothing has this name, or what has it is no folder.
fn is_absence(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn tree(dir: &Path) -> Tree {
        Tree {
            job: "home".to_owned(),
            folder: "2026-11-28T01-30-00Z".to_owned(),
            volume: dir.to_owned(),
            path: dir.to_owned(),
        }
    }

    #[test]
    fn no_path_leads_out_of_the_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("tree");
        std::fs::create_dir_all(inside.join("a")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/secret"), "x").unwrap();
        std::fs::write(inside.join("a/file"), "content").unwrap();
        symlink(dir.path().join("outside"), inside.join("link")).unwrap();
        let tree = tree(&inside);
        for path in [
            "/link/secret",
            "/a/../../outside/secret",
            "/../outside/secret",
            "/a/../a/file",
            "/a/b/../file",
            "/a/../file",
            "/a/..",
        ] {
            assert!(tree.stat(Path::new(path)).unwrap().is_none(), "{path}");
        }
        assert!(tree.folder(Path::new("/link")).unwrap().is_none());
        let refused = tree.no_such(Path::new("/link/secret")).to_string();
        assert!(refused.contains("symbolic link"), "{refused}");
        let refused = tree.no_such(Path::new("/a/../file")).to_string();
        assert!(refused.contains("'..'"), "{refused}");
        let missing = tree.no_such(Path::new("/a/none")).to_string();
        assert!(missing.contains("has no /a/none"), "{missing}");
        let (folder, name) = tree.place(Path::new("/a/file")).unwrap().unwrap();
        let text = io::read_to_string(folder.open(&name).unwrap()).unwrap();
        assert_eq!(text, "content");
        assert!(tree.stat(Path::new("/")).unwrap().is_some());
        assert!(tree.stat(Path::new("/a/file/below")).unwrap().is_none());
    }
}
