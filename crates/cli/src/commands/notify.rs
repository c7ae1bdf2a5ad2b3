//! `sprat notify`: tests the channels of notices, shows what they delivered, and sends what waits.

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use sprat_run::config::CHANNEL_HINT;
use sprat_run::notify::{Channel, Notifier, Tick};
use sprat_run::watch::{Now, Watch, event_json, events_text};
use sprat_session::text;

use super::context::{CommandArgs, Context};
use crate::output::result_json;
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat notify test
  sprat notify list
  sprat notify flush";

#[derive(Debug, Args)]
pub(super) struct NotifyArgs {
    #[command(subcommand)]
    command: NotifyCommand,
}

#[derive(Debug, Subcommand)]
enum NotifyCommand {
    /// Send a test notice by each channel of the config
    Test,
    /// List the open events, and what each channel delivered
    List,
    /// Send all notices that wait, even by channels that failed a short time ago
    Flush,
}

impl CommandArgs for NotifyArgs {
    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let mut watch = Watch::new(context.watched(), context.environment.network());
        if watch.delivery().channels.list().is_empty()
            && !matches!(self.command, NotifyCommand::List)
        {
            return Err(context.config.placed(
                Failure::usage("no channel is set in [notify]")
                    .with_hint(format!("nothing was sent. {CHANNEL_HINT}")),
            ));
        }
        let now = Now::read(context.environment.trust_clock);
        match self.command {
            NotifyCommand::Test => {
                let sent = Notifier::test(watch.delivery(), now.moment.wall);
                report_sent(context, "notify test", &sent)
            }
            NotifyCommand::List => list(context, &mut watch),
            NotifyCommand::Flush => flush(context, &mut watch, &now),
        }
    }
}

type Sent = (Channel, Result<(), String>);

fn report_sent(context: &Context, command: &str, sent: &[Sent]) -> Result<Exit, Failure> {
    let failed = sent.iter().any(|(_, result)| result.is_err());
    let exit = if failed { Exit::Failed } else { Exit::Done };
    let rows: Vec<Vec<String>> = sent
        .iter()
        .map(|(channel, result)| match result {
            Ok(()) => vec![channel.to_string(), "delivered".to_owned()],
            Err(why) => vec![
                channel.to_string(),
                format!("FAILED: {}", text::harmless(why)),
            ],
        })
        .collect();
    let json = |(channel, result): &Sent| json!({ "channel": channel, "delivered": result.is_ok(), "why": result.as_ref().err() });
    let fields = json!({ "channels": sent.iter().map(json).collect::<Vec<Value>>() });
    context.output.result(
        &text::table(&rows, &[]),
        &result_json(command, exit, fields),
    )?;
    Ok(exit)
}

fn list(context: &Context, watch: &mut Watch<'_>) -> Result<Exit, Failure> {
    let channels = watch.delivery().channels.list();
    let sender = watch.delivery().sender.clone();
    let events = watch.notifier().events.read();
    let states = watch.notifier().states();
    let text = events_text(&events, &channels, &states, &sender);
    let delivered = |event| {
        let mut json = event_json(event);
        json["delivered"] = event
            .delivered()
            .map(|(channel, at)| json!({ "channel": channel, "at": at }))
            .collect();
        json
    };
    let events: Vec<Value> = events.all().map(delivered).collect();
    let json = json!({ "events": events, "channels": states.channels });
    context
        .output
        .listing(&text, &result_json("notify list", Exit::Done, json))?;
    Ok(Exit::Done)
}

fn flush(context: &Context, watch: &mut Watch<'_>, now: &Now) -> Result<Exit, Failure> {
    let delivery = watch.delivery().clone();
    let tick = Tick {
        now: now.moment.wall,
        clock_is_trusted: watch.clock_is_trusted(now),
        at_once: true,
    };
    let outcome = watch.notifier().deliver(&delivery, tick);
    for problem in watch.notifier().take_problems() {
        context.output.warning(&problem);
    }
    for (channel, why) in &outcome.failed {
        context
            .output
            .warning(&format!("a notice by {channel} was not delivered: {why}"));
    }
    let exit = if outcome.failed.is_empty() {
        Exit::Done
    } else {
        Exit::Failed
    };
    let delivered = outcome.delivered as u64;
    let text = format!(
        "{} delivered\n",
        text::counted(delivered, "notice", "notices")
    );
    let failed = outcome.failed.iter();
    let failed = failed.map(|(channel, why)| json!({ "channel": channel, "why": why }));
    let fields = json!({ "delivered": delivered, "failed": failed.collect::<Vec<_>>() });
    context
        .output
        .result(&text, &result_json("notify flush", exit, fields))?;
    Ok(exit)
}
