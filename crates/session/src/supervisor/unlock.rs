//! Takes a container over from a session that may still run, and releases it when no write of that
//! session can arrive any more.
//!
//! The container never is without a lease. The new lease is made behind the old one. It is released
//! only when every open predecessor is closed.

mod waiting;

use std::path::Path;
use std::time::Duration;

use sprat_store::lock::{self, LATE_WRITE_S, RENEW_INTERVAL, Watched};
use sprat_store::{Access, FileName, Lock, LockError, LockInfo, Store, StoreError};

use crate::address::Target;
use crate::connect::Connection;
use crate::interrupt::Interrupt;
use crate::settings::SessionSettings;
use crate::state::journal::{open_journal, owner_note};
use crate::state::missing;
use crate::supervisor::unlock::waiting::Waiting;
use crate::{Exit, Failure, connect};

/// How long to wait for the old session's answer before anything weaker counts.
pub const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// How long a lease is watched: two renewals, and some time for the way to the server.
pub const WATCH: Duration = Duration::from_secs(2 * RENEW_INTERVAL.as_secs() + 5);

/// What an unlock may do.
#[derive(Debug, Clone)]
pub struct UnlockWish {
    /// Take over from a session that is alive.
    pub force: bool,
    /// The user knows that the machine of the old session is off.
    pub is_off: bool,
    /// Give up the comparison of what watched sessions wrote.
    pub forget_watch: bool,
    /// How long the lease is watched before it is taken over.
    pub watch: Duration,
    /// How long an answer is waited for.
    pub answer_wait: Duration,
    /// The silence after which a session counts as gone.
    pub silence_s: u64,
}

impl Default for UnlockWish {
    fn default() -> Self {
        Self {
            force: false,
            is_off: false,
            forget_watch: false,
            watch: WATCH,
            answer_wait: ANSWER_WAIT,
            silence_s: LATE_WRITE_S,
        }
    }
}

/// The reason to believe that no write of a session can arrive any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DoorWay {
    /// The session itself reported that everything that it sent was answered. A proof.
    Answered,
    /// The server's kernel reports that no process has the container open for writing. A proof.
    Kernel,
    /// The agent on the server refuses everything that it sent. A proof.
    Agent,
    /// Its lease was not renewed for so long that the server dropped the connection. No proof.
    Silent,
    /// The user says that its machine is off. No proof.
    Off,
}

/// What an unlock did.
#[derive(Debug, Default)]
pub struct Unlocked {
    /// The lease that was taken over. `None`: there was none, or it was released meanwhile.
    pub taken_over: Option<LockInfo>,
    /// It was renewed while it was watched.
    pub was_renewed: bool,
    /// Each earlier lease that the unlock waited for, and how the wait ended.
    pub ways: Vec<(u64, DoorWay)>,
    /// Sessions whose writes will not be compared.
    pub forgotten: usize,
    /// Something was locked when it began.
    pub was_locked: bool,
}

/// Frees a container. Writes lease files only; the container itself is not touched.
pub fn unlock(
    settings: &SessionSettings,
    wish: &UnlockWish,
    interrupt: &Interrupt,
    tell: &mut dyn FnMut(&str),
) -> Result<Unlocked, Failure> {
    let target = &settings.target;
    let record = open_journal(
        &settings.state_dir,
        target,
        crate::settings::Access::ReadWrite,
    )?;
    let connection = Connection::new(settings, &record)?;
    let store = connection.connect()?;
    let mut done = Unlocked::default();
    let held = lock::inspect(&*store, &target.name, Some(&record))?.held;
    done.was_locked = held.is_some();
    let writes = held.is_some() || wish.forget_watch;
    if writes && !store.capabilities().durable_flush && !settings.allow_no_fsync {
        return Err(no_fsync(&*store));
    }
    match &held {
        Some(info) => {
            tell(&format!(
                "{}; watching it for {} s",
                info_line(info),
                wish.watch.as_secs()
            ));
            let watched = lock::watch(&*store, &target.name, wish.watch, || {
                interrupt
                    .check()
                    .map_err(|failure| failure.with_hint("nothing was changed"))
            })?;
            match watched {
                Watched::Free if !wish.forget_watch => return Ok(done),
                Watched::Free => {}
                Watched::Renewed(info) if !wish.force => {
                    return Err(Failure::from(&LockError::Renewed {
                        container: target.name.clone(),
                        info: Box::new(info),
                    }));
                }
                Watched::Renewed(_) => done.was_renewed = true,
                Watched::Still(_) => {}
            }
        }
        None => {
            // A mistyped name must not be reported as a container that is not locked.
            if let Err(failure) = is_container(&*store, &settings.state_dir, target) {
                let what = format!("there is no container {target}");
                let failure = match failure.exit {
                    Exit::NoContainer if !is_there(&*store, &target.name) => {
                        Failure::new(Exit::NoContainer, what)
                    }
                    Exit::NoContainer => Failure::new(Exit::NoContainer, what).caused_by(&failure),
                    _ => return Err(failure),
                };
                let hint = missing::hint(&settings.state_dir, target);
                return Err(
                    failure.with_hint(format!("nothing was changed, and there is no lock; {hint}"))
                );
            }
            if !wish.forget_watch {
                return Ok(done);
            }
        }
    }
    let owner = owner_note(&settings.state_dir)?;
    let lease = Lock::take_over(&*store, &target.name, &record, owner)?;
    if held.is_some() {
        tell(&format!(
            "took over the lock with {}; now waiting until no data of the earlier session can arrive",
            lease.file()
        ));
    }
    done.taken_over = held;
    let mut waiting = Waiting::new(&lease, store, &connection, settings, wish, interrupt);
    done.ways = waiting.for_doors(tell).map_err(still_waiting)?;
    if wish.forget_watch {
        done.forgotten = lease.forget_comparisons();
    }
    for leftover in waiting.clear_up(tell).map_err(still_waiting)? {
        tell(&format!("also removed {leftover}"));
    }
    let store = waiting.into_store();
    lease.release(&*store).map_err(|error| {
        let failure = Failure::from(&error);
        match failure.exit {
            Exit::Locked => failure,
            _ => failure.with_hint(
                "sprat does not know whether the container is unlocked now. Run `sprat unlock` again",
            ),
        }
    })?;
    Ok(done)
}

/// A lease that a crash of the server can lose protects nothing.
fn no_fsync(store: &dyn Store) -> Failure {
    Failure::failed(format!(
        "{} can't make a lease durable: it has no fsync@openssh.com",
        store.describe()
    ))
    .with_hint(
        "nothing was changed. If backups to this server use --allow-no-fsync, add it here, too",
    )
}

fn is_there(store: &dyn Store, name: &FileName) -> bool {
    !matches!(store.stat(name), Err(StoreError::NotFound { .. }))
}

fn is_container(store: &dyn Store, state_dir: &Path, target: &Target) -> Result<(), Failure> {
    let file = store.open(&target.name, Access::ReadOnly)?;
    connect::any_header(&*file, state_dir, target).map(drop)
}

fn still_waiting(failure: Failure) -> Failure {
    if failure.exit == Exit::Locked {
        return failure;
    }
    let stays = "the container stays locked, so nobody can write to it. Run `sprat unlock` again: it \
                 continues to wait";
    match &failure.hint {
        // The user must learn what is wrong with the server, too.
        Some(_) if failure.exit == Exit::Damaged => failure.with_state(stays),
        _ => failure.with_hint(stays),
    }
}

fn hours(seconds: u64) -> String {
    format!("{}:{:02}", seconds / 3600, seconds / 60 % 60)
}

fn info_line(info: &LockInfo) -> String {
    match (&info.token, info.free) {
        (Some(_), false) => format!("locked by {info}"),
        (Some(_), true) => format!("{info}, but an earlier session may still write"),
        (None, _) => format!(
            "locked by {}, a lock without the name of its owner",
            info.file
        ),
    }
}
