//! The ACLs of the folders of a new tree that rsync left wrong ([`sticky_acl`]).

use std::cell::{Cell, RefCell};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::cancel::Cancel;
use crate::name_list::NameList;
use crate::progress::Progress;
use crate::record::{RunRecord, Warning};
use crate::sticky_acl;
use crate::text::{escape_path, unescape_path};
use crate::tree::{Tree, TreeFolder, is_a_folder};
use crate::unresponsive;

/// Repairs them from their sources, and keeps the names of those that it can't repair.
pub(super) struct FolderAcls<'a> {
    progress: RefCell<&'a mut dyn FnMut(Progress)>,
    cancel: &'a Cancel,
    /// A source did not answer. No other one is asked.
    no_answer: Cell<bool>,
    /// The sources of folders whose ACL may be wrong, escaped.
    wrong: RefCell<NameList>,
    /// Why.
    messages: RefCell<NameList>,
}

impl<'a> FolderAcls<'a> {
    pub(super) fn new(progress: &'a mut dyn FnMut(Progress), cancel: &'a Cancel) -> Self {
        Self {
            progress: RefCell::new(progress),
            cancel,
            no_answer: Cell::new(false),
            wrong: RefCell::default(),
            messages: RefCell::default(),
        }
    }

    /// Repairs the ACL of the folder `name` in `folder`, whose source is `path`.
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

    /// Repairs all of `tree`.
    pub(super) fn repair_all(&self, tree: &Tree) {
        // They are found again.
        self.wrong.take();
        self.messages.take();
        let mut waiting = vec![PathBuf::from("/")];
        while let Some(path) = waiting.pop() {
            if let Err(error) = self.repair_in(tree, &path, &mut waiting) {
                self.is_wrong(&path, &error);
            }
        }
    }

    /// Repairs the folders in `path`, and adds them to `waiting`.
    fn repair_in(&self, tree: &Tree, path: &Path, waiting: &mut Vec<PathBuf>) -> io::Result<()> {
        let folder = tree.folder(path).map_err(io::Error::other)?;
        let Some(folder) = folder else { return Ok(()) };
        for entry in folder.entries()? {
            if !matches!(entry.kind, FileType::Directory | FileType::Unknown) {
                continue;
            }
            let Some(stat) = folder.stat(&entry.name)?.filter(is_a_folder) else {
                continue;
            };
            let path = path.join(&entry.name);
            if sticky_acl::is_concerned(stat.st_mode) {
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
            let parent = TreeFolder::of_machine(parent)?;
            parent.map_or(Ok(None), |parent| {
                sticky_acl::acl(parent.at(Path::new(name)))
            })
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
