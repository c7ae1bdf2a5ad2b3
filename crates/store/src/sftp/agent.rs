//! Requests that only `sprat-agent` on the server answers: docs/agent.md, crates/agent/README.md.

use super::codec::{Builder, Fields, Malformed, Request};
use super::session::SftpSession;
use crate::contract::PastState;
use crate::{FileName, StoreError};

/// One of the agent's own requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AgentRequest<'a> {
    Generations { path: &'a str },
}

impl AgentRequest<'_> {
    /// See [`Request::changes_something`].
    pub(super) fn changes_something(self) -> bool {
        match self {
            Self::Generations { .. } => false,
        }
    }

    pub(super) fn encode(self, packet: &mut Builder) {
        match self {
            Self::Generations { path } => {
                packet.string(b"generations@sprat").string(path.as_bytes())
            }
        };
    }
}

/// Whether the value of the greeting's `sprat-agent@sprat` is of a version that sprat knows. Such an agent
/// carries out one request, answer included, before it reads the next (`Server::serve` there).
pub(super) fn announced(value: &[u8]) -> bool {
    value.split(|byte| *byte == b' ').next() == Some(b"1")
        && value
            .split(|byte| *byte == b' ')
            .any(|word| word == b"serial")
}

/// See [`crate::Store::past_states`].
pub(super) fn past_states(
    session: &SftpSession,
    name: &FileName,
) -> Result<Option<Vec<PastState>>, StoreError> {
    if !session.extensions.agent {
        return Ok(None);
    }
    let (object, path) = (session.object(name), session.path(name));
    let request = Request::Agent(AgentRequest::Generations { path: &path });
    let states = session
        .call("list the past states of", &object)
        .extended(&request, parse_states)?;
    Ok(Some(states))
}

/// The answer has the newest state first.
pub(crate) fn parse_states(reply: &[u8]) -> Result<Vec<PastState>, Malformed> {
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
        });
    }
    states.reverse();
    Ok(states)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_known_version_that_keeps_the_order_is_an_agent() {
        for (value, is_agent) in [
            (
                "1 log serial fence punch map will id=0011223344556677",
                true,
            ),
            ("1 log fence id=0011223344556677", false),
            ("2 log serial id=0011223344556677", false),
            ("", false),
        ] {
            assert_eq!(announced(value.as_bytes()), is_agent, "{value}");
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
        for end in 0..reply.len() {
            assert!(parse_states(&reply[..end]).is_err(), "{end}");
        }
        assert!(parse_states(&[255; 4]).is_err());
    }
}
