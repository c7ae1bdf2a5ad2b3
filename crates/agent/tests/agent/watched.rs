//! Agents whose system calls are watched: the kernel stops for those only that are not on a list.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use sprat_testkit::dice;

use crate::client::{Client, Served, agent};

/// No program is started, nothing is connected to, and nothing gets another owner, mode or link.
const ALLOWED: &[&str] = &[
    "arch_prctl",
    "access",
    "brk",
    "clock_gettime",
    "clock_nanosleep",
    "close",
    "exit_group",
    "faccessat2",
    "fallocate",
    "fcntl",
    "fdatasync",
    "flock",
    "fstat",
    "fstatfs",
    "fsync",
    "ftruncate",
    "futex",
    "getcwd",
    "getdents64",
    "getegid",
    "geteuid",
    "getpid",
    "getrandom",
    "gettid",
    "lseek",
    "lstat",
    "madvise",
    "mkdirat",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "nanosleep",
    "newfstatat",
    "open",
    "openat",
    "pidfd_open",
    "pidfd_send_signal",
    "poll",
    "prctl",
    "pread64",
    "prlimit64",
    "pwrite64",
    "read",
    "readlink",
    "renameat",
    "renameat2",
    "rseq",
    "rt_sigaction",
    "rt_sigprocmask",
    "sched_getaffinity",
    "set_robust_list",
    "set_tid_address",
    "sigaltstack",
    "stat",
    "statx",
    "umask",
    "uname",
    "unlinkat",
    "write",
];

/// What a fuzzer of these connections found.
pub struct Watch {
    folder: tempfile::TempDir,
    connections: usize,
}

impl Watch {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            connections: 0,
        }
    }

    /// strace runs beside it, so the child is the agent itself.
    pub fn connect(&mut self, served: &Served) -> Client {
        let others: Vec<String> = ALLOWED.iter().map(|name| format!("?{name}")).collect();
        let trace = self.folder.path().join(self.connections.to_string());
        self.connections += 1;
        let mut command = Command::new("strace");
        command.args(["-D", "-qq", "-f", "--seccomp-bpf", "-e", "signal=none"]);
        command.args(["-e", &format!("trace=!{}", others.join(",")), "-o"]);
        command.arg(trace).arg(agent()).args(["serve", "--root"]);
        command.arg(served.path(""));
        Client::start(command)
    }

    /// No connection came to another system call than the start of its own program.
    #[track_caller]
    pub fn check(&self) {
        let mut starts = 0;
        let mut others = BTreeSet::new();
        for entry in fs::read_dir(self.folder.path()).unwrap() {
            let text = fs::read_to_string(entry.unwrap().path()).unwrap();
            let mut lines = text.lines();
            starts += usize::from(lines.next().is_some_and(|first| first.contains("execve(")));
            // Of all ioctls only the one that makes a clone.
            let other = |line: &&str| !line.contains(", BTRFS_IOC_CLONE or FICLONE, ");
            others.extend(lines.filter(other).map(str::to_owned));
        }
        assert!(others.is_empty(), "{others:?}");
        assert_eq!(starts, self.connections, "not all of them were watched");
    }
}

/// So long a fuzzer goes on: `make torture` for 5 minutes, both fuzzers of logs together in CI, too. There they begin first
/// and take the processor time that nobody else needs.
pub fn fuzz_until() -> Instant {
    let long = dice::number("SPRAT_TORTURE_ROUNDS");
    let short_s = match std::env::var_os("CI") {
        Some(_) => 150,
        None => 3,
    };
    // Others go first. nextest has a process for each test.
    rustix::process::setpriority_process(None, 10).unwrap();
    Instant::now() + Duration::from_secs(long.map_or(short_s, |rounds| rounds * 3))
}

/// The processor time that this process and its children took.
pub fn cpu_time() -> String {
    let used = fs::read_to_string("/proc/self/stat").unwrap();
    let fields = used.rsplit_once(')').unwrap().1.split_whitespace();
    // utime, stime, cutime, cstime in hundredths of a second.
    let ticks = fields.skip(11).take(4);
    let ticks: u64 = ticks.map(|field| field.parse::<u64>().unwrap()).sum();
    format!("{} s of processor time", ticks / 100)
}
