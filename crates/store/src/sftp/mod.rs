//! A store on an SSH server: our own pipelined SFTP version 3 client.

mod target;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

pub use target::SshTarget;

use crate::contract::{Access, Capabilities, FileStat, FreeSpace, Store, StoreFile};
use crate::{FileName, StoreError};

/// How to reach an SFTP server.
#[derive(Debug)]
#[non_exhaustive]
pub struct SftpOptions {
    /// Program and arguments that give an SFTP server on their standard input and output; run
    /// once per channel. See [`SshTarget::argv`].
    pub program: Vec<OsString>,
    /// The server's name, for messages.
    pub host: String,
    /// The folder on the server: absolute, or relative to the account's home.
    pub folder: String,
    /// Channels for writes and read-ahead, besides the one for demand reads and everything else;
    /// default 4. Opened when the first large transfer comes.
    pub data_channels: usize,
    /// Descriptors that stay open as long as any of the spawned programs lives (the lock record's
    /// flock).
    pub inherit_fds: Vec<OwnedFd>,
    /// Without one byte of an answer for so long while one is owed, the line counts as lost;
    /// default 60 s.
    pub answer_timeout: Duration,
    /// The same while an fsync is owed, which may take long on a slow disk; default 10 min.
    pub flush_timeout: Duration,
    /// Lets [`StoreFile::flush`] succeed, without durability, on a server without
    /// `fsync@openssh.com`. For a user who insists; default false.
    pub insist_without_fsync: bool,
}

impl SftpOptions {
    /// The defaults for `program`, `host` and `folder`.
    #[must_use]
    pub fn new(program: Vec<OsString>, host: &str, folder: &str) -> Self {
        Self {
            program,
            host: host.to_owned(),
            folder: folder.to_owned(),
            data_channels: 4,
            inherit_fds: Vec::new(),
            answer_timeout: Duration::from_secs(60),
            flush_timeout: Duration::from_secs(600),
            insist_without_fsync: false,
        }
    }
}

/// A folder on an SFTP server. Once any of its connections is lost the store and all its files
/// are dead (`Disconnected`): connect again and open again.
#[derive(Debug)]
pub struct SftpStore {
    options: SftpOptions,
}

impl SftpStore {
    /// Connects the first channel and looks at the folder.
    pub fn connect(options: SftpOptions) -> Result<Self, StoreError> {
        let store = Self { options };
        Err(store.unsupported("connect"))
    }

    /// How many data channels are open at present, and why one could not be opened.
    #[must_use]
    pub fn data_channels(&self) -> (usize, Option<String>) {
        (0, None)
    }

    fn unsupported(&self, op: &'static str) -> StoreError {
        StoreError::Unsupported {
            op,
            object: self.describe(),
            reason: "not built yet".to_owned(),
        }
    }
}

impl Store for SftpStore {
    fn describe(&self) -> String {
        format!("ssh://{}/{}", self.options.host, self.options.folder)
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    fn open(&self, _: &FileName, _: Access) -> Result<Arc<dyn StoreFile>, StoreError> {
        Err(self.unsupported("open"))
    }
    fn create_new(&self, _: &FileName) -> Result<Arc<dyn StoreFile>, StoreError> {
        Err(self.unsupported("create"))
    }
    fn stat(&self, _: &FileName) -> Result<FileStat, StoreError> {
        Err(self.unsupported("stat"))
    }
    fn rename(&self, _: &FileName, _: &FileName) -> Result<(), StoreError> {
        Err(self.unsupported("rename"))
    }
    fn rename_new(&self, _: &FileName, _: &FileName) -> Result<(), StoreError> {
        Err(self.unsupported("rename"))
    }
    fn remove(&self, _: &FileName) -> Result<(), StoreError> {
        Err(self.unsupported("remove"))
    }
    fn list(&self) -> Result<Vec<FileName>, StoreError> {
        Err(self.unsupported("list"))
    }
    fn flush_folder(&self) -> Result<(), StoreError> {
        Err(self.unsupported("flush folder"))
    }
    fn free_space(&self) -> Result<FreeSpace, StoreError> {
        Err(self.unsupported("free space"))
    }
}

/// Text from the far end, made safe for a terminal: escaped, and cut to 300 characters.
pub(crate) fn printable(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let mut shown: String = text
        .trim()
        .chars()
        .take(300)
        .flat_map(char::escape_debug)
        .collect();
    if text.trim().chars().nth(300).is_some() {
        shown.push('…');
    }
    shown
}
