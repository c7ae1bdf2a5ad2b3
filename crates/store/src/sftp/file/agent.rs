//! Holes in a file: made and found by the agent on the server. SFTP itself has no requests for that.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::SftpFile;
use crate::StoreError;
use crate::sftp::agent::{AgentRequest, parse_first, parse_numbers};
use crate::sftp::codec::Request;

/// The most ranges that the agent accepts in a request.
const RANGES_MAX: usize = 8192;

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

    /// The agent does a part of each request: it saves what past states need first.
    pub(super) fn punch(&self, ranges: &[Range<u64>]) -> Result<(), StoreError> {
        self.needs_agent("discard")?;
        self.writable("discard")?;
        let mut left: Vec<Range<u64>> = ranges.iter().filter(|r| !r.is_empty()).cloned().collect();
        while !left.is_empty() {
            let some = &left[..left.len().min(RANGES_MAX)];
            self.changed_by_punch();
            let done = self.punch_some(some);
            self.changed_by_punch();
            let done = done?;
            let first = left[0].start;
            left.retain(|range| range.end > done);
            if let Some(range) = left.first_mut() {
                range.start = range.start.max(done);
                if range.start == first {
                    return Err(self.makes_no_sense("discard"));
                }
            }
        }
        Ok(())
    }

    fn changed_by_punch(&self) {
        self.changes();
        self.file.first.unsynced.store(true, Ordering::SeqCst);
    }

    /// Returns the offset up to which all was done. The guard of writes is asked, as for those.
    fn punch_some(&self, ranges: &[Range<u64>]) -> Result<u64, StoreError> {
        let handle = &self.file.first.bytes;
        let request = Request::Agent(AgentRequest::Punch { handle, ranges });
        let call = self.call(&self.session.first, "discard");
        let guard = self.guard.get();
        for checks in 0.. {
            let may_send = || guard.is_none_or(|guard| guard.may_send());
            if let Some(answer) = call.ask_if(&request, &may_send)? {
                let done = call.wait_extended(&answer, parse_first);
                return done.map_err(|error| self.session.explain(error));
            }
            if let Some(guard) = guard {
                guard.check_again(checks)?;
            }
        }
        unreachable!("the loop ends only by a return")
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
