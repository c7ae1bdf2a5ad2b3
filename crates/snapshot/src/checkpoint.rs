//! Records during a run which files of `.inflight` are durable. After a crash only those are used.
//!
//! With delayed allocation, a file can have its full size and its time after a crash, but not its data.
//! rsync would take such a file for unchanged and link it. So every [`INTERVAL`] a thread does this:
//!
//! 1. writes `.sprat/checkpoint.clock` and reads its change time T, by the file system's own clock;
//! 2. `syncfs`: everything written before T is durable;
//! 3. replaces `.sprat/NAME.checkpoint` with T. The write comes after the sync, and the volume keeps
//!    that order to the server's disk: where the file says T, what was before T is there.
//!
//! rsync sets a file's times and renames it after it has written the last byte, and both update the
//! inode's change time. So a file whose change time is older than T is complete. The recovery removes
//! the names of all others from the tree. If the clock is set back during the run, later files look
//! older: then the checkpoint is removed, and the run makes no further one.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, openat};
use rustix::time::{ClockId, clock_gettime};

use crate::begun::Begun;
use crate::foreign::temporary_name;
use crate::job::replace_file;
use crate::name::SnapshotName;
use crate::walk::change_time_ns;

/// How much work a crash can cost, and how often the volume is synced. ext4 commits its journal every 5
/// s anyway, so this adds little.
pub(crate) const INTERVAL: Duration = Duration::from_secs(15);
/// How often the file that rsync is writing is searched for ([`crate::begun`]).
const SEARCH_INTERVAL: Duration = Duration::from_millis(500);
/// Change times come from the kernel's coarse clock, which is up to 10 ms late.
const MARGIN_NS: i128 = 1_000_000_000;
/// NTP may slew the clock. A step back is larger than any slewing during a run.
const STEP_BACK_NS: i128 = 500_000_000;

/// What checkpoints are needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// All files.
    ForAll,
    /// Only large files, while one of them is written. Each commit of a btrfs is whole by itself.
    ForLargeFiles,
}

/// The thread that makes checkpoints. It runs until this is dropped.
pub(crate) struct Checkpoints {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<Result<(), io::Error>>>,
}

/// A file that is written for its change time.
const CLOCK: &str = "checkpoint.clock";

fn file_name(name: SnapshotName) -> String {
    format!("{name}.checkpoint")
}

impl Checkpoints {
    /// Starts the thread for the run `name`.
    pub(crate) fn begin(
        state: &OwnedFd,
        name: SnapshotName,
        every: Duration,
        begun: Option<Arc<Begun>>,
        need: Need,
    ) -> io::Result<Self> {
        let state = Arc::new(state.try_clone()?);
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::Builder::new()
            .name("checkpoint".to_owned())
            .spawn(move || {
                let offset = clock_offset_ns();
                let mut last = Instant::now();
                let wait = every.min(SEARCH_INTERVAL);
                while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(wait) {
                    if clock_offset_ns() < offset - STEP_BACK_NS {
                        forget(&state, name);
                        begun.iter().for_each(|begun| begun.withdraw());
                        return Ok(());
                    }
                    begun.iter().for_each(|begun| begun.link_file_in_progress());
                    if last.elapsed() < every {
                        continue;
                    }
                    let written = begun.as_ref().and_then(|begun| begun.written());
                    if need == Need::ForLargeFiles && written.is_none() {
                        continue;
                    }
                    make(&state, name)?;
                    if let Some(begun) = &begun {
                        // This concerns only the next run. This run continues.
                        if begun.note(written).is_err() {
                            begun.withdraw();
                        }
                    }
                    last = Instant::now();
                }
                Ok(())
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Ends the thread. Fails if a sync failed meanwhile.
    pub(crate) fn end(mut self) -> io::Result<()> {
        drop(self.stop.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("the checkpoint thread panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Checkpoints {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How far the wall clock is ahead of the boot time clock, which nobody can set.
fn clock_offset_ns() -> i128 {
    let ns = |id| {
        let time = clock_gettime(id);
        i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
    };
    ns(ClockId::Realtime) - ns(ClockId::Boottime)
}

/// Makes one checkpoint.
pub(crate) fn make(state: &OwnedFd, name: SnapshotName) -> io::Result<()> {
    // Exclusive: never writes through a foreign symbolic link or into a pipe.
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let clock = temporary_name(state, CLOCK)?;
    let mut clock = std::fs::File::from(openat(state, clock, flags, Mode::from(0o600))?);
    io::Write::write_all(&mut clock, b"now\n")?;
    let now_ns = change_time_ns(&rustix::fs::fstat(&clock)?);
    rustix::fs::syncfs(state)?;
    let durable_before_ns = now_ns - MARGIN_NS;
    replace_file(
        state,
        &file_name(name),
        format!("{durable_before_ns}\n").as_bytes(),
    )
}

/// The change time, in nanoseconds since 1970, before which everything of the run is durable.
pub(crate) fn read(state: &OwnedFd, name: SnapshotName) -> Option<i128> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = std::fs::File::from(openat(state, file_name(name), flags, Mode::empty()).ok()?);
    let mut text = String::new();
    io::Read::read_to_string(&mut io::Read::take(file, 64), &mut text).ok()?;
    text.strip_suffix('\n')?.parse().ok()
}

/// Removes the checkpoint of `name`.
pub(crate) fn forget(state: &OwnedFd, name: SnapshotName) {
    let _ = rustix::fs::unlinkat(state, file_name(name), AtFlags::empty());
    let _ = rustix::fs::unlinkat(state, CLOCK, AtFlags::empty());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walk::open_folder_at;

    #[test]
    fn checkpoints_appear_during_a_run_and_advance() {
        let dir = tempfile::tempdir().unwrap();
        let state = open_folder_at(dir.path()).unwrap();
        let name = SnapshotName::parse("2026-11-23T13-21-01Z").unwrap();
        assert_eq!(read(&state, name), None);
        let began_ns = i128::from(clock_gettime(ClockId::Realtime).tv_sec) * 1_000_000_000;
        let checkpoints =
            Checkpoints::begin(&state, name, Duration::from_millis(5), None, Need::ForAll).unwrap();
        let first = loop {
            if let Some(first) = read(&state, name) {
                break first;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        while read(&state, name) == Some(first) {
            std::thread::sleep(Duration::from_millis(5));
        }
        checkpoints.end().unwrap();
        let last = read(&state, name).unwrap();
        assert!(last > first && first >= began_ns - 2 * MARGIN_NS);
        forget(&state, name);
        assert_eq!(read(&state, name), None);
    }

    #[test]
    fn a_torn_checkpoint_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let state = open_folder_at(dir.path()).unwrap();
        let name = SnapshotName::parse("2026-11-23T13-21-01Z").unwrap();
        for text in ["", "17", "17 \n", "x\n", "\0\0\0\0"] {
            std::fs::write(dir.path().join(file_name(name)), text).unwrap();
            assert_eq!(read(&state, name), None, "{text:?}");
        }
    }
}
