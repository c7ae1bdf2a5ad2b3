//! What a session does about late writes: its own, after it lost the lease, and those of earlier
//! sessions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_store::lock::{LateUntil, PendingComparison};
use sprat_store::{FileName, IgnorePoison, Lock, LockError, Store};

use crate::Failure;
use crate::protocol::messages::{DRAIN_MAX, VolumeReply};
use crate::protocol::reports::Notice;
use crate::volume_process::late::{Replaced, Sent};
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::shutdown::EventSender;

/// The lists beside a container, and the notes in its lease.
pub(crate) type LateRecords = (Vec<FileName>, Vec<PendingComparison>);

impl ContainerLease {
    /// The lists beside the container and the notes in its lease, as this session found them.
    pub(crate) fn late_records(&self) -> LateRecords {
        self.late_records.clone()
    }

    /// Until when a write of an earlier session may arrive. `None`: nothing can arrive, or this
    /// session only reads.
    pub(crate) fn late_until(&self) -> Option<LateUntil> {
        let held = self.lock.read().ignore_poison();
        let until = held.as_ref()?.late_until()?;
        // On a disk of this machine no write outlives the process that sent it.
        (!until.own_only || self.server_outlives_us()).then_some(until)
    }

    /// Whether blocks may be given back to the server. They may not while lists name their content.
    /// After a dead session of this machine, this ends the recording of this session's writes.
    pub(crate) fn may_give_back(&self) -> bool {
        match self.late_until() {
            None => true,
            Some(until) if until.own_only && self.late_records.1.is_empty() => {
                if let Some(sent) = self.sent.get() {
                    sent.end_watch();
                }
                true
            }
            Some(_) => false,
        }
    }

    /// From now on every write is recorded. Called before anything is sent.
    pub(crate) fn notes_sent(&self, sent: Sent) {
        // Only the first value counts.
        let _ = self.sent.set(sent);
    }

    /// Records in the lease that this session's writes must be compared.
    pub(crate) fn record_comparison(&self, until_s: u64) -> Result<(), LockError> {
        let held = self.lock.read().ignore_poison();
        match &*held {
            Some(lock) => lock.record_comparison(&*self.store(), until_s),
            None => Ok(()),
        }
    }

    /// Removes the notes of sessions whose writes were compared for the last time.
    pub(crate) fn drop_comparisons(&self, tokens: &[String]) -> Result<(), LockError> {
        let held = self.lock.read().ignore_poison();
        let Some(lock) = &*held else { return Ok(()) };
        lock.drop_comparisons(tokens);
        lock.confirm(&*self.store())
    }

    /// Leaves the list of this session's writes, if they must be compared and all of them are
    /// durable. Without the list the note stays: it says that nobody can compare.
    pub(crate) fn leave_written_list(&self, events: &EventSender) {
        let held = self.lock.read().ignore_poison();
        let (Some(lock), Some(sent)) = (&*held, self.sent.get()) else {
            return;
        };
        let unresolved = self.unresolved.load(std::sync::atomic::Ordering::SeqCst);
        if unresolved || self.lost().is_some() {
            return;
        }
        let left = match sent.leave_written_list(lock, &*self.store()) {
            Ok(true) => {
                if let Some(late) = lock.late_until() {
                    lock.add_comparison(late.until_s);
                }
                self.end_replaced(lock, &sent.replaced())
            }
            Ok(false) => {
                lock.drop_comparisons(&[lock.token()]);
                Ok(())
            }
            Err(failure) => Err(failure),
        };
        if let Err(failure) = left {
            events.notice(Notice::NotListed {
                reason: failure.in_one_line(),
            });
        }
    }

    /// The list of this session is in place and replaces older ones. Their notes are removed first:
    /// a note without a list would say that nobody can compare.
    fn end_replaced(&self, lock: &Lock, replaced: &Replaced) -> Result<(), Failure> {
        if replaced.tokens.is_empty() {
            return Ok(());
        }
        let store = self.store();
        lock.drop_comparisons(&replaced.tokens);
        lock.confirm(&*store)?;
        for list in &replaced.lists {
            // A list that stays has no effect without its note.
            let _ = store.remove_if_there(list);
        }
        Ok(())
    }

    /// After another session took the lease over. First leaves the list of writes that may have
    /// arrived too late, so that the list is there if this process is killed before the answers
    /// come. Then waits for the answers to what was sent, and reports to the other session that
    /// nothing can arrive any more. False: the lease was not lost to a takeover. If a step fails,
    /// the other session has to wait and to compare.
    pub(super) fn answer_takeover(&self, events: &EventSender) -> bool {
        let held = self.lock.read().ignore_poison();
        let (Some(lock), true) = (&*held, self.lost().is_some()) else {
            return false;
        };
        let Some(store) = self.store_after_loss(lock) else {
            return false;
        };
        if let Some(sent) = self.sent.get() {
            events.reply(&VolumeReply::Draining);
            let leave = || {
                let noted = sent.noted();
                if let Err(failure) = sent.leave_late_list(lock, &*store) {
                    events.notice(Notice::NotListed {
                        reason: failure.in_one_line(),
                    });
                }
                noted
            };
            let listed = leave();
            let until = Instant::now() + DRAIN_MAX;
            while !sent.is_answered() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(50));
            }
            // A thread may have been about to send when the lease was lost.
            if sent.noted() != listed {
                leave();
            }
        }
        let drained = self.sent.get().is_none_or(Sent::is_answered);
        if drained {
            let _ = lock.answer(&*store);
        }
        true
    }

    /// A connection on which the lease can be read, if another session has taken it over.
    pub(crate) fn store_after_loss(&self, lock: &Lock) -> Option<Arc<dyn Store>> {
        let store = self.store();
        let lost = |store: &Arc<dyn Store>| match lock.verify(&**store) {
            Err(LockError::Lost { .. } | LockError::NotKept { .. }) => Some(true),
            Err(LockError::Store { .. }) => None,
            _ => Some(false),
        };
        match lost(&store) {
            Some(true) => Some(store),
            Some(false) => None,
            None => {
                let new = self.connection.connect().ok()?;
                (lost(&new) == Some(true)).then_some(new)
            }
        }
    }
}
