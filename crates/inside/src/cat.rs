//! Writes the content of one file to a descriptor.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use sprat_snapshot::tree::Tree;
use sprat_snapshot::{Cancel, SnapshotError};

use crate::answer::{Place, go_on};
use sprat_snapshot::seen::{Kind, Seen};

const READ_BYTES: usize = 256 << 10;
/// A pipe that `poll` reports as ready accepts so many bytes at once (pipe(7): `PIPE_BUF`).
const WRITE_BYTES: usize = 4096;
/// How often a reader that does not read is checked for an interrupt.
const PATIENCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 250_000_000,
};

/// Which file to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CatSpec {
    /// The file.
    pub place: Place,
    /// Only so much of its beginning; `None`: all of it.
    #[serde(default)]
    pub bytes_max: Option<u64>,
}

/// Writes the content of a regular file to `out`, and returns how many bytes. If the reader of a pipe has
/// closed its end, it has all that it wanted: that is no failure.
///
/// # Errors
/// There is no such file, it is no regular file, or reading or writing failed.
pub fn cat(
    volume_root: &Path,
    spec: &CatSpec,
    out: OwnedFd,
    cancel: &Cancel,
) -> Result<u64, SnapshotError> {
    let place = &spec.place;
    let tree = Tree::find(volume_root, &place.job, &place.snapshot)?;
    let path = place.path();
    let failed = |error| tree.failed("read", &path, error);
    let (folder, name) = tree.place(&path)?.ok_or_else(|| tree.no_such(&path))?;
    let seen = Seen::of(&folder, &name).map_err(failed)?;
    let seen = seen.ok_or_else(|| tree.no_such(&path))?;
    if seen.found.kind != Kind::File {
        return Err(SnapshotError::PathRefused {
            path: crate::answer::escaped(&path),
            why: "is not a regular file",
        });
    }
    let file = folder.open(&name).map_err(failed)?;
    let mut file = file.take(spec.bytes_max.unwrap_or(u64::MAX));
    let mut out = File::from(out);
    let mut buffer = vec![0; READ_BYTES];
    let mut written = 0;
    loop {
        go_on(cancel)?;
        let length = match file.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(failed)?,
        };
        if length == 0 {
            return Ok(written);
        }
        for piece in buffer[..length].chunks(WRITE_BYTES) {
            while !is_ready(&out) {
                go_on(cancel)?;
            }
            match out.write_all(piece) {
                Ok(()) => written += piece.len() as u64,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(written),
                Err(source) => {
                    return Err(SnapshotError::System {
                        op: "write to standard output",
                        source,
                    });
                }
            }
        }
    }
}

/// Whether a write does not wait, or fails at once.
fn is_ready(out: &impl AsFd) -> bool {
    let mut polled = [PollFd::new(out, PollFlags::OUT)];
    !matches!(poll(&mut polled, Some(&PATIENCE)), Ok(0))
}
