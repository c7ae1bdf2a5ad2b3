//! The errors of headers and keys, and the kinds that a caller distinguishes.

use std::{fmt, io};

use openssl::error::ErrorStack;

/// Work on a LUKS2 header failed. No variant contains a secret. Text from a header is escaped and its
/// length is limited.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "fields are named in the message")]
#[non_exhaustive]
pub enum LuksError {
    /// The bytes of the header could not be fetched.
    #[error("read {len} bytes of the LUKS2 header at offset {offset}")]
    Read {
        offset: u64,
        len: u64,
        #[source]
        source: io::Error,
    },
    /// Neither header copy has the LUKS magic.
    #[error("not a LUKS container: no LUKS header at its beginning")]
    NotLuks,
    /// A LUKS1 header. Only the kernel's dm-crypt opens it.
    #[error("a LUKS1 container: opens in kernel mode only")]
    Luks1,
    /// Legal and secure, but only the kernel's dm-crypt supports it.
    #[error("{what}: opens in kernel mode only")]
    KernelOnly { what: String },
    /// The file ends before the end of its header, or has no complete block after it.
    #[error("truncated container: {file_len} bytes long, at least {needed} needed")]
    Truncated { file_len: u64, needed: u64 },
    /// No header copy is usable.
    #[error("both LUKS2 header copies are damaged (primary: {primary}; secondary: {secondary})")]
    HeaderDamaged {
        primary: CopyFault,
        secondary: CopyFault,
    },
    /// The header is intact, but its metadata violate the rules of LUKS2.
    #[error("invalid LUKS2 metadata: {what}")]
    Invalid { what: String },
    /// The header requests something that is never done with a server's data.
    #[error("refused: the LUKS2 header asks for {what}")]
    Refused { what: String },
    /// Legal, but sprat supports it in neither mode.
    #[error("not supported: {what}")]
    Unsupported { what: String },
    /// The header differs from what this machine knows about the container.
    #[error("the LUKS2 header was changed: {field} is {found}, but this machine knows {pinned}")]
    Pin {
        field: &'static str,
        pinned: String,
        found: String,
    },
    /// The header has another fingerprint than the one that was typed.
    #[error("the fingerprint of the LUKS2 header is {found}, but {typed} was given")]
    Fingerprint { typed: String, found: String },
    /// The header is older than one that this machine has seen.
    #[error(
        "the LUKS2 header is an old one: its sequence number is {found}, but this machine knows \
             {known}"
    )]
    OlderHeader { known: u64, found: u64 },
    /// The sequence increased more than changes of keys can explain.
    #[error(
        "the LUKS2 header has an implausible sequence number, {found}; this machine knows {known}"
    )]
    Sequence { known: u64, found: u64 },
    /// The secret opens none of the key slots.
    #[error("the key or passphrase opens none of the {slots_tried} key slots")]
    WrongSecret { slots_tried: usize },
    /// The secret opens no slot, and some slots were skipped because they cost too much.
    #[error("key slot {slot} asks for too much: {asks}; the limit is {limit}")]
    KdfTooCostly {
        slot: u32,
        asks: String,
        limit: String,
    },
    /// The secret opens none of the slots that were tried. The key derivation of the others would exceed
    /// the budget for one opening.
    #[error(
        "the key or passphrase opens none of the {slots_tried} key slots that were tried; {} were \
         skipped, because their key derivation takes too long",
        .left_out.len()
    )]
    KdfBudget {
        slots_tried: usize,
        left_out: Vec<u32>,
    },
    /// A key slot's derivation needs more memory than is available.
    #[error("key slot {slot} needs {memory_kib} KiB of memory, which this machine does not have")]
    NoMemory { slot: u32, memory_kib: u64 },
    /// libcryptsetup failed.
    #[error("{op} with libcryptsetup")]
    Library {
        op: &'static str,
        #[source]
        source: libcryptsetup_rs::LibcryptErr,
    },
    /// The anonymous file that libcryptsetup works on failed.
    #[error("{op} the header's copy in memory")]
    Scratch {
        op: &'static str,
        #[source]
        source: io::Error,
    },
    /// OpenSSL failed.
    #[error("{op} with OpenSSL")]
    Crypto {
        op: &'static str,
        #[source]
        source: ErrorStack,
    },
    /// An argument from the user is invalid.
    #[error("{what}")]
    Argument { what: String },
}

/// The fault of a header copy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyFault {
    /// The magic bytes are missing.
    Magic,
    /// A version other than 2.
    Version(u16),
    /// A size that LUKS2 does not have.
    Size(u64),
    /// It contains another offset than its own.
    Offset(u64),
    /// An unknown checksum algorithm.
    ChecksumKind(String),
    /// The checksum is wrong.
    Checksum,
    /// The file ends within it.
    Truncated,
    /// A sequence that no number of key changes can reach. Somebody wrote it so that the next change
    /// wraps it to zero and removed keys become valid again.
    Sequence(u64),
    /// The checksum is correct, but the metadata can't be parsed.
    Metadata(String),
}

impl fmt::Display for CopyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("no LUKS2 magic"),
            Self::Version(version) => write!(f, "version {version}"),
            Self::Size(bytes) => write!(f, "a size of {bytes} bytes"),
            Self::Offset(offset) => write!(f, "it belongs at offset {offset}"),
            Self::ChecksumKind(kind) => write!(f, "unknown checksum {kind}"),
            Self::Checksum => f.write_str("wrong checksum"),
            Self::Truncated => f.write_str("cut short"),
            Self::Sequence(number) => write!(f, "an implausible sequence, {number}"),
            Self::Metadata(what) => f.write_str(what),
        }
    }
}

/// The kinds of failure that a caller distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LuksErrorKind {
    /// The bytes could not be fetched. The source has the reason.
    Read,
    /// There is no LUKS2 container (not LUKS, or LUKS1).
    NoContainer,
    /// Damaged, truncated, changed, contradictory or older than known.
    Damaged,
    /// Legal, but not supported by sprat, or not in this mode.
    Unsupported,
    /// Wrong key or passphrase.
    WrongSecret,
    /// Any other failure.
    Failed,
}

impl LuksError {
    /// The kind of this failure.
    #[must_use]
    pub fn kind(&self) -> LuksErrorKind {
        match self {
            Self::Read { .. } => LuksErrorKind::Read,
            Self::NotLuks => LuksErrorKind::NoContainer,
            Self::Truncated { .. }
            | Self::HeaderDamaged { .. }
            | Self::Invalid { .. }
            | Self::Refused { .. }
            | Self::Pin { .. }
            | Self::Fingerprint { .. }
            | Self::OlderHeader { .. }
            | Self::Sequence { .. }
            | Self::KdfTooCostly { .. } => LuksErrorKind::Damaged,
            Self::Luks1 | Self::KernelOnly { .. } | Self::Unsupported { .. } => {
                LuksErrorKind::Unsupported
            }
            Self::WrongSecret { .. } | Self::KdfBudget { .. } => LuksErrorKind::WrongSecret,
            Self::NoMemory { .. }
            | Self::Library { .. }
            | Self::Scratch { .. }
            | Self::Crypto { .. }
            | Self::Argument { .. } => LuksErrorKind::Failed,
        }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    pub(crate) fn refused(what: impl Into<String>) -> Self {
        Self::Refused { what: what.into() }
    }

    pub(crate) fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported { what: what.into() }
    }
}
