//! `sprat prune`: removes the snapshots of a job that no rule keeps.

use serde_json::json;
use sprat_session::{Access, text};
use sprat_snapshot::{EntryKind, Interrupted, KeepReason, PruneReport, PruneSpec, Pruned};

use super::context::{Context, close};
use crate::args::PruneArgs;
use crate::output::{Reporter, exit_json};
use crate::{Exit, Failure, config};

pub(super) fn run(context: &Context, args: &PruneArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let job = config::job_name(&args.job).map_err(Failure::usage)?;
    let rules = args.rules();
    if rules.is_empty() && !args.drop_interrupted {
        return Err(Failure::usage("nothing says what to keep").with_hint(
            "nothing was started. Give at least one of --keep-last, --keep-daily, --keep-weekly, \
             --keep-monthly, --keep-yearly and --keep-within; --dry-run shows what they do. \
             --drop-interrupted removes what interrupted runs left, and needs none of them",
        ));
    }
    let secret = context.secret(&resolved)?;
    let access = if args.dry_run {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let mut reporter = Reporter::new(context.output, format!("{job}: "));
    let mut options = context.session_options(&resolved, access)?;
    options.may_use_reserve = true;
    let mut session = context.open_with(&resolved, &secret, options, &mut reporter)?;
    drop(secret);
    let spec = PruneSpec {
        suspects: None,
        job,
        rules,
        drop_interrupted: args.drop_interrupted,
        dry_run: args.dry_run,
    };
    let pruned = session.prune(spec, &mut reporter, &context.interrupt);
    let (report, closed) = close(session, pruned, context, &resolved, &mut reporter)?;
    let json = json!({
        "command": "prune",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "job": args.job,
        "dry_run": args.dry_run,
        "report": report,
        "volume": closed.volume,
    });
    context
        .output
        .result(&table(&report, args, reporter.server_is_low()), &json)?;
    Ok(Exit::Done)
}

fn table(report: &PruneReport, args: &PruneArgs, server_is_low: bool) -> String {
    let (target, dry_run) = (&args.target, args.dry_run);
    let mut rows = vec![["SNAPSHOT", "WHAT", "WHY"].map(str::to_owned).to_vec()];
    for pruned in &report.snapshots {
        let what = match (pruned.decision.keep.is_empty(), dry_run) {
            (false, _) => "kept",
            // Without any rule nothing goes.
            (true, _) if args.rules().is_empty() => "kept",
            (true, false) => "removed",
            (true, true) => "would go",
        };
        rows.push(vec![
            pruned.decision.name.to_string(),
            what.to_owned(),
            why(pruned, args),
        ]);
    }
    for tree in &report.interrupted {
        let what = match (args.drop_interrupted, dry_run) {
            (false, _) => "kept",
            (true, false) => "removed",
            (true, true) => "would go",
        };
        rows.push(vec![
            tree.folder.clone(),
            what.to_owned(),
            text::harmless(&interrupted(tree)),
        ]);
    }
    let gone = |pruned: &&Pruned| !args.rules().is_empty() && pruned.decision.keep.is_empty();
    let count = report.snapshots.iter().filter(gone).count() as u64;
    let mut said = text::table(&rows, &[]);
    let mut snapshots = text::counted(count, "snapshot", "snapshots");
    let trees = report.interrupted.len() as u64;
    if trees > 0 && args.drop_interrupted {
        let trees = text::counted(trees, "interrupted tree", "interrupted trees");
        snapshots.push_str(&format!(" and {trees}"));
    } else if trees > 0 {
        said.push_str(
            "the next backup of the job goes on from what was interrupted; --drop-interrupted \
             removes it\n",
        );
    }
    if dry_run {
        said.push_str(&format!("{snapshots} would go\n"));
    } else {
        let freed = report.free_bytes[1].saturating_sub(report.free_bytes[0]);
        said.push_str(&format!(
            "{snapshots} removed, {}; {} in the volume for later snapshots\n",
            text::counted(report.names_removed, "name", "names"),
            text::bytes(freed)
        ));
        if freed > 0 || server_is_low {
            said.push_str(&format!(
                "`sprat trim {target}` gives the server back what the volume doesn't need\n"
            ));
        }
    }
    said
}

/// What is known of a run that did not come to its end.
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

fn why(pruned: &Pruned, args: &PruneArgs) -> String {
    if pruned.decision.keep.is_empty() {
        let rules = !args.rules().is_empty();
        return if rules {
            "no rule keeps it"
        } else {
            "no rule was given"
        }
        .to_owned();
    }
    let words: Vec<&str> = pruned
        .decision
        .keep
        .iter()
        .map(|reason| word(*reason))
        .collect();
    words.join(", ")
}

fn word(reason: KeepReason) -> &'static str {
    match reason {
        KeepReason::Last => "last",
        KeepReason::Daily => "daily",
        KeepReason::Weekly => "weekly",
        KeepReason::Monthly => "monthly",
        KeepReason::Yearly => "yearly",
        KeepReason::Within => "within",
        KeepReason::LastGood => "the newest whole one",
        KeepReason::Latest => "latest",
        KeepReason::Pinned => "pinned",
        KeepReason::MissingDisk => "the newest copy of a disk that the newest whole one lacks",
        KeepReason::RightContent => {
            "has the last right content of a file that is damaged elsewhere"
        }
        KeepReason::Unrecorded => "has no record: never touched",
        KeepReason::Future => "dated in the future: not counted",
        _ => "a reason that this version has no words for",
    }
}
