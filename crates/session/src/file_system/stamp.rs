//! The stamp of a state of the volume: the file system's own counters, and how two stamps compare.
//!
//! Each kind of file system fills the stamp from its super block.

use serde::{Deserialize, Serialize};

use crate::file_system::FileSystemKind;

/// A state of the volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    pub(super) file_system: FileSystemKind,
    /// Length of the container file.
    pub(crate) file_bytes: u64,
    /// Grows with each write.
    pub(super) counter: u64,
    /// Seconds since 1970, by the clock of the machine that wrote.
    pub(super) written_s: u64,
    /// SHA-256 of the bytes that hold the counters, in hexadecimal digits.
    pub(super) digest: String,
    /// A mount must replay a journal: an ext4 was not unmounted, or a btrfs has an fsync log.
    #[serde(default)]
    pub(super) open: bool,
}

/// How a state compares with a known one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Age {
    Same,
    Newer,
    Older,
    /// The counters are equal. The known state was unmounted, and this state was not. There are two
    /// causes: a session began within the same second, or the server lost the last write of the known
    /// state.
    NotUnmounted,
}

impl Stamp {
    /// Whether `self` is the known state, a newer or an older one.
    pub fn age(&self, known: &Self) -> Age {
        if self.file_system != known.file_system {
            return Age::Newer;
        }
        if self.file_system == FileSystemKind::Btrfs {
            return self.age_by_commits(known);
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

    /// btrfs: each commit has a generation of its own, and only a commit changes the super block. The
    /// one exception is the fsync log of a program that has mounted the volume without sprat's options.
    fn age_by_commits(&self, known: &Self) -> Age {
        match self.counter.cmp(&known.counter) {
            std::cmp::Ordering::Less => Age::Older,
            std::cmp::Ordering::Greater => Age::Newer,
            std::cmp::Ordering::Equal if self.file_bytes < known.file_bytes => Age::Older,
            std::cmp::Ordering::Equal if self.digest == known.digest => Age::Same,
            std::cmp::Ordering::Equal if self.open => Age::Newer,
            std::cmp::Ordering::Equal => Age::Older,
        }
    }

    /// Bytes that the file system had written in its whole life, if it counts them.
    pub fn life_bytes(&self) -> Option<u64> {
        self.file_system.life_bytes(self.counter)
    }

    /// When the state was written, as text.
    pub fn written(&self) -> String {
        if self.file_system == FileSystemKind::Btrfs {
            return format!("as generation {}", self.counter);
        }
        let seconds = i64::try_from(self.written_s).ok();
        let time = seconds.and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
        time.map_or_else(|| "an unknown time".to_owned(), |time| time.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file_system::{FileSystemState, stamp_block as block};

    fn stamp(counter: u64, written_s: u32, file_bytes: u64) -> Stamp {
        FileSystemState::read(&block(counter, written_s, 0), file_bytes)
            .unwrap()
            .stamp
    }

    #[test]
    fn lower_counter_is_older_whatever_the_clock_says() {
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
        let other = FileSystemState::read(&other, 4096).unwrap().stamp;
        assert_eq!(other.age(&known), Age::Newer);
        // The last write of a session that ended cleanly is missing.
        let mut open = block(1000, 500, 0);
        open[1024 + 0x60] = 4;
        let open = FileSystemState::read(&open, 4096).unwrap().stamp;
        assert_eq!(open.age(&known), Age::NotUnmounted);
        assert_eq!(known.age(&open), Age::Newer);
    }

    #[test]
    fn used_bytes_are_counted_in_blocks() {
        let mut block = block(1, 1, 0);
        let mut put = |at: usize, bytes: &[u8]| {
            block[1024 + at..1024 + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0x18, &2_u16.to_le_bytes());
        put(0x4, &1000_u32.to_le_bytes());
        put(0xc, &400_u32.to_le_bytes());
        put(0x150, &1_u32.to_le_bytes());
        let used = |block: &[u8]| FileSystemState::read(block, 4096).unwrap().used_bytes;
        assert_eq!(used(&block), 600 * 4096);
        block[1024 + 0x60] = 0x80;
        assert_eq!(used(&block), ((1 << 32) + 600) * 4096);
    }

    #[test]
    fn error_state_is_read_and_other_blocks_have_no_stamp() {
        let read = |block: &[u8]| FileSystemState::read(block, 4096);
        assert_eq!(read(&block(1, 1, 0)).unwrap().errors, None);
        assert_eq!(read(&block(1, 1, 7)).unwrap().errors, Some(7));
        assert_eq!(read(&[0; 4096]), None);
        assert_eq!(read(&[0; 100]), None);
    }
}
