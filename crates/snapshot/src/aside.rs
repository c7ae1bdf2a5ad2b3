//! Sets the tree of a run aside. The run continues in a new, empty tree that links to it.
//!
//! The tree becomes a `.partial`, like that of an interrupted run. Whatever happens then, the next run
//! can use it, and a finished run removes it.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;

use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::job::{Folder, RunFolder};
use crate::name::SnapshotName;
use crate::name_list::NameList;
use crate::recent;
use crate::rsync::Invocation;

/// rsync accepts 20 `--link-dest`. Among trees that one run set aside, the newest has all that the older
/// ones have.
const ASIDE_MAX: usize = 3;

/// Sets trees aside for one run.
pub(crate) struct Aside<'a> {
    folder: &'a RunFolder,
    /// The name of the run.
    name: SnapshotName,
    /// A file on the volume, for `syncfs`.
    sync: &'a File,
    /// Trees that a newer one replaces, oldest first.
    replaceable: RefCell<Vec<Folder>>,
}

impl<'a> Aside<'a> {
    pub(crate) fn new(folder: &'a RunFolder, name: SnapshotName, sync: &'a File) -> Self {
        Self {
            folder,
            name,
            sync,
            replaceable: RefCell::default(),
        }
    }

    /// Sets the tree aside, creates a new one, and lets `invocation` link to the former first. `recent`:
    /// the files in it whose time proves nothing. `replaceable`: the next such tree will have all that
    /// this one has.
    pub(crate) fn begin_again(
        &self,
        invocation: &mut Invocation,
        recent: &NameList,
        replaceable: bool,
    ) -> Result<(), SnapshotError> {
        let made = self.set_aside(recent)?;
        invocation.arguments.insert(0, link_dest(made));
        let mut older = self.replaceable.borrow_mut();
        if replaceable {
            older.push(made);
        }
        if older.len() > ASIDE_MAX {
            let oldest = older.remove(0);
            let link = link_dest(oldest);
            invocation.arguments.retain(|argument| *argument != link);
            // What can't be removed now is removed with the others at the end.
            let _ = self.folder.remove(oldest, &Cancel::new());
        }
        Ok(())
    }

    /// Turns the tree into an interrupted one, and creates a new, empty tree for the run.
    pub(crate) fn set_aside(&self, recent: &NameList) -> Result<Folder, SnapshotError> {
        let failed = |op| {
            move |source: std::io::Error| SnapshotError::Volume {
                op,
                object: Folder::Inflight(self.name).to_string(),
                source,
            }
        };
        // After a crash, no file of an interrupted tree may lack its content.
        rustix::fs::syncfs(self.sync).map_err(|e| failed("sync")(e.into()))?;
        let taken = self.folder.taken()?;
        let mut name = self.name.second_before();
        while let Some(used) = name.filter(|name| taken.contains(name)) {
            name = used.second_before();
        }
        let name = name.ok_or_else(|| {
            failed("rename")(std::io::Error::from(std::io::ErrorKind::AlreadyExists))
        })?;
        recent::write(&self.folder.state, name, recent).map_err(failed("write"))?;
        self.folder
            .inflight_becomes(self.name, Folder::Partial(name))?;
        self.folder.make_inflight(self.name)?;
        Ok(Folder::Partial(name))
    }
}

/// The option that lets rsync link to `folder` beside the tree.
pub(crate) fn link_dest(folder: Folder) -> OsString {
    OsString::from(format!("{LINK_DEST}../{folder}"))
}

pub(crate) const LINK_DEST: &str = "--link-dest=";
