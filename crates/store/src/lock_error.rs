//! What can go wrong with a lock, and what is known of the lock that is in the way.

use std::path::PathBuf;
use std::{fmt, io};

use crate::{FileName, StoreError};

/// What the highest lock file of a container says. Everything in it is the server's word; texts
/// are escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockInfo {
    /// The number in the lock file's name.
    pub number: u64,
    /// The lock file.
    pub file: FileName,
    /// Random hex; `None` where the file is empty or not readable as a lock.
    pub token: Option<String>,
    /// The random id of the host that took it.
    pub host: String,
    /// sprat's version there.
    pub version: String,
    /// When it was taken, seconds since the epoch by the owner's clock.
    pub started_s: u64,
    /// How often it was renewed.
    pub renewed: u64,
    /// Last change of the file by the server's clock, seconds since the epoch.
    pub modified_s: Option<u64>,
    /// Its session gave it back.
    pub free: bool,
    /// Earlier leases from which something may arrive, nobody knows until when.
    pub waits_for: Vec<u64>,
}

impl fmt::Display for LockInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.token.is_none() {
            return write!(f, " (which says nothing of its owner)");
        }
        if self.free {
            return write!(f, " of host {}, given back", self.host);
        }
        write!(f, " of host {}, renewed {} times", self.host, self.renewed)
    }
}

/// A lock could not be taken, kept or broken.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum LockError {
    /// A living process on this host has the container open.
    #[error("another process on this host has container {container_id} open")]
    HeldHere { container_id: String },
    /// Another session holds the lock, or one that can't be shown to be dead.
    #[error("container {container} is locked by {info}")]
    HeldElsewhere {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// The container was taken over from a session that may still write to it.
    #[error(
        "container {container} was taken over, and an earlier session may still write to it: {info}"
    )]
    Waiting {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// The server does not list a file that was made and is there.
    #[error("the server does not list {file}, which was just made: it can't keep a lease")]
    Unlisted { file: FileName },
    /// A lease of ours does not hold what was written there, by nobody else's doing: nobody but its
    /// maker writes into a lease. Nothing may be sent any more; `unused`: nothing was sent under it.
    #[error(
        "the server does not keep what is written to the lock on container {container}: {reason}"
    )]
    NotKept {
        container: FileName,
        reason: String,
        unused: bool,
    },
    /// The lock is no longer ours; nothing may be sent any more.
    #[error("the lock on container {container} was lost: {reason}")]
    Lost { container: FileName, reason: String },
    /// Another session took the lock while this one, which only reads and so has none, had it open.
    #[error("another session locked container {container} while this one was reading it: {info}")]
    TakenMeanwhile {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// Another session wrote while this one, which only reads and so has no lock, had it open.
    #[error("another session wrote to container {container} while this one was reading it")]
    Disturbed { container: FileName },
    /// The lock was renewed while it was watched: its owner lives.
    #[error("the lock on container {container} was renewed while watched, its owner lives: {info}")]
    Renewed {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// A name that no lock or record can be about.
    #[error("{op}: {reason}")]
    Invalid { op: &'static str, reason: String },
    /// The local record could not be read or written.
    #[error("{op} local record {}", path.display())]
    Record {
        op: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The store failed.
    #[error("{op} the lock on container {container}")]
    Store {
        op: &'static str,
        container: FileName,
        #[source]
        source: StoreError,
    },
}
