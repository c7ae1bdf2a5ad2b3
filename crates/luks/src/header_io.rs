//! Reads and writes of a header: the source of its bytes, and the steps that change it.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use crate::LuksError;

/// The source of a header's bytes.
#[allow(
    clippy::len_without_is_empty,
    reason = "the length of a file, asked with a chance to fail"
)]
pub trait HeaderRead {
    /// The present length of the file in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Fills `buf` from `offset`, or fails.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

impl HeaderRead for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buf, offset)
    }
}

impl HeaderRead for &[u8] {
    fn len(&self) -> io::Result<u64> {
        Ok(<[u8]>::len(self) as u64)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let part = usize::try_from(offset)
            .ok()
            .and_then(|begin| self.get(begin..begin.checked_add(buf.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(part);
        Ok(())
    }
}

/// Bytes at an offset in the container file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// One step of a change of the header on the server. The steps must be done in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HeaderWrite {
    /// Write this.
    Write(Extent),
    /// Everything before this must be durable (flushed and checked) before anything after it is sent.
    Barrier,
}

/// A sparse file with these extents, as the server would have it after the writes.
pub(crate) struct Written<'a> {
    extents: Vec<&'a Extent>,
    len: u64,
}

impl<'a> Written<'a> {
    pub(crate) fn new(extents: impl IntoIterator<Item = &'a Extent>, len: u64) -> Self {
        Self {
            extents: extents.into_iter().collect(),
            len,
        }
    }

    pub(crate) fn of(writes: &'a [HeaderWrite], len: u64) -> Self {
        let extents = writes.iter().filter_map(|write| match write {
            HeaderWrite::Write(extent) => Some(extent),
            HeaderWrite::Barrier => None,
        });
        Self::new(extents, len)
    }
}

impl HeaderRead for Written<'_> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        let (begin, end) = (offset, offset + buf.len() as u64);
        for extent in &self.extents {
            let extent_end = extent.offset + extent.bytes.len() as u64;
            let (from, to) = (begin.max(extent.offset), end.min(extent_end));
            if from < to {
                let index = |at: u64| usize::try_from(at).expect("inside of a buffer");
                let part = index(from - extent.offset)..index(to - extent.offset);
                buf[index(from - begin)..index(to - begin)].copy_from_slice(&extent.bytes[part]);
            }
        }
        Ok(())
    }
}

/// Fetches a range of the key slots' space. [`LuksError::Truncated`] if the file ends within it.
pub(crate) fn fetch(source: &dyn HeaderRead, area: &Range<u64>) -> Result<Extent, LuksError> {
    let (offset, len) = (area.start, area.end - area.start);
    let failed = |error| LuksError::Read {
        offset,
        len,
        source: error,
    };
    let file_len = source.len().map_err(failed)?;
    if file_len < area.end {
        return Err(LuksError::Truncated {
            file_len,
            needed: area.end,
        });
    }
    let mut bytes = vec![0; usize::try_from(len).expect("bounded when read")];
    source.read_at(offset, &mut bytes).map_err(failed)?;
    Ok(Extent { offset, bytes })
}

/// Fetches a range, as much of it as the file has.
pub(crate) fn fetch_up_to(
    source: &dyn HeaderRead,
    file_len: u64,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, LuksError> {
    let len = len.min(file_len.saturating_sub(offset));
    let mut bytes = vec![0; usize::try_from(len).expect("at most 4 MiB")];
    if !bytes.is_empty() {
        source
            .read_at(offset, &mut bytes)
            .map_err(|error| LuksError::Read {
                offset,
                len,
                source: error,
            })?;
    }
    Ok(bytes)
}
