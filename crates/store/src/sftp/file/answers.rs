//! Handles the answers to a file's reads: short ones, and those that report the end of a file that
//! is longer.

use std::ops::Range;
use std::sync::Arc;

use super::{Handle, SftpFile};
use crate::StoreError;
use crate::sftp::channel::{Answer, Channel};
use crate::sftp::codec::{Malformed, Reply, Request};
use crate::sftp::session::{Call, STATUS_EOF, SftpSession};

/// A request that was sent, and where.
pub(super) struct Owed<'a> {
    pub(super) channel: &'a Channel,
    pub(super) handle: Arc<Handle>,
    pub(super) at: u64,
    pub(super) len: usize,
    pub(super) answer: Answer,
}

/// The complete range that a caller asked for.
#[derive(Clone, Copy)]
pub(super) struct Whole {
    pub(super) offset: u64,
    pub(super) len: usize,
}

/// Asks for one range of a file that is being opened. One answer for each part of it; none if no
/// file can have this range.
pub(super) fn ask_range(
    session: &SftpSession,
    call: &Call<'_>,
    handle: &[u8],
    (offset, len): (u64, usize),
) -> Result<Vec<Answer>, StoreError> {
    if offset.checked_add(len as u64).is_none() {
        return Ok(Vec::new());
    }
    let ask = |(offset, part): (u64, Range<usize>)| {
        let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
        call.ask(&Request::Read {
            handle,
            offset,
            len,
        })
    };
    let parts = SftpFile::cut(offset, len, session.read_bytes_max);
    parts.map(ask).collect()
}

impl SftpFile {
    /// Takes the answers of [`ask_range`] for the same range.
    pub(super) fn take_range(
        &self,
        (offset, bytes): (u64, &mut [u8]),
        answers: Vec<Answer>,
    ) -> Result<(), StoreError> {
        let whole = Whole {
            offset,
            len: bytes.len(),
        };
        let parts = Self::cut(offset, whole.len, self.session.read_bytes_max);
        for ((at, part), answer) in parts.zip(answers) {
            let read = Owed {
                channel: &self.session.first,
                handle: Arc::clone(&self.file.first),
                at,
                len: part.len(),
                answer,
            };
            self.take_read(&read, &whole, &mut bytes[part])?;
        }
        Ok(())
    }

    /// Copies one read's answer into `part`; asks again for what a short answer left out.
    pub(super) fn take_read(
        &self,
        read: &Owed<'_>,
        whole: &Whole,
        part: &mut [u8],
    ) -> Result<(), StoreError> {
        match self.take_answers(read, whole, part) {
            Err(StoreError::Truncated { offset, got, .. }) => {
                let done = usize::try_from(offset + got - read.at).unwrap_or(0);
                let rest = &mut part[done..];
                self.read_on_new_handle(read, whole, offset + got, rest)
            }
            other => other,
        }
    }

    /// Reads past what a handle reported as the end, on a new handle, if the file is longer by now.
    /// A server may use the length that the file had when the handle was opened (ProFTPD's
    /// `mod_sftp` does).
    fn read_on_new_handle(
        &self,
        read: &Owed<'_>,
        whole: &Whole,
        at: u64,
        rest: &mut [u8],
    ) -> Result<(), StoreError> {
        let truncated = || StoreError::Truncated {
            op: "read",
            object: self.file.object.clone(),
            offset: whole.offset,
            asked: whole.len as u64,
            got: at - whole.offset,
        };
        let now = self.attributes("read")?.len.unwrap_or(0);
        if now < at + rest.len() as u64 {
            return Err(truncated());
        }
        let handle = self.file.open_again(&self.session, read.channel);
        let handle = Arc::new(handle.ok_or_else(truncated)?);
        let asked = self.call(read.channel, "read").ask(&Request::Read {
            handle: &handle.bytes,
            offset: at,
            len: u32::try_from(rest.len()).unwrap_or(self.session.read_bytes_max),
        });
        let outcome = asked.and_then(|answer| {
            let again = Owed {
                channel: read.channel,
                handle: Arc::clone(&handle),
                at,
                len: rest.len(),
                answer,
            };
            self.take_answers(&again, whole, rest)
        });
        let handle = &handle.bytes;
        read.channel.send_unanswered(&Request::Close { handle });
        outcome
    }

    fn take_answers(
        &self,
        read: &Owed<'_>,
        whole: &Whole,
        part: &mut [u8],
    ) -> Result<(), StoreError> {
        let call = self.call(read.channel, "read");
        let mut body = call.wait(&read.answer)?;
        let (mut done, mut empty) = (0, false);
        loop {
            match call.parse(&body)? {
                Reply::Data(data) if data.len() > part.len() - done => {
                    return Err(call.broken(&Malformed::TooMuchData {
                        asked: part.len() - done,
                        sent: data.len(),
                    }));
                }
                Reply::Data([]) if empty => return Err(call.broken(&Malformed::NoData)),
                Reply::Data(data) => {
                    empty = data.is_empty();
                    part[done..done + data.len()].copy_from_slice(data);
                    done += data.len();
                }
                Reply::Status {
                    code: STATUS_EOF, ..
                } => {
                    return Err(StoreError::Truncated {
                        op: "read",
                        object: self.file.object.clone(),
                        offset: whole.offset,
                        asked: whole.len as u64,
                        got: read.at - whole.offset + done as u64,
                    });
                }
                _ => return Err(call.unexpected(&body)),
            }
            if done == part.len() {
                return Ok(());
            }
            let len = u32::try_from(part.len() - done).unwrap_or(self.session.read_bytes_max);
            let request = Request::Read {
                handle: &read.handle.bytes,
                offset: read.at + done as u64,
                len,
            };
            body = call.wait(&call.ask(&request)?)?;
        }
    }
}
