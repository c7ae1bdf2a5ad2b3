//! The way to the store, walked at the start and again after each lost line.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sprat_luks::HeaderRead;
use sprat_store::{
    Fence, FileName, FileStat, LocalStore, LockError, OwnerNote, Puncher, PuncherOptions,
    ReadClass, SftpOptions, SftpStore, SshTarget, Store, StoreError, StoreFile, WriteJournal,
    Writers, hex,
};

use crate::address::{Location, Target};
use crate::protocol::messages::VolumeStart;
use crate::session::make_private_dir;
use crate::settings::SessionOptions;
use crate::{Access, Failure, patience};

/// How long the ssh of a session that was killed is waited for: it ends by itself once it sees
/// that nobody writes to it any more.
const DEAD_SESSION_GRACE: Duration = Duration::from_secs(5);

/// How long a server may take over some hundred holes.
const PUNCH_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a server's kernel may take to say who writes, the login included.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(20);

/// How to reach the store. Every ssh that it starts inherits the local record's flock, so that
/// the container counts as held for as long as one of them may still deliver bytes.
pub(crate) struct Connection {
    place: Location,
    ssh_command: Vec<OsString>,
    data_channels: usize,
    /// A session that writes is going to want them all.
    data_channels_at_once: bool,
    insist_without_fsync: bool,
    quiet_time: Duration,
    flock: OwnedFd,
}

impl Connection {
    pub(super) fn new(start: &VolumeStart, record: &WriteJournal) -> Result<Self, Failure> {
        let flock = record.fd().try_clone_to_owned().map_err(|error| {
            Failure::failed("can't share the local lock record").caused_by(&error)
        })?;
        Ok(Self {
            place: start.target.place.clone(),
            ssh_command: start.ssh_command.clone(),
            data_channels: start.data_channels,
            data_channels_at_once: start.access == Access::ReadWrite,
            insist_without_fsync: start.allow_no_fsync,
            quiet_time: Duration::from_millis(start.quiet_time_ms),
            flock,
        })
    }

    /// The same without a volume process.
    pub(crate) fn to(options: &SessionOptions, record: &WriteJournal) -> Result<Self, Failure> {
        let flock = record.fd().try_clone_to_owned().map_err(|error| {
            Failure::failed("can't share the local lock record").caused_by(&error)
        })?;
        Ok(Self {
            place: options.target.place.clone(),
            ssh_command: options.ssh_command.clone(),
            data_channels: options.data_channels,
            // A copy sends at once whatever it does.
            data_channels_at_once: true,
            insist_without_fsync: options.allow_no_fsync,
            quiet_time: options.quiet_time,
            flock,
        })
    }

    /// Connects.
    pub(crate) fn connect(&self) -> Result<Arc<dyn Store>, StoreError> {
        match &self.place {
            Location::Local { folder } => Ok(Arc::new(LocalStore::open(folder)?)),
            Location::Ssh {
                user,
                host,
                port,
                folder,
            } => {
                let target = SshTarget::new(user.as_deref(), host, *port)?;
                let mut options = SftpOptions::new(target.argv(&self.ssh_command), host, folder);
                options.data_channels = self.data_channels;
                options.data_channels_at_once = self.data_channels_at_once;
                options.insist_without_fsync = self.insist_without_fsync;
                patience::set_patience(&mut options);
                let flock = self.flock.try_clone().map_err(|source| StoreError::Io {
                    op: "connect",
                    object: host.clone(),
                    source,
                })?;
                options.inherit_fds = vec![flock];
                Ok(Arc::new(SftpStore::connect(options)?))
            }
        }
    }

    /// Starts a shell on the server that punches holes into `file`; `None` for a local store.
    pub(super) fn puncher(
        &self,
        file: &FileName,
        fence: Fence,
    ) -> Result<Option<Puncher>, StoreError> {
        let Location::Ssh {
            user,
            host,
            port,
            folder,
        } = &self.place
        else {
            return Ok(None);
        };
        let target = SshTarget::new(user.as_deref(), host, *port)?;
        let flock = self.flock.try_clone().map_err(|source| StoreError::Io {
            op: "connect",
            object: host.clone(),
            source,
        })?;
        let puncher = Puncher::start(PuncherOptions {
            program: target.shell_argv(&self.ssh_command),
            host: host.clone(),
            folder: folder.clone(),
            file: file.clone(),
            fence,
            inherit_fds: vec![flock],
            answer_timeout: patience::answer_timeout().unwrap_or(PUNCH_TIMEOUT),
        })?;
        Ok(Some(puncher))
    }

    /// Asks the server's kernel whether anybody has `file` open for writing.
    pub(crate) fn writers_of(&self, file: &FileName, stat: &FileStat) -> Writers {
        let unknown = |reason: &str| Writers::Unknown {
            reason: reason.to_owned(),
        };
        let Location::Ssh {
            user,
            host,
            port,
            folder,
        } = &self.place
        else {
            return unknown("it is no server");
        };
        match SshTarget::new(user.as_deref(), host, *port) {
            Ok(target) => {
                let argv = target.shell_argv(&self.ssh_command);
                sprat_store::writers_of(&argv, &format!("{folder}/{file}"), stat, KERNEL_TIMEOUT)
            }
            Err(error) => unknown(&error.to_string()),
        }
    }

    /// How long blocks that were in flight at a loss are held back.
    pub(super) fn quiet_time(&self) -> Duration {
        self.quiet_time
    }

    /// Whether what was sent may still arrive after this process is gone: on a server its process
    /// outlives the line, and a network file system's or a FUSE program's outlives us. A disk of this
    /// machine has none.
    pub(crate) fn outlives_us(&self) -> bool {
        match &self.place {
            Location::Ssh { .. } => true,
            Location::Local { folder } => is_behind_others(folder),
        }
    }
}

/// File systems whose writes another machine or process carries out: their magic numbers
/// (include/uapi/linux/magic.h, and for GPFS and Lustre what statfs(2) gives there).
const BEHIND_OTHERS: [i128; 12] = [
    0x6969,      // NFS
    0xFF53_4D42, // CIFS
    0xFE53_4D42, // SMB2
    0x517B,      // SMB
    0x6573_5546, // FUSE
    0x00C3_6400, // Ceph
    0x0102_1997, // 9p
    0x5346_414F, // AFS
    0x6B41_4653, // kAFS
    0x7375_7245, // Coda
    0x4750_4653, // GPFS
    0x0BD0_0BD0, // Lustre
];

/// Whether a local folder lies on a network file system or a FUSE program's. What can't be told counts
/// as a disk's: those who open the folder say why.
fn is_behind_others(folder: &Path) -> bool {
    let kind = rustix::fs::statfs(folder).map(|about| about.f_type);
    // The kernel's type is signed here and unsigned there, and 32 bits wide in any case.
    kind.is_ok_and(|kind| BEHIND_OTHERS.contains(&(i128::from(kind) & 0xFFFF_FFFF)))
}

/// Opens the container's local record, the proof that this host has it open at most once.
pub(crate) fn open_record(
    state_dir: &Path,
    target: &Target,
    access: Access,
) -> Result<WriteJournal, Failure> {
    let dir = state_dir.join("locks");
    let made = make_private_dir(&dir);
    let id = record_id(target);
    let deadline = Instant::now() + DEAD_SESSION_GRACE;
    let open = || match (&made, access) {
        (Ok(()), _) => WriteJournal::open(&dir, &id),
        _ => WriteJournal::open_in_memory(&dir, &id),
    };
    if access == Access::ReadWrite {
        made.clone()?;
    }
    loop {
        let opened = match open() {
            // Whoever restores on a machine whose disk is full or read-only must be able to.
            Err(LockError::Journal { .. }) if access == Access::ReadOnly => {
                WriteJournal::open_in_memory(&dir, &id)
            }
            opened => opened,
        };
        match opened {
            Err(LockError::HeldHere { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Ok(record) => return Ok(record),
            Err(error @ LockError::HeldHere { .. }) => {
                let mut failure = Failure::from(&error);
                failure.what = format!("another process on this machine has {target} open");
                return Err(failure);
            }
            Err(error) => return Err(Failure::from(&error)),
        }
    }
}

/// Two spellings of one local folder are one container.
pub(crate) fn record_id(target: &Target) -> String {
    let mut target = target.clone();
    if let Location::Local { folder } = &mut target.place
        && let Ok(real) = std::fs::canonicalize(&*folder)
    {
        *folder = real;
    }
    target.id()
}

/// Who this host is to a server: a random id, no name.
pub(crate) fn owner_note(state_dir: &Path) -> Result<OwnerNote, Failure> {
    let path = state_dir.join("host-id");
    let failed = |error: io::Error| {
        Failure::failed(format!("can't keep this host's id in {}", path.display()))
            .caused_by(&error)
    };
    make_private_dir(state_dir)?;
    let known = |path: &PathBuf| -> io::Result<Option<String>> {
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let text = text.trim().to_owned();
                let whole = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
                Ok(whole.then_some(text))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    };
    let host = match known(&path).map_err(failed)? {
        Some(host) => host,
        None => {
            make_host_id(state_dir, &path).map_err(failed)?;
            known(&path)
                .map_err(failed)?
                .ok_or_else(|| failed(io::Error::other("it was just made, but does not read")))?
        }
    };
    Ok(OwnerNote {
        host,
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// Of several processes that make it at once, one wins, and all read that one's.
fn make_host_id(state_dir: &Path, path: &Path) -> io::Result<()> {
    let mut random = [0; 16];
    openssl::rand::rand_bytes(&mut random).map_err(io::Error::other)?;
    let mut made = tempfile::NamedTempFile::new_in(state_dir)?;
    io::Write::write_all(&mut made, hex(&random).as_bytes())?;
    made.as_file().sync_all()?;
    match made.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => {
            // Left torn by a crash, it is of no use to anybody.
            if std::fs::read(path)?.len() != 32 {
                error.file.persist(path)?;
            }
            Ok(())
        }
        Err(error) => Err(error.error),
    }
}

/// A container's header as `luks` reads it: the bytes of the file in the store.
pub(crate) struct HeaderBytes<'a>(pub &'a dyn StoreFile);

impl HeaderRead for HeaderBytes<'_> {
    fn len(&self) -> io::Result<u64> {
        self.0.len().map_err(io::Error::other)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0
            .read_at(offset, buf, ReadClass::Demand)
            .map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_id_is_made_once_and_a_torn_one_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let first = owner_note(dir.path()).unwrap();
        assert_eq!(owner_note(dir.path()).unwrap(), first);
        std::fs::write(dir.path().join("host-id"), "12").unwrap();
        let second = owner_note(dir.path()).unwrap();
        assert_eq!(second.host.len(), 32);
        assert_ne!(second.host, first.host);
    }

    #[test]
    fn two_spellings_of_a_local_folder_share_a_record() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("a")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("b")).unwrap();
        let target = |folder: &str| Target {
            place: Location::Local {
                folder: dir.path().join(folder),
            },
            name: FileName::new("x.luks").unwrap(),
        };
        assert_eq!(record_id(&target("a")), record_id(&target("b")));
        assert_ne!(record_id(&target("a")), record_id(&target(".")));
    }
}
