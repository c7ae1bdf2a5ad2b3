//! Selects the copies of a run: which are due, which are skipped, and when each is next.
//!
//! The caller passes the time, and what is known of each copy.

use std::path::Path;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use sprat_snapshot::FileSystem;

use crate::conditions::{Conditions, Machine};
use crate::config::{Container, Copy, Source};
use crate::copy_state::{CopyState, HeldWhat};
use crate::due::{self, Decision};
use crate::target_disk::{self, LocalTarget};

/// What a run does with a copy.
#[derive(Debug, Clone)]
pub struct Selected<'c> {
    /// The copy.
    pub copy: Copy<'c>,
    /// Whether it is due.
    pub decision: Decision,
    /// A person asked for it, due or not.
    pub asked: bool,
    /// It would be made, but for this.
    pub skip: Option<String>,
    /// It gave way to copies in other containers: they go first.
    pub gave_way: bool,
}

impl Selected<'_> {
    /// Whether the run tries it.
    #[must_use]
    pub fn is_tried(&self) -> bool {
        (self.decision.due || self.asked) && self.skip.is_none()
    }

    /// Why it is tried, or why not.
    #[must_use]
    pub fn reason(&self) -> String {
        match &self.skip {
            Some(skip) => skip.clone(),
            None if self.asked && !self.decision.due => "asked for".to_owned(),
            None => self.decision.why.to_string(),
        }
    }
}

/// How copies are selected.
#[derive(Debug)]
pub struct Selecting<'a> {
    /// The zone of `at` and `window`.
    pub zone: &'a TimeZone,
    /// Identifies this machine: for `spread`.
    pub machine_id: &'a str,
    /// Where conditions are checked.
    pub machine: &'a Machine,
    /// As if due and all conditions met.
    pub anyway: bool,
    /// The time.
    pub now: Timestamp,
}

impl Selecting<'_> {
    /// Decides about one copy. Only a copy that would be made has its conditions checked.
    #[must_use]
    pub fn select<'c>(&self, copy: Copy<'c>, state: &CopyState) -> Selected<'c> {
        let decision = self.decide(copy, state);
        let asked = self.anyway;
        let skip = match decision.due || asked {
            true => self.skip(copy, state),
            false => None,
        };
        Selected {
            copy,
            decision,
            asked,
            skip,
            gave_way: state.gave_way,
        }
    }

    /// Whether the copy is due by its schedule and its last attempts.
    #[must_use]
    pub fn decide(&self, copy: Copy<'_>, state: &CopyState) -> Decision {
        let schedule = copy.schedule(self.machine_id);
        due::decide(&schedule, self.zone, state, &inputs(copy), self.now)
    }

    fn skip(&self, copy: Copy<'_>, state: &CopyState) -> Option<String> {
        let held = state.held.as_ref();
        if let Some(held) = held.filter(|held| held.what == HeldWhat::Copy) {
            return Some(format!("held: {}", held.reason));
        }
        // A `before` hook of the container may mount the disk.
        if copy.container.before.is_empty()
            && let Some(absent) = disk_absent(copy.container, state.file_system.as_ref())
        {
            return Some(absent);
        }
        if self.anyway {
            return None;
        }
        conditions(copy).stop_beginning(self.machine, self.zone, self.now)
    }
}

/// Says that the disk of a local container is away, if it is. `seen` is the disk of the last success.
pub(super) fn disk_absent(container: &Container, seen: Option<&FileSystem>) -> Option<String> {
    let file = container.target.local_path()?;
    match target_disk::find(&file, seen) {
        LocalTarget::DiskAbsent { disk } => Some(format!("the disk {disk} is not there")),
        LocalTarget::There | LocalTarget::NoContainer => None,
    }
}

/// The conditions of a copy. What needs no network does not depend on its cost.
pub(super) fn conditions(copy: Copy<'_>) -> Conditions {
    let mut conditions = copy.job.conditions.clone();
    let is_pulled = |source: &Source| matches!(source, Source::Pulled { .. });
    let is_local = copy.container.target.local_path().is_some();
    conditions.skip_on_metered &= !is_local || copy.job.sources.iter().any(is_pulled);
    conditions
}

/// Stands for the config of a copy and for its key file as they are now. A wrong key or config is tried
/// again once this changes.
#[must_use]
pub fn inputs(copy: Copy<'_>) -> String {
    use std::os::unix::fs::MetadataExt;

    let container = copy.container;
    let named = container.key_file.as_deref();
    let named = named.or(container.passphrase_file.as_deref());
    let default = container.settings.iter().find(|one| one.key == "key_file");
    let default = default.and_then(|one| one.value.as_str()).map(Path::new);
    let file = named.or(default).and_then(|path| path.metadata().ok());
    let key = file.map(|file| (file.ino(), file.len(), file.mtime(), file.mtime_nsec()));
    let settings = copy.job.settings.iter().chain(&container.settings);
    let settings: Vec<_> = settings.map(|one| (one.key, &one.value)).collect();
    digest(&format!("{settings:?} {key:?}"))
}

/// A short name for a text.
pub(super) fn digest(text: &str) -> String {
    let hash = openssl::sha::sha256(text.as_bytes());
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
