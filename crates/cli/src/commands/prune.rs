//! `sprat prune`: removes the snapshots of a job that no rule keeps.

use serde_json::json;
use sprat_snapshot::{KeepReason, PruneReport, PruneSpec, Pruned};

use super::context::{Context, close};
use crate::args::PruneArgs;
use crate::config;
use crate::output::{Reporter, exit_json, text};
use crate::session::Access;
use crate::{Exit, Failure};

pub(super) fn run(context: &Context, args: &PruneArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let job = config::job_name(&args.job).map_err(Failure::usage)?;
    let rules = args.rules();
    if rules.is_empty() {
        return Err(Failure::usage("nothing says what to keep").with_hint(
            "nothing was started. Give at least one of --keep-last, --keep-daily, --keep-weekly, \
             --keep-monthly, --keep-yearly and --keep-within; --dry-run shows what they do",
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
        job,
        rules,
        dry_run: args.dry_run,
    };
    let pruned = session.prune(spec, &mut reporter, &context.interrupt);
    let (report, closed) = close(session, pruned, context, &mut reporter)?;
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
        .result(&table(&report, &args.target, args.dry_run), &json)?;
    Ok(Exit::Done)
}

fn table(report: &PruneReport, target: &str, dry_run: bool) -> String {
    let mut rows = vec![["SNAPSHOT", "WHAT", "WHY"].map(str::to_owned).to_vec()];
    for pruned in &report.snapshots {
        let what = match (pruned.verdict.keep.is_empty(), dry_run) {
            (false, _) => "kept",
            (true, false) => "removed",
            (true, true) => "would go",
        };
        rows.push(vec![
            pruned.verdict.name.to_string(),
            what.to_owned(),
            why(pruned),
        ]);
    }
    let gone = |pruned: &&Pruned| pruned.verdict.keep.is_empty();
    let count = report.snapshots.iter().filter(gone).count() as u64;
    let mut said = text::table(&rows, &[]);
    let snapshots = text::counted(count, "snapshot", "snapshots");
    if dry_run {
        said.push_str(&format!("{snapshots} would go\n"));
    } else {
        let freed = report.free_bytes[1].saturating_sub(report.free_bytes[0]);
        said.push_str(&format!(
            "{snapshots} removed, {}; {} in the volume for later snapshots\n",
            text::counted(report.names_removed, "name", "names"),
            text::bytes(freed)
        ));
        if freed > 0 {
            said.push_str(&format!(
                "`sprat trim {target}` gives the server back what the volume doesn't need\n"
            ));
        }
    }
    said
}

fn why(pruned: &Pruned) -> String {
    if pruned.verdict.keep.is_empty() {
        return "no rule keeps it".to_owned();
    }
    let words: Vec<&str> = pruned
        .verdict
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
        KeepReason::Unrecorded => "has no record: never touched",
        KeepReason::Future => "dated in the future: not counted",
        _ => "a reason that this version has no words for",
    }
}
