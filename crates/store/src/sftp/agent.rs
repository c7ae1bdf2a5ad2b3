//! Requests that only `sprat-agent` on the server answers: docs/agent.md, crates/agent/README.md.

use std::ops::Range;

use super::codec::{Builder, Fields, Malformed, Request};
use super::session::SftpSession;
use crate::contract::PastState;
use crate::{FileName, StoreError};

/// One of the agent's own requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AgentRequest<'a> {
    Generations {
        path: &'a str,
    },
    SessionBegin {
        path: &'a str,
    },
    /// The file is left in order.
    SessionEnd {
        path: &'a str,
    },
    Punch {
        handle: &'a [u8],
        ranges: &'a [Range<u64>],
    },
    Map {
        handle: &'a [u8],
        from: u64,
    },
}

impl AgentRequest<'_> {
    /// See [`Request::changes_something`].
    pub(super) fn changes_something(self) -> bool {
        matches!(self, Self::Punch { .. })
    }

    pub(super) fn encode(self, packet: &mut Builder) {
        let (name, about): (&[u8], &[u8]) = match self {
            Self::Generations { path } => (b"generations@sprat", path.as_bytes()),
            Self::SessionBegin { path } => (b"session-begin@sprat", path.as_bytes()),
            Self::SessionEnd { path } => (b"session-end@sprat", path.as_bytes()),
            Self::Punch { handle, .. } => (b"punch@sprat", handle),
            Self::Map { handle, .. } => (b"map@sprat", handle),
        };
        packet.string(name).string(about);
        match self {
            Self::Generations { .. } => {}
            // A token, which the agent does not use.
            Self::SessionBegin { .. } => drop(packet.string(b"")),
            Self::SessionEnd { .. } => drop(packet.u32(1)),
            Self::Punch { ranges, .. } => {
                packet.u32(u32::try_from(ranges.len()).unwrap_or(u32::MAX));
                for range in ranges {
                    packet.u64(range.start).u64(range.end - range.start);
                }
            }
            Self::Map { from, .. } => drop(packet.u64(from)),
        }
    }
}

/// The root of an agent: 16 hex digits, which `adopt` makes there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AgentId([u8; 16]);

impl AgentId {
    pub(super) fn as_text(self) -> String {
        String::from_utf8_lossy(&self.0).into_owned()
    }
}

/// Parses the value of the greeting's `sprat-agent@sprat`. `None`: sprat does not know this version. An agent
/// carries out one request, answer included, before it reads the next (`Server::serve` there).
pub(super) fn announced(value: &[u8]) -> Option<AgentId> {
    let mut words = value.split(|byte| *byte == b' ');
    let is_known = words.next() == Some(b"1");
    let words: Vec<&[u8]> = words.collect();
    let can = |wanted: &&str| words.contains(&wanted.as_bytes());
    let can_all = ["serial", "fence", "punch", "map"].iter().all(can);
    let id = words.iter().find_map(|word| word.strip_prefix(b"id="))?;
    let id: [u8; 16] = id.try_into().ok()?;
    let is_plain = id.iter().all(u8::is_ascii_hexdigit);
    (is_known && can_all && is_plain).then_some(AgentId(id))
}

/// See [`crate::Store::past_states`].
pub(super) fn past_states(
    session: &SftpSession,
    name: &FileName,
) -> Result<Option<Vec<PastState>>, StoreError> {
    if session.extensions.agent.is_none() {
        return Ok(None);
    }
    let (object, path) = (session.object(name), session.path(name));
    let request = Request::Agent(AgentRequest::Generations { path: &path });
    let states = session
        .call("list the past states of", &object)
        .extended(&request, parse_states)?;
    Ok(Some(states))
}

/// See [`crate::Store::refuse_earlier`]. A further connection that opens the file after this belongs to the
/// session; what an earlier one opened is refused.
pub(super) fn refuse_earlier(session: &SftpSession, name: &FileName) -> Result<bool, StoreError> {
    if session.extensions.agent.is_none() {
        return Ok(false);
    }
    let (object, path) = (session.object(name), session.path(name));
    let request = Request::Agent(AgentRequest::SessionBegin { path: &path });
    let call = session.call("begin a session of", &object);
    call.extended(&request, parse_first)?;
    Ok(true)
}

/// See [`crate::Store::note_end`].
pub(super) fn note_end(session: &SftpSession, name: &FileName) {
    if session.extensions.agent.is_none() {
        return;
    }
    let path = session.path(name);
    let request = Request::Agent(AgentRequest::SessionEnd { path: &path });
    session.first.send_unanswered(&request);
    for index in 0..session.further.number() {
        if let Some(channel) = session.further.channel(index) {
            channel.send_unanswered(&request);
        }
    }
}

/// The first number of an answer.
pub(super) fn parse_first(reply: &[u8]) -> Result<u64, Malformed> {
    Fields(reply).u64("number")
}

/// All numbers of an answer.
pub(super) fn parse_numbers(reply: &[u8]) -> Result<Vec<u64>, Malformed> {
    let mut fields = Fields(reply);
    let mut numbers = Vec::new();
    while !fields.0.is_empty() {
        numbers.push(fields.u64("number")?);
    }
    Ok(numbers)
}

/// The answer has the newest state first.
pub(super) fn parse_states(reply: &[u8]) -> Result<Vec<PastState>, Malformed> {
    let mut fields = Fields(reply);
    // The count comes from the server, so no memory is reserved by it.
    let count = fields.u32("count of past states")?;
    let mut states = Vec::new();
    for _ in 0..count {
        let name = fields.string("name of a past state")?;
        let mut number = || fields.u64("number of a past state");
        let [written_s, begun_s, stood_s, len, flags] =
            [number()?, number()?, number()?, number()?, number()?];
        // A name that is none can't be opened.
        let name = std::str::from_utf8(name).ok();
        let Some(name) = name.and_then(|name| FileName::new(name).ok()) else {
            continue;
        };
        states.push(PastState {
            name,
            written_s,
            begun_s,
            stood_s,
            len,
            in_order: flags & 1 != 0,
            pinned: flags & 2 != 0,
            kept_until_s: None,
        });
    }
    // An older agent does not say it.
    if !fields.0.is_empty() {
        let longest_s = fields.u64("time that a past state is kept")?;
        for state in states.iter_mut().filter(|state| !state.pinned) {
            state.kept_until_s = state.begun_s.checked_add(longest_s);
        }
    }
    states.reverse();
    Ok(states)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_version_with_all_that_sprat_uses_is_an_agent() {
        for (value, is_agent) in [
            (
                "1 log serial fence punch map will id=0011223344556677",
                true,
            ),
            ("1 log fence punch map id=0011223344556677", false),
            ("2 log serial fence punch map id=0011223344556677", false),
            ("1 log serial fence punch map id=00112233445566", false),
            ("1 log serial fence punch map", false),
            ("", false),
        ] {
            let found = announced(value.as_bytes());
            assert_eq!(found.is_some(), is_agent, "{value}");
        }
    }

    #[test]
    fn past_states_are_parsed_oldest_first_without_names_that_are_none() {
        let mut reply = 3_u32.to_be_bytes().to_vec();
        for (name, flags) in [("new.luks", 3_u64), ("../x", 0), ("old.luks", 0)] {
            reply.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
            reply.extend(name.as_bytes());
            for number in [1, 2, 3, 4096, flags] {
                reply.extend(number.to_be_bytes());
            }
        }
        let states = parse_states(&reply).unwrap();
        let names: Vec<&str> = states.iter().map(|state| state.name.as_str()).collect();
        assert_eq!(names, ["old.luks", "new.luks"]);
        assert!(states[1].in_order && states[1].pinned && !states[0].in_order);
        assert_eq!((states[1].written_s, states[1].len), (1, 4096));
        assert_eq!(states[0].kept_until_s, None);
        for end in 0..reply.len() {
            assert!(parse_states(&reply[..end]).is_err(), "{end}");
        }
        reply.extend(1000_u64.to_be_bytes());
        let states = parse_states(&reply).unwrap();
        assert_eq!(
            (states[0].kept_until_s, states[1].kept_until_s),
            (Some(1002), None)
        );
        assert!(parse_states(&reply[..reply.len() - 1]).is_err());
        assert!(parse_states(&[255; 4]).is_err());
        assert_eq!(parse_numbers(&[0; 16]), Ok(vec![0, 0]));
        assert!(parse_numbers(&[0; 12]).is_err());
    }
}
