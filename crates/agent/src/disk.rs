//! Files below the root, always by a folder's descriptor and one name; and records that survive a crash.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;

/// Only the account itself reads what is here.
pub const PRIVATE: Mode = Mode::from_raw_mode(0o600);
const PRIVATE_FOLDER: Mode = Mode::from_raw_mode(0o700);
/// One slot of a [`Slots`] file; a write of one sector is the least that tears.
const SLOT_BYTES: usize = 512;

pub fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

/// Retries what a signal interrupts.
pub fn retry<T>(call: impl FnMut() -> rustix::io::Result<T>) -> io::Result<T> {
    Ok(rustix::io::retry_on_intr(call)?)
}

pub fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    [StorageFull, QuotaExceeded].contains(&error.kind())
}

/// `None` where the disk is full.
pub fn unless_full<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Err(error) if is_full(&error) => Ok(None),
        other => other.map(Some),
    }
}

/// `None` where the file is not there.
pub fn if_there<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// `None` where what was read is damaged.
pub fn if_whole<T>(done: io::Result<T>) -> io::Result<Option<T>> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
        other => other.map(Some),
    }
}

pub fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    retry(|| rustix::fs::open(path, flags, Mode::empty()))
}

pub fn folder_in(folder: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    retry(|| rustix::fs::openat(&folder, name, flags, Mode::empty()))
}

/// Makes the folder if it is not there, and opens it.
pub fn make_folder_in(folder: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(&folder, name, PRIVATE_FOLDER) {
        Ok(()) => rustix::fs::fsync(&folder)?,
        Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    let made = folder_in(&folder, name)?;
    give_to_owner(&made, &folder)?;
    Ok(made)
}

/// What root makes belongs to the account, as the folder does: else the account could not serve it.
fn give_to_owner(made: impl AsFd, folder: impl AsFd) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let (owner, found) = (rustix::fs::fstat(folder)?, rustix::fs::fstat(&made)?);
    let is_folder = FileType::from_raw_mode(found.st_mode).is_dir();
    // A file with two names may be anybody's.
    if owner.st_uid != 0 && found.st_uid == 0 && (is_folder || found.st_nlink == 1) {
        let (user, group) = (Uid::from_raw(owner.st_uid), Gid::from_raw(owner.st_gid));
        rustix::fs::fchown(made, Some(user), Some(group))?;
    }
    Ok(())
}

/// Opens a file that is neither a symbolic link nor anything that blocks.
pub fn open_in(folder: impl AsFd, name: &str, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = retry(|| rustix::fs::openat(&folder, name, flags, PRIVATE))?;
    if flags.contains(OFlags::CREATE) {
        give_to_owner(&opened, &folder)?;
    }
    Ok(File::from(opened))
}

pub fn exists_in(folder: impl AsFd, name: &str) -> io::Result<bool> {
    let found = rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW);
    Ok(if_there(found.map_err(io::Error::from))?.is_some())
}

pub fn list_in(folder: impl AsFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        match entry?.file_name().to_str() {
            Err(_) | Ok("." | "..") => {}
            Ok(name) => names.push(name.to_owned()),
        }
    }
    Ok(names)
}

pub fn remove_in(folder: impl AsFd, name: &str) -> io::Result<()> {
    let removed = rustix::fs::unlinkat(folder, name, AtFlags::empty());
    if_there(removed.map_err(io::Error::from)).map(drop)
}

/// Removes a folder of plain files.
pub fn remove_folder_in(folder: impl AsFd, name: &str) -> io::Result<()> {
    let Some(inner) = if_there(folder_in(&folder, name))? else {
        return Ok(());
    };
    for file in list_in(&inner)? {
        remove_in(&inner, &file)?;
    }
    rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)?;
    Ok(())
}

/// Makes a file that shares its data with another one until one of them is written. Durable when it returns.
pub fn clone_in(folder: impl AsFd, name: &str, from: &File) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC;
    let made = open_in(&folder, name, flags)?;
    retry(|| rustix::fs::ioctl_ficlone(&made, from))?;
    // XFS before Linux 6.13 says nothing if it stops half way, on a full disk.
    if made.metadata()?.len() != from.metadata()?.len() {
        return Err(io::ErrorKind::StorageFull.into());
    }
    made.sync_all()
}

/// Whether files in this folder can be cloned: tries it.
pub fn can_clone(folder: impl AsFd) -> io::Result<bool> {
    let trial = || {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC;
        let file = open_in(&folder, "trial", flags)?;
        remove_in(&folder, "trial")?;
        io::Result::Ok(file)
    };
    let (from, to) = (trial()?, trial()?);
    Ok(retry(|| rustix::fs::ioctl_ficlone(&to, &from)).is_ok())
}

/// Renames without replacing anything.
pub fn rename_new(from: impl AsFd, old: &str, to: impl AsFd, new: &str) -> io::Result<()> {
    rustix::fs::renameat_with(from, old, to, new, RenameFlags::NOREPLACE)?;
    Ok(())
}

/// Bytes that are free on the disk of a folder.
pub fn free_bytes(folder: impl AsFd) -> io::Result<u64> {
    let disk = rustix::fs::fstatvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

pub fn sync_folder(folder: impl AsFd) -> io::Result<()> {
    retry(|| rustix::fs::fsync(&folder))
}

pub fn read_all(folder: impl AsFd, name: &str, bytes_max: u64) -> io::Result<Vec<u8>> {
    let file = open_in(folder, name, OFlags::RDONLY)?;
    let len = file.metadata()?.len().min(bytes_max);
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| bad("file too long"))?];
    let got = read_most(&file, &mut bytes, 0)?;
    bytes.truncate(got);
    Ok(bytes)
}

/// The text of a small file. `None`: it is not there.
pub fn text_in(folder: impl AsFd, name: &str, bytes_max: u64) -> io::Result<Option<String>> {
    let bytes = if_there(read_all(folder, name, bytes_max))?;
    Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
}

/// Writes a whole small file so that its name leads to all of it or to what was there before.
pub fn replace_in(folder: impl AsFd, name: &str, bytes: &[u8]) -> io::Result<()> {
    let half = format!("{name}.half");
    let file = open_in(
        &folder,
        &half,
        OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC,
    )?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    rustix::fs::renameat(&folder, half.as_str(), &folder, name)?;
    sync_folder(folder)
}

/// Writes a file anywhere. Its name leads to all of it, or to what was there before.
pub fn write_file(
    path: &Path,
    mode: u32,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    // Others may write in that folder: no link of theirs is followed.
    if_there(std::fs::remove_file(&new))?;
    let mut options = File::options();
    let mut made = options.write(true).create_new(true).mode(mode).open(&new)?;
    write(&mut made)?;
    made.sync_all()?;
    std::fs::rename(new, path)
}

/// As many bytes as the file has there: how many.
pub fn read_most(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The same; the rest of `buf` becomes zero.
pub fn read_padded(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let done = read_most(file, buf, offset)?;
    buf[done..].fill(0);
    Ok(())
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
}

/// 64 random bits of the kernel.
pub fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    retry(|| rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()))?;
    Ok(u64::from_le_bytes(bytes))
}

/// A lock between processes, on a file of its own. The kernel releases it when the process ends,
/// however it ends.
#[derive(Debug)]
pub struct Flock(File);

impl Flock {
    pub fn open(folder: impl AsFd, name: &str) -> io::Result<Self> {
        Ok(Self(open_in(folder, name, OFlags::RDWR | OFlags::CREATE)?))
    }

    pub fn shared(&self) -> io::Result<Locked<'_>> {
        self.lock(FlockOperation::LockShared)
    }

    pub fn exclusive(&self) -> io::Result<Locked<'_>> {
        self.lock(FlockOperation::LockExclusive)
    }

    /// `None`: somebody has it.
    pub fn try_exclusive(&self) -> io::Result<Option<Locked<'_>>> {
        match self.lock(FlockOperation::NonBlockingLockExclusive) {
            Ok(locked) => Ok(Some(locked)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn lock(&self, operation: FlockOperation) -> io::Result<Locked<'_>> {
        lock(&self.0, operation)
    }
}

/// Locks a file.
pub fn lock(file: &File, operation: FlockOperation) -> io::Result<Locked<'_>> {
    retry(|| rustix::fs::flock(file, operation))?;
    Ok(Locked(file))
}

/// The lock, until dropped.
#[derive(Debug)]
pub struct Locked<'a>(&'a File);

impl Locked<'_> {
    /// Keeps the lock until the file is closed.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let _ = rustix::fs::flock(self.0, FlockOperation::Unlock);
    }
}

/// A small record in two slots that are written in turn: a crash leaves the newer or the older one.
///
/// A slot is `u64 sequence | u32 length | text | … | u32 crc32`, little endian, 512 bytes.
#[derive(Debug)]
pub struct Slots {
    file: File,
}

impl Slots {
    pub fn open(folder: impl AsFd, name: &str) -> io::Result<Self> {
        Ok(Self {
            file: open_in(folder, name, OFlags::RDWR | OFlags::CREATE)?,
        })
    }

    /// The newer whole slot: its sequence number and text. `None`: nothing was ever written.
    pub fn read(&self) -> io::Result<Option<(u64, String)>> {
        let mut bytes = [0; 2 * SLOT_BYTES];
        read_padded(&self.file, &mut bytes, 0)?;
        let found = bytes
            .chunks_exact(SLOT_BYTES)
            .filter_map(parse_slot)
            .max_by_key(|(sequence, _)| *sequence);
        if found.is_none() && bytes.iter().any(|b| *b != 0) {
            return Err(bad("both slots of a record are damaged"));
        }
        Ok(found)
    }

    /// Durable when it returns. The caller holds the lock that the record belongs to.
    pub fn write(&self, text: &str) -> io::Result<()> {
        let sequence = match self.read() {
            Ok(found) => found.map_or(0, |(sequence, _)| sequence) + 1,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => 1,
            Err(error) => return Err(error),
        };
        let mut slot = [0; SLOT_BYTES];
        slot[..8].copy_from_slice(&sequence.to_le_bytes());
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        slot[8..12].copy_from_slice(&len.to_le_bytes());
        let room = slot[12..SLOT_BYTES - 4].get_mut(..text.len());
        room.ok_or_else(|| bad("record too long"))?
            .copy_from_slice(text.as_bytes());
        let crc = crc32fast::hash(&slot[..SLOT_BYTES - 4]);
        slot[SLOT_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        self.file
            .write_all_at(&slot, (sequence % 2) * SLOT_BYTES as u64)?;
        self.file.sync_data()
    }
}

fn parse_slot(slot: &[u8]) -> Option<(u64, String)> {
    let (rest, crc) = slot.split_last_chunk::<4>()?;
    let (sequence, len) = (u64_at(rest, 0), u32_at(rest, 8));
    if crc32fast::hash(rest) != u32::from_le_bytes(*crc) || sequence == 0 {
        return None;
    }
    let text = rest[12..].get(..len as usize)?;
    Some((sequence, String::from_utf8(text.to_vec()).ok()?))
}

/// The value of `key` in lines of `key value`.
pub fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
}

/// The same as a number.
pub fn number<T: std::str::FromStr>(text: &str, key: &str) -> Option<T> {
    field(text, key)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_slot_leaves_the_older_record() {
        let folder = tempfile::tempdir().unwrap();
        let at = open_folder(folder.path()).unwrap();
        let slots = Slots::open(&at, "state").unwrap();
        assert_eq!(slots.read().unwrap(), None);
        for text in ["one", "two", "three"] {
            slots.write(text).unwrap();
            assert_eq!(slots.read().unwrap().unwrap().1, text);
        }
        // "three" has sequence number 3 and lies in the second slot.
        let file = File::options()
            .write(true)
            .open(folder.path().join("state"))
            .unwrap();
        file.write_all_at(b"x", SLOT_BYTES as u64 + 40).unwrap();
        assert_eq!(slots.read().unwrap().unwrap().1, "two");
        file.write_all_at(b"x", 40).unwrap();
        assert!(slots.read().is_err());
        slots.write(&"x".repeat(SLOT_BYTES)).unwrap_err();
    }
}
