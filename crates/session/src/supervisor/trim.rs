//! Gives the space of what the file system no longer needs back to the server.
//!
//! First everything is durable and the journal replayed; then a read-only mount says what it does
//! not need, which is only noted; then nothing is mounted any more, and the space is given back.
//! Only after every answer of that the lock is released, so nobody can have begun to write.

use sprat_luks::Secret;

use crate::interrupt::Interrupt;
use crate::protocol::messages::{TrimHow, VolumeOrder, VolumeReply, WorkerOrder, WorkerReply};
use crate::protocol::reports::{ContainerFacts, Observer, Phase, TrimReport};
use crate::protocol::spawn::Role;
use crate::session::{MountFor, mount_privately};
use crate::settings::{Access, Mode, SessionSettings};
use crate::supervisor::{Heard, OnInterrupt, Shape, Supervisor, Watch};
use crate::{Exit, Failure, text};

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
    let mut watch = Watch {
        observer,
        interrupt,
    };
    let (mut supervisor, facts) =
        Supervisor::start(&settings, Shape::Session, &[secret], &mut watch)?;
    let done = run(&mut supervisor, &settings, how, &mut watch);
    let done = match done {
        Ok(done) => done,
        Err(failure) if supervisor.over().is_some() => return Err(failure),
        Err(failure) => return Err(supervisor.fail(failure)),
    };
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
    order(supervisor, watch, &VolumeOrder::Collect, |reply| {
        matches!(reply, VolumeReply::Collecting).then_some(())
    })?;
    mount_read_only(supervisor, settings, watch)?;
    watch.observer.phase(Phase::Collecting);
    supervisor.order(&WorkerOrder::Trim);
    supervisor.wait_worker(watch, OnInterrupt::GiveUp, |reply| match reply {
        WorkerReply::Trimmed(bytes) => Some(bytes),
        _ => None,
    })?;
    supervisor.detach(watch)?;
    watch.interrupt.check()?;
    order(
        supervisor,
        watch,
        &VolumeOrder::Trim(how),
        |reply| match reply {
            VolumeReply::Trimmed(done) => Some(*done),
            _ => None,
        },
    )
}

fn mount_read_only(
    supervisor: &mut Supervisor,
    settings: &SessionSettings,
    watch: &mut Watch<'_>,
) -> Result<(), Failure> {
    supervisor.attach(Role::Worker, watch)?;
    mount_privately(supervisor, settings, MountFor::Reading, watch)
}

/// An interrupt is heard by the volume process itself, between two steps that belong together.
fn order<T>(
    supervisor: &mut Supervisor,
    watch: &mut Watch<'_>,
    order: &VolumeOrder,
    mut wanted: impl FnMut(VolumeReply) -> Option<T>,
) -> Result<T, Failure> {
    supervisor.order_volume(order);
    supervisor.wait(watch, OnInterrupt::GiveUp, |heard| match heard {
        Heard::Volume(reply) => wanted(reply),
        Heard::Worker(_) => None,
    })
}

/// The failure of a way that does not exist here, with the way that would.
pub(crate) fn no_way(reasons: &[String], needed_bytes: u64, available: Option<u64>) -> Failure {
    let mut failure = Failure::new(
        Exit::Failed,
        "no holes can be made in the container where it lies",
    );
    for reason in reasons {
        failure = failure.because(reason);
    }
    let needed = text::bytes(needed_bytes);
    failure.with_hint(match available {
        Some(available) if available < needed_bytes => format!(
            "nothing was changed. A rewrite (`sprat trim --rewrite`) needs room for {needed} there, \
             and only {} are free. `sprat copy` to another server copies only what is used",
            text::bytes(available)
        ),
        available => format!(
            "nothing was changed. `sprat trim --rewrite` has the server rewrite the container: it \
             needs room for {needed}{}",
            available.map_or_else(String::new, |available| format!(
                ", and {} are free there",
                text::bytes(available)
            ))
        ),
    })
}
