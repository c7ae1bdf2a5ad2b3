//! The volume against a scripted SFTP server that loses its connections at chosen requests and
//! checks every request: writes that were under way are sent again first and with the same bytes,
//! and no later epoch is sent before an earlier one is synced. A server that processes requests in
//! order, and announces so, gets an fsync right behind its writes. Some servers announce it
//! wrongly.
//!
//! `SPRAT_REPLAY_SEEDS=FIRST..END` runs other seeds; a failure prints its own.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::{Duration, Instant};

use crate::support::{BLOCK, LIMIT, batching, geometry, stamp_of, stamped, tiny};
use sprat_store::sftp::Wire;
use sprat_store::{Access, FileName, IgnorePoison, SftpOptions, SftpStore, Store, StoreFile};
use sprat_testkit::dice::Dice;
use sprat_testkit::watchdog::within;
use sprat_volume::{Fenced, Flush, ReconnectError, SessionHooks, Volume, VolumeOptions};

const BLOCKS: u64 = 40;
const LEN: usize = 40 * BLOCK;
/// The upper half of a stamp is the number of the epoch.
const EPOCH: u32 = 32;
const QUIET: Duration = Duration::from_millis(150);

/// A write that no fsync covers yet.
struct Unsynced {
    stamp: u64,
    connection: u64,
    answered: bool,
}

/// A write that was under way when its connection was lost.
struct InDoubt {
    stamp: u64,
    since: Instant,
    sent_again: bool,
    read_back: bool,
}

/// How the server greets, and in which order it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Not as OpenSSH's; out of order.
    Unordered,
    /// As OpenSSH's, in order.
    OneByOne,
    /// Greets as OpenSSH's, but out of order: an fsync may leave out what was not answered before
    /// it.
    Liar,
}

/// The server's file, and what the referee knows.
struct Referee {
    file: Vec<u8>,
    dice: Dice,
    kind: Kind,
    connections: HashMap<u64, UnixStream>,
    next_connection: u64,
    /// Requests until the next loss; `None`: no loss.
    countdown: Option<u64>,
    losses: u64,
    unsynced: HashMap<u64, Unsynced>,
    in_doubt: HashMap<u64, InDoubt>,
    late: Vec<(Instant, u64, u64)>,
    late_writes: u64,
    held_back: u64,
    /// Fsyncs that arrived before the answer to a write had been sent.
    syncs_ahead: u64,
    violations: Vec<String>,
}

#[derive(Clone)]
struct Server(Arc<Mutex<Referee>>);

impl Referee {
    fn violated(&mut self, what: String) {
        self.violations.push(what);
    }

    /// A write arrives.
    fn write(&mut self, connection: u64, block: u64, stamp: u64) {
        let epoch = stamp >> EPOCH;
        let behind = self
            .unsynced
            .iter()
            .filter(|(at, one)| **at != block && one.stamp >> EPOCH < epoch)
            .map(|(at, one)| (*at, one.stamp >> EPOCH))
            .next();
        if let Some((at, older)) = behind {
            self.violated(format!(
                "epoch {epoch} is sent while block {at} of epoch {older} is not synced"
            ));
        }
        let same_epoch = self.unsynced.get(&block).map(|one| one.stamp >> EPOCH);
        if same_epoch.is_some_and(|older| older < epoch) {
            self.violated(format!("block {block} goes on before its own older epoch"));
        }
        if let Some(entry) = self.in_doubt.get_mut(&block) {
            if entry.stamp == stamp {
                entry.sent_again = true;
            } else if !entry.sent_again && entry.stamp >> EPOCH != epoch {
                // Within one epoch there is no order, and only the newest bytes must arrive.
                let was = entry.stamp;
                self.violated(format!(
                    "block {block}: {stamp:x} comes before {was:x} again"
                ));
            } else if entry.since.elapsed() < QUIET {
                self.violated(format!("block {block}: {stamp:x} within the quiet time"));
            } else {
                self.held_back += 1;
                entry.stamp = stamp;
                entry.sent_again = true;
            }
        }
        self.put(block, stamp);
        let answered = false;
        let fresh = Unsynced {
            stamp,
            connection,
            answered,
        };
        self.unsynced.insert(block, fresh);
    }

    fn put(&mut self, block: u64, stamp: u64) {
        let at = usize::try_from(block).unwrap() * BLOCK;
        self.file[at..at + BLOCK].copy_from_slice(&stamped(stamp));
    }

    fn synced(&mut self, connection: u64) {
        let in_order = self.kind == Kind::OneByOne;
        self.syncs_ahead += u64::from(self.unsynced.values().any(|one| !one.answered));
        self.unsynced
            .retain(|_, one| one.connection != connection || !(in_order || one.answered));
    }

    fn write_late(&mut self) {
        let now = Instant::now();
        while let Some(at) = self.late.iter().position(|(due, ..)| *due <= now) {
            let (_, block, stamp) = self.late.remove(at);
            self.put(block, stamp);
            self.late_writes += 1;
        }
    }

    /// Every connection is lost. A write that was not answered is there, is not, or arrives late.
    fn lose(&mut self) {
        self.losses += 1;
        let mut alive = HashSet::new();
        for (connection, stream) in self.connections.drain() {
            alive.insert(connection);
            let _ = stream.shutdown(Shutdown::Both);
        }
        let since = Instant::now();
        let under_way: Vec<(u64, u64)> = self
            .unsynced
            .iter()
            // A write of an earlier loss was counted then, and is not sent again yet.
            .filter(|(_, one)| !one.answered && alive.contains(&one.connection))
            .map(|(block, one)| (*block, one.stamp))
            .collect();
        for (block, stamp) in under_way {
            let (sent_again, read_back) = (false, false);
            let entry = InDoubt {
                stamp,
                since,
                sent_again,
                read_back,
            };
            self.in_doubt.insert(block, entry);
            match self.dice.below(3) {
                0 => {}
                1 => self.put(block, 0),
                _ => {
                    // Well within the quiet time.
                    let late = Duration::from_millis(self.dice.below(60));
                    self.late.push((since + late, block, stamp));
                }
            }
        }
    }
}

impl Server {
    fn new(seed: u64, kind: Kind) -> Self {
        Self(Arc::new(Mutex::new(Referee {
            file: vec![0; LEN],
            dice: Dice::new(seed),
            kind,
            connections: HashMap::new(),
            next_connection: 1,
            countdown: None,
            losses: 0,
            unsynced: HashMap::new(),
            in_doubt: HashMap::new(),
            late: Vec::new(),
            late_writes: 0,
            held_back: 0,
            syncs_ahead: 0,
            violations: Vec::new(),
        })))
    }

    fn referee(&self) -> MutexGuard<'_, Referee> {
        let mut referee = self.0.lock().ignore_poison();
        referee.write_late();
        referee
    }

    fn open(&self) -> Result<Arc<dyn StoreFile>, sprat_store::StoreError> {
        let server = self.clone();
        let dial = move || {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut referee = server.referee();
            let connection = referee.next_connection;
            referee.next_connection += 1;
            let kept = theirs.try_clone().unwrap();
            referee.connections.insert(connection, kept);
            drop(referee);
            let serving = server.clone();
            std::thread::spawn(move || serving.serve(connection, theirs));
            Ok(Wire::over_socket(ours).unwrap())
        };
        let mut options = SftpOptions::new(Vec::new(), "scripted", "/folder");
        options.connections = 3;
        SftpStore::connect_over(Box::new(dial), options)?
            .open(&FileName::new("x.luks").unwrap(), Access::ReadWrite)
    }

    /// Answers in order, each one a while after its request was carried out, as on a slow
    /// connection.
    fn answer_later(
        &self,
        connection: u64,
        stream: UnixStream,
    ) -> mpsc::Sender<(u64, Vec<u8>, Vec<u8>)> {
        let (later, answers) = mpsc::channel::<(u64, Vec<u8>, Vec<u8>)>();
        let server = self.clone();
        std::thread::spawn(move || {
            for (pause_ms, request, answer) in answers {
                std::thread::sleep(Duration::from_millis(pause_ms));
                server.answer(connection, &stream, &request, &answer);
            }
        });
        later
    }

    fn serve(&self, connection: u64, mut stream: UnixStream) {
        let later = self.answer_later(connection, stream.try_clone().unwrap());
        let mut head = [0; 4];
        while stream.read_exact(&mut head).is_ok() {
            let mut body = vec![0; usize::try_from(u32::from_be_bytes(head)).unwrap()];
            if stream.read_exact(&mut body).is_err() {
                return;
            }
            let (answer, defer) = {
                let mut referee = self.referee();
                if !referee.connections.contains_key(&connection) {
                    return;
                }
                let answer = handle(&mut referee, connection, &body);
                if let Some(left) = &mut referee.countdown {
                    *left = left.saturating_sub(1);
                    if *left == 0 {
                        referee.countdown = None;
                        referee.lose();
                        return;
                    }
                }
                let defer = body[0] == WRITE && referee.dice.percent(50);
                (answer, defer.then(|| referee.dice.below(4)))
            };
            if self.referee().kind == Kind::OneByOne {
                let _ = later.send((defer.unwrap_or(0), body, answer));
                continue;
            }
            let Some(pause) = defer else {
                self.answer(connection, &stream, &body, &answer);
                continue;
            };
            // Out of order, and late enough to be under way at a loss.
            let (server, stream) = (self.clone(), stream.try_clone().unwrap());
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(pause));
                server.answer(connection, &stream, &body, &answer);
            });
        }
    }

    fn answer(&self, connection: u64, mut stream: &UnixStream, request: &[u8], answer: &[u8]) {
        let mut referee = self.referee();
        if !referee.connections.contains_key(&connection) {
            return;
        }
        if request[0] == WRITE {
            let first = offset_of(request) / BLOCK as u64;
            let blocks = (request.len() - 21 - 1) / BLOCK;
            for block in first..first + blocks as u64 {
                if let Some(one) = referee.unsynced.get_mut(&block)
                    && one.connection == connection
                {
                    one.answered = true;
                }
            }
        }
        // At the same moment as its answer: otherwise no client could notice that a write was
        // answered in between.
        if is_fsync(request) && referee.kind == Kind::Liar {
            referee.synced(connection);
        }
        // Under the lock: no other answer may be written in the middle of this one.
        let _ = stream.write_all(answer);
    }
}

/// What OpenSSH's sftp-server announces (`process_init`, sftp-server.c).
const OPENSSH: [(&str, &str); 11] = [
    ("posix-rename@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("fstatvfs@openssh.com", "2"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
    ("copy-data", "1"),
    ("home-directory", "1"),
    ("users-groups-by-id@openssh.com", "1"),
];

const READ: u8 = 5;
const WRITE: u8 = 6;

/// The offset of a read or write with a handle of one byte (draft-ietf-secsh-filexfer-02, 6.4).
fn offset_of(body: &[u8]) -> u64 {
    u64::from_be_bytes(body[10..18].try_into().unwrap())
}

fn handle(referee: &mut Referee, connection: u64, body: &[u8]) -> Vec<u8> {
    let id = body.get(1..5).unwrap_or(&[0; 4]);
    let status = |code: u32| framed(&[&[101], id, &code.to_be_bytes(), &[0; 8]].concat());
    let attributes = |mode: u32| {
        let len = (LEN as u64).to_be_bytes();
        let numbers = [1u32, 1, mode, 7, 8].map(u32::to_be_bytes).concat();
        framed(&[&[105], id, &15u32.to_be_bytes(), &len, &numbers].concat())
    };
    match body[0] {
        1 => {
            let names: &[(&str, &str)] = match referee.kind {
                Kind::Unordered => &[("fsync@openssh.com", "1")],
                Kind::OneByOne | Kind::Liar => &OPENSSH,
            };
            let words = names.iter().flat_map(|(name, version)| [name, version]);
            let extensions: Vec<u8> = words.flat_map(|word| string(word.as_bytes())).collect();
            framed(&[&[2, 0, 0, 0, 3], &extensions[..]].concat())
        }
        // OPEN, then STAT of the folder, LSTAT and FSTAT of the file.
        3 => framed(&[&[102], id, &string(b"h")].concat()),
        17 => attributes(0o040_755),
        7 | 8 => attributes(0o100_600),
        READ => {
            let offset = offset_of(body);
            let len = u32::from_be_bytes(body[18..22].try_into().unwrap());
            for block in offset / BLOCK as u64..(offset + u64::from(len)).div_ceil(BLOCK as u64) {
                if let Some(entry) = referee.in_doubt.get_mut(&block) {
                    entry.read_back = true;
                }
            }
            let at = usize::try_from(offset).unwrap();
            let end = (at + usize::try_from(len).unwrap()).min(LEN);
            framed(&[&[103], id, &string(&referee.file[at..end])].concat())
        }
        WRITE => {
            let first = offset_of(body) / BLOCK as u64;
            for (block, bytes) in (first..).zip(body[22..].chunks_exact(BLOCK)) {
                referee.write(connection, block, stamp_of(bytes));
            }
            status(0)
        }
        200 if is_fsync(body) => {
            if referee.kind != Kind::Liar {
                referee.synced(connection);
            }
            status(0)
        }
        200 if body[9..].starts_with(b"limits") => {
            // Packet, read, write, handles: no limit.
            framed(&[&[201], id, &[0; 32][..]].concat())
        }
        200 => status(8),
        _ => status(0),
    }
}

fn is_fsync(body: &[u8]) -> bool {
    body[0] == 200 && body[9..].starts_with(b"fsync")
}

fn framed(body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap();
    [&len.to_be_bytes()[..], body].concat()
}

fn string(bytes: &[u8]) -> Vec<u8> {
    framed(bytes)
}

impl SessionHooks for Server {
    fn before_epoch(&self) -> Result<(), Fenced> {
        Ok(())
    }
    fn before_send(&self, _: &[Range<u64>]) -> Result<(), Fenced> {
        Ok(())
    }
    fn resolved(&self) {}
    fn resolved_in_part(&self, _: &[Range<u64>]) {}
    fn reconnect(&self, _: u32) -> Result<Arc<dyn StoreFile>, ReconnectError> {
        self.open().map_err(ReconnectError::Retry)
    }
}

/// What happened in one run.
#[derive(Debug, Default)]
struct Outcome {
    losses: u64,
    late_writes: u64,
    held_back: u64,
    syncs_ahead: u64,
}

/// Random writes with random losses.
fn life(seed: u64, kind: Kind) -> Outcome {
    let server = Server::new(seed, kind);
    let mut dice = Dice::new(seed ^ 0x4e91);
    let options = VolumeOptions {
        quiet_time: QUIET + Duration::from_millis(10),
        ..if dice.percent(50) { tiny() } else { batching() }
    };
    let file = server.open().unwrap();
    let volume = Volume::open(file, geometry(LEN), Arc::new(server.clone()), options).unwrap();
    let mut model = vec![0u64; LEN / BLOCK];
    let (mut epoch, mut serial) = (1u64, 0u64);
    for _ in 0..120 {
        if dice.percent(6) {
            let countdown = 1 + dice.below(12);
            server.referee().countdown.get_or_insert(countdown);
        }
        if dice.percent(20) {
            let durable = dice.percent(20);
            volume
                .flush(if durable {
                    Flush::Durable
                } else {
                    Flush::Ordered
                })
                .unwrap();
            epoch += 1;
            continue;
        }
        // Some blocks are written often: newer bytes of what is under way.
        let block = if dice.percent(50) {
            dice.below(4)
        } else {
            dice.below(BLOCKS)
        };
        serial += 1;
        let stamp = epoch << EPOCH | serial;
        volume
            .write_at(block * BLOCK as u64, &stamped(stamp))
            .unwrap();
        model[usize::try_from(block).unwrap()] = stamp;
    }
    server.referee().countdown = None;
    volume.close().unwrap();
    drop(volume);
    let referee = server.referee();
    assert!(
        referee.violations.is_empty(),
        "seed {seed}: {:#?}",
        referee.violations
    );
    assert!(
        referee.unsynced.is_empty(),
        "seed {seed}: closed, and not all is synced"
    );
    let unread = |entry: &&InDoubt| !entry.read_back;
    assert_eq!(
        referee.in_doubt.values().filter(unread).count(),
        0,
        "seed {seed}: closed, and not all in-doubt blocks were read back"
    );
    for (block, bytes) in referee.file.chunks_exact(BLOCK).enumerate() {
        assert_eq!(stamp_of(bytes), model[block], "seed {seed}, block {block}");
    }
    Outcome {
        losses: referee.losses,
        late_writes: referee.late_writes,
        held_back: referee.held_back,
        syncs_ahead: referee.syncs_ahead,
    }
}

/// All seeds against servers of one kind.
fn lives(kind: Kind) -> Outcome {
    let seeds = match std::env::var("SPRAT_REPLAY_SEEDS") {
        Ok(range) => {
            let (first, end) = range.split_once("..").unwrap();
            first.parse().unwrap()..end.parse().unwrap()
        }
        Err(_) => 0..16,
    };
    // They mostly wait, so several run at once.
    let workers: Vec<_> = (0..4)
        .map(|nth| {
            let mine = seeds.clone().filter(move |seed| seed % 4 == nth);
            std::thread::spawn(move || mine.map(|seed| life(seed, kind)).collect::<Vec<_>>())
        })
        .collect();
    let all = workers
        .into_iter()
        .flat_map(|worker| worker.join().unwrap());
    all.fold(Outcome::default(), |sum, one| Outcome {
        losses: sum.losses + one.losses,
        late_writes: sum.late_writes + one.late_writes,
        held_back: sum.held_back + one.held_back,
        syncs_ahead: sum.syncs_ahead + one.syncs_ahead,
    })
}

#[test]
fn lost_writes_are_sent_again_first_and_epochs_stay_in_order() {
    within(LIMIT, || {
        let outcome = lives(Kind::Unordered);
        assert!(
            outcome.losses > 0 && outcome.late_writes > 0 && outcome.held_back > 0,
            "{outcome:?}"
        );
    });
}

#[test]
fn ordered_server_gets_fsyncs_behind_writes_and_epochs_in_order() {
    within(LIMIT, || {
        let outcome = lives(Kind::OneByOne);
        assert!(outcome.losses > 0 && outcome.late_writes > 0, "{outcome:?}");
        assert!(outcome.syncs_ahead > 0, "{outcome:?}");
    });
}

#[test]
fn server_that_wrongly_claims_order_is_detected() {
    within(LIMIT, || {
        let outcome = lives(Kind::Liar);
        assert!(outcome.losses > 0 && outcome.syncs_ahead > 0, "{outcome:?}");
    });
}
