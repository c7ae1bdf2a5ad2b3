//! Changes a container's keys. The volume process does the work.

use std::path::PathBuf;

use sprat_luks::{Secret, SlotKind};

use crate::interrupt::Interrupt;
use crate::protocol::messages::ChangeStart;
use crate::protocol::reports::{HeaderChanged, Observer};
use crate::settings::{Access, SessionSettings};
use crate::supervisor::{Supervisor, Watch};
use crate::{Exit, Failure};

/// What is to be done with the keys.
#[derive(Debug)]
pub enum HeaderChange {
    /// A further key.
    Add {
        /// The secret of the new key.
        secret: Secret,
        /// Its kind.
        kind: SlotKind,
        /// Worthless key derivation, for tests only.
        fast_kdf_for_tests: bool,
    },
    /// One key less.
    Remove {
        /// The key slot's number.
        slot: u32,
        /// Remove the slot even if the given secret, or this machine's own, opens it.
        although_in_use: bool,
        /// The secret of this machine's backups, if that is another one.
        used_here: Option<Secret>,
    },
    /// A kept header is restored.
    Restore {
        /// The file that it is kept in.
        kept: PathBuf,
        /// The sequence of the header that the user saw. A header with another sequence is refused.
        /// `None`: no header could be read.
        shown: Option<u64>,
    },
}

/// Changes the keys under the container's lock. `secret` opens the present header, or for
/// [`HeaderChange::Restore`] the kept one.
///
/// Whatever ends it, the container opens with the old keys or with the new ones. The same call again
/// continues where it stopped.
pub fn change_header(
    mut settings: SessionSettings,
    secret: &Secret,
    change: &HeaderChange,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<HeaderChanged, Failure> {
    settings.access = Access::ReadWrite;
    // Nothing of the volume is read here.
    settings.cache_bytes_max = 0;
    let mut secrets = vec![secret];
    let start = match change {
        HeaderChange::Add {
            secret,
            kind,
            fast_kdf_for_tests,
        } => {
            secrets.push(secret);
            ChangeStart::Add {
                kind: *kind,
                fast_kdf_for_tests: *fast_kdf_for_tests,
            }
        }
        HeaderChange::Remove {
            slot,
            although_in_use,
            used_here,
        } => {
            secrets.extend(used_here);
            ChangeStart::Remove {
                slot: *slot,
                although_in_use: *although_in_use,
            }
        }
        HeaderChange::Restore { kept, shown } => ChangeStart::Restore {
            kept: kept.clone().into_os_string(),
            shown: *shown,
        },
    };
    let mut watch = Watch::new(observer, interrupt);
    Supervisor::change(&settings, start, &secrets, &mut watch).map_err(|failure| {
        match (failure.exit, &failure.hint) {
            (Exit::Interrupted, None) => failure.with_hint(
                "the container opens either with the old keys or with the new ones. Run the same \
                 command again: it continues where this one stopped",
            ),
            _ => failure,
        }
    })
}
