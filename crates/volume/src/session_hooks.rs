//! What the volume needs from the session above it: the lock, the write journal, a new connection.

use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use sprat_store::{StoreError, StoreFile, WriteGuard};

/// A cause passed through from the session.
pub type Cause = Box<dyn Error + Send + Sync>;

/// The session must not send now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fenced {
    /// Another session has the lock, or the write journal can't be written: nothing more is ever
    /// sent.
    #[error("this session no longer has the lock")]
    Lost(#[source] Cause),
    /// The connection was lost during the check. The volume reconnects and checks again.
    #[error("connection lost while checking the lock")]
    Disconnected(#[source] StoreError),
}

/// No new connection could be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconnectError {
    /// Another attempt may succeed.
    #[error("can't reconnect yet")]
    Retry(#[source] StoreError),
    /// No other attempt can succeed: another container, other pins, the lock lost, the login
    /// refused.
    #[error("reconnecting is not safe or not possible")]
    GiveUp(#[source] Cause),
}

/// The session that a volume belongs to. Every method may block. The volume calls them from its own
/// threads, never while it holds one of its mutexes.
pub trait SessionHooks: Send + Sync {
    /// Checks that the lock is still ours. Called before the first byte of each epoch is sent, and
    /// again after each reconnect. A recent check may count, if it leaves the epoch time to be sent:
    /// [`SessionHooks::before_send`] and [`SessionHooks::may_send`] limit its age.
    fn before_epoch(&self) -> Result<(), Fenced>;

    /// Checks it now, however recent the last check is.
    fn check_lock_now(&self) -> Result<(), Fenced> {
        self.before_epoch()
    }

    /// Records byte ranges of the container file that are about to be written. Called by several
    /// threads at once, and again for ranges that are sent again.
    fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), Fenced>;

    /// Whether a write that [`SessionHooks::before_send`] allowed may still enter the connection. It
    /// may have waited for long. Must not block.
    fn may_send(&self) -> bool {
        true
    }

    /// Checks the lock again, for a write that may not be sent without. `checks`: how often this
    /// succeeded for the write, and each time took too long.
    fn check_to_send(&self, _checks: u32) -> Result<(), Fenced> {
        Ok(())
    }

    /// These bytes are sent to `offset` of the container file now, after
    /// [`SessionHooks::before_send`] allowed it. Returns a number for [`SessionHooks::answered`].
    fn sends(&self, _offset: u64, _bytes: &[u8]) -> u64 {
        0
    }

    /// The write with this number was answered: it succeeded, or the store refused it. A write that is never
    /// answered may arrive late.
    fn answered(&self, _number: u64) {}

    /// Every range recorded so far is answered and durable, and no old process of the server can
    /// overwrite it. Called after an epoch's flush, while nothing else is under way, and at close.
    fn resolved(&self);

    /// These ranges are answered and durable, nothing newer for them was sent, and no old process
    /// of the server can overwrite them. Other ranges may be under way. The fewer ranges stay
    /// recorded, the less the next session must recover after a crash.
    fn resolved_in_part(&self, ranges: &[Range<u64>]);

    /// Opens the file again, after it has checked identity, pins and lock. `attempt` counts from 0
    /// since the connection was lost. The volume waits between attempts.
    fn reconnect(&self, attempt: u32) -> Result<Arc<dyn StoreFile>, ReconnectError>;

    /// Progress of a recovery: `_done` of `_whole` in-doubt bytes are read and being written again.
    /// Called while the volume is opened.
    fn recovering(&self, _done: u64, _whole: u64) {}

    /// Whether the server's processes of all earlier connections are known to have exited, so that
    /// nothing can arrive late. Asked after each reconnect, and at open if writes are in doubt.
    fn old_server_dead(&self) -> bool {
        false
    }
}

/// Has the file ask the session before it sends a write that waited.
pub(crate) fn guard_writes(file: &dyn StoreFile, session: &Arc<dyn SessionHooks>) {
    file.guard_writes(Arc::new(SendGuard(Arc::clone(session))));
}

struct SendGuard(Arc<dyn SessionHooks>);

impl WriteGuard for SendGuard {
    fn may_send(&self) -> bool {
        self.0.may_send()
    }

    fn check_again(&self, checks: u32) -> Result<(), StoreError> {
        self.0.check_to_send(checks).map_err(|fenced| match fenced {
            Fenced::Disconnected(source) => source,
            Fenced::Lost(cause) => StoreError::Withheld {
                op: "write",
                object: "the container".to_owned(),
                reason: cause.to_string(),
            },
        })
    }
}
