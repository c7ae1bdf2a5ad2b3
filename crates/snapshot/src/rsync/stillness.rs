//! Detects an rsync that makes no progress: it prints nothing, none of its processes computes, and no
//! byte passes through any of them. A slow disk or a lost connection may take long. So this is first
//! reported, and rsync is stopped only after a time that neither needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::waiting::{file_waited_for, pipe_opened_by};

/// The time between two measurements.
const MEASURE_INTERVAL: Duration = Duration::from_secs(10);
/// How long rsync may make no progress before that is reported.
pub(crate) const REPORT_AFTER: Duration = Duration::from_secs(600);
/// How long rsync may make no progress before it is stopped. sprat waits 15 minutes for a lost
/// connection, and 10 for an fsync on the server.
pub(crate) const STILL_MAX: Duration = Duration::from_secs(3600);
/// Less computing than this counts as none, in hundredths of a second (`USER_HZ`).
const TICKS_OF_WORK: u64 = 10;
/// rsync has at most three processes. A wrapper script adds some.
const PROCESSES_MAX: usize = 64;

/// Measures how long rsync has made no progress.
#[derive(Debug)]
pub(super) struct Stillness {
    process: u32,
    moved: Option<u64>,
    measured: Instant,
    since: Instant,
}

impl Stillness {
    /// Measures this process's children, one of which is rsync.
    pub(super) fn of_children() -> Self {
        Self {
            process: own_number(),
            moved: None,
            measured: Instant::now(),
            since: Instant::now(),
        }
    }

    /// rsync has printed something.
    pub(super) fn note_output(&mut self) {
        self.since = Instant::now();
    }

    /// The pipe whose writer one of the processes below waits for, if any. Like [`pipe_opened_by`] it
    /// may block, so it is not for a thread that others wait for.
    pub(super) fn pipe_waited_for(process: u32) -> Option<PathBuf> {
        below(process).into_iter().find_map(pipe_opened_by)
    }

    /// The process whose children are measured.
    pub(super) fn process(&self) -> u32 {
        self.process
    }

    /// The file that one of the processes below waits for.
    pub(super) fn file_waited_for(&self) -> Option<PathBuf> {
        below(self.process).into_iter().find_map(file_waited_for)
    }

    /// For how long there was no progress. Zero if the kernel doesn't show it.
    pub(super) fn still(&mut self) -> Duration {
        if self.measured.elapsed() >= MEASURE_INTERVAL {
            self.measure();
        }
        match self.moved {
            Some(_) => self.since.elapsed(),
            None => Duration::ZERO,
        }
    }

    /// The same in seconds, if it is long enough to report.
    pub(super) fn still_s_to_report(&mut self) -> Option<u64> {
        let still = self.still();
        (still >= REPORT_AFTER).then_some(still.as_secs())
    }

    fn measure(&mut self) {
        self.measured = Instant::now();
        let moved = moved_below(self.process);
        if moved != self.moved {
            self.since = self.measured;
        }
        self.moved = moved;
    }
}

/// This process's number in `/proc`. `/proc` may be that of an outer pid namespace, with other numbers.
fn own_number() -> u32 {
    let own = fs::read_link("/proc/self").ok();
    own.and_then(|own| own.to_str()?.parse().ok()).unwrap_or(0)
}

/// The files below `tree` that processes below this one have open for writing.
pub(crate) fn written_in(tree: &Path) -> Vec<PathBuf> {
    let processes = below(own_number()).into_iter();
    let written = processes.filter_map(|child| files_written_by(child, tree));
    written.flatten().collect()
}

fn files_written_by(process: u32, tree: &Path) -> Option<Vec<PathBuf>> {
    let own = Path::new("/proc").join(process.to_string());
    let mut files = Vec::new();
    for open in fs::read_dir(own.join("fd")).ok()?.filter_map(Result::ok) {
        let Ok(path) = fs::read_link(open.path()) else {
            continue;
        };
        if !path.starts_with(tree) {
            continue;
        }
        // `flags:` in octal (proc.rst, 3.8); 1 and 2 are `O_WRONLY` and `O_RDWR`.
        let about = fs::read_to_string(own.join("fdinfo").join(open.file_name())).ok()?;
        let flags = about.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
        if flags.is_some_and(|flags| flags & 3 != 0) {
            files.push(path);
        }
    }
    Some(files)
}

/// All processes below `process`, without itself.
fn below(process: u32) -> Vec<u32> {
    let mut todo = children(process).unwrap_or_default();
    let mut found = Vec::new();
    while let Some(child) = todo.pop()
        && found.len() < PROCESSES_MAX
    {
        found.push(child);
        todo.extend(children(child).unwrap_or_default());
    }
    found
}

/// The bytes that all processes below `process` have read and written, including the pipes between them,
/// and the time that they have computed. The latter because reading a folder moves no bytes that are
/// counted.
fn moved_below(process: u32) -> Option<u64> {
    children(process)?;
    let of = |child: u32| {
        let bytes = bytes_of(child).unwrap_or(0);
        // A process that only waits wakes up now and then.
        bytes.wrapping_add(ticks_of(child).unwrap_or(0) / TICKS_OF_WORK)
    };
    Some(
        below(process)
            .into_iter()
            .map(of)
            .fold(0, u64::wrapping_add),
    )
}

/// `utime` and `stime` of `/proc/PID/stat`, fields 14 and 15 (proc_pid_stat(5)).
fn ticks_of(process: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{process}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // The name, field 2, may contain anything, even `)`.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11);
    let mut ticks = || times.next()?.parse::<u64>().ok();
    Some(ticks()?.wrapping_add(ticks()?))
}

/// `Documentation/filesystems/proc.rst`, 3.7. Each thread has a list of its own.
fn children(process: u32) -> Option<Vec<u32>> {
    let mut all = Vec::new();
    let tasks = Path::new("/proc").join(process.to_string()).join("task");
    for task in fs::read_dir(tasks).ok()?.filter_map(Result::ok) {
        let children = fs::read_to_string(task.path().join("children")).ok()?;
        all.extend(
            children
                .split_whitespace()
                .filter_map(|pid| pid.parse::<u32>().ok()),
        );
    }
    Some(all)
}

/// `rchar` and `wchar` of `/proc/PID/io` (proc.rst, 3.3).
fn bytes_of(process: u32) -> Option<u64> {
    let counts = fs::read_to_string(format!("/proc/{process}/io")).ok()?;
    let count = |name: &str| {
        let line = counts.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    Some(count("rchar:")?.wrapping_add(count("wchar:")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cancel::Cancel;
    use crate::error::SnapshotError;
    use crate::rsync::program::Rsync;
    use crate::rsync::{Invocation, Side};
    use std::process::{Command, Stdio};

    #[test]
    fn a_sleeping_process_makes_no_progress_and_a_writing_one_does() {
        let mut child = Command::new("sh")
            .args(["-c", "read line; cat /dev/zero"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        // The shell has read its libraries by then.
        std::thread::sleep(Duration::from_millis(300));
        let still = bytes_of(child.id());
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(bytes_of(child.id()), still);
        assert!(children(std::process::id()).unwrap().contains(&child.id()));

        let mut stillness = Stillness::of_children();
        assert_eq!(stillness.process, std::process::id());
        stillness.measure();
        assert_eq!(stillness.still_s_to_report(), None);
        stillness.since = Instant::now().checked_sub(REPORT_AFTER).unwrap();
        assert_eq!(stillness.still_s_to_report(), Some(600));
        drop(input);
        let mut out = child.stdout.take().unwrap();
        std::io::Read::read_exact(&mut out, &mut [0; 65536]).unwrap();
        stillness.measure();
        assert_eq!(stillness.still_s_to_report(), None);
        drop(out);
        child.wait().unwrap();
    }

    #[test]
    fn a_hanging_rsync_is_stopped_and_its_file_reported() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        // It has a writer, so that the open succeeds and only the read blocks.
        let mut options = fs::File::options();
        let _writer = options.read(true).write(true).open(&pipe).unwrap();
        let program = dir.path().join("rsync");
        fs::write(&program, "#!/bin/sh\nread line < pipe\n").unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&program, executable).unwrap();
        let rsync = Rsync {
            path: program,
            version: String::new(),
            numbers: (3, 2, 7),
        };
        let mut invocation = Invocation::new(Vec::new(), dir.path(), dir.path(), Side::IntoVolume);
        invocation.still_max = Duration::from_secs(1);
        let begun = Instant::now();
        let ran = rsync.run(&invocation, &mut |_| {}, &Cancel::new());
        let Err(SnapshotError::StoodStill { at, .. }) = ran else {
            panic!("{ran:?}");
        };
        assert_eq!(at.as_deref(), pipe.to_str());
        assert!(begun.elapsed() < Duration::from_secs(40));
    }
}
