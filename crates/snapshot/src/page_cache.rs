//! Reads files as far as the kernel has their content in memory, so that nothing is read from the volume. Holes are not
//! read: reading them would fill the memory with zeros.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use serde::{Deserialize, Serialize};

/// Whether the page cache has this range of a file. The range begins at a multiple of the page size.
type IsCached = fn(&File, Range<u64>) -> io::Result<bool>;

/// Answers what of a file is in memory. The default: nothing is.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub struct PageCache {
    #[serde(skip)]
    is_cached: Option<IsCached>,
}

impl PageCache {
    /// From now on this function is asked.
    pub fn ask(&mut self, is_cached: IsCached) {
        self.is_cached = Some(is_cached);
    }

    /// Whether all content of the range is in memory. Sets the position of the file.
    pub(crate) fn has(self, file: &File, range: Range<u64>) -> bool {
        let Some(is_cached) = self.is_cached else {
            return false;
        };
        let page = rustix::param::page_size() as u64;
        parts(file, range).all(|part| match part {
            Part::Hole(_) => true,
            Part::Content(range) => {
                let begin = range.start / page * page;
                is_cached(file, begin..range.end).unwrap_or(false)
            }
        })
    }

    /// Reads content that [`has`](Self::has) has found. `None`: the kernel has dropped some of it since, or nothing is
    /// there.
    pub(crate) fn read(file: &File, at: u64, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            let mut parts = [IoSliceMut::new(buffer)];
            match preadv2(file, &mut parts, at, ReadWriteFlags::NOWAIT) {
                Ok(0) | Err(Errno::AGAIN) => return Ok(None),
                Ok(some) => return Ok(Some(some)),
                Err(Errno::INTR) => {}
                // A file system that can only read and wait: what was there a moment ago is most likely there.
                Err(Errno::OPNOTSUPP) => {
                    let read = std::os::unix::fs::FileExt::read_at(file, buffer, at)?;
                    return Ok((read > 0).then_some(read));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// A part of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Part {
    Content(Range<u64>),
    /// Zeros that have no place on the volume.
    Hole(Range<u64>),
}

/// The parts of a range of a file, one after the other. Sets the position of the file.
pub(crate) fn parts(file: &File, range: Range<u64>) -> impl Iterator<Item = Part> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let begin = at;
        if begin >= range.end {
            return None;
        }
        let content = match seek(file, SeekFrom::Data(begin)) {
            Ok(content) => content.clamp(begin, range.end),
            // There is only a hole up to the end of the file.
            Err(Errno::NXIO) => range.end,
            // The file system knows no holes.
            Err(_) => begin,
        };
        if content > begin {
            at = content;
            return Some(Part::Hole(begin..content));
        }
        let hole = seek(file, SeekFrom::Hole(begin)).unwrap_or(range.end);
        at = match hole > begin {
            true => hole.min(range.end),
            false => range.end,
        };
        Some(Part::Content(begin..at))
    })
}

impl fmt::Debug for PageCache {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_struct("PageCache").finish_non_exhaustive()
    }
}

/// How it is asked is no part of what a specification wants.
impl PartialEq for PageCache {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for PageCache {}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn holes_need_no_memory() {
        let page = rustix::param::page_size() as u64;
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        let bytes = 40 * page + 7;
        file.set_len(bytes).unwrap();
        let write = |byte: u8, len: u64, at: u64| {
            let content = vec![byte; usize::try_from(len).unwrap()];
            file.write_all_at(&content, at * page).unwrap();
        };
        write(7, page, 10);
        write(8, page + 5, 20);
        let mut cache = PageCache::default();
        assert!(!cache.has(&file, 0..bytes));
        // In memory is what was written, and only that.
        cache.ask(|_, range| {
            let page = rustix::param::page_size() as u64;
            let written = [10 * page..11 * page, 20 * page..22 * page];
            Ok(written
                .iter()
                .any(|one| one.start <= range.start && range.end <= one.end))
        });
        assert!(cache.has(&file, 0..bytes));
        assert!(cache.has(&file, 20 * page + 9..bytes));
        let found: Vec<Part> = parts(&file, 3..21 * page).collect();
        let (begin, end) = (10 * page, 11 * page);
        assert_eq!(
            found,
            [
                Part::Hole(3..begin),
                Part::Content(begin..end),
                Part::Hole(end..20 * page),
                Part::Content(20 * page..21 * page)
            ]
        );
        assert_eq!(parts(&file, 5..5).count(), 0);
        assert_eq!(
            parts(&file, 22 * page..bytes).collect::<Vec<_>>(),
            [Part::Hole(22 * page..bytes)]
        );
        write(9, 1, 35);
        assert!(!cache.has(&file, 0..bytes));
    }

    #[test]
    fn what_the_kernel_has_dropped_is_not_read() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        file.sync_all().unwrap();
        let read = || PageCache::read(&file, 0, &mut [0; 4096]).unwrap();
        assert_eq!(read(), Some(4096));
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert_eq!(read(), None);
    }
}
