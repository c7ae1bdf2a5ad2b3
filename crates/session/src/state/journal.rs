//! A container's write journal, and the id of this host in leases. The journal's flock proves that this
//! host has the container open at most once.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sprat_snapshot::local_file;
use sprat_store::{LockError, OwnerNote, WriteJournal, hex};

use crate::Failure;
use crate::address::{Location, Target};
use crate::files::make_private_folder;
use crate::settings::Access;

/// How long to wait for the ssh of a session that was killed. It ends when it notices that its input
/// was closed.
const DEAD_SESSION_GRACE: Duration = Duration::from_secs(5);

/// Why a lease was not acquired.
pub(crate) enum AcquireError {
    Lock(LockError),
    Other(Failure),
}

impl From<LockError> for AcquireError {
    fn from(error: LockError) -> Self {
        Self::Lock(error)
    }
}

impl From<AcquireError> for Failure {
    fn from(error: AcquireError) -> Self {
        match error {
            AcquireError::Lock(error) => Self::from(&error),
            AcquireError::Other(failure) => failure,
        }
    }
}

/// Opens the container's journal. Its flock proves that this host has the container open at most once.
pub(crate) fn open_journal(
    state_dir: &Path,
    target: &Target,
    access: Access,
) -> Result<WriteJournal, Failure> {
    let dir = state_dir.join("locks");
    let made = make_private_folder(&dir);
    let id = journal_id(target);
    let deadline = Instant::now() + DEAD_SESSION_GRACE;
    let open = || match (&made, access) {
        (Ok(()), _) => WriteJournal::open(&dir, &id),
        _ => WriteJournal::open_in_memory(&dir, &id),
    };
    if access == Access::ReadWrite {
        made.clone()?;
    }
    loop {
        let opened = match open() {
            // A restore must work on a machine whose disk is full or read-only.
            Err(LockError::Journal { .. }) if access == Access::ReadOnly => {
                WriteJournal::open_in_memory(&dir, &id)
            }
            opened => opened,
        };
        match opened {
            Err(LockError::HeldHere { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(record) => return Ok(record),
            Err(error @ LockError::HeldHere { .. }) => {
                let mut failure = Failure::from(&error);
                failure.what = format!("another process on this machine has {target} open");
                return Err(failure);
            }
            Err(error) => return Err(Failure::from(&error)),
        }
    }
}

/// The name of the container's journal. Two spellings of one local folder give the same name.
pub(crate) fn journal_id(target: &Target) -> String {
    let real = target.local_folder().map(std::fs::canonicalize);
    match real {
        Some(Ok(folder)) => Target {
            location: Location::Local(folder),
            name: target.name.clone(),
        }
        .id(),
        _ => target.id(),
    }
}

/// What identifies this host to a server: a random id, not its name.
pub(crate) fn owner_note(state_dir: &Path) -> Result<OwnerNote, Failure> {
    let path = state_dir.join("host-id");
    let failed = |error: io::Error| {
        Failure::failed(format!("can't save this host's id in {}", path.display()))
            .caused_by(&error)
    };
    make_private_folder(state_dir)?;
    let known = |path: &PathBuf| -> io::Result<Option<String>> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let text = text.trim().to_owned();
                let whole = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
                Ok(whole.then_some(text))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    };
    let host = match known(&path).map_err(failed)? {
        Some(host) => host,
        None => {
            make_host_id(&path).map_err(failed)?;
            known(&path)
                .map_err(failed)?
                .ok_or_else(|| failed(io::Error::other("it was just created, but can't be read")))?
        }
    };
    Ok(OwnerNote {
        host,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// If several processes make the id at once, one wins, and all of them read its id.
fn make_host_id(path: &Path) -> io::Result<()> {
    let mut random = [0; 16];
    openssl::rand::rand_bytes(&mut random).map_err(io::Error::other)?;
    let id = hex(&random);
    let write = |file: &mut File| file.write_all(id.as_bytes());
    match local_file::create(path, write) {
        // A crash left it incomplete, so nobody has used it.
        Err(error)
            if error.kind() == io::ErrorKind::AlreadyExists && std::fs::read(path)?.len() != 32 =>
        {
            local_file::replace(path, write)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use sprat_store::FileName;

    use super::*;

    #[test]
    fn the_host_id_is_made_once_and_a_torn_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let first = owner_note(dir.path()).unwrap();
        assert_eq!(owner_note(dir.path()).unwrap(), first);
        std::fs::write(dir.path().join("host-id"), "12").unwrap();
        let second = owner_note(dir.path()).unwrap();
        assert_eq!(second.host.len(), 32);
        assert_ne!(second.host, first.host);
    }

    #[test]
    fn two_spellings_of_a_local_folder_share_a_record() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("b")).unwrap();
        let target = |folder: &str| Target {
            location: Location::Local(dir.path().join(folder)),
            name: FileName::new("x.luks").unwrap(),
        };
        assert_eq!(journal_id(&target("a")), journal_id(&target("b")));
        assert_ne!(journal_id(&target("a")), journal_id(&target(".")));
    }
}
