//! Reports the progress of a session: one line on a terminal, plain lines elsewhere, or JSON events.

use std::time::{Duration, Instant};

use serde_json::json;
use sprat_run::notice_text::notice_text;
use sprat_run::progress_text::{is_long, phase_text, progress_text};
use sprat_session::{Notice, Observer, Phase, SessionProgress, text};

use super::streams::{Output, write_stderr};

/// Between two changes of the line on a terminal.
const TERMINAL_INTERVAL: Duration = Duration::from_millis(200);
/// Between two events for a program that shows them.
const JSON_INTERVAL: Duration = Duration::from_secs(1);
/// Between two plain lines: rare enough for a log that is kept.
const PLAIN_INTERVAL: Duration = Duration::from_secs(15);

/// A path has at most 4,096 bytes. One that can't be printed takes 5 characters.
const FILE_CHARACTERS_MAX: usize = 5 * 4096;

/// Reports the progress and the notices of a session.
#[derive(Debug)]
pub(crate) struct Reporter {
    output: Output,
    /// The prefix of each line, such as the job's name.
    subject: String,
    phase: Option<Phase>,
    shown_at: Option<Instant>,
    /// A progress line is on the terminal; the next output replaces it.
    line_shown: bool,
    /// The server has little free space.
    server_low: bool,
}

impl Reporter {
    /// A reporter for `subject`, such as `home: `.
    pub(crate) fn new(output: Output, subject: impl Into<String>) -> Self {
        Self {
            output,
            subject: subject.into(),
            phase: None,
            // A run of a few seconds needs no line in a log.
            shown_at: (!output.terminal).then(Instant::now),
            line_shown: false,
            server_low: false,
        }
    }

    /// Whether the session reported that the server has little free space, or released the reserve.
    pub(crate) fn server_is_low(&self) -> bool {
        self.server_low
    }

    /// Sets what the next lines are about.
    pub(crate) fn about(&mut self, subject: impl Into<String>) {
        self.subject = subject.into();
    }

    /// Clears the progress line of the terminal, so that a result can be printed.
    pub(crate) fn clear(&mut self) {
        if self.line_shown {
            write_stderr("\r\x1b[K");
            self.line_shown = false;
        }
    }

    /// Whether the next report of progress is due.
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

    /// Reports progress of another kind than a session's if it is due: a line, or an event in JSON.
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

    /// Reports that a step begins, if every step is reported.
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

    /// Reports something beside the progress.
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

    fn wants_files(&self) -> bool {
        self.output.verbose
    }

    fn copied(&mut self, path: &str) {
        if self.output.json {
            let event = json!({ "copied": path, "about": self.subject.trim_end() });
            self.output.event(&event);
        } else {
            self.clear();
            let path = text::harmless_within(path, FILE_CHARACTERS_MAX);
            write_stderr(&format!("{}/{path}\n", self.subject));
        }
    }
}
