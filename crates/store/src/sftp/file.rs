//! One open file on an SFTP server: a handle per channel, transfers cut into requests.

mod agent;
mod answers;
mod batched_flush;
mod joined;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use super::channel::Channel;
use super::codec::{Attributes, OpenFor, Request};
use super::further::SharedSession;
use super::session::Call;
use crate::contract::{Access, Applied, FileStat, ReadClass, StoreFile, WriteGuard};
use crate::{FileName, IgnorePoison, StoreError};
use answers::{Owed, Whole, ask_range};
pub(super) use joined::{Handle, OpenFile};

/// Other channels take further reads once this much is under way on the first channel.
const DEMAND_QUEUE_BYTES: usize = 512 * 1024;
/// Requests end at multiples of this, so that a block is never split between two of them.
const BLOCK_BYTES: u64 = 4096;
/// Bytes that one call has requested ahead; their answers wait in memory.
const READ_WINDOW_BYTES: usize = 8 * 1024 * 1024;

/// The bytes of each range, or why they can't be read.
type RangesRead = Vec<Result<Vec<u8>, StoreError>>;

pub(crate) struct SftpFile {
    pub(super) session: Arc<SharedSession>,
    file: Arc<OpenFile>,
    /// Locked during a flush: a flush that starts later must not return before the one that took
    /// the `unsynced` marks.
    flushing: Mutex<()>,
    flush_failed: AtomicBool,
    /// Asked before each write is sent.
    guard: OnceLock<Arc<dyn WriteGuard>>,
    /// How often the file was changed through this handle.
    changes: AtomicU64,
    /// The attributes behind a flush, and the number of changes then.
    behind_flush: Mutex<Option<(u64, Attributes)>>,
}

impl SftpFile {
    pub(crate) fn open(
        session: &Arc<SharedSession>,
        name: &FileName,
        access: Access,
    ) -> Result<Self, StoreError> {
        let how = ("open", OpenFor::existing(access));
        Self::open_as(session, name, access, how, &mut |_| {})
    }

    /// Opens the file and reads these ranges, all asked for on the first channel before the first
    /// answer is waited for. Their answers wait in memory.
    pub(crate) fn open_and_read(
        session: &Arc<SharedSession>,
        name: &FileName,
        access: Access,
        ranges: &[(u64, usize)],
    ) -> Result<(Self, RangesRead), StoreError> {
        let object = session.object(name);
        let call = Call {
            channel: &session.first,
            op: "read",
            object: &object,
        };
        let mut asked = Vec::new();
        // If another file has the name by now, it is called again, with that file's handle.
        let mut ask_reads = |handle: &[u8]| {
            let ask = |range: &(u64, usize)| ask_range(session, &call, handle, *range);
            asked = ranges.iter().map(ask).collect();
        };
        let how = ("open", OpenFor::existing(access));
        let file = Self::open_as(session, name, access, how, &mut ask_reads)?;
        let read = ranges.iter().zip(asked);
        let read = read.map(|((offset, len), answers)| {
            file.in_range("read", *offset, *len)?;
            let mut bytes = vec![0; *len];
            file.take_range((*offset, &mut bytes), answers?)?;
            Ok(bytes)
        });
        let read = read.collect();
        Ok((file, read))
    }

    /// The attributes when it was opened.
    pub(crate) fn as_opened(&self) -> &Attributes {
        self.file.as_opened()
    }

    pub(crate) fn create_new(
        session: &Arc<SharedSession>,
        name: &FileName,
    ) -> Result<Self, StoreError> {
        let how = ("create", OpenFor::Creating);
        let file = Self::open_as(session, name, Access::ReadWrite, how, &mut |_| {})?;
        // So that a flush of an empty new file reaches its inode, too.
        file.file.first.unsynced.store(true, Ordering::SeqCst);
        Ok(file)
    }

    fn open_as(
        session: &Arc<SharedSession>,
        name: &FileName,
        access: Access,
        how: (&'static str, OpenFor),
        behind: &mut dyn FnMut(&[u8]),
    ) -> Result<Self, StoreError> {
        Ok(Self {
            session: Arc::clone(session),
            file: Arc::new(OpenFile::open(session, name, access, how, behind)?),
            flushing: Mutex::default(),
            flush_failed: AtomicBool::new(false),
            guard: OnceLock::new(),
            changes: AtomicU64::new(0),
            behind_flush: Mutex::default(),
        })
    }

    pub(super) fn call<'a>(&'a self, channel: &'a Channel, op: &'static str) -> Call<'a> {
        Call {
            channel,
            op,
            object: &self.file.object,
        }
    }

    pub(super) fn attributes(&self, op: &'static str) -> Result<Attributes, StoreError> {
        let handle = &self.file.first.bytes;
        self.call(&self.session.first, op)
            .attributes(&Request::Fstat { handle })
    }

    fn writable(&self, op: &'static str) -> Result<(), StoreError> {
        match self.file.access {
            Access::ReadWrite => Ok(()),
            Access::ReadOnly => Err(StoreError::PermissionDenied {
                op,
                object: self.file.object.clone(),
            }),
        }
    }

    /// The channel for a demand read: the first, which carries no bulk transfers once others can.
    /// While that is busy with other such reads, one that joined and is less busy.
    fn demand_channel(&self) -> (&Channel, Arc<Handle>) {
        let busy = self.session.first.load();
        if busy > DEMAND_QUEUE_BYTES
            && let Some((load, channel, handle)) = self.least_busy()
            && load < busy
        {
            return (channel, handle);
        }
        (&self.session.first, Arc::clone(&self.file.first))
    }

    /// The channel for a bulk transfer (a write or read-ahead): the least busy one that joined this
    /// file. Before the first has joined, the first channel; while that is full, this waits for
    /// whichever comes first: space, or a joined connection. So demand reads never wait behind more
    /// than a full channel. `when_full` may want further connections.
    fn bulk_channel(&self, len: usize, when_full: impl Fn()) -> (&Channel, Arc<Handle>) {
        if let Some((_, channel, handle)) = self.least_busy() {
            return (channel, handle);
        }
        let first = &self.session.first;
        if first.is_full(len) {
            when_full();
            first.wait_while_full(len, || self.file.has_joined());
            if let Some((_, channel, handle)) = self.least_busy() {
                return (channel, handle);
            }
        }
        (first, Arc::clone(&self.file.first))
    }

    /// The least busy of the further connections that joined this file, with its load.
    fn least_busy(&self) -> Option<(usize, &Channel, Arc<Handle>)> {
        let joined = self.joined();
        joined.min_by_key(|(load, ..)| *load)
    }

    fn joined(&self) -> impl Iterator<Item = (usize, &Channel, Arc<Handle>)> {
        (0..self.session.further.number()).filter_map(|index| {
            let handle = self.file.joined(index)?;
            let channel = self.session.further.channel(index)?;
            Some((channel.load(), channel, handle))
        })
    }

    /// Cuts a range into requests of at most `max` bytes that end at block boundaries.
    fn cut(offset: u64, len: usize, max: u32) -> impl Iterator<Item = (u64, Range<usize>)> {
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
                object: self.file.object.clone(),
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
            object: self.file.object.clone(),
            reason: "the server reports no file lengths".to_owned(),
        })
    }

    fn expect_much(&self) {
        self.session.want_further(&self.file);
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
                    ReadClass::Ahead => self.bulk_channel(part.len(), || {
                        self.session.want_further(&self.file);
                    }),
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
            outcome = both(outcome, answered);
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

    fn stat_behind_flush(&self) -> Option<FileStat> {
        let behind = self.behind_flush.lock().ignore_poison();
        let (changes, found) = behind.as_ref()?;
        let current = *changes == self.changes.load(Ordering::SeqCst);
        current.then(|| file_stat(found)).flatten()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let range = offset..offset.saturating_add(len);
        self.discard_ranges(std::slice::from_ref(&range))
    }

    fn discard_ranges(&self, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        self.punch(ranges)
    }

    fn data_ranges(&self, report: &mut dyn FnMut(Range<u64>)) -> Result<(), StoreError> {
        self.map(report)
    }

    fn guard_writes(&self, guard: Arc<dyn WriteGuard>) {
        let _ = self.guard.set(guard);
    }

    fn changed_elsewhere(&self) {
        self.changes();
        self.file.first.unsynced.store(true, Ordering::SeqCst);
    }

    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.writable("resize")?;
        self.changes();
        let handle = &self.file.first.bytes;
        let outcome = self
            .call(&self.session.first, "resize")
            .status(&Request::SetLen { handle, len });
        self.file.first.unsynced.store(true, Ordering::SeqCst);
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

    fn changes(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// Sends the writes. The second value is why not all of them were sent.
    fn ask_writes(&self, parts: &[(u64, &[u8])]) -> (Vec<Owed<'_>>, Result<(), StoreError>) {
        // Counted before and after: whoever asks for attributes in between sees a change.
        self.changes();
        let asked = self.ask_all_writes(parts);
        self.changes();
        asked
    }

    fn ask_all_writes(&self, parts: &[(u64, &[u8])]) -> (Vec<Owed<'_>>, Result<(), StoreError>) {
        let max = self.session.write_bytes_max;
        let requests = parts.iter().flat_map(|(offset, data)| {
            Self::cut(*offset, data.len(), max).map(move |(at, part)| (at, &data[part]))
        });
        let mut owed = Vec::new();
        for (at, data) in requests {
            match self.ask_write(at, data) {
                Ok(write) => owed.push(write),
                Err(error) => return (owed, Err(error)),
            }
        }
        (owed, Ok(()))
    }

    /// Sends one write, once the guard allows it. While the guard checks again, no place in a queue
    /// is taken: its own requests may need that.
    fn ask_write(&self, at: u64, data: &[u8]) -> Result<Owed<'_>, StoreError> {
        let guard = self.guard.get();
        for checks in 0.. {
            let (channel, handle) = self.bulk_channel(data.len(), || {
                let bytes = data.len();
                self.session.writes_found_first_full(&self.file, bytes);
            });
            let len = data.len();
            let request = Request::Write {
                handle: &handle.bytes,
                offset: at,
                data,
            };
            let may_send = || guard.is_none_or(|guard| guard.may_send());
            let call = self.call(channel, "write");
            if let Some(answer) = call.ask_if(&request, &may_send)? {
                return Ok(Owed {
                    channel,
                    handle,
                    at,
                    len,
                    answer,
                });
            }
            if let Some(guard) = guard {
                guard.check_again(checks)?;
            }
        }
        unreachable!("the loop ends only by a return")
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
                object: self.file.object.clone(),
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
            object: self.file.object.clone(),
            reason: "an earlier flush of this handle failed: what it covered is lost".to_owned(),
        })
    }

    /// Every open handle with its channel.
    fn handles(&self) -> Vec<(&Channel, Arc<Handle>)> {
        let mut handles = vec![(&self.session.first, Arc::clone(&self.file.first))];
        handles.extend(self.joined().map(|(_, channel, handle)| (channel, handle)));
        handles
    }
}

impl Drop for SftpFile {
    fn drop(&mut self) {
        self.file.close(&self.session);
    }
}

/// The outcome of two writes. The error of one that may still be carried out comes first: the other
/// one's says that it will not be.
fn both(one: Result<(), StoreError>, other: Result<(), StoreError>) -> Result<(), StoreError> {
    match (one, other) {
        (Err(one), Err(other)) if one.was_answered() && !other.was_answered() => Err(other),
        (one, other) => one.and(other),
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
