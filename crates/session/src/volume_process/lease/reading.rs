//! A read-only session has no lease: it checks that everything it read belongs to one state.

use sprat_store::{Access, LockError, LockInfo, Question, Store, StoreError, lock};

use crate::Failure;
use crate::volume_process::lease::{ContainerLease, InitialState};
use crate::volume_process::open::prefetch::joined;

impl ContainerLease {
    /// Records the state at the beginning of a read-only session. Another session may come and go
    /// between two checks of the leases; it leaves another stamp block. `stamp_at` is its offset in
    /// the file.
    pub(crate) fn begin_reading(&self, file_bytes: u64, stamp_at: u64, stamp_block: Vec<u8>) {
        let _ = self.initial_state.set(InitialState {
            file_bytes,
            stamp_at,
            stamp_block,
        });
    }

    /// At the end of a read-only session: whether everything it read belongs to one state. Another
    /// machine may have written since the check before, so this one must succeed: if the connection
    /// is lost just now, on a new one.
    pub(crate) fn was_undisturbed(&self) -> Result<(), Failure> {
        let last = |store: &dyn Store| self.is_undisturbed(store, LastCheck::Yes);
        let checked = match last(&*self.store()) {
            Err(LockError::Store { .. }) => match self.connection.connect() {
                Ok(store) => last(&*store),
                Err(source) => Err(self.unread(source)),
            },
            checked => checked,
        };
        checked.map_err(|error| match error {
            LockError::Store { .. } => not_known(
                &error,
                "what was read may be a mixture of two states. So may files that were already \
                 restored. This session changed nothing on the server. Run the same command again",
            ),
            error => Failure::from(&error),
        })
    }

    /// A read-only session has no lease. So it must check by itself that nobody writes, or wrote.
    pub(super) fn still_alone(&self, store: &dyn Store) -> Result<(), LockError> {
        self.is_undisturbed(store, LastCheck::No)
    }

    fn is_undisturbed(&self, store: &dyn Store, last: LastCheck) -> Result<(), LockError> {
        let inspect = || lock::inspect_near(store, &self.container, self.highest);
        let is_as_before = || {
            let Some(began) = self.initial_state.get() else {
                return Ok(true);
            };
            match (self.is_as(began, store), last) {
                // A later check finds it.
                (Err(_), LastCheck::No) => Ok(true),
                (found, _) => found.map_err(|source| self.unread(source)),
            }
        };
        let (now, is_as_before) = match self.highest {
            // Every session that writes leaves a higher lease. The stamp block shows what other
            // programs wrote, and so both are read at once.
            Some(_) => std::thread::scope(|scope| {
                let is_as_before = scope.spawn(is_as_before);
                let now = inspect();
                (now, joined(is_as_before))
            }),
            // A session of sprat 0.x that has removed its lock had written before that.
            None => (inspect(), is_as_before()),
        };
        store.forget_ahead();
        let (now, is_as_before) = (now?, is_as_before?);
        let came_and_went = now.highest != self.highest && !self.ignores_locks();
        match now.held {
            Some(info) if !self.is_stale(&info) => Err(LockError::TakenMeanwhile {
                container: self.container.clone(),
                info: Box::new(info),
            }),
            _ if came_and_went || !is_as_before => Err(LockError::Disturbed {
                container: self.container.clone(),
            }),
            _ => Ok(()),
        }
    }

    fn is_as(&self, began: &InitialState, store: &dyn Store) -> Result<bool, StoreError> {
        let access = Access::ReadOnly;
        store.ask_ahead(&[Question::Open(self.file_name.clone(), access)]);
        let stamp = (began.stamp_at, began.stamp_block.len());
        let read = store.open_and_read(&self.file_name, access, &[stamp])?;
        match read.ranges.into_iter().next() {
            Some(Ok(block)) => Ok(block == began.stamp_block && read.stat.len >= began.file_bytes),
            Some(Err(StoreError::Truncated { .. })) | None => Ok(false),
            Some(Err(error)) => Err(error),
        }
    }

    fn unread(&self, source: StoreError) -> LockError {
        LockError::Store {
            op: "check",
            container: self.container.clone(),
            source,
        }
    }

    /// Whether this session reads although another one has the lease (`--ignore-lock`).
    fn ignores_locks(&self) -> bool {
        self.initial_state.get().is_none() && self.known.get().is_some()
    }

    fn is_stale(&self, info: &LockInfo) -> bool {
        self.stale_lock
            .as_ref()
            .is_some_and(|stale| stale.number == info.number && stale.token == info.token)
    }
}

/// Whether a check is the one at the end of a session. No later one makes up for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LastCheck {
    Yes,
    No,
}

/// The last check of a session failed.
pub(crate) fn not_known(error: &LockError, hint: &str) -> Failure {
    let cause = Failure::from(error);
    let what = "the last check whether another session wrote to the container meanwhile failed";
    Failure::new(cause.exit, what)
        .because(cause.in_one_line())
        .with_hint(hint)
}
