//! The end of a copy: what has its name already is taken up, and the source of a move removed.

use std::time::Instant;

use sprat_luks::{Header, Pins};
use sprat_store::copy::{self, CopyError, CopyStage};
use sprat_store::{Access, FileName, Store, StoreFile};

use crate::copy::attempt::{Present, Source, Stores, flush_folder, stat_if_there};
use crate::copy::watch::Watch;
use crate::copy::{CopyObserver, CopyPhase, Job};
use crate::settings::{IdentityPolicy, SessionOptions};
use crate::state::paths::StatePaths;
use crate::state::{identity, moved, reserved_names};
use crate::volume_process::connection::{HeaderBytes, record_id};
use crate::volume_process::reserve;
use crate::{Exit, Failure};

/// What a container of LUKS begins with.
const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe";

impl Job<'_> {
    /// A run before gave the copy its name, or was about to note that it had. Others may have put
    /// something else there since, so all of it is read back once more. A session may have died
    /// there: what it sent is waited for, but not settled, as some of it may have arrived where the
    /// copy has holes, which are not read.
    pub(super) fn take_up_published(
        &mut self,
        stores: &Stores,
        there: &Present,
        source: Option<&Source>,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let store = &*stores.destination;
        self.destination.wait_for_quiet(observer, self.interrupt)?;
        let Some(note) = &self.note else {
            return Err(self.last_word(self.exists_already()));
        };
        let (stage, unfinished) = (note.stage(), self.unfinished_name(note)?);
        let file = store.open(self.destination.name(), Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        let whole = file.len()? == note.identity().source_bytes;
        let uuid = match &self.new_header {
            Some(new) => &new.pins.uuid,
            None => &note.identity().uuid,
        };
        if header.uuid() != uuid || !whole {
            // Without a source it may be all that is left: nobody is told to remove it.
            let other = match source {
                Some(_) => self.exists_already(),
                None => self.no_source(there),
            };
            return Err(self.last_word(other));
        }
        if let Some(source) = source
            && !self.is_as_copied(source)?
        {
            return Err(self.last_word(self.older_than_source()));
        }
        // Backups may go on there once the source was about to be removed, and it is gone.
        let over = source.is_none() && stage == CopyStage::Removing;
        if !self.named && !over {
            self.read_back(stores, &*file, observer)?;
        }
        if stage >= CopyStage::Published {
            return Ok(());
        }
        // Where a rename is a link and an unlink, the old name may have stayed.
        store.remove_if_there(&unfinished)?;
        flush_folder(store, observer)?;
        self.mark(CopyStage::Published)
    }

    /// Compares what has the copy's name with what was read from the source.
    fn read_back(
        &mut self,
        stores: &Stores,
        file: &dyn StoreFile,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let Some(note) = &mut self.note else {
            unreachable!("there is nothing to be taken up without it");
        };
        let both = [&self.source, &self.destination];
        let mut watch = Watch::new(observer, self.interrupt, both, stores, &self.sleep);
        self.working_since = Some(Instant::now());
        let read = copy::read_back(file, note, &mut watch);
        self.moved |= watch.moved;
        match (read, watch.failure.take()) {
            (_, Some(failure)) => Err(failure),
            (Err(error), None) => Err(self.failed_copy(&error)),
            (Ok(None), None) => Err(self.last_word(self.not_what_was_copied())),
            (Ok(Some(_)), None) => Ok(()),
        }
    }

    /// Whether the source is still what it was when it was copied.
    fn is_as_copied(&mut self, source: &Source) -> Result<bool, Failure> {
        let Some(note) = &self.note else {
            return Ok(false);
        };
        let (identity, now) = (note.identity(), source.file.stat()?);
        let same = now.len == identity.source_bytes
            && now.modified_s == identity.source_modified_s
            && source.pins.uuid == identity.uuid;
        let beginning = copy::same_beginning(&*self.as_copied(&source.file), note);
        match beginning {
            Ok(beginning) => Ok(same && beginning),
            Err(error) => Err(self.failed_copy(&CopyError::Source(error))),
        }
    }

    /// The pins of what has the copy's name, which this run didn't make: compared with all that is
    /// known of it.
    pub(super) fn pins_of_destination(
        &self,
        store: &dyn Store,
        source: Option<&Source>,
    ) -> Result<Pins, Failure> {
        let file = store.open(self.destination.name(), Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        if let Some(new) = &self.new_header {
            header.check_pins(&new.pins)?;
            return Ok(header.pins());
        }
        match (source, &self.options.source.pins) {
            (Some(source), _) => header.check_pins(&source.pins)?,
            (None, IdentityPolicy::Known(pins)) => header.check_pins(pins)?,
            (None, IdentityPolicy::Expect(typed)) => header.check_fingerprint(typed)?,
            (None, IdentityPolicy::TrustOnce) => {}
        }
        match &self.options.destination.pins {
            // With the source's header compared, those of another container are of one that is gone.
            IdentityPolicy::Known(pins) if source.is_none() || pins.uuid == header.uuid() => {
                header.check_pins(pins)?;
            }
            IdentityPolicy::Expect(typed) => header.check_fingerprint(typed)?,
            _ => {}
        }
        Ok(header.pins())
    }

    /// Removes the source, which is what it was when it was copied, and what this machine knew of
    /// it.
    pub(super) fn remove_source(
        &mut self,
        stores: &Stores,
        source: &Source,
        pins: &Pins,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        observer.phase(CopyPhase::Removing);
        let store = &*stores.source;
        if !self.is_as_copied(source)? {
            return Err(self.last_word(self.older_than_source()));
        }
        self.source.lease.still_ours(store)?;
        self.destination.lease.still_ours(&*stores.destination)?;
        self.mark(CopyStage::Removing)?;
        self.removing = true;
        // First: without its container nobody would look for it.
        self.remove_reserve(store)?;
        // Before, too: whatever ends this run, they are found at the new place.
        if let Err(error) = self.hand_over(pins) {
            self.tell_unmoved(&error, observer);
        }
        let aside = self.aside_name()?;
        store.rename_new(self.source.name(), &aside)?;
        let may_remove = flush_folder(store, observer)
            .map_err(Failure::from)
            .and_then(|()| self.may_remove(stores, &aside));
        if let Err(failure) = may_remove {
            return Err(self.put_back(stores, failure));
        }
        store.remove_if_there(&aside)?;
        self.forget_source(stores, pins, observer)
    }

    /// The name under which nobody but this copy looks for the source. A machine that sleeps between
    /// its last look and the removal removes nothing else when it wakes.
    pub(super) fn aside_name(&self) -> Result<FileName, Failure> {
        let Some(note) = &self.note else {
            unreachable!("nothing is removed without it");
        };
        let name = reserved_names::set_aside(self.source.name(), note.token());
        name.map_err(|error| Failure::usage(error.to_string()))
    }

    /// Once more, after the source was set aside: it is what was copied, both leases are ours, and
    /// nobody has put anything in its place.
    fn may_remove(&mut self, stores: &Stores, aside: &FileName) -> Result<(), Failure> {
        let store = &*stores.source;
        self.source.lease.still_ours(store)?;
        self.destination.lease.still_ours(&*stores.destination)?;
        let file = store.open(aside, Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        let now = Source {
            stat: file.stat()?,
            file,
            pins: header.pins(),
            header,
        };
        let unchanged = self.is_as_copied(&now)?;
        if !unchanged || stat_if_there(store, self.source.name())?.is_some() {
            return Err(self.last_word(self.older_than_source()));
        }
        Ok(())
    }

    /// Gives the source its name back; a failure of that is said with the one that led to it.
    fn put_back(&mut self, stores: &Stores, failure: Failure) -> Failure {
        if failure.exit == Exit::Unreachable {
            // The next attempt, or the next run, does that first.
            return failure;
        }
        match self.name_again(&*stores.source) {
            Ok(()) => {
                self.removing = false;
                failure
            }
            Err(error) => {
                let aside = self.aside_name();
                let aside = aside.map_or_else(|_| String::new(), |name| name.to_string());
                let failure = failure.because(error.in_one_line());
                self.last_word(failure.with_more_hint(&format!(
                    "The source lies there under the name {aside}: rename it back by hand"
                )))
            }
        }
    }

    /// A source that was set aside gets its name back.
    pub(super) fn name_again(&self, store: &dyn Store) -> Result<(), Failure> {
        store.rename_new(&self.aside_name()?, self.source.name())?;
        store.try_flush_folder()?;
        Ok(())
    }

    /// Removes the source's reserve, unless a container has that name.
    fn remove_reserve(&self, store: &dyn Store) -> Result<(), Failure> {
        let Ok(name) = reserve::name(self.source.name()) else {
            return Ok(());
        };
        if stat_if_there(store, &name)?.is_none_or(|stat| !stat.regular) {
            return Ok(());
        }
        let (_, beginning) = store.read_small(&name, Access::ReadOnly, LUKS_MAGIC.len())?;
        if beginning != LUKS_MAGIC {
            store.remove_if_there(&name)?;
        }
        Ok(())
    }

    /// Where this machine files what it keeps of one of the two.
    pub(super) fn paths(&self, end: &SessionOptions, pins: &Pins) -> StatePaths {
        StatePaths::new(&end.state_dir, &pins.uuid, &end.target)
    }

    /// Files what this machine keeps of the source as that of the copy, too.
    fn hand_over(&self, pins: &Pins) -> std::io::Result<()> {
        let (from, to) = (
            self.filed_source(pins),
            self.paths(&self.options.destination, pins),
        );
        match &self.new_header {
            // Headers and slots are of the old key; the copy has its own.
            Some(_) => from.link_content_to(&to),
            None => from.link_to(&to),
        }
    }

    /// Where this machine files what it keeps of the source of a copy with these pins.
    fn filed_source(&self, copy: &Pins) -> StatePaths {
        let from = &self.options.source;
        let uuid = self.uuid_of_source(copy);
        StatePaths::new(&from.state_dir, &uuid, &from.target)
    }

    /// The source's UUID, which a copy with a key of its own does not have.
    fn uuid_of_source(&self, copy: &Pins) -> String {
        let note = self.note.as_ref();
        note.map_or_else(|| copy.uuid.clone(), |note| note.identity().uuid.clone())
    }

    fn tell_unmoved(&self, error: &std::io::Error, observer: &mut dyn CopyObserver) {
        observer.tell(
            &format!(
                "kept headers and what `sprat status` shows stay under {}: {error}",
                self.options.source.target
            ),
            true,
        );
    }

    /// Makes the removal of the source durable, and forgets what this machine knew of it.
    pub(super) fn forget_source(
        &mut self,
        stores: &Stores,
        pins: &Pins,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        flush_folder(&*stores.source, observer)?;
        self.source_removed = true;
        let forgotten = self
            .hand_over(pins)
            .and_then(|()| self.filed_source(pins).forget());
        if let Err(error) = forgotten {
            self.tell_unmoved(&error, observer);
        }
        let target = &self.options.source.target;
        identity::forget(&self.source.options.state_dir, target)?;
        let state_dir = &self.options.source.state_dir;
        moved::note(state_dir, target, &self.options.destination.target);
        let uuid = self.uuid_of_source(pins);
        let cache = format!("{uuid}-{}", record_id(&self.options.source.target));
        // Of no use any more, and no harm.
        let _ = std::fs::remove_dir_all(self.source.options.cache_dir.join(cache));
        Ok(())
    }
}
