//! A scripted SFTP server: honest, except for what a test's script does with a request.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use sprat_store::sftp::Wire;
use sprat_store::{SftpOptions, SftpStore, StoreError};

pub const OPEN: u8 = 3;
pub const CLOSE: u8 = 4;
pub const READ: u8 = 5;
pub const WRITE: u8 = 6;
pub const LSTAT: u8 = 7;
pub const FSTAT: u8 = 8;
pub const FSETSTAT: u8 = 10;
pub const OPENDIR: u8 = 11;
pub const READDIR: u8 = 12;
pub const STAT: u8 = 17;
pub const EXTENDED: u8 = 200;

/// What the script does with one request; `None` leaves it to the honest server.
pub type Script = dyn Fn(u8, u32, &[u8], &mut UnixStream) -> Option<Next> + Send + Sync;

pub enum Next {
    Answered,
    HangUp,
}

pub fn packet(kind: u8, id: u32, rest: &[&[u8]]) -> Vec<u8> {
    let body: Vec<u8> = [&[kind][..], &id.to_be_bytes()]
        .iter()
        .chain(rest)
        .copied()
        .flatten()
        .copied()
        .collect();
    framed(&body)
}

pub fn framed(body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap();
    [&len.to_be_bytes()[..], body].concat()
}

pub fn string(bytes: &[u8]) -> Vec<u8> {
    framed(bytes)
}

pub fn status(id: u32, code: u32) -> Vec<u8> {
    packet(
        101,
        id,
        &[&code.to_be_bytes(), &string(b"told"), &string(b"")],
    )
}

pub fn data(id: u32, bytes: &[u8]) -> Vec<u8> {
    packet(103, id, &[&string(bytes)])
}

/// Size, owner, mode and times of a file of 1 GiB, or of a folder.
pub fn attributes(id: u32, mode: u32) -> Vec<u8> {
    let fields: Vec<u8> = [0xf_u32, 0, 1 << 30, 1, 1, mode, 7, 8]
        .iter()
        .flat_map(|field| field.to_be_bytes())
        .collect();
    packet(105, id, &[&fields])
}

/// OpenSSH's answer to `limits@openssh.com`: packet, read and write length, open handles.
fn limits(id: u32) -> Vec<u8> {
    let limits = [256 << 10, 255 << 10, 255 << 10, 100_u64].map(u64::to_be_bytes);
    packet(201, id, &[limits.as_flattened()])
}

/// Serves one connection: honest except for the script.
pub fn serve(mut stream: UnixStream, greeting: &[u8], script: &Script) {
    let mut head = [0; 4];
    while stream.read_exact(&mut head).is_ok() {
        let mut body = vec![0; usize::try_from(u32::from_be_bytes(head)).unwrap()];
        if stream.read_exact(&mut body).is_err() {
            return;
        }
        if body[0] == 1 {
            let _ = stream.write_all(greeting);
            continue;
        }
        let id = u32::from_be_bytes(body[1..5].try_into().unwrap());
        let answer = match (script(body[0], id, &body[5..], &mut stream), body[0]) {
            (Some(Next::HangUp), _) => return,
            (Some(Next::Answered), _) => continue,
            (None, STAT) => attributes(id, 0o040_755),
            (None, LSTAT | FSTAT) => attributes(id, 0o100_600),
            (None, OPEN | OPENDIR) => packet(102, id, &[&string(b"h")]),
            (None, EXTENDED) if body[9..].starts_with(b"limits@openssh.com") => limits(id),
            (None, WRITE | EXTENDED | FSETSTAT | CLOSE) => status(id, 0),
            (None, _) => status(id, 8),
        };
        if stream.write_all(&answer).is_err() {
            return;
        }
    }
}

pub fn greeting(extensions: &[&str]) -> Vec<u8> {
    let mut body = vec![2, 0, 0, 0, 3];
    for name in extensions {
        body.extend(string(name.as_bytes()));
        body.extend(string(if name.ends_with("statvfs@openssh.com") {
            b"2"
        } else {
            b"1"
        }));
    }
    framed(&body)
}

/// The greeting of a server that is known to carry out one request after another: OpenSSH's.
pub fn serial_greeting() -> Vec<u8> {
    greeting(&[
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
    ])
}

pub fn connect_to(
    greeting: &[u8],
    script: impl Fn(u8, u32, &[u8], &mut UnixStream) -> Option<Next> + Send + Sync + 'static,
) -> Result<SftpStore, StoreError> {
    connect_by(greeting, 1, script)
}

/// As [`connect_to`], with at most this many connections. Each connection has a stream of its own.
pub fn connect_by(
    greeting: &[u8],
    connections: usize,
    script: impl Fn(u8, u32, &[u8], &mut UnixStream) -> Option<Next> + Send + Sync + 'static,
) -> Result<SftpStore, StoreError> {
    let (greeting, script): (Vec<u8>, Arc<Script>) = (greeting.to_vec(), Arc::new(script));
    let dial = move || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (greeting, script) = (greeting.clone(), Arc::clone(&script));
        std::thread::spawn(move || serve(theirs, &greeting, &*script));
        Ok(Wire::over_socket(ours).unwrap())
    };
    let mut options = SftpOptions::new(Vec::new(), "evil.host", "/folder");
    options.connections = connections;
    options.answer_timeout = Duration::from_millis(700);
    options.flush_timeout = Duration::from_millis(1500);
    SftpStore::connect_over(Box::new(dial), options)
}
