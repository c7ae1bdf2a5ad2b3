//! A server that records every write and fsync of one file, and can lose its power.
//!
//! Each connection runs the system's own sftp-server, and its packets are read on their way. A program
//! in place of ssh ([`Recorder::ssh_command`]) leads to it, so that sprat's own client and everything
//! above it run unchanged.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use sprat_store::IgnorePoison;

use crate::agent_server;
use crate::power::{Op, Power};

const OPEN: u8 = 3;
const CLOSE: u8 = 4;
const WRITE: u8 = 6;
const STATUS: u8 = 101;
const HANDLE: u8 = 102;
const EXTENDED: u8 = 200;
/// Longer than any packet that sftp-server sends or accepts (`SFTP_MAX_MSG_LENGTH`, openssh sftp.h).
const PACKET_BYTES_MAX: usize = 1 << 20;

/// See the module. Dropping it ends every connection.
#[derive(Debug)]
pub struct Recorder {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    /// Where relative paths begin.
    folder: PathBuf,
    /// The file whose writes are recorded.
    file: String,
    log: Mutex<Vec<Op>>,
    lines: Mutex<Vec<Line>>,
    ended: AtomicBool,
}

/// One connection: its server and the threads that carry its packets.
#[derive(Debug)]
struct Line {
    server: Child,
    socket: TcpStream,
    threads: Vec<JoinHandle<()>>,
}

/// What is owed an answer on one connection.
#[derive(Debug)]
enum Owed {
    Open,
    Write { index: usize },
    Fsync { before: usize },
}

/// What both directions of a connection know.
#[derive(Debug, Default)]
struct Known {
    owed: HashMap<u32, Owed>,
    handles: Vec<Vec<u8>>,
}

impl Recorder {
    /// Records what is written to `file` in `folder`, from now on.
    pub fn start(folder: &Path, file: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            folder: folder.to_owned(),
            file: file.to_owned(),
            log: Mutex::new(Vec::new()),
            lines: Mutex::new(Vec::new()),
            ended: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = thread::spawn(move || {
            for socket in listener.incoming() {
                if accepting.ended.load(Ordering::SeqCst) {
                    return;
                }
                if let Ok(socket) = socket {
                    // A client without a server sees the end.
                    let _ = accepting.serve(socket);
                }
            }
        });
        Ok(Self {
            port,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// What to run instead of ssh; the program is written into `folder`. Needs bash.
    pub fn ssh_command(&self, folder: &Path) -> io::Result<Vec<OsString>> {
        let program = folder.join("line-to-recorder");
        // Ends as ssh does: when either side ends.
        let script = format!(
            "#!/bin/bash\nexec 3<>/dev/tcp/127.0.0.1/{} 4<&0\n( cat <&4 >&3; kill $$ ) >/dev/null 2>&1 &\n\
             exec cat <&3 4<&-\n",
            self.port
        );
        std::fs::write(&program, script)?;
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
        Ok(vec![program.into()])
    }

    /// The port of this machine on which it listens.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How much is recorded so far: a moment for [`Power`].
    #[must_use]
    pub fn now(&self) -> usize {
        self.shared.log.lock().ignore_poison().len()
    }

    /// Everything recorded so far.
    #[must_use]
    pub fn log(&self) -> Vec<Op> {
        self.shared.log.lock().ignore_poison().clone()
    }

    /// The server's machine loses its power: every connection is lost, and the file becomes what its
    /// disk kept, by `seed`. `power` has followed this recorder from its beginning. Returns the number
    /// of lost blocks.
    pub fn cut_power(&self, power: &mut Power, seed: u64) -> io::Result<usize> {
        // No connection is accepted until the machine is up again.
        let mut lines = self.shared.lines.lock().ignore_poison();
        for line in lines.drain(..) {
            line.end();
        }
        power.advance(&self.log())?;
        let lost = power.lose_unsynced(&self.shared.folder.join(&self.shared.file), seed)?;
        let mut log = self.shared.log.lock().ignore_poison();
        log.push(Op::PowerCut);
        power.advance(&log)?;
        Ok(lost)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for line in self.shared.lines.lock().ignore_poison().drain(..) {
            line.end();
        }
    }
}

impl Line {
    fn end(mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = self.socket.shutdown(Shutdown::Both);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn serve(self: &Arc<Self>, socket: TcpStream) -> io::Result<()> {
        let mut lines = self.lines.lock().ignore_poison();
        let program = agent_server::sftp_server(&self.folder).ok_or(io::ErrorKind::NotFound)?;
        let mut server = Command::new(program)
            .arg("-d")
            .arg(&self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdin = server.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let stdout = server.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        socket.set_nodelay(true)?;
        let connection = server.id();
        let known = Arc::new(Mutex::new(Known::default()));
        let (from, to) = (socket.try_clone()?, socket.try_clone()?);
        let (asking, asked) = (Arc::clone(self), Arc::clone(&known));
        let up = thread::spawn(move || {
            carry(from, stdin, |packet| {
                asking.request(&asked, connection, packet)
            });
        });
        let answering = Arc::clone(self);
        let down = thread::spawn(move || {
            carry(stdout, &to, |packet| {
                answering.answer(&known, connection, packet)
            });
            let _ = to.shutdown(Shutdown::Both);
        });
        lines.push(Line {
            server,
            socket,
            threads: vec![up, down],
        });
        Ok(())
    }

    /// Notes a request before the server has it.
    fn request(&self, known: &Mutex<Known>, connection: u32, packet: &[u8]) -> Option<()> {
        let mut fields = Fields(packet);
        let (kind, id) = (fields.byte()?, fields.number()?);
        let mut known = known.lock().ignore_poison();
        let owed = match kind {
            OPEN => {
                let path = fields.string()?;
                let ours = path.ends_with(self.file.as_bytes());
                ours.then_some(Owed::Open)?
            }
            CLOSE => {
                // The server gives the same handle to the next file.
                let handle = fields.string()?;
                known.handles.retain(|of_file| of_file != handle);
                return None;
            }
            WRITE => {
                let handle = fields.string()?;
                let offset = u64::from(fields.number()?) << 32 | u64::from(fields.number()?);
                let data = fields.string()?;
                known.handles.iter().find(|of_file| *of_file == handle)?;
                let mut log = self.log.lock().ignore_poison();
                log.push(Op::Write {
                    connection,
                    offset,
                    data: data.into(),
                });
                Owed::Write {
                    index: log.len() - 1,
                }
            }
            EXTENDED if fields.string()? == b"fsync@openssh.com" => {
                let handle = fields.string()?;
                known.handles.iter().find(|of_file| *of_file == handle)?;
                Owed::Fsync {
                    before: self.log.lock().ignore_poison().len(),
                }
            }
            _ => return None,
        };
        known.owed.insert(id, owed);
        Some(())
    }

    /// Notes an answer before the client has it.
    fn answer(&self, known: &Mutex<Known>, connection: u32, packet: &[u8]) -> Option<()> {
        let mut fields = Fields(packet);
        let (kind, id) = (fields.byte()?, fields.number()?);
        let mut known = known.lock().ignore_poison();
        match (known.owed.remove(&id)?, kind) {
            (Owed::Open, HANDLE) => known.handles.push(fields.string()?.to_vec()),
            (Owed::Write { index }, STATUS) if fields.number()? == 0 => {
                self.log
                    .lock()
                    .ignore_poison()
                    .push(Op::Answered { write: index });
            }
            (Owed::Fsync { before }, STATUS) if fields.number()? == 0 => {
                self.log
                    .lock()
                    .ignore_poison()
                    .push(Op::Synced { connection, before });
            }
            _ => {}
        }
        Some(())
    }
}

/// Carries packets until either side ends; `inspect` sees each one before it is passed on.
fn carry(mut from: impl Read, mut to: impl Write, inspect: impl Fn(&[u8]) -> Option<()>) {
    let mut head = [0; 4];
    while from.read_exact(&mut head).is_ok() {
        let len = usize::try_from(u32::from_be_bytes(head)).unwrap_or(usize::MAX);
        if len > PACKET_BYTES_MAX {
            return;
        }
        let mut packet = vec![0; 4 + len];
        packet[..4].copy_from_slice(&head);
        if from.read_exact(&mut packet[4..]).is_err() {
            return;
        }
        // Most packets are of no interest.
        let _ = inspect(&packet[4..]);
        if to.write_all(&packet).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}

/// What is left of a packet.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|byte| byte[0])
    }

    fn number(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.number()?).ok()?;
        self.take(len)
    }
}
