//! The limits of this process (setrlimit(2)): lifts them, and reports those that are too low.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys;

/// Open files that a process has in most logins.
const OPEN_FILES_WANTED: u64 = 1024;
/// A session over SSH needs some dozens; a limit below this is most likely too low.
const OPEN_FILES_NEEDED: u64 = 128;

/// Address space of a session's largest process, with room to spare.
const SESSION_MEMORY_BYTES: u64 = 2 << 30;

/// Lifts the limits on file size (`ulimit -f`) and memory (`ulimit -v`) of this process, and so of those
/// that it starts, as far as it may. They are meant for what a person's programs write, and would end a
/// session in the middle. Where a limit stays, a write beyond it fails with EFBIG and ends no process.
/// Raises the limit on open files, too. To be called first in a program.
pub fn lift_limits() {
    for kind in [Resource::Fsize, Resource::As] {
        if getrlimit(kind).current.is_some() {
            let none = Rlimit {
                current: None,
                maximum: None,
            };
            set_or_use_hard_limit(kind, none);
        }
    }
    lift_open_files();
    sys::ignore_file_size_signal();
}

/// Raises the limit on open files (`ulimit -n`) to what a login usually has. More would make those programs
/// slow that close every descriptor they might have inherited.
fn lift_open_files() {
    let now = getrlimit(Resource::Nofile);
    if now.current.is_some_and(|files| files < OPEN_FILES_WANTED) {
        let wanted = Rlimit {
            current: Some(OPEN_FILES_WANTED),
            maximum: now.maximum.map(|files| files.max(OPEN_FILES_WANTED)),
        };
        set_or_use_hard_limit(Resource::Nofile, wanted);
    }
}

/// Sets a limit. If only root may do that, raises the soft limit to the hard one.
fn set_or_use_hard_limit(kind: Resource, wanted: Rlimit) {
    if setrlimit(kind, wanted).is_err() {
        let now = getrlimit(kind);
        let hard = Rlimit {
            current: now.maximum,
            ..now
        };
        let _ = setrlimit(kind, hard);
    }
}

/// The limit of open files (`ulimit -n`), where it is too low for a session: its connections, its threads,
/// rsync and libcryptsetup need some dozens, and each fails in words of its own.
#[must_use]
pub fn open_files_limit_too_low() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile).current?;
    (limit < OPEN_FILES_NEEDED).then_some(limit)
}

/// The limit of memory (`ulimit -v`), in bytes, where it is too low for a session: half of a gigabyte of
/// address space is set aside for its threads alone.
#[must_use]
pub fn memory_limit_too_low() -> Option<u64> {
    let limit = getrlimit(Resource::As).current?;
    (limit < SESSION_MEMORY_BYTES).then_some(limit)
}
