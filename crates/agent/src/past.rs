//! Reads a past state of a container: its generation, the later ones, then the container itself.
//!
//! A block's old content lies in the first of the generations, from this one on, that saved it. What none
//! of them saved is unchanged. A generation may begin, and blocks may be saved, at any moment of a read:
//! after reading the container both are checked, and what was saved meanwhile counts.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::OFlags;

use crate::disk::{self, bad, open_in};
use crate::generation::{self, Head, Layer};
use crate::index::{self, Index};
use crate::keeper::seal_all;
use crate::log::{self, Entry};
use crate::ranges::{self, BLOCK, Blocks};
use crate::state::{Locks, changed_outside};

/// Logs that are open at once.
const LOGS_MAX: usize = 16;
/// Generations in memory; when more were begun meanwhile, the view is made again.
const LAYERS_MAX: usize = 4;

/// A past state, for reading.
#[derive(Debug)]
pub struct Past {
    container: OwnedFd,
    number: u32,
    /// The container as it is now.
    live: File,
    pub head: Head,
    pub map: Blocks,
    /// The entries of all sealed generations from this one on.
    view: Index,
    /// The generations behind the view, the oldest first. The last one takes old contents.
    layers: Vec<Layer>,
    logs: VecDeque<(u32, File)>,
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
    let all = list(container)?;
    let mut marked = changed_outside(container, live)?.then_some(u32::MAX);
    for (number, _) in &all {
        if has_mark(container, *number, "written-past")? {
            marked = marked.max(Some(*number));
        }
    }
    let heads = all
        .into_iter()
        .filter_map(|(number, head)| Some((number, head?)));
    Ok(heads
        .map(|(number, head)| {
            let suspect = marked.is_some_and(|marked| number <= marked);
            let stem = head.name.trim_end_matches(".luks");
            let name = if suspect {
                format!("{stem}-suspect.luks")
            } else {
                head.name.clone()
            };
            (number, name, head)
        })
        .collect())
}

/// Whether a generation has this mark.
pub fn has_mark(container: &OwnedFd, number: u32, what: &str) -> io::Result<bool> {
    match disk::if_there(generation::folder(container, number))? {
        Some(folder) => disk::exists_in(folder, what),
        None => Ok(false),
    }
}

/// The view, and the generations behind it. Nothing waits for expiry, which may merge generations meanwhile:
/// an index never changes in place, and an older one leads to the same contents. Only if a generation has
/// gone, the index that took its entries over may have been read before that: then once more.
fn load(container: &OwnedFd, number: u32, map: &Blocks) -> io::Result<(Index, Vec<Layer>)> {
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

fn load_of(container: &OwnedFd, numbers: &[u32], map: &Blocks) -> io::Result<(Index, Vec<Layer>)> {
    let mut sealed = 0;
    while sealed < numbers.len() && generation::is_sealed(container, numbers[sealed])? {
        sealed += 1;
    }
    let open = |n: usize| generation::open_index(container, numbers[n]);
    let scratch = || index::scratch(container);
    let keep = |block| ranges::contains(map, block);
    let view = index::merge(sealed, &open, &keep, &scratch, scratch()?)?;
    let layers = numbers[sealed..]
        .iter()
        .map(|n| Layer::open(container, *n))
        .collect::<io::Result<_>>()?;
    Ok((view, layers))
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
        let (view, layers) = load(container, number, &map)?;
        let container = container.try_clone()?;
        Ok(Self {
            container,
            number,
            live,
            head,
            map,
            view,
            layers,
            logs: VecDeque::new(),
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
        let found = ranges::both(&self.map, &ranges::normal(found));
        let live = crate::keeper::data_blocks(&self.live, self.live.metadata()?.len())?;
        let holes = ranges::without(&live, &self.map);
        Ok(ranges::normal([found, holes].concat()))
    }

    /// Reads at most `len` bytes at `offset`; fewer at the end.
    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        if self.layers.len() > LAYERS_MAX {
            self.reopen()?;
        }
        let left = usize::try_from(self.head.length.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = len.min(left);
        if len == 0 {
            return Ok(Vec::new());
        }
        let blocks = ranges::touched(offset, len as u64);
        let first = blocks.start;
        let place = |block: u64| usize::try_from((block - first) * BLOCK).unwrap_or(usize::MAX);
        let mut bytes = vec![0; place(blocks.end)];
        let (mut saved, mut unsaved) = (Vec::new(), Blocks::new());
        for block in ranges::both(&self.map, &[blocks]).into_iter().flatten() {
            match self.find(block)? {
                Some(entry) => saved.push(entry),
                None => unsaved.push(block..block + 1),
            }
        }
        let unsaved = ranges::normal(unsaved);
        for range in &unsaved {
            let part = &mut bytes[place(range.start)..place(range.end)];
            disk::read_padded(&self.live, part, range.start * BLOCK)?;
        }
        // The writer saves first and overwrites then. So what is not saved now was not overwritten.
        fence(Ordering::SeqCst);
        if !unsaved.is_empty() && self.refresh()? {
            for block in unsaved.into_iter().flatten() {
                saved.extend(self.find(block)?);
            }
        }
        // Read at once where they follow each other. A block of zeros has no data, and its log may have gone.
        let follows = |a: &Entry, b: &Entry| {
            let data_follows = a.place != 0 && a.place.checked_add(1) == Some(b.place);
            a.block + 1 == b.block && a.log == b.log && data_follows
        };
        for run in saved.chunk_by(follows) {
            let at = place(run[0].block);
            let part = &mut bytes[at..at + run.len() * 4096];
            match run[0].place {
                0 => part.fill(0),
                _ => log::contents(self.log(run[0].log)?, run, part)?,
            }
        }
        let skipped = usize::try_from(offset - first * BLOCK).unwrap_or(usize::MAX);
        bytes.truncate(skipped + len);
        Ok(bytes.split_off(skipped))
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
        if self.is_outdated()? {
            self.reopen()?;
            return Ok(true);
        }
        let mut grown = false;
        for layer in &mut self.layers {
            grown |= layer.refresh(&self.container)?;
        }
        while let Some(layer) = disk::if_there(Layer::open(&self.container, self.newest()? + 1))? {
            self.layers.push(layer);
            grown = true;
        }
        // The next generation may have been begun, and removed again.
        if self.is_outdated()? {
            self.reopen()?;
            return Ok(true);
        }
        Ok(grown)
    }

    fn newest(&self) -> io::Result<u32> {
        let newest = self.layers.last().map(|layer| layer.number);
        newest.ok_or_else(|| bad("there is no newest generation"))
    }

    /// Whether generations may have been merged or removed since this one was opened. All but the newest
    /// are sealed before that.
    fn is_outdated(&self) -> io::Result<bool> {
        generation::has_ended(&self.container, self.newest()?)
    }

    fn reopen(&mut self) -> io::Result<()> {
        let (container, live) = (self.container.try_clone()?, self.live.try_clone()?);
        *self = Self::open(&container, live, self.number)?;
        Ok(())
    }

    fn log(&mut self, number: u32) -> io::Result<&File> {
        if let Some(at) = self.logs.iter().position(|(open, _)| *open == number) {
            self.logs.swap(0, at);
        } else {
            if self.logs.len() == LOGS_MAX {
                self.logs.pop_back();
            }
            self.logs
                .push_front((number, generation::open_log(&self.container, number)?));
        }
        Ok(&self.logs[0].1)
    }
}
