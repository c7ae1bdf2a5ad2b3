//! `sprat analyze`: shows what snapshots cost, and what a removal would free.

use std::ffi::OsString;

use clap::Args;
use sprat_inside::AnalyzeSpec;
use sprat_run::analyze_text;
use sprat_snapshot::JobName;

use super::context::{CommandArgs, Context};
use super::lookup;
use crate::args::TARGET_HELP;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat analyze home
  sprat analyze home --job www
  sprat analyze home www/2026-11-23 www/2026-11-24";

pub(super) const NOTES: &str = "\
SIZE is what a snapshot takes, NEW what its run added, and ONLY HERE what its removal alone would free: files
that no other snapshot has. Two snapshots often share what neither has alone. So name all that you
want to remove: sprat shows what that frees together. It reads all folders, and no content.";

/// Paths of each list in JSON.
const PATHS_MAX: usize = 100;

#[derive(Debug, Args)]
pub(super) struct AnalyzeArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Show what the removal of these together would free
    #[arg(value_name = "JOB/SNAPSHOT")]
    snapshots: Vec<OsString>,
    /// Only the snapshots of this job, and of those that are named
    #[arg(long)]
    job: Option<String>,
}

impl CommandArgs for AnalyzeArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let refused = |what: String| Failure::usage(what).with_hint("nothing was started");
        let job = self.job.as_deref().map(JobName::new).transpose();
        let mut spec = AnalyzeSpec {
            job: job.map_err(|error| refused(error.to_string()))?,
            removed: Vec::new(),
            paths_max: PATHS_MAX,
        };
        for word in &self.snapshots {
            let wanted = context.wanted(word, None)?;
            let (Some(snapshot), None) = (wanted.snapshot, wanted.path) else {
                return Err(refused(format!("{word:?} is not JOB/SNAPSHOT")));
            };
            spec.removed.push((wanted.job, snapshot));
        }
        let (target, report) = lookup::look(context, &self.target, |session, reporter| {
            session.analyze(spec, reporter, &context.interrupt)
        })?;
        lookup::print(
            context,
            "analyze",
            &target,
            &analyze_text::costs(&report),
            &report,
            0,
        )
    }
}
