//! Repairs the ACLs of a new tree that rsync left wrong ([`sticky_acl`]).

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, OFlags};
use rustix::io::Errno;

use crate::cancel::Cancel;
use crate::long_path::open_at;
use crate::name_list::NameList;
use crate::progress::Progress;
use crate::record::{RunRecord, Warning};
use crate::sticky_acl;
use crate::text::{escape_path, unescape_path};
use crate::tree::{Tree, TreeFolder, is_a_folder};
use crate::unresponsive;

/// Repairs them from their sources, and keeps the names of those that it can't repair.
pub(super) struct AclRepair<'a> {
    progress: RefCell<&'a mut dyn FnMut(Progress)>,
    cancel: &'a Cancel,
    /// A source did not answer. No other one is asked.
    no_answer: Cell<bool>,
    /// The sources of what may have a wrong ACL, escaped.
    wrong: RefCell<NameList>,
    /// Why.
    messages: RefCell<NameList>,
}

impl<'a> AclRepair<'a> {
    pub(super) fn new(progress: &'a mut dyn FnMut(Progress), cancel: &'a Cancel) -> Self {
        Self {
            progress: RefCell::new(progress),
            cancel,
            no_answer: Cell::new(false),
            wrong: RefCell::default(),
            messages: RefCell::default(),
        }
    }

    /// Repairs the ACL of `name` in `folder`, whose source is `path`.
    pub(super) fn repair(&self, path: &Path, folder: &TreeFolder, name: &Path) {
        let repaired = sticky_acl::may_be_wrong(folder.at(name)).and_then(|found| {
            let Some(found) = found else { return Ok(()) };
            match self.acl_of_source(path)? {
                Some(right) => sticky_acl::correct(folder.at(name), &found, &right),
                None => Ok(()),
            }
        });
        if let Err(error) = repaired {
            self.is_wrong(path, &error);
        }
    }

    /// Repairs all folders with the sticky bit in `tree`; `with_files`: all folders and files.
    pub(super) fn repair_all(&self, tree: &Tree, with_files: bool) {
        // They are found again.
        self.wrong.take();
        self.messages.take();
        let mut waiting = vec![PathBuf::from("/")];
        while let Some(path) = waiting.pop() {
            if let Err(error) = self.repair_in(tree, &path, with_files, &mut waiting) {
                self.is_wrong(&path, &error);
            }
        }
    }

    /// Repairs the folders in `path`, and adds them to `waiting`.
    fn repair_in(
        &self,
        tree: &Tree,
        path: &Path,
        with_files: bool,
        waiting: &mut Vec<PathBuf>,
    ) -> io::Result<()> {
        let folder = tree.folder(path).map_err(io::Error::other)?;
        let Some(folder) = folder else { return Ok(()) };
        for entry in folder.entries()? {
            if with_files && entry.kind == FileType::RegularFile {
                self.repair(&path.join(&entry.name), &folder, &entry.name);
            }
            if !matches!(entry.kind, FileType::Directory | FileType::Unknown) {
                continue;
            }
            let Some(stat) = folder.stat(&entry.name)?.filter(is_a_folder) else {
                continue;
            };
            let path = path.join(&entry.name);
            if with_files || sticky_acl::is_concerned(stat.st_mode) {
                self.repair(&path, &folder, &entry.name);
            }
            waiting.push(path);
        }
        Ok(())
    }

    /// `None`: the source has no ACL, or is gone.
    fn acl_of_source(&self, path: &Path) -> io::Result<Option<Vec<u8>>> {
        if self.no_answer.get() {
            return Err(io::Error::other("its source was not asked for the ACL"));
        }
        let source = path.to_owned();
        let ask = move || {
            let (Some(parent), Some(name)) = (source.parent(), source.file_name()) else {
                return Ok(None);
            };
            // A user may reach what is in a folder that the user may not list.
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            match open_at(CWD, parent, flags) {
                Ok(parent) => sticky_acl::acl((parent.as_fd(), Path::new(name))),
                Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
                Err(error) => Err(error.into()),
            }
        };
        let mut progress = self.progress.borrow_mut();
        unresponsive::ask(&mut **progress, self.cancel, ask).unwrap_or_else(|error| {
            self.no_answer.set(true);
            Err(io::Error::other(error))
        })
    }

    fn is_wrong(&self, path: &Path, error: &io::Error) {
        let path = escape_path(path);
        let message = format!("{path}, ACL: {error}");
        self.messages.borrow_mut().push(message);
        self.wrong.borrow_mut().push(path);
    }

    /// Adds what could not be repaired.
    pub(super) fn add_to(&self, record: &mut RunRecord) {
        let wrong = self.wrong.take();
        if wrong.is_empty() {
            return;
        }
        record.complete = false;
        record.warnings.push(Warning::GroupRightsUnknown {
            folders: wrong.count,
        });
        if wrong.count > wrong.names.len() as u64 {
            // Any of them may have the others.
            for one in &mut record.file_systems {
                one.full = false;
            }
        }
        let names = wrong.names.iter().map(|name| unescape_path(name));
        for name in names {
            let disks = record.file_systems.iter_mut();
            let above = disks.filter(|one| name.starts_with(unescape_path(&one.place)));
            if let Some(its) = above.max_by_key(|one| one.place.len()) {
                its.full = false;
            }
        }
        record.messages.append(&self.messages.take());
        record.unread.append(&wrong);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, XattrFlags, chmod, lsetxattr};
    use rustix::process::geteuid;
    use rustix::thread::set_thread_uid;
    use serde_json::json;

    #[test]
    fn the_acl_of_a_source_is_read_below_a_folder_that_cannot_be_listed() {
        let dir = tempfile::tempdir().unwrap();
        let above = dir.path().join("above");
        let source = above.join("shared");
        std::fs::create_dir_all(&source).unwrap();
        let acl = sprat_testkit::tree::acl(1234, 5);
        let name = "system.posix_acl_access";
        let set = lsetxattr(&source, name, &acl, XattrFlags::empty());
        sprat_testkit::requires!(set.err().map(|error| format!("ACLs: {error}")));
        chmod(dir.path(), Mode::from(0o711)).unwrap();
        chmod(&above, Mode::from(0o111)).unwrap();
        let read = std::thread::scope(|scope| {
            let read = scope.spawn(|| {
                if geteuid().is_root() {
                    // Only of this thread, and of those that it starts.
                    set_thread_uid(rustix::fs::Uid::from_raw(65534)).unwrap();
                }
                assert!(std::fs::read_dir(&above).is_err());
                let (mut progress, cancel) = (|_| {}, Cancel::new());
                AclRepair::new(&mut progress, &cancel).acl_of_source(&source)
            });
            read.join().unwrap()
        });
        chmod(&above, Mode::from(0o711)).unwrap();
        assert_eq!(read.unwrap(), Some(acl));
    }

    #[test]
    fn no_disk_is_full_if_not_all_wrong_folders_are_named() {
        let disk = |place: &str| json!({"place": place, "kind": "ext4", "root": "/", "mounted_here": true, "full": true});
        let record = json!({
            "format": 1, "job": "home", "name": "2026-11-30T01-30-00Z", "complete": true,
            "started": "2026-11-30T01:30:00Z", "ended": "2026-11-30T01:31:00Z",
            "file_systems": [disk("/a"), disk("/b")],
        });
        let full_after = |folders: &[(&str, usize)]| {
            let (mut progress, cancel) = (|_| {}, Cancel::new());
            let acls = AclRepair::new(&mut progress, &cancel);
            for (place, count) in folders {
                for n in 0..*count {
                    let path = Path::new(place).join(n.to_string());
                    acls.is_wrong(&path, &io::ErrorKind::Other.into());
                }
            }
            let mut record: RunRecord = serde_json::from_value(record.clone()).unwrap();
            acls.add_to(&mut record);
            let full: Vec<bool> = record.file_systems.iter().map(|one| one.full).collect();
            (record.complete, full)
        };
        assert_eq!(full_after(&[]), (true, vec![true, true]));
        assert_eq!(full_after(&[("/a", 1000)]), (false, vec![false, true]));
        let both = [("/a", 1000), ("/b", 1)];
        assert_eq!(full_after(&both), (false, vec![false, false]));
    }
}
