//! The channels to one server, and single requests on them with their errors.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use super::channel::{Answer, Arrived, Channel, Killer, Patience};
use super::codec::{self, Attributes, Extensions, Malformed, Reply, Request, Statvfs};
use super::further::{FurtherConnections, SharedSession};
use super::wire::{Dial, Ending, EndingKind};
use crate::contract::Question;
use crate::local::LIST_ENTRIES_MAX;
use crate::text::printable;
use crate::{FileName, IgnorePoison, StoreError};

/// What a server without `limits@openssh.com` must accept: the draft's section 3 demands packets of
/// 34,000 bytes.
const PLAIN_TRANSFER_BYTES: u32 = 32 * 1024;
/// OpenSSH's own limit: its longest message, minus 1 KiB for everything but the data.
const TRANSFER_BYTES_MAX: u32 = 256 * 1024 - 1024;
/// A server that announces less than a block can't carry a block device.
const TRANSFER_BYTES_MIN: u32 = 4096;
/// With less free space than this, a failed write is reported as a full disk: SFTP v3 has no status
/// for it.
const NO_SPACE_BELOW_BYTES: u64 = 1024 * 1024;

/// Everything that a [`SftpSession`] needs except its first wire.
pub(crate) struct SessionOptions {
    pub host: String,
    pub folder: String,
    /// Connections beyond the first; see `further`.
    pub further: usize,
    pub patience: Patience,
    pub insist_without_fsync: bool,
    /// Asked ahead, before the server has greeted.
    pub questions: Vec<Question>,
}

/// A connected server. If one of the channels that are in use dies, all do.
pub(crate) struct SftpSession {
    pub options: SessionOptions,
    pub extensions: Extensions,
    pub read_bytes_max: u32,
    pub write_bytes_max: u32,
    pub first: Channel,
    pub(super) dial: Box<dyn Dial>,
    pub(super) further: FurtherConnections,
    pub(super) group: Arc<Group>,
    /// How often a name was renamed or removed: handles opened by a name before and after that must
    /// not be combined.
    renames: Mutex<HashMap<FileName, u64>>,
    /// Names that were created or given to another file since the folder was last flushed.
    new_names: Mutex<BTreeSet<FileName>>,
    /// The server opens no folder for a flush, or doesn't sync it.
    pub folders_closed: AtomicBool,
    /// A small file that all channels must show with the same content.
    witness: Mutex<Option<FileName>>,
    /// The witness that each further connection has shown.
    checked: Mutex<HashMap<usize, FileName>>,
    /// An answer arrived before that of a request sent earlier on the same channel.
    overtook: AtomicBool,
    /// A file that was opened ahead, how often it was renamed before, and its handle.
    pub(super) prepared: Mutex<Option<(FileName, u64, Vec<u8>)>>,
    /// Kept open for the programs that later channels start.
    _inherit_fds: Vec<OwnedFd>,
}

/// Ends all channels when one dies.
#[derive(Default)]
pub(super) struct Group {
    dead: OnceLock<Ending>,
    members: Mutex<Vec<Killer>>,
}

impl Group {
    /// Adds a channel. When it dies and `is_in_use` returns true then, all die. Otherwise the
    /// session is only slower.
    pub(super) fn join(
        self: &Arc<Self>,
        channel: &Channel,
        is_in_use: impl Fn() -> bool + Send + Sync + 'static,
    ) {
        self.members.lock().ignore_poison().push(channel.killer());
        let group = Arc::clone(self);
        channel.on_death(Box::new(move |ending| {
            if is_in_use() {
                group.die(ending);
            }
        }));
        if let Some(ending) = self.dead.get() {
            channel.die(ending);
        }
    }

    fn die(&self, ending: &Ending) {
        if self.dead.set(ending.clone()).is_ok() {
            // Taken out first, because each death calls this again.
            let members = std::mem::take(&mut *self.members.lock().ignore_poison());
            for member in members {
                member.kill(ending);
            }
        }
    }
}

impl SftpSession {
    /// Connects the first channel, asks for its limits and checks the folder.
    pub(crate) fn connect(
        dial: Box<dyn Dial>,
        options: SessionOptions,
        inherit_fds: Vec<OwnedFd>,
    ) -> Result<Arc<SharedSession>, StoreError> {
        let host = &options.host;
        let _span = tracing::debug_span!("connection", %host).entered();
        let wire = dial.dial()?;
        let first = Channel::start(wire, options.patience).map_err(|source| StoreError::Io {
            op: "connect",
            object: host.clone(),
            source,
        })?;
        options.ask_with_init(&first);
        let extensions = first
            .wait_greeting()
            .map_err(|ending| unreached(host, ending))?;
        let group = Arc::new(Group::default());
        group.join(&first, || true);
        let mut session = Self {
            further: FurtherConnections::new(options.further),
            options,
            extensions,
            read_bytes_max: PLAIN_TRANSFER_BYTES,
            write_bytes_max: PLAIN_TRANSFER_BYTES,
            first,
            dial,
            group,
            renames: Mutex::default(),
            new_names: Mutex::default(),
            folders_closed: AtomicBool::new(false),
            witness: Mutex::default(),
            checked: Mutex::default(),
            overtook: AtomicBool::new(false),
            prepared: Mutex::default(),
            _inherit_fds: inherit_fds,
        };
        let place = session.describe();
        let call = session.call("open folder", &place);
        let path = session.folder_path();
        // Both are under way.
        let found = call.ask(&Request::Stat { path })?;
        let limits = match session.extensions.limits {
            true => Some(call.ask(&Request::Limits)?),
            false => None,
        };
        let limits = limits
            .map(|asked| session.wait_limits(&asked))
            .transpose()?;
        let found = call.wait_attributes(&found)?;
        if let Some((read_bytes_max, write_bytes_max)) = limits {
            session.read_bytes_max = read_bytes_max;
            session.write_bytes_max = write_bytes_max;
        }
        if !found.may_be_folder() {
            return Err(StoreError::Refused {
                op: "open folder",
                object: place,
                reason: "not a folder".to_owned(),
            });
        }
        tracing::debug!(
            read_bytes_max = session.read_bytes_max,
            write_bytes_max = session.write_bytes_max,
            extensions = ?session.extensions,
            "connected"
        );
        Ok(SharedSession::new(session))
    }

    /// The largest read and write that the server announces.
    fn wait_limits(&self, asked: &Answer) -> Result<(u32, u32), StoreError> {
        let place = self.describe();
        let call = self.call("connect", &place);
        let limits = call.wait_extended(asked, codec::parse_limits)?;
        // Minus a request's other fields. Zero means no limit; then the default size is kept.
        let packet_max = limits.packet_bytes_max.saturating_sub(1024);
        let bound = |announced: u64| {
            let announced = if packet_max == 0 {
                announced
            } else {
                announced.min(packet_max)
            };
            match u32::try_from(announced) {
                Ok(0) => Ok(PLAIN_TRANSFER_BYTES),
                Ok(small) if small < TRANSFER_BYTES_MIN => Err(StoreError::Unsupported {
                    op: "connect",
                    object: place.clone(),
                    reason: format!("the server accepts no more than {small} bytes at a time"),
                }),
                Ok(announced) => Ok(announced.min(TRANSFER_BYTES_MAX)),
                Err(_) => Ok(TRANSFER_BYTES_MAX),
            }
        };
        Ok((
            bound(limits.read_bytes_max)?,
            bound(limits.write_bytes_max)?,
        ))
    }

    /// Returns the location for messages.
    pub(crate) fn describe(&self) -> String {
        let (host, folder) = (
            &self.options.host,
            printable(self.options.folder.as_bytes()),
        );
        if folder.starts_with('/') {
            format!("ssh://{host}{folder}")
        } else {
            format!("{host}:{folder}")
        }
    }

    /// A file's name in messages.
    pub(crate) fn object(&self, name: &FileName) -> String {
        format!("{}/{name}", self.describe().trim_end_matches('/'))
    }

    /// The folder's path in requests.
    pub(crate) fn folder_path(&self) -> &str {
        self.options.folder_path()
    }

    /// A file's path in requests.
    pub(crate) fn path(&self, name: &FileName) -> String {
        self.options.path(name)
    }

    /// Requests on the first channel, one after another.
    pub(crate) fn call<'a>(&'a self, op: &'static str, object: &'a str) -> Call<'a> {
        Call {
            channel: &self.first,
            op,
            object,
        }
    }

    /// How many further connections are in use, and why one can't be used.
    pub(crate) fn further_state(&self) -> (usize, Option<String>) {
        self.further.state()
    }

    /// Whether a channel's requests are certainly carried out one after another.
    pub(crate) fn keeps_order(&self) -> bool {
        self.extensions.keeps_order && !self.overtook.load(Ordering::SeqCst)
    }

    /// Records that this server does not keep the order.
    pub(crate) fn note_overtaking(&self) {
        self.overtook.store(true, Ordering::SeqCst);
    }

    /// How often `name` was renamed or removed through this session.
    pub(crate) fn renames_of(&self, name: &FileName) -> u64 {
        self.renames
            .lock()
            .ignore_poison()
            .get(name)
            .copied()
            .unwrap_or(0)
    }

    /// Must be called before a rename or removal of `name` is sent.
    pub(crate) fn note_rename(&self, name: &FileName) {
        *self
            .renames
            .lock()
            .ignore_poison()
            .entry(name.clone())
            .or_default() += 1;
    }

    /// Must be called when `name` was created, or given to another file.
    pub(crate) fn note_new_name(&self, name: &FileName) {
        self.new_names.lock().ignore_poison().insert(name.clone());
    }

    pub(crate) fn take_new_names(&self) -> BTreeSet<FileName> {
        std::mem::take(&mut *self.new_names.lock().ignore_poison())
    }

    pub(super) fn witness(&self) -> MutexGuard<'_, Option<FileName>> {
        self.witness.lock().ignore_poison()
    }

    pub(super) fn was_checked(&self, index: usize, witness: &FileName) -> bool {
        self.checked.lock().ignore_poison().get(&index) == Some(witness)
    }

    pub(super) fn note_checked(&self, index: usize, witness: &FileName) {
        self.checked
            .lock()
            .ignore_poison()
            .insert(index, witness.clone());
    }

    /// Ends all channels.
    pub(super) fn end(&self, ending: &Ending) {
        self.group.die(ending);
    }

    /// Free space of the folder.
    pub(crate) fn statvfs(&self, op: &'static str) -> Result<Statvfs, StoreError> {
        let object = self.describe();
        if !self.extensions.statvfs {
            let reason = "the server has no statvfs@openssh.com".to_owned();
            return Err(StoreError::Unsupported { op, object, reason });
        }
        let request = Request::Statvfs {
            path: self.folder_path(),
        };
        self.call(op, &object)
            .extended(&request, codec::parse_statvfs)
    }

    /// Finds the cause of a bare FAILURE (the status for ENOSPC, EDQUOT, EROFS and EIO,
    /// `errno_to_portable` in sftp-server.c). A quota can't be queried and stays `Refused`.
    pub(crate) fn explain(&self, error: StoreError) -> StoreError {
        let StoreError::Refused { op, object, .. } = &error else {
            return error;
        };
        let (op, object) = (*op, object.clone());
        match self.statvfs(op) {
            Ok(space) if space.read_only => StoreError::ReadOnly { op, object },
            Ok(space) if space.no_inodes || space.available_bytes < NO_SPACE_BELOW_BYTES => {
                StoreError::NoSpace {
                    op,
                    object,
                    available_bytes: space.available_bytes,
                }
            }
            _ => error,
        }
    }
}

/// Requests on one channel for one operation.
pub(crate) struct Call<'a> {
    pub channel: &'a Channel,
    pub op: &'static str,
    pub object: &'a str,
}

impl Call<'_> {
    /// Sends a request; the answer is waited for later.
    pub(crate) fn ask(&self, request: &Request<'_>) -> Result<Answer, StoreError> {
        self.channel
            .ask(request)
            .map_err(|ending| self.ended(ending))
    }

    /// Sends a request if it may be sent once its turn has come: see [`Channel::ask_if`].
    pub(crate) fn ask_if(
        &self,
        request: &Request<'_>,
        may_send: &dyn Fn() -> bool,
    ) -> Result<Option<Answer>, StoreError> {
        self.channel
            .ask_if(request, may_send)
            .map_err(|ending| self.ended(ending))
    }

    /// Waits for an answer's body.
    pub(crate) fn wait(&self, answer: &Answer) -> Result<Vec<u8>, StoreError> {
        Ok(self.wait_arrival(answer)?.body)
    }

    /// The same, with its position among the channel's answers.
    pub(crate) fn wait_arrival(&self, answer: &Answer) -> Result<Arrived, StoreError> {
        self.channel
            .wait(answer)
            .map_err(|ending| self.ended(ending))
    }

    /// Parses an answer's body.
    pub(crate) fn parse<'b>(&self, body: &'b [u8]) -> Result<Reply<'b>, StoreError> {
        codec::parse_reply(body).map_err(|malformed| self.broken(&malformed))
    }

    fn roundtrip(&self, request: &Request<'_>) -> Result<Vec<u8>, StoreError> {
        self.wait(&self.ask(request)?)
    }

    /// Ends the session because of what the server sent.
    pub(crate) fn broken(&self, malformed: &Malformed) -> StoreError {
        self.ended(self.channel.broken(malformed))
    }

    /// The error for an answer of the wrong kind: a refusal, or a violation of the protocol.
    pub(crate) fn unexpected(&self, body: &[u8]) -> StoreError {
        match self.parse(body) {
            Ok(Reply::Status { code, message }) if code != STATUS_OK => self.refused(code, message),
            Ok(_) => self.broken(&Malformed::ReplyType(
                body.first().copied().unwrap_or_default(),
            )),
            Err(error) => error,
        }
    }

    /// A request that is answered with a bare status.
    pub(crate) fn status(&self, request: &Request<'_>) -> Result<(), StoreError> {
        self.is_ok(&self.roundtrip(request)?)
    }

    /// Waits for a bare status.
    pub(crate) fn wait_status(&self, answer: &Answer) -> Result<(), StoreError> {
        self.is_ok(&self.wait(answer)?)
    }

    /// Checks that a status is OK.
    pub(crate) fn is_ok(&self, body: &[u8]) -> Result<(), StoreError> {
        match self.parse(body)? {
            Reply::Status {
                code: STATUS_OK, ..
            } => Ok(()),
            _ => Err(self.unexpected(body)),
        }
    }

    /// A request that is answered with a handle.
    pub(crate) fn handle(&self, request: &Request<'_>) -> Result<Vec<u8>, StoreError> {
        self.wait_handle(&self.ask(request)?)
    }

    /// Waits for a handle.
    pub(crate) fn wait_handle(&self, answer: &Answer) -> Result<Vec<u8>, StoreError> {
        let body = self.wait(answer)?;
        match self.parse(&body)? {
            Reply::Handle(handle) => Ok(handle.to_vec()),
            _ => Err(self.unexpected(&body)),
        }
    }

    /// A request that is answered with attributes.
    pub(crate) fn attributes(&self, request: &Request<'_>) -> Result<Attributes, StoreError> {
        self.wait_attributes(&self.ask(request)?)
    }

    /// Waits for attributes.
    pub(crate) fn wait_attributes(&self, answer: &Answer) -> Result<Attributes, StoreError> {
        let body = self.wait(answer)?;
        match self.parse(&body)? {
            Reply::Attributes(attributes) => Ok(attributes),
            _ => Err(self.unexpected(&body)),
        }
    }

    /// Waits for attributes whose answer came behind the channel's answer `number`. `None`: it came
    /// before.
    pub(crate) fn attributes_behind(
        &self,
        answer: &Answer,
        number: u64,
    ) -> Result<Option<Attributes>, StoreError> {
        let arrived = self.wait_arrival(answer)?;
        if arrived.number < number {
            return Ok(None);
        }
        match self.parse(&arrived.body)? {
            Reply::Attributes(attributes) => Ok(Some(attributes)),
            _ => Err(self.unexpected(&arrived.body)),
        }
    }

    /// A request of an extension that has an answer of its own.
    pub(crate) fn extended<T>(
        &self,
        request: &Request<'_>,
        parse: fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<T, StoreError> {
        self.wait_extended(&self.ask(request)?, parse)
    }

    pub(crate) fn wait_extended<T>(
        &self,
        answer: &Answer,
        parse: fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<T, StoreError> {
        let body = self.wait(answer)?;
        match self.parse(&body)? {
            Reply::Extended(reply) => parse(reply).map_err(|malformed| self.broken(&malformed)),
            _ => Err(self.unexpected(&body)),
        }
    }

    /// Reads the complete list of an open folder.
    pub(crate) fn names(&self, handle: &[u8]) -> Result<Vec<FileName>, StoreError> {
        let mut names = Vec::new();
        // Every answer counts for some entries, so that nearly empty ones can't go on for ever.
        let mut seen = 0;
        // Two at once: the end of a short list then arrives with its names.
        let mut owed = VecDeque::new();
        let mut at_end = false;
        loop {
            if owed.is_empty() && !at_end {
                for _ in 0..2 {
                    owed.push_back(self.ask(&Request::Readdir { handle })?);
                }
            }
            let Some(answer) = owed.pop_front() else {
                return Ok(names);
            };
            let body = self.wait(&answer)?;
            let found = match self.parse(&body)? {
                Reply::Names(found) => found,
                Reply::Status {
                    code: STATUS_EOF, ..
                } => {
                    at_end = true;
                    continue;
                }
                _ => return Err(self.unexpected(&body)),
            };
            seen += found.len().max(10);
            if seen > LIST_ENTRIES_MAX {
                return Err(StoreError::Refused {
                    op: self.op,
                    object: self.object.to_owned(),
                    reason: format!("the folder lists more than {LIST_ENTRIES_MAX} names"),
                });
            }
            let texts = found
                .into_iter()
                .filter_map(|name| std::str::from_utf8(name).ok());
            names.extend(texts.filter_map(|name| FileName::new(name).ok()));
        }
    }

    fn ended(&self, ending: Ending) -> StoreError {
        let (op, object, reason) = (self.op, self.object.to_owned(), ending.reason);
        match ending.kind {
            EndingKind::Protocol => StoreError::Protocol { op, object, reason },
            EndingKind::Elsewhere => StoreError::Elsewhere { object, reason },
            _ => StoreError::Disconnected { op, object, reason },
        }
    }

    /// The error for a status that isn't OK. Codes above 8 belong to later versions; some servers
    /// send them all the same (draft-ietf-secsh-filexfer-13 section 9.1).
    fn refused(&self, code: u32, message: &[u8]) -> StoreError {
        let (op, object) = (self.op, self.object.to_owned());
        match code {
            2 | 10 => StoreError::NotFound { op, object },
            3 => StoreError::PermissionDenied { op, object },
            8 => {
                let reason = "the server doesn't know this request".to_owned();
                StoreError::Unsupported { op, object, reason }
            }
            11 => StoreError::AlreadyExists { op, object },
            12 => StoreError::ReadOnly { op, object },
            14 | 15 => StoreError::NoSpace {
                op,
                object,
                available_bytes: 0,
            },
            code => {
                let text = printable(message);
                let reason = if text.is_empty() {
                    format!("status {code}")
                } else {
                    text
                };
                StoreError::Refused { op, object, reason }
            }
        }
    }
}

/// `SSH_FX_OK`
const STATUS_OK: u32 = 0;
/// `SSH_FX_EOF`
pub(crate) const STATUS_EOF: u32 = 1;

/// The error for a first channel that did not come up.
fn unreached(host: &str, ending: Ending) -> StoreError {
    let (host, reason) = (host.to_owned(), ending.reason);
    match ending.kind {
        EndingKind::LoginRefused => StoreError::LoginRefused { host, reason },
        EndingKind::HostKey => StoreError::HostKey { host, reason },
        EndingKind::Protocol => StoreError::Protocol {
            op: "connect",
            object: host,
            reason,
        },
        EndingKind::Elsewhere => StoreError::Elsewhere {
            object: host,
            reason,
        },
        EndingKind::Lost | EndingKind::Unreachable => StoreError::Unreachable { host, reason },
    }
}

impl std::fmt::Debug for SftpSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SftpSession")
            .field("place", &self.describe())
            .finish_non_exhaustive()
    }
}

impl SessionOptions {
    pub(crate) fn patience(answer: Duration, flush: Duration) -> Patience {
        Patience {
            answer,
            flush: flush.max(answer),
        }
    }
}
