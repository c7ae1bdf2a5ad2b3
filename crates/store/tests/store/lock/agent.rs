//! Takeovers on a server with an agent, which refuses what earlier sessions sent through it.

use std::sync::Mutex;

use sprat_store::{Access, Capabilities, FileStat, FreeSpace, StoreError, StoreFile};

use super::*;

/// A store behind an agent with this id, or behind none.
#[derive(Default)]
struct AgentStore {
    below: MemoryStore,
    id: Mutex<Option<&'static str>>,
    refusals: AtomicUsize,
}

impl AgentStore {
    fn is_behind(&self, id: Option<&'static str>) {
        *self.id.lock().unwrap() = id;
    }
}

impl Store for AgentStore {
    fn describe(&self) -> String {
        self.below.describe()
    }
    fn capabilities(&self) -> Capabilities {
        self.below.capabilities()
    }
    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        self.below.open(name, access)
    }
    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        self.below.create_new(name)
    }
    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        self.below.stat(name)
    }
    fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        self.below.rename(from, to)
    }
    fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        self.below.rename_new(from, to)
    }
    fn remove(&self, name: &FileName) -> Result<(), StoreError> {
        self.below.remove(name)
    }
    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        self.below.list()
    }
    fn flush_folder(&self) -> Result<(), StoreError> {
        self.below.flush_folder()
    }
    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        self.below.free_space()
    }
    fn agent(&self) -> Option<String> {
        self.id.lock().unwrap().map(str::to_owned)
    }
    fn refuse_earlier(&self, _name: &FileName) -> Result<bool, StoreError> {
        self.refusals.fetch_add(1, Ordering::SeqCst);
        Ok(self.agent().is_some())
    }
}

/// A session of this machine that dies with its lease.
fn dies(store: &AgentStore, host: &tempfile::TempDir) -> u64 {
    let lock = take(store, &record(host.path())).unwrap();
    lock.number()
}

#[test]
fn dead_session_is_no_predecessor_if_the_agent_refuses_all_that_it_sent() {
    let (store, host) = (AgentStore::default(), host());
    store.is_behind(Some("a"));
    let dead = dies(&store, &host);
    let lock = take(&store, &record(host.path())).unwrap();
    assert!(lock.took_over() && lock.may_arrive());
    let refused = lock.close_refused(&store, true).unwrap();
    assert_eq!(refused, [dead]);
    assert!(!lock.may_arrive() && lock.only_these_could_arrive(&refused));
    assert_eq!(store.refusals.load(Ordering::SeqCst), 1);
    // It is durable: the next session inherits nothing of it.
    lock.release(&store).unwrap();
    assert!(!take(&store, &record(host.path())).unwrap().may_arrive());
}

#[test]
fn session_that_sent_past_this_agent_stays_a_predecessor() {
    for before in [None, Some("b")] {
        let (store, host) = (AgentStore::default(), host());
        store.is_behind(before);
        dies(&store, &host);
        store.is_behind(Some("a"));
        let lock = take(&store, &record(host.path())).unwrap();
        assert!(lock.close_refused(&store, true).unwrap().is_empty());
        assert!(lock.may_arrive(), "{before:?}");
        assert_eq!(store.refusals.load(Ordering::SeqCst), 0);
    }
}

#[test]
fn older_predecessor_without_the_agent_still_counts_behind_a_refused_one() {
    let (store, host) = (AgentStore::default(), host());
    dies(&store, &host);
    store.is_behind(Some("a"));
    let dead = dies(&store, &host);
    let lock = take(&store, &record(host.path())).unwrap();
    let refused = lock.close_refused(&store, true).unwrap();
    assert_eq!(refused, [dead]);
    assert!(lock.may_arrive() && !lock.only_these_could_arrive(&refused));
    // Without an agent nothing is refused.
    store.is_behind(None);
    assert!(lock.close_refused(&store, true).unwrap().is_empty());
}

#[test]
fn reconnect_past_the_agent_is_recorded_in_the_lease() {
    let (store, host) = (AgentStore::default(), host());
    store.is_behind(Some("a"));
    let lock = take(&store, &record(host.path())).unwrap();
    store.is_behind(None);
    lock.reacquire(&store).unwrap();
    drop(lock);
    store.is_behind(Some("a"));
    let lock = take(&store, &record(host.path())).unwrap();
    assert!(lock.close_refused(&store, true).unwrap().is_empty() && lock.may_arrive());
}

#[test]
fn session_of_another_machine_is_refused_only_when_it_sends_no_more() {
    let (store, here, there) = (AgentStore::default(), host(), host());
    store.is_behind(Some("a"));
    let other = take(&store, &record(there.path())).unwrap();
    let lock = Lock::take_over(&store, &container(), &record(here.path()), owner()).unwrap();
    assert!(lock.close_refused(&store, true).unwrap().is_empty());
    assert_eq!(lock.open_predecessors(), [other.number()]);
    assert_eq!(lock.close_refused(&store, false).unwrap(), [other.number()]);
    assert!(lock.open_predecessors().is_empty());
    assert_lost(other.verify(&store));
}
