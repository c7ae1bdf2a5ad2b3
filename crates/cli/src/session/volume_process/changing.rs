//! Changes the header of a container: under its lock, one whole copy at every instant.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sprat_luks::{
    FormatOptions, Header, HeaderRead, HeaderWrite, LuksErrorKind, Secret, SectorCipher, SlotKind,
};
use sprat_store::{Access, ReadClass, Store, StoreFile};
use sprat_volume::{Fenced, Session as _};

use super::super::change::HeaderChanged;
use super::super::options::{Notice, Phase, PinPolicy};
use super::super::protocol::{ChangeStart, VolumeStart};
use super::connection::HeaderBytes;
use super::hold::{Hold, keep_renewing};
use super::opening::{
    Known, Reached, check_writable, ext4_bytes, facts, hold, open_volume, reach, stat_container,
    wait_for_quiet,
};
use super::stop::{Say, Stop};
use crate::kept_header::{self, Which};
use crate::{Exit, Failure};

const HALF_WAY: &str = "the container opens with every key that stays, and holds every snapshot. \
                        Run the same command again: it goes on where this one stopped";

/// Carries the change out. What fails leaves no lock, unless bytes may still be under way.
pub(super) fn change(
    start: &VolumeStart,
    what: &ChangeStart,
    secrets: &[Secret],
    stop: &Arc<Stop>,
    say: &Say,
) -> Result<HeaderChanged, Failure> {
    say.phase(Phase::Connecting);
    let (record, connection, store) = reach(start)?;
    stop.check()?;
    check_writable(start, &*store, say)?;
    stat_container(start, &*store)?;
    let reached = Reached {
        record,
        connection,
        store,
        first: None,
    };
    let hold = hold(start, reached, stop, say, || {})?;
    // The lock is read again before each write, so its loss needs no other answer.
    keep_renewing(&hold, stop);
    let mut changed = wait_for_quiet(start, &hold, stop, say)
        .and_then(|()| Work::begin(start, &hold, stop, say)?.carry_out(what, secrets));
    match (hold.release(), &mut changed) {
        (Ok(true), _) | (_, Err(_)) => {}
        (Ok(false), Ok(changed)) => changed.lock_left = Some("it was lost".to_owned()),
        (Err(error), Ok(changed)) => changed.lock_left = Some(error.to_string()),
    }
    changed
}

/// A container whose header is being changed.
struct Work<'w> {
    start: &'w VolumeStart,
    hold: &'w Arc<Hold>,
    store: Arc<dyn Store>,
    file: Arc<dyn StoreFile>,
    stop: &'w Stop,
    say: &'w Say,
}

/// What the change came to.
struct Done {
    slot: u32,
    as_before: bool,
    repaired: bool,
}

impl<'w> Work<'w> {
    fn begin(
        start: &'w VolumeStart,
        hold: &'w Arc<Hold>,
        stop: &'w Stop,
        say: &'w Say,
    ) -> Result<Self, Failure> {
        stop.check()?;
        say.phase(Phase::Unlocking);
        let store = hold.store();
        let file = store.open(hold.file_name(), Access::ReadWrite)?;
        Ok(Self {
            start,
            hold,
            store,
            file,
            stop,
            say,
        })
    }

    fn carry_out(&self, what: &ChangeStart, secrets: &[Secret]) -> Result<HeaderChanged, Failure> {
        let secret = |index: usize| {
            secrets
                .get(index)
                .ok_or_else(|| Failure::failed("a secret is missing"))
        };
        let (done, proof) = match what {
            ChangeStart::Add {
                slot,
                fast_kdf_for_tests,
            } => {
                let options = FormatOptions {
                    fast_kdf_for_tests: *fast_kdf_for_tests,
                    ..FormatOptions::default()
                };
                let kind = SlotKind::from(*slot);
                let done = self.add(secret(0)?, secret(1)?, kind, &options)?;
                (done, secret(1)?)
            }
            ChangeStart::Remove {
                slot,
                although_in_use,
            } => {
                let (done, mark) = self.remove(*slot, *although_in_use, secret(0)?)?;
                return self.report(&done, Some(mark));
            }
            ChangeStart::Restore { kept, shown } => {
                let done = self.restore(Path::new(kept), *shown, secret(0)?)?;
                (done, secret(0)?)
            }
        };
        let opened_by = self.read_again()?.unlock_by(&self.bytes(), proof)?.0;
        let slot = opened_by;
        self.report(&Done { slot, ..done }, None)
    }

    fn bytes(&self) -> HeaderBytes<'_> {
        HeaderBytes(&*self.file)
    }

    /// The header as it lies there, both copies good, and what a dead session left settled.
    fn present(&self) -> Result<(Header, bool), Failure> {
        let header = Header::load(&self.bytes())?;
        compare_with_pins(self.start, &header, self.say)?;
        self.settle(&header)?;
        let repair = header.repair()?;
        if repair.is_empty() {
            return Ok((header, false));
        }
        self.write(&repair)?;
        Ok((self.read_again()?, true))
    }

    /// The bytes that a dead session had under way in the volume are the volume's business.
    fn settle(&self, header: &Header) -> Result<(), Failure> {
        let file_bytes = self.file.len()?;
        self.hold.learn(header.pins(), file_bytes);
        if self.hold.record().suspects().is_empty() {
            return Ok(());
        }
        let payload = header.geometry(file_bytes)?;
        let known = Known::default();
        let volume = open_volume(
            self.start,
            self.hold,
            Arc::clone(&self.file),
            payload,
            known,
        )?;
        volume
            .close()
            .map_err(|error| self.hold.lost().unwrap_or_else(|| Failure::from(&error)))?;
        self.hold.all_settled()?;
        Ok(())
    }

    fn add(
        &self,
        present: &Secret,
        new: &Secret,
        kind: SlotKind,
        options: &FormatOptions,
    ) -> Result<Done, Failure> {
        let (header, repaired) = self.present()?;
        let (_, key) = header.unlock_by(&self.bytes(), present)?;
        match header.unlock_by(&self.bytes(), new) {
            Ok((slot, _)) => {
                return Ok(Done {
                    slot,
                    as_before: true,
                    repaired,
                });
            }
            Err(error) if error.kind() == LuksErrorKind::WrongSecret => {}
            Err(error) => return Err(error.into()),
        }
        let writes = header.add_slot(&key, new, kind, options)?;
        drop(key);
        self.change(&header, Which::Newest, &writes)?;
        Ok(Done {
            slot: 0,
            as_before: false,
            repaired,
        })
    }

    fn remove(
        &self,
        slot: u32,
        although_in_use: bool,
        present: &Secret,
    ) -> Result<(Done, String), Failure> {
        let (header, repaired) = self.present()?;
        let slots = header.slots();
        let (opened_by, _) = header.unlock_by(&self.bytes(), present)?;
        let done = |as_before| Done {
            slot,
            as_before,
            repaired,
        };
        let Some(found) = slots.iter().find(|found| found.number == slot) else {
            // The session that died may have come to its end.
            if repaired || self.hold.took_over() {
                return Ok((done(true), String::new()));
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
                "key slot {slot} is the one that the given key opens"
            ))
            .with_hint(
                "nothing was changed. Name another key of this container with --key-file or \
                 --passphrase-file, which proves that it opens; or insist with --although-in-use, \
                 and be sure that you have another key",
            ));
        }
        let writes = header.remove_slot(slot)?;
        self.change(&header, Which::Newest, &writes)?;
        let left = self.read_again()?;
        if opened_by != slot {
            left.unlock(&self.bytes(), present)?;
        }
        Ok((done(false), found.mark.clone()))
    }

    fn restore(&self, path: &Path, shown: Option<u64>, proof: &Secret) -> Result<Done, Failure> {
        let kept = kept_header::open(path)?;
        let from = kept_header::load(&kept, path)?;
        self.check_kept(&from)?;
        let present = match Header::load(&self.bytes()) {
            Ok(present) => Some(present),
            Err(error) if error.kind() == LuksErrorKind::Read => return Err(error.into()),
            // That is what the kept one is for.
            Err(_) => None,
        };
        if present.as_ref().map(Header::sequence_id) != shown {
            return Err(Failure::failed("the header was changed in the meantime")
                .with_hint("nothing was changed by this run. Look again and decide anew"));
        }
        let key = from
            .unlock(&kept, proof)
            .map_err(|error| Failure::from(&error).context("the kept header does not open"))?;
        let cipher = SectorCipher::new(&key, &from)?;
        drop(key);
        if present.is_none() && matches!(self.start.pins, PinPolicy::TrustOnce) {
            self.check_fits(&from, &cipher)?;
        }
        self.settle(&from)?;
        let known = match &self.start.pins {
            PinPolicy::Known(pins) => pins.sequence_id,
            _ => 0,
        };
        let bytes = self.bytes();
        let there = present
            .as_ref()
            .map(|present| (present, &bytes as &dyn HeaderRead));
        let writes = from
            .restore(&kept, there, known, proof, &[])
            .map_err(|error| {
                Failure::from(&error).context("the kept header can't be put back here")
            })?;
        match &present {
            // The newest one may be what is put back.
            Some(present) => self.change(present, Which::BeforeRestore, &writes)?,
            None => self.write(&writes)?,
        }
        Ok(Done {
            slot: 0,
            as_before: false,
            repaired: false,
        })
    }

    /// Refuses a header that is another container's.
    fn check_kept(&self, from: &Header) -> Result<(), Failure> {
        let compared = match &self.start.pins {
            PinPolicy::Known(pins) => {
                let mut pins = pins.clone();
                // A kept header is an old one by its nature.
                pins.sequence_id = 0;
                from.check_pins(&pins)
            }
            PinPolicy::Expect(fingerprint) => from.check_fingerprint(fingerprint),
            PinPolicy::TrustOnce => Ok(()),
        };
        compared.map_err(|error| {
            Failure::from(&error)
                .context("the kept header is not this container's")
                .with_hint("nothing was changed")
        })
    }

    /// With neither pins nor a header to compare with, the volume itself must fit the key.
    fn check_fits(&self, from: &Header, cipher: &SectorCipher) -> Result<(), Failure> {
        let payload = from.geometry(self.file.len()?)?;
        let mut block = [0; 4096];
        self.file
            .read_at(payload.offset_bytes, &mut block, ReadClass::Demand)?;
        cipher.decrypt(0, &mut block)?;
        if ext4_bytes(&block[1024..2048]).is_some() {
            return Ok(());
        }
        Err(Failure::new(
            Exit::Damaged,
            "the kept header's key does not fit this container's volume",
        )
        .with_hint(
            "nothing was changed. If it is this container's all the same, give --fingerprint from \
             its recovery sheet",
        ))
    }

    /// Keeps the present header on this machine, then writes.
    fn change(
        &self,
        present: &Header,
        which: Which,
        writes: &[HeaderWrite],
    ) -> Result<(), Failure> {
        let state_dir = PathBuf::from(&self.start.state_dir);
        kept_header::keep(&state_dir, present, &self.bytes(), which)?;
        self.stop.check()?;
        self.write(writes)
    }

    /// Writes in order, each step durable before the next; then reads it back. From the first
    /// write on nobody is asked whether to stop: what follows is short.
    fn write(&self, writes: &[HeaderWrite]) -> Result<(), Failure> {
        self.say.phase(Phase::Syncing);
        let half_way = |failure: Failure| failure.with_hint(HALF_WAY);
        for write in writes {
            let done = match write {
                HeaderWrite::Write(extent) => self.write_extent(extent.offset, &extent.bytes),
                HeaderWrite::Barrier => self.file.flush().map_err(Failure::from),
            };
            done.map_err(half_way)?;
        }
        for write in writes {
            if let HeaderWrite::Write(extent) = write {
                let mut found = vec![0; extent.bytes.len()];
                let read = self
                    .file
                    .read_at(extent.offset, &mut found, ReadClass::Demand);
                read.map_err(|error| half_way(Failure::from(error)))?;
                if found != extent.bytes {
                    return Err(Failure::new(
                        Exit::Damaged,
                        format!(
                            "the header does not read back as it was written (offset {})",
                            extent.offset
                        ),
                    )
                    .with_hint(
                        "the header as it was before is kept on this machine: `sprat key \
                         header-restore` puts it back. Check the server's disk",
                    ));
                }
            }
        }
        self.hold.all_settled()?;
        Ok(())
    }

    fn write_extent(&self, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.hold.still_ours()?;
        let range = offset..offset + bytes.len() as u64;
        self.hold
            .before_send(std::slice::from_ref(&range))
            .map_err(|fenced| match fenced {
                Fenced::Disconnected(error) => Failure::from(&error),
                other => self
                    .hold
                    .lost()
                    .unwrap_or_else(|| Failure::failed(other.to_string())),
            })?;
        Ok(self.file.write_at(offset, bytes)?)
    }

    /// The header as the server gives it on a handle of its own.
    fn read_again(&self) -> Result<Header, Failure> {
        let file = self.store.open(self.hold.file_name(), Access::ReadOnly)?;
        let header = Header::load(&HeaderBytes(&*file))?;
        if !header.copies().both_good() {
            return Err(Failure::new(
                Exit::Damaged,
                "one of the header's copies does not read back as it was written",
            )
            .with_hint(HALF_WAY));
        }
        Ok(header)
    }

    fn report(&self, done: &Done, mark: Option<String>) -> Result<HeaderChanged, Failure> {
        let header = self.read_again()?;
        let state_dir = PathBuf::from(&self.start.state_dir);
        let kept = kept_header::keep(&state_dir, &header, &self.bytes(), Which::Newest);
        let slots = header.slots();
        let slot = slots.iter().find(|slot| slot.number == done.slot);
        let mark = mark.or_else(|| Some(slot?.mark.clone()));
        let file_bytes = self.file.len()?;
        let payload = header.geometry(file_bytes)?;
        Ok(HeaderChanged {
            facts: facts(header.pins(), file_bytes, payload),
            slot: done.slot,
            mark: mark.unwrap_or_default(),
            as_before: done.as_before,
            repaired: done.repaired,
            kept: kept.map_err(|failure| failure.to_string()),
            lock_left: None,
        })
    }
}

/// Before the key comes near the header.
fn compare_with_pins(start: &VolumeStart, header: &Header, say: &Say) -> Result<(), Failure> {
    match &start.pins {
        PinPolicy::Known(pins) => header.check_pins(pins)?,
        PinPolicy::Expect(fingerprint) => header.check_fingerprint(fingerprint)?,
        PinPolicy::TrustOnce => say.notice(Notice::TrustedOnce {
            fingerprint: header.pins().fingerprint(),
        }),
    }
    Ok(())
}
