//! A container's write journal, and the id of this host in leases. The journal's flock proves that this
//! host has the container open at most once.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
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

/// The file in the state folder with the id of this host.
const HOST_ID: &str = "host-id";

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

impl AcquireError {
    /// For the user: see [`lock_failure`].
    pub(crate) fn into_failure(self, state_dir: &Path) -> Failure {
        match self {
            Self::Lock(error) => lock_failure(&error, state_dir),
            Self::Other(failure) => failure,
        }
    }
}

/// The failure. Where another session has the lock, it says whether that session is of this machine. The
/// server could change the id in a lease, so nothing else depends on it.
pub(crate) fn lock_failure(error: &LockError, state_dir: &Path) -> Failure {
    let failure = Failure::from(error);
    let LockError::HeldElsewhere { container, info } = error else {
        return failure;
    };
    let known = known_host(&state_dir.join(HOST_ID)).ok().flatten();
    let own = info.token.is_some() && known.as_ref() == Some(&info.host);
    let holder = match (&info.token, own) {
        (None, _) => "an unknown machine",
        (Some(_), true) => "this machine",
        (Some(_), false) => "another machine",
    };
    let failure = Failure {
        what: format!("container {container} is locked by {holder}: {info}"),
        ..failure
    };
    if !own {
        return failure;
    }
    failure.with_hint(
        "nothing was changed. A session of this machine uses the container under another name or \
         path, or its lock file was removed. Wait until it ends, or run `sprat umount`. If it died, run `sprat backup` with \
         the name or path of that session: it takes over the lock",
    )
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

/// The id of this host, if the file at `path` has one.
fn known_host(path: &Path) -> io::Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let text = text.trim().to_owned();
            let whole = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
            Ok(whole.then_some(text))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What identifies this host to a server: a random id, not its name.
pub(crate) fn owner_note(state_dir: &Path) -> Result<OwnerNote, Failure> {
    let path = state_dir.join(HOST_ID);
    let failed = |error: io::Error| {
        Failure::failed(format!("can't save this host's id in {}", path.display()))
            .caused_by(&error)
    };
    make_private_folder(state_dir)?;
    let host = match known_host(&path).map_err(failed)? {
        Some(host) => host,
        None => {
            make_host_id(&path).map_err(failed)?;
            known_host(&path)
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
