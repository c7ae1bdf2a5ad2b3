//! One open file on an SFTP server: a handle per channel, transfers cut into requests.

mod answers;
mod batched_flush;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};

use super::channel::Channel;
use super::codec::{Attributes, OpenFor, Request};
use super::session::{Call, SftpSession};
use crate::contract::{Access, Applied, FileStat, ReadClass, StoreFile};
use crate::join::join;
use crate::{FileName, IgnorePoison, StoreError};
use answers::{Owed, Whole};

/// A transfer beyond this size is worth opening the data channels for.
const SMALL_TRANSFER_BYTES: usize = 32 * 1024;
/// Other channels take further reads once this much is under way on the first channel.
const DEMAND_QUEUE_BYTES: usize = 512 * 1024;
/// Requests end at multiples of this, so that a block is never split between two of them.
const BLOCK_BYTES: u64 = 4096;
/// Bytes that one call has requested ahead; their answers wait in memory.
const READ_WINDOW_BYTES: usize = 8 * 1024 * 1024;

pub(crate) struct SftpFile {
    pub(super) session: Arc<SftpSession>,
    name: FileName,
    pub(super) object: String,
    path: String,
    access: Access,
    /// [`SftpSession::renames_of`] when it was opened.
    renames: u64,
    opened: Attributes,
    first: Arc<Handle>,
    data: Vec<DataHandle>,
    /// Locked during a flush: a flush that starts later must not return before the one that took
    /// the `unsynced` marks.
    flushing: Mutex<()>,
    flush_failed: AtomicBool,
}

pub(super) struct Handle {
    pub(super) bytes: Vec<u8>,
    /// A write on it was answered since its last fsync started.
    unsynced: AtomicBool,
}

/// This file on one data channel, opened when it is first needed.
#[derive(Default)]
struct DataHandle {
    opening: Mutex<()>,
    /// `None`: the channel can't be used for it.
    opened: OnceLock<Option<Arc<Handle>>>,
}

impl SftpFile {
    pub(crate) fn open(
        session: &Arc<SftpSession>,
        name: &FileName,
        access: Access,
    ) -> Result<Self, StoreError> {
        let how = match access {
            Access::ReadOnly => OpenFor::Reading,
            Access::ReadWrite => OpenFor::Writing,
        };
        Self::open_as(session, name, access, "open", how)
    }

    pub(crate) fn create_new(
        session: &Arc<SftpSession>,
        name: &FileName,
    ) -> Result<Self, StoreError> {
        let access = Access::ReadWrite;
        let file = Self::open_as(session, name, access, "create", OpenFor::Creating)?;
        // So that a flush of an empty new file reaches its inode, too.
        file.first.unsynced.store(true, Ordering::SeqCst);
        Ok(file)
    }

    fn open_as(
        session: &Arc<SftpSession>,
        name: &FileName,
        access: Access,
        op: &'static str,
        how: OpenFor,
    ) -> Result<Self, StoreError> {
        let (object, path) = (session.object(name), session.path(name));
        let renames = session.renames_of(name);
        let (bytes, opened) = session.open_file(&session.first, op, &object, &path, how)?;
        Ok(Self {
            session: Arc::clone(session),
            name: name.clone(),
            object,
            path,
            access,
            renames,
            opened,
            first: Arc::new(Handle {
                bytes,
                unsynced: AtomicBool::new(false),
            }),
            data: (0..session.options.data_channels)
                .map(|_| DataHandle::default())
                .collect(),
            flushing: Mutex::default(),
            flush_failed: AtomicBool::new(false),
        })
    }

    pub(super) fn call<'a>(&'a self, channel: &'a Channel, op: &'static str) -> Call<'a> {
        Call {
            channel,
            op,
            object: &self.object,
        }
    }

    pub(super) fn attributes(&self, op: &'static str) -> Result<Attributes, StoreError> {
        let handle = &self.first.bytes;
        self.call(&self.session.first, op)
            .attributes(&Request::Fstat { handle })
    }

    fn writable(&self, op: &'static str) -> Result<(), StoreError> {
        match self.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(StoreError::PermissionDenied {
                op,
                object: self.object.clone(),
            }),
        }
    }

    /// The channel for a demand read: the first, which carries no bulk transfers. While that is
    /// busy with other such reads, one that is up and less busy.
    fn demand_channel(&self) -> (&Channel, Arc<Handle>) {
        let first = (&self.session.first, Arc::clone(&self.first));
        let busy = self.session.first.load();
        if busy <= DEMAND_QUEUE_BYTES {
            return first;
        }
        let less_busy = self.session.data_channels().iter().zip(&self.data);
        let less_busy = less_busy.filter_map(|(channel, slot)| {
            // This must not wait: neither for a channel nor for a handle on it.
            let handle = slot.opened.get()?.as_ref()?;
            let up = self.session.usable(channel);
            up.then(|| (channel.load(), channel, Arc::clone(handle)))
        });
        match less_busy.min_by_key(|(load, ..)| *load) {
            Some((load, channel, handle)) if load < busy => (channel, handle),
            _ => first,
        }
    }

    /// The channel for read-ahead, which must not fill the first one. If no other channel is up,
    /// this waits until one is, or none can be.
    fn ahead_channel(&self, len: usize) -> (&Channel, Arc<Handle>) {
        let first = &self.session.first;
        let up = |channel: &Channel| self.session.usable(channel);
        if !self.session.data_channels().iter().any(up) && first.load() + len <= DEMAND_QUEUE_BYTES
        {
            // A few reads are not worth more logins, nor a wait for them.
            return (first, Arc::clone(&self.first));
        }
        for channel in self.session.begin_data_channels() {
            // The next channel is tried only if this one can't be used.
            if channel.wait_greeting().is_ok() && self.session.usable(channel) {
                break;
            }
        }
        self.bulk_channel(len)
    }

    /// The least busy channel for bulk transfers; the first while no other is up.
    fn bulk_channel(&self, len: usize) -> (&Channel, Arc<Handle>) {
        let channels = if len > SMALL_TRANSFER_BYTES {
            self.session.begin_data_channels()
        } else {
            self.session.data_channels()
        };
        let mut candidates: Vec<(usize, usize, &Channel)> = channels
            .iter()
            .enumerate()
            .filter(|(_, channel)| self.session.usable(channel))
            .map(|(index, channel)| (channel.load(), index, channel))
            .collect();
        candidates.sort_by_key(|(load, index, _)| (*load, *index));
        for (_, index, channel) in candidates {
            if let Some(handle) = self.data_handle(index, channel) {
                return (channel, handle);
            }
        }
        (&self.session.first, Arc::clone(&self.first))
    }

    /// Returns this file's handle on a data channel, opened at first use. `None` while another
    /// caller opens it: channels are opened in parallel, not one after another.
    fn data_handle(&self, index: usize, channel: &Channel) -> Option<Arc<Handle>> {
        let slot = &self.data[index];
        if let Some(opened) = slot.opened.get() {
            return opened.clone();
        }
        let _opening = match slot.opening.try_lock() {
            Ok(opening) => opening,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let open = || {
            let (same, handle) = join(
                || self.session.leads_to_the_same_folder(index, channel),
                || self.join_channel(channel),
            );
            handle.filter(|_| same).map(Arc::new)
        };
        slot.opened.get_or_init(open).clone()
    }

    /// Opens the file again by its name. It must be the same file, as far as SFTP v3 can tell: not
    /// renamed or removed by us, same owner and mode, same length.
    pub(super) fn join_channel(&self, channel: &Channel) -> Option<Handle> {
        let how = match self.access {
            Access::ReadOnly => OpenFor::Reading,
            Access::ReadWrite => OpenFor::Writing,
        };
        // A writer may be growing the file between the two checks.
        for _ in 0..3 {
            let (bytes, found) = self
                .session
                .open_file(channel, "open", &self.object, &self.path, how)
                .ok()?;
            let handle = Handle {
                bytes,
                unsynced: AtomicBool::new(false),
            };
            let same = (found.owner, found.mode) == (self.opened.owner, self.opened.mode)
                && self
                    .attributes("open")
                    .is_ok_and(|first| first.len == found.len);
            if same && self.session.renames_of(&self.name) == self.renames {
                return Some(handle);
            }
            channel.send_unanswered(&Request::Close {
                handle: &handle.bytes,
            });
        }
        None
    }

    /// Cuts a range into requests of at most `max` bytes that end at block boundaries.
    fn cut(
        offset: u64,
        len: usize,
        max: u32,
    ) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        let mut start = 0;
        std::iter::from_fn(move || {
            if start == len {
                return None;
            }
            let at = offset + start as u64;
            let mut end = (len - start).min(max as usize);
            let torn = (at + end as u64) % BLOCK_BYTES;
            if start + end < len && torn < end as u64 {
                end -= usize::try_from(torn).unwrap_or(0);
            }
            let part = start..start + end;
            start = part.end;
            Some((at, part))
        })
    }

    /// Checks that a file can have this range; then `offset + len` never overflows.
    fn in_range(&self, op: &'static str, offset: u64, len: usize) -> Result<(), StoreError> {
        match offset.checked_add(len as u64) {
            Some(end) if i64::try_from(end).is_ok() => Ok(()),
            _ => Err(StoreError::Io {
                op,
                object: self.object.clone(),
                source: std::io::ErrorKind::InvalidInput.into(),
            }),
        }
    }
}

impl StoreFile for SftpFile {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(self.stat()?.len)
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        file_stat(&self.attributes("stat")?).ok_or_else(|| StoreError::Unsupported {
            op: "stat",
            object: self.object.clone(),
            reason: "the server reports no file lengths".to_owned(),
        })
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.read_parts_at(&mut [(offset, buf)], class)
    }

    fn read_parts_at(
        &self,
        parts: &mut [(u64, &mut [u8])],
        class: ReadClass,
    ) -> Result<(), StoreError> {
        let mut owed: VecDeque<(Owed<'_>, Whole, &mut [u8])> = VecDeque::new();
        let mut waiting = 0;
        for (offset, buf) in parts {
            self.in_range("read", *offset, buf.len())?;
            let whole = Whole {
                offset: *offset,
                len: buf.len(),
            };
            let mut rest: &mut [u8] = buf;
            for (at, part) in Self::cut(*offset, whole.len, self.session.read_bytes_max) {
                while waiting + part.len() > READ_WINDOW_BYTES
                    && let Some((read, whole, into)) = owed.pop_front()
                {
                    waiting -= read.len;
                    self.take_read(&read, &whole, into)?;
                }
                let (channel, handle) = match class {
                    ReadClass::Demand => self.demand_channel(),
                    ReadClass::Ahead => self.ahead_channel(part.len()),
                };
                let len = u32::try_from(part.len()).unwrap_or(self.session.read_bytes_max);
                let request = Request::Read {
                    handle: &handle.bytes,
                    offset: at,
                    len,
                };
                let answer = self.call(channel, "read").ask(&request)?;
                waiting += part.len();
                let (into, behind) = std::mem::take(&mut rest).split_at_mut(part.len());
                rest = behind;
                let len = part.len();
                let read = Owed {
                    channel,
                    handle,
                    at,
                    len,
                    answer,
                };
                owed.push_back((read, whole, into));
            }
        }
        while let Some((read, whole, into)) = owed.pop_front() {
            self.take_read(&read, &whole, into)?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.write_parts_at(&[(offset, data)])
    }

    fn write_parts_at(&self, parts: &[(u64, &[u8])]) -> Result<(), StoreError> {
        self.may_write(parts)?;
        let (owed, mut outcome) = self.ask_writes(parts);
        // Every answer is waited for, even after a failure: when the caller writes there again,
        // perhaps on another channel, no write of this call may still be under way.
        for write in owed {
            let call = self.call(write.channel, "write");
            let answered = call.wait(&write.answer).and_then(|body| {
                write.handle.unsynced.store(true, Ordering::SeqCst);
                call.is_ok(&body)
            });
            outcome = outcome.and(answered);
        }
        outcome.map_err(|error| self.session.explain(error))
    }

    fn write_parts_durably(&self, parts: &[(u64, &[u8])]) -> Result<Applied, StoreError> {
        self.write_and_flush(parts)
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.flush_handles(0)
    }

    /// A server stops reading a channel during an fsync. The first fsync writes what all channels
    /// sent, while the others carry on; their own fsyncs then find little left.
    fn flush_behind(&self) -> Result<(), StoreError> {
        self.flush_handles(1)
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<(), StoreError> {
        Err(StoreError::Unsupported {
            op: "discard",
            object: self.object.clone(),
            reason: "SFTP has no request that makes a hole".to_owned(),
        })
    }

    fn changed_elsewhere(&self) {
        self.first.unsynced.store(true, Ordering::SeqCst);
    }

    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.writable("resize")?;
        let handle = &self.first.bytes;
        let outcome = self
            .call(&self.session.first, "resize")
            .status(&Request::SetLen { handle, len });
        self.first.unsynced.store(true, Ordering::SeqCst);
        outcome.map_err(|error| self.session.explain(error))
    }
}

impl SftpFile {
    /// Checks that all of this may be written to this file.
    fn may_write(&self, parts: &[(u64, &[u8])]) -> Result<(), StoreError> {
        self.writable("write")?;
        parts
            .iter()
            .try_for_each(|(offset, data)| self.in_range("write", *offset, data.len()))
    }

    /// Sends the writes. The second value is why not all of them were sent.
    fn ask_writes(&self, parts: &[(u64, &[u8])]) -> (Vec<Owed<'_>>, Result<(), StoreError>) {
        // A few small parts are not worth the data channels; many are.
        let whole: usize = parts.iter().map(|(_, data)| data.len()).sum();
        let max = self.session.write_bytes_max;
        let requests = parts.iter().flat_map(|(offset, data)| {
            Self::cut(*offset, data.len(), max).map(move |(at, part)| (at, &data[part]))
        });
        let mut owed = Vec::new();
        for (at, data) in requests {
            let (channel, handle) = self.bulk_channel(whole);
            let len = data.len();
            let request = Request::Write {
                handle: &handle.bytes,
                offset: at,
                data,
            };
            match self.call(channel, "write").ask(&request) {
                Ok(answer) => owed.push(Owed {
                    channel,
                    handle,
                    at,
                    len,
                    answer,
                }),
                Err(error) => return (owed, Err(error)),
            }
        }
        (owed, Ok(()))
    }

    /// Syncs every handle with writes since its last fsync: first `ahead` of them, then the others.
    fn flush_handles(&self, ahead: usize) -> Result<(), StoreError> {
        let _flushing = self.flushing.lock().ignore_poison();
        self.no_flush_failed()?;
        if !self.session.extensions.fsync {
            if self.session.options.insist_without_fsync {
                return Ok(());
            }
            return Err(StoreError::Unsupported {
                op: "flush",
                object: self.object.clone(),
                reason: "the server has no fsync@openssh.com".to_owned(),
            });
        }
        // All marks are taken first: what is answered from now on belongs to the next flush.
        let mut handles = self.handles();
        handles.retain(|(_, handle)| handle.unsynced.swap(false, Ordering::SeqCst));
        let mut outcome = Ok(());
        let (ahead, others) = handles.split_at(ahead.min(handles.len()));
        for some in [ahead, others] {
            let asked: Vec<_> = some
                .iter()
                .map(|(channel, handle)| {
                    let call = self.call(channel, "flush");
                    let handle = &handle.bytes;
                    let answer = call.ask(&Request::Fsync { handle });
                    (call, answer)
                })
                .collect();
            for (call, answer) in asked {
                let answered = answer
                    .and_then(|answer| call.wait(&answer))
                    .and_then(|body| call.is_ok(&body));
                outcome = outcome.and(answered);
            }
        }
        if outcome.is_err() {
            self.flush_failed.store(true, Ordering::SeqCst);
        }
        outcome.map_err(|error| self.session.explain(error))
    }

    fn no_flush_failed(&self) -> Result<(), StoreError> {
        if !self.flush_failed.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(StoreError::Refused {
            op: "flush",
            object: self.object.clone(),
            reason: "an earlier flush of this handle failed: what it covered is lost".to_owned(),
        })
    }

    /// Every open handle with its channel.
    fn handles(&self) -> Vec<(&Channel, Arc<Handle>)> {
        let mut handles = vec![(&self.session.first, Arc::clone(&self.first))];
        for (channel, slot) in self.session.data_channels().iter().zip(&self.data) {
            if let Some(Some(handle)) = slot.opened.get() {
                handles.push((channel, Arc::clone(handle)));
            }
        }
        handles
    }
}

impl Drop for SftpFile {
    fn drop(&mut self) {
        for (channel, handle) in self.handles() {
            channel.send_unanswered(&Request::Close {
                handle: &handle.bytes,
            });
        }
    }
}

/// Converts attributes; `None` if the server reports no length.
pub(crate) fn file_stat(found: &Attributes) -> Option<FileStat> {
    Some(FileStat {
        len: found.len?,
        modified_s: found.modified_s.map(u64::from),
        regular: found.regular(),
        allocated_bytes: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(offset: u64, len: usize, max: u32) -> Vec<(u64, usize)> {
        SftpFile::cut(offset, len, max)
            .map(|(at, part)| (at, part.len()))
            .collect()
    }

    #[test]
    fn requests_are_cut_at_block_boundaries() {
        assert_eq!(parts(0, 0, 8192), []);
        assert_eq!(parts(0, 5000, 8192), [(0, 5000)]);
        assert_eq!(
            parts(0, 20_000, 10_000),
            [(0, 8192), (8192, 8192), (16_384, 3616)]
        );
        assert_eq!(parts(4000, 8192, 4200), [(4000, 96 + 4096), (8192, 4000)]);
        let offset = 3;
        let cut = parts(offset, 8 * 1024 * 1024 + 1, 261_120);
        assert_eq!(
            cut.iter().map(|(_, len)| len).sum::<usize>(),
            8 * 1024 * 1024 + 1
        );
        assert!(cut.iter().skip(1).all(|(at, _)| at % 4096 == 0));
        assert!(cut.iter().all(|(_, len)| *len <= 261_120));
    }
}
