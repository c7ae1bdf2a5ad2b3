//! One attempt of a copy, over one pair of connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::Instant;

use sprat_luks::{Header, Pins};
use sprat_store::copy::{CopyNote, CopyProgress, CopyStage};
use sprat_store::{FileName, FileStat, Store, StoreError, StoreErrorKind, StoreFile};

use crate::copy::refusals::{self, check_writable};
use crate::copy::side::Side;
use crate::copy::sleep::OfCopy;
use crate::copy::{CopyObserver, CopyPhase, CopyReport, HolesBy, Job};
use crate::state::{identity, reserved_names};
use crate::volume_process::connection::record_id;
use crate::{Exit, Failure};

/// Both stores, as they are reached now.
pub(super) struct Stores {
    pub source: Arc<dyn Store>,
    pub destination: Arc<dyn Store>,
}

/// The source, open.
pub(super) struct Source {
    pub file: Arc<dyn StoreFile>,
    pub stat: FileStat,
    pub header: Header,
    pub pins: Pins,
}

/// What lies under the two names.
pub(super) struct Present {
    pub source: Option<FileStat>,
    pub destination: Option<FileStat>,
    /// The source was set aside to be removed, and has no name.
    pub set_aside: bool,
}

/// A copy that was made by this run and read back.
pub(super) struct Made {
    pub pins: Pins,
    pub figures: CopyProgress,
    pub holes_by: HolesBy,
}

impl Job<'_> {
    /// Connects, holds both sides, goes on from the note to the end, and lets both sides go.
    pub(super) fn attempt(
        &mut self,
        observer: &mut dyn CopyObserver,
    ) -> Result<CopyReport, Failure> {
        observer.phase(CopyPhase::Opening);
        let stores = self.connect()?;
        self.interrupt.check()?;
        let sleep = Arc::clone(&self.sleep);
        let _at_work = sleep.at_work(&stores);
        let done = self.lease(&stores, observer);
        let connections_end = done
            .as_ref()
            .is_err_and(|failure| failure.exit == Exit::Unreachable || self.unexplained);
        if connections_end {
            let now = Some(Instant::now());
            self.source.lost_at = now;
            if std::mem::take(&mut self.under_way) {
                self.destination.lost_at = now;
            }
        } else {
            let released = self.let_go(&stores, observer);
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
                    note.remove().map_err(|error| refusals::of_copy(&error))?;
                    // After the note, which needs it; without one nobody looks for it.
                    let _ = std::fs::remove_file(self.header_path());
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

    /// Everything sent is answered, so both locks go; but one under which a session died only where
    /// its bytes are of no account any more. Should that fail, the next run on this host takes the
    /// lock over.
    fn let_go(&self, stores: &Stores, observer: &mut dyn CopyObserver) -> Result<(), Failure> {
        let mut let_go = |side: &Side, store: &dyn Store, settled| {
            side.lease.still_ours(store)?;
            if !side.lease.release(store, settled)? {
                let text = format!(
                    "the lock on {} stays: a session of this machine died while it wrote there, \
                     and only a session can see to what it had under way. The next one on this \
                     machine does",
                    side.options.target
                );
                observer.tell(&text, true);
            }
            Ok(())
        };
        let there = let_go(&self.destination, &*stores.destination, self.file_is_ours);
        let here = let_go(&self.source, &*stores.source, self.source_removed);
        there.and(here)
    }

    /// No line is sought any more: the locks of the sides that still answer are given back, as far
    /// as nothing that was sent can be carried out late under them. The source was only read, as
    /// long as its removal wasn't asked for.
    pub(super) fn give_up(&mut self) {
        let outlives = |side: &Side| side.connection.outlives_us();
        // Where it fails, the next session on this host takes the lock over, as after a kill.
        if !self.removing || !outlives(&self.source) {
            let _ = self.source.give_up(self.source_removed);
        }
        if self.destination.lost_at.is_none() || !outlives(&self.destination) {
            let _ = self.destination.give_up(self.file_is_ours);
        }
    }

    fn lease(
        &mut self,
        stores: &Stores,
        observer: &mut dyn CopyObserver,
    ) -> Result<CopyReport, Failure> {
        if self.note.is_none() {
            let note = CopyNote::open(&self.note_path());
            self.note = note.map_err(|error| refusals::of_copy(&error))?;
        }
        let mut there = self.look(stores)?;
        check_writable(&self.destination, &*stores.destination)?;
        // What a dead session had under way went into what has the name, if anything has.
        self.file_is_ours = self.named || there.destination.is_none();
        // Refused before any lock is taken.
        let near_its_end =
            self.is_near_its_end() && (there.destination.is_some() || !self.has_other_key());
        let may_lack_source = there.destination.is_some() && near_its_end && self.may_lack_source();
        if there.source.is_none() && !there.set_aside && !may_lack_source {
            return Err(self.last_word(self.no_source(&there)));
        }
        if there.destination.is_some() && !near_its_end {
            return Err(self.last_word(self.exists_already()));
        }
        self.destination
            .lease
            .lease(&*stores.destination, observer)?;
        let locked = if self.options.remove_source {
            self.source.lease.lease(&*stores.source, observer)?;
            true
        } else {
            self.source.lease.hold_or_look(&*stores.source, observer)?
        };
        if !near_its_end {
            self.source.lease.check_nothing_late(&*stores.source)?;
        }
        if !locked {
            observer.tell(
                "the source can't be locked (full disk, read-only account or no fsync): nobody may \
                 write to it until this is over",
                true,
            );
        }
        self.began = true;
        // Before anything but leases is sent.
        if let Some(watch) = self.watch_sleep.take() {
            watch(OfCopy::new(&self.sleep));
        }
        if there.set_aside {
            self.name_again(&*stores.source)?;
            there = self.look(stores)?;
        }
        if there.destination.is_some() && self.has_other_key() {
            return Err(self.last_word(self.begun_with_other_key()));
        }
        self.connected_at = Some(Instant::now());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (lease, store) in [
                (&self.source.lease, &stores.source),
                (&self.destination.lease, &stores.destination),
            ] {
                let (lease, store) = (Arc::clone(lease), Arc::clone(store));
                let done = &done;
                let renewing = move || lease.keep_renewing(&*store, done);
                if let Err(error) = Builder::new().spawn_scoped(scope, renewing) {
                    done.store(true, Ordering::SeqCst);
                    return Err(Failure::failed("can't start a thread").caused_by(&error));
                }
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
            Some(_) => Some(self.open_source(&*stores.source, observer)?),
            None => None,
        };
        let is_there = there.destination.is_some();
        self.prepare_new_key(source.as_ref(), is_there, observer)?;
        let mut made = None;
        if there.destination.is_none() {
            let Some(source) = &source else {
                unreachable!("one of the two is there");
            };
            made = Some(self.make(stores, source, locked, observer)?);
            self.publish(stores, source, observer)?;
        } else {
            self.take_up_published(stores, there, source.as_ref(), observer)?;
        }
        let pins = match (&made, &source) {
            (Some(made), _) => made.pins.clone(),
            (None, source) => self.pins_of_destination(&*stores.destination, source.as_ref())?,
        };
        // Before the source goes: whoever opens the copy next must find them.
        let state_dir = &self.destination.options.state_dir;
        identity::store(state_dir, &self.options.destination.target, &pins)?;
        if self.options.remove_source {
            match &source {
                Some(source) => self.remove_source(stores, source, &pins, observer)?,
                // The line was lost about the answer.
                None if self.removing => self.forget_source(stores, &pins, observer)?,
                // Its disk may just not be mounted here.
                None => {}
            }
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
            source_found: source.is_some() || self.source_removed,
        })
    }

    /// The note says that the destination may have its name by now.
    fn is_near_its_end(&self) -> bool {
        self.note.as_ref().is_some_and(|note| {
            note.stage() >= CopyStage::Verified
                && note.identity().source == self.options.source.target.identity()
                && note.identity().destination == self.options.destination.target.identity()
        })
    }

    /// One of `--new-key` and a copy that is near its end without it, or the other way round.
    fn has_other_key(&self) -> bool {
        self.note.as_ref().is_some_and(|note| {
            note.identity().new_header.is_some() != self.options.new_key.is_some()
        })
    }

    /// A move that didn't come to the removal isn't over as long as its source isn't there.
    fn may_lack_source(&self) -> bool {
        let stage = self.note.as_ref().map(CopyNote::stage);
        !self.options.remove_source || stage == Some(CopyStage::Removing)
    }

    /// Marks a failure as one whose own hint says all.
    pub(super) fn last_word(&mut self, failure: Failure) -> Failure {
        self.explained = true;
        failure
    }

    /// The name of the file that the note was begun with, and is about.
    pub(super) fn unfinished_name(&self, note: &CopyNote) -> Result<FileName, Failure> {
        let name = reserved_names::unfinished_copy(self.destination.name(), note.token());
        name.map_err(|error| Failure::usage(error.to_string()))
    }

    pub(super) fn note_path(&self) -> PathBuf {
        let (from, to) = (
            &self.options.source.target,
            &self.options.destination.target,
        );
        let name = format!("{}-{}.note", record_id(from), record_id(to));
        self.destination.options.state_dir.join("copies").join(name)
    }
}

pub(super) fn stat_if_there(
    store: &dyn Store,
    name: &FileName,
) -> Result<Option<FileStat>, StoreError> {
    match store.stat(name) {
        Ok(stat) => Ok(Some(stat)),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn flush_folder(
    store: &dyn Store,
    observer: &mut dyn CopyObserver,
) -> Result<(), StoreError> {
    if !store.try_flush_folder()? {
        observer.tell(
            "this server can't make a rename durable at once; a crash of the server in the next \
             seconds may undo it",
            false,
        );
    }
    Ok(())
}
