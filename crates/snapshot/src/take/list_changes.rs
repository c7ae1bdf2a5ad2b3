//! The list of what a run changed, and the ACLs that are repaired while the tree is compared for it.

use super::Run;
use super::acl_repair::AclRepair;
use crate::cancel::Cancel;
use crate::change_list::ChangeList;
use crate::error::SnapshotError;
use crate::job::Folder;
use crate::large_files::UpToDate;
use crate::progress::Progress;
use crate::record::{RunRecord, Warning};
use crate::subvolume_ops::Subvolumes;
use crate::tree::Tree;

/// Of a tree that is the subvolume `work`.
type Work<'a> = (&'a dyn Subvolumes, &'a UpToDate);

impl Run<'_> {
    /// Lists what the run changed, and repairs the ACLs of folders. A run does not fail because of its list.
    pub(super) fn list_changes(
        &self,
        tree: Folder,
        work: Option<Work<'_>>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
        record: &mut RunRecord,
    ) {
        let acls = AclRepair::new(progress, cancel);
        // The files of a snapshot may be those of older ones, too, except on btrfs.
        let with_files = work.is_some();
        let list = self.change_list(tree, false, work, record);
        let repair = |path: &_, folder: &_, name: &_| acls.repair(path, folder, name);
        let written = list.write(&repair, cancel);
        if !matches!(written, Ok(true)) {
            // Not all of the tree was compared: the user stopped the run, or something can't be read.
            acls.repair_all(
                &Tree::of_job(self.volume_root, &self.folder.job, tree),
                with_files,
            );
        }
        acls.add_to(record);
        let written = written.and_then(|_| match record.complete || !list.complete {
            true => Ok(()),
            false => list.set_incomplete(),
        });
        note(written, record);
    }

    /// Lists what an interrupted run changed.
    pub(super) fn list_interrupted(
        &self,
        tree: Folder,
        stopped: &SnapshotError,
        work: Option<Work<'_>>,
        cancel: &Cancel,
        record: &mut RunRecord,
    ) {
        if matches!(stopped, SnapshotError::VolumeFull { .. }) {
            return;
        }
        let list = self.change_list(tree, true, work, record);
        // The next run repairs the ACLs of its tree.
        let written = list.write(&|_, _, _| {}, cancel);
        note(written.map(drop), record);
    }

    fn change_list<'r>(
        &'r self,
        tree: Folder,
        interrupted: bool,
        work: Option<Work<'r>>,
        record: &RunRecord,
    ) -> ChangeList<'r> {
        ChangeList {
            volume_root: self.volume_root,
            folder: &self.folder,
            tree,
            since: self.last(),
            interrupted,
            complete: record.complete,
            page_cache: self.spec.page_cache,
            large: work.map(|(_, large)| large),
            local: self.spec.change_lists.as_deref(),
            subvolumes: work.map(|(subvolumes, _)| subvolumes),
            edited: self.spec.edited,
        }
    }
}

fn note(written: Result<(), SnapshotError>, record: &mut RunRecord) {
    if let Err(error) = written {
        record.warnings.push(Warning::ChangesNotListed {
            reason: error.to_string(),
        });
    }
}
