//! Grows a container: first the file on the server, then, mounted, the file system in it.
//!
//! Each step leaves a container that opens. If the file is longer than the file system, the same command
//! again is enough.

use serde::Serialize;
use sprat_luks::Secret;

use crate::Failure;
use crate::interrupt::Interrupt;
use crate::protocol::messages::WorkerOrder;
use crate::protocol::reports::{ClosedReport, ContainerFacts, Observer, Phase};
use crate::protocol::spawn::Role;
use crate::session::{MountFor, mount_privately};
use crate::settings::SessionSettings;
use crate::supervisor::{Shape, Supervisor, Watch};

/// A container that was grown.
#[derive(Debug, Clone, Serialize)]
pub struct Grown {
    /// What it is now.
    pub facts: ContainerFacts,
    /// The figures of the session.
    pub closed: ClosedReport,
}

/// Grows the container file to `file_bytes` and the file system to all of it. After an interrupt at any
/// moment the container is as usable as before. The same call again finishes.
pub fn grow(
    settings: &SessionSettings,
    secret: &Secret,
    file_bytes: u64,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Grown, Failure> {
    let mut watch = Watch::new(observer, interrupt);
    let shape = Shape::Grow(file_bytes / 4096 * 4096);
    let (mut supervisor, facts) = Supervisor::start(settings, shape, &[secret], &mut watch)?;
    grow_file_system(&mut supervisor, settings, &facts, &mut watch)?;
    supervisor.detach(&mut watch)?;
    let closed = supervisor.close(&mut watch)?;
    supervisor.finish();
    Ok(Grown { facts, closed })
}

fn grow_file_system(
    supervisor: &mut Supervisor,
    settings: &SessionSettings,
    facts: &ContainerFacts,
    watch: &mut Watch<'_>,
) -> Result<(), Failure> {
    supervisor.attach(Role::Worker, watch)?;
    mount_privately(supervisor, settings, MountFor::Growing, watch)?;
    watch.observer.phase(Phase::Growing);
    let volume_bytes = facts.volume_bytes;
    supervisor.call(&WorkerOrder::Grow { volume_bytes }, watch)
}
