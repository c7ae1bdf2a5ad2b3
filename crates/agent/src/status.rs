//! What the administrator has to know: space, alarms, overdue containers.

use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::OFlags;

use crate::disk::{self, bad};
use crate::generation;
use crate::names::Name;
use crate::root::Root;
use crate::state::{changed_outside, is_damaged, read_state};
use crate::time_text::{self, show_bytes};

/// The exit codes of `status`: the gravest that applies.
pub const ALARM: u8 = 3;
pub const OVERDUE: u8 = 4;
pub const QUOTA: u8 = 5;

/// One container's figures for `status`.
struct Report {
    name: String,
    states: usize,
    last_write_s: i64,
    session_open: bool,
    /// The record of the state: nobody can write.
    damaged: bool,
    alarm: Option<String>,
    hold: bool,
    overdue: bool,
}

fn report(root: &Root, name: &str, wall_s: i64) -> io::Result<Report> {
    let parsed = Name::parse(name).ok_or_else(|| bad("not a container"))?;
    let last_write_s = root.open_file(&parsed, OFlags::RDONLY)?.metadata()?.mtime();
    let overdue = root
        .policy
        .expect_s
        .is_some_and(|expect_s| wall_s - last_write_s > expect_s);
    let mut report = Report {
        name: name.to_owned(),
        states: 0,
        last_write_s,
        session_open: false,
        damaged: false,
        alarm: None,
        hold: false,
        overdue,
    };
    if let Some(folder) = root.kept(name)? {
        report.states = generation::numbers(&folder)?.len();
        if is_damaged(&folder)? {
            report.damaged = true;
            return Ok(report);
        }
        report.session_open = read_state(&disk::Slots::open(&folder, "state")?)?.writing;
        if changed_outside(&folder, &root.live(name)?)? {
            report.alarm =
                Some("the container was changed by something else than sprat-agent".to_owned());
        }
        report.hold = disk::exists_in(&folder, "hold")?;
        if disk::exists_in(&folder, "alarm")? {
            report.alarm = Some(
                String::from_utf8_lossy(&disk::read_all(&folder, "alarm", 4096)?)
                    .trim()
                    .to_owned(),
            );
        }
    }
    Ok(report)
}

/// The state of a root, as text or JSON, and the exit code.
pub fn status(root: &Root, json: bool) -> io::Result<(String, u8)> {
    let now = root.clock.now()?;
    let used = root.space.used()?;
    let (available, total) = root.space.available()?;
    let reports: Vec<Report> = root
        .containers()?
        .iter()
        .map(|name| report(root, name, now.wall_s))
        .collect::<io::Result<_>>()?;
    let quota_is_full = root.policy.quota.is_some_and(|quota| used > quota / 10 * 9);
    let code = match () {
        () if now.apart || reports.iter().any(|one| one.damaged || one.alarm.is_some()) => ALARM,
        () if reports.iter().any(|one| one.overdue) => OVERDUE,
        () if quota_is_full => QUOTA,
        () => 0,
    };
    let mut text = String::new();
    if json {
        let containers: Vec<String> = reports
            .iter()
            .map(|one| {
                format!(
                    "{{\"name\":{:?},\"states\":{},\"last_write\":{},\"session_open\":{},\"damaged\":{},\"alarm\":{},\"hold\":{},\"overdue\":{}}}",
                    one.name, one.states, one.last_write_s, one.session_open, one.damaged, one.alarm.is_some(), one.hold, one.overdue
                )
            })
            .collect();
        text = format!(
            "{{\"used\":{used},\"available\":{available},\"total\":{total},\"clock_apart\":{},\"containers\":[{}]}}\n",
            now.apart,
            containers.join(",")
        );
        return Ok((text, code));
    }
    text += &format!(
        "used {}, available {}\n",
        show_bytes(used),
        show_bytes(available)
    );
    if now.apart {
        text += "ALARM: the wall clock moved by more than a day; nothing expires. If it is right now, run \
                 sprat-agent clock accept\n";
    }
    for one in &reports {
        let (name, states) = (&one.name, one.states);
        text += &format!(
            "{name}: {states} past states, last write {}\n",
            time_text::name(one.last_write_s)
        );
        if one.damaged {
            text += &format!(
                "  ALARM: the record of the state is damaged, and nobody can write. Run sprat-agent repair {name}\n"
            );
        }
        if let Some(alarm) = &one.alarm {
            text += &format!("  ALARM: {alarm}. If that was you, run sprat-agent ack {name}\n");
        }
        if one.overdue {
            text += "  OVERDUE: no session wrote for longer than the policy expects\n";
        }
        if one.hold {
            text += "  held: nothing expires\n";
        }
    }
    Ok((text, code))
}
