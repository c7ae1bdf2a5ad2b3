//! Asks for a passphrase on the terminal, without echo.
//!
//! Ctrl-Z restores the terminal before the process stops, and `fg` turns the echo off again and shows the
//! prompt again, as `readpassphrase(3)` does. Shells differ: after `fg` bash would turn the echo on, and
//! dash would leave it off.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Mutex, MutexGuard};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};
use sprat_session::interrupt::{Interrupt, Terminal};
use sprat_store::IgnorePoison;
use zeroize::{Zeroize, Zeroizing};

use crate::Failure;

/// What the signal thread calls when this process stops, continues or ends at a prompt.
pub(crate) const HOOKS: Terminal = Terminal { restore, resume };

/// Longest line that is accepted; the terminal itself (N_TTY_BUF_SIZE) returns no more.
const LINE_BYTES_MAX: usize = 4096;

/// Shows `prompt` on the controlling terminal and reads one line from it, without echo. Ctrl-C ends it. The
/// echo is always turned on again.
pub(crate) fn ask(prompt: &str, interrupt: &Interrupt) -> Result<Zeroizing<String>, Failure> {
    let tty = open().map_err(|error| {
        Failure::usage("no key was given, and there is no terminal to ask on")
            .caused_by(&error)
            .with_hint(
                "nothing was started. Give a key with --key-file, --passphrase-file or \
                 --passphrase-command, or in the config",
            )
    })?;
    let failed = |error: std::io::Error| {
        Failure::failed("can't ask for the passphrase on the terminal").caused_by(&error)
    };
    let shown = Shown::silently(&tty, prompt).map_err(failed)?;
    let line = read_line(&tty, interrupt);
    drop(shown);
    let _ = (&tty).write_all(b"\n");
    let line = line?;
    if line.is_empty() {
        return Err(Failure::usage("the passphrase is empty"));
    }
    let text = std::str::from_utf8(&line)
        .map_err(|_| Failure::usage("the passphrase is not UTF-8 text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Whether there is a terminal.
pub(crate) fn is_there() -> bool {
    open().is_ok()
}

/// Asks for something that is not secret. An empty line is accepted.
pub(crate) fn ask_openly(prompt: &str, interrupt: &Interrupt) -> Result<String, Failure> {
    let failed =
        |error: std::io::Error| Failure::usage("there is no terminal to ask on").caused_by(&error);
    let tty = open().map_err(failed)?;
    let shown = Shown::openly(&tty, prompt).map_err(failed)?;
    let line = read_line(&tty, interrupt);
    drop(shown);
    let line = line?;
    Ok(String::from_utf8_lossy(&line).trim().to_owned())
}

fn open() -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).open("/dev/tty")
}

fn read_line(tty: &File, interrupt: &Interrupt) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut line = Zeroizing::new(Vec::with_capacity(LINE_BYTES_MAX));
    let mut byte = [0u8; 1];
    loop {
        let woken = interrupt.readable_when_requested();
        let mut fds = [
            PollFd::new(tty, PollFlags::IN),
            PollFd::new(&woken, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(Failure::failed("can't wait for the terminal").caused_by(&error));
            }
        }
        // A terminal that is closed shows an end of input, perhaps before its signal arrives.
        if fds[0].revents().contains(PollFlags::HUP) && !interrupt.requested() {
            interrupt.request();
        }
        interrupt.check()?;
        if fds[0].revents().is_empty() {
            continue;
        }
        match rustix::io::read(tty, &mut byte) {
            Ok(0) => break,
            Ok(_) if byte[0] == b'\n' || byte[0] == b'\r' => break,
            Ok(_) if line.len() < LINE_BYTES_MAX => line.push(byte[0]),
            Ok(_) => return Err(Failure::usage("the passphrase is too long")),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return Err(Failure::failed("can't read from the terminal").caused_by(&error));
            }
        }
    }
    byte.zeroize();
    Ok(line)
}

/// The prompt that is shown now.
static PROMPT: Mutex<Option<Prompt>> = Mutex::new(None);

struct Prompt {
    tty: File,
    text: String,
    /// How the terminal was before, and how it is without echo; `None`: it echoes.
    modes: Option<(Termios, Termios)>,
}

impl Prompt {
    /// Whether this process may change the terminal. In the background the kernel would stop it for that.
    /// `None`: the terminal is closed (EIO; the kernel then sends SIGHUP and SIGCONT).
    fn in_foreground(&self) -> Option<bool> {
        let group = tcgetpgrp(&self.tty).ok()?;
        Some(group == rustix::process::getpgrp())
    }

    fn echo_again(&self) {
        if let Some((before, _)) = &self.modes
            && self.in_foreground() == Some(true)
        {
            let _ = tcsetattr(&self.tty, OptionalActions::Now, before);
        }
    }
}

fn prompt() -> MutexGuard<'static, Option<Prompt>> {
    PROMPT.lock().ignore_poison()
}

/// Gives the terminal back, or turns the echo on again, before this process stops or ends.
fn restore() {
    sprat_browse::restore();
    if let Some(prompt) = &*prompt() {
        prompt.echo_again();
    }
}

/// After a stop: turns the echo off again, discards what was typed meanwhile, and shows the prompt.
/// `false`: a prompt or the browser is open, and this process is in the background.
fn resume() -> bool {
    if !sprat_browse::resume() {
        return false;
    }
    let Some(prompt) = &*prompt() else {
        return true;
    };
    match prompt.in_foreground() {
        Some(true) => {}
        Some(false) => return false,
        // No shell would ever continue a process that stops now.
        None => return true,
    }
    if let Some((_, silent)) = &prompt.modes {
        let _ = tcsetattr(&prompt.tty, OptionalActions::Flush, silent);
    }
    let _ = (&prompt.tty).write_all(prompt.text.as_bytes());
    true
}

/// Shows a prompt until it is dropped.
struct Shown;

impl Shown {
    /// Shows a prompt; what is typed is echoed.
    fn openly(tty: &File, text: &str) -> std::io::Result<Self> {
        Self::begin(tty, text, None)
    }

    /// Shows a prompt; nothing that is typed is shown.
    fn silently(tty: &File, text: &str) -> std::io::Result<Self> {
        let before = tcgetattr(tty)?;
        let mut silent = before.clone();
        silent
            .local_modes
            .remove(LocalModes::ECHO | LocalModes::ECHONL);
        Self::begin(tty, text, Some((before, silent)))
    }

    fn begin(tty: &File, text: &str, modes: Option<(Termios, Termios)>) -> std::io::Result<Self> {
        let silent = modes.as_ref().map(|(_, silent)| silent.clone());
        *prompt() = Some(Prompt {
            tty: tty.try_clone()?,
            text: text.to_owned(),
            modes,
        });
        // From here on the terminal is restored when this is dropped.
        let shown = Self;
        if let Some(silent) = silent {
            // Started in the background, the process stops here until it is in the foreground.
            tcsetattr(tty, OptionalActions::Flush, &silent)?;
        }
        let mut tty = tty;
        tty.write_all(text.as_bytes())?;
        Ok(shown)
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(prompt) = prompt().take() {
            prompt.echo_again();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_does_not_stop_for_a_terminal_that_is_gone() {
        // /dev/null is not this session's terminal, so it has no foreground.
        let tty = File::open("/dev/null").unwrap();
        *prompt() = Some(Prompt {
            tty,
            text: String::new(),
            modes: None,
        });
        let goes_on = resume();
        *prompt() = None;
        assert!(goes_on);
    }
}
