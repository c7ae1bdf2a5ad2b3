//! The lock files of a container as they are found, and the bytes in one.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::beside::beside;
use super::{LockError, LockInfo, OwnerNote};
use crate::record::Token;
use crate::{Access, FileName, Store, StoreError, StoreErrorKind};

/// The length of a lock file.
pub(super) const LOCK_BYTES: usize = 512;
/// How often names that come and go are looked at before that counts as held.
const LOOK_ATTEMPTS: u32 = 3;

/// The bytes of a lock file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Content {
    pub(super) token: String,
    host: String,
    started_s: u64,
    pub(super) renewed: u64,
    version: String,
}

/// A lock file as it was found. `content` is `None` where it is empty or no lock.
#[derive(Debug, Clone)]
pub(super) struct Seen {
    pub(super) number: u64,
    pub(super) file: FileName,
    pub(super) content: Option<Content>,
    pub(super) empty: bool,
    pub(super) modified_s: Option<u64>,
}

/// All lock files of a container, by number.
pub(super) fn look(store: &dyn Store, container: &FileName) -> Result<Vec<Seen>, LockError> {
    look_for(store, container, None)
}

/// The same; the lock `expected`, which we made, is read while the folder is being listed.
pub(super) fn look_for(
    store: &dyn Store,
    container: &FileName,
    expected: Option<u64>,
) -> Result<Vec<Seen>, LockError> {
    let failed = |source| LockError::Store {
        op: "read",
        container: container.clone(),
        source,
    };
    let mut attempt = 0;
    'again: loop {
        attempt += 1;
        let mut found = Vec::new();
        let (listed, mut expected) = list_and_read(store, container, expected)?;
        for file in listed.map_err(failed)? {
            let number = file.as_str().strip_prefix(container.as_str());
            let number = number.and_then(|rest| rest.strip_prefix(".lock."));
            let Some(number) = number.and_then(|digits| digits.parse::<u64>().ok()) else {
                continue;
            };
            if number == 0 || lock_name(container, number)? != file {
                continue;
            }
            let read = match expected.take() {
                Some((read_number, read)) if read_number == number => read,
                other => {
                    expected = other;
                    read_lock(store, number, &file, Access::ReadOnly)
                }
            };
            match read {
                Ok(seen) => found.push(seen),
                // Removed since it was listed: another may have come for it.
                Err(error)
                    if error.kind() == StoreErrorKind::NotFound && attempt < LOOK_ATTEMPTS =>
                {
                    continue 'again;
                }
                Err(error) if error.kind() == StoreErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        found.sort_by_key(|seen| seen.number);
        return Ok(found);
    }
}

/// The folder's names, and what lies at the name of lock `expected`.
#[expect(clippy::type_complexity, reason = "two outcomes, used once")]
fn list_and_read(
    store: &dyn Store,
    container: &FileName,
    expected: Option<u64>,
) -> Result<
    (
        Result<Vec<FileName>, StoreError>,
        Option<(u64, Result<Seen, StoreError>)>,
    ),
    LockError,
> {
    let Some(number) = expected else {
        return Ok((store.list(), None));
    };
    let file = lock_name(container, number)?;
    // Ours to write, and read in fewer round trips so.
    let read = || read_lock(store, number, &file, Access::ReadWrite);
    let (read, listed) = beside(read, || store.list());
    Ok((listed, Some((number, read))))
}

fn read_lock(
    store: &dyn Store,
    number: u64,
    file: &FileName,
    access: Access,
) -> Result<Seen, StoreError> {
    let mut seen = Seen {
        number,
        file: file.clone(),
        content: None,
        empty: false,
        modified_s: None,
    };
    let (stat, bytes) = match store.read_small(file, access, LOCK_BYTES) {
        Ok(read) => read,
        // Not ours whatever it is, so it counts as held.
        Err(error) if error.kind() == StoreErrorKind::NotRegular => return Ok(seen),
        Err(error) => return Err(error),
    };
    seen.modified_s = stat.modified_s;
    seen.empty = stat.len == 0;
    if stat.len == LOCK_BYTES as u64 && bytes.len() == LOCK_BYTES {
        seen.content = Content::parse(&bytes);
    }
    Ok(seen)
}

pub(super) fn lock_name(container: &FileName, number: u64) -> Result<FileName, LockError> {
    container
        .with_suffix(&format!(".lock.{number}"))
        .map_err(|error| LockError::Invalid {
            op: "name the lock",
            reason: error.to_string(),
        })
}

impl Seen {
    /// Whether the local record proves that this is a lock of a dead session of this host. An
    /// empty one was made and not yet written: ours, if we were taking that number.
    pub(super) fn is_ours(&self, takings: &[(u64, Token)]) -> bool {
        takings
            .iter()
            .any(|(number, token)| *number == self.number && (self.empty || self.has(*token)))
    }

    pub(super) fn has(&self, token: Token) -> bool {
        self.content
            .as_ref()
            .is_some_and(|content| content.token == token.to_string())
    }

    pub(super) fn same_owner(&self, other: &Self) -> bool {
        let token = |seen: &Self| seen.content.as_ref().map(|content| content.token.clone());
        (self.number, self.empty, token(self)) == (other.number, other.empty, token(other))
    }

    pub(super) fn held(&self, container: &FileName) -> LockError {
        LockError::HeldElsewhere {
            container: container.clone(),
            info: Box::new(self.info()),
        }
    }

    pub(super) fn info(&self) -> LockInfo {
        let content = self.content.clone();
        let text = |text: &str| crate::sftp::printable(text.as_bytes());
        LockInfo {
            number: self.number,
            file: self.file.clone(),
            token: content.as_ref().map(|content| text(&content.token)),
            host: content
                .as_ref()
                .map(|content| text(&content.host))
                .unwrap_or_default(),
            version: content
                .as_ref()
                .map(|content| text(&content.version))
                .unwrap_or_default(),
            started_s: content.as_ref().map_or(0, |content| content.started_s),
            renewed: content.as_ref().map_or(0, |content| content.renewed),
            modified_s: self.modified_s,
        }
    }
}

impl Content {
    pub(super) fn new(token: Token, owner: OwnerNote) -> Self {
        let plain = |mut text: String| {
            text.retain(|c| c.is_ascii_alphanumeric() || "._+-".contains(c));
            text.truncate(64);
            text
        };
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            token: token.to_string(),
            host: plain(owner.host),
            started_s: now.map_or(0, |now| now.as_secs()),
            renewed: 0,
            version: plain(owner.version),
        }
    }

    pub(super) fn bytes(&self) -> [u8; LOCK_BYTES] {
        let mut bytes = [b' '; LOCK_BYTES];
        let json = serde_json::to_vec(self).unwrap_or_default();
        assert!(
            !json.is_empty() && json.len() < LOCK_BYTES,
            "a lock of {} bytes",
            json.len()
        );
        bytes[..json.len()].copy_from_slice(&json);
        bytes[LOCK_BYTES - 1] = b'\n';
        bytes
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}
