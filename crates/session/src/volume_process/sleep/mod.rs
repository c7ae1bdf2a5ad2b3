//! Prepares for the machine's sleep: before it, every request is answered and no connection is
//! open.
//!
//! logind notifies the processes that have a *delay* inhibitor before it lets the machine sleep,
//! and waits for them for 5 s (`InhibitDelayMaxSec`, logind.conf(5); org.freedesktop.login1(5)).
//! Without logind, or without its answer, nothing happens and nothing is reported: this does not
//! prevent late writes, it only makes them rare.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use sprat_store::IgnorePoison;

use crate::message_bus::{Bus, Message};

const LOGIND: &str = "org.freedesktop.login1";
const PATH: &str = "/org/freedesktop/login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
/// How often this checks whether the session still exists.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// If a machine stays awake for so long after it announced its sleep, it does not sleep.
const AWAKE_MAX: Duration = Duration::from_secs(60);

/// How long to wait for answers. logind waits for 5 s by default.
pub(crate) const DRAIN_MAX: Duration = Duration::from_secs(4);

/// Whether the machine is about to sleep.
#[derive(Default)]
pub(crate) struct SleepFlag {
    /// Since when, on a clock that stops while the machine sleeps.
    since: Mutex<Option<Instant>>,
    changed: Condvar,
}

impl SleepFlag {
    fn since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.since.lock().ignore_poison()
    }

    /// The machine is about to sleep.
    pub(crate) fn begin(&self) {
        *self.since() = Some(Instant::now());
    }

    /// The machine is awake.
    pub(crate) fn end(&self) {
        *self.since() = None;
        self.changed.notify_all();
    }

    pub(crate) fn is_on(&self) -> bool {
        let since = *self.since();
        since.is_some_and(|begun| begun.elapsed() < AWAKE_MAX)
    }

    /// Waits while the machine is about to sleep, sleeps, or wakes.
    pub(crate) fn wait_until_awake(&self) {
        let mut since = self.since();
        while let Some(begun) = *since {
            let left = AWAKE_MAX.saturating_sub(begun.elapsed());
            if left.is_zero() {
                *since = None;
                return;
            }
            since = self.changed.wait_timeout(since, left).ignore_poison().0;
        }
    }
}

/// Receives the announcements.
pub(crate) trait SleepListener {
    /// False once no further announcement is wanted.
    fn is_alive(&self) -> bool;
    /// The machine sleeps once this returns, and in 4 s at the latest.
    fn prepare_for_sleep(&self);
    /// The machine woke, or does not sleep after all.
    fn woke(&self);
}

/// Starts a thread that follows logind while the session exists.
pub(crate) fn listen(sleeper: impl SleepListener + Send + 'static) {
    let thread = std::thread::Builder::new().name("sleep".to_owned());
    // Without the thread the machine sleeps as it does without logind.
    let _ = thread.spawn(move || {
        if let Ok(bus) = Bus::system() {
            let _ = follow(bus, &sleeper);
        }
        sleeper.woke();
    });
}

/// Follows logind until the session or the bus ends.
fn follow(mut bus: Bus, sleeper: &dyn SleepListener) -> io::Result<()> {
    bus.ask_bus(
        "AddMatch",
        &["type='signal',sender='org.freedesktop.login1',\
           interface='org.freedesktop.login1.Manager',member='PrepareForSleep'"],
    )?;
    let mut inhibitor = Some(inhibit(&mut bus)?);
    while sleeper.is_alive() {
        let Some(message) = bus.next(CHECK_INTERVAL)? else {
            continue;
        };
        if !message.is_signal(MANAGER, "PrepareForSleep") || !is_from_logind(&mut bus, &message) {
            continue;
        }
        match message.boolean() {
            Some(true) => {
                sleeper.prepare_for_sleep();
                // Closing the inhibitor lets the machine sleep.
                inhibitor = None;
            }
            Some(false) => {
                // This comes first: the machine may be about to sleep again.
                inhibitor = inhibit(&mut bus).ok();
                sleeper.woke();
            }
            None => {}
        }
    }
    drop(inhibitor);
    Ok(())
}

fn inhibit(bus: &mut Bus) -> io::Result<OwnedFd> {
    let why = "Data on its way to a backup is being completed";
    let texts = ["sleep", "sprat", why, "delay"];
    let mut answer = bus.call(LOGIND, PATH, MANAGER, "Inhibit", &texts)?;
    answer
        .fds
        .pop()
        .ok_or_else(|| io::Error::other("logind gave no descriptor"))
}

/// Any program may send a signal to one connection.
fn is_from_logind(bus: &mut Bus, message: &Message) -> bool {
    let owner = bus.ask_bus("GetNameOwner", &[LOGIND]);
    owner.is_ok_and(|owner| owner.text().is_some_and(|owner| owner == message.sender))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Arc, Mutex};
    use std::thread::JoinHandle;

    use sprat_testkit::private_bus::PrivateBus;
    use sprat_testkit::{needs, requires};

    use super::*;
    use crate::message_bus::Values;

    /// A private bus, on which the test plays logind.
    pub(crate) struct Logind {
        daemon: PrivateBus,
        bus: Bus,
    }

    impl Logind {
        pub(crate) fn start() -> Self {
            let daemon = PrivateBus::start();
            let mut bus = connect(&daemon);
            bus.request_name(LOGIND).unwrap();
            Self { daemon, bus }
        }

        /// Follows this bus for `sleeper` on a thread, as [`listen`] does.
        pub(crate) fn follow(
            &self,
            sleeper: impl SleepListener + Send + 'static,
        ) -> JoinHandle<Result<(), String>> {
            let bus = connect(&self.daemon);
            std::thread::spawn(move || follow(bus, &sleeper).map_err(|error| error.to_string()))
        }

        /// Announces that the machine is about to sleep, or that it woke.
        pub(crate) fn sleeps(&mut self, sleeps: bool) {
            announce(&mut self.bus, sleeps);
        }

        /// Answers `Inhibit`. When the inhibitor is closed, the returned descriptor reaches its
        /// end.
        pub(crate) fn inhibited(&mut self) -> OwnedFd {
            loop {
                let Some(call) = self.bus.next(Duration::from_secs(10)).unwrap() else {
                    panic!("nobody asks");
                };
                if call.member == "Inhibit" {
                    let (here, there) = rustix::pipe::pipe().unwrap();
                    let mut values = Values::default();
                    values.number(0);
                    self.bus.answer(&call, ("h", values), Some(&there)).unwrap();
                    return here;
                }
            }
        }
    }

    fn connect(daemon: &PrivateBus) -> Bus {
        Bus::at(&daemon.socket()).unwrap()
    }

    fn announce(bus: &mut Bus, sleeps: bool) {
        let mut values = Values::default();
        values.number(u32::from(sleeps));
        bus.emit(PATH, MANAGER, "PrepareForSleep", ("b", values))
            .unwrap();
    }

    struct Noting {
        said: Sender<&'static str>,
        ended: Arc<Mutex<bool>>,
    }

    impl SleepListener for Noting {
        fn is_alive(&self) -> bool {
            !*self.ended.lock().unwrap()
        }
        fn prepare_for_sleep(&self) {
            self.said.send("falls asleep").unwrap();
            std::thread::sleep(Duration::from_millis(200));
            self.said.send("is done").unwrap();
        }
        fn woke(&self) {
            self.said.send("woke").unwrap();
        }
    }

    fn next(heard: &Receiver<&'static str>) -> &'static str {
        heard.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn logind_waits_for_answers_and_inhibitor_is_acquired_again() {
        requires!(needs::program("dbus-daemon"));
        let mut logind = Logind::start();
        let (said, heard) = channel();
        let ended = Arc::new(Mutex::new(false));
        let sleeper = Noting {
            said,
            ended: Arc::clone(&ended),
        };
        let follower = logind.follow(sleeper);
        let mut inhibitor = logind.inhibited();
        // Any other program may announce a sleep.
        let mut other = connect(&logind.daemon);
        announce(&mut other, true);
        for _ in 0..2 {
            logind.sleeps(true);
            assert_eq!(next(&heard), "falls asleep");
            let mut byte = [0];
            // It ends only when everything is done.
            assert_eq!(rustix::io::read(&inhibitor, &mut byte).unwrap(), 0);
            assert_eq!(heard.try_recv(), Ok("is done"));
            logind.sleeps(false);
            inhibitor = logind.inhibited();
            assert_eq!(next(&heard), "woke");
        }
        *ended.lock().unwrap() = true;
        follower.join().unwrap().unwrap();
        assert_eq!(rustix::io::read(&inhibitor, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn without_logind_nobody_waits() {
        requires!(needs::program("dbus-daemon"));
        let daemon = PrivateBus::start();
        let (said, heard) = channel();
        let sleeper = Noting {
            said,
            ended: Arc::default(),
        };
        assert!(follow(connect(&daemon), &sleeper).is_err());
        assert!(heard.try_recv().is_err());
    }
}
