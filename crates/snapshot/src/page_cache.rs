//! Reads files as far as the kernel has their content in memory, so that nothing is read from the volume. The holes of a
//! file are read, too.

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
        let has = |range| is_cached(file, range).unwrap_or(false);
        has(range.clone()) || content_of(file, range).is_some_and(|mut parts| parts.all(has))
    }

    /// Reads what [`has`](Self::has) has found. `None`: the kernel has dropped some of it since, or nothing is
    /// there. Sets the position of the file.
    pub(crate) fn read(file: &File, at: u64, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            let mut parts = [IoSliceMut::new(buffer)];
            match preadv2(file, &mut parts, at, ReadWriteFlags::NOWAIT) {
                Ok(0) => return Ok(None),
                Err(Errno::AGAIN) => return read_hole(file, at, buffer),
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

/// The parts of the range that are no holes, from multiples of the page size on. `None`: the file is one without holes.
fn content_of(file: &File, range: Range<u64>) -> Option<impl Iterator<Item = Range<u64>>> {
    let first_hole = seek(file, SeekFrom::Hole(range.start)).ok()?;
    if first_hole >= range.end {
        return None;
    }
    let page = rustix::param::page_size() as u64;
    let mut at = range.start;
    Some(std::iter::from_fn(move || {
        // After the last content there is none to find.
        let begin = seek(file, SeekFrom::Data(at)).ok()?;
        let end = seek(file, SeekFrom::Hole(begin)).ok()?.min(range.end);
        at = end;
        (begin < end).then_some(begin / page * page..end)
    }))
}

/// Reads a hole, in which there is nothing to read from the volume. It is read nevertheless, so the result is right even
/// if content has been written there. `None`: there is no hole at this place.
fn read_hole(file: &File, at: u64, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    let content = match seek(file, SeekFrom::Data(at)) {
        Ok(content) => content,
        Err(Errno::NXIO) => u64::MAX,
        Err(error) => return Err(error.into()),
    };
    let most = usize::try_from(content - at).unwrap_or(usize::MAX);
    let most = most.min(buffer.len());
    let read = std::os::unix::fs::FileExt::read_at(file, &mut buffer[..most], at)?;
    Ok((read > 0).then_some(read))
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
    fn holes_are_read_and_need_no_memory() {
        let page = rustix::param::page_size();
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        let bytes = 40 * page as u64;
        file.set_len(bytes).unwrap();
        file.write_all_at(&vec![7; page], 10 * page as u64).unwrap();
        file.write_all_at(&vec![8; page + 5], 20 * page as u64)
            .unwrap();
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
        assert!(cache.has(&file, 30 * page as u64..bytes));
        file.write_all_at(&[9], 35 * page as u64).unwrap();
        assert!(!cache.has(&file, 0..bytes));
        let mut content = vec![1; 40 * page];
        let mut at = 0;
        while at < content.len() {
            at += PageCache::read(&file, at as u64, &mut content[at..])
                .unwrap()
                .unwrap();
        }
        let mut right = vec![0; 40 * page];
        right[10 * page..11 * page].fill(7);
        right[20 * page..21 * page + 5].fill(8);
        right[35 * page] = 9;
        assert!(content == right);
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
