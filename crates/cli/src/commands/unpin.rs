//! `sprat unpin`: lets `prune` and `remove` remove a pinned snapshot again.

use std::ffi::OsString;

use clap::Args;

use super::context::{CommandArgs, Context};
use super::pin;
use crate::args::TARGET_HELP;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Example:
  sprat unpin home www/2026-11-23T13-21-01Z";

#[derive(Debug, Args)]
pub(super) struct UnpinArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// A snapshot's name, the beginning of a name (the newest match), `latest` or `latest-complete`
    #[arg(value_name = "JOB/SNAPSHOT")]
    snapshot: OsString,
}

impl CommandArgs for UnpinArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        pin::change(context, &self.target, &self.snapshot, None)
    }
}
