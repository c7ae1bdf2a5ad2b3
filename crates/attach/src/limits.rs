//! Resource limits of this process (setrlimit(2)): lifts them, and reports those that are too low.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::sys;

/// The number of open files that most logins allow.
const OPEN_FILES_WANTED: u64 = 1024;
/// A session over SSH needs some dozens. A limit below this is most likely too low.
const OPEN_FILES_NEEDED: u64 = 128;

/// The address space that the largest process of a session needs, with a margin.
const SESSION_MEMORY_BYTES: u64 = 2 << 30;

/// Lifts the limits on file size (`ulimit -f`) and memory (`ulimit -v`), and raises the one on open
/// files, for this process and for all that it starts, as far as permitted. The limits are meant for
/// other programs, and would end a session in the middle. If a limit stays, a write beyond it fails with
/// EFBIG and does not end the process. To be called first in a program.
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

/// Raises the limit on open files (`ulimit -n`) to that of most logins. With more, programs that close
/// every possible descriptor would be slow.
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

/// Sets a limit. If only root may do that, raises the soft limit to the hard limit.
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

/// The limit on open files (`ulimit -n`), if it is too low for a session: connections, threads, rsync
/// and libcryptsetup need some dozens, and each fails with a different message.
#[must_use]
pub fn open_files_limit_too_low() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile).current?;
    (limit < OPEN_FILES_NEEDED).then_some(limit)
}

/// The limit on memory (`ulimit -v`) in bytes, if it is too low for a session: its threads alone reserve
/// half a gigabyte of address space.
#[must_use]
pub fn memory_limit_too_low() -> Option<u64> {
    let limit = getrlimit(Resource::As).current?;
    (limit < SESSION_MEMORY_BYTES).then_some(limit)
}
