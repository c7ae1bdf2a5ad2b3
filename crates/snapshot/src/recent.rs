//! Files that may have changed once more, without a sign, after rsync had read them.
//!
//! Times on a file system have steps: some milliseconds (ext4 before Linux 6.13), a second (ext3,
//! HFS+, sshfs), two (FAT). A file that changes twice within one step has the same time and often the
//! same size after both changes. So a file whose time is not older than the run that read it proves
//! nothing by its time. git calls such files racily clean (Documentation/technical/racy-git.txt).
//! A run lists them in `.sprat/NAME.recent`, one escaped name relative to the root in each line. The
//! next run compares the content of those that it linked with the source.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{Mode, OFlags, openat};

use crate::compare::{Unread, same_content};
use crate::job::replace_file;
use crate::name::SnapshotName;
use crate::record::NameList;
use crate::text::escape_path;
use crate::text::unescape_path;

/// FAT's two seconds, and one for a file server's clock.
const STEP_S: i64 = 3;
/// Stands for all files, where there were too many to list.
const ALL: &str = "*";
const FILE_BYTES_MAX: u64 = 1 << 30;

/// What a run must compare.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Recent {
    /// Relative to the root.
    pub(crate) paths: Vec<PathBuf>,
    /// Every file: the list was too long.
    pub(crate) all: bool,
}

/// The second from which on a time proves nothing for a run that began at `started`.
pub(crate) fn from_s(started: Timestamp) -> i64 {
    started.as_second() - STEP_S
}

/// [`from_s`] as rsync's `%M` shows it in UTC.
pub(crate) fn from_text(started: Timestamp) -> String {
    let from = Timestamp::from_second(from_s(started)).unwrap_or(Timestamp::UNIX_EPOCH);
    from.strftime("%Y/%m/%d-%H:%M:%S").to_string()
}

fn file_name(name: SnapshotName) -> String {
    format!("{name}.recent")
}

/// Writes the list of the run `name` into the state folder; durable after the next sync.
pub(crate) fn write(state: &OwnedFd, name: SnapshotName, recent: &NameList) -> io::Result<()> {
    if recent.is_empty() {
        return Ok(());
    }
    let mut text = if recent.count > recent.names.len() as u64 {
        ALL.to_owned()
    } else {
        recent.names.join("\n")
    };
    text.push('\n');
    replace_file(state, &file_name(name), text.as_bytes())
}

/// Removes the list of a run whose tree is gone.
pub(crate) fn forget(state: &OwnedFd, name: SnapshotName) {
    let _ = rustix::fs::unlinkat(state, file_name(name), rustix::fs::AtFlags::empty());
}

impl Recent {
    /// Adds what the run `name` listed. A list that can't be read stands for all files.
    pub(crate) fn read(&mut self, state: &OwnedFd, name: SnapshotName) {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(state, file_name(name), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT) => return,
            Err(_) => {
                self.all = true;
                return;
            }
        };
        let mut text = String::new();
        if file.take(FILE_BYTES_MAX).read_to_string(&mut text).is_err() {
            self.all = true;
        }
        for line in text.lines() {
            if line == ALL {
                self.all = true;
            } else {
                self.paths.push(unescape_path(line));
            }
        }
        self.paths.sort();
        self.paths.dedup();
    }
}

/// After a crash: lists the files below `tree` whose time is not older than the run `name`.
pub(crate) fn list_again(state: &OwnedFd, name: SnapshotName, tree: &OwnedFd) -> io::Result<()> {
    let mut recent = NameList::default();
    let from = from_s(name.moment());
    crate::walk::each_file(tree, &mut |path, stat| {
        if stat.st_mtime >= from {
            recent.push_within(escape_path(path), crate::rsync::ITEMS_MAX);
        }
    })?;
    write(state, name, &recent)
}

/// Whether `kept`, a file of the new tree that seems unchanged, has another content than its source.
/// `None`: the source looks different by now, is gone, or can't be read: it proves nothing.
pub(crate) fn differs(kept: &mut File, source: &Path) -> io::Result<Option<bool>> {
    let looks = |about: &fs::Metadata| (about.len(), about.mtime(), about.mtime_nsec());
    let ours = looks(&kept.metadata()?);
    let same_looks = || {
        let about = fs::symlink_metadata(source).ok()?;
        (about.is_file() && looks(&about) == ours).then_some(())
    };
    let compared = (|| {
        same_looks()?;
        let mut live = crate::long_path::open_regular(source).ok()?;
        Some(same_content(kept, &mut live, &mut |_| true))
    })();
    match compared {
        Some(Ok(Some(same))) if same_looks().is_some() => Ok(Some(!same)),
        Some(Err(Unread::Kept(error))) => Err(error),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_has_the_form_of_rsyncs() {
        let started = "2026-11-28T15:28:34.9Z".parse().unwrap();
        assert_eq!(from_text(started), "2026/11/28-15:28:31");
    }

    #[test]
    fn a_list_comes_back_and_one_that_is_too_long_means_all() {
        let dir = tempfile::tempdir().unwrap();
        let state = crate::walk::open_folder_at(dir.path()).unwrap();
        let name = SnapshotName::parse("2026-11-28T15-28-34Z").unwrap();
        let mut recent = Recent::default();
        recent.read(&state, name);
        assert_eq!(recent, Recent::default());
        let mut list = NameList::default();
        list.push("a/b\\#012c".to_owned());
        write(&state, name, &list).unwrap();
        recent.read(&state, name);
        assert_eq!(recent.paths, [PathBuf::from("a/b\nc")]);
        assert!(!recent.all);
        list.count = 3;
        write(&state, name, &list).unwrap();
        recent.read(&state, name);
        assert!(recent.all);
        forget(&state, name);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
