//! `sprat trim`: releases unused space to the server.

use clap::Args;
use serde_json::json;
use sprat_session::interrupt::Interrupt;
use sprat_session::{self as session, Access, TrimHow, TrimReport, TrimRoute, text};

use super::context::{CommandArgs, Context, Prepared};
use crate::args::TARGET_HELP;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat trim home
  sprat trim home --rewrite";

pub(super) const NOTES: &str = "\
sprat trim frees unused space by making holes in the container file. On a server it needs an account
with a shell, and `fallocate`. The server then sees how much is used, and where. If the command is
interrupted, nothing is lost: run it again.";

#[derive(Debug, Args)]
pub(super) struct TrimArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Copy the used data to a new file on the server, which replaces the old one; for servers that
    /// cannot make holes
    #[arg(long)]
    rewrite: bool,
    /// With --rewrite: copy through this machine, for servers that cannot copy files; transfers all
    /// used data twice
    #[arg(long, requires = "rewrite")]
    through_client: bool,
}

impl CommandArgs for TrimArgs {
    const NEEDS_ROOT: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let prepared = context.prepare(&self.target, Access::ReadWrite)?;
        let target = prepared.resolved.target.clone();
        let how = match (self.rewrite, self.through_client) {
            (false, _) => TrimHow::Punch,
            (true, false) => TrimHow::Rewrite,
            (true, true) => TrimHow::RewriteThroughClient,
        };
        let report = trim(context, prepared, how, &context.interrupt)?;
        let fields = json!({ "trim": report });
        context.finish("trim", Exit::Done, &target, &render(&report), fields)
    }
}

/// Trims a container.
pub(super) fn trim(
    context: &Context,
    mut prepared: Prepared,
    how: TrimHow,
    interrupt: &Interrupt,
) -> Result<TrimReport, Failure> {
    // It makes room, and its lock needs some.
    prepared.options.may_use_reserve = true;
    let (_, report) = context.in_own_session(
        prepared,
        |(facts, _)| facts,
        |options, secret, reporter| session::trim(options, secret, how, reporter, interrupt),
    )?;
    Ok(report)
}

fn render(report: &TrimReport) -> String {
    let way = match report.route {
        TrimRoute::AgentPunch => "holes made by sprat-agent on the server",
        TrimRoute::LocalPunch => "holes made in the local file",
        TrimRoute::ShellPunch => "holes made with fallocate on the server",
        TrimRoute::Rewrite => "rewritten by the server",
        TrimRoute::RewriteThroughClient => "rewritten through this machine",
        TrimRoute::NotWorthwhile => "nothing to do",
    };
    let given_back = match &report.measure {
        Some(measure) => format!(
            "{} released (measured by {})",
            text::bytes(measure.given_back_bytes),
            measure.by
        ),
        None => match report.kept_bytes {
            Some(kept) => format!(
                "the container now takes at most {} (the size before can't be measured on this server)",
                text::bytes(kept)
            ),
            None => "space released (the amount can't be measured on this server)".to_owned(),
        },
    };
    format!(
        "{given_back}: {way}; {} of the volume unused, in {}\n",
        text::bytes(report.unneeded_bytes),
        text::counted(report.ranges, "range", "ranges")
    )
}
