//! The list of snapshots.

use std::collections::BTreeSet;

use sprat_run::snapshots_text;
use sprat_run::watch::Shown;
use sprat_session::text;
use sprat_snapshot::{EntryKind, SnapshotEntry};

use crate::question::At;
use crate::rows::Rows;

/// The snapshots of all jobs: jobs by name, and of each the newest one first.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    pub(crate) entries: Vec<SnapshotEntry>,
    pub(crate) rows: Rows,
    /// `(job, folder)` of those that are marked.
    pub(crate) marked: BTreeSet<(String, String)>,
}

impl Snapshots {
    /// Shows another list. The cursor stays on its snapshot; at first it is on the newest complete one.
    pub(crate) fn set(&mut self, mut entries: Vec<SnapshotEntry>) {
        let before = self.current();
        entries.reverse();
        // Stable: each job keeps its order.
        entries.sort_by(|one, other| one.job.cmp(&other.job));
        self.entries = entries;
        let place = self.entries.iter().position(|entry| match &before {
            Some(at) => is_at(entry, at),
            None => entry.kind == EntryKind::Complete,
        });
        self.rows.cursor = place.unwrap_or(0);
        let there: BTreeSet<_> = self.entries.iter().map(key).collect();
        self.marked.retain(|marked| there.contains(marked));
    }

    pub(crate) fn current(&self) -> Option<At> {
        let entry = self.entries.get(self.rows.cursor)?;
        Some(At::top(&entry.job, &entry.folder))
    }

    pub(crate) fn mark(&mut self) {
        if let Some(entry) = self.entries.get(self.rows.cursor) {
            let key = key(entry);
            if !self.marked.remove(&key) {
                self.marked.insert(key);
            }
        }
    }

    /// What is marked; if nothing is, the one under the cursor.
    pub(crate) fn chosen(&self) -> Vec<At> {
        match self.marked.is_empty() {
            true => self.current().into_iter().collect(),
            false => self
                .marked
                .iter()
                .map(|(job, folder)| At::top(job, folder))
                .collect(),
        }
    }

    /// The cells of a row: mark, job, snapshot, time, size, state.
    pub(crate) fn cells(&self, row: usize, shown: &Shown) -> Vec<String> {
        let Some(entry) = self.entries.get(row) else {
            return Vec::new();
        };
        let stats = entry.record.as_ref().map(|record| record.stats);
        let size = stats.filter(|stats| stats.files > 0);
        let mark = match self.marked.contains(&key(entry)) {
            true => "*",
            false => " ",
        };
        vec![
            mark.to_owned(),
            entry.job.clone(),
            entry.folder.clone(),
            entry
                .name
                .as_ref()
                .map_or_else(String::new, |name| shown.time(name.moment())),
            size.map_or_else(|| "-".to_owned(), |stats| text::bytes(stats.bytes_total)),
            snapshots_text::state(entry),
        ]
    }
}

fn key(entry: &SnapshotEntry) -> (String, String) {
    (entry.job.clone(), entry.folder.clone())
}

fn is_at(entry: &SnapshotEntry, at: &At) -> bool {
    entry.job == at.job && entry.folder == at.snapshot
}
