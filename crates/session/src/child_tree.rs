//! Waits for a child, and ends it with all that it started.

use std::io;
use std::process::{Child, ChildStdout, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::interrupt::Interrupt;

/// How long the child may take to end after SIGTERM, before SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A child and all that it starts.
pub struct ChildTree {
    child: Child,
    /// It leads a process group of its own.
    own_group: bool,
}

impl ChildTree {
    /// Of a child that was just started; `own_group`: it leads a process group of its own.
    #[must_use]
    pub fn new(child: Child, own_group: bool) -> Self {
        Self { child, own_group }
    }

    /// The pipe of its standard output.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for its end; `None` after an interrupt.
    pub fn wait(&mut self, interrupt: &Interrupt) -> io::Result<Option<ExitStatus>> {
        while !interrupt.requested() {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(None)
    }

    /// Its exit status, if it has exited.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Ends it and all that it started.
    pub fn end(&mut self) {
        self.end_within(END_LIMIT);
    }

    /// Ends it and all that it started: SIGTERM, then SIGKILL once the child has ended, and after
    /// `limit` at the latest.
    pub fn end_within(&mut self, limit: Duration) {
        let Some(leader) = self.pid() else {
            return;
        };
        let child = &mut self.child;
        let has_ended = &mut || !matches!(child.try_wait(), Ok(None));
        end_tree(leader, self.own_group, limit, has_ended);
        let _ = self.child.wait();
    }

    /// The child's process.
    #[must_use]
    pub fn pid(&self) -> Option<Pid> {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw)
    }
}

/// Ends the process `leader` and all that it started, see [`ChildTree::end_within`]. `own_group`: it leads a process
/// group of its own. `has_ended` returns whether it has ended.
pub fn end_tree(
    leader: Pid,
    own_group: bool,
    limit: Duration,
    has_ended: &mut dyn FnMut() -> bool,
) {
    let descendants = descendants(leader);
    // Each may have ended by itself already.
    let signal = |signal: Signal, with_leader: bool| {
        if own_group {
            let _ = kill_process_group(leader, signal);
        } else if with_leader {
            let _ = kill_process(leader, signal);
        }
        for pid in &descendants {
            let _ = kill_process(*pid, signal);
        }
    };
    signal(Signal::TERM, true);
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline && !has_ended() {
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(Signal::KILL, !has_ended());
}

/// All processes below `leader` at this moment, from proc(5).
fn descendants(leader: Pid) -> Vec<Pid> {
    let parents: Vec<(Pid, Pid)> = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let pid = Pid::from_raw(name.to_str()?.parse().ok()?)?;
            let stat =
                std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
            // `PID (NAME) STATE PARENT …`, and NAME may hold anything.
            let (_, rest) = stat.rsplit_once(')')?;
            let parent = rest.split_whitespace().nth(1)?.parse().ok()?;
            Some((pid, Pid::from_raw(parent)?))
        })
        .collect();
    let mut found = vec![leader];
    let mut at = 0;
    while at < found.len() {
        let above = found[at];
        found.extend(
            parents
                .iter()
                .filter(|(_, parent)| *parent == above)
                .map(|(pid, _)| *pid),
        );
        at += 1;
    }
    found.remove(0);
    found
}
