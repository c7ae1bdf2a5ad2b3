//! The bytes of a lease file, and what they contain about earlier leases.
//!
//! A lease is 4,096 bytes: one JSON object, padded with blanks, then at 4,087 the CRC-32 of the
//! bytes before it as 8 hex digits and a newline. One write in place replaces all of it, so the
//! file neither grows nor shrinks. A reader that sees parts of two writes finds a wrong checksum.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::OwnerNote;
use crate::checksum::crc32;
use crate::token::Token;

/// The length of a lease file.
pub(super) const LEASE_BYTES: usize = 4096;
/// The length of a lock file of sprat 0.x: one JSON object, padded.
const OLD_BYTES: usize = 512;
/// Where the checksum starts.
const CHECKED_BYTES: usize = LEASE_BYTES - 9;
/// The first number of a chain. sprat 0.x counts from 1. A removal that it sent may be carried out
/// late and must not hit one of our files.
pub(super) const FIRST_NUMBER: u64 = 1_000_001;
/// For how long a write of an earlier session may still arrive, in seconds: until the server's
/// kernel drops a silent connection. With TCP keepalive as sshd sets it, that takes 2 h 11 min.
pub const LATE_WRITE_S: u64 = (2 * 60 + 15) * 60;

const PREDECESSORS_MAX: usize = 16;
const COMPARISONS_MAX: usize = 16;

/// The bytes of a lease file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Content {
    /// Of the process that created it: 32 hex digits.
    pub token: String,
    /// The session has ended: the next number may be taken. It must follow the token directly, see
    /// [`Content::held_word`].
    #[serde(default)]
    pub free: bool,
    /// Of this file alone. Two copies of one process share a token, but not this.
    #[serde(default)]
    pub attempt: String,
    pub renewed: u64,
    pub host: String,
    pub started_s: u64,
    pub version: String,
    /// Earlier leases from which writes may still arrive.
    #[serde(default)]
    pub doors: Vec<Predecessor>,
    /// Sessions whose writes have not been compared yet.
    #[serde(default)]
    pub watch: Vec<Comparison>,
    /// The agent on the server through which the lease is used.
    #[serde(default)]
    pub agent: Option<String>,
    /// Several epochs may be under way at once: after a crash a later one may exist without an
    /// earlier one.
    #[serde(default)]
    pub flight: bool,
}

/// An earlier lease from which writes may still arrive. In the file this is an entry of `doors`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Predecessor {
    pub number: u64,
    /// By the server's clock, in seconds since the epoch; `None`: open, the end is not known yet.
    pub until_s: Option<u64>,
    /// Stands for every lease below `number`, too.
    #[serde(default)]
    pub all_before: bool,
    /// Its session died on the machine of the next one, which knows what was under way.
    #[serde(default, skip_serializing_if = "is_false")]
    pub own: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A session that wrote while writes of an earlier one could still arrive. In the file this is an
/// entry of `watch`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Comparison {
    /// The host that can compare; empty if several entries were joined.
    pub host: String,
    pub token: String,
    pub until_s: u64,
}

impl Content {
    pub(super) fn new(token: Token, attempt: Token, owner: OwnerNote) -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            token: token.to_string(),
            free: false,
            attempt: attempt.to_string(),
            renewed: 0,
            host: plain(owner.host),
            started_s: now.map_or(0, |now| now.as_secs()),
            version: plain(owner.version),
            doors: Vec::new(),
            watch: Vec::new(),
            agent: None,
            flight: false,
        }
    }

    pub(super) fn bytes(&self) -> [u8; LEASE_BYTES] {
        let mut bytes = [b' '; LEASE_BYTES];
        let json = serde_json::to_vec(self).unwrap_or_default();
        assert!(
            !json.is_empty() && json.len() <= CHECKED_BYTES,
            "a lease of {} bytes",
            json.len()
        );
        bytes[..json.len()].copy_from_slice(&json);
        let checksum = crc32(&bytes[..CHECKED_BYTES]);
        bytes[CHECKED_BYTES..].copy_from_slice(format!("{checksum:08x}\n").as_bytes());
        bytes
    }

    /// Reads a lease, or a lock of sprat 0.x; `None` if it is neither.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let json = match bytes.len() {
            OLD_BYTES => bytes,
            LEASE_BYTES => {
                let (checked, checksum) = bytes.split_at(CHECKED_BYTES);
                if format!("{:08x}\n", crc32(checked)).as_bytes() != checksum {
                    return None;
                }
                checked
            }
            _ => return None,
        };
        let mut content: Self = serde_json::from_slice(json).ok()?;
        content.doors = joined_predecessors(content.doors);
        content.watch = joined_comparisons(content.watch);
        Some(content)
    }

    /// The text that is in a lease exactly as long as it is not released.
    pub(super) fn held_word(&self) -> String {
        format!("\"token\":\"{}\",\"free\":false", self.token)
    }

    pub(super) fn has_open_predecessor(&self) -> bool {
        self.doors
            .iter()
            .any(|predecessor| predecessor.until_s.is_none())
    }

    /// Adds the entries of another lease.
    pub(super) fn inherit(&mut self, doors: &[Predecessor], watch: &[Comparison]) {
        for predecessor in doors {
            self.add_predecessor(predecessor.clone());
        }
        for note in watch {
            if !self.watch.contains(note) {
                self.watch.push(note.clone());
            }
        }
        self.watch = joined_comparisons(std::mem::take(&mut self.watch));
    }

    /// Adds a predecessor. If the number exists already, the later time is kept.
    pub(super) fn add_predecessor(&mut self, predecessor: Predecessor) {
        let same = |there: &&mut Predecessor| {
            there.number == predecessor.number && there.all_before == predecessor.all_before
        };
        match self.doors.iter_mut().find(same) {
            Some(there) => {
                there.until_s = later(there.until_s, predecessor.until_s);
                there.own &= predecessor.own;
            }
            None => self.doors.push(predecessor),
        }
        self.doors = joined_predecessors(std::mem::take(&mut self.doors));
    }

    /// Drops predecessors whose time is over at `now_s`. The lease directly below stays: its
    /// session searches for itself here when it releases its lease.
    pub(super) fn drop_past(&mut self, now_s: u64, below: Option<u64>) {
        self.doors.retain(|predecessor| {
            Some(predecessor.number) == below
                || predecessor.until_s.is_none_or(|until| until > now_s)
        });
    }
}

/// `None` is the latest of all.
fn later(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    Some(a?.max(b?))
}

/// Keeps at most [`PREDECESSORS_MAX`]: joins the lowest ones, with the latest of their times.
fn joined_predecessors(mut doors: Vec<Predecessor>) -> Vec<Predecessor> {
    doors.sort_by_key(|predecessor| predecessor.number);
    let many = doors.len().saturating_sub(PREDECESSORS_MAX - 1);
    if many > 1 {
        let joined: Vec<Predecessor> = doors.drain(..many).collect();
        let until_s = joined
            .iter()
            .map(|predecessor| predecessor.until_s)
            .fold(Some(0), later);
        let number = joined.last().map_or(0, |predecessor| predecessor.number);
        let own = joined.iter().all(|predecessor| predecessor.own);
        let all_before = true;
        doors.insert(
            0,
            Predecessor {
                number,
                until_s,
                all_before,
                own,
            },
        );
    }
    doors
}

/// Keeps at most [`COMPARISONS_MAX`]: joins the first ones into one that no host can end.
fn joined_comparisons(mut watch: Vec<Comparison>) -> Vec<Comparison> {
    for note in &mut watch {
        note.host = plain(std::mem::take(&mut note.host));
        note.token = plain(std::mem::take(&mut note.token));
        note.host.truncate(32);
        note.token.truncate(32);
    }
    let many = watch.len().saturating_sub(COMPARISONS_MAX - 1);
    if many > 1 {
        let joined: Vec<Comparison> = watch.drain(..many).collect();
        let until_s = joined.iter().map(|note| note.until_s).max().unwrap_or(0);
        let (host, token) = (String::new(), String::new());
        watch.insert(
            0,
            Comparison {
                host,
                token,
                until_s,
            },
        );
    }
    watch
}

fn plain(mut text: String) -> String {
    text.retain(|c| c.is_ascii_alphanumeric() || "._+-".contains(c));
    text.truncate(64);
    text
}

#[cfg(test)]
mod tests {
    use sprat_testkit::leases::{RELEASED_BY_AGENT, WRITTEN_BY_SPRAT};

    use super::*;

    fn content() -> Content {
        let owner = OwnerNote {
            host: "a".repeat(100),
            version: "v".repeat(100),
        };
        Content::new(Token([0xff; 16]), Token([1; 16]), owner)
    }

    #[test]
    fn the_largest_lease_fits_and_reads_back() {
        let mut lease = content();
        lease.renewed = u64::MAX;
        lease.agent = Some("f".repeat(16));
        for n in 0..40 {
            lease.add_predecessor(Predecessor {
                number: u64::MAX - n,
                until_s: Some(u64::MAX - n),
                all_before: false,
                own: true,
            });
            let note = Comparison {
                host: format!("{n:064}"),
                token: "e".repeat(64),
                until_s: u64::MAX,
            };
            lease.inherit(&[], &[note]);
        }
        assert_eq!((lease.doors.len(), lease.watch.len()), (16, 16));
        assert_eq!(Content::parse(&lease.bytes()), Some(lease));
    }

    /// `sprat-agent` has code of its own for this format, and a test with the same texts.
    #[test]
    fn the_agent_and_sprat_read_and_write_the_same_leases() {
        let entry = |number, until_s, all_before, own| Predecessor {
            number,
            until_s,
            all_before,
            own,
        };
        let token = |first: u8| Token(std::array::from_fn(|n| first + u8::try_from(n).unwrap()));
        let owner = OwnerNote {
            host: "laptop".to_owned(),
            version: "0.9.0".to_owned(),
        };
        let mut lease = Content::new(token(0), token(16), owner);
        lease.started_s = 1_795_831_511;
        lease.renewed = 3;
        lease.add_predecessor(entry(7, Some(1_795_839_611), true, true));
        lease.add_predecessor(entry(1_000_004, None, false, false));
        lease.watch.push(Comparison {
            host: "desk.home".to_owned(),
            token: "2021222324252627".to_owned(),
            until_s: 1_795_839_612,
        });
        lease.agent = Some("0123456789abcdef".to_owned());
        lease.flight = true;
        let bytes = lease.bytes();
        let text = std::str::from_utf8(&bytes[..CHECKED_BYTES]).unwrap();
        assert_eq!(text.trim_end_matches(' '), WRITTEN_BY_SPRAT);

        lease.free = true;
        lease.renewed = 0;
        lease.host = "sprat-agent".to_owned();
        lease.doors = vec![
            entry(7, Some(1_795_839_611), true, false),
            entry(1_000_004, Some(1_795_839_613), false, false),
        ];
        lease.agent = None;
        lease.flight = false;
        let released: Content = serde_json::from_str(RELEASED_BY_AGENT).unwrap();
        assert_eq!(released, lease);
    }

    #[test]
    fn joined_predecessors_keep_the_latest_time_and_stay_open() {
        let mut lease = content();
        for n in 1..=20 {
            let until_s = (n != 3).then_some(1000 - n);
            lease.add_predecessor(Predecessor {
                number: n,
                until_s,
                all_before: false,
                own: false,
            });
        }
        let first = &lease.doors[0];
        assert_eq!(
            (first.number, first.all_before, first.until_s),
            (5, true, None)
        );
        assert!(lease.has_open_predecessor());
        lease.drop_past(985, Some(20));
        let left: Vec<u64> = lease
            .doors
            .iter()
            .map(|predecessor| predecessor.number)
            .collect();
        assert_eq!(left, [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 20]);
    }

    #[test]
    fn torn_lease_is_refused_and_old_lock_is_read() {
        let (mut one, mut two) = (content(), content());
        two.renewed = 1;
        two.free = true;
        assert!(one.held_word().len() > 40);
        let (bytes, mut torn) = (two.bytes(), one.bytes());
        torn[..60].copy_from_slice(&bytes[..60]);
        assert_eq!(Content::parse(&torn), None);
        let json = r#"{"token":"ab","host":"h","started_s":1,"renewed":2,"version":"0.1"}"#;
        let old = Content::parse(format!("{json:<511}\n").as_bytes()).unwrap();
        assert_eq!((old.free, old.renewed, old.doors.len()), (false, 2, 0));
        one.free = true;
        let text = String::from_utf8(one.bytes().to_vec()).unwrap();
        assert!(!text.contains(&one.held_word()));
        one.free = false;
        let text = String::from_utf8(one.bytes().to_vec()).unwrap();
        assert!(text.contains(&one.held_word()));
    }

    #[test]
    fn predecessor_that_is_added_again_keeps_the_later_time() {
        let mut lease = content();
        let mut add = |until_s| {
            lease.add_predecessor(Predecessor {
                number: 7,
                until_s,
                all_before: false,
                own: false,
            });
            lease.doors[0].until_s
        };
        assert_eq!(add(Some(5)), Some(5));
        assert_eq!(add(Some(3)), Some(5));
        assert_eq!(add(Some(8)), Some(8));
        // Only its session can close an open one.
        assert_eq!(add(None), None);
        assert_eq!(add(Some(u64::MAX)), None);
        assert_eq!(lease.doors.len(), 1);
    }
}
