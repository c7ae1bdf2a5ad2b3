//! Runs the pipeline of a `command` job: a dump whose output becomes a file of the snapshot.
//!
//! Each stage runs as a hook does. The output counts only if every stage ended with 0; a stage that
//! SIGPIPE ended has failed, too.

use std::ffi::{OsStr, OsString};
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use sprat_session::Failure;
use sprat_session::child_tree::ChildTree;
use sprat_session::interrupt::Interrupt;

use crate::hooks::{Context, END_LIMIT, Kind, not_started};
use crate::program::start::{NotStarted, Output, prepare, spawn};
use crate::program::tail::Tail;

/// How long all stages together may take to end after an interrupt: this process ends within 10 s then, and
/// the hooks after the copy must still run.
const INTERRUPTED_LIMIT: Duration = Duration::from_secs(2);
/// How often the stages are looked after while no output comes.
const CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// A pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pipeline {
    /// The words of each stage; neither the list nor a stage is empty.
    pub stages: Vec<Vec<OsString>>,
    /// All stages must have ended by then.
    pub timeout: Duration,
    /// Who runs it; `None`: the user of this process.
    pub user: Option<String>,
}

/// What a pipeline left.
#[derive(Debug)]
pub struct PipelineReport {
    /// Bytes of output, or why the output does not count.
    pub end: Result<u64, Failure>,
    /// The last 64 KiB that the stages wrote to stderr.
    pub log: Vec<u8>,
}

/// Runs the pipeline and writes its output to `to`. Whatever was written counts only if the report
/// says so.
pub fn run(
    pipeline: &Pipeline,
    context: &Context,
    to: &mut dyn Write,
    interrupt: &Interrupt,
) -> PipelineReport {
    run_within(pipeline, context, to, interrupt, END_LIMIT)
}

pub(super) fn run_within(
    pipeline: &Pipeline,
    context: &Context,
    to: &mut dyn Write,
    interrupt: &Interrupt,
    end_limit: Duration,
) -> PipelineReport {
    let mut log = Tail::default();
    let end = start(pipeline, context, end_limit).and_then(|mut running| {
        let end = running.transfer(to, interrupt, pipeline.timeout, &mut log);
        let end = end.and_then(|bytes| running.judge().map(|()| bytes));
        if interrupt.requested() {
            running.end_limit = running.end_limit.min(INTERRUPTED_LIMIT);
        }
        running.end_all();
        running.log.read_available(|bytes| log.push(bytes));
        end
    });
    PipelineReport {
        end,
        log: log.into_bytes(),
    }
}

struct Stage {
    program: OsString,
    tree: ChildTree,
    status: Option<ExitStatus>,
}

struct Running {
    stages: Vec<Stage>,
    /// `None` once all writers have closed it.
    output: Option<PipeReader>,
    log: Output,
    end_limit: Duration,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end_all();
    }
}

fn start(pipeline: &Pipeline, context: &Context, end_limit: Duration) -> Result<Running, Failure> {
    let system =
        |error: io::Error| Failure::failed("can't make the pipes of the command").caused_by(&error);
    let variables = context.variables(Kind::Command);
    let (log, log_input) = io::pipe().map_err(system)?;
    let mut running = Running {
        stages: Vec::new(),
        output: None,
        log: Output::new(log).map_err(system)?,
        end_limit,
    };
    for words in &pipeline.stages {
        let program = words.first().cloned().unwrap_or_default();
        let refused = |why: NotStarted| not_started(&why, &program, Kind::Command);
        let (output, input) = io::pipe().map_err(system)?;
        let user = pipeline.user.as_deref();
        let mut command = prepare(words, user, &variables).map_err(refused)?;
        let stdin = running.output.take().map_or_else(Stdio::null, Stdio::from);
        let stderr = log_input.try_clone().map_err(system)?;
        command.stdin(stdin).stdout(input).stderr(stderr);
        let (tree, _) = spawn(command).map_err(refused)?;
        running.output = Some(output);
        running.stages.push(Stage {
            program,
            tree,
            status: None,
        });
    }
    if let Some(output) = &running.output {
        let flags = rustix::fs::fcntl_getfl(output).map_err(|errno| system(errno.into()))?;
        rustix::fs::fcntl_setfl(output, flags | OFlags::NONBLOCK)
            .map_err(|errno| system(errno.into()))?;
    }
    Ok(running)
}

impl Running {
    /// Moves the output until all stages have ended. A child that keeps the pipe open is not waited
    /// for.
    fn transfer(
        &mut self,
        to: &mut dyn Write,
        interrupt: &Interrupt,
        timeout: Duration,
        log: &mut Tail,
    ) -> Result<u64, Failure> {
        let deadline = Instant::now().checked_add(timeout);
        let mut buffer = vec![0; 64 << 10];
        let mut bytes = 0;
        loop {
            interrupt.check()?;
            if deadline.is_some_and(|at| Instant::now() >= at) {
                return Err(Failure::failed("the command took too long")
                    .because(format!("it did not end within {} s", timeout.as_secs()))
                    .with_hint("raise `command_timeout` if it needs more time"));
            }
            // Before the output is read: what was written before the end is then read, too.
            let ended = self.all_ended()?;
            self.log.read_available(|bytes| log.push(bytes));
            match self.read(&mut buffer)? {
                Some(0) if ended => return Ok(bytes),
                // All writers have closed it, but not all have ended.
                Some(0) => std::thread::sleep(CHECK_INTERVAL),
                None if ended => return Ok(bytes),
                None => self.wait(interrupt)?,
                Some(count) => {
                    to.write_all(&buffer[..count]).map_err(|error| {
                        Failure::failed("can't write the output of the command").caused_by(&error)
                    })?;
                    bytes += count as u64;
                }
            }
        }
    }

    /// `Some(0)`: closed. `None`: nothing is there now.
    fn read(&mut self, buffer: &mut [u8]) -> Result<Option<usize>, Failure> {
        let Some(output) = &mut self.output else {
            return Ok(Some(0));
        };
        loop {
            match output.read(buffer) {
                Ok(0) => {
                    self.output = None;
                    return Ok(Some(0));
                }
                Ok(count) => return Ok(Some(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    let what = "can't read the output of the command";
                    return Err(Failure::failed(what).caused_by(&error));
                }
            }
        }
    }

    fn wait(&self, interrupt: &Interrupt) -> Result<(), Failure> {
        let woken = interrupt.readable_when_requested();
        let pipes = self.output.as_ref().map(AsFd::as_fd).into_iter();
        let mut wanted: Vec<_> = pipes
            .chain(self.log.fd())
            .chain([woken])
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        match poll(
            &mut wanted,
            Timespec::try_from(CHECK_INTERVAL).ok().as_ref(),
        ) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(Failure::failed("can't wait for the command").caused_by(&errno)),
        }
    }

    fn all_ended(&mut self) -> Result<bool, Failure> {
        for stage in &mut self.stages {
            if stage.status.is_none() {
                let status = stage.tree.try_wait();
                stage.status = status.map_err(|error| {
                    Failure::failed("can't wait for the command").caused_by(&error)
                })?;
            }
        }
        Ok(self.stages.iter().all(|stage| stage.status.is_some()))
    }

    /// Fails if a stage failed.
    fn judge(&self) -> Result<(), Failure> {
        let failed: Vec<String> = self
            .stages
            .iter()
            .filter_map(|stage| {
                let status = stage.status.filter(|status| !status.success())?;
                Some(format!("{}: {status}", shown(&stage.program)))
            })
            .collect();
        if failed.is_empty() {
            return Ok(());
        }
        let failure = Failure::failed("the command failed");
        let failure = failed.into_iter().fold(failure, Failure::because);
        Err(failure.with_hint("the last snapshot stays, and no part of this output is used"))
    }

    /// Ends what still runs.
    fn end_all(&mut self) {
        let deadline = Instant::now() + self.end_limit;
        // The first ones first: the others may end by themselves then.
        for stage in &mut self.stages {
            if stage.status.is_none() {
                let left = deadline.saturating_duration_since(Instant::now());
                stage.tree.end_within(left);
                stage.status = stage.tree.try_wait().ok().flatten();
            }
        }
    }
}

fn shown(program: &OsStr) -> String {
    format!("{program:?}")
}
