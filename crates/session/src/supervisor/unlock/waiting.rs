//! Keeps the lease that took over until no write of an earlier session can arrive. That may take hours.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_store::lock::RENEW_INTERVAL;
use sprat_store::{FileName, Lock, LockError, Outage, Store, StoreErrorKind, Writers};

use crate::connect::Connection;
use crate::interrupt::Interrupt;
use crate::settings::SessionSettings;
use crate::state::reserved_names::HalfMade;
use crate::supervisor::unlock::{DoorWay, UnlockWish, hours};
use crate::{Failure, text};

/// Time between two questions to the server's kernel. Each needs a login of its own.
const KERNEL_PAUSE: Duration = Duration::from_secs(60);
/// Time between two checks of the leases that it waits for.
const PAUSE: Duration = Duration::from_secs(1);
/// The first pause before a reconnect. [`Outage`] doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// After this time an earlier session sends nothing more: its last check of the lease counts for 10 s
/// ([`RENEW_INTERVAL`]), and a lease that it finds now is not its own.
const SENDS_NO_MORE: Duration = Duration::from_secs(15);
/// Time between two reports on the wait: the first interval, then each time twice as long, up to the
/// second one.
const REPORT_INTERVALS: [Duration; 2] = [Duration::from_secs(60), Duration::from_secs(15 * 60)];

/// A lease that waits for its predecessors.
pub(crate) struct Waiting<'w> {
    lease: &'w Lock,
    store: Arc<dyn Store>,
    connection: &'w Connection,
    wish: &'w UnlockWish,
    interrupt: &'w Interrupt,
    container: &'w FileName,
    begun: Instant,
    /// Its clock stands still while the machine sleeps, as that of `begun` does.
    outage: Outage,
    outage_max: Duration,
    /// The last reason that was reported for a lost connection.
    reported: String,
    renewed: Instant,
    kernel_asked: Option<Instant>,
    ways: Vec<(u64, DoorWay)>,
}

impl<'w> Waiting<'w> {
    pub(crate) fn new(
        lease: &'w Lock,
        store: Arc<dyn Store>,
        connection: &'w Connection,
        settings: &'w SessionSettings,
        wish: &'w UnlockWish,
        interrupt: &'w Interrupt,
    ) -> Self {
        Self {
            lease,
            store,
            connection,
            wish,
            interrupt,
            container: &settings.target.name,
            begun: Instant::now(),
            outage: Outage::new(settings.reconnect_max),
            outage_max: settings.reconnect_max,
            reported: String::new(),
            renewed: Instant::now(),
            kernel_asked: None,
            ways: Vec::new(),
        }
    }

    /// The store over the present connection.
    pub(crate) fn into_store(self) -> Arc<dyn Store> {
        self.store
    }

    /// Waits until no predecessor is open. Returns how each was closed.
    pub(crate) fn for_doors(
        &mut self,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Vec<(u64, DoorWay)>, Failure> {
        let mut next_report = self.wish.answer_wait;
        let mut interval = REPORT_INTERVALS[0];
        loop {
            self.ask_kernel(tell);
            if self.with_patience(tell, Self::check_predecessors)? {
                return Ok(std::mem::take(&mut self.ways));
            }
            let waited = self.begun.elapsed();
            if waited >= next_report {
                tell(&self.what_is_waited_for(waited));
                next_report = waited + interval;
                interval = (interval * 2).min(REPORT_INTERVALS[1]);
            }
            let pause = PAUSE.min(self.wish.answer_wait);
            self.interrupt.wait_until(Instant::now() + pause)?;
        }
    }

    /// Records durably that the wait is over, and checks once more that the lease is ours. Removes what a
    /// rewrite (`trim --rewrite`) that died has left: no later session would know of it.
    pub(crate) fn clear_up(
        &mut self,
        tell: &mut dyn FnMut(&str),
    ) -> Result<Vec<FileName>, Failure> {
        self.with_patience(tell, |this| {
            this.lease.confirm(&*this.store)?;
            let removed = HalfMade::Rewritten.remove_all(&*this.store, this.container);
            removed.map_err(|source| LockError::Store {
                op: "clear up beside",
                container: this.container.clone(),
                source,
            })
        })
    }

    /// Runs `act`, on new connections if necessary, until the server has been away for too long.
    fn with_patience<T>(
        &mut self,
        tell: &mut dyn FnMut(&str),
        mut act: impl FnMut(&mut Self) -> Result<T, LockError>,
    ) -> Result<T, Failure> {
        let mut connected = true;
        loop {
            let reached = if connected {
                Ok(())
            } else {
                self.connect_again()
            };
            let answers = reached.is_ok();
            let done = reached.and_then(|()| act(self));
            let error = match done {
                Ok(done) => {
                    if self.outage.is_on() {
                        tell("the server answers again");
                        self.outage.answered();
                        self.reported.clear();
                    }
                    return Ok(done);
                }
                Err(error) => error,
            };
            let LockError::Store { source, .. } = &error else {
                // Only leases were sent, so nothing can arrive late. If this report fails, the session
                // that took over waits longer.
                let _ = self.lease.answer(&*self.store);
                return Err(Failure::from(&error));
            };
            let now = self.begun.elapsed();
            self.outage.lost(now);
            let over = self.outage_max.is_zero() || !self.outage.begin_attempt(now);
            // Until the lease was read on a new connection, every error may pass, as in a session. A
            // server that starts may show another host key, or refuse logins.
            let may_pass = !answers || source.kind().may_pass();
            if !may_pass || over {
                return Err(Failure::from(&error));
            }
            connected = false;
            let reason = source.to_string();
            // Once for each reason.
            if self.reported != reason {
                tell(&format!(
                    "the server does not answer, retrying for {}: {reason}",
                    text::duration(self.outage_max)
                ));
                self.reported = reason;
            }
            let pause = self.outage.pause(FIRST_PAUSE);
            self.interrupt.wait_until(Instant::now() + pause)?;
        }
    }

    fn connect_again(&mut self) -> Result<(), LockError> {
        let failed = |source| LockError::Store {
            op: "reach",
            container: self.container.clone(),
            source,
        };
        let new = self.connection.connect().map_err(failed)?;
        // Its disk may be mounted later than logins work. A missing lease is not lost then.
        match new.stat(&self.lease.file()) {
            Err(error) if error.kind() == StoreErrorKind::NotFound => {
                new.stat(self.container).map_err(failed)?;
            }
            found => drop(found.map_err(failed)?),
        }
        self.store = new;
        self.lease.reacquire(&*self.store)?;
        self.outage.connected(self.begun.elapsed(), true);
        Ok(())
    }

    /// True when no predecessor is open.
    fn check_predecessors(&mut self) -> Result<bool, LockError> {
        let (lease, wish) = (self.lease, self.wish);
        let ways = &mut self.ways;
        let mut note = |doors: Vec<u64>, way| {
            ways.extend(doors.into_iter().map(|number| (number, way)));
        };
        note(lease.close_answered(&*self.store)?, DoorWay::Answered);
        if self.begun.elapsed() >= SENDS_NO_MORE && !lease.open_predecessors().is_empty() {
            note(lease.close_refused(&*self.store, false)?, DoorWay::Agent);
        }
        if self.begun.elapsed() >= wish.answer_wait && !lease.open_predecessors().is_empty() {
            // By the server's clock, which is read from our own lease.
            lease.renew(&*self.store)?;
            let silent = lease.close_silent(&*self.store, wish.silence_s)?;
            note(silent, DoorWay::Silent);
            if wish.is_off {
                note(lease.close_by_word(wish.silence_s), DoorWay::Off);
            }
        } else if self.renewed.elapsed() >= RENEW_INTERVAL {
            lease.renew(&*self.store)?;
            self.renewed = Instant::now();
        }
        Ok(lease.open_predecessors().is_empty())
    }

    fn what_is_waited_for(&self, waited: Duration) -> String {
        let doors = self.lease.open_predecessors();
        let numbers: Vec<String> = doors.iter().map(u64::to_string).collect();
        let which = match doors.len() {
            1 => format!("the session of lease {}", numbers.join(", ")),
            _ => format!("the sessions of leases {}", numbers.join(", ")),
        };
        if waited < self.wish.answer_wait + REPORT_INTERVALS[0] {
            return format!(
                "no answer from {which}: its machine may be asleep. Its last writes can arrive until {} \
                 h after it last renewed the lock; waiting until then. If the machine is off, not \
                 asleep, press Ctrl-C and use --that-machine-is-off. If it is awake, end sprat there",
                hours(self.wish.silence_s)
            );
        }
        format!(
            "still waiting for {which}, since {} h; the wait ends {} h after it last renewed the lock",
            hours(waited.as_secs()),
            hours(self.wish.silence_s)
        )
    }

    /// Closes all predecessors if no process on the server has the container open for writing. Else it
    /// asks again later: the server may have dropped a connection by then.
    fn ask_kernel(&mut self, tell: &mut dyn FnMut(&str)) {
        let answer_is_late = self.begun.elapsed() >= self.wish.answer_wait;
        let asked = self.kernel_asked;
        if !answer_is_late
            || self.lease.open_predecessors().is_empty()
            || asked.is_some_and(|asked| asked.elapsed() < KERNEL_PAUSE)
        {
            return;
        }
        self.kernel_asked = Some(Instant::now());
        let first = asked.is_none();
        let name = self.lease.container();
        let Ok(stat) = self.store.stat(name) else {
            return;
        };
        match self.connection.writers_of(name, &stat) {
            Writers::None => {
                let closed = self.lease.close_proven().into_iter();
                self.ways
                    .extend(closed.map(|number| (number, DoorWay::Kernel)));
            }
            Writers::Some if first => tell(
                "the server's kernel reports that a process still has the container open for writing: \
                 an sftp-server of the earlier session. If you can, end that process on the server",
            ),
            Writers::Unknown { reason } if first => tell(&format!(
                "can't ask the server's kernel whether writes can still arrive: {reason}"
            )),
            _ => {}
        }
    }
}
