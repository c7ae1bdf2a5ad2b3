//! What people read of a restore.

use std::time::Duration;

use sprat_session::text;
use sprat_snapshot::{RestoreReport, RestoreSpec};

/// Changes that a dry run lists as text; JSON has more.
const CHANGES_SHOWN_MAX: usize = 200;

/// What was restored, or with `dry_run` would be.
#[must_use]
pub fn summary(spec: &RestoreSpec, report: &RestoreReport, took: Duration) -> String {
    let stats = &report.stats;
    let mut summary = String::new();
    if spec.dry_run {
        for change in report.changes.names.iter().take(CHANGES_SHOWN_MAX) {
            summary.push_str(&format!("{}\n", text::harmless(change)));
        }
        let shown = report.changes.names.len().min(CHANGES_SHOWN_MAX);
        let more = report.changes.count.saturating_sub(shown as u64);
        if more > 0 {
            summary.push_str(&format!("… and {} more\n", text::count(more)));
        }
    }
    let would = if spec.dry_run {
        "would restore"
    } else {
        "restored"
    };
    summary.push_str(&format!(
        "{would} {}/{} to {}: {}, {}; {} ({}) copied",
        spec.job,
        text::harmless(&report.snapshot),
        text::harmless(&spec.to.to_string_lossy()),
        text::counted(stats.files_of_people().unwrap_or(0), "file", "files"),
        text::bytes(stats.bytes_total),
        text::counted(stats.transferred, "file", "files"),
        text::bytes(stats.bytes_transferred),
    ));
    if report.same > 0 {
        summary.push_str(&format!(
            ", {} compared and the same",
            text::count(report.same)
        ));
    }
    let left = stats.regular_files.saturating_sub(stats.transferred);
    if spec.trust_times && left > 0 {
        summary.push_str(&format!(
            ", {} skipped: their size and time are equal, their content was not compared",
            text::count(left)
        ));
    }
    if stats.deleted > 0 {
        summary.push_str(&format!(", {} deleted", text::count(stats.deleted)));
    }
    summary.push_str(&format!(" in {}\n", text::duration(took)));
    if let Some(verified) = report.verified {
        summary.push_str(&format!(
            "verified: {} read again and equal to the snapshot\n",
            text::counted(verified, "file", "files")
        ));
    }
    if report.unequal.count > 0 {
        summary.push_str(&format!(
            "{} {} written although size and time were equal: the content differed, or the file was a hard \
             link to another one:\n",
            text::counted(report.unequal.count, "file", "files"),
            match (spec.dry_run, report.unequal.count) {
                (true, _) => "would be",
                (false, 1) => "was",
                (false, _) => "were",
            }
        ));
        for path in report.unequal.names.iter().take(CHANGES_SHOWN_MAX) {
            summary.push_str(&format!("  {}\n", text::harmless(path)));
        }
    }
    for message in report.messages.names.iter().take(CHANGES_SHOWN_MAX) {
        summary.push_str(&format!("  {}\n", text::harmless(message)));
    }
    summary
}
