//! A running `sprat --json`, and the events that it reported.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::leftovers::LIMIT;

/// Waits until a program handles `signal`, which would end it before, or until it has ended.
///
/// # Panics
/// When that takes too long.
pub fn until_it_handles(signal: Signal, pid: u32) {
    let until = Instant::now() + LIMIT;
    let bit = 1_u64 << (signal.as_raw() - 1);
    loop {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.unwrap_or_default().trim()
        };
        let handles = |name: &str| u64::from_str_radix(field(name), 16).unwrap_or(0) & bit != 0;
        // proc(5): blocked, ignored, caught.
        if ["SigBlk:", "SigIgn:", "SigCgt:"].into_iter().any(handles)
            || field("State:").starts_with('Z')
        {
            return;
        }
        assert!(
            Instant::now() < until,
            "{signal:?} is not handled:\n{status}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What the session reported last.
#[derive(Debug, Clone, Default)]
pub struct Reported {
    /// Its phase.
    pub phase: String,
    /// Bytes that the server has not yet synced.
    pub unsynced_bytes: u64,
    /// Lost connections so far.
    pub losses: u64,
    /// The connection is lost at present.
    pub away: bool,
}

impl Reported {
    /// Reads one line of `--json`: an event with a phase or the volume's figures.
    fn read(&mut self, line: &str) {
        let Ok(event) = serde_json::from_str::<serde_json::Value>(line) else {
            return;
        };
        if let Some(phase) = event.get("phase").and_then(serde_json::Value::as_str) {
            phase.clone_into(&mut self.phase);
        }
        if let Some(figures) = event.pointer("/progress/volume") {
            let number = |name: &str| figures.get(name).and_then(serde_json::Value::as_u64);
            self.unsynced_bytes = number("unsynced_bytes").unwrap_or(0);
            self.losses = number("losses").unwrap_or(0);
            self.away = number("reconnecting_ms").is_some();
        }
    }
}

/// The session, and what it reported.
#[derive(Debug)]
pub struct Running {
    /// Its process.
    pub child: Child,
    /// The newest events.
    pub reported: Reported,
    /// The last lines without figures, for a failing test's message.
    pub said: Vec<String>,
    /// When it was started.
    pub begun: Instant,
    lines: Receiver<String>,
}

impl Running {
    /// Starts `command`, which must report its progress as JSON.
    ///
    /// # Panics
    /// When the program does not start.
    pub fn start(command: &mut Command) -> Self {
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("sprat starts");
        let pipe = child.stderr.take().expect("stderr is a pipe");
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                // Read on without a receiver: the session must not wait for us.
                let _ = send.send(line);
            }
        });
        Self {
            child,
            reported: Reported::default(),
            said: Vec::new(),
            begun: Instant::now(),
            lines,
        }
    }

    /// Reads on until `enough`; false if the session ended its output before.
    ///
    /// # Panics
    /// When that takes longer than `limit`; the session is killed then.
    pub fn until(
        &mut self,
        limit: Duration,
        what: &str,
        enough: impl Fn(&Reported) -> bool,
    ) -> bool {
        self.within(limit, enough).unwrap_or_else(|| {
            let state = self.state();
            let _ = self.child.kill();
            panic!(
                "not within {limit:?}: {what}; {:?}\n{}\n{state}",
                self.reported,
                self.said.join("\n")
            );
        })
    }

    /// As [`Self::until`], but returns `None` when it takes longer than `limit`.
    pub fn within(&mut self, limit: Duration, enough: impl Fn(&Reported) -> bool) -> Option<bool> {
        let until = Instant::now() + limit;
        while !enough(&self.reported) {
            let left = until.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => self.read(line),
                Err(RecvTimeoutError::Disconnected) => return Some(false),
                Err(RecvTimeoutError::Timeout) => return None,
            }
        }
        Some(true)
    }

    /// Reads what was reported meanwhile.
    pub fn catch_up(&mut self) {
        while let Ok(line) = self.lines.try_recv() {
            self.read(line);
        }
    }

    fn read(&mut self, line: String) {
        self.reported.read(&line);
        if !line.contains("\"progress\"") {
            self.said.push(line);
            let surplus = self.said.len().saturating_sub(40);
            self.said.drain(..surplus);
        }
    }

    /// Waits for its end and returns the exit code, or none after a signal.
    ///
    /// # Panics
    /// When it takes longer than `limit`; it is killed then.
    pub fn end(&mut self, limit: Duration) -> Option<i32> {
        let until = Instant::now() + limit;
        loop {
            self.catch_up();
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                self.catch_up();
                return status.code();
            }
            if Instant::now() > until {
                let state = self.state();
                let _ = self.child.kill();
                panic!(
                    "the session hangs for {limit:?}: {:?}\n{}\n{state}",
                    self.reported,
                    self.said.join("\n")
                );
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What the kernel shows of the process.
    fn state(&self) -> String {
        let mut state = String::new();
        for name in ["wchan", "status", "stack"] {
            let file = format!("/proc/{}/{name}", self.child.id());
            let _ = write!(
                state,
                "{}",
                std::fs::read_to_string(file).unwrap_or_default()
            );
        }
        state
    }
}
