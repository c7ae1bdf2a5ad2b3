//! `sprat generations`: lists the past states that the server keeps.

use clap::Args;
use serde_json::json;
use sprat_run::generations_text;
use sprat_session::generations;

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::output::result_json;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat generations home
  sprat restore home www --to /restore --generation latest-before:yesterday";

pub(super) const NOTES: &str = "\
A server with sprat-agent keeps past states of the container file, which no client can change.
Commands that read take --generation NAME, the beginning of a NAME (the newest match), or
latest-before:TIME.";

#[derive(Debug, Args)]
pub(super) struct GenerationsArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
}

impl CommandArgs for GenerationsArgs {
    const READS: bool = true;

    fn state_when_interrupted(&self) -> Option<&'static str> {
        Some("nothing was changed")
    }

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let states = generations::list(&resolved.target, &resolved.ssh)?;
        let fields = json!({
            "target": resolved.target.to_string(),
            "generations": generations_text::list(&states),
        });
        let json = result_json("generations", Exit::Done, fields);
        let text = generations_text::table(&states, &context.shown());
        context.output.listing(&text, &json)?;
        Ok(Exit::Done)
    }
}
