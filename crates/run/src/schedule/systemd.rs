//! systemctl: the state of sprat's timers, and how they are enabled and disabled.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use jiff::Timestamp;
use serde::Serialize;
use sprat_session::{Failure, text};

use crate::timer::TIMERS;

/// What `systemctl show` is asked for.
const PROPERTIES: &str = "--property=Id,LoadState,UnitFileState,ActiveState,NextElapseUSecRealtime,\
                          ExecMainStartTimestamp,Result,ExecMainStatus";

/// One timer, and the last run of what it starts.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct TimerState {
    /// `sprat.timer` or `sprat-alert.timer`.
    pub unit: &'static str,
    /// The unit is there, from sprat or from a package.
    #[serde(skip)]
    pub exists: bool,
    /// It is started when the machine starts.
    pub enabled: bool,
    /// It runs now.
    pub active: bool,
    /// When it starts its service next.
    pub next: Option<Timestamp>,
    /// When the service was started last, since the machine started.
    pub last_start: Option<Timestamp>,
    /// How that ended, in systemd's word: `success`, `exit-code`, `signal`, `timeout` …; `None`: it did
    /// not run, or runs now.
    pub last_result: Option<String>,
    /// The exit code of that run.
    pub last_code: Option<u8>,
}

pub(super) struct Systemctl<'p>(pub(super) &'p OsStr);

impl Systemctl<'_> {
    /// Both timers, whether they exist or not.
    pub(super) fn timers(&self) -> Result<Vec<TimerState>, Failure> {
        let services = TIMERS.map(|timer| timer.replace(".timer", ".service"));
        let mut arguments = vec!["show", PROPERTIES];
        arguments.extend(TIMERS);
        arguments.extend(services.iter().map(String::as_str));
        let shown = self.run(&arguments)?;
        let block = |unit: &str| {
            let id = format!("Id={unit}");
            let mut blocks = shown.split("\n\n");
            blocks.find(|block| block.lines().any(|line| line == id))
        };
        let state = |(unit, service): (&'static str, &String)| {
            let timer = block(unit).unwrap_or_default();
            state(unit, timer, block(service).unwrap_or_default())
        };
        Ok(TIMERS.into_iter().zip(&services).map(state).collect())
    }

    pub(super) fn reload(&self) -> Result<(), Failure> {
        self.run(&["daemon-reload"]).map(drop)
    }

    pub(super) fn enable(&self, timers: &[&str]) -> Result<(), Failure> {
        self.run(&[&["enable", "--now"], timers].concat()).map(drop)
    }

    /// A run under way is not stopped: only the timers are.
    pub(super) fn disable(&self, timers: &[&str]) -> Result<(), Failure> {
        let arguments = [&["disable", "--now"], timers].concat();
        self.run(&arguments).map(drop)
    }

    fn run(&self, arguments: &[&str]) -> Result<String, Failure> {
        let shown = format!("systemctl {}", arguments[0]);
        let output = Command::new(self.0)
            .args(arguments)
            // Times and words in one form.
            .env("LC_ALL", "C")
            .env("TZ", "UTC")
            .env("SYSTEMD_PAGER", "")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| Failure::failed(format!("can't run {shown}")).caused_by(&error))?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let mut failure = Failure::failed(format!("{shown} failed: {}", output.status));
        let said = String::from_utf8_lossy(&output.stderr);
        for line in said.lines().filter(|line| !line.trim().is_empty()).take(5) {
            failure = failure.because(text::harmless(line.trim()));
        }
        Err(failure.with_hint("run the command again once that is corrected: it does what is left"))
    }
}

fn state(unit: &'static str, timer: &str, service: &str) -> TimerState {
    let last_start = value(service, "ExecMainStartTimestamp").and_then(time);
    // A service that runs has "success" as its result already.
    let runs = value(service, "ActiveState").is_some_and(|state| state == "activating");
    let ended = last_start.filter(|_| !runs);
    let result = ended.and_then(|_| value(service, "Result"));
    let code = ended.and_then(|_| value(service, "ExecMainStatus"));
    TimerState {
        unit,
        exists: value(timer, "LoadState").is_some_and(|state| state != "not-found"),
        enabled: value(timer, "UnitFileState") == Some("enabled"),
        active: value(timer, "ActiveState") == Some("active"),
        next: value(timer, "NextElapseUSecRealtime").and_then(time),
        last_start,
        last_result: result.map(str::to_owned),
        last_code: code.and_then(|code| code.parse().ok()),
    }
}

fn value<'b>(block: &'b str, name: &str) -> Option<&'b str> {
    let mut lines = block.lines().filter_map(|line| line.split_once('='));
    let (_, value) = lines.find(|(known, _)| *known == name)?;
    (!value.is_empty()).then_some(value)
}

/// `Sun 2026-11-29 09:52:00 UTC`.
fn time(text: &str) -> Option<Timestamp> {
    let (_, rest) = text.split_once(' ')?;
    format!("{}Z", rest.strip_suffix(" UTC")?).parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_systemctl_are_read() {
        let read = time("Sun 2026-11-29 09:52:00 UTC").map(|time| time.to_string());
        assert_eq!(read.as_deref(), Some("2026-11-29T09:52:00Z"));
        for other in ["n/a", "", "infinity", "Sun 2026-11-29 09:52:00 CET"] {
            assert_eq!(time(other), None, "{other}");
        }
    }
}
