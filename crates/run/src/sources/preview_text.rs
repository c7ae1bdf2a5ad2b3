//! The text of `backup --dry-run`.

use std::fmt::Write as _;

use sprat_session::text;
use sprat_snapshot::{Census, Preview};

use crate::config::Job;

/// How many unreadable files are named.
const UNREAD_SHOWN_MAX: usize = 20;

/// What a backup of a job would copy and exclude, for people. `job` is `None` for a job of the command line.
#[must_use]
pub fn preview_text(name: &str, job: Option<&Job>, preview: &Preview) -> String {
    let mut out = String::new();
    let files = text::counted(preview.files, "file", "files");
    let others = text::counted(
        preview.others,
        "folder or other object",
        "folders and other objects",
    );
    let _ = writeln!(
        out,
        "{name}: {files} with {}, {others}",
        text::bytes(preview.bytes)
    );
    let commands = job
        .iter()
        .filter(|job| job.dump.is_some() || job.system_state);
    for _ in commands {
        let _ = writeln!(out, "commands of the job are not run now, and not counted");
    }
    if let Some(census) = preview
        .census
        .as_ref()
        .filter(|one| one.files_before.is_some())
    {
        let gone = match census.gone {
            0 => String::new(),
            gone => format!("; {} are gone", text::count(gone)),
        };
        let _ = writeln!(
            out,
            "since the last snapshot: {}{gone}",
            census_text(census)
        );
    }
    for path in preview.paths.iter().flatten() {
        let _ = writeln!(out, "  {path}");
    }
    if !preview.largest.is_empty() {
        let rows = preview.largest.iter();
        let rows: Vec<Vec<String>> = rows
            .map(|(path, bytes)| vec![text::bytes(*bytes), path.clone()])
            .collect();
        let _ = writeln!(
            out,
            "largest files:\n{}",
            text::table(&rows, &[0]).trim_end()
        );
    }
    if preview.excluded.is_empty() {
        let _ = writeln!(out, "nothing is excluded");
    } else {
        let _ = writeln!(out, "excluded (objects, rule, first of them):");
        let rows = preview.excluded.iter().map(|excluded| {
            let first = excluded.examples.join(", ");
            vec![text::count(excluded.objects), excluded.rule.clone(), first]
        });
        let _ = writeln!(
            out,
            "{}",
            text::table(&rows.collect::<Vec<_>>(), &[0]).trim_end()
        );
    }
    if !preview.unread.is_empty() {
        let count = text::counted(preview.unread.count, "object", "objects");
        let _ = writeln!(out, "{count} can't be read:");
        for path in preview.unread.names.iter().take(UNREAD_SHOWN_MAX) {
            let _ = writeln!(out, "  {path}");
        }
    }
    out
}

/// What is new in the sources, in one line.
#[must_use]
pub fn census_text(census: &Census) -> String {
    let named = |what: &str, all: &[(String, u64)]| {
        let named = all
            .iter()
            .map(|(path, bytes)| format!("{path} ({})", text::bytes(*bytes)));
        let named: Vec<String> = named.collect();
        match named.is_empty() {
            true => String::new(),
            false => format!("; {what}: {}", named.join(", ")),
        }
    };
    format!(
        "{} with {} are new or changed{}{}",
        text::counted(census.new + census.changed, "file", "files"),
        text::bytes(census.bytes),
        named("most in", &census.folders),
        named("largest", &census.largest),
    )
}
