//! One entry of the journal and its 40 bytes. The table is in the description of [`super`].

use crate::checksum::crc32;
use crate::token::Token;

pub(super) const ENTRY_BYTES: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    InFlight(u64, u64),
    Resolved(u64, u64),
    Acquiring(u64, Token),
    NotAcquired(u64, Token),
    Boot(u64),
    Quiet,
    Renewed(u64, u64),
    Free(u64),
    LockFile(u64, u64),
}

impl Entry {
    pub(super) fn encode(self, at_s: u64) -> [u8; ENTRY_BYTES] {
        let pair = |a: u64, b: u64| {
            let mut body = [0; 24];
            body[..8].copy_from_slice(&a.to_le_bytes());
            body[8..16].copy_from_slice(&b.to_le_bytes());
            body
        };
        let tagged = |number: u64, token: Token| {
            let mut body = pair(number, 0);
            body[8..].copy_from_slice(&token.0);
            body
        };
        let (kind, body) = match self {
            Self::InFlight(start, end) => (1u32, pair(start, end)),
            Self::Resolved(start, end) => (2, pair(start, end)),
            Self::Acquiring(number, token) => (3, tagged(number, token)),
            Self::NotAcquired(number, token) => (4, tagged(number, token)),
            Self::Boot(boot) => (5, pair(boot, 0)),
            Self::Quiet => (6, pair(0, 0)),
            Self::Renewed(number, counter) => (7, pair(number, counter)),
            Self::Free(number) => (8, pair(number, 0)),
            Self::LockFile(device, inode) => (9, pair(device, inode)),
        };
        let mut entry = [0; ENTRY_BYTES];
        entry[4..8].copy_from_slice(&kind.to_le_bytes());
        entry[8..32].copy_from_slice(&body);
        entry[32..].copy_from_slice(&at_s.to_le_bytes());
        let checksum = crc32(&entry[4..]);
        entry[..4].copy_from_slice(&checksum.to_le_bytes());
        entry
    }

    pub(super) fn parse(entry: &[u8]) -> Option<Self> {
        let checksum = u32::from_le_bytes(*entry.first_chunk()?);
        if checksum != crc32(&entry[4..]) {
            return None;
        }
        let number = |at: usize| Some(u64::from_le_bytes(*entry.get(at..)?.first_chunk()?));
        let (a, b) = (number(8)?, number(16)?);
        let token = Token(*entry.get(16..)?.first_chunk()?);
        Some(match u32::from_le_bytes(*entry.get(4..)?.first_chunk()?) {
            1 => Self::InFlight(a, b),
            2 => Self::Resolved(a, b),
            3 => Self::Acquiring(a, token),
            4 => Self::NotAcquired(a, token),
            5 => Self::Boot(a),
            6 => Self::Quiet,
            7 => Self::Renewed(a, b),
            8 => Self::Free(a),
            9 => Self::LockFile(a, b),
            _ => return None,
        })
    }
}
