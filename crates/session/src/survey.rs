//! What `sprat setup` needs to know of a server before anything is made there. Nothing is changed.

use std::sync::Arc;

use sprat_store::{Store, StoreError, StoreErrorKind};

use crate::address::Target;
use crate::{Failure, SshOptions, connect, generations};

/// A server that let us in. One connection stays open.
pub struct Survey {
    store: Arc<dyn Store>,
    /// There is a file with the container's name.
    pub has_container: bool,
    /// Writes can be made durable.
    pub durable: bool,
    /// Free space in bytes, where the server reports it.
    pub available_bytes: Option<u64>,
    /// What an agent on the server keeps, if there is one.
    pub past_states: Option<String>,
    /// The server's file system is mounted read-only.
    pub read_only: bool,
}

/// Why a server did not let us in.
#[derive(Debug)]
pub struct NotReached {
    /// For the user.
    pub failure: Failure,
    /// It accepts none of this machine's keys.
    pub login_refused: bool,
    /// It let us in, and the container's folder is not there.
    pub no_folder: bool,
}

impl From<StoreError> for NotReached {
    fn from(error: StoreError) -> Self {
        Self {
            login_refused: error.kind() == StoreErrorKind::LoginRefused,
            no_folder: error.kind() == StoreErrorKind::NotFound,
            failure: Failure::from(error),
        }
    }
}

/// Logs in at the server of `target`, or opens the local folder.
///
/// # Errors
/// Why that is not possible.
pub fn survey(target: &Target, ssh: &SshOptions) -> Result<Survey, NotReached> {
    let store = connect::connect(target, ssh)?;
    let has_container = match store.stat(&target.name) {
        Ok(_) => true,
        Err(error) if error.kind() == StoreErrorKind::NotFound => false,
        Err(error) => return Err(error.into()),
    };
    let space = match store.free_space() {
        Ok(space) => Some(space),
        Err(error) if error.was_answered() => None,
        Err(error) => return Err(error.into()),
    };
    Ok(Survey {
        has_container,
        durable: store.capabilities().durable_flush,
        available_bytes: space.as_ref().map(|space| space.available_bytes),
        past_states: store
            .past_states(&target.name)?
            .map(|states| generations::kept_in_words(&states)),
        read_only: space.is_some_and(|space| space.read_only),
        store,
    })
}

impl Survey {
    /// Opens a second connection beside the first one, and returns the folder of the server's own snapshots, if
    /// there is one ([`connect::zfs_snapshots`]).
    ///
    /// # Errors
    /// The server lets no second connection in; the text says why.
    pub fn second_connection(
        &self,
        target: &Target,
        ssh: &SshOptions,
    ) -> Result<Option<String>, String> {
        let second = connect::zfs_snapshots(target, ssh).map_err(|error| error.to_string());
        // The first one must be open until now.
        let _ = self.store.describe();
        second
    }
}
