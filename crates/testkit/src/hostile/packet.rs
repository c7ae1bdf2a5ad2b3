//! Packets of SFTP version 3, as far as a server that lies must know them.

use std::io::{self, Read};

use super::Kind;

pub(super) const STATUS: u8 = 101;
pub(super) const HANDLE: u8 = 102;
pub(super) const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;

/// Longer than any packet that sftp-server sends or accepts (`SFTP_MAX_MSG_LENGTH`, openssh sftp.h).
const PACKET_BYTES_MAX: usize = 1 << 20;

/// Reads one packet without its length; `None` at the end.
pub(super) fn read(from: &mut impl Read) -> Option<Vec<u8>> {
    let mut head = [0; 4];
    from.read_exact(&mut head).ok()?;
    let len = usize::try_from(u32::from_be_bytes(head)).ok()?;
    if len == 0 || len > PACKET_BYTES_MAX {
        return None;
    }
    let mut body = vec![0; len];
    from.read_exact(&mut body).ok()?;
    Some(body)
}

/// A packet with its length in front.
pub(super) fn framed(body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    [&len.to_be_bytes()[..], body].concat()
}

/// What a packet of the client asks for.
pub(super) fn kind(body: &[u8]) -> Kind {
    match body[0] {
        1 => Kind::Greeting,
        3 => Kind::Open,
        4 => Kind::Close,
        5 => Kind::Read,
        6 => Kind::Write,
        7 | 8 | 17 => Kind::Stat,
        9 | 10 => Kind::SetStat,
        11 | 12 => Kind::Folder,
        13 => Kind::Remove,
        18 => Kind::Rename,
        200 => match Fields(&body[5..]).string() {
            Some(b"fsync@openssh.com") => Kind::Fsync,
            Some(b"posix-rename@openssh.com") => Kind::Rename,
            Some(b"copy-data") => Kind::Copy,
            _ => Kind::Other,
        },
        _ => Kind::Other,
    }
}

/// The request's number; a greeting has none.
pub(super) fn id(body: &[u8]) -> u32 {
    let number = body.get(1..5).and_then(|bytes| bytes.try_into().ok());
    number.map_or(0, u32::from_be_bytes)
}

pub(super) fn status(id: u32, code: u32) -> Vec<u8> {
    let text: &[u8] = b"as the script wants";
    let len = u32::try_from(text.len()).unwrap_or(0);
    [
        &[STATUS][..],
        &id.to_be_bytes(),
        &code.to_be_bytes(),
        &len.to_be_bytes(),
        text,
        &[0; 4],
    ]
    .concat()
}

/// An answer of another type with the same number.
pub(super) fn other_type(body: &[u8]) -> Vec<u8> {
    let number = id(body);
    match body[0] {
        // No names, which a client could take for the end of a folder.
        STATUS => [&[NAME][..], &number.to_be_bytes(), &[0; 4]].concat(),
        // "Done" where data was asked for.
        _ => status(number, 0),
    }
}

/// The same answer, with more or fewer bytes than there are.
pub(super) fn other_length(body: &[u8], turn: usize) -> Vec<u8> {
    let mut changed = body.to_vec();
    match body[0] {
        DATA if body.len() > 10 => {
            let data = &body[9..];
            let data = match turn % 3 {
                0 => [data, b"x"].concat(),
                1 => data[..data.len() / 2].to_vec(),
                _ => data[..1].to_vec(),
            };
            changed.truncate(5);
            changed.extend(framed(&data));
        }
        // The size comes first, if it is there at all.
        ATTRS if body.len() > 17 && body[8] & 1 == 1 => {
            let size = u64::from_be_bytes(body[9..17].try_into().unwrap_or_default());
            let size = match turn % 3 {
                0 => size / 2,
                1 => size + 4096,
                _ => u64::MAX,
            };
            changed[9..17].copy_from_slice(&size.to_be_bytes());
        }
        _ => changed.truncate(body.len() - body.len().min(1 + turn % 6)),
    }
    if changed.is_empty() {
        changed.push(body[0]);
    }
    changed
}

/// The same answer with some bytes changed: data where there is some, else whatever follows the number.
pub(super) fn garbled(body: &[u8], turn: usize) -> Vec<u8> {
    let mut changed = body.to_vec();
    let from = if body[0] == DATA { 9 } else { 5 };
    let room = body.len().saturating_sub(from);
    for n in 0..room.min(3) {
        changed[from + (turn * 7919 + n * room / 3) % room] ^= 0x41;
    }
    changed
}

/// What is left of a packet.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn number(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    pub(super) fn long(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    pub(super) fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.number()?).ok()?;
        self.take(len)
    }
}

/// `DATA` from another file.
pub(super) fn data_of(
    file: &std::fs::File,
    id: u32,
    offset: u64,
    len: usize,
) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)?;
    Ok([&[DATA][..], &id.to_be_bytes(), &framed(&bytes)].concat())
}
