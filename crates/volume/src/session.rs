//! What the volume asks of the session above it: the lock, the local record, a new connection.

use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use sprat_store::{StoreError, StoreFile};

/// A cause handed through from the session.
pub type Cause = Box<dyn Error + Send + Sync>;

/// The session may not send now.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Fenced {
    /// The lock is another's, or the local record can't be kept: nothing more is ever sent.
    #[error("this session no longer holds the container")]
    Lost(#[source] Cause),
    /// The line was lost while asking: the volume reconnects and asks again.
    #[error("connection lost while checking the lock")]
    Disconnected(#[source] StoreError),
}

/// A new connection could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconnectError {
    /// Trying again may help.
    #[error("can't reconnect yet")]
    Retry(#[source] StoreError),
    /// Never: another container, other pins, the lock lost, the login refused.
    #[error("reconnecting is not safe or not possible")]
    GiveUp(#[source] Cause),
}

/// The session that a volume belongs to. Every method may block and is called from the volume's
/// own threads, never while one of its locks is held.
pub trait Session: Send + Sync {
    /// Asks whether the lock is still ours; called before the first byte of each epoch is sent,
    /// and again after each reconnect.
    fn before_epoch(&self) -> Result<(), Fenced>;

    /// Notes byte ranges of the container file that are about to be written; called by several
    /// threads at once, and again for ranges that are sent again.
    fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), Fenced>;

    /// These bytes go to `offset` of the container file now, after [`Session::before_send`] has let
    /// them go. Returns a number for [`Session::answered`].
    fn sends(&self, _offset: u64, _bytes: &[u8]) -> u64 {
        0
    }

    /// The write with this number was answered well. One that never was may arrive late.
    fn answered(&self, _number: u64) {}

    /// Every range noted so far is answered and durable and no old process of the server can
    /// touch it; called after an epoch's flush (while nothing else is under way) and at close.
    fn settled(&self);

    /// These ranges are answered and durable, nothing newer of them was sent, and no old process
    /// of the server can touch them; other ranges may be under way. Keeps what a session that
    /// takes over has to settle little.
    fn settled_in_part(&self, ranges: &[Range<u64>]);

    /// Opens the file again after identity, pins and lock were checked; `attempt` counts from 0
    /// since the connection was lost. The waiting between attempts is the volume's.
    fn reconnect(&self, attempt: u32) -> Result<Arc<dyn StoreFile>, ReconnectError>;

    /// So many bytes of a dead session's suspects are read and on their way back, of `whole`: called
    /// while the volume is opened.
    fn settling(&self, _done: u64, _whole: u64) {}

    /// The server's processes of all earlier connections are known to be gone, so that nothing
    /// written late can arrive. Asked after each reconnect and at open with suspects.
    fn old_server_dead(&self) -> bool {
        false
    }
}
