//! What earlier runs found in the snapshots of a job: on this machine, so that snapshots are not read twice.
//!
//! A finished snapshot does not change. The caller removes the files if anybody else could have written to the
//! container. A file is JSON, one value in each line, compressed with zstd:
//!
//! | line | has |
//! | --- | --- |
//! | first | [`Head`] |
//! | one for each path | the path, escaped, and its [`Run`]s |
//! | last | how many paths there are |

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use sprat_snapshot::{escape_name, local_file, path_order, unescape_name};

const FORMAT: u32 = 1;
/// More paths of a job are not kept: all of them are in memory.
const PATHS_MAX: usize = 1_000_000;
/// A larger file is not kept.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// The longest line. No path is longer than a few KiB.
const LINE_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    format: u32,
    /// Of sprat: the numbers that stand for files on btrfs are its own.
    version: String,
    exact: bool,
    snapshots: Vec<Identity>,
}

/// Which snapshot it is: its name, and the inode of its folder with its last change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity(String, u64, i64, i64);

/// What a path was in snapshots that follow each other: the first and the last of them, and what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Run(u32, u32, Object);

/// What a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Object {
    pub(super) is_folder: bool,
    /// Which file it is; of a folder 0.
    pub(super) key: u64,
    /// What it takes.
    pub(super) bytes: u64,
}

impl Object {
    pub(super) fn folder(bytes: u64) -> Self {
        Self {
            is_folder: true,
            key: 0,
            bytes,
        }
    }

    pub(super) fn file(key: u64, bytes: u64) -> Self {
        Self {
            is_folder: false,
            key,
            bytes,
        }
    }
}

/// What is known of the snapshots of a job.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// So many snapshots, from the oldest one on, are known from earlier runs.
    pub(super) known: usize,
    /// Sorted, until a snapshot is added.
    sorted: Vec<(PathBuf, Vec<Run>)>,
    added: HashMap<PathBuf, Vec<Run>>,
    /// It differs from the file.
    is_new: bool,
    /// Too much to be kept.
    is_full: bool,
}

impl Identity {
    pub(super) fn of(name: &str, top: &Stat) -> Self {
        let nanoseconds = i64::try_from(top.st_ctime_nsec).unwrap_or(0);
        Self(name.to_owned(), top.st_ino, top.st_ctime, nanoseconds)
    }
}

impl Kept {
    /// Reads what is known of these snapshots, which are all of the job. Whatever does not fit is not known.
    pub(super) fn load(file: &Path, is_exact: bool, snapshots: &[Identity]) -> Self {
        let found = File::open(file).and_then(|file| read(file, is_exact));
        let Ok((before, mut paths)) = found else {
            return Self {
                is_new: true,
                ..Self::default()
            };
        };
        let number_before = |one: &Identity| before.iter().position(|other| other == one);
        let known: Vec<usize> = snapshots.iter().map_while(number_before).collect();
        let in_order = known.windows(2).all(|pair| pair[0] < pair[1]);
        let known = if in_order { known } else { Vec::new() };
        // Those that were removed leave the runs.
        let renumbered = |run: &Run| {
            let first = known.partition_point(|number| *number < run.0 as usize);
            let end = known.partition_point(|number| *number <= run.1 as usize);
            let [first, last] = [first, end.checked_sub(1)?].map(u32::try_from);
            let (first, last) = (first.ok()?, last.ok()?);
            (first <= last).then_some(Run(first, last, run.2))
        };
        for (_, runs) in &mut paths {
            *runs = runs.iter().filter_map(renumbered).collect();
        }
        paths.retain(|(_, runs)| !runs.is_empty());
        Self {
            is_new: known.len() != before.len() || before.len() != snapshots.len(),
            known: known.len(),
            sorted: paths,
            ..Self::default()
        }
    }

    /// Every path of a known snapshot, in the order of a walk.
    pub(super) fn paths(&self, number: usize) -> impl Iterator<Item = (&Path, Object)> {
        self.sorted.iter().filter_map(move |(path, runs)| {
            let has = |run: &&Run| (run.0 as usize..=run.1 as usize).contains(&number);
            let run = runs.iter().find(has)?;
            Some((&**path, run.2))
        })
    }

    /// A path of a snapshot that was not known. Those come after all known ones.
    pub(super) fn add(&mut self, number: usize, path: &Path, object: Object) {
        if self.is_full {
            return;
        }
        if self.added.is_empty() {
            self.added = std::mem::take(&mut self.sorted).into_iter().collect();
        }
        let Ok(number) = u32::try_from(number) else {
            return;
        };
        let runs = match self.added.get_mut(path) {
            Some(runs) => runs,
            None => self.added.entry(path.to_owned()).or_default(),
        };
        match runs.last_mut() {
            Some(run) if run.1 + 1 == number && run.2 == object => run.1 = number,
            _ => runs.push(Run(number, number, object)),
        }
        if self.added.len() > PATHS_MAX {
            self.is_full = true;
            self.added = HashMap::new();
        }
    }

    /// Replaces the file, if it does not have all that is known now of these snapshots.
    pub(super) fn save(
        self,
        file: &Path,
        is_exact: bool,
        snapshots: Vec<Identity>,
    ) -> io::Result<()> {
        if !self.is_new || self.is_full {
            return Ok(());
        }
        let mut paths: Vec<(PathBuf, Vec<Run>)> = self.sorted;
        paths.extend(self.added);
        paths.sort_unstable_by(|(one, _), (other, _)| path_order(one, other));
        let head = Head::new(is_exact, snapshots);
        local_file::replace(file, |file| {
            let mut lines = zstd::Encoder::new(&mut *file, 1)?;
            lines.include_checksum(true)?;
            write_line(&mut lines, &head)?;
            for (path, runs) in &paths {
                let path = escape_name(path.as_os_str().as_encoded_bytes());
                write_line(&mut lines, &(path, runs))?;
            }
            write_line(&mut lines, &paths.len())?;
            lines.finish()?;
            match file.metadata()?.len() {
                ..=FILE_BYTES_MAX => Ok(()),
                _ => Err(io::ErrorKind::FileTooLarge.into()),
            }
        })
    }
}

impl Head {
    fn new(exact: bool, snapshots: Vec<Identity>) -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            exact,
            snapshots,
        }
    }
}

type Paths = Vec<(PathBuf, Vec<Run>)>;

fn read(file: File, is_exact: bool) -> io::Result<(Vec<Identity>, Paths)> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidData);
    let mut lines = BufReader::new(zstd::Decoder::new(file)?);
    let mut line = Vec::new();
    next_line(&mut lines, &mut line)?;
    let mut head: Head = serde_json::from_slice(&line)?;
    let snapshots = std::mem::take(&mut head.snapshots);
    if head != Head::new(is_exact, Vec::new()) {
        return Err(wrong());
    }
    let mut paths = Paths::new();
    loop {
        next_line(&mut lines, &mut line)?;
        if line.first() != Some(&b'[') {
            let count: usize = serde_json::from_slice(&line)?;
            // The checksum is at the end.
            let is_whole = count == paths.len() && lines.read(&mut [0])? == 0;
            return is_whole.then_some((snapshots, paths)).ok_or_else(wrong);
        }
        let (path, runs): (String, Vec<Run>) = serde_json::from_slice(&line)?;
        if paths.len() > PATHS_MAX {
            return Err(wrong());
        }
        let path = std::ffi::OsString::from_vec(unescape_name(&path));
        paths.push((path.into(), runs));
    }
}

fn next_line(from: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<()> {
    line.clear();
    from.take(LINE_BYTES_MAX).read_until(b'\n', line)?;
    match line.last() {
        Some(b'\n') => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

fn write_line(to: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    to.write_all(&text)
}
