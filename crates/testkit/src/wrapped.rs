//! Wraps a file so that a test changes what its reads, writes or flushes do.

use std::sync::{Arc, OnceLock};

use sprat_store::{FileStat, ReadClass, StoreError, StoreFile, WriteGuard};

/// What a test does in place of a read; the file below comes first.
type OnRead =
    dyn Fn(&dyn StoreFile, u64, &mut [u8], ReadClass) -> Result<(), StoreError> + Send + Sync;
/// What a test does in place of a write.
type OnWrite = dyn Fn(&dyn StoreFile, u64, &[u8]) -> Result<(), StoreError> + Send + Sync;
/// What a test does in place of a flush.
type OnFlush = dyn Fn(&dyn StoreFile) -> Result<(), StoreError> + Send + Sync;

/// Passes every operation on, except those that a test replaces. Operations on several parts become
/// one for each part.
pub struct WrappedFile {
    below: Arc<dyn StoreFile>,
    on_read: Option<Box<OnRead>>,
    on_write: Option<Box<OnWrite>>,
    on_flush: Option<Box<OnFlush>>,
    guard: OnceLock<Arc<dyn WriteGuard>>,
}

impl WrappedFile {
    /// Wraps `below` and changes nothing yet.
    #[must_use]
    pub fn new(below: Arc<dyn StoreFile>) -> Self {
        Self {
            below,
            on_read: None,
            on_write: None,
            on_flush: None,
            guard: OnceLock::new(),
        }
    }

    /// Calls `on_read` in place of each read.
    #[must_use]
    pub fn on_read(
        mut self,
        on_read: impl Fn(&dyn StoreFile, u64, &mut [u8], ReadClass) -> Result<(), StoreError>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        self.on_read = Some(Box::new(on_read));
        self
    }

    /// Calls `on_write` in place of each write.
    #[must_use]
    pub fn on_write(
        mut self,
        on_write: impl Fn(&dyn StoreFile, u64, &[u8]) -> Result<(), StoreError> + Send + Sync + 'static,
    ) -> Self {
        self.on_write = Some(Box::new(on_write));
        self
    }

    /// Calls `on_flush` in place of each flush.
    #[must_use]
    pub fn on_flush(
        mut self,
        on_flush: impl Fn(&dyn StoreFile) -> Result<(), StoreError> + Send + Sync + 'static,
    ) -> Self {
        self.on_flush = Some(Box::new(on_flush));
        self
    }
}

impl StoreFile for WrappedFile {
    fn len(&self) -> Result<u64, StoreError> {
        self.below.len()
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        self.below.stat()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        match &self.on_read {
            Some(on_read) => on_read(&*self.below, offset, buf, class),
            None => self.below.read_at(offset, buf, class),
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        for checks in 0.. {
            match self.guard.get() {
                Some(guard) if !guard.may_send() => guard.check_again(checks)?,
                _ => break,
            }
        }
        match &self.on_write {
            Some(on_write) => on_write(&*self.below, offset, data),
            None => self.below.write_at(offset, data),
        }
    }

    fn flush(&self) -> Result<(), StoreError> {
        match &self.on_flush {
            Some(on_flush) => on_flush(&*self.below),
            None => self.below.flush(),
        }
    }

    fn guard_writes(&self, guard: Arc<dyn WriteGuard>) {
        let _ = self.guard.set(guard);
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        self.below.discard(offset, len)
    }

    fn resize(&self, len: u64) -> Result<(), StoreError> {
        self.below.resize(len)
    }
}
