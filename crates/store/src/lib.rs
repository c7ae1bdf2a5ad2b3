//! Reads and writes the bytes of one remote file, and looks after the folder it lies in.
//!
//! Above: `volume` (block path) and the session in `cli` (header, lock, set-up).
//! Below: the local file system, or the system's `ssh` talking SFTP to a server.
//!
//! Always true:
//! - A transfer is whole or an error; nothing is ever read or written short in silence.
//! - What the server sends is hostile: every length, id and name is checked before use.
//! - Memory is bounded, whatever the server sends or the caller asks.
#![forbid(unsafe_code)]

mod beside;
mod checksum;
pub mod clock;
mod contract;
pub mod copy;
mod error;
mod local;
pub mod lock;
mod lock_error;
mod name;
mod outage;
mod poison;
mod ranges;
mod record;
pub mod sftp;
mod text;
mod token;

pub use contract::{
    Access, Applied, Capabilities, FileStat, FreeSpace, ReadClass, Store, StoreFile,
};
pub use error::{StoreError, StoreErrorKind};
pub use local::LocalStore;
pub use lock::{FirstLook, Lock, OwnerNote};
pub use lock_error::{LockError, LockInfo};
pub use name::{FileName, FileNameError};
pub use outage::Outage;
pub use poison::IgnorePoison;
pub use record::LocalRecord;
pub use sftp::{
    Fence, Puncher, PuncherOptions, SftpOptions, SftpStore, SshTarget, Writers, writers_of,
};
pub use text::hex;
