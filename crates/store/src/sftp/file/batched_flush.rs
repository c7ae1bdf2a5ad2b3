//! Writes and their fsync in one round trip, if the server carries out requests in order.
//!
//! An fsync that is sent behind a write, on the same channel and handle, covers it if the server
//! carries out requests in order. This is used only with a server that greets like OpenSSH's. If an
//! answer ever overtakes another one, the server's order is not trusted any more, and the writes
//! are flushed again.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Handle, Owed, SftpFile, both};
use crate::contract::{Applied, StoreFile};
use crate::sftp::channel::{Answer, Channel};
use crate::sftp::codec::{Reply, Request};
use crate::{IgnorePoison, StoreError};

/// An fsync that was sent.
struct Asked<'a> {
    channel: &'a Channel,
    handle: Arc<Handle>,
    answer: Result<Answer, StoreError>,
}

/// A question for the attributes that was sent behind an fsync.
struct AskedStat<'a> {
    channel: &'a Channel,
    answer: Answer,
    /// The number of changes before.
    changes: u64,
}

impl SftpFile {
    /// See [`StoreFile::write_parts_durably`].
    pub(super) fn write_and_flush(&self, parts: &[(u64, &[u8])]) -> Result<Applied, StoreError> {
        if !self.session.keeps_order() {
            self.write_parts_at(parts)?;
            return Ok(self.flush().into());
        }
        let flushing = self.flushing.lock().ignore_poison();
        if let Err(error) = self.no_flush_failed() {
            return Ok(Applied::NotDurable(error));
        }
        self.may_write(parts)?;
        let (writes, unasked) = self.ask_writes(parts);
        let flushes = self.ask_flushes(&writes);
        let stat = self.ask_stat_behind(&writes);
        let (mut written, mut flushed) = (unasked, Ok(()));
        // Every answer is waited for, even after a failure: see `write_parts_at`.
        let mut last: Vec<(&Channel, u64)> = Vec::new();
        for write in &writes {
            let call = self.call(write.channel, "write");
            let answered = call.wait_arrival(&write.answer).and_then(|arrived| {
                last.push((write.channel, arrived.number));
                call.is_ok(&arrived.body)
            });
            written = both(written, answered);
        }
        let (mut overtaken, mut flushed_at) = (false, 0);
        for asked in flushes {
            let call = self.call(asked.channel, "flush");
            let answered = asked.answer.and_then(|answer| {
                let arrived = call.wait_arrival(&answer)?;
                overtaken |= last.iter().any(|(channel, number)| {
                    std::ptr::eq(*channel, asked.channel) && *number > arrived.number
                });
                flushed_at = arrived.number;
                call.is_ok(&arrived.body)
            });
            if answered.is_err() {
                // Perhaps written, but certainly not durable.
                asked.handle.unsynced.store(true, Ordering::SeqCst);
            }
            flushed = flushed.and(answered);
        }
        if flushed.is_err() {
            self.flush_failed.store(true, Ordering::SeqCst);
        }
        if overtaken || written.is_err() {
            for write in &writes {
                write.handle.unsynced.store(true, Ordering::SeqCst);
            }
        }
        drop(flushing);
        written.map_err(|error| self.session.explain(error))?;
        if let Err(error) = flushed {
            return Ok(Applied::NotDurable(self.session.explain(error)));
        }
        if overtaken {
            self.session.note_overtaking();
            return Ok(self.flush().into());
        }
        if let Some(stat) = stat {
            self.note_stat_behind(&stat, flushed_at);
        }
        Ok(Applied::Durable)
    }

    /// Asks for the attributes behind the fsync, if one channel carries everything: then they are
    /// those after the last write.
    fn ask_stat_behind<'a>(&self, writes: &[Owed<'a>]) -> Option<AskedStat<'a>> {
        let [write] = writes else { return None };
        let changes = self.changes.load(Ordering::SeqCst);
        let handle = &write.handle.bytes;
        let asked = self
            .call(write.channel, "stat")
            .ask(&Request::Fstat { handle });
        Some(AskedStat {
            channel: write.channel,
            answer: asked.ok()?,
            changes,
        })
    }

    /// The attributes count only if their answer came behind the fsync's.
    fn note_stat_behind(&self, asked: &AskedStat<'_>, flushed_at: u64) {
        let call = self.call(asked.channel, "stat");
        let Ok(arrived) = call.wait_arrival(&asked.answer) else {
            return;
        };
        if let (Ok(Reply::Attributes(found)), true) =
            (call.parse(&arrived.body), arrived.number > flushed_at)
        {
            *self.behind_flush.lock().ignore_poison() = Some((asked.changes, found));
        }
    }

    /// Sends an fsync behind the writes of each handle, and for each handle with older writes.
    fn ask_flushes(&self, writes: &[Owed<'_>]) -> Vec<Asked<'_>> {
        let carried = |handle: &Arc<Handle>| {
            let mut carriers = writes.iter().map(|write| &write.handle);
            carriers.any(|carrier| Arc::ptr_eq(carrier, handle))
        };
        let mut handles = self.handles();
        // As in `flush_handles`: what is answered from now on belongs to the next flush.
        handles.retain(|(_, handle)| {
            let older = handle.unsynced.swap(false, Ordering::SeqCst);
            older || carried(handle)
        });
        let ask = |(channel, handle): (_, Arc<Handle>)| Asked {
            channel,
            answer: self.call(channel, "flush").ask(&Request::Fsync {
                handle: &handle.bytes,
            }),
            handle,
        };
        handles.into_iter().map(ask).collect()
    }
}
