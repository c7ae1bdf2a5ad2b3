//! Reads a list of changes. What was read counts only after the end of the list: it has a checksum there.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};

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
}

/// The last line.
#[derive(Debug, Deserialize)]
struct End {
    finished: bool,
}

/// A list that was read to its end.
#[derive(Debug)]
pub(crate) struct ReadList {
    pub(crate) head: ListHead,
    /// All changed paths are in it.
    pub(crate) finished: bool,
}

/// Calls `each` with each line that names a path or a file. After an error all of them are void.
pub(crate) fn read<T: DeserializeOwned>(
    file: File,
    each: &mut dyn FnMut(T) -> io::Result<()>,
) -> io::Result<ReadList> {
    let mut lines = BufReader::new(zstd::Decoder::new(file)?);
    let mut line = Vec::new();
    let mut next = Vec::new();
    if !read_line(&mut lines, &mut line)? || !read_line(&mut lines, &mut next)? {
        return Err(torn());
    }
    let head: ListHead = serde_json::from_slice(&line)?;
    if head.format != FORMAT {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("the list has format {}", head.format),
        ));
    }
    loop {
        std::mem::swap(&mut line, &mut next);
        if !read_line(&mut lines, &mut next)? {
            let End { finished } = serde_json::from_slice(&line)?;
            return Ok(ReadList { head, finished });
        }
        each(serde_json::from_slice(&line)?)?;
    }
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
