//! The file with what this machine knows of a container, and the comparison with what the server shows.
//!
//! The file is replaced as a whole. If it is missing, torn or of another format, nothing is known, and
//! every command works. It holds no secret.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::file_system::{Age, FileSystemState, Stamp};
use crate::files;
use crate::state::paths::{KNOWN, StatePaths};
use crate::{Exit, Failure};

const FORMAT: u32 = 1;

/// The newest snapshot of each job: job, snapshot.
pub type Newest = BTreeMap<String, String>;

/// Key slots: number, digest of the slot's metadata in the header.
type Slots = BTreeMap<u32, String>;

/// What is known of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownState {
    format: u32,
    /// The state in which a session of this machine last left or saw the container.
    stamp: Option<Stamp>,
    /// Since then a session of this machine may have written. It did not end in order.
    #[serde(default)]
    writing: bool,
    /// The newest snapshots in the state of `stamp`. `None`: not known.
    #[serde(default)]
    newest: Option<Newest>,
    /// The newest snapshots in an earlier state, without those of which a later session has reported that they are gone.
    #[serde(default)]
    sought: Newest,
    /// The key slots, as this machine last accepted them.
    #[serde(default)]
    slots: Option<Slots>,
    /// The key slots after a change that this machine has begun. Set before its first write, until its
    /// end. After an interrupted change, each slot may have the old or the new state.
    #[serde(default)]
    changing_to: Option<Slots>,
    /// The key slot that opened the container the last time.
    #[serde(default)]
    opened_by: Option<u32>,
    /// Blocks of the volume that were overwritten late, and whose files a check has named.
    #[serde(default)]
    overwritten: BTreeSet<u64>,
    /// Set if the container got its volume key by `copy --new-key`.
    #[serde(default)]
    new_key: Option<NewKey>,
}

/// When a container got its volume key, by the file system's count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct NewKey {
    /// Bytes that the file system had written until then, under other keys.
    life_bytes: u64,
    /// Bytes that were in use, and so were encrypted with the new key.
    used_bytes: u64,
}

/// The result of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Nothing is known, or the file system has no stamp.
    Unknown,
    /// The container is as this machine left it.
    Same,
    /// Only a session of this machine that did not end in order may have written.
    OwnInterrupted,
    /// Another machine or program has written.
    WrittenElsewhere,
    /// The container is older than this machine knows it.
    Older {
        /// The state that this machine knows, in words.
        known: String,
        /// The state that the server shows, in words.
        found: String,
    },
}

impl KnownState {
    /// Reads what this machine knows of the container.
    pub fn load(paths: &StatePaths) -> Self {
        files::read_json(&path(paths))
            .filter(|known: &Self| known.format == FORMAT)
            .unwrap_or_default()
    }

    /// Whether the known state is this one.
    pub fn is_of(&self, stamp: &Stamp) -> bool {
        self.stamp.as_ref() == Some(stamp)
    }

    /// Whether there is a state to compare with.
    pub fn has_stamp(&self) -> bool {
        self.stamp.is_some()
    }

    /// Bytes that were written under the present volume key, when this machine last saw the container. All
    /// that the file system has ever written, where this machine knows of no other key.
    pub fn written_bytes(&self) -> Option<u64> {
        let life_bytes = self.stamp.as_ref()?.life_bytes()?;
        let under = self.new_key.as_ref().map_or(life_bytes, |new| {
            new.used_bytes + life_bytes.saturating_sub(new.life_bytes)
        });
        Some(under)
    }

    /// Records this knowledge for a copy with another volume key, in the state that `stamp_block`, in
    /// plaintext, shows. `paths` and `slots` are the copy's.
    pub fn with_new_key(
        &self,
        paths: &StatePaths,
        stamp_block: &[u8],
        file_bytes: u64,
        slots: Slots,
    ) -> Result<(), Failure> {
        let found = FileSystemState::read(stamp_block, file_bytes);
        let stamp = found.as_ref().map(|found| found.stamp.clone());
        let finding = self.compare(stamp.as_ref(), false);
        let (newest, sought) = match finding {
            Finding::Same => (self.newest.clone(), self.sought.clone()),
            _ => (None, self.remembered()),
        };
        let mut copy = Self {
            newest,
            sought,
            slots: Some(slots),
            overwritten: self.overwritten.clone(),
            new_key: found.and_then(|found| {
                Some(NewKey {
                    life_bytes: found.stamp.life_bytes()?,
                    used_bytes: found.used_bytes,
                })
            }),
            stamp,
            ..Self::default()
        };
        copy.store(paths)
    }

    /// Compares the state that the server shows with the known one. `own`: no other machine has had the
    /// container open since this one, so a newer state is this machine's.
    pub fn compare(&self, found: Option<&Stamp>, own: bool) -> Finding {
        let (Some(known), Some(found)) = (&self.stamp, found) else {
            return Finding::Unknown;
        };
        match found.age(known) {
            Age::Same => Finding::Same,
            Age::Newer if self.writing && own => Finding::OwnInterrupted,
            Age::Newer => Finding::WrittenElsewhere,
            // A session of this machine had just begun.
            Age::NotUnmounted if self.writing && own => Finding::OwnInterrupted,
            Age::NotUnmounted if self.writing => Finding::WrittenElsewhere,
            Age::Older | Age::NotUnmounted => Finding::Older {
                known: known.written(),
                found: found.written(),
            },
        }
    }

    /// Compares the key slots. A slot that was added is no danger: a server can't make one that
    /// opens the container.
    pub fn check_slots(&self, found: &Slots, target: &str) -> Result<(), Failure> {
        let Some(known) = &self.slots else {
            return Ok(());
        };
        let by_own_change = |number: &u32| {
            let changing = self.changing_to.as_ref();
            changing.is_some_and(|changing| changing.get(number) == found.get(number))
        };
        let numbers = |wanted: &dyn Fn(Option<&String>, &String) -> bool| -> Vec<String> {
            let differ = known
                .iter()
                .filter(|(number, slot)| wanted(found.get(number), slot) && !by_own_change(number));
            differ.map(|(number, _)| number.to_string()).collect()
        };
        let gone = numbers(&|found, _| found.is_none());
        let changed = numbers(&|found, slot| found.is_some_and(|found| found != slot));
        if gone.is_empty() && changed.is_empty() {
            return Ok(());
        }
        let mut failure = Failure::new(
            Exit::Damaged,
            format!("the key slots of {target} were changed, and not by this machine"),
        );
        for (what, slots) in [("gone", gone), ("changed", changed)] {
            if !slots.is_empty() {
                failure = failure.because(format!("{what}: key slot {}", slots.join(", ")));
            }
        }
        Err(failure.with_hint(
            "no key was used and nothing was written. If somebody changed the keys on another machine \
             or with cryptsetup, add --accept-changed-keys once. Otherwise the server changed them: run \
             `sprat key header-restore`, which restores the header that this machine has saved",
        ))
    }

    /// The newest snapshots that must be there in the state of `finding`. A session of this machine that
    /// did not end in order has removed none of them: it adds newer ones, `prune` keeps the newest, and a
    /// mount for writing forgets them. If a session was refused because they are gone, the next session
    /// must see that, too.
    pub fn expected(&self, finding: &Finding) -> Newest {
        match finding {
            Finding::Same | Finding::OwnInterrupted => self.newest.clone().unwrap_or_default(),
            _ => Newest::new(),
        }
    }

    /// The newest snapshots that this machine saw. If one of them is not in [`Self::expected`], another machine
    /// may have removed it.
    fn remembered(&self) -> Newest {
        let mut all = self.sought.clone();
        all.extend(self.newest.clone().unwrap_or_default());
        all
    }

    /// Those of the newest snapshots that this machine saw, and that may be gone in the state of `finding`.
    pub fn uncertain(&self, finding: &Finding) -> Newest {
        match finding {
            Finding::Same => self.sought.clone(),
            _ => self.remembered(),
        }
    }

    /// `searched`: the session has searched the volume for all that are remembered, and reported these as gone
    /// (`JOB/SNAPSHOT`).
    fn note_newest(&mut self, newest: Option<Newest>, searched: Option<&[String]>) {
        self.sought = match (&newest, searched) {
            // All that are there are known now.
            (Some(_), Some(_)) => Newest::new(),
            (_, searched) => without(self.remembered(), searched.unwrap_or_default()),
        };
        self.newest = newest;
    }

    /// Notes that this machine is about to write into the state of `finding`. Durable when it returns.
    pub fn begin_writing(&mut self, paths: &StatePaths, finding: &Finding) -> Result<(), Failure> {
        self.writing = true;
        if !matches!(finding, Finding::Same | Finding::OwnInterrupted) {
            // Another machine may have removed them. If this session does not end in order, the next one must not
            // take their absence for damage.
            self.note_newest(None, None);
        }
        self.store(paths)
    }

    /// Notes that this machine is about to cut the container file. A file that is longer than the known one is no
    /// older state. Durable when it returns.
    pub fn begin_cut(&mut self, paths: &StatePaths, file_bytes: u64) -> Result<(), Failure> {
        if let Some(stamp) = &mut self.stamp {
            stamp.file_bytes = stamp.file_bytes.min(file_bytes);
        }
        self.store(paths)
    }

    /// From now on a user writes, and may remove any snapshot. Durable when it returns.
    pub fn forget_newest(&mut self, paths: &StatePaths) -> Result<(), Failure> {
        self.sought = Newest::new();
        self.newest = None;
        self.store(paths)
    }

    /// Notes the state in which a session that wrote has left the container. `searched`: it has searched for the snapshots
    /// that are remembered, and reported these as gone (`JOB/SNAPSHOT`).
    pub fn end_writing(
        &mut self,
        paths: &StatePaths,
        stamp: Option<Stamp>,
        newest: Option<Newest>,
        searched: Option<&[String]>,
    ) -> Result<(), Failure> {
        self.writing = false;
        self.stamp = stamp;
        self.note_newest(newest, searched);
        self.store(paths)
    }

    /// Notes the state that a session which only read has seen. `searched` as in [`Self::end_writing`].
    pub fn end_reading(
        &mut self,
        paths: &StatePaths,
        finding: &Finding,
        stamp: Option<Stamp>,
        searched: Option<&[String]>,
    ) -> Result<(), Failure> {
        match finding {
            Finding::Unknown | Finding::WrittenElsewhere | Finding::Older { .. } => {
                self.writing = false;
                self.stamp = stamp;
                self.note_newest(None, searched);
                self.store(paths)
            }
            Finding::Same if searched.is_some_and(|gone| !gone.is_empty()) => {
                let sought = std::mem::take(&mut self.sought);
                self.sought = without(sought, searched.unwrap_or_default());
                self.store(paths)
            }
            // The session that writes next ends the note.
            Finding::Same | Finding::OwnInterrupted => Ok(()),
        }
    }

    /// Whether a check has named the files of all these blocks of the volume.
    pub fn knows_overwritten(&self, blocks: &[u64]) -> bool {
        blocks.iter().all(|block| self.overwritten.contains(block))
    }

    /// A check has named the files of these blocks of the volume, all that are overwritten by now.
    pub fn name_overwritten(&mut self, paths: &StatePaths, blocks: &[u64]) -> Result<(), Failure> {
        let blocks: BTreeSet<u64> = blocks.iter().copied().collect();
        if blocks == self.overwritten {
            return Ok(());
        }
        self.overwritten = blocks;
        self.store(paths)
    }

    /// Notes the key slots as they are now.
    pub fn accept_slots(&mut self, paths: &StatePaths, slots: Slots) -> Result<(), Failure> {
        if self.slots.as_ref() == Some(&slots) && self.changing_to.is_none() {
            return Ok(());
        }
        self.slots = Some(slots);
        self.changing_to = None;
        self.store(paths)
    }

    /// Notes the key slots that this machine is about to write. Durable when it returns.
    pub fn begin_changing_slots(
        &mut self,
        paths: &StatePaths,
        slots: Slots,
    ) -> Result<(), Failure> {
        if self.slots.as_ref() == Some(&slots) {
            return Ok(());
        }
        self.changing_to = Some(slots);
        self.store(paths)
    }

    /// The key slot that opened the container the last time: it is tried first.
    pub fn opened_by(&self) -> Option<u32> {
        self.opened_by
    }

    /// Notes the key slot that opened the container.
    pub fn note_opened_by(&mut self, paths: &StatePaths, slot: u32) -> Result<(), Failure> {
        if self.opened_by == Some(slot) {
            return Ok(());
        }
        self.opened_by = Some(slot);
        self.store(paths)
    }

    fn store(&mut self, paths: &StatePaths) -> Result<(), Failure> {
        self.format = FORMAT;
        let path = path(paths);
        files::write_json_even_if_full(&path, self).map_err(|error| {
            Failure::failed(format!(
                "can't save the state of the container in {}",
                path.display()
            ))
            .caused_by(&error)
            .with_hint("free space on the disk of the state folder, or make the folder writable")
        })
    }
}

/// The failure of a session that was shown an older state.
pub fn older(target: &str, known: &str, found: &str) -> Failure {
    Failure::new(
        Exit::Damaged,
        format!("{target} is older than the state that this machine saw last"),
    )
    .because(format!(
        "the present state was written {found}, the state that this machine saw last was written {known}"
    ))
    .with_hint(
        "nothing was written. Either the server shows an old copy of the file (from a snapshot or a \
         backup of its disk, or after `sprat-agent revert`), or it lost data that it had reported as \
         durable. Find out which. To continue with the older state, add --accept-older-state once: the \
         snapshots that are missing in it are lost. Then `sprat accept` ends the report in `sprat status`",
    )
}

fn path(paths: &StatePaths) -> PathBuf {
    paths.file(KNOWN, ".json")
}

/// `gone` has `JOB/SNAPSHOT`.
fn without(mut all: Newest, gone: &[String]) -> Newest {
    all.retain(|job, name| !gone.contains(&format!("{job}/{name}")));
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_system::stamp_block as block;
    use crate::state::paths::tests::paths;

    fn stamp(counter: u64) -> Option<Stamp> {
        Some(FileSystemState::read(&block(counter, 1, 0), 4096)?.stamp)
    }

    #[test]
    fn each_finding_follows_from_the_stamp_and_the_note() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        let mut known = KnownState::load(&paths);
        assert_eq!(known.compare(stamp(5).as_ref(), true), Finding::Unknown);
        known.begin_writing(&paths, &Finding::Unknown).unwrap();
        assert_eq!(known.compare(stamp(5).as_ref(), true), Finding::Unknown);
        let newest = Newest::from([("home".to_owned(), "2026-01-01T00-00-00Z".to_owned())]);
        known
            .end_writing(&paths, stamp(5), Some(newest.clone()), Some(&[]))
            .unwrap();
        let mut known = KnownState::load(&paths);
        assert_eq!(known.compare(stamp(5).as_ref(), true), Finding::Same);
        assert_eq!(known.expected(&Finding::Same), newest);
        assert!(known.expected(&Finding::WrittenElsewhere).is_empty());
        assert_eq!(
            known.compare(stamp(6).as_ref(), true),
            Finding::WrittenElsewhere
        );
        assert_eq!(known.compare(None, true), Finding::Unknown);
        let older = known.compare(stamp(4).as_ref(), true);
        assert!(matches!(older, Finding::Older { .. }));
        known.begin_writing(&paths, &Finding::Same).unwrap();
        let mut known = KnownState::load(&paths);
        assert_eq!(
            known.compare(stamp(6).as_ref(), true),
            Finding::OwnInterrupted
        );
        for finding in [Finding::Same, Finding::OwnInterrupted] {
            assert_eq!(known.expected(&finding), newest);
        }
        // Another machine took over from the interrupted session, and may have pruned.
        let finding = known.compare(stamp(6).as_ref(), false);
        assert_eq!(finding, Finding::WrittenElsewhere);
        assert!(known.expected(&finding).is_empty());
        assert!(matches!(
            known.compare(stamp(4).as_ref(), true),
            Finding::Older { .. }
        ));
        known.end_reading(&paths, &older, stamp(4), None).unwrap();
        let known = KnownState::load(&paths);
        assert_eq!(known.compare(stamp(4).as_ref(), true), Finding::Same);
        // Which snapshots are in that state was not seen, and no writing of ours is open any more.
        assert!(known.expected(&Finding::Same).is_empty());
        let newer = known.compare(stamp(5).as_ref(), true);
        assert_eq!(newer, Finding::WrittenElsewhere);
    }

    /// After a session that left these newest snapshots.
    fn after_writing(paths: &StatePaths) -> (KnownState, Newest) {
        let newest = Newest::from([("home".to_owned(), "2026-01-01T00-00-00Z".to_owned())]);
        let mut known = KnownState::default();
        let noted = known.end_writing(paths, stamp(5), Some(newest.clone()), Some(&[]));
        noted.unwrap();
        (known, newest)
    }

    #[test]
    fn interrupted_writing_after_another_machine_demands_no_snapshot() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        let (mut known, newest) = after_writing(&paths);
        let finding = known.compare(stamp(6).as_ref(), false);
        assert_eq!(finding, Finding::WrittenElsewhere);
        known.begin_writing(&paths, &finding).unwrap();
        // The session is killed.
        let known = KnownState::load(&paths);
        let finding = known.compare(stamp(7).as_ref(), true);
        assert_eq!(finding, Finding::OwnInterrupted);
        assert!(known.expected(&finding).is_empty());
        assert_eq!(known.remembered(), newest);
    }

    #[test]
    fn newest_snapshots_are_remembered_until_they_are_reported_as_gone() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        let (mut known, newest) = after_writing(&paths);
        assert!(known.uncertain(&Finding::Same).is_empty());
        let elsewhere = Finding::WrittenElsewhere;
        // One session could not search, and one found them.
        for (counter, searched) in [(6, None), (7, Some([].as_slice()))] {
            let noted = known.end_reading(&paths, &elsewhere, stamp(counter), searched);
            noted.unwrap();
            known = KnownState::load(&paths);
            assert!(known.expected(&Finding::Same).is_empty());
            assert_eq!(known.remembered(), newest);
            assert_eq!(known.uncertain(&Finding::Same), newest);
        }
        let mut writes = known.clone();
        writes.end_writing(&paths, stamp(8), None, None).unwrap();
        assert_eq!(KnownState::load(&paths).remembered(), newest);
        let gone = ["home/2026-01-01T00-00-00Z".to_owned()];
        let noted = known.end_reading(&paths, &Finding::Same, stamp(7), Some(&gone));
        noted.unwrap();
        assert!(KnownState::load(&paths).remembered().is_empty());
        let noted = known.end_writing(&paths, stamp(9), Some(newest), Some(&[]));
        noted.unwrap();
        known.forget_newest(&paths).unwrap();
        assert!(KnownState::load(&paths).remembered().is_empty());
    }

    #[test]
    fn under_a_new_key_counts_what_was_in_use_and_what_was_written_since() {
        let state = tempfile::tempdir().unwrap();
        let (source, copy) = (
            paths(state.path(), "h:x.luks"),
            paths(state.path(), "h:y.luks"),
        );
        let newest = Newest::from([("home".to_owned(), "2026-01-01T00-00-00Z".to_owned())]);
        let mut known = KnownState::default();
        known
            .end_writing(&source, stamp(5000), Some(newest.clone()), Some(&[]))
            .unwrap();
        known.name_overwritten(&source, &[7]).unwrap();
        let slots = Slots::from([(0, "new".to_owned())]);
        let mut first = block(5000, 1, 0);
        // 600 blocks of 1 KiB in use.
        first[1024 + 4..][..4].copy_from_slice(&600_u32.to_le_bytes());
        known
            .with_new_key(&copy, &first, 4096, slots.clone())
            .unwrap();
        let mut of_copy = KnownState::load(&copy);
        let found = FileSystemState::read(&first, 4096).unwrap().stamp;
        assert_eq!(of_copy.compare(Some(&found), true), Finding::Same);
        assert!(of_copy.check_slots(&slots, "y").is_ok());
        assert!(of_copy.knows_overwritten(&[7]));
        assert_eq!(of_copy.written_bytes(), Some(600 * 1024));
        of_copy
            .end_writing(&copy, stamp(5100), None, Some(&[]))
            .unwrap();
        let bytes = KnownState::load(&copy).written_bytes();
        assert_eq!(bytes, Some((600 + 100) * 1024));
        assert_eq!(KnownState::load(&source).written_bytes(), Some(5000 * 1024));
        // What is newer than this machine has seen may have lost its snapshots in order.
        let newer = block(5001, 1, 0);
        known.with_new_key(&copy, &newer, 4096, slots).unwrap();
        assert!(KnownState::load(&copy).expected(&Finding::Same).is_empty());
    }

    #[test]
    fn a_file_of_another_format_is_the_same_as_knowing_nothing() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        let mut known = KnownState::default();
        known
            .end_writing(&paths, stamp(5), None, Some(&[]))
            .unwrap();
        let text = std::fs::read(path(&paths)).unwrap();
        let mut content: serde_json::Value = serde_json::from_slice(&text).unwrap();
        content["format"] = (FORMAT + 1).into();
        std::fs::write(path(&paths), content.to_string()).unwrap();
        assert_eq!(KnownState::load(&paths), KnownState::default());
    }

    #[test]
    fn a_torn_file_is_the_same_as_knowing_nothing() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        let mut known = KnownState::default();
        known
            .end_writing(&paths, stamp(5), None, Some(&[]))
            .unwrap();
        let whole = std::fs::read(path(&paths)).unwrap();
        for end in 0..whole.len() - 2 {
            std::fs::write(path(&paths), &whole[..end]).unwrap();
            assert_eq!(KnownState::load(&paths), KnownState::default());
        }
    }

    #[test]
    fn slots_that_went_or_changed_are_refused_and_added_ones_are_not() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        let slots = |texts: &[(u32, &str)]| -> Slots {
            let texts = texts.iter();
            texts.map(|(n, text)| (*n, (*text).to_owned())).collect()
        };
        let mut known = KnownState::default();
        assert!(known.check_slots(&slots(&[]), "x").is_ok());
        known
            .accept_slots(&paths, slots(&[(0, "a"), (1, "b")]))
            .unwrap();
        let known = KnownState::load(&paths);
        let check = |texts: &[(u32, &str)]| known.check_slots(&slots(texts), "x");
        assert!(check(&[(0, "a"), (1, "b")]).is_ok());
        assert!(check(&[(0, "a"), (1, "b"), (2, "c")]).is_ok());
        for texts in [&[(0, "a")][..], &[(0, "a"), (1, "c")]] {
            assert_eq!(check(texts).unwrap_err().exit, Exit::Damaged);
        }
    }

    #[test]
    fn an_interrupted_change_of_slots_is_accepted_as_before_and_as_it_was_to_be() {
        let state = tempfile::tempdir().unwrap();
        let paths = paths(state.path(), "h:x.luks");
        let slots = |texts: &[(u32, &str)]| -> Slots {
            let texts = texts.iter();
            texts.map(|(n, text)| (*n, (*text).to_owned())).collect()
        };
        let before = [(0, "a"), (1, "b"), (2, "c")];
        let mut known = KnownState::default();
        known.accept_slots(&paths, slots(&before)).unwrap();
        known
            .begin_changing_slots(&paths, slots(&[(0, "a"), (2, "d")]))
            .unwrap();
        let mut known = KnownState::load(&paths);
        let check =
            |known: &KnownState, texts: &[(u32, &str)]| known.check_slots(&slots(texts), "x");
        for texts in [&before[..], &[(0, "a"), (2, "d")], &[(0, "a"), (2, "c")]] {
            assert!(check(&known, texts).is_ok(), "{texts:?}");
        }
        for texts in [
            &[(1, "b"), (2, "c")][..],
            &[(0, "a")],
            &[(0, "b"), (2, "d")],
        ] {
            assert!(check(&known, texts).is_err(), "{texts:?}");
        }
        // Back to what was known: the change is over all the same.
        known.accept_slots(&paths, slots(&before)).unwrap();
        assert!(check(&KnownState::load(&paths), &[(0, "a"), (2, "d")]).is_err());
    }
}
