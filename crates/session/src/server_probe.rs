//! Tries on a small file of its own what a container and its lease need of a server, before anything is made there
//! that counts. Then the message says what the server lacks, and nothing is left behind.

use sprat_store::{Access, FileName, ReadClass, Store, StoreError, StoreErrorKind, StoreFile};

use crate::state::reserved_names;
use crate::{Failure, text};

const BLOCK_BYTES: usize = 4096;
/// So long is the file made. It costs nothing where holes are holes.
const LONG_BYTES: u64 = 16 << 20;
/// What others write meanwhile is not counted as what the file takes.
const TAKEN_BYTES: u64 = LONG_BYTES / 4 * 3;

/// How a file is stored there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holes {
    /// A file takes what was written, or the server does not say what is free.
    Kept,
    /// A file takes its whole length (exFAT, FAT).
    Filled,
}

/// Tries the folder of `store`, where `container` is to be made. The account must be one that may remove
/// files.
pub(crate) fn run(store: &dyn Store, container: &FileName) -> Result<Holes, Failure> {
    let Some(name) = reserved_names::nobodys(container) else {
        return Ok(Holes::Kept);
    };
    let file = store.create_new(&name)?;
    let tried = try_on(store, &name, &*file);
    drop(file);
    // It may stay where a connection is lost, with the name of an unfinished copy and a block of content.
    let removed = store.remove(&name);
    let taken_bytes = tried?;
    removed?;
    let Some((taken_bytes, left_bytes)) = taken_bytes else {
        return Ok(Holes::Kept);
    };
    let given_back = free_bytes(store)?.unwrap_or(0).saturating_sub(left_bytes);
    match taken_bytes.min(given_back) >= TAKEN_BYTES {
        true => Ok(Holes::Filled),
        false => Ok(Holes::Kept),
    }
}

/// Returns what the file's length has taken, and what was free then, where the server says so.
fn try_on(
    store: &dyn Store,
    name: &FileName,
    file: &dyn StoreFile,
) -> Result<Option<(u64, u64)>, Failure> {
    file.write_at(0, &[0x55; BLOCK_BYTES])?;
    file.flush()?;
    if !store.list()?.contains(name) {
        return Err(unfit(
            "it hides new files until they are closed, so it can't keep a lease",
            "In ProFTPD, set `HiddenStores off`; or use another server",
        ));
    }
    let again = match store.open(name, Access::ReadWrite) {
        Err(error) if was_refused(&error) => {
            return Err(unfit(
                &format!("it does not let sprat write to an existing file: {error}"),
                "In ProFTPD, set `AllowOverwrite on`; or use another server",
            ));
        }
        other => other?,
    };
    let second = [0xAA; BLOCK_BYTES];
    again.write_at(0, &second)?;
    again.flush()?;
    let mut found = [0; BLOCK_BYTES];
    again.read_at(0, &mut found, ReadClass::Demand)?;
    if found != second {
        return Err(unfit(
            "it does not keep data: a block that was written twice reads back with other content",
            "Use another server, or another file system on this one",
        ));
    }
    let before = free_bytes(store)?;
    again.resize(LONG_BYTES)?;
    again.flush()?;
    let after = free_bytes(store)?;
    Ok(before
        .zip(after)
        .map(|(before, after)| (before.saturating_sub(after), after)))
}

fn was_refused(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        StoreErrorKind::PermissionDenied | StoreErrorKind::ReadOnly | StoreErrorKind::Failed
    )
}

fn free_bytes(store: &dyn Store) -> Result<Option<u64>, StoreError> {
    match store.free_space() {
        Ok(space) => Ok(Some(space.available_bytes)),
        Err(error) if error.was_answered() => Ok(None),
        Err(error) => Err(error),
    }
}

fn unfit(why: &str, hint: &str) -> Failure {
    Failure::failed("this server can't store a container")
        .because(why.to_owned())
        .with_hint(format!("nothing was changed. {hint}"))
}

/// Refuses a container that takes its whole size where there is less room.
pub(crate) fn check_room(size_bytes: u64, available_bytes: Option<u64>) -> Result<(), Failure> {
    let Some(available_bytes) = available_bytes.filter(|bytes| *bytes < size_bytes) else {
        return Ok(());
    };
    Err(Failure::failed(format!(
        "the container would take its full size of {} at once, but the server has only {} free",
        text::bytes(size_bytes),
        text::bytes(available_bytes)
    ))
    .because("the server's file system has no sparse files (exFAT, FAT)".to_owned())
    .with_hint(
        "nothing was changed. Choose a smaller --size, or a file system with sparse files there (ext4, \
         XFS, btrfs)",
    ))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use sprat_store::{Capabilities, FileStat, FreeSpace};
    use sprat_testkit::memory::MemoryStore;

    use super::*;

    /// A store that lacks one thing.
    #[derive(Default)]
    struct Lacking {
        memory: MemoryStore,
        hides: bool,
        writes_once: bool,
        fills_holes: bool,
        /// Of a file system that others write to.
        others_bytes: std::sync::atomic::AtomicU64,
    }

    const FREE_BYTES: u64 = 1 << 30;

    impl Store for Lacking {
        fn describe(&self) -> String {
            "lacking".to_owned()
        }
        fn capabilities(&self) -> Capabilities {
            self.memory.capabilities()
        }
        fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
            if self.writes_once {
                return Err(StoreError::PermissionDenied {
                    op: "open",
                    object: name.to_string(),
                });
            }
            self.memory.open(name, access)
        }
        fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
            self.memory.create_new(name)
        }
        fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
            self.memory.stat(name)
        }
        fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
            self.memory.rename(from, to)
        }
        fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
            self.memory.rename_new(from, to)
        }
        fn remove(&self, name: &FileName) -> Result<(), StoreError> {
            self.memory.remove(name)
        }
        fn list(&self) -> Result<Vec<FileName>, StoreError> {
            match self.hides {
                true => Ok(Vec::new()),
                false => self.memory.list(),
            }
        }
        fn flush_folder(&self) -> Result<(), StoreError> {
            self.memory.flush_folder()
        }
        fn free_space(&self) -> Result<FreeSpace, StoreError> {
            let names = self.memory.list()?;
            let lens = names.iter().map(|name| Ok(self.memory.stat(name)?.len));
            let lens: u64 = lens.sum::<Result<u64, StoreError>>()?;
            let step = 12 << 20;
            let others = &self.others_bytes;
            let others = others.fetch_add(step, std::sync::atomic::Ordering::Relaxed);
            let taken = if self.fills_holes { lens } else { others };
            Ok(FreeSpace {
                available_bytes: FREE_BYTES - taken,
                total_bytes: FREE_BYTES,
                read_only: false,
            })
        }
    }

    fn tried(store: &Lacking) -> Result<Holes, Failure> {
        let ran = run(store, &FileName::new("x.luks").unwrap());
        assert!(store.memory.list().unwrap().is_empty(), "something is left");
        ran
    }

    #[test]
    fn what_a_server_lacks_is_named_and_nothing_is_left() {
        assert_eq!(tried(&Lacking::default()).unwrap(), Holes::Kept);
        let hides = Lacking {
            hides: true,
            ..Lacking::default()
        };
        let failure = tried(&hides).unwrap_err();
        assert!(
            failure.causes[0].contains("until they are closed"),
            "{failure:?}"
        );
        let writes_once = Lacking {
            writes_once: true,
            ..Lacking::default()
        };
        let failure = tried(&writes_once).unwrap_err();
        assert!(failure.causes[0].contains("existing file"), "{failure:?}");
        assert!(failure.hint.unwrap().contains("AllowOverwrite"));
    }

    #[test]
    fn a_file_system_without_sparse_files_is_told_from_one_that_others_write_to() {
        let fills_holes = Lacking {
            fills_holes: true,
            ..Lacking::default()
        };
        assert_eq!(tried(&fills_holes).unwrap(), Holes::Filled);
        let failure = check_room(5 << 40, Some(FREE_BYTES)).unwrap_err();
        assert!(failure.what.contains("5.0 TiB at once"), "{failure:?}");
        assert!(check_room(FREE_BYTES, Some(FREE_BYTES)).is_ok());
        assert!(check_room(5 << 40, None).is_ok());
    }
}
