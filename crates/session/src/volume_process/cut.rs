//! Cuts the container file behind its file system, which was shrunk before.

use sprat_store::Access;
use sprat_volume::Flush;

use crate::volume_process::Served;
use crate::volume_process::extend_file::{may_be_resized, note_resize};
use crate::volume_process::trim::read_super;
use crate::{Exit, Failure, text};

impl Served {
    /// Nothing is mounted any more: makes everything durable, and cuts the file to `wanted_bytes`.
    ///
    /// The file system already ends before that. So a file that keeps its old length works, too.
    pub(super) fn cut(&mut self, wanted_bytes: u64) -> Result<(), Failure> {
        self.wait_until_unmounted()?;
        let file_system = read_super(&self.device)?.len_bytes();
        let offset = self.facts.pins.payload_offset_bytes;
        let needed_bytes = file_system.and_then(|bytes| bytes.checked_add(offset));
        // A shorter file would not have all of the file system.
        if needed_bytes.is_none_or(|needed| needed > wanted_bytes) {
            return Err(Failure::new(
                Exit::Damaged,
                "the file system in the container did not become smaller, so the file was not cut",
            )
            .with_hint("the container works as before"));
        }
        self.check_may_give_back("the container works as before, and keeps its length")?;
        self.volume.flush(Flush::Durable)?;
        // Nothing waits for the volume any more. What it has read is not kept: the length is part of the state that
        // the cache belongs to.
        self.close_volume()?;
        self.lease.verify()?;
        self.knowledge.begin_cut(wanted_bytes)?;
        // A later session may have made the file longer again when a late cut arrives. So the next one waits.
        note_resize(&self.lease)?;
        let store = self.lease.store();
        let file = store.open(self.lease.file_name(), Access::ReadWrite)?;
        if let Err(error) = file.resize(wanted_bytes) {
            if !error.was_answered() {
                return Err(may_be_resized(&error));
            }
            self.lease.all_resolved()?;
            return Err(Failure::from(&error).with_hint(format!(
                "the container works as before, and its file still has {}. The file system in it is shorter \
                 now, and the server does not let this account cut the file. sprat's agent never does. Cut it \
                 on the server while no session is open: `truncate --size={wanted_bytes} FILE`. \
                 `sprat grow` undoes the change",
                text::bytes(self.facts.file_bytes),
            )));
        }
        file.flush()?;
        self.lease.all_resolved()?;
        self.facts.file_bytes = wanted_bytes;
        self.facts.volume_bytes = wanted_bytes - offset;
        Ok(())
    }
}
