//! Which reads from the store are queued and under way, and which of their bytes may be kept.
//!
//! A fetch is a run of whole clusters. A cluster is in at most one fetch. If the plan kept a write
//! of a block when the fetch started, or the block was written during the fetch, the bytes that the
//! fetch returns for it may be old. Such a block is tainted: it is neither cached nor returned to a
//! reader.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use sprat_store::ReadClass;

use crate::plan::{Block, Plan};

/// Blocks in a cluster: 64 KiB. On a slow connection a smaller request takes about as long.
pub(crate) const CLUSTER_BLOCKS: u64 = 16;

/// How a fetch ended.
#[derive(Debug)]
pub(crate) enum FetchOutcome {
    /// One entry per block; `None` if it is tainted or unreadable.
    Blocks(Vec<Option<Block>>),
    /// Read-ahead that was dropped; ask again.
    Dropped,
}

/// One read from the store, shared by all readers that wait for it.
#[derive(Debug)]
pub(crate) struct Fetch {
    id: u64,
    pub(crate) blocks: Range<u64>,
    pub(crate) outcome: OnceLock<FetchOutcome>,
}

impl Fetch {
    fn len_blocks(&self) -> u64 {
        self.blocks.end - self.blocks.start
    }

    /// The block, if this fetch has returned it.
    pub(crate) fn block(&self, index: u64) -> Option<&Block> {
        if !self.blocks.contains(&index) {
            return None;
        }
        let Some(FetchOutcome::Blocks(blocks)) = self.outcome.get() else {
            return None;
        };
        blocks
            .get(usize::try_from(index - self.blocks.start).ok()?)?
            .as_ref()
    }
}

#[derive(Debug)]
struct Active {
    fetch: Arc<Fetch>,
    tainted: HashSet<u64>,
    class: ReadClass,
    running: bool,
    /// How often the store failed.
    failures: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Fetches {
    len_blocks: u64,
    next_id: u64,
    active: HashMap<u64, Active>,
    by_cluster: HashMap<u64, u64>,
    demand: VecDeque<u64>,
    ahead: VecDeque<u64>,
    ahead_running: usize,
    ahead_running_max: usize,
    /// Blocks of read-ahead that are under way. `ahead_blocks` also counts those that are queued.
    ahead_blocks_running: u64,
    ahead_blocks: u64,
}

impl Fetches {
    pub(crate) fn new(len_blocks: u64, ahead_running_max: usize) -> Self {
        Self {
            len_blocks,
            next_id: 0,
            active: HashMap::new(),
            by_cluster: HashMap::new(),
            demand: VecDeque::new(),
            ahead: VecDeque::new(),
            ahead_running: 0,
            ahead_running_max,
            ahead_blocks_running: 0,
            ahead_blocks: 0,
        }
    }

    /// Asks for all of `clusters`. Returns the fetches that read them, new or already queued ones.
    pub(crate) fn ask(
        &mut self,
        clusters: &[u64],
        class: ReadClass,
        run_blocks: u64,
    ) -> Vec<Arc<Fetch>> {
        let mut fetches: BTreeMap<u64, Arc<Fetch>> = BTreeMap::new();
        let mut rest = clusters;
        while let Some((&first, _)) = rest.split_first() {
            if let Some(&id) = self.by_cluster.get(&first) {
                self.join(id, class);
                fetches.insert(id, self.active[&id].fetch.clone());
                rest = &rest[1..];
                continue;
            }
            let most = usize::try_from((run_blocks / CLUSTER_BLOCKS).max(1)).unwrap_or(1);
            let count = (first..)
                .zip(rest)
                .take(most)
                .take_while(|(want, have)| want == *have && !self.by_cluster.contains_key(have))
                .count();
            let fetch = self.start(first, count as u64, class);
            fetches.insert(fetch.id, fetch);
            rest = &rest[count..];
        }
        fetches.into_values().collect()
    }

    /// The fetches that a reader waits for.
    pub(crate) fn demanded(&self) -> impl Iterator<Item = &Arc<Fetch>> {
        self.active
            .values()
            .filter(|active| active.class == ReadClass::Demand)
            .map(|active| &active.fetch)
    }

    /// Drops queued read-ahead after a loss: no reader waits for it, and by the time the connection
    /// is back it may not be needed.
    pub(crate) fn drop_ahead(&mut self) {
        while let Some(id) = self.ahead.pop_front() {
            let fetch = Arc::clone(&self.active[&id].fetch);
            self.finish(&fetch, None);
        }
    }

    pub(crate) fn is_asked(&self, cluster: u64) -> bool {
        self.by_cluster.contains_key(&cluster)
    }

    /// The blocks that are being fetched.
    pub(crate) fn under_way(&self) -> impl Iterator<Item = u64> {
        self.active
            .values()
            .flat_map(|active| active.fetch.blocks.clone())
    }

    /// Marks the bytes of a block that is being fetched as unusable: it was written meanwhile, or
    /// it can't be read.
    pub(crate) fn taint(&mut self, index: u64) {
        if let Some(id) = self.by_cluster.get(&(index / CLUSTER_BLOCKS))
            && let Some(active) = self.active.get_mut(id)
        {
            active.tainted.insert(index);
        }
    }

    /// Blocks of read-ahead that were asked for and have not arrived.
    pub(crate) fn ahead_blocks(&self) -> u64 {
        self.ahead_blocks
    }

    /// Takes the next fetch, demand first. At most `ahead_blocks_max` blocks of read-ahead are
    /// under way, except for a single fetch.
    pub(crate) fn take(
        &mut self,
        plan: &Plan,
        ahead_blocks_max: u64,
    ) -> Option<(Arc<Fetch>, ReadClass)> {
        let id = match self.demand.pop_front() {
            Some(id) => id,
            None if self.may_run_ahead(ahead_blocks_max) => self.ahead.pop_front()?,
            None => return None,
        };
        let active = self.active.get_mut(&id).expect("a queued fetch is active");
        active.running = true;
        active.tainted = active
            .fetch
            .blocks
            .clone()
            .filter(|index| plan.newest(*index).is_some())
            .collect();
        if active.class == ReadClass::Ahead {
            self.ahead_running += 1;
            self.ahead_blocks_running += active.fetch.len_blocks();
        }
        Some((active.fetch.clone(), active.class))
    }

    pub(crate) fn has_work(&self, ahead_blocks_max: u64) -> bool {
        !self.demand.is_empty() || self.may_run_ahead(ahead_blocks_max)
    }

    fn may_run_ahead(&self, ahead_blocks_max: u64) -> bool {
        let Some(next) = self.ahead.front().and_then(|id| self.active.get(id)) else {
            return false;
        };
        let with_it = self.ahead_blocks_running + next.fetch.len_blocks();
        self.ahead_running < self.ahead_running_max
            && (self.ahead_running == 0 || with_it <= ahead_blocks_max)
    }

    /// Queues a fetch again after its connection was lost; a reader waits for it.
    pub(crate) fn put_back(&mut self, fetch: &Fetch) {
        let active = self
            .active
            .get_mut(&fetch.id)
            .expect("a running fetch is active");
        assert_eq!(active.class, ReadClass::Demand, "read-ahead is dropped");
        active.running = false;
        self.demand.push_front(fetch.id);
    }

    /// Counts a failure of the store for this fetch; returns how many there were.
    pub(crate) fn failed(&mut self, fetch: &Fetch) -> u32 {
        self.active.get_mut(&fetch.id).map_or(u32::MAX, |active| {
            active.failures += 1;
            active.failures
        })
    }

    /// Ends a fetch, with its bytes or without; returns the blocks that may be cached.
    pub(crate) fn finish(&mut self, fetch: &Fetch, bytes: Option<&[u8]>) -> Vec<(u64, Block)> {
        let active = self
            .active
            .remove(&fetch.id)
            .expect("a running fetch is active");
        if active.class == ReadClass::Ahead {
            self.ahead_blocks -= fetch.len_blocks();
            if active.running {
                self.ahead_running -= 1;
                self.ahead_blocks_running -= fetch.len_blocks();
            }
        }
        for cluster in clusters_of(&fetch.blocks) {
            self.by_cluster.remove(&cluster);
        }
        let mut good = Vec::new();
        let outcome = match bytes {
            Some(bytes) => {
                let blocks = fetch
                    .blocks
                    .clone()
                    .zip(bytes.chunks_exact(crate::BLOCK_BYTES));
                let kept = blocks.map(|(index, bytes)| {
                    let block = (!active.tainted.contains(&index)).then(|| Block::from(bytes))?;
                    good.push((index, block.clone()));
                    Some(block)
                });
                FetchOutcome::Blocks(kept.collect())
            }
            None => FetchOutcome::Dropped,
        };
        fetch.outcome.set(outcome).expect("a fetch ends once");
        good
    }

    fn join(&mut self, id: u64, class: ReadClass) {
        let active = self
            .active
            .get_mut(&id)
            .expect("an indexed fetch is active");
        if class == ReadClass::Demand && active.class == ReadClass::Ahead && !active.running {
            active.class = ReadClass::Demand;
            self.ahead_blocks -= active.fetch.len_blocks();
            self.ahead.retain(|queued| *queued != id);
            self.demand.push_back(id);
        }
    }

    fn start(&mut self, first_cluster: u64, clusters: u64, class: ReadClass) -> Arc<Fetch> {
        let id = self.next_id;
        self.next_id += 1;
        let end = ((first_cluster + clusters) * CLUSTER_BLOCKS).min(self.len_blocks);
        let blocks = first_cluster * CLUSTER_BLOCKS..end;
        let fetch = Arc::new(Fetch {
            id,
            blocks,
            outcome: OnceLock::new(),
        });
        for cluster in clusters_of(&fetch.blocks) {
            self.by_cluster.insert(cluster, id);
        }
        let active = Active {
            fetch: fetch.clone(),
            tainted: HashSet::new(),
            class,
            running: false,
            failures: 0,
        };
        self.active.insert(id, active);
        match class {
            ReadClass::Demand => self.demand.push_back(id),
            ReadClass::Ahead => {
                self.ahead_blocks += fetch.len_blocks();
                self.ahead.push_back(id);
            }
        }
        fetch
    }
}

/// The clusters that a range of blocks touches.
pub(crate) fn clusters_of(blocks: &Range<u64>) -> Range<u64> {
    blocks.start / CLUSTER_BLOCKS..blocks.end.div_ceil(CLUSTER_BLOCKS)
}
