//! `sprat unlock`: removes the lock of a session that died on another machine.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::json;
use sprat_store::lock::{self, LockInfo, RENEW_INTERVAL};
use sprat_store::{Access, FileName, Store, StoreError};

use super::context::Context;
use crate::args::UnlockArgs;
use crate::output::{exit_json, text};
use crate::session::{self, TAKEOVER_QUIET_TIMES};
use crate::{Exit, Failure, reach};

/// Two renewals and some time on the way, and no less than the time for which a session that died
/// just now may still write, by its kernel and its server: who opens the container next, on
/// whatever machine, knows nothing of that session.
fn watch_default(quiet_time: Duration) -> Duration {
    (2 * RENEW_INTERVAL + Duration::from_secs(5)).max(TAKEOVER_QUIET_TIMES * quiet_time)
}

pub(super) fn run(context: &Context, args: &UnlockArgs) -> Result<Exit, Failure> {
    let resolved = context.resolve(&args.target)?;
    let store = reach::connect(&resolved.target, &resolved.ssh_command)?;
    let name = &resolved.target.name;
    let Some(info) = lock::inspect(&*store, name)? else {
        // A mistyped name must not be reported as a container that is not locked.
        if let Err(failure) = is_container(&*store, name) {
            let hint = "nothing was changed: no lock is there either. Check the path";
            let what = format!("there is no container {}", resolved.target);
            let failure = match failure.exit {
                Exit::NoContainer if !is_there(&*store, name) => {
                    Failure::new(Exit::NoContainer, what)
                }
                Exit::NoContainer => Failure::new(Exit::NoContainer, what).caused_by(&failure),
                _ => failure,
            };
            return Err(failure.with_hint(hint));
        }
        let text = format!("{} is not locked\n", resolved.target);
        return done(context, &text, &resolved.target.to_string(), None, false);
    };
    let watch = args
        .watch
        .unwrap_or_else(|| watch_default(context.global.quiet_time));
    context.output.note(&format!(
        "{}; watching it for {}",
        describe(&info),
        text::duration(watch)
    ));
    let broken = lock::break_lock(&*store, name, args.force, watch)?;
    let Some(removed) = broken.lock else {
        let text = format!(
            "{} is no longer locked: its owner gave it back\n",
            resolved.target
        );
        return done(context, &text, &resolved.target.to_string(), None, false);
    };
    // What a rewrite (`trim --rewrite`) left that died there: nobody else will know of it.
    let leftover = session::rewrite_name(name)?;
    if store.remove_if_there(&leftover)? {
        context.output.note(&format!("removed {leftover}, too"));
    }
    let mut text = format!("unlocked {}: removed {}\n", resolved.target, removed.file);
    if broken.was_renewed {
        text.push_str("its owner was alive a moment ago: it will stop, and its run fails\n");
    }
    let target = resolved.target.to_string();
    done(context, &text, &target, Some(&removed), broken.was_renewed)
}

fn is_there(store: &dyn Store, name: &FileName) -> bool {
    !matches!(store.stat(name), Err(StoreError::NotFound { .. }))
}

fn is_container(store: &dyn Store, name: &FileName) -> Result<(), Failure> {
    let file = store.open(name, Access::ReadOnly)?;
    reach::any_header(&*file).map(drop)
}

fn done(
    context: &Context,
    text: &str,
    target: &str,
    removed: Option<&LockInfo>,
    was_renewed: bool,
) -> Result<Exit, Failure> {
    let json = json!({
        "command": "unlock",
        "result": exit_json(Exit::Done),
        "target": target,
        "removed": removed.map(|info| info.file.as_str()),
        "was_renewed": was_renewed,
    });
    context.output.result(text, &json)?;
    Ok(Exit::Done)
}

/// What the lock says; all of it is the server's word.
fn describe(info: &LockInfo) -> String {
    let since = i64::try_from(info.started_s)
        .ok()
        .and_then(|seconds| Timestamp::from_second(seconds).ok())
        .map_or_else(|| "an unknown time".to_owned(), |time| time.to_string());
    match &info.token {
        Some(_) => format!(
            "locked by {} since {since}, renewed {} (host {}, sprat {})",
            info.file,
            text::counted(info.renewed, "time", "times"),
            text::harmless_within(&info.host, 40),
            text::harmless_within(&info.version, 40),
        ),
        None => format!("locked by {}, which says nothing of its owner", info.file),
    }
}
