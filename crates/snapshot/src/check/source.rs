//! Compares a file of a snapshot with the live file that it was made from.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::read::{Outcome, Stop};
use crate::long_path;
use crate::name::SnapshotName;

/// The live file that belongs to a snapshot's.
pub(super) struct Source {
    pub(super) path: PathBuf,
    /// See [`read_after`].
    pub(super) read_after_s: Option<i64>,
}

/// How the two stand to each other.
pub(super) enum Compared {
    /// Byte for byte.
    Same,
    /// The source was changed after the snapshot, by its size or its modification time.
    Changed,
    /// It differs, and neither size nor time tells; it was touched since it was copied. Backups
    /// don't copy it again.
    Missed,
    /// There is no such source any more.
    Gone,
    /// It differs, and nobody touched the source since it was copied.
    Differs,
    SourceUnreadable(io::Error),
    Unreadable(io::Error),
}

/// A second before which the source of a file with this `stat` had not yet been read: when the run
/// began that made it. That is the newest of the job's `moments` that is no later than the file's
/// birth; where its run's snapshot is gone an older one is found, which is just as true. The birth
/// itself is too late: rsync reads ahead of what it writes.
pub(super) fn read_after(stat: &fs::Metadata, moments: &[SnapshotName]) -> Option<i64> {
    let born = stat.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
    let born_s = i64::try_from(born.as_secs()).ok()?;
    let seconds = moments.iter().map(|name| name.moment().as_second());
    seconds.filter(|second| *second <= born_s).max()
}

/// Reads the snapshot's file to its end, and compares what can be compared. `None`: stopped.
pub(super) fn compare(
    file: &Path,
    source: &Source,
    stop: &Stop<'_>,
    buffer: &mut [u8],
) -> Option<Outcome> {
    let mut bytes = 0;
    let is = match judge(file, source, stop, buffer, &mut bytes) {
        Ok(is) => is?,
        Err(error) => Compared::Unreadable(error),
    };
    Some(Outcome::Compared { bytes, is })
}

/// Fails where the snapshot's file can't be read.
fn judge(
    file: &Path,
    source: &Source,
    stop: &Stop<'_>,
    buffer: &mut [u8],
    bytes: &mut u64,
) -> io::Result<Option<Compared>> {
    let kept = long_path::lstat(file)?;
    let (mut live, mut so_far) = match open(&kept, &source.path) {
        Ok(live) => (Some(live), Compared::Same),
        Err(why) => (None, why),
    };
    let mut of_snapshot = long_path::open_regular(file)?;
    let half = buffer.len() / 2;
    let (ours, theirs) = buffer.split_at_mut(half);
    loop {
        if stop.now() {
            return Ok(None);
        }
        let some = match of_snapshot.read(ours) {
            Ok(0) => break,
            Ok(some) => some,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        *bytes += some as u64;
        let Some(open) = &mut live else { continue };
        match open.read_exact(&mut theirs[..some]) {
            Ok(()) if ours[..some] == theirs[..some] => {}
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                (live, so_far) = (None, Compared::SourceUnreadable(error));
            }
            _ => (live, so_far) = (None, of_difference(&kept, source)),
        }
    }
    Ok(Some(so_far))
}

/// Opens a source that should be the same, by its size and time.
fn open(kept: &fs::Metadata, source: &Path) -> Result<File, Compared> {
    let unusable = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Compared::Gone,
        _ => Compared::SourceUnreadable(error),
    };
    let live = long_path::lstat(source).map_err(unusable)?;
    if !looks_the_same(kept, &live) {
        return Err(Compared::Changed);
    }
    long_path::open_regular(source).map_err(unusable)
}

/// What it says that the two differ. Nobody can set a file's change time (ctime): one before the
/// copying says that the source is what it was then. One after it says nothing: it was rewritten
/// with its times kept, or only its owner was changed.
fn of_difference(kept: &fs::Metadata, source: &Source) -> Compared {
    // Looked at again: it may have been changed while it was read.
    match long_path::lstat(&source.path) {
        Ok(now) if looks_the_same(kept, &now) => {
            if source.read_after_s.is_some_and(|read| now.ctime() < read) {
                Compared::Differs
            } else {
                Compared::Missed
            }
        }
        _ => Compared::Changed,
    }
}

fn looks_the_same(kept: &fs::Metadata, live: &fs::Metadata) -> bool {
    let about = |stat: &fs::Metadata| (stat.len(), stat.mtime(), stat.mtime_nsec());
    live.is_file() && about(kept) == about(live)
}
