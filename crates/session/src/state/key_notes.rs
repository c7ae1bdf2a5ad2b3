//! What this machine knows of each key: its kind, its label, when it was added and last proved.
//!
//! It is in the state folder, never in the container: there the server could read and change it. A note
//! belongs to a slot's mark, so a new slot with an old number gets no old label. Notes of removed slots
//! stay: a kept header may bring the slots back.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::Failure;
use crate::address::Target;
use crate::files;
use crate::state::headers;
use crate::state::paths::StatePaths;

/// What a key is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyKind {
    /// A key file.
    KeyFile,
    /// A passphrase that people know.
    Passphrase,
    /// The recovery key of the sheet.
    Recovery,
}

impl KeyKind {
    /// In words, for `key list`.
    pub fn text(self) -> &'static str {
        match self {
            Self::KeyFile => "key file",
            Self::Passphrase => "passphrase",
            Self::Recovery => "recovery key",
        }
    }
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyNote {
    /// The slot's mark.
    pub mark: String,
    /// What opens the slot.
    pub kind: KeyKind,
    /// The label that the user gave it.
    pub label: Option<String>,
    /// When this machine added it.
    pub added: Option<Timestamp>,
    /// When a rehearsal opened the container with it; `None` again once its slot was removed.
    pub proved: Option<Timestamp>,
}

/// All keys of one container that this machine knows something of.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyNotes {
    keys: Vec<KeyNote>,
}

impl KeyNotes {
    /// Reads the notes. Empty if that fails: they are for people only.
    pub fn load(state_dir: &Path, uuid: &str) -> Self {
        files::read_json(&path(state_dir, uuid)).unwrap_or_default()
    }

    /// As [`Self::load`], but a file that can't be read is a failure.
    pub(crate) fn read(state_dir: &Path, uuid: &str) -> Result<Self, Failure> {
        files::read_json_if_there(&path(state_dir, uuid)).map(Option::unwrap_or_default)
    }

    /// The note of the slot with this mark.
    pub fn of(&self, mark: &str) -> Option<&KeyNote> {
        self.keys.iter().find(|key| key.mark == mark)
    }

    /// Adds a note, and removes an old one of that slot.
    pub fn note(&mut self, note: KeyNote) {
        self.keys.retain(|key| key.mark != note.mark);
        self.keys.push(note);
    }

    /// Notes that a key has opened the container.
    pub fn prove(&mut self, mark: &str, at: Timestamp) {
        for key in self.keys.iter_mut().filter(|key| key.mark == mark) {
            key.proved = Some(at);
        }
    }

    /// Notes that the key opens nothing any more. After a header is restored it must be proved again.
    pub fn removed(&mut self, mark: &str) {
        for key in self.keys.iter_mut().filter(|key| key.mark == mark) {
            key.proved = None;
        }
    }

    /// When a key that can be on paper was last proved. A key file is lost with the machine.
    pub fn last_proved(&self) -> Option<Timestamp> {
        let on_paper = |key: &&KeyNote| key.kind != KeyKind::KeyFile;
        let keys = self.keys.iter().filter(on_paper);
        keys.filter_map(|key| key.proved).max()
    }

    /// Writes the notes to the state folder.
    pub fn store(&self, state_dir: &Path, uuid: &str) -> Result<(), Failure> {
        let path = path(state_dir, uuid);
        files::write_json(&path, self).map_err(|error| {
            Failure::failed(format!(
                "can't save the notes about keys in \
                                     {}",
                path.display()
            ))
            .caused_by(&error)
        })
    }
}

/// A header's UUID was parsed as one, so it can name a file.
fn path(state_dir: &Path, uuid: &str) -> PathBuf {
    state_dir.join("keys").join(format!("{uuid}.json"))
}

/// Notes the two keys of a new container: the `first` one, and the recovery key. A failure is ignored: only
/// the list of keys shows it.
pub fn note_new_container(state_dir: &Path, uuid: &str, target: &Target, first: KeyKind) {
    let path = headers::newest(&StatePaths::new(state_dir, uuid, target));
    let Ok(header) = headers::open(&path).and_then(|file| headers::load(&file, &path)) else {
        return;
    };
    let mut notes = KeyNotes::default();
    for (slot, kind) in header.slots().iter().zip([first, KeyKind::Recovery]) {
        notes.note(KeyNote {
            mark: slot.mark.clone(),
            kind,
            label: None,
            added: Some(Timestamp::now()),
            proved: None,
        });
    }
    let _ = notes.store(state_dir, uuid);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_of_a_slot_and_not_of_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let uuid = "8a2ac4f5-8d45-4a0c-a1f3-3c3c7c4fca46";
        let mut notes = KeyNotes::load(folder.path(), uuid);
        assert_eq!(notes, KeyNotes::default());
        let note = |mark: &str, label: &str| KeyNote {
            mark: mark.to_owned(),
            kind: KeyKind::Passphrase,
            label: Some(label.to_owned()),
            added: Some(Timestamp::UNIX_EPOCH),
            proved: None,
        };
        notes.note(note("aa", "one"));
        notes.note(note("bb", "two"));
        notes.note(note("aa", "three"));
        notes.prove("bb", Timestamp::UNIX_EPOCH);
        notes.store(folder.path(), uuid).unwrap();
        let read = KeyNotes::load(folder.path(), uuid);
        assert_eq!(read.of("aa").unwrap().label.as_deref(), Some("three"));
        assert!(read.of("bb").unwrap().proved.is_some());
        assert!(read.of("cc").is_none());
        std::fs::write(path(folder.path(), uuid), "{").unwrap();
        assert_eq!(KeyNotes::load(folder.path(), uuid), KeyNotes::default());
    }
}
