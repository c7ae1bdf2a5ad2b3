//! Opens, checks and makes LUKS2 headers through libcryptsetup, and encrypts sectors.
//!
//! Above: the session, which fetches the header's bytes and stores the pins.
//! Below: libcryptsetup (all key work) and OpenSSL (AES-XTS, hashes, random numbers). No network,
//! no files but an anonymous one in memory.
//!
//! Always true:
//! - libcryptsetup sees only headers that our own strict parser has accepted.
//! - A volume key leaves [`Header::unlock`] only if it fits the digest in that header; with
//!   [`Header::check_pins`] before it, that is the digest that this machine knows.
//! - `cipher_null`, ECB, integrity, unfinished re-encryption and unknown requirements are refused.
//! - The costs of a header (memory, time, bytes fetched) are bounded, whatever it contains.
//! - Secrets and keys are wiped when dropped and never appear in `Debug` or an error.
//!
//! Secrets are on the heap. The process calls `mlockall` (in `attach`), because safe code can't lock single
//! ranges.
#![forbid(unsafe_code)]

mod allowed_ciphers;
mod backup;
mod change;
mod cipher;
mod copies;
mod digest;
mod error;
mod format;
mod header;
mod header_io;
mod keyslot;
mod luks1;
mod metadata;
mod metadata_json;
mod pins;
mod recovery;
mod reference;
mod secret;
mod text;
mod turn;
mod unlock;

pub use allowed_ciphers::OpenedBy;
pub use backup::HeaderBackup;
pub use cipher::SectorCipher;
pub use copies::{Copies, CopyState};
pub use error::{CopyFault, LuksError, LuksErrorKind};
pub use format::{FormatOptions, NewContainer, SlotKind, format};
pub use header::{Header, Payload, Slot};
pub use header_io::{Extent, HeaderRead, HeaderWrite};
pub use luks1::{AnyHeader, Luks1Header};
pub use pins::Pins;
pub use recovery::{RecoveryKey, RecoveryKeyError};
pub use secret::{Secret, VolumeKey};
pub use turn::Turn;
pub use unlock::UnlockOptions;
