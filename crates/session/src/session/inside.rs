//! Looks into the snapshots of an open container.

use std::os::fd::{AsFd, OwnedFd};

use sprat_inside::{
    CatSpec, DiffReport, DiffSpec, FindReport, FindSpec, ListSpec, Listing, VersionsReport,
    VersionsSpec,
};

use crate::Failure;
use crate::interrupt::Interrupt;
use crate::protocol::messages::WorkerOrder;
use crate::protocol::reports::Observer;
use crate::session::Session;

impl Session {
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

    /// Writes the content of a file to `out`, and returns how many bytes.
    pub fn cat(
        &mut self,
        spec: CatSpec,
        out: OwnedFd,
        observer: &mut dyn Observer,
        interrupt: &Interrupt,
    ) -> Result<u64, Failure> {
        interrupt.check()?;
        self.supervisor.give_worker(out.as_fd())?;
        drop(out);
        self.ask(&WorkerOrder::Cat(Box::new(spec)), observer, interrupt)
    }
}
