//! Snapshots whose names came from a wrong clock.
//!
//! A run gets an earlier name than a finished snapshot only if that one is dated more than a day ahead of
//! the clock (`choose_name`). Its record says which one that is, and which snapshots it was linked from. So
//! the records prove the order of making, also when the wrong date has passed. Mostly the clock ran ahead
//! before. If it was behind for one run, the runs around that one show it.

use std::collections::BTreeSet;

use crate::error::SnapshotError;
use crate::job::{Folder, JobFolder};
use crate::name::SnapshotName;
use crate::record::{RunRecord, Warning};

/// How many records are read at once. Reading one after the other would cost a round trip for each.
const READERS: usize = 16;

/// The snapshots of `records` that have a wrong date: those after which one with an earlier name was made,
/// unless that one has the wrong date.
pub(crate) fn misdated(records: &[RunRecord]) -> BTreeSet<SnapshotName> {
    let mut wrong = BTreeSet::new();
    for record in records {
        let made_before = made_before(record, records);
        match made_before
            .iter()
            .any(|one| is_behind(record, *one, records))
        {
            true => wrong.extend([record.name]),
            false => wrong.extend(made_before),
        }
    }
    wrong
}

/// The snapshots with later names that were made before `record`.
fn made_before(record: &RunRecord, records: &[RunRecord]) -> Vec<SnapshotName> {
    let is_later = |name: &SnapshotName| *name > record.name;
    let mut found: Vec<SnapshotName> = linked(record).into_iter().chain(warned(record)).collect();
    found.retain(is_later);
    // What those were linked from was made before them.
    let mut at = 0;
    while let Some(name) = found.get(at) {
        let of_name = records.iter().filter(|one| one.name == *name);
        let older: Vec<SnapshotName> = of_name.flat_map(linked).filter(is_later).collect();
        for name in older {
            if !found.contains(&name) {
                found.push(name);
            }
        }
        at += 1;
    }
    found
}

/// Whether the clock was behind when `record` was made, after `before` with its later name: `before` was
/// made after yet another one with a later name than `record`, and the next run got a later one than both
/// from its clock.
fn is_behind(record: &RunRecord, before: SnapshotName, records: &[RunRecord]) -> bool {
    let mut befores = records.iter().filter(|one| one.name == before);
    let follows_later = befores.any(|one| linked(one).iter().any(|name| *name > record.name));
    // A name that only follows the newest one is not from the clock. One that is dated later still, by yet
    // another wrong clock, says nothing.
    let is_next = |one: &RunRecord| {
        let is_from_clock = warned(one).all(|newest| newest > one.name);
        one.name > before && linked(one).contains(&record.name) && is_from_clock
    };
    follows_later && records.iter().any(is_next)
}

/// The newest snapshot, if the clock of the run was behind it.
fn warned(record: &RunRecord) -> impl Iterator<Item = SnapshotName> + '_ {
    record.warnings.iter().filter_map(|warning| match warning {
        Warning::ClockBehind { newest } => Some(*newest),
        _ => None,
    })
}

/// The snapshots that a run was linked from: they were made before it.
fn linked(record: &RunRecord) -> Vec<SnapshotName> {
    let linked = record.linked_from.iter();
    let names = linked.filter_map(|linked| SnapshotName::parse(&linked.folder).ok());
    names.collect()
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
        // The clock was behind for one run, by more than the days between the runs.
        let [second, third, behind, fourth] = [
            "2026-11-12T01-30-00Z",
            "2026-11-13T01-30-00Z",
            "2026-11-10T01-30-00Z",
            "2026-11-14T01-30-00Z",
        ]
        .map(name);
        let mut one_behind = vec![
            record(second, &[], Vec::new()),
            record(third, &[second], Vec::new()),
            record(behind, &[third], Vec::new()),
        ];
        let before = misdated(&one_behind);
        assert_eq!(
            Vec::from_iter(before),
            [second, third],
            "not known before the next run"
        );
        one_behind.push(record(fourth, &[behind], Vec::new()));
        assert_eq!(Vec::from_iter(misdated(&one_behind)), [behind]);
        // Long before that, another clock had run seven years ahead for one run.
        let far = name("2033-11-01T01-30-00Z");
        for one in &mut one_behind[2..] {
            one.warnings.push(Warning::ClockBehind { newest: far });
        }
        one_behind.push(record(far, &[], Vec::new()));
        let found = misdated(&one_behind);
        assert_eq!(Vec::from_iter(found), [behind, far]);
        // It ran ahead for two runs. The next ones are dated before both.
        let two_ahead = [
            record(third, &[], Vec::new()),
            record(fourth, &[third], Vec::new()),
            record(behind, &[fourth], Vec::new()),
            record(second, &[behind], Vec::new()),
        ];
        assert_eq!(Vec::from_iter(misdated(&two_ahead)), [third, fourth]);
        // The run after the wrong date passed: its name follows it.
        let follows = record(
            name("2026-11-14T01-30-01Z"),
            &[behind],
            vec![Warning::ClockBehind { newest: fourth }],
        );
        let passed = [&two_ahead[..3], &[follows]].concat();
        assert_eq!(Vec::from_iter(misdated(&passed)), [third, fourth]);
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
