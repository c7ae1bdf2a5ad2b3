//! Orders that only read the mounted volume: for the session itself, and for other commands of this machine.

use std::fs::File;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::Path;

use sprat_inside::Place;
use sprat_snapshot::{Cancel, Progress, SnapshotError};

use crate::Failure;
use crate::file_system::FileSystemKind;
use crate::protocol::frames::Sender;
use crate::protocol::messages::{WorkerOrder, WorkerReply};

/// Who asks, and for what.
pub(super) struct Reading<'r> {
    /// The mounted volume.
    pub(super) root: &'r Path,
    pub(super) events: &'r Sender,
    pub(super) descriptors: &'r UnixStream,
    pub(super) cancel: &'r Cancel,
    pub(super) file_system: FileSystemKind,
}

impl Reading<'_> {
    /// Carries out an order. `None`: it does more than read.
    pub(super) fn answer(&self, order: WorkerOrder) -> Result<Option<WorkerReply>, Failure> {
        let (root, cancel) = (self.root, self.cancel);
        Ok(Some(match order {
            WorkerOrder::List => WorkerReply::Listed(sprat_snapshot::list(root)?),
            WorkerOrder::ListFolder(spec) => {
                WorkerReply::FolderListed(Box::new(sprat_inside::list(root, &spec, cancel)?))
            }
            WorkerOrder::Find(spec) => {
                WorkerReply::Found(Box::new(sprat_inside::find(root, &spec, cancel)?))
            }
            WorkerOrder::Versions(spec) => {
                WorkerReply::VersionsFound(Box::new(sprat_inside::versions(root, &spec, cancel)?))
            }
            WorkerOrder::Diff(spec) => {
                WorkerReply::Differs(Box::new(sprat_inside::diff(root, &spec, cancel)?))
            }
            WorkerOrder::Analyze(spec) => {
                let is_exact = self.file_system.subvolumes().is_none();
                let space = self.file_system.shared_space(root, cancel);
                let report = sprat_inside::analyze(root, &spec, is_exact, space.as_ref(), cancel)?;
                WorkerReply::Analyzed(Box::new(report))
            }
            WorkerOrder::Size(spec) => WorkerReply::Sized(sprat_inside::size(root, &spec, cancel)?),
            WorkerOrder::DiffSource(spec) => {
                let list = sprat_attach::receive_fd(self.descriptors)?;
                let mut list = BufReader::new(File::from(list));
                let report = self.with_mounts(vec![Path::new("/")], Path::new("/"), |_| {
                    sprat_inside::diff_source(root, &spec, &mut list, cancel)
                })?;
                WorkerReply::Differs(Box::new(report))
            }
            WorkerOrder::Cat(spec) => {
                let out = sprat_attach::receive_fd(self.descriptors)?;
                WorkerReply::Written(sprat_inside::cat(root, &spec, out, cancel)?)
            }
            WorkerOrder::Export(spec) => {
                let report = self.with_mounts(vec![&*spec.to], &spec.rsync, |events| {
                    sprat_snapshot::export(root, &spec, events, cancel)
                })?;
                WorkerReply::Exported(Box::new(report))
            }
            WorkerOrder::Restore(mut spec, patterns) => {
                if !patterns.is_empty() {
                    let (job, snapshot) = (spec.job.clone(), spec.snapshot.clone());
                    let place = Place::new(job, snapshot, spec.path.take().as_deref());
                    spec.paths = sprat_inside::matching(root, &place, &patterns, cancel)?;
                }
                let containers = spec.containers.iter().map(|container| &container.path);
                let paths = spec.never_enter.iter().chain(containers).chain([&spec.to]);
                let names = spec.owner_by_name.then(|| Path::new("/etc"));
                let needed = paths.map(|path| &**path).chain(names).collect();
                let report = self.with_mounts(needed, &spec.rsync, |events| {
                    sprat_snapshot::restore(root, &spec, events, cancel)
                })?;
                WorkerReply::Restored(Box::new(report))
            }
            _ => return Ok(None),
        }))
    }

    /// Runs a job that reads or writes files of this machine, with the mounts as they are now.
    pub(super) fn with_mounts<'p, T: Send>(
        &self,
        mut needed: Vec<&'p Path>,
        program: &'p Path,
        job: impl FnOnce(&mut dyn FnMut(Progress)) -> Result<T, SnapshotError> + Send,
    ) -> Result<T, Failure> {
        needed.extend(program.is_absolute().then_some(program));
        let events = self.events.clone();
        let run = || {
            job(&mut |progress| {
                // Without a receiver this process is about to end anyway.
                let _ = events.send(&WorkerReply::Progress(progress));
            })
        };
        Ok(sprat_attach::with_current_mounts(self.root, &needed, run)??)
    }
}
