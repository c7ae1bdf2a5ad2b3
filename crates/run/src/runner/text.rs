//! What people read about copies that were made, and about those that are due.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_session::{ClosedReport, text};
use sprat_snapshot::{RunRecord, SnapshotReport, Warning};

use super::run::Plan;

/// Largest number of unread files that are listed as text; JSON has all of them.
const UNREAD_SHOWN_MAX: usize = 20;

/// The files that warnings of changed content are about; the record has more of them.
#[must_use]
pub fn content_names(record: &RunRecord) -> Vec<String> {
    let line = |what: &'static str| {
        move |name: &String| format!("{}: {what}: {}", record.job, text::harmless(name))
    };
    let healed = record.healed.names.iter().map(line("was damaged"));
    let caught_up = record.caught_up.names.iter().map(line("was missed"));
    healed.chain(caught_up).take(UNREAD_SHOWN_MAX).collect()
}

/// The result as text: one line, and the files that could not be read.
#[must_use]
pub fn outcome_text(job: &str, report: &SnapshotReport, took: Duration) -> String {
    let stats = &report.record.stats;
    let seconds = took.as_millis().max(1);
    let rate = u128::from(stats.bytes_transferred) * 1000 / seconds;
    let rate = text::bytes(u64::try_from(rate).unwrap_or(u64::MAX));
    let mut summary = format!(
        "{job}: snapshot {} of {}, {}; {} ({}) copied in {} ({rate}/s)",
        report.name,
        text::counted(stats.files_of_people().unwrap_or(0), "file", "files"),
        text::bytes(stats.bytes_total),
        text::counted(stats.transferred, "file", "files"),
        text::bytes(stats.bytes_transferred),
        text::duration(took),
    );
    let vanished = report.record.vanished.count;
    if vanished > 0 {
        summary.push_str(&format!(
            "; {} vanished while it ran",
            text::counted(vanished, "file", "files")
        ));
    }
    let unread = &report.record.unread;
    if unread.is_empty() {
        summary.push_str(if report.record.complete {
            "\n"
        } else {
            "; NOT complete\n"
        });
        return summary;
    }
    let lost = report.record.without_attributes();
    let what = match lost {
        lost if lost >= unread.count => format!(
            "{} stored in this snapshot without some of the attributes",
            text::counted(unread.count, "source file is", "source files are")
        ),
        0 => {
            // A folder whose disk was unmounted is there in part.
            let part = report.record.warnings.iter().any(Warning::lacks_something);
            format!(
                "{} could not be read, and NOT stored in this snapshot{}",
                text::counted(unread.count, "source file", "source files"),
                if part { ", or only in part" } else { "" }
            )
        }
        _ => format!(
            "{} could NOT be stored in this snapshot, or only in part",
            text::counted(unread.count, "source file", "source files")
        ),
    };
    summary.push_str(&format!("\n{job}: {what}:\n"));
    for name in unread.names.iter().take(UNREAD_SHOWN_MAX) {
        let reason = report
            .record
            .reason_unread(name)
            .map(|reason| format!(": {reason}"));
        summary.push_str(&format!(
            "  {}{}\n",
            text::harmless(name),
            text::harmless(&reason.unwrap_or_default())
        ));
    }
    let shown = u64::try_from(unread.names.len().min(UNREAD_SHOWN_MAX)).unwrap_or(u64::MAX);
    if unread.count > shown {
        summary.push_str(&format!(
            "  … and {} more\n",
            text::count(unread.count - shown)
        ));
    }
    // A source can't be excluded.
    let is_source = |name: &String| {
        let left_out = |warning: &Warning| matches!(warning, Warning::SourceLeftOut { path, .. } if path == name);
        report.record.warnings.iter().any(left_out)
    };
    if unread.names.iter().any(is_source) {
        summary.push_str("To leave a source out for good, remove it from `sources` of the job.\n");
    }
    if !unread.names.iter().all(is_source) {
        summary.push_str(
            "To leave one out for good, exclude its path: --exclude PATH, or `exclude` of the job.\n",
        );
    }
    summary
}

/// What a session sent, and where it is.
#[must_use]
pub fn closed_text(closed: &ClosedReport) -> String {
    let durable = match closed.durable {
        true => "everything is on the server's disk",
        false => "the server can't report whether it is on its disk",
    };
    format!(
        "{} sent, {} read; {durable}\n",
        text::bytes(closed.volume.written_bytes),
        text::bytes(closed.volume.read_bytes)
    )
}

/// The copies of a plan as a table: which are due, why, and when each is next.
#[must_use]
pub fn plan_table(plan: &Plan<'_>, zone: &TimeZone) -> String {
    let mut rows = vec![["COPY", "DUE", "WHY", "NEXT"].map(str::to_owned).to_vec()];
    for selected in &plan.copies {
        let due = if selected.decision.due { "yes" } else { "no" };
        let next = match selected.decision.next {
            _ if selected.is_tried() => "now".to_owned(),
            Some(next) => local(next, zone),
            None => "never".to_owned(),
        };
        let name = selected.copy.name().to_string();
        rows.push(vec![
            name,
            due.to_owned(),
            text::harmless(&selected.reason()),
            next,
        ]);
    }
    let mut said = text::table(&rows, &[]);
    for container in &plan.slices {
        said.push_str(&format!(
            "{}: a slice of the check is due\n",
            container.name
        ));
    }
    for container in &plan.drills {
        said.push_str(&format!("{}: a drill is due\n", container.name));
    }
    said
}

/// `2026-11-28 14:00`.
fn local(at: Timestamp, zone: &TimeZone) -> String {
    let zoned = zone.to_datetime(at);
    zoned.strftime("%Y-%m-%d %H:%M").to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Of a snapshot that lacks these files, with these warnings.
    fn whole(unread: &[&str], warnings: &serde_json::Value) -> String {
        let name = "2026-11-26T13-21-01Z";
        let record = json!({
            "format": 1, "job": "home", "name": name, "complete": false,
            "started": "2026-11-26T13:21:01Z", "ended": "2026-11-26T13:22:01Z",
            "unread": { "count": unread.len(), "names": unread }, "warnings": warnings,
        });
        let record: RunRecord = serde_json::from_value(record).unwrap();
        let report = SnapshotReport {
            name: record.name,
            record,
            snapshots: None,
            census: None,
        };
        outcome_text("home", &report, Duration::from_secs(1))
    }

    /// What it says of the files.
    fn summary(unread: &[&str], warnings: &serde_json::Value) -> String {
        let text = whole(unread, warnings);
        text.lines().nth(1).unwrap_or_default().to_owned()
    }

    #[test]
    fn missing_source_is_not_to_be_excluded() {
        let missing = json!([{ "what": "source_left_out", "path": "/gone", "why": "is missing" }]);
        let (of_source, of_file) = ("remove it from `sources`", "exclude its path");
        let text = whole(&["/gone"], &missing);
        assert!(
            text.contains(of_source) && !text.contains(of_file),
            "{text}"
        );
        let text = whole(&["/gone", "/a/b"], &missing);
        assert!(text.contains(of_source) && text.contains(of_file), "{text}");
        let text = whole(&["/a/b"], &json!([]));
        assert!(
            !text.contains(of_source) && text.contains(of_file),
            "{text}"
        );
    }

    #[test]
    fn files_without_attributes_are_not_called_missing() {
        let refused = json!([{ "what": "attributes_refused", "files": 1 }]);
        assert_eq!(
            summary(&["/a"], &json!([])),
            "home: 1 source file could not be read, and NOT stored in this snapshot:"
        );
        assert_eq!(
            summary(&["/a"], &refused),
            "home: 1 source file is stored in this snapshot without some of the attributes:"
        );
        assert_eq!(
            summary(&["/a", "/b"], &refused),
            "home: 2 source files could NOT be stored in this snapshot, or only in part:"
        );
        let unmounted = json!([{ "what": "unmounted_meanwhile", "path": "/a" }]);
        assert_eq!(
            summary(&["/a"], &unmounted),
            "home: 1 source file could not be read, and NOT stored in this snapshot, or only in part:"
        );
    }
}
