//! Which content of files the kernel has in memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use crate::sys;

/// Whether the page cache has this range of a file, so that reading it reads nothing from the device (mincore(2)).
/// The range begins at a multiple of the page size. The answer is that of this moment.
///
/// # Errors
/// The file can't be mapped.
pub fn is_cached(file: &File, range: Range<u64>) -> io::Result<bool> {
    let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
    match len {
        0 => Ok(true),
        len => sys::is_cached(file.as_fd(), range.start, len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn content_is_cached_until_the_kernel_drops_it() {
        let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
        let content = vec![7; 5 * rustix::param::page_size() + 1];
        let bytes = content.len() as u64;
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
        assert!(is_cached(&file, 0..bytes).unwrap());
        assert!(is_cached(&file, 0..0).unwrap());
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(!is_cached(&file, 0..bytes).unwrap());
    }
}
