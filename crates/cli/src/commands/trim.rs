//! `sprat trim`: gives space back to the server.

use serde_json::json;
use sprat_session as session;
use sprat_session::{Access, TrimHow, TrimReport, TrimRoute, text};

use super::context::Context;
use crate::args::TrimArgs;
use crate::output::{Reporter, exit_json};
use crate::{Exit, Failure};

pub(super) fn run(context: &Context, args: &TrimArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let secret = context.secret(&resolved)?;
    let mut options = context.session_options(&resolved, Access::ReadWrite)?;
    // It makes room, and its lock needs some.
    options.may_use_reserve = true;
    let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
    let how = match (args.rewrite, args.through_client) {
        (false, _) => TrimHow::Punch,
        (true, false) => TrimHow::Rewrite,
        (true, true) => TrimHow::RewriteThroughClient,
    };
    let mut reporter = Reporter::new(context.output, "");
    let trimmed = session::trim(options, &secret, how, &mut reporter, &context.interrupt);
    reporter.clear();
    let (facts, report) = trimmed?;
    context.remember(&state_dir, &resolved, &policy, &facts);
    let json = json!({
        "command": "trim",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "trim": report,
    });
    context.output.result(&told(&report), &json)?;
    Ok(Exit::Done)
}

fn told(report: &TrimReport) -> String {
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
