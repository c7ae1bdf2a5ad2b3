//! Reads and writes the bytes of one remote file, and manages the folder it is in.
//!
//! Above: `volume` (block path) and `session` (header, lock, set-up). Below: the local
//! file system, or the system's `ssh` with SFTP to a server.
//!
//! Always true:
//! - A transfer is complete or an error; no read or write is ever silently short.
//! - What the server sends is hostile: every length, id and name is checked before use.
//! - Memory is bounded, whatever the server sends or the caller asks for.
#![forbid(unsafe_code)]

mod checksum;
pub mod clock;
mod contract;
pub mod copy;
mod error;
mod join;
mod local;
pub mod lock;
mod lock_error;
mod name;
mod outage;
mod poison;
mod ranges;

pub mod sftp;
mod text;
mod token;
mod write_journal;

pub use contract::{
    Access, Applied, Capabilities, FileStat, FreeSpace, OpenedAndRead, PastState, Question,
    ReadClass, Store, StoreFile, WriteGuard,
};
pub use error::{StoreError, StoreErrorKind};
pub use local::LocalStore;
pub use lock::{LeaseCheck, Lock, OwnerNote};
pub use lock_error::{LockError, LockInfo};
pub use name::{FileName, FileNameError};
pub use outage::Outage;
pub use poison::IgnorePoison;

pub use sftp::{
    Fence, Puncher, PuncherOptions, SftpOptions, SftpStore, SshTarget, Writers, unattended,
    writers_of,
};
pub use text::hex;
pub use write_journal::WriteJournal;
