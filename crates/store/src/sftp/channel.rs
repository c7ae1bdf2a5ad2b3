//! One pipelined SFTP channel: many callers, one writer thread, one reader thread.
//!
//! The reader takes answers off the wire whatever the writer does. sftp-server stops reading
//! requests while its answers are not read, so a reader that waited for the writer would wait for
//! ever. Callers enter in turn, while the channel's limits leave space; the reader frees it again.

use std::collections::{HashMap, VecDeque};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ahead::Ahead;
use super::codec::{self, Extensions, Malformed, Request};
use super::packet::{CLOSED, NoPacket, read_packet};
use super::wire::{Ending, EndingKind, Wire, WireEnd};
use crate::IgnorePoison;

pub(crate) use super::answer::{Answer, Arrived};

/// Bytes in flight on one channel: the window of an SSH session channel (`CHAN_SES_WINDOW_DEFAULT`,
/// openssh channels.h). More would only wait in pipes, in front of everything that comes later.
const IN_FLIGHT_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Requests in flight on one channel: twice what OpenSSH's own client uses (sftp.c), so that an
/// opening asks everything at once.
const IN_FLIGHT_REQUESTS_MAX: usize = 128;
/// Small packets are combined up to this size before they are written.
const WRITE_BATCH_BYTES: usize = 64 * 1024;
/// How long an ended wire may take to report why.
const ENDING_PATIENCE: Duration = Duration::from_secs(1);
/// How long a server may take to close its side after we closed ours.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a server that greeted may take to answer a note.
const NOTE_PATIENCE: Duration = Duration::from_secs(30);

/// How long a channel waits for pending answers: for any byte to move, and for one answer after all
/// requests before it were answered. A server that answers one byte now and then, or everything but
/// one request, must not keep a session alive for ever.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    pub answer: Duration,
    /// While an fsync is pending.
    pub flush: Duration,
}

/// The lowest speed assumed for the bytes of one request. A connection of 64 kbit/s, shared by five
/// channels, has more.
const BYTES_PER_SECOND_MIN: usize = 1024;

/// Called with the reason when a channel dies.
type OnDeath = Box<dyn Fn(&Ending) + Send + Sync>;

/// Ends a channel without keeping it alive.
pub(crate) struct Killer(Weak<Shared>);

impl Killer {
    pub(crate) fn kill(&self, ending: &Ending) {
        if let Some(shared) = self.0.upgrade() {
            shared.die(ending);
        }
    }
}

/// A channel and its two threads.
pub(crate) struct Channel {
    pub(super) ahead: Ahead,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<ChannelState>,
    /// A caller may enter, or the channel has died.
    room: Condvar,
    /// The writer has something to do.
    work: Condvar,
    /// The reader has ended, or an answer has arrived.
    reader_ended: Condvar,
    end: Box<dyn WireEnd>,
    patience: Patience,
    greeting: OnceLock<Extensions>,
    on_death: OnceLock<OnDeath>,
}

struct ChannelState {
    pending: HashMap<u32, Pending>,
    next_id: u32,
    /// Callers take tickets and enter in their order.
    next_ticket: u64,
    entering: u64,
    bytes_in_flight: usize,
    /// Bytes of callers that wait for space.
    bytes_waiting: usize,
    fsyncs_in_flight: usize,
    queue: VecDeque<Vec<u8>>,
    /// Answers received so far.
    arrivals: u64,
    /// When a byte last moved in either direction, or the first of the pending requests was sent.
    moved: Instant,
    /// Requests sent so far.
    asked: u64,
    /// Since when the oldest pending request has been the oldest: everything sent before it was
    /// answered then.
    oldest_since: Instant,
    greeting_owed: bool,
    /// The last note that was not answered yet, and how long it may take.
    note: Option<(u32, Instant)>,
    closing: bool,
    reader_ended: bool,
    dead: Option<Ending>,
}

struct Pending {
    /// Its position among the channel's requests; set by [`ChannelState::owe`].
    order: u64,
    bytes: usize,
    fsync: bool,
    answer: SyncSender<Arrived>,
}

impl Channel {
    /// Sends the greeting and starts the threads; waits for nothing.
    pub(crate) fn start(wire: Wire, patience: Patience) -> std::io::Result<Self> {
        let Wire {
            reader,
            writer,
            end,
        } = wire;
        let shared = Arc::new(Shared {
            state: Mutex::new(ChannelState {
                pending: HashMap::new(),
                next_id: 1,
                next_ticket: 0,
                entering: 0,
                bytes_in_flight: 0,
                bytes_waiting: 0,
                fsyncs_in_flight: 0,
                queue: VecDeque::from([Request::Init.encode(0)]),
                arrivals: 0,
                moved: Instant::now(),
                asked: 0,
                oldest_since: Instant::now(),
                greeting_owed: true,
                note: None,
                closing: false,
                reader_ended: false,
                dead: None,
            }),
            room: Condvar::new(),
            work: Condvar::new(),
            reader_ended: Condvar::new(),
            end,
            patience,
            greeting: OnceLock::new(),
            on_death: OnceLock::new(),
        });
        let mut channel = Self {
            ahead: Ahead::default(),
            shared: Arc::clone(&shared),
            threads: Vec::new(),
        };
        let writing = Arc::clone(&shared);
        channel.thread("sftp-writer", move || writing.write_all(writer))?;
        channel.thread("sftp-reader", move || shared.read_all(reader))?;
        Ok(channel)
    }

    fn thread(&mut self, name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
        self.threads.push(
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)?,
        );
        Ok(())
    }

    /// The server's greeting, once it has arrived.
    pub(crate) fn greeting(&self) -> Option<Extensions> {
        self.shared.greeting.get().copied()
    }

    /// Waits for the greeting.
    pub(crate) fn wait_greeting(&self) -> Result<Extensions, Ending> {
        let mut state = self.shared.lock();
        loop {
            if let Some(ending) = &state.dead {
                return Err(ending.clone());
            }
            if let Some(greeting) = self.greeting() {
                return Ok(greeting);
            }
            state = self.shared.wait_for_room(state);
        }
    }

    /// Why the channel has died, if it has.
    pub(crate) fn ending(&self) -> Option<Ending> {
        self.shared.lock().dead.clone()
    }

    /// Calls `report` when the channel dies, or at once if it has died.
    pub(crate) fn on_death(&self, report: OnDeath) {
        // Set before `dead` is checked: `die` does the two in the other order.
        let _ = self.shared.on_death.set(report);
        if let Some(ending) = self.ending() {
            self.shared.report_death(&ending);
        }
    }

    /// Ends this channel later without keeping it.
    pub(crate) fn killer(&self) -> Killer {
        Killer(Arc::downgrade(&self.shared))
    }

    /// Ends the channel at once; everything pending fails with `ending`.
    pub(crate) fn die(&self, ending: &Ending) {
        self.shared.die(ending);
    }

    /// Ends the channel because of what the server sent.
    pub(crate) fn broken(&self, malformed: &Malformed) -> Ending {
        let ending = Ending {
            kind: EndingKind::Protocol,
            reason: malformed.to_string(),
        };
        self.die(&ending);
        ending
    }

    /// Bytes in flight and waiting to be, to choose the channel with the fewest.
    pub(crate) fn load(&self) -> usize {
        let state = self.shared.lock();
        state.bytes_in_flight + state.bytes_waiting
    }

    /// Whether a request with so many bytes would have to wait: more is queued than the channel
    /// carries in one round trip.
    pub(crate) fn is_full(&self, bytes: usize) -> bool {
        self.shared.lock().is_full(bytes)
    }

    /// Waits until such a request fits, the channel has died, or `until` returns true.
    /// [`wake`](Self::wake) makes it ask `until` again, which must not use this channel.
    pub(crate) fn wait_while_full(&self, bytes: usize, until: impl Fn() -> bool) {
        let mut state = self.shared.lock();
        while state.dead.is_none() && state.is_full(bytes) && !until() {
            state = self.shared.wait_for_room(state);
        }
    }

    /// See [`wait_while_full`](Self::wait_while_full).
    pub(crate) fn wake(&self) {
        // Under the lock, so that no caller is between its check and its wait.
        let _state = self.shared.lock();
        self.shared.room.notify_all();
    }

    /// Sends a request, unless its answer is under way already.
    pub(crate) fn ask(&self, request: &Request<'_>) -> Result<Answer, Ending> {
        match self.ahead.take(request) {
            Some(answer) => Ok(answer),
            None => self.send(request),
        }
    }

    /// Asks a question whose answer a later [`Channel::ask`] takes. A channel that has died reports
    /// that then.
    pub(super) fn ask_ahead(&self, request: &Request<'_>) {
        if let Ok(answer) = self.send(request) {
            self.ahead.keep(request, answer);
        }
    }

    /// Sends a request. While the channel is full, callers wait in turn.
    pub(super) fn send(&self, request: &Request<'_>) -> Result<Answer, Ending> {
        match self.send_if(request, &|| true)? {
            Some(answer) => Ok(answer),
            None => unreachable!("it may always be sent"),
        }
    }

    /// As [`Channel::ask`], if the request may be sent once its turn has come: it may have waited
    /// for long. `None`: nothing was sent, and the turn is passed on. `may_send` is called under
    /// this channel's lock.
    pub(crate) fn ask_if(
        &self,
        request: &Request<'_>,
        may_send: &dyn Fn() -> bool,
    ) -> Result<Option<Answer>, Ending> {
        match self.ahead.take(request) {
            Some(answer) => Ok(Some(answer)),
            None => self.send_if(request, may_send),
        }
    }

    fn send_if(
        &self,
        request: &Request<'_>,
        may_send: &dyn Fn() -> bool,
    ) -> Result<Option<Answer>, Ending> {
        let bytes = match request {
            Request::Read { len, .. } => usize::try_from(*len).unwrap_or(usize::MAX),
            Request::Write { data, .. } => data.len(),
            _ => 0,
        };
        let mut state = self.shared.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.bytes_waiting += bytes;
        loop {
            if let Some(ending) = &state.dead {
                return Err(ending.clone());
            }
            if state.entering == ticket && state.fits(bytes) {
                break;
            }
            state = self.shared.wait_for_room(state);
        }
        state.entering += 1;
        state.bytes_waiting -= bytes;
        if !may_send() {
            drop(state);
            self.shared.room.notify_all();
            return Ok(None);
        }
        let (answer, owed) = sync_channel(1);
        // These may wait for the server's disk.
        let fsync = matches!(request, Request::Fsync { .. } | Request::Agent(_));
        let id = state.owe(Pending {
            order: 0,
            bytes,
            fsync,
            answer,
        });
        // Encoding copies the data once, so it is not done under the lock. Meanwhile the id keeps
        // the request's place within the limits. Requests may reach the wire in another order than
        // they entered.
        drop(state);
        self.shared.room.notify_all();
        let packet = request.encode(id);
        self.shared.lock().queue.push_back(packet);
        self.shared.work.notify_one();
        Ok(Some(Answer::new(owed)))
    }

    /// Sends a request without waiting for space or its answer: a `CLOSE`, of which there is one per
    /// handle, or a note to the agent. For the answer to a note the channel waits when it is dropped.
    pub(crate) fn send_unanswered(&self, request: &Request<'_>) {
        let mut state = self.shared.lock();
        if state.dead.is_none() {
            let (answer, _) = sync_channel(1);
            let id = state.owe(Pending {
                order: 0,
                bytes: 0,
                fsync: false,
                answer,
            });
            let is_note = matches!(request, Request::Agent(_));
            let note = is_note.then(|| (id, Instant::now() + NOTE_PATIENCE));
            state.note = note.or(state.note);
            state.queue.push_back(request.encode(id));
            self.shared.work.notify_one();
        }
    }

    /// Waits for an answer.
    pub(crate) fn wait(&self, answer: &Answer) -> Result<Arrived, Ending> {
        if let Some(arrived) = answer.take_arrived() {
            return Ok(arrived);
        }
        loop {
            match answer.owed.recv_timeout(self.shared.time_to_next_check()) {
                Ok(arrived) => return Ok(arrived),
                Err(RecvTimeoutError::Timeout) => self.shared.check_for_stall(),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.ending().unwrap_or_else(|| Ending {
                        kind: EndingKind::Lost,
                        reason: "closed".to_owned(),
                    }));
                }
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let closed_by = Instant::now() + CLOSE_PATIENCE;
        let mut state = self.shared.lock();
        state.closing = true;
        self.shared.work.notify_all();
        while !state.reader_ended {
            let note = state.note.filter(|_| !state.greeting_owed);
            let until = note.map_or(closed_by, |(_, noted_by)| closed_by.max(noted_by));
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.shared.reader_ended.wait_timeout(state, left);
            state = waited.ignore_poison().0;
        }
        let ended = state.reader_ended;
        drop(state);
        if !ended {
            self.shared.end.cut();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // The server has closed its side or was cut: its program is about to exit.
        self.shared.end.ending(CLOSE_PATIENCE);
        self.shared.end.cut();
    }
}

impl ChannelState {
    fn owe(&mut self, mut pending: Pending) -> u32 {
        if self.pending.is_empty() {
            self.moved = Instant::now();
            if !self.greeting_owed {
                self.oldest_since = self.moved;
            }
        }
        pending.order = self.asked;
        self.asked += 1;
        self.bytes_in_flight += pending.bytes;
        self.fsyncs_in_flight += usize::from(pending.fsync);
        // At most a few dozen ids are used, so this ends.
        while self.pending.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.pending.insert(id, pending);
        id
    }

    fn paid(&mut self, id: u32) -> Option<Pending> {
        let pending = self.pending.remove(&id)?;
        self.bytes_in_flight -= pending.bytes;
        self.fsyncs_in_flight -= usize::from(pending.fsync);
        if self.oldest().is_none_or(|next| next.order > pending.order) {
            self.oldest_since = Instant::now();
        }
        self.note = self.note.filter(|(note, _)| *note != id);
        Some(pending)
    }

    /// Whether the limits leave space for a request.
    fn fits(&self, bytes: usize) -> bool {
        let fits = self.bytes_in_flight == 0
            || self.bytes_in_flight.saturating_add(bytes) <= IN_FLIGHT_BYTES_MAX;
        fits && self.pending.len() < IN_FLIGHT_REQUESTS_MAX
    }

    fn is_full(&self, bytes: usize) -> bool {
        let nobody_waits = self.entering == self.next_ticket;
        !(nobody_waits && self.fits(bytes))
    }

    /// The request that has waited longest, of a few dozen at most.
    fn oldest(&self) -> Option<&Pending> {
        self.pending.values().min_by_key(|pending| pending.order)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ChannelState> {
        self.state.lock().ignore_poison()
    }

    /// Waits until something changed, and checks for a stall meanwhile.
    fn wait_for_room<'a>(
        &'a self,
        state: MutexGuard<'a, ChannelState>,
    ) -> MutexGuard<'a, ChannelState> {
        let check_in = self
            .stall_after(&state)
            .saturating_duration_since(Instant::now());
        let check_in = check_in.max(Duration::from_millis(1));
        let (state, waited) = self.room.wait_timeout(state, check_in).ignore_poison();
        if !waited.timed_out() {
            return state;
        }
        drop(state);
        self.check_for_stall();
        self.lock()
    }

    fn stall_after(&self, state: &ChannelState) -> Instant {
        let patience = match state.fsyncs_in_flight {
            0 => self.patience.answer,
            _ => self.patience.flush,
        };
        let bytes = match state.greeting_owed {
            true => 0,
            false => state.oldest().map_or(0, |oldest| oldest.bytes),
        };
        let transfer = Duration::from_secs((bytes / BYTES_PER_SECOND_MIN) as u64);
        (state.moved + patience).min(state.oldest_since + patience + transfer)
    }

    fn time_to_next_check(&self) -> Duration {
        let after = self.stall_after(&self.lock());
        after
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1))
    }

    fn check_for_stall(&self) {
        let state = self.lock();
        let owed = state.greeting_owed || !state.pending.is_empty();
        if !owed || Instant::now() < self.stall_after(&state) {
            return;
        }
        let (silent, waited) = (state.moved.elapsed(), state.oldest_since.elapsed());
        let what = match state.greeting_owed {
            true => "the greeting",
            false => "one request",
        };
        drop(state);
        let reason = if silent >= self.patience.answer {
            format!("no answer for {} s", silent.as_secs())
        } else {
            format!(
                "no answer to {what} for {} s, although other data arrived",
                waited.as_secs()
            )
        };
        self.die(&Ending {
            kind: EndingKind::Lost,
            reason,
        });
    }

    fn die(&self, ending: &Ending) {
        let mut state = self.lock();
        if state.dead.is_some() {
            return;
        }
        state.dead = Some(ending.clone());
        state.pending.clear();
        state.queue.clear();
        state.bytes_in_flight = 0;
        state.fsyncs_in_flight = 0;
        drop(state);
        self.room.notify_all();
        self.work.notify_all();
        self.end.cut();
        self.report_death(ending);
    }

    fn report_death(&self, ending: &Ending) {
        if let Some(report) = self.on_death.get() {
            report(ending);
        }
    }

    /// The writer thread. Returning drops `writer`, which shows the server that no more will come.
    fn write_all(&self, mut writer: Box<dyn Write + Send>) {
        loop {
            let mut batch;
            {
                let mut state = self.lock();
                while state.queue.is_empty() && !state.closing && state.dead.is_none() {
                    state = self.work.wait(state).ignore_poison();
                }
                let Some(first) = state.queue.pop_front() else {
                    return;
                };
                batch = first;
                while let Some(next) = state.queue.front()
                    && batch.len() + next.len() <= WRITE_BATCH_BYTES
                {
                    batch.extend_from_slice(next);
                    state.queue.pop_front();
                }
            }
            let mut written = 0;
            while written < batch.len() {
                match writer.write(&batch[written..]) {
                    Ok(0) => return self.lost("the connection accepts no more bytes"),
                    Ok(more) => {
                        written += more;
                        self.lock().moved = Instant::now();
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // The reader may report the same end first.
                    Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                        return self.lost(CLOSED);
                    }
                    Err(error) => return self.lost(&format!("can't send: {error}")),
                }
            }
        }
    }

    /// The reader thread.
    fn read_all(&self, reader: Box<dyn Read + Send>) {
        let mut reader = BufReader::with_capacity(
            64 * 1024,
            Moving {
                reader,
                shared: self,
            },
        );
        loop {
            match read_packet(&mut reader) {
                Ok(body) => {
                    if let Err(reason) = self.deliver(body) {
                        self.die(&Ending {
                            kind: EndingKind::Protocol,
                            reason,
                        });
                        break;
                    }
                }
                Err(NoPacket::Ended(how)) => {
                    self.lost(how);
                    break;
                }
                Err(NoPacket::Refused(reason)) => {
                    self.die(&Ending {
                        kind: EndingKind::Protocol,
                        reason,
                    });
                    break;
                }
            }
        }
        self.lock().reader_ended = true;
        self.reader_ended.notify_all();
    }

    /// Dies with the reason that the wire reports, or with `how` if it reports none.
    fn lost(&self, how: &str) {
        let closing = self.lock().closing;
        let mut ending = if closing {
            Ending {
                kind: EndingKind::Lost,
                reason: String::new(),
            }
        } else {
            self.end.ending(ENDING_PATIENCE)
        };
        if ending.reason.is_empty() {
            how.clone_into(&mut ending.reason);
        } else if ending.kind == EndingKind::Lost {
            ending.reason = format!("{how}: {}", ending.reason);
        }
        self.die(&ending);
    }

    fn deliver(&self, body: Vec<u8>) -> Result<(), String> {
        let Some(id) = codec::reply_id(&body).map_err(|malformed| malformed.to_string())? else {
            let extensions = codec::parse_version(&body).map_err(|bad| bad.to_string())?;
            if self.greeting.set(extensions).is_err() {
                return Err("a second greeting".to_owned());
            }
            let mut state = self.lock();
            state.greeting_owed = false;
            state.oldest_since = Instant::now();
            drop(state);
            self.room.notify_all();
            return Ok(());
        };
        let mut state = self.lock();
        if state.dead.is_some() {
            return Ok(());
        }
        let Some(pending) = state.paid(id) else {
            return Err(format!("an answer to request {id}, which was not sent"));
        };
        state.arrivals += 1;
        let number = state.arrivals;
        drop(state);
        self.room.notify_all();
        self.reader_ended.notify_all();
        // The receiver can't be full: one answer per request. A caller that gave up is gone.
        let _ = pending.answer.try_send(Arrived { number, body });
        Ok(())
    }
}

/// Records when bytes arrive.
struct Moving<'a> {
    reader: Box<dyn Read + Send>,
    shared: &'a Shared,
}

impl Read for Moving<'_> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(buf)?;
        if read > 0 {
            self.shared.lock().moved = Instant::now();
        }
        Ok(read)
    }
}
