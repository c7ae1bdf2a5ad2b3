//! Runs the command that prints a passphrase; a signal ends it and all that it started.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ChildStdout, Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;
use sprat_session::Failure;
use sprat_session::child_tree::ChildTree;
use sprat_session::interrupt::Interrupt;
use zeroize::Zeroizing;

use crate::secret_file::{PASSPHRASE_BYTES_MAX, read_bounded};

/// Runs the command with our stderr and no input, and returns what it prints. `on_terminal`: it may ask there.
///
/// # Errors
/// The command can't be started, fails or prints too much, or the user interrupts.
pub fn run(
    words: &[OsString],
    on_terminal: bool,
    interrupt: &Interrupt,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let program = words[0].to_string_lossy().into_owned();
    let what = format!("the passphrase command {program:?}");
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    // In a process group of its own it would be stopped when it asks on the terminal.
    let own_group = !on_terminal;
    if own_group {
        command.process_group(0);
    }
    let child = command
        .spawn()
        .map_err(|error| Failure::usage(format!("{what} can't be started")).caused_by(&error))?;
    let mut running = ChildTree::new(child, own_group);
    let Some(stdout) = running.take_stdout() else {
        unreachable!("its stdout is a pipe")
    };
    let printed = read_bounded(
        Answer { stdout, interrupt },
        PASSPHRASE_BYTES_MAX,
        &format!("the answer of {what}"),
    );
    let status = match &printed {
        Ok(_) => running.wait(interrupt).map_err(|error| {
            Failure::failed(format!("{what} can't be waited for")).caused_by(&error)
        })?,
        Err(_) => None,
    };
    let Some(status) = status else {
        running.end();
        interrupt.check().map_err(|failure| {
            failure.with_hint(format!("nothing was changed, and {what} was ended"))
        })?;
        return printed;
    };
    // On a terminal Ctrl-C reaches the command, too.
    let interrupted = [Signal::INT, Signal::QUIT, Signal::TERM, Signal::HUP]
        .iter()
        .any(|signal| status.signal() == Some(signal.as_raw()));
    if interrupted && !own_group {
        return Err(Failure::interrupted().with_hint("nothing was changed"));
    }
    if !status.success() {
        return Err(Failure::failed(format!("{what} failed")).because(status.to_string()));
    }
    printed
}

/// The command's output; an interrupt ends the reading.
struct Answer<'i> {
    stdout: ChildStdout,
    interrupt: &'i Interrupt,
}

impl Read for Answer<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.interrupt.requested() {
                // Not the kind `Interrupted`, which asks to try again.
                return Err(io::Error::other("interrupted"));
            }
            let woken = self.interrupt.readable_when_requested();
            let mut fds = [
                PollFd::new(&self.stdout, PollFlags::IN),
                PollFd::new(&woken, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !fds[0].revents().is_empty() {
                return self.stdout.read(buf);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn words(script: &str) -> Vec<OsString> {
        ["sh", "-c", script].map(OsString::from).to_vec()
    }

    #[test]
    fn hanging_command_and_its_children_end_with_an_interrupt() {
        let folder = tempfile::tempdir().unwrap();
        let pid = folder.path().join("pid");
        // It ignores SIGTERM and leaves a child that keeps the pipe open.
        let script = format!(
            "trap '' TERM; sleep 600 & echo $! > {}; wait; sleep 600",
            pid.display()
        );
        let interrupt = Interrupt::never().unwrap();
        let stops = interrupt.clone();
        let seen = pid.clone();
        let stopper = std::thread::spawn(move || {
            while std::fs::read_to_string(&seen).map_or(true, |text| !text.ends_with('\n')) {
                std::thread::sleep(Duration::from_millis(5));
            }
            stops.request();
        });
        let failure = run(&words(&script), false, &interrupt).unwrap_err();
        stopper.join().unwrap();
        assert_eq!(failure.exit, sprat_session::Exit::Interrupted);
        let left = std::fs::read_to_string(&pid).unwrap();
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", left.trim()));
            // If no process waits for it, it stays a zombie.
            stat.map_or(true, |stat| stat.contains(") Z "))
        };
        let until = Instant::now() + Duration::from_secs(20);
        while !gone() {
            assert!(Instant::now() < until, "process {left} is left");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn failure_of_the_command_is_reported_and_its_answer_is_taken() {
        let interrupt = Interrupt::never().unwrap();
        let answer = run(&words("printf 'a b'"), false, &interrupt).unwrap();
        assert_eq!(answer.as_slice(), b"a b");
        assert!(run(&words("printf x; exit 3"), false, &interrupt).is_err());
    }
}
