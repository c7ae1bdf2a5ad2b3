//! One generation on the disk: the folder `g.N` of a container, and its log.
//!
//! | file | is |
//! | --- | --- |
//! | `g.N/head` | lines of text: length, times, why it was begun |
//! | `g.N/map` | the blocks that had data; all others were holes |
//! | `g.N/bits` | a bit a block: its old content is saved. In the page cache only, never synced |
//! | `g.N/tail` | boot id, the log's durable length and its entries, for all processes of this boot; never synced |
//! | `g.N/index` | after sealing: the entries, sorted |
//! | `g.N/image` | of a clone: the container as it was; its log stays empty |
//! | `logs/N` | the blocks' old contents |
//!
//! A generation with an image is a clone. States are read through logs up to the first image. Of a clone, bits and index
//! only say what was overwritten while it was the newest: for the quota and the alarm.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::OFlags;

use crate::disk::{
    self, bad, field, folder_in, list_in, number, open_in, read_padded, sync_folder,
};
use crate::index::{self, Index, Writer};
use crate::log::{self, Entry, LogId};
use crate::ranges::{self, BLOCK, Blocks};
use crate::state::Locks;

const TAIL_BYTES: usize = 32;
/// So many bits are read at once.
const PAGE_BYTES: usize = 4096;
const PAGE_BLOCKS: u64 = PAGE_BYTES as u64 * 8;
/// Behind the tail is the number of entries in the log. It may be lost with the tail: it only says when to stop.
const ENTRIES_AT: u64 = 32;
/// A longer log takes too much memory and time to read: the next generation begins. Blocks of zeros have entries only.
const LOG_BYTES_MAX: u64 = 1 << 30;
const LOG_ENTRIES_MAX: u64 = 1 << 18;
/// A tail that is being written is read again.
const TAIL_ATTEMPTS: u32 = 1000;
pub const IMAGE: &str = "image";
/// A folder with an image of the container as the last session left it: for a generation that begins with that state.
/// Gone, durably, before the first write of the next session.
pub const LEFT_CLONE: &str = "left.clone";
/// The same while it is made, under the lock `tidy`.
pub const HALF_CLONE: &str = "half.clone";
/// A generation while it is made, under `gate`.
pub const NEW: &str = "new";
/// Where an entry of a clone's index lies. What it leads to by mistake can't be read.
const NOWHERE: u32 = u32::MAX;
/// So many blocks of a clone are looked up at once.
const BITS_AT_ONCE: usize = 1 << 16;

/// What the file `head` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// The log's random number.
    pub secret: u64,
    /// The container's length then.
    pub length: u64,
    /// When the state came about: the time of its last write, by the server's clock.
    pub state_s: i64,
    pub state_ns: i64,
    /// When the generation was begun: the first write after that.
    pub begun_s: i64,
    /// Begin by the counted clock.
    pub counted_s: i64,
    /// The state's place in the calendar of buckets.
    pub bucket_s: i64,
    /// How long the state stood, from its last write to the next one.
    pub stood_s: i64,
    /// The client said so at the end of its session: a file system in it needs no repair.
    pub clean: bool,
    /// It has an image.
    pub clone: bool,
    /// `first`, `session`, `secret`, `day`, `size`, `restart` or `written-past`.
    pub reason: String,
    /// The name of the past state, as the client sees it.
    pub name: String,
}

impl Head {
    pub fn to_text(&self) -> String {
        let text = format!(
            "secret {:016x}\nlength {}\nstate {}\nstate-ns {}\nbegun {}\ncounted {}\nbucket {}\nstood {}\n\
             clean {}\nclone {}\nreason {}\nname {}\nversion {}\n",
            self.secret,
            self.length,
            self.state_s,
            self.state_ns,
            self.begun_s,
            self.counted_s,
            self.bucket_s,
            self.stood_s,
            self.clean,
            self.clone,
            self.reason,
            self.name,
            env!("CARGO_PKG_VERSION"),
        );
        format!("{text}crc {:08x}\n", crc32fast::hash(text.as_bytes()))
    }

    pub fn parse(text: &str) -> Option<Self> {
        let (rest, crc) = text.strip_suffix('\n')?.rsplit_once("crc ")?;
        (crc == format!("{:08x}", crc32fast::hash(rest.as_bytes()))).then_some(())?;
        let name = field(text, "name")?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-.".contains(&b);
        if name.is_empty() || !name.bytes().all(plain) {
            return None;
        }
        Some(Self {
            secret: u64::from_str_radix(field(text, "secret")?, 16).ok()?,
            length: number(text, "length")?,
            state_s: number(text, "state")?,
            state_ns: number(text, "state-ns")?,
            begun_s: number(text, "begun")?,
            counted_s: number(text, "counted")?,
            bucket_s: number(text, "bucket")?,
            stood_s: number(text, "stood")?,
            clean: number(text, "clean")?,
            clone: number(text, "clone")?,
            reason: field(text, "reason")?.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// The numbers of the generations in a container's folder, ascending.
pub fn numbers(container: impl AsFd) -> io::Result<Vec<u32>> {
    let names = list_in(container)?;
    let mut found: Vec<u32> = names
        .iter()
        .filter_map(|name| name.strip_prefix("g.")?.parse().ok())
        .collect();
    found.sort_unstable();
    Ok(found)
}

/// A generation's folder.
pub fn folder(container: impl AsFd, number: u32) -> io::Result<OwnedFd> {
    folder_in(container, &format!("g.{number}"))
}

pub fn read_head(folder: impl AsFd) -> io::Result<Head> {
    let bytes = disk::read_all(folder, "head", 4096)?;
    Head::parse(&String::from_utf8_lossy(&bytes))
        .ok_or_else(|| bad("a generation's head is damaged"))
}

pub fn read_map(folder: impl AsFd) -> io::Result<Blocks> {
    ranges::from_bytes(&disk::read_all(folder, "map", ranges::MAP_BYTES_MAX)?)
}

/// The image of a generation. `None`: it has a log.
pub fn open_image(container: impl AsFd, number: u32) -> io::Result<Option<File>> {
    disk::if_there(open_in(folder(container, number)?, IMAGE, OFlags::RDONLY))
}

pub fn is_clone(container: impl AsFd, number: u32) -> io::Result<bool> {
    disk::exists_in(container, &format!("g.{number}/{IMAGE}"))
}

/// How many blocks were overwritten while the clone in this folder was the newest.
pub fn blocks_of_clone(folder: impl AsFd) -> io::Result<u64> {
    if let Some(index) = disk::if_there(open_in(&folder, "index", OFlags::RDONLY))? {
        return Ok(disk::if_whole(Index::open(index))?.map_or(0, |index| index.entries));
    }
    let tail = disk::if_there(open_in(&folder, "tail", OFlags::RDONLY))?;
    tail.map_or(Ok(0), |tail| entries_in(&tail))
}

/// Opens the log of any generation.
pub fn open_log(container: impl AsFd, number: u32) -> io::Result<File> {
    open_in(
        folder_in(container, "logs")?,
        &number.to_string(),
        OFlags::RDWR,
    )
}

/// Makes the generation `number` of the state that the container has now. It is whole or not there. A clone has the
/// image that the last session left, or a new one of `clones`.
pub fn make(
    container: &OwnedFd,
    number: u32,
    head: &Head,
    map: &Blocks,
    boot: &str,
    clones: &File,
) -> io::Result<()> {
    disk::remove_folder_in(container, NEW)?;
    if head.clone {
        let left = rustix::fs::renameat(container, LEFT_CLONE, container, NEW);
        disk::if_there(left.map_err(io::Error::from))?;
    }
    let new = disk::make_folder_in(container, NEW)?;
    if head.clone && !disk::exists_in(&new, IMAGE)? {
        disk::clone_in(&new, IMAGE, clones)?;
    }
    let write = |name: &str, bytes: &[u8]| {
        let file = open_in(&new, name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
        file.write_all_at(bytes, 0)?;
        file.sync_all()
    };
    write("head", head.to_text().as_bytes())?;
    write("map", &ranges::to_bytes(map))?;
    write("tail", &tail_bytes(boot, 0))?;
    let bits = open_in(&new, "bits", OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?;
    bits.set_len(head.length.div_ceil(BLOCK).div_ceil(8))?;
    let logs = disk::make_folder_in(container, "logs")?;
    let log = open_in(
        &logs,
        &number.to_string(),
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC,
    )?;
    log.sync_all()?;
    sync_folder(&logs)?;
    sync_folder(&new)?;
    disk::rename_new(container, NEW, container, &format!("g.{number}"))?;
    sync_folder(container)
}

/// What stands for a boot in a tail after which nothing may be saved any more: a sync failed.
const FAILED: &str = "0";

/// The length in the bytes of a tail. `None`: they are not whole.
fn tail_in(bytes: &[u8; TAIL_BYTES]) -> Option<u64> {
    let tail = disk::u64_at(bytes, 16);
    (disk::u64_at(bytes, 24) == !tail).then_some(tail)
}

fn tail_bytes(boot: &str, tail: u64) -> [u8; TAIL_BYTES] {
    let mut bytes = [0; TAIL_BYTES];
    let id = u128::from_str_radix(boot, 16).unwrap_or(0);
    bytes[..16].copy_from_slice(&id.to_le_bytes());
    bytes[16..24].copy_from_slice(&tail.to_le_bytes());
    bytes[24..].copy_from_slice(&(!tail).to_le_bytes());
    bytes
}

/// The newest generation, to which old contents are saved.
#[derive(Debug)]
pub struct Newest {
    pub number: u32,
    pub head: Head,
    pub map: Blocks,
    log: File,
    bits: File,
    tail: File,
    /// After [`Newest::go_on`] the tail that others see.
    shown_tail: Option<File>,
    boot: String,
}

impl Newest {
    /// `map` and `head` must be readable: else the generation takes nothing any more.
    pub fn open(container: &OwnedFd, number: u32, boot: &str) -> io::Result<Self> {
        let folder = folder(container, number)?;
        Ok(Self {
            number,
            head: read_head(&folder)?,
            map: read_map(&folder)?,
            log: open_log(container, number)?,
            bits: open_in(&folder, "bits", OFlags::RDWR)?,
            tail: open_in(&folder, "tail", OFlags::RDWR)?,
            shown_tail: None,
            boot: boot.to_owned(),
        })
    }

    fn id(&self) -> LogId {
        LogId {
            number: self.number,
            secret: self.head.secret,
        }
    }

    /// The log's durable length. `None`: bits and tail are of another boot, or a sync failed; nothing
    /// may be saved here any more.
    pub fn tail(&self) -> io::Result<Option<u64>> {
        for _ in 0..TAIL_ATTEMPTS {
            let mut bytes = [0; TAIL_BYTES];
            read_padded(&self.tail, &mut bytes, 0)?;
            if let Some(tail) = tail_in(&bytes) {
                return Ok((bytes == tail_bytes(&self.boot, tail)).then_some(tail));
            }
        }
        Ok(None)
    }

    fn add_entries(&self, more: u64) -> io::Result<()> {
        let entries = entries_in(&self.tail)?.saturating_add(more);
        self.tail.write_all_at(&entries.to_le_bytes(), ENTRIES_AT)
    }

    /// Whether the log is so long that the next generation begins.
    pub fn is_full(&self) -> io::Result<bool> {
        let is_long = self.tail()?.is_some_and(|tail| tail >= LOG_BYTES_MAX);
        Ok(!self.head.clone && (is_long || entries_in(&self.tail)? >= LOG_ENTRIES_MAX))
    }

    /// Whether nothing was ever saved here. A disk that dropped out may have lost the tail, and the time of the
    /// container's last write, but no record. Of a clone nobody knows.
    pub fn is_unused(&self) -> io::Result<bool> {
        let is_empty = self.tail()? == Some(0) && self.log.metadata()?.size() == 0;
        Ok(is_empty && !self.head.clone)
    }

    /// The blocks of `wanted` that had data when the generation began and are not saved yet.
    pub fn unsaved(&self, wanted: &[Range<u64>]) -> io::Result<Blocks> {
        unsaved_in(&self.bits, &ranges::both(&self.map, wanted))
    }

    /// The blocks of the map that are not in `data` any more though nobody saved them. They stay in the
    /// next map: a block leaves the maps only when its old content is saved.
    pub fn still_mapped(&self, data: &[Range<u64>]) -> io::Result<Blocks> {
        let gone = ranges::without(&self.map, data);
        if self.tail()?.is_none() {
            return Ok(gone);
        }
        unsaved_in(&self.bits, &gone)
    }

    /// Saves the content of `blocks` of the container. Durable when it returns. Only under the lock
    /// `save`, and only for blocks that [`Newest::unsaved`] found under it. A clone has them already, and counts them.
    pub fn save(&self, container: &File, blocks: &[Range<u64>]) -> io::Result<()> {
        let Some(mut tail) = self.tail()? else {
            return Err(bad("this generation takes nothing any more"));
        };
        if self.head.clone {
            self.add_entries(ranges::count(blocks))?;
            return self.set_bits(blocks);
        }
        let mut pending = blocks.iter().cloned().flatten();
        loop {
            let numbers: Vec<u64> = pending.by_ref().take(log::ENTRIES_MAX).collect();
            if numbers.is_empty() {
                return Ok(());
            }
            let mut contents = vec![0; numbers.len() * 4096];
            let mut rest = &mut contents[..];
            for run in numbers.chunk_by(|a, b| a + 1 == *b) {
                let (part, later) = rest.split_at_mut(run.len() * 4096);
                read_padded(container, part, run[0] * BLOCK)?;
                rest = later;
            }
            let list: Vec<(u64, &[u8])> = numbers
                .iter()
                .copied()
                .zip(contents.chunks_exact(4096))
                .collect();
            let record = log::record(self.id(), tail, &list);
            if let Err(error) = self.log.write_all_at(&record, tail) {
                self.log.set_len(tail)?;
                return Err(error);
            }
            // Each one is durable before the next one: so only the last one can be torn, and readers who have
            // found a whole one never see it go.
            let end = tail + record.len() as u64;
            self.commit(tail, end, numbers.len())?;
            tail = end;
            self.set_bits(&ranges::of(&numbers))?;
        }
    }

    /// Makes the log up to `tail` durable. After a failure nothing is ever saved here again: the kernel
    /// reports a failed write once, and a second sync would succeed without the data.
    fn commit(&self, begun_at: u64, tail: u64, more_entries: usize) -> io::Result<()> {
        if let Err(error) = self.log.sync_data() {
            for tail in self.shown_tail.iter().chain([&self.tail]) {
                tail.write_all_at(&tail_bytes(FAILED, begun_at), 0)?;
            }
            return Err(error);
        }
        self.add_entries(more_entries as u64)?;
        self.tail.write_all_at(&tail_bytes(&self.boot, tail), 0)
    }

    /// Takes over what a killed process left behind the tail: whole records count, a torn end is cut off.
    /// Only under the lock `save`.
    pub fn take_over(&self) -> io::Result<()> {
        let Some(tail) = self.tail()? else {
            return Ok(());
        };
        if self.log.metadata()?.size() > tail {
            let (read, blocks) = self.read_log(tail, tail)?;
            self.take(tail, &read, &blocks)?;
        }
        Ok(())
    }

    /// What was saved from the offset `from` on.
    fn read_log(&self, from: u64, tail: u64) -> io::Result<(log::Read, Vec<u64>)> {
        let mut blocks = Vec::new();
        let read = log::read(&self.log, self.id(), from, tail, &mut |entry| {
            blocks.push(entry.block);
            Ok(())
        })?;
        Ok((read, blocks))
    }

    fn take(&self, from: u64, read: &log::Read, blocks: &[u64]) -> io::Result<()> {
        if read.end < self.log.metadata()?.size() {
            self.log.set_len(read.end)?;
        }
        self.commit(from, read.end, blocks.len())?;
        self.set_bits(&ranges::of(blocks))
    }

    /// Goes on with a generation of an earlier boot, in this process only, which has refused all others: the log
    /// says what is saved. For others the generation takes nothing any more. Changes nothing where a sync failed or a
    /// record is damaged.
    pub fn go_on(&mut self, container: &OwnedFd) -> io::Result<()> {
        let mut bytes = [0; TAIL_BYTES];
        read_padded(&self.tail, &mut bytes, 0)?;
        let Some(tail) = tail_in(&bytes).filter(|tail| bytes != tail_bytes(FAILED, *tail)) else {
            return Ok(());
        };
        let (read, blocks) = self.read_log(0, tail)?;
        if read.damaged {
            return Ok(());
        }
        self.bits = index::scratch(container)?;
        let own = index::scratch(container)?;
        self.shown_tail = Some(std::mem::replace(&mut self.tail, own));
        self.take(0, &read, &blocks)
    }

    fn set_bits(&self, blocks: &[Range<u64>]) -> io::Result<()> {
        for parts in ranges::parts(blocks, PAGE_BLOCKS) {
            let (start, end) = (parts[0].start / 8, parts[parts.len() - 1].end.div_ceil(8));
            let mut bytes = [0; PAGE_BYTES];
            let bytes = &mut bytes[..usize::try_from(end - start).unwrap_or(PAGE_BYTES)];
            read_padded(&self.bits, bytes, start)?;
            for block in parts.into_iter().flatten() {
                bytes[usize::try_from(block / 8 - start).unwrap_or(0)] |= 1 << (block % 8);
            }
            self.bits.write_all_at(bytes, start)?;
        }
        Ok(())
    }
}

/// The number of entries behind a tail.
fn entries_in(tail: &File) -> io::Result<u64> {
    let mut bytes = [0; 8];
    read_padded(tail, &mut bytes, ENTRIES_AT)?;
    Ok(u64::from_le_bytes(bytes))
}

fn unsaved_in(bits: &File, wanted: &[Range<u64>]) -> io::Result<Blocks> {
    let mut found: Blocks = Vec::new();
    let mut bytes = [0; PAGE_BYTES];
    for parts in ranges::parts(wanted, PAGE_BLOCKS) {
        let (start, end) = (parts[0].start / 8, parts[parts.len() - 1].end.div_ceil(8));
        let len = usize::try_from(end - start).unwrap_or(PAGE_BYTES);
        read_padded(bits, &mut bytes[..len], start)?;
        for block in parts.into_iter().flatten() {
            let byte = bytes[usize::try_from(block / 8 - start).unwrap_or(0)];
            if byte >> (block % 8) & 1 == 0 {
                match found.last_mut() {
                    Some(last) if last.end == block => last.end = block + 1,
                    _ => found.push(block..block + 1),
                }
            }
        }
    }
    Ok(found)
}

/// Entries of a log that are in memory; more are in a file.
const IN_MEMORY_MAX: usize = 8192;
/// Files with entries of a log; more are merged into one.
const RUNS_MAX: usize = 4;

/// The entries of a log that are known so far: the first of a block counts.
#[derive(Debug)]
pub struct Layer {
    pub number: u32,
    log: File,
    secret: u64,
    tail: File,
    read_to: u64,
    /// In files, the oldest first; what came since is in `entries`.
    runs: Vec<Index>,
    entries: HashMap<u64, Entry>,
    pub damaged: bool,
}

impl Layer {
    /// Without a readable head the log's records are lost: anything may have been saved.
    pub fn open(container: &OwnedFd, number: u32) -> io::Result<Self> {
        let folder = folder(container, number)?;
        let head = disk::if_whole(read_head(&folder))?;
        // A clone whose image is lost: nobody knows what was overwritten.
        let secret = head.filter(|head| !head.clone).map(|head| head.secret);
        let mut layer = Self {
            number,
            log: open_log(container, number)?,
            secret: secret.unwrap_or_default(),
            tail: open_in(&folder, "tail", OFlags::RDWR)?,
            read_to: if secret.is_some() { 0 } else { u64::MAX },
            runs: Vec::new(),
            entries: HashMap::new(),
            damaged: secret.is_none(),
        };
        layer.refresh(container)?;
        Ok(layer)
    }

    /// Reads what was appended since. Returns whether there was anything. `container` is the container's folder.
    /// `NotFound`: the generation is gone, and its log may have holes. The older ones have what it took.
    pub fn refresh(&mut self, container: &OwnedFd) -> io::Result<bool> {
        let mut bytes = [0; TAIL_BYTES];
        read_padded(&self.tail, &mut bytes, 0)?;
        // Another boot's tail is the length of then at most, so all below it was durable all the same.
        let tail = tail_in(&bytes).unwrap_or(0);
        if self.log.metadata()?.size().max(tail) <= self.read_to {
            return Ok(false);
        }
        let (runs, entries) = (&mut self.runs, &mut self.entries);
        let mut sink = |entry: Entry| {
            entries.entry(entry.block).or_insert(entry);
            if entries.len() < IN_MEMORY_MAX {
                return Ok(());
            }
            runs.push(run_of(entries, index::scratch(container)?, false)?);
            entries.clear();
            if runs.len() > RUNS_MAX {
                *runs = vec![index::merge_open(
                    runs,
                    &|_| true,
                    index::scratch(container)?,
                )?];
            }
            Ok(())
        };
        let id = LogId {
            number: self.number,
            secret: self.secret,
        };
        let read = log::read(&self.log, id, self.read_to, tail, &mut sink)?;
        // Holes are punched into a log after its generation is gone: what is still there now was read whole.
        if !disk::exists_in(container, &format!("g.{}", self.number))? {
            return Err(io::ErrorKind::NotFound.into());
        }
        let grown = read.end > self.read_to;
        self.read_to = read.end.max(tail);
        self.damaged |= read.damaged;
        Ok(grown || read.damaged)
    }

    pub fn find(&self, block: u64) -> io::Result<Option<Entry>> {
        for run in &self.runs {
            if let Some(entry) = run.find(block)? {
                return Ok(Some(entry));
            }
        }
        Ok(self.entries.get(&block).copied())
    }

    /// The blocks that were saved.
    pub fn blocks(&self, found: &mut dyn FnMut(u64)) -> io::Result<()> {
        for entry in self.runs.iter().flat_map(Index::iter) {
            found(entry?.block);
        }
        self.entries.keys().copied().for_each(found);
        Ok(())
    }

    /// All entries as an index in `file`.
    fn index(mut self, container: &OwnedFd, file: File) -> io::Result<Index> {
        let scratch = index::scratch(container)?;
        self.runs
            .push(run_of(&self.entries, scratch, self.damaged)?);
        index::merge_open(&self.runs, &|_| true, file)
    }
}

/// Entries in the order of their blocks.
fn run_of(entries: &HashMap<u64, Entry>, file: File, damaged: bool) -> io::Result<Index> {
    let mut sorted: Vec<Entry> = entries.values().copied().collect();
    sorted.sort_unstable_by_key(|entry| entry.block);
    let mut writer = Writer::new(file);
    for entry in sorted {
        writer.push(entry)?;
    }
    writer.finish(damaged)
}

/// Writes the index of a generation that takes nothing any more. Durable when it returns.
pub fn seal(container: &OwnedFd, number: u32) -> io::Result<()> {
    let folder = folder(container, number)?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
    let file = open_in(&folder, "index.tmp", flags)?;
    make_index(container, number, file)?.sync()?;
    rustix::fs::renameat(&folder, "index.tmp", &folder, "index")?;
    sync_folder(&folder)
}

/// Seals all generations but the newest, if nobody else does so.
pub fn seal_all(container: &OwnedFd, locks: &Locks) -> io::Result<()> {
    let Some(_tidy) = locks.tidy.try_exclusive()? else {
        return Ok(());
    };
    seal_all_locked(container)
}

/// The same for a caller that has the lock `tidy`.
pub fn seal_all_locked(container: &OwnedFd) -> io::Result<()> {
    let mut older = numbers(container)?;
    older.pop();
    for number in older {
        if !is_sealed(container, number)? {
            seal(container, number)?;
        }
    }
    Ok(())
}

fn make_index(container: &OwnedFd, number: u32, file: File) -> io::Result<Index> {
    if !is_clone(container, number)? {
        return Layer::open(container, number)?.index(container, file);
    }
    let folder = folder(container, number)?;
    let map = disk::if_whole(read_map(&folder))?.unwrap_or_default();
    let bits = open_in(&folder, "bits", OFlags::RDONLY)?;
    let mut writer = Writer::new(file);
    for range in map {
        for start in range.clone().step_by(BITS_AT_ONCE) {
            let piece = start..range.end.min(start + BITS_AT_ONCE as u64);
            let piece = std::slice::from_ref(&piece);
            let saved = ranges::without(piece, &unsaved_in(&bits, piece)?);
            for block in saved.into_iter().flatten() {
                writer.push(Entry {
                    block,
                    log: number,
                    place: NOWHERE,
                    crc: 0,
                })?;
            }
        }
    }
    writer.finish(false)
}

/// The index of a sealed generation.
pub fn open_index(container: &OwnedFd, number: u32) -> io::Result<Index> {
    Index::open(open_in(
        folder(container, number)?,
        "index",
        OFlags::RDONLY,
    )?)
}

/// The index of any generation; where it is not sealed, one that is made for the caller.
pub fn index_of(container: &OwnedFd, number: u32) -> io::Result<Index> {
    if is_sealed(container, number)? {
        open_index(container, number)
    } else {
        make_index(container, number, index::scratch(container)?)
    }
}

/// Whether a generation takes nothing any more, or was removed.
pub fn has_ended(container: &OwnedFd, number: u32) -> io::Result<bool> {
    Ok(is_sealed(container, number)? || !disk::exists_in(container, &format!("g.{number}"))?)
}

/// Whether a generation is sealed.
pub fn is_sealed(container: &OwnedFd, number: u32) -> io::Result<bool> {
    disk::exists_in(container, &format!("g.{number}/index"))
}
