//! Turns the errors of the crates below into failures: which exit code, and which hint.

use sprat_store::{StoreError, StoreErrorKind};

use super::{Exit, Failure};

impl From<&StoreError> for Failure {
    fn from(error: &StoreError) -> Self {
        let exit = match error.kind() {
            StoreErrorKind::Disconnected
            | StoreErrorKind::Unreachable
            | StoreErrorKind::LoginRefused
            | StoreErrorKind::HostKey => Exit::Unreachable,
            StoreErrorKind::Truncated => Exit::Damaged,
            _ => Exit::Failed,
        };
        let mut failure = Self::new(exit, error.to_string());
        if let Some(source) = std::error::Error::source(error) {
            failure = failure.caused_by(source);
        }
        match store_hint(error.kind()) {
            Some(hint) => failure.with_hint(hint),
            None => failure,
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::from(&error)
    }
}

fn store_hint(kind: StoreErrorKind) -> Option<&'static str> {
    Some(match kind {
        StoreErrorKind::NoSpace => {
            "finished snapshots are unharmed. Make room on the server, then run the same command \
             again: it goes on where it stopped"
        }
        StoreErrorKind::ReadOnly | StoreErrorKind::PermissionDenied => {
            "nothing was changed. Check who owns the folder and whether the account may write; \
             `restore` and `mount` also work on a read-only account"
        }
        StoreErrorKind::NotRegular => {
            "sprat opens regular files only and never follows a link on the server"
        }
        StoreErrorKind::Truncated => {
            "the file on the server is shorter than it was; don't write to it. Look for a copy \
             on the server's side"
        }
        StoreErrorKind::Disconnected => {
            "finished snapshots are unharmed. Run the same command again: it goes on where it \
             stopped"
        }
        StoreErrorKind::Unreachable => {
            "check that `ssh HOST` works from this account without asking for anything"
        }
        StoreErrorKind::LoginRefused => {
            "sprat never asks for ssh passwords: add this account's public key to the server's \
             authorized_keys, or name a key with --ssh-command 'ssh -i FILE'"
        }
        StoreErrorKind::HostKey => {
            "log in once with `ssh HOST` and compare the fingerprint. If the server's key has \
             changed and nobody told you why, don't go on"
        }
        _ => return None,
    })
}
