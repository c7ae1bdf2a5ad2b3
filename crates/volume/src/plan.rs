//! What to send, in which order, and when it is durable: the state machine, without I/O or clock.
//!
//! One epoch is under way at a time: the oldest sealed one or, when there is none, the open one
//! (sent early). It needs a permit (the lock was checked), then its blocks go out as runs, then
//! its flush, which retires it. Long epochs are retired in part meanwhile: a flush behind covers
//! what was answered when it began, while more is sent. So an epoch may be larger than the
//! buffer, and the line idles only where a flush from above asks for order. A loss voids what is
//! not retired: it is unsent again.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;
use std::time::Duration;

use crate::epoch::Epoch;
pub(crate) use crate::epoch::{Behind, Block, EpochNumber, Generation, Retired, Run};
use crate::flush_window::Portion;

/// Limits of a plan, in blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Most blocks kept until durable.
    pub(crate) buffer_blocks: usize,
    /// Runs are given out while fewer blocks than this are under way.
    pub(crate) in_flight_blocks: usize,
    /// Most blocks in a run.
    pub(crate) run_blocks: usize,
    /// The open epoch is sent early while it has at least this many unsent blocks.
    pub(crate) early_blocks: usize,
    /// A flush behind is due once this many answered blocks wait for it, at most; less on a line that
    /// is slow or breaks.
    pub(crate) behind_blocks: usize,
    /// A sealed epoch of at most this many blocks goes out together with its fsync.
    pub(crate) together_blocks: usize,
}

/// What the conductor does next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Check the lock, then call [`Plan::permitted`].
    Permit(EpochNumber),
    /// Take all of it with [`Plan::begin_together`], write and flush it in one call of the store, then
    /// report each run, and call [`Plan::flushed`] or [`Plan::lost`].
    Together(EpochNumber),
    /// Flush the store, then call [`Plan::flushed`] or [`Plan::lost`].
    Flush(EpochNumber),
    /// Call [`Plan::begin_behind`], flush the store while more is sent, then call
    /// [`Plan::flushed_behind`] or [`Plan::lost`].
    FlushBehind,
    /// No call is under way on the lost connection any more: make a new one.
    Reconnect,
    /// Read back what [`Plan::next_read_backs`] says.
    ReadBack,
    /// Nothing until something happens.
    Wait,
}

/// What came of reading a suspect back.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It holds what it should, or it is about to be written anyway.
    Good,
    /// It held something else; the right bytes are in the open epoch again.
    Rewritten,
    /// It holds something else and nothing can be done about it.
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

/// A block that a server's old process may still overwrite with what was under way at a loss.
#[derive(Debug)]
struct Suspect {
    expected: Expected,
    /// Newer bytes are held until the quiet time of this loss is over.
    held: Option<u64>,
    rewrites: u32,
}

/// How often a suspect is written again before the file counts as written to from elsewhere.
const REWRITES_MAX: u32 = 4;

#[derive(Debug, PartialEq, Eq)]
enum Line {
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
    /// Retired and not yet settled: newer bytes for them wait.
    settling: HashSet<u64>,
    portion: Portion,
    pressed: bool, // a writer waits for room
    permitted: Option<EpochNumber>,
    line: Line,
    generation: Generation,
    losses: u64,
    suspects: BTreeMap<u64, Suspect>,
    /// Where the last run ended: runs go upwards through the epoch and round again.
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
            together_blocks: limits.together_blocks,
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
            settling: HashSet::new(),
            portion: Portion::new(limits.behind_blocks),
            pressed: false,
            permitted: None,
            line: Line::Up,
            generation: Generation(1),
            losses: 0,
            suspects: BTreeMap::new(),
            cursor: 0,
        }
    }

    // What comes from above.

    /// Most blocks that one call of [`write`](Self::write) may bring: room for them always comes.
    pub(crate) fn write_blocks_max(&self) -> usize {
        (self.limits.buffer_blocks / 4).max(1)
    }

    /// Whether `blocks` more fit. If not, the caller waits until some blocks are durable; what
    /// was written is sent and flushed though it is little.
    pub(crate) fn room_for(&mut self, blocks: usize) -> bool {
        assert!(
            blocks <= self.write_blocks_max(),
            "a write of {blocks} blocks must be split"
        );
        let fits = self.kept_blocks + self.suspect_copies() + blocks <= self.limits.buffer_blocks;
        self.pressed |= !fits;
        fits
    }

    /// Takes blocks from `first` on into the open epoch.
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

    /// Ends the open epoch (an empty one stays open) and returns the newest sealed epoch: all
    /// that was written so far is durable when that one is.
    pub(crate) fn seal(&mut self) -> EpochNumber {
        if !self.open.blocks.is_empty() {
            self.drop_overtaken();
            let next = EpochNumber(self.open.number.0 + 1);
            self.sealed
                .push_back(std::mem::replace(&mut self.open, Epoch::new(next)));
        } else if self.permitted == Some(self.open.number) {
            // All of it was retired behind. What comes later is not covered by the look at the
            // lock that was for these.
            self.permitted = None;
        }
        EpochNumber(self.open.number.0 - 1)
    }

    /// The newest bytes of a block, if they are kept here. Those of a suspect count until it was
    /// read back: the store may hold what the old process wrote late.
    pub(crate) fn newest(&self, index: u64) -> Option<&Block> {
        if let Some((_, block)) = self.newest.get(&index) {
            return Some(block);
        }
        match &self.suspects.get(&index)?.expected {
            Expected::Bytes(block) => Some(block),
            Expected::Digest(_) => None,
        }
    }

    // What the threads ask.

    pub(crate) fn step(&self) -> Step {
        if self.line == Line::Lost {
            return if self.runs_in_flight == 0 {
                Step::Reconnect
            } else {
                Step::Wait
            };
        }
        if let Some(epoch) = self.under_way() {
            if !epoch.unsent.is_empty() && self.permitted != Some(epoch.number) {
                return Step::Permit(epoch.number);
            }
            if self.goes_together(epoch) {
                return Step::Together(epoch.number);
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

    /// Takes the next run to send, if there is one now.
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

    /// The epochs behind the one under way, of which nothing was sent yet, oldest first.
    pub(crate) fn behind_under_way(&self) -> impl Iterator<Item = EpochNumber> + '_ {
        let under_way = self.under_way().map(|epoch| epoch.number);
        let some_of_open = (!self.open.blocks.is_empty()).then_some(&self.open);
        let behind = self.sealed.iter().chain(some_of_open);
        behind
            .map(|epoch| epoch.number)
            .filter(move |number| Some(*number) != under_way && Some(*number) != self.permitted)
    }

    /// Whether the open epoch has nothing that is to become durable.
    pub(crate) fn open_is_empty(&self) -> bool {
        self.open.blocks.is_empty()
    }

    /// Whether [`next_run`](Self::next_run) would give one.
    pub(crate) fn has_run(&self) -> bool {
        self.next_run_range().is_some()
    }

    // What the store and the session answer.

    pub(crate) fn permitted(&mut self, epoch: EpochNumber) {
        if self.line == Line::Up {
            self.permitted = Some(epoch);
        }
    }

    /// The run was answered, on a connection that may have been lost since.
    pub(crate) fn answered(&mut self, run: &Run) {
        self.returned(run);
        // On a lost line it will be sent again.
        if self.line == Line::Up {
            self.portion.moved(run.blocks.len());
            let answered = run.entries().map(|(index, block)| (index, block.clone()));
            self.answered.extend(answered);
        }
    }

    /// The run's connection was lost before its answer came: its blocks may be written late.
    pub(crate) fn lost_run(&mut self, run: &Run) {
        self.lost(self.generation);
        self.returned(run);
        for (index, block) in run.entries() {
            let suspect = self.suspects.entry(index).or_insert(Suspect {
                expected: Expected::Bytes(block.clone()),
                held: None,
                rewrites: 0,
            });
            let same_digest =
                matches!(suspect.expected, Expected::Digest(digest) if digest == digest_of(block));
            if !same_digest {
                suspect.expected = Expected::Bytes(block.clone());
            }
            suspect.held = Some(self.losses);
        }
    }

    /// The connection was lost, or its flush failed: nothing more is sent on it.
    pub(crate) fn lost(&mut self, generation: Generation) {
        if generation == self.generation && self.line == Line::Up {
            self.line = Line::Lost;
            self.losses += 1;
            self.permitted = None;
            self.answered.clear();
            self.portion.lost();
        }
    }

    /// There is a new connection: the epoch under way is sent again, all of it.
    pub(crate) fn reconnected(&mut self) {
        assert_eq!(self.line, Line::Lost);
        assert_eq!(
            self.runs_in_flight, 0,
            "calls on the lost connection are still under way"
        );
        match self.sealed.front_mut() {
            Some(epoch) => epoch.void(),
            None => self.open.void(),
        }
        self.line = Line::Up;
        self.generation = Generation(self.generation.0 + 1);
        self.permitted = None;
    }

    /// The store's flush returned after all writes of `epoch` were answered: it is durable.
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

    /// Takes what a flush of the store that begins now is going to make durable.
    pub(crate) fn begin_behind(&mut self) -> Behind {
        let epoch = self.sealed.front().unwrap_or(&self.open);
        Behind {
            epoch: epoch.number,
            blocks: std::mem::take(&mut self.answered),
        }
    }

    /// The store's flush returned: what it covered and was not written again is durable. Newer
    /// bytes for these blocks wait until [`settled_behind`](Self::settled_behind).
    pub(crate) fn flushed_behind(&mut self, behind: Behind) -> Retired {
        let epoch = self.sealed.front_mut().unwrap_or(&mut self.open);
        assert_eq!(
            epoch.number, behind.epoch,
            "only its own flush ends an epoch"
        );
        let blocks = epoch.take(behind.blocks);
        self.settling.extend(blocks.keys());
        self.retire(behind.epoch, blocks)
    }

    /// The session knows that what was retired behind is settled.
    pub(crate) fn settled_behind(&mut self) {
        self.settling = HashSet::new();
    }

    /// What is durable now took so long, from its first answer on: sets the portion.
    pub(crate) fn took(&mut self, took: Duration) {
        self.portion.durable(took);
    }

    // Suspects.

    /// No process of the server from before and up to this loss can write any more.
    pub(crate) fn quiet_over(&mut self, loss: u64) {
        for suspect in self.suspects.values_mut() {
            if suspect.held.is_some_and(|held| held <= loss) {
                suspect.held = None;
            }
        }
    }

    /// Adds a block that was settled for a dead session and has to be read back, by the
    /// [`digest_of`] what it should hold.
    pub(crate) fn add_settled_suspect(&mut self, index: u64, digest: u64) {
        // It may have been sent and lost already: that holds newer bytes back, and stays.
        self.suspects.entry(index).or_insert_with(|| Suspect {
            expected: Expected::Digest(digest),
            held: None,
            rewrites: 0,
        });
    }

    /// Judges what was read back from the store. The caller looked at nothing else in between
    /// that could have made the block durable anew.
    pub(crate) fn judge(&mut self, index: u64, found: &[u8]) -> Verdict {
        if self.newest.contains_key(&index) {
            return Verdict::Good;
        }
        let Some(suspect) = self.suspects.get_mut(&index) else {
            return Verdict::Good;
        };
        if suspect.expected.matches(found) {
            self.suspects.remove(&index);
            return Verdict::Good;
        }
        suspect.rewrites += 1;
        match &suspect.expected {
            Expected::Bytes(block) if suspect.rewrites <= REWRITES_MAX => {
                let block = block.clone();
                self.write(index, vec![block]);
                Verdict::Rewritten
            }
            Expected::Bytes(_) | Expected::Digest(_) => Verdict::Foreign,
        }
    }

    // What can be watched.

    pub(crate) fn durable(&self) -> EpochNumber {
        self.durable
    }

    pub(crate) fn open_number(&self) -> EpochNumber {
        self.open.number
    }

    /// Everything written is durable and no suspect is left.
    pub(crate) fn is_settled(&self) -> bool {
        self.newest.is_empty() && self.suspects.is_empty()
    }

    /// Sealed epochs that are not durable yet.
    pub(crate) fn sealed_len(&self) -> usize {
        self.sealed.len()
    }

    /// Somebody asked for blocks to be made durable, or waits for the room that they take.
    pub(crate) fn owes(&self) -> bool {
        !self.sealed.is_empty() || self.pressed
    }

    /// Whether the store holds the bytes of this block that were made durable last, and none of a
    /// later or a lost write.
    pub(crate) fn rests(&self, index: u64) -> bool {
        !self.newest.contains_key(&index)
            && !self.suspects.contains_key(&index)
            && !self.in_flight.contains(&index)
    }

    pub(crate) fn suspects_len(&self) -> usize {
        self.suspects.len()
    }

    pub(crate) fn losses(&self) -> u64 {
        self.losses
    }

    /// The connection that a call begun now is made on; `None` while it is lost.
    pub(crate) fn connection(&self) -> Option<Generation> {
        (self.line == Line::Up).then_some(self.generation)
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

    // Below: how it is done.

    /// The one epoch of which anything may be sent, or flushed behind, now.
    fn under_way(&self) -> Option<&Epoch> {
        if let Some(epoch) = self.sealed.front() {
            return Some(epoch);
        }
        let enough = self.open.unsent.len() >= self.limits.early_blocks;
        (enough || self.pressed || self.answered.len() >= self.portion.blocks())
            .then_some(&self.open)
    }

    fn behind_is_due(&self, epoch: &Epoch, sealed: bool) -> bool {
        let enough = self.answered.len() >= self.portion.blocks();
        // The last part of a sealed epoch waits for the flush that ends it.
        let goes_on = !sealed || epoch.unsent.len() >= 2 * self.portion.blocks();
        let nothing_else_comes = self.pressed && self.in_flight.is_empty() && !self.has_run();
        !self.answered.is_empty() && ((enough && goes_on) || nothing_else_comes)
    }

    /// Forgets what is durable now.
    fn retire(&mut self, number: EpochNumber, blocks: BTreeMap<u64, Block>) -> Retired {
        self.kept_blocks -= blocks.len();
        self.pressed = false; // writers look again now
        for index in blocks.keys() {
            let newest = self.newest.get(index);
            if newest.is_some_and(|(newest, _)| *newest == number) {
                self.newest.remove(index);
            }
        }
        for (index, suspect) in &mut self.suspects {
            if let Some(block) = blocks.get(index) {
                suspect.expected = match suspect.expected {
                    Expected::Bytes(_) => Expected::Bytes(block.clone()),
                    Expected::Digest(_) => Expected::Digest(digest_of(block)),
                };
            }
        }
        Retired(blocks)
    }

    fn next_run_range(&self) -> Option<(u64, u64)> {
        let in_flight_max = self.limits.in_flight_blocks.min(self.portion.blocks());
        if self.line == Line::Lost || self.in_flight.len() >= in_flight_max {
            return None;
        }
        let epoch = self.under_way()?;
        if self.permitted != Some(epoch.number) || self.goes_together(epoch) {
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
        if self.in_flight.contains(&index) || self.settling.contains(&index) {
            return false;
        }
        match self.suspects.get(&index) {
            Some(Suspect {
                expected,
                held: Some(_),
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

    /// Drops the newest sealed epoch if it and the open one are the same single block, and nothing
    /// of it is under way. The block then goes from its older value to the newest without the one
    /// between, and is still written after everything before it and before everything behind it;
    /// with a second block in either epoch their order would be lost. An unmount ends with several
    /// such epochs: jbd2 writes its super block once for each transaction that it checkpoints
    /// (fs/jbd2/checkpoint.c).
    fn drop_overtaken(&mut self) {
        // Of the oldest something may have been sent.
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

    /// Suspects whose bytes are kept; they count against the buffer.
    fn suspect_copies(&self) -> usize {
        self.suspects.len()
    }

    /// Runs of suspects to be read back, of `blocks_max` blocks in all or a little more.
    pub(crate) fn next_read_backs(&self, blocks_max: usize) -> Vec<(u64, usize)> {
        let ready = self
            .suspects
            .iter()
            .filter(|(index, suspect)| suspect.held.is_none() && !self.newest.contains_key(index));
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

// Its place is told for the benches, which compile this file from elsewhere.
#[path = "plan/batched_flush.rs"]
mod batched_flush;

#[cfg(test)]
mod tests;
