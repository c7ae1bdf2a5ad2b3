//! Lets one run work at a time: `flock` on `run.lock` in the runtime folder. The hooks of a job, or of a
//! container, have a lock each in the same way.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use sprat_session::interrupt::Interrupt;
use sprat_session::{Exit, Failure};
use sprat_snapshot::local_file::make_private_folder;

const NAME: &str = "run.lock";
/// The folder of the locks of hooks.
const HOOKS: &str = "hooks";
/// How often a lock that another run has is tried again.
const TRY_INTERVAL: Duration = Duration::from_millis(100);

/// No other run works while this exists. It ends with the process, also with `kill -9`.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Acquires the lock. Waits up to `wait` while another run has it; `None`: it still has it then.
    pub fn acquire(
        runtime_dir: &Path,
        wait: Duration,
        interrupt: &Interrupt,
    ) -> Result<Option<Self>, Failure> {
        make_private_folder(runtime_dir)
            .map_err(|error| cannot_use(&runtime_dir.join(NAME), &error))?;
        Self::at(&runtime_dir.join(NAME), wait, interrupt)
    }

    /// Acquires the lock of the hooks of a job, or of a container with `@` before its name; `None`: another
    /// process has it.
    pub(crate) fn of_hooks(runtime_dir: &Path, name: &str) -> Result<Option<Self>, Failure> {
        let folder = runtime_dir.join(HOOKS);
        let path = folder.join(format!("{name}.lock"));
        make_private_folder(&folder).map_err(|error| cannot_use(&path, &error))?;
        Self::at(&path, Duration::ZERO, &Interrupt::never()?)
    }

    /// Where the hook that runs below the lock [`of_hooks`](Self::of_hooks) is noted.
    pub(crate) fn note_of_hook(runtime_dir: &Path, name: &str) -> PathBuf {
        runtime_dir.join(HOOKS).join(format!("{name}.hook"))
    }

    fn at(path: &Path, wait: Duration, interrupt: &Interrupt) -> Result<Option<Self>, Failure> {
        let cannot = |error: io::Error| cannot_use(path, &error);
        let mut options = OpenOptions::new();
        // It is not truncated: another run may have it.
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(path).map_err(cannot)?;
        let deadline = Instant::now().checked_add(wait);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(errno) => return Err(cannot(errno.into())),
            }
            interrupt.check()?;
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            match left {
                Some(left) if left.is_zero() => return Ok(None),
                left => std::thread::sleep(TRY_INTERVAL.min(left.unwrap_or(TRY_INTERVAL))),
            }
        }
        // For people and messages only.
        let _ = file.set_len(0);
        let _ = writeln!(file, "{}", std::process::id());
        Ok(Some(Self { _file: file }))
    }

    /// Another run has the lock.
    #[must_use]
    pub fn already_running(runtime_dir: &Path) -> Failure {
        let pid = std::fs::read_to_string(runtime_dir.join(NAME)).unwrap_or_default();
        let failure = Failure::new(Exit::Locked, "already running");
        let failure = match pid.trim().parse::<u32>() {
            Ok(pid) => failure.because(format!("another `sprat run` works (process {pid})")),
            Err(_) => failure.because("another `sprat run` works"),
        };
        failure.with_hint("nothing was started. Wait for it with --lock-wait TIME")
    }
}

fn cannot_use(path: &Path, error: &io::Error) -> Failure {
    Failure::failed(format!("can't use the lock file {}", path.display()))
        .caused_by(error)
        .with_hint("nothing was started")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_run_at_a_time_and_the_next_waits_or_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let runtime = folder.path().join("run");
        let interrupt = Interrupt::never().unwrap();
        let acquire = |wait| RunLock::acquire(&runtime, wait, &interrupt).unwrap();
        let first = acquire(Duration::ZERO).unwrap();
        assert!(acquire(Duration::ZERO).is_none());
        assert!(acquire(Duration::from_millis(150)).is_none());
        let failure = RunLock::already_running(&runtime);
        assert_eq!(failure.exit, Exit::Locked);
        let pid = std::process::id().to_string();
        assert!(failure.in_one_line().contains(&pid), "{failure:?}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| acquire(Duration::from_secs(60)).is_some());
            std::thread::sleep(Duration::from_millis(50));
            drop(first);
            assert!(waiting.join().unwrap());
        });
        let held = acquire(Duration::ZERO).unwrap();
        interrupt.request();
        let failure = RunLock::acquire(&runtime, Duration::from_secs(60), &interrupt).unwrap_err();
        assert_eq!(failure.exit, Exit::Interrupted);
        drop(held);
    }

    #[test]
    fn a_child_that_outlives_the_run_does_not_keep_the_lock() {
        let folder = tempfile::tempdir().unwrap();
        let interrupt = Interrupt::never().unwrap();
        let lock = RunLock::acquire(folder.path(), Duration::ZERO, &interrupt).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        drop(lock);
        // spawn(3) returns when the child has a memory of its own. Its copy of the file is closed a moment later.
        let again = RunLock::acquire(folder.path(), Duration::from_secs(10), &interrupt).unwrap();
        assert!(again.is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
