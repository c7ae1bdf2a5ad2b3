//! What people read of a drill, and the jobs that it compares with their sources.

use std::fmt::Write as _;

use sprat_session::drill::Drilled;
use sprat_session::{Exit, text};
use sprat_snapshot::{DrilledSnapshot, JobName};

use crate::check_text::list;
use crate::config::Config;

/// The jobs that back up this machine into a container.
#[must_use]
pub fn jobs_here(config: &Config, container: &str) -> Vec<JobName> {
    let copies = config.copies();
    let of_it = copies.filter(|copy| copy.container.name == container);
    of_it.map(|copy| copy.job.name.clone()).collect()
}

/// What a drill of the container `name` found.
#[must_use]
pub fn summary(name: &str, drilled: &Drilled) -> String {
    let report = &drilled.report;
    let passed = match drilled.exit() {
        Exit::Done => "the drill passed",
        _ => "the drill FAILED",
    };
    let mut out = format!(
        "{name}: {passed}: {} ({}) restored from the server\n",
        text::counted(report.files, "file", "files"),
        text::bytes(report.bytes)
    );
    for DrilledSnapshot {
        job,
        snapshot,
        files,
        bytes,
    } in &report.snapshots
    {
        let files = text::counted(*files, "file", "files");
        let _ = writeln!(out, "  {job}/{snapshot}: {files} ({})", text::bytes(*bytes));
    }
    let files = |count| text::counted(count, "file", "files");
    let _ = writeln!(
        out,
        "compared: {} with the checksum of their backup or of a check, {} with the unchanged source",
        files(report.compared_with_checksum),
        files(report.compared_with_source)
    );
    if report.not_compared > 0 {
        let _ = writeln!(
            out,
            "not compared: {} without a checksum and without an unchanged source. `sprat check \
             --read-data` saves checksums",
            files(report.not_compared)
        );
    }
    if report.in_parts > 0 {
        let _ = writeln!(
            out,
            "read in part: {}, because of the size",
            files(report.in_parts)
        );
    }
    if report.left > 0 || !report.listed_all {
        let _ = writeln!(
            out,
            "the time was over: {} of the sample not restored{}",
            files(report.left),
            match report.listed_all {
                true => "",
                false => ", and not all folders were listed for it",
            }
        );
    }
    list(&mut out, "DAMAGED", &report.damaged);
    list(&mut out, "CAN'T BE READ", &report.unreadable);
    list(
        &mut out,
        "differ from the source although size and time are the same: backups did not notice the change \
         (the next backup from this machine copies them)",
        &report.missed,
    );
    if drilled.differing_blocks > 0 {
        let _ = writeln!(
            out,
            "DAMAGED: {} of the server differ from what this machine wrote there",
            text::counted(drilled.differing_blocks, "block", "blocks")
        );
    }
    if let Some(errors) = drilled.facts.file_system_errors {
        let _ = writeln!(
            out,
            "DAMAGED: the file system is marked as faulty ({}). Run `sprat check`",
            text::counted(errors.into(), "error", "errors")
        );
    }
    out
}
