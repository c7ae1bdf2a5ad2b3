//! The bytes of SFTP version 3: requests to packets, packets to replies; no I/O.
//!
//! draft-ietf-secsh-filexfer-02. A packet is `u32 length | u8 type | …`, big endian; `length`
//! counts what follows it. Requests and their replies carry a `u32 id` after the type; the greeting
//! (`INIT`, `VERSION`) doesn't. A string is `u32 length | bytes`.

use super::agent::{AgentId, AgentRequest, announced};
use crate::contract::Access;

/// The longest packet that is accepted, as in OpenSSH (`SFTP_MAX_MSG_LENGTH`, sftp-common.h).
pub(crate) const PACKET_BYTES_MAX: usize = 256 * 1024;
/// The draft's limit of a handle's length (section 6.2).
const HANDLE_BYTES_MAX: usize = 256;
/// The only version spoken.
pub(crate) const VERSION: u32 = 3;

const INIT: u8 = 1;
const VERSION_REPLY: u8 = 2;
const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const READ: u8 = 5;
const WRITE: u8 = 6;
const LSTAT: u8 = 7;
const FSTAT: u8 = 8;
const FSETSTAT: u8 = 10;
const OPENDIR: u8 = 11;
const READDIR: u8 = 12;
const REMOVE: u8 = 13;
const STAT: u8 = 17;
const RENAME: u8 = 18;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const DATA: u8 = 103;
const NAME: u8 = 104;
const ATTRS: u8 = 105;
const EXTENDED: u8 = 200;
const EXTENDED_REPLY: u8 = 201;

const ATTR_SIZE: u32 = 1;
const ATTR_UIDGID: u32 = 2;
const ATTR_PERMISSIONS: u32 = 4;
const ATTR_ACMODTIME: u32 = 8;
const ATTR_EXTENDED: u32 = 0x8000_0000;

/// How `OPEN` opens; the draft's pflags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpenFor {
    /// READ
    Reading,
    /// READ | WRITE
    Writing,
    /// READ | WRITE | CREAT | EXCL, mode 0600
    Creating,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request<'a> {
    Init,
    Open {
        path: &'a str,
        how: OpenFor,
    },
    Close {
        handle: &'a [u8],
    },
    Read {
        handle: &'a [u8],
        offset: u64,
        len: u32,
    },
    Write {
        handle: &'a [u8],
        offset: u64,
        data: &'a [u8],
    },
    Lstat {
        path: &'a str,
    },
    Stat {
        path: &'a str,
    },
    Fstat {
        handle: &'a [u8],
    },
    SetLen {
        handle: &'a [u8],
        len: u64,
    },
    SetOwnerAndMode {
        handle: &'a [u8],
        owner: (u32, u32),
        mode: u32,
    },
    CopyData {
        from: &'a [u8],
        to: &'a [u8],
        offset: u64,
        len: u64,
    },
    Opendir {
        path: &'a str,
    },
    Readdir {
        handle: &'a [u8],
    },
    Remove {
        path: &'a str,
    },
    Rename {
        from: &'a str,
        to: &'a str,
    },
    PosixRename {
        from: &'a str,
        to: &'a str,
    },
    Fsync {
        handle: &'a [u8],
    },
    Limits,
    Statvfs {
        path: &'a str,
    },
    Agent(AgentRequest<'a>),
}

impl OpenFor {
    /// How an existing file is opened.
    pub(crate) fn existing(access: Access) -> Self {
        match access {
            Access::ReadOnly => Self::Reading,
            Access::ReadWrite => Self::Writing,
        }
    }
}

impl Request<'_> {
    /// Whether the server is another one after this request.
    pub(crate) fn changes_something(&self) -> bool {
        match self {
            Self::Agent(request) => request.changes_something(),
            Self::Open { how, .. } => *how == OpenFor::Creating,
            Self::Write { .. }
            | Self::SetLen { .. }
            | Self::SetOwnerAndMode { .. }
            | Self::CopyData { .. }
            | Self::Remove { .. }
            | Self::Rename { .. }
            | Self::PosixRename { .. } => true,
            Self::Init
            | Self::Close { .. }
            | Self::Read { .. }
            | Self::Lstat { .. }
            | Self::Stat { .. }
            | Self::Fstat { .. }
            | Self::Opendir { .. }
            | Self::Readdir { .. }
            | Self::Fsync { .. }
            | Self::Limits
            | Self::Statvfs { .. } => false,
        }
    }

    /// The whole packet, starting with its length. `INIT` has no id.
    pub(crate) fn encode(&self, id: u32) -> Vec<u8> {
        let mut packet = Builder::new(self.kind(), id, self.capacity());
        match *self {
            Self::Init => {
                packet.0.truncate(5);
                packet.u32(VERSION);
            }
            Self::Open { path, how } => {
                packet.string(path.as_bytes());
                match how {
                    OpenFor::Reading => packet.u32(0x01).u32(0),
                    OpenFor::Writing => packet.u32(0x01 | 0x02).u32(0),
                    OpenFor::Creating => packet
                        .u32(0x01 | 0x02 | 0x08 | 0x20)
                        .u32(ATTR_PERMISSIONS)
                        .u32(0o600),
                };
            }
            Self::Close { handle } | Self::Fstat { handle } | Self::Readdir { handle } => {
                packet.string(handle);
            }
            Self::Read {
                handle,
                offset,
                len,
            } => {
                packet.string(handle).u64(offset).u32(len);
            }
            Self::Write {
                handle,
                offset,
                data,
            } => {
                packet.string(handle).u64(offset).string(data);
            }
            Self::Lstat { path }
            | Self::Stat { path }
            | Self::Opendir { path }
            | Self::Remove { path } => {
                packet.string(path.as_bytes());
            }
            Self::SetLen { handle, len } => {
                packet.string(handle).u32(ATTR_SIZE).u64(len);
            }
            Self::SetOwnerAndMode {
                handle,
                owner,
                mode,
            } => {
                packet
                    .string(handle)
                    .u32(ATTR_UIDGID | ATTR_PERMISSIONS)
                    .u32(owner.0)
                    .u32(owner.1)
                    .u32(mode);
            }
            // draft-ietf-secsh-filexfer-extensions-00, section 7: a length of 0 would mean "all".
            Self::CopyData {
                from,
                to,
                offset,
                len,
            } => {
                packet.string(b"copy-data").string(from).u64(offset);
                packet.u64(len.max(1)).string(to).u64(offset);
            }
            Self::Rename { from, to } => {
                packet.string(from.as_bytes()).string(to.as_bytes());
            }
            Self::PosixRename { from, to } => {
                packet.string(b"posix-rename@openssh.com");
                packet.string(from.as_bytes()).string(to.as_bytes());
            }
            Self::Fsync { handle } => {
                packet.string(b"fsync@openssh.com").string(handle);
            }
            Self::Limits => {
                packet.string(b"limits@openssh.com");
            }
            Self::Statvfs { path } => {
                packet
                    .string(b"statvfs@openssh.com")
                    .string(path.as_bytes());
            }
            Self::Agent(request) => request.encode(&mut packet),
        }
        packet.finish()
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Init => INIT,
            Self::Open { .. } => OPEN,
            Self::Close { .. } => CLOSE,
            Self::Read { .. } => READ,
            Self::Write { .. } => WRITE,
            Self::Lstat { .. } => LSTAT,
            Self::Stat { .. } => STAT,
            Self::Fstat { .. } => FSTAT,
            Self::SetLen { .. } | Self::SetOwnerAndMode { .. } => FSETSTAT,
            Self::Opendir { .. } => OPENDIR,
            Self::Readdir { .. } => READDIR,
            Self::Remove { .. } => REMOVE,
            Self::Rename { .. } => RENAME,
            Self::PosixRename { .. }
            | Self::Fsync { .. }
            | Self::Limits
            | Self::Statvfs { .. }
            | Self::CopyData { .. }
            | Self::Agent(_) => EXTENDED,
        }
    }

    fn capacity(&self) -> usize {
        match self {
            Self::Write { handle, data, .. } => handle.len() + data.len() + 32,
            _ => 128,
        }
    }
}

pub(super) struct Builder(Vec<u8>);

impl Builder {
    fn new(kind: u8, id: u32, capacity: usize) -> Self {
        let mut bytes = Vec::with_capacity(capacity);
        bytes.extend([0, 0, 0, 0, kind]);
        bytes.extend(id.to_be_bytes());
        Self(bytes)
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn string(&mut self, bytes: &[u8]) -> &mut Self {
        let len = u32::try_from(bytes.len());
        self.u32(len.unwrap_or_else(|_| panic!("a request's string of {} bytes", bytes.len())));
        self.0.extend(bytes);
        self
    }

    fn finish(mut self) -> Vec<u8> {
        let len = u32::try_from(self.0.len() - 4);
        let len = len.unwrap_or_else(|_| panic!("a request of {} bytes", self.0.len()));
        self.0[..4].copy_from_slice(&len.to_be_bytes());
        self.0
    }
}

/// A length that is text: a login printed something before SFTP began.
fn as_text(length: u32) -> String {
    let bytes = length.to_be_bytes();
    let printable = |byte: &u8| matches!(byte, b' '..=b'~' | b'\n' | b'\r' | b'\t');
    if !bytes.iter().all(printable) {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes).escape_default().to_string();
    format!(
        ", which is the text \"{text}\": something on the server prints text before SFTP begins (a \
         start-up file of its shell, such as .bashrc); it must print nothing in a session without a terminal"
    )
}

/// Describes an answer's type (the draft's section 3), with its number for readers who know the
/// protocol.
fn type_in_words(kind: u8) -> String {
    let words = match kind {
        STATUS => "a status",
        HANDLE => "a handle of a file",
        DATA => "data",
        NAME => "names of files",
        ATTRS => "attributes of a file",
        EXTENDED_REPLY => "an answer to an extension",
        VERSION_REPLY => "a greeting",
        _ => "nothing that the protocol knows",
    };
    format!("{words} (type {kind})")
}

/// A packet that does not follow the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("a packet of {0} bytes{text}", text = as_text(*.0))]
    PacketLength(u32),
    #[error("a packet ends inside its {0}")]
    Short(&'static str),
    #[error("a handle of {0} bytes")]
    HandleLength(usize),
    #[error("unknown attributes (flags {0:#x})")]
    AttributeFlags(u32),
    #[error("{0} bytes after the end of a reply")]
    Trailing(usize),
    #[error("an answer that doesn't fit the request: {}", type_in_words(*.0))]
    ReplyType(u8),
    #[error("version {0} instead of 3")]
    Version(u32),
    #[error("{sent} bytes of data instead of {asked}")]
    TooMuchData { asked: usize, sent: usize },
    #[error("no data twice in a row")]
    NoData,
}

/// Checks a packet's announced length before anything is allocated for it.
pub(crate) fn packet_len(head: [u8; 4]) -> Result<usize, Malformed> {
    let announced = u32::from_be_bytes(head);
    match usize::try_from(announced) {
        Ok(len) if (5..=PACKET_BYTES_MAX).contains(&len) => Ok(len),
        _ => Err(Malformed::PacketLength(announced)),
    }
}

/// What a server can do beyond the draft.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Extensions {
    pub limits: bool,
    pub fsync: bool,
    pub statvfs: bool,
    pub posix_rename: bool,
    pub hardlink: bool,
    pub copy_data: bool,
    /// `sprat-agent` answers.
    pub agent: Option<AgentId>,
    /// It greets like [`OPENSSH_GREETING`]: it carries out requests one after another, in the order
    /// in which they arrive.
    pub keeps_order: bool,
}

/// What OpenSSH's sftp-server announces, in its order (`process_init`, sftp-server.c, since 9.1;
/// later versions may append more). Its `process` carries out one request, answer included, before
/// it reads the next. Servers that don't (asyncssh, pkg/sftp) announce other names, or these in
/// another order.
const OPENSSH_GREETING: [(&[u8], &[u8]); 11] = [
    (b"posix-rename@openssh.com", b"1"),
    (b"statvfs@openssh.com", b"2"),
    (b"fstatvfs@openssh.com", b"2"),
    (b"hardlink@openssh.com", b"1"),
    (b"fsync@openssh.com", b"1"),
    (b"lsetstat@openssh.com", b"1"),
    (b"limits@openssh.com", b"1"),
    (b"expand-path@openssh.com", b"1"),
    (b"copy-data", b"1"),
    (b"home-directory", b"1"),
    (b"users-groups-by-id@openssh.com", b"1"),
];

/// Attributes of a file, as far as the server sent them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Attributes {
    pub len: Option<u64>,
    pub owner: Option<(u32, u32)>,
    pub mode: Option<u32>,
    pub modified_s: Option<u32>,
}

impl Attributes {
    /// The file type of `mode` (stat(2): `S_IFMT` 0o170000, `S_IFREG` 0o100000).
    pub(crate) fn regular(&self) -> bool {
        self.mode.is_some_and(|mode| mode & 0o170_000 == 0o100_000)
    }

    /// A folder, or of a type that the server did not report.
    pub(crate) fn may_be_folder(&self) -> bool {
        self.mode.is_none_or(|mode| mode & 0o170_000 == 0o040_000)
    }
}

/// A server's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reply<'a> {
    Status {
        code: u32,
        message: &'a [u8],
    },
    Handle(&'a [u8]),
    Data(&'a [u8]),
    /// File names only; long names and attributes are skipped.
    Names(Vec<&'a [u8]>),
    Attributes(Attributes),
    Extended(&'a [u8]),
}

/// The request id of a packet's body (what follows the length); `None` for a greeting.
pub(crate) fn reply_id(body: &[u8]) -> Result<Option<u32>, Malformed> {
    let mut fields = Fields(body);
    match fields.u8("type")? {
        VERSION_REPLY => Ok(None),
        STATUS | HANDLE | DATA | NAME | ATTRS | EXTENDED_REPLY => Ok(Some(fields.u32("id")?)),
        other => Err(Malformed::ReplyType(other)),
    }
}

/// Parses the greeting.
pub(crate) fn parse_version(body: &[u8]) -> Result<Extensions, Malformed> {
    let mut fields = Fields(body);
    match fields.u8("type")? {
        VERSION_REPLY => {}
        other => return Err(Malformed::ReplyType(other)),
    }
    match fields.u32("version")? {
        VERSION => {}
        other => return Err(Malformed::Version(other)),
    }
    let mut found = Extensions::default();
    let mut as_openssh = 0;
    while !fields.0.is_empty() {
        let name = fields.string("extension name")?;
        let version = fields.string("extension version")?;
        if OPENSSH_GREETING.get(as_openssh) == Some(&(name, version)) {
            as_openssh += 1;
        } else if as_openssh < OPENSSH_GREETING.len() {
            // Nothing matches any more.
            as_openssh = usize::MAX;
        }
        match (name, version) {
            (b"limits@openssh.com", b"1") => found.limits = true,
            (b"fsync@openssh.com", b"1") => found.fsync = true,
            (b"statvfs@openssh.com", b"2") => found.statvfs = true,
            (b"posix-rename@openssh.com", b"1") => found.posix_rename = true,
            (b"hardlink@openssh.com", b"1") => found.hardlink = true,
            (b"copy-data", b"1") => found.copy_data = true,
            (b"sprat-agent@sprat", value) => found.agent = announced(value),
            _ => {}
        }
    }
    // The agent answers one request after another, too.
    found.keeps_order = as_openssh == OPENSSH_GREETING.len() || found.agent.is_some();
    Ok(found)
}

/// Parses the body of any other reply.
pub(crate) fn parse_reply(body: &[u8]) -> Result<Reply<'_>, Malformed> {
    let mut fields = Fields(body);
    let kind = fields.u8("type")?;
    fields.u32("id")?;
    let reply = match kind {
        STATUS => {
            let code = fields.u32("status code")?;
            // Old servers omit message and language.
            let message = if fields.0.is_empty() {
                b""
            } else {
                fields.string("status message")?
            };
            return Ok(Reply::Status { code, message });
        }
        HANDLE => {
            let handle = fields.string("handle")?;
            if handle.is_empty() || handle.len() > HANDLE_BYTES_MAX {
                return Err(Malformed::HandleLength(handle.len()));
            }
            Reply::Handle(handle)
        }
        DATA => Reply::Data(fields.string("data")?),
        NAME => Reply::Names(fields.names()?),
        ATTRS => Reply::Attributes(fields.attributes()?),
        EXTENDED_REPLY => Reply::Extended(std::mem::take(&mut fields.0)),
        other => return Err(Malformed::ReplyType(other)),
    };
    match fields.0.len() {
        0 => Ok(reply),
        rest => Err(Malformed::Trailing(rest)),
    }
}

/// The reply to `limits@openssh.com`; zero means that the server sets no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub packet_bytes_max: u64,
    pub read_bytes_max: u64,
    pub write_bytes_max: u64,
}

pub(crate) fn parse_limits(reply: &[u8]) -> Result<Limits, Malformed> {
    let mut fields = Fields(reply);
    Ok(Limits {
        packet_bytes_max: fields.u64("packet limit")?,
        read_bytes_max: fields.u64("read limit")?,
        write_bytes_max: fields.u64("write limit")?,
    })
}

/// The reply to `statvfs@openssh.com`, as far as it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Statvfs {
    pub available_bytes: u64,
    pub total_bytes: u64,
    pub read_only: bool,
    /// The file system counts its inodes and none is left.
    pub no_inodes: bool,
}

pub(crate) fn parse_statvfs(reply: &[u8]) -> Result<Statvfs, Malformed> {
    let mut fields = Fields(reply);
    let _block = fields.u64("block size")?;
    let fragment = fields.u64("fragment size")?;
    let blocks = fields.u64("blocks")?;
    let _free = fields.u64("free blocks")?;
    let available = fields.u64("available blocks")?;
    let files = fields.u64("files")?;
    let _files_free = fields.u64("free files")?;
    let files_available = fields.u64("available files")?;
    let _id = fields.u64("file system id")?;
    let flags = fields.u64("flags")?;
    Ok(Statvfs {
        available_bytes: available.saturating_mul(fragment),
        total_bytes: blocks.saturating_mul(fragment),
        // SSH2_FXE_STATVFS_ST_RDONLY, openssh PROTOCOL section 4.4
        read_only: flags & 1 != 0,
        no_inodes: files > 0 && files_available == 0,
    })
}

/// The part of a packet that is not parsed yet.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(*taken)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        Ok(u8::from_be_bytes(self.array(what)?))
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array(what)?))
    }

    pub(super) fn string(&mut self, what: &'static str) -> Result<&'a [u8], Malformed> {
        let len = usize::try_from(self.u32(what)?).map_err(|_| Malformed::Short(what))?;
        self.take(len, what)
    }

    fn names(&mut self) -> Result<Vec<&'a [u8]>, Malformed> {
        // The count comes from the server, so no memory is reserved by it. Every entry takes at
        // least twelve bytes of a packet of limited size.
        let count = self.u32("name count")?;
        let mut names = Vec::new();
        for _ in 0..count {
            names.push(self.string("file name")?);
            self.string("long name")?;
            self.attributes()?;
        }
        Ok(names)
    }

    fn attributes(&mut self) -> Result<Attributes, Malformed> {
        let flags = self.u32("attribute flags")?;
        let known = ATTR_SIZE | ATTR_UIDGID | ATTR_PERMISSIONS | ATTR_ACMODTIME | ATTR_EXTENDED;
        if flags & !known != 0 {
            return Err(Malformed::AttributeFlags(flags));
        }
        let mut found = Attributes::default();
        if flags & ATTR_SIZE != 0 {
            found.len = Some(self.u64("size")?);
        }
        if flags & ATTR_UIDGID != 0 {
            found.owner = Some((self.u32("uid")?, self.u32("gid")?));
        }
        if flags & ATTR_PERMISSIONS != 0 {
            found.mode = Some(self.u32("permissions")?);
        }
        if flags & ATTR_ACMODTIME != 0 {
            self.u32("access time")?;
            found.modified_s = Some(self.u32("modification time")?);
        }
        if flags & ATTR_EXTENDED != 0 {
            for _ in 0..self.u32("extended attribute count")? {
                self.string("extended attribute type")?;
                self.string("extended attribute data")?;
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
