//! Opens files, and reads, makes and removes small ones whole, in as few round trips as the order
//! of things allows.
//!
//! What depends on nothing that is still to be answered is asked at once. What follows what, and
//! must: a name is made before it is written to and before its folder is flushed; it is removed
//! before its folder is flushed; a handle is there before it is used.

use std::sync::atomic::Ordering;

use super::channel::{Answer, Channel};
use super::codec::{Attributes, Malformed, OpenFor, Reply, Request};
use super::session::{Call, STATUS_EOF, Session};
use crate::contract::{Access, Applied};
use crate::{FileName, StoreError, StoreErrorKind};

/// How names become durable on this server.
enum Folder {
    /// By an fsync of this handle.
    Open(Vec<u8>),
    /// It opens no folders, or doesn't sync them: by each file's own fsync, which on a file system
    /// with a journal or a log covers the name that the file was last given (ext4, XFS, btrfs).
    Closed,
    /// Not at all, and the user insists.
    Unflushed,
}

/// How often a file that changes while it is being opened is looked at.
const OPEN_ATTEMPTS: u32 = 3;

impl Session {
    /// Opens a regular file on a channel. SFTP v3 can't refuse to follow a symbolic link, so the
    /// name is looked at before and what was opened is looked at after; both must be the same as
    /// far as v3 tells.
    pub(crate) fn open_file(
        &self,
        channel: &Channel,
        op: &'static str,
        object: &str,
        path: &str,
        how: OpenFor,
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
                    let (before, handle) = look_and_open(&call, path, how)?;
                    (Some(before), handle)
                }
            };
            let after = call.attributes(&Request::Fstat { handle: &handle });
            match judge(&call, before.as_ref(), after) {
                Ok(Some(after)) => return Ok((handle, after)),
                other => {
                    channel.tell(&Request::Close { handle: &handle });
                    other?;
                }
            }
        }
        Err(changing(&call))
    }

    /// Reads the first bytes of a file, `len_max` at most and one request's worth.
    pub(crate) fn read_small(
        &self,
        name: &FileName,
        access: Access,
        len_max: usize,
    ) -> Result<(Attributes, Vec<u8>), StoreError> {
        let how = match access {
            Access::ReadOnly => OpenFor::Reading,
            Access::ReadWrite => OpenFor::Writing,
        };
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
            let (before, handle) = look_and_open(&call, &path, how)?;
            let found = read_and_look(&call, &handle, len);
            call.channel.tell(&Request::Close { handle: &handle });
            let (bytes, after) = found?;
            if let Some(after) = judge(&call, Some(&before), Ok(after))? {
                return Ok((after, bytes));
            }
        }
        Err(changing(&call))
    }

    /// Makes a small file, and then makes it durable: see [`crate::Store::create_filled`].
    pub(crate) fn create_filled(
        &self,
        name: &FileName,
        content: &[u8],
    ) -> Result<Applied, StoreError> {
        let (object, path) = (self.object(name), self.path(name));
        let call = self.call("create", &object);
        let how = OpenFor::Creating;
        let created = call.ask(&Request::Open { path: &path, how })?;
        let folder = self.begin_folder();
        let created = call.wait_handle(&created);
        let folder = folder.and_then(|folder| self.end_folder(folder));
        let filled = match &created {
            Ok(file) => folder.and_then(|folder| self.fill(&call, file, &folder, content)),
            Err(_) => folder.map(|folder| self.close_folder(&folder)),
        };
        let file = created?;
        self.close(&file);
        Ok(filled.map_err(|error| self.explain(error)).into())
    }

    /// Content and both flushes on one channel, whose server answers in order. One that took the
    /// flush before the write would leave the content to a later flush: a crash of the server then
    /// leaves an empty file, which every reader of small files must expect anyway.
    fn fill(
        &self,
        call: &Call<'_>,
        file: &[u8],
        folder: &Folder,
        content: &[u8],
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
        call.wait_status(&write)?;
        if let Some(flush) = flush {
            call.wait_status(&flush)?;
        }
        match folder_flush.map(|flush| call.wait_status(&flush)) {
            // The file's own fsync was there already.
            Some(Err(error)) if no_folders(&error) => {
                self.folders_closed.store(true, Ordering::Relaxed);
                Ok(())
            }
            other => other.unwrap_or(Ok(())),
        }
    }

    /// Writes over a small file, and looks at another name behind that: see
    /// [`crate::Store::overwrite_and_stat`]. Both on one channel; where its server may not keep the
    /// order, one after the other.
    pub(crate) fn overwrite_and_stat(
        &self,
        name: &FileName,
        content: &[u8],
        next: &FileName,
    ) -> Result<Option<Attributes>, StoreError> {
        let (object, path) = (self.object(name), self.path(name));
        let call = self.call("write", &object);
        let (_, handle) = look_and_open(&call, &path, OpenFor::Writing)?;
        let (next_object, next_path) = (self.object(next), self.path(next));
        let stat_call = self.call("stat", &next_object);
        let stat = Request::Lstat { path: &next_path };
        let written = call.ask(&Request::Write {
            handle: &handle,
            offset: 0,
            data: content,
        });
        let outcome = written.and_then(|written| {
            if self.one_by_one() {
                let stat = stat_call.ask(&stat)?;
                call.wait_status(&written)?;
                return stat_call.wait_attributes(&stat).map(Some);
            }
            call.wait_status(&written)?;
            stat_call.attributes(&stat).map(Some)
        });
        self.close(&handle);
        match outcome {
            Err(StoreError::NotFound { op: "stat", .. }) => Ok(None),
            other => other.map_err(|error| self.explain(error)),
        }
    }

    /// Removes a name, and then makes that durable: see [`crate::Store::remove_durably`].
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

    /// Asks for a handle of the folder that can be flushed; `None` where there is none to be had.
    /// `OPENDIR`'s handles can't be given to fsync (sftp-server looks for a file's descriptor),
    /// but open(2) for reading takes a folder, too. Other servers refuse that (ProFTPD's
    /// `mod_sftp`, asyncssh).
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

    /// Flushes each file that was made or renamed since the last flush and is still there.
    /// A removal has nothing to flush: a name that a crash of the server brings back is one that
    /// every reader expects (a lock of a session that ended, a half-made copy).
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
        let (_, handle) = look_and_open(&call, &path, OpenFor::Writing)?;
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
        self.first.tell(&Request::Close { handle });
    }
}

/// Whether the server answered that it won't, rather than that it failed on the way.
fn refused(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        StoreErrorKind::PermissionDenied | StoreErrorKind::Unsupported | StoreErrorKind::Failed
    )
}

/// Whether an fsync of a folder was refused as such. A bare FAILURE may be the disk's.
fn no_folders(error: &StoreError) -> bool {
    matches!(
        error.kind(),
        StoreErrorKind::PermissionDenied | StoreErrorKind::Unsupported
    )
}

/// Looks at a name and opens it. For reading and writing both go out at once. An open for reading
/// alone waits for the look: it would keep the server waiting at a FIFO (fifo(7)).
fn look_and_open(
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
    let looked = call.ask(&Request::Lstat { path })?;
    if how == OpenFor::Reading {
        let found = call.wait_attributes(&looked).and_then(regular)?;
        return Ok((found, call.handle(&open)?));
    }
    let opened = call.ask(&open)?;
    let found = call.wait_attributes(&looked).and_then(regular);
    let handle = call.wait_handle(&opened);
    match (found, handle) {
        (Ok(found), Ok(handle)) => Ok((found, handle)),
        (Ok(_), Err(error)) => Err(error),
        (Err(error), handle) => {
            if let Ok(handle) = handle {
                call.channel.tell(&Request::Close { handle: &handle });
            }
            Err(error)
        }
    }
}

/// What is open now, if it is the regular file that was looked at; `None` where the name may mean
/// another one by now.
fn judge(
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

/// Reads up to `len` bytes from the start, and looks at what is open.
fn read_and_look(
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
    let looked = call.ask(&Request::Fstat { handle })?;
    let mut bytes = Vec::new();
    loop {
        let body = call.wait(&owed)?;
        let room = len as usize - bytes.len();
        match call.parse(&body)? {
            Reply::Data(data) if data.len() > room => {
                return Err(call.broken(&Malformed::TooMuchData {
                    asked: room,
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
    Ok((bytes, call.wait_attributes(&looked)?))
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
