//! `sprat status`: shows free space, the last runs and the lock, without a key and without opening anything.

use std::time::Duration;

use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};
use sprat_session::state::history::JobHistory;
use sprat_session::status::{ContainerStatus, LocalStatus, ServerStatus};
use sprat_session::text;

use super::context::{CommandArgs, Context, Resolved};
use crate::output::{exit_json, failure_json, result_json};
use crate::{Exit, Failure};

pub(super) const EXAMPLES: &str = "\
Examples:
  sprat status
  sprat status home --json";

pub(super) const NOTES: &str = "\
It needs no key and opens nothing. Free space in the volume and jobs are shown as the last
sessions of this machine saw them; everything else is asked of the server.";

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// Containers; the default is all of the config
    #[arg(value_name = "TARGET")]
    targets: Vec<String>,
    /// Show only what this machine knows; ask no server
    #[arg(long)]
    offline: bool,
}

/// From this amount on `status` warns: 2^36 blocks of 16 bytes (IEEE P1619/D12, for XTS).
const WRITTEN_MANY_BYTES: u64 = 1 << 40;

/// One container of the output.
struct Shown {
    resolved: Resolved,
    status: ContainerStatus,
}

impl CommandArgs for StatusArgs {
    fn state_when_interrupted(&self) -> Option<&'static str> {
        Some("nothing was changed")
    }

    fn run(&self, context: &Context) -> Result<Exit, Failure> {
        refuse_what_opens(context)?;
        let resolved = context.resolve_all(&self.targets)?;
        if resolved.is_empty() {
            let failure = Failure::usage("nothing to show: no container in a config");
            return Err(context.config.placed(failure).with_hint(
                "name one: sprat status TARGET. What it remembers of a container comes from sessions \
                 of this machine",
            ));
        }
        let mut shown = Vec::new();
        for resolved in resolved {
            context.interrupt.check()?;
            let server = (!self.offline).then_some(&resolved.ssh);
            let jobs = context.config.jobs_of(&resolved.name);
            let status =
                ContainerStatus::read(&context.state_dir(), &resolved.target, jobs, server);
            shown.push(Shown { resolved, status });
        }
        let exit = Exit::worst(shown.iter().map(|shown| shown.status.exit()));
        let now = Timestamp::now();
        let containers: Vec<Value> = shown.iter().map(Shown::json).collect();
        let json = result_json(
            "status",
            exit,
            json!({ "at": now, "containers": containers }),
        );
        let text: Vec<String> = shown.iter().map(|shown| shown.text(now)).collect();
        context.output.listing(&text.join("\n"), &json)?;
        for failure in shown.iter().filter_map(|shown| shown.status.failure()) {
            context.output.failure(&failure);
        }
        Ok(exit)
    }
}

/// Refuses options that a status ignores: a user who gives a key may think that it was tried.
fn refuse_what_opens(context: &Context) -> Result<(), Failure> {
    let global = &context.global;
    let given = [
        ("--key-file", global.key_file.is_some()),
        ("--passphrase-file", global.passphrase_file.is_some()),
        ("--passphrase-command", global.passphrase_command.is_some()),
        ("--fingerprint", global.fingerprint.is_some()),
    ];
    let Some((option, _)) = given.iter().find(|(_, given)| *given) else {
        return Ok(());
    };
    Err(Failure::usage(format!(
        "a status opens nothing, so it has no use for {option}"
    ))
    .with_hint(
        "nothing was asked. Leave it out; `sprat key rehearse` tries a key, and compares a \
             fingerprint",
    ))
}

impl Shown {
    fn json(&self) -> Value {
        let history = self.status.known().map(|known| &known.history);
        json!({
            "name": self.resolved.name,
            "target": self.resolved.target.to_string(),
            "uuid": self.status.known().map(|known| &known.uuid),
            "server": self.status.server.as_ref().and_then(|server| server.as_ref().ok()),
            "failure": self.status.failure().as_ref().map(failure_json),
            "volume": history.and_then(|history| history.room.as_ref()),
            "written_bytes": self.status.known().and_then(|known| known.written_bytes),
            "jobs": history.map(|history| &history.jobs),
            "jobs_never_run": self.status.never_run().collect::<Vec<_>>(),
            "checks": self.status.known().map(checks_json),
            "key_proved": self.status.known().and_then(|known| known.proved),
        })
    }

    fn text(&self, now: Timestamp) -> String {
        let mut rows = Vec::new();
        let mut row = |what: &str, detail: String| {
            rows.push(vec![format!("  {what}"), text::harmless(&detail)]);
        };
        match &self.status.server {
            None => row("server", "not asked".to_owned()),
            Some(Err(failure)) => row("server", failure.what.clone()),
            Some(Ok(server)) => {
                row("server", space(server));
                row("container", container(server));
                row("reserve", reserve(server));
                row("lock", lock(server, now));
            }
        }
        match &self.status.known {
            Err(failure) => row("known here", failure.what.clone()),
            Ok(None) => row(
                "known here",
                "nothing: no session of this machine yet".to_owned(),
            ),
            Ok(Some(known)) => {
                row("volume", volume(known, now));
                row("checks", checks(known, now));
                row("keys", keys(known, now));
                if let Some(bytes) = known.written_bytes
                    && bytes >= WRITTEN_MANY_BYTES
                {
                    row("key use", written_many(bytes));
                }
                for (job, history) in &known.history.jobs {
                    let state = match self.status.in_config(job) {
                        true => job_text(history, now),
                        false => format!("not in the config; {}", snapshot_text(history, now)),
                    };
                    row(&format!("job {job}"), state);
                }
            }
        }
        for job in self.status.never_run() {
            let what = "no run by this machine has ended yet".to_owned();
            row(&format!("job {job}"), what);
        }
        format!(
            "{}: {}\n{}",
            self.resolved.name,
            self.resolved.target,
            text::table(&rows, &[])
        )
    }
}

fn space(server: &ServerStatus) -> String {
    match (server.available_bytes, server.total_bytes) {
        (Some(available), Some(total)) => {
            let low = if server.is_low() {
                "; LOW: make room there, or with `sprat prune` and `sprat trim`"
            } else {
                ""
            };
            let (available, total) = (text::bytes(available), text::bytes(total));
            format!("{available} of {total} free{low}")
        }
        _ => "does not report its free space".to_owned(),
    }
}

fn container(server: &ServerStatus) -> String {
    let limit = text::bytes(server.container_bytes);
    match server.allocated_bytes {
        Some(taken) => format!("takes {}, may grow to {limit}", text::bytes(taken)),
        None => format!("may grow to {limit}; the server can't report what it takes now"),
    }
}

fn reserve(server: &ServerStatus) -> String {
    match server.reserve_bytes {
        0 => "none: on a full disk even pruning may not work".to_owned(),
        bytes => format!(
            "{}, so that pruning works on a full disk",
            text::bytes(bytes)
        ),
    }
}

fn lock(server: &ServerStatus, now: Timestamp) -> String {
    match &server.locked {
        None => "not locked".to_owned(),
        Some(lock) => {
            let since = lock
                .since
                .map_or_else(String::new, |at| format!(" since {}", when(at, now)));
            let renewed = lock.renewed.filter(|_| server.is_left_locked(now));
            match renewed {
                None => format!("locked{since} ({}): a session runs, or one died", lock.file),
                Some(at) => format!(
                    "locked{since} ({}) and not renewed for {}: its session died. `sprat \
                     unlock` removes it",
                    lock.file,
                    ago(at, now).trim_end_matches(" ago")
                ),
            }
        }
    }
}

fn volume(known: &LocalStatus, now: Timestamp) -> String {
    let Some(seen) = &known.history.room else {
        return "not seen by a session of this machine yet".to_owned();
    };
    let room = &seen.room;
    let low = if room.is_low() {
        "; NEARLY FULL: `sprat prune`, or `sprat grow`"
    } else {
        ""
    };
    format!(
        "{} of {} and {} free ({}){low}",
        text::bytes(room.available_bytes),
        text::bytes(room.total_bytes),
        text::counted(room.free_inodes, "file", "files"),
        when(seen.at, now)
    )
}

fn checks(known: &LocalStatus, now: Timestamp) -> String {
    let shown: Vec<String> = known
        .each_check()
        .map(|(kind, check)| {
            let found = match (check.exit, check.finished) {
                (Exit::Done, true) => "whole",
                (Exit::Done, false) => "whole as far as it came",
                _ => "DAMAGED",
            };
            format!("{kind}: {found}, {}", ago(check.at, now))
        })
        .collect();
    match shown.is_empty() {
        true => "none by this machine yet: `sprat check`".to_owned(),
        false => shown.join("; "),
    }
}

fn checks_json(known: &LocalStatus) -> Value {
    let each = known.each_check().map(|(kind, check)| {
        let result = json!({
            "at": check.at,
            "result": exit_json(check.exit),
            "finished": check.finished,
        });
        (kind, result)
    });
    each.collect::<serde_json::Map<_, _>>().into()
}

fn keys(known: &LocalStatus, now: Timestamp) -> String {
    match known.proved {
        Some(at) => format!("a key on paper was last proved {}", when(at, now)),
        None => {
            "never rehearsed here: `sprat key rehearse` proves that the sheet opens it".to_owned()
        }
    }
}

fn written_many(bytes: u64) -> String {
    format!(
        "{} were written under one volume key, and more than {} weaken it little by little: make a \
         copy with a new key, `sprat copy --new-key` (docs/threat-model.md)",
        text::bytes(bytes),
        text::bytes(WRITTEN_MANY_BYTES)
    )
}

fn snapshot_text(job: &JobHistory, now: Timestamp) -> String {
    match &job.last_snapshot {
        Some(made) => {
            let unread = if made.complete {
                ""
            } else {
                ", some files unread"
            };
            let missing: Vec<String> = made
                .missing
                .iter()
                .map(|disk| {
                    let path = text::harmless(&disk.path);
                    format!("; the disk of {path} is MISSING, last in {}", disk.kept_in)
                })
                .collect();
            let missing = missing.concat();
            format!(
                "last snapshot {}{unread}, {}{missing}",
                made.name,
                ago(made.at, now)
            )
        }
        None => "no snapshot by this machine yet".to_owned(),
    }
}

fn job_text(job: &JobHistory, now: Timestamp) -> String {
    let made = snapshot_text(job, now);
    let run = &job.last_run;
    match &run.failure {
        Some(why) => format!("{made}; last run FAILED {}: {why}", ago(run.at, now)),
        None => made,
    }
}

/// `2026-11-25 13:21 UTC, 2 h 10 min ago`.
fn when(at: Timestamp, now: Timestamp) -> String {
    format!("{}, {}", at.strftime("%Y-%m-%d %H:%M UTC"), ago(at, now))
}

fn ago(at: Timestamp, now: Timestamp) -> String {
    match Duration::try_from(now.duration_since(at)) {
        Ok(ago) => format!("{} ago", text::duration(ago)),
        Err(_) => "by a clock that is ahead of this one's".to_owned(),
    }
}

#[cfg(test)]
mod tests;
