//! What the administrator has to know: space, alarms, overdue containers; as text, JSON or for Prometheus.

use std::fmt::Write;
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::clock::DAY_S;
use crate::disk;
use crate::generation;
use crate::root::{Root, TIDIED};
use crate::state::{CHANGED_OUTSIDE, changed_outside, whole_state};
use crate::time_text::{self, show_bytes};

/// The exit codes of `status`: the gravest that applies.
pub const ALARM: u8 = 3;
pub const OVERDUE: u8 = 4;
pub const QUOTA: u8 = 5;

const UNCONFINED: &str = "note: the last connection was not confined by Landlock; a fault of this program reaches all \
                          files of its account; adopt prints how to confine it\n";
/// `tidy` should run every hour.
const TIDY_MAX_S: i64 = 2 * DAY_S;

/// One container.
#[derive(Default)]
pub struct Report {
    pub name: String,
    pub states: usize,
    pub last_write_s: i64,
    session_open: bool,
    /// The record of the state: nobody can write.
    damaged: bool,
    alarm: Option<String>,
    hold: bool,
    overdue: bool,
}

type Figure = fn(&Report) -> i64;

/// A root with its containers.
pub struct Status {
    pub used: u64,
    available: u64,
    total: u64,
    clock_apart: bool,
    tidy_is_overdue: bool,
    quota_is_full: bool,
    confined: bool,
    pub containers: Vec<Report>,
}

/// Whether no session ended in order for longer than the policy expects. Where no client ever said how it
/// leaves a container (sftp, an older sprat), each write counts.
pub fn is_overdue(root: &Root, name: &str, wall_s: i64) -> io::Result<bool> {
    let state = root
        .kept(name)?
        .map_or(Ok(None), |kept| whole_state(&kept))?;
    let clean_s = state.map_or(0, |state| state.clean_s);
    let since_s = match clean_s {
        0 => root.live(name)?.metadata()?.mtime(),
        clean_s => clean_s,
    };
    Ok(root
        .policy
        .expect_s
        .is_some_and(|expect_s| wall_s - since_s > expect_s))
}

fn report(root: &Root, name: &str, wall_s: i64) -> io::Result<Report> {
    let live = root.live(name)?;
    let mut report = Report {
        name: name.to_owned(),
        last_write_s: live.metadata()?.mtime(),
        overdue: is_overdue(root, name, wall_s)?,
        ..Report::default()
    };
    let Some(folder) = root.kept(name)? else {
        return Ok(report);
    };
    report.states = generation::numbers(&folder)?.len();
    report.hold = disk::exists_in(&folder, "hold")?;
    match whole_state(&folder)? {
        Some(state) => report.session_open = state.writing,
        None => report.damaged = true,
    }
    if changed_outside(&folder, &live)? {
        report.alarm = Some(CHANGED_OUTSIDE.to_owned());
    }
    if let Some(text) = disk::text_in(&folder, "alarm", 4096)? {
        report.alarm = Some(text.trim().to_owned());
    }
    Ok(report)
}

impl Status {
    pub fn of(root: &Root) -> io::Result<Self> {
        let now = root.clock.now()?;
        let used = root.space.used()?;
        let (available, total) = root.space.available()?;
        // From `adopt` on where it never ran.
        let tidied = disk::text_in(&root.agent, TIDIED, 64)?;
        let tidied_s: i64 = tidied.map_or(0, |text| disk::number(&text, TIDIED).unwrap_or(0));
        let names = root.containers()?;
        let reports = names.iter().map(|name| report(root, name, now.wall_s));
        Ok(Self {
            used,
            available,
            total,
            clock_apart: now.apart,
            tidy_is_overdue: now.counted_s - tidied_s > TIDY_MAX_S,
            confined: root.is_confined()?,
            quota_is_full: root.policy.quota.is_some_and(|quota| used > quota / 10 * 9),
            containers: reports.collect::<io::Result<_>>()?,
        })
    }

    pub fn code(&self) -> u8 {
        let any = |what: fn(&Report) -> bool| self.containers.iter().any(what);
        match () {
            () if self.clock_apart
                || self.tidy_is_overdue
                || any(|one| one.damaged || one.alarm.is_some()) =>
            {
                ALARM
            }
            () if any(|one| one.overdue) => OVERDUE,
            () if self.quota_is_full => QUOTA,
            () => 0,
        }
    }

    /// What is wrong with the root itself.
    pub fn own_problems(&self) -> Vec<String> {
        let mut found = Vec::new();
        if self.clock_apart {
            found.push(
                "ALARM: the wall clock moved by more than a day; nothing expires. If it is right now, run \
                 sprat-agent clock accept"
                    .to_owned(),
            );
        }
        if self.tidy_is_overdue {
            found.push(
                "ALARM: tidy has not run to its end for two days; nothing expires. Let cron run it every hour"
                    .to_owned(),
            );
        }
        if self.quota_is_full {
            found.push("QUOTA: more than 90 % is used".to_owned());
        }
        found
    }

    /// What is wrong, a line each. The lines stay the same as long as nothing changes.
    pub fn problems(&self) -> Vec<String> {
        let mut found = self.own_problems();
        for one in &self.containers {
            let name = &one.name;
            found.extend(
                one.problems()
                    .iter()
                    .map(|problem| format!("{name}: {problem}")),
            );
        }
        found
    }

    pub fn text(&self) -> String {
        let (used, available) = (show_bytes(self.used), show_bytes(self.available));
        let mut text = format!("used {used}, available {available}\n");
        for one in &self.containers {
            let last = time_text::name(one.last_write_s);
            let _ = writeln!(
                text,
                "{}: {} past states, last write {last}{}",
                one.name,
                one.states,
                if one.hold {
                    "; held: nothing expires"
                } else {
                    ""
                }
            );
        }
        for problem in self.problems() {
            text += &format!("{problem}\n");
        }
        text + if self.confined { "" } else { UNCONFINED }
    }

    pub fn json(&self) -> String {
        let containers: Vec<String> = self
            .containers
            .iter()
            .map(|one| {
                format!(
                    "{{\"name\":{},\"states\":{},\"last_write\":{},\"session_open\":{},\"damaged\":{},\"alarm\":{},\
                     \"hold\":{},\"overdue\":{}}}",
                    quoted(&one.name),
                    one.states,
                    one.last_write_s,
                    one.session_open,
                    one.damaged,
                    one.alarm.is_some(),
                    one.hold,
                    one.overdue
                )
            })
            .collect();
        let problems: Vec<String> = self.problems().iter().map(|line| quoted(line)).collect();
        format!(
            "{{\"used\":{},\"available\":{},\"total\":{},\"clock_apart\":{},\"tidy_overdue\":{},\"code\":{},\"problems\":[{}],\
             \"containers\":[{}]}}\n",
            self.used,
            self.available,
            self.total,
            self.clock_apart,
            self.tidy_is_overdue,
            self.code(),
            problems.join(","),
            containers.join(",")
        )
    }

    /// Figures for a text file that Prometheus's node exporter reads.
    pub fn prometheus(&self) -> String {
        let mut text = String::new();
        let mut gauge = |name: &str, help: &str, values: &[(Option<&str>, String)]| {
            let _ = writeln!(
                text,
                "# HELP sprat_agent_{name} {help}\n# TYPE sprat_agent_{name} gauge"
            );
            for (container, value) in values {
                let label = container.map_or_else(String::new, |name| {
                    format!("{{container={}}}", quoted(name))
                });
                let _ = writeln!(text, "sprat_agent_{name}{label} {value}");
            }
        };
        for (name, help, value) in [
            ("used_bytes", "Space that the folder uses.", self.used),
            (
                "available_bytes",
                "Space that may still be used.",
                self.available,
            ),
            ("total_bytes", "The quota, or the disk.", self.total),
            (
                "clock_apart",
                "1 if the wall clock moved by more than a day.",
                u64::from(self.clock_apart),
            ),
            (
                "tidy_overdue",
                "1 if tidy has not run for two days.",
                u64::from(self.tidy_is_overdue),
            ),
            (
                "status_code",
                "The exit code of status.",
                u64::from(self.code()),
            ),
        ] {
            gauge(name, help, &[(None, value.to_string())]);
        }
        let figures: [(&str, &str, Figure); 7] = [
            ("past_states", "Past states.", |one| {
                i64::try_from(one.states).unwrap_or(i64::MAX)
            }),
            (
                "last_write_timestamp_seconds",
                "When a client wrote last.",
                |one| one.last_write_s,
            ),
            (
                "session_open",
                "1 if a session writes, or ended abruptly.",
                |one| one.session_open.into(),
            ),
            (
                "state_damaged",
                "1 if nobody can write before a repair.",
                |one| one.damaged.into(),
            ),
            ("alarm", "1 if there is an alarm.", |one| {
                one.alarm.is_some().into()
            }),
            ("overdue", "1 if a backup is overdue.", |one| {
                one.overdue.into()
            }),
            ("hold", "1 if nothing expires.", |one| one.hold.into()),
        ];
        for (name, help, figure) in figures {
            let values: Vec<_> = self
                .containers
                .iter()
                .map(|one| (Some(one.name.as_str()), figure(one).to_string()))
                .collect();
            gauge(name, help, &values);
        }
        text
    }
}

impl Report {
    pub fn problems(&self) -> Vec<String> {
        let name = &self.name;
        let mut found = Vec::new();
        if self.damaged {
            found.push(format!(
                "ALARM: the record of the state is damaged, and nobody can write. Run sprat-agent repair {name}"
            ));
        }
        if let Some(alarm) = &self.alarm {
            found.push(format!(
                "ALARM: {alarm}. If that was you, run sprat-agent ack {name}"
            ));
        }
        if self.overdue {
            found.push(
                "OVERDUE: no session ended in order for longer than the policy expects; nothing expires"
                    .to_owned(),
            );
        }
        found
    }
}

/// Text in quotes, for JSON and for Prometheus.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out + "\""
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::State;

    #[test]
    fn only_a_session_that_ended_in_order_counts_as_a_backup() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("x.luks"), "now").unwrap();
        Root::adopt(folder.path()).unwrap();
        std::fs::write(folder.path().join(".sprat-agent/policy"), "expect = 26h\n").unwrap();
        let root = Root::open(folder.path(), None).unwrap();
        let now_s = root.clock.now().unwrap().wall_s;
        let overdue = || is_overdue(&root, "x.luks", now_s).unwrap();
        // No client ever said how it left the container: the write of this moment counts.
        assert!(!overdue());
        let kept = disk::make_folder_in(&root.agent, "x.luks").unwrap();
        let ended = |clean_s| {
            let state = State {
                clean_s,
                ..State::default()
            };
            let slots = disk::Slots::open(&kept, "state").unwrap();
            slots.write(&state.to_text()).unwrap();
        };
        ended(0);
        assert!(!overdue());
        ended(now_s - 3600);
        assert!(!overdue());
        ended(now_s - 27 * 3600);
        assert!(overdue());
    }
}
