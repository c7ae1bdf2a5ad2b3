//! The status of a container, without a key and without opening it: what this machine knows of it, and what
//! its server reports.

use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use sprat_luks::Pins;
use sprat_store::copy::DataMap;
use sprat_store::{Access, FileStat, LockInfo, Store, StoreError, StoreErrorKind, lock};

use crate::address::Target;
use crate::state::checks::{self, KeptCheck, KeptChecks};
use crate::state::history::{History, JobHistory};
use crate::state::key_notes::KeyNotes;
use crate::state::paths::StatePaths;
use crate::state::{KnownState, identity, missing};
use crate::volume_process::reserve::name as reserve_name;
use crate::volume_process::space_monitor::LOW_BYTES;
use crate::{Exit, Failure, IdentityPolicy, SshOptions, connect};

/// How long the server's shell may take to report where the container holds data.
const SHELL_LIMIT: Duration = Duration::from_secs(15);

/// A lock that was not renewed for this long belongs to a session that died. A server's clock may be some
/// hours off.
const LEFT_LOCKED: jiff::SignedDuration = jiff::SignedDuration::from_hours(24);

/// The status of one container.
#[derive(Debug)]
pub struct ContainerStatus {
    /// What this machine knows; `None` before its first session. A failure: what is pinned can't be read.
    pub known: Result<Option<LocalStatus>, Failure>,
    /// The container's jobs in the config; `None` if it has none there.
    pub jobs: Option<Vec<String>>,
    /// `None`: it was not asked.
    pub server: Option<Result<ServerStatus, Failure>>,
}

/// What this machine knows of a container.
#[derive(Debug)]
pub struct LocalStatus {
    /// Of the container's header.
    pub uuid: String,
    /// Free space and jobs, as the last sessions saw them.
    pub history: History,
    /// The last check of each kind.
    pub checks: KeptChecks,
    /// When a rehearsal last opened the container.
    pub proved: Option<Timestamp>,
    /// Bytes that the file system has written in its whole life, and so under one volume key.
    pub written_bytes: Option<u64>,
    /// A file of this can't be read: what it has is missing here. It is not known that nothing is wrong.
    pub unread: Option<Failure>,
}

/// What the server reports.
#[derive(Debug, Serialize)]
pub struct ServerStatus {
    /// Free for this account; `None`: the server does not report it.
    pub available_bytes: Option<u64>,
    /// Size of the file system that holds the container.
    pub total_bytes: Option<u64>,
    /// Length of the container file.
    pub container_bytes: u64,
    /// Space that the container takes; `None` if neither the store nor a shell there can report it.
    pub allocated_bytes: Option<u64>,
    /// Length of the reserve file; 0: there is none.
    pub reserve_bytes: u64,
    /// The lock; `None`: not locked.
    pub locked: Option<LockStatus>,
}

/// The lock of a container.
#[derive(Debug, Serialize)]
pub struct LockStatus {
    /// Name of the lock file.
    pub file: String,
    /// When the session began, by its clock.
    pub since: Option<Timestamp>,
    /// Last renewal, by the server's clock.
    pub renewed: Option<Timestamp>,
}

impl ContainerStatus {
    /// Reads what this machine knows of `target`, whose jobs in the config are `jobs`. With `ssh` it asks
    /// the server as well.
    pub fn read(
        state_dir: &Path,
        target: &Target,
        jobs: Vec<String>,
        ssh: Option<&SshOptions>,
    ) -> Self {
        let known = identity::policy(state_dir, target, None).map(|policy| match policy {
            IdentityPolicy::Known(Pins { uuid, .. }) => {
                let paths = StatePaths::new(state_dir, &uuid, target);
                let mut unread = None;
                Some(LocalStatus {
                    history: or_unread(History::read(&paths), &mut unread),
                    checks: or_unread(checks::read(&paths), &mut unread),
                    proved: or_unread(KeyNotes::read(state_dir, &uuid), &mut unread).last_proved(),
                    written_bytes: KnownState::load(&paths).written_bytes(),
                    uuid,
                    unread,
                })
            }
            _ => None,
        });
        Self {
            known,
            jobs: (!jobs.is_empty()).then_some(jobs),
            server: ssh.map(|ssh| ask(state_dir, target, ssh)),
        }
    }

    /// Leaves out all jobs but these.
    pub fn only(&mut self, jobs: &[String]) {
        if let Ok(Some(known)) = &mut self.known {
            known.history.jobs.retain(|job, _| jobs.contains(job));
        }
        if let Some(known) = &mut self.jobs {
            known.retain(|job| jobs.contains(job));
        }
    }

    /// Why the status is not complete.
    pub fn failure(&self) -> Option<Failure> {
        let server = self.server.as_ref();
        let server = server.and_then(|server| server.as_ref().err()).cloned();
        let known = match &self.known {
            Ok(known) => known.as_ref().and_then(|known| known.unread.as_ref()),
            Err(failure) => Some(failure),
        };
        match (server, known.cloned()) {
            (Some(server), Some(known)) => Some(server.merge(known)),
            (server, known) => server.or(known),
        }
    }

    /// What a monitor should report: a failure now, damage that this machine knows of, a job whose
    /// last run failed, too little space, or files that were not read. The jobs of `others` are left
    /// out: the caller knows more of them.
    pub fn exits(&self, others: impl Fn(&str) -> bool) -> Vec<Exit> {
        let failure = self.failure().map(|failure| failure.exit);
        let low = match &self.server {
            Some(Ok(server)) if server.is_low() => Some(Exit::Failed),
            Some(Ok(server)) if server.is_left_locked(Timestamp::now()) => Some(Exit::Locked),
            _ => None,
        };
        let known = self.known().into_iter().flat_map(|known| {
            let room = known.history.room.as_ref();
            let full = room.filter(|seen| seen.room.is_low()).map(|_| Exit::Failed);
            let damaged = known.is_damaged().then_some(Exit::Damaged);
            let jobs = known.history.jobs.iter();
            let jobs = jobs.filter(|(job, _)| self.in_config(job) && !others(job));
            let jobs = jobs.filter_map(|(_, history)| job_exit(history));
            full.into_iter()
                .chain(damaged)
                .chain(jobs)
                .collect::<Vec<_>>()
        });
        failure.into_iter().chain(low).chain(known).collect()
    }

    /// Whether the config has the job, or no job of the container at all: then it is backed up by hand.
    pub fn in_config(&self, job: &str) -> bool {
        self.jobs
            .as_ref()
            .is_none_or(|jobs| jobs.iter().any(|known| known == job))
    }

    /// Jobs of the config that have not run on this machine.
    pub fn never_run(&self) -> impl Iterator<Item = &String> {
        let jobs = self.jobs.iter().flatten();
        let history = self.known().map(|known| &known.history.jobs);
        jobs.filter(move |job| history.is_none_or(|jobs| !jobs.contains_key(*job)))
    }

    /// What this machine knows, if it knows anything.
    pub fn known(&self) -> Option<&LocalStatus> {
        self.known.as_ref().ok()?.as_ref()
    }
}

/// What was read, or nothing; why, goes to `unread`.
fn or_unread<T: Default>(read: Result<T, Failure>, unread: &mut Option<Failure>) -> T {
    read.unwrap_or_else(|failure| {
        *unread = Some(match unread.take() {
            Some(before) => before.merge(failure),
            None => failure,
        });
        T::default()
    })
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

impl ServerStatus {
    /// Nobody has renewed the lock for a day: its session died.
    pub fn is_left_locked(&self, now: Timestamp) -> bool {
        let renewed = self.locked.as_ref().and_then(|lock| lock.renewed);
        renewed.is_some_and(|renewed| now.duration_since(renewed) > LEFT_LOCKED)
    }

    /// The server has little free space.
    pub fn is_low(&self) -> bool {
        self.available_bytes
            .is_some_and(|available| available < LOW_BYTES)
    }
}

impl LocalStatus {
    /// Whether the last check of some kind or a drill found damage, or snapshots are gone.
    pub fn is_damaged(&self) -> bool {
        let checks = self.each_check().map(|(_, check)| check);
        let drills = self.checks.drill.iter().chain(&self.checks.recovery);
        let found = checks.chain(drills).any(|check| check.exit != Exit::Done);
        found || self.history.gone.is_some()
    }

    /// The last check of each kind, and the name of the kind.
    pub fn each_check(&self) -> impl Iterator<Item = (String, &KeptCheck)> {
        let checks = &self.checks;
        let quick = checks.quick.iter().map(|check| ("quick".to_owned(), check));
        let read = checks.read_data.iter();
        let read = read.map(|check| ("--read-data".to_owned(), check));
        let against = checks.against_source.iter();
        let against = against.map(|(job, check)| (format!("--against-source {job}"), check));
        quick.chain(read).chain(against)
    }
}

fn ask(state_dir: &Path, target: &Target, ssh: &SshOptions) -> Result<ServerStatus, Failure> {
    let store = connect::connect(target, ssh)?;
    let name = &target.name;
    let stat = store.stat(name).map_err(|error| match error.kind() {
        StoreErrorKind::NotFound => missing::no_container(state_dir, target),
        _ => Failure::from(error),
    })?;
    let file = store.open(name, Access::ReadOnly)?;
    // Any header that cryptsetup opens: it is only checked.
    connect::any_header(&*file, state_dir, target)?;
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
    Ok(ServerStatus {
        available_bytes: space.map(|space| space.available_bytes),
        total_bytes: space.map(|space| space.total_bytes),
        container_bytes: stat.len,
        allocated_bytes: stat
            .allocated_bytes
            .or_else(|| allocated(target, ssh, &*store, &stat)),
        reserve_bytes: reserve,
        locked: locked.as_ref().map(LockStatus::of),
    })
}

fn unless_unsupported<T>(asked: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match asked {
        Ok(answer) => Ok(Some(answer)),
        Err(StoreError::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// SFTP reports only a file's length; a shell on the server can report where it holds data.
fn allocated(target: &Target, ssh: &SshOptions, store: &dyn Store, stat: &FileStat) -> Option<u64> {
    let map = match connect::remote_data_map(target, ssh, stat, SHELL_LIMIT) {
        Some(map) => map.ok()?,
        None => DataMap::of(&*store.open(&target.name, Access::ReadOnly).ok()?).ok()?,
    };
    Some(map.data_bytes())
}

impl LockStatus {
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
