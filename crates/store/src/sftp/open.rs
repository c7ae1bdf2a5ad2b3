//! Opens files; reads, creates and removes small ones, in as few round trips as the order allows.
//!
//! Requests that do not depend on a pending answer are sent at once. This order must be kept: a
//! name is created before it is written to and before its folder is flushed; it is removed before
//! its folder is flushed; a handle is opened before it is used.

use std::sync::atomic::Ordering;

use super::channel::{Answer, Channel};
use super::codec::{Attributes, Malformed, OpenFor, Reply, Request};
use super::session::{Call, STATUS_EOF, SftpSession};
use crate::contract::{Access, Applied, Question};
use crate::{FileName, IgnorePoison, StoreError, StoreErrorKind};

/// How names become durable on this server.
enum Folder {
    /// By an fsync of this handle.
    Open(Vec<u8>),
    /// It opens no folders, or doesn't sync them. Each file's own fsync must do: on a file system
    /// with a journal or a log (ext4, XFS, btrfs) it covers the name that the file was last given.
    Closed,
    /// Not at all; the user allowed that.
    Unflushed,
}

/// How often a file that changes while it is being opened is tried.
const OPEN_ATTEMPTS: u32 = 3;

impl SftpSession {
    /// Opens a regular file on a channel. SFTP v3 can't refuse to follow a symbolic link. So the
    /// name is checked before, and the open file after; both must be the same, as far as v3 can
    /// tell.
    pub(crate) fn open_file(
        &self,
        channel: &Channel,
        op: &'static str,
        object: &str,
        path: &str,
        how: OpenFor,
    ) -> Result<(Vec<u8>, Attributes), StoreError> {
        self.open_file_asking(channel, op, object, path, how, &mut |_| {})
    }

    /// The same. Calls `behind` with the handle, to ask more while the open file is checked.
    pub(crate) fn open_file_asking(
        &self,
        channel: &Channel,
        op: &'static str,
        object: &str,
        path: &str,
        how: OpenFor,
        behind: &mut dyn FnMut(&[u8]),
    ) -> Result<(Vec<u8>, Attributes), StoreError> {
        let call = Call {
            channel,
            op,
            object,
        };
        for _ in 0..OPEN_ATTEMPTS {
            let (before, handle) = match how {
                OpenFor::Creating => (None, call.handle(&Request::Open { path, how })?),
                OpenFor::Reading | OpenFor::Writing => {
                    let (before, handle) = stat_and_open(&call, path, how)?;
                    (Some(before), handle)
                }
            };
            let after = call.ask(&Request::Fstat { handle: &handle });
            behind(&handle);
            let after = after.and_then(|asked| call.wait_attributes(&asked));
            match compare_stats(&call, before.as_ref(), after) {
                Ok(Some(after)) => return Ok((handle, after)),
                other => {
                    channel.send_unanswered(&Request::Close { handle: &handle });
                    other?;
                }
            }
        }
        Err(changing(&call))
    }

    /// Reads the first bytes of a file: `len_max` at most, in one request.
    pub(crate) fn read_small(
        &self,
        name: &FileName,
        access: Access,
        len_max: usize,
    ) -> Result<(Attributes, Vec<u8>), StoreError> {
        let how = OpenFor::existing(access);
        self.read_small_on(&self.first, name, how, len_max)
    }

    /// The same on any channel.
    pub(super) fn read_small_on(
        &self,
        channel: &Channel,
        name: &FileName,
        how: OpenFor,
        len_max: usize,
    ) -> Result<(Attributes, Vec<u8>), StoreError> {
        let (object, path) = (self.object(name), self.path(name));
        let call = Call {
            channel,
            op: "read",
            object: &object,
        };
        let len = u32::try_from(len_max).unwrap_or(u32::MAX);
        let len = len.min(self.read_bytes_max);
        for _ in 0..OPEN_ATTEMPTS {
            let (before, handle) = stat_and_open(&call, &path, how)?;
            let found = read_and_stat(&call, &handle, len);
            call.channel
                .send_unanswered(&Request::Close { handle: &handle });
            let (bytes, after) = found?;
            if let Some(after) = compare_stats(&call, Some(&before), Ok(after))? {
                return Ok((after, bytes));
            }
        }
        Err(changing(&call))
    }

    /// Creates a small file and makes it durable: see [`crate::Store::create_filled`].
    pub(crate) fn create_filled(
        &self,
        name: &FileName,
        content: &[u8],
        behind: &[Question],
    ) -> Result<Applied, StoreError> {
        let (object, path) = (self.object(name), self.path(name));
        let call = self.call("create", &object);
        let how = OpenFor::Creating;
        let created = call.ask(&Request::Open { path: &path, how })?;
        let folder = self.begin_folder();
        let created = call.wait_handle(&created);
        let folder = folder.and_then(|folder| self.end_folder(folder));
        let filled = match &created {
            Ok(file) => folder.and_then(|folder| self.fill(&call, file, &folder, content, behind)),
            Err(_) => folder.map(|folder| self.close_folder(&folder)),
        };
        let file = created?;
        self.close(&file);
        Ok(filled.map_err(|error| self.explain(error)).into())
    }

    /// Sends content and both flushes on one channel, which the server answers in order. If a
    /// server carried out the flush before the write, the content would only be covered by a later
    /// flush. A crash of the server would then leave an empty file, which every reader of small
    /// files must expect anyway.
    ///
    /// The questions `behind` are sent behind both flushes. If one of their answers overtakes a
    /// flush, none of them is used.
    fn fill(
        &self,
        call: &Call<'_>,
        file: &[u8],
        folder: &Folder,
        content: &[u8],
        behind: &[Question],
    ) -> Result<(), StoreError> {
        let write = call.ask(&Request::Write {
            handle: file,
            offset: 0,
            data: content,
        })?;
        let ask_flush = |handle| call.ask(&Request::Fsync { handle });
        let flush = match folder {
            Folder::Open(_) | Folder::Closed => Some(ask_flush(file)?),
            Folder::Unflushed => None,
        };
        let folder_flush = match folder {
            Folder::Open(folder) => Some(ask_flush(folder)?),
            Folder::Closed | Folder::Unflushed => None,
        };
        self.close_folder(folder);
        if self.keeps_order() {
            self.ask_ahead(behind);
        }
        let mut last = 0;
        let mut wait = |answer: &Answer| {
            let arrived = call.wait_arrival(answer)?;
            last = last.max(arrived.number);
            call.is_ok(&arrived.body)
        };
        let written = wait(&write);
        let flushed = flush.map_or(Ok(()), |flush| wait(&flush));
        let folder_flushed = folder_flush.map(|flush| wait(&flush));
        self.forget_overtaken(last);
        written.and(flushed)?;
        match folder_flushed {
            // The file's own fsync was sent already.
            Some(Err(error)) if no_folders(&error) => {
                self.folders_closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            other => other.unwrap_or(Ok(())),
        }
    }

    /// Opens a file ahead: see [`crate::Store::prepare_overwrite`]. If this fails, the overwrite
    /// opens the file and reports why it can't.
    pub(crate) fn prepare_overwrite(&self, name: &FileName) {
        let (object, path) = (self.object(name), self.path(name));
        let renames = self.renames_of(name);
        let call = self.call("write", &object);
        if let Ok((_, handle)) = stat_and_open(&call, &path, OpenFor::Writing) {
            let prepared = (name.clone(), renames, handle);
            let before = self.prepared.lock().ignore_poison().replace(prepared);
            if let Some((.., handle)) = before {
                self.close(&handle);
            }
        }
    }

    /// The handle of [`prepare_overwrite`](Self::prepare_overwrite), once.
    fn take_prepared(&self, wanted: &FileName) -> Option<Vec<u8>> {
        let (name, renames, handle) = self.prepared.lock().ignore_poison().take()?;
        if name == *wanted && renames == self.renames_of(wanted) {
            return Some(handle);
        }
        self.close(&handle);
        None
    }

    /// Overwrites a small file, and then checks another name: see
    /// [`crate::Store::overwrite_and_stat`]. Both are sent at once on one channel; if the server
    /// may not keep the order, one after the other.
    pub(crate) fn overwrite_and_stat(
        &self,
        name: &FileName,
        content: &[u8],
        next: &FileName,
    ) -> Result<Option<Attributes>, StoreError> {
        let (object, path) = (self.object(name), self.path(name));
        let call = self.call("write", &object);
        let (handle, prepared) = match self.take_prepared(name) {
            Some(handle) => (handle, true),
            None => (stat_and_open(&call, &path, OpenFor::Writing)?.1, false),
        };
        let (next_object, next_path) = (self.object(next), self.path(next));
        let stat_call = self.call("stat", &next_object);
        let stat = Request::Lstat { path: &next_path };
        let written = call.ask(&Request::Write {
            handle: &handle,
            offset: 0,
            data: content,
        });
        // The name may be gone since the file was opened.
        let own_stat = Request::Lstat { path: &path };
        let named = prepared.then(|| call.ask(&own_stat));
        // False: the answer came before that of the write, so it proves nothing.
        let is_named = |written_at: u64| match &named {
            Some(Ok(asked)) => Ok(call.attributes_behind(asked, written_at)?.is_some()),
            _ => Ok(true),
        };
        let outcome = written.and_then(|written| {
            if self.keeps_order() {
                let asked = stat_call.ask(&stat)?;
                let written = call.wait_arrival(&written)?;
                call.is_ok(&written.body)?;
                let named = is_named(written.number)?;
                let found = stat_call.attributes_behind(&asked, written.number);
                if named && !matches!(found, Ok(None)) {
                    return found;
                }
                self.note_overtaking();
                call.attributes(&own_stat)?;
            } else {
                is_named(0)?;
                call.wait_status(&written)?;
            }
            stat_call.attributes(&stat).map(Some)
        });
        self.close(&handle);
        match outcome {
            Err(StoreError::NotFound { op: "stat", .. }) => Ok(None),
            other => other.map_err(|error| self.explain(error)),
        }
    }

    /// Removes a name and makes that durable: see [`crate::Store::remove_durably`].
    pub(crate) fn remove_durably(&self, name: &FileName) -> Result<Applied, StoreError> {
        self.note_rename(name);
        let (object, path) = (self.object(name), self.path(name));
        let call = self.call("remove", &object);
        let removed = call.ask(&Request::Remove { path: &path })?;
        let folder = self.begin_folder();
        let removed = call.wait_status(&removed);
        let folder = folder.and_then(|folder| self.end_folder(folder));
        removed.map_err(|error| self.explain(error))?;
        let flushed = folder.and_then(|folder| self.flush_opened_folder(folder));
        Ok(flushed.into())
    }

    /// Makes creations, renames and removals durable that were answered before.
    pub(crate) fn flush_folder(&self) -> Result<(), StoreError> {
        let folder = self.begin_folder()?;
        let folder = self.end_folder(folder)?;
        self.flush_opened_folder(folder)
    }

    /// Asks for a handle of the folder that can be flushed; `None` if the server has none. A handle
    /// of `OPENDIR` can't be used for fsync (sftp-server needs a file's descriptor), but open(2)
    /// for reading accepts a folder, too. Other servers refuse that (ProFTPD's `mod_sftp`,
    /// asyncssh).
    fn begin_folder(&self) -> Result<Option<Answer>, StoreError> {
        let place = self.describe();
        let call = self.call("flush folder", &place);
        if self.extensions.fsync {
            if self.folders_closed.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let path = self.folder_path();
            let how = OpenFor::Reading;
            return Ok(Some(call.ask(&Request::Open { path, how })?));
        }
        if self.options.insist_without_fsync {
            return Ok(None);
        }
        Err(StoreError::Unsupported {
            op: "flush folder",
            object: place,
            reason: "the server has no fsync@openssh.com".to_owned(),
        })
    }

    fn end_folder(&self, asked: Option<Answer>) -> Result<Folder, StoreError> {
        let place = self.describe();
        let call = self.call("flush folder", &place);
        match asked.map(|asked| call.wait_handle(&asked)) {
            Some(Ok(handle)) => Ok(Folder::Open(handle)),
            Some(Err(error)) if refused(&error) => {
                self.folders_closed.store(true, Ordering::Relaxed);
                Ok(Folder::Closed)
            }
            Some(Err(error)) => Err(error),
            None if self.extensions.fsync => Ok(Folder::Closed),
            None => Ok(Folder::Unflushed),
        }
    }

    fn flush_opened_folder(&self, folder: Folder) -> Result<(), StoreError> {
        let handle = match folder {
            Folder::Open(handle) => handle,
            Folder::Closed => return self.flush_new_names(),
            Folder::Unflushed => return Ok(()),
        };
        let place = self.describe();
        let call = self.call("flush folder", &place);
        let outcome = call.status(&Request::Fsync { handle: &handle });
        self.close(&handle);
        match outcome {
            Ok(()) => {
                self.take_new_names();
                Ok(())
            }
            Err(error) if no_folders(&error) => {
                self.folders_closed.store(true, Ordering::Relaxed);
                self.flush_new_names()
            }
            Err(error) => Err(self.explain(error)),
        }
    }

    /// Flushes each file that was created or renamed since the last flush and still exists.
    /// Removals need no flush: if a crash of the server restores a name, every reader expects that
    /// (a lock of a session that ended, an unfinished copy).
    fn flush_new_names(&self) -> Result<(), StoreError> {
        for name in self.take_new_names() {
            let flushed = self.flush_one(&name);
            if flushed
                .as_ref()
                .is_err_and(|error| error.kind() != StoreErrorKind::NotFound)
            {
                self.note_new_name(&name);
                return flushed;
            }
        }
        Ok(())
    }

    fn flush_one(&self, name: &FileName) -> Result<(), StoreError> {
        let (object, path) = (self.object(name), self.path(name));
        let call = self.call("flush", &object);
        let (_, handle) = stat_and_open(&call, &path, OpenFor::Writing)?;
        let outcome = call.status(&Request::Fsync { handle: &handle });
        self.close(&handle);
        outcome.map_err(|error| self.explain(error))
    }

    fn close_folder(&self, folder: &Folder) {
        if let Folder::Open(handle) = folder {
            self.close(handle);
        }
    }

    fn close(&self, handle: &[u8]) {
        self.first.send_unanswered(&Request::Close { handle });
    }
}

/// Whether the server refused the request itself; otherwise it failed for another reason.
fn refused(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        StoreErrorKind::PermissionDenied | StoreErrorKind::Unsupported | StoreErrorKind::Failed
    )
}

/// Whether an fsync was refused because it was for a folder. A bare FAILURE may come from the disk.
fn no_folders(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        StoreErrorKind::PermissionDenied | StoreErrorKind::Unsupported
    )
}

/// Checks a name and opens it. For reading and writing both are sent at once. An open for reading
/// alone waits for the check: at a FIFO it would block the server (fifo(7)).
fn stat_and_open(
    call: &Call<'_>,
    path: &str,
    how: OpenFor,
) -> Result<(Attributes, Vec<u8>), StoreError> {
    let open = Request::Open { path, how };
    let regular = |found: Attributes| {
        if found.regular() {
            return Ok(found);
        }
        Err(not_regular(call))
    };
    let asked = call.ask(&Request::Lstat { path })?;
    if how == OpenFor::Reading {
        let found = call.wait_attributes(&asked).and_then(regular)?;
        return Ok((found, call.handle(&open)?));
    }
    let opened = call.ask(&open)?;
    let found = call.wait_attributes(&asked).and_then(regular);
    let handle = call.wait_handle(&opened);
    match (found, handle) {
        (Ok(found), Ok(handle)) => Ok((found, handle)),
        (Ok(_), Err(error)) => Err(error),
        (Err(error), handle) => {
            if let Ok(handle) = handle {
                call.channel
                    .send_unanswered(&Request::Close { handle: &handle });
            }
            Err(error)
        }
    }
}

/// Returns what is open now, if it is the regular file that was checked; `None` if the name may be
/// another file by now.
fn compare_stats(
    call: &Call<'_>,
    before: Option<&Attributes>,
    after: Result<Attributes, StoreError>,
) -> Result<Option<Attributes>, StoreError> {
    let after = after?;
    if !after.regular() {
        return Err(not_regular(call));
    }
    let same = before.is_none_or(|before| {
        (before.len, before.owner, before.mode) == (after.len, after.owner, after.mode)
    });
    Ok(same.then_some(after))
}

/// Reads up to `len` bytes from the start, and the attributes of the open file.
fn read_and_stat(
    call: &Call<'_>,
    handle: &[u8],
    len: u32,
) -> Result<(Vec<u8>, Attributes), StoreError> {
    let read = |offset: usize| {
        call.ask(&Request::Read {
            handle,
            offset: offset as u64,
            len: len - u32::try_from(offset).unwrap_or(len),
        })
    };
    let mut owed = read(0)?;
    let asked = call.ask(&Request::Fstat { handle })?;
    let mut bytes = Vec::new();
    loop {
        let body = call.wait(&owed)?;
        let space = len as usize - bytes.len();
        match call.parse(&body)? {
            Reply::Data(data) if data.len() > space => {
                return Err(call.broken(&Malformed::TooMuchData {
                    asked: space,
                    sent: data.len(),
                }));
            }
            Reply::Data([]) => break,
            Reply::Data(data) => bytes.extend_from_slice(data),
            Reply::Status {
                code: STATUS_EOF, ..
            } => break,
            _ => return Err(call.unexpected(&body)),
        }
        if bytes.len() == len as usize {
            break;
        }
        owed = read(bytes.len())?;
    }
    Ok((bytes, call.wait_attributes(&asked)?))
}

fn not_regular(call: &Call<'_>) -> StoreError {
    StoreError::NotRegular {
        op: call.op,
        object: call.object.to_owned(),
    }
}

fn changing(call: &Call<'_>) -> StoreError {
    StoreError::Refused {
        op: call.op,
        object: call.object.to_owned(),
        reason: "the file is being changed or replaced while it is opened".to_owned(),
    }
}
