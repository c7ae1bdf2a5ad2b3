//! A read-only session has no lease: it checks that everything it read belongs to one state.

use sprat_store::{Access, LockError, LockInfo, Question, Store, StoreError, lock};

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

    /// At the end of a read-only session: whether everything it read belongs to one state. A
    /// connection that is lost just now says nothing, and the last check was a short while ago.
    pub(crate) fn was_undisturbed(&self) -> Result<(), LockError> {
        match self.verify() {
            Err(LockError::Store { .. }) => Ok(()),
            other => other,
        }
    }

    /// A read-only session has no lease. So it must check by itself that nobody writes, or wrote.
    pub(super) fn still_alone(&self, store: &dyn Store) -> Result<(), LockError> {
        let inspect = || lock::inspect_near(store, &self.container, self.highest);
        let is_as_before = || {
            let began = self.initial_state.get();
            began.is_none_or(|began| self.is_as(began, store).unwrap_or(true))
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
        let now = now?;
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
