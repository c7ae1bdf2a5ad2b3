//! A program that runs: waits for its exit, reads its output meanwhile, and ends it where it shall not go
//! on.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Pid;
use sprat_session::child_tree::ChildTree;
use sprat_session::interrupt::Interrupt;

use super::start::{NotStarted, Output, patience, spawn};
use super::tail::Tail;

/// A program that was started.
pub(crate) struct Running {
    tree: ChildTree,
    /// Readable once the process has exited; `None` on an old kernel.
    exited: Option<OwnedFd>,
    outputs: Vec<(Output, Tail)>,
}

/// How the wait for a program ended.
pub(crate) enum End {
    /// It exited.
    Exited(ExitStatus),
    /// It took too long, and was ended.
    TimedOut,
    /// This process shall end, so the program was ended.
    Interrupted,
}

/// Where stdout and stderr of a program go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outputs {
    /// To one pipe.
    Together,
    /// To a pipe each.
    Apart,
}

impl Running {
    /// Starts a program that [`super::start::prepare`] has prepared.
    pub(crate) fn start(
        mut command: Command,
        input: Stdio,
        outputs: Outputs,
    ) -> Result<Self, NotStarted> {
        let cannot = |source| NotStarted::System {
            what: "can't make a pipe".to_owned(),
            source,
        };
        let mut read = Vec::new();
        let mut pipe = || {
            let (output, input) = io::pipe().map_err(cannot)?;
            read.push((Output::new(output).map_err(cannot)?, Tail::default()));
            Ok::<_, NotStarted>(input)
        };
        let stdout = pipe()?;
        let stderr = match outputs {
            Outputs::Together => stdout.try_clone().map_err(cannot)?,
            Outputs::Apart => pipe()?,
        };
        command.stdin(input).stdout(stdout).stderr(stderr);
        let (tree, exited) = spawn(command)?;
        Ok(Self {
            tree,
            exited,
            outputs: read,
        })
    }

    pub(crate) fn pid(&self) -> Option<Pid> {
        self.tree.pid()
    }

    /// Waits for the exit of the process. After `timeout` or an interrupt it gets SIGTERM, with all that it
    /// started, and after `end_limit` SIGKILL.
    pub(crate) fn wait(
        &mut self,
        timeout: Duration,
        interrupt: Option<&Interrupt>,
        end_limit: Duration,
    ) -> io::Result<End> {
        let ended = self.watch(timeout, interrupt);
        if !matches!(ended, Ok(End::Exited(_))) {
            self.tree.end_within(end_limit);
        }
        // What the process wrote at its end.
        self.read_available();
        ended
    }

    /// The end of what it wrote, for each pipe.
    pub(crate) fn into_outputs(self) -> impl Iterator<Item = Vec<u8>> {
        self.outputs.into_iter().map(|(_, tail)| tail.into_bytes())
    }

    fn watch(&mut self, timeout: Duration, interrupt: Option<&Interrupt>) -> io::Result<End> {
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(status) = self.tree.try_wait()? {
                return Ok(End::Exited(status));
            }
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(End::TimedOut);
            }
            if interrupt.is_some_and(Interrupt::requested) {
                return Ok(End::Interrupted);
            }
            let exited = self.exited.as_ref().map(AsFd::as_fd);
            let woken = interrupt.map(Interrupt::readable_when_requested);
            let outputs = self.outputs.iter().filter_map(|(output, _)| output.fd());
            let mut wanted: Vec<_> = outputs
                .chain(exited)
                .chain(woken)
                .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
                .collect();
            let patience = patience(exited.is_some(), left);
            match poll(&mut wanted, Timespec::try_from(patience).ok().as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            self.read_available();
        }
    }

    fn read_available(&mut self) {
        for (output, tail) in &mut self.outputs {
            output.read_available(|bytes| tail.push(bytes));
        }
    }
}
