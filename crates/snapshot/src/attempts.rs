//! Runs rsync again after a single file made it fail. rsync gives up if a file has more names than the
//! volume allows, or if the volume refuses a file's content. The other files can still be copied.
//!
//! A file in the tree so far may be that of an older snapshot, by another name. If the attributes of its
//! source had changed meanwhile, another rsync would change them in place. So each further run writes
//! into a new, empty tree and links to the previous one, see [`crate::aside`]. No file in the subvolume `work` of a
//! btrfs is one of an older snapshot: each run goes on there.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::aside::Aside;
use crate::cancel::Cancel;
use crate::error::SnapshotError;
use crate::name_list::NameList;
use crate::progress::Progress;
use crate::record::RunStats;
use crate::rsync::{Ended, ITEMS_MAX, Invocation, Obstacle, Outcome, Rsync};
use crate::split;
use crate::text::{escape_path, unescape_path};

/// How many such files are tolerated. With one more, the run fails.
const OBSTACLES_MAX: usize = 32;

/// One or more runs of rsync that make one tree.
pub(crate) struct Attempts<'a> {
    pub(crate) rsync: &'a Rsync,
    /// The absolute path of the folder written to.
    pub(crate) tree: &'a Path,
    /// Returns the source file of a path on the volume.
    pub(crate) source_of: &'a dyn Fn(&Path) -> PathBuf,
    /// Provides a new tree for each further run. `None`: each run writes into the same tree, and only
    /// what it lacks.
    pub(crate) aside: Option<&'a Aside<'a>>,
    /// If the tree is a subvolume, where each name is changed in place.
    pub(crate) in_place: Option<InPlace>,
}

/// A tree that is a subvolume.
#[derive(Debug, Clone, Copy)]
pub(crate) struct InPlace {
    /// Relative to the job's folder.
    pub(crate) path: &'static str,
    /// The last run has split files with too many names.
    pub(crate) was_split: bool,
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
        if self.in_place.is_some_and(|work| work.was_split)
            && let Some(stopped) =
                self.split(&mut invocation, &mut before, None, progress, cancel)?
        {
            return Ok(stopped);
        }
        loop {
            let mut outcome = self.rsync.run(&invocation, progress, cancel)?;
            self.leave_out_pipes(&mut outcome);
            before.left_out.append(&mut outcome.pipes);
            let Ended::Because(obstacle) = &outcome.ended else {
                return Ok(before.complete(outcome, self.tree));
            };
            let give_up = |mut outcome: Outcome, ended: &str| {
                outcome.ended = Ended::Failed {
                    ended: ended.to_owned(),
                    message: outcome.messages.names.first().cloned().unwrap_or_default(),
                };
                outcome
            };
            if before.attempts >= OBSTACLES_MAX {
                let outcome = give_up(outcome, "the volume refuses too many files");
                return Ok(before.complete(outcome, self.tree));
            }
            match obstacle {
                Obstacle::TooManyLinks(_) | Obstacle::LinkRefused => {
                    let places = self.aside.is_some() || self.in_place.is_some();
                    if !places || before.split.is_some() {
                        let why = "the volume's file system refuses a hard link";
                        return Ok(before.complete(give_up(outcome, why), self.tree));
                    }
                    before.add(&outcome);
                    let obstacle = Some(obstacle);
                    let stopped =
                        self.split(&mut invocation, &mut before, obstacle, progress, cancel)?;
                    if let Some(stopped) = stopped {
                        return Ok(stopped);
                    }
                }
                Obstacle::WriteRefused(written) => {
                    let source = (self.source_of)(&unescape_path(written));
                    before.add(&outcome);
                    if let Some(aside) = self.aside {
                        aside.begin_again(&mut invocation, &before.recent, true)?;
                    }
                    invocation.leave_out(&source);
                    before.left_out.push(source);
                }
            }
        }
    }

    /// Splits the files with too many names, and changes `invocation` for the last run. Returns the outcome if the
    /// whole run was stopped.
    fn split(
        &self,
        invocation: &mut Invocation,
        before: &mut Before,
        obstacle: Option<&Obstacle>,
        progress: &mut dyn FnMut(Progress),
        cancel: &Cancel,
    ) -> Result<Option<Outcome>, SnapshotError> {
        let limit = match obstacle {
            Some(Obstacle::TooManyLinks(first)) if self.aside.is_some() => {
                split::limit(self.tree, first)
            }
            _ => split::LINKS_MAX,
        };
        self.begin_again(invocation, before)?;
        let work = split::Work {
            rsync: self.rsync,
            tree: self.tree,
            limit,
            in_place: self.in_place.map(|work| work.path),
        };
        let (stopped, links) = work.carry_out(invocation, progress, cancel)?;
        let Some(links) = links else {
            return Ok(Some(std::mem::take(before).complete(stopped, self.tree)));
        };
        before.add_work(&stopped);
        before.split = Some(links);
        self.begin_again(invocation, before)?;
        split::without_links(invocation);
        Ok(None)
    }

    fn begin_again(
        &self,
        invocation: &mut Invocation,
        before: &Before,
    ) -> Result<(), SnapshotError> {
        match self.aside {
            Some(aside) => aside.begin_again(invocation, &before.recent, false),
            None => Ok(()),
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
            // A file shared with older snapshots was not written now.
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

/// The results of all runs but the last.
#[derive(Default)]
struct Before {
    attempts: usize,
    messages: NameList,
    recent: NameList,
    copied_from_older: NameList,
    left_out: Vec<PathBuf>,
    stats: RunStats,
    /// The files with several names, after a link limit was reached.
    split: Option<split::Links>,
}

impl Before {
    fn add(&mut self, outcome: &Outcome) {
        self.messages.append(&outcome.messages);
        self.add_work(outcome);
    }

    /// Adds the results of a run whose problems the last run will report.
    fn add_work(&mut self, outcome: &Outcome) {
        self.attempts += 1;
        // The next runs need the list of all files in the tree whose time proves nothing.
        self.recent.append_within(&outcome.recent, ITEMS_MAX);
        self.copied_from_older
            .append_within(&outcome.copied_from_older, ITEMS_MAX);
        self.stats.add_copied(&outcome.stats);
    }

    fn complete(mut self, mut outcome: Outcome, tree: &Path) -> Outcome {
        self.messages.append(&outcome.messages);
        outcome.messages = self.messages;
        outcome.recent.append_within(&self.recent, ITEMS_MAX);
        outcome
            .copied_from_older
            .append_within(&self.copied_from_older, ITEMS_MAX);
        outcome.counts_unknown |= self.attempts > 0;
        outcome.stats.add_copied(&self.stats);
        for path in &self.left_out {
            outcome.unread.push(escape_path(path));
        }
        if let Some(links) = &self.split
            && matches!(outcome.ended, Ended::Whole | Ended::WithUnread)
        {
            for path in links.missing_in(tree) {
                outcome.unread.push(escape_path(&path));
            }
            outcome.warnings.extend(links.warnings());
        }
        if !outcome.unread.is_empty() && outcome.ended == Ended::Whole {
            outcome.ended = Ended::WithUnread;
        }
        outcome
    }
}
