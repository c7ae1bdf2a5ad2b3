//! Grows a container: first the file on the server, then, mounted, the file system in it. Shrinks one: first the file
//! system, and when that is durable, the file.
//!
//! Each step leaves a container that opens. If the file is longer than the file system, the same command
//! again is enough.

use serde::Serialize;
use sprat_luks::Secret;

use crate::interrupt::Interrupt;
use crate::protocol::messages::{VolumeOrder, WorkerOrder};
use crate::protocol::reports::{ClosedReport, ContainerFacts, Observer, Phase};
use crate::protocol::spawn::Role;
use crate::session::{MountFor, mount_privately};
use crate::settings::{Mode, SessionSettings};
use crate::supervisor::{Shape, Supervisor, Watch};
use crate::{Failure, text};

/// A container that was grown or shrunk.
#[derive(Debug, Clone, Serialize)]
pub struct Resized {
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
) -> Result<Resized, Failure> {
    let mut watch = Watch::new(observer, interrupt);
    let shape = Shape::Grow(file_bytes / 4096 * 4096);
    let (mut supervisor, facts) = Supervisor::start(settings, shape, &[secret], &mut watch)?;
    grow_file_system(&mut supervisor, settings, &facts, &mut watch)?;
    supervisor.detach(&mut watch)?;
    let closed = supervisor.close(&mut watch)?;
    supervisor.finish();
    Ok(Resized { facts, closed })
}

/// Shrinks the file system in the container, and then the container file, to `file_bytes`. After an interrupt at any
/// moment the container is as usable as before. The same call again finishes.
pub fn shrink(
    settings: &SessionSettings,
    secret: &Secret,
    file_bytes: u64,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<Resized, Failure> {
    let file_bytes = file_bytes / 4096 * 4096;
    // Not kernel mode: there only the kernel can read how long the file system is.
    let settings = SessionSettings {
        mode: Mode::User,
        ..settings.clone()
    };
    let mut watch = Watch::new(observer, interrupt);
    let (mut supervisor, mut facts) =
        Supervisor::start(&settings, Shape::Session, &[secret], &mut watch)?;
    let volume_bytes = check_may_shrink(&facts, file_bytes)?;
    supervisor.attach(Role::Worker, &mut watch)?;
    mount_privately(&mut supervisor, &settings, MountFor::Writing, &mut watch)?;
    watch.observer.phase(Phase::Shrinking);
    supervisor.call::<()>(&WorkerOrder::Shrink { volume_bytes }, &mut watch)?;
    supervisor.detach(&mut watch)?;
    supervisor.call::<()>(&VolumeOrder::Cut { file_bytes }, &mut watch)?;
    let closed = supervisor.close(&mut watch)?;
    supervisor.finish();
    (facts.file_bytes, facts.volume_bytes) = (file_bytes, volume_bytes);
    Ok(Resized { facts, closed })
}

/// The new length of the volume. Nothing was changed so far.
fn check_may_shrink(facts: &ContainerFacts, file_bytes: u64) -> Result<u64, Failure> {
    facts.file_system.check_may_shrink()?;
    let least_bytes = facts.file_system.shrunk_volume_bytes_min();
    let least_bytes = least_bytes.saturating_add(facts.pins.payload_offset_bytes);
    if file_bytes > facts.file_bytes || file_bytes < least_bytes {
        return Err(Failure::usage(format!(
            "the new size must be at most that of the container, which is {}, and at least {}",
            text::bytes(facts.file_bytes),
            text::bytes(least_bytes)
        ))
        .with_hint("nothing was changed. `sprat grow` makes a container larger"));
    }
    Ok(file_bytes - facts.pins.payload_offset_bytes)
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
