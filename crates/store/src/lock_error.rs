//! Errors of a lock, and what is known about the lock that is in the way.

use std::path::PathBuf;
use std::{fmt, io};

use crate::{FileName, StoreError};

/// The content of a container's highest lease file. All of it was sent by the server; texts are
/// escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockInfo {
    /// The number in the lock file's name.
    pub number: u64,
    /// The lock file.
    pub file: FileName,
    /// Random hex; `None` if the file is empty or not readable as a lease.
    pub token: Option<String>,
    /// The random id of the host that acquired it.
    pub host: String,
    /// The version of sprat on that host.
    pub version: String,
    /// When it was acquired, in seconds since the epoch, by the owner's clock.
    pub started_s: u64,
    /// How often it was renewed.
    pub renewed: u64,
    /// Last change of the file by the server's clock, seconds since the epoch.
    pub modified_s: Option<u64>,
    /// Its session released it.
    pub free: bool,
    /// Open predecessors: earlier leases whose writes may arrive, with no known end.
    pub waits_for: Vec<u64>,
}

impl fmt::Display for LockInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        if self.token.is_none() {
            return write!(f, " (owner unknown)");
        }
        if self.free {
            return write!(f, " of host {}, released", self.host);
        }
        write!(f, " of host {}, renewed {} times", self.host, self.renewed)
    }
}

/// A lock could not be acquired, kept or broken.
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
    /// Another session has the lock, or had it and is not known to be dead.
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
    /// The server does not list a file that exists and was just created.
    #[error("the server does not list {file}, which was just created, so it can't keep a lease")]
    Unlisted { file: FileName },
    /// A lease of ours does not contain what was written there. Nothing but its creator writes into
    /// a lease, so the server is at fault. Nothing may be sent any more. `unused`: nothing was sent
    /// under it.
    #[error("the server changed the lock file of container {container}: {reason}")]
    NotKept {
        container: FileName,
        reason: String,
        unused: bool,
    },
    /// The lock is no longer ours; nothing may be sent any more.
    #[error("the lock on container {container} was lost: {reason}")]
    Lost { container: FileName, reason: String },
    /// Another session acquired the lock while this read-only one, which has no lock, had the
    /// container open.
    #[error("another session locked container {container} while this one was reading it: {info}")]
    TakenMeanwhile {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// Another session wrote while this read-only one, which has no lock, had the container open.
    #[error("another session wrote to container {container} while this one was reading it")]
    Disturbed { container: FileName },
    /// The lock was renewed while it was watched: its owner is alive.
    #[error("the lock on container {container} was just renewed, so its owner is alive: {info}")]
    Renewed {
        container: FileName,
        info: Box<LockInfo>,
    },
    /// A name that no lock or journal can have.
    #[error("{op}: {reason}")]
    Invalid { op: &'static str, reason: String },
    /// The write journal could not be read or written.
    #[error("{op} write journal {}", path.display())]
    Journal {
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
