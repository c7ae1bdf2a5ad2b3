//! Gives the space of what the file system no longer needs back to the server.
//!
//! First everything is durable and the journal replayed; then a read-only mount says what it does
//! not need, which is only noted; then nothing is mounted any more, and the space is given back.
//! Only after every answer of that the lock is released, so nobody can have begun to write.

use sprat_luks::Secret;

use crate::Failure;
use crate::interrupt::Interrupt;
use crate::protocol::messages::{TrimHow, VolumeOrder, WorkerOrder};
use crate::protocol::reports::{ContainerFacts, Observer, Phase, TrimReport};
use crate::protocol::spawn::Role;
use crate::session::{MountFor, mount_privately};
use crate::settings::{Access, Mode, SessionSettings};
use crate::supervisor::{Shape, Supervisor, Watch};

/// Trims the container; returns what was done once all of it is durable and the lock released.
/// Interrupted or killed anywhere nothing is lost; run it again.
pub fn trim(
    settings: SessionSettings,
    secret: &Secret,
    how: TrimHow,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<(ContainerFacts, TrimReport), Failure> {
    debug_assert_eq!(settings.access, Access::ReadWrite);
    // What is noted is the file system's own view: where the kernel decrypts, its discards would
    // have to pass through dm-crypt, which drops them unless told otherwise.
    let settings = SessionSettings {
        mode: Mode::User,
        ..settings
    };
    let mut watch = Watch::new(observer, interrupt);
    let (mut supervisor, facts) =
        Supervisor::start(&settings, Shape::Session, &[secret], &mut watch)?;
    let done = run(&mut supervisor, &settings, how, &mut watch)?;
    supervisor.close(&mut watch)?;
    supervisor.finish();
    Ok((facts, done))
}

fn run(
    supervisor: &mut Supervisor,
    settings: &SessionSettings,
    how: TrimHow,
    watch: &mut Watch<'_>,
) -> Result<TrimReport, Failure> {
    // Replays the journal of a session that died, which is a write like any other.
    mount_read_only(supervisor, settings, watch)?;
    supervisor.detach(watch)?;
    supervisor.call::<()>(&VolumeOrder::Collect, watch)?;
    mount_read_only(supervisor, settings, watch)?;
    watch.observer.phase(Phase::Collecting);
    supervisor.call::<()>(&WorkerOrder::Trim, watch)?;
    supervisor.detach(watch)?;
    watch.interrupt.check()?;
    supervisor.call(&VolumeOrder::Trim(how), watch)
}

fn mount_read_only(
    supervisor: &mut Supervisor,
    settings: &SessionSettings,
    watch: &mut Watch<'_>,
) -> Result<(), Failure> {
    supervisor.attach(Role::Worker, watch)?;
    mount_privately(supervisor, settings, MountFor::Reading, watch)
}
