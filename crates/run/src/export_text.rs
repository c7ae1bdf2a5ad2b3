//! What people read of an export.

use std::path::Path;

use sprat_session::text;
use sprat_snapshot::ExportReport;

/// Damaged files that are listed as text; JSON has more.
const DAMAGED_SHOWN_MAX: usize = 200;

/// What was exported, or with `dry_run` would be. `moved`: it was removed from the container.
#[must_use]
pub fn summary(report: &ExportReport, to: &Path, dry_run: bool, moved: bool) -> String {
    if report.snapshots.is_empty() {
        return "no snapshot is that old: nothing to export\n".to_owned();
    }
    let mut out = String::new();
    for one in &report.snapshots {
        let what = match (one.was_there, dry_run) {
            (true, true) => "is there already".to_owned(),
            (false, true) => "would be exported".to_owned(),
            (true, false) if one.compared == 0 => "is there already".to_owned(),
            (true, false) => format!(
                "is there already, {} compared",
                text::counted(one.compared, "file or folder", "files and folders")
            ),
            (false, false) => format!(
                "exported, {} compared, {} copied",
                text::counted(one.compared, "file or folder", "files and folders"),
                text::bytes(one.copied_bytes)
            ),
        };
        out.push_str(&format!("{}/{}: {what}\n", one.job, one.name));
        if one.damaged.count > 0 {
            let files = text::counted(one.damaged.count, "file", "files");
            out.push_str(&format!(
                "{files} DAMAGED in the container, as a check found:\n"
            ));
        }
        for path in one.damaged.names.iter().take(DAMAGED_SHOWN_MAX) {
            out.push_str(&format!("  {}\n", text::harmless(path)));
        }
    }
    let count = text::counted(report.snapshots.len() as u64, "snapshot", "snapshots");
    let to = text::harmless(&to.to_string_lossy());
    out.push_str(&match (dry_run, moved) {
        (true, _) => format!("{count} would be in {to}\n"),
        (false, false) => {
            format!("{count} are in {to}\n").replace("1 snapshot are", "1 snapshot is")
        }
        (false, true) => format!("moved {count} to {to}\n"),
    });
    out
}
