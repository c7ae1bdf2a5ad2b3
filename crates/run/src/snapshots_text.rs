//! What people read of a list of snapshots.

use sprat_session::text;
use sprat_snapshot::{EntryKind, RunRecord, SnapshotEntry};

/// One snapshot a line.
#[must_use]
pub fn table(entries: &[SnapshotEntry]) -> String {
    if entries.is_empty() {
        return "no snapshots yet\n".to_owned();
    }
    let title = ["JOB", "SNAPSHOT", "FILES", "SIZE", "COPIED", "STATE"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    for entry in entries {
        let stats = entry.record.as_ref().map(|record| record.stats);
        // A run that was interrupted counted nothing.
        let stats = stats.filter(|stats| stats.files > 0);

        let number = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            text::harmless_within(&entry.job, 40),
            text::harmless_within(&entry.folder, 40),
            number(
                stats
                    .and_then(|stats| stats.files_of_people())
                    .map(text::count),
            ),
            number(stats.map(|stats| text::bytes(stats.bytes_total))),
            number(stats.map(|stats| text::bytes(stats.bytes_transferred))),
            state(entry),
        ]);
    }
    text::table(&rows, &[2, 3, 4])
}

/// What a snapshot lacks: `unread` files, of which it has `lost` without some attributes.
#[must_use]
pub fn lacking(unread: u64, lost: u64) -> String {
    let counted = |count| text::counted(count, "file", "files");
    match (unread - lost.min(unread), lost) {
        (files, 0) => counted(files),
        (0, lost) => format!("attributes of {}", counted(lost)),
        (files, lost) => format!("{}, and attributes of {}", counted(files), counted(lost)),
    }
}

/// Whether it is complete, the newest, and pinned.
#[must_use]
pub fn state(entry: &SnapshotEntry) -> String {
    let record = entry.record.as_ref();
    let unread = record.map_or(0, |record| record.unread.count);
    let lost = record.map_or(0, RunRecord::without_attributes);
    let state = match entry.kind {
        EntryKind::Complete => "complete".to_owned(),
        EntryKind::Incomplete if unread == 0 => {
            "incomplete: files vanished during the backup".to_owned()
        }
        EntryKind::Incomplete if lost == 0 => format!(
            "incomplete: {} unread",
            text::counted(unread, "file", "files")
        ),
        EntryKind::Incomplete => format!("incomplete: lacks {}", lacking(unread, lost)),
        EntryKind::Unrecorded => "no record (the files are there)".to_owned(),
        EntryKind::Partial => "interrupted; the next run continues from it".to_owned(),
        EntryKind::Inflight => "running, or was killed".to_owned(),
        EntryKind::Adopted => "not made by sprat".to_owned(),
        _ => "unknown".to_owned(),
    };
    let latest = if entry.is_latest { ", latest" } else { "" };
    let pinned = match entry.pin.as_deref() {
        None => String::new(),
        Some("") => ", pinned".to_owned(),
        Some(reason) => format!(", pinned: {}", text::harmless(reason)),
    };
    format!("{state}{latest}{pinned}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn entry(folder: &str, kind: EntryKind, is_latest: bool) -> SnapshotEntry {
        SnapshotEntry {
            job: "home".to_owned(),
            folder: folder.to_owned(),
            kind,
            name: None,
            is_latest,
            pin: None,
            record: None,
            record_error: None,
        }
    }

    fn with_stats(mut entry: SnapshotEntry, stats: &serde_json::Value) -> SnapshotEntry {
        let record = json!({
            "format": 1, "job": "home", "name": "2026-11-26T13-21-01Z", "complete": true,
            "started": "2026-11-26T13:21:01Z", "ended": "2026-11-26T13:22:01Z", "stats": stats,
        });
        entry.record = Some(serde_json::from_value(record).unwrap());
        entry
    }

    #[test]
    fn folders_are_no_files_and_what_was_not_counted_is_no_number() {
        let good = || entry("2026-11-26T13-21-01Z", EntryKind::Complete, false);
        let counted =
            json!({"files": 6, "regular_files": 2, "bytes_total": 8, "bytes_transferred": 8});
        let of_early_version = json!({"files": 6, "bytes_total": 8});
        let partial = entry("2026-11-26T13-21-01Z.partial", EntryKind::Partial, false);
        let entries = [
            with_stats(good(), &counted),
            with_stats(good(), &json!({"files": 3})),
            with_stats(good(), &of_early_version),
            with_stats(partial, &json!({})),
        ];
        insta::assert_snapshot!(table(&entries), @r"
        JOB   SNAPSHOT                      FILES  SIZE  COPIED  STATE
        home  2026-11-26T13-21-01Z              2   8 B     8 B  complete
        home  2026-11-26T13-21-01Z              0   0 B     0 B  complete
        home  2026-11-26T13-21-01Z              6   8 B     0 B  complete
        home  2026-11-26T13-21-01Z.partial      -     -       -  interrupted; the next run continues from it
        ");
    }

    #[test]
    fn what_a_snapshot_lacks_is_files_or_attributes() {
        assert_eq!(lacking(1, 0), "1 file");
        assert_eq!(lacking(3, 3), "attributes of 3 files");
        assert_eq!(lacking(3, 1), "2 files, and attributes of 1 file");
        assert_eq!(lacking(1, 2), "attributes of 2 files");
    }

    #[test]
    fn every_state_has_its_words() {
        let entries = [
            entry("2026-11-23T13-21-01Z", EntryKind::Complete, false),
            entry("2026-11-24T13-21-01Z", EntryKind::Unrecorded, true),
            entry("2026-11-25T13-21-01Z.partial", EntryKind::Partial, false),
            entry("x\u{1b}[2J.inflight", EntryKind::Inflight, false),
            entry("home.2026-11-20", EntryKind::Adopted, false),
        ];
        insta::assert_snapshot!(table(&entries), @r"
        JOB   SNAPSHOT                      FILES  SIZE  COPIED  STATE
        home  2026-11-23T13-21-01Z              -     -       -  complete
        home  2026-11-24T13-21-01Z              -     -       -  no record (the files are there), latest
        home  2026-11-25T13-21-01Z.partial      -     -       -  interrupted; the next run continues from it
        home  x\u{1b}[2J.inflight               -     -       -  running, or was killed
        home  home.2026-11-20                   -     -       -  not made by sprat
        ");
    }
}
