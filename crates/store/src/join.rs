//! Runs two calls at once, or one after the other if no thread can be started.

use std::sync::Mutex;
use std::thread::{Builder, scope};

use crate::IgnorePoison;

/// Runs `aside` on another thread while `here` runs on this one. If no thread can be started
/// (limits on processes or memory), `aside` runs after `here`, which costs one round trip more. A
/// panic of either is passed on.
pub(crate) fn join<A: Send, B>(
    aside: impl FnOnce() -> A + Send,
    here: impl FnOnce() -> B,
) -> (A, B) {
    let aside = Mutex::new(Some(aside));
    let run = || {
        let aside = aside.lock().ignore_poison().take();
        aside.map(|aside| aside())
    };
    let (aside, here) = scope(|scope| {
        let started = Builder::new().spawn_scoped(scope, run);
        let here = here();
        let aside = match started.map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(aside)) => aside,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(_) => run(),
        };
        (aside, here)
    });
    (aside.expect("it runs once on one of the threads"), here)
}
