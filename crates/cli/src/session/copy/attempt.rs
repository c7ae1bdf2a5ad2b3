//! One attempt of a copy, over one pair of connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use sprat_luks::{Header, Pins};
use sprat_store::copy::{
    self, CopyError, CopyIdentity, CopyNote, CopyProgress, CopySides, CopyStage, CopyStep,
    CopyWatch,
};
use sprat_store::{Access, FileName, FileStat, Store, StoreError, StoreErrorKind, StoreFile};

use super::super::options::PinPolicy;
use super::super::volume_process::connection::{HeaderBytes, record_id};
use super::side::Side;
use super::{CopyObserver, CopyPhase, CopyReport, HolesBy, Job, finding};
use crate::interrupt::Interrupt;
use crate::output::text;
use crate::{Exit, Failure, pinned};

/// A destination with less than this is full: the account may need some for its own files.
const FREE_BYTES_MIN: u64 = 16 << 20;

/// Both stores, as they are reached now.
struct Stores {
    source: Arc<dyn Store>,
    destination: Arc<dyn Store>,
}

/// The source, open.
struct Source {
    file: Arc<dyn StoreFile>,
    stat: FileStat,
    pins: Pins,
}

impl Job<'_> {
    /// Connects, holds both sides, goes on from the note to the end, and lets both sides go.
    pub(super) fn attempt(
        &mut self,
        observer: &mut dyn CopyObserver,
    ) -> Result<CopyReport, Failure> {
        observer.phase(CopyPhase::Opening);
        let stores = Stores {
            source: self.source.connect()?,
            destination: self.destination.connect()?,
        };
        self.interrupt.check()?;
        let done = self.hold(&stores, observer);
        if done
            .as_ref()
            .is_err_and(|failure| failure.exit == Exit::Unreachable)
        {
            let now = Some(Instant::now());
            (self.source.lost_at, self.destination.lost_at) = (now, now);
        } else {
            let released = self.let_go(&stores);
            if done.is_ok() {
                if let Err(failure) = released {
                    let why = failure.what;
                    let text = format!(
                        "a lock could not be given back ({why}); the next session on this machine \
                         takes it over"
                    );
                    observer.tell(&text, true);
                }
                // Last: a run that is killed before finds here that nothing is left to be done.
                if let Some(note) = self.note.take() {
                    note.remove().map_err(|error| failure(&error))?;
                }
            }
        }
        done
    }

    /// Whether the last attempt got further than the one before.
    pub(super) fn progressed(&mut self) -> bool {
        let copied = self.note.as_ref().map_or(0, CopyNote::copied_bytes);
        let more = copied > self.resumed_bytes;
        self.resumed_bytes = self.resumed_bytes.max(copied);
        more
    }

    /// What was asked and not answered may still arrive, so its lock stays; everything else goes.
    /// Should that fail, the next run on this host takes the lock over.
    fn let_go(&self, stores: &Stores) -> Result<(), Failure> {
        let (from, to) = (&self.source.held, &self.destination.held);
        let there = to
            .still_ours(&*stores.destination)
            .and_then(|()| to.release(&*stores.destination, true));
        let here = from
            .still_ours(&*stores.source)
            .and_then(|()| from.release(&*stores.source, self.source_removed));
        there.and(here)
    }

    fn hold(
        &mut self,
        stores: &Stores,
        observer: &mut dyn CopyObserver,
    ) -> Result<CopyReport, Failure> {
        if self.note.is_none() {
            let note = CopyNote::open(&self.note_path());
            self.note = note.map_err(|error| failure(&error))?;
        }
        check_writable(&self.destination, &*stores.destination)?;
        let there = Present {
            source: stat_if_there(&*stores.source, self.source.name())?,
            destination: stat_if_there(&*stores.destination, self.destination.name())?,
        };
        // Refused before any lock is taken.
        let near_its_end = self.is_near_its_end();
        if there.source.is_none() && !(there.destination.is_some() && near_its_end) {
            return Err(self.no_source(&there));
        }
        if there.destination.is_some() && !near_its_end {
            return Err(self.exists_already());
        }
        self.destination.held.hold(&*stores.destination, observer)?;
        let locked = if self.options.remove_source {
            self.source.held.hold(&*stores.source, observer)?;
            true
        } else {
            self.source.held.hold_or_look(&*stores.source, observer)?
        };
        if !locked {
            observer.tell(
                "the source can't be locked (full disk or read-only account): nobody may write to \
                 it until this is over",
                true,
            );
        }
        self.began = true;
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (held, store) in [
                (&self.source.held, &stores.source),
                (&self.destination.held, &stores.destination),
            ] {
                let (held, store) = (Arc::clone(held), Arc::clone(store));
                let done = &done;
                scope.spawn(move || held.keep_renewing(&*store, done));
            }
            let report = self.work(stores, &there, locked, observer);
            done.store(true, Ordering::SeqCst);
            report
        })
    }

    /// Under both locks.
    fn work(
        &mut self,
        stores: &Stores,
        there: &Present,
        locked: bool,
        observer: &mut dyn CopyObserver,
    ) -> Result<CopyReport, Failure> {
        self.source.wait_for_quiet(observer, self.interrupt)?;
        let source = match &there.source {
            Some(_) => Some(self.open_source(&*stores.source)?),
            None => None,
        };
        let mut made = None;
        if there.destination.is_none() {
            let Some(source) = &source else {
                unreachable!("one of the two is there");
            };
            made = Some(self.make(stores, source, locked, observer)?);
            self.publish(stores, source, observer)?;
        } else {
            self.take_up_published(stores)?;
        }
        let pins = match (&made, &source) {
            (Some(made), _) => made.pins.clone(),
            (None, _) => self.pins_of_destination(&*stores.destination)?,
        };
        // Before the source goes: whoever opens the copy next must find them.
        let (state_dir, target) = (
            &self.destination.options.state_dir,
            &self.options.destination,
        );
        pinned::store(state_dir, &target.target, &pins)?;
        if self.options.remove_source {
            self.remove_source(stores, source.as_ref(), &pins, observer)?;
        }
        let container_bytes = self
            .note
            .as_ref()
            .map_or(0, |note| note.identity().source_bytes);
        Ok(CopyReport {
            pins,
            container_bytes,
            holes_by: made.as_ref().map_or(HolesBy::Nothing, |made| made.holes_by),
            figures: made.map(|made| made.figures),
            resumed_bytes: self.resumed_bytes,
            source_removed: self.source_removed,
        })
    }

    /// Opens the source and judges its header; no key is needed for that.
    fn open_source(&self, store: &dyn Store) -> Result<Source, Failure> {
        let file = store.open(self.source.name(), Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        match &self.options.source.pins {
            PinPolicy::Known(pins) => header.check_pins(pins)?,
            PinPolicy::Expect(fingerprint) => header.check_fingerprint(fingerprint)?,
            // The copy is believed as much as the source was.
            PinPolicy::TrustOnce => {}
        }
        Ok(Source {
            stat: file.stat()?,
            pins: header.pins(),
            file,
        })
    }

    /// Copies to the unfinished name and reads back.
    fn make(
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
        };
        let destination = self.unfinished(&*stores.destination, source, identity, observer)?;
        observer.phase(CopyPhase::Mapping);
        let (map, holes_by) =
            finding::find(&self.source.options, &*source.file, &source.stat, observer)?;
        let Some(note) = &mut self.note else {
            unreachable!("it was begun with the unfinished file");
        };
        let sides = CopySides {
            source: Arc::clone(&source.file),
            destination,
            len: source.stat.len,
            map,
        };
        if let (Some(map), Ok(space)) = (&sides.map, stores.destination.free_space()) {
            let needed = map.data_bytes().saturating_sub(note.copied_bytes());
            if needed > space.available_bytes {
                return Err(too_little_space(needed, space.available_bytes));
            }
        }
        // From here on bytes of ours may be under way to the destination.
        let whole = 0..sides.len;
        self.destination.held.record.before_send(&[whole])?;
        let mut watch = Watch {
            observer,
            interrupt: self.interrupt,
            sides: [&self.source, &self.destination],
            stores,
            phase: None,
            failure: None,
        };
        let copied = copy::copy(&sides, note, &mut watch);
        let figures = match (copied, watch.failure.take()) {
            (_, Some(failure)) => return Err(failure),
            (Err(CopyError::Stopped), None) => return Err(Failure::interrupted()),
            (Err(error), None) => return Err(failure(&error)),
            (Ok(figures), None) => figures,
        };
        let now = stores.source.stat(self.source.name())?;
        let same = (now.len, now.modified_s) == (source.stat.len, source.stat.modified_s);
        if !same || (!locked && !copy::same_beginning(&*source.file, note)?) {
            return Err(Failure::failed(format!(
                "{} was written to while it was copied",
                self.options.source.target
            ))
            .with_hint("the copy is begun anew at the next run; see who writes to the source"));
        }
        Ok(Made {
            pins: source.pins.clone(),
            figures,
            holes_by,
        })
    }

    /// The unfinished copy, as the note knows it, or a new one with a new note.
    fn unfinished(
        &mut self,
        store: &dyn Store,
        source: &Source,
        identity: CopyIdentity,
        observer: &mut dyn CopyObserver,
    ) -> Result<Arc<dyn StoreFile>, Failure> {
        let name = self.unfinished_name()?;
        if let Some(note) = &self.note
            && *note.identity() == identity
            && copy::same_beginning(&*source.file, note)?
            && stat_if_there(store, &name)?.is_some_and(|stat| stat.len == identity.source_bytes)
        {
            self.resumed_bytes = self.resumed_bytes.max(note.copied_bytes());
            return Ok(store.open(&name, Access::ReadWrite)?);
        }
        if self.note.is_some() {
            observer.tell("the source has changed, so the copy is begun anew", false);
        }
        self.resumed_bytes = 0;
        // What an older copy may have under way goes into a file that has no name any more.
        remove_if_there(store, &name)?;
        let note = CopyNote::begin(&self.note_path(), identity);
        let note = self.note.insert(note.map_err(|error| failure(&error))?);
        let file = store.create_new(&name)?;
        file.resize(note.identity().source_bytes)?;
        Ok(file)
    }

    /// Gives the copy its name, durably.
    fn publish(
        &mut self,
        stores: &Stores,
        source: &Source,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        observer.phase(CopyPhase::Publishing);
        let store = &*stores.destination;
        self.destination.wait_for_quiet(observer, self.interrupt)?;
        let unfinished = self.unfinished_name()?;
        let file = store.open(&unfinished, Access::ReadOnly)?;
        Header::load(&HeaderBytes(&*file))?.check_pins(&source.pins)?;
        drop(file);
        self.destination.held.still_ours(store)?;
        self.source.held.still_ours(&*stores.source)?;
        self.interrupt.check()?;
        match store.rename_new(&unfinished, self.destination.name()) {
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                return Err(self.exists_already());
            }
            other => other?,
        }
        flush_folder(store, observer)?;
        self.mark_published()
    }

    /// A run before gave the copy its name, or was about to note that it had.
    fn take_up_published(&mut self, stores: &Stores) -> Result<(), Failure> {
        let store = &*stores.destination;
        let Some(note) = &self.note else {
            return Err(self.exists_already());
        };
        let file = store.open(self.destination.name(), Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        let whole = file.len()? == note.identity().source_bytes;
        if header.uuid() != note.identity().uuid || !whole {
            return Err(self.exists_already());
        }
        if note.stage() == CopyStage::Published {
            return Ok(());
        }
        if !copy::same_beginning(&*file, note)? {
            return Err(self.exists_already());
        }
        // Where a rename is a link and an unlink, the old name may have stayed.
        remove_if_there(store, &self.unfinished_name()?)?;
        match store.flush_folder() {
            Err(error) if error.kind() != StoreErrorKind::Unsupported => Err(error.into()),
            _ => self.mark_published(),
        }
    }

    fn mark_published(&mut self) -> Result<(), Failure> {
        if let Some(note) = &mut self.note {
            let marked = note.mark(CopyStage::Published);
            marked.map_err(|error| failure(&error))?;
        }
        Ok(())
    }

    fn pins_of_destination(&self, store: &dyn Store) -> Result<Pins, Failure> {
        let file = store.open(self.destination.name(), Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        if let PinPolicy::Known(pins) = &self.options.source.pins {
            header.check_pins(pins)?;
        }
        Ok(header.pins())
    }

    /// Removes the source, which is what it was when it was copied, and what this machine knew of
    /// it.
    fn remove_source(
        &mut self,
        stores: &Stores,
        source: Option<&Source>,
        pins: &Pins,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        observer.phase(CopyPhase::Removing);
        let store = &*stores.source;
        if let (Some(source), Some(note)) = (source, &self.note) {
            let identity = note.identity();
            let same = source.stat.len == identity.source_bytes
                && source.stat.modified_s == identity.source_modified_s
                && source.pins.uuid == identity.uuid
                && copy::same_beginning(&*source.file, note)?;
            if !same {
                return Err(Failure::failed(format!(
                    "{} was written to after it had been copied, so it was not removed",
                    self.options.source.target
                ))
                .with_hint(
                    "the copy is whole, but older than the source. Look at both with `sprat \
                     snapshots`, and remove by hand the one that you don't want",
                ));
            }
            self.source.held.still_ours(store)?;
            self.destination.held.still_ours(&*stores.destination)?;
            remove_if_there(store, self.source.name())?;
        }
        for suffix in [".reserve", ".copying"] {
            if let Ok(name) = self.source.name().with_suffix(suffix) {
                remove_if_there(store, &name)?;
            }
        }
        flush_folder(store, observer)?;
        self.source_removed = true;
        pinned::forget(&self.source.options.state_dir, &self.options.source.target)?;
        let cache = format!("{}-{}", pins.uuid, record_id(&self.options.source.target));
        // Of no use any more, and no harm.
        let _ = std::fs::remove_dir_all(self.source.options.cache_dir.join(cache));
        Ok(())
    }

    /// The note says that the destination may have its name by now.
    fn is_near_its_end(&self) -> bool {
        self.note.as_ref().is_some_and(|note| {
            note.stage() >= CopyStage::Verified
                && note.identity().source == self.options.source.target.identity()
                && note.identity().destination == self.options.destination.target.identity()
        })
    }

    /// Where the destination is there it may be all that is left of a move that had come to its end:
    /// nobody may be told to remove it.
    fn no_source(&self, there: &Present) -> Failure {
        let (from, to) = (
            &self.options.source.target,
            &self.options.destination.target,
        );
        let hint = match there.destination {
            None => "nothing was changed. Check the path".to_owned(),
            Some(_) => format!(
                "nothing was changed. {to} is there: if it was to be moved, that is done. Look at \
                 it with `sprat snapshots`"
            ),
        };
        Failure::new(Exit::NoContainer, format!("there is no container {from}")).with_hint(hint)
    }

    fn exists_already(&self) -> Failure {
        Failure::failed(format!(
            "{} exists already",
            self.options.destination.target
        ))
        .with_hint(
            "copy never overwrites, and nothing was changed. Choose another name, or remove that \
             file yourself if you are sure",
        )
    }

    fn unfinished_name(&self) -> Result<FileName, Failure> {
        let name = self.destination.name().with_suffix(".copying");
        name.map_err(|error| Failure::usage(error.to_string()))
    }

    fn note_path(&self) -> PathBuf {
        let (from, to) = (
            &self.options.source.target,
            &self.options.destination.target,
        );
        let name = format!("{}-{}.note", record_id(from), record_id(to));
        self.destination.options.state_dir.join("copies").join(name)
    }
}

/// What lies under the two names.
struct Present {
    source: Option<FileStat>,
    destination: Option<FileStat>,
}

/// A copy that was made by this run and read back.
struct Made {
    pins: Pins,
    figures: CopyProgress,
    holes_by: HolesBy,
}

/// Watches a copy: progress, interrupt, locks, room.
struct Watch<'a> {
    observer: &'a mut dyn CopyObserver,
    interrupt: &'a Interrupt,
    sides: [&'a Side; 2],
    stores: &'a Stores,
    phase: Option<CopyStep>,
    /// Why the copy was stopped.
    failure: Option<Failure>,
}

impl Watch<'_> {
    fn stop(&mut self, failure: Failure) -> bool {
        self.failure.get_or_insert(failure);
        false
    }
}

impl CopyWatch for Watch<'_> {
    fn progress(&mut self, progress: &CopyProgress) -> bool {
        if self.phase.replace(progress.step) != Some(progress.step) {
            self.observer.phase(match progress.step {
                CopyStep::Copying => CopyPhase::Copying,
                CopyStep::Verifying => CopyPhase::Verifying,
            });
        }
        self.observer.progress(progress);
        if let Some(failure) = self.sides.iter().find_map(|side| side.held.lost()) {
            return self.stop(failure);
        }
        !self.interrupt.requested()
    }

    fn checkpoint(&mut self, remaining_bytes: Option<u64>) -> bool {
        let [from, to] = self.sides;
        let ours = from
            .held
            .still_ours(&*self.stores.source)
            .and_then(|()| to.held.still_ours(&*self.stores.destination));
        if let Err(failure) = ours {
            return self.stop(failure);
        }
        if let Ok(space) = self.stores.destination.free_space() {
            let needed = remaining_bytes.unwrap_or(0);
            if remaining_bytes != Some(0) && space.available_bytes < needed.max(FREE_BYTES_MIN) {
                // What has arrived is noted all the same, and the next piece stops it.
                self.failure
                    .get_or_insert(too_little_space(needed, space.available_bytes));
            }
        }
        true
    }
}

fn too_little_space(needed: u64, available: u64) -> Failure {
    Failure::failed(format!(
        "the destination has {} left and {} are still to be copied",
        text::bytes(available),
        text::bytes(needed.max(1))
    ))
    .with_hint("make room there")
}

/// Refuses a destination that can't make anything durable.
fn check_writable(side: &Side, store: &dyn Store) -> Result<(), Failure> {
    if !store.capabilities().durable_flush && !side.options.allow_no_fsync {
        return Err(Failure::failed(format!(
            "{} can't make data durable: it has no fsync@openssh.com",
            store.describe()
        ))
        .with_hint("nothing was changed. Insist with --insist-without-fsync"));
    }
    match store.free_space() {
        Ok(space) if space.read_only => Err(Failure::failed(format!(
            "{} is on a read-only file system",
            store.describe()
        ))
        .with_hint("nothing was changed")),
        _ => Ok(()),
    }
}

fn stat_if_there(store: &dyn Store, name: &FileName) -> Result<Option<FileStat>, StoreError> {
    match store.stat(name) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn remove_if_there(store: &dyn Store, name: &FileName) -> Result<(), StoreError> {
    match store.remove(name) {
        Err(error) if error.kind() != StoreErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn flush_folder(store: &dyn Store, observer: &mut dyn CopyObserver) -> Result<(), StoreError> {
    match store.flush_folder() {
        Err(error) if error.kind() == StoreErrorKind::Unsupported => {
            observer.tell(
                "this server can't make a rename durable at once; a crash of the server in the \
                 next seconds may undo it",
                false,
            );
            Ok(())
        }
        other => other,
    }
}

/// The failure that a copy's error amounts to.
fn failure(error: &CopyError) -> Failure {
    match error {
        CopyError::Source(source) | CopyError::Destination(source) => {
            Failure::from(source).context(error.to_string())
        }
        CopyError::Differs { .. } => Failure::new(Exit::Damaged, error.to_string()).with_hint(
            "the destination's disk or its way there is faulty: don't keep backups there",
        ),
        CopyError::Stopped => Failure::interrupted(),
        other => {
            let mut failure = Failure::failed(other.to_string());
            if let Some(source) = std::error::Error::source(other) {
                failure = failure.caused_by(source);
            }
            failure
        }
    }
}
