//! Finds, checks and judges the two copies of a LUKS2 binary header.
use std::fmt;

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
    /// Whole, but its metadata can't be read.
    Metadata(String),
}

impl fmt::Display for CopyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("no LUKS2 magic"),
            Self::Version(version) => write!(f, "version {version}"),
            Self::Size(bytes) => write!(f, "size of {bytes} bytes"),
            Self::Offset(offset) => write!(f, "belongs at offset {offset}"),
            Self::ChecksumKind(kind) => write!(f, "unknown checksum {kind}"),
            Self::Checksum => f.write_str("wrong checksum"),
            Self::Truncated => f.write_str("cut short"),
            Self::Metadata(what) => f.write_str(what),
        }
    }
}

/// The state of one header copy.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CopyState {
    /// Whole, and of the newest sequence.
    Good,
    /// Whole, but older than the other one: a change of keys was interrupted between the two.
    Stale {
        /// Its sequence.
        sequence_id: u64,
    },
    /// Not usable.
    Damaged(CopyFault),
}

/// Both header copies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copies {
    /// The one at the file's beginning.
    pub primary: CopyState,
    /// The one behind it.
    pub secondary: CopyState,
}

impl Copies {
    /// Nothing to repair.
    #[must_use]
    pub fn both_good(&self) -> bool {
        self.primary == CopyState::Good && self.secondary == CopyState::Good
    }
}
