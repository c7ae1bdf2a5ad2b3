//! `sprat remove`: removes the snapshots that are named.

use std::ffi::OsString;

use clap::Args;
use serde_json::json;
use sprat_run::config::Job;
use sprat_run::prune_text::{removed, why_kept};
use sprat_run::runner::old_content;
use sprat_session::{Access, text};
use sprat_snapshot::{KeepReason, Removal, RemoveReport, RemoveSpec, SnapshotPath};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::output::Reporter;
use crate::{Exit, Failure, terminal};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat remove home www/2026-11-23T13-21-01Z
  sprat remove home www/2026-11-23T13 www/2026-11-24T13 --yes";

pub(super) const NOTES: &str = "\
A pinned snapshot is never removed. The newest complete snapshot of a job is removed only with
--allow-newest. Without --yes, sprat lists what would be lost, and asks. With --yes, it removes the
last undamaged copy of a file, and the newest copy of a missing disk or source, only with
--allow-last-copy.

Everything is checked before the first snapshot is removed. Other snapshots do not change.";

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// A snapshot's name, or a beginning that only this snapshot of the job has
    #[arg(value_name = "JOB/SNAPSHOT", required = true)]
    snapshots: Vec<OsString>,
    /// Do not ask
    #[arg(long)]
    yes: bool,
    /// Also remove the newest complete snapshot of a job
    #[arg(long)]
    allow_newest: bool,
    /// With --yes: also remove the last undamaged copy of a file, and the newest copy of a missing disk
    /// or source
    #[arg(long)]
    allow_last_copy: bool,
}

impl CommandArgs for RemoveArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let parse = |text| {
            SnapshotPath::parse_snapshot(text).map_err(|what| {
                Failure::usage(what).with_hint("nothing was started. Write JOB/SNAPSHOT")
            })
        };
        let snapshots: Result<Vec<_>, Failure> =
            self.snapshots.iter().map(|text| parse(text)).collect();
        let mut spec = RemoveSpec {
            allow_newest: self.allow_newest,
            // A person is asked.
            allow_last_copy: self.allow_last_copy || !self.yes,
            ..RemoveSpec::new(snapshots?)
        };
        if !self.yes && !terminal::is_there() {
            return Err(Failure::usage("there is no terminal to ask on").with_hint(
                "nothing was started. Add --yes to remove the snapshots without a question",
            ));
        }
        let mut prepared = context.prepare(&self.target, Access::ReadWrite)?;
        prepared.options.may_use_reserve = true;
        let target = prepared.resolved.target.clone();
        let here = |job: &&Job| job.is_in(&prepared.resolved.name);
        let jobs = context.config.jobs.iter().filter(here);
        spec.sources = jobs
            .map(|job| (job.name.clone(), job.kept_sources()))
            .collect();
        spec.old_content = old_content(
            &context.config,
            &context.state_dir(),
            &prepared.resolved.name,
        );
        let mut reporter = Reporter::new(context.output, "");
        let (report, closed) =
            context.in_session(prepared, &mut reporter, |session, reporter| {
                let plan = RemoveSpec {
                    dry_run: true,
                    ..spec.clone()
                };
                let plan = session.remove(plan, reporter, &context.interrupt)?;
                reporter.clear();
                self.confirm(context, &plan)?;
                session.remove(spec, reporter, &context.interrupt)
            })?;
        let fields = json!({ "report": report, "volume": closed.volume });
        let snapshots = text::counted(report.snapshots.len() as u64, "snapshot", "snapshots");
        let text = removed(
            &snapshots,
            report.names_removed,
            report.free_bytes,
            &self.target,
            reporter.server_is_low(),
        );
        context.finish("remove", context.exit(Exit::Done), &target, &text, fields)
    }
}

impl RemoveArgs {
    /// Says what will be removed, and asks.
    fn confirm(&self, context: &Context, plan: &RemoveReport) -> Result<(), Failure> {
        let list = table(&plan.snapshots);
        // Each line by itself: a line end in a message is escaped.
        for line in ["to be removed:"].into_iter().chain(list.lines()) {
            match self.yes {
                true => context.output.note(line),
                false => context.output.asked_about(line),
            }
        }
        if self.yes {
            return Ok(());
        }
        let answer = terminal::ask_openly("Type yes to remove: ", &context.interrupt)?;
        if answer == "yes" {
            return Ok(());
        }
        Err(
            Failure::failed("nothing was removed: the answer was not `yes`")
                .with_hint("to remove the snapshots, run the command again"),
        )
    }
}

fn table(snapshots: &[Removal]) -> String {
    let title = ["SNAPSHOT", "FILES", "SIZE", "NOTE"];
    let mut rows = vec![title.map(str::to_owned).to_vec()];
    for one in snapshots {
        let number = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            format!(
                "{}/{}",
                text::harmless_within(one.job.as_str(), 40),
                one.name
            ),
            number(one.files.map(text::count)),
            number(one.bytes_total.map(text::bytes)),
            notes(one),
        ]);
    }
    text::table(&rows, &[1, 2])
}

/// What is lost with it.
fn notes(one: &Removal) -> String {
    let mut notes = Vec::new();
    if one.begun_before {
        notes.push("its removal was interrupted");
    }
    for reason in &one.needed {
        notes.extend(match reason {
            KeepReason::LastGood | KeepReason::RightContent | KeepReason::OldContent => {
                Some(why_kept(*reason))
            }
            KeepReason::Latest => Some("the latest one"),
            KeepReason::MissingDisk => Some("has the newest copy of a disk or source"),
            KeepReason::Unrecorded => Some("has no record"),
            _ => None,
        });
    }
    notes.join(", ")
}
