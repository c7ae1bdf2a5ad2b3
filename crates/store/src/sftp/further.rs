//! Further connections: logged in and joined in the background, used only once they are joined.
//!
//! The first connection carries everything until reads find it full, or until writes found it full
//! for a while: only then further logins are worth it. Nothing waits for them. A further
//! connection joins an open file: it shows that it leads to the same folder, and opens the same
//! file again. Only then it gets requests for that file. Before its first request its loss costs
//! nothing. After that, the session can't tell what it carried, and ends with it.

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::channel::Channel;
use super::file::OpenFile;
use super::session::SftpSession;
use super::wire::{Ending, EndingKind};
use crate::IgnorePoison;

/// How long the threads may take to end, before their connections are cut.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Further logins begin once so many bytes that are written have found the first connection full. A
/// login takes about eight round trips and the work of both ends. A daily run that sends a few MiB of
/// metadata ends before that. Who reads so much at once reads far more: a restore, or a check.
const WORTH_LOGINS_BYTES: usize = 4 << 20;

/// The further connections of one session.
pub(super) struct FurtherConnections {
    connections: Vec<FurtherConnection>,
    work: Mutex<Work>,
    /// Bytes that were written and found the first connection full.
    found_full_bytes: AtomicUsize,
    /// There is a file to join, a thread has ended, or all must.
    changed: Condvar,
}

#[derive(Default)]
struct FurtherConnection {
    channel: OnceLock<Channel>,
    usage: Arc<Mutex<Usage>>,
    /// Why it can't be used.
    failure: OnceLock<String>,
}

/// Whether the session depends on a connection.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Usage {
    /// No file has joined it.
    #[default]
    NotYet,
    /// Requests of a file may be sent on it.
    InUse,
    /// It was lost before that.
    Ended,
}

#[derive(Default)]
struct Work {
    begun: bool,
    ended: bool,
    /// Files that want further connections.
    files: Vec<Weak<OpenFile>>,
    threads: Vec<std::thread::JoinHandle<()>>,
    running: usize,
}

impl FurtherConnections {
    /// At most `number` of them; none is begun.
    pub(super) fn new(number: usize) -> Self {
        Self {
            connections: (0..number).map(|_| FurtherConnection::default()).collect(),
            work: Mutex::default(),
            found_full_bytes: AtomicUsize::new(0),
            changed: Condvar::new(),
        }
    }

    /// How many there may be.
    pub(super) fn number(&self) -> usize {
        self.connections.len()
    }

    /// The channel of one of them, once it was started.
    pub(super) fn channel(&self, index: usize) -> Option<&Channel> {
        self.connections[index].channel.get()
    }

    /// From now on requests may be sent on it, and the session ends with it. Returns false if it
    /// has ended before.
    pub(super) fn begin_use(&self, index: usize) -> bool {
        let connection = &self.connections[index];
        if !connection.is_up() {
            return false;
        }
        let mut usage = connection.usage.lock().ignore_poison();
        if *usage == Usage::NotYet {
            *usage = Usage::InUse;
        }
        *usage == Usage::InUse
    }

    /// How many are in use, and why one can't be used.
    pub(super) fn state(&self) -> (usize, Option<String>) {
        let in_use = |connection: &&FurtherConnection| connection.is_in_use() && connection.is_up();
        let mut failures = self.connections.iter().filter_map(|c| c.failure.get());
        (
            self.connections.iter().filter(in_use).count(),
            failures.next().cloned(),
        )
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().ignore_poison()
    }

    /// Waits for a file that this connection has not joined. `None`: the session ends.
    fn next_file(&self, index: usize) -> Option<Arc<OpenFile>> {
        let mut work = self.work();
        loop {
            if work.ended {
                return None;
            }
            work.files.retain(|file| file.strong_count() > 0);
            let open = work.files.iter().filter_map(Weak::upgrade);
            if let Some(file) = open.into_iter().find(|file| file.awaits(index)) {
                return Some(file);
            }
            work = self.changed.wait(work).ignore_poison();
        }
    }
}

impl FurtherConnection {
    fn is_up(&self) -> bool {
        let channel = self.channel.get();
        channel.is_some_and(|channel| channel.ending().is_none())
    }

    fn is_in_use(&self) -> bool {
        *self.usage.lock().ignore_poison() == Usage::InUse
    }
}

impl SftpSession {
    /// Starts a further connection, and waits until it is logged in.
    fn log_in(&self, index: usize) -> Result<&Channel, String> {
        let connection = &self.further.connections[index];
        let wire = self.dial.dial().map_err(|error| error.to_string())?;
        let channel = Channel::start(wire, self.options.patience).map_err(|e| e.to_string())?;
        let usage = Arc::clone(&connection.usage);
        self.group.join(&channel, move || {
            let mut usage = usage.lock().ignore_poison();
            if *usage == Usage::NotYet {
                *usage = Usage::Ended;
            }
            *usage == Usage::InUse
        });
        let channel = connection.channel.get_or_init(|| channel);
        if self.further.work().ended {
            channel.die(&closed());
        }
        let greeting = channel.wait_greeting().map_err(|ending| ending.reason)?;
        if greeting != self.extensions {
            return Err("it leads to a server with other extensions".to_owned());
        }
        Ok(channel)
    }

    /// The body of a further connection's thread.
    fn serve(&self, index: usize) {
        let _span = tracing::debug_span!("further connection", index).entered();
        match self.log_in(index) {
            Ok(channel) => {
                tracing::debug!("logged in");
                while let Some(file) = self.further.next_file(index) {
                    file.join(self, index, channel);
                }
            }
            Err(why) => {
                tracing::debug!(why, "not usable");
                // Only this thread sets it.
                let _ = self.further.connections[index].failure.set(why);
            }
        }
    }
}

/// A session that its store and files share. When the last of them is dropped, the further
/// connections' threads end, and then the channels.
pub(crate) struct SharedSession(Arc<SftpSession>);

impl SharedSession {
    pub(super) fn new(session: SftpSession) -> Arc<Self> {
        Arc::new(Self(Arc::new(session)))
    }

    /// So many bytes that are written to this file found the first connection full. Once that was
    /// much, further connections are wanted.
    pub(super) fn writes_found_first_full(&self, file: &Arc<OpenFile>, bytes: usize) {
        let found_full = &self.0.further.found_full_bytes;
        let before = found_full.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) >= WORTH_LOGINS_BYTES {
            self.want_further(file);
        }
    }

    /// Joins further connections to this file in the background. The first call begins their
    /// logins.
    pub(super) fn want_further(&self, file: &Arc<OpenFile>) {
        let further = &self.0.further;
        if further.connections.is_empty() || !file.begin_to_want() {
            return;
        }
        let mut work = further.work();
        work.files.push(Arc::downgrade(file));
        if !std::mem::replace(&mut work.begun, true) {
            for index in 0..further.number() {
                let session = Arc::clone(&self.0);
                let body = move || {
                    session.serve(index);
                    session.further.work().running -= 1;
                    session.further.changed.notify_all();
                };
                match Builder::new().name("sftp-further".to_owned()).spawn(body) {
                    Ok(thread) => {
                        work.threads.push(thread);
                        work.running += 1;
                    }
                    Err(error) => {
                        let failure = &further.connections[index].failure;
                        let _ = failure.set(error.to_string());
                    }
                }
            }
        }
        drop(work);
        further.changed.notify_all();
    }
}

impl Deref for SharedSession {
    type Target = SftpSession;

    fn deref(&self) -> &SftpSession {
        &self.0
    }
}

impl std::fmt::Debug for SharedSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Drop for SharedSession {
    fn drop(&mut self) {
        let further = &self.0.further;
        let mut work = further.work();
        work.ended = true;
        let threads = std::mem::take(&mut work.threads);
        drop(work);
        further.changed.notify_all();
        // A connection that carried nothing need not log in first.
        for connection in &further.connections {
            if let Some(channel) = connection.channel.get()
                && !connection.is_in_use()
            {
                channel.die(&closed());
            }
        }
        let until = Instant::now() + END_PATIENCE;
        let mut work = further.work();
        while work.running > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            work = further.changed.wait_timeout(work, left).ignore_poison().0;
        }
        let running = work.running;
        drop(work);
        if running > 0 {
            self.0.end(&closed());
        }
        for thread in threads {
            let _ = thread.join();
        }
    }
}

fn closed() -> Ending {
    Ending {
        kind: EndingKind::Lost,
        reason: "closed".to_owned(),
    }
}
