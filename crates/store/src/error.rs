//! Errors below the block path, and how a caller tells the cases apart.

use std::io;

/// An operation on a store failed. Text from a server is escaped and cut to a length that suits a
/// terminal before it enters a variant.
#[derive(Debug, thiserror::Error)]
#[expect(
    missing_docs,
    reason = "each variant's message says what its fields are"
)]
#[non_exhaustive]
pub enum StoreError {
    /// The named object does not exist.
    #[error("{op} {object}: not found")]
    NotFound { op: &'static str, object: String },
    /// The named object exists already.
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
    /// The connection was lost (or the server stopped answering) during a session.
    #[error("{op} {object}: connection lost: {reason}")]
    Disconnected {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// This machine has no such program: ssh, or the one configured instead.
    #[error("the program {program} was not found on this machine")]
    ProgramMissing { program: String },
    /// No session could be started: unknown name, no route, closed port, no sftp subsystem.
    #[error("can't reach {host}: {reason}")]
    Unreachable { host: String, reason: String },
    /// The server refused this user's keys.
    #[error("{host} refused the login: {reason}")]
    LoginRefused { host: String, reason: String },
    /// The server's host key is unknown or has changed.
    #[error("host key of {host} not accepted: {reason}")]
    HostKey { host: String, reason: String },
    /// The server broke the protocol.
    #[error("{op} {object}: the server broke the protocol: {reason}")]
    Protocol {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// The connections of one session end at different machines, which don't show the same files.
    #[error("{object}: {reason}")]
    Elsewhere { object: String, reason: String },
    /// A [`WriteGuard`](crate::WriteGuard) refused it. What was sent of it was answered.
    #[error("{op} {object}: not sent: {reason}")]
    Withheld {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// This store does not support the operation.
    #[error("{op} {object}: not supported by this store: {reason}")]
    Unsupported {
        op: &'static str,
        object: String,
        reason: String,
    },
    /// The server failed without giving a cause.
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

/// The kinds of errors that a caller may distinguish.
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
    /// See [`StoreError::Withheld`].
    Withheld,
    /// See [`StoreError::Unsupported`].
    Unsupported,
    /// Any other failure.
    Failed,
}

impl StoreError {
    /// Whether the store reported that it did not do it. Then it will not do it late, either.
    /// Otherwise it may have done it, or may still do it.
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

    /// Returns the kind of this error.
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
            Self::Withheld { .. } => StoreErrorKind::Withheld,
            Self::Unsupported { .. } => StoreErrorKind::Unsupported,
            Self::Refused { .. } | Self::Io { .. } => StoreErrorKind::Failed,
        }
    }
}

impl StoreErrorKind {
    /// Whether the same request may succeed later, on a new connection: the connection was lost, a
    /// program is being replaced, or the server answers so until its disk is there. A root file
    /// system is read-only until it was checked at boot.
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
            // Only a person can change these, or a retry may do harm.
            Self::AlreadyExists
            | Self::NoSpace
            | Self::NotRegular
            | Self::Truncated
            | Self::LoginRefused
            | Self::HostKey
            | Self::Protocol
            | Self::Elsewhere
            | Self::Withheld
            | Self::Unsupported => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::StoreErrorKind::*;

    #[test]
    fn errors_of_a_starting_server_may_pass_and_others_do_not() {
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
            Withheld,
            Unsupported,
        ];
        assert!(passing.iter().all(|kind| kind.may_pass()));
        assert!(!lasting.iter().any(|kind| kind.may_pass()));
    }
}
