//! The bytes of SFTP version 3: packets to requests, answers to packets; no I/O.
//!
//! A packet is `u32 length | u8 type | u32 id | …`, big endian; `length` counts what follows it.
//! A string is `u32 length | bytes`. draft-ietf-secsh-filexfer-02; extensions: OpenSSH's PROTOCOL.

/// The longest packet that is accepted, as in OpenSSH (`SFTP_MAX_MSG_LENGTH`, sftp-common.h).
pub const PACKET_BYTES_MAX: usize = 256 * 1024;
/// The most data in one READ or WRITE, as in OpenSSH.
pub const TRANSFER_BYTES_MAX: u32 = 256 * 1024 - 1024;
pub const DATA_HEAD_BYTES: usize = 13;
/// The longest path that is parsed; longer ones name nothing.
const PATH_BYTES_MAX: usize = 4096;

/// Flags of OPEN: read 1, write 2, create 8, exclusive 32.
pub const OPEN_READ: u32 = 1;
pub const OPEN_READ_WRITE: u32 = 1 | 2;
pub const OPEN_NEW: u32 = 1 | 2 | 8 | 32;

const ATTR_SIZE: u32 = 1;
const ATTR_UIDGID: u32 = 2;
const ATTR_PERMISSIONS: u32 = 4;
const ATTR_ACMODTIME: u32 = 8;

/// The most ranges in one request.
const RANGES_MAX: u32 = 8192;

/// What the agent can do beyond OpenSSH's extensions; the root's id follows.
const AGENT: (&str, &str) = ("sprat-agent@sprat", "1 log serial fence punch map will id=");

/// The extensions that the greeting announces, with their versions.
const EXTENSIONS: [(&str, &str); 5] = [
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("fsync@openssh.com", "1"),
    ("limits@openssh.com", "1"),
];

/// As the client sent them: nothing is checked yet.
type Path<'a> = &'a [u8];
type Handle<'a> = &'a [u8];
/// Pairs of offset and length.
type Ranges = Vec<(u64, u64)>;

/// One request.
#[derive(Debug, PartialEq, Eq)]
pub enum Request<'a> {
    /// With flags.
    Open(Path<'a>, u32),
    Close(Handle<'a>),
    Read {
        handle: Handle<'a>,
        offset: u64,
        len: u32,
    },
    Write {
        handle: Handle<'a>,
        offset: u64,
        data: &'a [u8],
    },
    /// STAT or LSTAT: there are no symbolic links to follow.
    Stat(Path<'a>),
    Fstat(Handle<'a>),
    SetLen(Handle<'a>, u64),
    Opendir(Path<'a>),
    Readdir(Handle<'a>),
    Remove(Path<'a>),
    /// RENAME or posix-rename, from and to: neither replaces a file here.
    Rename(Path<'a>, Path<'a>),
    Realpath(Path<'a>),
    Fsync(Handle<'a>),
    Limits,
    Statvfs,
    /// Begins a session on a container: its predecessors are refused from then on.
    SessionBegin(Path<'a>),
    /// Makes a further connection part of a session, by its number.
    SessionJoin(Path<'a>, u64),
    /// Says whether the container was left in order.
    SessionEnd(Path<'a>, bool),
    /// Announces writes, in bytes: what they destroy is saved at once.
    WillWrite(Handle<'a>, Ranges),
    /// Makes holes.
    Punch(Handle<'a>, Ranges),
    /// Asks which parts have data, from an offset on.
    Map(Handle<'a>, u64),
    /// Asks for the past states of a container.
    Generations(Path<'a>),
    /// A request that changes what may not be changed: mode, owner, times, links, folders.
    Forbidden,
    /// A request that is not known.
    Unknown,
}

/// What went wrong, as a status of version 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok = 0,
    Eof = 1,
    NoSuchFile = 2,
    Denied = 3,
    Failure = 4,
    BadMessage = 5,
    Unsupported = 8,
}

impl Status {
    fn text(self) -> &'static str {
        match self {
            Self::Ok => "Success",
            Self::Eof => "End of file",
            Self::NoSuchFile => "No such file",
            Self::Denied => "Permission denied",
            Self::Failure => "Failure",
            Self::BadMessage => "Bad message",
            Self::Unsupported => "Operation unsupported",
        }
    }
}

/// A file's attributes, as answered.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attributes {
    pub len: u64,
    pub mode: u32,
    pub owner: (u32, u32),
    pub modified_s: u32,
}

/// Splits the first whole packet off `bytes`: its body, and how long it was. `Ok(None)`: more bytes
/// are needed. `Err`: no client sends that; the connection has to end.
pub fn split_packet(bytes: &[u8]) -> Result<Option<(&[u8], usize)>, ()> {
    let Some((head, rest)) = bytes.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let len = usize::try_from(u32::from_be_bytes(*head)).map_err(|_| ())?;
    if len == 0 || len > PACKET_BYTES_MAX {
        return Err(());
    }
    Ok(rest.get(..len).map(|body| (body, 4 + len)))
}

/// Parses INIT; the answer is [`greeting`].
pub fn is_init(body: &[u8]) -> bool {
    body.first() == Some(&1) && body.len() >= 5
}

/// The answer to INIT.
pub fn greeting(root_id: &str) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 0, 2, 0, 0, 0, 3];
    for (name, version) in EXTENSIONS {
        string(&mut out, name.as_bytes());
        string(&mut out, version.as_bytes());
    }
    string(&mut out, AGENT.0.as_bytes());
    string(&mut out, format!("{}{root_id}", AGENT.1).as_bytes());
    seal(out)
}

/// Parses any other request: its id, and the request. `None`: the packet ends too early;
/// the id is 0 where not even that is there.
pub fn parse(body: &[u8]) -> (u32, Option<Request<'_>>) {
    let mut fields = Fields(body);
    let (Some(kind), Some(id)) = (fields.u8(), fields.u32()) else {
        return (0, None);
    };
    (id, parse_fields(kind, &mut fields))
}

fn parse_fields<'a>(kind: u8, fields: &mut Fields<'a>) -> Option<Request<'a>> {
    Some(match kind {
        3 => {
            let (path, flags) = (fields.path()?, fields.u32()?);
            fields.attributes()?;
            Request::Open(path, flags)
        }
        4 => Request::Close(fields.string()?),
        5 => Request::Read {
            handle: fields.string()?,
            offset: fields.u64()?,
            len: fields.u32()?,
        },
        6 => Request::Write {
            handle: fields.string()?,
            offset: fields.u64()?,
            data: fields.string()?,
        },
        7 | 17 => Request::Stat(fields.path()?),
        8 => Request::Fstat(fields.string()?),
        10 => {
            let handle = fields.string()?;
            match fields.attributes()? {
                (ATTR_SIZE, len) => Request::SetLen(handle, len),
                _ => Request::Forbidden,
            }
        }
        11 => Request::Opendir(fields.path()?),
        12 => Request::Readdir(fields.string()?),
        13 => Request::Remove(fields.path()?),
        16 => Request::Realpath(fields.path()?),
        18 => Request::Rename(fields.path()?, fields.path()?),
        // SETSTAT, MKDIR, RMDIR, SYMLINK.
        9 | 14 | 15 | 20 => Request::Forbidden,
        200 => match fields.string()? {
            b"posix-rename@openssh.com" => Request::Rename(fields.path()?, fields.path()?),
            b"fsync@openssh.com" => Request::Fsync(fields.string()?),
            b"limits@openssh.com" => Request::Limits,
            b"statvfs@openssh.com" | b"fstatvfs@openssh.com" => {
                fields.string()?;
                Request::Statvfs
            }
            b"session-begin@sprat" => Request::SessionBegin(fields.path()?),
            b"session-join@sprat" => Request::SessionJoin(fields.path()?, fields.u64()?),
            b"session-end@sprat" => Request::SessionEnd(fields.path()?, fields.u32()? != 0),
            b"will-write@sprat" => Request::WillWrite(fields.string()?, fields.ranges()?),
            b"punch@sprat" => Request::Punch(fields.string()?, fields.ranges()?),
            b"map@sprat" => Request::Map(fields.string()?, fields.u64()?),
            b"generations@sprat" => Request::Generations(fields.path()?),
            _ => Request::Unknown,
        },
        _ => Request::Unknown,
    })
}

/// An answer of numbers.
pub fn numbers(id: u32, numbers: &[u64]) -> Vec<u8> {
    let mut out = begin(201, id);
    numbers
        .iter()
        .for_each(|number| out.extend(number.to_be_bytes()));
    seal(out)
}

/// An answer of names with numbers, and one number at the end.
pub fn states(id: u32, states: &[(String, Vec<u64>)], last: u64) -> Vec<u8> {
    let mut out = begin(201, id);
    out.extend(u32::try_from(states.len()).unwrap_or(0).to_be_bytes());
    for (name, numbers) in states {
        string(&mut out, name.as_bytes());
        numbers
            .iter()
            .for_each(|number| out.extend(number.to_be_bytes()));
    }
    out.extend(last.to_be_bytes());
    seal(out)
}

pub fn status(id: u32, status: Status) -> Vec<u8> {
    let mut out = begin(101, id);
    out.extend((status as u32).to_be_bytes());
    string(&mut out, status.text().as_bytes());
    string(&mut out, b"en");
    seal(out)
}

pub fn handle(id: u32, number: u32) -> Vec<u8> {
    let mut out = begin(102, id);
    string(&mut out, &number.to_be_bytes());
    seal(out)
}

/// What comes before `len` bytes of data in an answer to READ.
pub fn data_head(id: u32, len: usize) -> [u8; DATA_HEAD_BYTES] {
    let mut head = [0; DATA_HEAD_BYTES];
    let len = u32::try_from(len).unwrap_or(0);
    head[..4].copy_from_slice(&(len + 9).to_be_bytes());
    head[4] = 103;
    head[5..9].copy_from_slice(&id.to_be_bytes());
    head[9..].copy_from_slice(&len.to_be_bytes());
    head
}

/// File names with their attributes; the long name is what `sftp` shows for `ls -l`.
pub fn names(id: u32, names: &[(String, Attributes)]) -> Vec<u8> {
    let mut out = begin(104, id);
    out.extend(u32::try_from(names.len()).unwrap_or(0).to_be_bytes());
    for (name, found) in names {
        string(&mut out, name.as_bytes());
        let kind = if found.mode & 0o170_000 == 0o040_000 {
            "drwx------"
        } else {
            "-rw-------"
        };
        let long = format!(
            "{kind}    1 {:8} {:8} {:>12} {name}",
            found.owner.0, found.owner.1, found.len
        );
        string(&mut out, long.as_bytes());
        put_attributes(&mut out, found);
    }
    seal(out)
}

pub fn attributes(id: u32, found: &Attributes) -> Vec<u8> {
    let mut out = begin(105, id);
    put_attributes(&mut out, found);
    seal(out)
}

/// The answer to limits@openssh.com: packet, read, write, open handles.
pub fn limits(id: u32, handles_max: usize) -> Vec<u8> {
    let transfer = u64::from(TRANSFER_BYTES_MAX);
    let (packet, handles) = (PACKET_BYTES_MAX as u64, handles_max as u64);
    numbers(id, &[packet, transfer, transfer, handles])
}

/// The answer to statvfs@openssh.com, in units of 4,096 bytes.
pub fn statvfs(id: u32, total_bytes: u64, available_bytes: u64, read_only: bool) -> Vec<u8> {
    let (total, free) = (total_bytes / 4096, available_bytes / 4096);
    // Of units: size, size, all, free, available. Of files: all, free, available (0: not counted). Id, flags (1:
    // read-only), longest name.
    let flags = u64::from(read_only);
    numbers(id, &[4096, 4096, total, free, free, 0, 0, 0, 0, flags, 255])
}

/// A handle's number; `None` for bytes that were never handed out.
pub fn handle_number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

fn begin(kind: u8, id: u32) -> Vec<u8> {
    let mut out = vec![0, 0, 0, 0, kind];
    out.extend(id.to_be_bytes());
    out
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u32::try_from(bytes.len()).unwrap_or(0).to_be_bytes());
    out.extend(bytes);
}

fn put_attributes(out: &mut Vec<u8>, found: &Attributes) {
    out.extend((ATTR_SIZE | ATTR_UIDGID | ATTR_PERMISSIONS | ATTR_ACMODTIME).to_be_bytes());
    out.extend(found.len.to_be_bytes());
    for field in [
        found.owner.0,
        found.owner.1,
        found.mode,
        found.modified_s,
        found.modified_s,
    ] {
        out.extend(field.to_be_bytes());
    }
}

/// Writes the packet's length in front of it.
fn seal(mut out: Vec<u8>) -> Vec<u8> {
    let len = u32::try_from(out.len() - 4).unwrap_or(0);
    out[..4].copy_from_slice(&len.to_be_bytes());
    out
}

/// The part of a packet that is not parsed yet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u8(&mut self) -> Option<u8> {
        Some(u8::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.array()?))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn path(&mut self) -> Option<&'a [u8]> {
        self.string().filter(|path| path.len() <= PATH_BYTES_MAX)
    }

    /// At most [`RANGES_MAX`] pairs of offset and length, whose sums fit.
    fn ranges(&mut self) -> Option<Ranges> {
        let count = self.u32()?;
        if count > RANGES_MAX {
            return None;
        }
        let range = |fields: &mut Self| {
            let (offset, len) = (fields.u64()?, fields.u64()?);
            offset.checked_add(len).map(|_| (offset, len))
        };
        (0..count).map(|_| range(self)).collect()
    }

    /// The flags and the size of attributes.
    fn attributes(&mut self) -> Option<(u32, u64)> {
        let flags = self.u32()?;
        let size = if flags & ATTR_SIZE != 0 {
            self.u64()?
        } else {
            0
        };
        Some((flags, size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = split_packet(&bytes);
            let _ = parse(&bytes);
            let _ = is_init(&bytes);
        }

        #[test]
        fn a_request_that_is_cut_short_is_refused(kind in 0_u8..=255, cut in 0_usize..40) {
            let mut body = vec![kind, 0, 0, 0, 7, 0, 0, 0, 9];
            body.extend(b"aaaaaaaaa\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
            body.truncate(body.len().saturating_sub(cut).max(5));
            let (id, _) = parse(&body);
            prop_assert_eq!(id, 7);
        }
    }

    #[test]
    fn a_packet_longer_than_the_limit_ends_the_connection() {
        assert!(split_packet(&[0x40, 0, 0, 0, 1]).is_err());
        assert!(split_packet(&[0, 0, 0, 0]).is_err());
        assert_eq!(split_packet(&[0, 0, 0, 2, 1]), Ok(None));
        assert_eq!(
            split_packet(&[0, 0, 0, 1, 9, 9]),
            Ok(Some((&[9_u8][..], 5)))
        );
    }

    #[test]
    fn the_greeting_is_not_taken_for_openssh_and_has_fsync() {
        let text = String::from_utf8_lossy(&greeting("00ff")).into_owned();
        assert!(
            text.contains("id=00ff")
                && text.contains("fsync@openssh.com")
                && !text.contains("hardlink")
        );
    }
}
