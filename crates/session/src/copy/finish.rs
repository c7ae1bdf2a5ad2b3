//! The end of a copy: verifies a copy that has its name already, and removes the source of a move.

use std::time::Instant;

use sprat_luks::{Header, Pins};
use sprat_store::copy::{self, CopyError, CopyStage};
use sprat_store::{Access, FileName, Store, StoreFile};

use crate::connect::HeaderBytes;
use crate::copy::endpoint::{Present, Source, Stores, flush_folder, stat_if_there};
use crate::copy::monitor::Monitor;
use crate::copy::{CopyObserver, CopyPhase, Job};
use crate::settings::{IdentityPolicy, SessionSettings};
use crate::state::journal::journal_id;
use crate::state::paths::StatePaths;
use crate::state::{identity, moved, reserved_names};
use crate::volume_process::reserve;
use crate::{Exit, Failure};

/// The first bytes of a LUKS container.
const LUKS_MAGIC: &[u8] = b"LUKS\xba\xbe";

impl Job<'_> {
    /// Continues with a copy that has its name. An earlier run gave it the name, or was about to
    /// note that it had. Since then another program may have put another file there, so all of it
    /// is read back again. A session may have died on it. Its pending writes are waited for, but
    /// they stay in doubt: some may have landed in holes of the copy, which are not read.
    pub(super) fn resume_published(
        &mut self,
        stores: &Stores,
        there: &Present,
        source: Option<&Source>,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let store = &*stores.destination;
        self.destination.wait_for_quiet(observer, self.interrupt)?;
        let Some(note) = &self.note else {
            return Err(self.with_final_hint(self.exists_already()));
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
            // Without a source the file may be the only copy. No hint may suggest to remove it.
            let other = match source {
                Some(_) => self.exists_already(),
                None => self.no_source(there),
            };
            return Err(self.with_final_hint(other));
        }
        if let Some(source) = source
            && !self.is_as_copied(source)?
        {
            return Err(self.with_final_hint(self.older_than_source()));
        }
        // The source was about to be removed, and is gone now. Backups may already go to the copy,
        // so it may differ.
        let over = source.is_none() && stage == CopyStage::Removing;
        if !self.named && !over {
            self.read_back(stores, &*file, observer)?;
        }
        if stage >= CopyStage::Published {
            return Ok(());
        }
        // On some servers a rename is a link and an unlink. Then the old name may still be there.
        store.remove_if_there(&unfinished)?;
        flush_folder(store, observer)?;
        self.mark(CopyStage::Published)
    }

    /// Compares the file that has the copy's name with what was read from the source.
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
        let mut monitor = Monitor::new(observer, self.interrupt, both, stores, &self.sleep);
        self.working_since = Some(Instant::now());
        let read = copy::read_back(file, note, &mut monitor);
        self.moved |= monitor.moved;
        match (read, monitor.failure.take()) {
            (_, Some(failure)) => Err(failure),
            (Err(error), None) => Err(self.failed_copy(&error)),
            (Ok(None), None) => Err(self.with_final_hint(self.not_what_was_copied())),
            (Ok(Some(_)), None) => Ok(()),
        }
    }

    /// Whether the source is unchanged since it was copied.
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

    /// The pins of the file that has the copy's name. This run did not make that file, so it is
    /// compared with everything that is known of it.
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
            // The source's header was compared. So pins of another container belong to a file that
            // is gone.
            IdentityPolicy::Known(pins) if source.is_none() || pins.uuid == header.uuid() => {
                header.check_pins(pins)?;
            }
            IdentityPolicy::Expect(typed) => header.check_fingerprint(typed)?,
            _ => {}
        }
        Ok(header.pins())
    }

    /// Removes the source and this machine's state about it. The source must be unchanged since it
    /// was copied.
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
            return Err(self.with_final_hint(self.older_than_source()));
        }
        self.source.lease.verify(store)?;
        self.destination.lease.verify(&*stores.destination)?;
        self.mark(CopyStage::Removing)?;
        self.removing = true;
        // The reserve goes first: without its container nobody would look for it.
        self.remove_reserve(store)?;
        // Also before the removal: if this run ends now, the state is found at the new place.
        if let Err(error) = self.hand_over(pins) {
            self.report_unmoved(&error, observer);
        }
        let aside = self.aside_name()?;
        store.rename_new(self.source.name(), &aside)?;
        let may_remove = flush_folder(store, observer)
            .map_err(Failure::from)
            .and_then(|()| self.may_remove(stores, &aside));
        if let Err(failure) = may_remove {
            return Err(self.undo_set_aside(stores, failure));
        }
        store.remove_if_there(&aside)?;
        self.forget_source(stores, pins, observer)
    }

    /// A name for the source that only this copy uses. If the machine sleeps between its last check
    /// and the removal, it can only remove this file when it woke.
    pub(super) fn aside_name(&self) -> Result<FileName, Failure> {
        let Some(note) = &self.note else {
            unreachable!("nothing is removed without it");
        };
        let name = reserved_names::set_aside(self.source.name(), note.token());
        name.map_err(|error| Failure::usage(error.to_string()))
    }

    /// Checks again, after the source was set aside: the file is what was copied, both leases are
    /// ours, and nobody has put another file in its place.
    fn may_remove(&mut self, stores: &Stores, aside: &FileName) -> Result<(), Failure> {
        let store = &*stores.source;
        self.source.lease.verify(store)?;
        self.destination.lease.verify(&*stores.destination)?;
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
            return Err(self.with_final_hint(self.older_than_source()));
        }
        Ok(())
    }

    /// Gives the source its name back. If this fails, the failure that led to it is reported as
    /// well.
    fn undo_set_aside(&mut self, stores: &Stores, failure: Failure) -> Failure {
        if failure.exit == Exit::Unreachable {
            // The next attempt or the next run does that first.
            return failure;
        }
        match self.restore_name(&*stores.source) {
            Ok(()) => {
                self.removing = false;
                failure
            }
            Err(error) => {
                let aside = self.aside_name();
                let aside = aside.map_or_else(|_| String::new(), |name| name.to_string());
                let failure = failure.because(error.in_one_line());
                self.with_final_hint(failure.with_more_hint(&format!(
                    "The source now has the name {aside}: rename this file to its old name"
                )))
            }
        }
    }

    /// Gives a source that was set aside its name back.
    pub(super) fn restore_name(&self, store: &dyn Store) -> Result<(), Failure> {
        store.rename_new(&self.aside_name()?, self.source.name())?;
        store.try_flush_folder()?;
        Ok(())
    }

    /// Removes the source's reserve, unless the file of that name is a container.
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

    /// Where this machine keeps its state about one of the two containers.
    pub(super) fn paths(&self, end: &SessionSettings, pins: &Pins) -> StatePaths {
        StatePaths::new(&end.state_dir, &pins.uuid, &end.target)
    }

    /// Links this machine's state about the source to the copy.
    fn hand_over(&self, pins: &Pins) -> std::io::Result<()> {
        let (from, to) = (
            self.filed_source(pins),
            self.paths(&self.options.destination, pins),
        );
        match &self.new_header {
            // Kept headers and key slots belong to the old key. The copy has its own.
            Some(_) => from.link_content_to(&to),
            None => from.link_to(&to),
        }
    }

    /// Where this machine keeps its state about the source of a copy with these pins.
    fn filed_source(&self, copy: &Pins) -> StatePaths {
        let from = &self.options.source;
        let uuid = self.uuid_of_source(copy);
        StatePaths::new(&from.state_dir, &uuid, &from.target)
    }

    /// The source's UUID. A copy with a key of its own has another one.
    fn uuid_of_source(&self, copy: &Pins) -> String {
        let note = self.note.as_ref();
        note.map_or_else(|| copy.uuid.clone(), |note| note.identity().uuid.clone())
    }

    fn report_unmoved(&self, error: &std::io::Error, observer: &mut dyn CopyObserver) {
        observer.tell(
            &format!(
                "saved headers and the notes for `sprat status` stay under {}: {error}",
                self.options.source.target
            ),
            true,
        );
    }

    /// Makes the removal of the source durable, and removes this machine's state about it.
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
            self.report_unmoved(&error, observer);
        }
        let target = &self.options.source.target;
        identity::forget(&self.source.options.state_dir, target)?;
        let state_dir = &self.options.source.state_dir;
        moved::note(state_dir, target, &self.options.destination.target);
        let uuid = self.uuid_of_source(pins);
        let cache = format!("{uuid}-{}", journal_id(&self.options.source.target));
        // It is useless now. If it stays, it does no harm.
        let _ = std::fs::remove_dir_all(self.source.options.cache_dir.join(cache));
        Ok(())
    }
}
