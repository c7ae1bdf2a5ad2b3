//! Serves one connection: the part of SFTP version 3 that a backup needs, on standard input and output.

mod sessions;
mod write;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{AtFlags, FlockOperation, OFlags};

use crate::disk;
use crate::keeper::Keeper;
use crate::names::{self, Kind, Name, Node};
use crate::past::{self, Past};
use crate::root::Root;
use crate::wire::{self, Attributes, Request, Status};

const HANDLES_MAX: usize = 256;
/// Past states that are open at once. Few maps have more than a hundred ranges: while those of the open ones have more
/// than this, no further one is opened.
const PAST_MAX: usize = 8;
const PAST_RANGES_MAX: usize = 1 << 19;
/// Logs that they have open together.
const LOGS_MAX: usize = 128;
/// Requests are read in pieces of this size, so that many small writes are one batch.
const INPUT_BYTES: usize = 1 << 20;
/// Answers are sent when they reach this.
const OUTPUT_BYTES: usize = 256 * 1024;
const NAMES_IN_ANSWER: usize = 100;
/// Files other than leases in a root, and leases of a container.
const FILES_MAX: usize = 64;
const LEASES_MAX: usize = 1024;

/// What a client has open.
enum Handle {
    Names(Vec<(String, Attributes)>),
    /// The folder, to be synced.
    Folder,
    File {
        name: Name,
        file: File,
        writes: bool,
    },
    Past(Box<Past>),
}

/// One connection.
pub struct Server {
    root: Root,
    read_only: bool,
    handles: HashMap<u32, Handle>,
    next_handle: u32,
    keepers: HashMap<String, Keeper>,
}

/// The WRITE requests that are carried out as one batch: of one handle.
#[derive(Default)]
struct Batch<'a> {
    handle: &'a [u8],
    ids: Vec<u32>,
    writes: Vec<(u64, &'a [u8])>,
}

type Answered = Result<Vec<u8>, Status>;

impl From<io::Error> for Status {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NoSuchFile,
            io::ErrorKind::PermissionDenied => Self::Denied,
            _ if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
                Self::Denied
            }
            _ => Self::Failure,
        }
    }
}

fn attributes_of(file: &std::fs::Metadata) -> Attributes {
    Attributes {
        len: file.size(),
        mode: file.mode(),
        owner: (file.uid(), file.gid()),
        modified_s: u32::try_from(file.mtime()).unwrap_or(0),
    }
}

impl Server {
    pub fn new(root: Root, read_only: bool) -> Self {
        let read_only = read_only || root.is_newer;
        Self {
            root,
            read_only,
            handles: HashMap::new(),
            next_handle: 0,
            keepers: HashMap::new(),
        }
    }

    /// Serves until the client closes its end.
    pub fn run(&mut self, input: &mut impl Read, output: &mut impl Write) -> io::Result<()> {
        let served = self.serve(input, output);
        let ended = self.end();
        served.and(ended)
    }

    fn serve(&mut self, input: &mut impl Read, output: &mut impl Write) -> io::Result<()> {
        let mut buffer: Vec<u8> = Vec::new();
        let mut piece = vec![0; INPUT_BYTES];
        let mut answers = Vec::new();
        let mut greeted = false;
        loop {
            let more = match input.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(more) => more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            buffer.extend_from_slice(&piece[..more]);
            let mut at = 0;
            let mut batch = Batch::default();
            let protocol =
                || io::Error::new(io::ErrorKind::InvalidData, "the client does not speak SFTP");
            while let Some((body, used)) =
                wire::split_packet(&buffer[at..]).map_err(|()| protocol())?
            {
                at += used;
                if !greeted {
                    if !wire::is_init(body) {
                        return Err(protocol());
                    }
                    greeted = true;
                    answers.extend(wire::greeting(&self.root.id));
                    continue;
                }
                let (id, request) = wire::parse(body);
                if let Some(Request::Write {
                    handle,
                    offset,
                    data,
                }) = request
                {
                    if handle != batch.handle {
                        self.write(std::mem::take(&mut batch), &mut answers);
                        batch.handle = handle;
                    }
                    batch.ids.push(id);
                    batch.writes.push((offset, data));
                    continue;
                }
                self.write(std::mem::take(&mut batch), &mut answers);
                self.answer(id, request, &mut answers);
                if answers.len() >= OUTPUT_BYTES {
                    output.write_all(&answers)?;
                    answers.clear();
                }
            }
            self.write(batch, &mut answers);
            output.write_all(&answers)?;
            output.flush()?;
            answers.clear();
            buffer.drain(..at);
        }
    }

    fn answer(&mut self, id: u32, request: Option<Request<'_>>, answers: &mut Vec<u8>) {
        let before = answers.len();
        let done = match request {
            None => Err(Status::BadMessage),
            // The data is not copied, and takes no new memory each time.
            Some(Request::Read {
                handle,
                offset,
                len,
            }) => self.read(id, handle, offset, len, answers),
            Some(request) => self
                .carry_out(id, &request)
                .map(|answer| answers.extend(answer)),
        };
        if let Err(status) = done {
            answers.truncate(before);
            answers.extend(wire::status(id, status));
        }
    }

    fn carry_out(&mut self, id: u32, request: &Request<'_>) -> Answered {
        let done = |()| wire::status(id, Status::Ok);
        match *request {
            Request::Open(path, flags) => self.open(id, path, flags),
            Request::Close(handle) => self.close(handle).map(done),
            Request::Read { .. } | Request::Write { .. } => Err(Status::Failure),
            Request::Stat(path) => Ok(wire::attributes(id, &self.stat(self.resolve(path)?)?)),
            Request::Fstat(handle) => self.fstat(id, handle),
            Request::SetLen(handle, len) => self.set_len(handle, len).map(done),
            Request::Opendir(path) => {
                let names = self.list(self.resolve(path)?)?;
                self.hand_out(id, Handle::Names(names))
            }
            Request::Readdir(handle) => self.next_names(id, handle),
            Request::Remove(path) => self.remove(path).map(done),
            Request::Rename(from, to) => self.rename(from, to).map(done),
            Request::Realpath(path) => {
                let name = names::shown(&self.resolve(path)?);
                Ok(wire::names(id, &[(name, Attributes::default())]))
            }
            Request::Fsync(handle) => self.sync(handle).map(done),
            Request::Limits => Ok(wire::limits(id, HANDLES_MAX)),
            Request::Statvfs => {
                let (available, total) = self.root.space.shown()?;
                Ok(wire::statvfs(id, total, available, self.read_only))
            }
            Request::SessionBegin(path) => self.session_begin(id, path),
            Request::SessionJoin(path, session) => self.session_join(path, session).map(done),
            Request::SessionEnd(path, clean) => self.session_end(path, clean).map(done),
            Request::WillWrite(handle, ref ranges) => self.will_write(id, handle, ranges),
            Request::Punch(handle, ref ranges) => self.punch(id, handle, ranges),
            Request::Map(handle, from) => self.map(id, handle, from),
            Request::Generations(path) => self.generations(id, path),
            Request::Forbidden => Err(Status::Denied),
            Request::Unknown => Err(Status::Unsupported),
        }
    }

    fn resolve(&self, path: &[u8]) -> Result<Node, Status> {
        names::resolve(path, &self.root.path).ok_or(Status::NoSuchFile)
    }

    fn hand_out(&mut self, id: u32, handle: Handle) -> Answered {
        if self.handles.len() >= HANDLES_MAX {
            return Err(Status::Failure);
        }
        while self.handles.contains_key(&self.next_handle) {
            self.next_handle = self.next_handle.wrapping_add(1);
        }
        let number = self.next_handle;
        self.next_handle = self.next_handle.wrapping_add(1);
        self.handles.insert(number, handle);
        Ok(wire::handle(id, number))
    }

    fn handle(&mut self, handle: &[u8]) -> Result<&mut Handle, Status> {
        let number = wire::handle_number(handle).ok_or(Status::Failure)?;
        self.handles.get_mut(&number).ok_or(Status::Failure)
    }
}

/// Opening and closing.
impl Server {
    fn open(&mut self, id: u32, path: &[u8], flags: u32) -> Answered {
        let writes = match flags {
            wire::OPEN_READ => false,
            wire::OPEN_READ_WRITE | wire::OPEN_NEW => true,
            _ => return Err(Status::Denied),
        };
        if self.handles.len() >= HANDLES_MAX {
            return Err(Status::Failure);
        }
        let node = self.resolve(path)?;
        if writes && (self.read_only || !matches!(node, Node::File(_))) {
            return Err(Status::Denied);
        }
        let handle = match node {
            Node::Folder => Handle::Folder,
            Node::File(name) => {
                let file = match flags {
                    wire::OPEN_READ => self.root.open_file(&name, OFlags::RDONLY),
                    wire::OPEN_READ_WRITE => self.root.open_file(&name, OFlags::RDWR),
                    _ => self.create(&name),
                }?;
                // From now on a session that begins refuses what comes through this handle.
                if writes && name.kind == Kind::Container {
                    self.keeper(&name.container)?;
                }
                Handle::File { name, file, writes }
            }
            Node::PastFile(container, state) => {
                Handle::Past(Box::new(self.open_past(&container, &state)?))
            }
            Node::PastFolder | Node::PastOf(_) => return Err(Status::Failure),
        };
        self.hand_out(id, handle)
    }

    fn open_past(&mut self, container: &str, state: &str) -> Result<Past, Status> {
        // Each has its map and a part of the newest log in memory.
        let open = self.handles.values().filter_map(|handle| match handle {
            Handle::Past(past) => Some(past.map.len()),
            _ => None,
        });
        let (count, ranges) = open.fold((0, 0), |(count, all), one| (count + 1, all + one));
        if count >= PAST_MAX || ranges > PAST_RANGES_MAX {
            return Err(Status::Failure);
        }
        let kept = self.root.kept(container)?.ok_or(Status::NoSuchFile)?;
        let live = self.root.live(container)?;
        let shown = past::shown(&kept, &live)?;
        let (number, ..) = shown
            .iter()
            .find(|(_, name, _)| name == state)
            .ok_or(Status::NoSuchFile)?;
        let mut opened = Past::open(&kept, live, *number)?;
        let logs_max = LOGS_MAX / (count + 1);
        opened.limit_logs(logs_max);
        for handle in self.handles.values_mut() {
            if let Handle::Past(past) = handle {
                past.limit_logs(logs_max);
            }
        }
        Ok(opened)
    }

    fn create(&self, name: &Name) -> io::Result<File> {
        let denied = || Err(io::ErrorKind::PermissionDenied.into());
        let files = self.root.files()?;
        let is_lease = |name: &Name| matches!(name.kind, Kind::Lease(_));
        match name.kind {
            Kind::Lease(number) => {
                let highest = self.root.highest_lease(&name.container)?;
                // One that is there is refused by the creation itself.
                let is_next = names::next_lease(highest).contains(&number);
                if !is_next && highest.is_none_or(|highest| number > highest) {
                    return denied();
                }
                let same = files
                    .iter()
                    .filter(|other| is_lease(other) && other.container == name.container);
                if same.count() >= LEASES_MAX {
                    return denied();
                }
            }
            Kind::Container if self.root.containers()?.len() >= self.root.policy.containers_max => {
                return denied();
            }
            _ if files.iter().filter(|other| !is_lease(other)).count() >= FILES_MAX => {
                return denied();
            }
            _ => {}
        }
        self.root.space.check(4096, 0)?;
        self.root
            .open_file(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    fn close(&mut self, handle: &[u8]) -> Result<(), Status> {
        let number = wire::handle_number(handle).ok_or(Status::Failure)?;
        match self.handles.remove(&number).ok_or(Status::Failure)? {
            Handle::File {
                name, writes: true, ..
            } => Ok(self.closed(&name)?),
            _ => Ok(()),
        }
    }

    /// With the last handle the session of this process ends.
    fn closed(&mut self, closed: &Name) -> io::Result<()> {
        let same = |handle: &Handle| match handle {
            Handle::File { name, writes, .. } => *writes && name.container == closed.container,
            _ => false,
        };
        if self.handles.values().any(same) {
            return Ok(());
        }
        self.end_session(&closed.container)
    }

    fn end_session(&mut self, container: &str) -> io::Result<()> {
        // If it is not there, the administrator has removed it.
        match (
            self.keepers.get_mut(container),
            disk::if_there(self.root.writable(container))?,
        ) {
            (Some(keeper), Some(file)) => keeper.end(&file),
            _ => Ok(()),
        }
    }

    fn end(&mut self) -> io::Result<()> {
        self.handles.clear();
        let containers: Vec<String> = self.keepers.keys().cloned().collect();
        let ended = containers
            .iter()
            .map(|container| self.end_session(container));
        let ended = ended.fold(Ok(()), io::Result::and);
        for (container, keeper) in &self.keepers {
            // What fails is done when the next session begins.
            if let Ok(file) = self.root.live(container) {
                let _ = keeper.clone_left(&file);
            }
        }
        ended
    }

    fn remove(&self, path: &[u8]) -> Result<(), Status> {
        let Node::File(name) = self.resolve(path)? else {
            return Err(Status::Denied);
        };
        let must_stay = match name.kind {
            Kind::Container => true,
            Kind::Lease(number) => {
                let highest = self.root.highest_lease(&name.container)?;
                names::lease_must_stay(number, highest)
            }
            _ => false,
        };
        if must_stay || self.read_only {
            return Err(Status::Denied);
        }
        let removed = rustix::fs::unlinkat(&self.root.folder, &*name.text, AtFlags::empty());
        Ok(removed.map_err(io::Error::from)?)
    }

    /// Only a half-made container gets a new name: that of its container, if nobody has it.
    fn rename(&self, from: &[u8], to: &[u8]) -> Result<(), Status> {
        let (Node::File(from), Node::File(to)) = (self.resolve(from)?, self.resolve(to)?) else {
            return Err(Status::Denied);
        };
        let may_be_born = from.kind == Kind::HalfMade
            && to.kind == Kind::Container
            && from.container == to.container;
        if !may_be_born || self.read_only {
            return Err(Status::Denied);
        }
        let is_full = self.root.containers()?.len() >= self.root.policy.containers_max;
        if is_full {
            return Err(Status::Denied);
        }
        let file = self.root.open_file(&from, OFlags::RDWR)?;
        // No batch of writes to the half-made file is under way: see `write_half_made`.
        let _locked = disk::lock(&file, FlockOperation::LockExclusive)?;
        let folder = &self.root.folder;
        Ok(disk::rename_new(folder, &from.text, folder, &to.text)?)
    }
}

/// Reading.
impl Server {
    fn read(
        &mut self,
        id: u32,
        handle: &[u8],
        offset: u64,
        len: u32,
        answers: &mut Vec<u8>,
    ) -> Result<(), Status> {
        let len = len.min(wire::TRANSFER_BYTES_MAX) as usize;
        let handle = self.handle(handle)?;
        let head = answers.len();
        let first = head + wire::DATA_HEAD_BYTES;
        answers.resize(first, 0);
        match handle {
            Handle::File { file, .. } => {
                i64::try_from(offset).map_err(|_| Status::Failure)?;
                answers.resize(first + len, 0);
                let got = file.read_at(&mut answers[first..], offset)?;
                answers.truncate(first + got);
            }
            Handle::Past(past) => answers.extend_from_slice(past.read(offset, len)?),
            _ => return Err(Status::Failure),
        }
        let got = answers.len() - first;
        if got == 0 && len > 0 {
            return Err(Status::Eof);
        }
        answers[head..first].copy_from_slice(&wire::data_head(id, got));
        Ok(())
    }

    fn stat(&self, node: Node) -> Result<Attributes, Status> {
        let folder = |mode| {
            let found = File::from(self.root.folder.try_clone()?).metadata()?;
            Ok(Attributes {
                mode,
                len: 4096,
                ..attributes_of(&found)
            })
        };
        match node {
            Node::Folder => folder(0o040_700),
            Node::PastFolder => folder(0o040_500),
            Node::PastOf(container) => {
                self.root.kept(&container)?.ok_or(Status::NoSuchFile)?;
                folder(0o040_500)
            }
            Node::File(name) => {
                let file = self.root.open_file(&name, OFlags::RDONLY)?;
                Ok(attributes_of(&file.metadata()?))
            }
            Node::PastFile(container, state) => {
                let all = self.list(Node::PastOf(container))?;
                let found = all.into_iter().find(|(name, _)| *name == state);
                found.map(|(_, found)| found).ok_or(Status::NoSuchFile)
            }
        }
    }

    fn fstat(&mut self, id: u32, handle: &[u8]) -> Answered {
        let found = match self.handle(handle)? {
            Handle::File { file, .. } => attributes_of(&file.metadata()?),
            Handle::Past(past) => past_attributes(&past.head),
            Handle::Folder | Handle::Names(_) => self.stat(Node::Folder)?,
        };
        Ok(wire::attributes(id, &found))
    }

    fn list(&self, node: Node) -> Result<Vec<(String, Attributes)>, Status> {
        match node {
            Node::Folder => {
                let mut found = Vec::new();
                for name in self.root.files()? {
                    // What is no plain file, or is gone by now, is not shown.
                    if let Ok(file) = self.stat(Node::File(name.clone())) {
                        found.push((name.text, file));
                    }
                }
                found.push((names::PAST.to_owned(), self.stat(Node::PastFolder)?));
                Ok(found)
            }
            Node::PastFolder => {
                let mut found = Vec::new();
                for name in self.root.containers()? {
                    if let Ok(attributes) = self.stat(Node::PastOf(name.clone())) {
                        found.push((name, attributes));
                    }
                }
                Ok(found)
            }
            Node::PastOf(container) => {
                let kept = self.root.kept(&container)?.ok_or(Status::NoSuchFile)?;
                let live = self.root.live(&container)?;
                let all = past::shown(&kept, &live)?;
                Ok(all
                    .into_iter()
                    .map(|(_, name, head)| (name, past_attributes(&head)))
                    .collect())
            }
            Node::File(_) | Node::PastFile(..) => Err(Status::Failure),
        }
    }

    fn next_names(&mut self, id: u32, handle: &[u8]) -> Answered {
        let Handle::Names(names) = self.handle(handle)? else {
            return Err(Status::Failure);
        };
        if names.is_empty() {
            return Err(Status::Eof);
        }
        let rest = names.split_off(names.len().min(NAMES_IN_ANSWER));
        let part = std::mem::replace(names, rest);
        Ok(wire::names(id, &part))
    }
}

fn past_attributes(head: &crate::generation::Head) -> Attributes {
    Attributes {
        len: head.length,
        mode: 0o100_400,
        owner: (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        ),
        modified_s: u32::try_from(head.state_s).unwrap_or(0),
    }
}
