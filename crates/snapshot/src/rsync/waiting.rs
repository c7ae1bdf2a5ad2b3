//! Finds a process that waits in `open` for the writer of a pipe, in the kernel's tables.

use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// The numbers of `openat` and `openat2` (asm/unistd_64.h, asm-generic/unistd.h); other machines than
/// these two have none here, and no pipe is found there.
#[cfg(target_arch = "x86_64")]
const OPEN_AT: [u64; 2] = [257, 437];
#[cfg(not(target_arch = "x86_64"))]
const OPEN_AT: [u64; 2] = [56, 437];
/// `open` of x86_64, which has no folder argument.
#[cfg(target_arch = "x86_64")]
const OPEN: Option<u64> = Some(2);
#[cfg(not(target_arch = "x86_64"))]
const OPEN: Option<u64> = None;
/// `AT_FDCWD`: relative to the working folder.
const CURRENT_FOLDER: i32 = -100;
const PATH_BYTES_MAX: usize = 4096;

/// The pipe that `process` is opening, absolute, if it waits there.
pub(super) fn pipe_opened_by(process: u32) -> Option<PathBuf> {
    let own = Path::new("/proc").join(process.to_string());
    // `NUMBER ARGUMENT…` of the call in which it waits (proc.rst); `running` otherwise.
    let call = fs::read_to_string(own.join("syscall")).ok()?;
    let mut words = call.split_whitespace();
    let number: u64 = words.next()?.parse().ok()?;
    let mut argument = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let (folder, address) = if OPEN == Some(number) {
        (CURRENT_FOLDER, argument()?)
    } else if OPEN_AT.contains(&number) {
        // An `int` in a register: the upper half means nothing.
        let low = u32::try_from(argument()? & u64::from(u32::MAX)).ok()?;
        (low.cast_signed(), argument()?)
    } else {
        return None;
    };
    let folder = if folder == CURRENT_FOLDER {
        own.join("cwd")
    } else {
        own.join("fd").join(folder.to_string())
    };
    let name = text_at(&own, address)?;
    // An absolute name replaces the folder.
    let path = fs::read_link(folder).ok()?.join(name);
    let is_pipe = fs::symlink_metadata(&path).is_ok_and(|about| about.file_type().is_fifo());
    is_pipe.then_some(path)
}

/// The text that ends with NUL at `address` of the process.
fn text_at(process: &Path, address: u64) -> Option<PathBuf> {
    let memory = File::open(process.join("mem")).ok()?;
    let mut bytes = vec![0; PATH_BYTES_MAX];
    // Fewer where the memory ends.
    let read = memory.read_at(&mut bytes, address).ok()?;
    let end = bytes[..read].iter().position(|byte| *byte == 0)?;
    bytes.truncate(end);
    Some(std::ffi::OsString::from_vec(bytes).into())
}
