//! The volume as its callers see it.

use std::sync::Arc;

use sprat_store::{ReadClass, StoreFile};

use crate::{Flush, Geometry, ReadOnlyOptions, Session, VolumeError, VolumeOptions, VolumeStats};

/// An ordered, write-back block device over one remote file. Any number of threads may call.
pub struct Volume {
    file: Arc<dyn StoreFile>,
    session: Arc<dyn Session>,
    geometry: Geometry,
}

fn store(op: &'static str) -> impl Fn(sprat_store::StoreError) -> VolumeError {
    move |source| VolumeError::Store { op, source }
}

impl Volume {
    /// Opens for reading and writing.
    pub fn open(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn Session>,
        options: VolumeOptions,
    ) -> Result<Self, VolumeError> {
        let _ = options;
        Ok(Self {
            file,
            session,
            geometry,
        })
    }

    /// Opens without ever writing to the store.
    pub fn open_read_only(
        file: Arc<dyn StoreFile>,
        geometry: Geometry,
        session: Arc<dyn Session>,
        options: ReadOnlyOptions,
    ) -> Result<Self, VolumeError> {
        let _ = options;
        Ok(Self {
            file,
            session,
            geometry,
        })
    }

    /// Length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.geometry.len_bytes
    }

    /// Fills `buf` with the newest bytes at `offset`.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), VolumeError> {
        self.file
            .read_at(self.geometry.offset_bytes + offset, buf, ReadClass::Demand)
            .map_err(store("read"))
    }

    /// Takes `data` for `offset`; returns before it is sent.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), VolumeError> {
        self.file
            .write_at(self.geometry.offset_bytes + offset, data)
            .map_err(store("write"))
    }

    /// Gives the space of a range back.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), VolumeError> {
        self.file
            .discard(self.geometry.offset_bytes + offset, len)
            .map_err(store("discard"))
    }

    /// Orders, or makes durable, everything written before.
    pub fn flush(&self, flush: Flush) -> Result<(), VolumeError> {
        let _ = flush;
        self.file.flush().map_err(store("flush"))
    }

    /// What was done and is held now.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        VolumeStats::default()
    }

    /// Durable flush, suspects read back; every later call fails.
    pub fn close(&self) -> Result<(), VolumeError> {
        self.flush(Flush::Durable)?;
        self.session.settled();
        Ok(())
    }

    /// Why the volume refuses everything.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<VolumeError>> {
        None
    }

    /// Stops sending at once and fails every call, waiting ones too.
    pub fn abort(&self) {}
}
