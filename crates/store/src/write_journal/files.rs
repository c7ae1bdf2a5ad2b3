//! The journal's files: how one replaces the other without giving up its blocks.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::{CWD, FallocateFlags, OFlags, RenameFlags, fallocate, renameat_with};

/// Replaces the file at `path` by one with `bytes`, durably, and returns it at their end. The other file
/// has room for it, and the blocks of the one at `path` become the other's: `room_bytes` each.
pub(super) fn replace(path: &Path, bytes: &[u8], room_bytes: u64) -> io::Result<File> {
    let other = path.with_extension("record.new");
    let mut file = open_private(&other)?;
    clear(&mut file, room_bytes)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    if renameat_with(CWD, &other, CWD, path, RenameFlags::EXCHANGE).is_err() {
        // The first journal, or a file system that can't do this.
        std::fs::rename(&other, path)?;
        let _ = open_private(&other).and_then(|mut file| clear(&mut file, room_bytes));
    }
    // For file systems on which fdatasync of the file does not make its name durable. On ext4
    // the fdatasync behind each entry does.
    if let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(file)
}

/// Removes what the file contains: the entries of an earlier journal would follow the new ones.
/// Keeps and allocates its blocks, where the file system can do that and has them.
fn clear(file: &mut File, room_bytes: u64) -> io::Result<()> {
    let allocate = |file: &File, how: FallocateFlags| {
        fallocate(file, how | FallocateFlags::KEEP_SIZE, 0, room_bytes).is_ok()
    };
    let len = file.metadata()?.len();
    if len > room_bytes {
        file.set_len(0)?;
    }
    if allocate(file, FallocateFlags::ZERO_RANGE) {
        return Ok(());
    }
    if len > room_bytes || !allocate(file, FallocateFlags::empty()) {
        return file.set_len(0);
    }
    // tmpfs.
    io::copy(&mut io::repeat(0).take(len), file)?;
    file.rewind()
}

/// Opens the lock file read-only. If there is none, no session of this host can have it.
pub(super) fn open_existing(path: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    match File::options().read(true).custom_flags(flags).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => in_memory(&[]).map(|made| made.0),
        opened => opened,
    }
}

pub(super) fn in_memory(bytes: &[u8]) -> io::Result<(File, u64)> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::memfd_create("sprat-record", flags)?);
    file.write_all(bytes)?;
    Ok((file, bytes.len() as u64))
}

pub(super) fn open_private(path: &Path) -> io::Result<File> {
    let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(flags)
        .open(path)
}
