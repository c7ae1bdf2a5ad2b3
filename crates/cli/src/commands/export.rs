//! `sprat export`: exports snapshots to a folder.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use sprat_run::config::Job;
use sprat_run::export_text;
use sprat_run::runner::old_content;
use sprat_session::Access;
use sprat_snapshot::{ExportSpec, RemoveSpec, SnapshotChoice, SnapshotPath};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::output::{Reporter, path_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat export home www/2026-11-23T13-21-01Z /media/archive
  sprat export home www/2025-11 www/2025-12 /media/archive --dry-run
  sprat export home www /media/archive --older-than 52w --move";

pub(super) const NOTES: &str = "\
A snapshot becomes the folder DIR/JOB/SNAPSHOT. It is not encrypted. Files that exported snapshots
share are hard links. Each snapshot is compared with the original before it gets its name. To
continue after an interruption, run the same command again.

--move then removes the snapshots from the container, as `sprat remove` does: it refuses pinned ones
and the newest complete one of a job.";

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// A snapshot's name, or a beginning that only this snapshot of the job has. With --older-than: a job
    #[arg(value_name = "JOB[/SNAPSHOT]", required = true)]
    what: Vec<OsString>,
    /// The folder. It must exist
    #[arg(value_name = "DIR", required = true)]
    dir: PathBuf,
    /// Export the finished snapshots of the jobs that began before TIME: 2026-11-28 14:00, yesterday, 52w
    #[arg(long, value_name = "TIME")]
    older_than: Option<String>,
    /// Then remove the snapshots from the container
    #[arg(long = "move")]
    moves: bool,
    /// Show only what would be done
    #[arg(long)]
    dry_run: bool,
}

impl CommandArgs for ExportArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let mut spec = self.spec(context)?;
        let access = match self.moves && !self.dry_run {
            true => Access::ReadWrite,
            false => Access::ReadOnly,
        };
        let prepared = context.prepare(&self.target, access)?;
        let target = prepared.resolved.target.clone();
        let here = |job: &&Job| job.is_in(&prepared.resolved.name);
        let jobs = context.config.jobs.iter().filter(here);
        let sources = jobs.map(|job| (job.name.clone(), job.kept_sources()));
        let mut remove = RemoveSpec {
            sources: sources.collect(),
            old_content: old_content(
                &context.config,
                &context.state_dir(),
                &prepared.resolved.name,
            ),
            dry_run: true,
            ..RemoveSpec::new(Vec::new())
        };
        let mut reporter = Reporter::new(context.output, "");
        let interrupt = &context.interrupt;
        let ((report, removed), closed) =
            context.in_session(prepared, &mut reporter, |session, reporter| {
                spec.dry_run = true;
                let plan = session.export(spec.clone(), reporter, interrupt)?;
                let moves = self.moves && !plan.snapshots.is_empty();
                if moves {
                    let all = plan.snapshots.iter();
                    let named = all.map(|one| {
                        let name = one.name.to_string();
                        (one.job.clone(), SnapshotChoice::Named(name))
                    });
                    remove.snapshots = named.collect();
                    // What may not be removed is not exported either.
                    let plan = session.remove(remove.clone(), reporter, interrupt);
                    plan.map_err(|failure| {
                        failure.with_hint(
                            "nothing was exported, and nothing removed. Without --move, sprat exports it all the same",
                        )
                    })?;
                    // Exactly these, whatever another session makes meanwhile.
                    (spec.snapshots, spec.older) = (remove.snapshots.clone(), Vec::new());
                }
                if self.dry_run {
                    return Ok((plan, None));
                }
                spec.dry_run = false;
                let report = session.export(spec.clone(), reporter, interrupt)?;
                reporter.clear();
                if !moves {
                    return Ok((report, None));
                }
                remove.dry_run = false;
                let removed = session.remove(remove.clone(), reporter, interrupt)?;
                Ok((report, Some(removed)))
            })?;
        let text = export_text::summary(&report, &spec.to, self.dry_run, removed.is_some());
        let fields = json!({
            "to": path_json(&spec.to),
            "dry_run": self.dry_run,
            "snapshots": report.snapshots,
            "removed": removed.is_some(),
            "volume": closed.volume,
        });
        let mut exported = report.snapshots.iter();
        let exit = match exported.all(|one| one.damaged.is_empty()) {
            true => context.exit(Exit::Done),
            false => Exit::Damaged,
        };
        context.finish("export", exit, &target, &text, fields)
    }
}

impl ExportArgs {
    fn spec(&self, context: &Context) -> Result<ExportSpec, Failure> {
        let refused = |what: String| Failure::usage(what).with_hint("nothing was started");
        let to = context.environment.absolute(&self.dir);
        if !to.is_dir() {
            let failure = Failure::usage(format!("{} is not a folder", to.display()));
            return Err(failure.with_hint(
                "nothing was started. Create the folder first. sprat doesn't, because the disk that \
                 belongs there may not be mounted",
            ));
        }
        let mut spec = ExportSpec {
            snapshots: Vec::new(),
            older: Vec::new(),
            to,
            rsync: PathBuf::from("rsync"),
            dry_run: false,
            compare_all: self.moves,
            suspects: None,
        };
        let before = self
            .older_than
            .as_deref()
            .map(|time| context.moment(time, "--older-than"));
        let before = before.transpose()?;
        for word in &self.what {
            let found = SnapshotPath::parse(word).map_err(refused)?;
            match (found.snapshot, found.path, before) {
                (Some(snapshot), None, _) => spec.snapshots.push((found.job, snapshot)),
                (None, None, Some(before)) => spec.older.push((found.job, before)),
                _ => {
                    return Err(refused(format!(
                        "{word:?} is not JOB/SNAPSHOT. A job alone needs --older-than"
                    )));
                }
            }
        }
        Ok(spec)
    }
}
