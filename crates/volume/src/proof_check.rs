//! Reads back a sample of what the server reported as durable.

use std::sync::Arc;

use sprat_store::{ReadClass, StoreError, StoreErrorKind, StoreFile};

use crate::engine::{Engine, FAILURES_MAX, Meaning, VolumeState, meaning};
use crate::proof::Sample;
use crate::session_hooks::ReconnectError;
use crate::{BLOCK_BYTES, VolumeError};

impl Engine {
    /// What the server must prove on a new connection.
    pub(crate) fn samples(&self) -> Vec<Sample> {
        let state = self.state();
        let mut samples = self.samples_of(&state);
        if !self.read_only {
            samples.extend(state.proof.opened_sample(&state.plan));
        }
        samples
    }

    /// Empty for a read-only volume: other checks cover a container that another session may write.
    pub(crate) fn samples_of(&self, state: &VolumeState) -> Vec<Sample> {
        match self.read_only {
            true => Vec::new(),
            false => state.proof.samples(&state.plan),
        }
    }

    /// Checks that the store still holds what it reported as durable, before anything is sent to
    /// it.
    pub(crate) fn still_has(
        &self,
        file: Arc<dyn StoreFile>,
        samples: &[Sample],
    ) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        match self.prove(&*file, samples) {
            Ok(()) => Ok(file),
            Err(VolumeError::Store { op, source }) => Err(match meaning(op, source) {
                Meaning::ConnectionLost(cause) => ReconnectError::Retry(cause),
                // A server that has just come back may not have its disk yet.
                Meaning::Fatal(VolumeError::Store { source, .. })
                    if source.kind() == StoreErrorKind::Failed =>
                {
                    ReconnectError::Retry(source)
                }
                Meaning::Fatal(cause) => ReconnectError::GiveUp(Box::new(cause)),
            }),
            Err(cause) => Err(ReconnectError::GiveUp(Box::new(cause))),
        }
    }

    /// As [`prove`](Self::prove), but retries a failure of the server.
    pub(crate) fn prove_patiently(
        &self,
        file: &dyn StoreFile,
        samples: &[Sample],
    ) -> Result<(), VolumeError> {
        let mut failures = 0;
        loop {
            match self.prove(file, samples) {
                Err(VolumeError::Store { source, .. })
                    if source.kind() == StoreErrorKind::Failed && failures < FAILURES_MAX =>
                {
                    failures += 1;
                }
                proved => return proved,
            }
        }
    }

    /// Reads the samples in one round trip and compares them.
    fn prove(&self, file: &dyn StoreFile, samples: &[Sample]) -> Result<(), VolumeError> {
        if samples.is_empty() {
            return Ok(());
        }
        let mut bytes = vec![0; samples.len() * BLOCK_BYTES];
        let mut parts: Vec<(u64, &mut [u8])> = samples
            .iter()
            .map(|sample| self.offset_of(sample.index))
            .zip(bytes.chunks_exact_mut(BLOCK_BYTES))
            .collect();
        match file.read_parts_at(&mut parts, ReadClass::Demand) {
            Ok(()) => {}
            Err(StoreError::Truncated { offset, .. }) => {
                return Err(VolumeError::LostDurable { offset });
            }
            Err(source) => return Err(VolumeError::Store { op: "read", source }),
        }
        let state = self.state();
        let found = samples.iter().zip(bytes.chunks_exact(BLOCK_BYTES));
        for (sample, found) in found {
            if !state.proof.matches(sample, found) {
                let offset = self.offset_of(sample.index);
                return Err(VolumeError::LostDurable { offset });
            }
        }
        Ok(())
    }
}
