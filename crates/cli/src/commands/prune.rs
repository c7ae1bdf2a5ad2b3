//! `sprat prune`: removes the snapshots of a job that no retention rule keeps.

use std::time::Duration;

use clap::Args;
use serde_json::json;
use sprat_run::config::{self, Container};
use sprat_run::copy_name::CopyName;
use sprat_run::copy_state::copy_file;
use sprat_run::prune_text::{Asked, table};
use sprat_session::state::identity;
use sprat_session::{Access, IdentityPolicy, text};
use sprat_snapshot::{KeepCount, KeepPolicy, KeepRules, PruneSpec};

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
The rules are the --keep options, or else those of the config. Snapshots that no rule keeps are
removed. --drop-interrupted alone removes no finished snapshot.

Hours are UTC hours. Days begin at midnight in the time zone of the config. If fewer than N hours or
days have a snapshot, the rule also keeps the oldest one. The newest snapshot, the newest complete
one and pinned snapshots are always kept.";

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

/// Lets the prune keep what the config and `sprat run` keep of the job in the container of this name or UUID, however
/// its location is spelled. A copy of the container has that UUID, too: it has the same snapshots.
fn keep_more(context: &Context, spec: &mut PruneSpec, name: &str, uuid: &str) {
    let state_dir = context.state_dir();
    let Ok(job) = context.config.job(spec.job.as_str()) else {
        return;
    };
    let has_uuid = |container: &Container| {
        match identity::policy(&state_dir, &container.target, None) {
            Ok(IdentityPolicy::Known(pins)) => pins.uuid == uuid,
            Ok(_) => false,
            // It may be this one.
            Err(_) => true,
        }
    };
    let is_meant = |it: &&Container| job.is_in(&it.name) && (it.name == name || has_uuid(it));
    for container in context.config.containers.iter().filter(is_meant) {
        spec.sources = Some(job.kept_sources());
        let copy = CopyName::new(job.name.as_str(), &*container.name);
        let state = copy_file(&state_dir, &copy).read();
        spec.old_content.extend(state.old_content());
        spec.changed_at = spec.changed_at.max(state.kept_before());
    }
}

impl CommandArgs for PruneArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let job = config::job_name(&self.job).map_err(Failure::usage)?;
        let resolved = context.resolve(&self.target)?;
        let in_config = context
            .config
            .jobs
            .iter()
            .find(|known| known.name == job && known.is_in(&resolved.config_name));
        // Without a rule here, those of the config count.
        let configured = in_config.and_then(|job| job.keep);
        let own = self
            .given()
            .or(configured.filter(|_| !self.drop_interrupted));
        let rules = own.unwrap_or_default();
        if rules.is_empty() && !self.drop_interrupted {
            return Err(Failure::usage("no retention rule given").with_hint(
                "nothing was started. Give at least one of --keep-last, --keep-hourly, --keep-daily, \
                 --keep-weekly, --keep-monthly, --keep-yearly and --keep-within, or write keep_ settings \
                 into the config; --dry-run shows what they do. To remove only the partial snapshots of \
                 interrupted runs, give --drop-interrupted alone",
            ));
        }
        let access = match self.dry_run {
            true => Access::ReadOnly,
            false => Access::ReadWrite,
        };
        let copy = in_config.map(|job| CopyName::new(job.name.as_str(), &*resolved.config_name));
        let mut prepared = context.prepare_resolved(resolved, access)?;
        prepared.options.may_use_reserve = true;
        let target = prepared.resolved.target.clone();
        let mut reporter = Reporter::new(context.output, format!("{job}: "));
        let mut spec = PruneSpec::new(job, rules);
        spec.time_zone.clone_from(&context.config.time_zone);
        spec.drop_interrupted = self.drop_interrupted;
        spec.dry_run = self.dry_run;
        let name = prepared.resolved.name.clone();
        let (report, closed) =
            context.in_session(prepared, &mut reporter, |session, reporter| {
                keep_more(context, &mut spec, &name, &session.facts().uuid);
                session.prune(spec, reporter, &context.interrupt)
            })?;
        if let Some(copy) = copy.filter(|_| !self.dry_run && !rules.is_empty()) {
            let time_zone = context.config.time_zone.clone();
            let policy = KeepPolicy { rules, time_zone };
            copy_file(&context.state_dir(), &copy).change(|state| state.pruned_by_hand(policy));
        }
        let fields = json!({
            "job": self.job,
            "dry_run": self.dry_run,
            "report": report,
            "volume": closed.volume,
        });
        let asked = Asked {
            target: &self.target,
            dry_run: self.dry_run,
            drop_interrupted: self.drop_interrupted,
            no_rule: rules.is_empty(),
            server_is_low: reporter.server_is_low(),
        };
        let text = table(&report, &asked);
        context.finish("prune", Exit::Done, &target, &text, fields)
    }
}
