//! What other sessions see of a lease.

use super::acquire::hint;
use super::comparison::{PendingComparison, notes};
use super::lease::{Folder, FoundLease, read_folder};
use super::{LockError, LockInfo};
use crate::{FileName, Store, WriteJournal};

/// Who has locked a container, according to its highest lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// The lease that keeps others out: in use, or free with an open predecessor. `None` if the
    /// container is free.
    pub held: Option<LockInfo>,
    /// The number of the highest lease. It grows with every session. `None` without any lease.
    pub highest: Option<u64>,
    /// The highest lease belongs to the given journal, however that session ended: no other machine
    /// has locked the container since.
    pub highest_is_own: bool,
    /// Sessions whose writes may have been overwritten late, and have not been compared yet.
    pub pending_comparisons: Vec<PendingComparison>,
    /// The late-write lists beside the container.
    pub late_lists: Vec<FileName>,
}

/// Reads the highest lease. `journal` saves round trips if that is the last one of its machine.
pub fn inspect(
    store: &dyn Store,
    container: &FileName,
    journal: Option<&WriteJournal>,
) -> Result<Inspected, LockError> {
    let folder = read_folder(store, container, journal.and_then(hint))?;
    Ok(inspected(store, &folder, journal))
}

/// The same; `hint` is the number that is probably the highest. Also the first check on a new
/// connection of a session that only reads.
pub fn inspect_near(
    store: &dyn Store,
    container: &FileName,
    hint: Option<u64>,
) -> Result<Inspected, LockError> {
    let folder = read_folder(store, container, hint)?;
    Ok(inspected(store, &folder, None))
}

fn inspected(store: &dyn Store, folder: &Folder, journal: Option<&WriteJournal>) -> Inspected {
    let highest = folder.highest();
    if let Some(highest) = highest {
        store.set_witness(&highest.file);
    }
    let enters = |seen: &&FoundLease| {
        let content = seen.content.as_ref();
        content.is_some_and(|content| content.free && !content.has_open_predecessor())
    };
    Inspected {
        held: highest.filter(|seen| !enters(seen)).map(FoundLease::info),
        highest: highest.map(|seen| seen.number),
        highest_is_own: journal.is_some_and(|journal| {
            let acquisitions = journal.acquisitions();
            highest.is_some_and(|seen| seen.is_of(&acquisitions))
        }),
        pending_comparisons: highest
            .and_then(|seen| seen.content.as_ref())
            .map(notes)
            .unwrap_or_default(),
        late_lists: folder.lists.clone(),
    }
}
