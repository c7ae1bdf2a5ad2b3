//! The leases of a container as they are found in its folder.

use super::content::{Content, FIRST_NUMBER, LEASE_BYTES};
use super::{LockError, LockInfo};
use crate::join::join;
use crate::token::Token;
use crate::{Access, FileName, Store, StoreError, StoreErrorKind};

/// How often the folder is read again because a listed name was gone. Then it counts as in use.
const LIST_ATTEMPTS: u32 = 3;
/// How often a lease that is just being written is read. Then it counts as in use.
const READ_ATTEMPTS: u32 = 3;
/// How many empty leases are passed on the way down to one with content.
const EMPTY_MAX: usize = 64;

/// A lease file as it was found. `content` is `None` if it is empty or not a lease.
#[derive(Debug, Clone)]
pub(super) struct FoundLease {
    pub(super) number: u64,
    pub(super) file: FileName,
    pub(super) content: Option<Content>,
    pub(super) empty: bool,
    pub(super) modified_s: Option<u64>,
}

/// The leases and lists in a container's folder.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    /// The numbers of all leases, ascending. A lock of sprat 0.x (below the first number) counts
    /// only if there is no lease.
    pub(super) numbers: Vec<u64>,
    /// Locks of sprat 0.x.
    pub(super) old: Vec<u64>,
    /// Late-write lists beside the container.
    pub(super) lists: Vec<FileName>,
    /// The highest lease. If it is empty, also those below it, down to one that is not. Descending.
    pub(super) read: Vec<FoundLease>,
}

impl Folder {
    /// The lease that decides.
    pub(super) fn highest(&self) -> Option<&FoundLease> {
        self.read.first()
    }

    /// The highest lease with content, below one that is empty.
    pub(super) fn below(&self) -> Option<&FoundLease> {
        self.read.iter().skip(1).find(|seen| !seen.empty)
    }
}

/// Lists the folder and reads the highest lease. The lease `hint` is read while the folder is being
/// listed: if it is the highest, this saves the round trips for reading it.
pub(super) fn read_folder(
    store: &dyn Store,
    container: &FileName,
    hint: Option<u64>,
) -> Result<Folder, LockError> {
    let failed = |source| LockError::Store {
        op: "read",
        container: container.clone(),
        source,
    };
    let mut attempt = 0;
    'again: loop {
        attempt += 1;
        let hinted = match hint {
            Some(number) => Some((number, lock_name(container, number)?)),
            None => None,
        };
        let read = || {
            let (number, file) = hinted.as_ref()?;
            Some(read_lease(store, *number, file))
        };
        let (mut hinted, names) = join(read, || store.list());
        let names = names.map_err(failed)?;
        let (numbers, old) = numbers_in(container, &names);
        let mut folder = Folder {
            numbers,
            old,
            lists: late_lists_in(container, &names),
            read: Vec::new(),
        };
        for number in folder.numbers.iter().rev().take(EMPTY_MAX) {
            let read = match hinted.take() {
                Some(read) if hint == Some(*number) => read,
                _ => read_lease(store, *number, &lock_name(container, *number)?),
            };
            let seen = match read {
                Ok(seen) => seen,
                // Removed since it was listed: list again.
                Err(error)
                    if error.kind() == StoreErrorKind::NotFound && attempt < LIST_ATTEMPTS =>
                {
                    continue 'again;
                }
                // Listed and not there: a session may be using it.
                Err(error) if error.kind() == StoreErrorKind::NotFound => FoundLease {
                    number: *number,
                    file: lock_name(container, *number)?,
                    content: None,
                    empty: false,
                    modified_s: None,
                },
                Err(error) => return Err(failed(error)),
            };
            let is_last = !seen.empty;
            folder.read.push(seen);
            if is_last {
                break;
            }
        }
        return Ok(folder);
    }
}

/// The leases among the names of a folder, ascending, and the locks of sprat 0.x.
pub(super) fn numbers_in(container: &FileName, names: &[FileName]) -> (Vec<u64>, Vec<u64>) {
    let number_of = |file: &FileName| {
        let number = file.as_str().strip_prefix(container.as_str())?;
        let number = number.strip_prefix(".lock.")?.parse::<u64>().ok()?;
        let same = lock_name(container, number).is_ok_and(|name| name == *file);
        (number > 0 && same).then_some(number)
    };
    let mut numbers: Vec<u64> = names.iter().filter_map(number_of).collect();
    numbers.sort_unstable();
    let first = numbers.partition_point(|number| *number < FIRST_NUMBER);
    let new = numbers.split_off(first);
    match new.is_empty() {
        true => (numbers.clone(), numbers),
        false => (new, numbers),
    }
}

/// Part of the name of a late-write list; a token follows. A session writes there what it sent.
const LIST: &str = ".late-";

/// The name of a late-write list; `token` is 16 hex digits.
pub(super) fn late_list_name(container: &FileName, token: &str) -> Result<FileName, LockError> {
    container
        .with_suffix(&format!("{LIST}{token}"))
        .map_err(|error| LockError::Invalid {
            op: "name a late-write list",
            reason: error.to_string(),
        })
}

/// The late-write lists among the names of a folder.
pub(super) fn late_lists_in(container: &FileName, names: &[FileName]) -> Vec<FileName> {
    let is_list = |file: &&FileName| {
        let rest = file.as_str().strip_prefix(container.as_str());
        let token = rest.and_then(|rest| rest.strip_prefix(LIST));
        token.is_some_and(|token| token.len() == 16 && token.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    names.iter().filter(is_list).cloned().collect()
}

/// Reads a lease by its name. Reads again if it is being written meanwhile.
pub(super) fn read_lease(
    store: &dyn Store,
    number: u64,
    file: &FileName,
) -> Result<FoundLease, StoreError> {
    let mut seen = FoundLease {
        number,
        file: file.clone(),
        content: None,
        empty: false,
        modified_s: None,
    };
    for _ in 0..READ_ATTEMPTS {
        // Opened for reading and writing, because that takes fewer round trips.
        let read = match store.read_small(file, Access::ReadWrite, LEASE_BYTES) {
            Err(error) if may_not_write(error.kind()) => {
                store.read_small(file, Access::ReadOnly, LEASE_BYTES)
            }
            read => read,
        };
        let (stat, bytes) = match read {
            Ok(read) => read,
            // Certainly not ours, so it counts as in use.
            Err(error) if error.kind() == StoreErrorKind::NotRegular => return Ok(seen),
            Err(error) => return Err(error),
        };
        seen.modified_s = stat.modified_s;
        seen.empty = stat.len == 0;
        if stat.len == bytes.len() as u64 {
            seen.content = Content::parse(&bytes);
        }
        if seen.empty || seen.content.is_some() {
            break;
        }
    }
    Ok(seen)
}

fn may_not_write(kind: StoreErrorKind) -> bool {
    matches!(
        kind,
        StoreErrorKind::PermissionDenied | StoreErrorKind::ReadOnly | StoreErrorKind::Failed
    )
}

pub(super) fn lock_name(container: &FileName, number: u64) -> Result<FileName, LockError> {
    container
        .with_suffix(&format!(".lock.{number}"))
        .map_err(|error| LockError::Invalid {
            op: "name the lock",
            reason: error.to_string(),
        })
}

/// Whether a session of this machine may have renewed lease `number` so often. sprat 0.x did not
/// record renewals.
pub(super) fn may_be_ours(number: u64, renewed: u64, renewals: (u64, u64)) -> bool {
    let known = if renewals.0 == number { renewals.1 } else { 0 };
    number < FIRST_NUMBER || renewed <= known.saturating_add(super::UNRECORDED_RENEWALS_MAX)
}

impl FoundLease {
    /// Whether a session that acquired one of these created it, however that session ended.
    pub(super) fn is_of(&self, acquisitions: &[(u64, Token)]) -> bool {
        let mut acquisitions = acquisitions.iter();
        acquisitions.any(|(number, token)| *number == self.number && self.has(*token))
    }

    /// Whether the journal shows that a dead session of this host created it. An empty one was
    /// created and never written: it is ours if we were acquiring that number. If its counter is
    /// far ahead of the journal, a copy of this machine uses it.
    pub(super) fn is_ours(&self, acquisitions: &[(u64, Token)], renewals: (u64, u64)) -> bool {
        let acquired = acquisitions
            .iter()
            .any(|(number, token)| *number == self.number && (self.empty || self.has(*token)));
        let renewed = self.content.as_ref().map_or(0, |content| content.renewed);
        acquired && may_be_ours(self.number, renewed, renewals)
    }

    /// It has bytes that no sprat writes. In a lease of ours: the server did not keep what we
    /// wrote, as nothing else writes into it.
    pub(super) fn is_garbled(&self) -> bool {
        self.content.is_none() && !self.empty
    }

    pub(super) fn has(&self, token: Token) -> bool {
        self.content
            .as_ref()
            .is_some_and(|content| content.token == token.to_string())
    }

    pub(super) fn is_free(&self) -> bool {
        self.content.as_ref().is_some_and(|content| content.free)
    }

    pub(super) fn held(&self, container: &FileName) -> LockError {
        LockError::HeldElsewhere {
            container: container.clone(),
            info: Box::new(self.info()),
        }
    }

    pub(super) fn info(&self) -> LockInfo {
        let content = self.content.as_ref();
        let text = |text: &str| crate::text::printable(text.as_bytes());
        LockInfo {
            number: self.number,
            file: self.file.clone(),
            token: content.map(|content| text(&content.token)),
            host: content
                .map(|content| text(&content.host))
                .unwrap_or_default(),
            version: content
                .map(|content| text(&content.version))
                .unwrap_or_default(),
            started_s: content.map_or(0, |content| content.started_s),
            renewed: content.map_or(0, |content| content.renewed),
            modified_s: self.modified_s,
            free: self.is_free(),
            waits_for: content
                .map(|content| &content.doors[..])
                .unwrap_or_default()
                .iter()
                .filter(|predecessor| predecessor.until_s.is_none())
                .map(|predecessor| predecessor.number)
                .collect(),
        }
    }
}
