//! Reads a past state of a container: its generation, the later ones, then the container itself. The image of a
//! clone takes the container's place for its own state, and for those before it.
//!
//! A block's old content lies in the first of the generations, from this one on, that saved it. What none
//! of them saved is unchanged. A generation may begin, and blocks may be saved, at any moment of a read:
//! after reading the container both are checked, and what was saved meanwhile counts.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::OFlags;

use crate::disk::{self, bad, open_in};
use crate::generation::{self, Head, Layer, seal_all};
use crate::index::{self, Index};
use crate::log::{self, Entry};
use crate::ranges::{self, BLOCK, Blocks};
use crate::state::{Locks, changed_outside};

/// Logs that are open at once, if nobody wants fewer.
const LOGS_MAX: usize = 64;
/// Generations in memory; when more were begun meanwhile, the view is made again.
const LAYERS_MAX: usize = 4;
/// A client that reads on gets its next bytes from what was read at once: 1 MiB.
const AHEAD_BLOCKS: u64 = 256;
/// Of the container, so many blocks that are not needed are read rather than with two calls.
const GAP_BLOCKS: u64 = 16;
/// Blocks that are compared at once.
const COMPARED: usize = 256;

/// A past state, for reading.
#[derive(Debug)]
pub struct Past {
    container: OwnedFd,
    number: u32,
    /// The container as it is now.
    live: File,
    /// The image that takes its place, of the first clone from this generation on.
    image: Option<File>,
    pub head: Head,
    pub map: Blocks,
    /// The entries of all sealed generations from this one on.
    view: Index,
    /// The generations behind the view, the oldest first. The last one takes old contents.
    layers: Vec<Layer>,
    folder_of_logs: OwnedFd,
    logs: VecDeque<(u32, File)>,
    logs_max: usize,
    /// What was read last, from this block on. It never changes.
    ahead: (u64, Vec<u8>),
    /// Where a client that reads on goes on.
    next: u64,
    /// Expiry leaves a generation alone that is being read.
    _reading: File,
}

/// The generations of a container with their heads; those with a damaged head have none.
pub fn list(container: &OwnedFd) -> io::Result<Vec<(u32, Option<Head>)>> {
    let mut found = Vec::new();
    for number in generation::numbers(container)? {
        // If it is gone, it has expired since.
        if let Some(folder) = disk::if_there(generation::folder(container, number))? {
            found.push((number, generation::read_head(folder).ok()));
        }
    }
    Ok(found)
}

/// The past states of a container as the client sees them: number, name, head.
///
/// The container was changed by something else than the agent while the marked generation was the newest
/// one. What was overwritten then is lost, for all states up to this one: their names say so.
pub fn shown(container: &OwnedFd, live: &File) -> io::Result<Vec<(u32, String, Head)>> {
    let mut suspect = changed_outside(container, live)?;
    let mut found = Vec::new();
    for number in generation::numbers(container)?.into_iter().rev() {
        // If it is gone, it has expired since.
        let Some(folder) = disk::if_there(generation::folder(container, number))? else {
            continue;
        };
        suspect |= disk::exists_in(&folder, "written-past")?;
        // What is written to the container does not reach a clone, nor the states that are read from it.
        suspect = suspect && !disk::exists_in(&folder, generation::IMAGE)?;
        let Ok(head) = generation::read_head(&folder) else {
            continue;
        };
        let stem = head.name.trim_end_matches(".luks");
        let name = if suspect {
            format!("{stem}-suspect.luks")
        } else {
            head.name.clone()
        };
        found.push((number, name, head));
    }
    found.reverse();
    Ok(found)
}

/// Whether a generation has this mark.
pub fn has_mark(container: &OwnedFd, number: u32, what: &str) -> io::Result<bool> {
    disk::exists_in(container, &format!("g.{number}/{what}"))
}

/// What a [`Past`] reads from: the view, the generations behind it, the image behind those.
type Loaded = (Index, Vec<Layer>, Option<File>);

/// The view, and the generations behind it. Nothing waits for expiry, which may merge generations meanwhile:
/// an index never changes in place, and an older one leads to the same contents. Only if a generation has
/// gone, the index that took its entries over may have been read before that: then once more.
fn load(container: &OwnedFd, number: u32, map: &Blocks) -> io::Result<Loaded> {
    loop {
        let mut numbers = generation::numbers(container)?;
        numbers.retain(|n| *n >= number);
        if numbers.first() != Some(&number) {
            return Err(io::ErrorKind::NotFound.into());
        }
        match load_of(container, &numbers, map) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let left = generation::numbers(container)?;
                if numbers.iter().all(|n| left.contains(n)) {
                    return Err(error);
                }
            }
            other => return other,
        }
    }
}

fn load_of(container: &OwnedFd, numbers: &[u32], map: &Blocks) -> io::Result<Loaded> {
    let (mut logs, mut sealed, mut image) = (0, 0, None);
    for number in numbers {
        let folder = generation::folder(container, *number)?;
        if disk::exists_in(&folder, generation::IMAGE)? {
            image = Some(open_in(&folder, generation::IMAGE, OFlags::RDONLY)?);
            break;
        }
        let is_sealed = disk::exists_in(&folder, "index")?;
        sealed += usize::from(is_sealed && sealed == logs);
        logs += 1;
    }
    let numbers = &numbers[..logs];
    let open = |n: usize| generation::open_index(container, numbers[n]);
    let scratch = || index::scratch(container);
    let keep = |block| ranges::contains(map, block);
    let view = index::merge(sealed, &open, &keep, &scratch, scratch()?)?;
    let layers = numbers[sealed..]
        .iter()
        .map(|n| Layer::open(container, *n))
        .collect::<io::Result<_>>()?;
    Ok((view, layers, image))
}

impl Past {
    /// Opens the past state that the generation `number` began with.
    pub fn open(container: &OwnedFd, live: File, number: u32) -> io::Result<Self> {
        // What is not sealed can be read, too.
        disk::unless_full(seal_all(container, &Locks::open(container)?))?;
        let folder = generation::folder(container, number)?;
        let reading = open_in(&folder, "head", OFlags::RDONLY)?;
        disk::retry(|| rustix::fs::flock(&reading, rustix::fs::FlockOperation::LockShared))?;
        let (head, map) = (
            generation::read_head(&folder)?,
            generation::read_map(&folder)?,
        );
        let (view, layers, image) = load(container, number, &map)?;
        // A container never becomes shorter.
        let image_len = image.as_ref().map(File::metadata).transpose()?;
        let image_len = image_len.map_or(u64::MAX, |found| found.len());
        if head.clone && !generation::is_clone(container, number)? || image_len < head.length {
            return Err(bad("its image is missing, or too short"));
        }
        let container = container.try_clone()?;
        Ok(Self {
            number,
            live,
            image,
            head,
            map,
            view,
            layers,
            folder_of_logs: disk::folder_in(&container, "logs")?,
            logs: VecDeque::new(),
            logs_max: LOGS_MAX,
            ahead: (0, Vec::new()),
            next: 0,
            container,
            _reading: reading,
        })
    }

    /// The blocks that differ from the container, or may: what was saved since, and what was a hole.
    pub fn changed(&self) -> io::Result<Blocks> {
        let mut found = Blocks::new();
        let mut add = |block| match found.last_mut() {
            Some(last) if last.end == block => last.end += 1,
            _ => found.push(block..block + 1),
        };
        for entry in self.view.iter() {
            add(entry?.block);
        }
        for layer in &self.layers {
            layer.blocks(&mut add)?;
        }
        if let Some(image) = &self.image {
            self.differing(image, &mut add)?;
        }
        let found = ranges::both(&self.map, &ranges::normal(found));
        let live = crate::holes::data_blocks(&self.live, self.live.metadata()?.len())?;
        let holes = ranges::without(&live, &self.map);
        Ok(ranges::normal([found, holes].concat()))
    }

    /// Finds the blocks of the map that an image and the container don't have in common.
    fn differing(&self, image: &File, found: &mut dyn FnMut(u64)) -> io::Result<()> {
        let mut buffers = [vec![0; COMPARED * 4096], vec![0; COMPARED * 4096]];
        for range in &self.map {
            for start in (range.start..range.end).step_by(COMPARED) {
                for (file, buffer) in [image, &self.live].into_iter().zip(&mut buffers) {
                    disk::read_padded(file, buffer, start * BLOCK)?;
                }
                let pairs = buffers[0].chunks(4096).zip(buffers[1].chunks(4096));
                (start..range.end.min(start + COMPARED as u64))
                    .zip(pairs)
                    .filter(|(_, (old, new))| old != new)
                    .for_each(|(block, _)| found(block));
            }
        }
        Ok(())
    }

    /// Reads at most `len` bytes at `offset`; fewer at the end.
    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<&[u8]> {
        let left = usize::try_from(self.head.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = len.min(left);
        let blocks = ranges::touched(offset, len as u64);
        let known = self.ahead.0..self.ahead.0 + self.ahead.1.len() as u64 / BLOCK;
        let goes_on = offset == self.next;
        self.next = offset.saturating_add(len as u64);
        if !goes_on || blocks.start < known.start || blocks.end > known.end {
            let mut bytes = None;
            if goes_on {
                let end = self.head.length.div_ceil(BLOCK);
                let end = blocks.end.max(end.min(blocks.start + AHEAD_BLOCKS));
                // Damage behind what the client asked for is no error yet.
                bytes = self.contents(blocks.start..end).ok();
            }
            let bytes = bytes.map_or_else(|| self.contents(blocks.clone()), Ok)?;
            self.ahead = (blocks.start, bytes);
        }
        let at = offset.saturating_sub(self.ahead.0 * BLOCK);
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        Ok(self.ahead.1.get(at..at.saturating_add(len)).unwrap_or(&[]))
    }

    /// The contents of some blocks.
    fn contents(&mut self, blocks: Range<u64>) -> io::Result<Vec<u8>> {
        if self.layers.len() > LAYERS_MAX {
            self.reopen()?;
        }
        let first = blocks.start;
        let place = |block: u64| usize::try_from((block - first) * BLOCK).unwrap_or(usize::MAX);
        // Of these blocks each one is written below: the memory is used again as it is.
        let mut bytes = std::mem::take(&mut self.ahead.1);
        bytes.resize(place(blocks.end), 0);
        let mapped = ranges::both(&self.map, std::slice::from_ref(&blocks));
        let (mut saved, mut unsaved) = (Vec::new(), Blocks::new());
        for block in mapped.iter().cloned().flatten() {
            match self.find(block)? {
                Some(entry) => saved.push(entry),
                None => unsaved.push(block..block + 1),
            }
        }
        let unsaved = ranges::normal(unsaved);
        for run in unsaved.chunk_by(|a, b| b.start - a.end <= GAP_BLOCKS) {
            let (start, end) = (run[0].start, run[run.len() - 1].end);
            let part = &mut bytes[place(start)..place(end)];
            disk::read_padded(
                self.image.as_ref().unwrap_or(&self.live),
                part,
                start * BLOCK,
            )?;
        }
        // The writer saves first and overwrites then. So what is not saved now was not overwritten.
        fence(Ordering::SeqCst);
        if !unsaved.is_empty() && self.refresh()? {
            // The container is not read any more, and may have been overwritten before it was.
            if self.image.is_some() {
                return self.contents(blocks);
            }
            for block in unsaved.into_iter().flatten() {
                saved.extend(self.find(block)?);
            }
        }
        // Between them were holes, and what was saved.
        for hole in ranges::without(std::slice::from_ref(&blocks), &mapped) {
            bytes[place(hole.start)..place(hole.end)].fill(0);
        }
        // A block of zeros has no data, and its log may have gone.
        for zeros in saved.extract_if(.., |entry| entry.place == 0) {
            bytes[place(zeros.block)..place(zeros.block + 1)].fill(0);
        }
        saved.sort_unstable_by_key(|entry| (entry.log, entry.place));
        let mut rest = &saved[..];
        while !rest.is_empty() {
            let (run, later) = rest.split_at(log::near(rest));
            log::contents(self.log(run[0].log)?, run, &mut |block, content| {
                bytes[place(block)..place(block + 1)].copy_from_slice(content);
            })?;
            rest = later;
        }
        Ok(bytes)
    }

    /// The entry that counts for a block. Where a record is lost nobody knows: an error.
    fn find(&self, block: u64) -> io::Result<Option<Entry>> {
        if let Some(entry) = self.view.find(block)? {
            return Ok(Some(entry));
        }
        let mut damaged = self.view.damaged;
        for layer in &self.layers {
            if damaged {
                break;
            }
            if let Some(entry) = layer.find(block)? {
                return Ok(Some(entry));
            }
            damaged = layer.damaged;
        }
        if damaged {
            Err(bad("a log is damaged; this block may have been in it"))
        } else {
            Ok(None)
        }
    }

    /// Finds what was saved, and which generations were begun, since the last time. Returns whether there
    /// was anything.
    fn refresh(&mut self) -> io::Result<bool> {
        match self.refresh_here() {
            // One of them has expired since.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.reopen().map(|()| true),
            other => other,
        }
    }

    fn refresh_here(&mut self) -> io::Result<bool> {
        // Nothing changes where the container is not read.
        if self.image.is_some() {
            return Ok(false);
        }
        // All of them were sealed while this was opened.
        if self.layers.is_empty() {
            return self.reopen().map(|()| true);
        }
        let mut grown = self.refresh_layers()?;
        // More than one may have been begun, and none of them be sealed yet.
        while let Some(next) = disk::if_there(Layer::open(&self.container, self.newest()? + 1))? {
            if generation::is_clone(&self.container, next.number)? {
                return self.reopen().map(|()| true);
            }
            // Something may have been saved before that one was begun, and again in that one: the older one counts.
            self.refresh_layers()?;
            self.layers.push(next);
            grown = true;
        }
        // The next one may have been merged or removed. This one is sealed, or removed, before that.
        match self.layers.last() {
            Some(newest) if !generation::has_ended(&self.container, newest.number)? => Ok(grown),
            _ => self.reopen().map(|()| true),
        }
    }

    fn refresh_layers(&mut self) -> io::Result<bool> {
        let mut grown = false;
        for layer in &mut self.layers {
            grown |= layer.refresh(&self.container)?;
        }
        Ok(grown)
    }

    fn newest(&self) -> io::Result<u32> {
        let newest = self.layers.last().map(|layer| layer.number);
        newest.ok_or_else(|| bad("there is no newest generation"))
    }

    fn reopen(&mut self) -> io::Result<()> {
        let (container, live) = (self.container.try_clone()?, self.live.try_clone()?);
        let logs_max = self.logs_max;
        *self = Self::open(&container, live, self.number)?;
        self.logs_max = logs_max;
        Ok(())
    }

    /// At most so many logs stay open, at least one.
    pub fn limit_logs(&mut self, most: usize) {
        self.logs_max = most.clamp(1, LOGS_MAX);
        self.logs.truncate(self.logs_max);
    }

    fn log(&mut self, number: u32) -> io::Result<&File> {
        if let Some(at) = self.logs.iter().position(|(open, _)| *open == number) {
            self.logs.swap(0, at);
        } else {
            self.logs.truncate(self.logs_max - 1);
            let file = open_in(&self.folder_of_logs, &number.to_string(), OFlags::RDONLY)?;
            self.logs.push_front((number, file));
        }
        Ok(&self.logs[0].1)
    }
}
