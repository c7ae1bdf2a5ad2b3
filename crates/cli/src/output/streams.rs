//! Results to stdout, everything else to stderr, for people or as JSON.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use sprat_session::text;

use super::failure_json;
use crate::Failure;
use crate::args::GlobalArgs;

/// How this run prints. The default is plain text, for what fails before the command line is read.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Output {
    /// JSON instead of text.
    pub json: bool,
    /// Results and failures only.
    pub quiet: bool,
    /// Every step.
    pub verbose: bool,
    /// stderr is a terminal.
    pub terminal: bool,
    /// The time between two reports of progress, if the user sets it.
    pub progress_interval: Option<Duration>,
}

/// Whether the reader of a pipe or a socket has closed its end.
fn is_closed(out: &impl std::os::fd::AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut polled = [PollFd::new(out, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // POLLERR: "the reading end of the pipe has been closed" (poll(2)).
    poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::ERR)
}

impl Output {
    /// As the command line sets it.
    pub(crate) fn new(global: &GlobalArgs) -> Self {
        Self {
            json: global.json,
            quiet: global.quiet,
            verbose: global.verbose,
            terminal: std::io::stderr().is_terminal(),
            progress_interval: global.progress_interval,
        }
    }

    /// Prints the command's result: `text` (ending in a newline, or empty), or `json` as one line.
    pub(crate) fn result(
        self,
        text: &(impl AsRef<[u8]> + ?Sized),
        json: &impl Serialize,
    ) -> Result<(), Failure> {
        let mut out = std::io::stdout().lock();
        let written = if self.json {
            serde_json::to_writer(&mut out, json)
                .map_err(std::io::Error::from)
                .and_then(|()| out.write_all(b"\n"))
        } else {
            out.write_all(text.as_ref())
        };
        match written.and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(error) => Err(
                Failure::failed("the result can't be written to standard output").caused_by(&error),
            ),
        }
    }

    /// Checks that standard output can show a secret, and that other users can't read it there. Call it
    /// before anything depends on the secret.
    ///
    /// # Errors
    /// Standard output is closed, is `/dev/null`, or is a file that others can read: an empty one of this
    /// user's gets mode 0600, any other is refused.
    pub(crate) fn ready_for_secret(self) -> Result<(), Failure> {
        let out = rustix::stdio::stdout();
        let refused = |why: &str| {
            Err(
                Failure::usage(format!("the recovery sheet can't be shown: {why}"))
                    .with_hint("nothing was started. Have it written to a new file: --sheet FILE"),
            )
        };
        let (Ok(about), Ok(flags)) = (rustix::fs::fstat(out), rustix::fs::fcntl_getfl(out)) else {
            return refused("standard output is closed");
        };
        if flags & rustix::fs::OFlags::ACCMODE == rustix::fs::OFlags::RDONLY {
            return refused("standard output can't be written to");
        }
        // A standard output that was closed when the program began is /dev/null by now (Rust's
        // runtime opens it).
        let kind = rustix::fs::FileType::from_raw_mode(about.st_mode);
        let null = rustix::fs::makedev(1, 3);
        if kind == rustix::fs::FileType::CharacterDevice && about.st_rdev == null {
            return refused("standard output is closed, or is /dev/null");
        }
        if kind != rustix::fs::FileType::RegularFile || about.st_mode & 0o077 == 0 {
            return Ok(());
        }
        // A process that has opened the file already can still read it.
        if about.st_size == 0 && rustix::fs::fchmod(out, rustix::fs::Mode::from(0o600)).is_ok() {
            self.note(
                "the mode of the file on standard output is 0600 now: it gets the recovery key",
            );
            return Ok(());
        }
        refused(&format!(
            "standard output is a file that others can read (mode {:04o})",
            about.st_mode & 0o7777
        ))
    }

    /// As [`result`](Self::result), for listings: a reader that closes the pipe early (`| head`) is no
    /// failure.
    pub(crate) fn listing(
        self,
        text: &(impl AsRef<[u8]> + ?Sized),
        json: &impl Serialize,
    ) -> Result<(), Failure> {
        if is_closed(&std::io::stdout()) {
            return Ok(());
        }
        match self.result(text, json) {
            Err(_) if is_closed(&std::io::stdout()) => Ok(()),
            written => written,
        }
    }

    /// Reports something that happened, unless quiet.
    pub(crate) fn note(self, text: &str) {
        if !self.quiet {
            self.line(text);
        }
    }

    /// Shows what the next question is about; with `-q` too.
    pub(crate) fn asked_about(self, text: &str) {
        self.line(text);
    }

    /// Warns of something that matters for the safety of the data; with `-q` too.
    pub(crate) fn warning(self, text: &str) {
        self.line(&format!("warning: {text}"));
    }

    /// Reports how a command failed.
    pub(crate) fn failure(self, failure: &Failure) {
        if self.json {
            self.event(&json!({ "failure": failure_json(failure) }));
            return;
        }
        let mut text = format!("sprat: {}\n", text::harmless(&failure.what));
        if !failure.causes.is_empty() {
            text.push_str("Caused by:\n");
            for (index, cause) in failure.causes.iter().enumerate() {
                text.push_str(&format!("  {}: {}\n", index + 1, text::harmless(cause)));
            }
        }
        if let Some(hint) = &failure.hint {
            text.push_str(&format!("Hint: {}\n", text::harmless(hint)));
        }
        write_stderr(&text);
    }

    fn line(self, text: &str) {
        if self.json {
            self.event(&json!({ "note": text }));
        } else {
            write_stderr(&format!("sprat: {}\n", text::harmless(text)));
        }
    }

    /// One line of JSON on stderr.
    pub(super) fn event(self, event: &serde_json::Value) {
        write_stderr(&format!("{event}\n"));
    }
}

/// Prints a message of the command line's parser, which ends in a newline.
pub(crate) fn complain(text: &str) {
    write_stderr(&format!("sprat: {text}"));
}

/// Writes in one call, so that lines of several processes don't mix. A failure is ignored: without stderr
/// it can't be reported.
pub(super) fn write_stderr(text: &str) {
    let mut err = std::io::stderr().lock();
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}
