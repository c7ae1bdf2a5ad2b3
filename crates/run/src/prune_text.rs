//! What people read about a prune.

use sprat_session::text;
use sprat_snapshot::{EntryKind, Interrupted, KeepReason, PruneReport, Pruned};

/// What was asked for, as far as the table says it.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The container, as it was named.
    pub target: &'a str,
    /// Nothing was removed.
    pub dry_run: bool,
    /// Interrupted trees go, too.
    pub drop_interrupted: bool,
    /// Without a rule no snapshot is removed.
    pub no_rule: bool,
    /// The server has little free space.
    pub server_is_low: bool,
}

/// Each snapshot: whether it is kept, and why; and what was freed.
#[must_use]
pub fn table(report: &PruneReport, asked: &Asked<'_>) -> String {
    let Asked {
        target,
        dry_run,
        drop_interrupted,
        no_rule,
        server_is_low,
    } = *asked;
    let mut rows = vec![["SNAPSHOT", "WHAT", "WHY"].map(str::to_owned).to_vec()];
    for pruned in &report.snapshots {
        let what = match (pruned.decision.keep.is_empty(), dry_run) {
            (false, _) => "kept",
            (true, _) if no_rule => "kept",
            (true, false) => "removed",
            (true, true) => "would be removed",
        };
        rows.push(vec![
            pruned.decision.name.to_string(),
            what.to_owned(),
            why(pruned, no_rule),
        ]);
    }
    for tree in &report.interrupted {
        let what = match (drop_interrupted, dry_run) {
            (false, _) => "kept",
            (true, false) => "removed",
            (true, true) => "would be removed",
        };
        rows.push(vec![
            tree.folder.clone(),
            what.to_owned(),
            text::harmless(&interrupted(tree)),
        ]);
    }
    let gone = |pruned: &&Pruned| !no_rule && pruned.decision.keep.is_empty();
    let count = report.snapshots.iter().filter(gone).count() as u64;
    let mut said = text::table(&rows, &[]);
    let mut snapshots = text::counted(count, "snapshot", "snapshots");
    let trees = report.interrupted.len() as u64;
    if trees > 0 && drop_interrupted {
        let trees = text::counted(trees, "interrupted snapshot", "interrupted snapshots");
        snapshots.push_str(&format!(" and {trees}"));
    } else if trees > 0 {
        said.push_str(
            "the next backup of the job continues from an interrupted snapshot; --drop-interrupted \
             removes it\n",
        );
    }
    if dry_run {
        said.push_str(&format!("{snapshots} would be removed\n"));
    } else {
        said.push_str(&removed(
            &snapshots,
            report.names_removed,
            report.free_bytes,
            target,
            server_is_low,
        ));
    }
    said
}

/// What a removal of `snapshots` has freed: `free_bytes` in the volume before and after. Names `sprat trim`
/// where that helps the server.
#[must_use]
pub fn removed(
    snapshots: &str,
    names: u64,
    free_bytes: [u64; 2],
    target: &str,
    server_is_low: bool,
) -> String {
    let freed = free_bytes[1].saturating_sub(free_bytes[0]);
    // Snapshots that are subvolumes are removed as a whole.
    let names = match names {
        0 => String::new(),
        names => format!(
            " ({})",
            text::counted(names, "file or folder", "files and folders")
        ),
    };
    let mut said = format!(
        "{snapshots} removed{names}; {} more free in the volume\n",
        text::bytes(freed)
    );
    if freed > 0 || server_is_low {
        said.push_str(&format!(
            "to release the unused space to the server, run `sprat trim {target}`\n"
        ));
    }
    said
}

/// What is known of an interrupted run.
fn interrupted(tree: &Interrupted) -> String {
    let mut said = match tree.kind {
        EntryKind::Inflight => "interrupted by a crash".to_owned(),
        _ => "interrupted".to_owned(),
    };
    if let Some(bytes) = tree.bytes_copied {
        said.push_str(&format!(", {} copied", text::bytes(bytes)));
    }
    if let Some(why) = &tree.stopped_by {
        said.push_str(&format!(": {why}"));
    }
    said
}

fn why(pruned: &Pruned, no_rule: bool) -> String {
    if pruned.decision.keep.is_empty() {
        return match no_rule {
            true => "no rule was given",
            false => "no rule keeps it",
        }
        .to_owned();
    }
    let words: Vec<&str> = pruned
        .decision
        .keep
        .iter()
        .map(|reason| why_kept(*reason))
        .collect();
    words.join(", ")
}

/// Why a snapshot is kept.
#[must_use]
pub fn why_kept(reason: KeepReason) -> &'static str {
    match reason {
        KeepReason::Last => "last",
        KeepReason::Hourly => "hourly",
        KeepReason::Daily => "daily",
        KeepReason::Weekly => "weekly",
        KeepReason::Monthly => "monthly",
        KeepReason::Yearly => "yearly",
        KeepReason::Within => "within",
        KeepReason::Oldest => "the oldest, because a rule has too few others",
        KeepReason::LastGood => "the newest complete one",
        KeepReason::Latest => "latest",
        KeepReason::Newest => "the newest one",
        KeepReason::Pinned => "pinned",
        KeepReason::MissingDisk => {
            "the newest copy of a disk or source that the newest complete one lacks"
        }
        KeepReason::RightContent => {
            "has the last undamaged copy of a file that is damaged in others"
        }
        KeepReason::OldContent => {
            "has the last copy of a source file from before its content changed silently"
        }
        KeepReason::BeforeChange => "made before an unusual change of the source",
        KeepReason::Unrecorded => "has no record: never pruned",
        KeepReason::Future => "dated in the future: not counted",
        _ => "a reason that this version does not know",
    }
}
