//! What people read of the cost of snapshots.

use std::fmt::Write as _;

use sprat_inside::{AnalyzeReport, PathCost};
use sprat_session::text;

/// Paths of each list that are shown; JSON has more.
const PATHS_SHOWN: usize = 10;

/// What the snapshots cost.
#[must_use]
pub fn costs(report: &AnalyzeReport) -> String {
    let title = ["SNAPSHOT", "FILES", "SIZE", "NEW", "ONLY HERE"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    rows.extend(report.snapshots.iter().map(|one| {
        vec![
            format!("{}/{}", one.job, text::harmless(&one.snapshot)),
            text::count(one.files),
            text::bytes(one.bytes),
            text::bytes(one.new_bytes),
            text::bytes(one.own_bytes),
        ]
    }));
    let mut out = text::table(&rows, &[1, 2, 3, 4]);
    let _ = writeln!(
        out,
        "together: {}, of which folders take {}",
        text::bytes(report.bytes),
        text::bytes(report.folder_bytes)
    );
    if let Some(removal) = &report.removal {
        let _ = writeln!(
            out,
            "removing {} frees {} ({})",
            text::counted(removal.snapshots.len() as u64, "snapshot", "snapshots"),
            text::bytes(removal.frees_bytes),
            text::counted(removal.frees_objects, "file or folder", "files and folders")
        );
    }
    if !report.exact {
        out.push_str(
            "These are estimates: on btrfs, the versions of a changed file may share a part of it\n",
        );
    }
    let biggest = |one: &PathCost| text::bytes(one.bytes);
    let versions = |one: &PathCost| format!("{}×", text::count(one.versions));
    let all = |one: &PathCost| {
        format!(
            "{} in {} versions",
            text::bytes(one.all_bytes),
            text::count(one.versions)
        )
    };
    paths(&mut out, "biggest", &report.biggest, &biggest);
    paths(
        &mut out,
        "most often changed",
        &report.most_changed,
        &versions,
    );
    paths(&mut out, "most expensive", &report.most_expensive, &all);
    out
}

fn paths(out: &mut String, title: &str, paths: &[PathCost], what: &dyn Fn(&PathCost) -> String) {
    if paths.is_empty() {
        return;
    }
    let _ = writeln!(out, "\n{title}:");
    let rows = paths.iter().take(PATHS_SHOWN).map(|one| {
        let name = text::harmless(&one.path);
        vec![format!("  {}", what(one)), format!("{}:{name}", one.job)]
    });
    let rows: Vec<Vec<String>> = rows.collect();
    out.push_str(&text::table(&rows, &[]));
}
