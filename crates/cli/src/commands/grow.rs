//! `sprat grow`: enlarges a container.

use clap::Args;
use serde_json::json;
use sprat_session::{self as session, Access, text};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "Example:\n  sprat grow home 8T";

pub(super) const NOTES: &str = "\
If the command is interrupted, the container stays usable; run the same command again to finish.
sprat grow needs CAP_SYS_RESOURCE, which root has outside of Docker and similar environments.";

#[derive(Debug, Args)]
pub(super) struct GrowArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// The new size; on the server the file takes only the space of the data in it
    #[arg(value_parser = text::parse_size)]
    size: u64,
}

impl CommandArgs for GrowArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let prepared = context.prepare(&self.target, Access::ReadWrite)?;
        let target = prepared.resolved.target.clone();
        let grown = context.in_own_session(
            prepared,
            |grown: &session::Resized| &grown.facts,
            |options, secret, reporter| {
                session::grow(&options, secret, self.size, reporter, &context.interrupt)
            },
        )?;
        report(context, "grow", &target, &grown)
    }
}

/// Prints the new size.
pub(super) fn report(
    context: &Context,
    command: &str,
    target: &session::address::Target,
    resized: &session::Resized,
) -> Result<Exit, Failure> {
    let (facts, closed) = (&resized.facts, &resized.closed);
    let text = format!(
        "{target} now has {}; {} sent\n",
        text::bytes(facts.file_bytes),
        text::bytes(closed.volume.written_bytes)
    );
    let fields = json!({
        "file_bytes": facts.file_bytes,
        "volume_bytes": facts.volume_bytes,
        "durable": closed.durable,
        "volume": closed.volume,
    });
    context.finish(command, Exit::Done, target, &text, fields)
}
