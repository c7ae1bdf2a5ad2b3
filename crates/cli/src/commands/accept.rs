//! `sprat accept`: releases what an event holds back, and shows it first.

use clap::Args;
use serde_json::{Value, json};
use sprat_run::config::Named;
use sprat_run::notify::Subject;
use sprat_run::watch::{Now, Watch, event_json};
use sprat_session::state::history::SeenGone;
use sprat_session::status::ContainerStatus;
use sprat_session::text;

use super::context::{CommandArgs, Context};
use crate::output::result_json;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat accept home@nas
  sprat accept nas";

pub(super) const NOTES: &str = "\
sprat accept shows the open events of the kinds growth, change, held and damage, and closes them.
For damage it closes only the event: sprat remembers the damage until a check no longer finds it.
For snapshots that are gone it ends the warning.
For a source file that changed silently, the snapshot with its old content is no longer kept.";

#[derive(Debug, Args)]
pub(super) struct AcceptArgs {
    /// A copy (JOB@CONTAINER), a job, or a container of the config
    #[arg(value_name = "COPY|TARGET")]
    word: String,
}

impl CommandArgs for AcceptArgs {
    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let subjects = match context.config.named(&self.word)? {
            Some(Named::Container(container)) => vec![Subject::Container(container.name.clone())],
            Some(Named::Copies(copies)) => copies
                .iter()
                .map(|copy| Subject::Copy(copy.name()))
                .collect(),
            None => vec![Subject::Container(context.resolve(&self.word)?.config_name)],
        };
        let gone = match subjects.as_slice() {
            [Subject::Container(_)] => self.accept_gone(context)?,
            _ => None,
        };
        let mut watch = Watch::new(context.watched(), context.environment.network());
        let accepted = watch.accept(&subjects, &Now::read(context.environment.trust_clock));
        for problem in &accepted.problems {
            context.output.warning(problem);
        }
        let mut shown = String::new();
        for (headline, event) in &accepted.events {
            shown.push_str(&format!("{headline}\n"));
            for line in event.text.lines() {
                shown.push_str(&format!("  {}\n", text::harmless(line)));
            }
        }
        for snapshot in gone.iter().flat_map(|gone| &gone.snapshots) {
            shown.push_str(&format!("gone: {}\n", text::harmless(snapshot)));
        }
        shown.push_str(&match accepted.events.len() as u64 {
            0 if gone.is_some() => String::new(),
            0 => format!(
                "{} has no event that waits for you\n",
                text::harmless(&self.word)
            ),
            count => format!("{} accepted\n", text::counted(count, "event", "events")),
        });
        let events: Vec<Value> = accepted
            .events
            .iter()
            .map(|(_, event)| event_json(event))
            .collect();
        let exit = match accepted.problems.is_empty() {
            true => Exit::Done,
            false => Exit::Failed,
        };
        let fields = json!({ "events": events, "snapshots_gone": gone });
        context
            .output
            .result(&shown, &result_json("accept", exit, fields))?;
        Ok(exit)
    }
}

impl AcceptArgs {
    /// That snapshots are gone is reported no more.
    fn accept_gone(&self, context: &Context) -> Result<Option<SeenGone>, Failure> {
        let target = context.resolve(&self.word)?.target;
        let state_dir = context.state_dir();
        let status = ContainerStatus::read(&state_dir, &target, Vec::new(), None);
        let Some(known) = status.known().filter(|known| known.history.gone.is_some()) else {
            return Ok(None);
        };
        let mut gone = None;
        context.note_history(&known.uuid, &target, |history| gone = history.gone.take());
        Ok(gone)
    }
}
