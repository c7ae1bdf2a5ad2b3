//! Compares a file of a snapshot with the live file that it was made from.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Outcome;
use crate::name::SnapshotName;

/// How the two stand to each other.
pub(super) enum Compared {
    /// Byte for byte.
    Same,
    /// The source was changed after the snapshot, by its size or one of its times.
    Changed,
    /// There is no such source any more.
    Gone,
    /// The source's times and size are those of the snapshot, its content is not.
    Differs,
    SourceUnreadable(io::Error),
    Unreadable(io::Error),
}

/// Compares. Nobody can set a file's change time (ctime), so one older than the snapshot says that
/// the source was left alone since; a newer one says nothing, and a difference is then a change.
pub(super) fn compare(
    file: &Path,
    source: &Path,
    moment: SnapshotName,
    buffer: &mut [u8],
) -> Outcome {
    let mut bytes = 0;
    let is = judge(file, source, moment, buffer, &mut bytes);
    Outcome::Compared {
        bytes,
        is: is.unwrap_or_else(Compared::Unreadable),
    }
}

/// Fails where the snapshot's file can't be read.
fn judge(
    file: &Path,
    source: &Path,
    moment: SnapshotName,
    buffer: &mut [u8],
    bytes: &mut u64,
) -> io::Result<Compared> {
    let kept = fs::symlink_metadata(file)?;
    let live = match fs::symlink_metadata(source) {
        Ok(live) => live,
        Err(error) if is_gone(&error) => return Ok(Compared::Gone),
        Err(error) => return Ok(Compared::SourceUnreadable(error)),
    };
    let times = |stat: &fs::Metadata| (stat.len(), stat.mtime(), stat.mtime_nsec());
    let looks_same = live.is_file() && times(&kept) == times(&live);
    let mut of_source = match File::open(source) {
        _ if !looks_same => None,
        Ok(open) => Some(open),
        Err(error) if is_gone(&error) => return Ok(Compared::Gone),
        Err(error) => return Ok(Compared::SourceUnreadable(error)),
    };
    let mut of_snapshot = File::open(file)?;
    let half = buffer.len() / 2;
    let (ours, theirs) = buffer.split_at_mut(half);
    let mut same = true;
    loop {
        let some = of_snapshot.read(ours)?;
        if some == 0 {
            break;
        }
        *bytes += some as u64;
        if let Some(live) = &mut of_source
            && same
        {
            match live.read_exact(&mut theirs[..some]) {
                Ok(()) => same = ours[..some] == theirs[..some],
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => same = false,
                Err(error) => return Ok(Compared::SourceUnreadable(error)),
            }
        }
    }
    if of_source.is_none() {
        return Ok(Compared::Changed);
    }
    if same {
        return Ok(Compared::Same);
    }
    // It may have been changed while it was read.
    let now = match fs::symlink_metadata(source) {
        Ok(now) => now,
        Err(_) => return Ok(Compared::Changed),
    };
    let touched_since = now.ctime() >= moment.moment().as_second();
    if touched_since || times(&now) != times(&kept) {
        return Ok(Compared::Changed);
    }
    Ok(Compared::Differs)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}
