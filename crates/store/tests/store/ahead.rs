//! Questions that are asked ahead: each is answered once, and never from before a change.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sprat_store::{Access, FileName, Question, SftpStore, Store};

use crate::part::scripted::{
    EXTENDED, FSTAT, LSTAT, Next, OPEN, OPENDIR, READ, READDIR, STAT, WRITE, attributes,
    connect_to, data, greeting, serial_greeting, status,
};

fn name(text: &str) -> FileName {
    FileName::new(text).unwrap()
}

/// What a server received, and when it answered an fsync.
type Received = Arc<Mutex<Vec<&'static str>>>;

/// A server that answers an fsync after a moment.
fn recording(greeting: &[u8]) -> (SftpStore, Received) {
    let received = Received::default();
    let seen = Arc::clone(&received);
    let script = move |kind: u8, id: u32, rest: &[u8], stream: &mut UnixStream| {
        let what = match kind {
            LSTAT if rest.ends_with(b"next") => "stat next",
            OPEN if rest[..rest.len() - 8].ends_with(b"next") => "open next",
            OPENDIR => "list",
            WRITE => "write",
            READ => "read",
            EXTENDED if rest[4..].starts_with(b"fsync") => "fsync",
            READDIR => {
                stream.write_all(&status(id, 1)).unwrap();
                return Some(Next::Answered);
            }
            _ => return None,
        };
        seen.lock().unwrap().push(what);
        if what != "fsync" {
            return None;
        }
        let (seen, mut stream) = (Arc::clone(&seen), stream.try_clone().unwrap());
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            seen.lock().unwrap().push("fsynced");
            stream.write_all(&status(id, 0)).unwrap();
        });
        Some(Next::Answered)
    };
    let store = connect_to(greeting, script).unwrap();
    (store, received)
}

fn count(received: &Received, what: &str) -> usize {
    let received = received.lock().unwrap();
    received.iter().filter(|one| **one == what).count()
}

#[test]
fn answer_is_used_once_and_not_after_it_was_forgotten() {
    let (store, received) = recording(&serial_greeting());
    let next = name("next");
    let asked = [
        Question::List,
        Question::Stat(next.clone()),
        Question::Open(next.clone(), Access::ReadWrite),
    ];
    store.ask_ahead(&asked);
    crate::part::eventually(|| (count(&received, "open next") == 1).then_some(()));
    store.list().unwrap();
    store.open(&next, Access::ReadWrite).unwrap();
    store.stat(&next).unwrap();
    let counts = || ["list", "stat next", "open next"].map(|what| count(&received, what));
    assert_eq!(counts(), [1, 2, 1], "all of it came from the answers");
    store.list().unwrap();
    store.stat(&next).unwrap();
    store.open(&next, Access::ReadWrite).unwrap();
    assert_eq!(counts(), [2, 4, 2], "each answer counts once");
    store.ask_ahead(&asked);
    store.forget_ahead();
    store.list().unwrap();
    store.stat(&next).unwrap();
    assert_eq!(counts(), [4, 7, 3]);
}

/// The server greets when it is asked for its folder.
#[test]
fn what_needs_no_greeting_is_asked_before_it() {
    let script = |kind: u8, _: u32, _: &[u8], stream: &mut UnixStream| {
        if kind == STAT {
            stream.write_all(&serial_greeting()).unwrap();
        }
        None
    };
    connect_to(&[], script).unwrap();
}

#[test]
fn no_answer_from_before_a_change_is_used_after_it() {
    type Change = fn(&SftpStore);
    let changes: [Change; 6] = [
        |store| drop(store.create_new(&name("x"))),
        |store| drop(store.overwrite_and_stat(&name("x"), b"free", &name("y"))),
        |store| drop(store.remove(&name("x"))),
        |store| drop(store.rename(&name("x"), &name("y"))),
        |store| {
            let file = store.open(&name("x"), Access::ReadWrite).unwrap();
            file.write_at(0, b"bytes").unwrap();
        },
        |store| {
            let file = store.open(&name("x"), Access::ReadWrite).unwrap();
            file.resize(1).unwrap();
        },
    ];
    for change in changes {
        let (store, received) = recording(&serial_greeting());
        store.ask_ahead(&[Question::Stat(name("next"))]);
        change(&store);
        store.stat(&name("next")).unwrap();
        assert_eq!(count(&received, "stat next"), 2);
    }
}

/// Servers give the handle of a closed file to the next one.
#[test]
fn bytes_of_a_file_that_was_replaced_while_it_was_opened_are_not_used() {
    let (stats, reads) = (AtomicU8::new(0), AtomicU8::new(0));
    let script = move |kind: u8, id: u32, _: &[u8], stream: &mut UnixStream| {
        let answer = match kind {
            // Another file than the one that was checked by name.
            FSTAT if stats.fetch_add(1, Ordering::SeqCst) == 0 => attributes(id, 0o100_644),
            READ => data(id, &[reads.fetch_add(1, Ordering::SeqCst); 8]),
            _ => return None,
        };
        stream.write_all(&answer).unwrap();
        Some(Next::Answered)
    };
    let store = connect_to(&serial_greeting(), script).unwrap();
    let read = store.open_and_read(&name("x"), Access::ReadOnly, &[(0, 8)]);
    let ranges = read.unwrap().ranges;
    assert_eq!(ranges[0].as_ref().unwrap(), &[1; 8]);
}

/// Nothing that another thread sends meanwhile makes the reads wait for each other.
#[test]
fn ranges_are_all_asked_for_before_the_first_answer() {
    const RANGES: usize = 70;
    let held = Mutex::new(Vec::new());
    let script = move |kind: u8, id: u32, _: &[u8], stream: &mut UnixStream| {
        if kind != READ {
            return None;
        }
        let mut held = held.lock().unwrap();
        held.push(id);
        if held.len() == RANGES {
            for id in held.drain(..) {
                stream.write_all(&data(id, &[1; 8])).unwrap();
            }
        }
        Some(Next::Answered)
    };
    let store = connect_to(&serial_greeting(), script).unwrap();
    let ranges: Vec<_> = (0..RANGES as u64).map(|at| (at << 12, 8)).collect();
    let read = std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..100 {
                drop(store.open(&name("y"), Access::ReadOnly));
            }
        });
        store.open_and_read(&name("x"), Access::ReadOnly, &ranges)
    });
    assert!(read.unwrap().ranges.iter().all(Result::is_ok));
}

/// As for a new lease: the second check comes behind the flushes of the file and of its folder.
#[test]
fn questions_behind_a_new_file_are_carried_out_after_its_flushes() {
    for (greeting, serial) in [
        (serial_greeting(), true),
        (greeting(&["fsync@openssh.com"]), false),
    ] {
        let (store, received) = recording(&greeting);
        let behind = [Question::Stat(name("next")), Question::List];
        let filled = store.create_filled_asking(&name("x"), &[1; 4096], &behind);
        filled.unwrap().durable().unwrap();
        store.stat(&name("next")).unwrap();
        store.list().unwrap();
        let received = received.lock().unwrap();
        let at = |what: &str| received.iter().position(|one| *one == what).unwrap();
        let last_fsync = received.iter().rposition(|one| *one == "fsync").unwrap();
        assert!(at("write") < at("fsync"), "{received:?}");
        assert!(last_fsync < at("stat next") && last_fsync < at("list"));
        // This server answers the questions before the fsyncs: it doesn't keep the order, and
        // so they are asked again. Any other gets them after the answers.
        let answered = received.iter().rposition(|one| *one == "fsynced").unwrap();
        let again = received
            .iter()
            .rposition(|one| *one == "stat next")
            .unwrap();
        assert!(answered < again, "{received:?}");
        assert_eq!(at("stat next") < answered, serial, "{received:?}");
        assert_eq!(again > at("stat next"), serial, "{received:?}");
    }
}

#[test]
fn connection_asks_the_first_questions_before_any_answer() {
    use sprat_testkit::{needs, requires};
    requires!(needs::sftp_server_missing());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("x"), [7; 9000]).unwrap();
    let mut options = crate::part::piped(folder.path(), &[]);
    options.questions = vec![
        Question::FreeSpace,
        Question::List,
        Question::Stat(name("x")),
        Question::Open(name("x"), Access::ReadOnly),
        Question::Open(name("missing"), Access::ReadWrite),
    ];
    let store = SftpStore::connect(options).unwrap();
    assert!(store.free_space().unwrap().total_bytes > 0);
    assert_eq!(store.list().unwrap(), [name("x")]);
    store
        .open(&name("missing"), Access::ReadWrite)
        .map(drop)
        .unwrap_err();
    let ranges = [(0, 4096), (8192, 4096), (4000, 5000)];
    let read = store.open_and_read(&name("x"), Access::ReadOnly, &ranges);
    let read = read.unwrap();
    assert_eq!(read.stat.len, 9000);
    let lens: Vec<_> = read
        .ranges
        .iter()
        .map(|range| range.as_ref().map(Vec::len).ok())
        .collect();
    assert_eq!(
        lens,
        [Some(4096), None, Some(5000)],
        "one ends behind the file"
    );
    assert!(
        read.ranges
            .iter()
            .flatten()
            .flatten()
            .all(|byte| *byte == 7)
    );
    // What somebody else changed meanwhile is seen by everything that is asked now.
    std::fs::remove_file(folder.path().join("x")).unwrap();
    assert!(store.stat(&name("x")).is_ok(), "it was asked before");
    assert!(store.stat(&name("x")).is_err());
}

/// The check behind "free" decides whether a session may report success.
#[test]
fn check_behind_a_write_is_asked_again_if_its_answer_came_first() {
    for prepared in [false, true] {
        let writing: Arc<Mutex<Option<u32>>> = Arc::default();
        let script = move |kind: u8, id: u32, rest: &[u8], stream: &mut UnixStream| match kind {
            WRITE => {
                *writing.lock().unwrap() = Some(id);
                Some(Next::Answered)
            }
            // It is carried out before the write, and another session makes it in between.
            LSTAT if rest.ends_with(b"next") => {
                let write = writing.lock().unwrap().take()?;
                stream.write_all(&status(id, 2)).unwrap();
                stream.write_all(&status(write, 0)).unwrap();
                Some(Next::Answered)
            }
            _ => None,
        };
        let store = connect_to(&serial_greeting(), script).unwrap();
        let lease = name("lease");
        if prepared {
            store.prepare_overwrite(&lease);
        }
        let found = store.overwrite_and_stat(&lease, b"free", &name("next"));
        assert!(found.unwrap().is_some(), "{prepared}");
    }
}
