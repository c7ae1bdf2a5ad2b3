//! A container that is read without a session: no lock is acquired, and nothing is written. For `key`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use sprat_luks::{Header, HeaderBackup, LuksErrorKind, Secret, SectorCipher, Slot};
use sprat_store::{Access, StoreErrorKind, StoreFile};

use crate::address::Target;
use crate::file_system::{file_system_bytes, read_stamp_block};
use crate::state::key_notes::{KeyKind, KeyNote, KeyNotes};
use crate::state::{self, identity, missing};
use crate::volume_process::header::create::exists_already;
use crate::volume_process::open::length_check::truncated;
use crate::{Exit, Failure, IdentityPolicy, SshOptions, connect};

/// A container file that is open for reading.
pub struct ClosedContainer {
    state_dir: PathBuf,
    target: Target,
    file: Arc<dyn StoreFile>,
}

impl ClosedContainer {
    /// Connects to the server and opens the file.
    pub fn open(state_dir: PathBuf, target: &Target, ssh: &SshOptions) -> Result<Self, Failure> {
        let store = connect::connect(target, ssh)?;
        let file = store
            .open(&target.name, Access::ReadOnly)
            .map_err(|error| match error.kind() {
                StoreErrorKind::NotFound => missing::no_container(&state_dir, target),
                _ => Failure::from(&error),
            })?;
        Ok(Self {
            state_dir,
            target: target.clone(),
            file,
        })
    }

    /// The file's bytes, as `luks` reads them.
    #[must_use]
    pub fn bytes(&self) -> connect::HeaderBytes<'_> {
        connect::HeaderBytes(&*self.file)
    }

    /// The header, compared with what is pinned on this machine or with `fingerprint`. `false`: there is
    /// nothing to compare it with.
    pub fn header(&self, fingerprint: Option<&str>) -> Result<(Header, bool), Failure> {
        let policy = identity::policy(&self.state_dir, &self.target, fingerprint)?;
        let header = Header::load(&self.bytes()).map_err(|error| match error.kind() {
            LuksErrorKind::NoContainer | LuksErrorKind::Damaged => {
                state::header_unreadable(&self.state_dir, &self.target, &policy, &error)
            }
            _ => Failure::of_key_work(&error),
        })?;
        match policy {
            IdentityPolicy::Known(pins) => header.check_pins(&pins)?,
            IdentityPolicy::Expect(typed) => self.check_fingerprint(&header, &typed)?,
            IdentityPolicy::TrustOnce => return Ok((header, false)),
        }
        Ok((header, true))
    }

    /// Compares the header with a fingerprint that was typed from the recovery sheet.
    pub fn check_fingerprint(&self, header: &Header, typed: &str) -> Result<(), Failure> {
        let Err(error) = header.check_fingerprint(typed) else {
            return Ok(());
        };
        if !identity::is_known(&self.state_dir, &self.target, header) {
            return Err(error.into());
        }
        Err(Failure::new(
            Exit::Damaged,
            "the given fingerprint is not this container's fingerprint: compare it with the sheet",
        )
        .because(format!(
            "{} has the fingerprint {}",
            self.target,
            header.pins().fingerprint()
        ))
        .with_hint(
            "nothing was changed. Either this is a typing error, or the sheet of another \
                    container",
        ))
    }

    /// Fails if key slots are gone or changed since this machine last saw them.
    pub fn check_slots(&self, header: &Header) -> Result<(), Failure> {
        let slots = header.slot_digests();
        state::check_slots(&self.state_dir, &self.target, header.uuid(), &slots)
    }

    /// A copy of `header`, which must not have changed while it was read.
    pub fn copy_of_header(&self, header: &Header) -> Result<HeaderBackup, Failure> {
        let copy = header.backup(&self.bytes())?;
        if connect::header(&*self.file)?.sequence_id() == header.sequence_id() {
            return Ok(copy);
        }
        Err(Failure::failed("the header was changed while it was read")
            .with_hint("nothing was written. Run the command again"))
    }

    /// Checks that `secret` opens the container and that the file system in it can be read; returns the key
    /// slot. With `accept_older_state` the state is not compared with the last known one.
    pub fn rehearse(
        &self,
        header: &Header,
        secret: &Secret,
        accept_changed_keys: bool,
        accept_older_state: bool,
    ) -> Result<u32, Failure> {
        let (slot, key) = header.unlock_by(&self.bytes(), secret)?;
        let cipher = SectorCipher::new(&key, header)?;
        drop(key);
        let first = read_stamp_block(&*self.file, header, &cipher).and_then(|first| {
            check_file_system(&first.0, header, first.1)?;
            Ok(first)
        });
        let (block, file_bytes) = first.map_err(|failure| {
            failure.context(format!(
                "the key opens {} (slot {slot}), but the container file is too short for its volume",
                self.target
            ))
        })?;
        // A key that opens an old copy, or a container that lost slots, proves nothing for today's.
        if !accept_changed_keys {
            self.check_slots(header)?;
        }
        if !accept_older_state {
            state::refuse_older(
                &self.state_dir,
                &self.target,
                header.uuid(),
                &block,
                file_bytes,
            )?;
        }
        Ok(slot)
    }

    /// Notes for the list of keys that the key of `slot` was proved. A failure is ignored: the proof counts.
    pub fn note_proof(&self, header: &Header, slot: u32, kind: KeyKind) {
        let slots = header.slots();
        let Some(found) = slots.iter().find(|found| found.number == slot) else {
            return;
        };
        let mut notes = KeyNotes::load(&self.state_dir, header.uuid());
        if notes.of(&found.mark).is_none() {
            notes.note(KeyNote {
                mark: found.mark.clone(),
                kind,
                label: None,
                added: None,
                proved: None,
            });
        }
        notes.prove(&found.mark, Timestamp::now());
        let _ = notes.store(&self.state_dir, header.uuid());
    }

    /// Why the key of `slot` should not be removed: it is the last one that is not a file, or the only
    /// recovery key. This machine knows the kind of the keys that it added. The derivation of the others shows
    /// as much as that of a key file does.
    #[must_use]
    pub fn reason_to_keep(&self, slot: u32) -> Option<&'static str> {
        // A header that can't be used fails the change itself, with the right words.
        let header = Header::load(&self.bytes()).ok()?;
        let notes = KeyNotes::load(&self.state_dir, header.uuid());
        let kind = |slot: &Slot| match notes.of(&slot.mark) {
            Some(note) => Some(note.kind),
            None if slot.kdf.starts_with("pbkdf2") => Some(KeyKind::KeyFile),
            None => None,
        };
        let slots = header.slots();
        let removed = kind(slots.iter().find(|found| found.number == slot)?);
        let left = slots.iter().filter(|left| left.number != slot);
        let left: Vec<_> = left.map(kind).collect();
        // The very last slot is never removed.
        if left.is_empty() || removed == Some(KeyKind::KeyFile) {
            return None;
        }
        if left.iter().all(|kind| *kind == Some(KeyKind::KeyFile)) {
            return Some(
                "the only key that is not a file: if the key files are lost, nobody can open the \
                 container",
            );
        }
        // A key that this machine doesn't know may be a recovery key as well.
        let may_be_recovery =
            |kind: &Option<KeyKind>| matches!(kind, None | Some(KeyKind::Recovery));
        if removed == Some(KeyKind::Passphrase) || left.iter().any(may_be_recovery) {
            return None;
        }
        Some("the only recovery key: the printed recovery sheet would no longer open the container")
    }
}

/// Checks that there is nothing at `target`.
pub fn check_free(target: &Target, ssh: &SshOptions) -> Result<(), Failure> {
    let store = connect::connect(target, ssh)?;
    match store.stat(&target.name) {
        Ok(_) => Err(exists_already(target)),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::from(&error)),
    }
}

/// Checks that there is a container at `target`, before the user is asked for its key. Any other failure is
/// left to the session, which reports it.
pub fn check_exists(state_dir: &Path, target: &Target, ssh: &SshOptions) -> Result<(), Failure> {
    let Ok(store) = connect::connect(target, ssh) else {
        return Ok(());
    };
    match store.stat(&target.name) {
        Err(error) if error.kind() == StoreErrorKind::NotFound => {
            Err(missing::no_container(state_dir, target))
        }
        _ => Ok(()),
    }
}

/// Checks that the beginning of the file system decrypts, and that the file is as long as it says.
fn check_file_system(block: &[u8], header: &Header, file_bytes: u64) -> Result<(), Failure> {
    let payload = header.geometry(file_bytes)?;
    match file_system_bytes(block) {
        Some(needed) if needed > payload.len_bytes => {
            let needed = payload.offset_bytes.saturating_add(needed);
            Err(truncated(file_bytes, needed))
        }
        Some(_) => Ok(()),
        None => Err(
            Failure::new(Exit::Damaged, "the volume has no file system that sprat knows").with_hint(
                "nothing was changed. The key is right, but the beginning of the volume was overwritten \
                 or damaged on the server. Search the server for another copy of the container, and \
                 check the server's disk",
            ),
        ),
    }
}
