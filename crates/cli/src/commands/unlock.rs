//! `sprat unlock`: sets a container free that a session of another machine holds.

use serde_json::json;
use sprat_session as session;
use sprat_session::{DoorWay, UnlockWish, Unlocked, text};

use super::context::Context;
use crate::args::UnlockArgs;
use crate::output::exit_json;
use crate::{Exit, Failure};

pub(super) fn run(context: &Context, args: &UnlockArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let options = context.session_options(&resolved, session::Access::ReadWrite)?;
    let mut wish = UnlockWish {
        force: args.force,
        is_off: args.that_machine_is_off,
        forget_watch: args.forget_watch,
        ..UnlockWish::default()
    };
    if let Some(watch) = args.watch {
        wish.watch = watch;
        wish.answer_wait = wish.answer_wait.min(watch);
    }
    if let Some(silence) = args.silence {
        wish.silence_s = silence.as_secs();
    }
    let mut tell = |text: &str| context.output.note(text);
    let done = session::unlock(&options, &wish, &context.interrupt, &mut tell)?;
    let target = resolved.target.to_string();
    let ways: Vec<_> = done
        .ways
        .iter()
        .map(|(lease, way)| json!({ "lease": lease, "way": way }))
        .collect();
    let json = json!({
        "command": "unlock",
        "result": exit_json(Exit::Done),
        "target": target,
        "taken_over": done.taken_over.as_ref().map(|info| info.file.as_str()),
        "was_renewed": done.was_renewed,
        "ways": ways,
        "forgotten": done.forgotten,
    });
    context.output.result(&text(&target, &done), &json)?;
    Ok(Exit::Done)
}

fn text(target: &str, done: &Unlocked) -> String {
    let mut text = match &done.taken_over {
        Some(info) => format!("unlocked {target}: took over {}\n", info.file),
        None if done.forgotten > 0 => String::new(),
        None if done.was_locked => format!("{target} is no longer locked: it was given back\n"),
        None => format!("{target} is not locked\n"),
    };
    for (lease, way) in &done.ways {
        text.push_str(&match way {
            DoorWay::Answered => {
                format!("the session of lease {lease} answered: all that it sent has arrived\n")
            }
            DoorWay::Kernel => format!(
                "the server's kernel says that nobody has the container open for writing: nothing of \
                 the session of lease {lease} can arrive any more\n"
            ),
            DoorWay::Silent => format!(
                "the session of lease {lease} was silent for so long that the server has dropped \
                 its connection. What is written in the next 2:15 h is compared, should anything \
                 arrive all the same\n"
            ),
            DoorWay::Off => format!(
                "the machine of lease {lease} is off, you say. If it only sleeps, it may overwrite \
                 parts of what is written now when it wakes: for 2:15 h that is compared, and \
                 reported\n"
            ),
        });
    }
    if done.was_renewed {
        text.push_str("that session was alive a moment ago: it stops, and its run fails\n");
    }
    if done.forgotten > 0 {
        text.push_str(&format!(
            "what {} wrote will not be compared\n",
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
        assert_eq!(said(1), "what 1 session wrote will not be compared\n");
        assert_eq!(said(2), "what 2 sessions wrote will not be compared\n");
    }
}
