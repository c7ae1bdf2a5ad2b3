//! `sprat browse`: browses snapshots on the terminal.

use std::time::Duration;

use clap::Args;
use sprat_browse::Browse;
use sprat_run::config::Stops;
use sprat_session::{Access, Session, text};

use super::context::{CommandArgs, Context};
use crate::args::TARGET_HELP;
use crate::output::Reporter;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat browse
  sprat browse home";

pub(super) const NOTES: &str = "\
The keys are shown at the bottom of the screen; `?` shows all of them. Nothing is changed in the
container, and a restore asks before it replaces a file. While you read, sprat closes the container,
so that backups can run; the next key that needs it opens it again.";

#[derive(Debug, Args)]
pub(super) struct BrowseArgs {
    #[arg(help = TARGET_HELP)]
    target: Option<String>,
    /// Close the container after TIME without a question
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = text::parse_limit)]
    close_after: Duration,
}

impl CommandArgs for BrowseArgs {
    const NEEDS_ROOT: bool = true;
    const READS: bool = true;

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let nothing = "nothing was started. ";
        if context.output.json {
            return Err(Failure::usage("`browse` has no output in JSON")
                .with_hint(format!("{nothing}`sprat ls --json` lists a folder")));
        }
        if !sprat_browse::is_possible() {
            return Err(Failure::usage("there is no terminal to browse on").with_hint(format!(
                "{nothing}Its input and its output must be a terminal: with ssh, add -t. Or use `sprat ls`"
            )));
        }
        if self.target.is_none() {
            // One with a mistake may be the one that is meant.
            let concerns = |stops: &Stops| matches!(stops, Stops::Container(_) | Stops::File);
            context.refuse_mistakes(concerns)?;
        }
        let target = match (&self.target, &context.config.containers[..]) {
            (Some(target), _) => target,
            (None, [only]) => &only.name,
            (None, _) => {
                return Err(
                    Failure::usage("name a container: the config has not exactly one")
                        .with_hint(format!("{nothing}`sprat config show` lists them")),
                );
            }
        };
        let prepared = context.prepare(target, Access::ReadOnly)?;
        let (resolved, secret) = (prepared.resolved, prepared.secret);
        let mut reporter = Reporter::new(context.output, "");
        let session = context.open(&resolved, &secret, prepared.options, &mut reporter)?;
        reporter.clear();
        let browse = Browse {
            target: resolved.target.to_string(),
            shown: context.shown(),
            colours: context.environment.colours,
            current_dir: context.environment.current_dir.clone(),
            close_after: self.close_after,
            open: &mut |observer| {
                let options = context.session_options(&resolved, Access::ReadOnly)?;
                Session::open(options, &secret, observer, &context.interrupt)
                    .map_err(|failure| context.explain(&resolved, failure))
            },
        };
        let ended = sprat_browse::browse(browse, session, &mut reporter, &context.interrupt);
        reporter.clear();
        ended
    }
}
