//! A store on an SSH server: our own pipelined SFTP version 3 client.

//! `codec` translates requests and replies to bytes. `wire` and `program` provide the byte streams.
//! `channel` has many requests in flight on one wire; `ahead` asks early. `session` holds the
//! channels of one server, `further` all but the first.
//! `open` opens its files, and reads, creates and removes small ones. `file` is one open file over
//! all channels. `witness` verifies that all channels lead to one folder. `punch` and `read_lease`
//! use a shell on the server, `copy` copies within the server. `agent` has the requests of `sprat-agent`.

mod agent;
mod ahead;
mod answer;
mod channel;
mod codec;
mod copy;
mod file;
mod further;
mod open;
mod packet;
mod program;
mod punch;
mod questions;
mod read_lease;
mod session;
mod target;
mod wire;
mod witness;

use std::ffi::OsString;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::FdFlags;

pub use punch::{Fence, Puncher, PuncherOptions};
pub use read_lease::{Writers, writers_of};
pub use target::{SshTarget, unattended};
pub use wire::{Dial, Ending, EndingKind, Wire, WireEnd};

use codec::{Attributes, Request};
use file::{SftpFile, file_stat};
use further::SharedSession;
use program::Program;
use session::{SessionOptions, SftpSession};

use crate::contract::{
    Access, Applied, Capabilities, FileStat, FreeSpace, OpenedAndRead, PastState, Question, Store,
    StoreFile,
};
use crate::text::printable;
use crate::{FileName, StoreError};

/// How to reach an SFTP server.
#[derive(Debug)]
#[non_exhaustive]
pub struct SftpOptions {
    /// Program and arguments that provide an SFTP server on their standard input and output; run
    /// once per channel. See [`SshTarget::argv`].
    pub program: Vec<OsString>,
    /// The server's name, for messages.
    pub host: String,
    /// The folder on the server: absolute, or relative to the account's home.
    pub folder: String,
    /// Most connections, at least 1; default 4. The first one carries everything until more is
    /// queued than it carries in one round trip. Then all others are begun, in the background, for
    /// writes and read-ahead. If the server refuses one, the session goes on without it.
    pub connections: usize,
    /// Descriptors that stay open as long as any of the spawned programs runs (the write journal's
    /// flock).
    pub inherit_fds: Vec<OwnedFd>,
    /// If an answer is pending and no byte of it arrives for this long, the connection counts as
    /// lost; default 60 s.
    pub answer_timeout: Duration,
    /// The same while an fsync is pending, which may take long on a slow disk; default 10 min.
    pub flush_timeout: Duration,
    /// Let [`StoreFile::flush`] succeed, without durability, on a server without
    /// `fsync@openssh.com`. Only if the user explicitly allows it; default false.
    pub insist_without_fsync: bool,
    /// Asked ahead as soon as the server has greeted: see [`Store::ask_ahead`]. Default none.
    pub questions: Vec<Question>,
}

impl SftpOptions {
    /// The defaults for `program`, `host` and `folder`.
    #[must_use]
    pub fn new(program: Vec<OsString>, host: &str, folder: &str) -> Self {
        Self {
            program,
            host: host.to_owned(),
            folder: folder.to_owned(),
            connections: 4,
            inherit_fds: Vec::new(),
            answer_timeout: Duration::from_secs(60),
            flush_timeout: Duration::from_secs(600),
            insist_without_fsync: false,
            questions: Vec::new(),
        }
    }
}

/// A folder on an SFTP server.
///
/// Once any of its connections is lost, or the server breaks the protocol, the store and all its
/// files are dead and every call fails: connect again and open again. Files keep the connection for
/// as long as they exist. Only an agent can `discard`; see [`Puncher`].
#[derive(Debug)]
pub struct SftpStore {
    session: Arc<SharedSession>,
}

impl SftpStore {
    /// Connects the first channel and checks the folder, which must exist.
    pub fn connect(options: SftpOptions) -> Result<Self, StoreError> {
        let_inherit(&options.inherit_fds, &options.host)?;
        let hold_fds = !options.inherit_fds.is_empty();
        let program = Program::new(options.program.clone(), &options.host, hold_fds);
        Self::connect_over(Box::new(program), options)
    }

    /// The same over wires of any kind; [`SftpOptions::program`] is not used.
    pub fn connect_over(dial: Box<dyn Dial>, options: SftpOptions) -> Result<Self, StoreError> {
        let session = SftpSession::connect(
            dial,
            SessionOptions {
                host: printable(options.host.as_bytes()),
                folder: options.folder,
                further: options.connections.saturating_sub(1),
                patience: SessionOptions::patience(options.answer_timeout, options.flush_timeout),
                insist_without_fsync: options.insist_without_fsync,
                questions: options.questions,
            },
            options.inherit_fds,
        )?;
        Ok(Self { session })
    }

    /// How many connections beyond the first are in use, and why one can't be used.
    #[must_use]
    pub fn further_connections(&self) -> (usize, Option<String>) {
        self.session.further_state()
    }

    fn lstat(&self, op: &'static str, name: &FileName) -> Result<Attributes, StoreError> {
        let (object, path) = (self.session.object(name), self.session.path(name));
        self.session
            .call(op, &object)
            .attributes(&Request::Lstat { path: &path })
    }

    fn exists(&self, op: &'static str, name: &FileName) -> Result<bool, StoreError> {
        match self.lstat(op, name) {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn file_stat_of(&self, name: &FileName, found: &Attributes) -> Result<FileStat, StoreError> {
        file_stat(found).ok_or_else(|| StoreError::Unsupported {
            op: "stat",
            object: self.session.object(name),
            reason: "the server reports no file lengths".to_owned(),
        })
    }

    /// Checks whether a bare FAILURE means that `name` existed already.
    fn explain_with(&self, error: StoreError, op: &'static str, name: &FileName) -> StoreError {
        if matches!(error, StoreError::Refused { .. }) && self.exists(op, name).unwrap_or(false) {
            return StoreError::AlreadyExists {
                op,
                object: self.session.object(name),
            };
        }
        self.session.explain(error)
    }
}

impl SftpStore {
    /// A file system that became read-only refuses an open for writing with a bare FAILURE, too.
    fn explain_opened(&self, error: StoreError, access: Access) -> StoreError {
        match access {
            Access::ReadOnly => error,
            Access::ReadWrite => self.session.explain(error),
        }
    }
}

impl Store for SftpStore {
    fn describe(&self) -> String {
        self.session.describe()
    }

    fn capabilities(&self) -> Capabilities {
        let extensions = &self.session.extensions;
        Capabilities {
            durable_flush: extensions.fsync,
            discard: extensions.agent.is_some(),
            free_space: extensions.statvfs,
            atomic_replace: extensions.posix_rename,
        }
    }

    fn open(&self, name: &FileName, access: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        let opened = SftpFile::open(&self.session, name, access);
        Ok(Arc::new(
            opened.map_err(|error| self.explain_opened(error, access))?,
        ))
    }

    fn create_new(&self, name: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        match SftpFile::create_new(&self.session, name) {
            Ok(file) => {
                self.session.note_new_name(name);
                Ok(Arc::new(file))
            }
            Err(error) => Err(self.explain_with(error, "create", name)),
        }
    }

    fn stat(&self, name: &FileName) -> Result<FileStat, StoreError> {
        self.file_stat_of(name, &self.lstat("stat", name)?)
    }

    fn rename(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        if !self.session.extensions.posix_rename {
            if self.exists("rename", to)? {
                return Err(StoreError::Unsupported {
                    op: "rename",
                    object: self.session.object(to),
                    reason: "the server has no posix-rename@openssh.com".to_owned(),
                });
            }
            return self.rename_new(from, to);
        }
        self.session.note_rename(from);
        self.session.note_rename(to);
        let object = self.session.object(from);
        let (old, new) = (self.session.path(from), self.session.path(to));
        let request = Request::PosixRename {
            from: &old,
            to: &new,
        };
        let outcome = self.session.call("rename", &object).status(&request);
        outcome.map_err(|error| self.session.explain(error))?;
        self.session.note_new_name(to);
        Ok(())
    }

    fn rename_new(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        // The draft demands a failure if `to` exists. OpenSSH implements that without a race (link
        // and unlink). This check is for servers that don't.
        if self.exists("rename", to)? {
            let object = self.session.object(to);
            return Err(StoreError::AlreadyExists {
                op: "rename",
                object,
            });
        }
        self.session.note_rename(from);
        self.session.note_rename(to);
        let object = self.session.object(from);
        let (old, new) = (self.session.path(from), self.session.path(to));
        let request = Request::Rename {
            from: &old,
            to: &new,
        };
        let outcome = self.session.call("rename", &object).status(&request);
        outcome.map_err(|error| self.explain_with(error, "rename", to))?;
        self.session.note_new_name(to);
        Ok(())
    }

    fn remove(&self, name: &FileName) -> Result<(), StoreError> {
        self.session.note_rename(name);
        let (object, path) = (self.session.object(name), self.session.path(name));
        let outcome = self
            .session
            .call("remove", &object)
            .status(&Request::Remove { path: &path });
        outcome.map_err(|error| self.session.explain(error))
    }

    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        let place = self.describe();
        let call = self.session.call("list", &place);
        let handle = call.handle(&Request::Opendir {
            path: self.session.folder_path(),
        })?;
        let names = call.names(&handle);
        self.session
            .first
            .send_unanswered(&Request::Close { handle: &handle });
        names
    }

    fn flush_folder(&self) -> Result<(), StoreError> {
        self.session.flush_folder()
    }

    fn read_small(
        &self,
        name: &FileName,
        access: Access,
        len_max: usize,
    ) -> Result<(FileStat, Vec<u8>), StoreError> {
        let read = self.session.read_small(name, access, len_max);
        let (found, bytes) = read.map_err(|error| self.explain_opened(error, access))?;
        Ok((self.file_stat_of(name, &found)?, bytes))
    }

    fn create_filled(&self, name: &FileName, content: &[u8]) -> Result<Applied, StoreError> {
        self.create_filled_asking(name, content, &[])
    }

    fn create_filled_asking(
        &self,
        name: &FileName,
        content: &[u8],
        behind: &[Question],
    ) -> Result<Applied, StoreError> {
        self.session
            .create_filled(name, content, behind)
            .map_err(|error| self.explain_with(error, "create", name))
    }

    fn ask_ahead(&self, questions: &[Question]) {
        self.session.ask_ahead(questions);
    }

    fn forget_ahead(&self) {
        self.session.first.ahead.forget();
    }

    fn open_and_read(
        &self,
        name: &FileName,
        access: Access,
        ranges: &[(u64, usize)],
    ) -> Result<OpenedAndRead, StoreError> {
        let opened = SftpFile::open_and_read(&self.session, name, access, ranges);
        let (file, ranges) = opened.map_err(|error| self.explain_opened(error, access))?;
        Ok(OpenedAndRead {
            ranges,
            stat: self.file_stat_of(name, file.as_opened())?,
            file: Arc::new(file),
        })
    }

    fn overwrite_and_stat(
        &self,
        name: &FileName,
        content: &[u8],
        next: &FileName,
    ) -> Result<Option<FileStat>, StoreError> {
        let found = self.session.overwrite_and_stat(name, content, next);
        let found = found.map_err(|error| self.session.explain(error))?;
        found
            .map(|found| self.file_stat_of(next, &found))
            .transpose()
    }

    fn prepare_overwrite(&self, name: &FileName) {
        self.session.prepare_overwrite(name);
    }

    fn remove_durably(&self, name: &FileName) -> Result<Applied, StoreError> {
        self.session.remove_durably(name)
    }

    fn copy_ranges(
        &self,
        from: &FileName,
        to: &FileName,
        ranges: &[Range<u64>],
    ) -> Result<(), StoreError> {
        copy::ranges(&self.session, from, to, ranges).map_err(|error| self.session.explain(error))
    }

    fn copy_owner_and_mode(&self, from: &FileName, to: &FileName) -> Result<(), StoreError> {
        copy::owner_and_mode(&self.session, from, to).map_err(|error| self.session.explain(error))
    }

    fn set_witness(&self, name: &FileName) {
        self.session.set_witness(name);
    }

    fn disconnect(&self, reason: &str) {
        self.session.end(&Ending {
            kind: EndingKind::Lost,
            reason: reason.to_owned(),
        });
    }

    fn agent(&self) -> Option<String> {
        Some(self.session.extensions.agent?.as_text())
    }

    fn refuse_earlier(&self, name: &FileName) -> Result<bool, StoreError> {
        agent::refuse_earlier(&self.session, name)
    }

    fn note_end(&self, name: &FileName) {
        agent::note_end(&self.session, name);
    }

    fn past_states(&self, name: &FileName) -> Result<Option<Vec<PastState>>, StoreError> {
        agent::past_states(&self.session, name)
    }

    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        let space = self.session.statvfs("free space")?;
        Ok(FreeSpace {
            available_bytes: space.available_bytes,
            total_bytes: space.total_bytes,
            read_only: space.read_only,
        })
    }
}

/// Keeps descriptors open in the programs that are started from now on.
fn let_inherit(fds: &[OwnedFd], host: &str) -> Result<(), StoreError> {
    for fd in fds {
        rustix::io::fcntl_setfd(fd, FdFlags::empty()).map_err(|errno| StoreError::Io {
            op: "connect",
            object: printable(host.as_bytes()),
            source: errno.into(),
        })?;
    }
    Ok(())
}
