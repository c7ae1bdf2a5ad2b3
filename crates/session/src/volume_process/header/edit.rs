//! Changes the header of a container, under its lease. At every instant at least one copy is
//! complete.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sprat_luks::{
    Extent, FormatOptions, Header, HeaderRead, HeaderWrite, LuksError, LuksErrorKind, Secret,
    SectorCipher, SlotKind, VolumeKey,
};
use sprat_store::{Access, Store, StoreErrorKind, StoreFile};

use crate::connect::HeaderBytes;
use crate::file_system::{FileSystemKind, file_system_bytes, read_stamp_block};
use crate::protocol::messages::{ChangeStart, VolumeStart};
use crate::protocol::reports::HeaderChanged;
use crate::protocol::reports::{Notice, Phase};
use crate::settings::IdentityPolicy;
use crate::state::headers::{self, Kept};
use crate::state::paths::StatePaths;
use crate::state::{self, KnownState};
use crate::volume_process::header::differs;
use crate::volume_process::knowledge;
use crate::volume_process::lease::{ContainerLease, keep_renewing};
use crate::volume_process::open::{
    ConnectedStore, VolumeHints, acquire, check_writable, connect_store, facts, open_volume,
    stat_container, wait_for_quiet,
};
use crate::volume_process::rewrite::prevent_late_rename;
use crate::volume_process::shutdown::{EventSender, StopFlag};
use crate::{Exit, Failure, generations};

const HALF_WAY: &str = "The container opens with every key that stays, and has all snapshots. Run the \
                        same command again: it continues where this one stopped";

/// The number of slots in LUKS2 (cryptsetup: lib/luks2/luks2.h, `LUKS2_KEYSLOTS_MAX`).
const SLOTS_MAX: usize = 32;

/// Carries the change out. After a failure no lease is left, unless writes may still be pending.
pub(crate) fn change(
    start: &VolumeStart,
    what: &ChangeStart,
    secrets: &[Secret],
    stop: &Arc<StopFlag>,
    events: &EventSender,
) -> Result<HeaderChanged, Failure> {
    events.phase(Phase::Connecting);
    let (record, connection, store) = connect_store(start)?;
    stop.check()?;
    check_writable(start, &*store, events)?;
    stat_container(start, &*store)?;
    let reached = ConnectedStore {
        record,
        connection,
        store,
        first: None,
    };
    let lease = acquire(start, reached, stop, events, || {})?;
    // The lease is read again before each write, so its loss needs no other handling.
    keep_renewing(&lease, stop)?;
    let may_come_late = lease.record().may_arrive();
    let mut changed = wait_for_quiet(start, &lease, stop, events).and_then(|()| {
        // A late rename would bring the old header back, and a removed key with it.
        if may_come_late || lease.late_requests_may_arrive() {
            prevent_late_rename(&lease)?;
        }
        HeaderEdit::begin(start, &lease, stop, events)?.carry_out(what, secrets)
    });
    if let Ok(changed) = &mut changed {
        // The change is durable, whatever the server answers.
        let (name, store) = (&start.settings.target.name, lease.store());
        let states = store.past_states(name).ok().flatten();
        let removed = matches!(what, ChangeStart::Remove { .. });
        changed.agent_note =
            states.map(|states| generations::note_of_key_change(name, &states, removed));
    }
    release(&lease, &mut changed);
    changed
}

/// Releases the lease after a change. It is done and durable, whatever becomes of the lease.
pub(crate) fn release(lease: &ContainerLease, changed: &mut Result<HeaderChanged, Failure>) {
    let released = lease.release();
    let Ok(changed) = changed else { return };
    changed.taken_over = lease.lost().map(|lost| lost.in_one_line());
    if changed.taken_over.is_none() {
        let left = released.err().map(|error| error.to_string());
        changed.lock_left = left.or_else(|| lease.left_locked());
    }
}

/// A container whose header is being changed.
pub(crate) struct HeaderEdit<'w> {
    pub(crate) start: &'w VolumeStart,
    pub(crate) lease: &'w Arc<ContainerLease>,
    store: Arc<dyn Store>,
    pub(crate) file: Arc<dyn StoreFile>,
    pub(crate) stop: &'w StopFlag,
    events: &'w EventSender,
}

/// The result of the change.
#[derive(Default)]
pub(crate) struct EditOutcome {
    slot: u32,
    as_before: bool,
    repaired: bool,
    /// The file that keeps the header which a restore replaced.
    replaced: Option<PathBuf>,
}

impl EditOutcome {
    /// A header was restored, and the replaced one is kept in this file.
    pub(crate) fn put_back(replaced: PathBuf) -> Self {
        Self {
            replaced: Some(replaced),
            ..Self::default()
        }
    }
}

impl<'w> HeaderEdit<'w> {
    pub(crate) fn begin(
        start: &'w VolumeStart,
        lease: &'w Arc<ContainerLease>,
        stop: &'w StopFlag,
        events: &'w EventSender,
    ) -> Result<Self, Failure> {
        stop.check()?;
        events.phase(Phase::Unlocking);
        let store = lease.store();
        let file = store.open(lease.file_name(), Access::ReadWrite)?;
        Ok(Self {
            start,
            lease,
            store,
            file,
            stop,
            events,
        })
    }

    pub(crate) fn carry_out(
        &self,
        what: &ChangeStart,
        secrets: &[Secret],
    ) -> Result<HeaderChanged, Failure> {
        let secret = |index: usize| {
            secrets
                .get(index)
                .ok_or_else(|| Failure::failed("a secret is missing"))
        };
        let (done, proof) = match what {
            ChangeStart::Add {
                kind,
                fast_kdf_for_tests,
            } => {
                let options = FormatOptions {
                    fast_kdf_for_tests: *fast_kdf_for_tests,
                    ..FormatOptions::default()
                };
                let done = self.add(secret(0)?, secret(1)?, *kind, &options)?;
                (done, secret(1)?)
            }
            ChangeStart::Remove {
                slot,
                although_in_use,
            } => {
                let used_here = secrets.get(1).filter(|_| !although_in_use);
                let (done, mark) = self.remove(*slot, *although_in_use, secret(0)?, used_here)?;
                return self.report(&done, Some(mark));
            }
            ChangeStart::Restore { kept, shown } => {
                let done = self.put_back(Path::new(kept), *shown, secret(0)?)?;
                (done, secret(0)?)
            }
        };
        let opened_by = self.read_again()?.unlock_by(&self.bytes(), proof)?.0;
        let slot = opened_by;
        self.report(&EditOutcome { slot, ..done }, None)
    }

    pub(crate) fn bytes(&self) -> HeaderBytes<'_> {
        HeaderBytes(&*self.file)
    }

    /// The current header, with both copies repaired and a dead session's writes recovered. The
    /// flag: a copy was repaired.
    fn present(&self) -> Result<(Header, bool), Failure> {
        let header = Header::load(&self.bytes()).map_err(|error| match error.kind() {
            LuksErrorKind::NoContainer | LuksErrorKind::Damaged => state::header_unreadable(
                self.state_dir(),
                &self.start.settings.target,
                &self.start.settings.pins,
                &error,
            ),
            _ => Failure::of_key_work(&error),
        })?;
        compare_with_pins(self.start, &header, self.events)?;
        self.recover(&header)?;
        let repair = header.repair()?;
        if repair.is_empty() {
            return Ok((header, false));
        }
        self.write(&repair)?;
        Ok((self.read_again()?, true))
    }

    /// Refuses to change keys in an old copy of the container. Also refuses a header that is seen
    /// for the first time and does not belong to the volume behind it, because it would be pinned.
    fn refuse_older(&self, header: &Header, key: &VolumeKey) -> Result<(), Failure> {
        let cipher = SectorCipher::new(key, header)?;
        let (block, file_bytes) = read_stamp_block(&*self.file, header, &cipher)?;
        if matches!(self.start.settings.pins, IdentityPolicy::TrustOnce)
            && file_system_bytes(&block).is_none()
        {
            return Err(Failure::new(
                Exit::Damaged,
                "either the header's key does not fit the volume, or the volume has no file system that sprat knows",
            )
            .with_hint(
                "nothing was changed, and this machine did not accept the header. Compare its \
                 fingerprint with the recovery sheet. If it is right, give it with --fingerprint",
            ));
        }
        if self.start.settings.accept_older_state {
            return Ok(());
        }
        let target = &self.start.settings.target;
        state::refuse_older(self.state_dir(), target, header.uuid(), &block, file_bytes)
    }

    /// Recovers a dead session's writes to the volume. The volume does that.
    pub(crate) fn recover(&self, header: &Header) -> Result<(), Failure> {
        let file_bytes = self.file.len()?;
        self.lease.learn(header.pins(), file_bytes);
        if self.lease.record().in_doubt().is_empty() {
            return Ok(());
        }
        let payload = header.geometry(file_bytes)?;
        let known = VolumeHints::default();
        let volume = open_volume(
            self.start,
            self.lease,
            Arc::clone(&self.file),
            payload,
            known,
        )?;
        self.stop.reaches(&volume);
        volume
            .close()
            .map_err(|error| self.lease.lost().unwrap_or_else(|| Failure::from(&error)))?;
        self.lease.all_resolved()?;
        Ok(())
    }

    fn add(
        &self,
        present: &Secret,
        new: &Secret,
        kind: SlotKind,
        options: &FormatOptions,
    ) -> Result<EditOutcome, Failure> {
        let (header, repaired) = self.present()?;
        let opened = header.unlock_by(&self.bytes(), present);
        let (_, key) = opened.map_err(|error| Failure::of_key_work(&error))?;
        self.refuse_older(&header, &key)?;
        if let Some(slot) = self.opened_by(&header, new, kind)? {
            return Ok(EditOutcome {
                slot,
                as_before: true,
                repaired,
                ..EditOutcome::default()
            });
        }
        if header.slots().len() >= SLOTS_MAX {
            return Err(
                Failure::usage(format!("all {SLOTS_MAX} key slots are used")).with_hint(
                    "nothing was changed. Run `sprat key list` to see the slots, and `sprat key remove` \
                     to free one",
                ),
            );
        }
        let writes = header.add_slot(&key, new, kind, options, self.lease.turn())?;
        drop(key);
        self.change(&header, None, &writes)?;
        Ok(EditOutcome {
            repaired,
            ..EditOutcome::default()
        })
    }

    /// The slot that a key opens which is to be added.
    fn opened_by(
        &self,
        header: &Header,
        new: &Secret,
        kind: SlotKind,
    ) -> Result<Option<u32>, Failure> {
        // A new recovery key was never used before.
        if kind == SlotKind::Recovery {
            return Ok(None);
        }
        match header.unlock_by(&self.bytes(), new) {
            Ok((slot, _)) => Ok(Some(slot)),
            // A slot that can't be tried is no reason to refuse another one.
            Err(
                LuksError::KdfTooCostly { .. }
                | LuksError::KernelOnly { .. }
                | LuksError::NoMemory { .. },
            ) => Ok(None),
            Err(error) if error.kind() == LuksErrorKind::WrongSecret => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn remove(
        &self,
        slot: u32,
        although_in_use: bool,
        present: &Secret,
        used_here: Option<&Secret>,
    ) -> Result<(EditOutcome, String), Failure> {
        let (header, repaired) = self.present()?;
        let slots = header.slots();
        let opened = header.unlock_by(&self.bytes(), present);
        let (opened_by, key) = opened.map_err(|error| Failure::of_key_work(&error))?;
        self.refuse_older(&header, &key)?;
        drop(key);
        let done = |as_before| EditOutcome {
            slot,
            as_before,
            repaired,
            ..EditOutcome::default()
        };
        let Some(found) = slots.iter().find(|found| found.number == slot) else {
            // The dead session may have completed: it kept the header, as it was, first.
            if (repaired || self.lease.took_over())
                && let Some(mark) = self.mark_kept(&header, slot)
            {
                return Ok((done(true), mark));
            }
            return Err(Failure::usage(format!("there is no key slot {slot}"))
                .with_hint("nothing was changed. `sprat key list` shows the slots"));
        };
        if slots.len() == 1 {
            return Err(Failure::usage(format!("key slot {slot} is the last one"))
                .with_hint("nothing was changed. Add another key first: `sprat key add`"));
        }
        if opened_by == slot && !although_in_use {
            return Err(Failure::usage(format!(
                "the given key opens key slot {slot}"
            ))
            .with_hint(
                "nothing was changed. Give another key of this container with --key-file or \
                 --passphrase-file: that proves that the other key opens the container. If you are sure \
                 that you have another key, add --allow-in-use",
            ));
        }
        if let Some(used_here) = used_here
            && header.unlock_slot(&self.bytes(), used_here, slot).is_ok()
        {
            return Err(Failure::usage(format!(
                "the key of this machine's backups opens key slot {slot}"
            ))
            .with_hint(
                "nothing was changed. This key is in the config, or is the default key file. First set \
                 another key for the backups. To remove the slot anyway, add --allow-in-use",
            ));
        }
        let writes = header.remove_slot(slot, self.lease.turn())?;
        self.change(&header, Some(slot), &writes)?;
        let left = self.read_again()?;
        if opened_by != slot {
            left.unlock(&self.bytes(), present)?;
        }
        Ok((done(false), found.mark.clone()))
    }

    /// The mark of that slot in the newest header that this machine keeps, if the slot is there.
    fn mark_kept(&self, header: &Header, slot: u32) -> Option<String> {
        let path = headers::newest(&self.paths(header));
        let kept = headers::load(&headers::open(&path).ok()?, &path).ok()?;
        let mut slots = kept.slots().into_iter();
        slots.find_map(|kept| (kept.number == slot).then_some(kept.mark))
    }

    /// Where this machine keeps its state about the container.
    pub(crate) fn paths(&self, header: &Header) -> StatePaths {
        StatePaths::new(self.state_dir(), header.uuid(), &self.start.settings.target)
    }

    pub(crate) fn state_dir(&self) -> &Path {
        &self.start.settings.state_dir
    }

    /// Keeps the current header on this machine, then writes.
    fn change(
        &self,
        present: &Header,
        going: Option<u32>,
        writes: &[HeaderWrite],
    ) -> Result<(), Failure> {
        self.keep_newest(present, going)?;
        self.stop.check()?;
        self.write(writes)
    }

    fn keep_quietly(&self, header: &Header, going: Option<u32>) -> Result<Kept, Failure> {
        headers::keep_newest(&self.paths(header), header, &self.bytes(), going)
    }

    /// Keeps the header as the newest, and warns if slots have changed.
    fn keep_newest(&self, header: &Header, going: Option<u32>) -> Result<PathBuf, Failure> {
        let kept = self.keep_quietly(header, going)?;
        Ok(self.events.kept_header(kept))
    }

    /// As [`write_in_order`]. After the first write a request to stop is ignored: the rest is
    /// short.
    pub(crate) fn write(&self, writes: &[HeaderWrite]) -> Result<(), Failure> {
        self.note_slots_to_be(writes)?;
        self.events.phase(Phase::Syncing);
        write_in_order(self.lease, &*self.file, writes)
    }

    /// Records the slots as they will be. If the change is interrupted, the next session must not
    /// take it for a change by the server.
    fn note_slots_to_be(&self, writes: &[HeaderWrite]) -> Result<(), Failure> {
        let changed = Header::load(&Changed {
            present: self.bytes(),
            writes,
        })?;
        let paths = self.paths(&changed);
        KnownState::load(&paths).begin_changing_slots(&paths, changed.slot_digests())
    }

    /// The header as the server returns it on a new handle.
    fn read_again(&self) -> Result<Header, Failure> {
        let file = self.store.open(self.lease.file_name(), Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        if !header.copies().both_good() {
            return Err(Failure::new(
                Exit::Damaged,
                "a header copy reads back with other content than was written",
            )
            .with_hint(HALF_WAY));
        }
        Ok(header)
    }

    /// `mark`: that of the removed slot.
    fn report(&self, done: &EditOutcome, mark: Option<String>) -> Result<HeaderChanged, Failure> {
        let header = self.read_again()?;
        let removed = mark.as_ref().map(|_| done.slot);
        // A restore has shown the header before it replaced the current one, which is kept.
        let kept = match &done.replaced {
            Some(_) => self.keep_quietly(&header, removed).map(|kept| kept.path),
            None => self.keep_newest(&header, removed),
        };
        let slots = header.slots();
        let slot = slots.iter().find(|slot| slot.number == done.slot);
        let mark = mark.or_else(|| Some(slot?.mark.clone()));
        let file_bytes = self.file.len()?;
        let payload = header.geometry(file_bytes)?;
        let paths = self.paths(&header);
        let noted = KnownState::load(&paths).accept_slots(&paths, header.slot_digests());
        knowledge::report_unrecorded(noted, self.events);
        Ok(HeaderChanged {
            // A change of keys opens no volume, so nothing depends on the kind.
            facts: facts(header.pins(), file_bytes, payload, FileSystemKind::DEFAULT),
            slot: done.slot,
            mark: mark.unwrap_or_default(),
            as_before: done.as_before,
            repaired: done.repaired,
            replaced: done.replaced.clone(),
            kept: kept.map_err(|failure| failure.to_string()),
            agent_note: None,
            lock_left: None,
            taken_over: None,
        })
    }
}

/// The header's bytes after all of `writes`.
struct Changed<'a> {
    present: HeaderBytes<'a>,
    writes: &'a [HeaderWrite],
}

impl HeaderRead for Changed<'_> {
    fn len(&self) -> io::Result<u64> {
        self.present.len()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.present.read_at(offset, buf)?;
        for write in self.writes {
            let HeaderWrite::Write(extent) = write else {
                continue;
            };
            // Both are distances inside a buffer.
            let within = |from: u64, begin: u64| {
                usize::try_from(from.saturating_sub(begin)).map_err(io::Error::other)
            };
            let into = within(extent.offset, offset)?.min(buf.len());
            let skipped = within(offset, extent.offset)?.min(extent.bytes.len());
            let bytes = &extent.bytes[skipped..];
            let count = bytes.len().min(buf.len() - into);
            buf[into..][..count].copy_from_slice(&bytes[..count]);
        }
        Ok(())
    }
}

/// Writes in order, each step durable before the next, then reads back.
pub(crate) fn write_in_order(
    lease: &ContainerLease,
    file: &dyn StoreFile,
    writes: &[HeaderWrite],
) -> Result<(), Failure> {
    let half_way = |failure: Failure| failure.with_more_hint(HALF_WAY);
    for write in writes {
        let done = match write {
            HeaderWrite::Write(extent) => write_extent(lease, file, extent),
            HeaderWrite::Barrier => file.flush().map_err(Failure::from),
        };
        done.map_err(half_way)?;
    }
    for write in writes {
        if let HeaderWrite::Write(extent) = write {
            let read = differs(file, extent);
            if let Some(failure) = read.map_err(|error| half_way(Failure::from(error)))? {
                return Err(failure.with_hint(
                    "this machine has saved the previous header: run `sprat key header-restore` to \
                     restore it. Check the server's disk",
                ));
            }
        }
    }
    lease.all_resolved()?;
    Ok(())
}

fn write_extent(
    lease: &ContainerLease,
    file: &dyn StoreFile,
    extent: &Extent,
) -> Result<(), Failure> {
    lease.verify()?;
    let range = extent.offset..extent.offset + extent.bytes.len() as u64;
    lease.before_own_write(std::slice::from_ref(&range))?;
    let written = file.write_at(extent.offset, &extent.bytes);
    written.map_err(|error| match lease.store().agent() {
        Some(_) if error.kind() == StoreErrorKind::PermissionDenied => {
            Failure::from(error).with_hint(generations::header_refused(lease.file_name()))
        }
        _ => Failure::from(error),
    })
}

/// Checked before the key is used with the header.
fn compare_with_pins(
    start: &VolumeStart,
    header: &Header,
    events: &EventSender,
) -> Result<(), Failure> {
    match &start.settings.pins {
        IdentityPolicy::Known(pins) => header.check_pins(pins)?,
        IdentityPolicy::Expect(fingerprint) => header.check_fingerprint(fingerprint)?,
        IdentityPolicy::TrustOnce => events.notice(Notice::TrustedOnce {
            fingerprint: header.pins().fingerprint(),
        }),
    }
    if !matches!(start.settings.pins, IdentityPolicy::Known(_)) {
        header.pins().check_first()?;
    }
    if start.settings.accept_changed_keys {
        return Ok(());
    }
    let slots = header.slot_digests();
    state::check_slots(
        &start.settings.state_dir,
        &start.settings.target,
        header.uuid(),
        &slots,
    )
}
