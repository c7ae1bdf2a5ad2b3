//! `sprat diff`: compares two snapshots, or one and its source.

use std::ffi::OsString;

use clap::Args;
use sprat_inside::{DiffReport, DiffSpec, Place, SourceDiffSpec, diff_in_lists};
use sprat_run::copy_name::CopyName;
use sprat_run::inside_text;
use sprat_run::runner::CopyWork;
use sprat_session::{preview, text};

use super::context::{CommandArgs, Context};
use super::lookup::{self, Answer};
use crate::args::ReadTarget;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat diff home www
  sprat diff home www/2026-11-23 www/2026-11-28
  sprat diff home www/2026-11-23:/etc www/latest
  sprat diff home www:/etc --source";

pub(super) const NOTES: &str = "\
With one WHAT, it is compared with the snapshot before it: that shows what the backup changed. A
path in the first WHAT applies to the second, unless that has one. Files of equal size and time are
equal, as they are for rsync. A path that was renamed is shown as gone and as new. --offline
compares a snapshot with the one before it only.";

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// What to compare. SNAPSHOT is a name, the beginning of a name (the newest match), `latest` or
    /// `latest-complete`; the default is the latest snapshot. PATH is a path in the source
    #[arg(value_name = "JOB[/SNAPSHOT][:PATH]")]
    what: OsString,
    /// What to compare it with: the newer one
    #[arg(value_name = "JOB[/SNAPSHOT][:PATH]")]
    with: Option<OsString>,
    /// Compare with the files of this machine as they are now: what the next backup would change. The job
    /// must be in the config
    #[arg(long, conflicts_with = "with")]
    source: bool,
    /// Answer from the lists of changes on this machine, without a connection or a key
    #[arg(long, conflicts_with_all = ["generation", "source"])]
    offline: bool,
}

impl CommandArgs for DiffArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let first = lookup::place(context, &self.what, None)?;
        if self.source {
            let (target, report) = self.with_source(context, first)?;
            let as_of = None;
            return print(
                context,
                &Answer {
                    target,
                    report,
                    as_of,
                },
            );
        }
        let spec = match &self.with {
            None => DiffSpec {
                before: None,
                after: first,
            },
            Some(with) => {
                let with = context.wanted(with, None)?;
                let path = with.path.unwrap_or_else(|| first.path());
                let snapshot = with.snapshot.unwrap_or_default();
                DiffSpec {
                    before: Some(first),
                    after: Place::new(with.job, snapshot, Some(&path)),
                }
            }
        };
        let answer = lookup::look_or_read(
            context,
            &self.target,
            self.offline,
            |session, reporter| session.diff(spec.clone(), reporter, &context.interrupt),
            |lists, cancel| diff_in_lists(lists, &spec, cancel),
        )?;
        print(context, &answer)
    }
}

impl DiffArgs {
    /// Lists what a backup would copy now, and then compares.
    fn with_source(
        &self,
        context: &Context,
        place: Place,
    ) -> Result<(String, DiffReport), Failure> {
        let prepared = context.prepare_reading(&self.target)?;
        let name = CopyName::new(place.job.as_str(), &*prepared.resolved.name);
        let copies = context.config.copies_of_all(&[name.to_string()])?;
        let spec = copies.first().map(|copy| CopyWork::of(*copy).spec);
        let spec = spec.ok_or_else(|| Failure::usage(format!("{name} is not in the config")))?;
        let preview = preview(&prepared.options, spec, true, &context.interrupt)?;
        if preview.unread.count > 0 {
            context.output.warning(&format!(
                "{} of the source can't be read, and are not compared",
                text::counted(preview.unread.count, "file", "files")
            ));
        }
        let paths = preview.paths.unwrap_or_default();
        lookup::look_in(context, prepared, |session, reporter| {
            let spec = SourceDiffSpec { place };
            session.diff_source(spec, &paths, reporter, &context.interrupt)
        })
    }
}

fn print(context: &Context, answer: &Answer<DiffReport>) -> Result<Exit, Failure> {
    let report = &answer.report;
    for side in [&report.before, &report.after] {
        if let (Some(snapshot), Some(kind)) = (&side.snapshot, side.kind) {
            lookup::note_kind(context, snapshot, kind);
        }
    }
    let text = inside_text::differences(report);
    lookup::print_answer(context, "diff", &text, answer, report.more)
}
