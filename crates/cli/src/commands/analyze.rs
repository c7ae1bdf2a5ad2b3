//! `sprat analyze`: shows what snapshots cost, and what a removal would free.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use jiff::Timestamp;
use sprat_inside::{AnalyzeReport, AnalyzeSpec};
use sprat_run::recovery_sheet::{create, write};
use sprat_run::watch::full_on;
use sprat_run::{analyze_page, analyze_text};
use sprat_session::status::ContainerStatus;
use sprat_snapshot::JobName;

use super::context::{CommandArgs, Context};
use super::lookup;
use crate::args::ReadTarget;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat analyze home
  sprat analyze home --job www
  sprat analyze home www/2026-11-23 www/2026-11-24
  sprat analyze home --html cost.html";

pub(super) const NOTES: &str = "\
SIZE is what a snapshot takes, NEW what its run added, and ONLY HERE what its removal alone would
free: files that no other snapshot has. Two snapshots often share what neither has alone. So name
all that you want to remove: sprat shows what that frees together. It reads no content, and
no folders of snapshots that it knows from the last time.";

/// Paths of each list in JSON.
const PATHS_MAX: usize = 100;

#[derive(Debug, Args)]
pub(super) struct AnalyzeArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// Show what the removal of these together would free
    #[arg(value_name = "JOB/SNAPSHOT")]
    snapshots: Vec<OsString>,
    /// Only the snapshots of this job, and of those that are named
    #[arg(long)]
    job: Option<String>,
    /// Also write a page for a browser to this new file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl AnalyzeArgs {
    /// The target, what was found in it, and when it is full.
    fn find(
        &self,
        context: &Context,
        spec: AnalyzeSpec,
    ) -> Result<(String, AnalyzeReport, Option<Timestamp>), Failure> {
        let prepared = context.prepare_reading(&self.target)?;
        let target = prepared.resolved.target.clone();
        let (shown, report) = lookup::look_in(context, prepared, |session, reporter| {
            session.analyze(spec, reporter, &context.interrupt)
        })?;
        let status = ContainerStatus::read(&context.state_dir(), &target, Vec::new(), None);
        let known = status.known();
        let full = known.and_then(|known| full_on(&known.history, Timestamp::now()));
        Ok((shown, report, full))
    }
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
            kept: None,
        };
        for word in &self.snapshots {
            let wanted = context.wanted(word, None)?;
            let (Some(snapshot), None) = (wanted.snapshot, wanted.path) else {
                return Err(refused(format!("{word:?} is not JOB/SNAPSHOT")));
            };
            spec.removed.push((wanted.job, snapshot));
        }
        let page = self.html.as_ref().map(|path| {
            let path = context.environment.absolute(path);
            create(&path).map(|file| (file, path))
        });
        let page = page.transpose()?;
        let found = self.find(context, spec).inspect_err(|_| {
            if let Some((_, path)) = &page {
                let _ = std::fs::remove_file(path);
            }
        });
        let (target, report, full) = found?;
        // The same day as in `sprat status`.
        let zone = context.shown().zone;
        let day = full.map(|full| full.to_zoned_datetime(zone).date());
        if let Some((file, path)) = &page {
            write(file, path, &analyze_page::page(&report, &target, day))?;
        }
        let mut fields = lookup::fields(&report)?;
        fields["full_on"] = full.map(|full| full.to_string()).into();
        let text = analyze_text::costs(&report, day);
        lookup::print(context, "analyze", &target, &text, &fields, 0)
    }
}
