//! Runs rsync again where it ended because of one file. rsync gives up on a file with more names than
//! the volume allows, and on a file whose content the volume refuses; the others can be copied.

use std::ffi::OsString;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::SnapshotError;
use crate::mounts::pattern_for;
use crate::record::{NameList, Warning};
use crate::rsync::{Ended, ITEMS_MAX, Invocation, Obstacle, Outcome, Rsync};
use crate::spec::{Cancel, Progress};
use crate::text::{escape_path, unescape_path};

/// What every run of rsync for a snapshot keeps: hard links, among others.
pub(crate) const OPTIONS: &str = "-aHAXXS";

/// So many files may be such obstacles; one more and the run fails.
const OBSTACLES_MAX: usize = 32;

/// One or more runs of rsync into the same tree.
pub(crate) struct Attempts<'a> {
    pub(crate) rsync: &'a Rsync,
    /// The folder written to, absolute.
    pub(crate) tree: &'a Path,
    /// Finds the source file that was written to a path on the volume.
    pub(crate) source_of: &'a dyn Fn(&Path) -> PathBuf,
}

impl Attempts<'_> {
    pub(crate) fn run(
        &self,
        invocation: &Invocation,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Outcome, SnapshotError> {
        let mut invocation = invocation.clone();
        let mut before = Before::default();
        loop {
            let mut outcome = self.rsync.run(&invocation, progress, cancel)?;
            self.leave_out_pipes(&mut outcome);
            before.left_out.append(&mut outcome.pipes);
            let Ended::Because(obstacle) = &outcome.ended else {
                return Ok(before.complete(outcome));
            };
            if before.attempts >= OBSTACLES_MAX {
                outcome.ended = Ended::Failed {
                    ended: "the volume refuses too many files".to_owned(),
                    message: outcome.messages.names.first().cloned().unwrap_or_default(),
                };
                return Ok(before.complete(outcome));
            }
            match obstacle {
                // A second run without hard links was seen to lose names: no snapshot is better.
                Obstacle::TooManyLinks(_) => {
                    outcome.ended = Ended::Failed {
                        ended: "the volume's file system can't give a file so many names"
                            .to_owned(),
                        message: outcome.messages.names.first().cloned().unwrap_or_default(),
                    };
                    return Ok(before.complete(outcome));
                }
                Obstacle::WriteRefused(written) => {
                    let source = (self.source_of)(&unescape_path(written));
                    let mut exclude = OsString::from("--exclude=");
                    exclude.push(pattern_for(&source, false));
                    // The first rule that matches counts.
                    invocation.arguments.insert(0, exclude);
                    before.left_out.push(source);
                }
            }
            before.add(&outcome);
        }
    }

    /// Removes the empty files that rsync wrote for pipes.
    fn leave_out_pipes(&self, outcome: &mut Outcome) {
        for pipe in &outcome.pipes {
            let below = pipe.strip_prefix("/").unwrap_or(pipe);
            let path = self.tree.join(below);
            let Ok(written) = crate::long_path::lstat(&path) else {
                continue;
            };
            // What older snapshots share was not written now, and is not empty by this.
            let ours = written.is_file() && written.len() == 0 && written.nlink() == 1;
            if ours && std::fs::remove_file(&path).is_ok() {
                continue;
            }
            if outcome.ended == Ended::Whole || outcome.ended == Ended::WithUnread {
                outcome.ended = Ended::Failed {
                    ended: "source changed".to_owned(),
                    message: format!("{} became a pipe while it was copied", escape_path(pipe)),
                };
            }
        }
    }
}

/// What is kept of attempts that ended early.
#[derive(Default)]
struct Before {
    attempts: usize,
    messages: NameList,
    recent: NameList,
    copied_from_older: NameList,
    left_out: Vec<PathBuf>,
    warnings: Vec<Warning>,
}

impl Before {
    fn add(&mut self, outcome: &Outcome) {
        self.attempts += 1;
        self.messages.append(&outcome.messages);
        // What these files were compared by, the next runs must know of all that are in the tree.
        self.recent.append_within(&outcome.recent, ITEMS_MAX);
        self.copied_from_older
            .append_within(&outcome.copied_from_older, ITEMS_MAX);
    }

    fn complete(mut self, mut outcome: Outcome) -> Outcome {
        self.messages.append(&outcome.messages);
        outcome.messages = self.messages;
        outcome.recent.append_within(&self.recent, ITEMS_MAX);
        outcome
            .copied_from_older
            .append_within(&self.copied_from_older, ITEMS_MAX);
        outcome.counts_unknown = self.attempts > 0;
        outcome.warnings = self.warnings;
        for path in &self.left_out {
            outcome.unread.push(escape_path(path));
        }
        if !self.left_out.is_empty() && outcome.ended == Ended::Whole {
            outcome.ended = Ended::WithUnread;
        }
        outcome
    }
}
