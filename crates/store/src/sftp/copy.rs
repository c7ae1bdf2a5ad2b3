//! Copies within the server, without sending the bytes to this machine.

use std::collections::VecDeque;
use std::ops::Range;

use super::channel::Answer;
use super::codec::{Attributes, OpenFor, Request};
use super::session::{Call, SftpSession};
use crate::{FileName, StoreError};

/// Bytes that one request copies. The server copies before it answers (`process_extended_copy_data`
/// in sftp-server.c), so this limits how long a server with a slow disk sends nothing.
const REQUEST_BYTES_MAX: u64 = 32 << 20;
/// Most bytes that are requested and not answered.
const WINDOW_BYTES_MAX: u64 = 2 * REQUEST_BYTES_MAX;
const WINDOW_REQUESTS_MAX: usize = 48;

/// See [`crate::Store::copy_ranges`].
pub(crate) fn ranges(
    session: &SftpSession,
    from: &FileName,
    to: &FileName,
    ranges: &[Range<u64>],
) -> Result<(), StoreError> {
    let object = session.object(to);
    let unsupported = |what: &str| {
        Err(StoreError::Unsupported {
            op: "copy",
            object: object.clone(),
            reason: format!("the server has no {what}"),
        })
    };
    if !session.extensions.copy_data {
        return unsupported("copy-data");
    }
    if !session.extensions.fsync && !session.options.insist_without_fsync {
        return unsupported("fsync@openssh.com");
    }
    let call = session.call("copy", &object);
    let pair = Pair::open(session, from, to)?;
    let done = pair.copy(&call, ranges).and_then(|()| {
        if !session.extensions.fsync {
            return Ok(());
        }
        call.status(&Request::Fsync { handle: &pair.to.0 })
    });
    pair.close(session);
    done
}

/// See [`crate::Store::copy_owner_and_mode`].
pub(crate) fn owner_and_mode(
    session: &SftpSession,
    from: &FileName,
    to: &FileName,
) -> Result<(), StoreError> {
    let object = session.object(to);
    let pair = Pair::open(session, from, to)?;
    let set = match (pair.from.1.owner, pair.from.1.mode) {
        (Some(owner), Some(mode)) => {
            session
                .call("set owner and mode of", &object)
                .status(&Request::SetOwnerAndMode {
                    handle: &pair.to.0,
                    owner,
                    mode: mode & 0o7777,
                })
        }
        _ => Err(StoreError::Unsupported {
            op: "set owner and mode of",
            object: object.clone(),
            reason: "the server reports no owners or modes".to_owned(),
        }),
    };
    pair.close(session);
    set
}

/// Two files, open on the first channel: a handle is not valid on another channel.
struct Pair {
    from: (Vec<u8>, Attributes),
    to: (Vec<u8>, Attributes),
}

impl Pair {
    fn open(session: &SftpSession, from: &FileName, to: &FileName) -> Result<Self, StoreError> {
        let open = |name: &FileName, how: OpenFor| {
            let (object, path) = (session.object(name), session.path(name));
            session.open_file(&session.first, "open", &object, &path, how)
        };
        let from = open(from, OpenFor::Reading)?;
        match open(to, OpenFor::Writing) {
            Ok(to) => Ok(Self { from, to }),
            Err(error) => {
                session
                    .first
                    .send_unanswered(&Request::Close { handle: &from.0 });
                Err(error)
            }
        }
    }

    fn close(&self, session: &SftpSession) {
        for handle in [&self.from.0, &self.to.0] {
            session.first.send_unanswered(&Request::Close { handle });
        }
    }

    fn copy(&self, call: &Call<'_>, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        let mut owed: VecDeque<(Answer, u64)> = VecDeque::new();
        let mut waiting = 0;
        let mut outcome = Ok(());
        let take = |owed: &mut VecDeque<(Answer, u64)>, waiting: &mut u64| {
            let Some((answer, len)) = owed.pop_front() else {
                return Ok(());
            };
            *waiting -= len;
            call.is_ok(&call.wait(&answer)?)
        };
        for (offset, len) in ranges.iter().flat_map(cut) {
            while outcome.is_ok()
                && !owed.is_empty()
                && (waiting + len > WINDOW_BYTES_MAX || owed.len() >= WINDOW_REQUESTS_MAX)
            {
                outcome = take(&mut owed, &mut waiting);
            }
            if outcome.is_err() {
                break;
            }
            let request = Request::CopyData {
                from: &self.from.0,
                to: &self.to.0,
                offset,
                len,
            };
            match call.ask(&request) {
                Ok(answer) => {
                    waiting += len;
                    owed.push_back((answer, len));
                }
                Err(error) => outcome = Err(error),
            }
        }
        // All answers are waited for, even after a failure: nothing may still be copied after this
        // returns.
        while !owed.is_empty() {
            let taken = take(&mut owed, &mut waiting);
            outcome = outcome.and(taken);
        }
        outcome
    }
}

/// Cuts a range into requests.
fn cut(range: &Range<u64>) -> impl Iterator<Item = (u64, u64)> + use<> {
    let (start, end) = (range.start, range.end);
    (0..)
        .map(move |number| start + number * REQUEST_BYTES_MAX)
        .take_while(move |at| *at < end)
        .map(move |at| (at, (end - at).min(REQUEST_BYTES_MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_is_cut_without_gap_or_overlap() {
        assert_eq!(cut(&(5..5)).count(), 0);
        assert_eq!(cut(&(5..6)).collect::<Vec<_>>(), [(5, 1)]);
        let max = REQUEST_BYTES_MAX;
        assert_eq!(cut(&(1..1 + max)).collect::<Vec<_>>(), [(1, max)]);
        assert_eq!(
            cut(&(1..2 + 2 * max)).collect::<Vec<_>>(),
            [(1, max), (1 + max, max), (1 + 2 * max, 1)]
        );
    }
}
