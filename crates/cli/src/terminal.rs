//! Asks for a passphrase on the terminal, without echo.

use std::fs::{File, OpenOptions};
use std::io::Write;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::{Zeroize, Zeroizing};

use crate::Failure;
use crate::interrupt::Interrupt;

/// Longest line that is taken; the terminal itself (N_TTY_BUF_SIZE) gives no more.
const LINE_BYTES_MAX: usize = 4096;

/// Shows `prompt` on the controlling terminal and reads one line from it. Ctrl-C ends it, and the
/// terminal echoes again afterwards, whatever happened.
pub(crate) fn ask(prompt: &str, interrupt: &Interrupt) -> Result<Zeroizing<String>, Failure> {
    let tty = open().map_err(|error| {
        Failure::usage("no key: none is named, and there is no terminal to ask on")
            .caused_by(&error)
            .with_hint(
                "nothing was started. Name one with --key-file, --passphrase-file or \
                 --passphrase-command, or in the config",
            )
    })?;
    let failed = |error: std::io::Error| {
        Failure::failed("can't ask for the passphrase on the terminal").caused_by(&error)
    };
    let silence = Silence::begin(&tty).map_err(failed)?;
    (&tty).write_all(prompt.as_bytes()).map_err(failed)?;
    let line = read_line(&tty, interrupt);
    drop(silence);
    let _ = (&tty).write_all(b"\n");
    let line = line?;
    if line.is_empty() {
        return Err(Failure::usage("the passphrase is empty"));
    }
    let text = std::str::from_utf8(&line)
        .map_err(|_| Failure::usage("the passphrase is not UTF-8 text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Whether there is a terminal to ask on.
pub(crate) fn is_there() -> bool {
    open().is_ok()
}

/// Asks for something that is no secret; an empty line is an answer, too.
pub(crate) fn ask_openly(prompt: &str, interrupt: &Interrupt) -> Result<String, Failure> {
    let failed =
        |error: std::io::Error| Failure::usage("there is no terminal to ask on").caused_by(&error);
    let tty = open().map_err(failed)?;
    (&tty).write_all(prompt.as_bytes()).map_err(failed)?;
    let line = read_line(&tty, interrupt)?;
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

/// No echo for as long as this lives.
struct Silence<'t> {
    tty: &'t File,
    before: Termios,
}

impl<'t> Silence<'t> {
    fn begin(tty: &'t File) -> std::io::Result<Self> {
        let before = tcgetattr(tty)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(tty, OptionalActions::Flush, &silent)?;
        Ok(Self { tty, before })
    }
}

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        let _ = tcsetattr(self.tty, OptionalActions::Now, &self.before);
    }
}
