//! The log of a generation: blocks as they were before their first overwrite.
//!
//! A record is `header | data blocks | the same header again`, all in units of 4,096 bytes. The second
//! header heals damage of the first one, and shows that the record is whole. A header is, little endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..8 | magic |
//! | 8..16 | the log's own random number: no block of a client passes for a header |
//! | 16..24 | the record's offset in the log |
//! | 24..28 | number of entries, at most 250 |
//! | 32.. | entries: `u64 block`, `u32 crc32 of the data`, `u32 place in the record` (0: all zeros, no data) |
//! | 4092..4096 | crc32 of all before |
//!
//! A record is appended only when the one before it is durable. So only the last one can be torn.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::disk::{bad, read_padded};
use crate::ranges::BLOCK;

const MAGIC: &[u8; 8] = b"sprlog1\n";
/// The most blocks of one record: one write of at most 1,008 KiB.
pub const ENTRIES_MAX: usize = 250;
const BLOCK_BYTES: usize = 4096;
const ENTRIES_AT: usize = 32;
const ENTRY_BYTES: usize = 16;
/// From one block to the next one that is read with it.
const GAP_MAX: u32 = 16;

/// Where a block's old content lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    pub block: u64,
    /// The number of the log.
    pub log: u32,
    /// In blocks of the log; 0: the block was all zeros.
    pub place: u32,
    pub crc: u32,
}

/// A log's number and its random number.
#[derive(Debug, Clone, Copy)]
pub struct LogId {
    pub number: u32,
    pub secret: u64,
}

/// The bytes of a record at `offset`: `blocks` are numbers and contents of 4,096 bytes.
pub fn record(id: LogId, offset: u64, blocks: &[(u64, &[u8])]) -> Vec<u8> {
    assert!(
        blocks.len() <= ENTRIES_MAX,
        "a record of {} blocks",
        blocks.len()
    );
    let mut header = [0; BLOCK_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&id.secret.to_le_bytes());
    header[16..24].copy_from_slice(&offset.to_le_bytes());
    let mut data = Vec::with_capacity((blocks.len() + 2) * BLOCK_BYTES);
    data.extend(header);
    let mut place = 0_u32;
    for (index, (block, content)) in blocks.iter().enumerate() {
        let is_zero = content.iter().all(|b| *b == 0);
        if !is_zero {
            place += 1;
            data.extend(*content);
        }
        let entry = &mut header[ENTRIES_AT + index * ENTRY_BYTES..][..ENTRY_BYTES];
        entry[..8].copy_from_slice(&block.to_le_bytes());
        entry[8..12].copy_from_slice(&crc32fast::hash(content).to_le_bytes());
        entry[12..].copy_from_slice(&if is_zero { 0 } else { place }.to_le_bytes());
    }
    let count = u32::try_from(blocks.len()).unwrap_or(0);
    header[24..28].copy_from_slice(&count.to_le_bytes());
    let crc = crc32fast::hash(&header[..BLOCK_BYTES - 4]);
    header[BLOCK_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    data[..BLOCK_BYTES].copy_from_slice(&header);
    data.extend(header);
    data
}

/// A record's header as it was read.
struct Header {
    offset: u64,
    entries: Vec<Entry>,
    data_blocks: u64,
}

impl Header {
    fn end(&self) -> u64 {
        self.offset + (self.data_blocks + 2) * BLOCK
    }
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4]
        .iter()
        .rev()
        .fold(0, |all, b| all << 8 | u32::from(*b))
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8]
        .iter()
        .rev()
        .fold(0, |all, b| all << 8 | u64::from(*b))
}

fn parse_header(id: LogId, bytes: &[u8; BLOCK_BYTES]) -> Option<Header> {
    let count = usize::try_from(u32_at(bytes, 24)).ok()?;
    let whole = bytes[..8] == *MAGIC
        && u64_at(bytes, 8) == id.secret
        && u32_at(bytes, BLOCK_BYTES - 4) == crc32fast::hash(&bytes[..BLOCK_BYTES - 4]);
    if !whole || count > ENTRIES_MAX {
        return None;
    }
    let offset = u64_at(bytes, 16);
    let first_block = u32::try_from(offset / BLOCK).ok()?;
    let mut entries = Vec::with_capacity(count);
    let mut data_blocks = 0;
    for entry in bytes[ENTRIES_AT..].chunks_exact(ENTRY_BYTES).take(count) {
        let place = u32_at(entry, 12);
        data_blocks = data_blocks.max(u64::from(place));
        let place = if place == 0 {
            0
        } else {
            first_block.checked_add(place)?
        };
        entries.push(Entry {
            block: u64_at(entry, 0),
            log: id.number,
            place,
            crc: u32_at(entry, 8),
        });
    }
    Some(Header {
        offset,
        entries,
        data_blocks,
    })
}

fn header_at(log: &File, id: LogId, at: u64) -> io::Result<Option<Header>> {
    let mut bytes = [0; BLOCK_BYTES];
    read_padded(log, &mut bytes, at)?;
    Ok(parse_header(id, &bytes))
}

/// The header of the record at `at`, from its second copy if the first one is damaged.
fn find_header(log: &File, id: LogId, at: u64, len: u64) -> io::Result<Option<Header>> {
    if let Some(header) = header_at(log, id, at)? {
        return Ok((header.offset == at).then_some(header));
    }
    scan(log, id, at, len, |found, place| {
        found.offset == at && place + BLOCK == found.end()
    })
}

/// The first header behind `at`, within the length of a record, that fits.
fn scan(
    log: &File,
    id: LogId,
    at: u64,
    len: u64,
    fits: impl Fn(&Header, u64) -> bool,
) -> io::Result<Option<Header>> {
    for step in 1..=ENTRIES_MAX as u64 + 2 {
        let place = at + step * BLOCK;
        if place + BLOCK > len {
            break;
        }
        if let Some(found) = header_at(log, id, place)?.filter(|found| fits(found, place)) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// Whether all of a record is there as it was written.
fn is_whole(log: &File, id: LogId, header: &Header) -> io::Result<bool> {
    match header_at(log, id, header.end() - BLOCK)? {
        Some(copy) if copy.offset == header.offset => {}
        _ => return Ok(false),
    }
    let mut data = [0; BLOCK_BYTES];
    for entry in header.entries.iter().filter(|entry| entry.place != 0) {
        read_padded(log, &mut data, u64::from(entry.place) * BLOCK)?;
        if crc32fast::hash(&data) != entry.crc {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What [`read`] found.
#[derive(Debug, PartialEq, Eq)]
pub struct Read {
    /// Behind the last record.
    pub end: u64,
    /// A record is lost: what is not among the entries may be in it.
    pub damaged: bool,
}

/// Reads the records from `from` on. All below `tail` was durable: what is missing there is damage.
/// Behind `tail` a record counts if all of it is there; a torn one ends the log.
pub fn read(
    log: &File,
    id: LogId,
    from: u64,
    tail: u64,
    found: &mut dyn FnMut(Entry) -> io::Result<()>,
) -> io::Result<Read> {
    let len = log.metadata()?.len();
    let mut at = from;
    let mut damaged = false;
    while at + 2 * BLOCK <= len {
        let header = find_header(log, id, at, len)?.filter(|header| header.end() <= len);
        match header {
            Some(header) if at < tail || is_whole(log, id, &header)? => {
                at = header.end();
                header.entries.into_iter().try_for_each(&mut *found)?;
            }
            // Nothing is appended behind a torn record. So a record that follows shows damage: of this
            // one's data, or of both its headers.
            header => match (
                header,
                scan(log, id, at, len, |next, place| next.offset == place)?,
            ) {
                (Some(header), Some(_)) => {
                    at = header.end();
                    header.entries.into_iter().try_for_each(&mut *found)?;
                }
                (None, Some(next)) => {
                    damaged = true;
                    at = next.offset;
                }
                (_, None) => break,
            },
        }
    }
    Ok(Read {
        end: at,
        damaged: damaged || at < tail,
    })
}

/// How many of some entries are read in one call. They are sorted by log and place. Of what is read, at least the half
/// is needed: between two records are two headers.
pub fn near(entries: &[Entry]) -> usize {
    let first = entries[0];
    let is_apart = |n: &usize| {
        let (before, entry) = (entries[*n - 1], entries[*n]);
        let span = u64::from(entry.place.wrapping_sub(first.place)) + 1;
        let gap = entry.place.wrapping_sub(before.place);
        entry.log != first.log || gap > GAP_MAX || span > 2 * (*n as u64 + 1)
    };
    (1..entries.len()).find(is_apart).unwrap_or(entries.len())
}

/// The contents that entries lead to, which are near each other.
pub fn contents(
    log: &File,
    entries: &[Entry],
    found: &mut dyn FnMut(u64, &[u8]),
) -> io::Result<()> {
    let (first, last) = (entries[0].place, entries[entries.len() - 1].place);
    let mut bytes = vec![0; (last - first + 1) as usize * BLOCK_BYTES];
    if first != 0 {
        log.read_exact_at(&mut bytes, u64::from(first) * BLOCK)?;
    }
    for entry in entries {
        let content = &bytes[(entry.place - first) as usize * BLOCK_BYTES..][..BLOCK_BYTES];
        if crc32fast::hash(content) != entry.crc {
            return Err(bad(format!("log {} is damaged", entry.log)));
        }
        found(entry.block, content);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: LogId = LogId {
        number: 3,
        secret: 0x0123_4567_89ab_cdef,
    };

    fn into(list: &mut Vec<Entry>) -> impl FnMut(Entry) -> io::Result<()> {
        |entry| {
            list.push(entry);
            Ok(())
        }
    }

    fn sample() -> (tempfile::NamedTempFile, Vec<Entry>, u64) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut at = 0;
        let blocks: Vec<Vec<u8>> = (0..9).map(|n: u8| vec![n * 7; BLOCK_BYTES]).collect();
        for group in [0..3, 3..4, 4..9] {
            let list: Vec<(u64, &[u8])> = group
                .map(|n| (n as u64 * 10, blocks[n].as_slice()))
                .collect();
            let bytes = record(ID, at, &list);
            file.as_file().write_all_at(&bytes, at).unwrap();
            at += bytes.len() as u64;
        }
        let mut entries = Vec::new();
        let read = read(file.as_file(), ID, 0, at, &mut into(&mut entries)).unwrap();
        assert_eq!(
            read,
            Read {
                end: at,
                damaged: false
            }
        );
        (file, entries, at)
    }

    #[test]
    fn what_was_written_is_read_and_zeros_take_no_data() {
        let (file, entries, end) = sample();
        assert_eq!(
            entries.iter().map(|entry| entry.block).collect::<Vec<_>>(),
            [0, 10, 20, 30, 40, 50, 60, 70, 80]
        );
        assert_eq!(end, (6 + 8) * BLOCK);
        for (n, entry) in entries.iter().enumerate() {
            contents(file.as_file(), &[*entry], &mut |block, data| {
                assert_eq!((block, usize::from(data[9])), (n as u64 * 10, n * 7));
            })
            .unwrap();
        }
        // Another log's number does not fit: a client that writes a copy of a record changes nothing.
        let other = LogId { secret: 1, ..ID };
        assert_eq!(
            read(file.as_file(), other, 0, 0, &mut |_| panic!()).unwrap(),
            Read {
                end: 0,
                damaged: false
            }
        );
    }

    /// Every bit of the headers, and one of each data block: the entries are right, or damage is reported.
    #[test]
    fn a_flipped_bit_is_healed_or_reported() {
        let (file, entries, end) = sample();
        for at in 0..end {
            // In the unused end of a header one byte in 64 is enough.
            if at % BLOCK > 400 && at % 61 != 0 {
                continue;
            }
            let mut byte = [0];
            file.as_file().read_exact_at(&mut byte, at).unwrap();
            file.as_file()
                .write_all_at(&[byte[0] ^ 1 << (at % 8)], at)
                .unwrap();
            for tail in [end, 0] {
                let mut seen = Vec::new();
                let read = read(file.as_file(), ID, 0, tail, &mut into(&mut seen)).unwrap();
                // Not known to have been durable, and the last: a torn one looks the same.
                let torn = tail == 0 && read.end < end;
                assert!(
                    torn || read.damaged || seen == entries,
                    "byte {at}, tail {tail}: {read:?}"
                );
                for entry in seen {
                    assert!(entries.contains(&entry), "byte {at}");
                    let _ = contents(file.as_file(), &[entry], &mut |block, data| {
                        assert_eq!(u64::from(data[9]), block / 10 * 7, "byte {at}");
                    });
                }
            }
            file.as_file().write_all_at(&byte, at).unwrap();
        }
    }

    #[test]
    fn a_torn_end_is_no_damage_and_a_lost_record_is() {
        let (file, entries, end) = sample();
        for cut in 1..=6 * BLOCK {
            if cut % 1000 != 1 {
                continue;
            }
            file.as_file().set_len(end - cut).unwrap();
            let mut seen = Vec::new();
            let read = read(file.as_file(), ID, 0, 0, &mut into(&mut seen)).unwrap();
            assert_eq!((read.end, read.damaged), (7 * BLOCK, false), "cut {cut}");
            assert_eq!(seen, entries[..4]);
            assert!(
                super::read(file.as_file(), ID, 0, end, &mut |_| Ok(()))
                    .unwrap()
                    .damaged
            );
        }
        let (file, entries, end) = sample();
        // The second record (a block of data) with both headers gone.
        for at in [4, 6] {
            file.as_file().write_all_at(&[0; 64], at * BLOCK).unwrap();
        }
        let mut seen = Vec::new();
        let read = read(file.as_file(), ID, 0, end, &mut into(&mut seen)).unwrap();
        assert!(read.damaged);
        assert_eq!(seen, [&entries[..3], &entries[4..]].concat());
    }
}
