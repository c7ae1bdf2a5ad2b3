//! The second rsync of a run. It reads those files from their source that must not come from an older
//! snapshot.

use super::Run;
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::job::Folder;
use crate::progress::Progress;
use crate::pulled::Host;
use crate::recent;
use crate::reread::{self, Plan, Tree};
use crate::rsync::{Ended, ITEMS_MAX, Outcome};
use crate::suspects::Suspects;

impl Run<'_> {
    /// Reads files from their source whose content must not come from an older snapshot.
    pub(super) fn read_again(
        &self,
        mut outcome: Outcome,
        inflight: Folder,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<(Outcome, Plan), SnapshotError> {
        let failed = |source| SnapshotError::Volume {
            op: "check",
            object: inflight.to_string(),
            source,
        };
        let tree = self.folder.job.path.join(inflight.to_string());
        let root = crate::walk::open_folder_at(&tree).map_err(failed)?;
        let suspects = self.spec.suspects.as_deref().map(Suspects::load);
        let about = Tree {
            root: &root,
            job: self.spec.job.as_str(),
            links_to_copy: self.copy.is_some(),
            recent_from_s: recent::from_s(self.started),
            hosts: self.sources.pulled.hosts.iter().map(Host::folder).collect(),
            linked_first: self
                .linked_from
                .first()
                .map(|(folder, _)| match self.in_work {
                    // `work` lies one folder deeper.
                    true => format!("../{folder}"),
                    false => folder.to_string(),
                }),
            has_older_links: !self.in_work && (self.copy.is_some() || !self.linked_from.is_empty()),
        };
        let plan = Plan::make(
            &about,
            &suspects.unwrap_or_default(),
            &self.recent,
            &outcome.copied_from_older,
            cancel,
        )
        .map_err(failed)?;
        outcome.recent.append_within(&plan.still_recent, ITEMS_MAX);
        if plan.is_empty() {
            return Ok((outcome, plan));
        }
        plan.prepare(&root).map_err(failed)?;
        if matches!(outcome.ended, Ended::Whole | Ended::WithUnread) {
            if cancel.is_cancelled() {
                // The tree lacks them now.
                outcome.ended = Ended::Cancelled;
            } else {
                let run = self.run_into_volume(Vec::new());
                let invocation = reread::copying(
                    &run,
                    plan.paths(),
                    &inflight.to_string(),
                    &self.attribute_filters(),
                );
                let second = self.attempt(&invocation, inflight, None, progress, cancel)?;
                outcome.add(second);
                for name in plan.missing(&root, &outcome.unread) {
                    outcome.unread.push_within(name, ITEMS_MAX);
                    outcome.ended = Ended::WithUnread;
                }
            }
        }
        Ok((outcome, plan))
    }
}
