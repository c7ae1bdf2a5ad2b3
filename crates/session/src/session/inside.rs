//! Reads the snapshots of an open container: listings, searches, differences.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use sprat_inside::{
    AnalyzeReport, AnalyzeSpec, CatSpec, DiffReport, DiffSpec, FindReport, FindSpec, FolderSize,
    ListSpec, Listing, SizeSpec, SourceDiffSpec, VersionsReport, VersionsSpec,
};
use sprat_snapshot::escape_name;

use crate::Failure;
use crate::interrupt::Interrupt;
use crate::protocol::frames::Sender;
use crate::protocol::messages::WorkerOrder;
use crate::protocol::reports::Observer;
use crate::protocol::spawn::Child;
use crate::session::{Session, Via};
use crate::state::paths::StatePaths;

/// Stops what a session does at the moment, from another thread. The session stays open.
#[derive(Debug, Clone)]
pub struct Stopper {
    worker: Sender,
}

impl Stopper {
    /// Stops the order under way, if there is one: it fails with [`Exit::Interrupted`](crate::Exit). Where an
    /// order has just ended, the next one may be stopped instead.
    pub fn stop(&self) {
        // Where the other process is gone, the order ends anyway.
        let _ = self.worker.send(&WorkerOrder::CancelCurrent);
    }
}

impl Session {
    /// See [`Stopper`].
    pub fn stopper(&self) -> Result<Stopper, Failure> {
        let worker = match &self.via {
            Via::Own(supervisor) => supervisor.worker().map(Child::sender),
            Via::Beside(beside, _) => Some(beside.sender()),
        };
        let worker = worker.ok_or_else(|| Failure::failed("there is no worker"))?;
        Ok(Stopper { worker })
    }

    /// Whether its processes have ended, so that each further call fails.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(&self.via, Via::Own(supervisor) if supervisor.is_over())
    }

    /// Sums up a folder of a snapshot.
    pub fn size(
        &mut self,
        spec: SizeSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<FolderSize, Failure> {
        self.ask(&WorkerOrder::Size(Box::new(spec)), observer, interrupt)
    }

    /// Lists a folder of a snapshot.
    pub fn list_folder(
        &mut self,
        spec: ListSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<Listing, Failure> {
        self.ask(
            &WorkerOrder::ListFolder(Box::new(spec)),
            observer,
            interrupt,
        )
    }

    /// Finds paths in all snapshots.
    pub fn find(
        &mut self,
        spec: FindSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<FindReport, Failure> {
        self.ask(&WorkerOrder::Find(Box::new(spec)), observer, interrupt)
    }

    /// Finds the versions of a path.
    pub fn versions(
        &mut self,
        spec: VersionsSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<VersionsReport, Failure> {
        self.ask(&WorkerOrder::Versions(Box::new(spec)), observer, interrupt)
    }

    /// Compares two snapshots.
    pub fn diff(
        &mut self,
        spec: DiffSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<DiffReport, Failure> {
        self.ask(&WorkerOrder::Diff(Box::new(spec)), observer, interrupt)
    }

    /// Compares a snapshot with its source. `paths` are all that a backup would copy now, escaped, as
    /// [`sprat_snapshot::preview`] lists them.
    pub fn diff_source(
        &mut self,
        spec: SourceDiffSpec,
        paths: &[String],
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<DiffReport, Failure> {
        interrupt.check()?;
        let failed = |error: io::Error| {
            Failure::failed("the list of the source can't be written").caused_by(&error)
        };
        let list = tempfile::tempfile_in(&self.settings.runtime_dir).map_err(failed)?;
        let mut out = BufWriter::new(&list);
        for path in paths {
            writeln!(out, "{path}").map_err(failed)?;
        }
        out.flush().map_err(failed)?;
        drop(out);
        (&list).rewind().map_err(failed)?;
        self.via.give_worker(list.as_fd())?;
        self.ask(
            &WorkerOrder::DiffSource(Box::new(spec)),
            observer,
            interrupt,
        )
    }

    /// Finds what snapshots cost.
    pub fn analyze(
        &mut self,
        mut spec: AnalyzeSpec,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<AnalyzeReport, Failure> {
        // Beside a mount, a person may change the snapshots at any moment.
        if matches!(self.via, Via::Own(_)) && self.facts().costs_hold && !self.settings.is_past() {
            let facts = self.facts();
            let paths =
                StatePaths::new(&self.settings.state_dir, &facts.uuid, &self.settings.target);
            spec.kept = Some(escape_name(paths.costs().as_os_str().as_encoded_bytes()));
        }
        self.ask(&WorkerOrder::Analyze(Box::new(spec)), observer, interrupt)
    }

    /// Writes the content of a file to `out`, and returns how many bytes. If the reader of a pipe has closed its
    /// end, it has all that it wanted: that is no failure.
    pub fn cat(
        &mut self,
        spec: CatSpec,
        out: OwnedFd,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<u64, Failure> {
        interrupt.check()?;
        let failed =
            |error: io::Error| Failure::failed("can't write to standard output").caused_by(&error);
        // The worker may be that of a session that writes, and must never wait in a write: a terminal may stand
        // still. So it gets a pipe, and this process waits for the terminal.
        let (mut from_worker, to_here) = io::pipe().map_err(failed)?;
        let (copied, end) = mpsc::channel();
        std::thread::Builder::new()
            .name("output".to_owned())
            .spawn(move || {
                let _ = copied.send(pass_on(&mut from_worker, &mut File::from(out)));
            })
            .map_err(failed)?;
        self.via.give_worker(to_here.as_fd())?;
        drop(to_here);
        let read: u64 = self.ask(&WorkerOrder::Cat(Box::new(spec)), observer, interrupt)?;
        loop {
            interrupt.check()?;
            match end.recv_timeout(INTERVAL) {
                Ok(Ok(written)) => return Ok(written),
                Ok(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(read),
                Ok(Err(error)) => return Err(failed(error)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(read),
            }
        }
    }
}

/// As [`io::copy`], which uses splice(2). That keeps the pipe locked while the output waits, and so the worker.
fn pass_on(from: &mut impl Read, out: &mut impl Write) -> io::Result<u64> {
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0;
    loop {
        let length = match from.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        if length == 0 {
            return Ok(passed);
        }
        out.write_all(&buffer[..length])?;
        passed += length as u64;
    }
}

/// How often an interrupt is checked.
const INTERVAL: Duration = Duration::from_millis(100);
