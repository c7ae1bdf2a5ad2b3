//! Compares the content of two files.

use std::fs::File;
use std::io::{self, Read};

const BUFFER_BYTES: usize = 256 << 10;

/// A file that can't be read.
pub(crate) enum Unread {
    /// The snapshot's file.
    Kept(io::Error),
    /// The file outside of the snapshot.
    Live(io::Error),
}

/// Whether two files have the same content. `go_on` gets the content, piece by piece. If it returns
/// false, the result is `None`.
pub(crate) fn same_content(
    kept: &mut File,
    live: &mut File,
    go_on: &mut dyn FnMut(&[u8]) -> bool,
) -> Result<Option<bool>, Unread> {
    let (mut ours, mut theirs) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    loop {
        let some = match kept.read(&mut ours) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            other => other.map_err(Unread::Kept)?,
        };
        if !go_on(&ours[..some]) {
            return Ok(None);
        }
        if some == 0 {
            return match live.read(&mut theirs) {
                Ok(more) => Ok(Some(more == 0)),
                Err(error) => Err(Unread::Live(error)),
            };
        }
        match live.read_exact(&mut theirs[..some]) {
            Ok(()) if ours[..some] == theirs[..some] => {}
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(Unread::Live(error));
            }
            _ => return Ok(Some(false)),
        }
    }
}
