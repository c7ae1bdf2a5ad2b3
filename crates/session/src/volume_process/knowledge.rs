//! This machine's state about the container during one session: compared before anything is
//! written, and recorded again at the end.

use std::collections::BTreeMap;
use std::sync::Arc;

use sprat_luks::{Header, HeaderBackup, HeaderRead, SectorCipher};

use crate::file_system::{FileSystemKind, FileSystemState};
use crate::protocol::messages::VolumeStart;
use crate::protocol::reports::{Finished, Notice};
use crate::settings::Access;
use crate::state::paths::StatePaths;
use crate::state::{Finding, KnownState, headers, older, snapshots};
use crate::volume_process::lease::ContainerLease;
use crate::volume_process::open::prefetch::Unlocked;
use crate::volume_process::shutdown::EventSender;
use crate::{Exit, Failure};

/// See the module.
pub(crate) struct Knowledge {
    paths: StatePaths,
    known: KnownState,
    slots: Option<BTreeMap<u32, String>>,
    /// The header, if it is newer than the one that this machine keeps.
    newer_header: Option<(Box<Header>, HeaderBackup)>,
    /// The key slot that opened.
    opened_by: Option<u32>,
    finding: Finding,
    found: Option<FileSystemState>,
    /// Decrypts the stamp block where the kernel decrypts the rest.
    cipher: Option<SectorCipher>,
    /// What this session sees must not be recorded: another session may be writing.
    unsure: bool,
    /// No other machine has had the lease since this machine had it last.
    own: bool,
    costs_hold: bool,
    /// The volume was searched for the snapshots that this machine remembers, and these were reported as gone.
    searched: Option<Vec<String>>,
}

impl Knowledge {
    /// Loads this machine's state.
    pub(super) fn new(
        start: &VolumeStart,
        lease: &Arc<ContainerLease>,
        Unlocked { header, key, slot }: &Unlocked,
    ) -> Result<Self, Failure> {
        let pins = header.pins();
        let paths = StatePaths::new(
            &start.settings.state_dir,
            &pins.uuid,
            &start.settings.target,
        );
        Ok(Self {
            known: KnownState::load(&paths),
            paths,
            slots: header.slot_digests(),
            newer_header: None,
            opened_by: Some(*slot),
            finding: Finding::Unknown,
            found: None,
            cipher: match start.kernel {
                true => SectorCipher::of_pins(key, &pins)?,
                false => None,
            },
            unsure: start.settings.ignore_lock || lease.left_by_dead_session(),
            own: lease.follows_own(),
            costs_hold: false,
            searched: None,
        })
    }

    /// For a new container. Nothing is known of it.
    pub(super) fn of_new(
        start: &VolumeStart,
        header: &Header,
        cipher: Option<SectorCipher>,
    ) -> Self {
        Self {
            paths: StatePaths::new(
                &start.settings.state_dir,
                header.uuid(),
                &start.settings.target,
            ),
            known: KnownState::default(),
            slots: Some(header.slot_digests()),
            newer_header: None,
            opened_by: None,
            finding: Finding::Unknown,
            found: None,
            cipher,
            unsure: false,
            own: true,
            costs_hold: false,
            searched: None,
        }
    }

    /// Compares the state that the server shows with the known one. `stamp_block` is plaintext.
    /// `None`: only the kernel has its cipher, and nothing is compared.
    pub(super) fn compare(
        &mut self,
        start: &VolumeStart,
        stamp_block: Option<&[u8]>,
        file_bytes: u64,
        events: &EventSender,
    ) -> Result<(), Failure> {
        self.found = stamp_block.and_then(|block| FileSystemState::read(block, file_bytes));
        let stamp = self.found.as_ref().map(|found| &found.stamp);
        self.finding = self.known.compare(stamp, self.own);
        // Somebody else may have changed snapshots. Reading needs no writable state folder.
        self.costs_hold = self.finding == Finding::Same || self.paths.forget_costs().is_ok();
        if let Finding::Older { known, found } = &self.finding {
            if !start.settings.accept_older_state {
                return Err(older(&start.settings.target.to_string(), known, found));
            }
            events.notice(Notice::OlderStateAccepted);
        }
        if start.settings.access == Access::ReadWrite
            && let Some(errors) = self.errors()
        {
            return Err(met_errors(errors).with_hint(format!("nothing was written. {REPAIR}")));
        }
        let found = self.found.as_ref();
        if start.settings.access == Access::ReadWrite
            && let Some(why) = found.and_then(|found| found.unsupported.as_ref())
        {
            return Err(Failure::failed(
                "sprat does not write to the file system in the container",
            )
            .because(why)
            .with_hint("nothing was written. `restore` and `mount` still work"));
        }
        Ok(())
    }

    /// Errors that the file system had met before the session.
    pub(super) fn errors(&self) -> Option<u32> {
        self.found.as_ref()?.errors
    }

    /// Whether a check on this machine has reported the content of these blocks of the volume.
    pub(super) fn knows_overwritten(&self, blocks: &[u64]) -> bool {
        self.known.knows_overwritten(blocks)
    }

    /// The container is older than this machine knows it.
    pub(super) fn found_older(&self) -> bool {
        matches!(self.finding, Finding::Older { .. })
    }

    pub(super) fn written_elsewhere(&self) -> bool {
        self.finding == Finding::WrittenElsewhere
    }

    /// What `analyze` found in earlier sessions still holds.
    pub(super) fn costs_hold(&self) -> bool {
        self.costs_hold
    }

    /// The snapshots that must be in the volume.
    pub(super) fn expected(&self, start: &VolumeStart) -> BTreeMap<String, String> {
        match start.settings.accept_older_state {
            true => BTreeMap::new(),
            false => self.known.expected(&self.finding),
        }
    }

    /// Snapshots that this machine saw, and that may be gone.
    pub(super) fn uncertain(&self) -> BTreeMap<String, String> {
        self.known.uncertain(&self.finding)
    }

    /// The volume is mounted, and was searched for the snapshots that this machine remembers. `gone`: what was reported as
    /// gone. `None`: that could not be noted, and the next session searches again.
    pub(super) fn has_searched(&mut self, gone: Option<Vec<String>>) {
        self.searched = gone;
    }

    /// Records that this session is about to write. Must be called before anything is sent.
    pub(super) fn begin_writing(&mut self) -> Result<(), Failure> {
        self.known.begin_writing(&self.paths, &self.finding)
    }

    /// Records that the file is about to be cut. Otherwise a state that was cut, and whose session did not end in
    /// order, would look like one that was cut short.
    pub(super) fn begin_cut(&mut self, file_bytes: u64) -> Result<(), Failure> {
        // The state at the end, if this session writes no other: an interrupted one may have shrunk the file system.
        if let Some(found) = &mut self.found {
            found.stamp.file_bytes = found.stamp.file_bytes.min(file_bytes);
        }
        self.known.begin_cut(&self.paths, file_bytes)
    }

    /// Records the state in which the session leaves the container. All writes are durable, and the
    /// file has this length. `stamp_block` is the block as it was last written, of this kind:
    /// plaintext, unless the kernel decrypts. An error: the file system has met errors in this
    /// session.
    pub(super) fn end_writing(
        &mut self,
        stamp_block: Option<(FileSystemKind, Vec<u8>)>,
        file_bytes: u64,
        finished: Option<Finished>,
        events: &EventSender,
    ) -> Result<(), Failure> {
        let written = stamp_block.and_then(|(kind, mut block)| {
            if let Some(cipher) = &self.cipher {
                let at = kind.stamp_range().start;
                cipher.decrypt(at, &mut block).ok()?;
            }
            FileSystemState::read(&block, file_bytes)
        });
        let last = written.or_else(|| self.found.clone());
        let errors = last.as_ref().and_then(|last| last.errors);
        let stamp = last.map(|last| last.stamp);
        let newest = finished.as_ref().map(|finished| {
            let named = finished.iter();
            named
                .filter_map(|(job, names)| Some((job.clone(), names.last()?.to_string())))
                .collect()
        });
        let noted =
            self.known
                .end_writing(&self.paths, stamp.clone(), newest, self.searched.as_deref());
        report_unrecorded(noted.and_then(|()| self.accept_slots(events)), events);
        if let (Some(stamp), Some(finished)) = (stamp, finished)
            && let Err(error) = snapshots::note(&self.paths, stamp, finished)
        {
            // Without the note, commands open the container.
            tracing::warn!(%error, "this machine can't note which snapshots there are");
        }
        match errors {
            None => Ok(()),
            Some(errors) => Err(met_errors(errors).with_hint(format!(
                "the last data of this session may be lost. {REPAIR}"
            ))),
        }
    }

    /// Records the state that a read-only session has seen. PrefetchThread needs no writable state folder,
    /// so a failure to record is ignored.
    pub(super) fn end_reading(&mut self, events: &EventSender) {
        // If there is no known file system, this may be another container's header. It is not
        // trusted.
        if self.unsure || self.found.is_none() {
            return;
        }
        let stamp = self.found.as_ref().map(|found| found.stamp.clone());
        let noted =
            self.known
                .end_reading(&self.paths, &self.finding, stamp, self.searched.as_deref());
        let _ = noted.and_then(|()| self.accept_slots(events));
    }

    /// The header as this session has found it, to be kept when its slots are accepted: another machine may have added a
    /// key. What can't be read now is kept by a later session.
    pub(super) fn found_header(&mut self, header: Box<Header>, source: &dyn HeaderRead) {
        match headers::newer(&self.paths, &header, source) {
            Ok(newer) => self.newer_header = newer.map(|backup| (header, backup)),
            Err(failure) => tracing::warn!(%failure, "the newer header can't be read"),
        }
    }

    fn accept_slots(&mut self, events: &EventSender) -> Result<(), Failure> {
        if let Some(slots) = self.slots.clone() {
            self.known.accept_slots(&self.paths, slots)?;
        }
        if let Some((header, backup)) = self.newer_header.take()
            && let Some(kept) = headers::keep_newer(&self.paths, &header, &backup)?
        {
            events.kept_header(kept);
        }
        match self.opened_by {
            Some(slot) => self.known.note_opened_by(&self.paths, slot),
            None => Ok(()),
        }
    }
}

/// Reports what could not be recorded. The container is complete; the next session only knows less
/// of it.
pub(super) fn report_unrecorded(noted: Result<(), Failure>, events: &EventSender) {
    if let Err(failure) = noted {
        let causes = failure.causes.join("; ");
        events.notice(Notice::NotNoted {
            reason: format!("{}: {causes}", failure.what),
        });
    }
}

const REPAIR: &str = "Files can still be restored. To repair the file system, open the container \
                      file with `cryptsetup open`, and run `e2fsck -f` on the mapped device. Then \
                      run `sprat check --read-data`";

fn met_errors(errors: u32) -> Failure {
    let count = match errors {
        1 => "an error".to_owned(),
        more => format!("{more} errors"),
    };
    Failure::new(
        Exit::Damaged,
        format!(
            "the kernel found {count} in the container's file system, which is marked as faulty"
        ),
    )
}
