//! What can go wrong with a header or a key, and how a caller tells the cases apart.

use std::{fmt, io};

use openssl::error::ErrorStack;

/// Work on a LUKS2 header failed. No variant holds a secret; text that came from a header is
/// escaped and cut.
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
    /// Neither header copy begins as LUKS does.
    #[error("not a LUKS container: no LUKS header at its beginning")]
    NotLuks,
    /// A LUKS1 header; only the kernel's dm-crypt opens those.
    #[error("a LUKS1 container: opens in kernel mode only")]
    Luks1,
    /// Legal and sound, but only the kernel's dm-crypt has it.
    #[error("{what}: opens in kernel mode only")]
    KernelOnly { what: String },
    /// The file ends before its header, or holds no whole block after it.
    #[error("truncated container: {file_len} bytes long, at least {needed} needed")]
    Truncated { file_len: u64, needed: u64 },
    /// No header copy is usable.
    #[error("both LUKS2 header copies are damaged (primary: {primary}; secondary: {secondary})")]
    HeaderDamaged {
        primary: CopyFault,
        secondary: CopyFault,
    },
    /// The header is whole, but its metadata break LUKS2's own rules.
    #[error("invalid LUKS2 metadata: {what}")]
    Invalid { what: String },
    /// The header asks for something that is never done with a server's data.
    #[error("refused: the LUKS2 header asks for {what}")]
    Refused { what: String },
    /// Legal LUKS that sprat doesn't open in either mode.
    #[error("not supported: {what}")]
    Unsupported { what: String },
    /// The header differs from what this machine knows of the container.
    #[error("the LUKS2 header was changed: {field} is {found}, known is {pinned}")]
    Pin {
        field: &'static str,
        pinned: String,
        found: String,
    },
    /// The header is older than one seen before.
    #[error("the LUKS2 header is an old one: sequence {found}, known is {known}")]
    OlderHeader { known: u64, found: u64 },
    /// The header's sequence went up further than any number of key changes explains.
    #[error("the LUKS2 header has an implausible sequence, {found}; known is {known}")]
    Sequence { known: u64, found: u64 },
    /// The secret opens none of the key slots.
    #[error("the key or passphrase opens none of the {slots_tried} key slots")]
    WrongSecret { slots_tried: usize },
    /// The secret opens no slot, and some were left out because of what they would cost.
    #[error("key slot {slot} asks for too much: {asks}; the limit is {limit}")]
    KdfTooCostly {
        slot: u32,
        asks: String,
        limit: String,
    },
    /// The secret opens none of the slots that were tried, and deriving keys for the others would
    /// take more than one opening may.
    #[error(
        "the key or passphrase opens none of the {slots_tried} key slots that were tried; {} were \
         left out, as their key derivation takes too long",
        .left_out.len()
    )]
    KdfBudget {
        slots_tried: usize,
        left_out: Vec<u32>,
    },
    /// A key slot's derivation needs more memory than there is.
    #[error("key slot {slot} needs {memory_kib} KiB of memory, which this machine does not give")]
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
    /// An argument that the caller got from the user makes no sense.
    #[error("{what}")]
    Argument { what: String },
}

/// What is wrong with one header copy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyFault {
    /// Not where it should be, or the magic bytes are wrong.
    Magic,
    /// A version other than 2.
    Version(u16),
    /// A size that LUKS2 does not have.
    Size(u64),
    /// It names another place than the one it lies at.
    Offset(u64),
    /// A checksum algorithm that isn't known.
    ChecksumKind(String),
    /// The checksum doesn't fit.
    Checksum,
    /// The file ends within it.
    Truncated,
    /// A sequence that no count of key changes comes to: only somebody who wants the next change to
    /// wrap it to zero, so that removed keys count again, writes it.
    Sequence(u64),
    /// The checksum fits, but the metadata can't be read.
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

/// What a caller may choose by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LuksErrorKind {
    /// The bytes could not be fetched; the source tells why.
    Read,
    /// There is no LUKS2 container (not LUKS, or LUKS1).
    NoContainer,
    /// Damaged, truncated, changed, contradicting or older than known.
    Damaged,
    /// Legal, but not opened by sprat, or not in this mode.
    Unsupported,
    /// Wrong key or passphrase.
    WrongSecret,
    /// Any other failure.
    Failed,
}

impl LuksError {
    /// The case, for a caller that must choose.
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
