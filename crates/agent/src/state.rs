//! What all processes that write a container share: its state's record, and its locks.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;

use crate::disk::{Flock, Slots, bad, field, if_whole, number};

/// What the file `state` says; written only under `gate`, exclusive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// The session that may write. Processes of an earlier one are refused.
    pub session: u64,
    /// The last session that refused its predecessors.
    pub fence: u64,
    /// A session writes, or ended without an orderly end.
    pub writing: bool,
    /// The container at the last orderly end.
    pub file: Option<FileId>,
    /// Generations that sessions may begin, in thousandths, and when they were counted.
    pub tokens_milli: u64,
    pub tokens_at_s: i64,
    /// When the next secret moment is, by the counted clock.
    pub secret_due_s: i64,
    /// When the newest generation was begun, by the counted clock.
    pub begun_s: i64,
    /// The client said that it left the container in order.
    pub clean: bool,
    /// Why a generation has to begin before anything is written: `session` or `written-past`. Empty: it has begun, or
    /// the policy lets the one before it go on.
    pub due: String,
    /// When a client said so last, by the wall clock; 0: never.
    pub clean_s: i64,
    /// The blocks that had data at the last orderly end, if there were many: the checksum of the file `left`. Gone
    /// before the first write of the next session.
    pub left: Option<u32>,
}

/// What shows that a file is the same and unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    pub inode: u64,
    pub len: u64,
    pub modified: (i64, i64),
    /// The time of the inode, which nobody can set back.
    pub changed: (i64, i64),
}

impl FileId {
    pub fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self {
            inode: found.ino(),
            len: found.size(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }
}

impl State {
    /// Whether something else than the agent changed the container since the last session ended in order. After a
    /// session that did not, only another file is known to be one. Another owner or mode is no change.
    pub fn is_changed(&self, container: FileId) -> bool {
        self.file.is_some_and(|left| {
            let is_same = (left.len, left.modified) == (container.len, container.modified);
            left.inode != container.inode || !self.writing && !is_same
        })
    }

    pub fn to_text(&self) -> String {
        let mut text = format!(
            "session {}\nfence {}\nwriting {}\ntokens {}\ntokens-at {}\nsecret-due {}\nbegun {}\nclean {}\nclean-at {}\n\
             due {}\n",
            self.session,
            self.fence,
            self.writing,
            self.tokens_milli,
            self.tokens_at_s,
            self.secret_due_s,
            self.begun_s,
            self.clean,
            self.clean_s,
            self.due
        );
        if let Some(file) = self.file {
            let ((s, ns), (changed_s, changed_ns)) = (file.modified, file.changed);
            text += &format!(
                "inode {}\nlen {}\nmodified {s}\nmodified-ns {ns}\nchanged {changed_s}\nchanged-ns {changed_ns}\n",
                file.inode, file.len
            );
        }
        if let Some(crc) = self.left {
            text += &format!("left {crc}\n");
        }
        text
    }

    fn parse(text: &str) -> Option<Self> {
        let file = || {
            Some(FileId {
                inode: number(text, "inode")?,
                len: number(text, "len")?,
                modified: (number(text, "modified")?, number(text, "modified-ns")?),
                changed: (number(text, "changed")?, number(text, "changed-ns")?),
            })
        };
        Some(Self {
            session: number(text, "session")?,
            fence: number(text, "fence")?,
            writing: number(text, "writing")?,
            file: file(),
            tokens_milli: number(text, "tokens")?,
            tokens_at_s: number(text, "tokens-at")?,
            secret_due_s: number(text, "secret-due")?,
            begun_s: number(text, "begun")?,
            clean: number(text, "clean")?,
            clean_s: number(text, "clean-at")?,
            due: field(text, "due")?.to_owned(),
            left: number(text, "left"),
        })
    }
}

/// The locks of a container.
#[derive(Debug)]
pub struct Locks {
    pub gate: Flock,
    pub save: Flock,
    /// Exclusive while generations are sealed, merged or removed.
    pub tidy: Flock,
}

impl Locks {
    pub fn open(folder: &OwnedFd) -> io::Result<Self> {
        Ok(Self {
            gate: Flock::open(folder, "gate")?,
            save: Flock::open(folder, "save")?,
            tidy: Flock::open(folder, "tidy")?,
        })
    }
}

/// The state's record of a container.
pub fn read_state(slots: &Slots) -> io::Result<State> {
    match slots.read()? {
        Some((_, text)) => State::parse(&text).ok_or_else(|| bad("the state is damaged")),
        None => Ok(State::default()),
    }
}

/// The same. `None`: the record is damaged, and nobody can write. Only `repair` makes a new one.
pub fn whole_state(container: &OwnedFd) -> io::Result<Option<State>> {
    if_whole(read_state(&Slots::open(container, "state")?))
}

/// The alarm of it, until the administrator confirms it.
pub const CHANGED_OUTSIDE: &str = "the container was changed by something else than sprat-agent";

/// Whether something else than the agent changed the container since the last session ended in order.
/// Where the record of the state is damaged, nobody knows: the past stays readable.
pub fn changed_outside(container: &OwnedFd, live: &File) -> io::Result<bool> {
    let Some(before) = whole_state(container)? else {
        return Ok(false);
    };
    // A session that begins meanwhile says so before it writes.
    Ok(before.is_changed(FileId::of(live)?) && whole_state(container)? == Some(before))
}
