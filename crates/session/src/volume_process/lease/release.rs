//! Releases the lease, if nothing that was sent is unresolved.

use std::sync::atomic::Ordering;

use sprat_store::{IgnorePoison, Lock, LockError, Store, StoreError, StoreErrorKind};

use crate::Failure;
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::EventSender;

impl ContainerLease {
    /// Releases the lease. While writes are pending or unresolved the lease stays, so that the next
    /// session recovers them first. Returns true if no lease is left.
    pub(crate) fn release(&self) -> Result<bool, LockError> {
        let mut held = self.lock.write().ignore_poison();
        // Checked under the mutex, so nothing is sent between this check and the end. If the wait
        // for a dead session's writes did not end, it is still due, and the lease tells the next
        // session so.
        let unresolved = self.unresolved.load(Ordering::SeqCst) || self.record.owes_quiet();
        if unresolved {
            self.record_answered();
            return Ok(false);
        }
        if self.lost().is_some() {
            // A session that took over from a change of keys, or from a session that sent nothing,
            // need not wait. A session that recorded what it sent leaves its list first, and
            // answers then.
            if self.sent.get().is_none()
                && let Some(lock) = held.take()
            {
                drop(held);
                if let Some(store) = self.store_after_loss(&lock) {
                    let _ = lock.answer(&*store);
                }
            }
            return Ok(false);
        }
        if let Some(lock) = held.take() {
            drop(held);
            self.record.all_resolved()?;
            let alone = self.write_free(lock, &*self.store())?;
            self.store().note_end(&self.file_name);
            self.released_alone.store(alone, Ordering::SeqCst);
        }
        Ok(true)
    }

    /// A session that ends with unresolved writes, for example because the server's disk is full, may have got
    /// the answer to each: then nothing can arrive late, and the next session need not wait. Called while
    /// nothing can be sent.
    fn record_answered(&self) {
        let Some(sent) = self.sent.get() else { return };
        // As many were allowed as were sent: no thread is about to send one, and there were no requests
        // of another kind, whose answers are not counted.
        let all_sent = sent.noted() == self.allowed.load(Ordering::SeqCst);
        if all_sent && sent.is_answered() && !self.record.owes_quiet() {
            // Without the entry the next session waits.
            let _ = self.record.quiet();
        }
    }

    /// Opens the lease ahead, for a [`release`](Self::release) in one round trip.
    pub(crate) fn prepare_release(&self) {
        if let Some(lock) = &*self.lock.read().ignore_poison() {
            lock.prepare_release(&*self.store());
        }
    }

    /// Whether the lease was released, and no other session acquired the container before that.
    pub(crate) fn was_released_alone(&self) -> bool {
        self.released_alone.load(Ordering::SeqCst)
    }

    /// Releases the lease after `last`. Nothing is sent before `last` any more, and nothing that
    /// was sent matters after it.
    pub(crate) fn release_after(
        &self,
        last: impl FnOnce(&dyn Store) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let store = self.store();
        let lock = {
            let mut held = self.lock.write().ignore_poison();
            held.take()
        };
        last(&*store)?;
        self.all_resolved()?;
        if let Some(lock) = lock {
            self.write_free(lock, &*store)?;
            store.note_end(&self.file_name);
        }
        Ok(())
    }

    /// Releases the lease that was taken out of this one. If it turns out to be lost, or that is
    /// not known, it is put back: the late-write list and the answer are still due.
    fn write_free(&self, lock: Lock, store: &dyn Store) -> Result<bool, LockError> {
        let released = match lock.write_free(store) {
            Err(LockError::Store { source, .. }) => self.write_free_again(&lock, store, &source),
            released => released,
        };
        if let Err(error) = &released {
            if matches!(error, LockError::Lost { .. }) {
                // First, so that nothing can be sent once the lease is back.
                self.lose(Failure::from(error));
            }
            *self.lock.write().ignore_poison() = Some(lock);
        }
        released
    }

    /// "Free" was not answered, and so neither was the check behind it. All that was sent was
    /// answered before, so a new connection can do both. `source`: why not.
    fn write_free_again(
        &self,
        lock: &Lock,
        store: &dyn Store,
        source: &StoreError,
    ) -> Result<bool, LockError> {
        let new = match source.kind() {
            StoreErrorKind::Disconnected => Some(self.connection.connect().map_err(|source| {
                let container = self.container.clone();
                LockError::Store {
                    op: "release",
                    container,
                    source,
                }
            })?),
            _ => None,
        };
        let store = new.as_deref().unwrap_or(store);
        match lock.write_free(store) {
            Err(LockError::Store { source, .. }) => {
                lock.check_after_session(store)?;
                let mut left = self.left_locked.lock().ignore_poison();
                *left = Some(source.to_string());
                Ok(false)
            }
            released => released,
        }
    }

    /// Why the released lease still says that a session has it. The next session of this machine
    /// takes it over.
    pub(crate) fn left_locked(&self) -> Option<String> {
        self.left_locked.lock().ignore_poison().clone()
    }

    /// Ends the lease of a session that failed. A lease that is lost, also one that only its
    /// release finds lost, gets the late-write list and the answer. Returns whether no lease is
    /// left.
    pub(crate) fn give_up(&self, events: &EventSender) -> bool {
        if !self.answer_takeover(events) {
            self.leave_written_list(events);
        }
        match self.release() {
            Ok(released) => released,
            Err(_) => {
                self.answer_takeover(events);
                false
            }
        }
    }
}
