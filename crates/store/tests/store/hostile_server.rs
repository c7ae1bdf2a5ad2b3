//! A scripted server that breaks the protocol in every possible way. Each is an error of the right
//! kind, in bounded time and memory, and the session is dead afterwards.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sprat_store::sftp::Wire;
use sprat_store::{
    Access, FileName, ReadClass, SftpOptions, SftpStore, Store, StoreError, StoreErrorKind,
    StoreFile,
};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::{agent_server, needs, requires};

use crate::part::scripted::{
    EXTENDED, FSTAT, LSTAT, Next, OPEN, READ, READDIR, WRITE, attributes, connect_to, data, framed,
    greeting, packet, status, string,
};

/// A file on a server that is honest except for what `script` does with requests of type `kind`, for
/// `EXTENDED` with those of an fsync.
fn file_with(
    kind: u8,
    script: impl Fn(u32, &mut UnixStream) -> Option<Next> + Send + Sync + 'static,
) -> (SftpStore, Arc<dyn StoreFile>) {
    let store = connect_to(
        &greeting(&["fsync@openssh.com"]),
        move |found, id, rest, stream| {
            if found == kind && (found != EXTENDED || rest[4..].starts_with(b"fsync")) {
                script(id, stream)
            } else {
                None
            }
        },
    );
    let store = store.unwrap();
    let file = store
        .open(&FileName::new("x").unwrap(), Access::ReadWrite)
        .unwrap();
    (store, file)
}

fn answer(
    bytes: impl Fn(u32) -> Vec<u8> + Send + Sync,
) -> impl Fn(u32, &mut UnixStream) -> Option<Next> {
    move |id, stream| {
        let _ = stream.write_all(&bytes(id));
        Some(Next::Answered)
    }
}

#[track_caller]
fn read_fails(file: &dyn StoreFile, kind: StoreErrorKind) -> StoreError {
    let begun = Instant::now();
    let error = file
        .read_at(0, &mut [0; 10], ReadClass::Demand)
        .unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    error
}

/// After a violation everything fails at once, with the same kind.
#[track_caller]
fn is_dead(store: &SftpStore, file: &dyn StoreFile, kind: StoreErrorKind) {
    assert_eq!(
        file.read_at(0, &mut [0; 1], ReadClass::Demand)
            .unwrap_err()
            .kind(),
        kind
    );
    assert_eq!(file.write_at(0, b"x").unwrap_err().kind(), kind);
    assert_eq!(file.flush().unwrap_err().kind(), kind);
    assert_eq!(store.list().unwrap_err().kind(), kind);
}

#[test]
fn answer_without_a_request_is_a_violation() {
    let (store, file) = file_with(READ, answer(|id| data(id + 1000, &[7; 10])));
    let error = read_fails(&*file, StoreErrorKind::Protocol);
    assert!(error.to_string().contains("was not sent"), "{error}");
    file.write_at(0, b"x").unwrap_err();
    assert_eq!(store.list().unwrap_err().kind(), StoreErrorKind::Protocol);
}

#[test]
fn answer_that_comes_twice_is_a_violation() {
    let twice = answer(|id| [data(id, &[7; 10]), data(id, &[7; 10])].concat());
    let (store, file) = file_with(READ, twice);
    file.read_at(0, &mut [0; 10], ReadClass::Demand).unwrap();
    crate::part::eventually(|| store.list().err());
    read_fails(&*file, StoreErrorKind::Protocol);
}

#[test]
fn more_data_than_requested_is_a_violation() {
    let (_store, file) = file_with(READ, answer(|id| data(id, &[7; 11])));
    let error = read_fails(&*file, StoreErrorKind::Protocol);
    assert!(
        error.to_string().contains("11 bytes of data instead of 10"),
        "{error}"
    );
}

#[test]
fn data_length_beyond_its_packet_is_a_violation() {
    let (_store, file) = file_with(
        READ,
        answer(|id| packet(103, id, &[&[255, 255, 255, 255], &[7; 10]])),
    );
    read_fails(&*file, StoreErrorKind::Protocol);
}

#[test]
fn packet_beyond_the_limit_is_refused_before_it_is_read() {
    for head in [
        [0, 4, 0, 1],
        [0x7f, 255, 255, 255],
        [255; 4],
        [0, 0, 0, 0],
        [0, 0, 0, 4],
    ] {
        let (_store, file) = file_with(READ, answer(move |_| head.to_vec()));
        read_fails(&*file, StoreErrorKind::Protocol);
    }
}

#[test]
fn answer_of_the_wrong_type_is_a_violation() {
    for kind in [102, 104, 105, 201, 99, 2] {
        let (_store, file) = file_with(READ, answer(move |id| packet(kind, id, &[&[0; 8]])));
        read_fails(&*file, StoreErrorKind::Protocol);
    }
    // A status of success carries no data.
    let (_store, file) = file_with(READ, answer(|id| status(id, 0)));
    read_fails(&*file, StoreErrorKind::Protocol);
}

#[test]
fn short_data_is_requested_again_and_none_twice_is_a_violation() {
    let (_store, file) = file_with(READ, answer(|id| data(id, &[7; 3])));
    let mut read = [0; 9];
    file.read_at(0, &mut read, ReadClass::Demand).unwrap();
    assert_eq!(read, [7; 9]);
    let (_store, file) = file_with(READ, answer(|id| data(id, b"")));
    read_fails(&*file, StoreErrorKind::Protocol);
}

#[test]
fn end_of_file_reports_how_much_there_was() {
    let asked = AtomicU32::new(0);
    let (_store, file) = file_with(
        READ,
        answer(move |id| match asked.fetch_add(1, Ordering::SeqCst) {
            0 => data(id, &[7; 4]),
            _ => status(id, 1),
        }),
    );
    let error = read_fails(&*file, StoreErrorKind::Truncated);
    assert!(error.to_string().contains("after 4 of 10 bytes"), "{error}");
    file.write_at(0, b"the session lives").unwrap();
}

/// ProFTPD's `mod_sftp` uses the length that the file had when it was opened.
#[test]
fn end_at_the_length_of_a_stale_handle_is_checked_on_a_new_one() {
    let opened = AtomicU32::new(0);
    let script = move |kind: u8, id, _: &[u8], stream: &mut UnixStream| {
        let handles = opened.fetch_add(u32::from(kind == OPEN), Ordering::SeqCst);
        let answer = match handles {
            1 => status(id, 1),
            _ => data(id, &[7; 10]),
        };
        (kind == READ).then(|| stream.write_all(&answer).map(|()| Next::Answered).unwrap())
    };
    let store = connect_to(&greeting(&["fsync@openssh.com"]), script).unwrap();
    let file = store.open(&FileName::new("x").unwrap(), Access::ReadWrite);
    let mut read = [0; 10];
    let read_there = |file: Arc<dyn StoreFile>| file.read_at(500, &mut read, ReadClass::Demand);
    file.and_then(read_there).unwrap();
    assert_eq!(read, [7; 10]);
}

#[test]
fn end_inside_an_answer_is_a_lost_connection() {
    for len in [1, 4, 9, 15] {
        let (store, file) = file_with(READ, move |id, stream| {
            let _ = stream.write_all(&data(id, &[7; 10])[..len]);
            Some(Next::HangUp)
        });
        file.write_at(0, b"so that a flush has something to do")
            .unwrap();
        read_fails(&*file, StoreErrorKind::Disconnected);
        is_dead(&store, &*file, StoreErrorKind::Disconnected);
    }
}

#[test]
fn server_that_never_answers_is_a_lost_connection() {
    for kind in [READ, WRITE] {
        let (_store, file) = file_with(kind, |_, _| Some(Next::Answered));
        let begun = Instant::now();
        let error = match kind {
            READ => file
                .read_at(0, &mut [0; 10], ReadClass::Demand)
                .unwrap_err(),
            _ => file.write_at(0, &[0; 300_000]).unwrap_err(),
        };
        assert_eq!(error.kind(), StoreErrorKind::Disconnected, "{error}");
        let waited = begun.elapsed();
        assert!(
            waited > Duration::from_millis(600) && waited < LIMIT,
            "{waited:?}"
        );
    }
}

/// `trickle` sends the answers' bytes one by one, with pauses that are far too short for a timeout.
#[test]
fn server_that_answers_a_byte_now_and_then_is_a_lost_connection() {
    let trickle = |id: u32, stream: &mut UnixStream| {
        for byte in data(id, &[7; 10]) {
            let _ = stream.write_all(&[byte]);
            std::thread::sleep(Duration::from_millis(150));
        }
        Some(Next::Answered)
    };
    let (_store, file) = file_with(READ, trickle);
    let error = read_fails(&*file, StoreErrorKind::Disconnected);
    let text = error.to_string();
    assert!(text.contains("although other data arrived"), "{text}");
    // The same for the greeting.
    let dial = || {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            for byte in greeting(&[]) {
                let _ = theirs.write_all(&[byte]);
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        Ok(Wire::over_socket(ours).unwrap())
    };
    let mut options = SftpOptions::new(Vec::new(), "evil.host", "/folder");
    options.answer_timeout = Duration::from_millis(700);
    let begun = Instant::now();
    let error = SftpStore::connect_over(Box::new(dial), options).unwrap_err();
    assert!(
        error.to_string().contains("no answer to the greeting"),
        "{error}"
    );
    assert!(begun.elapsed() < LIMIT, "{error}");
}

#[test]
fn large_answer_on_a_slow_connection_is_waited_for() {
    let slowly = |id: u32, stream: &mut UnixStream| {
        for piece in data(id, &[7; 4096]).chunks(400) {
            let _ = stream.write_all(piece);
            std::thread::sleep(Duration::from_millis(150));
        }
        Some(Next::Answered)
    };
    let (_store, file) = file_with(READ, slowly);
    let (begun, mut bytes) = (Instant::now(), [0; 4096]);
    file.read_at(0, &mut bytes, ReadClass::Demand).unwrap();
    assert_eq!(bytes, [7; 4096]);
    // Longer than an answer without data may take.
    assert!(begun.elapsed() > Duration::from_millis(1000));
}

#[test]
fn one_read_never_answered_is_a_lost_connection() {
    let (_store, file) = file_with(READ, |_, _| Some(Next::Answered));
    let begun = Instant::now();
    let error = std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            file.read_at(0, &mut [0; 10], ReadClass::Demand)
                .unwrap_err()
        });
        let until = begun + LIMIT;
        while !reading.is_finished() && Instant::now() < until {
            let _ = file.write_at(0, b"x");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(reading.is_finished(), "it waits for ever");
        reading.join().unwrap()
    });
    assert_eq!(error.kind(), StoreErrorKind::Disconnected, "{error}");
    let text = error.to_string();
    assert!(text.contains("although other data arrived"), "{text}");
}

/// The server is slow, but each answer comes in its turn: none of 40 reads waits too long.
#[test]
fn requests_that_wait_in_turn_are_not_overdue() {
    let (_store, file) = file_with(READ, |id, stream| {
        std::thread::sleep(Duration::from_millis(60));
        let _ = stream.write_all(&data(id, &[7; 10]));
        Some(Next::Answered)
    });
    let mut bufs = [[0; 10]; 40];
    let mut parts: Vec<(u64, &mut [u8])> =
        bufs.iter_mut().map(|buf| (0, buf.as_mut_slice())).collect();
    file.read_parts_at(&mut parts, ReadClass::Demand).unwrap();
    assert!(bufs.iter().flatten().all(|byte| *byte == 7));
}

#[test]
fn flush_may_take_longer_than_other_answers_but_not_for_ever() {
    let (_store, file) = file_with(EXTENDED, |id, stream| {
        std::thread::sleep(Duration::from_millis(900));
        let _ = stream.write_all(&status(id, 0));
        Some(Next::Answered)
    });
    file.write_at(0, b"x").unwrap();
    file.flush().unwrap();
    let (_store, file) = file_with(EXTENDED, |_, _| Some(Next::Answered));
    file.write_at(0, b"x").unwrap();
    assert_eq!(
        file.flush().unwrap_err().kind(),
        StoreErrorKind::Disconnected
    );
}

#[test]
fn failed_flush_is_never_followed_by_a_good_one() {
    let asked = AtomicU32::new(0);
    let (_store, file) = file_with(
        EXTENDED,
        answer(move |id| match asked.fetch_add(1, Ordering::SeqCst) {
            0 => status(id, 4),
            _ => status(id, 0),
        }),
    );
    file.write_at(0, b"x").unwrap();
    assert_eq!(file.flush().unwrap_err().kind(), StoreErrorKind::Failed);
    assert_eq!(file.flush().unwrap_err().kind(), StoreErrorKind::Failed);
    file.write_at(0, b"x").unwrap();
    assert_eq!(file.flush().unwrap_err().kind(), StoreErrorKind::Failed);
}

/// What OpenSSH's sftp-server announces (`process_init`, sftp-server.c).
const OPENSSH: [&str; 11] = [
    "posix-rename@openssh.com",
    "statvfs@openssh.com",
    "fstatvfs@openssh.com",
    "hardlink@openssh.com",
    "fsync@openssh.com",
    "lsetstat@openssh.com",
    "limits@openssh.com",
    "expand-path@openssh.com",
    "copy-data",
    "home-directory",
    "users-groups-by-id@openssh.com",
];

/// A server with a given greeting. It holds the answers to writes back until an fsync comes, and
/// sends them before or after the fsync's. Returns the requests in order, too.
fn keeping_writes_back(
    names: &[&str],
    behind: bool,
    fsync_code: u32,
) -> (Arc<dyn StoreFile>, Arc<Mutex<Vec<&'static str>>>) {
    let mut words = vec![2, 0, 0, 0, 3];
    for name in names {
        let version: &[u8] = if name.contains("statvfs") { b"2" } else { b"1" };
        words.extend([string(name.as_bytes()), string(version)].concat());
    }
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = Mutex::new(Vec::new());
    let noting = Arc::clone(&seen);
    let script = move |kind: u8, id: u32, rest: &[u8], stream: &mut UnixStream| {
        let mut seen = noting.lock().unwrap();
        if kind == WRITE {
            seen.push("write");
            kept.lock().unwrap().push(id);
        } else if kind == EXTENDED && rest[4..].starts_with(b"fsync") {
            seen.push("fsync");
            let writes: Vec<u8> = kept
                .lock()
                .unwrap()
                .drain(..)
                .flat_map(|id| status(id, 0))
                .collect();
            let fsync = status(id, fsync_code);
            let answers = if behind {
                [fsync, writes]
            } else {
                [writes, fsync]
            };
            let _ = stream.write_all(&answers.concat());
        } else if kind == EXTENDED && rest[4..].starts_with(b"limits") {
            let _ = stream.write_all(&packet(201, id, &[&[0; 32]]));
        } else {
            return None;
        }
        Some(Next::Answered)
    };
    let store = connect_to(&framed(&words), script).unwrap();
    let file = store.open(&FileName::new("x").unwrap(), Access::ReadWrite);
    (file.unwrap(), seen)
}

const PARTS: [(u64, &[u8]); 2] = [(0, b"a"), (4096, b"b")];

#[test]
fn writes_and_fsync_are_sent_in_one_batch_to_an_ordered_server() {
    let (file, seen) = keeping_writes_back(&OPENSSH, false, 0);
    for _ in 0..2 {
        file.write_parts_durably(&PARTS).unwrap().durable().unwrap();
    }
    file.flush().unwrap();
    let once = ["write", "write", "fsync"];
    assert_eq!(
        *seen.lock().unwrap(),
        [once, once].concat(),
        "none is left to flush"
    );
}

#[test]
fn fsync_that_overtakes_a_write_is_repeated_and_ends_batching() {
    let (file, seen) = keeping_writes_back(&OPENSSH, true, 0);
    file.write_parts_durably(&PARTS).unwrap().durable().unwrap();
    assert_eq!(*seen.lock().unwrap(), ["write", "write", "fsync", "fsync"]);
    // From now on the fsync waits for the writes' answers, which this server never sends before.
    let error = file.write_parts_durably(&PARTS).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Disconnected);
    assert_eq!(seen.lock().unwrap()[4..], ["write", "write"]);
}

#[test]
fn no_fsync_is_batched_for_a_server_that_is_not_openssh() {
    let mut reversed = OPENSSH;
    reversed.reverse();
    let asyncssh_like = [&["vendor-id"], &OPENSSH[..]].concat();
    for names in [
        &reversed[..],
        &asyncssh_like,
        &OPENSSH[..10],
        &["fsync@openssh.com"],
    ] {
        let (file, seen) = keeping_writes_back(names, false, 0);
        let error = file.write_parts_durably(&PARTS).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Disconnected, "{names:?}");
        assert_eq!(*seen.lock().unwrap(), ["write", "write"], "{names:?}");
    }
}

#[test]
fn batched_fsync_that_fails_is_a_failed_flush() {
    let (file, _) = keeping_writes_back(&OPENSSH, false, 4);
    let flushed = file.write_parts_durably(&PARTS).unwrap().durable();
    assert_eq!(flushed.unwrap_err().kind(), StoreErrorKind::Failed);
    let flushed = file.write_parts_durably(&PARTS).unwrap().durable();
    assert_eq!(
        flushed.unwrap_err().kind(),
        StoreErrorKind::Failed,
        "for ever"
    );
    assert_eq!(file.flush().unwrap_err().kind(), StoreErrorKind::Failed);
}

#[test]
fn server_that_stops_reading_does_not_block_the_end() {
    let (_store, file) = file_with(WRITE, |_, _| {
        std::thread::sleep(LIMIT * 2);
        Some(Next::HangUp)
    });
    // More than any buffer on the way holds.
    let error = file.write_at(0, &vec![1; 8 << 20]).unwrap_err();
    assert_eq!(error.kind(), StoreErrorKind::Disconnected, "{error}");
    let begun = Instant::now();
    drop(file);
    drop(_store);
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
}

#[test]
fn endless_list_is_refused() {
    for names in [0u32, 1] {
        let store = connect_to(&greeting(&[]), move |kind, id, _, stream| {
            (kind == READDIR).then(|| {
                let mut rest = names.to_be_bytes().to_vec();
                for _ in 0..names {
                    rest.extend([string(b"again"), string(b""), vec![0; 4]].concat());
                }
                let _ = stream.write_all(&packet(104, id, &[&rest]));
                Next::Answered
            })
        });
        assert_eq!(
            store.unwrap().list().unwrap_err().kind(),
            StoreErrorKind::Failed
        );
    }
}

#[test]
fn names_with_a_path_are_left_out_of_the_list() {
    let told = AtomicU32::new(0);
    let store = connect_to(&greeting(&[]), move |kind, id, _, stream| {
        if kind != READDIR {
            return None;
        }
        if told.fetch_add(1, Ordering::SeqCst) > 0 {
            let _ = stream.write_all(&status(id, 1));
            return Some(Next::Answered);
        }
        let mut rest = 5u32.to_be_bytes().to_vec();
        for name in [&b".."[..], b"../up", b"good", b"bad\x1bname", b"\xff"] {
            rest.extend([string(name), string(b"long"), vec![0; 4]].concat());
        }
        let _ = stream.write_all(&packet(104, id, &[&rest]));
        Some(Next::Answered)
    });
    let listed = store.unwrap().list().unwrap();
    assert_eq!(listed, [FileName::new("good").unwrap()]);
}

#[test]
fn greetings_of_other_kinds_end_the_connection() {
    let version = |number: u8| framed(&[2, 0, 0, 0, number]);
    for (bytes, kind) in [
        (version(2), StoreErrorKind::Protocol),
        (version(6), StoreErrorKind::Protocol),
        (
            b"Welcome to evil.host!\n".to_vec(),
            StoreErrorKind::Protocol,
        ),
        (status(0, 0), StoreErrorKind::Protocol),
        ([version(3), version(3)].concat(), StoreErrorKind::Protocol),
        (
            framed(&[2, 0, 0, 0, 3, 0, 0, 0, 200]),
            StoreErrorKind::Protocol,
        ),
        (Vec::new(), StoreErrorKind::Unreachable),
    ] {
        let connected = connect_to(&bytes, |_, _, _, _| None)
            .and_then(|store| crate::part::eventually(|| store.list().err().map(Err)));
        let error = connected.map(|_: Vec<FileName>| ()).unwrap_err();
        assert_eq!(error.kind(), kind, "{bytes:?}: {error}");
        if bytes.starts_with(b"Welcome") {
            assert!(
                error.to_string().contains("Welcome to evil.host!"),
                "{error}"
            );
        }
    }
}

#[test]
fn limits_below_a_block_are_refused_and_huge_ones_reduced() {
    let with_limits = |each: u64| {
        connect_to(
            &greeting(&["limits@openssh.com"]),
            move |kind, id, rest, stream| {
                let limits = each.to_be_bytes().repeat(4);
                match kind {
                    EXTENDED => drop(stream.write_all(&packet(201, id, &[&limits]))),
                    // No request is larger than a packet may be.
                    WRITE if rest.len() > 262_144 => return Some(Next::HangUp),
                    _ => return None,
                }
                Some(Next::Answered)
            },
        )
    };
    assert_eq!(
        with_limits(2000).unwrap_err().kind(),
        StoreErrorKind::Unsupported
    );
    for each in [0, 8192, u64::MAX] {
        let store = with_limits(each).unwrap();
        let file = store
            .open(&FileName::new("x").unwrap(), Access::ReadWrite)
            .unwrap();
        file.write_at(0, &vec![1; 1 << 20]).unwrap();
    }
}

#[test]
fn opened_file_must_be_regular_before_and_after_the_open() {
    for (liar, mode) in [(LSTAT, 0o120_777), (FSTAT, 0o120_777), (FSTAT, 0o040_700)] {
        let store = connect_to(&greeting(&[]), move |kind, id, _, stream| {
            (kind == liar).then(|| {
                let _ = stream.write_all(&attributes(id, mode));
                Next::Answered
            })
        });
        let opened = store
            .unwrap()
            .open(&FileName::new("x").unwrap(), Access::ReadOnly);
        assert_eq!(
            opened.map(drop).unwrap_err().kind(),
            StoreErrorKind::NotRegular
        );
    }
}

#[test]
fn server_text_is_escaped_for_the_terminal() {
    let (_store, file) = file_with(
        READ,
        answer(|id| {
            let text = [b"\x1b[2J\n", &[b'x'; 5000][..]].concat();
            packet(
                101,
                id,
                &[&4u32.to_be_bytes(), &string(&text), &string(b"")],
            )
        }),
    );
    let error = read_fails(&*file, StoreErrorKind::Failed).to_string();
    assert!(
        !error.contains('\x1b') && !error.contains('\n') && error.len() < 600,
        "{error}"
    );
}

#[test]
fn connection_that_does_not_come_up_only_slows_the_session() {
    let folder = tempfile::tempdir().unwrap();
    requires!(needs::sftp_server_missing());
    let server = agent_server::sftp_server(folder.path()).unwrap();
    let first = AtomicBool::new(true);
    let dial = move || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        if first.swap(false, Ordering::SeqCst) {
            spawn_server(&server, &theirs);
        } else {
            theirs.shutdown(std::net::Shutdown::Both).unwrap();
        }
        Ok(Wire::over_socket(ours).unwrap())
    };
    let mut options = SftpOptions::new(Vec::new(), "host", folder.path().to_str().unwrap());
    options.connections = 4;
    let store = SftpStore::connect_over(Box::new(dial), options).unwrap();
    let file = store.create_new(&FileName::new("x").unwrap()).unwrap();
    let (open, why) = crate::part::eventually(|| {
        file.write_at(0, &vec![1; 4 << 20]).unwrap();
        file.flush().unwrap();
        Some(store.further_connections()).filter(|(_, why)| why.is_some())
    });
    assert_eq!((open, why.is_some()), (0, true));
}

fn spawn_server(server: &Path, socket: &UnixStream) {
    let end = || std::os::fd::OwnedFd::from(socket.try_clone().unwrap());
    let mut child = std::process::Command::new(server)
        .stdin(end())
        .stdout(end())
        .spawn()
        .unwrap();
    std::thread::spawn(move || child.wait());
}
