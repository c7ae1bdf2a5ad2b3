//! The text of `status`.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_session::address::Target;
use sprat_session::state::checks::KeptCheck;
use sprat_session::state::history::{JobHistory, SeenGone};
use sprat_session::status::{LocalStatus, ServerStatus};
use sprat_session::{Exit, text};

use super::status::ContainerReport;
use super::{CopyView, WatchView, space};
use crate::due::Why;
use crate::notify::{FoundBy, Kind};

/// From this amount on `status` warns: 2^36 blocks of 16 bytes (IEEE P1619/D12, for XTS).
const WRITTEN_MANY_BYTES: u64 = 1 << 40;

/// When something is shown, and in which zone.
#[derive(Debug, Clone)]
pub struct Shown {
    /// Now.
    pub now: Timestamp,
    /// For times.
    pub zone: TimeZone,
}

impl ContainerReport {
    /// As text: a line with name and place, and a table.
    #[must_use]
    pub fn text(&self, shown: &Shown) -> String {
        let mut rows = Vec::new();
        let mut row = |what: &str, detail: String| {
            rows.push(vec![format!("  {what}"), text::harmless(&detail)]);
        };
        match &self.status.server {
            None => row("server", "not asked".to_owned()),
            Some(Err(failure)) => row("server", failure.what.clone()),
            Some(Ok(server)) => {
                row("server", server_space(server));
                row("container", container(server));
                row("reserve", reserve(server));
                row("lock", lock(server, shown));
            }
        }
        match &self.status.known {
            Err(failure) => row("known here", failure.what.clone()),
            Ok(None) => row(
                "known here",
                "nothing: no session of this machine yet".to_owned(),
            ),
            Ok(Some(known)) => {
                if let Some(unread) = &known.unread {
                    row("known here", format!("not all: {}", unread.what));
                }
                row("volume", volume(known, shown));
                row("checks", checks(known, shown.now));
                row("drill", drill(known, shown.now));
                row("keys", keys(known, shown));
                if let Some(gone) = &known.history.gone {
                    row("GONE", gone_text(gone, &self.target, shown));
                }
                if let Some(bytes) = known.written_bytes
                    && bytes >= WRITTEN_MANY_BYTES
                {
                    row("key use", written_many(bytes));
                }
            }
        }
        for (job, state) in self.jobs(shown) {
            row(&format!("job {job}"), state);
        }
        for event in self.events.iter().filter(|event| event.is_of_later_step()) {
            let (subject, since) = (&event.key.subject, shown.time(event.opened));
            let text = event.text.lines().next().unwrap_or_default();
            let text = format!("FAILED since {since}: {subject}: {text}");
            row(&event.cause.class, text);
        }
        for event in self
            .events
            .iter()
            .filter(|event| event.key.kind.is_acceptable())
        {
            // It stands in the row of its copy, or in one of its own.
            if event.key.kind != Kind::Held && event.key.part != FoundBy::Session.name() {
                let subject = &event.key.subject;
                let since = shown.time(event.opened);
                let text = event.text.lines().next().unwrap_or_default();
                let what = format!(
                    "{} since {since}: {text} `sprat accept {subject}`",
                    event.key.kind
                );
                row("waits", what);
            }
        }
        format!(
            "{}: {}\n{}",
            self.name,
            self.target,
            text::table(&rows, &[])
        )
    }

    /// Each job, and how it is.
    fn jobs(&self, shown: &Shown) -> Vec<(String, String)> {
        let mut jobs = Vec::new();
        let history = self.status.known().map(|known| &known.history.jobs);
        for (job, noted) in history.into_iter().flatten() {
            let mut copies = self.copies.iter();
            let state = match copies.find(|copy| copy.copy.job == *job) {
                Some(copy) => copy_text(copy, Some(noted), shown),
                None if self.status.in_config(job) => job_text(noted, shown.now),
                None => format!("not in the config; {}", snapshot_text(noted, shown.now)),
            };
            jobs.push((job.clone(), state));
        }
        let is_new = |job: &str| history.is_none_or(|known| !known.contains_key(job));
        for copy in self.copies.iter().filter(|copy| is_new(&copy.copy.job)) {
            jobs.push((copy.copy.job.clone(), copy_text(copy, None, shown)));
        }
        for job in self.status.never_run() {
            if !jobs.iter().any(|(known, _)| known == job) {
                let what = "no run by this machine has ended yet".to_owned();
                jobs.push((job.clone(), what));
            }
        }
        jobs
    }
}

impl WatchView {
    /// As text, one line.
    #[must_use]
    pub fn text(&self, shown: &Shown) -> String {
        let time =
            |at: Option<Timestamp>| at.map_or_else(|| "never".to_owned(), |at| shown.time(at));
        let overdue = match self.is_overdue {
            true => format!("OVERDUE since {}; ", time(self.overdue_at)),
            false => String::new(),
        };
        format!(
            "watch {}: {overdue}last written {}\n",
            self.name,
            time(self.last_written)
        )
    }
}

impl Shown {
    /// As `2026-11-28 14:00`.
    #[must_use]
    pub fn time(&self, at: Timestamp) -> String {
        let local = at.to_zoned_datetime(self.zone.clone());
        local.strftime("%Y-%m-%d %H:%M").to_string()
    }

    /// As `2026-11-28 14:00, 2 h 10 min ago`.
    fn when(&self, at: Timestamp) -> String {
        format!("{}, {}", self.time(at), ago(at, self.now))
    }
}

/// One copy: what stands in the way comes first.
fn copy_text(copy: &CopyView, noted: Option<&JobHistory>, shown: &Shown) -> String {
    let state = &copy.state;
    let mut parts = Vec::new();
    if copy.is_overdue {
        let since = copy
            .overdue_at
            .map_or_else(String::new, |at| shown.time(at));
        parts.push(format!("OVERDUE since {since}"));
    }
    let made = noted.filter(|noted| noted.last_snapshot.is_some());
    parts.push(match (made, noted, state.last_success) {
        (Some(noted), _, _) => snapshot_text(noted, shown.now),
        (None, _, Some(success)) => format!("last backup {}", shown.when(success)),
        (None, Some(noted), None) => snapshot_text(noted, shown.now),
        (None, None, None) => "no run by this machine has ended yet".to_owned(),
    });
    match (&state.last_attempt, noted) {
        (Some(last), _) if !matches!(last.exit, Exit::Done | Exit::Unread) => {
            let why = last.reason.as_deref().unwrap_or(last.exit.meaning());
            let what = format!("last run FAILED {}: {why}", ago(last.ended, shown.now));
            parts.push(match state.failures_since {
                0 | 1 => what,
                more => format!("{what}; {more} failures since the last backup"),
            });
        }
        (None, Some(noted)) => parts.extend(failed_run(noted, shown.now)),
        _ => {}
    }
    if let Some(held) = &state.held {
        let since = shown.time(held.since);
        parts.push(format!(
            "held since {since}: {}. `sprat accept {}` releases it",
            held.reason, copy.copy
        ));
    }
    if let Some(changed) = &state.changed {
        parts.push(format!(
            "older snapshots are kept since {}: {}. `sprat accept {}` ends that",
            shown.time(changed.since),
            changed.reason,
            copy.copy
        ));
    }
    if let Some(silent) = &state.silent {
        parts.push(format!(
            "found {}: {}. The content from before is kept. `sprat accept {}` ends that",
            shown.time(silent.since),
            text::harmless(&silent.reason()),
            copy.copy
        ));
    }
    if let Some(skipped) = &state.skipped {
        parts.push(format!(
            "skipped {}: {}",
            ago(skipped.at, shown.now),
            skipped.reason
        ));
    }
    parts.extend(match (copy.decision.due, copy.decision.next) {
        (true, _) => Some("due now".to_owned()),
        (false, Some(next)) => Some(format!("next {}", shown.time(next))),
        (false, None) if copy.decision.why == Why::ByHand => Some("by hand only".to_owned()),
        (false, None) => None,
    });
    parts.join("; ")
}

fn server_space(server: &ServerStatus) -> String {
    match (server.available_bytes, server.total_bytes) {
        (Some(available), Some(total)) => {
            let low = if server.is_low() {
                "; LOW: free space there, or run `sprat prune` and `sprat trim`"
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

fn lock(server: &ServerStatus, shown: &Shown) -> String {
    match &server.locked {
        None => "not locked".to_owned(),
        Some(lock) => {
            let since = lock
                .since
                .map_or_else(String::new, |at| format!(" since {}", shown.when(at)));
            let renewed = lock.renewed.filter(|_| server.is_left_locked(shown.now));
            match renewed {
                None => format!("locked{since} ({}): a session runs, or one died", lock.file),
                Some(at) => format!(
                    "locked{since} ({}) and not renewed for {}: its session died. Run `sprat \
                     unlock`",
                    lock.file,
                    ago(at, shown.now).trim_end_matches(" ago")
                ),
            }
        }
    }
}

fn volume(known: &LocalStatus, shown: &Shown) -> String {
    let Some(seen) = &known.history.room else {
        return "not seen by a session of this machine yet".to_owned();
    };
    let room = &seen.room;
    let low = match (room.is_low(), room.metadata_is_low()) {
        (false, _) => "",
        (true, false) => "; NEARLY FULL: run `sprat prune` or `sprat grow`",
        (true, true) => "; METADATA NEARLY FULL: run `sprat prune` or `sprat grow`",
    };
    let full = match space::full_on(&known.history, shown.now) {
        Some(full) => {
            let local = full.to_zoned_datetime(shown.zone.clone());
            format!("; full on about {}", local.strftime("%Y-%m-%d"))
        }
        None => String::new(),
    };
    let files = room.files_left();
    let files = files.map(|files| format!(" and {}", text::counted(files, "file", "files")));
    let files = files.unwrap_or_default();
    let metadata = room.metadata.map(|metadata| {
        format!(
            ", for metadata {} of {}",
            text::bytes(metadata.available_bytes),
            text::bytes(metadata.total_bytes)
        )
    });
    let metadata = metadata.unwrap_or_default();
    format!(
        "{} of {}{files} free{metadata} ({}){low}{full}",
        text::bytes(room.available_bytes),
        text::bytes(room.total_bytes),
        shown.when(seen.at)
    )
}

fn checks(known: &LocalStatus, now: Timestamp) -> String {
    let shown: Vec<String> = known
        .each_check()
        .map(|(kind, check)| {
            let found = match (check.exit, check.finished) {
                (Exit::Done, true) => "no damage",
                (Exit::Done, false) => "no damage so far",
                _ => "DAMAGED",
            };
            format!("{kind}: {found}, {}", ago(check.at, now))
        })
        .collect();
    match shown.is_empty() {
        true => "none by this machine yet: run `sprat check`".to_owned(),
        false => shown.join("; "),
    }
}

fn drill(known: &LocalStatus, now: Timestamp) -> String {
    let ended = |drill: &KeptCheck, command: &str| match drill.exit {
        Exit::Done => format!("passed, {}", ago(drill.at, now)),
        _ => format!("FAILED, {}: run `{command}`", ago(drill.at, now)),
    };
    let mut shown = match &known.checks.drill {
        None => "none by this machine yet: run `sprat drill`".to_owned(),
        Some(drill) => ended(drill, "sprat drill"),
    };
    if let Some(recovery) = &known.checks.recovery {
        let ended = ended(recovery, "sprat drill --recovery");
        shown.push_str(&format!("; by the recovery sheet alone: {ended}"));
    }
    shown
}

fn keys(known: &LocalStatus, shown: &Shown) -> String {
    match known.proved {
        Some(at) => format!("a key on paper was last tested {}", shown.when(at)),
        None => "never tested here: `sprat key rehearse` tests the recovery sheet".to_owned(),
    }
}

fn gone_text(gone: &SeenGone, target: &Target, shown: &Shown) -> String {
    let names: Vec<&str> = gone.snapshots.iter().map(String::as_str).collect();
    format!(
        "{}, since {}: removed by another machine, or the container was replaced by another copy of it. \
         `sprat accept {target}` ends this warning",
        names.join(", "),
        shown.time(gone.at)
    )
}

fn written_many(bytes: u64) -> String {
    format!(
        "{} were written with one volume key. More than {} weaken the encryption slightly. Make a \
         copy with a new key: `sprat copy --new-key`",
        text::bytes(bytes),
        text::bytes(WRITTEN_MANY_BYTES)
    )
}

fn snapshot_text(job: &JobHistory, now: Timestamp) -> String {
    match &job.last_snapshot {
        Some(made) => {
            let unread = if made.complete { "" } else { ", incomplete" };
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
    match failed_run(job, now) {
        Some(failed) => format!("{made}; {failed}"),
        None => made,
    }
}

fn failed_run(job: &JobHistory, now: Timestamp) -> Option<String> {
    let run = &job.last_run;
    let why = run.failure.as_ref()?;
    Some(format!("last run FAILED {}: {why}", ago(run.at, now)))
}

fn ago(at: Timestamp, now: Timestamp) -> String {
    match Duration::try_from(now.duration_since(at)) {
        Ok(ago) => format!("{} ago", text::duration(ago)),
        Err(_) => "in the future, by this machine's clock".to_owned(),
    }
}

#[cfg(test)]
mod tests;
