//! The log of a generation: blocks as they were before their first overwrite.
//!
//! A record is `header | data blocks | the same header again`, all in units of 4,096 bytes. The second
//! header heals damage of the first one, and shows that the record is whole. A header takes as many units
//! as its entries need. It is, little endian:
//!
//! | bytes | field |
//! | --- | --- |
//! | 0..8 | magic |
//! | 8..16 | the log's own random number: no block of a client passes for a header |
//! | 16..24 | the record's offset in the log |
//! | 24..28 | number of entries, at most 1,000 |
//! | 32.. | entries: `u64 block`, `u32 crc32 of the data`, `u32 place in the record` (0: all zeros, no data) |
//! | the last 4 | crc32 of all before |
//!
//! A record is appended only when the one before it is durable. So only the last one can be torn.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::disk::{bad, read_padded, u32_at, u64_at};
use crate::ranges::BLOCK;

const MAGIC: &[u8; 8] = b"sprlog1\n";
/// The most blocks of one record: one write of at most 4 MiB, for which the disk is waited for once.
pub const ENTRIES_MAX: usize = 1000;
const BLOCK_BYTES: usize = 4096;
const ENTRIES_AT: usize = 32;
const ENTRY_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
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

/// Units that a header of so many entries takes.
fn header_blocks(entries: usize) -> usize {
    (ENTRIES_AT + entries * ENTRY_BYTES + CRC_BYTES).div_ceil(BLOCK_BYTES)
}

/// The bytes of a record at `offset`: `blocks` are numbers and contents of 4,096 bytes.
pub fn record(id: LogId, offset: u64, blocks: &[(u64, &[u8])]) -> Vec<u8> {
    assert!(
        blocks.len() <= ENTRIES_MAX,
        "a record of {} blocks",
        blocks.len()
    );
    let header_blocks = header_blocks(blocks.len());
    let mut header = vec![0; header_blocks * BLOCK_BYTES];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&id.secret.to_le_bytes());
    header[16..24].copy_from_slice(&offset.to_le_bytes());
    let mut data = Vec::with_capacity((blocks.len() + 2 * header_blocks) * BLOCK_BYTES);
    data.extend(&header);
    for (index, (block, content)) in blocks.iter().enumerate() {
        let is_zero = content.iter().all(|b| *b == 0);
        let place = u32::try_from(data.len() / BLOCK_BYTES).unwrap_or(0);
        if !is_zero {
            data.extend(*content);
        }
        let entry = &mut header[ENTRIES_AT + index * ENTRY_BYTES..][..ENTRY_BYTES];
        entry[..8].copy_from_slice(&block.to_le_bytes());
        entry[8..12].copy_from_slice(&crc32fast::hash(content).to_le_bytes());
        entry[12..].copy_from_slice(&if is_zero { 0 } else { place }.to_le_bytes());
    }
    let count = u32::try_from(blocks.len()).unwrap_or(0);
    header[24..28].copy_from_slice(&count.to_le_bytes());
    let crc_at = header.len() - CRC_BYTES;
    let crc = crc32fast::hash(&header[..crc_at]);
    header[crc_at..].copy_from_slice(&crc.to_le_bytes());
    data[..header.len()].copy_from_slice(&header);
    data.extend(header);
    data
}

/// A record's header as it was read.
struct Header {
    offset: u64,
    entries: Vec<Entry>,
    /// Of one copy of it.
    len: u64,
    data_blocks: u64,
}

impl Header {
    fn end(&self) -> u64 {
        self.second() + self.len
    }

    /// Where the second copy begins.
    fn second(&self) -> u64 {
        self.offset + self.len + self.data_blocks * BLOCK
    }
}

fn header_at(log: &File, id: LogId, at: u64) -> io::Result<Option<Header>> {
    let mut bytes = vec![0; BLOCK_BYTES];
    read_padded(log, &mut bytes, at)?;
    let count = usize::try_from(u32_at(&bytes, 24)).unwrap_or(usize::MAX);
    if bytes[..8] != *MAGIC || u64_at(&bytes, 8) != id.secret || count > ENTRIES_MAX {
        return Ok(None);
    }
    bytes.resize(header_blocks(count) * BLOCK_BYTES, 0);
    read_padded(log, &mut bytes[BLOCK_BYTES..], at + BLOCK)?;
    let crc_at = bytes.len() - CRC_BYTES;
    if u32_at(&bytes, crc_at) != crc32fast::hash(&bytes[..crc_at]) {
        return Ok(None);
    }
    Ok(parse_header(id, &bytes, count))
}

/// A whole header. `None`: it is not of this place in a log.
fn parse_header(id: LogId, bytes: &[u8], count: usize) -> Option<Header> {
    let offset = u64_at(bytes, 16);
    let first_block = u32::try_from(offset / BLOCK).ok()?;
    let header_blocks = (bytes.len() / BLOCK_BYTES) as u64;
    let mut entries = Vec::with_capacity(count);
    let mut end = header_blocks;
    for entry in bytes[ENTRIES_AT..].chunks_exact(ENTRY_BYTES).take(count) {
        let place = u32_at(entry, 12);
        end = end.max(u64::from(place) + 1);
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
        len: header_blocks * BLOCK,
        data_blocks: end - header_blocks,
    })
}

/// The header of the record at `at`, from its second copy if the first one is damaged.
fn find_header(log: &File, id: LogId, at: u64, len: u64) -> io::Result<Option<Header>> {
    if let Some(header) = header_at(log, id, at)? {
        return Ok((header.offset == at).then_some(header));
    }
    scan(log, id, at, len, |found, place| {
        found.offset == at && place == found.second()
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
    for step in 1..=(ENTRIES_MAX + 2 * header_blocks(ENTRIES_MAX)) as u64 {
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
    match header_at(log, id, header.second())? {
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

    /// A record with more entries than fit into one unit: its header is healed, found torn, or lost like a short one.
    #[test]
    fn a_long_header_is_healed_or_reported() {
        let file = tempfile::tempfile().unwrap();
        let contents: Vec<Vec<u8>> = (0..702_u64)
            .map(|n| vec![u8::try_from(n % 5).unwrap(); BLOCK_BYTES])
            .collect();
        let blocks: Vec<(u64, &[u8])> = (0..).zip(contents.iter().map(Vec::as_slice)).collect();
        let long = record(ID, 0, &blocks[..700]);
        let end = long.len() as u64;
        file.write_all_at(&long, 0).unwrap();
        file.write_all_at(&record(ID, end, &blocks[700..]), end)
            .unwrap();
        let all = |tail: u64| {
            let mut seen = Vec::new();
            let read = read(&file, ID, 0, tail, &mut into(&mut seen)).unwrap();
            (read, seen)
        };
        let whole = all(0);
        assert_eq!((whole.0.damaged, whole.1.len()), (false, 702));
        for (n, entry) in whole.1.iter().enumerate() {
            assert_eq!(entry.place == 0, n % 5 == 0);
            super::contents(&file, &[*entry], &mut |_, data| {
                assert!(*data == contents[n]);
            })
            .unwrap();
        }
        let headers = header_blocks(700) as u64 * BLOCK;
        assert_eq!(headers, 3 * BLOCK);
        for at in (0..headers).step_by(511) {
            let mut byte = [0];
            for place in [at, end - headers + at] {
                file.read_exact_at(&mut byte, place).unwrap();
                file.write_all_at(&[!byte[0]], place).unwrap();
                assert_eq!(all(whole.0.end), whole, "{place}");
                // The same place of both: what follows shows that the record is lost.
                file.write_all_at(&[!byte[0]], end - headers + at).unwrap();
                file.write_all_at(&[!byte[0]], at).unwrap();
                let (read, seen) = all(0);
                assert!(read.damaged && seen == whole.1[700..], "{place}: {read:?}");
                for copy in [at, end - headers + at] {
                    file.write_all_at(&byte, copy).unwrap();
                }
            }
        }
        file.set_len(end - 1).unwrap();
        assert_eq!(
            (all(0).0.end, all(0).0.damaged, all(0).1.len()),
            (0, false, 0)
        );
    }
}
