//! Writing: one batch of WRITE requests of a handle, by the kind of its file.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{AtFlags, FlockOperation};

use super::{Batch, Handle, Server};
use crate::disk;
use crate::keeper::Keeper;
use crate::names::{Kind, Name};
use crate::wire::{self, Status};

const LEASE_BYTES_MAX: u64 = 4096;
const LATE_BYTES_MAX: u64 = 16 << 20;
const RESERVE_BYTES_MAX: u64 = 64 << 20;

/// Writing.
impl Server {
    pub(super) fn write(&mut self, batch: Batch<'_>, answers: &mut Vec<u8>) {
        if batch.ids.is_empty() {
            return;
        }
        let outcome = self.write_batch(batch.handle, &batch.writes);
        let status = outcome.err().unwrap_or(Status::Ok);
        for id in batch.ids {
            answers.extend(wire::status(id, status));
        }
    }

    fn write_batch(&mut self, handle: &[u8], writes: &[(u64, &[u8])]) -> Result<(), Status> {
        let (name, file) = self.writable(handle)?;
        let mut ends = writes
            .iter()
            .map(|(offset, data)| offset.checked_add(data.len() as u64));
        let end = ends
            .try_fold(0, |max, end| Some(max.max(end?)))
            .ok_or(Status::Denied)?;
        let kind = name.kind;
        let most = match kind {
            Kind::Container => file.metadata()?.size(),
            _ => self.len_max(kind),
        };
        if end > most {
            return Err(Status::Denied);
        }
        match kind {
            Kind::Container => Ok(self.keeper(&name.container)?.write(&file, writes)?),
            Kind::HalfMade | Kind::Rewrite => self.write_half_made(handle, &name, &file, writes),
            _ => Ok(self.write_plain(&file, writes)?),
        }
    }

    /// The file of a handle that may write.
    pub(super) fn writable(&self, handle: &[u8]) -> Result<(Name, File), Status> {
        let number = wire::handle_number(handle).ok_or(Status::Failure)?;
        match self.handles.get(&number) {
            Some(Handle::File {
                name,
                file,
                writes: true,
            }) => Ok((name.clone(), file.try_clone()?)),
            _ => Err(Status::Denied),
        }
    }

    fn len_max(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Lease(_) => LEASE_BYTES_MAX,
            Kind::LateList => LATE_BYTES_MAX,
            Kind::Reserve => RESERVE_BYTES_MAX,
            Kind::Container | Kind::HalfMade | Kind::Rewrite => self.root.policy.size_max,
        }
    }

    pub(super) fn keeper(&mut self, container: &str) -> Result<&mut Keeper, Status> {
        if !self.keepers.contains_key(container) {
            let keeper = self.root.keeper(container)?;
            self.keepers.insert(container.to_owned(), keeper);
        }
        self.keepers.get_mut(container).ok_or(Status::Failure)
    }

    fn write_plain(&self, file: &File, writes: &[(u64, &[u8])]) -> io::Result<()> {
        let bytes = writes.iter().map(|(_, data)| data.len() as u64).sum();
        // What is written again takes no space: a lease is renewed on a full disk.
        if writes.iter().any(|(offset, data)| {
            offset + data.len() as u64 > file.metadata().map_or(0, |file| file.size())
        }) {
            self.root.space.check(bytes, 0)?;
        }
        for (offset, data) in writes {
            file.write_all_at(data, *offset)?;
        }
        Ok(())
    }

    /// A handle belongs to the file, not to its name: if the file has become the container meanwhile, by
    /// whatever process, it is written as the container.
    fn write_half_made(
        &mut self,
        handle: &[u8],
        name: &Name,
        file: &File,
        writes: &[(u64, &[u8])],
    ) -> Result<(), Status> {
        // A rename takes this lock exclusively.
        let locked = disk::lock(file, FlockOperation::LockShared)?;
        if self.is_named(file, &name.text)? {
            return Ok(self.write_plain(file, writes)?);
        }
        drop(locked);
        if !self.is_named(file, &name.container)? {
            return Err(Status::Failure);
        }
        let born = Name {
            text: name.container.clone(),
            kind: Kind::Container,
            ..name.clone()
        };
        if let Handle::File { name, .. } = self.handle(handle)? {
            *name = born;
        }
        self.write_batch(handle, writes)
    }

    fn is_named(&self, file: &File, name: &str) -> io::Result<bool> {
        let found = file.metadata()?;
        match rustix::fs::statat(&self.root.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) => Ok(named.st_ino == found.ino() && named.st_dev == found.dev()),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn set_len(&mut self, handle: &[u8], len: u64) -> Result<(), Status> {
        let (name, file) = self.writable(handle)?;
        let now = file.metadata()?.size();
        if len < now || len > self.len_max(name.kind) {
            return Err(Status::Denied);
        }
        if len == now {
            return Ok(());
        }
        match name.kind {
            Kind::Container => self.keeper(&name.container)?.grow(&file, len)?,
            _ => self.set_len_of(&name, &file, len)?,
        }
        Ok(())
    }

    /// The lock keeps the file from becoming a container meanwhile, and from being made longer by another
    /// process so that this would make it shorter.
    fn set_len_of(&self, name: &Name, file: &File, len: u64) -> io::Result<()> {
        let _locked = disk::lock(file, FlockOperation::LockExclusive)?;
        match self.is_named(file, &name.text)? {
            true if file.metadata()?.size() <= len => file.set_len(len),
            _ => Err(io::ErrorKind::PermissionDenied.into()),
        }
    }

    pub(super) fn sync(&mut self, handle: &[u8]) -> Result<(), Status> {
        match self.handle(handle)? {
            Handle::File { file, .. } => Ok(file.sync_all()?),
            Handle::Folder => Ok(disk::sync_folder(&self.root.folder)?),
            _ => Err(Status::Failure),
        }
    }
}
