//! What an open file is, and the further connections that joined it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::contract::Access;
use crate::join::join;
use crate::sftp::channel::Channel;
use crate::sftp::codec::{Attributes, OpenFor, Request};
use crate::sftp::session::{Call, SftpSession};
use crate::{FileName, IgnorePoison, StoreError};

/// A writer may be growing the file while a further connection opens it.
const ATTEMPTS: u32 = 3;

/// A file that was opened on the first channel, and again on those that joined it.
pub(in crate::sftp) struct OpenFile {
    name: FileName,
    pub(super) object: String,
    path: String,
    pub(super) access: Access,
    /// [`SftpSession::renames_of`] when it was opened.
    renames: u64,
    opened: Attributes,
    pub(super) first: Arc<Handle>,
    /// One for each further connection.
    slots: Vec<Mutex<Slot>>,
    /// It wants further connections.
    wanted: AtomicBool,
}

pub(in crate::sftp) struct Handle {
    pub(super) bytes: Vec<u8>,
    /// A write on it was answered since its last fsync started.
    pub(super) unsynced: AtomicBool,
}

impl Handle {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes,
            unsynced: AtomicBool::new(false),
        }
    }
}

/// This file on one further connection.
#[derive(Default)]
enum Slot {
    #[default]
    NotJoined,
    Joined(Arc<Handle>),
    /// The connection can't be used for it.
    Unusable,
    /// The file was closed.
    Closed,
}

impl OpenFile {
    /// Calls `behind` with the handle, to ask more while the open file is checked.
    pub(super) fn open(
        session: &SftpSession,
        name: &FileName,
        access: Access,
        (op, how): (&'static str, OpenFor),
        behind: &mut dyn FnMut(&[u8]),
    ) -> Result<Self, StoreError> {
        let (object, path) = (session.object(name), session.path(name));
        let renames = session.renames_of(name);
        let first = &session.first;
        let (bytes, opened) = session.open_file_asking(first, op, &object, &path, how, behind)?;
        let slots = (0..session.further.number()).map(|_| Mutex::default());
        Ok(Self {
            name: name.clone(),
            object,
            path,
            access,
            renames,
            opened,
            first: Arc::new(Handle::new(bytes)),
            slots: slots.collect(),
            wanted: AtomicBool::new(false),
        })
    }

    /// The attributes when it was opened.
    pub(super) fn as_opened(&self) -> &Attributes {
        &self.opened
    }

    /// Records that further connections are wanted. Returns false if that was recorded before.
    pub(in crate::sftp) fn begin_to_want(&self) -> bool {
        !self.wanted.swap(true, Ordering::SeqCst)
    }

    /// Whether further connection `index` has still to join.
    pub(in crate::sftp) fn awaits(&self, index: usize) -> bool {
        matches!(*self.slot(index), Slot::NotJoined)
    }

    /// The handle on further connection `index`, if it has joined.
    pub(super) fn joined(&self, index: usize) -> Option<Arc<Handle>> {
        match &*self.slot(index) {
            Slot::Joined(handle) => Some(Arc::clone(handle)),
            _ => None,
        }
    }

    /// Whether a further connection has joined.
    pub(super) fn has_joined(&self) -> bool {
        (0..self.slots.len()).any(|index| matches!(*self.slot(index), Slot::Joined(_)))
    }

    fn slot(&self, index: usize) -> MutexGuard<'_, Slot> {
        self.slots[index].lock().ignore_poison()
    }

    /// Joins further connection `index`, or records that it can't be used for this file.
    pub(in crate::sftp) fn join(&self, session: &SftpSession, index: usize, channel: &Channel) {
        let (same_folder, handle) = join(
            || session.leads_to_the_same_folder(index, channel),
            || self.open_again(session, channel),
        );
        let mut slot = self.slot(index);
        let closed = matches!(*slot, Slot::Closed);
        match handle {
            Some(handle) if closed || !same_folder => {
                let handle = &handle.bytes;
                channel.send_unanswered(&Request::Close { handle });
            }
            Some(handle) if session.further.begin_use(index) => {
                *slot = Slot::Joined(Arc::new(handle));
            }
            _ => {}
        }
        if matches!(*slot, Slot::NotJoined) {
            *slot = Slot::Unusable;
        }
        drop(slot);
        session.first.wake();
    }

    /// Opens the file again by its name. It must be the same file, as far as SFTP v3 can tell: not
    /// renamed or removed by us, same owner, mode and length, and no other modification time than
    /// the first handle shows just before or just after. SFTP v3 has no inode numbers. A file that
    /// took the name since the first one was opened has another time: the writes of this session
    /// change that of the first one.
    pub(super) fn open_again(&self, session: &SftpSession, channel: &Channel) -> Option<Handle> {
        let how = match self.access {
            Access::ReadOnly => OpenFor::Reading,
            Access::ReadWrite => OpenFor::Writing,
        };
        for _ in 0..ATTEMPTS {
            let before = self.on_first(session)?;
            let (bytes, found) = session
                .open_file(channel, "open", &self.object, &self.path, how)
                .ok()?;
            let handle = Handle::new(bytes);
            let after = self.on_first(session);
            let is_same = |now: &Attributes| {
                (found.owner, found.mode) == (self.opened.owner, self.opened.mode)
                    && found.len == now.len
                    && (before.modified_s..=now.modified_s).contains(&found.modified_s)
            };
            let same = after.as_ref().is_some_and(is_same);
            if same && session.renames_of(&self.name) == self.renames {
                return Some(handle);
            }
            channel.send_unanswered(&Request::Close {
                handle: &handle.bytes,
            });
        }
        None
    }

    /// The attributes as the first channel shows them now.
    fn on_first(&self, session: &SftpSession) -> Option<Attributes> {
        let call = Call {
            channel: &session.first,
            op: "open",
            object: &self.object,
        };
        let handle = &self.first.bytes;
        call.attributes(&Request::Fstat { handle }).ok()
    }

    /// Closes all handles; what joins later closes its own.
    pub(super) fn close(&self, session: &SftpSession) {
        let handle = &self.first.bytes;
        session.first.send_unanswered(&Request::Close { handle });
        for index in 0..self.slots.len() {
            let slot = std::mem::replace(&mut *self.slot(index), Slot::Closed);
            if let (Slot::Joined(handle), Some(channel)) = (slot, session.further.channel(index)) {
                let handle = &handle.bytes;
                channel.send_unanswered(&Request::Close { handle });
            }
        }
    }
}
