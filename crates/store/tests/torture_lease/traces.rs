//! Runs traces of the model (`tests/model/lease_model.py traces`) with the real lease.
//!
//! The model decides which request of which session the server carries out next, which sessions
//! lose their connection or die, and which late requests arrive. The real code runs with a store in
//! memory and is let go in the same order. Both must end the same: the same leases, used by the
//! same sessions, and the same sessions that may write.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::Value;
use sprat_store::{
    Access, Applied, Capabilities, FileName, FileStat, FreeSpace, Lock, LockError, OwnerNote,
    ReadClass, Store, StoreError, StoreFile, WriteJournal, lock,
};
use sprat_testkit::memory::MemoryStore;

/// The model counts from 1.
const BEFORE_FIRST: u64 = 1_000_000;
/// Nothing that is let go takes longer than this.
const PATIENCE: Duration = Duration::from_secs(20);

type Late = Box<dyn FnOnce() + Send>;

/// Requests of one session that wait to be carried out.
#[derive(Default)]
struct Gate {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    waiting: BTreeMap<u64, String>,
    let_go: Vec<u64>,
    /// Requests that were carried out.
    done: u64,
    lost: bool,
    /// Requests of lost connections that may still be carried out, with their labels.
    late: Vec<(String, Late)>,
    /// The session carries out a command.
    busy: bool,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, Waiting> {
        self.state.lock().unwrap()
    }

    fn wait_until<T>(&self, what: &str, mut is: impl FnMut(&mut Waiting) -> Option<T>) -> T {
        let begun = Instant::now();
        let mut state = self.state();
        loop {
            if let Some(found) = is(&mut state) {
                return found;
            }
            assert!(begun.elapsed() < PATIENCE, "{what}: {:?}", state.waiting);
            let wait = self.changed.wait_timeout(state, Duration::from_millis(200));
            state = wait.unwrap().0;
        }
    }

    /// Carries out the request `label`.
    fn let_go(&self, label: &str) {
        let ticket = self.wait_until(label, |state| {
            let found = state.waiting.iter().find(|(_, waiting)| *waiting == label);
            found.map(|(ticket, _)| *ticket)
        });
        self.release(ticket);
    }

    fn release(&self, ticket: u64) {
        let mut state = self.state();
        state.waiting.remove(&ticket);
        state.let_go.push(ticket);
        let done = state.done;
        drop(state);
        self.changed.notify_all();
        self.wait_until("carried out", |state| (state.done > done).then_some(()));
    }

    /// Carries out everything up to the next request that changes the folder, or the end of the
    /// command.
    fn run(&self) {
        loop {
            let next = self.wait_until("run", |state| {
                let reads =
                    |label: &String| !label.starts_with("make") && !label.starts_with("put");
                let reading = state.waiting.iter().find(|(_, label)| reads(label));
                match reading {
                    Some((ticket, _)) => Some(Some(*ticket)),
                    None if !state.busy || !state.waiting.is_empty() => Some(None),
                    None => None,
                }
            });
            match next {
                Some(ticket) => self.release(ticket),
                None => return,
            }
        }
    }

    /// Carries out everything until the command ends.
    fn run_to_the_end(&self) {
        loop {
            self.run();
            let next = self.state().waiting.keys().next().copied();
            match next {
                Some(ticket) => self.release(ticket),
                None => return,
            }
        }
    }

    /// The connection is lost: waiting requests may come late, later ones are never sent.
    fn lose(&self) {
        // In the model, what follows an answer was sent together with what it follows.
        self.wait_until("asks or ends", |state| {
            (!state.waiting.is_empty() || !state.busy).then_some(())
        });
        self.state().lost = true;
        self.changed.notify_all();
    }
}

/// One connection of a session.
#[derive(Clone)]
struct Line {
    gate: Arc<Gate>,
    store: MemoryStore,
}

impl Line {
    fn ask<T: Send + 'static>(
        &self,
        label: &str,
        request: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let gone = || StoreError::Disconnected {
            op: "ask",
            object: "the store".to_owned(),
            reason: "the trace decided so".to_owned(),
        };
        let mut state = self.gate.state();
        if state.lost {
            return Err(gone());
        }
        let ticket = state.next;
        state.next += 1;
        state.waiting.insert(ticket, label.to_owned());
        self.gate.changed.notify_all();
        loop {
            if let Some(at) = state.let_go.iter().position(|let_go| *let_go == ticket) {
                state.let_go.remove(at);
                let answer = request();
                state.done += 1;
                drop(state);
                self.gate.changed.notify_all();
                return answer;
            }
            if state.lost {
                state.waiting.remove(&ticket);
                let late = Box::new(|| drop(request()));
                state.late.push((label.to_owned(), late));
                return Err(gone());
            }
            state = self.gate.changed.wait(state).unwrap();
        }
    }
}

fn number_of(name: &FileName) -> u64 {
    let (_, number) = name.as_str().rsplit_once(".lock.").unwrap();
    number.parse::<u64>().unwrap() - BEFORE_FIRST
}

impl Store for Line {
    fn describe(&self) -> String {
        "a line".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        self.store.capabilities()
    }

    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        // All that is asked through the handle is one request.
        let file = self.store.open(name, access)?;
        Ok(Arc::new(LineFile(self.clone(), file, number_of(name))))
    }

    fn create_new(&self, _: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        unreachable!("leases are created and filled in one call")
    }

    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        let (store, label) = (self.store.clone(), format!("stat {}", number_of(name)));
        let name = name.clone();
        self.ask(&label, move || store.stat(&name))
    }

    fn rename(&self, _: &FileName, _: &FileName) -> Result<(), StoreError> {
        unreachable!("a lease is never renamed")
    }

    fn rename_new(&self, _: &FileName, _: &FileName) -> Result<(), StoreError> {
        unreachable!("a lease is never renamed")
    }

    fn remove(&self, _: &FileName) -> Result<(), StoreError> {
        unreachable!("the traces remove no lease")
    }

    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        let store = self.store.clone();
        self.ask("list", move || store.list())
    }

    fn flush_folder(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        self.store.free_space()
    }

    fn read_small(
        &self,
        name: &FileName,
        access: Access,
        bytes_max: usize,
    ) -> Result<(FileStat, Vec<u8>), StoreError> {
        let (store, label) = (self.store.clone(), format!("read {}", number_of(name)));
        let name = name.clone();
        self.ask(&label, move || store.read_small(&name, access, bytes_max))
    }

    fn create_filled(&self, name: &FileName, data: &[u8]) -> Result<Applied, StoreError> {
        let number = number_of(name);
        let (store, made) = (self.store.clone(), name.clone());
        let file = self.ask(&format!("make {number}"), move || store.create_new(&made))?;
        Ok(LineFile(self.clone(), file, number)
            .write_at(0, data)
            .into())
    }

    fn overwrite_and_stat(
        &self,
        name: &FileName,
        data: &[u8],
        other: &FileName,
    ) -> Result<Option<FileStat>, StoreError> {
        self.open(name, Access::ReadWrite)?.write_at(0, data)?;
        match self.stat(other) {
            Ok(stat) => Ok(Some(stat)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

struct LineFile(Line, Arc<dyn StoreFile>, u64);

impl StoreFile for LineFile {
    fn len(&self) -> Result<u64, StoreError> {
        self.1.len()
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        self.1.stat()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        self.1.read_at(offset, buf, class)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let (file, data) = (Arc::clone(&self.1), data.to_vec());
        let label = format!("put {}", self.2);
        self.0.ask(&label, move || file.write_at(offset, &data))
    }

    fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), StoreError> {
        unreachable!("a lease has no holes")
    }

    fn resize(&self, _: u64) -> Result<(), StoreError> {
        unreachable!("a lease keeps its length")
    }
}

enum Command {
    Take { on_purpose: bool },
    Verify,
    Again,
    CloseAnswered,
    Confirm,
    Answer,
    Release,
}

/// A session of a machine, on a thread of its own.
struct Session {
    gate: Arc<Gate>,
    commands: Sender<Command>,
    thread: std::thread::JoinHandle<()>,
    lock: Arc<Mutex<Option<Lock>>>,
    machine: usize,
}

fn container() -> FileName {
    FileName::new("box.luks").unwrap()
}

impl Session {
    fn start(
        sid: u64,
        machine: usize,
        on_purpose: bool,
        state: PathBuf,
        store: &MemoryStore,
    ) -> Self {
        let gate = Arc::new(Gate::default());
        let (commands, orders) = channel();
        let lock = Arc::new(Mutex::new(None));
        let line = Line {
            gate: Arc::clone(&gate),
            store: store.clone(),
        };
        let held = Arc::clone(&lock);
        let thread = std::thread::spawn(move || live(sid, &state, &line, &orders, &held));
        let session = Self {
            gate,
            commands,
            thread,
            lock,
            machine,
        };
        session.order(Command::Take { on_purpose });
        session
    }

    fn order(&self, command: Command) {
        self.gate
            .wait_until("idle", |state| (!state.busy).then_some(()));
        self.gate.state().busy = true;
        self.commands.send(command).unwrap();
    }

    fn is_busy(&self) -> bool {
        self.gate.state().busy
    }

    /// Ends the session; returns what may arrive late.
    fn end(self) -> Vec<(String, Late)> {
        self.gate.lose();
        drop(self.commands);
        self.thread.join().unwrap();
        drop(self.lock.lock().unwrap().take());
        std::mem::take(&mut self.gate.state().late)
    }
}

fn live(
    sid: u64,
    state: &Path,
    line: &Line,
    orders: &Receiver<Command>,
    held: &Mutex<Option<Lock>>,
) {
    let record = WriteJournal::open(state, "id").unwrap();
    let owner = OwnerNote {
        host: sid.to_string(),
        version: "0".to_owned(),
    };
    while let Ok(order) = orders.recv() {
        // The outcome shows in the store.
        let mut held = held.lock().unwrap();
        match (order, &*held) {
            (Command::Take { on_purpose: true }, _) => {
                *held = Lock::take_over(line, &container(), &record, owner.clone()).ok();
            }
            (Command::Take { .. }, _) => *held = take(line, &record, owner.clone()).ok(),
            (Command::Verify, Some(lock)) => drop(lock.verify(line)),
            (Command::Again, Some(lock)) => drop(lock.reacquire(line)),
            (Command::CloseAnswered, Some(lock)) => drop(lock.close_answered(line)),
            // A session that loses its lease while it waits has sent nothing, and answers.
            (Command::Confirm, Some(lock)) => {
                if let Err(LockError::Lost { .. }) = lock.confirm(line) {
                    let _ = lock.answer(line);
                }
            }
            (Command::Answer, Some(lock)) => drop(lock.answer(line)),
            (Command::Release, Some(_)) => {
                let _ = held.take().unwrap().release(line);
            }
            (_, None) => {}
        }
        drop(held);
        line.gate.state().busy = false;
        line.gate.changed.notify_all();
    }
}

/// A lease that was never filled is passed once it was seen for some time; here the two checks are
/// one.
fn take(line: &Line, record: &WriteJournal, owner: OwnerNote) -> Result<Lock, LockError> {
    let first = Lock::check_leases(line, &container(), record)?;
    if first.wait_for_empty(record, lock::EMPTY_WAIT).is_some() {
        std::thread::sleep(Duration::from_millis(210));
    }
    Lock::acquire_after(&first, line, record, owner, || {})
}

/// Runs one trace. Returns what ended differently from the model.
pub fn drive(trace: &Value) -> Result<(), String> {
    let store = MemoryStore::new();
    let states: Vec<_> = (0..3)
        .map(|_| {
            tempfile::tempdir_in("/dev/shm")
                .or_else(|_| tempfile::tempdir())
                .unwrap()
        })
        .collect();
    let mut sessions: BTreeMap<u64, Session> = BTreeMap::new();
    let mut late: Vec<(String, Late)> = Vec::new();
    for act in trace["acts"].as_array().unwrap() {
        step(act, &store, &states, &mut sessions, &mut late);
    }
    let writers: Vec<u64> = sessions
        .iter()
        // A session that has asked for a check waits for its result.
        .filter(|(_, session)| !session.is_busy())
        .filter(|(_, session)| {
            let held = session.lock.try_lock();
            held.is_ok_and(|held| {
                held.as_ref().is_some_and(|lock| {
                    lock.open_predecessors().is_empty() && lock.verify(&store).is_ok()
                })
            })
        })
        .map(|(sid, _)| *sid)
        .collect();
    for session in std::mem::take(&mut sessions).into_values() {
        drop(session.end());
    }
    let mut leases = serde_json::Map::new();
    for name in store.list().unwrap() {
        let (_, bytes) = store.read_small(&name, Access::ReadOnly, 4096).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        let host = text
            .split("\"host\":\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next());
        let said = match host {
            None => "empty".to_owned(),
            Some(host) if text.contains("\"free\":true") => format!("free {host}"),
            Some(host) => format!("held {host}"),
        };
        leases.insert(number_of(&name).to_string(), said.into());
    }
    let (leases, writers) = (Value::from(leases), Value::from(writers));
    if leases == trace["leases"] && writers == trace["writers"] {
        return Ok(());
    }
    Err(format!(
        "{leases} {writers}; the model: {} {}",
        trace["leases"], trace["writers"]
    ))
}

fn step(
    act: &Value,
    store: &MemoryStore,
    states: &[tempfile::TempDir],
    sessions: &mut BTreeMap<u64, Session>,
    late: &mut Vec<(String, Late)>,
) {
    let text = |what: &str| act[what].as_str().unwrap_or_default();
    let sid = act["sid"].as_u64().unwrap_or_default();
    match text("do") {
        kind @ ("start" | "unlock") => {
            let machine = usize::try_from(act["machine"].as_u64().unwrap()).unwrap();
            // A session that has ended in the model may still have a read under way.
            let ended: Vec<u64> = sessions
                .iter()
                .filter(|(_, session)| session.machine == machine)
                .map(|(sid, _)| *sid)
                .collect();
            for sid in ended {
                let session = sessions.remove(&sid).unwrap();
                session.gate.run();
                drop(session.end());
            }
            let state = states[machine].path().to_owned();
            let session = Session::start(sid, machine, kind == "unlock", state, store);
            sessions.insert(sid, session);
        }
        "serve" => serve(act, &sessions[&sid]),
        "go" => {
            let session = &sessions[&sid];
            match (text("was"), text("choice")) {
                ("work", "look") => session.order(Command::Verify),
                ("work", "finish") => session.order(Command::Release),
                ("doors", "a") => session.order(Command::CloseAnswered),
                ("doors", _) => {
                    if let Some(lock) = &*session.lock.lock().unwrap() {
                        lock.close_by_word(lock::LATE_WRITE_S);
                    }
                    session.order(Command::Confirm);
                }
                ("lost", _) if act["free"] == true => session.order(Command::Answer),
                _ => {}
            }
        }
        "loss" if text("pc") == "again" => {
            let session = &sessions[&sid];
            session.gate.lose();
            session
                .gate
                .wait_until("lost", |state| (!state.busy).then_some(()));
            let mut state = session.gate.state();
            late.append(&mut state.late);
            state.lost = false;
            drop(state);
            session.order(Command::Again);
        }
        "loss" | "crash" => {
            if text("was") == "end" {
                // Before a withdrawal or an answer it checks the state.
                sessions[&sid].gate.run();
            }
            if text("pc").is_empty() {
                late.append(&mut sessions.remove(&sid).unwrap().end());
            }
        }
        "ghost" => {
            let label = format!("{} {}", text("what"), act["lease"]);
            if let Some(at) = late.iter().position(|(waiting, _)| *waiting == label) {
                (late.remove(at).1)();
            }
        }
        _ => {}
    }
}

fn serve(act: &Value, session: &Session) {
    let gate = &session.gate;
    let text = |what: &str| act[what].as_str().unwrap_or_default();
    let (lease, pred) = (
        act["lease"].as_u64().unwrap(),
        act["pred"].as_u64().unwrap(),
    );
    match (text("what"), text("was")) {
        ("list", "first") => gate.run(),
        ("list", "closing") => gate.run_to_the_end(),
        ("list", _) => gate.let_go("list"),
        ("make", "again made") => gate.let_go(&format!("make {}", lease + 1)),
        ("make", _) => {
            gate.let_go(&format!("make {lease}"));
            if text("pc").is_empty() {
                gate.run_to_the_end();
            }
        }
        ("put", "end") => {
            // Before a withdrawal or an answer it checks the state. A session that has released its
            // lease does nothing more.
            gate.run();
            if session.is_busy() {
                gate.let_go(&format!("put {lease}"));
            }
        }
        ("put", _) => gate.let_go(&format!("put {lease}")),
        ("look", "closing") => gate.let_go(&format!("stat {}", lease + 1)),
        ("look", _) => {
            gate.let_go(&format!("read {lease}"));
            gate.let_go(&format!("stat {}", lease + 1));
        }
        ("read", "asked") => gate.run(),
        ("read", _) if pred > 0 => gate.let_go(&format!("read {pred}")),
        _ => {}
    }
    // The model has finished the command; the rest of it are reads.
    let now = text("pc");
    if now == "work" || now == "doors" || now == "lost" || now == "opened" {
        gate.run_to_the_end();
    }
    if now == "entered" && text("was") == "asked" && !session.is_busy() {
        session.order(Command::Confirm);
    }
}
