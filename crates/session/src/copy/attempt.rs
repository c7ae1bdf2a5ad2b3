//! One attempt of a copy, over one pair of connections.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;
use std::time::Instant;

use sprat_luks::Pins;
use sprat_store::copy::{CopyNote, CopyProgress, CopyStage};
use sprat_store::{FileName, Store};

use crate::copy::endpoint::{Endpoint, Present, Stores};
use crate::copy::refusals::{self, check_writable};
use crate::copy::sleep::SleepingCopy;
use crate::copy::{CopyObserver, CopyPhase, CopyReport, HolesBy, Job};
use crate::state::journal::journal_id;
use crate::state::{identity, reserved_names};
use crate::{Exit, Failure};

/// A copy that this run made and read back.
pub(super) struct NewCopy {
    pub pins: Pins,
    pub figures: CopyProgress,
    pub holes_by: HolesBy,
}

impl Job<'_> {
    /// Connects, acquires both leases, continues from the note to the end, and releases both
    /// leases.
    pub(super) fn attempt(
        &mut self,
        observer: &mut dyn CopyObserver,
    ) -> Result<CopyReport, Failure> {
        observer.phase(CopyPhase::Opening);
        let stores = self.connect()?;
        self.interrupt.check()?;
        let sleep = Arc::clone(&self.sleep);
        let _at_work = sleep.at_work(&stores);
        let done = self.with_leases(&stores, observer);
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
            let released = self.release_leases(&stores, observer);
            if done.is_ok() {
                if let Err(failure) = released {
                    let why = failure.what;
                    let text = format!(
                        "a lock could not be released ({why}). The next session on this machine \
                         takes it over"
                    );
                    observer.tell(&text, true);
                }
                // This comes last. If the run is killed before, the next run finds that nothing is
                // left to do.
                if let Some(note) = self.note.take() {
                    note.remove().map_err(|error| refusals::of_copy(&error))?;
                    // After the note, which needs the file. Without a note nobody looks for the
                    // file.
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

    /// Releases both leases. Every request that this run sent has been answered. A lease stays if a
    /// session died under it and its writes still matter. If the release fails, the next run on
    /// this host takes the lease over.
    fn release_leases(
        &self,
        stores: &Stores,
        observer: &mut dyn CopyObserver,
    ) -> Result<(), Failure> {
        let mut release = |endpoint: &Endpoint, store: &dyn Store, is_resolved| {
            endpoint.lease.verify(store)?;
            if !endpoint.lease.release(store, is_resolved)? {
                let text = format!(
                    "the lock on {} stays: a session of this machine died while it wrote there. The \
                     next session on this machine recovers its writes and takes over the lock",
                    endpoint.options.target
                );
                observer.tell(&text, true);
            }
            Ok(())
        };
        let there = release(&self.destination, &*stores.destination, self.file_is_ours);
        let here = release(&self.source, &*stores.source, self.source_removed);
        there.and(here)
    }

    /// Ends without another attempt to reconnect. Releases the leases on the endpoints that still
    /// answer, unless a request of this run may still be carried out late there. The source was
    /// only read until its removal was requested.
    pub(super) fn give_up(&mut self) {
        let outlives = |endpoint: &Endpoint| endpoint.connection.outlives_us();
        // If this fails, the next session on this host takes the lease over, as after a kill.
        if !self.removing || !outlives(&self.source) {
            let _ = self.source.give_up(self.source_removed);
        }
        if self.destination.lost_at.is_none() || !outlives(&self.destination) {
            let _ = self.destination.give_up(self.file_is_ours);
        }
    }

    fn with_leases(
        &mut self,
        stores: &Stores,
        observer: &mut dyn CopyObserver,
    ) -> Result<CopyReport, Failure> {
        if self.note.is_none() {
            let note = CopyNote::open(&self.note_path());
            self.note = note.map_err(|error| refusals::of_copy(&error))?;
        }
        let mut there = self.inspect(stores)?;
        check_writable(&self.destination, &*stores.destination)?;
        // A dead session's pending writes went into the file that has the name, if there is one.
        self.file_is_ours = self.named || there.destination.is_none();
        // This refuses before any lease is acquired.
        let near_its_end =
            self.is_near_its_end() && (there.destination.is_some() || !self.has_other_key());
        let may_lack_source = there.destination.is_some() && near_its_end && self.may_lack_source();
        if there.source.is_none() && !there.set_aside && !may_lack_source {
            return Err(self.with_final_hint(self.no_source(&there)));
        }
        if there.destination.is_some() && !near_its_end {
            return Err(self.with_final_hint(self.exists_already()));
        }
        let locked = self.acquire_leases(stores, near_its_end, observer)?;
        self.began = true;
        // Before anything except leases is sent.
        if let Some(listen) = self.listen.take() {
            listen(SleepingCopy::new(&self.sleep));
        }
        if there.set_aside {
            self.restore_name(&*stores.source)?;
            there = self.inspect(stores)?;
        }
        if there.destination.is_some() && self.has_other_key() {
            return Err(self.with_final_hint(self.begun_with_other_key()));
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

    /// Acquires the lease of the destination and, if possible, that of the source. Returns whether
    /// the source has one.
    fn acquire_leases(
        &self,
        stores: &Stores,
        near_its_end: bool,
        observer: &mut dyn CopyObserver,
    ) -> Result<bool, Failure> {
        self.destination
            .lease
            .acquire(&*stores.destination, observer)?;
        let locked = if self.options.remove_source {
            self.source.lease.acquire(&*stores.source, observer)?;
            true
        } else {
            self.source
                .lease
                .acquire_or_check(&*stores.source, observer)?
        };
        if !near_its_end {
            self.source.lease.check_nothing_late(&*stores.source)?;
        }
        if !locked {
            observer.tell(
                "the source can't be locked (full disk, read-only account or no fsync). Make sure that \
                 nobody writes to it until the copy ends",
                true,
            );
        }
        Ok(locked)
    }

    /// The work itself. Both leases are ours.
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
            self.resume_published(stores, there, source.as_ref(), observer)?;
        }
        let pins = match (&made, &source) {
            (Some(made), _) => made.pins.clone(),
            (None, source) => self.pins_of_destination(&*stores.destination, source.as_ref())?,
        };
        // Before the source is removed: the next one who opens the copy must find these pins.
        let state_dir = &self.destination.options.state_dir;
        identity::store(state_dir, &self.options.destination.target, &pins)?;
        if self.options.remove_source {
            match &source {
                Some(source) => self.remove_source(stores, source, &pins, observer)?,
                // The connection was lost before the answer to the removal arrived.
                None if self.removing => self.forget_source(stores, &pins, observer)?,
                // The source's disk may only be unmounted here.
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

    /// The earlier run had `--new-key` and this run has not, or the reverse.
    fn has_other_key(&self) -> bool {
        self.note.as_ref().is_some_and(|note| {
            note.identity().new_header.is_some() != self.options.new_key.is_some()
        })
    }

    /// A move that did not reach the removal is not complete while its source is missing.
    fn may_lack_source(&self) -> bool {
        let stage = self.note.as_ref().map(CopyNote::stage);
        !self.options.remove_source || stage == Some(CopyStage::Removing)
    }

    /// Marks a failure whose own hint is complete: no general hint is added.
    pub(super) fn with_final_hint(&mut self, failure: Failure) -> Failure {
        self.hint_is_final = true;
        failure
    }

    /// The name of the unfinished file that belongs to the note.
    pub(super) fn unfinished_name(&self, note: &CopyNote) -> Result<FileName, Failure> {
        let name = reserved_names::unfinished_copy(self.destination.name(), note.token());
        name.map_err(|error| Failure::usage(error.to_string()))
    }

    pub(super) fn note_path(&self) -> PathBuf {
        let (from, to) = (
            &self.options.source.target,
            &self.options.destination.target,
        );
        let name = format!("{}-{}.note", journal_id(from), journal_id(to));
        self.destination.options.state_dir.join("copies").join(name)
    }
}
