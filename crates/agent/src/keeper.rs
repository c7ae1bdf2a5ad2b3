//! Keeps past states of one container: saves what a write would destroy, and begins generations.
//!
//! Processes of one account serve the connections of a session independently. They share two locks:
//! `gate` is shared for one batch of writes and exclusive to begin a generation. `save` is exclusive
//! while old contents are saved. The kernel releases both when a process ends, however it ends.
//!
//! Always true: the old content of a block is durable, in the log or in a clone, before the block can be overwritten.

mod left;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;

use crate::clock::{Clock, Now};
use crate::disk::{self, Flock, Locked, Slots, bad};
use crate::generation::{self, Head, Newest, seal_all};
use crate::holes::{data_blocks, read_left, store_left};
use crate::journal::Journal;
use crate::log;
use crate::policy::{Header, Policy};
use crate::ranges::{self, BLOCK, Blocks};
use crate::space::Space;
use crate::state::{CHANGED_OUTSIDE, FileId, Locks, State, read_state};
use crate::time_text;
use crate::writers::{self, Slot};

/// So long a new session waits for batches of an older one before it ends their processes, and then for
/// them to end.
const PATIENCE: Duration = Duration::from_secs(2);
const PATIENCE_AFTER_KILL: Duration = Duration::from_secs(30);
/// Blocks of one batch of punches or announced writes: others wait no longer than for these. A full record: the disk is
/// waited for after each.
const BATCH_BLOCKS: u64 = log::ENTRIES_MAX as u64;
/// Blocks of one request.
const REQUEST_BLOCKS: u64 = 16_384;
/// A session that lasts longer than this gets a further generation.
const SESSION_GENERATION_S: i64 = 86_400;

/// Why a generation begins, and its mark on the one before it.
const WRITTEN_PAST: &str = "written-past";

/// Until when, by the counted clock, the administrator allows writes to the header.
pub const HEADER_UNTIL: &str = "header-until";

/// Who begins a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    Client,
    /// The administrator may write to the header, and no quota stops him. The first write begins a generation for
    /// this reason. Without a reason none begins: what the newest one has saved already needs no space.
    Admin(Option<&'static str>),
}

/// A process's part in a session. Dropped, it is in none any more.
#[derive(Debug)]
struct Session {
    number: u64,
    /// Shared by every process that writes.
    writers: Flock,
    _slot: Slot,
}

/// One process's part in keeping a container's past states.
#[derive(Debug)]
pub struct Keeper {
    folder: OwnedFd,
    locks: Rc<Locks>,
    slots: Slots,
    clock: Rc<Clock>,
    policy: Rc<Policy>,
    space: Rc<Space>,
    journal: Journal,
    /// The session that this process belongs to; `None` before its first write.
    session: Option<Session>,
    open: Option<Newest>,
    /// The last session that refused its predecessors, when this process opened the container. What a process
    /// has in its pipe from before such a session must not arrive after it.
    fence: u64,
    /// The client said that it leaves the container in order.
    says_clean: bool,
    by: By,
    /// Counted seconds minus seconds since the boot, when the clock was last read.
    counted_ahead_s: i64,
}

impl Keeper {
    /// `agent` is the folder `.sprat-agent`, `container` a container's name.
    pub fn open(
        agent: &OwnedFd,
        container: &str,
        clock: &Rc<Clock>,
        policy: &Rc<Policy>,
        space: &Rc<Space>,
    ) -> io::Result<Self> {
        let folder = disk::make_folder_in(agent, container)?;
        let slots = Slots::open(&folder, "state")?;
        Ok(Self {
            locks: Rc::new(Locks::open(&folder)?),
            fence: read_state(&slots)?.fence,
            slots,
            journal: Journal::open(&folder)?,
            folder,
            clock: Rc::clone(clock),
            policy: Rc::clone(policy),
            space: Rc::clone(space),
            session: None,
            open: None,
            says_clean: false,
            by: By::Client,
            counted_ahead_s: 0,
        })
    }

    /// Begins a session: every process of an earlier one is refused from now on, and no byte of it arrives any
    /// more.
    pub fn begin_session(&mut self, file: &File, by: By) -> io::Result<u64> {
        let locks = Rc::clone(&self.locks);
        let _gate = close_gate(&self.folder, &locks)?;
        let mut state = read_state(&self.slots)?;
        self.fence = state.fence;
        self.join(&mut state, file, true)?;
        self.by = by;
        Ok(state.session)
    }

    /// Makes this process one of a session that another one has begun.
    pub fn join_session(&mut self, file: &File, session: u64) -> io::Result<()> {
        let locks = Rc::clone(&self.locks);
        let _gate = locks.gate.exclusive()?;
        let mut state = read_state(&self.slots)?;
        let own = self.session.as_ref().map(|own| own.number);
        if state.session != session || own.is_some_and(|own| own != session) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.fence = state.fence;
        match own {
            None => self.join(&mut state, file, false),
            Some(_) => Ok(()),
        }
    }

    /// What the client says of how it leaves the container. It is shown, and nothing else depends on it.
    pub fn note_clean(&mut self, clean: bool) {
        self.says_clean = clean;
    }

    /// Saves what announced writes will destroy, up to a limit. Returns behind which block nothing was done.
    pub fn will_write(&mut self, file: &File, blocks: &[Range<u64>]) -> io::Result<u64> {
        self.in_batches(blocks, &mut |keeper, batch| {
            keeper.change(file, batch, &|_| Ok(0))
        })
    }

    /// Makes holes of whole blocks, up to a limit. They read as zeros afterwards. Returns the same.
    pub fn punch(&mut self, file: &File, blocks: &[Range<u64>]) -> io::Result<u64> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.in_batches(blocks, &mut |keeper, batch| {
            keeper.change(file, batch, &|file| {
                for range in batch {
                    let (offset, len) = (range.start * BLOCK, (range.end - range.start) * BLOCK);
                    rustix::fs::fallocate(file, flags, offset, len)?;
                }
                Ok(0)
            })
        })
    }

    /// `step` gets so many blocks at once that others wait no longer than for these.
    fn in_batches(
        &mut self,
        blocks: &[Range<u64>],
        step: &mut dyn FnMut(&mut Self, &Blocks) -> io::Result<()>,
    ) -> io::Result<u64> {
        let mut left = REQUEST_BLOCKS;
        let mut done = 0;
        let mut batch = Blocks::new();
        for range in blocks {
            let mut at = range.start;
            while at < range.end && left > 0 {
                let room = BATCH_BLOCKS - ranges::count(&batch);
                let end = range.end.min(at + room.min(left));
                batch.push(at..end);
                left -= end - at;
                at = end;
                if left == 0 || ranges::count(&batch) == BATCH_BLOCKS {
                    step(self, &batch)?;
                    batch.clear();
                    done = at;
                }
            }
        }
        if let Some(last) = batch.last() {
            done = last.end;
            step(self, &batch)?;
        }
        Ok(done)
    }

    /// Writes to the container. On an error not a byte of it is changed, unless the disk fails.
    pub fn write(&mut self, file: &File, writes: &[(u64, &[u8])]) -> io::Result<()> {
        let touched = writes
            .iter()
            .map(|(offset, data)| ranges::touched(*offset, data.len() as u64));
        self.change(file, &ranges::normal(touched.collect()), &|file| {
            for (offset, data) in writes {
                file.write_all_at(data, *offset)?;
            }
            Ok(writes.iter().map(|(_, data)| data.len() as u64).sum())
        })
    }

    /// Saves the old content of `touched`, then calls `change`, which returns the bytes that it wrote.
    fn change(
        &mut self,
        file: &File,
        touched: &Blocks,
        change: &dyn Fn(&File) -> io::Result<u64>,
    ) -> io::Result<()> {
        if touched.is_empty() {
            return Ok(());
        }
        let locks = Rc::clone(&self.locks);
        for _ in 0..8 {
            let gate = locks.gate.shared()?;
            if self.is_ready()? {
                self.check_header(touched)?;
                self.save(file, touched)?;
                // No reader may see the new content and not yet the saved one.
                fence(Ordering::SeqCst);
                self.journal.count(change(file)?);
                return Ok(());
            }
            drop(gate);
            let gate = locks.gate.exclusive()?;
            let begun = self.prepare(file)?;
            drop(gate);
            if begun {
                seal_all(&self.folder, &locks)?;
            }
        }
        Err(bad("generations begin faster than anything is written"))
    }

    /// Makes the container longer. The new part is a hole: nothing is lost.
    pub fn grow(&mut self, file: &File, len: u64) -> io::Result<()> {
        let locks = Rc::clone(&self.locks);
        let _gate = locks.gate.exclusive()?;
        self.prepare(file)?;
        if file.metadata()?.size() > len {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        file.set_len(len)
    }

    /// Takes the container as it is now, as a session does that writes nothing. A full disk does not stop it.
    pub fn accept(&mut self, file: &File) -> io::Result<()> {
        let locks = Rc::clone(&self.locks);
        let gate = locks.gate.exclusive()?;
        let prepared = self.prepare(file);
        drop(gate);
        disk::unless_full(prepared)?;
        self.end(file)
    }

    /// This process writes no more. The last one records how it leaves the container.
    pub fn end(&mut self, file: &File) -> io::Result<()> {
        if self.session.is_none() {
            return Ok(());
        }
        // The next session checks again which one is the newest.
        self.open = None;
        let locks = Rc::clone(&self.locks);
        let _gate = locks.gate.exclusive()?;
        // Under `gate`, also if this fails: the next process has to know whether somebody writes.
        let Some(session) = self.session.take() else {
            return Ok(());
        };
        self.journal.flush(session.number)?;
        let mut state = read_state(&self.slots)?;
        let id = FileId::of(file)?;
        if state.file != Some(id) {
            self.drop_left_clone()?;
        }
        // It replaces the shared lock that this process has.
        let Some(_alone) = session.writers.try_exclusive()? else {
            return Ok(());
        };
        if state.session == session.number {
            state.clean = self.says_clean;
            if self.says_clean {
                state.clean_s = crate::clock::reading("").wall_s;
            }
            // From before this takes time: what another program writes meanwhile is a change without the agent.
            state.file = Some(id);
            file.sync_all()?;
            // Nothing else may change it later and leave the same times.
            let is_past = crate::clock::wait_for_later_times(file)?;
            state.left = match is_past {
                true => store_left(&self.folder, file)?,
                false => None,
            };
            state.writing = false;
            self.slots.write(&state.to_text())?;
        }
        Ok(())
    }

    /// Whether this process may write now. Only under `gate`.
    fn is_ready(&mut self) -> io::Result<bool> {
        let Some(session) = &self.session else {
            return Ok(false);
        };
        let state = read_state(&self.slots)?;
        if state.session != session.number {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let Some(open) = self.open.as_ref().filter(|_| state.due.is_empty()) else {
            return Ok(false);
        };
        let newer = format!("g.{}", open.number + 1);
        // The next one may have been begun, and removed again. This one is sealed, or removed, before that.
        if disk::exists_in(&self.folder, &newer)?
            || generation::has_ended(&self.folder, open.number)?
        {
            return Ok(false);
        }
        let counted_s = crate::clock::reading("").up_s + self.counted_ahead_s;
        let due =
            counted_s >= state.secret_due_s || counted_s - state.begun_s >= SESSION_GENERATION_S;
        Ok(match open.tail()? {
            Some(_) if self.by == By::Admin(None) => true,
            Some(_) => !due && !open.is_full()?,
            None => false,
        })
    }

    /// What the policy says of a write to the header. An alarm is there before the write is.
    fn check_header(&self, touched: &Blocks) -> io::Result<()> {
        let begin = touched.first().map_or(u64::MAX, |first| first.start);
        let is_header = begin.saturating_mul(BLOCK) < self.policy.header_bytes;
        if !is_header || self.by != By::Client || self.policy.header == Header::Free {
            return Ok(());
        }
        let counted_s = crate::clock::reading("").up_s + self.counted_ahead_s;
        let allowed = disk::text_in(&self.folder, HEADER_UNTIL, 64)?;
        let until_s: Option<i64> = allowed.and_then(|text| disk::number(&text, "until"));
        if until_s.is_some_and(|until_s| counted_s < until_s) {
            return Ok(());
        }
        if self.policy.header == Header::Refuse {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        if disk::exists_in(&self.folder, "alarm")? {
            return Ok(());
        }
        let text = "a client wrote to the header, which has the keys";
        let session = self.session.as_ref().map_or(0, |own| own.number);
        self.journal.note(session, text)?;
        self.raise_alarm(text)
    }

    /// An alarm that is not confirmed yet stays.
    fn raise_alarm(&self, text: &str) -> io::Result<()> {
        if disk::exists_in(&self.folder, "alarm")? {
            return Ok(());
        }
        disk::replace_in(&self.folder, "alarm", format!("{text}\n").as_bytes())
    }

    /// Saves the old content of `touched`, as far as it isn't saved.
    fn save(&self, file: &File, touched: &Blocks) -> io::Result<()> {
        let Some(open) = &self.open else {
            return Err(bad("no generation is open"));
        };
        let new = ranges::count(&ranges::without(touched, &open.map)) * BLOCK;
        if new > 0 && self.by == By::Client {
            self.space.check(new, 0)?;
        }
        if open.unsaved(touched)?.is_empty() {
            return Ok(());
        }
        let _save = self.locks.save.exclusive()?;
        open.take_over()?;
        // Once more: another process may have saved and overwritten it meanwhile.
        let unsaved = open.unsaved(touched)?;
        if self.by == By::Client {
            self.space.check(0, ranges::count(&unsaved) * BLOCK)?;
        }
        open.save(file, &unsaved)
    }

    /// Joins or begins a session, loads the newest generation and begins one if that is due. Only under
    /// `gate`, exclusive. Returns whether a generation was begun.
    fn prepare(&mut self, file: &File) -> io::Result<bool> {
        let mut state = read_state(&self.slots)?;
        let now = self.clock.now()?;
        self.counted_ahead_s = now.counted_s - crate::clock::reading("").up_s;
        let newest = generation::numbers(&self.folder)?.last().copied();
        if self.open.as_ref().map(|open| open.number) != newest {
            self.open = None;
        }
        if let (None, Some(newest)) = (&self.open, newest) {
            let opened = Newest::open(&self.folder, newest, self.clock.boot());
            self.open = disk::if_whole(disk::if_there(opened))?.flatten();
        }
        match &self.session {
            None => self.join(&mut state, file, false)?,
            Some(session) if session.number != state.session => {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            Some(_) => {}
        }
        let old = state.clone();
        self.refill(&mut state, now);
        let id = FileId::of(file)?;
        // From the first write of a session on nobody knows it.
        state.left = None;
        let is_state = |open: &Newest| {
            let state = (open.head.length, (open.head.state_s, open.head.state_ns));
            io::Result::Ok(state == (id.len, id.modified) && open.is_unused()?)
        };
        let unchanged = self.open.as_ref().map_or(Ok(false), is_state)?;
        let usable = match &mut self.open {
            Some(open) if !generation::has_ended(&self.folder, open.number)? => {
                if self.by == By::Admin(None) && open.tail()?.is_none() {
                    open.go_on(&self.folder)?;
                }
                open.tail()?
            }
            _ => None,
        };
        let is_full = self.open.as_ref().map_or(Ok(false), Newest::is_full)?;
        let is_due = !state.due.is_empty();
        let reason = match (newest, usable, self.by) {
            (None, ..) => "first",
            (_, Some(_), By::Admin(None)) => "",
            _ if state.due == WRITTEN_PAST => WRITTEN_PAST,
            (.., By::Admin(Some(reason))) if is_due => reason,
            (_, None, _) => "restart",
            _ if is_full => "size",
            _ if now.counted_s >= state.secret_due_s => "secret",
            _ if now.counted_s - state.begun_s >= SESSION_GENERATION_S => "day",
            _ if is_due && state.tokens_milli >= 1000 => "session",
            _ => "",
        };
        let may_be_spared = ["secret", "day", "session"].contains(&reason);
        let begins = !reason.is_empty() && (!unchanged || !may_be_spared);
        // Until this is empty no connection may write.
        state.due.clear();
        if !begins || !self.policy.clones {
            self.drop_left_clone()?;
        }
        if begins {
            let number = newest.map_or(1, |newest| newest + 1);
            self.begin(file, number, reason, now, &old)?;
            state.begun_s = now.counted_s;
            if reason == "session" {
                state.tokens_milli -= 1000;
            }
        } else if reason == "day" {
            state.begun_s = now.counted_s;
        }
        if reason == "secret" || newest.is_none() {
            state.secret_due_s = now.counted_s + self.policy.secret_delay_s()?;
        }
        if state != old {
            self.slots.write(&state.to_text())?;
        }
        Ok(begins)
    }

    /// Makes this process one of those that write. Begins a session if there is none, or if this one refuses its
    /// predecessors. Finds out whether the container was changed by something else since the last session.
    fn join(&mut self, state: &mut State, file: &File, refuses: bool) -> io::Result<()> {
        if self.fence != state.fence {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.session = None;
        let mut session = Session {
            number: 0,
            _slot: writers::enter(&self.folder)?,
            writers: Flock::open(&self.folder, "writers")?,
        };
        let is_alone = session.writers.try_exclusive()?.is_some();
        // `gate` keeps others from coming between.
        session.writers.shared()?.keep();
        if is_alone || refuses {
            state.session += 1;
            if is_alone {
                self.check_for_changes(state, file)?;
            }
            if refuses {
                state.fence = state.session;
            }
            // Nobody knows how a session that did not end has left the container.
            state.clean &= !state.writing;
            state.writing = true;
            if state.due.is_empty() {
                state.due = "session".to_owned();
            }
            self.slots.write(&state.to_text())?;
        }
        self.fence = state.fence;
        self.says_clean = false;
        session.number = state.session;
        self.session = Some(session);
        Ok(())
    }

    /// When nobody writes: whether the container is as the last session left it.
    fn check_for_changes(&self, state: &mut State, file: &File) -> io::Result<()> {
        if state.writing {
            state.left = None;
        }
        if state.is_changed(FileId::of(file)?) {
            let what = format!("{CHANGED_OUTSIDE}: was {:?}", state.file);
            self.journal.note(state.session, &what)?;
            // A full disk stops no session: past states are marked all the same.
            disk::unless_full(self.raise_alarm(CHANGED_OUTSIDE))?;
            if let Some(newest) = generation::numbers(&self.folder)?.last() {
                mark(&self.folder, *newest, WRITTEN_PAST, "")?;
            }
            state.due = WRITTEN_PAST.to_owned();
        } else if state.writing {
            self.journal.note(
                state.session,
                "the session before ended without an orderly end",
            )?;
        }
        Ok(())
    }

    fn refill(&self, state: &mut State, now: Now) {
        let most = self.policy.burst * 1000;
        if state.tokens_at_s == 0 && state.tokens_milli == 0 {
            state.tokens_milli = most;
            state.tokens_at_s = now.counted_s.max(1);
        }
        let passed = u64::try_from(now.counted_s - state.tokens_at_s).unwrap_or(0);
        let gained = passed * 1000 / self.policy.token_every_s.max(1);
        if gained > 0 {
            state.tokens_milli = (state.tokens_milli + gained).min(most);
            state.tokens_at_s = now.counted_s;
        }
    }

    /// Begins the generation of the state that the container has now. `state`: what is known of the last session's end.
    fn begin(
        &mut self,
        file: &File,
        number: u32,
        reason: &str,
        now: Now,
        state: &State,
    ) -> io::Result<()> {
        file.sync_all()?;
        // Not earlier: another program may have written while this took time.
        let id = FileId::of(file)?;
        let is_as_left = state.file == Some(id);
        if !is_as_left {
            self.drop_left_clone()?;
        }
        let left = state.left.filter(|_| is_as_left);
        let known = left.map_or(Ok(None), |crc| read_left(&self.folder, crc))?;
        let everything = 0..id.len.div_ceil(BLOCK);
        let mut map = match known {
            Some(map) => map,
            None => data_blocks(file, id.len)?,
        };
        if let Some(open) = &self.open {
            let still = open.still_mapped(&map)?;
            map.extend(still);
            map = ranges::both(&ranges::normal(map), std::slice::from_ref(&everything));
        }
        let is_map_lost = self.open.is_none() && number > 1;
        if is_map_lost || map.len() > ranges::RANGES_MAX {
            map = Blocks::from([everything]);
        }
        let ago = (now.wall_s - id.modified.0).max(0);
        let since_last = self
            .open
            .as_ref()
            .map_or(ago, |open| (now.counted_s - open.head.counted_s).max(0));
        let head = Head {
            secret: disk::random_u64()?,
            length: id.len,
            state_s: id.modified.0,
            state_ns: id.modified.1,
            begun_s: now.wall_s,
            clean: state.clean && reason == "session",
            clone: self.policy.clones,
            counted_s: now.counted_s,
            bucket_s: now.bucket_s - ago.min(since_last),
            stood_s: ago.min(since_last),
            reason: reason.to_owned(),
            name: free_name(&self.folder, number, id.modified.0)?,
        };
        let made = generation::make(&self.folder, number, &head, &map, self.clock.boot(), file);
        if let Err(error) = made {
            if head.clone && !disk::is_full(&error) {
                self.raise_alarm(&format!("keeper = clone, and nobody can write: {error}"))?;
            }
            return Err(error);
        }
        self.open = Some(Newest::open(&self.folder, number, self.clock.boot())?);
        Ok(())
    }
}

/// Gets `gate` exclusively, if need be by killing those who have it. The kernel grants it only when no write
/// is under way.
fn close_gate<'a>(container: &OwnedFd, locks: &'a Locks) -> io::Result<Locked<'a>> {
    for (patience, kills) in [(PATIENCE, false), (PATIENCE_AFTER_KILL, true)] {
        if kills {
            writers::kill_others(container)?;
        }
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if let Some(locked) = locks.gate.try_exclusive()? {
                return Ok(locked);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Err(bad("a process of an older session does not end"))
}

/// Makes a new record of the state where both copies of it are damaged. Until then nobody can write. Returns
/// false if it is whole. Every process that was there before is refused from now on.
pub fn repair_state(container: &OwnedFd, now: Now, policy: &Policy) -> io::Result<bool> {
    let locks = Locks::open(container)?;
    let _gate = close_gate(container, &locks)?;
    let slots = Slots::open(container, "state")?;
    if disk::if_whole(read_state(&slots))?.is_some() {
        return Ok(false);
    }
    // The numbers of earlier sessions are lost: no process may have the new one.
    let session = disk::random_u64()? >> 1;
    let state = State {
        session,
        fence: session,
        // Whether the container was changed by something else meanwhile, nobody knows.
        writing: true,
        secret_due_s: now.counted_s + policy.secret_delay_s()?,
        // The next write begins a generation.
        begun_s: now.counted_s - SESSION_GENERATION_S,
        ..State::default()
    };
    slots.write(&state.to_text())?;
    Journal::open(container)?.note(session, "the record of the state was damaged; repaired")?;
    Ok(true)
}

/// Puts a mark on a generation, with a note.
pub fn mark(container: &OwnedFd, number: u32, what: &str, note: &str) -> io::Result<()> {
    disk::replace_in(
        generation::folder(container, number)?,
        what,
        note.as_bytes(),
    )
}

/// A name for a state of that time that no generation has. What names were in damaged heads nobody knows, but none has
/// this generation's number: they are of earlier ones.
fn free_name(container: &OwnedFd, number: u32, state_s: i64) -> io::Result<String> {
    let mut taken = Vec::new();
    let mut count = 1;
    for earlier in generation::numbers(container)? {
        match generation::folder(container, earlier).and_then(generation::read_head) {
            Ok(head) => taken.push(head.name),
            Err(_) => count = number,
        }
    }
    let plain = time_text::name(state_s);
    loop {
        let name = match count {
            1 => format!("{plain}.luks"),
            _ => format!("{plain}-{count}.luks"),
        };
        if !taken.contains(&name) {
            return Ok(name);
        }
        count += 1;
    }
}
