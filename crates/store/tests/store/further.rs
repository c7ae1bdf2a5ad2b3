//! Further connections: begun when the first is full, used once they joined, never waited for.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sprat_store::sftp::Wire;
use sprat_store::{
    Access, FileName, ReadClass, SftpOptions, SftpStore, Store, StoreError, StoreErrorKind,
    StoreFile, WriteGuard,
};
use sprat_testkit::leftovers::LIMIT;

use crate::part::scripted::{
    EXTENDED, FSTAT, LSTAT, Next, OPEN, Script, WRITE, attributes, connect_to, framed,
    serial_greeting, serve, status, string,
};

/// More than one connection carries at once.
const MUCH_BYTES: usize = 24 << 20;

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
    /// The name leads to another file there, of the same owner, mode and length.
    OtherFile,
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
        let script = move |kind: u8, id: u32, _: &[u8], stream: &mut UnixStream| match others {
            Others::CloseAt(at) if number > 0 && kind == at => {
                strikes.fetch_add(1, Ordering::SeqCst);
                Some(Next::HangUp)
            }
            Others::NeverAnswer(at) if number > 0 && kind == at => {
                strikes.fetch_add(1, Ordering::SeqCst);
                Some(Next::Answered)
            }
            Others::OtherFile if number > 0 && matches!(kind, LSTAT | FSTAT) => {
                if kind == FSTAT {
                    strikes.fetch_add(1, Ordering::SeqCst);
                }
                let mut other = attributes(id, 0o100_600);
                // The last byte is that of the modification time.
                *other.last_mut().unwrap() += 1;
                stream.write_all(&other).unwrap();
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
        crate::part::eventually(|| {
            // A fast server may keep the first connection from being full.
            self.write_much();
            (self.struck.load(Ordering::SeqCst) == times).then_some(())
        });
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
    crate::part::eventually(|| {
        server.write_much();
        (server.store.further_connections().0 == 3).then_some(())
    });
    assert_eq!(server.logins.load(Ordering::SeqCst), 4);
}

#[test]
fn logins_begin_before_much_is_read_if_that_is_expected() {
    let server = server(Others::Work);
    server.file.expect_much();
    crate::part::eventually(|| (server.store.further_connections().0 == 3).then_some(()));
    server.file.expect_much();
    server.write_much();
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

/// Somebody gave the container's name to another file while it was open.
#[test]
fn connection_that_leads_to_another_file_is_not_used() {
    let server = server(Others::OtherFile);
    server.write_much();
    // Each of them tries three times.
    server.eventually_struck(9);
    server.write_much();
    assert_eq!(server.store.further_connections().0, 0);
}

#[test]
fn session_ends_at_once_beside_a_login_that_hangs() {
    for others in [Others::Hang, Others::NeverAnswer(OPEN)] {
        let server = server(others);
        server.write_much();
        server.eventually_struck(3);
        let begun = Instant::now();
        drop(server);
        assert!(begun.elapsed() < LIMIT);
    }
}

/// What an agent sends first.
fn agent_greeting() -> Vec<u8> {
    let agent = "sprat-agent@sprat";
    let value = "1 log serial fence punch map will id=0011223344556677";
    let version = [
        &[2, 0, 0, 0, 3][..],
        &string(agent.as_bytes()),
        &string(value.as_bytes()),
    ];
    framed(&version.concat())
}

/// The second request for holes is there before the first one is answered. If that one is refused, no third one is sent,
/// and nothing may be carried out any more when the caller hears of it.
#[test]
fn refused_holes_are_reported_when_nothing_of_them_can_arrive_any_more() {
    let (asked, over) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let (count, is_over) = (Arc::clone(&asked), Arc::clone(&over));
    let first = Mutex::new(0);
    let script = move |kind: u8, id: u32, fields: &[u8], stream: &mut UnixStream| {
        if kind != EXTENDED || !fields[4..].starts_with(b"punch@sprat") {
            return None;
        }
        if count.fetch_add(1, Ordering::SeqCst) == 0 {
            *first.lock().unwrap() = id;
            return Some(Next::Answered);
        }
        let refused = status(*first.lock().unwrap(), 4);
        stream.write_all(&refused).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        is_over.store(true, Ordering::SeqCst);
        let done = [
            &[201][..],
            &id.to_be_bytes(),
            &(128_u64 << 20).to_be_bytes(),
        ];
        stream.write_all(&framed(&done.concat())).unwrap();
        Some(Next::Answered)
    };
    let store = connect_to(&agent_greeting(), script).unwrap();
    let name = FileName::new("x").unwrap();
    let file = store.open(&name, Access::ReadWrite).unwrap();
    let range = 0..256 << 20;
    let refused = file.discard_ranges(std::slice::from_ref(&range));
    assert!(refused.unwrap_err().was_answered());
    assert!(over.load(Ordering::SeqCst));
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

/// A server that needs longer for its last act than a connection may take to be closed.
#[test]
fn session_ends_when_the_agent_knows_how_the_file_was_left() {
    let (noted, heard) = std::sync::mpsc::channel();
    let noted = Mutex::new(noted);
    let script = move |kind: u8, id: u32, fields: &[u8], stream: &mut UnixStream| {
        if kind != EXTENDED || !fields[4..].starts_with(b"session-end@sprat") {
            return None;
        }
        std::thread::sleep(Duration::from_secs(3));
        let answered = stream.write_all(&status(id, 0));
        noted.lock().unwrap().send(answered.is_ok()).unwrap();
        Some(Next::Answered)
    };
    let store = connect_to(&agent_greeting(), script).unwrap();
    store.note_end(&FileName::new("x").unwrap());
    drop(store);
    assert_eq!(heard.recv_timeout(LIMIT), Ok(true));
}

/// A lease whose last check is too old, or that is lost.
#[derive(Default)]
struct Lease {
    too_old: AtomicBool,
    lost: AtomicBool,
    checks: AtomicUsize,
}

impl WriteGuard for Lease {
    fn may_send(&self) -> bool {
        !self.too_old.load(Ordering::SeqCst) && !self.lost.load(Ordering::SeqCst)
    }

    fn check_again(&self, _: u32) -> Result<(), StoreError> {
        self.checks.fetch_add(1, Ordering::SeqCst);
        self.too_old.store(false, Ordering::SeqCst);
        match self.lost.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err(StoreError::Withheld {
                op: "write",
                object: "x".to_owned(),
                reason: "lost".to_owned(),
            }),
        }
    }
}

/// Writes wait while a slow connection is full. What was true of the lease before may not be true
/// when they are sent.
#[test]
fn write_that_waited_is_sent_only_if_the_guard_still_allows_it() {
    let held: Arc<Mutex<Vec<u32>>> = Arc::default();
    let (kept, streams) = (Arc::clone(&held), Arc::new(Mutex::new(None)));
    let server = Arc::clone(&streams);
    let script = move |kind: u8, id: u32, _: &[u8], stream: &mut UnixStream| {
        if kind != WRITE {
            return None;
        }
        kept.lock().unwrap().push(id);
        *server.lock().unwrap() = Some(stream.try_clone().unwrap());
        Some(Next::Answered)
    };
    let store = connect_to(&serial_greeting(), script).unwrap();
    let file = store
        .open(&FileName::new("x").unwrap(), Access::ReadWrite)
        .unwrap();
    let lease = Arc::new(Lease::default());
    file.guard_writes(Arc::clone(&lease) as Arc<dyn WriteGuard>);
    let arrived = |number: usize| {
        crate::part::eventually(|| (held.lock().unwrap().len() == number).then_some(()));
    };
    let answer_all = || {
        let ids = std::mem::take(&mut *held.lock().unwrap());
        let mut stream = streams.lock().unwrap();
        for id in ids {
            let stream = stream.as_mut().unwrap();
            stream.write_all(&status(id, 0)).unwrap();
        }
    };
    let full = vec![1; 2 << 20];
    for lost in [false, true] {
        std::thread::scope(|scope| {
            let filling = scope.spawn(|| file.write_at(0, &full));
            arrived(9);
            let waiting = scope.spawn(|| file.write_at(0, &[2; 4096]));
            std::thread::sleep(Duration::from_millis(20));
            lease.too_old.store(true, Ordering::SeqCst);
            lease.lost.store(lost, Ordering::SeqCst);
            answer_all();
            filling.join().unwrap().unwrap();
            if !lost {
                arrived(1);
                answer_all();
            }
            match waiting.join().unwrap() {
                Err(error) if lost => assert_eq!(error.kind(), StoreErrorKind::Withheld),
                outcome => outcome.unwrap(),
            }
        });
        assert!(held.lock().unwrap().is_empty(), "sent all the same");
    }
    assert_eq!(lease.checks.load(Ordering::SeqCst), 2);
}
