//! Random walks of the lease: the rules as a program (`tests/model/lease_model.py`), and the real
//! code with a store in memory.
//!
//! In a walk several machines acquire, keep, release and take over one container. Each request to
//! the store waits until the walk lets it go, so requests of all machines mix in any order. A
//! machine may lose its connection at any request: that one and the next are carried out late, or
//! never. After each step at most one session may be allowed to write by its next lease check.
//!
//! `SPRAT_TORTURE_ROUNDS` runs the long form (`make torture ONLY=lease`), `SPRAT_TORTURE_SEED`
//! repeats a run.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by unwrapping and print their counters"
)]

#[path = "torture_lease/traces.rs"]
mod traces;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use sprat_store::{
    Access, Capabilities, FileName, FileStat, FreeSpace, Lock, LockError, OwnerNote, ReadClass,
    Store, StoreError, StoreFile, WriteJournal,
};
use sprat_testkit::dice::{Dice, number, seed};
use sprat_testkit::memory::MemoryStore;
use sprat_testkit::{needs, requires};

/// Walks of the short form, in `make test`, and for each round of the long one.
const WALKS_SHORT: u64 = 25;
const WALKS_A_ROUND: u64 = 30;
const MACHINES: usize = 3;
/// Requests of one walk.
const STEPS: u32 = 400;

fn rounds() -> Option<u64> {
    number("SPRAT_TORTURE_ROUNDS")
}

/// Requests that wait for their turn, and the state of each machine's.
#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// By ticket: the machine that waits.
    waiting: BTreeMap<u64, usize>,
    next: u64,
    /// Tickets that may go, and whether their connection still works.
    let_go: BTreeMap<u64, bool>,
    /// The walk has ended: no request waits any more.
    over: bool,
    /// Requests of lost connections that may still be carried out.
    late: Vec<Box<dyn FnOnce() + Send>>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits for a turn; returns whether the connection still works.
    fn turn(&self, machine: usize) -> bool {
        let mut state = self.state();
        let ticket = state.next;
        state.next += 1;
        state.waiting.insert(ticket, machine);
        self.changed.notify_all();
        loop {
            if state.over {
                return false;
            }
            if let Some(works) = state.let_go.remove(&ticket) {
                return works;
            }
            state = self.changed.wait(state).unwrap();
        }
    }
}

/// A connection of one machine to the store.
#[derive(Clone)]
struct Line {
    gate: Arc<Gate>,
    store: MemoryStore,
    machine: usize,
    lost: Arc<AtomicUsize>,
}

impl Line {
    fn new(gate: &Arc<Gate>, store: &MemoryStore, machine: usize) -> Self {
        Self {
            gate: Arc::clone(gate),
            store: store.clone(),
            machine,
            lost: Arc::default(),
        }
    }

    /// Carries a request out in its turn. If the connection is lost it may come late.
    fn ask<T: Send + 'static>(
        &self,
        request: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let gone = || StoreError::Disconnected {
            op: "ask",
            object: "the store".to_owned(),
            reason: "the walk decided so".to_owned(),
        };
        if self.lost.load(Ordering::SeqCst) == 0 && self.gate.turn(self.machine) {
            return request();
        }
        // The first request of a lost connection may be on its way; later ones were never sent.
        if self.lost.fetch_add(1, Ordering::SeqCst) == 0 {
            let mut state = self.gate.state();
            state.late.push(Box::new(|| drop(request())));
        }
        Err(gone())
    }
}

impl Store for Line {
    fn describe(&self) -> String {
        "a line".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        self.store.capabilities()
    }

    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        let (store, name) = (self.store.clone(), name.clone());
        let file = self.ask(move || store.open(&name, access))?;
        Ok(Arc::new(LineFile(self.clone(), file)))
    }

    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        let (store, name) = (self.store.clone(), name.clone());
        let file = self.ask(move || store.create_new(&name))?;
        Ok(Arc::new(LineFile(self.clone(), file)))
    }

    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        let (store, name) = (self.store.clone(), name.clone());
        self.ask(move || store.stat(&name))
    }

    fn rename(&self, _: &FileName, _: &FileName) -> Result<(), StoreError> {
        unreachable!("a lease is never renamed")
    }

    fn rename_new(&self, _: &FileName, _: &FileName) -> Result<(), StoreError> {
        unreachable!("a lease is never renamed")
    }

    fn remove(&self, name: &FileName) -> Result<(), StoreError> {
        let (store, name) = (self.store.clone(), name.clone());
        self.ask(move || store.remove(&name))
    }

    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        let store = self.store.clone();
        self.ask(move || store.list())
    }

    fn flush_folder(&self) -> Result<(), StoreError> {
        self.ask(|| Ok(()))
    }

    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        self.store.free_space()
    }
}

struct LineFile(Line, Arc<dyn StoreFile>);

impl StoreFile for LineFile {
    fn len(&self) -> Result<u64, StoreError> {
        Ok(self.stat()?.len)
    }

    fn stat(&self) -> Result<FileStat, StoreError> {
        let file = Arc::clone(&self.1);
        self.0.ask(move || file.stat())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8], class: ReadClass) -> Result<(), StoreError> {
        let (file, len) = (Arc::clone(&self.1), buf.len());
        let read = self.0.ask(move || {
            let mut bytes = vec![0; len];
            file.read_at(offset, &mut bytes, class).map(|()| bytes)
        });
        buf.copy_from_slice(&read?);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), StoreError> {
        let (file, data) = (Arc::clone(&self.1), data.to_vec());
        self.0.ask(move || file.write_at(offset, &data))
    }

    fn flush(&self) -> Result<(), StoreError> {
        self.0.ask(|| Ok(()))
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), StoreError> {
        unreachable!("a lease has no holes")
    }

    fn resize(&self, _: u64) -> Result<(), StoreError> {
        unreachable!("a lease keeps its length")
    }
}

fn container() -> FileName {
    FileName::new("box.luks").unwrap()
}

/// Counters of a walk, so that a walk in which nothing happens is no success.
#[derive(Default)]
struct Counts {
    taken: AtomicUsize,
    released: AtomicUsize,
    taken_over: AtomicUsize,
    again: AtomicUsize,
    lost: AtomicUsize,
}

/// One machine: sessions, one after another, until the walk has ended.
struct Machine<'a> {
    gate: &'a Arc<Gate>,
    store: &'a MemoryStore,
    number: usize,
    state: &'a Path,
    /// The lease by which this machine would write now.
    writes_by: &'a Mutex<Option<Arc<Lock>>>,
    counts: &'a Counts,
}

impl Machine<'_> {
    fn live(&self, mut dice: Dice) {
        while !self.gate.state().over {
            // The check after a step may keep the old lease, and with it the journal, a moment
            // longer.
            let Ok(record) = WriteJournal::open(self.state, "id") else {
                std::thread::yield_now();
                continue;
            };
            let line = Line::new(self.gate, self.store, self.number);
            let on_purpose = dice.below(6) == 0;
            let owner = OwnerNote {
                host: format!("{}", self.number),
                version: "0".to_owned(),
            };
            let taken = match on_purpose {
                true => Lock::take_over(&line, &container(), &record, owner),
                false => Lock::acquire(&line, &container(), &record, owner),
            };
            if let Ok(lock) = taken {
                self.counts.taken.fetch_add(1, Ordering::SeqCst);
                self.hold(line, lock, &mut dice);
            } else if !self.gate.state().over {
                // So that a refused machine does not fill the walk.
                let _ = self.gate.turn(self.number);
            }
            *self.writes_by.lock().unwrap() = None;
        }
    }

    fn hold(&self, mut line: Line, lock: Lock, dice: &mut Dice) {
        if !lock.open_predecessors().is_empty() {
            self.counts.taken_over.fetch_add(1, Ordering::SeqCst);
            let answered =
                lock.close_answered(&line).is_ok() && lock.open_predecessors().is_empty();
            if !answered && dice.below(2) == 0 {
                return;
            }
            lock.close_by_word(sprat_store::lock::LATE_WRITE_S);
            if lock.confirm(&line).is_err() {
                return;
            }
        }
        let lock = Arc::new(lock);
        *self.writes_by.lock().unwrap() = Some(Arc::clone(&lock));
        for _ in 0..dice.below(6) {
            let kept = match dice.below(3) {
                0 => lock.verify(&line),
                1 => lock.remove_old(&line).map(drop),
                _ => lock.renew(&line),
            };
            let mut outcome = kept;
            while let Err(LockError::Store { .. }) = outcome {
                if self.gate.state().over || dice.below(4) == 0 {
                    return;
                }
                // A new connection; until it has the next lease nothing is written.
                *self.writes_by.lock().unwrap() = None;
                line = Line::new(self.gate, self.store, self.number);
                outcome = lock.reacquire(&line);
                if outcome.is_ok() {
                    self.counts.again.fetch_add(1, Ordering::SeqCst);
                    *self.writes_by.lock().unwrap() = Some(Arc::clone(&lock));
                }
            }
            if outcome.is_err() {
                self.counts.lost.fetch_add(1, Ordering::SeqCst);
                return;
            }
        }
        *self.writes_by.lock().unwrap() = None;
        let Some(lock) = Arc::into_inner(lock) else {
            return;
        };
        if dice.below(4) > 0 && lock.release(&line).is_ok() {
            self.counts.released.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// The highest lease that ever existed must be there, and at most one session may write.
fn check(store: &MemoryStore, writers: &[Mutex<Option<Arc<Lock>>>], highest: &mut u64, at: &str) {
    let writing: Vec<u64> = writers
        .iter()
        .filter_map(|writer| writer.lock().unwrap().clone())
        .filter(|lock| lock.verify(store).is_ok())
        .map(|lock| lock.number())
        .collect();
    assert!(writing.len() <= 1, "{at}: {writing:?} may write");
    let names = store.list().unwrap();
    let numbers = names.iter().filter_map(|name| {
        let number = name.as_str().rsplit_once(".lock.")?.1;
        number.parse::<u64>().ok()
    });
    let now = numbers.max().unwrap_or(0);
    assert!(now >= *highest, "{at}: lease {highest} is gone");
    *highest = now;
}

fn walk(seed: u64, counts: &Counts) {
    let mut dice = Dice::new(seed);
    let (gate, store) = (Arc::new(Gate::default()), MemoryStore::new());
    let states: Vec<_> = (0..MACHINES)
        .map(|_| tempfile::tempdir().unwrap())
        .collect();
    let writers: Vec<Mutex<Option<Arc<Lock>>>> = (0..MACHINES).map(|_| Mutex::default()).collect();
    std::thread::scope(|scope| {
        for (number, state) in states.iter().enumerate() {
            let machine = Machine {
                gate: &gate,
                store: &store,
                number,
                state: state.path(),
                writes_by: &writers[number],
                counts,
            };
            let dice = Dice::new(seed ^ (number as u64 + 1) << 40);
            scope.spawn(move || machine.live(dice));
        }
        let mut highest = 0;
        let walked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for step in 0..STEPS {
                let late = {
                    let mut state = gate.state();
                    // All others wait, or are about to: the dice decide on their order.
                    while state.waiting.is_empty() {
                        let (next, out) = gate
                            .changed
                            .wait_timeout(state, Duration::from_secs(20))
                            .unwrap();
                        assert!(!out.timed_out(), "no request arrives");
                        state = next;
                    }
                    if !state.late.is_empty() && dice.below(8) == 0 {
                        let which = dice.below(state.late.len() as u64);
                        Some(state.late.remove(usize::try_from(which).unwrap()))
                    } else {
                        let which = dice.below(state.waiting.len() as u64);
                        let mut tickets = state.waiting.keys().copied();
                        let ticket = tickets.nth(usize::try_from(which).unwrap()).unwrap();
                        state.waiting.remove(&ticket);
                        let works = dice.below(25) > 0;
                        state.let_go.insert(ticket, works);
                        gate.changed.notify_all();
                        None
                    }
                };
                if let Some(late) = late {
                    late();
                }
                if dice.below(30) == 0 {
                    store.let_pass(1800);
                }
                check(
                    &store,
                    &writers,
                    &mut highest,
                    &format!("seed {seed}, step {step}"),
                );
            }
        }));
        gate.state().over = true;
        gate.changed.notify_all();
        if let Err(panic) = walked {
            std::panic::resume_unwind(panic);
        }
    });
}

#[test]
fn never_two_sessions_write_in_any_order_of_requests() {
    let seed = seed();
    let counts = Counts::default();
    let walks = rounds().map_or(WALKS_SHORT, |rounds| rounds * WALKS_A_ROUND);
    for n in 0..walks {
        walk(seed.wrapping_mul(1_000_003).wrapping_add(n), &counts);
    }
    let counted = |count: &AtomicUsize| count.load(Ordering::SeqCst);
    let figures = [
        counted(&counts.taken),
        counted(&counts.released),
        counted(&counts.taken_over),
        counted(&counts.again),
        counted(&counts.lost),
    ];
    println!("{walks} walks; acquired, released, taken over, reacquired, lost: {figures:?}");
    assert!(figures.iter().all(|count| *count > 0), "{figures:?}");
}

/// Traces of the short form, and for each round of the long one.
const TRACES_SHORT: u64 = 100;
const TRACES_A_ROUND: u64 = 40;

#[test]
fn traces_of_the_model_end_the_same_in_the_real_code() {
    requires!(needs::program("python3"));
    let count = rounds().map_or(TRACES_SHORT, |rounds| rounds * TRACES_A_ROUND);
    let lines = model(&["traces", &count.to_string(), &seed().to_string()]);
    let mut acts = 0;
    for (nth, line) in lines.lines().enumerate() {
        let trace: serde_json::Value = serde_json::from_str(line).unwrap();
        acts += trace["acts"].as_array().unwrap().len();
        let driven = traces::drive(&trace);
        assert!(driven.is_ok(), "trace {nth}: {driven:?}\n{}", story(&trace));
    }
    println!("{count} traces, {acts} acts");
}

/// A trace as readable text.
fn story(trace: &serde_json::Value) -> String {
    let acts = trace["acts"].as_array().unwrap().iter();
    acts.map(|act| format!("{act}\n")).collect()
}

fn model(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/model/lease_model.py");
    let output = Command::new("python3")
        .arg(script)
        .args(arguments)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}{complaints}");
    said
}

#[test]
fn rules_of_the_model_break_no_invariant() {
    requires!(needs::program("python3"));
    let seed = format!("--seed={}", seed());
    // Seconds for each configuration; there are about twenty, and each is explored and walked.
    let seconds = rounds().map_or("0.2".to_owned(), |rounds| (rounds * 2).to_string());
    println!("{}", model(&[&seconds, &seed]));
}

#[test]
fn each_removed_rule_breaks_an_invariant() {
    requires!(needs::program("python3"));
    // These are found at once; the long form removes all rules.
    let short = ["--rule=doors", "--rule=until", "--rule=final"];
    let seconds = rounds().map_or("5", |_| "300");
    let arguments = match rounds() {
        Some(_) => vec!["mutate", seconds],
        None => [&["mutate", seconds][..], &short].concat(),
    };
    println!("{}", model(&arguments));
}
