//! Notices an rsync that does nothing: it says nothing, and no byte goes through any of its processes.
//! It is only told, never ended: a slow disk or a line that is away may take long.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::waiting::pipe_opened_by;

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// What takes longer than this is told.
const TOLD_AFTER: Duration = Duration::from_secs(600);
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

    /// The pipe for whose writer one of the processes below waits, if any does.
    pub(super) fn pipe_waited_for(&self) -> Option<PathBuf> {
        let mut todo = children(self.process)?;
        for _ in 0..PROCESSES_MAX {
            let child = todo.pop()?;
            if let Some(pipe) = pipe_opened_by(child) {
                return Some(pipe);
            }
            todo.extend(children(child).unwrap_or_default());
        }
        None
    }

    /// For how many seconds nothing has moved, where that is long and the kernel tells.
    pub(super) fn told_s(&mut self) -> Option<u64> {
        if self.looked.elapsed() >= LOOK_INTERVAL {
            self.look();
        }
        let still = self.since.elapsed();
        (self.moved.is_some() && still >= TOLD_AFTER).then_some(still.as_secs())
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
    let mut todo = children(own_number()).unwrap_or_default();
    let mut written = Vec::new();
    for _ in 0..PROCESSES_MAX {
        let Some(child) = todo.pop() else { break };
        written.extend(files_written_by(child, tree).unwrap_or_default());
        todo.extend(children(child).unwrap_or_default());
    }
    written
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

/// Bytes that all processes below `process` have read and written, pipes between them included.
fn moved_below(process: u32) -> Option<u64> {
    let mut todo = children(process)?;
    let mut moved = 0_u64;
    let mut seen = 0;
    while let Some(child) = todo.pop() {
        seen += 1;
        if seen > PROCESSES_MAX {
            break;
        }
        moved = moved.wrapping_add(bytes_of(child).unwrap_or(0));
        todo.extend(children(child).unwrap_or_default());
    }
    Some(moved)
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
}
