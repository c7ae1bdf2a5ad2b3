//! Compares a file of a snapshot with the live file that it was made from.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::cancel::Cancel;
use crate::long_path::{self, size_and_time};
use crate::name::SnapshotName;

/// The live file that belongs to a file of a snapshot.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    /// See [`read_after`].
    pub(crate) read_after_s: Option<i64>,
}

/// The result of the comparison.
pub(crate) enum Compared {
    /// They are equal, byte for byte.
    Same,
    /// Size or modification time of the source changed after the snapshot.
    Changed,
    /// The content differs although size and time are equal. The source was touched since it was copied.
    /// Backups don't copy it again.
    Missed,
    /// The source no longer exists.
    Gone,
    /// The content differs, and the source was not touched since it was copied.
    Differs,
    SourceUnreadable(io::Error),
    Unreadable(io::Error),
}

/// A time (in seconds) before which the source of this file had not been read: the start of the run that
/// copied the file. It is the newest of the job's `moments` that is not later than the file's birth. If
/// the snapshot of that run is gone, an older one is found, which is valid, too. The birth itself would
/// be too late: rsync reads ahead of what it writes.
pub(crate) fn read_after(stat: &fs::Metadata, moments: &[SnapshotName]) -> Option<i64> {
    let born = stat.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
    let born_s = i64::try_from(born.as_secs()).ok()?;
    let seconds = moments.iter().map(|name| name.moment().as_second());
    seconds.filter(|second| *second <= born_s).max()
}

/// Reads the snapshot's file to its end, and compares what can be compared. `None` if it was cancelled.
pub(crate) fn compare(
    file: &Path,
    source: &Source,
    cancel: &Cancel,
    buffer: &mut [u8],
) -> Option<(u64, Compared)> {
    let mut bytes = 0;
    let is = match judge(file, source, cancel, buffer, &mut bytes) {
        Ok(is) => is?,
        Err(error) => Compared::Unreadable(error),
    };
    Some((bytes, is))
}

/// Fails if the snapshot's file can't be read.
fn judge(
    file: &Path,
    source: &Source,
    cancel: &Cancel,
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
        if cancel.is_cancelled() {
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

/// Opens the source if it should be equal, by its size and time.
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

/// What a difference means. Nobody can set a file's change time (ctime). If it is older than the copy,
/// the source is unchanged. If it is newer, nothing is known: the file was rewritten and its times were
/// restored, or only its owner changed.
pub(crate) fn of_difference(kept: &fs::Metadata, source: &Source) -> Compared {
    // Checked again: it may have changed while it was read.
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

/// Whether the target of a symbolic link is that of the link it was made from. `None`: that one has changed since, or can't
/// be read.
pub(crate) fn is_same_link(kept: &fs::Metadata, target: &[u8], source: &Source) -> Option<bool> {
    let live = long_path::read_link(&source.path).ok()?;
    let now = long_path::lstat(&source.path).ok()?;
    let is_unchanged = size_and_time(kept) == size_and_time(&now)
        && source.read_after_s.is_some_and(|read| now.ctime() < read);
    is_unchanged.then(|| live.as_os_str().as_bytes() == target)
}

fn looks_the_same(kept: &fs::Metadata, live: &fs::Metadata) -> bool {
    live.is_file() && size_and_time(kept) == size_and_time(live)
}
