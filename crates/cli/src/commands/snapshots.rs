//! `sprat snapshots`: lists a container's snapshots.

use clap::Args;
use serde_json::json;
use sprat_run::snapshots_text;
use sprat_snapshot::{EntryKind, SnapshotEntry};

use super::context::{CommandArgs, Context};
use crate::args::ReadTarget;
use crate::output::{Reporter, result_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str =
    "Examples:\n  sprat snapshots home\n  sprat snapshots home --job www --json";

#[derive(Debug, Args)]
pub(super) struct SnapshotsArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// List only this job's snapshots
    #[arg(long)]
    job: Option<String>,
}

impl CommandArgs for SnapshotsArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let prepared = context.prepare_reading(&self.target)?;
        let target = prepared.resolved.target.to_string();
        let mut reporter = Reporter::new(context.output, "");
        let (mut entries, _) =
            context.in_session(prepared, &mut reporter, |session, reporter| {
                session.snapshots(reporter, &context.interrupt)
            })?;
        if let Some(job) = &self.job {
            if !entries.iter().any(|entry| entry.job == *job) {
                return Err(no_such_job(job, &entries));
            }
            entries.retain(|entry| entry.job == *job);
        }
        entries.retain(|entry| entry.kind != EntryKind::Foreign);
        entries.sort_by(|a, b| (&a.job, a.name, &a.folder).cmp(&(&b.job, b.name, &b.folder)));
        let fields = json!({ "target": target, "snapshots": entries });
        let json = result_json("snapshots", context.exit(Exit::Done), fields);
        context
            .output
            .listing(&snapshots_text::table(&entries), &json)?;
        Ok(Exit::Done)
    }
}

fn no_such_job(job: &str, entries: &[SnapshotEntry]) -> Failure {
    let failure = Failure::failed(format!("there is no job {job:?} in this container"));
    let mut jobs: Vec<&str> = entries.iter().map(|entry| entry.job.as_str()).collect();
    jobs.dedup();
    if jobs.is_empty() {
        return failure.with_hint("the container has no snapshots yet");
    }
    failure.with_hint(format!("the container has these jobs: {}", jobs.join(", ")))
}
