//! Makes a container under a temporary name, and gives it its own name once it is complete and
//! durable.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sprat_luks::{
    Extent, FormatOptions, Header, OpenedBy, Pins, Secret, SectorCipher, SlotKind, format,
};
use sprat_store::{Access, ReadClass, Store, StoreErrorKind, StoreFile};

use crate::address::Target;
use crate::connect::HeaderBytes;
use crate::file_system::FileSystemKind;
use crate::protocol::messages::{CreateStart, VolumeReply, VolumeStart};
use crate::protocol::reports::{Notice, Phase};
use crate::server_probe::{self, Holes};
use crate::state::headers;
use crate::state::paths::StatePaths;
use crate::state::reserved_names::{self, HalfMade};
use crate::volume_process::header::differs;
use crate::volume_process::knowledge::Knowledge;
use crate::volume_process::lease::LateRecords;
use crate::volume_process::lease::{ContainerLease, LeaseParts, keep_renewing};
use crate::volume_process::open::{
    Decryption, Opened, VolumeHints, acquire_lock, check_writable, connect_store, facts,
    open_volume, opened_by, report_overcommit,
};
use crate::volume_process::shutdown::{EventSender, StopFlag};
use crate::{Exit, Failure, text};

/// A container that is being made.
pub(crate) struct NewContainer {
    header: Vec<Extent>,
    pins: Pins,
    secrets: Vec<Secret>,
    paths: StatePaths,
    /// Bytes of the header that were sent.
    pub header_bytes: u64,
    /// The server was asked to give the container its name.
    naming: AtomicBool,
}

/// Makes the file, its header and an empty volume. After a failure neither file nor lease is left.
pub(crate) fn make(
    start: &VolumeStart,
    create: &CreateStart,
    secrets: Vec<Secret>,
    stop: &Arc<StopFlag>,
    events: &EventSender,
) -> Result<(Opened, NewContainer), Failure> {
    check_size(create.size_bytes, create.file_system)?;
    events.phase(Phase::Connecting);
    let (record, connection, store) = connect_store(start)?;
    stop.check()?;
    refuse_existing(start, &*store)?;
    let available_bytes = check_writable(start, &*store, events)?;
    // The trial file is the first one that must be removed.
    create
        .file_system
        .check_order(store.capabilities().durable_flush)?;
    stop.begin_cleanup_duty()?;
    if reserved_names::may_not_remove(&*store, &start.settings.target.name) {
        events.notice(Notice::NothingRemoved);
        report_overcommit(available_bytes, create.size_bytes, events);
    } else if server_probe::run(&*store, &start.settings.target.name)? == Holes::Filled {
        server_probe::check_room(create.size_bytes, available_bytes)?;
        events.notice(Notice::HolesFilled {
            size_bytes: create.size_bytes,
        });
    } else {
        report_overcommit(available_bytes, create.size_bytes, events);
    }
    stop.check()?;
    let lock = acquire_lock(start, &*store, &record, stop, events)?;
    // What a dead init sent may still arrive in the file that it made. That file is removed, so
    // nothing can arrive in the new one, and there is nothing to wait for.
    record.quiet()?;
    let lease = Arc::new(ContainerLease::new(LeaseParts {
        connection,
        record,
        container: start.settings.target.name.clone(),
        file_name: HalfMade::New.name(&start.settings.target.name)?,
        access: Access::ReadWrite,
        opened_by: opened_by(start),
        store,
        lock: Some(lock),
        stale_lock: None,
        highest: None,
        highest_is_own: false,
        late_records: LateRecords::default(),
    }));
    keep_renewing(&lease, stop)?;
    let made = fill(start, create, secrets, &lease, stop, events);
    made.map_err(|failure| {
        let state = match undo(&lease) {
            Ok(()) => "nothing of the new container is left on the server".to_owned(),
            Err(error) => format!(
                "{} may be left on the server ({error}); the next `sprat init` removes it",
                lease.file_name()
            ),
        };
        failure.with_state(&state)
    })
}

fn check_size(size_bytes: u64, kind: FileSystemKind) -> Result<(), Failure> {
    let min = kind.container_bytes_min();
    if size_bytes < min {
        return Err(Failure::usage(format!(
            "a container of {size_bytes} bytes is too small; the minimum is {min} bytes"
        )));
    }
    // No kind of file system has volumes as large as the largest file offset, 8 EiB.
    if size_bytes > kind.volume_bytes_max() {
        return Err(Failure::usage(format!(
            "a container of {size_bytes} bytes is too large"
        )));
    }
    Ok(())
}

/// A container exists already at the target of an `init`.
pub fn exists_already(target: &Target) -> Failure {
    Failure::failed(format!("{target} exists already")).with_hint(
        "nothing was changed: `sprat init` never overwrites a container. Choose another name, or delete \
         the old container on the server yourself. If an earlier `sprat init` created it but was \
         interrupted before it showed the sheet, run `sprat key add TARGET --new-recovery`: it creates \
         a recovery key and shows its sheet. If the key file is lost, the recovery key on the sheet \
         opens the container",
    )
}

/// Never overwrites.
fn refuse_existing(start: &VolumeStart, store: &dyn Store) -> Result<(), Failure> {
    match store.stat(&start.settings.target.name) {
        Ok(_) => Err(exists_already(&start.settings.target)),
        Err(error) if error.kind() == StoreErrorKind::NotFound => Ok(()),
        Err(error) => Err(Failure::from(&error)),
    }
}

fn fill(
    start: &VolumeStart,
    create: &CreateStart,
    secrets: Vec<Secret>,
    lease: &Arc<ContainerLease>,
    stop: &StopFlag,
    events: &EventSender,
) -> Result<(Opened, NewContainer), Failure> {
    let store = lease.store();
    // Checked again under the lease: another init may have finished meanwhile.
    refuse_existing(start, &*store)?;
    HalfMade::New.remove_all(&*store, lease.container())?;
    // Pending writes of a dead init go into a file that has no name any more.
    lease.all_resolved()?;
    stop.check()?;
    events.phase(Phase::Creating);
    let slots: Vec<(Secret, SlotKind)> = secrets
        .into_iter()
        .zip(create.slots.iter().copied())
        .collect();
    let mut options = FormatOptions::default();
    options.uuid.clone_from(&create.uuid);
    options.fast_kdf_for_tests = create.fast_kdf_for_tests;
    let new = format(&slots, &options)?;
    stop.check()?;
    let file = store.create_new(lease.file_name())?;
    let header_bytes = write_header(&*file, &new.header, create.size_bytes / 4096 * 4096)?;
    flush_folder(&*store, events)?;
    stop.check()?;
    can_hold(&*file, &new.header, create.size_bytes / 4096 * 4096)?;
    let header = Header::load(&HeaderBytes(&*file))?;
    header.check_pins(&new.pins)?;
    let file_bytes = file.len()?;
    let payload = header.geometry(file_bytes)?;
    let cipher = SectorCipher::new(&new.volume_key, &header)?;
    let cipher_of_kernel = match opened_by(start) {
        OpenedBy::Kernel => Some(SectorCipher::new(&new.volume_key, &header)?),
        OpenedBy::Sprat => None,
    };
    let decryption = Decryption::new(opened_by(start), new.volume_key, Some(cipher))?;
    lease.learn(new.pins.clone(), file_bytes);
    let known = VolumeHints {
        seen: None,
        // All of a new file except the header is a hole.
        hole_from_bytes: 0,
        kind: create.file_system,
    };
    let volume = open_volume(start, lease, file, payload, known)?;
    stop.reaches(&volume);
    let knowledge = Knowledge::of_new(start, &header, cipher_of_kernel);
    let opened = Opened {
        knowledge,
        lease: Arc::clone(lease),
        volume,
        decryption,
        facts: facts(new.pins.clone(), file_bytes, payload, create.file_system),
        flush: crate::volume_process::flush_kind(start),
        durable: store.capabilities().durable_flush,
        // The content is small, and is removed if it does not fit.
        available_bytes: None,
    };
    let state_dir = &start.settings.state_dir;
    let paths = StatePaths::new(state_dir, &new.pins.uuid, &start.settings.target);
    let new_container = NewContainer {
        header: new.header,
        pins: new.pins,
        secrets: slots.into_iter().map(|(secret, _)| secret).collect(),
        paths,
        header_bytes,
        naming: AtomicBool::new(false),
    };
    Ok((opened, new_container))
}

fn write_header(file: &dyn StoreFile, header: &[Extent], size_bytes: u64) -> Result<u64, Failure> {
    let mut sent = 0;
    for extent in header {
        file.write_at(extent.offset, &extent.bytes)?;
        sent += extent.bytes.len() as u64;
    }
    file.resize(size_bytes).map_err(|error| {
        // EFBIG, which SFTP can't express. A lost connection has its own error.
        if matches!(
            error.kind(),
            StoreErrorKind::Failed | StoreErrorKind::Unsupported
        ) {
            Failure::from(&error)
                .context(format!(
                    "the server can't store a file of {}",
                    text::bytes(size_bytes)
                ))
                .with_hint(
                    "the new file was removed. Each file system limits the size of a file (ext4: 16 \
                     TiB, with blocks of 1 KiB 4 TiB; FAT: 4 GiB), and the account can have a limit, \
                     too. Choose a smaller --size",
                )
        } else {
            Failure::from(&error)
        }
    })?;
    file.flush()?;
    Ok(sent)
}

/// Whether the server can store a container. A server that keeps another length, or returns other
/// bytes than were written, can't: its file system lacks sparse or large files, or it converts
/// text.
fn can_hold(file: &dyn StoreFile, header: &[Extent], size_bytes: u64) -> Result<(), Failure> {
    let unfit = |why: String| {
        Failure::failed("this server can't store a container")
            .because(why)
            .with_hint("choose another server, or another file system on this one")
    };
    let len = file.len()?;
    if len != size_bytes {
        return Err(unfit(format!(
            "a file was set to {size_bytes} bytes, but has {len}"
        )));
    }
    for extent in header {
        let mut found = vec![0; extent.bytes.len()];
        file.read_at(extent.offset, &mut found, ReadClass::Demand)?;
        if found != extent.bytes {
            return Err(unfit(format!(
                "the bytes at offset {} do not read back as they were written",
                extent.offset
            )));
        }
    }
    Ok(())
}

fn flush_folder(store: &dyn Store, events: &EventSender) -> Result<(), Failure> {
    if !store.try_flush_folder()? {
        events.notice(Notice::NoFolderFlush);
    }
    Ok(())
}

impl NewContainer {
    /// Reads the header back from the server, opens it with every secret, and gives the container
    /// its name. The volume must be closed by now.
    pub(crate) fn publish(
        &self,
        lease: &ContainerLease,
        stop: &StopFlag,
        events: &EventSender,
    ) -> Result<(), Failure> {
        events.phase(Phase::Publishing);
        let store = lease.store();
        let file = store.open(lease.file_name(), Access::ReadOnly)?;
        for extent in &self.header {
            if let Some(failure) = differs(&*file, extent)? {
                return Err(
                    failure.with_hint("the new container was removed; check the server's disk")
                );
            }
        }
        let bytes = HeaderBytes(&*file);
        let header = Header::load(&bytes)?;
        header.check_pins(&self.pins)?;
        for secret in &self.secrets {
            stop.check()?;
            header.unlock(&bytes, secret)?;
        }
        // If this fails nothing is lost yet. The next change of keys tries again.
        if let Err(failure) = headers::keep_newest(&self.paths, &header, &bytes, None) {
            let causes = failure.causes.join("; ");
            events.notice(Notice::HeaderNotKept {
                reason: format!("{}: {causes}", failure.what),
            });
        }
        drop(file);
        stop.check()?;
        lease.verify()?;
        self.give_name(&*store, lease, events)?;
        flush_folder(&*store, events)?;
        self.check_named(&*store, lease)
    }

    /// Checks that the rename took place. A server may only answer that it renamed.
    fn check_named(&self, store: &dyn Store, lease: &ContainerLease) -> Result<(), Failure> {
        let not_named = |why: String| {
            Failure::new(
                Exit::Damaged,
                format!(
                    "the server confirmed the renaming to {}, but did not do it",
                    lease.container()
                ),
            )
            .because(why)
            .with_hint("the server is not reliable: check its disk and its software")
        };
        let file = store
            .open(lease.container(), Access::ReadOnly)
            .map_err(|error| match error.kind() {
                StoreErrorKind::NotFound => not_named(error.to_string()),
                _ => Failure::from(&error),
            })?;
        let header =
            Header::load(&HeaderBytes(&*file)).map_err(|error| not_named(error.to_string()))?;
        header
            .check_pins(&self.pins)
            .map_err(|error| not_named(error.to_string()))
    }

    /// Once the request is sent, the container may have its name, even if the answer is lost.
    fn give_name(
        &self,
        store: &dyn Store,
        lease: &ContainerLease,
        events: &EventSender,
    ) -> Result<(), Failure> {
        let naming = |naming| {
            self.naming.store(naming, Ordering::SeqCst);
            events.reply(&VolumeReply::Naming(naming));
        };
        naming(true);
        match store.rename_new(lease.file_name(), lease.container()) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == StoreErrorKind::AlreadyExists => {
                naming(false);
                Err(Failure::failed(format!(
                    "another program created {} while the new container was being created",
                    lease.container()
                ))
                .with_hint("that file was not changed; the new container was removed"))
            }
            Err(error) => Err(Failure::from(&error)),
        }
    }

    /// Whether the container has its name. `None`: the server does not answer.
    pub(crate) fn is_named(&self, lease: &ContainerLease) -> Option<bool> {
        if !self.naming.load(Ordering::SeqCst) {
            return Some(false);
        }
        match lease.store().stat(lease.container()) {
            Ok(_) => Some(true),
            Err(error) if error.kind() == StoreErrorKind::NotFound => Some(false),
            Err(_) => None,
        }
    }
}

/// Removes the unfinished container and releases the lease. Pending writes go into a file without a
/// name, so nothing needs to be recovered.
pub(crate) fn undo(lease: &ContainerLease) -> Result<(), Failure> {
    if let Some(failure) = lease.lost() {
        return Err(failure);
    }
    lease.release_after(|store| Ok(store.remove_if_there(lease.file_name()).map(drop)?))
}
