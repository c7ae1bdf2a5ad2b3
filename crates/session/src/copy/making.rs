//! Makes the copy: an unfinished file that only its note knows, read back, and then named.

use std::sync::Arc;
use std::time::Instant;

use sprat_luks::{Header, LuksErrorKind, SectorCipher, UnlockOptions};
use sprat_store::copy::{self, CopyError, CopyIdentity, CopyLeft, CopyNote, CopySides, CopyStage};
use sprat_store::{Access, FileName, Store, StoreErrorKind, StoreFile};

use crate::copy::attempt::{Made, Source, Stores, flush_folder, stat_if_there};
use crate::copy::refusals::{of_copy, too_little_space};
use crate::copy::watch::Watch;
use crate::copy::{CopyObserver, CopyPhase, Job, finding, in_use};
use crate::settings::{IdentityPolicy, SessionOptions};
use crate::state::{self, identity, reserved_names};
use crate::volume_process::connection::HeaderBytes;
use crate::{Exit, Failure};

/// Why an earlier run is not continued: only one of the two was to have a new key.
const OTHER_KEY: &str = "an earlier run copied with another key (--new-key was given to one of the two only; a \
                         sheet that it showed opens nothing)";

impl Job<'_> {
    /// Opens the source and judges its header. A source that is older than this machine knows it is
    /// refused: its copy would be taken for the newest state.
    pub(super) fn open_source(
        &mut self,
        store: &dyn Store,
        observer: &mut dyn CopyObserver,
    ) -> Result<Source, Failure> {
        let file = store.open(self.source.name(), Access::ReadOnly)?;
        let options = &self.options.source;
        let header = Header::load(&HeaderBytes(&*file)).map_err(|error| {
            state::header_unreadable(&options.state_dir, &options.target, &options.pins, &error)
        })?;
        match &options.pins {
            IdentityPolicy::Known(pins) => header.check_pins(pins)?,
            IdentityPolicy::Expect(fingerprint) => header.check_fingerprint(fingerprint)?,
            // The copy is believed as much as the source was.
            IdentityPolicy::TrustOnce => {}
        }
        if !matches!(options.pins, IdentityPolicy::Known(_)) {
            header.pins().check_first()?;
        }
        if !options.accept_changed_keys {
            let slots = header.slot_digests();
            state::check_slots(&options.state_dir, &options.target, header.uuid(), &slots)?;
        }
        if !self.compared && !options.accept_older_state {
            self.compare_state(&*file, &header, observer)?;
        }
        // Only now: a comparison that a lost connection ended is made again by the next attempt.
        self.compared = true;
        Ok(Source {
            stat: file.stat()?,
            pins: header.pins(),
            header,
            file,
        })
    }

    /// Compares the state that the source shows with the one that this machine knows.
    fn compare_state(
        &mut self,
        file: &dyn StoreFile,
        header: &Header,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let SessionOptions {
            state_dir, target, ..
        } = &self.options.source;
        if !state::is_known(state_dir, target, header.uuid()) {
            return Ok(());
        }
        let last =
            UnlockOptions::beginning_with(state::opened_last(state_dir, target, header.uuid()));
        let source = HeaderBytes(file);
        let opened = self.options.source_key.as_ref();
        let opened = opened.map(|secret| header.unlock_within(&source, secret, &last));
        let why = match opened {
            Some(Ok((_, key))) => {
                let cipher = Arc::new(SectorCipher::new(&key, header)?);
                let (block, file_bytes) = state::first_block(file, header, &cipher)?;
                self.cipher = Some((header.pins(), cipher));
                return state::refuse_older(state_dir, target, header.uuid(), &block, file_bytes);
            }
            Some(Err(error)) if error.kind() == LuksErrorKind::Read => {
                return Err(Failure::from(&error));
            }
            Some(Err(error)) => error.to_string(),
            None => "no key was given, and none lies in a file of this machine".to_owned(),
        };
        let text = format!(
            "can't tell whether {target} is in the newest state that this machine knows: {why}. The \
             next command that opens the copy or the source says so"
        );
        observer.tell(&text, true);
        Ok(())
    }

    /// A server may answer that it renamed, and not have done it: with `--move` the source would go.
    fn check_named(
        &self,
        store: &dyn Store,
        unfinished: &FileName,
        source: &Source,
    ) -> Result<(), Failure> {
        let named = stat_if_there(store, self.destination.name())?;
        let is_named = named.is_some_and(|stat| stat.len == source.stat.len);
        if is_named && stat_if_there(store, unfinished)?.is_none() {
            return Ok(());
        }
        let to = &self.options.destination.target;
        Err(Failure::new(
            Exit::Damaged,
            format!("the server answered that {to} has its name, and it has not"),
        )
        .with_hint(
            "Nothing was removed. The server there can't be relied on: check its disk and its \
             software",
        ))
    }

    /// Copies to the unfinished name and reads back.
    pub(super) fn make(
        &mut self,
        stores: &Stores,
        source: &Source,
        locked: bool,
        observer: &mut dyn CopyObserver,
    ) -> Result<Made, Failure> {
        let identity = CopyIdentity {
            source: self.options.source.target.identity(),
            destination: self.options.destination.target.identity(),
            uuid: source.pins.uuid.clone(),
            source_bytes: source.stat.len,
            source_modified_s: source.stat.modified_s,
            new_header: self.new_header.as_ref().map(|new| new.digest.clone()),
        };
        let destination = self.unfinished(&*stores.destination, source, identity, observer)?;
        observer.phase(CopyPhase::Mapping);
        let from = &self.options.source;
        let opened = self
            .options
            .source_key
            .as_ref()
            .map(|secret| in_use::Opened {
                header: &source.header,
                secret,
                cipher: self.cipher_of(&source.pins),
                last: state::opened_last(&from.state_dir, &from.target, &source.pins.uuid),
            });
        let (mut map, holes_by) =
            finding::find(from, &*source.file, &source.stat, opened.as_ref(), observer)?;
        if let (Some(map), Some(new)) = (&mut map, &self.new_header) {
            map.add(new.used());
        }
        let as_copied = self.as_copied(&source.file);
        let pins = self.pins_of_copy(source);
        let Some(note) = &mut self.note else {
            unreachable!("it was begun with the unfinished file");
        };
        let sides = CopySides {
            source: Arc::clone(&as_copied),
            destination,
            len: source.stat.len,
            map,
        };
        if let (Some(map), Ok(space)) = (&sides.map, stores.destination.free_space()) {
            let needed = map.data_bytes().saturating_sub(note.copied_bytes());
            if needed > space.available_bytes {
                let needed = CopyLeft::Bytes(needed);
                return Err(too_little_space(needed, space.available_bytes));
            }
        }
        // From here on bytes of ours may be under way to the destination.
        let whole = 0..sides.len;
        self.under_way = true;
        self.destination.lease.record.before_send(&[whole])?;
        let both = [&self.source, &self.destination];
        let mut watch = Watch::new(observer, self.interrupt, both, stores, &self.sleep);
        self.working_since = Some(Instant::now());
        let copied = copy::copy(&sides, note, &mut watch);
        self.moved |= watch.moved;
        let figures = match (copied, watch.failure.take()) {
            // First: whatever else was seen by then came of it, or is seen again.
            (Err(error @ CopyError::Source(_)), _) => {
                // What was sent is answered, on every connection, or this fails.
                self.under_way = sides.destination.flush().is_err();
                return Err(self.failed_copy(&error));
            }
            (_, Some(failure)) => {
                if self.sleep.is_on() {
                    // As above.
                    self.under_way = sides.destination.flush().is_err();
                }
                return Err(failure);
            }
            (Err(error), None) => return Err(self.failed_copy(&error)),
            (Ok(figures), None) => figures,
        };
        self.under_way = false;
        let now = stores.source.stat(self.source.name())?;
        let same = (now.len, now.modified_s) == (source.stat.len, source.stat.modified_s);
        if !same || (!locked && !copy::same_beginning(&*as_copied, note)?) {
            return Err(Failure::failed(format!(
                "{} was written to while it was copied",
                self.options.source.target
            ))
            .with_hint("the copy is begun anew at the next run; see who writes to the source"));
        }
        Ok(Made {
            pins,
            figures,
            holes_by,
        })
    }

    /// The unfinished copy that the note was made with, or a new one with a new note.
    fn unfinished(
        &mut self,
        store: &dyn Store,
        source: &Source,
        identity: CopyIdentity,
        observer: &mut dyn CopyObserver,
    ) -> Result<Arc<dyn StoreFile>, Failure> {
        match self.may_go_on(store, source, &identity)? {
            Ok(file) => return Ok(file),
            Err(Some(why)) => {
                observer.tell(
                    &format!("{why}, so the copy is begun anew"),
                    why == OTHER_KEY,
                );
            }
            Err(None) => {}
        }
        (self.resumed_bytes, self.named) = (0, false);
        // Nobody's note is about them any more, as we hold the lock, or will find its file gone.
        // What an older copy may have under way goes into a file that has no name then.
        for name in store.list()? {
            if reserved_names::is_unfinished_copy(&name, self.destination.name()) {
                store.remove_if_there(&name)?;
            }
        }
        let note = CopyNote::begin(&self.note_path(), identity).map_err(|error| of_copy(&error))?;
        let name = self.unfinished_name(&note)?;
        let note = self.note.insert(note);
        let file = store.create_new(&name)?;
        file.resize(note.identity().source_bytes)?;
        Ok(file)
    }

    /// The file to go on with, or why there is none; no reason is needed where nothing had begun.
    fn may_go_on(
        &mut self,
        store: &dyn Store,
        source: &Source,
        identity: &CopyIdentity,
    ) -> Result<Result<Arc<dyn StoreFile>, Option<&'static str>>, Failure> {
        let Some(note) = &self.note else {
            return Ok(Err(None));
        };
        let same = *note.identity() == *identity
            && match copy::same_beginning(&*self.as_copied(&source.file), note) {
                Ok(same) => same,
                Err(error) => return Err(self.failed_copy(&CopyError::Source(error))),
            };
        if !same {
            let why = match note.identity().new_header == identity.new_header {
                true => "the source has changed",
                false => OTHER_KEY,
            };
            return Ok(Err(Some(why)));
        }
        let name = self.unfinished_name(note)?;
        let there = stat_if_there(store, &name)?;
        if there.is_none_or(|stat| stat.len != identity.source_bytes) {
            return Ok(Err(Some("what had been copied is gone")));
        }
        self.resumed_bytes = self.resumed_bytes.max(note.copied_bytes());
        Ok(Ok(store.open(&name, Access::ReadWrite)?))
    }

    /// Gives the copy its name, durably.
    pub(super) fn publish(
        &mut self,
        stores: &Stores,
        source: &Source,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        observer.phase(CopyPhase::Publishing);
        let store = &*stores.destination;
        self.destination.wait_for_quiet(observer, self.interrupt)?;
        let Some(note) = &self.note else {
            unreachable!("it was begun with the unfinished file");
        };
        let unfinished = self.unfinished_name(note)?;
        let file = store.open(&unfinished, Access::ReadOnly)?;
        let pins = self.pins_of_copy(source);
        Header::load(&HeaderBytes(&*file))?.check_pins(&pins)?;
        self.destination.lease.still_ours(store)?;
        self.source.lease.still_ours(&*stores.source)?;
        self.interrupt.check()?;
        // Nothing has that name, so what is known of that place is of a file that is gone.
        if let Err(error) = self.paths(&self.options.destination, &pins).make_way() {
            observer.tell(
                &format!(
                    "what this machine knew of an earlier {} may be taken for the copy's: {error}",
                    self.options.destination.target
                ),
                true,
            );
        }
        self.prove_new_key(&*file, source, observer)?;
        drop(file);
        // Both before the name is given: whoever opens the copy next, after a kill just now, finds
        // its pins and no suspects. All of it was read back, and the server's old processes are gone.
        let state_dir = &self.destination.options.state_dir;
        identity::store(state_dir, &self.options.destination.target, &pins)?;
        self.destination.lease.record.all_resolved()?;
        self.under_way = true;
        match store.rename_new(&unfinished, self.destination.name()) {
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                self.put_pins_back()?;
                return Err(self.last_word(self.exists_already()));
            }
            other => other?,
        }
        if let Err(failure) = self.check_named(store, &unfinished, source) {
            self.put_pins_back()?;
            return Err(failure);
        }
        (self.named, self.under_way) = (true, false);
        flush_folder(store, observer)?;
        self.mark(CopyStage::Published)
    }

    /// Somebody else's file has the name: what was known of it before is known again.
    fn put_pins_back(&self) -> Result<(), Failure> {
        let target = &self.options.destination.target;
        let state_dir = &self.destination.options.state_dir;
        match &self.options.destination.pins {
            IdentityPolicy::Known(pins) => identity::store(state_dir, target, pins),
            IdentityPolicy::Expect(_) | IdentityPolicy::TrustOnce => {
                identity::forget(state_dir, target)
            }
        }
    }

    pub(super) fn mark(&mut self, stage: CopyStage) -> Result<(), Failure> {
        if let Some(note) = &mut self.note {
            let marked = note.mark(stage);
            marked.map_err(|error| of_copy(&error))?;
        }
        Ok(())
    }
}
