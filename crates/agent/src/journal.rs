//! What the sessions of a container did, a line of JSON each: `sessions.jsonl`.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::OFlags;

use crate::disk::{self, open_in};

const NAME: &str = "sessions.jsonl";
/// A longer journal is begun again; the one before stays as `sessions.jsonl.old`.
const BYTES_MAX: u64 = 5 << 20;

/// Appends to a container's journal.
#[derive(Debug)]
pub struct Journal {
    folder: OwnedFd,
    written: Cell<u64>,
}

impl Journal {
    pub fn open(folder: &OwnedFd) -> io::Result<Self> {
        Ok(Self {
            folder: folder.try_clone()?,
            written: Cell::new(0),
        })
    }

    /// Counts bytes that the client wrote.
    pub fn count(&self, bytes: u64) {
        self.written.set(self.written.get() + bytes);
    }

    /// Records what this process wrote.
    pub fn flush(&self, session: u64) -> io::Result<()> {
        self.line(session, &format!(",\"written\":{}", self.written.take()))
    }

    /// Records what happened. `text` has no quotes of its own.
    pub fn note(&self, session: u64, text: &str) -> io::Result<()> {
        self.line(session, &format!(",\"note\":{text:?}"))
    }

    fn line(&self, session: u64, rest: &str) -> io::Result<()> {
        let mut file = self.file()?;
        if file.metadata()?.size() > BYTES_MAX {
            rustix::fs::renameat(&self.folder, NAME, &self.folder, "sessions.jsonl.old")?;
            file = self.file()?;
        }
        let at = crate::clock::reading("").wall_s;
        let address = std::env::var("SSH_CONNECTION").unwrap_or_default();
        let address: String = address
            .chars()
            .take_while(|c| c.is_ascii_hexdigit() || ".:%".contains(*c))
            .take(64)
            .collect();
        let written = file.write_all(
            format!("{{\"at\":{at},\"session\":{session},\"from\":\"{address}\"{rest}}}\n")
                .as_bytes(),
        );
        // A full disk stops no session for a line of this.
        disk::unless_full(written).map(drop)
    }

    fn file(&self) -> io::Result<File> {
        open_in(
            &self.folder,
            NAME,
            OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE,
        )
    }
}
