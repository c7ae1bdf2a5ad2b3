//! `sprat trim`: releases unused space to the server.

use clap::Args;
use serde_json::json;
use sprat_session::{self as session, Access, TrimHow, TrimReport, TrimRoute, text};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat trim home
  sprat trim home --rewrite";

pub(super) const NOTES: &str = "\
Makes holes in the container file where its file system uses nothing: directly in a local
folder, with `fallocate` if the account has a shell. The server then sees how much is used, and
where. An interruption loses nothing: run it again.";

#[derive(Debug, Args)]
pub(super) struct TrimArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Rewrite the container in a new file on the server, for servers that cannot make holes
    #[arg(long)]
    rewrite: bool,
    /// Transfer all used data twice for that, for servers that cannot copy by themselves
    #[arg(long, requires = "rewrite")]
    through_client: bool,
}

impl CommandArgs for TrimArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let mut prepared = context.prepare(&self.target, Access::ReadWrite)?;
        // It makes room, and its lock needs some.
        prepared.options.may_use_reserve = true;
        let target = prepared.resolved.target.clone();
        let how = match (self.rewrite, self.through_client) {
            (false, _) => TrimHow::Punch,
            (true, false) => TrimHow::Rewrite,
            (true, true) => TrimHow::RewriteThroughClient,
        };
        let (_, report) = context.in_own_session(
            prepared,
            |(facts, _)| facts,
            |options, secret, reporter| {
                session::trim(options, secret, how, reporter, &context.interrupt)
            },
        )?;
        let fields = json!({ "trim": report });
        context.finish("trim", Exit::Done, &target, &render(&report), fields)
    }
}

fn render(report: &TrimReport) -> String {
    let way = match report.route {
        TrimRoute::LocalPunch => "holes made in the local file",
        TrimRoute::ShellPunch => "holes made with fallocate on the server",
        TrimRoute::Rewrite => "rewritten by the server",
        TrimRoute::RewriteThroughClient => "rewritten through this machine",
    };
    let given_back = match &report.measure {
        Some(measure) => format!(
            "{} given back (measured by {})",
            text::bytes(measure.given_back_bytes),
            measure.by
        ),
        None => match report.kept_bytes {
            Some(kept) => format!(
                "the container now takes {} at most (how much it took before can't be measured there)",
                text::bytes(kept)
            ),
            None => "space given back (how much can't be measured there)".to_owned(),
        },
    };
    format!(
        "{given_back}: {way}; {} of the volume unused, in {}\n",
        text::bytes(report.unneeded_bytes),
        text::counted(report.ranges, "range", "ranges")
    )
}
