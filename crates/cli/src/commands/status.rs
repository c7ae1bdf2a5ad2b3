//! `sprat status`: how things stand, without a key and without opening anything.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};
use sprat_luks::Pins;
use sprat_session::address::Location;
use sprat_session::state::checks::{self, KeptCheck, KeptChecks};
use sprat_session::state::history::{History, JobHistory};
use sprat_session::state::key_notes::KeyNotes;
use sprat_session::state::paths::StatePaths;
use sprat_session::state::{self, identity, moved};
use sprat_session::{IdentityPolicy, SERVER_SPACE_LOW_BYTES, connect, reserve_name, text};
use sprat_store::copy::{DataMap, read_remote_map};
use sprat_store::{Access, FileStat, LockInfo, SshTarget, Store, StoreError, StoreErrorKind, lock};

use super::context::{Context, Resolved, both};
use crate::args::StatusArgs;
use crate::output::{exit_json, failure_json};
use crate::{Exit, Failure};

/// How long the server's shell may take to tell where the container holds data.
const SHELL_LIMIT: Duration = Duration::from_secs(15);

/// A lock that was not renewed for so long was left by a session that died; a server's clock may be
/// some hours off.
const LEFT_LOCKED: jiff::SignedDuration = jiff::SignedDuration::from_hours(24);

/// What is known of one container.
struct Found {
    resolved: Resolved,
    /// `None`: no session of this machine yet. A failure: what is pinned can't be read.
    known: Result<Option<Known>, Failure>,
    /// The container's jobs in the config; `None` where it has none.
    jobs: Option<Vec<String>>,
    /// `None`: it was not asked.
    server: Option<Result<Server, Failure>>,
}

/// What this machine remembers.
struct Known {
    uuid: String,
    history: History,
    checks: KeptChecks,
    proved: Option<Timestamp>,
    /// Bytes that the file system has written in its whole life, and so under one volume key.
    written_bytes: Option<u64>,
}

/// From so much on `status` says it: 2^36 blocks of 16 bytes (IEEE P1619/D12, for XTS).
const WRITTEN_MANY_BYTES: u64 = 1 << 40;

/// What the server tells.
#[derive(Serialize)]
struct Server {
    available_bytes: Option<u64>,
    total_bytes: Option<u64>,
    container_bytes: u64,
    /// `None` where neither the store nor a shell there can tell.
    allocated_bytes: Option<u64>,
    reserve_bytes: u64,
    locked: Option<Lock>,
}

#[derive(Serialize)]
struct Lock {
    file: String,
    since: Option<Timestamp>,
    /// Last renewal, by the server's clock.
    renewed: Option<Timestamp>,
}

pub(super) fn run(context: &Context, args: &StatusArgs) -> Result<Exit, Failure> {
    refuse_what_opens(context)?;
    let mut resolved = Vec::new();
    for target in &args.targets {
        resolved.push(context.resolve(target)?);
    }
    if args.targets.is_empty() {
        for container in &context.config.containers {
            resolved.push(context.resolve_container(container)?);
        }
    }
    if resolved.is_empty() {
        let failure = Failure::usage("nothing to show: no container in a config");
        return Err(context.config.placed(failure).with_hint(
            "name one: sprat status TARGET. What it remembers of a container comes from sessions \
             of this machine",
        ));
    }
    let mut found = Vec::new();
    for resolved in resolved {
        context.interrupt.check()?;
        found.push(look(context, resolved, args.offline));
    }
    let exit = Exit::worst(found.iter().map(Found::exit));
    let containers: Vec<Value> = found.iter().map(Found::json).collect();
    let json = json!({
        "command": "status",
        "result": exit_json(exit),
        "at": Timestamp::now(),
        "containers": containers,
    });
    let now = Timestamp::now();
    let shown: Vec<String> = found.iter().map(|found| found.text(now)).collect();
    context.output.listing(&shown.join("\n"), &json)?;
    for failure in found.iter().filter_map(Found::failure) {
        context.output.failure(&failure);
    }
    Ok(exit)
}

/// Whoever gives a key or a fingerprint may think that it was tried.
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

fn look(context: &Context, resolved: Resolved, offline: bool) -> Found {
    let state_dir = context.environment.absolute(&context.global.state_dir);
    let known = identity::policy(&state_dir, &resolved.target, None).map(|policy| match policy {
        IdentityPolicy::Known(Pins { uuid, .. }) => {
            let paths = StatePaths::new(&state_dir, &uuid, &resolved.target);
            Some(Known {
                history: History::load(&paths),
                checks: checks::last(&paths),
                proved: KeyNotes::load(&state_dir, &uuid).last_proved(),
                written_bytes: state::KnownState::load(&paths).written_bytes(),
                uuid,
            })
        }
        _ => None,
    });
    let server = (!offline).then(|| ask(&state_dir, &resolved));
    let jobs = context.config.jobs_of(&resolved.name);
    Found {
        jobs: (!jobs.is_empty()).then_some(jobs),
        resolved,
        known,
        server,
    }
}

fn ask(state_dir: &Path, resolved: &Resolved) -> Result<Server, Failure> {
    let store = connect::connect(&resolved.target, &resolved.ssh_command)?;
    let name = &resolved.target.name;
    let stat = store.stat(name).map_err(|error| match error.kind() {
        StoreErrorKind::NotFound => moved::no_container(state_dir, &resolved.target),
        _ => Failure::from(error),
    })?;
    let file = store.open(name, Access::ReadOnly)?;
    // Any that cryptsetup opens: the header is looked at, not used.
    connect::any_header(&*file, state_dir, &resolved.target)?;
    drop(file);
    let space = unless_unsupported(store.free_space())?;
    let reserve = match store.stat(&reserve_name(name)?) {
        Ok(stat) => stat.len,
        Err(error) if error.kind() == StoreErrorKind::NotFound => 0,
        Err(error) => return Err(error.into()),
    };
    let locked = lock::inspect(&*store, name, None)
        .map_err(|error| Failure::from(&error))?
        .held;
    Ok(Server {
        available_bytes: space.map(|space| space.available_bytes),
        total_bytes: space.map(|space| space.total_bytes),
        container_bytes: stat.len,
        allocated_bytes: stat
            .allocated_bytes
            .or_else(|| allocated(resolved, &*store, &stat)),
        reserve_bytes: reserve,
        locked: locked.as_ref().map(Lock::of),
    })
}

fn unless_unsupported<T>(asked: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match asked {
        Ok(told) => Ok(Some(told)),
        Err(StoreError::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// SFTP tells a file's length only; a shell there can tell where it holds data.
fn allocated(resolved: &Resolved, store: &dyn Store, stat: &FileStat) -> Option<u64> {
    let Location::Ssh {
        user,
        host,
        port,
        folder,
    } = &resolved.target.place
    else {
        let file = store.open(&resolved.target.name, Access::ReadOnly).ok()?;
        return DataMap::of(&*file).ok().map(|map| map.data_bytes());
    };
    let ssh = SshTarget::new(user.as_deref(), host, *port).ok()?;
    let path = format!("{folder}/{}", resolved.target.name);
    let argv = ssh.shell_argv(&resolved.ssh_command);
    let map = read_remote_map(&argv, &path, stat.len, stat.modified_s, SHELL_LIMIT).ok()?;
    Some(map.data_bytes())
}

impl Lock {
    fn of(info: &LockInfo) -> Self {
        let time = |seconds: u64| {
            let seconds = i64::try_from(seconds).ok()?;
            Timestamp::from_second(seconds).ok()
        };
        Self {
            file: info.file.to_string(),
            since: time(info.started_s),
            renewed: info.modified_s.and_then(time),
        }
    }
}

impl Found {
    fn failure(&self) -> Option<Failure> {
        let server = self.server.as_ref();
        let server = server.and_then(|server| server.as_ref().err()).cloned();
        match (server, self.known.as_ref().err().cloned()) {
            (Some(server), Some(known)) => Some(both(server, known)),
            (server, known) => server.or(known),
        }
    }

    /// What a monitor should report: a failure now, damage that the last check found, a job whose
    /// last run failed, too little room, or files that were not read.
    fn exit(&self) -> Exit {
        let failure = self.failure().map(|failure| failure.exit);
        let low = match &self.server {
            Some(Ok(server)) if server.is_low() => Some(Exit::Failed),
            Some(Ok(server)) if server.is_left_locked(Timestamp::now()) => Some(Exit::Locked),
            _ => None,
        };
        let known = self.known().into_iter().flat_map(|known| {
            let room = known.history.room.as_ref();
            let full = room.filter(|seen| seen.room.is_low()).map(|_| Exit::Failed);
            let damaged = known
                .each_check()
                .any(|(_, check)| check.exit != Exit::Done)
                .then_some(Exit::Damaged);
            let jobs = known.history.jobs.iter();
            let jobs = jobs.filter(|(job, _)| self.in_config(job));
            let jobs = jobs.filter_map(|(_, history)| job_exit(history));
            full.into_iter()
                .chain(damaged)
                .chain(jobs)
                .collect::<Vec<_>>()
        });
        Exit::worst(failure.into_iter().chain(low).chain(known))
    }

    /// Whether the config has the job, or has no job of the container at all: it is backed up by
    /// hand then.
    fn in_config(&self, job: &str) -> bool {
        self.jobs
            .as_ref()
            .is_none_or(|jobs| jobs.iter().any(|known| known == job))
    }

    /// Jobs of the config of which this machine knows nothing.
    fn never_run(&self) -> impl Iterator<Item = &String> {
        let jobs = self.jobs.iter().flatten();
        let history = self.known().map(|known| &known.history.jobs);
        jobs.filter(move |job| history.is_none_or(|jobs| !jobs.contains_key(*job)))
    }

    fn known(&self) -> Option<&Known> {
        self.known.as_ref().ok()?.as_ref()
    }

    fn json(&self) -> Value {
        let history = self.known().map(|known| &known.history);
        json!({
            "name": self.resolved.name,
            "target": self.resolved.target.to_string(),
            "uuid": self.known().map(|known| &known.uuid),
            "server": self.server.as_ref().and_then(|server| server.as_ref().ok()),
            "failure": self.failure().as_ref().map(failure_json),
            "volume": history.and_then(|history| history.room.as_ref()),
            "written_bytes": self.known().and_then(|known| known.written_bytes),
            "jobs": history.map(|history| &history.jobs),
            "jobs_never_run": self.never_run().collect::<Vec<_>>(),
            "checks": self.known().map(Known::checks_json),
            "key_proved": self.known().and_then(|known| known.proved),
        })
    }

    fn text(&self, now: Timestamp) -> String {
        let mut rows = Vec::new();
        let mut row = |what: &str, detail: String| {
            rows.push(vec![format!("  {what}"), text::harmless(&detail)]);
        };
        match &self.server {
            None => row("server", "not asked".to_owned()),
            Some(Err(failure)) => row("server", failure.what.clone()),
            Some(Ok(server)) => {
                row("server", server.space());
                row("container", server.container());
                row("reserve", server.reserve());
                row("lock", server.lock(now));
            }
        }
        match &self.known {
            Err(failure) => row("known here", failure.what.clone()),
            Ok(None) => row(
                "known here",
                "nothing: no session of this machine yet".to_owned(),
            ),
            Ok(Some(known)) => {
                row("volume", known.volume(now));
                row("checks", known.checks(now));
                row("keys", known.keys(now));
                if let Some(bytes) = known.written_bytes
                    && bytes >= WRITTEN_MANY_BYTES
                {
                    row("key use", written_many(bytes));
                }
                for (job, history) in &known.history.jobs {
                    let told = match self.in_config(job) {
                        true => told_job(history, now),
                        false => format!("not in the config; {}", told_snapshot(history, now)),
                    };
                    row(&format!("job {job}"), told);
                }
            }
        }
        for job in self.never_run() {
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

/// What is wrong with a job, if anything is.
fn job_exit(job: &JobHistory) -> Option<Exit> {
    if job.last_run.failure.is_some() {
        return Some(Exit::Failed);
    }
    let unread = job
        .last_snapshot
        .as_ref()
        .is_some_and(|made| !made.complete);
    unread.then_some(Exit::Unread)
}

impl Server {
    /// Nobody renewed the lock for a day: no run on another machine can go on.
    fn is_left_locked(&self, now: Timestamp) -> bool {
        let renewed = self.locked.as_ref().and_then(|lock| lock.renewed);
        renewed.is_some_and(|renewed| now.duration_since(renewed) > LEFT_LOCKED)
    }

    fn is_low(&self) -> bool {
        self.available_bytes
            .is_some_and(|available| available < SERVER_SPACE_LOW_BYTES)
    }

    fn space(&self) -> String {
        match (self.available_bytes, self.total_bytes) {
            (Some(available), Some(total)) => {
                let low = if self.is_low() {
                    "; LOW: make room there, or with `sprat prune` and `sprat trim`"
                } else {
                    ""
                };
                let (available, total) = (text::bytes(available), text::bytes(total));
                format!("{available} of {total} free{low}")
            }
            _ => "does not tell how much is free".to_owned(),
        }
    }

    fn container(&self) -> String {
        let limit = text::bytes(self.container_bytes);
        match self.allocated_bytes {
            Some(taken) => format!("takes {}, may grow to {limit}", text::bytes(taken)),
            None => format!("may grow to {limit}; the server can't tell what it takes now"),
        }
    }

    fn reserve(&self) -> String {
        match self.reserve_bytes {
            0 => "none: on a full disk even pruning may not work".to_owned(),
            bytes => format!(
                "{}, so that pruning works on a full disk",
                text::bytes(bytes)
            ),
        }
    }

    fn lock(&self, now: Timestamp) -> String {
        match &self.locked {
            None => "not locked".to_owned(),
            Some(lock) => {
                let since = lock
                    .since
                    .map_or_else(String::new, |at| format!(" since {}", when(at, now)));
                let renewed = lock.renewed.filter(|_| self.is_left_locked(now));
                match renewed {
                    None => format!("locked{since} ({}): a session runs, or one died", lock.file),
                    Some(at) => format!(
                        "locked{since} ({}) and not renewed for {}: its session died. `sprat \
                         unlock` gives it back",
                        lock.file,
                        ago(at, now).trim_end_matches(" ago")
                    ),
                }
            }
        }
    }
}

impl Known {
    fn volume(&self, now: Timestamp) -> String {
        let Some(seen) = &self.history.room else {
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

    /// Each kind's last one; the whole of what it said is not shown.
    fn each_check(&self) -> impl Iterator<Item = (String, &KeptCheck)> {
        let checks = &self.checks;
        let quick = checks.quick.iter().map(|check| ("quick".to_owned(), check));
        let read = checks.read_data.iter();
        let read = read.map(|check| ("--read-data".to_owned(), check));
        let against = checks.against_source.iter();
        let against = against.map(|(job, check)| (format!("--against-source {job}"), check));
        quick.chain(read).chain(against)
    }

    fn checks(&self, now: Timestamp) -> String {
        let told: Vec<String> = self
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
        match told.is_empty() {
            true => "none by this machine yet: `sprat check`".to_owned(),
            false => told.join("; "),
        }
    }

    fn checks_json(&self) -> Value {
        let each = self.each_check().map(|(kind, check)| {
            let said = json!({
                "at": check.at,
                "result": exit_json(check.exit),
                "finished": check.finished,
            });
            (kind, said)
        });
        each.collect::<serde_json::Map<_, _>>().into()
    }

    fn keys(&self, now: Timestamp) -> String {
        match self.proved {
            Some(at) => format!("a key on paper was last proved {}", when(at, now)),
            None => "never rehearsed here: `sprat key rehearse` proves that the sheet opens it"
                .to_owned(),
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

fn told_snapshot(job: &JobHistory, now: Timestamp) -> String {
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

fn told_job(job: &JobHistory, now: Timestamp) -> String {
    let made = told_snapshot(job, now);
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
