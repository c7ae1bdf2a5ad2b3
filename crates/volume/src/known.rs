//! Reads at once what a session that compares everything will need first.
//!
//! Such a session uses nothing of the persistent cache. But the cache knows which blocks the last
//! sessions needed: mostly those that a check of the file system reads one after another.

use std::collections::BTreeSet;
use std::ops::Range;

use sprat_store::ReadClass;

use crate::BLOCK_BYTES;
use crate::cache::Cache;
use crate::engine::Engine;
use crate::fetch::CLUSTER_BLOCKS;
use crate::plan::Block;

/// Most clusters that are read: 16 MiB, a quarter of the usual read cache.
const CLUSTERS_MAX: usize = 256;

impl Engine {
    /// Reads the clusters of the cached blocks from the store, the last used ones first if they are
    /// too many. If that fails, they are read when they are needed, and that reports the failure.
    pub(crate) fn read_known(&self) {
        let state = self.state();
        let (Some(cache), Some(connection)) = (&state.cache, state.connection()) else {
            return;
        };
        if !cache.only_compare {
            return;
        }
        let runs = runs_of(cache, self.geometry.len_bytes / BLOCK_BYTES as u64);
        drop(state);
        let blocks = |run: &Range<u64>| usize::try_from(run.end - run.start).unwrap_or(0);
        let mut read: Vec<Vec<u8>> = runs
            .iter()
            .map(|run| vec![0; blocks(run) * BLOCK_BYTES])
            .collect();
        let mut parts: Vec<(u64, &mut [u8])> = runs
            .iter()
            .map(|run| self.offset_of(run.start))
            .zip(read.iter_mut().map(|bytes| &mut bytes[..]))
            .collect();
        let file = &connection.file;
        if parts.is_empty() || file.read_parts_at(&mut parts, ReadClass::Demand).is_err() {
            return;
        }
        let mut state = self.state();
        for (run, bytes) in runs.into_iter().zip(read) {
            state.wire.read_requests += 1;
            state.wire.read_bytes += bytes.len() as u64;
            for (index, block) in run.zip(bytes.chunks_exact(BLOCK_BYTES)) {
                if let Some(cache) = &mut state.cache {
                    cache.compare(index, block);
                }
                state.read_cache.insert(index, Block::from(block));
            }
        }
    }
}

/// The clusters of the cached blocks as runs of blocks.
fn runs_of(cache: &Cache, len_blocks: u64) -> Vec<Range<u64>> {
    let mut clusters = BTreeSet::new();
    for held in cache.slots.held().iter().rev() {
        if clusters.len() == CLUSTERS_MAX {
            break;
        }
        clusters.insert(held.index / CLUSTER_BLOCKS);
    }
    let mut runs: Vec<Range<u64>> = Vec::new();
    for cluster in clusters {
        let start = cluster * CLUSTER_BLOCKS;
        let end = (start + CLUSTER_BLOCKS).min(len_blocks);
        match runs.last_mut() {
            Some(run) if run.end == start => run.end = end,
            _ if start < end => runs.push(start..end),
            _ => {}
        }
    }
    runs
}
