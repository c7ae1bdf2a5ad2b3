//! How many files fit into a new file system, and how many the sources have.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use crate::text;

/// The number of inodes that mke2fs makes in a volume of `bytes`.
#[must_use]
pub fn default_inodes(bytes: u64) -> u64 {
    bytes / default_inode_ratio(bytes)
}

/// How many files fit into a container, and a warning if the disks of its sources have more. Later only growing
/// raises the number.
#[must_use]
pub fn file_room_texts(room: u64, sources: &[PathBuf]) -> (String, Option<String>) {
    let note = format!(
        "the container has room for about {}",
        text::counted(room, "file", "files")
    );
    let there = files_on_disks_of(sources);
    let warning = (there > room).then(|| {
        format!(
            "the disks of this container's jobs have {}, but the container has room for about {}. To \
             back up most of them, delete the container file and run `sprat init` again with --inodes \
             {}. Later only `sprat grow` raises the number",
            text::counted(there, "file", "files"),
            text::count(room),
            there.saturating_mul(2)
        )
    });
    (note, warning)
}

/// The number of files on the disks that `sources` are on, each disk once.
fn files_on_disks_of<'s>(sources: impl IntoIterator<Item = &'s PathBuf>) -> u64 {
    let mut seen = Vec::new();
    let mut files = 0_u64;
    for source in sources {
        let (Ok(about), Ok(meta)) = (rustix::fs::statvfs(source), std::fs::metadata(source)) else {
            continue;
        };
        if !seen.contains(&meta.dev()) {
            seen.push(meta.dev());
            files = files.saturating_add(about.f_files.saturating_sub(about.f_ffree));
        }
    }
    files
}

/// Bytes for each file by size of the volume (mke2fs.conf of e2fsprogs: `small`, default, `big`, `huge`).
fn default_inode_ratio(bytes: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    const TIB: u64 = 1 << 40;
    match bytes {
        0..536_870_912 => 4096,
        _ if bytes / MIB < 4 * TIB / MIB => 16_384,
        _ if bytes / TIB < 16 => 32_768,
        _ => 65_536,
    }
}
