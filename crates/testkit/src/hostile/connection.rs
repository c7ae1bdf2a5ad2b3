//! One connection: its server, and the two threads that carry its packets.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::packet::{self, Fields};
use super::{Act, Kind, Shared};
use sprat_store::IgnorePoison;

use crate::agent_server;

/// An answer that waits for the next one is sent alone after this time.
const REORDER_LIMIT: Duration = Duration::from_millis(300);

#[derive(Debug)]
pub(super) struct Connection {
    server: Mutex<Child>,
    socket: TcpStream,
    silent: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    owed: HashMap<u32, Owed>,
    /// Handles of the file that has an older state.
    handles: Vec<Vec<u8>>,
    held: Option<Vec<u8>>,
    /// One byte in so much time.
    slow: Option<Duration>,
    ended: bool,
    turn: usize,
}

#[derive(Debug, Clone)]
struct Owed {
    act: Option<Act>,
    opens_file: bool,
    /// Where a read of the file begins.
    reads_file_at: Option<u64>,
}

impl Connection {
    /// Serves a socket until either side ends.
    pub(super) fn serve(shared: &Arc<Shared>, mut socket: TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut wish = [0; 2];
        socket.read_exact(&mut wish)?;
        socket.set_read_timeout(None)?;
        let act = match wish[0] == b'h' && !shared.stalled() {
            false => None,
            true => match shared.due(Kind::Shell, false) {
                Some(Act::Drop | Act::DropAfter | Act::Status(_)) => return Ok(()),
                Some(act @ (Act::Never | Act::Silence | Act::Stall)) => Some(act),
                act => {
                    if act == Some(Act::Rollback) {
                        let _ = shared.roll_back();
                    }
                    return socket.write_all(b"go\n");
                }
            },
        };
        let program = agent_server::sftp_server(&shared.folder).ok_or(io::ErrorKind::NotFound)?;
        let mut server = Command::new(program)
            .arg("-d")
            .arg(&shared.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let stdin = server.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let stdout = server.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        let connection = Arc::new(Self {
            server: Mutex::new(server),
            silent: AtomicBool::new(act.is_some() || shared.stalled()),
            state: Mutex::new(State::default()),
            socket,
        });
        let (asking, shared_up) = (Arc::clone(&connection), Arc::clone(shared));
        thread::spawn(move || {
            asking.requests(&shared_up, stdin);
            asking.end();
        });
        let (answering, shared_down) = (Arc::clone(&connection), Arc::clone(shared));
        thread::spawn(move || {
            answering.answers(&shared_down, stdout);
            answering.end();
        });
        shared.connections.lock().ignore_poison().push(connection);
        Ok(())
    }

    /// Ends it for both sides.
    pub(super) fn end(&self) {
        self.state.lock().ignore_poison().ended = true;
        let _ = self.socket.shutdown(Shutdown::Both);
        let mut server = self.server.lock().ignore_poison();
        let _ = server.kill();
        let _ = server.wait();
    }

    fn is_silent(&self, shared: &Shared) -> bool {
        self.silent.load(Ordering::SeqCst) || shared.stalled()
    }

    fn requests(&self, shared: &Shared, mut to: ChildStdin) {
        let mut from = &self.socket;
        while let Some(mut body) = packet::read(&mut from) {
            if self.is_silent(shared) {
                continue;
            }
            let (kind, id) = (packet::kind(&body), packet::id(&body));
            let mut fields = Fields(body.get(5..).unwrap_or_default());
            let name = match kind {
                Kind::Open | Kind::Close | Kind::Read | Kind::Write => {
                    fields.string().unwrap_or_default().to_vec()
                }
                _ => Vec::new(),
            };
            let offset = fields.long().filter(|_| kind == Kind::Read);
            let mut state = self.state.lock().ignore_poison();
            let of_file = state.handles.contains(&name);
            if kind == Kind::Close {
                // The server gives a closed handle to another file.
                state.handles.retain(|handle| *handle != name);
            }
            drop(state);
            let act = shared.due(kind, of_file);
            match act {
                Some(Act::Drop) => return,
                Some(Act::Silence | Act::Stall) => {
                    self.silent.store(true, Ordering::SeqCst);
                    continue;
                }
                Some(Act::Lie) if kind != Kind::Greeting => {
                    self.send(&packet::status(id, 0));
                    continue;
                }
                Some(Act::Status(code)) if kind != Kind::Greeting => {
                    self.send(&packet::status(id, code));
                    continue;
                }
                Some(Act::Nonsense) => {
                    let _ = (&self.socket).write_all(b"\xff\xff\xff\xf0welcome to this server\n");
                    continue;
                }
                Some(Act::GarbleWrite) if kind == Kind::Write => {
                    if let Some(last) = body.last_mut() {
                        *last ^= 0x41;
                    }
                }
                Some(Act::Rollback) => {
                    let _ = shared.roll_back();
                }
                Some(Act::Slow(every)) => self.state.lock().ignore_poison().slow = Some(every),
                _ => {}
            }
            let mut state = self.state.lock().ignore_poison();
            let owed = Owed {
                act,
                opens_file: kind == Kind::Open && name.ends_with(shared.file.as_bytes()),
                reads_file_at: offset.filter(|_| of_file),
            };
            // A greeting has no number: its answer is of type 2, where others have theirs.
            let id = if kind == Kind::Greeting { u32::MAX } else { id };
            state.owed.insert(id, owed);
            drop(state);
            let sent = to.write_all(&packet::framed(&body));
            if sent.and_then(|()| to.flush()).is_err() {
                return;
            }
        }
    }

    fn answers(self: &Arc<Self>, shared: &Shared, mut from: impl Read) {
        while let Some(body) = packet::read(&mut from) {
            if self.is_silent(shared) {
                continue;
            }
            let id = if body[0] == 2 {
                u32::MAX
            } else {
                packet::id(&body)
            };
            let mut state = self.state.lock().ignore_poison();
            let owed = state.owed.remove(&id);
            state.turn += 1;
            let (turn, others) = (state.turn, !state.owed.is_empty());
            let held = state.held.take();
            let opened = owed.as_ref().is_some_and(|owed| owed.opens_file);
            if opened
                && body[0] == packet::HANDLE
                && let Some(handle) = Fields(&body[5..]).string()
            {
                state.handles.push(handle.to_vec());
            }
            drop(state);
            let act = owed.as_ref().and_then(|owed| owed.act);
            let answer = match act {
                Some(Act::DropAfter) => return,
                Some(Act::Never) => None,
                Some(Act::Delay(time)) => {
                    thread::sleep(time);
                    Some(body)
                }
                Some(Act::WrongType) => Some(packet::other_type(&body)),
                Some(Act::WrongLength) => Some(packet::other_length(&body, turn)),
                Some(Act::Garble) => Some(packet::garbled(&body, turn)),
                Some(Act::OldData) => {
                    let offset = owed.as_ref().and_then(|owed| owed.reads_file_at);
                    Some(older(shared, offset, id, &body).unwrap_or(body))
                }
                Some(Act::Reorder) if others => {
                    self.state.lock().ignore_poison().held = Some(body);
                    let late = Arc::clone(self);
                    thread::spawn(move || {
                        thread::sleep(REORDER_LIMIT);
                        let held = late.state.lock().ignore_poison().held.take();
                        if let Some(held) = held {
                            late.send(&held);
                        }
                    });
                    None
                }
                _ => Some(body),
            };
            for packet in [answer, held].into_iter().flatten() {
                self.send(&packet);
            }
        }
    }

    /// Sends a packet, at the connection's speed.
    fn send(&self, body: &[u8]) {
        let packet = packet::framed(body);
        let slow = self.state.lock().ignore_poison().slow;
        let Some(every) = slow else {
            // One packet in one piece, and never two at once.
            let _state = self.state.lock().ignore_poison();
            let _ = (&self.socket).write_all(&packet);
            return;
        };
        for byte in packet {
            if self.state.lock().ignore_poison().ended || (&self.socket).write_all(&[byte]).is_err()
            {
                return;
            }
            thread::sleep(every);
        }
    }
}

/// The older file's bytes in place of a read's answer, where that has any.
fn older(shared: &Shared, offset: Option<u64>, id: u32, body: &[u8]) -> Option<Vec<u8>> {
    if body[0] != packet::DATA {
        return None;
    }
    let file = std::fs::File::open(&shared.older).ok()?;
    packet::data_of(&file, id, offset?, body.len() - 9).ok()
}
