//! What can go wrong below the block path, and how a caller tells the cases apart.

use std::io;

/// An operation on a store failed. Text that came from a server is escaped and cut to a length
/// that suits a terminal before it is put into a variant.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum StoreError {
    /// The named object is not there.
    #[error("{op} {object}: not found")]
    NotFound { op: &'static str, object: String },
    /// The named object is there already.
    #[error("{op} {object}: exists already")]
    AlreadyExists { op: &'static str, object: String },
    /// The account may not do this.
    #[error("{op} {object}: permission denied")]
    PermissionDenied { op: &'static str, object: String },
    /// The file system or the account is read-only.
    #[error("{op} {object}: read-only file system or account")]
    ReadOnly { op: &'static str, object: String },
    /// The disk or the quota is full.
    #[error("{op} {object}: no space left ({available_bytes} bytes available)")]
    NoSpace {
        op: &'static str,
        object: String,
        available_bytes: u64,
    },
    /// The object is a folder, symbolic link or device where a regular file was expected.
    #[error("{op} {object}: not a regular file")]
    NotRegular { op: &'static str, object: String },
    /// The file ends before the range that was asked for.
    #[error("{op} {object}: file ends after {got} of {asked} bytes at offset {offset}")]
    Truncated {
        op: &'static str,
        object: String,
        offset: u64,
        asked: u64,
        got: u64,
    },
    /// The line was lost (or the far end stopped answering) in the middle of a session.
    #[error("{op} {object}: connection lost: {reason}")]
    Disconnected {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// This machine has no such program: ssh, or what was named in its place.
    #[error("the program {program} was not found on this machine")]
    ProgramMissing { program: String },
    /// No session could be begun: name, route, port, sftp subsystem missing.
    #[error("can't reach {host}: {reason}")]
    Unreachable { host: String, reason: String },
    /// The server refused this user's keys.
    #[error("{host} refused the login: {reason}")]
    LoginRefused { host: String, reason: String },
    /// The server's host key is unknown or has changed.
    #[error("host key of {host} not accepted: {reason}")]
    HostKey { host: String, reason: String },
    /// The far end broke the protocol.
    #[error("{op} {object}: the server broke the protocol: {reason}")]
    Protocol {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// The connections of one session end at different machines, which don't show the same files.
    #[error("{object}: {reason}")]
    Elsewhere { object: String, reason: String },
    /// This store can't do that.
    #[error("{op} {object}: not supported by this store: {reason}")]
    Unsupported {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// The far end answered with a failure that says no more.
    #[error("{op} {object}: the server answered \"{reason}\"")]
    Refused {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// The local system failed.
    #[error("{op} {object}")]
    Io {
        op: &'static str,
        object: String,
        #[source]
        source: io::Error,
    },
}

/// What a caller may choose by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// See [`StoreError::NotFound`].
    NotFound,
    /// See [`StoreError::AlreadyExists`].
    AlreadyExists,
    /// See [`StoreError::PermissionDenied`].
    PermissionDenied,
    /// See [`StoreError::ReadOnly`].
    ReadOnly,
    /// See [`StoreError::NoSpace`].
    NoSpace,
    /// See [`StoreError::NotRegular`].
    NotRegular,
    /// See [`StoreError::Truncated`].
    Truncated,
    /// See [`StoreError::Disconnected`]: reconnecting may help.
    Disconnected,
    /// See [`StoreError::Unreachable`]: reconnecting may help.
    Unreachable,
    /// See [`StoreError::ProgramMissing`].
    ProgramMissing,
    /// See [`StoreError::LoginRefused`].
    LoginRefused,
    /// See [`StoreError::HostKey`].
    HostKey,
    /// See [`StoreError::Protocol`].
    Protocol,
    /// See [`StoreError::Elsewhere`].
    Elsewhere,
    /// See [`StoreError::Unsupported`].
    Unsupported,
    /// Any other failure.
    Failed,
}

impl StoreError {
    /// The store said that it did not do it, so it will not do it late. Otherwise it may have, or
    /// may still.
    #[must_use]
    pub fn was_answered(&self) -> bool {
        !matches!(
            self.kind(),
            StoreErrorKind::Disconnected
                | StoreErrorKind::Protocol
                | StoreErrorKind::Elsewhere
                | StoreErrorKind::Unreachable
        )
    }

    /// The case, for a caller that must choose.
    #[must_use]
    pub fn kind(&self) -> StoreErrorKind {
        match self {
            Self::NotFound { .. } => StoreErrorKind::NotFound,
            Self::AlreadyExists { .. } => StoreErrorKind::AlreadyExists,
            Self::PermissionDenied { .. } => StoreErrorKind::PermissionDenied,
            Self::ReadOnly { .. } => StoreErrorKind::ReadOnly,
            Self::NoSpace { .. } => StoreErrorKind::NoSpace,
            Self::NotRegular { .. } => StoreErrorKind::NotRegular,
            Self::Truncated { .. } => StoreErrorKind::Truncated,
            Self::Disconnected { .. } => StoreErrorKind::Disconnected,
            Self::Unreachable { .. } => StoreErrorKind::Unreachable,
            Self::ProgramMissing { .. } => StoreErrorKind::ProgramMissing,
            Self::LoginRefused { .. } => StoreErrorKind::LoginRefused,
            Self::HostKey { .. } => StoreErrorKind::HostKey,
            Self::Protocol { .. } => StoreErrorKind::Protocol,
            Self::Elsewhere { .. } => StoreErrorKind::Elsewhere,
            Self::Unsupported { .. } => StoreErrorKind::Unsupported,
            Self::Refused { .. } | Self::Io { .. } => StoreErrorKind::Failed,
        }
    }
}

impl StoreErrorKind {
    /// Whether the same request may succeed later, on a new connection: a connection that was lost, a
    /// program that is being replaced, or what a server answers until its disk is there. A root file
    /// system is read-only until a start has checked it.
    #[must_use]
    pub fn may_pass(self) -> bool {
        match self {
            Self::Disconnected
            | Self::Unreachable
            | Self::ProgramMissing
            | Self::NotFound
            | Self::PermissionDenied
            | Self::ReadOnly
            | Self::Failed => true,
            // Nothing but a person changes these, or asking again may do harm.
            Self::AlreadyExists
            | Self::NoSpace
            | Self::NotRegular
            | Self::Truncated
            | Self::LoginRefused
            | Self::HostKey
            | Self::Protocol
            | Self::Elsewhere
            | Self::Unsupported => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::StoreErrorKind::*;

    #[test]
    fn what_a_server_answers_while_it_starts_passes_and_the_rest_does_not() {
        // `ProgramMissing`: ssh while a package manager replaces it. `ReadOnly`: a root file system
        // that was not checked yet.
        let passing = [
            Disconnected,
            Unreachable,
            ProgramMissing,
            NotFound,
            PermissionDenied,
            ReadOnly,
            Failed,
        ];
        let lasting = [
            AlreadyExists,
            NoSpace,
            NotRegular,
            Truncated,
            LoginRefused,
            HostKey,
            Protocol,
            Elsewhere,
            Unsupported,
        ];
        assert!(passing.iter().all(|kind| kind.may_pass()));
        assert!(!lasting.iter().any(|kind| kind.may_pass()));
    }
}
