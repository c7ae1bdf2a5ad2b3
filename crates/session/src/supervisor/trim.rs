//! Gives space that the file system no longer needs back to the server.
//!
//! 1. Everything becomes durable, and the journal is replayed.
//! 2. A read-only mount reports what it does not need. V only notes that.
//! 3. Nothing is mounted any more, and the space is given back. The lock is released after the last
//!    answer, so no other session can have begun to write.

use sprat_luks::Secret;

use crate::Failure;
use crate::interrupt::Interrupt;
use crate::protocol::messages::{TrimHow, VolumeOrder, WorkerOrder};
use crate::protocol::reports::{ContainerFacts, Observer, Phase, TrimReport};
use crate::protocol::spawn::Role;
use crate::session::{MountFor, mount_privately};
use crate::settings::{Access, Mode, SessionSettings};
use crate::supervisor::{Shape, Supervisor, Watch};

/// Trims the container. Returns when everything is durable and the lock is released. An interrupt or a
/// kill at any moment loses nothing. Run it again.
pub fn trim(
    settings: SessionSettings,
    secret: &Secret,
    how: TrimHow,
    observer: &mut dyn Observer,
    interrupt: &Interrupt,
) -> Result<(ContainerFacts, TrimReport), Failure> {
    debug_assert_eq!(settings.access, Access::ReadWrite);
    // Not kernel mode: there dm-crypt drops the discards of the file system by default.
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
    // Replays the journal of a session that died. That is a write like any other.
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
