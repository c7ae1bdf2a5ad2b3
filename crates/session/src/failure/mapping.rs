//! Turns the errors of the crates below into failures: which exit code, and which hint.

use std::error::Error;
use std::io;

use sprat_attach::AttachError;
use sprat_luks::{LuksError, LuksErrorKind};
use sprat_snapshot::{SnapshotError, SnapshotErrorKind};
use sprat_store::{LockError, StoreError, StoreErrorKind};
use sprat_volume::VolumeError;

use crate::address::TargetError;
use crate::failure::{Exit, Failure};

impl Failure {
    /// The failure of a library's error, with the error's sources as causes.
    fn of(error: &dyn Error, exit: Exit, hint: Option<&str>) -> Self {
        let mut failure = Self::new(exit, error.to_string());
        if let Some(source) = error.source() {
            failure = failure.caused_by(source);
        }
        failure.hint = hint.map(str::to_owned);
        failure
    }
}

macro_rules! from_owned {
    ($($error:ty),+) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::from(&error)
            }
        })+
    };
}

from_owned!(
    AttachError,
    LockError,
    LuksError,
    SnapshotError,
    StoreError,
    VolumeError
);

impl From<TargetError> for Failure {
    fn from(error: TargetError) -> Self {
        let hint = match &error {
            TargetError::LoginOnly(text) => {
                let (login, path) = text.split_once('/').unwrap_or((text, "PATH/x.luks"));
                format!("did you mean {login}:{path}? A local file of that name is ./{text}")
            }
            _ => "a TARGET is a container's name in the config, \
                  ssh://user@host[:port]/path/x.luks, host:path/x.luks or a local path"
                .to_owned(),
        };
        Self::usage(error.to_string()).with_hint(hint)
    }
}

impl From<&StoreError> for Failure {
    fn from(error: &StoreError) -> Self {
        let exit = match error.kind() {
            StoreErrorKind::Disconnected
            | StoreErrorKind::Unreachable
            | StoreErrorKind::LoginRefused
            | StoreErrorKind::HostKey => Exit::Unreachable,
            StoreErrorKind::Truncated => Exit::Damaged,
            // No file, no folder, or something else at the container's place.
            StoreErrorKind::NotFound | StoreErrorKind::NotRegular => Exit::NoContainer,
            _ => Exit::Failed,
        };
        let hint = match error.kind() {
            // What a machine backs up, and what it knows of its containers, is root's.
            StoreErrorKind::PermissionDenied if !rustix::process::geteuid().is_root() => Some(
                "nothing was changed. Run it as root. Where that is not it, check who owns the folder, and \
                 whether the account may write",
            ),
            kind => store_hint(kind),
        };
        Self::of(error, exit, hint)
    }
}

fn store_hint(kind: StoreErrorKind) -> Option<&'static str> {
    Some(match kind {
        StoreErrorKind::NotFound => {
            "nothing was changed. Check the path, and whether its disk is mounted there; sprat \
             makes no folders on a server"
        }
        StoreErrorKind::NoSpace => {
            "finished snapshots are unharmed. Make room on the server. If NAME.luks.reserve is \
             there, `sprat prune` works on a full disk, too. Then run the same command again: it \
             continues where it stopped"
        }
        StoreErrorKind::ReadOnly => {
            "finished snapshots are unharmed. The server's file system is mounted read-only. A \
             kernel does that by itself after a disk error. Check the server (dmesg, mount) \
             before the next backup. `restore` and `mount` still work"
        }
        StoreErrorKind::PermissionDenied => {
            "nothing was changed. Check who owns the folder and whether the account may write; \
             `restore` and `mount` also work on a read-only account"
        }
        StoreErrorKind::NotRegular => {
            "sprat opens regular files only and never follows a link on the server"
        }
        StoreErrorKind::Truncated => {
            "the file on the server is shorter than it was. Don't write to it. Search the server \
             for an intact copy"
        }
        StoreErrorKind::Disconnected => {
            "finished snapshots are unharmed. Run the same command again: it continues where it \
             stopped"
        }
        StoreErrorKind::Elsewhere => {
            "the server's name seems to stand for several machines that don't show the same files. Finished \
             snapshots are unharmed. Name one of these machines as the target; or let ssh send all sessions \
             over one connection (ControlMaster, ControlPath and ControlPersist in ssh_config(5))"
        }
        StoreErrorKind::Unreachable => {
            "check that `sftp HOST` works from this account without asking for anything"
        }
        StoreErrorKind::ProgramMissing => {
            "nothing was changed. Install it with your package manager (openssh-client), or name another \
             one with --ssh-command"
        }
        StoreErrorKind::LoginRefused => {
            "sprat never asks for passwords or passphrases of ssh. Add this account's public key to the \
             server's authorized_keys, or name a key with --ssh-command 'ssh -i FILE'. A key with a \
             passphrase works only from an agent (ssh-add), which a timer does not have: make one without"
        }
        StoreErrorKind::HostKey => {
            "nothing was sent. Get the fingerprint of the server's key in another way (its \
             provider, its console) and compare it. If it is the same: for a server that is new \
             here, log in once with `ssh HOST`; for one whose key was changed, remove the old \
             key first (`ssh-keygen -R HOST`). If nobody knows why it changed, stop: somebody \
             else may answer"
        }
        _ => return None,
    })
}

/// Looks through an error and its sources for one of the store: it knows best what happened.
fn store_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a StoreError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<StoreError>() {
            return Some(found);
        }
        // An io::Error's own payload is not among its sources.
        let inner = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        if let Some(inner) = inner
            && let Some(found) = store_error(inner)
        {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// A failure that the session put into an error's chain itself.
fn failure_inside<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a Failure> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<Failure>() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

impl From<&LuksError> for Failure {
    fn from(error: &LuksError) -> Self {
        if error.kind() == LuksErrorKind::Read
            && let Some(cause) = store_error(error)
        {
            return Self::from(cause).context(error.to_string());
        }
        let exit = match error.kind() {
            LuksErrorKind::NoContainer => Exit::NoContainer,
            LuksErrorKind::Damaged => Exit::Damaged,
            LuksErrorKind::WrongSecret => Exit::WrongKey,
            _ => Exit::Failed,
        };
        Self::of(error, exit, luks_hint(error))
    }
}

fn luks_hint(error: &LuksError) -> Option<&'static str> {
    Some(match error {
        LuksError::NotLuks => "nothing was changed. Check the path: that file is no container",
        LuksError::Luks1 | LuksError::KernelOnly { .. } => {
            "nothing was changed. Use it on a machine whose kernel has dm-crypt (`sprat doctor` \
             reports it), without --mode user"
        }
        LuksError::Unsupported { .. } => {
            "nothing was changed. cryptsetup itself may open it, if the kernel has dm-crypt"
        }
        LuksError::WrongSecret { .. } => {
            "nothing was changed. Check which key file or passphrase belongs to this container; \
             the recovery key on the sheet opens it too, given as a passphrase"
        }
        LuksError::HeaderDamaged { .. } => {
            "nothing was changed. The header is damaged, the data may be intact. Restore a \
             header backup, if you have one"
        }
        LuksError::Truncated { .. } => {
            "nothing was changed. Don't write to the file. Search the server for an intact copy \
             of it"
        }
        LuksError::Pin {
            field: "fingerprint",
            ..
        } => {
            "nothing was sent and no key was used. Compare what was typed with the sheet. If it \
             is right, somebody changed the container on the server, or it is another one. Find \
             out which before you continue"
        }
        LuksError::Pin { .. } | LuksError::Refused { .. } | LuksError::Invalid { .. } => {
            "nothing was sent and no key was used. Somebody changed the container on the server, \
             or it is another one. Find out which before you continue"
        }
        LuksError::OlderHeader { .. } => {
            "nothing was sent and no key was used. The server shows a header that was replaced, \
             and removed keys may open it. Or another machine wrote back a kept one. Find out \
             which. Then `sprat key header-restore` writes back the header that this machine \
             keeps, so that every machine accepts it"
        }
        LuksError::Sequence { .. } => {
            "nothing was sent and no key was used. Somebody changed the header on the server, so \
             that a later change of keys would make removed keys valid again. `sprat key \
             header-restore` writes back the header that this machine keeps"
        }
        LuksError::KdfTooCostly { .. } => {
            "nothing was changed. The server may have changed the header to exhaust this machine"
        }
        LuksError::KdfBudget { .. } => {
            "nothing was changed. The slots with the least work are tried first. Open the container \
             with a key of such a slot, a key file for example; or remove slots that nobody uses"
        }
        LuksError::NoMemory { .. } => {
            "nothing was changed. Free memory, or open the container with a key of another slot; a \
             recovery key of sprat's needs 64 MiB"
        }
        _ => return None,
    })
}

impl Failure {
    /// For the work on keys, which is done in user mode wherever it is.
    pub fn of_key_work(error: &LuksError) -> Self {
        let failure = Self::from(error);
        match error {
            LuksError::Luks1 | LuksError::KernelOnly { .. } => failure.with_hint(
                "nothing was changed. Backups work if the kernel has dm-crypt. Change its keys \
                 and its header with cryptsetup: luksAddKey, luksRemoveKey, luksHeaderBackup, on \
                 the server's file while no backup runs",
            ),
            _ => failure,
        }
    }
}

impl From<&LockError> for Failure {
    fn from(error: &LockError) -> Self {
        let (exit, hint) = match error {
            LockError::Store { source, .. } => {
                return Self::from(source).context(error.to_string());
            }
            LockError::Journal { .. } => (
                Exit::Failed,
                "nothing was changed on the server. sprat's folder on this machine must be \
                 writable and have room. SPRAT_STATE_DIR or --state-dir names another one",
            ),
            LockError::HeldHere { .. } => (
                Exit::Locked,
                "nothing was changed. Wait for the other run to end, or `sprat umount` what is \
                 mounted",
            ),
            LockError::HeldElsewhere { .. } => (
                Exit::Locked,
                "nothing was changed. If the other machine is dead, asleep or lost, run `sprat \
                 unlock`. It takes the lock over, and waits up to 2 hours and 15 minutes until \
                 nothing of the other session can arrive any more. If the account may only read, \
                 restore with --ignore-lock",
            ),
            LockError::Waiting { .. } => (
                Exit::Locked,
                "nothing was changed. Run `sprat unlock`: it waits until nothing of that session \
                 can arrive any more. If the account may only read, restore with --ignore-lock",
            ),
            LockError::Unlisted { .. } => (
                Exit::Failed,
                "no data was changed. Such a server shows new files only when they are closed \
                 (ProFTPD: HiddenStores off). Change that, or use another server",
            ),
            LockError::NotKept { unused, .. } => (
                Exit::Damaged,
                match unused {
                    true => {
                        "nothing was sent to the container. No other session wrote there: a \
                         server that damages one file may damage others. Find out what is wrong \
                         with it or its disk, then run `sprat check --read-data`"
                    }
                    false => {
                        "nothing more is sent. No other session wrote there: a server that \
                         damages one file may have damaged what this session sent, too. Find out \
                         what is wrong with it or its disk, then run `sprat check --read-data` \
                         before the next backup"
                    }
                },
            ),
            LockError::Lost { .. } => (
                Exit::Locked,
                "nothing more is sent. What was on its way may have arrived after the other \
                 session began. Each later run compares what that session wrote, and reports \
                 differences. Find out who took the lock, then run the same command again",
            ),
            LockError::TakenMeanwhile { .. } => (
                Exit::Locked,
                "what was read may be a mixture of two states. So may files that were already \
                 restored. This session changed nothing on the server. Run the same command \
                 again when the other session has ended",
            ),
            LockError::Disturbed { .. } => (
                Exit::Locked,
                "what was read may be a mixture of two states. So may files that were already \
                 restored. This session changed nothing on the server. Run the same command \
                 again",
            ),
            LockError::Renewed { .. } => (
                Exit::Locked,
                "nothing was changed. Stop that session, or use --force if you know that it \
                 can't write any more",
            ),
            _ => (Exit::Failed, "finished snapshots are unharmed"),
        };
        Self::of(error, exit, Some(hint))
    }
}

impl From<&VolumeError> for Failure {
    fn from(error: &VolumeError) -> Self {
        if let VolumeError::Failed(first) = error {
            return Self::from(&**first);
        }
        if let Some(failure) = failure_inside(error) {
            return failure.clone();
        }
        if let VolumeError::Fenced(fenced) = error
            && let Some(lock) = fenced.source().and_then(|s| s.downcast_ref::<LockError>())
        {
            return Self::from(lock);
        }
        if let Some(store) = store_error(error) {
            let exit_14 = matches!(
                error,
                VolumeError::ConnectionLost { .. } | VolumeError::NotReconnected(_)
            );
            let mut failure = Self::from(store).context(error.to_string());
            if exit_14 {
                failure.exit = Exit::Unreachable;
            }
            return failure;
        }
        let (exit, hint) = match error {
            VolumeError::Short { .. } => (
                Exit::Damaged,
                Some("nothing was changed. Search the server for a complete copy of the file"),
            ),
            VolumeError::CacheDiffers { .. } => (
                Exit::Damaged,
                Some(
                    "nothing was written. The server shows other data than this machine left \
                     there: its disk is damaged, it lost what it had reported as durable, or it \
                     shows an older copy. The local cache of the container is discarded. `sprat \
                     check --read-data` reports which files are damaged",
                ),
            ),
            VolumeError::ForeignWrite { .. } => (
                Exit::Damaged,
                Some(
                    "something else writes to the container. Find it before the next run; then \
                     run `e2fsck -fn` on the volume",
                ),
            ),
            VolumeError::LostDurable { .. } => (
                Exit::Damaged,
                Some(
                    "nothing more was sent. The server answered that these bytes are on its \
                     disk, and now they are not. Either it lost power with a cache that keeps \
                     nothing, or it was reset to an older state. What was written in the last \
                     minutes before that is damaged or gone, snapshots too. Find out what \
                     happened to the server, then run `sprat check --read-data` before the next \
                     backup",
                ),
            ),
            VolumeError::Overlay { .. } | VolumeError::OverlayFull { .. } => (
                Exit::Failed,
                Some("nothing on the server was changed; make room in the state folder"),
            ),
            VolumeError::Cache { .. } => (
                Exit::Failed,
                Some(
                    "nothing on the server was changed. The local cache would be out of date \
                     after this run. Remove the container's folder in the cache folder \
                     (/var/cache/sprat, or SPRAT_CACHE_DIR), then run the command again",
                ),
            ),
            VolumeError::Fenced(_) => (Exit::Locked, None),
            _ => (Exit::Failed, None),
        };
        Self::of(error, exit, hint)
    }
}

impl From<&AttachError> for Failure {
    fn from(error: &AttachError) -> Self {
        let hint = match error {
            AttachError::NotRoot { .. } => Some("run it as root (sudo)"),
            AttachError::Busy { .. } => Some(
                "it stays mounted. End these programs, or leave the folder in them, then run the \
                 same command again",
            ),
            AttachError::StillHeld { .. } => Some(
                "what is written there still reaches the server. End these programs, or unmount it there \
                 (in another mount namespace: `nsenter -t PID -m umount DIR`), then run the same command \
                 again",
            ),
            AttachError::NoFuse { .. } | AttachError::NoLoop { .. } => {
                Some("`sprat doctor` reports what this machine lacks")
            }
            AttachError::NoDmCrypt { .. } => Some(
                "nothing was changed. Omit --mode: user mode opens and writes the same container \
                 format",
            ),
            AttachError::RootNotMounted => Some(
                "the chroot directory must be a mount point: run mount --bind FOLDER FOLDER \
                 before the chroot. Finished snapshots are unharmed",
            ),
            AttachError::CryptMap { .. } => Some(
                "finished snapshots are unharmed. `--mode user` does without the kernel's dm-crypt",
            ),
            AttachError::ProgramMissing { .. } => {
                Some("install it with your package manager (e2fsprogs)")
            }
            AttachError::MountRefused { damaged: true, .. } => Some(
                "the container was opened, but its file system is damaged. Nothing was changed \
                 beyond a journal replay. `sprat check` says what is damaged; docs/recovery.md says \
                 how to repair or to save it",
            ),
            AttachError::MountRefused { .. } => Some(
                "the container was opened, but its file system can't be mounted. Nothing was \
                 changed beyond a journal replay",
            ),
            _ => None,
        };
        let exit = match error {
            AttachError::MountRefused { damaged: true, .. } => Exit::Damaged,
            _ => Exit::Failed,
        };
        Self::of(error, exit, hint)
    }
}

impl From<&SnapshotError> for Failure {
    fn from(error: &SnapshotError) -> Self {
        let exit = match error.kind() {
            SnapshotErrorKind::Usage => Exit::Usage,
            SnapshotErrorKind::Cancelled => Exit::Interrupted,
            SnapshotErrorKind::Busy => Exit::Locked,
            SnapshotErrorKind::Damaged => Exit::Damaged,
            _ => Exit::Failed,
        };
        let mut failure = Self::of(error, exit, snapshot_hint(error));
        // The first is in the message already.
        let messages = error.messages().iter().skip(1).take(10);
        failure.causes.extend(messages.cloned());
        failure
    }
}

fn snapshot_hint(error: &SnapshotError) -> Option<&'static str> {
    Some(match error {
        _ if error.kind() == SnapshotErrorKind::Damaged => {
            "The file system in the container is damaged. Don't write to it. Run `sprat check \
             --read-data` to see what is damaged; docs/recovery.md explains the repair."
        }
        SnapshotError::SourceEmpty { .. } => {
            "Nothing was changed. Mount its disk, or allow empty sources if this one is meant to be \
             empty."
        }
        SnapshotError::SourceMissing { .. } => {
            "Nothing was changed. Mount its disk, or remove the source from the job."
        }
        SnapshotError::SourceChanged { .. } => {
            "No snapshot was made; older snapshots are complete. Run it again when the source is in \
             place."
        }
        SnapshotError::RsyncMissing { .. } => {
            "Install rsync (3.1.3 or newer) with your package manager."
        }
        SnapshotError::RsyncFailed { .. } => {
            "Older snapshots are complete. What was copied is kept, and the next run continues from \
             there."
        }
        SnapshotError::StoodStill { .. } => {
            "Older snapshots are complete. What was copied is kept, and the next run continues from \
             there. Bring that file system back, unmount it, or exclude it from the job."
        }
        SnapshotError::VolumeFull { .. } => {
            "Older snapshots are complete, and what was copied is kept for the next run. Enlarge the \
             volume with `sprat grow`, or free space with `sprat prune`. If interrupted runs fill \
             the volume, `sprat prune --drop-interrupted` removes what they copied."
        }
        SnapshotError::PatternRefused { .. } | SnapshotError::PatternLineRefused { .. } => {
            "Nothing was changed. A pattern that begins with / matches a whole path, any other a \
             name; rsync's manual has the rules."
        }
        SnapshotError::PatternFile { .. } => {
            "Nothing was changed. Make it a readable file, or remove it from the job."
        }
        SnapshotError::DestinationConflicts { .. } => {
            "The snapshot is unchanged. Move the folder away, restore to another place, or remove the \
             folder with --delete."
        }
        SnapshotError::DeleteLosesExcluded { .. } => {
            "Nothing was changed. Run with --dry-run to see which. Add --delete-excluded to delete \
             them, or omit --delete."
        }
        SnapshotError::DeleteReachesContainer { .. } => {
            "Nothing was changed. Omit --delete, or restore parts that don't contain the container \
             file, with JOB:PATH."
        }
        SnapshotError::DeleteReachesOtherDisk { .. } => {
            "Nothing was changed. Mount the disk that the snapshot has. To restore onto the present \
             disk, omit --delete: its other files stay, and files of the same name are replaced."
        }
        SnapshotError::DeleteReachesMounts { .. } => {
            "Nothing was changed. Unmount them, omit --delete, or restore parts that don't contain \
             them, with JOB:PATH."
        }
        SnapshotError::DestinationIsOwn { .. } => {
            "Nothing was changed. Restore it to another folder."
        }
        SnapshotError::NoSuchJob { .. } | SnapshotError::NoSuchSnapshot { .. } => {
            "Nothing was changed. Run `sprat snapshots` to list what there is."
        }
        SnapshotError::SeveralSnapshots { .. } => {
            "Nothing was changed. Give one of these names in full."
        }
        SnapshotError::RemovalRefused { .. } => {
            "Nothing was removed. Run `sprat unpin` if it is pinned and not needed any more. \
             --allow-newest removes the newest complete snapshot of a job."
        }
        SnapshotError::Zone(_) => {
            "Nothing was changed. Correct `time_zone` in the config, or install the system's time \
             zones (tzdata)."
        }
        SnapshotError::NoSuchPath { .. } => {
            "Nothing was changed. The path is the one in the source. Run `sprat mount` to browse the \
             snapshots."
        }
        SnapshotError::Cancelled => {
            "What was copied is kept, and the next run continues from there."
        }
        SnapshotError::CheckCancelled => {
            "Nothing was changed. The same command continues where this one stopped."
        }
        SnapshotError::PruneCancelled => {
            "All snapshots to be kept are complete. A snapshot whose removal had begun is gone; the \
             next prune or backup removes the rest of it."
        }
        SnapshotError::RestoreFailed { .. } => {
            "The snapshot is unchanged, and what was restored so far stays. Fix the cause; then the \
             same command restores the rest."
        }
        SnapshotError::DestinationFull { .. } => {
            "The snapshot is unchanged, and what was restored so far stays. Free some space; then \
             the same command restores the rest."
        }
        SnapshotError::RestoreCancelled => {
            "The snapshot is unchanged. The same command continues where this one stopped; with \
             --trust-times it skips the comparison of what is already restored."
        }
        SnapshotError::RestoreDiffers { .. } => {
            "The snapshot is unchanged. Either another program changes these files, or the disk does \
             not store what is written to it. The same command restores them again."
        }
        _ => return None,
    })
}
