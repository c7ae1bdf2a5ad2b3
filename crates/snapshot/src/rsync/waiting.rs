//! Finds the file that a process or thread waits for in a system call, from the kernel's tables.

use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// System calls that concern a file, by number (asm/unistd_64.h, asm-generic/unistd.h). Only two
/// architectures are known; on others nothing is found.
struct Calls {
    /// `openat` and `openat2`, with a folder and a name.
    open_at: &'static [u64],
    /// Others with a folder and a name: `newfstatat`, `statx`, `readlinkat`, `faccessat`.
    at: &'static [u64],
    /// `open`, with a name.
    open: &'static [u64],
    /// Others with a name: `stat`, `lstat`, `readlink`, `access`, `statfs`, `chdir`, and those that read
    /// attributes.
    named: &'static [u64],
    /// With a descriptor: `read`, `pread64`, `getdents64`, `fstat`, `close`, `fadvise64`, and those that
    /// read attributes.
    of_descriptor: &'static [u64],
}

#[cfg(target_arch = "x86_64")]
const CALLS: Calls = Calls {
    open_at: &[257, 437],
    at: &[262, 332, 267, 269],
    open: &[2],
    named: &[4, 6, 89, 21, 137, 80, 191, 192, 194, 195],
    of_descriptor: &[0, 17, 217, 5, 3, 221, 193, 196],
};
#[cfg(not(target_arch = "x86_64"))]
const CALLS: Calls = Calls {
    open_at: &[56, 437],
    at: &[79, 291, 78, 48],
    open: &[],
    named: &[43, 49, 8, 9, 11, 12],
    of_descriptor: &[63, 67, 61, 80, 57, 223, 10, 13],
};
/// `AT_FDCWD`: relative to the working folder.
const CURRENT_FOLDER: i32 = -100;
const PATH_BYTES_MAX: usize = 4096;

/// A system call in which a process or thread waits.
struct Call {
    /// Its folder in /proc.
    process: PathBuf,
    number: u64,
    arguments: Vec<u64>,
}

impl Call {
    /// Reads `NUMBER ARGUMENT…` of the call in which the process waits (proc.rst). The file contains
    /// `running` otherwise.
    fn of(process: PathBuf) -> Option<Self> {
        let call = fs::read_to_string(process.join("syscall")).ok()?;
        let mut words = call.split_whitespace();
        let number: u64 = words.next()?.parse().ok()?;
        let arguments = words.map_while(|word| {
            let digits = word.strip_prefix("0x")?;
            u64::from_str_radix(digits, 16).ok()
        });
        Some(Self {
            number,
            arguments: arguments.collect(),
            process,
        })
    }

    fn opens(&self) -> bool {
        CALLS.open_at.contains(&self.number) || CALLS.open.contains(&self.number)
    }

    /// The file of the call, absolute. Accesses no file system, because it may be the one that doesn't
    /// answer.
    fn file(&self) -> Option<PathBuf> {
        let is = |calls: &[u64]| calls.contains(&self.number);
        let (first, second) = (self.arguments.first()?, self.arguments.get(1)?);
        if is(CALLS.of_descriptor) {
            let file = self.descriptor(*first)?;
            // Pipes and sockets are not files.
            return file.is_absolute().then_some(file);
        }
        let (folder, name) = if is(CALLS.open_at) || is(CALLS.at) {
            (self.descriptor(*first)?, second)
        } else if is(CALLS.open) || is(CALLS.named) {
            (
                self.descriptor(u64::from(CURRENT_FOLDER.cast_unsigned()))?,
                first,
            )
        } else {
            return None;
        };
        // An absolute name replaces the folder.
        Some(folder.join(text_at(&self.process, *name)?))
    }

    /// What a descriptor of the process refers to.
    fn descriptor(&self, argument: u64) -> Option<PathBuf> {
        // An `int` in a register: the upper half has no meaning.
        let low = u32::try_from(argument & u64::from(u32::MAX)).ok()?;
        let link = match low.cast_signed() {
            CURRENT_FOLDER => self.process.join("cwd"),
            number => self.process.join("fd").join(number.to_string()),
        };
        fs::read_link(link).ok()
    }
}

/// The file that `process` waits for in a call, absolute.
pub(super) fn file_waited_for(process: u32) -> Option<PathBuf> {
    Call::of(folder(process))?.file()
}

/// The same of the thread with this folder in /proc.
pub(crate) fn file_of_thread(thread: &Path) -> Option<PathBuf> {
    Call::of(thread.to_owned())?.file()
}

fn folder(process: u32) -> PathBuf {
    Path::new("/proc").join(process.to_string())
}

/// The pipe that `process` is trying to open, absolute. Accesses the file system of what it is opening,
/// which may not answer.
pub(super) fn pipe_opened_by(process: u32) -> Option<PathBuf> {
    let call = Call::of(folder(process)).filter(Call::opens)?;
    let path = call.file()?;
    let is_pipe = fs::symlink_metadata(&path).is_ok_and(|about| about.file_type().is_fifo());
    is_pipe.then_some(path)
}

/// The NUL-terminated text at `address` of the process.
fn text_at(process: &Path, address: u64) -> Option<PathBuf> {
    let memory = File::open(process.join("mem")).ok()?;
    let mut bytes = vec![0; PATH_BYTES_MAX];
    // Fewer bytes if the memory area ends.
    let read = memory.read_at(&mut bytes, address).ok()?;
    let end = bytes[..read].iter().position(|byte| *byte == 0)?;
    bytes.truncate(end);
    Some(std::ffi::OsString::from_vec(bytes).into())
}
