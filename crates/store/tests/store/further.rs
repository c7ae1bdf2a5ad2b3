//! Further connections: begun when the first is full, used once they joined, never waited for.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sprat_store::sftp::Wire;
use sprat_store::{Access, FileName, ReadClass, SftpOptions, SftpStore, Store, StoreFile};

use crate::part::scripted::{LSTAT, Next, OPEN, Script, serial_greeting, serve};

/// More than one connection carries at once.
const MUCH_BYTES: usize = 8 << 20;

/// What each connection but the first does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Others {
    Work,
    /// They never greet.
    Hang,
    /// They are closed by the first request of this kind.
    CloseAt(u8),
    /// They never answer a request of this kind.
    NeverAnswer(u8),
}

struct Server {
    store: SftpStore,
    file: Arc<dyn StoreFile>,
    /// Logins so far.
    logins: Arc<AtomicUsize>,
    /// Connections that did what [`Others`] says, and those that hang.
    struck: Arc<AtomicUsize>,
    _hanging: Arc<Mutex<Vec<UnixStream>>>,
}

fn server(others: Others) -> Server {
    let [logins, struck] = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    let hanging = Arc::new(Mutex::new(Vec::new()));
    let (count, strikes, hang) = (
        Arc::clone(&logins),
        Arc::clone(&struck),
        Arc::clone(&hanging),
    );
    let dial = move || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let number = count.fetch_add(1, Ordering::SeqCst);
        if others == Others::Hang && number > 0 {
            strikes.fetch_add(1, Ordering::SeqCst);
            hang.lock().unwrap().push(theirs);
            return Ok(Wire::over_socket(ours).unwrap());
        }
        let strikes = Arc::clone(&strikes);
        let script = move |kind: u8, _: u32, _: &[u8], _: &mut UnixStream| match others {
            Others::CloseAt(at) if number > 0 && kind == at => {
                strikes.fetch_add(1, Ordering::SeqCst);
                Some(Next::HangUp)
            }
            Others::NeverAnswer(at) if number > 0 && kind == at => {
                strikes.fetch_add(1, Ordering::SeqCst);
                Some(Next::Answered)
            }
            _ => None,
        };
        let script: Box<Script> = Box::new(script);
        std::thread::spawn(move || serve(theirs, &serial_greeting(), &*script));
        Ok(Wire::over_socket(ours).unwrap())
    };
    let options = SftpOptions::new(Vec::new(), "host", "/folder");
    let store = SftpStore::connect_over(Box::new(dial), options).unwrap();
    let name = FileName::new("x").unwrap();
    Server {
        file: store.open(&name, Access::ReadWrite).unwrap(),
        store,
        logins,
        struck,
        _hanging: hanging,
    }
}

impl Server {
    fn write_much(&self) {
        self.file.write_at(0, &vec![1; MUCH_BYTES]).unwrap();
        self.file.flush().unwrap();
    }

    fn eventually_struck(&self, times: usize) {
        crate::part::eventually(|| (self.struck.load(Ordering::SeqCst) == times).then_some(()));
    }
}

#[test]
fn small_writes_and_flushes_make_one_login() {
    let server = server(Others::Work);
    let file = &server.file;
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                for round in 0..20 {
                    let at = (thread * 20 + round) << 20;
                    file.write_at(at, &[1; 65_536]).unwrap();
                }
                file.flush().unwrap();
            });
        }
    });
    let parts: Vec<(u64, &[u8])> = (0..50).map(|part| (part << 20, &[2; 16_384][..])).collect();
    file.write_parts_durably(&parts).unwrap().durable().unwrap();
    // The scripted server has no reads; the request is what counts.
    let ahead = file.read_at(0, &mut [0; 65_536], ReadClass::Ahead);
    assert!(ahead.is_err());
    assert_eq!(server.logins.load(Ordering::SeqCst), 1);
    server.write_much();
    crate::part::eventually(|| (server.store.further_connections().0 == 3).then_some(()));
    assert_eq!(server.logins.load(Ordering::SeqCst), 4);
}

#[test]
fn writes_do_not_wait_for_a_login_that_hangs() {
    for others in [Others::Hang, Others::NeverAnswer(LSTAT)] {
        let server = server(others);
        server.write_much();
        server.eventually_struck(3);
        // An answer is waited for 60 s, so all of them hang still.
        server.write_much();
        assert_eq!(server.store.further_connections(), (0, None));
    }
}

#[test]
fn connection_lost_before_it_carried_anything_is_not_missed() {
    for at in [LSTAT, OPEN] {
        let server = server(Others::CloseAt(at));
        server.write_much();
        server.eventually_struck(3);
        for _ in 0..5 {
            server.write_much();
        }
        assert_eq!(server.store.further_connections().0, 0);
    }
}

#[test]
fn session_ends_at_once_beside_a_login_that_hangs() {
    for others in [Others::Hang, Others::NeverAnswer(OPEN)] {
        let server = server(others);
        server.write_much();
        server.eventually_struck(3);
        let begun = Instant::now();
        drop(server);
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}
