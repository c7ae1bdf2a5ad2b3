//! Files that may have changed again, with an unchanged time, after rsync had read them.
//!
//! File times have steps: some milliseconds (ext4 before Linux 6.13), a second (ext3, HFS+, sshfs), two
//! seconds (FAT). A file that changes twice within one step has the same time, and often the same size,
//! after both changes. So the time of a file proves nothing if it is not older than the run that read
//! the file. git calls such files racily clean (Documentation/technical/racy-git.txt). A run lists them
//! in `.sprat/NAME.recent`, one escaped name relative to the root in each line. The next run compares
//! the content of those that it linked with their source.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{Mode, OFlags, openat};

use crate::compare::{Unread, same_content};
use crate::job::replace_file;
use crate::long_path::size_and_time;
use crate::name::SnapshotName;
use crate::name_list::NameList;
use crate::text::escape_path;
use crate::text::unescape_path;

/// FAT's step of two seconds, and one second for the clock of a file server.
const STEP_S: i64 = 3;
/// How far the clock of another host may be behind that of this machine.
const HOST_BEHIND_S: i64 = 60;
/// Means all files, if there were too many to list.
const ALL: &str = "*";
/// Of the names of the lists.
const ENDING: &str = ".recent";
const FILE_BYTES_MAX: u64 = 1 << 30;

/// The files that a run must compare by content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Recent {
    /// Relative to the root.
    pub(crate) paths: Vec<PathBuf>,
    /// All files: a list was too long or unreadable.
    pub(crate) all: bool,
}

/// File times from this second on prove nothing for a run that began at `started`.
pub(crate) fn from_s(started: Timestamp) -> i64 {
    started.as_second() - STEP_S
}

/// The same for files that are pulled from another host.
pub(crate) fn from_s_on_hosts(started: Timestamp) -> i64 {
    from_s(started) - HOST_BEHIND_S
}

/// [`from_s`] in UTC, in the form of rsync's `%M`.
pub(crate) fn from_text(started: Timestamp) -> String {
    as_text(from_s(started))
}

/// The same for files that are pulled from another host.
pub(crate) fn from_text_on_hosts(started: Timestamp) -> String {
    as_text(from_s_on_hosts(started))
}

fn as_text(from_s: i64) -> String {
    let from = Timestamp::from_second(from_s).unwrap_or(Timestamp::UNIX_EPOCH);
    from.strftime("%Y/%m/%d-%H:%M:%S").to_string()
}

fn file_name(name: SnapshotName) -> String {
    format!("{name}{ENDING}")
}

/// Writes the list of the run `name` into the state folder. It is durable after the next sync.
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

/// The runs that have a list.
pub(crate) fn runs(state: &OwnedFd) -> io::Result<Vec<SnapshotName>> {
    let names = crate::walk::names_in(state.as_fd(), Path::new("."))?;
    let names = names.iter().filter_map(|(name, _)| name.to_str());
    Ok(names
        .filter_map(|name| SnapshotName::parse(name.strip_suffix(ENDING)?).ok())
        .collect())
}

impl Recent {
    /// Adds the list of the run `name`. An unreadable list means all files.
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
    let (here, on_hosts) = (from_s(name.moment()), from_s_on_hosts(name.moment()));
    crate::walk::each_file(tree, &mut |path, stat| {
        let from = match path.as_os_str().as_encoded_bytes().starts_with(b"@") {
            true => on_hosts,
            false => here,
        };
        if stat.st_mtime >= from {
            recent.push_within(escape_path(path), crate::rsync::ITEMS_MAX);
        }
    })?;
    write(state, name, &recent)
}

/// Whether `kept`, a file of the new tree with unchanged size and time, has another content than its
/// source. `None` if the source has changed or is gone or unreadable: then the comparison proves
/// nothing.
pub(crate) fn differs(kept: &mut File, source: &Path) -> io::Result<Option<bool>> {
    let ours = size_and_time(&kept.metadata()?);
    let is_unchanged = || {
        let about = fs::symlink_metadata(source).ok()?;
        (about.is_file() && size_and_time(&about) == ours).then_some(())
    };
    let compared = (|| {
        is_unchanged()?;
        let mut live = crate::long_path::open_regular(source).ok()?;
        Some(same_content(kept, &mut live, &mut |_| true))
    })();
    match compared {
        Some(Ok(Some(same))) if is_unchanged().is_some() => Ok(Some(!same)),
        Some(Err(Unread::Kept(error))) => Err(error),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn from_text_has_rsyncs_form() {
        let started = "2026-11-28T15:28:34.9Z".parse().unwrap();
        assert_eq!(from_text(started), "2026/11/28-15:28:31");
        assert_eq!(from_text_on_hosts(started), "2026/11/28-15:27:31");
    }

    #[test]
    fn a_list_is_read_back_and_a_truncated_list_means_all() {
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
