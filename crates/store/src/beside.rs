//! Two calls at once, or one after the other where no thread can be made.

use std::sync::Mutex;
use std::thread::{Builder, scope};

use crate::IgnorePoison;

/// Runs `aside` on a thread of its own while `here` runs on this one; without a thread (limits on
/// processes or memory) behind it, which costs a round trip more. A panic of either goes on here.
pub(crate) fn beside<A: Send, B>(
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
    (aside.expect("it runs once, here or there"), here)
}
