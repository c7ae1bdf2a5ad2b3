//! Reads a list of changes. What was read counts only after the end of the list: it has a checksum there.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::FORMAT;
use crate::name::SnapshotName;

/// The longest line. A file of 16 TiB has 17 MiB of digests.
const LINE_BYTES_MAX: u64 = 64 << 20;

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ListHead {
    format: u32,
    /// The snapshot whose run made it; of the digests of a check, the one whose list has them, too.
    pub(crate) snapshot: Option<SnapshotName>,
    /// The snapshot that was compared with.
    pub(crate) since: Option<SnapshotName>,
    /// Whether the snapshot has all that was to be backed up. `None`: it was not finished then.
    #[serde(default)]
    pub(crate) complete: Option<bool>,
    /// The lists of several runs are in it.
    #[serde(default)]
    pub(crate) folded: bool,
    /// When the snapshots were compared; of a folded list, the earliest time. `None`: see [`Self::made`].
    #[serde(default)]
    compared: Option<Timestamp>,
    /// When the run wrote it, by the clock of its machine.
    #[serde(default)]
    pub(crate) written: Option<Timestamp>,
}

impl ListHead {
    /// A time that is not later than that of the comparison. `None`: that is not known.
    pub(crate) fn made(&self) -> Option<Timestamp> {
        let by_its_run = self.snapshot.filter(|_| !self.folded);
        self.compared.or(by_its_run.map(SnapshotName::moment))
    }
}

/// The last line.
#[derive(Debug, Deserialize)]
struct End {
    finished: bool,
}

/// A list that is being read.
pub(crate) struct ListLines {
    lines: BufReader<zstd::Decoder<'static, BufReader<File>>>,
    pub(crate) head: ListHead,
    /// The line that comes next: one is read ahead, because the last one is of another kind.
    next: Vec<u8>,
    /// Whether all changed paths are in it. `None`: its end was not reached.
    pub(crate) finished: Option<bool>,
}

impl ListLines {
    pub(crate) fn begin(file: File) -> io::Result<Self> {
        let mut lines = BufReader::new(zstd::Decoder::new(file)?);
        let mut next = Vec::new();
        read_line(&mut lines, &mut next)?;
        let head: ListHead = serde_json::from_slice(&next)?;
        if head.format != FORMAT {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("the list has format {}", head.format),
            ));
        }
        match read_line(&mut lines, &mut next)? {
            true => Ok(Self {
                lines,
                head,
                next,
                finished: None,
            }),
            false => Err(torn()),
        }
    }

    /// The next line that names a path or a file; `None`: there are no more.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        if self.finished.is_some() {
            return Ok(None);
        }
        let line = std::mem::take(&mut self.next);
        if read_line(&mut self.lines, &mut self.next)? {
            return Ok(Some(serde_json::from_slice(&line)?));
        }
        let End { finished } = serde_json::from_slice(&line)?;
        self.finished = Some(finished);
        Ok(None)
    }
}

/// Calls `each` with each line that names a path or a file. After an error all of them are void.
pub(crate) fn read<T: DeserializeOwned>(
    file: File,
    each: &mut dyn FnMut(T),
) -> io::Result<ListLines> {
    let mut lines = ListLines::begin(file)?;
    while let Some(line) = lines.next()? {
        each(line);
    }
    Ok(lines)
}

/// False at the end.
fn read_line(from: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    from.take(LINE_BYTES_MAX).read_until(b'\n', line)?;
    match line.last() {
        None => Ok(false),
        Some(b'\n') => Ok(true),
        Some(_) => Err(torn()),
    }
}

fn torn() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the list is torn")
}
