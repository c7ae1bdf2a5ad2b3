//! What this machine keeps of each copy between runs: its last success and attempts, why it is held
//! or skipped, and which hooks have begun.
//!
//! In the state folder, `schedule/JOB@CONTAINER.json`, and `schedule/@CONTAINER.json` for what
//! belongs to the container alone. A file that is missing, torn or not understood counts as not
//! known: the copy is due then. If one is there that can't be read, nothing is pruned until a person
//! accepts that: it may have named snapshots to keep.

mod place;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use sprat_session::Exit;
use sprat_snapshot::{FileSystem, FoundChange, KeepPolicy, OldContent, SourceCursor};

pub use self::place::Place;
use crate::copy_name::CopyName;
use crate::state_file::StateFile;
use crate::times::is_ahead;

/// The folder in the state folder.
const FOLDER: &str = "schedule";

/// When a copy was found overdue for the first time in this boot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundOverdue {
    pub(crate) boot_id: String,
    /// CLOCK_MONOTONIC.
    pub(crate) monotonic_seconds: u64,
}

/// What is known of one copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CopyState {
    /// The container into which it was made, or is to be made.
    pub place: Option<Place>,
    /// When `sprat run` first saw the copy.
    pub first_seen: Option<Timestamp>,
    /// When a run first saw that its last success, or `first_seen`, lies ahead of the clock.
    pub ahead_seen: Option<Timestamp>,
    /// When the last attempt that left a snapshot began.
    pub last_success: Option<Timestamp>,
    /// When the last attempt that left a complete snapshot began.
    pub last_complete: Option<Timestamp>,
    /// How many snapshots the container had of the job at the last success.
    pub snapshots: Option<u64>,
    /// The file system on which the container file lay at the last success. Only for a local target.
    pub file_system: Option<FileSystem>,
    /// The last attempt, however it ended.
    pub last_attempt: Option<Attempt>,
    /// Attempts since the last success that ended with other than 0, 3 and 130.
    pub failures_since: u32,
    /// Those of them that ended with 1.
    pub failed_in_a_row: u32,
    /// When the first of the attempts began that ended with 11 or 14, if the last one did.
    pub not_reached_since: Option<Timestamp>,
    /// Its last attempt stopped because it had taken long and a copy in another container was due: that one
    /// goes first.
    pub gave_way: bool,
    /// When an attempt last moved bytes.
    pub bytes_moved_at: Option<Timestamp>,
    /// When the copy was found overdue for the first time in this boot.
    pub found_overdue: Option<FoundOverdue>,
    /// When it was last pruned by a run.
    pub last_prune: Option<Timestamp>,
    /// The rules and the zone by which a run last pruned it.
    pub pruned_by: Option<KeepPolicy>,
    /// It waits for `sprat accept`.
    pub held: Option<Held>,
    /// What was known before that time could not be read. All snapshots are kept until `sprat accept`.
    pub lost: Option<Timestamp>,
    /// A person accepted then that much is pruned: the next prune passes, and removes this.
    pub released: Option<Timestamp>,
    /// A person accepted then that much is uploaded: the next success removes this.
    pub growth_accepted: Option<Timestamp>,
    /// Far more files changed than usual: older snapshots are kept until `sprat accept`.
    pub changed: Option<Changed>,
    /// A person accepted such a change then, before a snapshot of it could be made: the next success removes
    /// this.
    pub change_accepted: Option<Timestamp>,
    /// Files of the sources changed silently. Their last copies are kept until `sprat accept`.
    pub silent: Option<SilentChange>,
    /// The last run skipped it.
    pub skipped: Option<Skipped>,
    /// The hooks of the attempt that is under way, or that was killed.
    pub begun: Option<BegunHooks>,
}

/// One try at a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Its run.
    pub run: String,
    /// Its beginning.
    pub started: Timestamp,
    /// Its end.
    pub ended: Timestamp,
    /// How it ended.
    pub exit: Exit,
    /// What went wrong, in one line.
    pub reason: Option<String>,
    /// Stands for the config and the key file as they were.
    pub inputs: String,
}

/// A copy waits for a person.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// What waits.
    #[serde(default)]
    pub what: HeldWhat,
    /// Since when.
    pub since: Timestamp,
    /// Why, in one line.
    pub reason: String,
}

/// What waits for a person.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeldWhat {
    /// The next snapshot.
    #[default]
    Copy,
    /// Only the removal of old snapshots.
    Prune,
}

/// A snapshot has far more changes than usual.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// When it was found.
    pub since: Timestamp,
    /// The name of the snapshot as a time. Older ones are kept.
    pub kept_before: Timestamp,
    /// What changed, in one line.
    pub reason: String,
    /// The snapshot could not be made, for lack of room.
    #[serde(default)]
    pub not_made: bool,
}

/// Content of a source is not what was backed up, and nobody has written to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SilentChange {
    /// When the first of the files was found.
    pub since: Timestamp,
    /// What the snapshots have: at most [`SILENT_FILES_MAX`] files.
    pub files: Vec<OldContent>,
    /// How many files there are; one more than `files` has if some are not in it.
    pub count: u64,
}

/// How many files that changed silently are known by name.
pub const SILENT_FILES_MAX: usize = 1000;

impl SilentChange {
    /// What happened, with the names of some of the files, escaped.
    #[must_use]
    pub fn reason(&self) -> String {
        const NAMED: usize = 5;
        let known = self.files.len() as u64;
        let files = sprat_session::text::counted(known, "source file", "source files");
        let files = match self.has_unnamed() {
            true => format!("more than {files}"),
            false => files,
        };
        let names = self.files.iter().take(NAMED);
        let mut names: Vec<&str> = names.map(|file| &*file.path).collect();
        if self.count > names.len() as u64 {
            names.push("…");
        }
        format!(
            "{files} changed although nobody has written to them: {}",
            names.join(", ")
        )
    }

    /// Whether there are more files than it names.
    fn has_unnamed(&self) -> bool {
        self.count > self.files.len() as u64
    }
}

/// How far the sources of a job were read again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SourceCheckState {
    /// When the last slice was read.
    pub last: Option<Timestamp>,
    /// Where the next one begins.
    pub next: SourceCursor,
    /// What the last slices found, and the next one reads again.
    pub found: Vec<FoundChange>,
    /// What was found twice, and reported.
    pub reported: Vec<FoundChange>,
    /// By container: reported changes of which it is not known yet which snapshots there have the old content.
    pub unanswered: BTreeMap<String, Vec<FoundChange>>,
}

/// A run did not try a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// When.
    pub at: Timestamp,
    /// Why, in one line.
    pub reason: String,
}

/// Which hooks are owed: they run at the end of the attempt, or in the next run if this one is
/// killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BegunHooks {
    /// The run.
    pub run: String,
    /// Its beginning.
    pub started: Timestamp,
    /// `before` has begun, so `after` is owed.
    pub after: bool,
    /// `finally` is owed.
    pub finally: bool,
    /// It was reported that they can't run.
    #[serde(default)]
    pub reported: bool,
}

/// What is known of a container, beside its copies.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ContainerState {
    /// The container's own hooks of a run that is under way, or that was killed. `after` is never
    /// set.
    pub begun: Option<BegunHooks>,
    /// When the last slice of the check began that was read.
    pub sliced: Option<Timestamp>,
    /// When the last slice began, however it ended.
    pub slice_tried: Option<Timestamp>,
    /// When the last drill began, however it ended.
    pub drill_tried: Option<Timestamp>,
    /// When it was last trimmed, or a trim was found not to be worth it.
    pub trimmed: Option<Timestamp>,
}

impl CopyState {
    /// In place of one that can't be read. That may have named snapshots that are to be kept.
    fn instead_of_unread() -> Self {
        let now = Timestamp::now();
        Self {
            held: Some(Held {
                what: HeldWhat::Prune,
                since: now,
                reason: "The state of the copy could not be read. It may have named snapshots that are to be kept, \
                         so all are kept."
                    .to_owned(),
            }),
            lost: Some(now),
            ..Self::default()
        }
    }

    /// A run, or a check for overdue copies, sees the copy at `now`.
    pub fn seen(&mut self, now: Timestamp) {
        let begin = *self.first_seen.get_or_insert(now);
        let begin = self.last_success.unwrap_or(begin);
        let known = self.ahead_seen.filter(|seen| *seen <= now);
        self.ahead_seen = is_ahead(begin, now).then(|| known.unwrap_or(now));
    }

    /// An attempt ended. What is skipped, and a run that met another one, is not an attempt.
    pub fn attempted(&mut self, attempt: Attempt) {
        let started = attempt.started;
        let exit = attempt.exit;
        self.last_attempt = Some(attempt);
        self.skipped = None;
        // One that a person interrupted has not had its turn.
        self.gave_way &= exit == Exit::Interrupted;
        match exit {
            Exit::Done | Exit::Unread => {
                self.last_success = Some(started);
                if exit == Exit::Done {
                    self.last_complete = Some(started);
                }
                self.failures_since = 0;
                self.failed_in_a_row = 0;
                self.not_reached_since = None;
                self.found_overdue = None;
                self.ahead_seen = None;
                self.growth_accepted = None;
                self.change_accepted = None;
                if let Some(changed) = &mut self.changed {
                    changed.not_made = false;
                }
                return;
            }
            // The attempts before it count as they did.
            Exit::Interrupted => return,
            Exit::Unreachable | Exit::Locked => {
                self.not_reached_since.get_or_insert(started);
            }
            Exit::Failed => {
                self.failed_in_a_row = self.failed_in_a_row.saturating_add(1);
                self.not_reached_since = None;
            }
            _ => self.not_reached_since = None,
        }
        self.failures_since = self.failures_since.saturating_add(1);
    }

    /// A copy was made after a person accepted what held it. If it has rules and was not `pruned`, a prune
    /// may be what was held: that passes later.
    pub(crate) fn passed(&mut self, pruned: bool, has_rules: bool) {
        if pruned || !has_rules {
            self.released = None;
        }
    }

    /// A person accepts what holds back the copy, or its prune.
    pub fn accept(&mut self, now: Timestamp) {
        self.silent = None;
        self.lost = None;
        match self.held.take().map(|held| held.what) {
            Some(HeldWhat::Prune) => self.released = Some(now),
            Some(HeldWhat::Copy) => self.growth_accepted = Some(now),
            None => {}
        }
        let changed = self.changed.take();
        if changed.is_some_and(|changed| changed.not_made) {
            self.change_accepted = Some(now);
        }
    }

    /// A person pruned the copy by these rules.
    pub fn pruned_by_hand(&mut self, policy: KeepPolicy) {
        self.pruned_by = Some(policy);
        if self.lost.is_some() {
            return;
        }
        self.held = self.held.take().filter(|held| held.what != HeldWhat::Prune);
    }

    /// Files that changed silently in the sources, as the snapshots have them.
    #[must_use]
    pub fn old_content(&self) -> Vec<OldContent> {
        let silent = self.silent.as_ref();
        silent.map_or_else(Vec::new, |silent| silent.files.clone())
    }

    /// These files changed silently.
    pub(crate) fn changed_silently(&mut self, now: Timestamp, files: Vec<OldContent>) {
        let silent = self.silent.get_or_insert_with(|| SilentChange {
            since: now,
            files: Vec::new(),
            count: 0,
        });
        let mut unnamed = silent.has_unnamed();
        for file in files {
            // A later version of a file may change silently, too.
            if silent.files.contains(&file) {
                continue;
            }
            match silent.files.len() < SILENT_FILES_MAX {
                true => silent.files.push(file),
                false => unnamed = true,
            }
        }
        silent.count = silent.files.len() as u64 + u64::from(unnamed);
    }

    /// Snapshots from before this moment are kept until a person accepts what was found.
    #[must_use]
    pub fn kept_before(&self) -> Option<Timestamp> {
        let silent = self.silent.as_ref();
        // It is not known which ones have the old content of a file without a name.
        let all = silent.is_some_and(SilentChange::has_unnamed) || self.lost.is_some();
        let changed = self.changed.as_ref().map(|changed| changed.kept_before);
        all.then_some(Timestamp::MAX).or(changed)
    }

    /// These files have the right content again.
    pub(crate) fn right_again(&mut self, is_right: impl Fn(&str) -> bool) {
        let Some(silent) = &mut self.silent else {
            return;
        };
        let unnamed = u64::from(silent.has_unnamed());
        silent.files.retain(|file| !is_right(&file.path));
        silent.count = silent.files.len() as u64 + unnamed;
        if silent.count == 0 {
            self.silent = None;
        }
    }

    /// A run did not try the copy.
    pub fn skip(&mut self, at: Timestamp, reason: String) {
        self.skipped = Some(Skipped { at, reason });
    }

    /// All times in it that a clock wrote.
    pub fn times(&self) -> impl Iterator<Item = Timestamp> {
        let attempt = self.last_attempt.as_ref();
        [
            self.first_seen,
            self.last_success,
            attempt.map(|attempt| attempt.ended),
            self.last_prune,
        ]
        .into_iter()
        .flatten()
    }
}

/// The file of a copy.
#[must_use]
pub fn copy_file(state_dir: &Path, copy: &CopyName) -> StateFile<CopyState> {
    let path = state_dir.join(FOLDER).join(format!("{copy}.json"));
    let file = StateFile::new(path, "When the copy was last made is not known here.");
    file.with_instead(CopyState::instead_of_unread)
}

/// The file of a container.
#[must_use]
pub fn container_file(state_dir: &Path, container: &str) -> StateFile<ContainerState> {
    let path = state_dir.join(FOLDER).join(format!("@{container}.json"));
    StateFile::new(path, "Whether its hooks are owed is not known.")
}

/// The file of the sources of a job.
#[must_use]
pub fn source_check_file(state_dir: &Path, job: &str) -> StateFile<SourceCheckState> {
    let path = state_dir.join("sources").join(format!("{job}.json"));
    StateFile::new(path, "Its sources are read again from the beginning.")
}

/// All copies of which something is kept, also those that are not in the config any more.
pub fn known_copies(state_dir: &Path) -> io::Result<Vec<CopyName>> {
    let copy = |name: String| {
        // A container's name has no `@`; that of an old job may have one.
        let (job, container) = name.rsplit_once('@')?;
        (!job.is_empty()).then(|| CopyName::new(job, container))
    };
    Ok(known(state_dir)?.into_iter().filter_map(copy).collect())
}

/// All containers of which something is kept, also those that are not in the config any more.
pub fn known_containers(state_dir: &Path) -> io::Result<Vec<String>> {
    let name = |name: String| name.strip_prefix('@').map(str::to_owned);
    Ok(known(state_dir)?.into_iter().filter_map(name).collect())
}

/// The names of all files in the folder, sorted.
fn known(state_dir: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(state_dir.join(FOLDER)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().into_string();
        let name = name.ok();
        names.extend(name.and_then(|name| name.strip_suffix(".json").map(str::to_owned)));
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests;
