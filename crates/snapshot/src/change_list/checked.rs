//! Digests that a check computed, because the lists of changes lack them.
//!
//! They wait in `checked.changes.zst` beside this machine's copies of the lists. The next backup adds them to its
//! own list. The head then names the snapshot of that backup, and when that snapshot exists, the file goes.

use std::fs::File;
use std::io;
use std::path::Path;

use super::reading;
use super::{First, Last, Lines, SUFFIX};
use crate::content::Content;
use crate::local_file;
use crate::name::SnapshotName;

/// The digests of a job that wait for its next backup.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    pub(crate) contents: Vec<Content>,
    /// This snapshot's list has them, if it exists.
    sent_with: Option<SnapshotName>,
}

impl Checked {
    fn file_name() -> String {
        format!("checked{SUFFIX}")
    }

    /// Reads what waits in the folder of a job's lists. What can't be read is computed again by a check.
    /// `exists`: there is such a snapshot.
    pub(crate) fn load(folder: &Path, exists: impl FnOnce(SnapshotName) -> bool) -> Self {
        let mut contents = Vec::new();
        let read = File::open(folder.join(Self::file_name()))
            .and_then(|file| reading::read(file, &mut |content| contents.push(content)));
        match read {
            Ok(list) if !list.head.snapshot.is_some_and(exists) => Self {
                contents,
                sent_with: list.head.snapshot,
            },
            _ => Self::default(),
        }
    }

    /// Adds them to the list of a run.
    pub(super) fn add_to(&self, lines: &mut Lines<'_>) -> io::Result<()> {
        self.contents.iter().try_for_each(|one| lines.write(one))
    }

    /// Notes which snapshot's list has them. Without any, the file goes.
    pub(super) fn sent(mut self, folder: &Path, job: &str, with: SnapshotName) -> io::Result<()> {
        self.sent_with = Some(with);
        self.save(folder, job)
    }

    /// Adds what a check computed.
    pub(crate) fn extend(&mut self, contents: Vec<Content>) {
        self.contents.extend(contents);
        self.sent_with = None;
    }

    /// Writes the file.
    pub(crate) fn save(&self, folder: &Path, job: &str) -> io::Result<()> {
        let path = folder.join(Self::file_name());
        if self.contents.is_empty() {
            return match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        local_file::replace(&path, |file| {
            let mut lines = Lines::begin(file)?;
            lines.write(&First::new(job, self.sent_with, None))?;
            self.add_to(&mut lines)?;
            lines.write(&Last {
                finished: true,
                ..Last::default()
            })?;
            lines.end()
        })
    }
}
