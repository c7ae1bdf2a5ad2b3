//! Keeps one line of JSON for each attempt at a copy.
//!
//! In the state folder, `runs/JOB@CONTAINER.jsonl`: the newest 10,000 attempts of the last 400 days.
//! A line that is torn or not understood is skipped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sprat_snapshot::local_file;

use crate::copy_name::CopyName;
use crate::times::add;

/// The folder in the state folder.
const FOLDER: &str = "runs";
const ATTEMPTS_MAX: usize = 10_000;
const AGE_MAX: Duration = Duration::from_secs(400 * 24 * 3600);
/// The file is rewritten only when so many lines have to go.
const REWRITE_LINES: usize = 200;

/// How one attempt went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RunLine {
    /// The run.
    pub run: String,
    /// The beginning of the attempt.
    pub started: Timestamp,
    /// Its end.
    pub ended: Timestamp,
    /// The exit code.
    pub code: u8,
    /// What went wrong, in one line.
    pub reason: Option<String>,
    /// The snapshot that it made.
    pub snapshot: Option<String>,
    /// Files in that.
    pub files: Option<u64>,
    /// Size of its files.
    pub bytes: Option<u64>,
    /// Files that `exclude_larger_than` excluded for the first time.
    pub newly_excluded: Option<u64>,
    /// Bytes that the sources had new.
    pub copied_bytes: Option<u64>,
    /// Bytes that went to the server.
    pub sent_bytes: Option<u64>,
    /// How many times `every` had passed since the success before.
    pub covered: Option<u32>,
}

/// The attempts of all copies.
#[derive(Debug, Clone)]
pub struct RunHistory {
    folder: PathBuf,
}

impl RunHistory {
    /// Below this state folder.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        let folder = state_dir.join(FOLDER);
        Self { folder }
    }

    /// Adds an attempt, durably. `now` is the time from which the age of the others counts.
    pub fn append(&self, copy: &CopyName, line: &RunLine, now: Timestamp) -> io::Result<()> {
        local_file::make_private_folder(&self.folder)?;
        let turn = File::open(&self.folder)?;
        flock(&turn, FlockOperation::LockExclusive)?;
        let path = self.path(copy);
        let before = read(&path)?;
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        if is_too_long(&before, now) {
            let mut content = shortened(&before, now);
            content.extend(text);
            return local_file::replace(&path, |file| file.write_all(&content));
        }
        let torn = before.last().is_some_and(|last| *last != b'\n');
        if torn {
            text.insert(0, b'\n');
        }
        let mut options = OpenOptions::new();
        let options = options.append(true).create(true).mode(0o600);
        let mut file = options.open(&path)?;
        file.write_all(&text)?;
        file.sync_all()?;
        if before.is_empty() {
            turn.sync_all()?;
        }
        Ok(())
    }

    /// The attempts at a copy, oldest first.
    pub fn load(&self, copy: &CopyName) -> io::Result<Vec<RunLine>> {
        let content = read(&self.path(copy))?;
        let lines = content.split(|byte| *byte == b'\n');
        Ok(lines.filter_map(parse).collect())
    }

    /// The file of a copy.
    pub(crate) fn path(&self, copy: &CopyName) -> PathBuf {
        self.folder.join(format!("{copy}.jsonl"))
    }
}

/// Only some lines are parsed: this is asked at each attempt.
fn is_too_long(content: &[u8], now: Timestamp) -> bool {
    let lines = content.iter().filter(|byte| **byte == b'\n').count();
    let nth = content.split(|byte| *byte == b'\n').nth(REWRITE_LINES);
    lines >= ATTEMPTS_MAX + REWRITE_LINES
        || nth.and_then(parse).is_some_and(|line| is_old(&line, now))
}

/// The lines that are kept.
fn shortened(content: &[u8], now: Timestamp) -> Vec<u8> {
    let lines = content.split_inclusive(|byte| *byte == b'\n');
    let kept = lines.filter(|line| {
        let parsed = line.ends_with(b"\n").then(|| parse(line)).flatten();
        parsed.is_some_and(|line| !is_old(&line, now))
    });
    let kept: Vec<&[u8]> = kept.collect();
    kept[kept.len().saturating_sub(ATTEMPTS_MAX - 1)..].concat()
}

fn is_old(line: &RunLine, now: Timestamp) -> bool {
    add(line.ended, AGE_MAX) < now
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        content => content,
    }
}

fn parse(line: &[u8]) -> Option<RunLine> {
    serde_json::from_slice(line).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(number: usize, ended: &str) -> RunLine {
        RunLine {
            run: number.to_string(),
            ended: ended.parse().unwrap(),
            ..RunLine::default()
        }
    }

    #[test]
    fn a_torn_line_costs_nothing_but_itself() {
        let folder = tempfile::tempdir().unwrap();
        let history = RunHistory::new(folder.path());
        let copy = CopyName::new("home", "nas");
        assert_eq!(history.load(&copy).unwrap(), []);
        let now = "2026-11-28T12:00:00Z".parse().unwrap();
        let lines: Vec<_> = (0..3).map(|n| line(n, "2026-11-28T12:00:00Z")).collect();
        history.append(&copy, &lines[0], now).unwrap();
        history.append(&copy, &lines[1], now).unwrap();
        let path = history.path(&copy);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 7]).unwrap();
        history.append(&copy, &lines[2], now).unwrap();
        let known = history.load(&copy).unwrap();
        assert_eq!(known, [lines[0].clone(), lines[2].clone()]);
    }

    #[test]
    fn history_is_bounded_by_number_and_by_age() {
        let folder = tempfile::tempdir().unwrap();
        let history = RunHistory::new(folder.path());
        let copy = CopyName::new("home", "nas");
        let text = |lines: &mut dyn Iterator<Item = RunLine>| -> Vec<u8> {
            let text = |line| [serde_json::to_vec(&line).unwrap(), vec![b'\n']].concat();
            lines.flat_map(text).collect()
        };
        let mut old = (0..300).map(|n| line(n, "2025-10-01T12:00:00Z"));
        let mut new = (300..12_000).map(|n| line(n, "2026-11-01T12:00:00Z"));
        local_file::make_private_folder(&history.folder).unwrap();
        let path = history.path(&copy);
        std::fs::write(&path, [text(&mut old), text(&mut new)].concat()).unwrap();
        let now: Timestamp = "2026-11-28T12:00:00Z".parse().unwrap();
        let append = |number| {
            let next = line(number, "2026-11-28T12:00:00Z");
            history.append(&copy, &next, now).unwrap();
            let known = history.load(&copy).unwrap();
            assert_eq!(known.last(), Some(&next));
            (known.len(), known[0].run.clone())
        };
        assert_eq!(append(12_000), (ATTEMPTS_MAX, "2001".to_owned()));
        // It is not written again at each attempt.
        assert_eq!(append(12_001), (ATTEMPTS_MAX + 1, "2001".to_owned()));
        let mut many =
            (0..ATTEMPTS_MAX + REWRITE_LINES - 1).map(|n| line(n, "2026-11-01T12:00:00Z"));
        std::fs::write(&path, text(&mut many)).unwrap();
        assert_eq!(append(20_000).0, ATTEMPTS_MAX + REWRITE_LINES);
        assert_eq!(append(20_001).0, ATTEMPTS_MAX);
        let mut old = (0..REWRITE_LINES + 1).map(|n| line(n, "2025-10-01T12:00:00Z"));
        std::fs::write(&path, text(&mut old)).unwrap();
        assert_eq!(append(1_000), (1, "1000".to_owned()));
    }
}
