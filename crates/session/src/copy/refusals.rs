//! Why a copy is refused or stopped: what happened, the state of both containers, what to do.

use sprat_store::copy::{CopyError, CopyLeft};
use sprat_store::{Store, StoreErrorKind};

use crate::copy::endpoint::{Endpoint, Present};
use crate::copy::{FAILURES_APART, FAILURES_MAX, Job};
use crate::state::{missing, reserved_names};
use crate::volume_process::open::read_only_account;
use crate::{Exit, Failure, text};

impl Job<'_> {
    /// If the destination is there, it may be all that is left of a completed move. No hint may
    /// suggest to remove it.
    pub(super) fn no_source(&self, there: &Present) -> Failure {
        let (from, to) = (
            &self.options.source.target,
            &self.options.destination.target,
        );
        let hint = match there.destination {
            None => {
                let hint = missing::hint(&self.options.source.state_dir, from);
                format!("nothing was changed: {hint}")
            }
            Some(_) => format!(
                "nothing was changed. {to} is there. Either the move is complete, or the source's disk \
                 is not mounted. Check the copy with `sprat snapshots`"
            ),
        };
        Failure::new(Exit::NoContainer, format!("there is no container {from}")).with_hint(hint)
    }

    pub(super) fn exists_already(&self) -> Failure {
        Failure::failed(format!(
            "{} exists already",
            self.options.destination.target
        ))
        .with_hint(
            "nothing was changed: `sprat copy` never overwrites a file. Choose another name, or delete \
             that file yourself if you are sure",
        )
    }

    pub(super) fn begun_with_other_key(&self) -> Failure {
        let with = match self.options.new_key {
            Some(_) => "without",
            None => "with",
        };
        Failure::usage(format!(
            "{} was copied by a run {with} --new-key that did not finish",
            self.options.destination.target
        ))
        .with_hint(format!(
            "nothing was changed. Run the same command {with} --new-key: it finishes that copy"
        ))
    }

    pub(super) fn older_than_source(&self) -> Failure {
        let (from, to) = (
            &self.options.source.target,
            &self.options.destination.target,
        );
        Failure::failed(format!(
            "{from} was changed after it had been copied to {to}"
        ))
        .with_hint(
            "nothing was removed. The copy was read back, but is older than the source. Check both with \
             `sprat snapshots`. To copy the newer state, delete the older copy yourself and run the \
             same command again",
        )
    }

    pub(super) fn not_what_was_copied(&self) -> Failure {
        let to = &self.options.destination.target;
        Failure::failed(format!(
            "{to} is not the copy that was made: it was changed later, is damaged, or is another file"
        ))
        .with_hint(
            "nothing was removed, and the source is unchanged since the copy. Check both with `sprat \
             snapshots`, and delete the one that you don't want",
        )
    }

    /// A failed copy. Its hint is complete if the same command would fail the same way.
    pub(super) fn failed_copy(&mut self, error: &CopyError) -> Failure {
        self.hint_is_final |= is_unreadable(error);
        self.unexplained |= is_unexplained(error);
        of_copy(error)
    }

    /// Whether another attempt on new connections is due, because the current attempt ended with a
    /// failure that the server did not explain. An attempt reaches a piece that always fails at
    /// once.
    pub(super) fn may_retry(&mut self) -> bool {
        let worked = self.working_since.take();
        if !std::mem::take(&mut self.unexplained) {
            return false;
        }
        if worked.is_some_and(|since| since.elapsed() >= FAILURES_APART) {
            self.failures = 0;
        }
        self.failures += 1;
        self.failures <= FAILURES_MAX
    }
}

/// Refuses a destination that can't make data durable.
pub(super) fn check_writable(endpoint: &Endpoint, store: &dyn Store) -> Result<(), Failure> {
    let durable = store.capabilities().durable_flush;
    if !durable && reserved_names::may_not_remove(store, endpoint.name()) {
        return Err(read_only_account(store));
    }
    if !durable && !endpoint.options.allow_no_fsync {
        return Err(Failure::failed(format!(
            "{} can't make data durable: it has no fsync@openssh.com",
            store.describe()
        ))
        .with_hint("nothing was changed. To copy anyway, add --allow-no-fsync"));
    }
    match store.free_space() {
        Ok(space) if space.read_only => Err(Failure::failed(format!(
            "{} is on a read-only file system",
            store.describe()
        ))
        .with_hint("nothing was changed")),
        _ => Ok(()),
    }
}

pub(super) fn too_little_space(left: CopyLeft, available: u64) -> Failure {
    let left = match left {
        CopyLeft::Bytes(bytes) => format!("{} are", text::bytes(bytes)),
        CopyLeft::AtMost(bytes) => format!("up to {} are", text::bytes(bytes)),
    };
    Failure::failed(format!(
        "the destination has {} free, and {left} still to be copied",
        text::bytes(available),
    ))
    .with_hint("free space there")
}

/// A read or a write that failed without a reason from its server or disk.
fn is_unexplained(error: &CopyError) -> bool {
    matches!(
        error,
        CopyError::Source(source) | CopyError::Destination(source)
            if source.kind() == StoreErrorKind::Failed
    )
}

/// A part of the source that its disk can't read. The connection is not the cause.
fn is_unreadable(error: &CopyError) -> bool {
    matches!(error, CopyError::Source(source) if source.kind() == StoreErrorKind::Failed)
}

/// The failure for an error of a copy.
pub(super) fn of_copy(error: &CopyError) -> Failure {
    match error {
        CopyError::Source(source) if is_unreadable(error) => Failure::from(source)
            .context("a part of the source can't be read")
            .with_hint(
                "the source is unchanged, and the copied part is kept. The source's disk may be \
                 failing: the same command would stop at the same place. First restore the files that \
                 can be read, with `sprat restore`. Then copy the container file to a good disk with \
                 `ddrescue`, which skips unreadable blocks, and run `sprat check --read-data` on the \
                 copy to see which files are damaged",
            ),
        CopyError::Source(source) | CopyError::Destination(source) => {
            Failure::from(source).context(error.to_string())
        }
        CopyError::Differs { .. } => Failure::new(Exit::Damaged, error.to_string()).with_hint(
            "the destination's disk, or the connection to it, is faulty: don't keep backups there",
        ),
        CopyError::Stopped => Failure::interrupted(),
        other => {
            let mut failure = Failure::failed(other.to_string());
            if let Some(source) = std::error::Error::source(other) {
                failure = failure.caused_by(source);
            }
            failure
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use sprat_store::StoreError;

    use super::*;

    #[test]
    fn unreadable_source_gets_a_hint_instead_of_a_retry() {
        let unreadable = [
            StoreError::Io {
                op: "read",
                object: "x.luks".to_owned(),
                source: io::Error::from_raw_os_error(5),
            },
            // What OpenSSH's sftp-server answers then.
            StoreError::Refused {
                op: "read",
                object: "x.luks".to_owned(),
                reason: "Failure".to_owned(),
            },
        ];
        for source in unreadable {
            let error = CopyError::Source(source);
            assert!(is_unreadable(&error));
            let hint = of_copy(&error).hint.unwrap();
            assert!(
                hint.contains("ddrescue") && hint.contains("sprat restore"),
                "{hint}"
            );
        }
        let lost = || StoreError::Disconnected {
            op: "read",
            object: "x.luks".to_owned(),
            reason: "gone".to_owned(),
        };
        assert!(!is_unreadable(&CopyError::Source(lost())));
        assert!(!is_unreadable(&CopyError::Destination(lost())));
        assert_eq!(of_copy(&CopyError::Source(lost())).exit, Exit::Unreachable);
    }
}
