//! Snapshots whose names came from a clock that ran ahead.
//!
//! A run gets an earlier name than a finished snapshot only if that one is dated more than a day ahead of
//! the clock (`choose_name`). Its record says which one that is, and which snapshots it was linked from. So
//! the records prove the order of making, also when the wrong date has passed.

use std::collections::BTreeSet;

use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder};
use crate::name::SnapshotName;
use crate::record::{RunRecord, Warning};

/// How many records are read at once. Reading one after the other would cost a round trip for each.
const READERS: usize = 16;

/// The snapshots of `records` after which one with an earlier name was made.
pub(crate) fn misdated(records: &[RunRecord]) -> BTreeSet<SnapshotName> {
    let before = |record: &RunRecord| -> Vec<SnapshotName> {
        let linked = record.linked_from.iter();
        let linked = linked.filter_map(|linked| SnapshotName::parse(&linked.folder).ok());
        let warned = record.warnings.iter().filter_map(|warning| match warning {
            Warning::ClockBehind { newest } => Some(*newest),
            _ => None,
        });
        linked
            .chain(warned)
            .filter(|earlier| *earlier > record.name)
            .collect()
    };
    records.iter().flat_map(before).collect()
}

/// Reads the records of the finished snapshots, oldest first. Those that can't be read are missing.
pub(crate) fn finished_records(job: &JobFolder) -> Result<Vec<RunRecord>, SnapshotError> {
    let own = job.own_folders()?.into_iter();
    let named: Vec<Folder> = own.filter(|own| matches!(own, Folder::Named(_))).collect();
    let read = |folders: &[Folder]| -> Vec<RunRecord> {
        let found = folders.iter().map(|folder| job.record(folder.name()));
        let found = found.filter_map(Result::ok);
        found.filter(|record| record.finished_run).collect()
    };
    let share = named.len().div_ceil(READERS).max(1);
    let mut all: Vec<RunRecord> = std::thread::scope(|scope| {
        let readers: Vec<_> = named
            .chunks(share)
            .map(|part| {
                let thread = std::thread::Builder::new();
                (part, thread.spawn_scoped(scope, move || read(part)))
            })
            .collect();
        let mut all = Vec::new();
        for (part, reader) in readers {
            let found = reader.ok().and_then(|reader| reader.join().ok());
            // If no thread can be started, this thread reads the records.
            all.extend(found.unwrap_or_else(|| read(part)));
        }
        all
    });
    all.sort_by_key(|record| record.name);
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{EntryKind, LinkedFrom};

    fn name(text: &str) -> SnapshotName {
        SnapshotName::parse(text).unwrap()
    }

    #[test]
    fn records_prove_which_snapshot_has_a_wrong_date() {
        let [real, ahead, later] = [
            "2026-11-15T01-30-00Z",
            "2026-11-18T20-00-00Z",
            "2026-11-19T01-30-00Z",
        ]
        .map(name);
        let record = |name: SnapshotName, linked: &[SnapshotName], warnings: Vec<Warning>| {
            let moment = name.moment().to_string();
            let known = serde_json::json!({
                "format": 1, "job": "home", "name": name, "complete": true,
                "started": moment, "ended": moment, "warnings": warnings,
            });
            let mut record: RunRecord = serde_json::from_value(known).unwrap();
            let linked = linked.iter().map(|linked| LinkedFrom {
                folder: linked.to_string(),
                kind: EntryKind::Complete,
            });
            record.linked_from.extend(linked);
            record
        };
        let behind = Warning::ClockBehind { newest: ahead };
        let first = record(ahead, &[], Vec::new());
        let wrong = |records: &[RunRecord]| Vec::from_iter(misdated(records));
        assert_eq!(
            wrong(&[record(real, &[ahead], Vec::new()), first.clone()]),
            [ahead]
        );
        // The next run was linked from another one.
        assert_eq!(
            wrong(&[record(real, &[], vec![behind.clone()]), first.clone()]),
            [ahead]
        );
        assert!(wrong(&[first, record(later, &[ahead], vec![behind])]).is_empty());
    }
}
