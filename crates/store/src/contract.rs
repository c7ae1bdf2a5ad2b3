//! The contract that every store keeps; `tests/store/contract.rs` runs it against each of them.

use std::ops::Range;
use std::sync::Arc;

use crate::{FileName, StoreError};

/// How a file is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing is ever written through the handle; works with a read-only account.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// How urgent a read is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadClass {
    /// A caller is blocked until it returns; it is sent before write-back and read-ahead.
    Demand,
    /// Read-ahead; may wait behind anything.
    Ahead,
}

/// What a store can do beyond reading and writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// [`StoreFile::flush`] reaches the disk. Without it a store must not be written to, unless the
    /// user explicitly allows it.
    pub durable_flush: bool,
    /// [`StoreFile::discard`] gives space back.
    pub discard: bool,
    /// [`Store::free_space`] works.
    pub free_space: bool,
    /// [`Store::rename`] replaces atomically.
    pub atomic_replace: bool,
}

/// What a store reports about one name, without following symbolic links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStat {
    /// Length in bytes.
    pub len: u64,
    /// Time of the last modification, in seconds since the epoch, if the store reports it.
    pub modified_s: Option<u64>,
    /// A regular file, not a folder, symbolic link or device.
    pub regular: bool,
    /// Bytes allocated on the disk, if the store reports them (SFTP does not).
    pub allocated_bytes: Option<u64>,
}

/// Space of the file system that holds the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FreeSpace {
    /// Bytes that this account may still allocate.
    pub available_bytes: u64,
    /// Size of the file system in bytes.
    pub total_bytes: u64,
    /// Mounted read-only.
    pub read_only: bool,
}

/// An earlier state of a file, which the server keeps by its own policy and which no client can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastState {
    /// The file's name in the folder of past states.
    pub name: FileName,
    /// When the state was written last, by the server's clock, in seconds since the epoch.
    pub written_s: u64,
    /// When something was written over it. From then on the server keeps it.
    pub begun_s: u64,
    /// How long it was the present state, in seconds.
    pub stood_s: u64,
    /// Length in bytes.
    pub len: u64,
    /// The client said that it left the file in order.
    pub in_order: bool,
    /// The server's admin keeps it, whatever the policy is.
    pub pinned: bool,
    /// From then on no rule of the server's policy keeps it, in seconds since the epoch. `None`: not known, or
    /// pinned.
    pub kept_until_s: Option<u64>,
}

/// The outcome of a change that the store carried out: is it on the disk, too?
///
/// If the store did not carry it out at all, that is the `Err` of `Result<Applied, _>`.
#[must_use]
#[derive(Debug)]
pub enum Applied {
    /// Done and durable.
    Durable,
    /// Done at least in part, and not known to be durable.
    NotDurable(StoreError),
}

impl Applied {
    /// `Ok` only if the change is durable.
    pub fn durable(self) -> Result<(), StoreError> {
        match self {
            Self::Durable => Ok(()),
            Self::NotDurable(error) => Err(error),
        }
    }
}

impl From<Result<(), StoreError>> for Applied {
    fn from(flushed: Result<(), StoreError>) -> Self {
        flushed.map_or_else(Self::NotDurable, |()| Self::Durable)
    }
}

/// A question that can be asked ahead: see [`Store::ask_ahead`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// That of [`Store::free_space`].
    FreeSpace,
    /// That of [`Store::list`].
    List,
    /// That of [`Store::stat`].
    Stat(FileName),
    /// Those of [`Store::open`] and [`Store::read_small`].
    Open(FileName, Access),
}

/// A file that was opened, and what was read of it.
pub struct OpenedAndRead {
    /// The file.
    pub file: Arc<dyn StoreFile>,
    /// Its attributes.
    pub stat: FileStat,
    /// The bytes of each range, in the order in which they were asked for.
    pub ranges: Vec<Result<Vec<u8>, StoreError>>,
}

/// A folder that holds containers. Any number of threads may call at once.
///
/// A store never follows a symbolic link at a name: opening one is
/// [`StoreErrorKind::NotRegular`](crate::StoreErrorKind).
pub trait Store: Send + Sync {
    /// Returns the location for messages: `ssh://user@host/folder` or `/folder`.
    fn describe(&self) -> String;

    /// Returns what this store can do; this never changes.
    fn capabilities(&self) -> Capabilities;

    /// Opens an existing regular file.
    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError>;

    /// Creates a new, empty file of mode 0600 and opens it for reading and writing. Exclusive: of
    /// any number of callers on any number of machines one succeeds, the others get
    /// `AlreadyExists`. If the connection is lost, the file may exist all the same.
    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError>;

    /// Returns the attributes of `name`; `NotFound` if there is nothing.
    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError>;

    /// Renames a file and atomically replaces `to` if it exists.
    fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError>;

    /// Renames a file. `AlreadyExists` if `to` exists; then nothing has changed.
    fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError>;

    /// Removes a file.
    fn remove(&self, name: &FileName) -> Result<(), StoreError>;

    /// Removes a file if it exists. Returns whether it did.
    fn remove_if_there(&self, name: &FileName) -> Result<bool, StoreError> {
        match self.remove(name) {
            Ok(()) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            // An account that may not remove files gets the same error for a missing file.
            Err(error) => match self.stat(name) {
                Err(StoreError::NotFound { .. }) => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Returns the names in the folder, in any order. Names that are not a [`FileName`] are left
    /// out. A server that lists without end is an error.
    fn list(&self) -> Result<Vec<FileName>, StoreError>;

    /// Makes creations, renames and removals durable (fsync of the folder). `Unsupported` if the
    /// server can't.
    fn flush_folder(&self) -> Result<(), StoreError>;

    /// As [`Store::flush_folder`], but returns false if the server can't do it.
    fn try_flush_folder(&self) -> Result<bool, StoreError> {
        match self.flush_folder() {
            Ok(()) => Ok(true),
            Err(StoreError::Unsupported { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Sets the witness: a small file, the lease. Before any further connection of this store is
    /// used, it must show this file with the same content as the first connection. If one does not,
    /// all calls fail with [`StoreError::Elsewhere`]. Does nothing by default: other stores have
    /// one connection.
    fn set_witness(&self, name: &FileName) {
        let _ = name;
    }

    /// Ends all connections, as if they had been lost for `reason`. Does nothing by default: other
    /// stores have none.
    fn disconnect(&self, reason: &str) {
        let _ = reason;
    }

    /// Returns the free space of the folder's file system; `Unsupported` if the server can't report
    /// it.
    fn free_space(&self) -> Result<FreeSpace, StoreError>;

    /// The id of the agent that answers on the server. `None`, as by default: there is none.
    fn agent(&self) -> Option<String> {
        None
    }

    /// Has the agent refuse everything that was sent to a file through it on other connections: once this
    /// returns true, no byte of that arrives any more. `false`, as by default: there is no agent. Call it when
    /// the lease is ours: it ends any other session.
    fn refuse_earlier(&self, name: &FileName) -> Result<bool, StoreError> {
        let _ = name;
        Ok(false)
    }

    /// Reports to the agent that this session leaves the file in order. The store waits for its answer when it is
    /// dropped. Does nothing by default.
    fn note_end(&self, name: &FileName) {
        let _ = name;
    }

    /// The past states that the server keeps of a file, oldest first. `None`, as by default: this server
    /// keeps none.
    fn past_states(&self, name: &FileName) -> Result<Option<Vec<PastState>>, StoreError> {
        let _ = name;
        Ok(None)
    }

    /// Copies byte ranges of one file to the same offsets of another, without the bytes passing
    /// through this machine. Both files must exist. The copy is durable when this returns. After an
    /// error each range of `to` may hold any bytes. `Unsupported` by default.
    fn copy_ranges(
        &self,
        from: &FileName,
        to: &FileName,
        ranges: &[Range<u64>],
    ) -> Result<(), StoreError> {
        let _ = (to, ranges);
        Err(StoreError::Unsupported {
            op: "copy",
            object: from.to_string(),
            reason: "this store can't copy without the client".to_owned(),
        })
    }

    /// Gives `to` the owner, group and mode of `from`. `Unsupported` by default.
    fn copy_owner_and_mode(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        let _ = to;
        Err(StoreError::Unsupported {
            op: "set owner and mode",
            object: from.to_string(),
            reason: "this store can't set them".to_owned(),
        })
    }

    /// Reads the first `len_max` bytes of a small file, and its attributes. A file that is
    /// truncated meanwhile gives fewer bytes. The result is that of [`Store::open`] with `access`
    /// and a read, but takes fewer round trips if the store supports that; [`Access::ReadWrite`]
    /// takes the fewest.
    fn read_small(
        &self,
        name: &FileName,
        access: Access,
        len_max: usize,
    ) -> Result<(FileStat, Vec<u8>), StoreError> {
        let file = self.open(name, access)?;
        let stat = file.stat()?;
        let mut bytes = vec![0; len_max.min(usize::try_from(stat.len).unwrap_or(len_max))];
        match file.read_at(0, &mut bytes, ReadClass::Demand) {
            Ok(()) => {}
            Err(StoreError::Truncated { .. }) => bytes.clear(),
            Err(error) => return Err(error),
        }
        Ok((stat, bytes))
    }

    /// Creates a new file as [`Store::create_new`] does, writes `content`, and makes content and
    /// name durable. An error means that the file was not created. A failure after that is
    /// [`Applied::NotDurable`]; then the content may be missing, too.
    fn create_filled(&self, name: &FileName, content: &[u8]) -> Result<Applied, StoreError> {
        let file = self.create_new(name)?;
        let filled = file
            .write_at(0, content)
            .and_then(|()| file.flush())
            .and_then(|()| self.flush_folder());
        Ok(filled.into())
    }

    /// As [`Store::create_filled`]. If the store knows that its server carries out requests in
    /// order, it also asks `behind` ahead, so that the server answers after both flushes.
    fn create_filled_asking(
        &self,
        name: &FileName,
        content: &[u8],
        behind: &[Question],
    ) -> Result<Applied, StoreError> {
        let _ = behind;
        self.create_filled(name, content)
    }

    /// Sends questions now whose answers later calls use: each once, and only until something is
    /// changed through this store, or until [`Store::forget_ahead`]. On a slow connection these
    /// calls then wait less. Does nothing by default.
    fn ask_ahead(&self, questions: &[Question]) {
        let _ = questions;
    }

    /// Ends the use of answers to questions that were asked ahead.
    fn forget_ahead(&self) {}

    /// Opens a file as [`Store::open`] does, and reads its attributes and some ranges of it, each
    /// given by offset and length. Takes as few round trips as the store can.
    fn open_and_read(
        &self,
        name: &FileName,
        access: Access,
        ranges: &[(u64, usize)],
    ) -> Result<OpenedAndRead, StoreError> {
        let file = self.open(name, access)?;
        let stat = file.stat()?;
        let ranges = ranges.iter().map(|(offset, len)| {
            let mut bytes = vec![0; *len];
            file.read_at(*offset, &mut bytes, ReadClass::Demand)?;
            Ok(bytes)
        });
        Ok(OpenedAndRead {
            ranges: ranges.collect(),
            stat,
            file,
        })
    }

    /// Overwrites the first bytes of a small file, and then returns the attributes of `next`;
    /// `None` if it does not exist. An error if one of the two failed.
    fn overwrite_and_stat(
        &self,
        name: &FileName,
        content: &[u8],
        next: &FileName,
    ) -> Result<Option<FileStat>, StoreError> {
        self.open(name, Access::ReadWrite)?.write_at(0, content)?;
        match self.stat(next) {
            Ok(stat) => Ok(Some(stat)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens `name` ahead for one [`Store::overwrite_and_stat`], which then takes one round trip.
    /// Does nothing by default.
    fn prepare_overwrite(&self, name: &FileName) {
        let _ = name;
    }

    /// Removes a file and makes the removal durable. An error means that it was not removed.
    fn remove_durably(&self, name: &FileName) -> Result<Applied, StoreError> {
        self.remove(name)?;
        Ok(self.flush_folder().into())
    }
}

/// Decides at the last moment whether a write is sent: see [`StoreFile::guard_writes`].
pub trait WriteGuard: Send + Sync {
    /// Whether a write may be sent now. Called under a mutex of the store, so it must neither block
    /// nor use the store.
    fn may_send(&self) -> bool;

    /// Called when a write may not be sent. `checks`: how often it succeeded for this write. May use
    /// the store. After an error, such as [`StoreError::Withheld`], nothing more of the write is sent.
    fn check_again(&self, checks: u32) -> Result<(), StoreError>;
}

/// One open file. Any number of threads may call at once. Calls on overlapping ranges have no
/// order, unless one returned before the other began.
///
/// After an error of kind `Disconnected` the handle is dead: every later call fails with the same
/// kind, and the file must be opened again. Nothing is retried inside.
#[expect(
    clippy::len_without_is_empty,
    reason = "the length costs a round trip; no caller asks whether a file is empty"
)]
pub trait StoreFile: Send + Sync {
    /// Asks the store for the current length in bytes.
    fn len(&self) -> Result<u64, StoreError>;

    /// Length, time and allocation of the open file.
    fn stat(&self) -> Result<FileStat, StoreError>;

    /// Fills `buf` from `offset`; `Truncated` if the file ends before that.
    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError>;

    /// Fills several parts, each as [`StoreFile::read_at`] does, in any order. On a slow connection
    /// a store has them under way at once.
    fn read_parts_at(
        &self,
        parts: &mut [(u64, &mut [u8])],
        class: ReadClass,
    ) -> Result<(), StoreError> {
        parts
            .iter_mut()
            .try_for_each(|(offset, buf)| self.read_at(*offset, buf, class))
    }

    /// Writes all of `data` at `offset`, growing the file if it ends earlier. On return the write
    /// was answered, but is not durable. After an error the range holds any mix of old and new
    /// bytes; after `Disconnected` it may even change until the server's process has exited.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError>;

    /// Writes several parts that don't overlap, each as [`StoreFile::write_at`] does, in any order.
    /// On a slow connection a store has them under way at once.
    fn write_parts_at(&self, parts: &[(u64, &[u8])]) -> Result<(), StoreError> {
        parts
            .iter()
            .try_for_each(|(offset, data)| self.write_at(*offset, data))
    }

    /// Writes parts as [`StoreFile::write_parts_at`] does. Then makes them, and every write that was
    /// answered before, durable as [`StoreFile::flush`] does. If the store knows that its server
    /// keeps the order of requests, both take one round trip.
    ///
    /// A failed write is the error; some of the parts may be durable then, and a flush may have
    /// failed, too. If only the flush failed, the outcome is [`Applied::NotDurable`].
    fn write_parts_durably(&self, parts: &[(u64, &[u8])]) -> Result<Applied, StoreError> {
        self.write_parts_at(parts)?;
        Ok(self.flush().into())
    }

    /// Reports each range that may hold data, in order. Outside of them the file reads as zeros.
    /// `Unsupported` if the store can't tell holes from data, which is the default.
    fn data_ranges(&self, _report: &mut dyn FnMut(Range<u64>)) -> Result<(), StoreError> {
        Err(StoreError::Unsupported {
            op: "find the holes of",
            object: "the file".to_owned(),
            reason: "it can't tell holes from data".to_owned(),
        })
    }

    /// Announces that much will be read or written. The store may prepare for that, without waiting. Does nothing by
    /// default.
    fn expect_much(&self) {}

    /// Asks the system to drop its cache of the file, so that the next read comes from the disk, as
    /// far as this host can do that. Does nothing by default.
    fn forget_cached(&self) {}

    /// Makes every write durable that was answered before this call, on every connection that
    /// carried one. After a failure *none* of them may be trusted: write them again on a new
    /// handle, then flush. Never just call it again.
    fn flush(&self) -> Result<(), StoreError>;

    /// As [`flush`](Self::flush), for a caller that goes on writing meanwhile: slower, and delays
    /// other calls as little as possible.
    fn flush_behind(&self) -> Result<(), StoreError> {
        self.flush()
    }

    /// The file's attributes behind the last [`StoreFile::write_parts_durably`], if the store asked
    /// for them in the same round trip and nothing was written since. `None` by default.
    fn stat_behind_flush(&self) -> Option<FileStat> {
        None
    }

    /// Gives the space of a range back; it then reads as zeros. `Unsupported` by default.
    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError>;

    /// As [`StoreFile::discard`], for several ranges, in order.
    fn discard_ranges(&self, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        let mut ranges = ranges.iter();
        ranges.try_for_each(|range| self.discard(range.start, range.end - range.start))
    }

    /// From now on `guard` is asked when a write enters a connection. A write may wait for that for
    /// a long time. Only the first guard counts. Does nothing by default: other stores have no
    /// queue.
    fn guard_writes(&self, guard: Arc<dyn WriteGuard>) {
        drop(guard);
    }

    /// Notes that the file was changed by other means than this handle, by something that has
    /// finished: the next flush makes that durable, too.
    fn changed_elsewhere(&self) {}

    /// Sets the length; new bytes are a hole.
    fn resize(&self, len: u64) -> Result<(), StoreError>;
}
