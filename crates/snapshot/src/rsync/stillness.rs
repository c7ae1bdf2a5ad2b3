//! Notices an rsync that does nothing: it says nothing, none of its processes computes, and no byte goes
//! through any of them. A slow disk or a connection that is away may take long, so it is reported first,
//! and ended only after a time that neither needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::waiting::{file_waited_for, pipe_opened_by};

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// What takes longer than this is told.
const TOLD_AFTER: Duration = Duration::from_secs(600);
/// After so long it is ended. A lost connection to the server is waited for for 15 minutes, and an fsync
/// there for 10.
pub(super) const STILL_MAX: Duration = Duration::from_secs(3600);
/// Computing counts in steps of so many hundredths of a second (`USER_HZ`).
const TICKS_OF_WORK: u64 = 10;
/// rsync is three processes at most; a wrapper adds some.
const PROCESSES_MAX: usize = 64;

/// How long nothing has moved.
#[derive(Debug)]
pub(super) struct Stillness {
    process: u32,
    moved: Option<u64>,
    looked: Instant,
    since: Instant,
}

impl Stillness {
    /// Looks at this process's children, of which one is rsync.
    pub(super) fn of_children() -> Self {
        Self {
            process: own_number(),
            moved: None,
            looked: Instant::now(),
            since: Instant::now(),
        }
    }

    /// rsync has said something.
    pub(super) fn spoken(&mut self) {
        self.since = Instant::now();
    }

    /// The pipe for whose writer one of the processes below waits, if any does. As
    /// [`pipe_opened_by`], so not for a thread that others wait for.
    pub(super) fn pipe_waited_for(process: u32) -> Option<PathBuf> {
        below(process).into_iter().find_map(pipe_opened_by)
    }

    /// The process whose children are examined.
    pub(super) fn process(&self) -> u32 {
        self.process
    }

    /// The file for which one of the processes below waits.
    pub(super) fn file_waited_for(&self) -> Option<PathBuf> {
        below(self.process).into_iter().find_map(file_waited_for)
    }

    /// For how long nothing has moved; zero where the kernel doesn't tell.
    pub(super) fn still(&mut self) -> Duration {
        if self.looked.elapsed() >= LOOK_INTERVAL {
            self.look();
        }
        match self.moved {
            Some(_) => self.since.elapsed(),
            None => Duration::ZERO,
        }
    }

    /// The same in seconds, where that is long.
    pub(super) fn told_s(&mut self) -> Option<u64> {
        let still = self.still();
        (still >= TOLD_AFTER).then_some(still.as_secs())
    }

    fn look(&mut self) {
        self.looked = Instant::now();
        let moved = moved_below(self.process);
        if moved != self.moved {
            self.since = self.looked;
        }
        self.moved = moved;
    }
}

/// This process's number in `/proc`. The table may be that of an outer pid namespace, with other numbers.
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

/// The processes below `process`, without itself.
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

/// Bytes that all processes below `process` have read and written, pipes between them included, and the
/// time for which they have computed: reading a folder moves no byte that is counted.
fn moved_below(process: u32) -> Option<u64> {
    children(process)?;
    let of = |child: u32| {
        let bytes = bytes_of(child).unwrap_or(0);
        // Who only waits wakes up now and then.
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
    // The name, field 2, may hold anything, `)` too.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut times = rest.split_whitespace().skip(11);
    let mut ticks = || times.next()?.parse::<u64>().ok();
    Some(ticks()?.wrapping_add(ticks()?))
}

/// `Documentation/filesystems/proc.rst`, 3.7; each thread has its own list.
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
    use crate::error::SnapshotError;
    use crate::rsync::program::Rsync;
    use crate::rsync::{Invocation, Side};
    use crate::spec::Cancel;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_that_sleeps_moves_nothing_and_one_that_writes_does() {
        let mut child = Command::new("sh")
            .args(["-c", "read line; cat /dev/zero"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        // Until the shell has read its libraries.
        std::thread::sleep(Duration::from_millis(300));
        let still = bytes_of(child.id());
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(bytes_of(child.id()), still);
        assert!(children(std::process::id()).unwrap().contains(&child.id()));

        let mut stillness = Stillness::of_children();
        assert_eq!(stillness.process, std::process::id());
        stillness.look();
        assert_eq!(stillness.told_s(), None);
        stillness.since = Instant::now().checked_sub(TOLD_AFTER).unwrap();
        assert_eq!(stillness.told_s(), Some(600));
        drop(input);
        let mut out = child.stdout.take().unwrap();
        std::io::Read::read_exact(&mut out, &mut [0; 65536]).unwrap();
        stillness.look();
        assert_eq!(stillness.told_s(), None);
        drop(out);
        child.wait().unwrap();
    }

    #[test]
    fn an_rsync_that_does_nothing_is_ended_and_its_file_named() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        // With a writer, so that opening it waits for nobody, and a read does.
        let mut options = fs::File::options();
        let _writer = options.read(true).write(true).open(&pipe).unwrap();
        let program = dir.path().join("rsync");
        fs::write(&program, "#!/bin/sh\nread line < pipe\n").unwrap();
        let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(&program, executable).unwrap();
        let rsync = Rsync {
            path: program,
            version: String::new(),
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
