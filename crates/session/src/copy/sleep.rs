//! What a copy does before its machine sleeps: it starts no further piece, waits for the answers to
//! what it sent, and closes its connections. After waking it continues from its note, as after a
//! lost connection.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};

use sprat_store::{IgnorePoison, Store};

use crate::copy::endpoint::Stores;
use crate::volume_process::sleep::{DRAIN_MAX, SleepFlag, SleepListener};

/// Whether the machine is about to sleep, and the connections of the copy.
#[derive(Default)]
pub(super) struct CopySleep {
    asleep: SleepFlag,
    /// `None` between two attempts.
    at_work: Mutex<Option<[Arc<dyn Store>; 2]>>,
    ended: Condvar,
}

impl CopySleep {
    pub(super) fn is_on(&self) -> bool {
        self.asleep.is_on()
    }

    /// Begins an attempt over these connections. The attempt ends when the returned value is
    /// dropped.
    pub(super) fn at_work(&self, stores: &Stores) -> CurrentAttempt<'_> {
        let both = [&stores.source, &stores.destination].map(Arc::clone);
        *self.stores() = Some(both);
        CurrentAttempt(self)
    }

    fn stores(&self) -> MutexGuard<'_, Option<[Arc<dyn Store>; 2]>> {
        self.at_work.lock().ignore_poison()
    }

    fn prepare_for_sleep(&self) {
        self.asleep.begin();
        let waited = self
            .ended
            .wait_timeout_while(self.stores(), DRAIN_MAX, |stores| stores.is_some());
        let stores = waited.ignore_poison().0;
        for store in stores.iter().flatten() {
            store.disconnect("the machine is about to sleep");
        }
    }
}

/// The current attempt.
pub(super) struct CurrentAttempt<'s>(&'s CopySleep);

impl Drop for CurrentAttempt<'_> {
    fn drop(&mut self) {
        let stores = self.0.stores().take();
        self.0.ended.notify_all();
        drop(stores);
    }
}

/// The copy, while it runs.
pub(super) struct SleepingCopy(Weak<CopySleep>);

impl SleepingCopy {
    pub(super) fn new(sleep: &Arc<CopySleep>) -> Self {
        Self(Arc::downgrade(sleep))
    }
}

impl SleepListener for SleepingCopy {
    fn is_alive(&self) -> bool {
        self.0.strong_count() > 0
    }

    fn prepare_for_sleep(&self) {
        if let Some(sleep) = self.0.upgrade() {
            sleep.prepare_for_sleep();
        }
    }

    fn woke(&self) {
        if let Some(sleep) = self.0.upgrade() {
            sleep.asleep.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::mpsc::{Sender, channel};
    use std::time::{Duration, Instant};

    use sprat_luks::{Pins, RecoveryKey};
    use sprat_store::copy::CopyProgress;
    use sprat_testkit::{leases, needs, requires};

    use super::*;
    use crate::Failure;
    use crate::address::Target;
    use crate::copy::CopyObserver;
    use crate::copy::CopyOptions;
    use crate::copy::CopyPhase;
    use crate::copy::copy_watched;
    use crate::interrupt::Interrupt;
    use crate::settings::Access;
    use crate::settings::SessionSettings;
    use crate::volume_process::sleep::tests::Logind;
    use crate::volume_process::tests::make_container;

    /// Lets the machine sleep in the middle of the copying.
    struct Observer {
        copying: Option<Sender<()>>,
        sleep: Arc<Mutex<Weak<CopySleep>>>,
        said: Vec<String>,
    }

    impl CopyObserver for Observer {
        fn phase(&mut self, phase: CopyPhase) {
            if phase == CopyPhase::Copying
                && let Some(copying) = self.copying.take()
            {
                copying.send(()).unwrap();
                let sleep = self.sleep.lock().unwrap().upgrade().unwrap();
                let begun = Instant::now();
                while !sleep.is_on() {
                    assert!(
                        begun.elapsed() < Duration::from_secs(10),
                        "it does not sleep"
                    );
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }

        fn progress(&mut self, _: &CopyProgress) {}

        fn new_key(&mut self, _: &Pins, _: &RecoveryKey) -> Result<(), Failure> {
            unreachable!("none is asked for")
        }

        fn tell(&mut self, text: &str, _: bool) {
            self.said.push(text.to_owned());
        }
    }

    #[test]
    fn copy_sleeps_with_nothing_pending_and_continues_afterwards() {
        requires!(needs::program("dbus-daemon"));
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["from", "to"] {
            fs::create_dir(path(name)).unwrap();
        }
        let (from, to) = (path("from/x.luks"), path("to/x.luks"));
        make_container(&from);
        let file = fs::File::options().write(true).open(&from).unwrap();
        file.write_all_at(&[7; 1 << 20], 17 << 20).unwrap();
        let options = |path: &Path| {
            let target = Target::parse(&path.display().to_string(), Path::new("/")).unwrap();
            let state = folder.path().join("state");
            SessionSettings::new(target, Access::ReadWrite, state, folder.path().join("run"))
        };
        let options = CopyOptions {
            source: options(&from),
            destination: options(&to),
            source_key: None,
            remove_source: false,
            new_key: None,
        };
        let mut logind = Logind::start();
        let (copying, begun) = channel();
        let (watch, watched) = channel::<SleepingCopy>();
        let sleep = Arc::new(Mutex::new(Weak::new()));
        let mut observer = Observer {
            copying: Some(copying),
            sleep: Arc::clone(&sleep),
            said: Vec::new(),
        };
        let copier = std::thread::spawn(move || {
            let watch = |sleeper: SleepingCopy| {
                *sleep.lock().unwrap() = sleeper.0.clone();
                watch.send(sleeper).unwrap();
            };
            let copied = copy_watched(&options, &mut observer, &Interrupt::never().unwrap(), watch);
            (copied, observer.said)
        });
        let follower = logind.follow(watched.recv().unwrap());
        let inhibitor = logind.inhibited();
        begun.recv().unwrap();
        logind.sleeps(true);
        let asleep = Instant::now();
        // The inhibitor ends: the machine sleeps.
        assert_eq!(rustix::io::read(&inhibitor, &mut [0]).unwrap(), 0);
        // Long before the time limit after which it would sleep in any case.
        assert!(asleep.elapsed() < Duration::from_secs(3), "{asleep:?}");
        std::thread::sleep(Duration::from_millis(300));
        assert!(!copier.is_finished() && !to.exists());
        // Both leases are still there, and no other machine sees a difference.
        let lease = |folder: &str| leases::held(&path(folder)).len();
        assert_eq!((lease("from"), lease("to")), (1, 1));
        logind.sleeps(false);
        let inhibitor = logind.inhibited();
        let (copied, said) = copier.join().unwrap();
        copied.unwrap();
        assert!(
            said.iter().any(|text| text.contains("about to sleep")),
            "{said:?}"
        );
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert_eq!((lease("from"), lease("to")), (0, 0));
        follower.join().unwrap().unwrap();
        assert_eq!(rustix::io::read(&inhibitor, &mut [0]).unwrap(), 0);
    }
}
