//! A slow wire on loopback that can be cut, go silent, and deliver bytes late.
//!
//! The wire is between `ssh` and sshd: every byte arrives half a round trip later, each way. At a
//! loss it decides what happens to the bytes in flight: they are gone, or they reach the server after
//! the client has given up, as from a kernel that still sends for a process that has exited.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_linger;
use sprat_store::IgnorePoison;

/// How often a delivery that its receiver does not accept checks whether it is still wanted.
const CHECK: Duration = Duration::from_millis(100);
const CHUNK_BYTES: usize = 64 << 10;

/// How slow the wire is.
#[derive(Debug, Clone, Copy, Default)]
pub struct WireOptions {
    /// There and back, on top of loopback's own time.
    pub round_trip: Duration,
    /// Shared by all connections, each way; `None` is no limit.
    pub bytes_per_s: Option<u64>,
}

/// How connections are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Both ends see a reset at once; the bytes in flight are gone.
    Reset,
    /// The client sees a reset; after this time the bytes in flight reach the server.
    ResetLate(Duration),
    /// Nothing passes any more, and neither end is notified. Once the client has given up, the bytes
    /// in flight are gone.
    Silent,
    /// As `Silent`, but the bytes in flight reach the server so long after the client gave up.
    SilentLate(Duration),
}

/// What happens to new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// They pass.
    Open,
    /// They are reset.
    Refusing,
    /// They are accepted and nothing ever passes.
    Silent,
}

/// See the module. Dropping it cuts everything.
#[derive(Debug)]
pub struct Wire {
    port: u16,
    shared: Arc<Shared>,
    acceptor: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target_port: u16,
    options: WireOptions,
    door: AtomicU8,
    /// See [`Wire::hold`].
    held: AtomicBool,
    ended: AtomicBool,
    /// When the wire is free again, up and down.
    free_at: [Mutex<Option<Instant>>; 2],
    bytes: [AtomicU64; 2],
    connections: Mutex<Vec<Weak<Connection>>>,
}

/// From the client to the server, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Up = 0,
    Down = 1,
}

#[derive(Debug)]
struct Connection {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// The client's side; none once it was reset.
    near: Option<Arc<TcpStream>>,
    /// The server's side.
    far: Option<Arc<TcpStream>>,
    queues: [VecDeque<(Instant, Vec<u8>)>; 2],
    /// No more will come into that queue.
    ended: [bool; 2],
    /// Nothing passes; what to do when the client has given up.
    silent: Option<Loss>,
    held: bool,
    /// Before this nothing reaches the server.
    hold_until: Option<Instant>,
}

impl Wire {
    /// A wire to `target_port` on 127.0.0.1.
    pub fn start(target_port: u16, options: WireOptions) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let port = listener.local_addr()?.port();
        let shared = Arc::new(Shared {
            target_port,
            options,
            door: AtomicU8::new(0),
            held: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            free_at: [Mutex::new(None), Mutex::new(None)],
            bytes: [AtomicU64::new(0), AtomicU64::new(0)],
            connections: Mutex::new(Vec::new()),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = thread::spawn(move || accept_all(&listener, &accepting));
        Ok(Self {
            port,
            shared,
            acceptor: Some(acceptor),
        })
    }

    /// Where clients connect.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Bytes received so far, from clients and from the server.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        let read = |way: Way| self.shared.bytes[way as usize].load(Ordering::SeqCst);
        (read(Way::Up), read(Way::Down))
    }

    /// Connections that pass bytes at present.
    #[must_use]
    pub fn live(&self) -> usize {
        self.shared.live().len()
    }

    /// Loses every connection.
    pub fn lose(&self, loss: Loss) {
        for connection in self.shared.live() {
            connection.lose(loss);
        }
    }

    /// Loses one connection alone, the `nth` of those that live in the order of their beginning;
    /// false if there are none.
    pub fn lose_one(&self, nth: usize, loss: Loss) -> bool {
        let live = self.shared.live();
        match live.len() {
            0 => false,
            many => {
                live[nth % many].lose(loss);
                true
            }
        }
    }

    /// Delays every byte, both ways, until it is called with `false`. So does a machine that sleeps:
    /// its kernel sends nothing and forgets nothing.
    pub fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::SeqCst);
        for connection in self.shared.all() {
            connection.state().held = held;
            connection.changed.notify_all();
        }
    }

    /// From now on new connections are treated like this.
    pub fn door(&self, door: Door) {
        self.shared.door.store(door as u8, Ordering::SeqCst);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        for connection in self.shared.all() {
            connection.die(&mut connection.state());
        }
    }
}

impl Shared {
    fn all(&self) -> Vec<Arc<Connection>> {
        let mut connections = self.connections.lock().ignore_poison();
        connections.retain(|connection| connection.strong_count() > 0);
        connections.iter().filter_map(Weak::upgrade).collect()
    }

    fn live(&self) -> Vec<Arc<Connection>> {
        let mut all = self.all();
        all.retain(|connection| connection.state().passes());
        all
    }

    /// When a block that was just received arrives.
    fn due(&self, way: Way, bytes: usize) -> Instant {
        self.bytes[way as usize].fetch_add(bytes as u64, Ordering::SeqCst);
        let now = Instant::now();
        let mut sent = now;
        if let Some(rate) = self.options.bytes_per_s {
            let takes = Duration::from_micros(bytes as u64 * 1_000_000 / rate.max(1));
            let mut free_at = self.free_at[way as usize].lock().ignore_poison();
            sent = free_at.map_or(now, |free| free.max(now)) + takes;
            *free_at = Some(sent);
        }
        sent + self.options.round_trip / 2
    }
}

fn accept_all(listener: &TcpListener, shared: &Arc<Shared>) {
    for near in listener.incoming() {
        if shared.ended.load(Ordering::SeqCst) {
            return;
        }
        let Ok(near) = near else { continue };
        let door = shared.door.load(Ordering::SeqCst);
        let far = TcpStream::connect(("127.0.0.1", shared.target_port));
        match far {
            Ok(far) if door != Door::Refusing as u8 => begin(shared, near, far, door),
            _ => reset(near),
        }
    }
}

fn begin(shared: &Arc<Shared>, near: TcpStream, far: TcpStream, door: u8) {
    for stream in [&near, &far] {
        let _ = stream.set_nodelay(true);
        let _ = stream.set_write_timeout(Some(CHECK));
    }
    let silent = (door == Door::Silent as u8).then_some(Loss::Silent);
    let (near, far) = (Arc::new(near), Arc::new(far));
    let connection = Arc::new(Connection {
        state: Mutex::new(State {
            near: Some(Arc::clone(&near)),
            far: Some(Arc::clone(&far)),
            queues: [VecDeque::new(), VecDeque::new()],
            ended: [false; 2],
            silent,
            held: false,
            hold_until: None,
        }),
        changed: Condvar::new(),
    });
    shared
        .connections
        .lock()
        .ignore_poison()
        .push(Arc::downgrade(&connection));
    connection.state().held = shared.held.load(Ordering::SeqCst);
    for (way, from) in [(Way::Up, near), (Way::Down, far)] {
        let (taking, shared) = (Arc::clone(&connection), Arc::clone(shared));
        thread::spawn(move || taking.take_in(way, &from, &shared));
        let giving = Arc::clone(&connection);
        thread::spawn(move || giving.give_out(way));
    }
}

/// Closes at once, so that the other side sees a reset and no end.
fn reset(stream: TcpStream) {
    let _ = set_socket_linger(&stream, Some(Duration::ZERO));
    drop(stream);
}

/// The same where other threads use the stream too: it closes with the last of them, which this
/// wakes.
fn reset_shared(stream: Option<Arc<TcpStream>>) {
    if let Some(stream) = stream {
        let _ = set_socket_linger(&stream, Some(Duration::ZERO));
        let _ = stream.shutdown(Shutdown::Read);
    }
}

impl State {
    fn passes(&self) -> bool {
        self.near.is_some() && self.far.is_some() && self.silent.is_none()
    }

    fn to(&self, way: Way) -> Option<Arc<TcpStream>> {
        match way {
            Way::Up => self.far.clone(),
            Way::Down => self.near.clone(),
        }
    }
}

impl Connection {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().ignore_poison()
    }

    fn lose(&self, loss: Loss) {
        let mut state = self.state();
        match loss {
            Loss::Reset => self.die(&mut state),
            Loss::ResetLate(late) => self.lose_client(&mut state, late),
            Loss::Silent | Loss::SilentLate(_) => state.silent = Some(loss),
        }
        self.changed.notify_all();
    }

    fn die(&self, state: &mut State) {
        state.queues = [VecDeque::new(), VecDeque::new()];
        state.ended = [true; 2];
        reset_shared(state.near.take());
        reset_shared(state.far.take());
        self.changed.notify_all();
    }

    /// The server hears what is under way, `late`, and then the end.
    fn lose_client(&self, state: &mut State, late: Duration) {
        reset_shared(state.near.take());
        state.silent = None;
        state.ended[Way::Up as usize] = true;
        state.hold_until = Some(Instant::now() + late);
        self.changed.notify_all();
    }

    fn take_in(&self, way: Way, mut from: &TcpStream, shared: &Shared) {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let got = match from.read(&mut chunk) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                got => got.unwrap_or(0),
            };
            let mut state = self.state();
            if state.ended[way as usize] {
                return;
            }
            if got == 0 {
                match (way, state.silent) {
                    (Way::Up, Some(Loss::SilentLate(late))) => self.lose_client(&mut state, late),
                    (Way::Up, Some(_)) => self.die(&mut state),
                    _ => {}
                }
                state.ended[way as usize] = true;
                self.changed.notify_all();
                return;
            }
            let due = shared.due(way, got);
            state.queues[way as usize].push_back((due, chunk[..got].to_vec()));
            self.changed.notify_all();
        }
    }

    fn give_out(&self, way: Way) {
        while let Some((to, block)) = self.next(way) {
            let mut rest = &block[..];
            while !rest.is_empty() {
                match (&*to).write(rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(error)
                        if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                    {
                        if self.state().to(way).is_none() {
                            return;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return self.die(&mut self.state()),
                }
            }
        }
    }

    /// The next block when it is due; at the end, once all is delivered, the receiver sees the end.
    fn next(&self, way: Way) -> Option<(Arc<TcpStream>, Vec<u8>)> {
        let mut state = self.state();
        loop {
            let to = state.to(way)?;
            let now = Instant::now();
            let held = state
                .hold_until
                .filter(|until| way == Way::Up && now < *until);
            let due = state.queues[way as usize].front().map(|(due, _)| *due);
            let wait = match (held.max(due.filter(|due| now < *due)), due) {
                _ if state.silent.is_some() || state.held => None,
                (Some(until), _) => Some(until - now),
                (None, Some(_)) => {
                    let (_, block) = state.queues[way as usize].pop_front()?;
                    return Some((to, block));
                }
                (None, None) if state.ended[way as usize] => {
                    let _ = to.shutdown(Shutdown::Write);
                    return None;
                }
                (None, None) => None,
            };
            state = match wait {
                Some(wait) => {
                    let waited = self.changed.wait_timeout(state, wait);
                    waited.ignore_poison().0
                }
                None => self.changed.wait(state).ignore_poison(),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A wire to a listener, a client through it, and the listener's end of that.
    fn through(options: WireOptions) -> (Wire, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Wire::start(listener.local_addr().unwrap().port(), options).unwrap();
        let client = TcpStream::connect(("127.0.0.1", wire.port())).unwrap();
        let (server, _) = listener.accept().unwrap();
        until_live(&wire, 1);
        (wire, client, server)
    }

    fn until_live(wire: &Wire, connections: usize) {
        while wire.live() < connections {
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn read_to_end(mut stream: &TcpStream) -> io::Result<Vec<u8>> {
        let mut found = Vec::new();
        stream.read_to_end(&mut found).map(|_| found)
    }

    fn until_taken(wire: &Wire, bytes: u64) {
        while wire.bytes().0 < bytes {
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn bytes_pass_both_ways_in_order_and_so_does_the_end() {
        let options = WireOptions {
            round_trip: Duration::from_millis(10),
            bytes_per_s: Some(50_000_000),
        };
        let (wire, mut client, mut server) = through(options);
        let sent: Vec<u8> = (0..500_000u32).map(|n| n.to_le_bytes()[1]).collect();
        let begun = Instant::now();
        let sending = sent.clone();
        let writer = thread::spawn(move || {
            client.write_all(&sending).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            client
        });
        assert!(read_to_end(&server).unwrap() == sent);
        assert!(begun.elapsed() >= Duration::from_millis(15));
        server.write_all(b"back").unwrap();
        drop(server);
        assert_eq!(read_to_end(&writer.join().unwrap()).unwrap(), b"back");
        assert_eq!(wire.bytes(), (500_000, 4));
    }

    #[test]
    fn a_reset_is_seen_by_both_and_refused_clients_get_nothing() {
        let (wire, client, server) = through(WireOptions::default());
        wire.lose(Loss::Reset);
        assert!(read_to_end(&client).is_err() && read_to_end(&server).is_err());
        assert_eq!(wire.live(), 0);
        wire.door(Door::Refusing);
        let refused = TcpStream::connect(("127.0.0.1", wire.port())).unwrap();
        assert!(read_to_end(&refused).is_err());
    }

    #[test]
    fn what_is_under_way_at_a_reset_can_reach_the_server_late() {
        let round_trip = Duration::from_millis(400);
        let (wire, mut client, server) = through(WireOptions {
            round_trip,
            ..WireOptions::default()
        });
        client.write_all(b"late").unwrap();
        until_taken(&wire, 4);
        wire.lose(Loss::ResetLate(Duration::from_millis(300)));
        assert!(read_to_end(&client).is_err());
        assert_eq!(read_to_end(&server).unwrap(), b"late");
    }

    #[test]
    fn a_silent_wire_tells_nobody_until_the_client_gives_up() {
        for (loss, arrives) in [
            (Loss::Silent, &b""[..]),
            (Loss::SilentLate(Duration::from_millis(50)), b"held"),
        ] {
            let (wire, mut client, server) = through(WireOptions::default());
            wire.lose(loss);
            client.write_all(b"held").unwrap();
            until_taken(&wire, 4);
            server
                .set_read_timeout(Some(Duration::from_millis(200)))
                .unwrap();
            assert!(read_to_end(&server).is_err(), "nothing passes");
            drop(client);
            server.set_read_timeout(None).unwrap();
            let found = read_to_end(&server);
            assert!(found.is_err() == arrives.is_empty());
            assert_eq!(found.unwrap_or_default(), arrives);
        }
    }

    #[test]
    fn what_is_held_arrives_whole_once_it_is_let_go() {
        let (wire, mut client, mut server) = through(WireOptions::default());
        wire.hold(true);
        client.write_all(b"held").unwrap();
        server.write_all(b"back").unwrap();
        until_taken(&wire, 4);
        server
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        assert!(read_to_end(&server).is_err(), "nothing passes");
        wire.hold(false);
        client.shutdown(Shutdown::Write).unwrap();
        server.set_read_timeout(None).unwrap();
        assert_eq!(read_to_end(&server).unwrap(), b"held");
        drop(server);
        assert_eq!(read_to_end(&client).unwrap(), b"back");
    }

    #[test]
    fn one_of_two_is_lost_alone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let wire = Wire::start(port, WireOptions::default()).unwrap();
        let first = TcpStream::connect(("127.0.0.1", wire.port())).unwrap();
        let (_first_server, _) = listener.accept().unwrap();
        let mut second = TcpStream::connect(("127.0.0.1", wire.port())).unwrap();
        let (second_server, _) = listener.accept().unwrap();
        until_live(&wire, 2);
        assert!(wire.lose_one(0, Loss::Reset));
        assert!(read_to_end(&first).is_err());
        second.write_all(b"on").unwrap();
        drop(second);
        assert_eq!(read_to_end(&second_server).unwrap(), b"on");
    }
}
