//! Ctrl-C, Ctrl-\, SIGTERM and SIGHUP: a request to end in order, and a second one to end at once. Ctrl-Z
//! stops the process as ever, but gives the terminal back first.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTOU};
use signal_hook::iterator::Signals;
use sprat_snapshot::Cancel;
use sprat_store::IgnorePoison;

use crate::{Exit, Failure};

/// How long a last message may take.
const SAY_LIMIT: Duration = Duration::from_secs(1);
/// How long this process may go on after the first request: it is promised that it ends within 10 s. Time
/// limits do not run during a [`Hold`].
const END_LIMIT: Duration = Duration::from_millis(9700);

type Wake = Box<dyn Fn(u32) + Send>;

/// What a prompt on the terminal needs when this process stops, goes on or ends: both are called on the
/// signal thread.
#[derive(Debug, Clone, Copy)]
pub struct Terminal {
    /// Restores the terminal as it was before the prompt.
    pub restore: fn(),
    /// Takes the terminal again after a stop; false where this process is in the background and must wait.
    pub resume: fn() -> bool,
}

/// Counts requests to stop. Clones share the count.
#[derive(Clone)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

struct Shared {
    requests: AtomicU32,
    /// Readable from the first request on; nobody ever reads it empty.
    woken: OwnedFd,
    wakes: Mutex<Vec<Wake>>,
    limits: Mutex<Limits>,
}

/// When the time limits of the end began.
#[derive(Default)]
struct Limits {
    /// At the first request, and again at the end of the last hold after it.
    began: Option<Instant>,
    holds: u32,
}

/// While this exists, no time limit ends this process after a request: work is under way that must be
/// finished, and that has a time limit of its own.
#[derive(Debug)]
pub struct Hold {
    interrupt: Interrupt,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut limits = self.interrupt.shared.limits.lock().ignore_poison();
        limits.holds -= 1;
        if limits.holds == 0 && limits.began.is_some() {
            limits.began = Some(Instant::now());
        }
    }
}

impl Interrupt {
    /// Takes over the signals of this process. Called once, before any thread is started. SIGHUP,
    /// SIGINT and SIGQUIT stay ignored where they were ignored from the start: by `nohup`, or by a
    /// shell that runs this in the background. The third request ends the
    /// process on the spot; what it started ends with it.
    pub fn listen(terminal: Terminal) -> Result<Self, Failure> {
        let interrupt = Self::never()?;
        // SIGQUIT too: a terminal that is asked on must echo again afterwards.
        let ignorable = [SIGINT, SIGQUIT, SIGHUP, SIGTSTP].into_iter();
        let wanted = ignorable.filter(|signal| !ignored_from_the_start(*signal));
        let wanted: Vec<i32> = wanted.chain([SIGTERM, SIGCONT]).collect();
        let cannot =
            |error: std::io::Error| Failure::failed("can't handle signals").caused_by(&error);
        let mut signals = Signals::new(wanted).map_err(cannot)?;
        let listener = interrupt.clone();
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for signal in signals.forever() {
                    match signal {
                        SIGTSTP => {
                            (terminal.restore)();
                            let _ = signal_hook::low_level::emulate_default_handler(SIGTSTP);
                            continue;
                        }
                        SIGCONT => {
                            // In the background it waits, stopped, until it may ask again.
                            if !listener.requested() && !(terminal.resume)() {
                                let _ = signal_hook::low_level::emulate_default_handler(SIGTTOU);
                            }
                            continue;
                        }
                        // First, as what is called at a request may wait.
                        _ if !listener.requested() => end_in_time(terminal, listener.clone()),
                        _ => {}
                    }
                    listener.request();
                    if listener.requests() >= 3 {
                        (terminal.restore)();
                        signal_hook::low_level::exit(i32::from(Exit::Interrupted.code()));
                    }
                }
            })
            .map_err(cannot)?;
        Ok(interrupt)
    }

    /// An interrupt that no signal raises; [`Interrupt::request`] does.
    pub fn never() -> Result<Self, Failure> {
        let woken = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Failure::failed("can't make an event descriptor").caused_by(&error))?;
        Ok(Self {
            shared: Arc::new(Shared {
                requests: AtomicU32::new(0),
                woken,
                wakes: Mutex::new(Vec::new()),
                limits: Mutex::new(Limits::default()),
            }),
        })
    }

    /// Counts one request, as a signal does.
    pub fn request(&self) {
        let limits = &self.shared.limits;
        limits
            .lock()
            .ignore_poison()
            .began
            .get_or_insert_with(Instant::now);
        let count = self.shared.requests.fetch_add(1, Ordering::SeqCst) + 1;
        // A full counter is readable all the same.
        let _ = rustix::io::write(&self.shared.woken, &1u64.to_ne_bytes());
        let wakes = self.shared.wakes.lock().ignore_poison();
        for wake in wakes.iter() {
            wake(count);
        }
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> u32 {
        self.shared.requests.load(Ordering::SeqCst)
    }

    /// Somebody asked to end in order.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.requests() >= 1
    }

    /// Somebody asked twice: end at once, without waiting for the server.
    #[must_use]
    pub fn hard(&self) -> bool {
        self.requests() >= 2
    }

    /// Stops the time limits of the end while the hold exists. Afterwards they begin again.
    #[must_use]
    pub fn hold(&self) -> Hold {
        self.shared.limits.lock().ignore_poison().holds += 1;
        Hold {
            interrupt: self.clone(),
        }
    }

    /// What is left of a time limit that runs from the first request. All of it before that, and during
    /// a [`Hold`].
    #[must_use]
    pub fn time_left(&self, limit: Duration) -> Duration {
        let limits = self.shared.limits.lock().ignore_poison();
        match limits.began {
            Some(began) if limits.holds == 0 => limit.saturating_sub(began.elapsed()),
            _ => limit,
        }
    }

    /// Fails once a request came in.
    pub fn check(&self) -> Result<(), Failure> {
        if self.requested() {
            return Err(Failure::interrupted());
        }
        Ok(())
    }

    /// Waits until `end`. Fails as soon as a request comes in.
    pub fn wait_until(&self, end: Instant) -> Result<(), Failure> {
        loop {
            self.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(Duration::from_millis(50)));
        }
    }

    /// Calls `wake` with the count at each request from now on, on the signal thread; at once if
    /// one came in already. It must not block and not call back into this.
    pub fn on_request(&self, wake: impl Fn(u32) + Send + 'static) {
        let mut wakes = self.shared.wakes.lock().ignore_poison();
        if self.requested() {
            wake(self.requests());
        }
        wakes.push(Box::new(wake));
    }

    /// Cancelled by the first request.
    #[must_use]
    pub fn cancel(&self) -> Cancel {
        let cancel = Cancel::new();
        let requested = cancel.clone();
        self.on_request(move |_| requested.cancel());
        cancel
    }

    /// A descriptor that is readable (for `poll`) from the first request on. Never read from it.
    #[must_use]
    pub fn readable_when_requested(&self) -> BorrowedFd<'_> {
        self.shared.woken.as_fd()
    }
}

impl fmt::Debug for Interrupt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Interrupt({})", self.requests())
    }
}

/// Whatever waits for a server then, however it waits: after the first request this process ends within
/// [`END_LIMIT`], as at the third request.
fn end_in_time(terminal: Terminal, interrupt: Interrupt) {
    // Without the thread a second and third request end it.
    let _ = std::thread::Builder::new()
        .name("end in time".to_owned())
        .spawn(move || {
            // The request comes a moment after this thread.
            std::thread::sleep(Duration::from_millis(50));
            loop {
                let left = interrupt.time_left(END_LIMIT);
                if left.is_zero() {
                    break;
                }
                std::thread::sleep(left);
            }
            // Past the output's lock, which may be what is waited for.
            write_if_ready(
                b"sprat: interrupted; the current operation didn't end in 10 s. Finished snapshots are \
                  unharmed, and the next run continues from there\n",
            );
            (terminal.restore)();
            signal_hook::low_level::exit(i32::from(Exit::Interrupted.code()));
        });
}

/// Writes a line to stderr unless that would block, at most 4096 bytes of it: a pipe that is ready takes as
/// many at once (POSIX, `PIPE_BUF`).
pub fn write_if_ready(line: &[u8]) {
    let line = &line[..line.len().min(4096)];
    let stderr = rustix::stdio::stderr();
    let mut ready = [PollFd::new(&stderr, PollFlags::OUT)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    if poll(&mut ready, Some(&now)).is_ok_and(|count| count > 0) {
        let _ = rustix::io::write(stderr, line);
    }
}

/// Ends this process now, after `events` has had a moment to write to a terminal or pipe that may take
/// nothing.
pub fn end_after(events: impl FnOnce() + Send + 'static, exit: Exit) -> ! {
    let (done, said) = std::sync::mpsc::channel();
    let _ = std::thread::Builder::new()
        .name("say".to_owned())
        .spawn(move || {
            events();
            let _ = done.send(());
        });
    let _ = said.recv_timeout(SAY_LIMIT);
    // Not `std::process::exit`, which waits for buffers.
    signal_hook::low_level::exit(i32::from(exit.code()))
}

/// Whether this process was started with `signal` ignored (`SigIgn` in proc(5), a bit mask in
/// which signal n is bit n-1).
fn ignored_from_the_start(signal: i32) -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else {
        return false;
    };
    status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << (signal - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_request_is_soft_and_second_is_hard() {
        let interrupt = Interrupt::never().unwrap();
        assert!(interrupt.check().is_ok());
        interrupt.request();
        assert!(interrupt.requested() && !interrupt.hard());
        interrupt.request();
        assert!(interrupt.hard());
        let fd = interrupt.readable_when_requested();
        let mut fds = [PollFd::new(&fd, PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
    }

    #[test]
    fn time_limit_begins_again_after_each_hold() {
        let interrupt = Interrupt::never().unwrap();
        let limit = Duration::from_millis(40);
        let ends = || interrupt.time_left(limit).is_zero();
        std::thread::sleep(limit);
        assert!(!ends());
        let held = interrupt.hold();
        interrupt.request();
        std::thread::sleep(limit);
        assert!(!ends());
        drop(held);
        assert!(!ends());
        std::thread::sleep(limit);
        assert!(ends());
        let held = interrupt.hold();
        assert!(!ends());
        drop(held);
        assert!(!ends());
    }

    #[test]
    fn wake_registered_late_is_called_at_once() {
        let interrupt = Interrupt::never().unwrap();
        interrupt.request();
        let seen = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&seen);
        interrupt.on_request(move |count| counted.store(count, Ordering::SeqCst));
        assert_eq!(seen.load(Ordering::SeqCst), 1);
        interrupt.request();
        assert_eq!(seen.load(Ordering::SeqCst), 2);
    }
}
