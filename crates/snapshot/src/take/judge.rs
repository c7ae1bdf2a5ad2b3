//! Judges what rsync made: whether the tree may become a snapshot.

use super::Run;
use crate::error::SnapshotError;
use crate::job::Folder;
use crate::pulled::Host;
use crate::rsync::{Ended, Outcome};
use crate::sources::Source;
use crate::text::{escape_path, unescape_path};

impl Run<'_> {
    /// Whether the tree that rsync made may become a snapshot.
    pub(super) fn check_outcome(
        &self,
        outcome: &Outcome,
        inflight: Folder,
    ) -> Result<(), SnapshotError> {
        match &outcome.ended {
            Ended::Whole | Ended::WithUnread => {}
            Ended::Cancelled => return Err(SnapshotError::Cancelled),
            Ended::Full(full) => {
                return Err(full.error(self.made(outcome, inflight).file_that_did_not_fit()));
            }
            Ended::Because(_) => {
                return Err(SnapshotError::RsyncFailed {
                    ended: "stopped".to_owned(),
                    first_message: outcome.messages.names.first().cloned().unwrap_or_default(),
                    messages: outcome.messages.clone(),
                });
            }
            Ended::Conflict(folder) => {
                return Err(SnapshotError::RsyncFailed {
                    ended: "stopped".to_owned(),
                    first_message: format!("the folder {folder} is at the place of a file"),
                    messages: outcome.messages.clone(),
                });
            }
            Ended::Failed { ended, message } => {
                // A changed source explains the failure better than rsync's message.
                self.sources.check_again()?;
                return Err(SnapshotError::RsyncFailed {
                    ended: ended.clone(),
                    first_message: message.clone(),
                    messages: outcome.messages.clone(),
                });
            }
        }
        self.sources.check_again()?;
        self.check_sources_in_tree(outcome, inflight)
    }

    /// Checks that the tree has some of the sources, and each source unless it is reported as unread.
    fn check_sources_in_tree(
        &self,
        outcome: &Outcome,
        inflight: Folder,
    ) -> Result<(), SnapshotError> {
        let tree = self.folder.job.path.join(inflight.to_string());
        let is_there = |source: &Source| {
            let below = source.path.strip_prefix("/").unwrap_or(&source.path);
            crate::long_path::lstat(&tree.join(below)).is_ok()
        };
        // A folder that could not be listed exists in the tree, and is empty.
        let has_some = |source: &Source| {
            let below = source.path.strip_prefix("/").unwrap_or(&source.path);
            let path = escape_path(&source.path);
            let is_empty =
                || std::fs::read_dir(tree.join(below)).is_ok_and(|mut all| all.next().is_none());
            is_there(source) && !(outcome.unread.names.contains(&path) && is_empty())
        };
        let has_host = |host: &Host| {
            let mut content = std::fs::read_dir(tree.join(host.folder())).ok();
            content.as_mut().is_some_and(|all| all.next().is_some())
        };
        if outcome.ended == Ended::WithUnread
            && !self.sources.list.iter().any(has_some)
            && !self.sources.pulled.hosts.iter().any(has_host)
        {
            // A snapshot of nothing must not look like a good one.
            return Err(SnapshotError::RsyncFailed {
                ended: "nothing was copied".to_owned(),
                first_message: outcome.messages.names.first().cloned().unwrap_or_default(),
                messages: outcome.messages.clone(),
            });
        }
        for source in &self.sources.list {
            let there = is_there(source);
            // A source that could not be read is reported as unread.
            let unread = &outcome.unread;
            let mut names = unread.names.iter().map(|name| unescape_path(name));
            let is_unread = names.any(|name| name.starts_with(&source.path))
                || unread.count > unread.names.len() as u64;
            if !there && !is_unread {
                return Err(SnapshotError::SourceRefused {
                    path: escape_path(&source.path),
                    why: "the job's patterns exclude all of it".to_owned(),
                });
            }
        }
        Ok(())
    }
}
