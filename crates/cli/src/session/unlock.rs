//! Takes a container over from a session that may still live, and sets it free once nothing of
//! that session can arrive any more.
//!
//! No step leaves the container without a lease: the next lease is made behind the old one, held
//! until every open door of it is closed, and only then given back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_store::lock::{self, DOOR_S, LockInfo, RENEW_INTERVAL, Watched};
use sprat_store::{Access, FileName, Lock, LockError, Store, StoreError, StoreErrorKind, Writers};

use super::options::SessionOptions;
use super::rewrite_name;
use super::volume_process::connection::{Connection, open_record, owner_note};
use crate::interrupt::Interrupt;
use crate::{Exit, Failure, reach};

/// For an answer of the old session this long is waited before anything less is used.
pub const ANSWER_WAIT: Duration = Duration::from_secs(30);
/// How long a lease is watched: two renewals and some time on the way.
pub const WATCH: Duration = Duration::from_secs(2 * RENEW_INTERVAL.as_secs() + 5);
/// Between two questions to the server's kernel, each with a login of its own.
const KERNEL_PAUSE: Duration = Duration::from_secs(60);
/// Between two looks at the leases that are waited for.
const PAUSE: Duration = Duration::from_secs(1);

/// What an unlock may do.
#[derive(Debug, Clone)]
pub struct UnlockWish {
    /// Take over from a session that is alive.
    pub force: bool,
    /// Somebody knows that the machine of the old session is off.
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
            silence_s: DOOR_S,
        }
    }
}

/// How it became known, as far as it is, that nothing of a session arrives any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DoorWay {
    /// It said so: everything that it sent was answered. A proof.
    Answered,
    /// The server's kernel says that nobody has the container open for writing. A proof.
    Kernel,
    /// Its lease was not renewed for so long that the server dropped the connection. No proof.
    Silent,
    /// The user says that its machine is off. No proof.
    Off,
}

/// What an unlock did.
#[derive(Debug, Default)]
pub struct Unlocked {
    /// What was taken over; `None` where nothing held the container, or it was given back.
    pub taken_over: Option<LockInfo>,
    /// It was renewed while it was watched.
    pub was_renewed: bool,
    /// Each earlier lease that was waited for, and how the waiting ended.
    pub ways: Vec<(u64, DoorWay)>,
    /// Sessions whose writes will not be compared.
    pub forgotten: usize,
    /// Something was locked when it began.
    pub was_locked: bool,
}

/// Sets a container free. Sends at most leases; the container itself is not touched.
pub fn unlock(
    options: &SessionOptions,
    wish: &UnlockWish,
    interrupt: &Interrupt,
    tell: &mut dyn FnMut(&str),
) -> Result<Unlocked, Failure> {
    let target = &options.target;
    let record = open_record(
        &options.state_dir,
        target,
        super::options::Access::ReadWrite,
    )?;
    let connection = Connection::to(options, &record)?;
    let mut store = connection.connect()?;
    let mut done = Unlocked::default();
    let held = lock::inspect(&*store, &target.name, Some(&record))?.held;
    done.was_locked = held.is_some();
    let writes = held.is_some() || wish.forget_watch;
    if writes && !store.capabilities().durable_flush && !options.allow_no_fsync {
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
                Watched::Free => return Ok(done),
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
        None if wish.forget_watch => {}
        None => {
            // A mistyped name must not be reported as a container that is not locked.
            if let Err(failure) = is_container(&*store, &target.name) {
                let what = format!("there is no container {target}");
                let failure = match failure.exit {
                    Exit::NoContainer if !is_there(&*store, &target.name) => {
                        Failure::new(Exit::NoContainer, what)
                    }
                    Exit::NoContainer => Failure::new(Exit::NoContainer, what).caused_by(&failure),
                    _ => failure,
                };
                return Err(failure
                    .with_hint("nothing was changed: no lock is there either. Check the path"));
            }
            return Ok(done);
        }
    }
    let owner = owner_note(&options.state_dir)?;
    let lease = Lock::take_over(&*store, &target.name, &record, owner)?;
    if held.is_some() {
        tell(&format!(
            "took it over with {}; now waiting until nothing of the earlier session can arrive",
            lease.file()
        ));
    }
    done.taken_over = held;
    done.ways = wait_for_doors(&lease, &mut store, &connection, wish, interrupt, tell)
        .map_err(still_waiting)?;
    if wish.forget_watch {
        done.forgotten = lease.forget_watches();
    }
    lease.confirm(&*store)?;
    // What a rewrite (`trim --rewrite`) left that died: nobody else will know of it.
    let leftover = rewrite_name(&target.name)?;
    if store.remove_if_there(&leftover)? {
        tell(&format!("removed {leftover}, too"));
    }
    lease.release(&*store)?;
    Ok(done)
}

/// A lease that may be gone after a crash of the server is none.
fn no_fsync(store: &dyn Store) -> Failure {
    Failure::failed(format!(
        "{} can't make a lease durable: it has no fsync@openssh.com",
        store.describe()
    ))
    .with_hint(
        "nothing was changed. Who backs up there with --insist-without-fsync unlocks with it, too",
    )
}

fn wait_for_doors(
    lease: &Lock,
    store: &mut Arc<dyn Store>,
    connection: &Connection,
    wish: &UnlockWish,
    interrupt: &Interrupt,
    tell: &mut dyn FnMut(&str),
) -> Result<Vec<(u64, DoorWay)>, Failure> {
    let begun = Instant::now();
    let mut ways = Vec::new();
    let mut renewed = Instant::now();
    let mut told = false;
    let mut asked: Option<Instant> = None;
    loop {
        let waited = begun.elapsed() >= wish.answer_wait && !lease.open_doors().is_empty();
        if waited && asked.is_none_or(|asked| asked.elapsed() >= KERNEL_PAUSE) {
            let first = asked.is_none();
            asked = Some(Instant::now());
            let closed = ask_kernel(lease, &**store, connection, tell, first);
            ways.extend(closed.into_iter().map(|number| (number, DoorWay::Kernel)));
        }
        let mut step = || -> Result<bool, LockError> {
            let mut note = |doors: Vec<u64>, way| {
                ways.extend(doors.into_iter().map(|number| (number, way)));
            };
            note(lease.close_answered(&**store)?, DoorWay::Answered);
            if begun.elapsed() >= wish.answer_wait && !lease.open_doors().is_empty() {
                // By the server's clock, which is read from our own lease.
                lease.renew(&**store)?;
                note(
                    lease.close_silent(&**store, wish.silence_s)?,
                    DoorWay::Silent,
                );
                if wish.is_off {
                    note(lease.close_by_word(wish.silence_s), DoorWay::Off);
                }
            } else if renewed.elapsed() >= RENEW_INTERVAL {
                renewed = Instant::now();
                lease.renew(&**store)?;
            }
            Ok(lease.open_doors().is_empty())
        };
        match step() {
            Ok(true) => return Ok(ways),
            Ok(false) => {}
            Err(LockError::Store { source, .. }) if may_come_back(source.kind()) => {
                tell(&format!("connection lost, connecting again: {source}"));
                match connection.connect() {
                    Ok(new) => {
                        lease.take_again(&*new)?;
                        *store = new;
                    }
                    Err(error) if may_come_back(error.kind()) => {}
                    Err(error) => return Err(Failure::from(&error)),
                }
            }
            Err(error) => return Err(Failure::from(&error)),
        }
        if begun.elapsed() >= wish.answer_wait && !told {
            told = true;
            tell(&format!(
                "no answer: it may be a machine that sleeps. Its last writes may arrive until {} h \
                 after its last renewal; waiting for that. If that machine is off, not asleep, stop \
                 this and use --that-machine-is-off; if it is awake, end sprat there",
                hours(wish.silence_s)
            ));
        }
        let until = Instant::now() + PAUSE.min(wish.answer_wait);
        while Instant::now() < until {
            interrupt.check()?;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Closes all doors where nobody has the container open for writing. Asked again later where somebody
/// has: a connection that the server drops is one less.
fn ask_kernel(
    lease: &Lock,
    store: &dyn Store,
    connection: &Connection,
    tell: &mut dyn FnMut(&str),
    first: bool,
) -> Vec<u64> {
    let name = lease.container();
    let Ok(stat) = store.stat(name) else {
        return Vec::new();
    };
    match connection.writers_of(name, &stat) {
        Writers::None => return lease.close_proven(),
        Writers::Some if first => tell(
            "the server's kernel says that a process there has the container open for writing yet: \
             an sftp-server of the earlier session. End it on the server if you can",
        ),
        Writers::Unknown { reason } if first => tell(&format!(
            "whether anything can arrive yet can't be asked of the server's kernel: {reason}"
        )),
        _ => {}
    }
    Vec::new()
}

fn is_there(store: &dyn Store, name: &FileName) -> bool {
    !matches!(store.stat(name), Err(StoreError::NotFound { .. }))
}

fn is_container(store: &dyn Store, name: &FileName) -> Result<(), Failure> {
    let file = store.open(name, Access::ReadOnly)?;
    reach::any_header(&*file).map(drop)
}

fn may_come_back(kind: StoreErrorKind) -> bool {
    matches!(
        kind,
        StoreErrorKind::Disconnected | StoreErrorKind::Unreachable
    )
}

fn still_waiting(failure: Failure) -> Failure {
    if failure.exit == Exit::Locked {
        return failure;
    }
    failure.with_hint(
        "the container stays taken over and locked, so nothing can be written to it. Run `sprat \
         unlock` again: it goes on waiting",
    )
}

fn hours(seconds: u64) -> String {
    format!("{}:{:02}", seconds / 3600, seconds / 60 % 60)
}

fn info_line(info: &LockInfo) -> String {
    match (&info.token, info.free) {
        (Some(_), false) => format!("locked by {info}"),
        (Some(_), true) => format!("{info}, but an earlier session may still write"),
        (None, _) => format!("locked by {}, which says nothing of its owner", info.file),
    }
}
