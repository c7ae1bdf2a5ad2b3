//! What a session does, while it does it: one line on a terminal, plain lines elsewhere.

use std::time::{Duration, Instant};

use serde_json::json;
use sprat_session::{Notice, Observer, Phase, SessionProgress, text};

use super::notices::notice_text;
use super::progress::{is_long, phase_text, progress_text};
use super::streams::{Output, write_stderr};

/// Between two changes of the line on a terminal.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(200);
/// Between two events for a program that shows them.
const JSON_INTERVAL: Duration = Duration::from_secs(1);
/// Between two plain lines: rare enough for a log that is kept.
const PLAIN_INTERVAL: Duration = Duration::from_secs(15);

/// Tells the user what a session does.
#[derive(Debug)]
pub(crate) struct Reporter {
    output: Output,
    /// Put in front of each line, such as the job's name.
    subject: String,
    phase: Option<Phase>,
    shown_at: Option<Instant>,
    /// The terminal's present line, which the next output replaces.
    line_shown: bool,
    /// The server told of little room.
    server_low: bool,
}

impl Reporter {
    /// A reporter for `subject`, such as `home: `.
    pub(crate) fn new(output: Output, subject: impl Into<String>) -> Self {
        Self {
            output,
            subject: subject.into(),
            phase: None,
            // A run that is over in seconds needs no line in a log.
            shown_at: (!output.terminal).then(Instant::now),
            line_shown: false,
            server_low: false,
        }
    }

    /// Whether the session told that the server has little room left, or gave up the reserve for it.
    pub(crate) fn server_is_low(&self) -> bool {
        self.server_low
    }

    /// Says whom the next lines are about.
    pub(crate) fn about(&mut self, subject: impl Into<String>) {
        self.subject = subject.into();
    }

    /// Takes the progress line off the terminal, so that a result can be printed.
    pub(crate) fn clear(&mut self) {
        if self.line_shown {
            write_stderr("\r\x1b[K");
            self.line_shown = false;
        }
    }

    /// Whether people or programs want to hear of progress again.
    fn is_due(&self) -> bool {
        let usual = if self.output.json {
            JSON_INTERVAL
        } else if self.output.terminal {
            TERMINAL_INTERVAL
        } else {
            PLAIN_INTERVAL
        };
        let interval = self.output.progress_interval.unwrap_or(usual);
        !self.output.quiet && self.shown_at.is_none_or(|at| at.elapsed() >= interval)
    }

    /// Shows progress of another kind than a session's, where it is due: a line, or for programs
    /// an event.
    pub(crate) fn other_progress(&mut self, line: &str, event: &serde_json::Value) {
        if !self.is_due() {
            return;
        }
        if self.output.json {
            self.shown_at = Some(Instant::now());
            self.output.event(event);
        } else {
            self.show(&format!("{}{line}", self.subject));
        }
    }

    /// Tells that something begins, where every step is told.
    pub(crate) fn step(&mut self, line: &str, event: &serde_json::Value) {
        if self.output.quiet {
            return;
        }
        if self.output.json {
            self.output.event(event);
        } else if self.output.terminal || self.output.verbose {
            self.show(&format!("{}{line}", self.subject));
        }
    }

    /// Tells something beside the progress.
    pub(crate) fn tell(&mut self, line: &str, matters: bool) {
        self.clear();
        if matters {
            self.output.warning(line);
        } else {
            self.output.note(line);
        }
    }

    fn show(&mut self, line: &str) {
        if self.output.terminal {
            let width = rustix::termios::tcgetwinsize(rustix::stdio::stderr())
                .map_or(80, |size| usize::from(size.ws_col).max(20));
            let line = text::harmless_columns(line, width - 2);
            write_stderr(&format!("\r\x1b[K{line}"));
            self.line_shown = true;
        } else {
            write_stderr(&format!("sprat: {}\n", text::harmless(line)));
        }
        self.shown_at = Some(Instant::now());
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Observer for Reporter {
    fn phase(&mut self, phase: Phase) {
        let changed = self.phase.replace(phase) != Some(phase);
        if self.output.quiet || !changed {
            return;
        }
        if self.output.json {
            self.output
                .event(&json!({ "phase": phase, "about": self.subject.trim_end() }));
        } else if self.output.terminal || self.output.verbose || is_long(phase) {
            let line = format!("{}{}", self.subject, phase_text(phase));
            self.show(&line);
        }
    }

    fn progress(&mut self, progress: &SessionProgress) {
        if !self.is_due() {
            return;
        }
        if self.output.json {
            self.shown_at = Some(Instant::now());
            let event = json!({
                "progress": { "phase": self.phase, "rsync": progress.rsync, "volume": progress.volume },
                "about": self.subject.trim_end(),
            });
            self.output.event(&event);
            return;
        }
        let phase = self.phase.map_or("", phase_text);
        let line = format!("{}{}", self.subject, progress_text(phase, progress));
        self.show(&line);
    }

    fn notice(&mut self, notice: Notice) {
        self.server_low |= matches!(
            notice,
            Notice::ServerSpaceLow { .. } | Notice::ReserveGivenUp
        );
        let (text, matters) = notice_text(&notice);
        if self.output.quiet && !matters {
            return;
        }
        self.clear();
        if self.output.json {
            self.output
                .event(&json!({ "notice": notice, "about": self.subject.trim_end() }));
            return;
        }
        let text = format!("{}{text}", self.subject);
        if matters {
            self.output.warning(&text);
        } else {
            self.output.note(&text);
        }
    }
}
