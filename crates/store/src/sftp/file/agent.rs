//! Holes in a file: made and found by the agent on the server. SFTP itself has no requests for that.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{SftpFile, both};
use crate::StoreError;
use crate::sftp::agent::{AgentRequest, parse_first, parse_numbers};
use crate::sftp::channel::Answer;
use crate::sftp::codec::Request;

/// The most ranges that the agent accepts in a request.
const RANGES_MAX: usize = 8192;
/// Of a longer request the agent does only a part.
const REQUEST_BYTES: u64 = 64 << 20;
/// The next request is there when the agent has done one. More would only be late after a lost connection.
const REQUESTS_OWED: usize = 2;

impl SftpFile {
    fn needs_agent(&self, op: &'static str) -> Result<(), StoreError> {
        match self.session.extensions.agent {
            Some(_) => Ok(()),
            None => Err(StoreError::Unsupported {
                op,
                object: self.file.object.clone(),
                reason: "SFTP has no request for holes".to_owned(),
            }),
        }
    }

    /// The agent may do a part of a request only: it saves what past states need first. On an error nothing is left that
    /// may still be carried out, unless the error says so.
    pub(super) fn punch(&self, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        self.needs_agent("discard")?;
        self.writable("discard")?;
        let mut left: VecDeque<_> = ranges.iter().filter(|r| !r.is_empty()).cloned().collect();
        let mut owed: VecDeque<(Answer, Vec<Range<u64>>)> = VecDeque::new();
        let mut outcome = Ok(());
        loop {
            while outcome.is_ok() && owed.len() < REQUESTS_OWED && !left.is_empty() {
                let some = next_request(&mut left);
                self.changed_by_punch();
                match self.ask_to_punch(&some) {
                    Ok(answer) => owed.push_back((answer, some)),
                    Err(error) => outcome = Err(error),
                }
            }
            let Some((answer, some)) = owed.pop_front() else {
                return outcome;
            };
            let done = self.done_up_to(&answer, &some);
            self.changed_by_punch();
            match done {
                Ok(done) => {
                    for range in some.into_iter().rev().filter(|range| range.end > done) {
                        left.push_front(range.start.max(done)..range.end);
                    }
                }
                Err(error) => outcome = both(outcome, Err(error)),
            }
        }
    }

    fn changed_by_punch(&self) {
        self.changes();
        self.file.first.unsynced.store(true, Ordering::SeqCst);
    }

    /// The guard of writes is asked, as for those.
    fn ask_to_punch(&self, ranges: &[Range<u64>]) -> Result<Answer, StoreError> {
        let handle = &self.file.first.bytes;
        let request = Request::Agent(AgentRequest::Punch { handle, ranges });
        let call = self.call(&self.session.first, "discard");
        let guard = self.guard.get();
        for checks in 0.. {
            let may_send = || guard.is_none_or(|guard| guard.may_send());
            if let Some(answer) = call.ask_if(&request, &may_send)? {
                return Ok(answer);
            }
            if let Some(guard) = guard {
                guard.check_again(checks)?;
            }
        }
        unreachable!("the loop ends only by a return")
    }

    /// Returns the offset up to which all of a request was done.
    fn done_up_to(&self, answer: &Answer, ranges: &[Range<u64>]) -> Result<u64, StoreError> {
        let call = self.call(&self.session.first, "discard");
        let done = call.wait_extended(answer, parse_first);
        let done = done.map_err(|error| self.session.explain(error))?;
        match ranges[0].start < done {
            true => Ok(done),
            false => Err(self.makes_no_sense("discard")),
        }
    }

    /// Reports what is no hole.
    pub(super) fn map(&self, report: &mut dyn FnMut(Range<u64>)) -> Result<(), StoreError> {
        let op = "find the holes of";
        self.needs_agent(op)?;
        let call = self.call(&self.session.first, op);
        let handle = &self.file.first.bytes;
        let mut from = 0;
        loop {
            let request = Request::Agent(AgentRequest::Map { handle, from });
            let numbers = call.extended(&request, parse_numbers)?;
            let (pairs, rest) = numbers.as_chunks::<2>();
            if pairs.is_empty() && rest.is_empty() {
                return Ok(());
            }
            for [start, end] in pairs {
                if *start < from || start >= end || !rest.is_empty() {
                    return Err(self.makes_no_sense(op));
                }
                report(*start..*end);
                from = *end;
            }
        }
    }

    fn makes_no_sense(&self, op: &'static str) -> StoreError {
        StoreError::Refused {
            op,
            object: self.file.object.clone(),
            reason: "the agent's answer makes no sense".to_owned(),
        }
    }
}

/// Takes the ranges of one request, all of which the agent will do.
fn next_request(left: &mut VecDeque<Range<u64>>) -> Vec<Range<u64>> {
    let mut some: Vec<Range<u64>> = Vec::new();
    let mut room = REQUEST_BYTES;
    while room > 0 && some.len() < RANGES_MAX {
        let Some(range) = left.pop_front() else {
            break;
        };
        let end = range.end.min(range.start.saturating_add(room));
        room -= end - range.start;
        some.push(range.start..end);
        if end < range.end {
            left.push_front(end..range.end);
        }
    }
    some
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_no_more_than_the_agent_does_at_once() {
        let many = (0..10_000).map(|n| n * 8192..n * 8192 + 4096);
        let large = 1 << 40..(1 << 40) + 3 * REQUEST_BYTES + 4096;
        let all: Vec<Range<u64>> = many.chain([large]).collect();
        let mut left: VecDeque<_> = all.iter().cloned().collect();
        let mut sizes: Vec<u64> = Vec::new();
        let mut sent: Vec<Range<u64>> = Vec::new();
        while !left.is_empty() {
            let some = next_request(&mut left);
            sizes.push(some.iter().map(|range| range.end - range.start).sum());
            assert!(some.len() <= RANGES_MAX);
            for range in some {
                match sent.last_mut() {
                    Some(last) if last.end == range.start => last.end = range.end,
                    _ => sent.push(range),
                }
            }
        }
        assert_eq!(sent, all);
        let rest = (10_000 - RANGES_MAX as u64) * 4096;
        let last = 3 * REQUEST_BYTES + 4096 - (REQUEST_BYTES - rest) - 2 * REQUEST_BYTES;
        let first = RANGES_MAX as u64 * 4096;
        assert_eq!(
            sizes,
            [first, REQUEST_BYTES, REQUEST_BYTES, REQUEST_BYTES, last]
        );
    }
}
