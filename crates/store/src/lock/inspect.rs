//! What others see of a lease.

use super::seen::{Folder, Seen, look};
use super::taking::hint;
use super::watching::{WatchNote, notes};
use super::{LockError, LockInfo};
use crate::{FileName, LocalRecord, Store};

/// Who holds a container, by the highest lease, and that lease's number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    /// The lease by which nobody may enter just so: held, or free with a session before it that may
    /// still write. `None` where the container is free.
    pub held: Option<LockInfo>,
    /// It tells every session that came and went. `None` without any lease.
    pub highest: Option<u64>,
    /// The highest lease is one of the record that was asked about, however that session ended: no
    /// other machine has held the container since.
    pub highest_is_own: bool,
    /// Sessions whose writes may have been overwritten late, and were not compared yet.
    pub watched: Vec<WatchNote>,
    /// The lists of writes beside the container.
    pub lists: Vec<FileName>,
}

/// What the highest lease says. `record` saves round trips where that is the last one of its
/// machine.
pub fn inspect(
    store: &dyn Store,
    container: &FileName,
    record: Option<&LocalRecord>,
) -> Result<Inspected, LockError> {
    let folder = look(store, container, record.and_then(hint))?;
    if let Some(highest) = folder.highest() {
        store.set_witness(&highest.file);
    }
    Ok(inspected(&folder, record))
}

/// The same; `hint` is the number that is probably the highest.
pub fn inspect_near(
    store: &dyn Store,
    container: &FileName,
    hint: Option<u64>,
) -> Result<Inspected, LockError> {
    let folder = look(store, container, hint)?;
    Ok(inspected(&folder, None))
}

fn inspected(folder: &Folder, record: Option<&LocalRecord>) -> Inspected {
    let highest = folder.highest();
    let enters = |seen: &&Seen| {
        let content = seen.content.as_ref();
        content.is_some_and(|content| content.free && !content.has_open_door())
    };
    Inspected {
        held: highest.filter(|seen| !enters(seen)).map(Seen::info),
        highest: highest.map(|seen| seen.number),
        highest_is_own: record.is_some_and(|record| {
            let takings = record.takings();
            highest.is_some_and(|seen| seen.is_of(&takings))
        }),
        watched: highest
            .and_then(|seen| seen.content.as_ref())
            .map(notes)
            .unwrap_or_default(),
        lists: folder.lists.clone(),
    }
}
