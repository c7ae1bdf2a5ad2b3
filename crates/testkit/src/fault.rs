//! Wraps a file so that its nth operation fails, once or for ever after.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sprat_store::{FileStat, IgnorePoison, ReadClass, StoreError, StoreFile};

/// How an operation fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The disk is full.
    NoSpace,
    /// The server answers "failure".
    Refused,
    /// The server breaks the protocol.
    Protocol,
    /// The connection is lost before the operation arrives; the handle is dead from then on.
    LostBefore,
    /// The connection is lost after the operation was done; the handle is dead from then on.
    LostAfter,
}

impl Fault {
    /// Every fault, for loops over all of them.
    pub const ALL: [Self; 5] = [
        Self::NoSpace,
        Self::Refused,
        Self::Protocol,
        Self::LostBefore,
        Self::LostAfter,
    ];

    /// Whether the connection is lost by it.
    #[must_use]
    pub fn loses_line(self) -> bool {
        matches!(self, Self::LostBefore | Self::LostAfter)
    }

    fn error(self, op: &'static str) -> StoreError {
        let object = "container".to_owned();
        let reason = "injected".to_owned();
        match self {
            Self::NoSpace => StoreError::NoSpace {
                op,
                object,
                available_bytes: 0,
            },
            Self::Refused => StoreError::Refused { op, object, reason },
            Self::Protocol => StoreError::Protocol { op, object, reason },
            Self::LostBefore | Self::LostAfter => StoreError::Disconnected { op, object, reason },
        }
    }
}

/// Which operation fails, and how; shared by all handles of a test.
#[derive(Debug)]
pub struct FaultPlan {
    /// The operation that fails, counted from 1 over all handles.
    pub nth: u64,
    /// Every later one fails too.
    pub for_ever: bool,
    /// How.
    pub fault: Fault,
    done: AtomicU64,
}

impl FaultPlan {
    /// Makes a plan; `nth` counts from 1.
    #[must_use]
    pub fn new(nth: u64, for_ever: bool, fault: Fault) -> Arc<Self> {
        Arc::new(Self {
            nth,
            for_ever,
            fault,
            done: AtomicU64::new(0),
        })
    }

    /// Whether the fault has struck: if not, `nth` was beyond the last operation.
    #[must_use]
    pub fn struck(&self) -> bool {
        self.done.load(Ordering::SeqCst) >= self.nth
    }

    /// Whether operations fail (or would fail) now for ever.
    #[must_use]
    pub fn failing_for_ever(&self) -> bool {
        self.for_ever && self.struck()
    }

    fn strikes(&self) -> bool {
        let now = self.done.fetch_add(1, Ordering::SeqCst) + 1;
        now == self.nth || (self.for_ever && now > self.nth)
    }
}

/// See the module.
pub struct FaultFile {
    below: Arc<dyn StoreFile>,
    plan: Arc<FaultPlan>,
    dead: Mutex<bool>,
}

impl FaultFile {
    /// Puts `plan` in front of `below`.
    #[must_use]
    pub fn new(below: Arc<dyn StoreFile>, plan: Arc<FaultPlan>) -> Self {
        Self {
            below,
            plan,
            dead: Mutex::new(false),
        }
    }

    fn run<T>(
        &self,
        op: &'static str,
        call: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        if *self.dead.lock().ignore_poison() {
            return Err(Fault::LostBefore.error(op));
        }
        if !self.plan.strikes() {
            return call();
        }
        let fault = self.plan.fault;
        if fault.loses_line() {
            *self.dead.lock().ignore_poison() = true;
        }
        if fault == Fault::LostAfter {
            call()?;
        }
        Err(fault.error(op))
    }
}

impl StoreFile for FaultFile {
    fn len(&self) -> Result<u64, StoreError> {
        self.below.len()
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        self.below.stat()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.run("read", || self.below.read_at(offset, buf, class))
    }

    fn read_parts_at(
        &self,
        parts: &mut [(u64, &mut [u8])],
        class: ReadClass,
    ) -> Result<(), StoreError> {
        self.run("read", || self.below.read_parts_at(parts, class))
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        self.run("write", || self.below.write_at(offset, data))
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.run("flush", || self.below.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.run("discard", || self.below.discard(offset, len))
    }

    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.run("resize", || self.below.resize(len))
    }
}
