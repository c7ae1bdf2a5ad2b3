//! The terminal while the browser is shown. It is given back as it was: at the end, after a panic, and before this
//! process stops or ends by a signal.

use std::io::{self, IsTerminal, Stdout, stdin, stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::{Frame, Terminal};
use rustix::termios::tcgetpgrp;
use sprat_session::Failure;
use sprat_store::IgnorePoison;

/// Who has the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    /// The shell. The browser is not shown, or it has ended.
    Shell,
    Browser,
    /// The shell, until this process goes on after a stop.
    ShellForNow,
}

static OWNER: Mutex<Owner> = Mutex::new(Owner::Shell);
/// All of the screen must be drawn again.
static IS_STALE: AtomicBool = AtomicBool::new(false);
/// How often, and how long each time, a signal waits for a drawing that a slow terminal delays.
const TRIES: u32 = 20;
const WAIT: Duration = Duration::from_millis(10);

/// Whether a browser can be shown: both ends of this process are a terminal.
#[must_use]
pub fn is_possible() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// What is drawn on.
pub struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

/// Does `work` with the terminal, which is given back afterwards, and before the words of a panic.
///
/// # Errors
/// Those of `work`, or the terminal can't be used.
pub fn on_screen(work: impl FnOnce(&mut Screen) -> Result<(), Failure>) -> Result<(), Failure> {
    let unusable =
        |error: io::Error| Failure::failed("the terminal can't be used").caused_by(&error);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let _ = leave(Owner::Shell);
        before(panic);
    }));
    let guard = Guard;
    let done = enter().map_err(unusable).and_then(|()| {
        let terminal = Terminal::new(CrosstermBackend::new(stdout())).map_err(unusable)?;
        work(&mut Screen { terminal })
    });
    drop(guard);
    // The hook that gives the terminal back finds nothing to do from here on.
    done
}

struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = leave(Owner::Shell);
    }
}

impl Screen {
    /// Draws, unless the shell has the terminal.
    pub(crate) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> io::Result<()> {
        let owner = OWNER.lock().ignore_poison();
        if *owner != Owner::Browser {
            return Ok(());
        }
        if IS_STALE.swap(false, Ordering::SeqCst) {
            self.terminal.clear()?;
        }
        self.terminal.draw(draw).map(drop)
    }
}

/// Whether all must be drawn again: the process was stopped, and goes on.
pub(crate) fn is_stale() -> bool {
    IS_STALE.load(Ordering::SeqCst)
}

/// Gives the terminal back to the shell before this process stops or ends. Called on the signal thread.
pub fn restore() {
    let _ = leave(Owner::ShellForNow);
}

/// Takes the terminal again after a stop. `false`: the browser is shown, and this process is in the background.
pub fn resume() -> bool {
    if *owner_soon() != Owner::ShellForNow {
        return true;
    }
    let group = tcgetpgrp(rustix::stdio::stdout());
    match group {
        Ok(group) if group == rustix::process::getpgrp() => enter().is_ok(),
        Ok(_) => false,
        // The terminal is closed. No shell would ever continue a process that stops now.
        Err(_) => true,
    }
}

fn enter() -> io::Result<()> {
    let mut owner = OWNER.lock().ignore_poison();
    enable_raw_mode()?;
    // From here on, leaving restores it.
    *owner = Owner::Browser;
    IS_STALE.store(true, Ordering::SeqCst);
    execute!(stdout(), EnterAlternateScreen)
}

fn leave(to: Owner) -> io::Result<()> {
    let mut owner = owner_soon();
    if *owner != Owner::Browser {
        return Ok(());
    }
    *owner = to;
    // Each even if the other fails.
    let left = execute!(stdout(), LeaveAlternateScreen, Show);
    disable_raw_mode().and(left)
}

/// A drawing may hang: the terminal takes nothing. Then this process ends without waiting for it.
fn owner_soon() -> Soon {
    for _ in 0..TRIES {
        match OWNER.try_lock() {
            Ok(owner) => return Soon::Now(owner),
            Err(TryLockError::Poisoned(owner)) => return Soon::Now(owner.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::sleep(WAIT),
        }
    }
    Soon::Later(Owner::Browser)
}

/// The owner; if it could not be locked, a stand-in.
enum Soon {
    Now(MutexGuard<'static, Owner>),
    Later(Owner),
}

impl std::ops::Deref for Soon {
    type Target = Owner;

    fn deref(&self) -> &Owner {
        match self {
            Self::Now(owner) => owner,
            Self::Later(owner) => owner,
        }
    }
}

impl std::ops::DerefMut for Soon {
    fn deref_mut(&mut self) -> &mut Owner {
        match self {
            Self::Now(owner) => owner,
            Self::Later(owner) => owner,
        }
    }
}
