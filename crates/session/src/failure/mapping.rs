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
                "nothing was changed. Run the command as root. If you are root: check who owns the \
                 folder, and whether the account may write to it",
            ),
            kind => store_hint(kind),
        };
        let lacks_room = error.kind() == StoreErrorKind::NoSpace;
        Self::of(error, exit, hint).for_lack_of_room(lacks_room)
    }
}

fn store_hint(kind: StoreErrorKind) -> Option<&'static str> {
    Some(match kind {
        StoreErrorKind::NotFound => {
            "nothing was changed. Check the path, and whether its disk is mounted on the server; sprat \
             creates no folders on a server"
        }
        StoreErrorKind::NoSpace => {
            "finished snapshots are unharmed. Free space on the server. If NAME.luks.reserve exists \
             there, `sprat prune` works even on a full disk. Then run the same command again: it \
             continues where it stopped"
        }
        StoreErrorKind::ReadOnly => {
            "finished snapshots are unharmed. The server's file system is mounted read-only. The kernel \
             does this after a disk error. Check the server (dmesg, mount) before the next backup. \
             `restore` and `mount` still work"
        }
        StoreErrorKind::PermissionDenied => {
            "nothing was changed. Check who owns the folder, and whether the account may write to it. \
             `restore` and `mount` also work with an account that may only read"
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
            "finished snapshots are unharmed. The server's name stands for several machines, which \
             don't show the same files. Use the name of one of these machines in the target. Or let ssh \
             send all sessions over one connection (ControlMaster, ControlPath and ControlPersist in \
             ssh_config(5))"
        }
        StoreErrorKind::Unreachable => {
            "check that `sftp HOST` works from this account without a question"
        }
        StoreErrorKind::ProgramMissing => {
            "nothing was changed. Install the program with your package manager (openssh-client), or \
             give another one with --ssh-command"
        }
        StoreErrorKind::LoginRefused => {
            "sprat never asks for passwords or passphrases of ssh. Add this account's public key to the \
             server's authorized_keys, or give a key with --ssh-command 'ssh -i FILE'. A key with a \
             passphrase needs an agent (ssh-add), and a timer has no agent: use a key without a \
             passphrase"
        }
        StoreErrorKind::HostKey => {
            "nothing was sent. Get the fingerprint of the server's key in another way (from its \
             provider, at its console), and compare. If the fingerprints are equal and the server is \
             new to this machine, log in once with `sftp HOST`. If they are equal and the server's key \
             was changed, first remove the old key: `ssh-keygen -R HOST`. If nobody knows why the key \
             changed, stop: another machine may answer in place of the server"
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
        LuksError::NotLuks => {
            "nothing was changed. Check the path: the file there is not a container"
        }
        LuksError::Luks1 | LuksError::KernelOnly { .. } => {
            "nothing was changed. Use this container on a machine whose kernel has dm-crypt (`sprat \
             doctor` shows that), without --mode user"
        }
        LuksError::Unsupported { .. } => {
            "nothing was changed. If the kernel has dm-crypt, try to open the container with cryptsetup"
        }
        LuksError::WrongSecret { .. } => {
            "nothing was changed. Check which key file or passphrase belongs to this container. The \
             recovery key on the sheet opens it, too: write the key to a file, and give \
             --passphrase-file FILE"
        }
        LuksError::HeaderDamaged { .. } => {
            "nothing was changed. The header is damaged, but the data may be intact. If you have a \
             header backup, restore it: `sprat key header-restore`"
        }
        LuksError::Truncated { .. } => {
            "nothing was changed. Don't write to the file. Search the server for an intact copy \
             of it"
        }
        LuksError::Fingerprint { .. } => {
            "nothing was sent and no key was used. Compare the given fingerprint with the sheet. If it \
             is right, either somebody changed the container on the server, or it is another container. \
             Find out which before you continue"
        }
        LuksError::Pin { .. } | LuksError::Refused { .. } | LuksError::Invalid { .. } => {
            "nothing was sent and no key was used. Either somebody changed the container on the server, \
             or it is another container. Find out which before you continue"
        }
        LuksError::OlderHeader { .. } => {
            "nothing was sent and no key was used. The server shows an old header, which removed keys \
             can open. Either the server did that, or another machine restored a saved header. Find out \
             which. Then run `sprat key header-restore`: it restores the header that this machine has \
             saved, so that every machine accepts it"
        }
        LuksError::Sequence { .. } => {
            "nothing was sent and no key was used. Somebody changed the header's sequence number on the \
             server. With this number, removed keys could become valid again. Run `sprat key \
             header-restore`: it restores the header that this machine has saved"
        }
        LuksError::KdfTooCostly { .. } => {
            "nothing was changed. The server may have changed the header to overload this machine"
        }
        LuksError::KdfBudget { .. } => {
            "nothing was changed. sprat tries the cheapest slots first. Use the key of such a slot, for \
             example a key file; or remove slots that nobody uses"
        }
        LuksError::NoMemory { .. } => {
            "nothing was changed. Free some memory, or use another key. A recovery key of sprat needs \
             only 64 MiB of memory"
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
                "nothing was changed. Backups work if the kernel has dm-crypt. Change the keys and the \
                 header of this container with cryptsetup (luksAddKey, luksRemoveKey, luksHeaderBackup) \
                 on the file on the server, while no backup runs",
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
                "nothing was changed on the server. sprat's state folder on this machine must be \
                 writable, and its disk must have free space. --state-dir (or SPRAT_STATE_DIR) sets another \
                 folder",
            ),
            LockError::HeldHere { .. } => (
                Exit::Locked,
                "nothing was changed. Wait for the other run to end. If the container is mounted, run \
                 `sprat umount`",
            ),
            LockError::HeldElsewhere { .. } => (
                Exit::Locked,
                "nothing was changed. If the other machine is dead, asleep or lost, run `sprat \
                 unlock`. It takes over the lock, then waits up to 2 hours and 15 minutes until no data \
                 of the other session can arrive any more. If that machine is off for good, and not \
                 asleep, `sprat unlock --that-machine-is-off` does not wait. An account that may only \
                 read can't unlock: if the other machine is gone for good, restore with --ignore-lock",
            ),
            LockError::Waiting { .. } => (
                Exit::Locked,
                "nothing was changed. Run `sprat unlock`: it waits until no data of that session can \
                 arrive any more. If that machine is off for good, and not asleep, `sprat unlock \
                 --that-machine-is-off` does not wait. An account that may only read can't unlock: if the \
                 other machine is gone for good, restore with --ignore-lock",
            ),
            LockError::Unlisted { .. } => (
                Exit::Failed,
                "no data was changed. This server hides new files until they are closed. In ProFTPD, \
                 set `HiddenStores off`; or use another server",
            ),
            LockError::NotKept { unused, .. } => (
                Exit::Damaged,
                match unused {
                    true => {
                        "nothing was sent to the container. No other session writes to this lock file, \
                         so the server damaged it. The server may damage other files, too. Find out \
                         what is wrong with the server or its disk, then run `sprat check --read-data`"
                    }
                    false => {
                        "sprat sends nothing more. No other session writes to this lock file, so the \
                         server damaged it. The server may have damaged the data of this session, too. \
                         Find out what is wrong with the server or its disk, then run `sprat check \
                         --read-data` before the next backup"
                    }
                },
            ),
            LockError::Lost { .. } => (
                Exit::Locked,
                "sprat sends nothing more. Data of this session may have arrived after the other \
                 session began. Each later run checks whether it has overwritten data of the other \
                 session, and reports that. Find out who took over the lock, then run the same command \
                 again",
            ),
            LockError::TakenMeanwhile { .. } => (
                Exit::Locked,
                "the data that was read may be a mixture of two states, and so may the files that were \
                 already restored. This session changed nothing on the server. Run the same command \
                 again when the other session has ended",
            ),
            LockError::Disturbed { .. } => (
                Exit::Locked,
                "the data that was read may be a mixture of two states, and so may the files that were \
                 already restored. This session changed nothing on the server. Run the same command \
                 again",
            ),
            LockError::Renewed { .. } => (
                Exit::Locked,
                "nothing was changed. Stop that session. If you know that it can't write any more, use \
                 --force",
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
                    "nothing was written. The server shows other data than this machine wrote. Either \
                     the server's disk is damaged, or the server lost data that it had reported as \
                     durable, or it shows an older copy. The local cache of the container was \
                     discarded. Run `sprat check --read-data` to see which files are damaged",
                ),
            ),
            VolumeError::ForeignWrite { .. } => (
                Exit::Damaged,
                Some(
                    "another program writes to the container. Find it before the next run; then run \
                     `sprat check`",
                ),
            ),
            VolumeError::LostDurable { .. } => (
                Exit::Damaged,
                Some(
                    "nothing more was sent. The server had confirmed that these bytes are on its disk, \
                     but they are not. Either the server lost power and its disk cache lost data, or \
                     the server was reset to an older state. Data that was written in the minutes \
                     before is damaged or gone, snapshots included. Find out what happened to the \
                     server, then run `sprat check --read-data` before the next backup",
                ),
            ),
            VolumeError::Overlay { .. } | VolumeError::OverlayFull { .. } => (
                Exit::Failed,
                Some(
                    "nothing on the server was changed. Free space on the disk of the state folder",
                ),
            ),
            VolumeError::Cache { .. } => (
                Exit::Failed,
                Some(
                    "nothing on the server was changed. sprat can't write to its local cache. Remove \
                     the container's folder in the cache folder (/var/cache/sprat, or SPRAT_CACHE_DIR), \
                     then run the command again",
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
            AttachError::NotRoot { .. } => Some("run the command as root (sudo)"),
            AttachError::Busy { .. } => Some(
                "the folder stays mounted. End these programs, or change their working folder (cd). \
                 Then run the same command again",
            ),
            AttachError::StillHeld { .. } => Some(
                "files that are written there still reach the server. End these programs. If the volume \
                 is mounted in another mount namespace, unmount it there: `nsenter -t PID -m umount \
                 DIR`. Then run the same command again",
            ),
            AttachError::NoFuse { .. } | AttachError::NoLoop { .. } => {
                Some("run `sprat doctor` to see what this machine lacks")
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
                "finished snapshots are unharmed. --mode user works without the kernel's dm-crypt",
            ),
            AttachError::ProgramMissing { .. } => {
                Some("install it with your package manager (e2fsprogs)")
            }
            AttachError::MountRefused { damaged: true, .. } => Some(
                "the container was opened, but its file system is damaged. Nothing was changed \
                 except for a journal replay. Run `sprat check` to see what is damaged. To repair \
                 it, open the container file with `cryptsetup open`, and run `e2fsck -f` on the \
                 mapped device",
            ),
            AttachError::MountRefused { .. } => Some(
                "the container was opened, but its file system can't be mounted. Nothing was changed \
                 except for a journal replay",
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
            SnapshotErrorKind::Unreachable => Exit::Unreachable,
            _ => Exit::Failed,
        };
        let mut failure = Self::of(error, exit, snapshot_hint(error));
        // The first is in the message already.
        let messages = error.messages().iter().skip(1).take(10);
        failure.causes.extend(messages.cloned());
        failure.for_lack_of_room(error.lacks_room_in_volume())
    }
}

/// As rsync reports a file that it listed and then did not find.
fn has_vanished(message: &str) -> bool {
    let kinds = ["file has vanished: ", "directory has vanished: "];
    kinds.iter().any(|kind| message.starts_with(kind))
}

fn snapshot_hint(error: &SnapshotError) -> Option<&'static str> {
    Some(match error {
        SnapshotError::RestoreFailed { damaged: true, .. } => {
            "these files are damaged in the container, and were not restored. All others were. Restore the \
             damaged ones from another snapshot. `sprat check --read-data` names all damaged files; the next \
             backup reads them from the source again"
        }
        _ if error.kind() == SnapshotErrorKind::Damaged => {
            "the file system in the container is damaged. Don't write to it. First restore the \
             files that you need. Then run `sprat check --read-data`: it names the damage, and \
             says what to do"
        }
        SnapshotError::SourceEmpty { .. } => {
            "no snapshot was created. Mount the disk of the source. If the source is meant to be empty, \
             set allow_empty = true in the job, or give --allow-empty"
        }
        SnapshotError::SourceMissing { .. } => {
            "no snapshot was created. Mount the disk of the source, or remove the source from the job"
        }
        SnapshotError::HostsMissing { .. } => {
            "no snapshot was created. As root, `ssh HOST rsync --version` must work without a question"
        }
        SnapshotError::SourceChanged { .. } => {
            "no snapshot was created; older snapshots are complete. Run the command again when the \
             source is back"
        }
        SnapshotError::RsyncMissing { .. } => {
            "install rsync (3.1.3 or newer) with your package manager"
        }
        SnapshotError::RsyncFailed { .. } => {
            "older snapshots are complete. What was copied is kept, and the next run continues from \
             there"
        }
        SnapshotError::StoodStill { .. } => {
            "older snapshots are complete. What was copied is kept, and the next run continues from \
             there. Repair the connection of that file system, unmount it, or exclude it from the job"
        }
        SnapshotError::TooMuchNew { .. } => {
            "nothing was copied, and the last snapshot is complete. If this much is right, run \
             `sprat accept` with the copy"
        }
        SnapshotError::VolumeFull { .. } => {
            "older snapshots are complete, and what was copied is kept for the next run. Enlarge the \
             volume with `sprat grow`, or free space with `sprat prune`. If interrupted runs fill the \
             volume, remove their files with `sprat prune --drop-interrupted`"
        }
        SnapshotError::PatternRefused { .. } | SnapshotError::PatternLineRefused { .. } => {
            "no snapshot was created. A pattern that begins with / matches a whole path. Any other \
             pattern matches a name. See rsync(1), FILTER RULES"
        }
        SnapshotError::PatternFile { .. } => {
            "no snapshot was created. Make the file readable, or remove it from the job"
        }
        SnapshotError::DestinationConflicts { .. } => {
            "the snapshot is unchanged. Move the folder away, restore to another place, or remove the \
             folder with --delete"
        }
        SnapshotError::DeleteLosesExcluded { .. } => {
            "nothing was changed. Run with --dry-run to see these files. Add --delete-excluded to \
             delete them, or omit --delete"
        }
        SnapshotError::DeleteReachesContainer { .. } => {
            "nothing was changed. Omit --delete, or restore parts that don't contain the container \
             file, with JOB:PATH"
        }
        SnapshotError::DeleteReachesOtherDisk { .. } => {
            "nothing was changed. Mount the disk that the snapshot has. To restore to the present \
             disk, omit --delete: its other files stay, and files of the same name are replaced"
        }
        SnapshotError::DeleteReachesMounts { .. } => {
            "nothing was changed. Unmount these file systems, omit --delete, or restore parts that \
             don't contain them, with JOB:PATH"
        }
        SnapshotError::DestinationBusy { .. } => {
            "nothing was changed. Run the command again when the other one has ended"
        }
        SnapshotError::DestinationIsOwn { .. } => "nothing was changed. Restore to another folder",
        SnapshotError::NoSuchJob { .. } | SnapshotError::NoSuchSnapshot { .. } => {
            "no snapshot was changed. Run `sprat snapshots` to list the jobs and snapshots"
        }
        SnapshotError::SeveralSnapshots { .. } => {
            "no snapshot was changed. Give one of these names in full"
        }
        SnapshotError::RemovalRefused { .. } => {
            "nothing was removed. If the snapshot is pinned and no longer needed, run `sprat unpin`. \
             To remove the newest complete snapshot of a job, add --allow-newest. To remove the last \
             copy of a file or disk with --yes, add --allow-last-copy"
        }
        SnapshotError::Zone(_) => {
            "no snapshot was changed. Correct `time_zone` in the config, or install the system's time \
             zones (tzdata)"
        }
        SnapshotError::ListUnusable { .. } => {
            "nothing was opened. Omit --offline. If the list is damaged, remove the folder with this job's lists \
             below lists/ in the state folder: the next backup copies them from the container"
        }
        SnapshotError::ListsUnclear { .. } | SnapshotError::NotInLists { .. } => {
            "nothing was opened. Omit --offline"
        }
        SnapshotError::PathRefused { .. } => {
            "nothing was changed. `sprat ls` shows the paths of a snapshot"
        }
        SnapshotError::NoSuchPath { .. } | SnapshotError::NoSuchPathInJob { .. } => {
            "nothing was changed. Give the path that the file had on the machine that was backed up, \
             such as JOB:/home/anna. `sprat find` searches all snapshots for a name, and `sprat ls` shows \
             what a folder has"
        }
        SnapshotError::Cancelled => {
            "what was copied is kept, and the next run continues from there"
        }
        SnapshotError::CheckCancelled => {
            "nothing was changed. Run the same command again: it continues where this one stopped"
        }
        SnapshotError::ReadCancelled => "nothing was changed",
        SnapshotError::PruneCancelled => {
            "all snapshots to be kept are complete. A snapshot whose removal had begun is gone; the \
             next prune or backup removes the rest of it"
        }
        // Nothing else changes a snapshot.
        SnapshotError::RestoreFailed { first_message, .. } if has_vanished(first_message) => {
            "the snapshot was removed meanwhile. The files that were restored so far stay. Restore another \
             snapshot: `sprat snapshots` lists them"
        }
        SnapshotError::RestoreFailed { .. } => {
            "the snapshot is unchanged, and the files that were restored so far stay. Fix the cause, \
             then run the same command again: it restores the rest"
        }
        SnapshotError::DestinationFull { .. } => {
            "the snapshot is unchanged, and the files that were restored so far stay. Free some \
             space, then run the same command again: it restores the rest"
        }
        SnapshotError::RestoreCancelled => {
            "the snapshot is unchanged. Run the same command again: it continues where this one \
             stopped. With --trust-times it does not read the files that are already restored"
        }
        SnapshotError::RestoreDiffers { .. } => {
            "the snapshot is unchanged. Either another program changes these files, or the disk does \
             not store what is written to it. Run the same command again to restore them"
        }
        _ => return None,
    })
}
