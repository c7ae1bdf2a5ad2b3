//! `sprat drill`: restores a sample from the server, and compares it.

use clap::Args;
use serde_json::json;
use sprat_run::drill_text;
use sprat_session::Access;
use sprat_session::drill::{self, DrillPlan, Drilled};
use sprat_session::interrupt::Interrupt;

use super::context::{CommandArgs, Context, Prepared};
use super::key::recovery_key;
use crate::args::TARGET_HELP;
use crate::output::Reporter;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat drill home
  sprat drill home --files 500
  sprat drill home --recovery";

pub(super) const NOTES: &str = "\
sprat drill restores a few files into an empty folder, compares them, and deletes them: some of the
biggest, oldest and newest files, and some of an older snapshot. Every byte comes from the server,
none from the cache of this machine. sprat compares the files with the checksums that their backups
or `sprat check --read-data` saved, and with their sources if these are unchanged. Exit code 13
reports a difference.

With --recovery, sprat asks for the recovery key on the sheet, or reads it from --passphrase-file,
and restores as a machine that has lost everything else: with an empty state folder, no cache, and
nothing of the config.";

/// So many files prove a recovery.
const RECOVERED_FILES: u32 = 1;

#[derive(Debug, Args)]
pub(super) struct DrillArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Restore up to N files, and up to 2 MiB for each of them in all
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    files: u32,
    /// Rehearse a recovery: restore with the recovery key, without what this machine knows
    #[arg(long, conflicts_with = "files")]
    recovery: bool,
}

impl CommandArgs for DrillArgs {
    const NEEDS_ROOT: bool = true;
    const NOTES_DAMAGE: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        if self.recovery {
            return recovery(context, &self.target);
        }
        let prepared = context.prepare(&self.target, Access::ReadOnly)?;
        let target = prepared.resolved.target.clone();
        let drilled = drill(context, prepared, Some(self.files), &context.interrupt)?;
        let fields =
            json!({ "drill": drilled.report, "differing_blocks": drilled.differing_blocks });
        let text = drill_text::summary(&target.to_string(), &drilled);
        context.finish("drill", drilled.exit(), &target, &text, fields)
    }
}

/// Restores as a machine that has only the recovery sheet.
fn recovery(context: &Context, target: &str) -> Result<Exit, Failure> {
    let mut resolved = context.resolve(target)?;
    let target = resolved.target.clone();
    let note = |text: &str| context.output.note(text);
    note(&format!(
        "the container is at {target}: compare this with the sheet"
    ));
    let jobs = drill_text::jobs_here(&context.config, &resolved.name);
    if context.global.ssh_command.is_none() {
        // The sheet has no other one.
        resolved.ssh.command = vec!["ssh".into()];
    }
    let key = recovery_key(context)?;
    note(
        "the recovery key has the right form; opening the container with it, and with an empty state folder",
    );
    let settings = context.session_options(&resolved, Access::ReadOnly)?;
    let plan = DrillPlan::new(jobs, Some(RECOVERED_FILES));
    let mut reporter = Reporter::new(context.output, "");
    let fingerprint = context.global.fingerprint.as_deref();
    let drilled = drill::rehearse_recovery(
        settings,
        fingerprint,
        &key.secret(),
        &plan,
        &mut reporter,
        &context.interrupt,
    );
    reporter.clear();
    let drilled = drilled?;
    let shown = drilled.facts.pins.fingerprint();
    note(&format!(
        "the recovery key opened it. Its fingerprint is {shown}: compare this with the sheet"
    ));
    warn_not_saved(context, &drilled);
    let fields = json!({
        "drill": drilled.report,
        "differing_blocks": drilled.differing_blocks,
        "fingerprint": shown,
    });
    let text = drill_text::summary(&format!("{target}, by the recovery sheet alone"), &drilled);
    context.finish("drill", drilled.exit(), &target, &text, fields)
}

fn warn_not_saved(context: &Context, drilled: &Drilled) {
    for reason in &drilled.report.not_saved {
        let what = format!("the result of the drill can't be saved on this machine: {reason}");
        context.output.warning(&what);
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
    warn_not_saved(context, &drilled);
    Ok(drilled)
}
