//! `sprat shrink`: makes a container smaller.

use clap::Args;
use sprat_session::{self as session, Access, text};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "Example:\n  sprat shrink home 200G";

pub(super) const NOTES: &str = "\
Only for a container with btrfs. If the command is interrupted, the container stays usable; run the
same command again to finish.";

#[derive(Debug, Args)]
pub(super) struct ShrinkArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// The new size; all data must fit in it
    #[arg(value_parser = text::parse_size)]
    size: u64,
}

impl CommandArgs for ShrinkArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let prepared = context.prepare(&self.target, Access::ReadWrite)?;
        let target = prepared.resolved.target.clone();
        let shrunk = context.in_own_session(
            prepared,
            |shrunk: &session::Resized| &shrunk.facts,
            |options, secret, reporter| {
                session::shrink(&options, secret, self.size, reporter, &context.interrupt)
            },
        )?;
        super::grow::report(context, "shrink", &target, &shrunk)
    }
}
