//! Which blocks of a container have data.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::disk;
use crate::ranges::{self, BLOCK, Blocks};

/// Fewer ranges are found in some milliseconds.
const LEFT_RANGES_MIN: usize = 4096;
const LEFT: &str = "left";

/// The blocks that the file system does not know to be holes.
pub fn data_blocks(file: &File, len: u64) -> io::Result<Blocks> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < len && found.len() <= ranges::RANGES_MAX * 2 {
        let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = rustix::fs::seek(file, SeekFrom::Hole(start))?;
        found.push(start / BLOCK..at.div_ceil(BLOCK));
    }
    if at < len && found.len() > ranges::RANGES_MAX * 2 {
        found.clear();
        found.push(0..len.div_ceil(BLOCK));
    }
    Ok(ranges::normal(found))
}

/// Writes the file `left` at the end of a session, if it saves time when the next one begins. Durable when it returns
/// the checksum.
pub fn store_left(container: &OwnedFd, file: &File) -> io::Result<Option<u32>> {
    let blocks = data_blocks(file, file.metadata()?.len())?;
    if blocks.len() < LEFT_RANGES_MIN {
        disk::remove_in(container, LEFT)?;
        return Ok(None);
    }
    let bytes = ranges::to_bytes(&blocks);
    let stored = disk::unless_full(disk::replace_in(container, LEFT, &bytes))?;
    Ok(stored.map(|()| ranges::crc_of(&bytes)))
}

/// What it says. `None`: it is not the one with this checksum.
pub fn read_left(container: &OwnedFd, crc: u32) -> io::Result<Option<Blocks>> {
    let bytes = disk::if_there(disk::read_all(container, LEFT, ranges::MAP_BYTES_MAX))?;
    match bytes.filter(|bytes| ranges::crc_of(bytes) == crc) {
        Some(bytes) => disk::if_whole(ranges::from_bytes(&bytes)),
        None => Ok(None),
    }
}
