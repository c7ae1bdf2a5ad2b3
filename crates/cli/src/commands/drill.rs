//! `sprat drill`: restores a sample from the server, and compares it.

use clap::Args;
use serde_json::json;
use sprat_run::drill_text;
use sprat_session::Access;
use sprat_session::drill::{self, DrillPlan, Drilled};
use sprat_session::interrupt::Interrupt;

use super::context::{CommandArgs, Context, Prepared};
use crate::args::TARGET_HELP;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat drill home
  sprat drill home --files 500";

pub(super) const NOTES: &str = "\
sprat drill restores a few files into an empty folder, compares them, and deletes them: some of the
biggest, oldest and newest files, and some of an older snapshot. Every byte comes from the server, none
from the cache of this machine. sprat compares the files with the checksums that their backups or `sprat
check --read-data` saved, and with their sources if these are unchanged. Exit code 13 reports a difference.";

#[derive(Debug, Args)]
pub(super) struct DrillArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Restore up to N files, and up to 2 MiB for each of them in all
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    files: u32,
}

impl CommandArgs for DrillArgs {
    const NEEDS_ROOT: bool = true;
    const NOTES_DAMAGE: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let prepared = context.prepare(&self.target, Access::ReadOnly)?;
        let target = prepared.resolved.target.clone();
        let drilled = drill(context, prepared, Some(self.files), &context.interrupt)?;
        let fields =
            json!({ "drill": drilled.report, "differing_blocks": drilled.differing_blocks });
        let text = drill_text::summary(&target.to_string(), &drilled);
        context.finish("drill", drilled.exit(), &target, &text, fields)
    }
}

/// Restores a sample, compares it, and keeps the result on this machine.
pub(super) fn drill(
    context: &Context,
    prepared: Prepared,
    files: Option<u32>,
    interrupt: &Interrupt,
) -> Result<Drilled, Failure> {
    let jobs = drill_text::jobs_here(&context.config, &prepared.resolved.name);
    let plan = DrillPlan::new(jobs, files);
    let drilled = context.in_own_session(
        prepared,
        |drilled: &Drilled| &drilled.facts,
        |settings, secret, reporter| drill::drill(settings, secret, &plan, reporter, interrupt),
    )?;
    for reason in &drilled.report.not_saved {
        let what = format!("the result of the drill can't be saved on this machine: {reason}");
        context.output.warning(&what);
    }
    Ok(drilled)
}
