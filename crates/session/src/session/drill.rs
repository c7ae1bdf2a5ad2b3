//! `sprat drill`: restores a sample from the server in one read-only session, compares it, and keeps the
//! result on this machine. With `--recovery` as a machine that has lost everything but the recovery sheet.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde_json::json;
use sprat_luks::Secret;
use sprat_snapshot::{CheckWhat, DrillReport, DrillSpec, JobName};

use crate::files::make_private_folder;
use crate::interrupt::Interrupt;
use crate::json::{exit_json, failure_json};
use crate::protocol::messages::WorkerOrder;
use crate::protocol::reports::{ContainerFacts, Observer};
use crate::session::Session;
use crate::settings::{Access, IdentityPolicy, SessionSettings};
use crate::state::checks::{self, KeptCheck, Kind};
use crate::state::identity;
use crate::state::paths::{CHECKS, SUSPECTS, StatePaths};
use crate::{Exit, Failure};

/// The folder for restored files, in the cache folder.
const SCRATCH: &str = "drill";
/// The folder of a rehearsed recovery, below the cache folder.
const RECOVERY: &str = "recovery";
/// How many files are restored.
const FILES_MAX: u32 = 100;
/// For each of them, so many bytes are restored in all.
const FILE_BYTES: u64 = 2 << 20;
/// For so many files, no further file is restored after this time.
const DURATION_MAX: Duration = Duration::from_secs(600);

/// How much is restored, and what it is compared with.
#[derive(Debug, Clone)]
pub struct DrillPlan {
    /// As [`DrillSpec::jobs_here`].
    pub jobs_here: Vec<JobName>,
    /// As [`DrillSpec::files_max`].
    pub files_max: usize,
    /// As [`DrillSpec::bytes_max`].
    pub bytes_max: u64,
    /// As [`DrillSpec::duration_max`].
    pub duration_max: Duration,
}

impl DrillPlan {
    /// 100 files or 200 MiB, whichever is less, within 10 minutes. With `files`, as much more or less.
    #[must_use]
    pub fn new(jobs_here: Vec<JobName>, files: Option<u32>) -> Self {
        let files = files.unwrap_or(FILES_MAX);
        Self {
            jobs_here,
            files_max: files as usize,
            bytes_max: FILE_BYTES * u64::from(files),
            duration_max: DURATION_MAX * files.div_ceil(FILES_MAX),
        }
    }
}

/// What a drill found.
#[derive(Debug)]
pub struct Drilled {
    /// What the container is.
    pub facts: ContainerFacts,
    /// The sample.
    pub report: DrillReport,
    /// Blocks that the server showed with other bytes than this machine had left there.
    pub differing_blocks: u64,
}

impl Drilled {
    /// [`Exit::Done`] or [`Exit::Damaged`].
    #[must_use]
    pub fn exit(&self) -> Exit {
        let faulty = self.facts.file_system_errors.is_some();
        match self.report.is_damaged() || self.differing_blocks > 0 || faulty {
            true => Exit::Damaged,
            false => Exit::Done,
        }
    }
}

/// Opens the container for reading, restores a sample, and compares it. Every byte comes from the server: what
/// this machine has cached is compared, and not used.
///
/// # Errors
/// The container can't be opened, or nothing could be restored. Damage in the sample is no error.
pub fn drill(
    mut settings: SessionSettings,
    secret: &Secret,
    plan: &DrillPlan,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Drilled, Failure> {
    settings.access = Access::ReadOnly;
    settings.verify_cache = true;
    let (state_dir, target) = (settings.state_dir.clone(), settings.target.clone());
    let pinned = match &settings.pins {
        IdentityPolicy::Known(pins) => Some(StatePaths::new(&state_dir, &pins.uuid, &target)),
        _ => None,
    };
    let drilled = in_scratch(settings, &state_dir, secret, plan, observer, interrupt);
    let paths_of = |uuid: &str| StatePaths::new(&state_dir, uuid, &target);
    keep(Kind::Drill, drilled, pinned, &paths_of)
}

/// As [`drill`], by what the recovery sheet has: the location of the container, the recovery key, and the
/// fingerprint if one is given. Nothing that this machine knows of the container, or has cached of it, is used
/// to open it; its checksums are used to compare. Nothing of the rehearsal is left but its result.
///
/// # Errors
/// As [`drill`].
pub fn rehearse_recovery(
    mut settings: SessionSettings,
    fingerprint: Option<&str>,
    recovery_key: &Secret,
    plan: &DrillPlan,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Drilled, Failure> {
    let (state_dir, target) = (settings.state_dir.clone(), settings.target.clone());
    let pinned = match &settings.pins {
        IdentityPolicy::Known(pins) => Some(StatePaths::new(&state_dir, &pins.uuid, &target)),
        _ => None,
    };
    let machine = Scratch::begin(&settings.cache_dir, RECOVERY)?;
    settings.access = Access::ReadOnly;
    settings.state_dir = machine.path.join("state");
    settings.cache_dir = machine.path.join("cache");
    settings.runtime_dir = machine.path.join("run");
    settings.containers.clear();
    settings.pins = identity::policy(&settings.state_dir, &target, fingerprint)?;
    let drilled = in_scratch(
        settings,
        &state_dir,
        recovery_key,
        plan,
        observer,
        interrupt,
    );
    let paths_of = |uuid: &str| StatePaths::new(&state_dir, uuid, &target);
    keep(Kind::Recovery, drilled, pinned, &paths_of)
}

/// Keeps the result on this machine. `pinned`: where, if the container was not opened.
fn keep(
    kind: Kind<'_>,
    mut drilled: Result<Drilled, Failure>,
    pinned: Option<StatePaths>,
    paths_of: &dyn Fn(&str) -> StatePaths,
) -> Result<Drilled, Failure> {
    let verdict = match &drilled {
        Ok(drilled) => {
            let paths = paths_of(&drilled.facts.uuid);
            Some((paths, drilled.exit(), json!(drilled.report)))
        }
        Err(failure) if failure.exit == Exit::Damaged => {
            pinned.map(|paths| (paths, Exit::Damaged, failure_json(failure)))
        }
        Err(_) => None,
    };
    if let Some((paths, exit, found)) = verdict {
        let result = json!({ "result": exit_json(exit), "found": found });
        let kept = KeptCheck::now(exit, true, result);
        if let (Err(error), Ok(drilled)) = (checks::keep(&paths, vec![(kind, kept)]), &mut drilled)
        {
            let path = checks::path(&paths);
            let reason = format!("{}: {error}", path.display());
            drilled.report.not_saved.push(reason);
        }
    }
    drilled
}

/// Restores and compares. `state_dir` has what this machine knows of the files.
fn in_scratch(
    settings: SessionSettings,
    state_dir: &Path,
    secret: &Secret,
    plan: &DrillPlan,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Drilled, Failure> {
    let scratch = Scratch::begin(&settings.cache_dir, SCRATCH)?;
    let target = settings.target.clone();
    let mut session = Session::open(settings, secret, observer, interrupt)?;
    let facts = session.facts().clone();
    let paths = StatePaths::new(state_dir, &facts.uuid, &target);
    // Without them less can be compared.
    let (known, _) = checks::sums(&paths, &CheckWhat::Everything);
    let spec = DrillSpec {
        scratch: scratch.path.clone(),
        known,
        change_lists: Some(paths.change_lists()),
        suspects: paths.file(CHECKS, SUSPECTS),
        jobs_here: plan.jobs_here.clone(),
        files_max: plan.files_max,
        bytes_max: plan.bytes_max,
        duration_max: plan.duration_max,
        seed: RandomState::new().build_hasher().finish(),
    };
    let asked = session.ask(&WorkerOrder::Drill(Box::new(spec)), observer, interrupt);
    let closed = session.close(observer, interrupt);
    let report: DrillReport = match (asked, &closed) {
        (Ok(report), _) => report,
        (Err(first), Err(last)) => return Err(first.merge(last.clone())),
        (Err(failure), Ok(_)) => return Err(failure),
    };
    let differing_blocks = closed?.differing_blocks;
    if report.files == 0 && !report.is_damaged() {
        let (why, hint) = match report.listed_all {
            true => (
                "no finished snapshot has a file with content",
                "make a backup first",
            ),
            false => (
                "the time was over before a file was found",
                "the connection is slow. Run the same command again with more --files",
            ),
        };
        return Err(Failure::failed("nothing was restored")
            .because(why)
            .with_hint(hint));
    }
    Ok(Drilled {
        facts,
        report,
        differing_blocks,
    })
}

/// A folder, empty at the beginning and at the end. One drill at a time has it.
struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    fn begin(cache_dir: &Path, name: &str) -> Result<Self, Failure> {
        let path = cache_dir.join(name);
        make_private_folder(&path)?;
        let unusable = |error: io::Error| {
            Failure::failed(format!("can't use the folder {}", path.display())).caused_by(&error)
        };
        let lock = File::open(&path).map_err(unusable)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(Failure::new(Exit::Locked, "another drill is running")
                    .with_hint("nothing was started. Wait until it has ended"));
            }
            locked => locked.map_err(|error| unusable(error.into()))?,
        }
        empty(&path).map_err(unusable)?;
        Ok(Self { path, _lock: lock })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // The next drill tries again.
        let _ = empty(&self.path);
    }
}

/// Removes what a drill that was killed has left in clear, unless one is running.
pub(super) fn empty_left(cache_dir: &Path) {
    for name in [SCRATCH, RECOVERY] {
        empty_left_in(&cache_dir.join(name));
    }
}

fn empty_left_in(path: &Path) {
    let has_some = std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_some());
    if !has_some {
        return;
    }
    let emptied = File::open(path).and_then(|lock| {
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(()),
            locked => locked.map_err(io::Error::from).and_then(|()| empty(path)),
        }
    });
    if let Err(error) = emptied {
        tracing::warn!(%error, path = %path.display(), "files of a drill can't be removed");
    }
}

fn empty(folder: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => std::fs::remove_dir_all(entry.path())?,
            false => std::fs::remove_file(entry.path())?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_killed_drill_are_removed_and_those_of_a_running_one_stay() {
        let cache = tempfile::tempdir().unwrap();
        empty_left(cache.path());
        let running = Scratch::begin(cache.path(), SCRATCH).unwrap();
        let left = running.path.join("0/left");
        std::fs::create_dir(left.parent().unwrap()).unwrap();
        std::fs::write(&left, "plain text").unwrap();
        empty_left(cache.path());
        assert!(left.exists());
        let Scratch { path, _lock } = &running;
        flock(_lock, FlockOperation::Unlock).unwrap();
        empty_left(cache.path());
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 0);
    }
}
