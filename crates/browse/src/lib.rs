//! Browses the snapshots of a container on a terminal: folders, versions of files, previews, restores.
//!
//! Above: `cli`, which opens the container. Below: `session`, which reads it; `run`, whose words are shown.
//!
//! Two threads share the work. The thread that opened the session answers questions, one after the other.
//! The other one draws, reads keys and asks: a slow server never keeps a key waiting.
//!
//! Always true:
//! - Nothing of the volume reaches the terminal before [`text`](sprat_session::text) has made it harmless: each
//!   name and each content may be hostile.
//! - However it ends, the terminal is as it was before: also after a signal or a panic.
//! - Nothing is written but what a restore writes, and nothing is overwritten unasked.
#![forbid(unsafe_code)]

mod answers;
mod app;
mod dialog;
mod draw;
mod folder;
mod keys;
mod preview;
mod question;
mod rows;
mod screen;
mod snapshots;
mod versions;

use std::path::PathBuf;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sprat_run::watch::Shown;
use sprat_session::interrupt::Interrupt;
use sprat_session::{Exit, Failure, Observer, Session};

use crate::answers::{Answers, Ended};
use crate::app::App;
pub use crate::screen::{Screen, is_possible, on_screen, restore, resume};

/// What the browser needs to begin.
pub struct Browse<'b> {
    /// The container, as it is shown.
    pub target: String,
    /// How times are shown.
    pub shown: Shown,
    /// Colours are welcome.
    pub colours: bool,
    /// The folder that a relative destination starts from.
    pub current_dir: PathBuf,
    /// Without a question for so long, the container is closed until the next one: a backup needs it, too.
    pub close_after: Duration,
    /// Opens the container again.
    pub open: &'b mut dyn FnMut(&mut dyn Observer) -> Result<Session, Failure>,
}

/// Shows the browser until the user ends it. Closes the session, and passes the notices that came meanwhile
/// to `observer`.
///
/// # Errors
/// The terminal can't be used, the server was lost, or an interrupt.
pub fn browse(
    browse: Browse<'_>,
    session: Session,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Exit, Failure> {
    let own = Interrupt::never()?;
    let passed_on = own.clone();
    interrupt.on_request(move |_| passed_on.request());
    let mut app = App::new(
        browse.target,
        browse.shown,
        browse.colours,
        browse.current_dir,
    );
    let (ask, questions) = mpsc::channel();
    let (tell, events) = mpsc::channel();
    let stopper = Arc::new(Mutex::new(None));
    let mut answers = Answers::new(
        session,
        browse.open,
        tell,
        Arc::clone(&stopper),
        own.clone(),
        browse.close_after,
    );
    let (ended, shown) = std::thread::scope(|scope| {
        let stops = own.clone();
        let screen = scope.spawn(move || {
            let shown = on_screen(|screen| {
                keys::converse(&mut app, screen, &events, &ask, &stopper, interrupt)
            });
            // What is under way is not waited for.
            let asked = app.is_waiting();
            drop(ask);
            if asked {
                stops.request();
            }
            shown
        });
        let ended = answers.serve(&questions);
        let shown = screen.join().unwrap_or_else(|_| {
            Err(Failure::failed("internal error: the browser panicked")
                .with_hint("nothing in the container was changed"))
        });
        (ended, shown)
    });
    let closed = answers.close(observer, interrupt);
    match (ended, shown, closed) {
        (Ended::Failed(failure), ..) => Err(failure),
        (_, Err(failure), _) | (Ended::Done, Ok(()), Err(failure)) => Err(failure),
        (Ended::Done, Ok(()), Ok(())) => {
            interrupt.check()?;
            Ok(answers.exit())
        }
    }
}
