//! `sprat prune`: removes the snapshots of a job that no retention rule keeps.

use std::time::Duration;

use clap::Args;
use serde_json::json;
use sprat_run::config;
use sprat_session::{Access, text};
use sprat_snapshot::{
    EntryKind, Interrupted, KeepCount, KeepReason, KeepRules, PruneReport, PruneSpec, Pruned,
};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::output::Reporter;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat prune home --job www --keep-last 3 --keep-daily 14 --keep-monthly 12 --dry-run
  sprat prune home --job www --keep-within 30d
  sprat prune home --job www --drop-interrupted";

pub(super) const NOTES: &str = "\
With at least one --keep rule, the snapshots that no rule keeps are removed. --drop-interrupted
alone removes no finished snapshot. One snapshot can satisfy several rules. Hours are UTC hours.
Days begin at midnight of the local time zone. A rule that finds fewer than N periods also keeps
the oldest snapshot. The newest complete snapshot is always kept. All rules: docs/retention.md";

#[derive(Debug, Args)]
pub(super) struct PruneArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Prune this job's snapshots
    #[arg(long)]
    job: String,
    /// Keep the newest N
    #[arg(long, value_name = "N")]
    keep_last: Option<KeepCount>,
    /// Keep one snapshot per hour, for the newest N hours that have one
    #[arg(long, value_name = "N")]
    keep_hourly: Option<KeepCount>,
    /// The same for days; N can be `all`, here and in each rule with N
    #[arg(long, value_name = "N")]
    keep_daily: Option<KeepCount>,
    /// The same for weeks, Monday to Sunday
    #[arg(long, value_name = "N")]
    keep_weekly: Option<KeepCount>,
    /// The same for months
    #[arg(long, value_name = "N")]
    keep_monthly: Option<KeepCount>,
    /// The same for years
    #[arg(long, value_name = "N")]
    keep_yearly: Option<KeepCount>,
    /// Keep all snapshots made within this time before the newest one, such as 36h, 14d, 6w
    #[arg(long, value_name = "TIME", value_parser = within)]
    keep_within: Option<Duration>,
    /// Also remove the partial snapshots of interrupted runs; the next run can't continue from them
    #[arg(long)]
    drop_interrupted: bool,
    /// Show only what would be removed, and why the rest is kept
    #[arg(long)]
    dry_run: bool,
}

fn within(text: &str) -> Result<Duration, String> {
    let time = text::parse_time(text, "hdw")?;
    let keeps_something = !time.is_zero();
    keeps_something
        .then_some(time)
        .ok_or("the time must be more than zero".to_owned())
}

impl PruneArgs {
    /// The rules of the command line; `None`: there is none.
    fn given(&self) -> Option<KeepRules> {
        let within_s = self.keep_within.map(|time| time.as_secs());
        let rules = KeepRules {
            last: self.keep_last.unwrap_or_default(),
            hourly: self.keep_hourly.unwrap_or_default(),
            daily: self.keep_daily.unwrap_or_default(),
            weekly: self.keep_weekly.unwrap_or_default(),
            monthly: self.keep_monthly.unwrap_or_default(),
            yearly: self.keep_yearly.unwrap_or_default(),
            within_s: within_s.unwrap_or_default(),
        };
        let counts = [
            self.keep_last,
            self.keep_hourly,
            self.keep_daily,
            self.keep_weekly,
            self.keep_monthly,
            self.keep_yearly,
        ];
        let any = counts.iter().any(Option::is_some) || within_s.is_some();
        any.then_some(rules)
    }
}

impl CommandArgs for PruneArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let job = config::job_name(&self.job).map_err(Failure::usage)?;
        let rules = self.given().unwrap_or_default();
        if rules.is_empty() && !self.drop_interrupted {
            return Err(Failure::usage("no retention rule given").with_hint(
                "nothing was started. Give at least one of --keep-last, --keep-hourly, --keep-daily, \
                 --keep-weekly, --keep-monthly, --keep-yearly and --keep-within; --dry-run shows what they do. \
                 To remove only the partial snapshots of interrupted runs, give --drop-interrupted \
                 alone. `sprat run` prunes by the rules of the config",
            ));
        }
        let access = match self.dry_run {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let mut prepared = context.prepare(&self.target, access)?;
        prepared.options.may_use_reserve = true;
        let target = prepared.resolved.target.clone();
        let mut reporter = Reporter::new(context.output, format!("{job}: "));
        let mut spec = PruneSpec::new(job, rules);
        spec.drop_interrupted = self.drop_interrupted;
        spec.dry_run = self.dry_run;
        let (report, closed) =
            context.in_session(prepared, &mut reporter, |session, reporter| {
                session.prune(spec, reporter, &context.interrupt)
            })?;
        let fields = json!({
            "job": self.job,
            "dry_run": self.dry_run,
            "report": report,
            "volume": closed.volume,
        });
        let text = table(&report, self, rules.is_empty(), reporter.server_is_low());
        context.finish("prune", Exit::Done, &target, &text, fields)
    }
}

/// `no_rule`: without a rule nothing is removed.
fn table(report: &PruneReport, args: &PruneArgs, no_rule: bool, server_is_low: bool) -> String {
    let (target, dry_run) = (&args.target, args.dry_run);
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
        let what = match (args.drop_interrupted, dry_run) {
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
    if trees > 0 && args.drop_interrupted {
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
pub(super) fn removed(
    snapshots: &str,
    names: u64,
    free_bytes: [u64; 2],
    target: &str,
    server_is_low: bool,
) -> String {
    let freed = free_bytes[1].saturating_sub(free_bytes[0]);
    let mut said = format!(
        "{snapshots} removed ({}); {} more free in the volume\n",
        text::counted(names, "file or folder", "files and folders"),
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
        .map(|reason| word(*reason))
        .collect();
    words.join(", ")
}

fn word(reason: KeepReason) -> &'static str {
    match reason {
        KeepReason::Last => "last",
        KeepReason::Hourly => "hourly",
        KeepReason::Daily => "daily",
        KeepReason::Weekly => "weekly",
        KeepReason::Monthly => "monthly",
        KeepReason::Yearly => "yearly",
        KeepReason::Within => "within",
        KeepReason::Oldest => "the oldest: a rule could keep more than there are",
        KeepReason::LastGood => "the newest complete one",
        KeepReason::Latest => "latest",
        KeepReason::Newest => "the newest one",
        KeepReason::Pinned => "pinned",
        KeepReason::MissingDisk => "the newest copy of a disk that the newest complete one lacks",
        KeepReason::RightContent => {
            "has the last undamaged copy of a file that is damaged in others"
        }
        KeepReason::BeforeChange => "made before an unusual change of the source",
        KeepReason::Unrecorded => "has no record: never touched",
        KeepReason::Future => "dated in the future: not counted",
        _ => "a reason that this version does not know",
    }
}
