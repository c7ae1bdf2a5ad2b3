//! `sprat copy`: a container as it is, from one store to another.
//!
//! Nothing is mounted. No key is needed, unless the copy gets a volume key of its own (`new_key`). Where
//! there is one at hand, the first block of the volume is decrypted to tell an older state from the
//! newest, and the file system's bitmaps, where nothing else says where the container holds data. So one
//! process does it all: both locks, both
//! connections, and `sprat_store::copy` between them. What has arrived is noted in the state
//! folder; the destination bears another name until all of it was read back.

mod attempt;
mod ending;
mod finding;
mod in_use;
mod making;
mod new_key;
mod refusals;
mod returning;
mod side;
mod sleep;
mod watch;

use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_luks::{Pins, RecoveryKey, Secret, SectorCipher};
use sprat_store::Outage;
use sprat_store::copy::{CopyNote, CopyProgress};

use crate::copy::new_key::{NewHeader, NewKey};
use crate::copy::side::Side;
use crate::copy::sleep::{CopySleep, OfCopy};
use crate::interrupt::Interrupt;
use crate::settings::SessionOptions;
use crate::state::reserved_names;
use crate::volume_process::connection::record_id;
use crate::volume_process::sleep as logind;
use crate::{Exit, Failure};

pub use crate::copy::new_key::NewKeyOptions;

/// The first pause before a lost connection is sought again; [`Outage`] doubles it.
const PAUSE: Duration = Duration::from_secs(1);

/// Reads and writes that a server answers with a failure that it doesn't explain: so many in a row are
/// retried, each on new connections. A server whose disk is away for a moment answers so.
const FAILURES_MAX: u32 = 3;

/// Failures with so much work between them are not in a row.
const FAILURES_APART: Duration = Duration::from_secs(60);

/// What is copied where.
#[derive(Debug)]
pub struct CopyOptions {
    /// How the source is reached, and its pins; `access` is not looked at.
    pub source: SessionOptions,
    /// How the destination is reached, and what is pinned of what has its name already; `access`
    /// is not looked at.
    pub destination: SessionOptions,
    /// Opens the source, to tell whether it is the newest state that this machine knows, and which of
    /// its blocks are in use; `None`: the key can't be had without a question.
    pub source_key: Option<Secret>,
    /// Give the copy a volume key of its own, which needs `source_key`; `None`: it is the source bit for
    /// bit.
    pub new_key: Option<NewKeyOptions>,
    /// Remove the source once the destination is whole, read back and durable.
    pub remove_source: bool,
}

/// Where a copy stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyPhase {
    /// Reaching both stores and taking both locks.
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

/// How the source's holes were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HolesBy {
    /// The local file system told.
    Allocation,
    /// The server's shell told.
    ServerShell,
    /// By the bitmaps of the file system inside, which the key opens.
    FileSystem,
    /// All of the file was read.
    Zeros,
    /// Nothing was left to be copied.
    Nothing,
}

/// A copy that is whole, read back, durable and named.
#[derive(Debug)]
pub struct CopyReport {
    /// What was copied; pinned for the destination.
    pub pins: Pins,
    /// Length of the container file.
    pub container_bytes: u64,
    /// This run's part.
    pub figures: Option<CopyProgress>,
    /// What earlier runs had copied already, rounded up to pieces of 4 MiB.
    pub resumed_bytes: u64,
    /// How the holes were found.
    pub holes_by: HolesBy,
    /// This run removed the source.
    pub source_removed: bool,
    /// This run saw the source. Without it all was done before but, perhaps, the last of a move: it
    /// is gone, or not within reach.
    pub source_found: bool,
}

/// Sees a copy; called on the session's own thread and must not block.
pub trait CopyObserver {
    /// A phase begins.
    fn phase(&mut self, phase: CopyPhase);
    /// Newer figures.
    fn progress(&mut self, progress: &CopyProgress);
    /// Something to know; `matters` for the safety of the data.
    fn tell(&mut self, text: &str, matters: bool);
    /// The copy is to have a volume key of its own, and will be known by these pins. The recovery key must
    /// be shown now: no later run has it. Where that fails nothing is copied.
    fn new_key(&mut self, pins: &Pins, recovery: &RecoveryKey) -> Result<(), Failure>;
}

/// One run of `sprat copy`, over any number of lost lines.
struct Job<'a> {
    options: &'a CopyOptions,
    source: Side,
    destination: Side,
    interrupt: &'a Interrupt,
    note: Option<CopyNote>,
    /// Both locks were held once: from then on a lost line is waited for.
    began: bool,
    resumed_bytes: u64,
    /// When the present attempt held both sides.
    connected_at: Option<Instant>,
    /// Something was read back in the present attempt.
    moved: bool,
    /// When the present attempt began to read and write.
    working_since: Option<Instant>,
    /// Failures in a row that no server explained.
    failures: u32,
    /// The present attempt ended with one.
    unexplained: bool,
    /// This run gave the copy its name.
    named: bool,
    /// This run asked for the source's removal, and may not have had the answer.
    removing: bool,
    source_removed: bool,
    /// Something was sent to the destination that its server may not have carried out yet.
    under_way: bool,
    /// What has the destination's name was made by this run, or nothing has it yet: whatever a dead
    /// session had under way there went into a file that is gone.
    file_is_ours: bool,
    /// The source was compared with what this machine knows of it.
    compared: bool,
    /// The source's, once a key has opened it, and the pins of what it opened: after a lost connection
    /// another container may have the source's name.
    cipher: Option<(Pins, Arc<SectorCipher>)>,
    /// Of a copy that gets a volume key of its own.
    new_header: Option<Arc<NewHeader>>,
    new_key: Option<Arc<NewKey>>,
    /// The last failure's own hint says all.
    explained: bool,
    /// Whether the machine is about to sleep.
    sleep: Arc<CopySleep>,
    /// Asks logind to wait for us, once.
    watch_sleep: Option<Box<dyn FnOnce(OfCopy) + 'a>>,
}

/// Copies a container. After a failure the source is as it was, the destination's name is free or
/// names a whole copy, and the same call goes on where this one stopped.
pub fn copy(
    options: &CopyOptions,
    observer: &mut dyn CopyObserver,
    interrupt: &Interrupt,
) -> Result<CopyReport, Failure> {
    copy_watched(options, observer, interrupt, logind::watch)
}

/// The same; `watch_sleep` begins to ask logind, or who plays it.
fn copy_watched<'a>(
    options: &'a CopyOptions,
    observer: &mut dyn CopyObserver,
    interrupt: &'a Interrupt,
    watch_sleep: impl FnOnce(OfCopy) + 'a,
) -> Result<CopyReport, Failure> {
    let (from, to) = (&options.source.target, &options.destination.target);
    reserved_names::check(&from.name)?;
    reserved_names::check(&to.name)?;
    if record_id(from) == record_id(to) {
        return Err(Failure::usage(format!("{from} can't be copied to itself")));
    }
    interrupt.on_request(|requests| {
        // Asked twice: at once, as a kill does. Both locks are left to the next run.
        if requests >= 2 {
            std::process::exit(i32::from(Exit::Interrupted.code()));
        }
    });
    observer.phase(CopyPhase::Opening);
    let mut job = Job {
        options,
        source: Side::new(&options.source)?,
        destination: Side::new(&options.destination)?,
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
        explained: false,
        sleep: Arc::default(),
        watch_sleep: Some(Box::new(watch_sleep)),
    };
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
        // Reading back counts as well: days may pass with nothing else.
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
            return Err(job.explained(failure));
        }
        // What it says is of an attempt that is over.
        job.explained = false;
        if job.sleep.is_on() {
            observer.tell(
                "the machine is about to sleep: the copy goes on when it is awake",
                false,
            );
            while job.sleep.is_on() && !interrupt.requested() {
                std::thread::sleep(Duration::from_millis(50));
            }
            continue;
        }
        let pause = outage.pause(PAUSE);
        // Once for each reason.
        if reported != failure.what {
            let (what, s) = (&failure.what, pause.as_secs());
            let why = match retried {
                true => "the server reported a failure",
                false => "connection lost",
            };
            observer.tell(&format!("{why}, retrying in {s} s: {what}"), false);
            reported.clone_from(&failure.what);
        }
        let until = Instant::now() + pause;
        while Instant::now() < until && !interrupt.requested() {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Job<'_> {
    /// What the failure means for the two containers.
    fn explained(&self, failure: Failure) -> Failure {
        let interrupted = self.interrupt.requested() && failure.exit == Exit::Unreachable;
        let failure = match interrupted {
            true => Failure::interrupted().because(failure.what),
            false => failure,
        };
        if !self.began || self.explained || failure.exit == Exit::Locked {
            return failure;
        }
        let state = if self.source_removed {
            "the copy is whole and durable, and the source is removed. Run the same command \
             again: it clears up"
        } else if self.removing {
            "the copy is whole and durable, and the source is removed or about to be. Run the same \
             command again: it finishes"
        } else {
            "the source is as it was. Run the same command again: it goes on where this one \
             stopped"
        };
        match &failure.hint {
            Some(hint) if failure.exit != Exit::Unreachable => {
                let hint = format!("{state}. {hint}");
                failure.with_hint(hint)
            }
            _ => failure.with_hint(state),
        }
    }
}
