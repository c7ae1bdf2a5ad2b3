//! What to send, in which order, and when it is durable: the state machine, without I/O or clock.
//!
//! One epoch is under way at a time: the oldest sealed epoch or, if none is sealed, the open one
//! (sent early). First the lock is checked for it, then its blocks are sent as runs, then a flush
//! retires it. Long epochs are retired in parts: a flush behind covers what was answered when it
//! started, while more is sent. So an epoch may be larger than the buffer, and the connection idles
//! only if a flush from above asks for order. After a loss, everything that is not retired counts
//! as unsent again.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use crate::epoch::Epoch;
pub(crate) use crate::epoch::{Behind, Block, EpochNumber, Generation, Retired, Run};
use crate::flush_window::FlushWindow;

/// Limits of a plan, in blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most blocks that are kept until they are durable.
    pub(crate) buffer_blocks: usize,
    /// Runs are handed out while fewer blocks than this are under way.
    pub(crate) in_flight_blocks: usize,
    /// Most blocks in a run.
    pub(crate) run_blocks: usize,
    /// The open epoch is sent early while it has at least this many unsent blocks.
    pub(crate) early_blocks: usize,
    /// A flush behind is due at the latest when this many answered blocks wait for it. On a slow or
    /// unreliable connection it is due earlier.
    pub(crate) behind_blocks: usize,
    /// A sealed epoch of at most this many blocks is sent in one batch with its fsync.
    pub(crate) batched_flush_blocks: usize,
}

/// What the coordinator does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Check the lock, then call [`Plan::lock_checked`].
    CheckLock(EpochNumber),
    /// Take the whole epoch with [`Plan::begin_batched_flush`], write and flush it in one call of
    /// the store, then report each run, and call [`Plan::flushed`] or [`Plan::lost`].
    BatchedFlush(EpochNumber),
    /// Flush the store, then call [`Plan::flushed`] or [`Plan::lost`].
    Flush(EpochNumber),
    /// Call [`Plan::begin_behind`], flush the store while more is sent, then call
    /// [`Plan::flushed_behind`] or [`Plan::lost`].
    FlushBehind,
    /// No call is under way on the lost connection any more: make a new connection.
    Reconnect,
    /// Read back what [`Plan::next_read_backs`] returns.
    ReadBack,
    /// Wait until something happens.
    Wait,
}

/// The result of reading an in-doubt block back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadBackResult {
    /// It has the expected bytes, or it is about to be written anyway.
    Good,
    /// It had other bytes; the expected bytes are in the open epoch again.
    Rewritten,
    /// It has other bytes, and writing it again did not help or is not possible.
    Foreign,
}

#[derive(Debug)]
enum Expected {
    Bytes(Block),
    Digest(u64),
}

impl Expected {
    fn matches(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Bytes(block) => block[..] == *bytes,
            Self::Digest(digest) => *digest == digest_of(bytes),
        }
    }
}

/// An in-doubt block: a server's old process may still overwrite it with what was under way at a
/// loss.
#[derive(Debug)]
struct InDoubt {
    expected: Expected,
    /// Newer bytes wait until the quiet time of this loss is over.
    waits_for_loss: Option<u64>,
    rewrites: u32,
}

/// How often an in-doubt block is written again. After that something else must be writing to the
/// file.
const REWRITES_MAX: u32 = 4;

#[derive(Debug, PartialEq, Eq)]
enum Link {
    Up,
    Lost,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Plan {
    limits: Limits,
    open: Epoch,
    sealed: VecDeque<Epoch>,
    durable: EpochNumber,
    /// The newest version of every block that is kept, and the epoch it belongs to.
    newest: HashMap<u64, (EpochNumber, Block)>,
    kept_blocks: usize,
    kept_blocks_peak: usize,
    in_flight: HashSet<u64>,
    runs_in_flight: usize,
    answered: Vec<(u64, Block)>, // of the epoch under way, for the next flush behind
    /// Retired, and the session does not yet know them as resolved: newer bytes for them wait.
    unresolved: HashSet<u64>,
    flush_window: FlushWindow,
    pressed: bool, // a writer waits for free space
    lock_checked: Option<EpochNumber>,
    link: Link,
    generation: Generation,
    losses: u64,
    in_doubt: BTreeMap<u64, InDoubt>,
    /// Where the last run ended. Runs go upwards through the epoch and start again at its
    /// beginning.
    cursor: u64,
}

impl Plan {
    pub(crate) fn new(limits: Limits) -> Self {
        let limits = Limits {
            buffer_blocks: limits.buffer_blocks.max(8),
            in_flight_blocks: limits.in_flight_blocks.max(1),
            run_blocks: limits.run_blocks.max(1),
            early_blocks: limits.early_blocks.max(1),
            behind_blocks: limits.behind_blocks.max(1),
            batched_flush_blocks: limits.batched_flush_blocks,
        };
        Self {
            limits,
            open: Epoch::new(EpochNumber(1)),
            sealed: VecDeque::new(),
            durable: EpochNumber(0),
            newest: HashMap::new(),
            kept_blocks: 0,
            kept_blocks_peak: 0,
            in_flight: HashSet::new(),
            runs_in_flight: 0,
            answered: Vec::new(),
            unresolved: HashSet::new(),
            flush_window: FlushWindow::new(limits.behind_blocks),
            pressed: false,
            lock_checked: None,
            link: Link::Up,
            generation: Generation(1),
            losses: 0,
            in_doubt: BTreeMap::new(),
            cursor: 0,
        }
    }

    // Calls from above.

    /// Most blocks for one call of [`write`](Self::write): there will always be free space for so
    /// many.
    pub(crate) fn write_blocks_max(&self) -> usize {
        (self.limits.buffer_blocks / 4).max(1)
    }

    /// Whether `blocks` more fit. If not, the caller waits until some blocks are durable. Meanwhile
    /// all written blocks are sent and flushed, however few they are.
    pub(crate) fn room_for(&mut self, blocks: usize) -> bool {
        assert!(
            blocks <= self.write_blocks_max(),
            "a write of {blocks} blocks must be split"
        );
        let fits = self.kept_blocks + self.in_doubt_copies() + blocks <= self.limits.buffer_blocks;
        self.pressed |= !fits;
        fits
    }

    /// Adds blocks from `first` on to the open epoch.
    pub(crate) fn write(&mut self, first: u64, blocks: Vec<Block>) {
        for (index, block) in (first..).zip(blocks) {
            if self.open.blocks.insert(index, block.clone()).is_none() {
                self.kept_blocks += 1;
            }
            self.open.unsent.insert(index);
            self.newest.insert(index, (self.open.number, block));
        }
        self.kept_blocks_peak = self.kept_blocks_peak.max(self.kept_blocks);
    }

    /// Ends the open epoch (an empty one stays open). Returns the newest sealed epoch: when it is
    /// durable, everything written so far is durable.
    pub(crate) fn seal(&mut self) -> EpochNumber {
        if !self.open.blocks.is_empty() {
            self.drop_overtaken();
            let next = EpochNumber(self.open.number.0 + 1);
            self.sealed
                .push_back(std::mem::replace(&mut self.open, Epoch::new(next)));
        } else if self.lock_checked == Some(self.open.number) {
            // All of it was retired by flushes behind. The lock check for those blocks does not
            // cover later ones.
            self.lock_checked = None;
        }
        EpochNumber(self.open.number.0 - 1)
    }

    /// The newest bytes of a block, if they are kept here. For an in-doubt block they count until
    /// it was read back: the store may hold what the old process wrote late.
    pub(crate) fn newest(&self, index: u64) -> Option<&Block> {
        if let Some((_, block)) = self.newest.get(&index) {
            return Some(block);
        }
        match &self.in_doubt.get(&index)?.expected {
            Expected::Bytes(block) => Some(block),
            Expected::Digest(_) => None,
        }
    }

    // Questions of the threads.

    pub(crate) fn step(&self) -> Step {
        if self.link == Link::Lost {
            return if self.runs_in_flight == 0 {
                Step::Reconnect
            } else {
                Step::Wait
            };
        }
        if let Some(epoch) = self.under_way() {
            if !epoch.unsent.is_empty() && self.lock_checked != Some(epoch.number) {
                return Step::CheckLock(epoch.number);
            }
            if self.is_batched(epoch) {
                return Step::BatchedFlush(epoch.number);
            }
            let sealed = epoch.number < self.open.number;
            if sealed && epoch.unsent.is_empty() && self.in_flight.is_empty() {
                return Step::Flush(epoch.number);
            }
            if self.behind_is_due(epoch, sealed) {
                return Step::FlushBehind;
            }
        }
        if self.next_read_backs(1).is_empty() {
            Step::Wait
        } else {
            Step::ReadBack
        }
    }

    /// Takes the next run to send, if there is one.
    pub(crate) fn next_run(&mut self) -> Option<Run> {
        let (first, end) = self.next_run_range()?;
        Some(self.take_run(first, end))
    }

    fn take_run(&mut self, first: u64, end: u64) -> Run {
        let epoch = match self.sealed.front_mut() {
            Some(epoch) => epoch,
            None => &mut self.open,
        };
        let mut blocks = Vec::new();
        for index in first..end {
            assert!(epoch.unsent.remove(&index), "block {index} was not unsent");
            assert!(
                self.in_flight.insert(index),
                "block {index} was under way already"
            );
            blocks.push(epoch.blocks[&index].clone());
        }
        self.cursor = end;
        self.runs_in_flight += 1;
        Run { first, blocks }
    }

    /// The epochs behind the one under way, oldest first. Nothing of them was sent yet.
    pub(crate) fn behind_under_way(&self) -> impl Iterator<Item = EpochNumber> + '_ {
        let under_way = self.under_way().map(|epoch| epoch.number);
        let some_of_open = (!self.open.blocks.is_empty()).then_some(&self.open);
        let behind = self.sealed.iter().chain(some_of_open);
        behind
            .map(|epoch| epoch.number)
            .filter(move |number| Some(*number) != under_way && Some(*number) != self.lock_checked)
    }

    /// Whether the open epoch has no blocks.
    pub(crate) fn open_is_empty(&self) -> bool {
        self.open.blocks.is_empty()
    }

    /// Whether [`next_run`](Self::next_run) would return one.
    pub(crate) fn has_run(&self) -> bool {
        self.next_run_range().is_some()
    }

    // Answers of the store and the session.

    pub(crate) fn lock_checked(&mut self, epoch: EpochNumber) {
        if self.link == Link::Up {
            self.lock_checked = Some(epoch);
        }
    }

    /// The run was answered. Its connection may have been lost since.
    pub(crate) fn answered(&mut self, run: &Run) {
        self.returned(run);
        // After a loss it is sent again.
        if self.link == Link::Up {
            self.flush_window.moved(run.blocks.len());
            let answered = run.entries().map(|(index, block)| (index, block.clone()));
            self.answered.extend(answered);
        }
    }

    /// The run's connection was lost before the answer came: its blocks may be written late.
    pub(crate) fn lost_run(&mut self, run: &Run) {
        self.lost(self.generation);
        self.returned(run);
        for (index, block) in run.entries() {
            let entry = self.in_doubt.entry(index).or_insert(InDoubt {
                expected: Expected::Bytes(block.clone()),
                waits_for_loss: None,
                rewrites: 0,
            });
            let same_digest =
                matches!(entry.expected, Expected::Digest(digest) if digest == digest_of(block));
            if !same_digest {
                entry.expected = Expected::Bytes(block.clone());
            }
            entry.waits_for_loss = Some(self.losses);
        }
    }

    /// The connection was lost, or its flush failed: nothing more is sent on it.
    pub(crate) fn lost(&mut self, generation: Generation) {
        if generation == self.generation && self.link == Link::Up {
            self.link = Link::Lost;
            self.losses += 1;
            self.lock_checked = None;
            self.answered.clear();
            self.flush_window.lost();
        }
    }

    /// There is a new connection: the whole epoch under way is sent again.
    pub(crate) fn reconnected(&mut self) {
        assert_eq!(self.link, Link::Lost);
        assert_eq!(
            self.runs_in_flight, 0,
            "calls on the lost connection are still under way"
        );
        match self.sealed.front_mut() {
            Some(epoch) => epoch.void(),
            None => self.open.void(),
        }
        self.link = Link::Up;
        self.generation = Generation(self.generation.0 + 1);
        self.lock_checked = None;
    }

    /// The store's flush succeeded after all writes of `epoch` were answered: the epoch is durable.
    pub(crate) fn flushed(&mut self, number: EpochNumber) -> Retired {
        let epoch = self.sealed.pop_front().expect("a flushed epoch is sealed");
        assert_eq!(epoch.number, number);
        assert!(
            epoch.unsent.is_empty() && self.in_flight.is_empty(),
            "flushed too early"
        );
        self.durable = number;
        self.answered.clear();
        self.retire(number, epoch.blocks)
    }

    /// Takes what a flush of the store that starts now will make durable.
    pub(crate) fn begin_behind(&mut self) -> Behind {
        let epoch = self.sealed.front().unwrap_or(&self.open);
        Behind {
            epoch: epoch.number,
            blocks: std::mem::take(&mut self.answered),
        }
    }

    /// The store's flush succeeded: what it covered is durable, except blocks that were written
    /// again since. Newer bytes for the durable blocks wait until
    /// [`resolved_behind`](Self::resolved_behind).
    pub(crate) fn flushed_behind(&mut self, behind: Behind) -> Retired {
        let epoch = self.sealed.front_mut().unwrap_or(&mut self.open);
        assert_eq!(
            epoch.number, behind.epoch,
            "only its own flush ends an epoch"
        );
        let blocks = epoch.take(behind.blocks);
        self.unresolved.extend(blocks.keys());
        self.retire(behind.epoch, blocks)
    }

    /// The session has recorded as resolved what was retired by the flush behind.
    pub(crate) fn resolved_behind(&mut self) {
        self.unresolved = HashSet::new();
    }

    /// Sets the flush window: what is durable now took this long, counted from its first answer.
    pub(crate) fn took(&mut self, took: Duration) {
        self.flush_window.durable(took);
    }

    // In-doubt blocks.

    /// No process of the server from before this loss can write any more.
    pub(crate) fn quiet_over(&mut self, loss: u64) {
        for entry in self.in_doubt.values_mut() {
            if entry
                .waits_for_loss
                .is_some_and(|waited_for| waited_for <= loss)
            {
                entry.waits_for_loss = None;
            }
        }
    }

    /// Adds a block that was recovered for a session that died. It must be read back and match
    /// `digest`, see [`digest_of`].
    pub(crate) fn add_recovered(&mut self, index: u64, digest: u64) {
        // It may have been sent and lost already. That entry holds newer bytes back, and stays.
        self.in_doubt.entry(index).or_insert_with(|| InDoubt {
            expected: Expected::Digest(digest),
            waits_for_loss: None,
            rewrites: 0,
        });
    }

    /// Checks the bytes of an in-doubt block that were read back. Between the read and this call
    /// the caller must not have done anything that could make the block durable again.
    pub(crate) fn judge(&mut self, index: u64, found: &[u8]) -> ReadBackResult {
        if self.newest.contains_key(&index) {
            return ReadBackResult::Good;
        }
        let Some(entry) = self.in_doubt.get_mut(&index) else {
            return ReadBackResult::Good;
        };
        if entry.expected.matches(found) {
            self.in_doubt.remove(&index);
            return ReadBackResult::Good;
        }
        entry.rewrites += 1;
        match &entry.expected {
            Expected::Bytes(block) if entry.rewrites <= REWRITES_MAX => {
                let block = block.clone();
                self.write(index, vec![block]);
                ReadBackResult::Rewritten
            }
            Expected::Bytes(_) | Expected::Digest(_) => ReadBackResult::Foreign,
        }
    }

    // Counters.

    pub(crate) fn durable(&self) -> EpochNumber {
        self.durable
    }

    pub(crate) fn open_number(&self) -> EpochNumber {
        self.open.number
    }

    /// Everything written is durable and no block is in doubt.
    pub(crate) fn is_resolved(&self) -> bool {
        self.newest.is_empty() && self.in_doubt.is_empty()
    }

    /// Sealed epochs that are not durable yet.
    pub(crate) fn sealed_len(&self) -> usize {
        self.sealed.len()
    }

    /// A caller waits for blocks to become durable, or for the space that they use.
    pub(crate) fn owes(&self) -> bool {
        !self.sealed.is_empty() || self.pressed
    }

    /// Whether the store holds the bytes of this block that were last made durable, and none of a
    /// later or a lost write.
    pub(crate) fn rests(&self, index: u64) -> bool {
        !self.newest.contains_key(&index)
            && !self.in_doubt.contains_key(&index)
            && !self.in_flight.contains(&index)
    }

    pub(crate) fn in_doubt_len(&self) -> usize {
        self.in_doubt.len()
    }

    pub(crate) fn losses(&self) -> u64 {
        self.losses
    }

    /// The connection for a call that starts now; `None` while it is lost.
    pub(crate) fn connection(&self) -> Option<Generation> {
        (self.link == Link::Up).then_some(self.generation)
    }

    pub(crate) fn kept_blocks(&self) -> usize {
        self.kept_blocks
    }

    pub(crate) fn kept_blocks_peak(&self) -> usize {
        self.kept_blocks_peak
    }

    /// Blocks that the store has not answered yet.
    pub(crate) fn unanswered_blocks(&self) -> usize {
        let unsent: usize = self.sealed.iter().map(|epoch| epoch.unsent.len()).sum();
        unsent + self.open.unsent.len() + self.in_flight.len()
    }

    // The implementation.

    /// The only epoch of which anything may be sent, or flushed behind, now.
    fn under_way(&self) -> Option<&Epoch> {
        if let Some(epoch) = self.sealed.front() {
            return Some(epoch);
        }
        let enough = self.open.unsent.len() >= self.limits.early_blocks;
        (enough || self.pressed || self.answered.len() >= self.flush_window.blocks())
            .then_some(&self.open)
    }

    fn behind_is_due(&self, epoch: &Epoch, sealed: bool) -> bool {
        let enough = self.answered.len() >= self.flush_window.blocks();
        // The last part of a sealed epoch waits for the flush that ends it.
        let goes_on = !sealed || epoch.unsent.len() >= 2 * self.flush_window.blocks();
        let nothing_else_comes = self.pressed && self.in_flight.is_empty() && !self.has_run();
        !self.answered.is_empty() && ((enough && goes_on) || nothing_else_comes)
    }

    /// Drops what is durable now.
    fn retire(&mut self, number: EpochNumber, blocks: BTreeMap<u64, Block>) -> Retired {
        self.kept_blocks -= blocks.len();
        self.pressed = false; // writers check again now
        for index in blocks.keys() {
            let newest = self.newest.get(index);
            if newest.is_some_and(|(newest, _)| *newest == number) {
                self.newest.remove(index);
            }
        }
        for (index, entry) in &mut self.in_doubt {
            if let Some(block) = blocks.get(index) {
                entry.expected = match entry.expected {
                    Expected::Bytes(_) => Expected::Bytes(block.clone()),
                    Expected::Digest(_) => Expected::Digest(digest_of(block)),
                };
            }
        }
        Retired(blocks)
    }

    fn next_run_range(&self) -> Option<(u64, u64)> {
        let in_flight_max = self.limits.in_flight_blocks.min(self.flush_window.blocks());
        if self.link == Link::Lost || self.in_flight.len() >= in_flight_max {
            return None;
        }
        let epoch = self.under_way()?;
        if self.lock_checked != Some(epoch.number) || self.is_batched(epoch) {
            return None;
        }
        let above = epoch.unsent.range(self.cursor..);
        let below = epoch.unsent.range(..self.cursor);
        let first = *above
            .chain(below)
            .find(|index| self.sendable(epoch, **index))?;
        let mut end = first + 1;
        while end - first < self.limits.run_blocks as u64
            && epoch.unsent.contains(&end)
            && self.sendable(epoch, end)
        {
            end += 1;
        }
        Some((first, end))
    }

    fn sendable(&self, epoch: &Epoch, index: u64) -> bool {
        if self.in_flight.contains(&index) || self.unresolved.contains(&index) {
            return false;
        }
        match self.in_doubt.get(&index) {
            Some(InDoubt {
                expected,
                waits_for_loss: Some(_),
                ..
            }) => {
                let block = &epoch.blocks[&index];
                match expected {
                    Expected::Bytes(bytes) => Arc::ptr_eq(bytes, block) || bytes == block,
                    Expected::Digest(digest) => *digest == digest_of(block),
                }
            }
            Some(_) | None => true,
        }
    }

    fn returned(&mut self, run: &Run) {
        for (index, _) in run.entries() {
            assert!(
                self.in_flight.remove(&index),
                "block {index} was not under way"
            );
        }
        self.runs_in_flight -= 1;
    }

    /// Drops the newest sealed epoch if it and the open one consist of the same single block, and
    /// nothing of it is under way. The block then goes from its older value to the newest without
    /// the one between. It is still written after everything before it and before everything behind
    /// it; with a second block in either epoch that order would be lost. An unmount ends with
    /// several such epochs: jbd2 writes its super block once for each transaction that it
    /// checkpoints (fs/jbd2/checkpoint.c).
    fn drop_overtaken(&mut self) {
        // The oldest epoch may have been sent in part.
        if self.sealed.len() < 2 {
            return;
        }
        let single = |epoch: &Epoch| match epoch.blocks.len() {
            1 => epoch.blocks.keys().next().copied(),
            _ => None,
        };
        let open = single(&self.open);
        let newest = self.sealed.back().and_then(single);
        if open.is_some() && open == newest {
            self.kept_blocks -= 1;
            self.sealed.pop_back();
        }
    }

    /// In-doubt blocks whose bytes are kept; they count against the buffer.
    fn in_doubt_copies(&self) -> usize {
        self.in_doubt.len()
    }

    /// Runs of in-doubt blocks to be read back, of about `blocks_max` blocks in total.
    pub(crate) fn next_read_backs(&self, blocks_max: usize) -> Vec<(u64, usize)> {
        let ready = self.in_doubt.iter().filter(|(index, entry)| {
            entry.waits_for_loss.is_none() && !self.newest.contains_key(index)
        });
        let mut runs: Vec<(u64, usize)> = Vec::new();
        for (index, _) in ready.take(blocks_max) {
            match runs.last_mut() {
                Some((first, blocks))
                    if *first + *blocks as u64 == *index && *blocks < self.limits.run_blocks =>
                {
                    *blocks += 1;
                }
                _ => runs.push((*index, 1)),
            }
        }
        runs
    }
}

pub(crate) fn digest_of(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

// The path is given for the benches, which compile this file from elsewhere.
#[path = "plan/batched_flush.rs"]
mod batched_flush;

#[cfg(test)]
mod tests;
