//! Reaches a container's store for the commands that need no session: `unlock`, `doctor`, and
//! those of `key` that only read.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;

use sprat_luks::{AnyHeader, Header, HeaderRead, LuksError, OpenedBy};
use sprat_store::{
    LocalStore, ReadClass, SftpOptions, SftpStore, SshTarget, Store, StoreError, StoreFile,
};

use crate::address::{Location, Target};
use crate::state::{self, identity};
use crate::{Failure, patience};

/// Connects to the folder that holds `target`.
pub fn connect(target: &Target, ssh_command: &[OsString]) -> Result<Arc<dyn Store>, StoreError> {
    match &target.place {
        Location::Local { folder } => Ok(Arc::new(LocalStore::open(folder)?)),
        Location::Ssh {
            user,
            host,
            port,
            folder,
        } => {
            let ssh = SshTarget::new(user.as_deref(), host, *port)?;
            let mut options = SftpOptions::new(ssh.argv(ssh_command), host, folder);
            patience::set_patience(&mut options);
            Ok(Arc::new(SftpStore::connect(options)?))
        }
    }
}

/// Loads a container's header, for the work on keys; no key is needed for that.
pub fn header(file: &dyn StoreFile) -> Result<Header, Failure> {
    Header::load(&HeaderBytes(file)).map_err(|error| Failure::of_key_work(&error))
}

/// The same as the kernel's dm-crypt opens it; and why user mode doesn't, where it doesn't.
///
/// # Errors
/// [`crate::Exit::Damaged`] where this machine knows a container there, and no header is left of it.
pub fn any_header(
    file: &dyn StoreFile,
    state_dir: &Path,
    target: &Target,
) -> Result<(AnyHeader, Option<LuksError>), Failure> {
    let header = AnyHeader::load(&HeaderBytes(file), OpenedBy::Kernel).map_err(|error| {
        match identity::policy(state_dir, target, None) {
            Ok(pins) => state::header_unreadable(state_dir, target, &pins, &error),
            Err(_) => Failure::from(&error),
        }
    })?;
    Ok((header, Header::load(&HeaderBytes(file)).err()))
}

/// A container's header as `luks` reads it.
pub struct HeaderBytes<'f>(pub &'f dyn StoreFile);

impl HeaderRead for HeaderBytes<'_> {
    fn len(&self) -> io::Result<u64> {
        self.0.len().map_err(io::Error::other)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0
            .read_at(offset, buf, ReadClass::Demand)
            .map_err(io::Error::other)
    }
}
