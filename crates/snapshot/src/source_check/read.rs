//! Reads one file of a source, and judges a difference.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{Advice, fadvise, fstatfs};
use rustix::io::Errno;

use crate::change_list::ListedFile;
use crate::content::{ContentHash, Digest, PIECE_BYTES};
use crate::long_path;
use crate::mounts::{Mount, holding};

const BUFFER_BYTES: usize = 1 << 20;
/// Local file systems that keep a status change time which no program can set, and their magic numbers
/// (include/uapi/linux/magic.h). On others, and over a network, an older time may come back.
const FILE_SYSTEMS: [(&str, u32); 11] = [
    ("ext2", 0xEF53),
    ("ext3", 0xEF53),
    ("ext4", 0xEF53),
    ("xfs", 0x5846_5342),
    ("btrfs", 0x9123_683E),
    ("f2fs", 0xF2F5_2010),
    ("bcachefs", 0xCA45_1A4E),
    ("zfs", 0x2FC1_2FC1),
    ("jfs", 0x3153_464A),
    ("nilfs2", 0x3434),
    ("reiserfs", 0x5265_4973),
];
/// Boot loaders write here without a file system's help: GRUB changes `grubenv` at each start, and no time.
const BOOT: &str = "/boot";
/// The last ten bytes of the first page of a swap file, also of a hibernated one. The kernel changes its content and
/// no time (mm/swapfile.c, kernel/power/swap.c; systemd and uswsusp use the others).
const SWAP: [&[u8]; 6] = [
    b"SWAPSPACE2",
    b"SWAP-SPACE",
    b"S1SUSPEND",
    b"S2SUSPEND",
    b"ULSUSPEND",
    b"LINHIB0001",
];
const PAGE_BYTES: [u64; 4] = [4 << 10, 8 << 10, 16 << 10, 64 << 10];

/// What a comparison shows.
pub(super) enum Judged {
    Same,
    /// Nobody has written to the file, and its content is another one, or can't be read.
    Silent {
        found: String,
    },
    /// Somebody has written to it or set its times since it was backed up, and its content is another one.
    Rewritten,
    /// It is gone, was changed, is on a file system of another kind, or is written to right now.
    Unfit,
    /// There was no time to read it to its end.
    Stopped,
}

/// Reads files from their disk.
pub(super) struct Reader<'m> {
    mounts: &'m [Mount],
    unchanged_for: Duration,
    buffer: Vec<u8>,
}

impl<'m> Reader<'m> {
    pub(super) fn new(mounts: &'m [Mount], unchanged_for: Duration) -> Self {
        Self {
            mounts,
            unchanged_for,
            buffer: vec![0; BUFFER_BYTES],
        }
    }

    /// Compares a file, or one piece of it, with its digest in the lists.
    pub(super) fn judge(
        &mut self,
        file: &ListedFile,
        piece: Option<u64>,
        is_over: &dyn Fn() -> bool,
    ) -> Judged {
        let Some((expected, range)) = expected(file, piece) else {
            return Judged::Unfit;
        };
        if !self.is_fit(&file.path) {
            return Judged::Unfit;
        }
        let Some((open, about)) = open(file) else {
            return Judged::Unfit;
        };
        let found = match self.read(&open, &range, is_over) {
            Ok(None) => return Judged::Stopped,
            Ok(Some(found)) if found == expected => return Judged::Same,
            Ok(Some(found)) => Ok(found),
            Err(error) if is_bad_medium(&error) => Err(error),
            Err(_) => return Judged::Unfit,
        };
        // What a cable or the memory did is not there a second time.
        let again = match self.read(&open, &range, is_over) {
            Ok(None) => return Judged::Stopped,
            Ok(Some(again)) => Ok(again),
            Err(error) => Err(error),
        };
        let is_unchanged =
            || long_path::lstat(&file.path).is_ok_and(|now| state(&now) == state(&about));
        if is_swap(&open) || !is_unchanged() {
            return Judged::Unfit;
        }
        match (found, again) {
            (Err(error), Err(_)) => Judged::Silent {
                found: format!("can't be read: {error}"),
            },
            (Ok(found), Ok(again)) if found == again => match self.is_untouched(file, &about) {
                true => Judged::Silent {
                    found: String::from(found),
                },
                false => Judged::Rewritten,
            },
            _ => Judged::Unfit,
        }
    }

    fn is_fit(&self, path: &Path) -> bool {
        let kind = holding(self.mounts, path).map(|mount| &*mount.kind);
        kind.is_some_and(|kind| FILE_SYSTEMS.iter().any(|(name, _)| *name == kind))
            && !path.starts_with(BOOT)
    }

    /// Nobody has written to it, or set its times, since long before the run that read it.
    fn is_untouched(&self, file: &ListedFile, about: &Metadata) -> bool {
        let unchanged_for_s = i64::try_from(self.unchanged_for.as_secs()).unwrap_or(i64::MAX);
        file.read_by.is_some_and(|run| {
            about.ctime() < run.moment().as_second().saturating_sub(unchanged_for_s)
        })
    }

    /// The digest of a range, as the disk has it. `None`: there was no time for it.
    fn read(
        &mut self,
        file: &File,
        range: &Range<u64>,
        is_over: &dyn Fn() -> bool,
    ) -> io::Result<Option<Digest>> {
        // What is not in memory before need not be there afterwards.
        let drop_cache = || {
            let bytes = std::num::NonZeroU64::new(range.end - range.start);
            // Fails only where there is no cache.
            let _ = fadvise(file, range.start, bytes, Advice::DontNeed);
        };
        drop_cache();
        let mut hash = ContentHash::new(0);
        let mut at = range.start;
        while at < range.end {
            if is_over() {
                return Ok(None);
            }
            let most = usize::try_from(range.end - at).unwrap_or(BUFFER_BYTES);
            let some = &mut self.buffer[..most.min(BUFFER_BYTES)];
            file.read_exact_at(some, at)?;
            hash.update(some);
            at += some.len() as u64;
        }
        drop_cache();
        Ok(Some(hash.finish().whole))
    }
}

/// What stands for the content in the lists, as in [`Judged::Silent`].
pub(super) fn listed(file: &ListedFile, piece: Option<u64>) -> Option<String> {
    expected(file, piece).map(|(digest, _)| String::from(digest))
}

/// The digest in the lists, and what it is of.
fn expected(file: &ListedFile, piece: Option<u64>) -> Option<(Digest, Range<u64>)> {
    let Some(piece) = piece else {
        return Some((file.content.sha256?, 0..file.bytes));
    };
    let digest = *file.content.pieces.get(usize::try_from(piece).ok()?)?;
    let from = piece.checked_mul(PIECE_BYTES)?;
    let to = from.checked_add(PIECE_BYTES)?.min(file.bytes);
    (from < to).then_some((digest?, from..to))
}

/// Opens the file, if it has the size and the time that its backup had, on a file system that can be judged.
fn open(file: &ListedFile) -> Option<(File, Metadata)> {
    let is_same = |about: &Metadata| {
        let nanoseconds = i32::try_from(about.mtime_nsec()).unwrap_or(-1);
        let modified = Timestamp::new(about.mtime(), nanoseconds);
        about.is_file()
            && about.len() == file.bytes
            && modified.is_ok_and(|modified| modified == file.modified)
    };
    let about = long_path::lstat(&file.path).ok().filter(is_same)?;
    let open = long_path::open_regular(&file.path).ok()?;
    let is_it = open
        .metadata()
        .is_ok_and(|now| state(&now) == state(&about));
    let magic = u32::try_from(fstatfs(&open).ok()?.f_type & 0xFFFF_FFFF).ok()?;
    let is_known = FILE_SYSTEMS.iter().any(|(_, known)| *known == magic);
    (is_it && is_known).then_some((open, about))
}

/// What changes when a file is replaced or written to, or when any of its attributes are.
fn state(about: &Metadata) -> [i64; 7] {
    [
        about.dev().cast_signed(),
        about.ino().cast_signed(),
        about.len().cast_signed(),
        about.mtime(),
        about.mtime_nsec(),
        about.ctime(),
        about.ctime_nsec(),
    ]
}

/// The disk can't read it, or the file system finds it damaged.
fn is_bad_medium(error: &io::Error) -> bool {
    let bad = [Errno::IO, Errno::UCLEAN, Errno::BADMSG].map(Errno::raw_os_error);
    error.raw_os_error().is_some_and(|code| bad.contains(&code))
}

fn is_swap(file: &File) -> bool {
    PAGE_BYTES.iter().any(|page| {
        let mut end = [0; 10];
        file.read_exact_at(&mut end, page - 10).is_ok()
            && SWAP.iter().any(|mark| end.starts_with(mark))
    })
}
