//! What people read about the schedule.

use std::path::Path;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_session::{Exit, text};

use super::{Changes, FileState, Installed, Scheduler, TimerState};
use crate::config::{Config, ConfigPlaces};

/// Why an installed schedule starts nothing.
#[must_use]
pub fn inactive_warning(installed: &Installed) -> Option<String> {
    (installed.cron_runs == Some(false)).then(|| {
        "NOTHING starts sprat: no cron daemon runs, and systemd is not PID 1. Start a cron daemon, or keep \
         `sprat run --loop` running"
            .to_owned()
    })
}

/// What `install` or `remove` (`what`) changed. `active`: something starts sprat from now on.
#[must_use]
pub fn changes_text(what: &str, scheduler: Scheduler, changes: &Changes, active: bool) -> String {
    let installs = what == "install";
    if changes.is_nothing() {
        let state = if installs { "installed" } else { "not there" };
        return format!("nothing to do: the schedule is {state}\n");
    }
    let mut text = String::new();
    for path in &changes.written {
        text.push_str(&format!("wrote {}\n", path.display()));
    }
    for path in &changes.deleted {
        text.push_str(&format!("deleted {}\n", path.display()));
    }
    if !changes.timers.is_empty() {
        let done = if installs { "enabled" } else { "disabled" };
        text.push_str(&format!("{done} {}\n", changes.timers.join(", ")));
    }
    let by = match scheduler {
        Scheduler::Systemd => "systemd",
        Scheduler::Cron => "cron",
    };
    text.push_str(&match installs {
        true if !active => String::new(),
        true => format!(
            "{by} starts `sprat run` every 15 minutes now. `sprat schedule show` says when\n"
        ),
        false => "sprat is not started by itself any more\n".to_owned(),
    });
    text
}

/// Without a job nothing is ever backed up, and no error says so. `folder` is that of root's config.
#[must_use]
pub fn config_warning(folder: &Path) -> Option<String> {
    let places = ConfigPlaces {
        root: true,
        home: None,
        folder: Some(folder.to_owned()),
    };
    let path = folder.join("sprat.toml");
    let path = path.display();
    match Config::load(None, &places) {
        Ok(config) if config.files.is_empty() => Some(format!(
            "there is no config {path}: nothing is backed up. Only root's config is scheduled"
        )),
        Ok(config) if config.jobs.is_empty() => Some(format!(
            "the config {path} has no [job.NAME]: nothing is backed up"
        )),
        Ok(_) => None,
        Err(failure) => Some(failure.in_one_line()),
    }
}

/// What is installed.
#[must_use]
pub fn installed_text(installed: &Installed) -> String {
    let mut text = match (installed.active, installed.scheduler) {
        (true, Scheduler::Systemd) => "systemd starts sprat\n".to_owned(),
        (true, Scheduler::Cron) => "cron starts sprat\n".to_owned(),
        (false, _) => match inactive_warning(installed).filter(|_| !installed.files.is_empty()) {
            Some(warning) => format!("{warning}\n"),
            None => "NOTHING starts sprat by itself: run `sprat schedule install`\n".to_owned(),
        },
    };
    for file in &installed.files {
        let state = match file.state {
            FileState::Unchanged => "",
            FileState::Edited => ", changed since sprat wrote it",
            FileState::Foreign => ", not written by `sprat schedule install`",
        };
        text.push_str(&format!("file {}{state}\n", file.path.display()));
    }
    if let Some(next) = installed.cron_next.filter(|_| installed.active) {
        text.push_str(&format!("next run {}\n", local(next)));
    }
    let mut rows = vec![
        ["TIMER", "STATE", "NEXT", "LAST", "ENDED"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(installed.timers.iter().map(row));
    if rows.len() > 1 {
        text.push_str(&text::table(&rows, &[]));
    }
    text
}

fn row(timer: &TimerState) -> Vec<String> {
    let state = match (timer.enabled, timer.active) {
        (true, true) => "active",
        (true, false) => "enabled, not active",
        (false, true) => "active, not enabled",
        (false, false) => "off",
    };
    let time = |at: Option<Timestamp>| at.map_or("-".to_owned(), local);
    vec![
        timer.unit.to_owned(),
        state.to_owned(),
        time(timer.next),
        time(timer.last_start),
        ended(timer),
    ]
}

fn ended(timer: &TimerState) -> String {
    let code = |code: u8| {
        let known = Exit::ALL.into_iter().find(|exit| exit.code() == code);
        match known {
            Some(exit) => format!("{code}: {}", exit.meaning()),
            None => code.to_string(),
        }
    };
    match (timer.last_result.as_deref(), timer.last_code) {
        (None, _) if timer.last_start.is_some() => "still runs".to_owned(),
        (None, _) => "-".to_owned(),
        (Some("success" | "exit-code"), Some(number)) => code(number),
        (Some(result), _) => result.to_owned(),
    }
}

/// `2026-11-28 14:00`, in the machine's time zone.
fn local(at: Timestamp) -> String {
    let zoned = TimeZone::system().to_datetime(at);
    zoned.strftime("%Y-%m-%d %H:%M").to_string()
}
