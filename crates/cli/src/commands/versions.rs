//! `sprat versions`: lists the versions of a file or folder.

use std::ffi::OsString;

use clap::Args;
use sprat_inside::{Place, VersionsSpec, versions_in_lists};
use sprat_run::inside_text;
use sprat_snapshot::SnapshotChoice;

use super::context::{CommandArgs, Context};
use super::lookup;
use crate::args::ReadTarget;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat versions home www:/etc/fstab
  sprat versions home www:/etc/fstab --json";

#[derive(Debug, Args)]
pub(super) struct VersionsArgs {
    #[command(flatten)]
    target: ReadTarget,
    /// The file or folder, by its path in the source
    #[arg(value_name = "JOB:PATH")]
    what: OsString,
    /// Answer from the lists of changes on this machine, without a connection or a key
    #[arg(long, conflicts_with = "generation")]
    offline: bool,
}

impl CommandArgs for VersionsArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let wanted = context.wanted(&self.what, None)?;
        let (None, Some(path)) = (&wanted.snapshot, &wanted.path) else {
            return Err(
                Failure::usage("`versions` needs a job and a path, and no snapshot")
                    .with_hint("nothing was started. Write JOB:PATH, such as www:/etc/fstab"),
            );
        };
        let place = Place::new(wanted.job.clone(), SnapshotChoice::Latest, Some(path));
        let spec = VersionsSpec { place };
        let answer = lookup::look_or_read(
            context,
            &self.target,
            self.offline,
            |session, reporter| session.versions(spec.clone(), reporter, &context.interrupt),
            |lists, cancel| versions_in_lists(lists, &spec, cancel),
        )?;
        let text = inside_text::versions(&answer.report, !self.offline, &context.shown());
        lookup::print_answer(context, "versions", &text, &answer, 0)
    }
}
