//! What people read of the cost of snapshots.

use std::fmt::Write as _;

use jiff::civil::Date;
use sprat_inside::{AnalyzeReport, PathCost};
use sprat_session::text;

/// Paths of each list that are shown; JSON has more.
const PATHS_SHOWN: usize = 10;

/// How far the numbers can be wrong, if they can.
pub(crate) fn note(report: &AnalyzeReport) -> Option<&'static str> {
    match (report.exact, report.measured) {
        (true, _) => None,
        (false, true) => Some(
            "Sizes are measured by what the snapshots share. On btrfs, a removal frees up to 2 % more or less",
        ),
        (false, false) => Some(
            "These are estimates: on btrfs, the versions of a changed file may share a part of it",
        ),
    }
}

/// What the snapshots cost. `full_on`: when the volume is full, if that is known.
#[must_use]
pub fn costs(report: &AnalyzeReport, full_on: Option<Date>) -> String {
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
    out.push_str(&removal(report));
    if let Some(day) = full_on {
        let _ = writeln!(
            out,
            "if the volume grows as in the last 30 days, it is full on {day}"
        );
    }
    if let Some(note) = note(report) {
        let _ = writeln!(out, "{note}");
    }
    let folders = report.biggest_folders.iter().take(PATHS_SHOWN).map(|one| {
        let name = format!("{}:{}", one.job, text::harmless(&one.path));
        vec![format!("  {}", text::bytes(one.bytes)), name]
    });
    let folders: Vec<Vec<String>> = folders.collect();
    if !folders.is_empty() {
        out.push_str("\nbiggest folders of the newest snapshots:\n");
        out.push_str(&text::table(&folders, &[]));
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

/// What a removal frees.
fn removal(report: &AnalyzeReport) -> String {
    let Some(removal) = &report.removal else {
        return String::new();
    };
    format!(
        "removing {} frees {} ({})\n",
        text::counted(removal.snapshots.len() as u64, "snapshot", "snapshots"),
        text::bytes(removal.frees_bytes),
        text::counted(removal.frees_objects, "file or folder", "files and folders")
    )
}

/// What a removal frees, and how far the numbers can be wrong.
#[must_use]
pub fn removal_alone(report: &AnalyzeReport) -> String {
    let mut out = removal(report);
    if let Some(note) = note(report) {
        let _ = writeln!(out, "{note}");
    }
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
