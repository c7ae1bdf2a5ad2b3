//! `sprat pin`: keeps a snapshot until it is unpinned.

use std::ffi::{OsStr, OsString};

use clap::Args;
use serde_json::json;
use sprat_session::{Access, text};
use sprat_snapshot::{PinSpec, SnapshotPath, check_pin_reason};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::output::Reporter;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat pin home www/2026-11-23 --reason \"before the move to the new server\"
  sprat snapshots home";

#[derive(Debug, Args)]
pub(super) struct PinArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// A snapshot's name, the beginning of a name (the newest match), `latest` or `latest-complete`
    #[arg(value_name = "JOB/SNAPSHOT")]
    snapshot: OsString,
    /// Why the snapshot is kept, in one line; `sprat snapshots` shows the reason
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: String,
}

fn reason(text: &str) -> Result<String, String> {
    let text = text.trim();
    check_pin_reason(text).map_err(|what| format!("the reason {what}"))?;
    Ok(text.to_owned())
}

impl CommandArgs for PinArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        change(context, &self.target, &self.snapshot, Some(&self.reason))
    }
}

/// Pins the snapshot with a reason, or without one unpins it.
pub(super) fn change(
    context: &Context,
    target: &str,
    snapshot: &OsStr,
    reason: Option<&String>,
) -> Result<Exit, Failure> {
    let (job, snapshot) = SnapshotPath::parse_snapshot(snapshot).map_err(|what| {
        Failure::usage(what).with_hint("nothing was started. Write JOB/SNAPSHOT")
    })?;
    let mut prepared = context.prepare(target, Access::ReadWrite)?;
    prepared.options.may_use_reserve = true;
    let target = prepared.resolved.target.clone();
    let mut reporter = Reporter::new(context.output, "");
    let spec = PinSpec {
        job: job.clone(),
        snapshot,
        reason: reason.cloned(),
    };
    let (report, closed) = context.in_session(prepared, &mut reporter, |session, reporter| {
        session.pin(spec, reporter, &context.interrupt)
    })?;
    let before = report.before.as_deref();
    let name = format!("{}/{}", text::harmless(job.as_str()), report.name);
    let text = match (reason, before) {
        (Some(_), None) => format!("{name} is pinned\n"),
        (Some(_), Some("")) => {
            format!("{name} is pinned; before, it was pinned without a reason\n")
        }
        (Some(_), Some(before)) => {
            format!(
                "{name} is pinned; the former reason was: {}\n",
                text::harmless(before)
            )
        }
        (None, Some(_)) => format!("{name} is no longer pinned\n"),
        (None, None) => format!("{name} was not pinned\n"),
    };
    let fields = json!({
        "job": job,
        "snapshot": report.name,
        "pin": reason,
        "pin_before": before,
        "volume": closed.volume,
    });
    let command = if reason.is_some() { "pin" } else { "unpin" };
    context.finish(command, context.exit(Exit::Done), &target, &text, fields)
}
