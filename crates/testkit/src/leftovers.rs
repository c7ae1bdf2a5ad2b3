//! Finds what of a test is still mounted, looped or running on this machine.

use std::fs;
use std::time::{Duration, Instant};

/// How long a test waits until something is gone, or has happened. A busy machine may need most of it.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Whether `bytes` hold `marker` somewhere.
#[must_use]
pub fn contains(bytes: &[u8], marker: &[u8]) -> bool {
    let Some(first) = marker.first() else {
        return true;
    };
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        rest = &rest[at..];
        if rest.starts_with(marker) {
            return true;
        }
        rest = &rest[1..];
    }
    false
}

/// The pids of all processes of this machine.
pub fn pids() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The parent of a process (proc(5): the name in `stat` may hold blanks and parentheses).
#[must_use]
pub fn parent(pid: i32) -> Option<i32> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    let behind_name = stat.rsplit_once(')')?.1;
    behind_name.split_whitespace().nth(1)?.parse().ok()
}

/// A process of a test.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: i32,
    /// The words of its command line.
    pub words: Vec<String>,
}

impl Process {
    /// Its command line.
    #[must_use]
    pub fn line(&self) -> String {
        self.words.join(" ")
    }
}

/// Whether sprat left this reader behind on purpose: it asks whether a device is dead, and waits for an
/// answer that may never come. The device is another test's: a mount of this one is found by itself.
fn waits_for_another_device(words: &[String]) -> bool {
    let is = |word: &str| words.iter().any(|found| found == word);
    is("of=/dev/null") && is("iflag=direct")
}

/// The processes of a test, by pid: those with one of `markers` in their environment or command
/// line, such as the test's folder, and the children of these. rsync is found as a child: neither
/// its environment nor its command line names the folder. The calling process is left out.
#[must_use]
pub fn processes_of(markers: &[&[u8]]) -> Vec<Process> {
    let me = i32::try_from(std::process::id()).ok();
    let mut found = Vec::new();
    let mut others = Vec::new();
    for pid in pids().filter(|pid| Some(*pid) != me) {
        let read = |name: &str| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let (environment, line) = (read("environ"), read("cmdline"));
        let is_marked = |marker: &&[u8]| contains(&environment, marker) || contains(&line, marker);
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        if words.is_empty() || waits_for_another_device(&words) {
            continue;
        }
        let process = Process { pid, words };
        if markers.iter().any(is_marked) {
            found.push(process);
        } else {
            others.push((parent(pid), process));
        }
    }
    let is_child = |found: &[Process], parent: &Option<i32>| {
        found.iter().any(|process| Some(process.pid) == *parent)
    };
    while let Some(at) = others
        .iter()
        .position(|(parent, _)| is_child(&found, parent))
    {
        found.push(others.swap_remove(at).1);
    }
    found.sort();
    found
}

/// The state letter of a process (proc(5)).
fn state(pid: i32) -> char {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let behind_name = stat.rsplit_once(") ").map_or("?", |(_, rest)| rest);
    behind_name.chars().next().unwrap_or('?')
}

/// One line for each process, mount and loop device of a test with a volume of `volume_bytes`.
#[must_use]
pub fn of(markers: &[&[u8]], volume_bytes: u64) -> Vec<String> {
    let mut left: Vec<String> = processes_of(markers)
        .iter()
        .map(|process| {
            let (pid, line) = (process.pid, process.line());
            format!("process {pid} in state {}: {line}", state(pid))
        })
        .collect();
    left.extend(markers.iter().flat_map(|marker| mounts_of(marker)));
    left.extend(loops_of(volume_bytes));
    left
}

/// Waits until `left` is empty.
///
/// # Panics
/// When something is left after [`LIMIT`].
#[track_caller]
pub fn assert_gone(left: impl Fn() -> Vec<String>) {
    let until = Instant::now() + LIMIT;
    loop {
        let left = left();
        if left.is_empty() {
            return;
        }
        assert!(
            Instant::now() < until,
            "left behind after {LIMIT:?}:\n  {}",
            left.join("\n  ")
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Loop devices of `len_bytes`. Their file names do not help: every volume has the same.
#[must_use]
pub fn loops_of(len_bytes: u64) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let is_ours = |device: &fs::DirEntry| {
        let read = |name: &str| fs::read_to_string(device.path().join(name)).ok();
        let sectors = read("size").and_then(|size| size.trim().parse().ok());
        read("loop/backing_file").is_some() && sectors == Some(len_bytes / 512)
    };
    let names = devices.filter(is_ours).map(|device| device.file_name());
    names
        .map(|name| format!("loop device {}", name.to_string_lossy()))
        .collect()
}

/// Mounts whose lines hold `marker`, in the namespace of any process.
#[must_use]
pub fn mounts_of(marker: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let mounts = fs::read(entry.path().join("mountinfo")).unwrap_or_default();
        let ours = mounts.split(|byte| *byte == b'\n');
        for mount in ours.filter(|mount| contains(mount, marker)) {
            let of = entry.file_name().to_string_lossy().into_owned();
            let line = String::from_utf8_lossy(mount);
            found.push(format!("mount in the namespace of {of}: {line}"));
        }
    }
    found
}
