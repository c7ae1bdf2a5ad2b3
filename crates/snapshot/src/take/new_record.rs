//! The record of a run.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::Run;
use crate::name_list::NameList;
use crate::record::{EntryKind, LinkedFrom, RECORD_FORMAT, RunRecord, Warning};
use crate::rsync::{Ended, Invocation, Outcome};
use crate::text::{escape_name, escape_path};

impl Run<'_> {
    /// The record of the run, as far as rsync and the sources tell it.
    pub(super) fn record(
        &self,
        invocation: &Invocation,
        outcome: &Outcome,
        warnings: Vec<Warning>,
    ) -> RunRecord {
        let found = &self.sources.found;
        let before = self.newest_record().map(|(_, record)| record);
        let too_large_new = found.newly_large(before.as_ref());
        let mut warnings = warnings;
        warnings.extend(
            too_large_new
                .names
                .first()
                .map(|path| Warning::NewTooLarge {
                    path: path.clone(),
                    files: too_large_new.count,
                    larger_than: self.spec.scan.larger_than.unwrap_or_default(),
                }),
        );
        let texts = |paths: &[PathBuf]| paths.iter().map(|path| escape_path(path)).collect();
        RunRecord {
            format: RECORD_FORMAT,
            job: self.spec.job.clone(),
            name: self.name,
            complete: outcome.ended == Ended::Whole,
            finished_run: true,
            sources: self
                .sources
                .list
                .iter()
                .map(|source| escape_path(&source.path))
                .collect(),
            excludes: self.spec.excludes.clone(),
            exclude_from: texts(&self.spec.exclude_from),
            scan: self.spec.scan.clone(),
            marked: found.folders.clone(),
            too_large: found.large.clone(),
            too_large_new,
            started: self.started,
            ended: self.started,
            rsync_version: self.rsync.version.clone(),
            rsync_arguments: invocation
                .arguments
                .iter()
                .map(|argument| escape_name(argument.as_bytes()))
                .collect(),
            rsync_exit: outcome.exit,
            stats: outcome.stats,
            staged: Vec::new(),
            pulled: Vec::new(),
            linked_from: self
                .linked_from
                .iter()
                .map(|(folder, kind)| LinkedFrom {
                    folder: folder.to_string(),
                    kind: *kind,
                })
                .chain(self.copy.iter().map(|copy| LinkedFrom {
                    folder: escape_path(&copy.copy),
                    kind: EntryKind::Adopted,
                }))
                .collect(),
            mounts: Vec::new(),
            file_systems: Vec::new(),
            disks_gone: Vec::new(),
            disks_left_out: Vec::new(),
            unread: outcome.unread.shortened(),
            vanished: outcome.vanished.clone(),
            healed: NameList::default(),
            caught_up: NameList::default(),
            messages: outcome.messages.clone(),
            warnings,
            stopped_by: None,
        }
    }
}
