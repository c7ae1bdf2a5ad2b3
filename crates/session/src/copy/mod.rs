//! `sprat copy`: copies a container from one store to another.
//!
//! Nothing is mounted. No key is needed, unless the copy gets a volume key of its own (`new_key`).
//! If a key is at hand, it has two uses: the file system's stamp block shows whether the source is
//! in its newest state, and the file system's bitmaps show where the container holds data if
//! nothing else does.
//!
//! So one process does everything: both leases, both connections, and `sprat_store::copy` between
//! them. A note in the state folder records how far the copy got. The destination has another name
//! until all of it was read back.

mod attempt;
mod create;
mod data_map;
mod endpoint;
mod finish;
mod monitor;
mod new_key;
mod reconnect;
mod refusals;
mod sleep;
mod used_blocks;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_luks::{Pins, RecoveryKey, Secret, SectorCipher};
use sprat_store::Outage;
use sprat_store::copy::CopyNote;
pub use sprat_store::copy::{CopyProgress, CopyStep};

use crate::copy::endpoint::Endpoint;
use crate::copy::new_key::{NewHeader, NewKey};
use crate::copy::sleep::{CopySleep, SleepingCopy};
use crate::interrupt::Interrupt;
use crate::settings::SessionSettings;
use crate::state::journal::journal_id;
use crate::state::reserved_names;
use crate::volume_process::sleep as logind;
use crate::{Exit, Failure};

pub use crate::copy::new_key::NewKeyOptions;

/// The first pause before a reconnect. [`Outage`] doubles it.
const PAUSE: Duration = Duration::from_secs(1);

/// How many failures in a row are retried, each on new connections, if the server does not explain
/// them. A server whose disk is briefly away answers like this.
const FAILURES_MAX: u32 = 3;

/// Failures that have this much work between them are not in a row.
const FAILURES_APART: Duration = Duration::from_secs(60);

/// The options of a copy.
#[derive(Debug)]
pub struct CopyOptions {
    /// How the source is reached, and its pins. `access` is ignored.
    pub source: SessionSettings,
    /// How the destination is reached, and the pins of the file that has its name already. `access`
    /// is ignored.
    pub destination: SessionSettings,
    /// Opens the source. This shows whether the source is in the newest state that this machine
    /// knows, and which of its blocks are in use. `None`: no key without asking the user.
    pub source_key: Option<Secret>,
    /// Give the copy a volume key of its own. This needs `source_key`. `None`: the copy is
    /// identical to the source.
    pub new_key: Option<NewKeyOptions>,
    /// Remove the source once the destination is complete, read back and durable.
    pub remove_source: bool,
}

/// The phase of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyPhase {
    /// Connecting to both stores and acquiring both leases.
    Opening,
    /// Finding out where the source holds data.
    Mapping,
    /// Reading and writing.
    Copying,
    /// Reading back.
    Verifying,
    /// Giving the copy its name.
    Publishing,
    /// Removing the source.
    Removing,
}

/// How the holes of the source were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HolesBy {
    /// Reported by the local file system.
    Allocation,
    /// Reported by the server's shell.
    ServerShell,
    /// By the bitmaps of the file system inside, which the key opens.
    FileSystem,
    /// All of the file was read.
    Zeros,
    /// Nothing was left to copy.
    Nothing,
}

/// A copy that is complete, read back, durable and named.
#[derive(Debug)]
pub struct CopyReport {
    /// The pins of the copy; they are stored for the destination.
    pub pins: Pins,
    /// Length of the container file.
    pub container_bytes: u64,
    /// The figures of this run.
    pub figures: Option<CopyProgress>,
    /// What earlier runs had copied already, rounded up to pieces of 4 MiB.
    pub resumed_bytes: u64,
    /// How the holes were found.
    pub holes_by: HolesBy,
    /// This run removed the source.
    pub source_removed: bool,
    /// This run saw the source. If not, everything was done before, except perhaps the end of a
    /// move: the source is gone or can't be reached.
    pub source_found: bool,
}

/// Receives the events of a copy. It is called on the session's own thread and must not block.
pub trait CopyObserver {
    /// A phase begins.
    fn phase(&mut self, phase: CopyPhase);
    /// Newer figures.
    fn progress(&mut self, progress: &CopyProgress);
    /// A message for the user. `matters`: it concerns the safety of the data.
    fn tell(&mut self, text: &str, matters: bool);
    /// The copy gets a volume key of its own and will have these pins. The recovery key must be
    /// shown now, because no later run has it. If this fails, nothing is copied.
    fn new_key(&mut self, pins: &Pins, recovery: &RecoveryKey) -> Result<(), Failure>;
}

/// One run of `sprat copy`, over any number of lost connections.
struct Job<'a> {
    options: &'a CopyOptions,
    source: Endpoint,
    destination: Endpoint,
    interrupt: &'a Interrupt,
    note: Option<CopyNote>,
    /// Both leases were acquired once. From then on the run waits and reconnects after a lost
    /// connection.
    began: bool,
    resumed_bytes: u64,
    /// When the current attempt acquired both leases.
    connected_at: Option<Instant>,
    /// Something was read back in the current attempt.
    moved: bool,
    /// When the current attempt began to read and write.
    working_since: Option<Instant>,
    /// Failures in a row that no server explained.
    failures: u32,
    /// The current attempt ended with such a failure.
    unexplained: bool,
    /// This run gave the copy its name.
    named: bool,
    /// This run requested the source's removal, and may not have got the answer.
    removing: bool,
    source_removed: bool,
    /// Writes to the destination may not be carried out yet.
    under_way: bool,
    /// This run made the file that has the destination's name, or no file has the name yet. A dead
    /// session's pending writes went into a file that is gone.
    file_is_ours: bool,
    /// The source was compared with this machine's state about it.
    compared: bool,
    /// The source's cipher, once a key has opened it, and the pins of the opened container. After a
    /// lost connection another container may have the source's name.
    cipher: Option<(Pins, Arc<SectorCipher>)>,
    /// For a copy that gets a volume key of its own.
    new_header: Option<Arc<NewHeader>>,
    new_key: Option<Arc<NewKey>>,
    /// The last failure's own hint is complete.
    hint_is_final: bool,
    /// Whether the machine is about to sleep.
    sleep: Arc<CopySleep>,
    /// Subscribes to logind, once.
    listen: Option<Box<dyn FnOnce(SleepingCopy) + 'a>>,
}

/// Copies a container. After a failure the source is unchanged, and the destination's name is free
/// or names a complete copy. The same call then continues where this one stopped.
pub fn copy(
    options: &CopyOptions,
    observer: &mut dyn CopyObserver,
    interrupt: &Interrupt,
) -> Result<CopyReport, Failure> {
    copy_watched(options, observer, interrupt, logind::listen)
}

/// As [`copy`]. `listen` subscribes to logind, or to a stand-in for it.
fn copy_watched<'a>(
    options: &'a CopyOptions,
    observer: &mut dyn CopyObserver,
    interrupt: &'a Interrupt,
    listen: impl FnOnce(SleepingCopy) + 'a,
) -> Result<CopyReport, Failure> {
    let (from, to) = (&options.source.target, &options.destination.target);
    reserved_names::check(&from.name)?;
    reserved_names::check(&to.name)?;
    if journal_id(from) == journal_id(to) {
        return Err(Failure::usage(format!("{from} can't be copied to itself")));
    }
    interrupt.on_request(|requests| {
        // The second request ends the process at once, as a kill does. Both leases are left to the
        // next run.
        if requests >= 2 {
            std::process::exit(i32::from(Exit::Interrupted.code()));
        }
    });
    observer.phase(CopyPhase::Opening);
    let mut job = Job::new(options, interrupt, Box::new(listen))?;
    let clock = Instant::now();
    let mut outage = Outage::new(options.destination.reconnect_max);
    let mut reported = String::new();
    loop {
        let done = job.attempt(observer);
        let failure = match done {
            Ok(report) => return Ok(report),
            Err(failure) => failure,
        };
        if let Some(at) = job.connected_at.take() {
            outage.connected(at.saturating_duration_since(clock), true);
        }
        // Reading back counts as progress: for days it may be the only work.
        let moved = std::mem::take(&mut job.moved);
        if job.progressed() || moved {
            outage.answered();
            reported.clear();
        }
        outage.lost(clock.elapsed());
        let retried = job.may_retry();
        let over = !job.began
            || !(failure.exit == Exit::Unreachable || retried)
            || interrupt.requested()
            || options.destination.reconnect_max.is_zero()
            || !outage.begin_attempt(clock.elapsed());
        if over {
            job.give_up();
            return Err(job.with_state_hint(failure));
        }
        // The mark belongs to an attempt that is over.
        job.hint_is_final = false;
        if job.sleep.is_on() {
            observer.tell(
                "the machine is about to sleep: the copy continues after waking",
                false,
            );
            while job.sleep.is_on() && !interrupt.requested() {
                std::thread::sleep(Duration::from_millis(50));
            }
            continue;
        }
        let pause = outage.pause(PAUSE);
        // Each reason is reported once.
        if reported != failure.what {
            let (what, s) = (&failure.what, pause.as_secs());
            let why = match retried {
                true => "the server reported a failure",
                false => "connection lost",
            };
            observer.tell(&format!("{why}, retrying in {s} s: {what}"), false);
            reported.clone_from(&failure.what);
        }
        // The next attempt ends at once after an interrupt.
        let _ = interrupt.wait_until(Instant::now() + pause);
    }
}

impl<'a> Job<'a> {
    fn new(
        options: &'a CopyOptions,
        interrupt: &'a Interrupt,
        listen: Box<dyn FnOnce(SleepingCopy) + 'a>,
    ) -> Result<Self, Failure> {
        Ok(Self {
            options,
            source: Endpoint::new(&options.source)?,
            destination: Endpoint::new(&options.destination)?,
            interrupt,
            note: None,
            began: false,
            resumed_bytes: 0,
            connected_at: None,
            moved: false,
            working_since: None,
            failures: 0,
            unexplained: false,
            named: false,
            removing: false,
            source_removed: false,
            under_way: false,
            file_is_ours: false,
            compared: false,
            cipher: None,
            new_header: None,
            new_key: None,
            hint_is_final: false,
            sleep: Arc::default(),
            listen: Some(listen),
        })
    }
}

impl Job<'_> {
    /// Adds to a failure what it means for the two containers.
    fn with_state_hint(&self, failure: Failure) -> Failure {
        let interrupted = self.interrupt.requested() && failure.exit == Exit::Unreachable;
        let failure = match interrupted {
            true => Failure::interrupted().because(failure.what),
            false => failure,
        };
        if !self.began || self.hint_is_final || failure.exit == Exit::Locked {
            return failure;
        }
        let state = if self.source_removed {
            "the copy is complete and durable, and the source was removed. Run the same command again: \
             it cleans up"
        } else if self.removing {
            "the copy is complete and durable, and the source was removed or is being removed. Run the \
             same command again: it finishes"
        } else {
            "the source is unchanged. Run the same command again: it continues where this one \
             stopped"
        };
        match &failure.hint {
            Some(_) if failure.exit != Exit::Unreachable => failure.with_state(state),
            _ => failure.with_hint(state),
        }
    }
}
