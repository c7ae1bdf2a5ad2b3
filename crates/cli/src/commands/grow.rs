//! `sprat grow`: gives a container a larger size.

use serde_json::json;
use sprat_session as session;
use sprat_session::{Access, text};

use super::context::Context;
use crate::args::GrowArgs;
use crate::output::{Reporter, exit_json};
use crate::{Exit, Failure};

pub(super) fn run(context: &Context, args: &GrowArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let secret = context.secret(&resolved)?;
    let options = context.session_options(&resolved, Access::ReadWrite)?;
    let (state_dir, policy) = (options.state_dir.clone(), options.pins.clone());
    let mut reporter = Reporter::new(context.output, "");
    let grown = session::grow(
        options,
        &secret,
        args.size,
        &mut reporter,
        &context.interrupt,
    );
    reporter.clear();
    let grown = grown?;
    context.remember(&state_dir, &resolved, &policy, &grown.facts);
    let json = json!({
        "command": "grow",
        "result": exit_json(Exit::Done),
        "target": resolved.target.to_string(),
        "file_bytes": grown.facts.file_bytes,
        "volume_bytes": grown.facts.volume_bytes,
        "durable": grown.closed.durable,
        "volume": grown.closed.volume,
    });
    let text = format!(
        "{} has {} now; {} sent\n",
        resolved.target,
        text::bytes(grown.facts.file_bytes),
        text::bytes(grown.closed.volume.written_bytes)
    );
    context.output.result(&text, &json)?;
    Ok(Exit::Done)
}
