//! What people read of a restore.

use std::time::Duration;

use sprat_session::text;
use sprat_snapshot::{Existing, Planned, RestoreReport, RestoreSpec};

/// Changes that a dry run lists as text; JSON has more.
const CHANGES_SHOWN_MAX: usize = 200;

/// What was restored, or with `dry_run` would be.
#[must_use]
pub fn summary(spec: &RestoreSpec, report: &RestoreReport, took: Option<Duration>) -> String {
    let stats = &report.stats;
    let mut summary = String::new();
    if spec.dry_run {
        for change in report.changes.names.iter().take(CHANGES_SHOWN_MAX) {
            summary.push_str(&format!("{}\n", text::harmless(&in_words(change))));
        }
        let shown = report.changes.names.len().min(CHANGES_SHOWN_MAX);
        let more = report.changes.count.saturating_sub(shown as u64);
        if more > 0 {
            summary.push_str(&format!("… and {} more\n", text::count(more)));
        }
    }
    if let Some(planned) = &report.planned {
        summary.push_str(&counts(planned, spec.existing));
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
    if let Some(took) = took {
        summary.push_str(&format!(" in {}", text::duration(took)));
    }
    summary.push('\n');
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
    for (files, words) in [
        (
            &report.damaged,
            "DAMAGED in the snapshot. Another snapshot may have the right content: see \
             `sprat versions`",
        ),
        (
            &report.damaged_kept,
            "DAMAGED in the snapshot. Not written, because the file here has the same size and time, and other content",
        ),
    ] {
        if files.count > 0 {
            let files = text::counted(files.count, "file", "files");
            summary.push_str(&format!("{files} {words}:\n"));
        }
        for path in files.names.iter().take(CHANGES_SHOWN_MAX) {
            summary.push_str(&format!("  {}\n", text::harmless(path)));
        }
    }
    for message in report.messages.names.iter().take(CHANGES_SHOWN_MAX) {
        summary.push_str(&format!("  {}\n", text::harmless(message)));
    }
    summary
}

/// What a dry run counted.
fn counts(planned: &Planned, existing: Existing) -> String {
    let newer = match (planned.newer_here, existing) {
        (None | Some(0), _) => String::new(),
        (Some(newer), Existing::KeepNewer) => format!(", {} kept, newer here", text::count(newer)),
        (Some(newer), _) => format!(" (newer here: {})", text::count(newer)),
    };
    format!(
        "{} new, {} replaced{newer}, {} deleted\n",
        text::count(planned.new),
        text::count(planned.replaced),
        text::count(planned.deleted)
    )
}

/// A line of rsync's `--out-format='%i %n%L'` (rsync(1), "itemize-changes") in words.
fn in_words(change: &str) -> String {
    let Some((flags, path)) = change.split_once(' ') else {
        return change.to_owned();
    };
    let is_new = flags.get(2..).is_some_and(|rest| rest.starts_with('+'));
    let what = match (flags.as_bytes().first(), is_new) {
        (Some(b'*'), _) => "delete",
        (Some(b'>' | b'c' | b'h'), true) => "new",
        (Some(b'>'), false) => "replace",
        (Some(b'c' | b'h'), false) => "change",
        (Some(b'.'), _) => "attributes",
        _ => return change.to_owned(),
    };
    format!("{what:<10}  {}", path.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_and_their_counts_are_shown_in_words() {
        for (line, words) in [
            (">f+++++++++ etc/fstab", "new         etc/fstab"),
            ("cd+++++++++ etc/", "new         etc/"),
            ("hf+++++++++ b => a", "new         b => a"),
            (">f.st...... a b", "replace     a b"),
            ("cL..t...... link -> x", "change      link -> x"),
            (".d..t...... etc/", "attributes  etc/"),
            ("*deleting   old", "delete      old"),
            ("something", "something"),
        ] {
            assert_eq!(in_words(line), words);
        }
        let planned = |newer_here| Planned {
            new: 12,
            replaced: 3,
            newer_here,
            deleted: 0,
        };
        let shown = |newer, existing| counts(&planned(newer), existing);
        assert_eq!(
            shown(Some(2), Existing::Overwrite),
            "12 new, 3 replaced (newer here: 2), 0 deleted\n"
        );
        assert_eq!(
            shown(Some(2), Existing::KeepNewer),
            "12 new, 3 replaced, 2 kept, newer here, 0 deleted\n"
        );
        assert_eq!(
            shown(None, Existing::Keep),
            "12 new, 3 replaced, 0 deleted\n"
        );
        assert_eq!(
            shown(Some(0), Existing::Overwrite),
            "12 new, 3 replaced, 0 deleted\n"
        );
    }
}
