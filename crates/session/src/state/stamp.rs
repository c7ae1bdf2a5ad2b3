//! The stamp of a state of the volume: the file system's own counters, and how two stamps compare.
//!
//! The stamp depends on the kind of file system. ext4 has its counters in block 0; another kind may
//! have them elsewhere, and adds a variant to [`FileSystem`] and a case to [`FirstBlock::read`].

use serde::{Deserialize, Serialize};
use sprat_store::hex;

/// A file system whose counters are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileSystem {
    /// Counter: `s_kbytes_written`, the KiB written in the file system's whole life, which the
    /// kernel never lowers. Time: `s_wtime`.
    Ext4,
}

/// A state of the volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    file_system: FileSystem,
    /// Length of the container file.
    file_bytes: u64,
    /// Grows with each write.
    counter: u64,
    /// Seconds since 1970, by the clock of the machine that wrote.
    written_s: u64,
    /// SHA-256 of the block that has the counters, in hexadecimal digits.
    digest: String,
    /// The file system was not unmounted in order: its journal has to be replayed.
    #[serde(default)]
    open: bool,
}

/// How a state compares with a known one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    Same,
    Newer,
    Older,
    /// Counters are equal, the known state was unmounted in order, and this one was not. A session that
    /// began within the same second looks so, and a server that lost the last write of the known state.
    NotUnmounted,
}

impl Stamp {
    /// Whether `self` is the known state, a newer or an older one.
    pub fn age(&self, known: &Self) -> Age {
        if self.file_system != known.file_system {
            return Age::Newer;
        }
        let (found, before) = (
            (self.counter, self.written_s),
            (known.counter, known.written_s),
        );
        match found.cmp(&before) {
            std::cmp::Ordering::Less => Age::Older,
            std::cmp::Ordering::Greater => Age::Newer,
            std::cmp::Ordering::Equal if self.file_bytes < known.file_bytes => Age::Older,
            std::cmp::Ordering::Equal if self.digest == known.digest => Age::Same,
            std::cmp::Ordering::Equal if self.open && !known.open => Age::NotUnmounted,
            std::cmp::Ordering::Equal => Age::Newer,
        }
    }

    /// Bytes that the file system had written in its whole life.
    pub fn life_bytes(&self) -> u64 {
        match self.file_system {
            FileSystem::Ext4 => self.counter.saturating_mul(1024),
        }
    }

    /// When the state was written, as text.
    pub fn written(&self) -> String {
        let seconds = i64::try_from(self.written_s).ok();
        let time = seconds.and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
        time.map_or_else(|| "an unknown time".to_owned(), |time| time.to_string())
    }
}

/// What the first block of the volume, in plaintext, says of the file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstBlock {
    /// The state of the volume.
    pub stamp: Stamp,
    /// How many errors the file system has met since it was last repaired.
    pub errors: Option<u32>,
    /// Bytes in use, as of the last unmount.
    pub used_bytes: u64,
}

/// Offsets in the super block: Documentation/filesystems/ext4/super.rst.
const MAGIC: u16 = 0xEF53;
const STATE_ERROR: u16 = 2;
const INCOMPAT_RECOVER: u64 = 4;
const INCOMPAT_64BIT: u64 = 0x80;

impl FirstBlock {
    /// Reads the volume's first 4096 bytes. `None`: no file system that is known.
    pub fn read(block: &[u8], file_bytes: u64) -> Option<Self> {
        let block = block.get(1024..2048)?;
        let u16_at = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        let u32_at = |at: usize| u64::from(u16_at(at)) | u64::from(u16_at(at + 2)) << 16;
        if u16_at(0x38) != MAGIC {
            return None;
        }
        let digest = openssl::sha::sha256(block);
        // The upper halves are there with 64 bits only.
        let blocks = |low: usize, high: usize| match u32_at(0x60) & INCOMPAT_64BIT {
            0 => u32_at(low),
            _ => u32_at(low) | u32_at(high) << 32,
        };
        let used_blocks = blocks(0x4, 0x150).saturating_sub(blocks(0xc, 0x158));
        let block_bytes = 1024_u64.checked_shl(u32::from(u16_at(0x18))).unwrap_or(0);
        Some(Self {
            used_bytes: used_blocks.saturating_mul(block_bytes),
            stamp: Stamp {
                file_system: FileSystem::Ext4,
                file_bytes,
                counter: u32_at(0x178) | u32_at(0x17c) << 32,
                // `s_wtime_hi` has the upper 8 bits.
                written_s: u32_at(0x30) | u64::from(block[0x274]) << 32,
                digest: hex(&digest),
                open: u32_at(0x60) & INCOMPAT_RECOVER != 0,
            },
            errors: (u16_at(0x3a) & STATE_ERROR != 0)
                .then(|| u32::try_from(u32_at(0x194)).unwrap_or(u32::MAX).max(1)),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A super block with these counters.
    pub fn block(counter: u64, written_s: u32, errors: u32) -> Vec<u8> {
        let mut block = vec![0; 4096];
        let mut put = |at: usize, bytes: &[u8]| {
            block[1024 + at..1024 + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0x38, &MAGIC.to_le_bytes());
        put(
            0x3a,
            &u16::from(errors > 0)
                .wrapping_mul(STATE_ERROR)
                .to_le_bytes(),
        );
        put(0x30, &written_s.to_le_bytes());
        put(0x178, &counter.to_le_bytes());
        put(0x194, &errors.to_le_bytes());
        block
    }

    fn stamp(counter: u64, written_s: u32, file_bytes: u64) -> Stamp {
        FirstBlock::read(&block(counter, written_s, 0), file_bytes)
            .unwrap()
            .stamp
    }

    #[test]
    fn a_lower_counter_is_older_whatever_the_clock_says() {
        let known = stamp(1000, 500, 4096);
        assert_eq!(stamp(1000, 500, 4096).age(&known), Age::Same);
        assert_eq!(stamp(999, 900, 4096).age(&known), Age::Older);
        assert_eq!(stamp(1001, 100, 4096).age(&known), Age::Newer);
        assert_eq!(stamp(1000, 499, 4096).age(&known), Age::Older);
        assert_eq!(stamp(1000, 500, 4095).age(&known), Age::Older);
        // `grow` was interrupted before it mounted.
        assert_eq!(stamp(1000, 500, 8192).age(&known), Age::Same);
        let mut other = block(1000, 500, 0);
        other[1024 + 0x34] ^= 1;
        let other = FirstBlock::read(&other, 4096).unwrap().stamp;
        assert_eq!(other.age(&known), Age::Newer);
        // The last write of a session that ended in order is not there any more.
        let mut open = block(1000, 500, 0);
        open[1024 + 0x60] = 4;
        let open = FirstBlock::read(&open, 4096).unwrap().stamp;
        assert_eq!(open.age(&known), Age::NotUnmounted);
        assert_eq!(known.age(&open), Age::Newer);
    }

    #[test]
    fn what_is_in_use_is_counted_in_blocks() {
        let mut block = block(1, 1, 0);
        let mut put = |at: usize, bytes: &[u8]| {
            block[1024 + at..1024 + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0x18, &2_u16.to_le_bytes());
        put(0x4, &1000_u32.to_le_bytes());
        put(0xc, &400_u32.to_le_bytes());
        put(0x150, &1_u32.to_le_bytes());
        let used = |block: &[u8]| FirstBlock::read(block, 4096).unwrap().used_bytes;
        assert_eq!(used(&block), 600 * 4096);
        block[1024 + 0x60] = 0x80;
        assert_eq!(used(&block), ((1 << 32) + 600) * 4096);
    }

    #[test]
    fn the_error_state_is_read_and_other_blocks_have_no_stamp() {
        let read = |block: &[u8]| FirstBlock::read(block, 4096);
        assert_eq!(read(&block(1, 1, 0)).unwrap().errors, None);
        assert_eq!(read(&block(1, 1, 7)).unwrap().errors, Some(7));
        assert_eq!(read(&[0; 4096]), None);
        assert_eq!(read(&[0; 100]), None);
    }
}
