//! Other commands of this machine that read through this session: they have no lease, connection and mount of their own.
//!
//! Each gets a thread here. Nothing of the volume leaves this process but the answers, so this process can always
//! unmount: it lets the running orders end for a while, and stops those that take longer.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sprat_snapshot::Cancel;
use sprat_store::IgnorePoison;

use super::hear_orders;
use super::reading::Reading;
use crate::protocol::frames::{Receiver, Sender};
use crate::protocol::messages::{WorkerOrder, WorkerReply};
use crate::protocol::reports::ContainerFacts;
use crate::{Exit, Failure};

/// How long the end of a session that writes waits for readers. What they look up takes seconds.
const WRITER_WAITS: Duration = Duration::from_secs(5);
/// How long the end of one that only reads waits. It has nothing that must become durable.
const READER_WAITS: Duration = Duration::from_secs(60);
/// How long a reader may take to stop.
const STOP_MAX: Duration = Duration::from_secs(20);
/// How often the thread that accepts readers checks whether the session ends.
const ACCEPT_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// More at once are refused: each costs a thread, and memory for its answer.
const READERS_MAX: usize = 16;

/// The readers of a session.
pub(super) struct Readers {
    shared: Arc<Shared>,
}

struct Shared {
    root: PathBuf,
    facts: ContainerFacts,
    /// The session writes.
    writes: bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    closing: bool,
    /// The number of the next reader.
    next: u64,
    readers: Vec<Reader>,
}

struct Reader {
    number: u64,
    cancel: Cancel,
    control: UnixStream,
    /// It waits for an answer.
    is_busy: bool,
}

impl Readers {
    /// Accepts readers of the volume that is mounted at `root`.
    pub(super) fn serve(
        listener: UnixListener,
        root: PathBuf,
        facts: ContainerFacts,
        writes: bool,
    ) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            root,
            facts,
            writes,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let accepts = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("readers".to_owned())
            .spawn(move || accepts.accept(&listener))?;
        Ok(Self { shared })
    }

    /// Ends them all. Nothing of theirs has the volume open afterwards, if they stop in time.
    pub(super) fn end(self) {
        let mut state = self.shared.state.lock().ignore_poison();
        state.closing = true;
        for idle in state.readers.iter().filter(|reader| !reader.is_busy) {
            let _ = idle.control.shutdown(std::net::Shutdown::Both);
        }
        drop(state);
        self.wait(match self.shared.writes {
            true => WRITER_WAITS,
            false => READER_WAITS,
        });
        for reader in &self.shared.state.lock().ignore_poison().readers {
            reader.cancel.cancel();
        }
        self.wait(STOP_MAX);
        // One that takes no answer, because it was stopped, keeps the thread that sends it.
        for reader in &self.shared.state.lock().ignore_poison().readers {
            let _ = reader.control.shutdown(std::net::Shutdown::Both);
        }
        self.wait(STOP_MAX);
    }

    /// Waits until no reader is left.
    fn wait(&self, limit: Duration) {
        let begun = Instant::now();
        let mut state = self.shared.state.lock().ignore_poison();
        while !state.readers.is_empty() {
            let left = limit.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        while !self.is_closing() {
            let mut fds = [PollFd::new(listener, PollFlags::IN)];
            let _ = poll(&mut fds, Some(&ACCEPT_INTERVAL));
            let Ok((control, _)) = listener.accept() else {
                continue;
            };
            if control.set_nonblocking(false).is_err() {
                continue;
            }
            let this = Arc::clone(self);
            // Without a thread the reader is not served, and its connection ends.
            let _ = std::thread::Builder::new()
                .name("reader".to_owned())
                .spawn(move || {
                    let _ = this.converse(control);
                });
        }
    }

    fn is_closing(&self) -> bool {
        self.state.lock().ignore_poison().closing
    }

    fn converse(&self, control: UnixStream) -> Result<(), Failure> {
        let lost = |error: io::Error| Failure::failed("a reader is gone").caused_by(&error);
        let descriptors = UnixStream::from(sprat_attach::receive_fd(&control)?);
        let events = Sender::new(control.try_clone().map_err(lost)?);
        let cancel = Cancel::new();
        let Some(number) = self.begin(&control, &cancel).map_err(lost)? else {
            return Ok(());
        };
        let orders = hear_orders(Receiver::new(control), &cancel, || ()).map_err(lost);
        if let Ok(orders) = &orders {
            let _ = events.send(&WorkerReply::ReaderAccepted(Box::new(self.facts.clone())));
            if !self.writes {
                let _ = events.send(&WorkerReply::OnlyReads);
            }
            let reading = Reading {
                root: &self.root,
                events: &events,
                descriptors: &descriptors,
                cancel: &cancel,
                file_system: self.facts.file_system,
            };
            while let Ok(order) = orders.recv()
                && self.set_busy(number, true)
            {
                let _ = events.send(&self.answer(&reading, order));
                self.set_busy(number, false);
            }
        }
        let mut state = self.state.lock().ignore_poison();
        state.readers.retain(|reader| reader.number != number);
        self.changed.notify_all();
        orders.map(drop)
    }

    fn answer(&self, reading: &Reading<'_>, order: WorkerOrder) -> WorkerReply {
        // A restore or an export may take hours, and a session that only reads may end in a moment.
        let answered = match &order {
            WorkerOrder::Restore(..) | WorkerOrder::Export(_) if !self.writes => Ok(None),
            _ => reading.answer(order),
        };
        match answered {
            Ok(Some(reply)) => reply,
            Ok(None) => WorkerReply::Failed(
                Failure::new(
                    Exit::Locked,
                    "another command of this machine has the container open",
                )
                .with_hint("nothing was changed. Wait until that command has ended"),
            ),
            Err(_) if self.is_closing() && reading.cancel.is_cancelled() => {
                WorkerReply::Failed(ended())
            }
            Err(failure) => WorkerReply::Failed(failure),
        }
    }

    /// `None`: it is not accepted.
    fn begin(&self, control: &UnixStream, cancel: &Cancel) -> io::Result<Option<u64>> {
        let mut state = self.state.lock().ignore_poison();
        let is_full = state.readers.len() >= READERS_MAX;
        if state.closing || is_full {
            return Ok(None);
        }
        let number = state.next;
        state.next += 1;
        state.readers.push(Reader {
            number,
            cancel: cancel.clone(),
            control: control.try_clone()?,
            is_busy: false,
        });
        Ok(Some(number))
    }

    /// Returns whether the reader may go on.
    fn set_busy(&self, number: u64, is_busy: bool) -> bool {
        let mut state = self.state.lock().ignore_poison();
        let goes_on = !state.closing;
        let mut readers = state.readers.iter_mut();
        if let Some(reader) = readers.find(|reader| reader.number == number) {
            reader.is_busy = is_busy;
            if !goes_on && !is_busy {
                let _ = reader.control.shutdown(std::net::Shutdown::Both);
            }
        }
        goes_on
    }
}

/// What a reader gets whose order had to be stopped.
pub(crate) fn ended() -> Failure {
    Failure::new(
        Exit::Locked,
        "the session of this machine through which this command read has ended",
    )
    .with_hint("nothing in the container was changed. Run the same command again")
}
