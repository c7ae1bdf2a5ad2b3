//! Reads files as far as the kernel has their content in memory, so that nothing is read from the volume.

use std::fmt;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;

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

    /// Whether all of the range is in memory.
    pub(crate) fn has(self, file: &File, range: Range<u64>) -> bool {
        let asked = self.is_cached.map(|is_cached| is_cached(file, range));
        matches!(asked, Some(Ok(true)))
    }

    /// Reads what [`has`](Self::has) has found. `None`: the kernel has dropped some of it since, or nothing is
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
