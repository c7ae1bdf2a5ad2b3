//! The local record of a container: who holds it on this host, and what was in flight.
//!
//! Two files: `ID.lock` is never replaced and carries the flock; `ID.record` is appended to, and
//! replaced by a shorter one now and then. The record is 8 bytes `sprtrec1`, then entries of
//! 40 bytes, little endian; fixed, so that a torn tail is found by its length or its checksum:
//!
//! | bytes | |
//! | --- | --- |
//! | 0..4 | CRC-32 of bytes 4..40 |
//! | 4..8 | kind: 1 in flight, 2 settled, 3 taking a lock, 4 lock given back or never taken, 5 boot, |
//! | | 6 what is in flight can't arrive any more, 7 renewals of a lease, 8 a lease is known to be free |
//! | 8..32 | kind 1 and 2: start, end (2 with 0, 0 is "everything"); 3 and 4: number, token; 5: boot id, 0: |
//! | | the boot of the last holder whose bytes were not waited for, or else of the present one; |
//! | | 7: number, counter; 8: number, 0 |
//! | 32..40 | seconds since the epoch, for people only: clocks are set |
//!
//! What an entry says is true before what it announces is done, so a record that lost its last
//! entry to a kill lost nothing that had happened. (An entry is in the page cache then; a power
//! cut may take more; [`LocalRecord::may_arrive`] covers that.)

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rustix::fs::{FlockOperation, OFlags};

use crate::checksum::crc32;
use crate::clock::now_s;
use crate::ranges::RangeSet;
use crate::token::Token;
use crate::{IgnorePoison, LockError};

const MAGIC: &[u8; 8] = b"sprtrec1";
const ENTRY_BYTES: usize = 40;
/// Beyond it the record is written anew with what still counts.
const RECORD_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// More separate ranges are joined over their smallest gaps. As many as there are blocks in the
/// largest usual buffer: whoever takes over reads and writes all of the ranges, so gaps are dear.
const RANGES_MAX: usize = 64 * 1024;
/// A record longer than this was not written by us.
const RECORD_BYTES_SANE: u64 = 64 * 1024 * 1024;

/// The record of one container on this host, held by `flock` for as long as any process has
/// [`LocalRecord::fd`] open. A pid proves nothing across pid namespaces; the flock does. Clones
/// share it.
#[derive(Debug, Clone)]
pub struct LocalRecord {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    lock_file: File,
    path: PathBuf,
    state: Mutex<State>,
    ranges_max: usize,
    lock_is_out: AtomicBool,
    may_arrive: bool,
}

/// Where a record is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    OnDisk,
    InMemory,
}

#[derive(Debug)]
struct State {
    file: File,
    len: u64,
    /// An append failed: nothing more is recorded, so nothing more may be sent.
    broken: bool,
    /// This session's first ranges are durable, and its boot with them.
    boot_noted: bool,
    /// What the last holder sent may still arrive, and nobody has waited for it to its end.
    owes_quiet: bool,
    content: Content,
}

/// What the entries of a record amount to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Content {
    in_flight: RangeSet,
    /// In flight when the last holder died, until everything is settled.
    suspects: Vec<Range<u64>>,
    takings: Vec<(u64, Token)>,
    boot: u64,
    /// The server's processes of all that was sent can't write any more.
    quiet: bool,
    /// A lease, and how often it was renewed at most when this was noted.
    renewals: (u64, u64),
    /// The highest lease that this machine knows to be free.
    free: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    InFlight(u64, u64),
    Settled(u64, u64),
    Taking(u64, Token),
    NotTaken(u64, Token),
    Boot(u64),
    Quiet,
    Renewed(u64, u64),
    Free(u64),
}

impl LocalRecord {
    /// Opens or makes the record of `container_id` in `dir` (made with mode 0700 if missing) and
    /// takes its flock; [`LockError::HeldHere`] where another living process has it.
    ///
    /// The descriptor is close-on-exec: hand a duplicate of [`LocalRecord::fd`] to whom it should
    /// live in.
    pub fn open(dir: &Path, container_id: &str) -> Result<Self, LockError> {
        Self::open_bounded(dir, container_id, RANGES_MAX, Kept::OnDisk)
    }

    /// As [`LocalRecord::open`], in a folder that can't be written: on a full disk, or a read-only
    /// one. For a session that only reads: what it would record is kept in memory and ends with it.
    /// A living session of this host is still respected, and what a dead one left is still known.
    pub fn open_in_memory(dir: &Path, container_id: &str) -> Result<Self, LockError> {
        Self::open_bounded(dir, container_id, RANGES_MAX, Kept::InMemory)
    }

    fn open_bounded(
        dir: &Path,
        container_id: &str,
        ranges_max: usize,
        kept: Kept,
    ) -> Result<Self, LockError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if container_id.is_empty()
            || container_id.starts_with('.')
            || container_id.len() > 200
            || !container_id.chars().all(plain)
        {
            return Err(LockError::Invalid {
                op: "open local record",
                reason: format!("{container_id:?} can't be part of a file's name"),
            });
        }
        let lock_path = dir.join(format!("{container_id}.lock"));
        let lock_file = match kept {
            Kept::OnDisk => {
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(dir)
                    .map_err(|source| failed("make the folder of", dir, source))?;
                open_private(&lock_path)
            }
            Kept::InMemory => open_existing(&lock_path),
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
        content.suspects = content.in_flight.to_vec();
        // A taking stays on record after its lease was given back: a crash of the server may show
        // that lease as held again.
        let given_back = |(number, _): &(u64, Token)| *number <= content.free;
        let in_order = content.suspects.is_empty() && content.takings.iter().all(given_back);
        let may_arrive = !content.quiet
            && (!content.suspects.is_empty() || (!in_order && content.boot != boot_id()));
        let (file, len) = match kept {
            Kept::OnDisk => rewrite(&path, &content)?,
            Kept::InMemory => {
                in_memory(&content.encode()).map_err(|source| failed("copy", &path, source))?
            }
        };
        let state = State {
            file,
            len,
            broken: false,
            boot_noted: false,
            owes_quiet: may_arrive,
            content,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                lock_file,
                path,
                state: Mutex::new(state),
                ranges_max,
                lock_is_out: AtomicBool::new(false),
                may_arrive,
            }),
        })
    }

    /// The descriptor that carries the flock: a process that inherits it is "still alive".
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.lock_file.as_fd()
    }

    /// Where the record lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Ranges of the container file that the last holder may have had in flight or unsynced when
    /// it died: a superset, merged, in order. Empty after a clean close, and once
    /// [`LocalRecord::all_settled`] was called.
    #[must_use]
    pub fn suspects(&self) -> Vec<Range<u64>> {
        self.state().content.suspects.clone()
    }

    /// The last holder died and what it sent may still arrive in the file, written by a process of
    /// the server that outlives it. True also without [`LocalRecord::suspects`] where this host
    /// died with it: the last entries may be missing then.
    #[must_use]
    pub fn may_arrive(&self) -> bool {
        self.inner.may_arrive
    }

    /// Whether that is still so: [`LocalRecord::may_arrive`], and [`LocalRecord::quiet`] was not
    /// called yet. Who ends in the middle of the wait leaves the lock, so that no other host writes
    /// either; the next session of this host waits all of it again.
    #[must_use]
    pub fn owes_quiet(&self) -> bool {
        self.state().owes_quiet
    }

    /// Records that it can't any more, for whoever comes next.
    pub fn quiet(&self) -> Result<(), LockError> {
        let mut state = self.state();
        state.content.quiet = true;
        state.content.boot = boot_id();
        let boot = Entry::Boot(state.content.boot);
        self.append(&mut state, &[boot, Entry::Quiet])?;
        state.owes_quiet = false;
        Ok(())
    }

    /// Records ranges whose bytes are about to be sent. Returns once the record survives kill -9
    /// of this process (it is in the kernel's page cache). Costs next to nothing where the ranges
    /// are recorded already.
    pub fn before_send(&self, ranges: &[Range<u64>]) -> Result<(), LockError> {
        let mut state = self.state();
        // A range that an append failed for is known from then on, and recorded nowhere.
        self.refuse_broken(&state)?;
        let mut entries = Vec::new();
        for range in ranges {
            if state.content.in_flight.insert(range) {
                entries.push(Entry::InFlight(range.start, range.end));
            }
        }
        // A range in a gap that is closed counts as known from now on: whoever reads the record must
        // know of it, too.
        let closed = state.content.in_flight.coarsen(self.inner.ranges_max);
        entries.extend(
            closed
                .into_iter()
                .map(|gap| Entry::InFlight(gap.start, gap.end)),
        );
        let was_quiet = std::mem::take(&mut state.content.quiet);
        if entries.is_empty() {
            match ranges.first() {
                // Known, but not as something that is out again.
                Some(range) if was_quiet => entries.push(Entry::InFlight(range.start, range.end)),
                _ => return Ok(()),
            }
        }
        let first = !state.boot_noted;
        if first && let Some(boot) = state.boot_to_note() {
            entries.insert(0, boot);
        }
        self.append(&mut state, &entries)?;
        if first {
            // Once a session: a power cut is told by the boot, but some ranges are better than none.
            self.sync(&mut state)?;
            state.boot_noted = true;
        }
        Ok(())
    }

    /// Records that these ranges are answered and durable, and nothing newer of them is out.
    /// Keeps the suspects of a long session few; [`LocalRecord::suspects`] stay as they are.
    pub fn settled(&self, ranges: &[Range<u64>]) -> Result<(), LockError> {
        let mut state = self.state();
        let mut entries = Vec::new();
        for range in ranges {
            // What the last holder left stays in flight until everything is settled.
            let mut part = RangeSet::default();
            part.insert(range);
            // In order and disjoint, and maybe thousands: only those that meet the range count.
            let suspects = &state.content.suspects;
            let first = suspects.partition_point(|suspect| suspect.end <= range.start);
            for suspect in suspects[first..].iter().take_while(|s| s.start < range.end) {
                part.remove(suspect);
            }
            for range in part.to_vec() {
                if state.content.in_flight.remove(&range) {
                    entries.push(Entry::Settled(range.start, range.end));
                }
            }
        }
        self.append(&mut state, &entries)
    }

    /// Records that every recorded write is answered and durable, and the suspects of the last
    /// holder were written again or read back; the ranges are forgotten.
    pub fn all_settled(&self) -> Result<(), LockError> {
        let mut state = self.state();
        state.content.suspects.clear();
        if state.content.in_flight.is_empty() {
            return Ok(());
        }
        state.content.in_flight.clear();
        self.append(&mut state, &[Entry::Settled(0, 0)])
    }

    /// True for the first of any number of callers until [`LocalRecord::end_lock`].
    pub(crate) fn begin_lock(&self) -> bool {
        !self.inner.lock_is_out.swap(true, Ordering::SeqCst)
    }

    /// The lock is no longer held by this process.
    pub(crate) fn end_lock(&self) {
        self.inner.lock_is_out.store(false, Ordering::SeqCst);
    }

    /// Records that a lock file is about to be made.
    pub(crate) fn taking(&self, number: u64, token: Token) -> Result<(), LockError> {
        let mut state = self.state();
        let taking = Entry::Taking(number, token);
        state.content.apply(taking, self.inner.ranges_max);
        let boot = state.boot_to_note();
        let entries: Vec<Entry> = boot.into_iter().chain([taking]).collect();
        self.append(&mut state, &entries)?;
        // A lock file that outlives a power cut must be known as ours.
        self.sync(&mut state)
    }

    /// Records that a lock file of ours is gone, or was never made. The last one stays on record
    /// while what an earlier holder sent was not waited for: with none, all would count as ended in
    /// order. Its token is nobody else's, so it takes nothing over.
    pub(crate) fn not_taken(&self, number: u64, token: Token) -> Result<(), LockError> {
        let mut state = self.state();
        if state.owes_quiet && state.content.takings == [(number, token)] {
            return Ok(());
        }
        state
            .content
            .takings
            .retain(|taking| *taking != (number, token));
        self.append(&mut state, &[Entry::NotTaken(number, token)])
    }

    /// The locks that this host was taking or held, and that may be held by its name yet.
    pub(crate) fn takings(&self) -> Vec<(u64, Token)> {
        self.state().content.takings.clone()
    }

    /// Records that lease `number`, which is synced, is ours: what is lower counts no more, whatever
    /// a crash of the server brings back.
    pub(crate) fn taken(&self, number: u64) -> Result<(), LockError> {
        let mut state = self.state();
        let below: Vec<(u64, Token)> = state.content.takings.clone();
        let below = below.into_iter().filter(|(taken, _)| *taken < number);
        let entries: Vec<Entry> = below.map(|(n, token)| Entry::NotTaken(n, token)).collect();
        state.content.takings.retain(|(taken, _)| *taken >= number);
        self.append(&mut state, &entries)
    }

    /// Records how often lease `number` may be renewed before this is called again, durably: a
    /// higher counter is the work of a copy of this machine.
    pub(crate) fn renewals(&self, number: u64, counter: u64) -> Result<(), LockError> {
        let mut state = self.state();
        state.content.renewals = (number, counter);
        self.append(&mut state, &[Entry::Renewed(number, counter)])?;
        self.sync(&mut state)
    }

    /// The lease whose renewals were noted last, and how many.
    pub(crate) fn known_renewals(&self) -> (u64, u64) {
        self.state().content.renewals
    }

    /// Records that lease `number` is free: this machine wrote so, or read it. Its taking stays
    /// until a later lease of this machine is synced.
    pub(crate) fn known_free(&self, number: u64) -> Result<(), LockError> {
        let mut state = self.state();
        if state.content.free >= number {
            return Ok(());
        }
        state.content.free = number;
        self.append(&mut state, &[Entry::Free(number)])
    }

    /// The highest lease that is known to be free; 0 where none is.
    pub(crate) fn highest_free(&self) -> u64 {
        self.state().content.free
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().ignore_poison()
    }

    fn sync(&self, state: &mut State) -> Result<(), LockError> {
        state.file.sync_data().map_err(|source| {
            state.broken = true;
            failed("sync", &self.inner.path, source)
        })
    }

    fn refuse_broken(&self, state: &State) -> Result<(), LockError> {
        let path = &self.inner.path;
        match state.broken {
            false => Ok(()),
            true => Err(failed("append to", path, io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn append(&self, state: &mut State, entries: &[Entry]) -> Result<(), LockError> {
        let path = &self.inner.path;
        self.refuse_broken(state)?;
        if entries.is_empty() {
            return Ok(());
        }
        let now = now_s();
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.encode(now)).collect();
        let grown = state.len + bytes.len() as u64;
        // After a failure half an entry may lie there and would hide what comes behind it.
        state.broken = true;
        if grown > RECORD_BYTES_MAX {
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

impl State {
    /// This boot, to be recorded; `None` while what was sent in an earlier one is not waited for:
    /// that boot is how whoever comes next knows of it.
    fn boot_to_note(&mut self) -> Option<Entry> {
        if self.owes_quiet {
            return None;
        }
        self.content.boot = boot_id();
        Some(Entry::Boot(self.content.boot))
    }
}

impl Content {
    fn apply(&mut self, entry: Entry, ranges_max: usize) {
        match entry {
            Entry::InFlight(start, end) => {
                self.in_flight.insert(&(start..end));
                self.in_flight.coarsen(ranges_max);
                self.quiet = false;
            }
            Entry::Settled(0, 0) => self.in_flight.clear(),
            Entry::Settled(start, end) => {
                self.in_flight.remove(&(start..end));
            }
            Entry::Taking(number, token) => {
                self.takings.push((number, token));
                self.quiet = false;
                // In a chain that begins again nothing of the earlier one is known to be free.
                self.free = self.free.min(number.saturating_sub(1));
            }
            Entry::NotTaken(number, token) => {
                self.takings.retain(|taking| *taking != (number, token));
            }
            Entry::Boot(boot) => self.boot = boot,
            Entry::Quiet => self.quiet = true,
            Entry::Renewed(number, counter) => self.renewals = (number, counter),
            Entry::Free(number) => self.free = self.free.max(number),
        }
    }

    /// The fewest entries that amount to it.
    fn encode(&self) -> Vec<u8> {
        let now = now_s();
        let ranges = self.in_flight.to_vec();
        let entries = [Entry::Boot(self.boot)]
            .into_iter()
            .chain(
                ranges
                    .into_iter()
                    .map(|range| Entry::InFlight(range.start, range.end)),
            )
            .chain(
                self.takings
                    .iter()
                    .map(|(number, token)| Entry::Taking(*number, *token)),
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

    /// Reads entries up to the first that is torn.
    fn parse(bytes: &[u8], ranges_max: usize) -> Option<Self> {
        let mut content = Self::default();
        let Some(entries) = bytes.strip_prefix(MAGIC) else {
            // A record that was being made when its maker was killed.
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

impl Entry {
    fn encode(self, at_s: u64) -> [u8; ENTRY_BYTES] {
        let pair = |a: u64, b: u64| {
            let mut body = [0; 24];
            body[..8].copy_from_slice(&a.to_le_bytes());
            body[8..16].copy_from_slice(&b.to_le_bytes());
            body
        };
        let tagged = |number: u64, token: Token| {
            let mut body = pair(number, 0);
            body[8..].copy_from_slice(&token.0);
            body
        };
        let (kind, body) = match self {
            Self::InFlight(start, end) => (1u32, pair(start, end)),
            Self::Settled(start, end) => (2, pair(start, end)),
            Self::Taking(number, token) => (3, tagged(number, token)),
            Self::NotTaken(number, token) => (4, tagged(number, token)),
            Self::Boot(boot) => (5, pair(boot, 0)),
            Self::Quiet => (6, pair(0, 0)),
            Self::Renewed(number, counter) => (7, pair(number, counter)),
            Self::Free(number) => (8, pair(number, 0)),
        };
        let mut entry = [0; ENTRY_BYTES];
        entry[4..8].copy_from_slice(&kind.to_le_bytes());
        entry[8..32].copy_from_slice(&body);
        entry[32..].copy_from_slice(&at_s.to_le_bytes());
        let checksum = crc32(&entry[4..]);
        entry[..4].copy_from_slice(&checksum.to_le_bytes());
        entry
    }

    fn parse(entry: &[u8]) -> Option<Self> {
        let checksum = u32::from_le_bytes(*entry.first_chunk()?);
        if checksum != crc32(&entry[4..]) {
            return None;
        }
        let number = |at: usize| Some(u64::from_le_bytes(*entry.get(at..)?.first_chunk()?));
        let (a, b) = (number(8)?, number(16)?);
        let token = Token(*entry.get(16..)?.first_chunk()?);
        Some(match u32::from_le_bytes(*entry.get(4..)?.first_chunk()?) {
            1 => Self::InFlight(a, b),
            2 => Self::Settled(a, b),
            3 => Self::Taking(a, token),
            4 => Self::NotTaken(a, token),
            5 => Self::Boot(a),
            6 => Self::Quiet,
            7 => Self::Renewed(a, b),
            8 => Self::Free(a),
            _ => return None,
        })
    }
}

fn read_content(path: &Path, ranges_max: usize) -> Result<Content, LockError> {
    let mut bytes = Vec::new();
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Content::default()),
        Err(source) => return Err(failed("open", path, source)),
    };
    let read = file.take(RECORD_BYTES_SANE).read_to_end(&mut bytes);
    read.map_err(|source| failed("read", path, source))?;
    Content::parse(&bytes, ranges_max).ok_or_else(|| {
        // Guessing "nothing was in flight" could cost data.
        failed(
            "read",
            path,
            io::Error::new(io::ErrorKind::InvalidData, "not a record of sprat"),
        )
    })
}

/// Replaces the record by one that says only what still counts.
fn rewrite(path: &Path, content: &Content) -> Result<(File, u64), LockError> {
    let fresh = path.with_extension("record.new");
    let write = || {
        let mut file = open_private(&fresh)?;
        let bytes = content.encode();
        file.set_len(0)?;
        file.write_all(&bytes)?;
        file.sync_data()?;
        std::fs::rename(&fresh, path)?;
        // Where fdatasync of the file leaves its name behind: ext4's, behind each entry, brings it along.
        if let Some(folder) = path.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok((file, bytes.len() as u64))
    };
    write().map_err(|source| failed("rewrite", path, source))
}

/// The lock file, to be read only; where there is none, no session of this host can have it.
fn open_existing(path: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    match File::options().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => in_memory(&[]).map(|made| made.0),
        opened => opened,
    }
}

fn in_memory(bytes: &[u8]) -> io::Result<(File, u64)> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("sprat-record", flags)?);
    file.write_all(bytes)?;
    Ok((file, bytes.len() as u64))
}

fn open_private(path: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
}

fn failed(op: &'static str, path: &Path, source: io::Error) -> LockError {
    LockError::Record {
        op,
        path: path.to_owned(),
        source,
    }
}

/// A number that differs from one start of the machine to the next (proc(5)); 0 if unknown.
fn boot_id() -> u64 {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits: String = id
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(16)
        .collect();
    u64::from_str_radix(&digits, 16).unwrap_or(0)
}

#[cfg(test)]
mod tests;
