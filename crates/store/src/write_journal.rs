//! The write journal of a container: which process of this host has it locked, and which writes are
//! in flight.
//!
//! Three files: `ID.lock` is never replaced and carries the flock. `ID.record` is the journal:
//! entries are appended, and now and then it changes places with `ID.record.new`, which has only
//! what still counts. Both are allocated on the disk when they are first used, so a session can
//! record its writes on a disk that is full by then. The journal starts with 8 bytes
//! `sprtrec1`, then come entries of 40 bytes, little endian. The size is fixed, so that a torn tail
//! is found by its length or its checksum. Zeros may follow.
//!
//! | bytes | |
//! | --- | --- |
//! | 0..4 | CRC-32 of bytes 4..40 |
//! | 4..8 | kind: 1 in flight, 2 resolved, 3 acquiring a lock, 4 lock released or not acquired, 5 boot, |
//! | | 6 what is in flight can't arrive any more, 7 renewals of a lease, 8 a lease is known to be free, |
//! | | 9 the lock file |
//! | 8..32 | kind 1 and 2: start, end (2 with 0, 0 is "everything"); 3 and 4: number, token; 5: boot id, 0: |
//! | | the boot of the last session whose writes were not waited for, or else of the current one; |
//! | | 7: number, counter; 8: number, 0; 9, with 5: device and inode of the lock file that the session locked |
//! | 32..40 | seconds since the epoch, only for people: clocks may be set |
//!
//! An entry is true before the action that it announces. So a journal that lost its last entry by a
//! kill lost nothing that had happened. (After the append an entry is in the page cache. A power
//! cut may lose more; [`WriteJournal::may_arrive`] covers that.)

mod entry;
mod files;

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::FlockOperation;

use entry::{ENTRY_BYTES, Entry};
use files::{in_memory, open_existing, open_private};

use crate::clock::{boot_id, now_s};
use crate::ranges::RangeSet;
use crate::token::Token;
use crate::{IgnorePoison, LockError};

const MAGIC: &[u8; 8] = b"sprtrec1";
/// Beyond this length the journal is rewritten with only what still counts. So much is allocated for
/// it.
const JOURNAL_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// More separate ranges than this are joined over their smallest gaps. It equals the number of
/// blocks in the largest usual buffer: a recovery reads and writes all recorded ranges, so joined
/// gaps cost time.
const RANGES_MAX: usize = 64 * 1024;
/// A longer journal was not written by us.
const JOURNAL_BYTES_SANE: u64 = 64 * 1024 * 1024;

/// The write journal of one container on this host. It is locked by `flock` for as long as any
/// process has [`WriteJournal::fd`] open. A process id proves nothing across pid namespaces; the
/// flock does. Clones share the journal.
#[derive(Debug, Clone)]
pub struct WriteJournal {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lock_file: File,
    path: PathBuf,
    state: Mutex<JournalState>,
    ranges_max: usize,
    lock_is_out: AtomicBool,
    may_arrive: bool,
    may_live: bool,
}

/// Where a journal is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Storage {
    Disk,
    Memory,
}

#[derive(Debug)]
struct JournalState {
    file: File,
    len: u64,
    /// An append failed: nothing more is recorded, so nothing more may be sent.
    broken: bool,
    /// This session's first ranges are durable, and its boot with them.
    boot_recorded: bool,
    /// Writes of the last session may still arrive, and the quiet time was not waited for to its
    /// end.
    owes_quiet: bool,
    content: JournalContent,
    /// Device and inode of the lock file.
    lock_id: (u64, u64),
}

/// The state that the entries of a journal describe.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct JournalContent {
    in_flight: RangeSet,
    /// In flight when the last session died, until everything is resolved.
    in_doubt: Vec<Range<u64>>,
    acquisitions: Vec<(u64, Token)>,
    boot: u64,
    /// The lock file of the session that recorded its boot, as device and inode.
    lock_id: (u64, u64),
    /// The server's processes of all that was sent can't write any more.
    quiet: bool,
    /// A lease, and how often at most it was renewed when this was recorded.
    renewals: (u64, u64),
    /// The highest lease that this machine knows to be free.
    free: u64,
}

impl WriteJournal {
    /// Opens or creates the journal of `container_id` in `dir` (created with mode 0700 if missing)
    /// and locks it; [`LockError::HeldHere`] if another living process has it.
    ///
    /// The descriptor is close-on-exec: pass a duplicate of [`WriteJournal::fd`] to a process that
    /// must keep the lock.
    pub fn open(dir: &Path, container_id: &str) -> Result<Self, LockError> {
        Self::open_bounded(dir, container_id, RANGES_MAX, Storage::Disk)
    }

    /// As [`WriteJournal::open`], if the folder can't be written: on a full or read-only disk. Only
    /// for read-only sessions: what they record is kept in memory and lost at their end. A living
    /// session of this host is still respected, and the entries of a dead one are still read.
    pub fn open_in_memory(dir: &Path, container_id: &str) -> Result<Self, LockError> {
        Self::open_bounded(dir, container_id, RANGES_MAX, Storage::Memory)
    }

    fn open_bounded(
        dir: &Path,
        container_id: &str,
        ranges_max: usize,
        storage: Storage,
    ) -> Result<Self, LockError> {
        check_id(container_id)?;
        let lock_path = dir.join(format!("{container_id}.lock"));
        let lock_file = match storage {
            Storage::Disk => {
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(dir)
                    .map_err(|source| failed("create the folder of", dir, source))?;
                open_private(&lock_path)
            }
            Storage::Memory => open_existing(&lock_path),
        }
        .map_err(|source| failed("open", &lock_path, source))?;
        match rustix::fs::flock(&lock_file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                return Err(LockError::HeldHere {
                    container_id: container_id.to_owned(),
                });
            }
            Err(errno) => return Err(failed("lock", &lock_path, errno.into())),
        }
        let path = dir.join(format!("{container_id}.record"));
        let mut content = read_content(&path, ranges_max)?;
        content.in_doubt = content.in_flight.to_vec();
        // An acquisition stays in the journal after its lease was released: after a crash of the
        // server that lease may appear as in use again.
        let released = |(number, _): &(u64, Token)| *number <= content.free;
        let ended_cleanly =
            content.in_doubt.is_empty() && content.acquisitions.iter().all(released);
        // We got the flock. It proves that the last session died only if that session had locked this very file: a file
        // that was removed or copied is another one, and the session may live.
        let found = lock_file
            .metadata()
            .map_err(|source| failed("read", &lock_path, source))?;
        let lock_id = (found.dev(), found.ino());
        let is_this_boot = content.boot == boot_id();
        let may_live = !ended_cleanly && is_this_boot && content.lock_id != lock_id;
        let may_arrive = may_live
            || !content.quiet
                && (!content.in_doubt.is_empty() || (!ended_cleanly && !is_this_boot));
        let (file, len) = match storage {
            Storage::Disk => rewrite(&path, &content)?,
            Storage::Memory => {
                in_memory(&content.encode()).map_err(|source| failed("copy", &path, source))?
            }
        };
        let state = JournalState {
            file,
            len,
            broken: false,
            boot_recorded: false,
            owes_quiet: may_arrive,
            content,
            lock_id,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                lock_file,
                path,
                state: Mutex::new(state),
                ranges_max,
                lock_is_out: AtomicBool::new(false),
                may_arrive,
                may_live,
            }),
        })
    }

    /// The descriptor that carries the flock: a process that inherits it keeps the container
    /// locked.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.lock_file.as_fd()
    }

    /// The path of the journal.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// The in-doubt ranges of the container file: the last session may have had them in flight or
    /// unsynced when it died. A superset, merged, in order. Empty after a clean close, and after
    /// [`WriteJournal::all_resolved`].
    #[must_use]
    pub fn in_doubt(&self) -> Vec<Range<u64>> {
        self.state().content.in_doubt.clone()
    }

    /// Whether the last session died and its writes may still arrive, carried out by a process of
    /// the server that outlives it. May be true without [`WriteJournal::in_doubt`] ranges if this
    /// host crashed, too: the last entries may be missing then.
    #[must_use]
    pub fn may_arrive(&self) -> bool {
        self.inner.may_arrive
    }

    /// Whether the last session of this host was not ended, and its flock, which proves that it died, was on another file
    /// than ours: somebody removed the file, or this is a copy of the journal. It notices a higher lease before it sends
    /// anything after the quiet time.
    #[must_use]
    pub fn may_live(&self) -> bool {
        self.inner.may_live
    }

    /// Whether the quiet time must still be waited for: [`WriteJournal::may_arrive`] is true, and
    /// [`WriteJournal::quiet`] was not called yet. A session that ends during this wait keeps the
    /// lock, so that no other host writes either. The next session of this host waits for the full
    /// time again.
    #[must_use]
    pub fn owes_quiet(&self) -> bool {
        self.state().owes_quiet
    }

    /// Whether nothing can arrive late of the last session, which died or gave up: that is recorded, and
    /// nothing was sent since.
    pub(crate) fn is_quiet(&self) -> bool {
        self.state().content.quiet
    }

    /// Records for later sessions that nothing can arrive late any more.
    pub fn quiet(&self) -> Result<(), LockError> {
        let mut state = self.state();
        state.content.quiet = true;
        let [boot, lock] = state.boot_now();
        self.append(&mut state, &[boot, lock, Entry::Quiet])?;
        state.owes_quiet = false;
        Ok(())
    }

    /// Records ranges whose bytes are about to be sent. On return the entries survive a kill -9 of
    /// this process (they are in the kernel's page cache). Costs almost nothing for ranges that are
    /// recorded already.
    pub fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), LockError> {
        let mut state = self.state();
        // After a failed append its range is known in memory, but not recorded.
        self.refuse_broken(&state)?;
        let mut entries = Vec::new();
        for range in ranges {
            if state.content.in_flight.insert(range) {
                entries.push(Entry::InFlight(range.start, range.end));
            }
        }
        // A range in a closed gap counts as recorded from now on, so the journal must contain the
        // gap.
        let closed = state.content.in_flight.coarsen(self.inner.ranges_max);
        entries.extend(
            closed
                .into_iter()
                .map(|gap| Entry::InFlight(gap.start, gap.end)),
        );
        let was_quiet = std::mem::take(&mut state.content.quiet);
        if entries.is_empty() {
            match ranges.first() {
                // Recorded, but not as in flight again.
                Some(range) if was_quiet => entries.push(Entry::InFlight(range.start, range.end)),
                _ => return Ok(()),
            }
        }
        let first = !state.boot_recorded;
        if first {
            entries.splice(..0, state.boot_to_record());
        }
        self.append(&mut state, &entries)?;
        if first {
            // Once in a session. A power cut is detected by the boot id, but some ranges are better
            // than none.
            self.sync(&mut state)?;
            state.boot_recorded = true;
        }
        Ok(())
    }

    /// Records that these ranges are answered and durable, and nothing newer for them is in flight.
    /// This keeps the number of in-doubt ranges small in a long session; [`WriteJournal::in_doubt`]
    /// does not change.
    pub fn resolved(&self, ranges: &[Range<u64>]) -> Result<(), LockError> {
        let mut state = self.state();
        let mut entries = Vec::new();
        for range in ranges {
            // The last session's ranges stay in flight until everything is resolved.
            let mut part = RangeSet::default();
            part.insert(range);
            // In order and disjoint, and maybe thousands: only those that overlap the range matter.
            let in_doubt = &state.content.in_doubt;
            let first = in_doubt.partition_point(|other| other.end <= range.start);
            for other in in_doubt[first..].iter().take_while(|s| s.start < range.end) {
                part.remove(other);
            }
            for range in part.to_vec() {
                if state.content.in_flight.remove(&range) {
                    entries.push(Entry::Resolved(range.start, range.end));
                }
            }
        }
        self.append(&mut state, &entries)
    }

    /// Records that every recorded write is answered and durable, and that the last session's
    /// in-doubt ranges were written again or read back. All ranges are forgotten.
    pub fn all_resolved(&self) -> Result<(), LockError> {
        let mut state = self.state();
        state.content.in_doubt.clear();
        if state.content.in_flight.is_empty() {
            return Ok(());
        }
        state.content.in_flight.clear();
        self.append(&mut state, &[Entry::Resolved(0, 0)])
    }

    /// True for the first caller, until [`WriteJournal::end_lock`].
    pub(crate) fn begin_lock(&self) -> bool {
        !self.inner.lock_is_out.swap(true, Ordering::SeqCst)
    }

    /// This process does not have the lock any more.
    pub(crate) fn end_lock(&self) {
        self.inner.lock_is_out.store(false, Ordering::SeqCst);
    }

    /// Records that a lease file is about to be created.
    pub(crate) fn acquiring(&self, number: u64, token: Token) -> Result<(), LockError> {
        let mut state = self.state();
        let acquiring = Entry::Acquiring(number, token);
        state.content.apply(acquiring, self.inner.ranges_max);
        let boot = state.boot_to_record();
        let entries: Vec<Entry> = boot.into_iter().chain([acquiring]).collect();
        self.append(&mut state, &entries)?;
        // A lease file that survives a power cut must be known as ours.
        self.sync(&mut state)
    }

    /// Records that a lease file of ours is gone, or was never created. The last one stays in the
    /// journal while the quiet time of an earlier session is owed: without any, everything would
    /// count as ended cleanly. Its token belongs to no other lease, so it takes nothing over.
    pub(crate) fn not_acquired(&self, number: u64, token: Token) -> Result<(), LockError> {
        let mut state = self.state();
        if state.owes_quiet && state.content.acquisitions == [(number, token)] {
            return Ok(());
        }
        state
            .content
            .acquisitions
            .retain(|acquiring| *acquiring != (number, token));
        self.append(&mut state, &[Entry::NotAcquired(number, token)])
    }

    /// The leases that this host was acquiring or had, and that may still be in use in its name.
    pub(crate) fn acquisitions(&self) -> Vec<(u64, Token)> {
        self.state().content.acquisitions.clone()
    }

    /// Records that lease `number`, which is synced, is ours: lower ones do not count any more,
    /// whatever a crash of the server brings back.
    pub(crate) fn acquired(&self, number: u64) -> Result<(), LockError> {
        let mut state = self.state();
        let below: Vec<(u64, Token)> = state.content.acquisitions.clone();
        let below = below.into_iter().filter(|(acquired, _)| *acquired < number);
        let entries: Vec<Entry> = below
            .map(|(n, token)| Entry::NotAcquired(n, token))
            .collect();
        state
            .content
            .acquisitions
            .retain(|(acquired, _)| *acquired >= number);
        self.append(&mut state, &entries)
    }

    /// Records, durably, how often lease `number` may be renewed before the next call. If a counter
    /// is higher, a copy of this machine is at work.
    pub(crate) fn renewals(&self, number: u64, counter: u64) -> Result<(), LockError> {
        let mut state = self.state();
        state.content.renewals = (number, counter);
        self.append(&mut state, &[Entry::Renewed(number, counter)])?;
        self.sync(&mut state)
    }

    /// The lease whose renewals were recorded last, and how many.
    pub(crate) fn known_renewals(&self) -> (u64, u64) {
        self.state().content.renewals
    }

    /// Records that lease `number` is free: this machine wrote or read that. Its acquisition stays
    /// until a later lease of this machine is synced.
    pub(crate) fn known_free(&self, number: u64) -> Result<(), LockError> {
        let mut state = self.state();
        if state.content.free >= number {
            return Ok(());
        }
        state.content.free = number;
        self.append(&mut state, &[Entry::Free(number)])
    }

    /// The highest lease that is known to be free; 0 if none is.
    pub(crate) fn highest_free(&self) -> u64 {
        self.state().content.free
    }

    fn state(&self) -> MutexGuard<'_, JournalState> {
        self.inner.state.lock().ignore_poison()
    }

    fn sync(&self, state: &mut JournalState) -> Result<(), LockError> {
        state.file.sync_data().map_err(|source| {
            state.broken = true;
            failed("sync", &self.inner.path, source)
        })
    }

    fn refuse_broken(&self, state: &JournalState) -> Result<(), LockError> {
        let path = &self.inner.path;
        match state.broken {
            false => Ok(()),
            true => Err(failed("append to", path, io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn append(&self, state: &mut JournalState, entries: &[Entry]) -> Result<(), LockError> {
        let path = &self.inner.path;
        self.refuse_broken(state)?;
        if entries.is_empty() {
            return Ok(());
        }
        let now = now_s();
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.encode(now)).collect();
        let grown = state.len + bytes.len() as u64;
        // After a failure the file may end with half an entry, which would hide any later one.
        state.broken = true;
        if grown > JOURNAL_BYTES_MAX {
            (state.file, state.len) = rewrite(path, &state.content)?;
        } else {
            state
                .file
                .write_all(&bytes)
                .map_err(|source| failed("append to", path, source))?;
            state.len = grown;
        }
        state.broken = false;
        Ok(())
    }
}

impl JournalState {
    /// Returns entries for this boot and its lock file. None while the quiet time of an earlier session is owed:
    /// later sessions recognise that by the earlier boot, or lock file.
    fn boot_to_record(&mut self) -> Vec<Entry> {
        match self.owes_quiet {
            true => Vec::new(),
            false => self.boot_now().to_vec(),
        }
    }

    fn boot_now(&mut self) -> [Entry; 2] {
        (self.content.boot, self.content.lock_id) = (boot_id(), self.lock_id);
        [
            Entry::Boot(self.content.boot),
            Entry::LockFile(self.lock_id.0, self.lock_id.1),
        ]
    }
}

impl JournalContent {
    fn apply(&mut self, entry: Entry, ranges_max: usize) {
        match entry {
            Entry::InFlight(start, end) => {
                self.in_flight.insert(&(start..end));
                self.in_flight.coarsen(ranges_max);
                self.quiet = false;
            }
            Entry::Resolved(0, 0) => self.in_flight.clear(),
            Entry::Resolved(start, end) => {
                self.in_flight.remove(&(start..end));
            }
            Entry::Acquiring(number, token) => {
                self.acquisitions.push((number, token));
                self.quiet = false;
                // If a chain starts again, no free lease of the earlier chain counts.
                self.free = self.free.min(number.saturating_sub(1));
            }
            Entry::NotAcquired(number, token) => {
                self.acquisitions
                    .retain(|acquiring| *acquiring != (number, token));
            }
            Entry::Boot(boot) => self.boot = boot,
            Entry::Quiet => self.quiet = true,
            Entry::Renewed(number, counter) => self.renewals = (number, counter),
            Entry::Free(number) => self.free = self.free.max(number),
            Entry::LockFile(device, inode) => self.lock_id = (device, inode),
        }
    }

    /// Encodes it in as few entries as possible.
    fn encode(&self) -> Vec<u8> {
        let now = now_s();
        let ranges = self.in_flight.to_vec();
        let lock = Entry::LockFile(self.lock_id.0, self.lock_id.1);
        let entries = [Entry::Boot(self.boot), lock]
            .into_iter()
            .chain(
                ranges
                    .into_iter()
                    .map(|range| Entry::InFlight(range.start, range.end)),
            )
            .chain(
                self.acquisitions
                    .iter()
                    .map(|(number, token)| Entry::Acquiring(*number, *token)),
            )
            .chain(self.quiet.then_some(Entry::Quiet))
            .chain(
                (self.renewals.0 > 0).then_some(Entry::Renewed(self.renewals.0, self.renewals.1)),
            )
            .chain((self.free > 0).then_some(Entry::Free(self.free)));
        MAGIC
            .iter()
            .copied()
            .chain(entries.flat_map(|entry| entry.encode(now)))
            .collect()
    }

    /// Reads entries up to the first torn one.
    fn parse(bytes: &[u8], ranges_max: usize) -> Option<Self> {
        let mut content = Self::default();
        let Some(entries) = bytes.strip_prefix(MAGIC) else {
            // A journal whose creator was killed while creating it.
            return MAGIC.starts_with(bytes).then_some(content);
        };
        for entry in entries.chunks_exact(ENTRY_BYTES) {
            let Some(entry) = Entry::parse(entry) else {
                break;
            };
            content.apply(entry, ranges_max);
        }
        Some(content)
    }
}

fn check_id(container_id: &str) -> Result<(), LockError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let is_name = !container_id.is_empty()
        && !container_id.starts_with('.')
        && container_id.len() <= 200
        && container_id.chars().all(plain);
    match is_name {
        true => Ok(()),
        false => Err(LockError::Invalid {
            op: "open the write journal",
            reason: format!("{container_id:?} can't be part of a file's name"),
        }),
    }
}

fn read_content(path: &Path, ranges_max: usize) -> Result<JournalContent, LockError> {
    let mut bytes = Vec::new();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(JournalContent::default());
        }
        Err(source) => return Err(failed("open", path, source)),
    };
    let read = file.take(JOURNAL_BYTES_SANE).read_to_end(&mut bytes);
    read.map_err(|source| failed("read", path, source))?;
    JournalContent::parse(&bytes, ranges_max).ok_or_else(|| {
        // Assuming "nothing was in flight" could cost data.
        failed(
            "read",
            path,
            io::Error::new(io::ErrorKind::InvalidData, "not a write journal of sprat"),
        )
    })
}

/// Replaces the journal by one that contains only what still counts.
fn rewrite(path: &Path, content: &JournalContent) -> Result<(File, u64), LockError> {
    let bytes = content.encode();
    match files::replace(path, &bytes, JOURNAL_BYTES_MAX) {
        Ok(file) => Ok((file, bytes.len() as u64)),
        Err(source) => Err(failed("rewrite", path, source)),
    }
}

fn failed(op: &'static str, path: &Path, source: io::Error) -> LockError {
    LockError::Journal {
        op,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
