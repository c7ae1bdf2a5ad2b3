//! `sprat unlock`: removes the lock of a session that died on another machine.

use std::time::Duration;

use clap::Args;
use serde_json::json;
use sprat_session::{self as session, DoorWay, UnlockWish, Unlocked, text};

use super::context::{CommandArgs, Context};
use crate::args::{TARGET_HELP, seconds};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "Example:\n  sprat unlock home";

pub(super) const NOTES: &str = "\
`sprat unlock` can take up to 2 hours and 15 minutes: it waits until no late data of the other
machine can arrive any more. Ctrl-C harms nothing; the next unlock continues.

A session that died on this machine needs no unlock: the next run takes over its lock.";

#[derive(Debug, Args)]
pub(super) struct UnlockArgs {
    #[arg(help = TARGET_HELP)]
    target: String,
    /// Take over the lock even from a session that is alive; that session fails
    #[arg(long)]
    force: bool,
    /// Do not wait; use this only if the other machine is off, not asleep
    #[arg(long)]
    that_machine_is_off: bool,
    /// Do not compare the data that was written after a takeover, and end the warning about it
    #[arg(long)]
    forget_watch: bool,
    /// How long to watch the lock, in seconds.
    #[arg(long, hide = true, value_parser = seconds)]
    watch: Option<Duration>,
    /// The silence after which a session counts as gone, in seconds.
    #[arg(long, hide = true, value_parser = seconds)]
    silence: Option<Duration>,
}

impl CommandArgs for UnlockArgs {
    fn state_when_interrupted(&self) -> Option<&'static str> {
        Some("the container stays locked. Run `sprat unlock` again: it continues")
    }

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        let resolved = context.resolve(&self.target)?;
        let options = context.session_options(&resolved, session::Access::ReadWrite)?;
        let mut wish = UnlockWish {
            force: self.force,
            is_off: self.that_machine_is_off,
            forget_watch: self.forget_watch,
            ..UnlockWish::default()
        };
        if let Some(watch) = self.watch {
            wish.watch = watch;
            wish.answer_wait = wish.answer_wait.min(watch);
        }
        if let Some(silence) = self.silence {
            wish.silence_s = silence.as_secs();
        }
        let mut note = |text: &str| context.output.note(text);
        let done = session::unlock(&options, &wish, &context.interrupt, &mut note)?;
        let ways: Vec<_> = done
            .ways
            .iter()
            .map(|(lease, way)| json!({ "lease": lease, "way": way }))
            .collect();
        let fields = json!({
            "taken_over": done.taken_over.as_ref().map(|info| info.file.as_str()),
            "was_renewed": done.was_renewed,
            "ways": ways,
            "forgotten": done.forgotten,
        });
        let target = &resolved.target;
        let text = text(&target.to_string(), &done);
        context.finish("unlock", Exit::Done, target, &text, fields)
    }
}

fn text(target: &str, done: &Unlocked) -> String {
    let mut text = match &done.taken_over {
        Some(info) => format!("unlocked {target}: took over the lock {}\n", info.file),
        None if done.forgotten > 0 => String::new(),
        None if done.was_locked => {
            format!("{target} is no longer locked: its session released the lock\n")
        }
        None => format!("{target} is not locked\n"),
    };
    for (lease, way) in &done.ways {
        text.push_str(&match way {
            DoorWay::Answered => {
                format!("the session of lease {lease} answered: all its data has arrived\n")
            }
            DoorWay::Kernel => format!(
                "the server's kernel reports that no process has the container open for writing, so no \
                 data of the session of lease {lease} can arrive any more\n"
            ),
            DoorWay::Agent => format!(
                "sprat-agent on the server refuses everything that the session of lease {lease} sent\n"
            ),
            DoorWay::Silent => format!(
                "the session of lease {lease} was silent for so long that the server has closed its \
                 connection. In case something still arrives, sprat checks for 2 h 15 min that nothing \
                 overwrites new data\n"
            ),
            DoorWay::Off => format!(
                "you state that the machine of lease {lease} is off. If it only sleeps, it can \
                 overwrite new data when it wakes. For 2 h 15 min sprat checks new data for that, and \
                 reports damage\n"
            ),
        });
    }
    if done.was_renewed {
        text.push_str("that session was alive a moment ago: it stops and fails\n");
    }
    if done.forgotten > 0 {
        text.push_str(&format!(
            "the data of {} will not be compared\n",
            text::counted(done.forgotten as u64, "session", "sessions")
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_session_is_one() {
        let said = |forgotten| {
            let done = Unlocked {
                forgotten,
                ..Unlocked::default()
            };
            text("x", &done)
        };
        assert_eq!(said(1), "the data of 1 session will not be compared\n");
        assert_eq!(said(2), "the data of 2 sessions will not be compared\n");
    }
}
