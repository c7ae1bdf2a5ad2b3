//! `sprat find`: finds files in all snapshots.

use clap::Args;
use sprat_inside::{FindSpec, find_in_lists};
use sprat_run::inside_text;
use sprat_snapshot::JobName;

use super::context::{CommandArgs, Context};
use super::lookup;
use crate::args::ReadTarget;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat find home fstab
  sprat find home '*.odt' --job www
  sprat find home 'thesis*' --offline
  sprat find home '/home/ann/**/thesis*' --ignore-case";

pub(super) const NOTES: &str = "\
A pattern without a slash is compared with the last name of each path; one with a slash, with the
whole path. * and ? match no slash, ** matches any folders, [abc] one of these, {a,b} either. Put a
pattern in quotes: the shell would expand it. A pattern that begins with a folder, such as
'/etc/**', is faster. Put -- before a pattern that begins with a dash: sprat find home -- '-x*'";

#[derive(Debug, Args)]
pub(super) struct FindArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// Names or paths to find
    #[arg(value_name = "PATTERN")]
    pattern: String,
    /// Only in this job's snapshots
    #[arg(long)]
    job: Option<String>,
    /// Capital and small letters are the same
    #[arg(long, short = 'i')]
    ignore_case: bool,
    /// Print only JOB:PATH, as raw bytes, each with a zero byte at its end
    #[arg(long, short = '0')]
    null: bool,
    /// Answer from the lists of changes on this machine, without a connection or a key
    #[arg(long, conflicts_with = "generation")]
    offline: bool,
}

impl CommandArgs for FindArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let refused = |what: String| Failure::usage(what).with_hint("nothing was started");
        let job = self.job.as_deref().map(JobName::new).transpose();
        let spec = FindSpec {
            job: job.map_err(|error| refused(error.to_string()))?,
            pattern: self.pattern.clone(),
            ignore_case: self.ignore_case,
        };
        lookup::check_pattern(&self.pattern, self.ignore_case)?;
        let answer = lookup::look_or_read(
            context,
            &self.target,
            self.offline,
            |session, reporter| session.find(spec.clone(), reporter, &context.interrupt),
            |lists, cancel| find_in_lists(lists, &spec, cancel),
        )?;
        let report = &answer.report;
        let text = match self.null {
            true => lookup::raw(
                report
                    .paths
                    .iter()
                    .map(|one| format!("{}:{}", one.job, one.path)),
            ),
            false => inside_text::found(report).into_bytes(),
        };
        lookup::print_answer(context, "find", &text, &answer, report.more)
    }
}
