//! Makes the copy: writes an unfinished file that only its note names, reads it back, and gives it
//! its name.

use std::sync::Arc;
use std::time::Instant;

use sprat_luks::{Header, LuksErrorKind, SectorCipher, UnlockOptions};
use sprat_store::copy::{
    self, CopyError, CopyIdentity, CopyLeft, CopyNote, CopySides, CopyStage, DataMap,
};
use sprat_store::{Access, FileName, Store, StoreErrorKind, StoreFile};

use crate::connect::HeaderBytes;
use crate::copy::attempt::NewCopy;
use crate::copy::endpoint::{Source, Stores, flush_folder, stat_if_there};
use crate::copy::monitor::Monitor;
use crate::copy::refusals::{of_copy, too_little_space};
use crate::copy::{CopyObserver, CopyPhase, HolesBy, Job, data_map, used_blocks};
use crate::file_system::read_stamp_block;
use crate::settings::{IdentityPolicy, SessionSettings};
use crate::state::{self, identity, reserved_names};
use crate::{Exit, Failure};

/// Why an earlier run is not continued: only one of the two runs had `--new-key`.
const OTHER_KEY: &str = "an earlier run copied with another key (only one of the two runs had \
                         --new-key). Discard the sheet that the earlier run showed: its key opens \
                         nothing";

/// What an earlier run of this copy has left.
enum Earlier {
    /// The file with which this run continues.
    Continues(Arc<dyn StoreFile>),
    /// The copy must be started over, for this reason.
    Outdated(&'static str),
    /// Nothing: no earlier run began.
    Missing,
}

impl Job<'_> {
    /// Opens the source and checks its header. A source that is older than this machine knows it is
    /// refused, because its copy would pass for the newest state.
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
            // The copy is trusted as much as the source was.
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
        // Set only now. If a lost connection ends the comparison, the next attempt repeats it.
        self.compared = true;
        Ok(Source {
            stat: file.stat()?,
            pins: header.pins(),
            header,
            file,
        })
    }

    /// Compares the source's state with the state that this machine knows.
    fn compare_state(
        &mut self,
        file: &dyn StoreFile,
        header: &Header,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let SessionSettings {
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
                let (block, file_bytes) = read_stamp_block(file, header, &cipher)?;
                self.cipher = Some((header.pins(), cipher));
                return state::refuse_older(state_dir, target, header.uuid(), &block, file_bytes);
            }
            Some(Err(error)) if error.kind() == LuksErrorKind::Read => {
                return Err(Failure::from(&error));
            }
            Some(Err(error)) => error.to_string(),
            None => "no key was given, and this machine has no key file".to_owned(),
        };
        let text = format!(
            "can't check whether {target} is in the newest state that this machine knows: {why}. The \
             next command that opens the copy or the source does this check"
        );
        observer.tell(&text, true);
        Ok(())
    }

    /// Checks that the rename took place. If a server only answers that it renamed, `--move` would
    /// remove the source.
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
            format!("the server confirmed the renaming to {to}, but did not do it"),
        )
        .with_hint(
            "nothing was removed. The server is not reliable: check its disk and its software",
        ))
    }

    /// Copies to the unfinished name and reads back.
    pub(super) fn make(
        &mut self,
        stores: &Stores,
        source: &Source,
        locked: bool,
        observer: &mut dyn CopyObserver,
    ) -> Result<NewCopy, Failure> {
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
        let (map, holes_by) = self.map_source(source, observer)?;
        let as_copied = self.as_copied(&source.file);
        let pins = self.pins_of_copy(source);
        let Some(note) = &mut self.note else {
            unreachable!("it was begun with the unfinished file");
        };
        let endpoints = CopySides {
            source: Arc::clone(&as_copied),
            destination,
            len: source.stat.len,
            map,
        };
        if let (Some(map), Ok(space)) = (&endpoints.map, stores.destination.free_space()) {
            let needed = map.data_bytes().saturating_sub(note.copied_bytes());
            if needed > space.available_bytes {
                let needed = CopyLeft::Bytes(needed);
                return Err(too_little_space(needed, space.available_bytes));
            }
        }
        // From here on writes of this run may be pending at the destination.
        let whole = 0..endpoints.len;
        self.under_way = true;
        self.destination.lease.record.before_send(&[whole])?;
        let both = [&self.source, &self.destination];
        let mut monitor = Monitor::new(observer, self.interrupt, both, stores, &self.sleep);
        self.working_since = Some(Instant::now());
        let copied = copy::copy(&endpoints, note, &mut monitor);
        self.moved |= monitor.moved;
        let figures = match (copied, monitor.failure.take()) {
            // This comes first: a failure that was also seen by now is a consequence of it, or will
            // be seen again.
            (Err(error @ CopyError::Source(_)), _) => {
                // If the flush succeeds, every request on every connection has been answered.
                self.under_way = endpoints.destination.flush().is_err();
                return Err(self.failed_copy(&error));
            }
            (_, Some(failure)) => {
                if self.sleep.is_on() {
                    // As above.
                    self.under_way = endpoints.destination.flush().is_err();
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
            .with_hint(
                "the next run starts the copy from the beginning. Find out who writes to the \
                        source",
            ));
        }
        Ok(NewCopy {
            pins,
            figures,
            holes_by,
        })
    }

    /// Where the source holds data, including the new header. `None`: all of it must be read.
    fn map_source(
        &self,
        source: &Source,
        observer: &mut dyn CopyObserver,
    ) -> Result<(Option<DataMap>, HolesBy), Failure> {
        let from = &self.options.source;
        let opened = self
            .options
            .source_key
            .as_ref()
            .map(|secret| used_blocks::UnlockedSource {
                header: &source.header,
                secret,
                cipher: self.cipher_of(&source.pins),
                last: state::opened_last(&from.state_dir, &from.target, &source.pins.uuid),
            });
        let (mut map, holes_by) =
            data_map::find(from, &*source.file, &source.stat, opened.as_ref(), observer)?;
        if let (Some(map), Some(new)) = (&mut map, &self.new_header) {
            map.add(new.used());
        }
        Ok((map, holes_by))
    }

    /// The unfinished copy that belongs to the note, or a new file with a new note.
    fn unfinished(
        &mut self,
        store: &dyn Store,
        source: &Source,
        identity: CopyIdentity,
        observer: &mut dyn CopyObserver,
    ) -> Result<Arc<dyn StoreFile>, Failure> {
        match self.find_earlier(store, source, &identity)? {
            Earlier::Continues(file) => return Ok(file),
            Earlier::Outdated(why) => {
                observer.tell(
                    &format!("{why}, so the copy starts from the beginning"),
                    why == OTHER_KEY,
                );
            }
            Earlier::Missing => {}
        }
        (self.resumed_bytes, self.named) = (0, false);
        // The lease is ours, so no valid note names these files; a run that has one will find its
        // file gone. Pending writes of an older copy go into a file that has no name then.
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

    /// Whether an earlier run can be continued.
    fn find_earlier(
        &mut self,
        store: &dyn Store,
        source: &Source,
        identity: &CopyIdentity,
    ) -> Result<Earlier, Failure> {
        let Some(note) = &self.note else {
            return Ok(Earlier::Missing);
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
            return Ok(Earlier::Outdated(why));
        }
        let name = self.unfinished_name(note)?;
        let there = stat_if_there(store, &name)?;
        if there.is_none_or(|stat| stat.len != identity.source_bytes) {
            return Ok(Earlier::Outdated("the unfinished copy is gone"));
        }
        self.resumed_bytes = self.resumed_bytes.max(note.copied_bytes());
        let file = store.open(&name, Access::ReadWrite)?;
        Ok(Earlier::Continues(file))
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
        self.destination.lease.verify(store)?;
        self.source.lease.verify(&*stores.source)?;
        self.interrupt.check()?;
        // The name is free, so the state that this machine has for it belongs to a file that is
        // gone.
        if let Err(error) = self.paths(&self.options.destination, &pins).make_way() {
            observer.tell(
                &format!(
                    "this machine may apply its notes about an earlier {} to the copy: {error}",
                    self.options.destination.target
                ),
                true,
            );
        }
        self.prove_new_key(&*file, source, observer)?;
        drop(file);
        // Both before the copy gets its name: if this run is killed then, the next one who opens
        // the copy finds its pins and no writes in doubt. All of the copy was read back, and the
        // server's old processes are gone.
        let state_dir = &self.destination.options.state_dir;
        identity::store(state_dir, &self.options.destination.target, &pins)?;
        self.destination.lease.record.all_resolved()?;
        self.under_way = true;
        match store.rename_new(&unfinished, self.destination.name()) {
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                self.restore_pins()?;
                return Err(self.with_final_hint(self.exists_already()));
            }
            other => other?,
        }
        if let Err(failure) = self.check_named(store, &unfinished, source) {
            self.restore_pins()?;
            return Err(failure);
        }
        (self.named, self.under_way) = (true, false);
        flush_folder(store, observer)?;
        self.mark(CopyStage::Published)
    }

    /// Another file has the name. Restores the pins that were known for it.
    fn restore_pins(&self) -> Result<(), Failure> {
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
