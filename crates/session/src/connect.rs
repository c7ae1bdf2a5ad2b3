//! Connects to a container's store. Only this file and `address.rs` know kinds of location.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use sprat_luks::{AnyHeader, Header, HeaderRead, LuksError, OpenedBy};
use sprat_store::copy::{DataMap, read_remote_map};
use sprat_store::{
    Fence, FileName, FileStat, LocalStore, PastState, Puncher, PuncherOptions, Question, ReadClass,
    SftpOptions, SftpStore, SshTarget, Store, StoreError, StoreErrorKind, StoreFile, WriteJournal,
    Writers,
};

use crate::Failure;
use crate::address::{Location, SshLocation, Target};
use crate::settings::{SessionSettings, SshOptions};
use crate::state::{self, identity};

/// How long a server may take to punch some hundred holes.
const PUNCH_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a server's kernel may take to report who writes, the login included.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(20);

/// Connects to the folder that holds `target`, for work without a session.
pub fn connect(target: &Target, ssh: &SshOptions) -> Result<Arc<dyn Store>, StoreError> {
    open_store(&target.location, ssh, |_| Ok(()))
}

/// `tune` sets what a session needs of a server.
fn open_store(
    location: &Location,
    ssh: &SshOptions,
    tune: impl FnOnce(&mut SftpOptions) -> Result<(), StoreError>,
) -> Result<Arc<dyn Store>, StoreError> {
    match location {
        Location::Local(folder) => Ok(Arc::new(LocalStore::open(folder)?)),
        Location::Ssh(server) => {
            let argv = ssh_target(server)?.argv(&ssh.command);
            let mut options = SftpOptions::new(argv, &server.host, &server.folder);
            if let Some(timeout) = ssh.answer_timeout {
                options.answer_timeout = timeout;
                options.flush_timeout = timeout * 10;
            }
            tune(&mut options)?;
            Ok(Arc::new(SftpStore::connect(options)?))
        }
    }
}

/// The past states that an agent on the server keeps of the container, oldest first. `None`: no agent answers.
///
/// # Errors
/// The server was not reached.
pub fn past_states(
    target: &Target,
    ssh: &SshOptions,
) -> Result<Option<Vec<PastState>>, StoreError> {
    connect(target, ssh)?.past_states(&target.name)
}

/// Where the agent shows a past state of the container: a file in a folder of its own.
pub(crate) fn past_target(target: &Target, state: &PastState) -> Target {
    let folder = format!(".generations/{}", target.name);
    Target {
        location: match &target.location {
            Location::Local(above) => Location::Local(above.join(folder)),
            Location::Ssh(server) => Location::Ssh(SshLocation {
                folder: format!("{}/{folder}", server.folder.trim_end_matches('/')),
                ..server.clone()
            }),
        },
        name: state.name.clone(),
    }
}

/// The folder in which the server's ZFS shows its own snapshots of the account's files, if there is one. Needs a
/// login of its own.
///
/// # Errors
/// The server was not reached, or let no further connection in.
pub fn zfs_snapshots(target: &Target, ssh: &SshOptions) -> Result<Option<String>, StoreError> {
    const NAME: &str = ".zfs/snapshot";
    let (location, shown) = match &target.location {
        Location::Local(folder) => {
            let folder = folder.join(NAME);
            let shown = folder.display().to_string();
            (Location::Local(folder), shown)
        }
        Location::Ssh(server) => {
            // It is at the root of a file system, which the account's home may be; below it nothing is.
            let folder = match server.folder.starts_with('/') {
                true => format!("{}/{NAME}", server.folder.trim_end_matches('/')),
                false => NAME.to_owned(),
            };
            let shown = folder.clone();
            let server = server.clone();
            (Location::Ssh(SshLocation { folder, ..server }), shown)
        }
    };
    match open_store(&location, ssh, |_| Ok(())) {
        Ok(_) => Ok(Some(shown)),
        Err(error) if error.was_answered() && error.kind() != StoreErrorKind::LoginRefused => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn ssh_target(server: &SshLocation) -> Result<SshTarget, StoreError> {
    SshTarget::new(server.user.as_deref(), &server.host, server.port)
}

/// Runs a shell on the server that reports where the container's file holds data. SFTP has no request
/// for that. The shell may take `limit`. `None` for a local container.
///
/// # Errors
/// Why the shell can't report it, as text.
pub fn remote_data_map(
    target: &Target,
    ssh: &SshOptions,
    stat: &FileStat,
    limit: Duration,
) -> Option<Result<DataMap, String>> {
    let Location::Ssh(server) = &target.location else {
        return None;
    };
    let path = server.path_of(&target.name);
    Some(match ssh_target(server) {
        Ok(server) => {
            let argv = server.shell_argv(&ssh.command);
            read_remote_map(&argv, &path, stat.len, stat.modified_s, limit)
                .map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    })
}

/// Loads a container's header, for the work on keys. No key is needed for that.
pub fn header(file: &dyn StoreFile) -> Result<Header, Failure> {
    Header::load(&HeaderBytes(file)).map_err(|error| Failure::of_key_work(&error))
}

/// Loads a header that the kernel's dm-crypt can open. Also returns why user mode can't open it, if it
/// can't.
///
/// # Errors
/// [`crate::Exit::Damaged`] if this machine knows a container there, and no header is left of it.
pub fn any_header(
    file: &dyn StoreFile,
    state_dir: &Path,
    target: &Target,
) -> Result<(AnyHeader, Option<LuksError>), Failure> {
    let header = AnyHeader::load(&HeaderBytes(file), OpenedBy::Kernel).map_err(|error| {
        match identity::policy(state_dir, target, None) {
            Ok(pins) => state::header_unreadable(state_dir, target, &pins, &error),
            Err(_) => Failure::from(&error),
        }
    })?;
    Ok((header, Header::load(&HeaderBytes(file)).err()))
}

/// A container's header as `luks` reads it: the bytes of the file in the store.
pub struct HeaderBytes<'f>(pub &'f dyn StoreFile);

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

/// How a session reaches its store, at the start and again after each lost connection.
///
/// Every ssh that it starts inherits the journal's flock. So the container counts as open for as
/// long as one of them may still deliver bytes.
pub(crate) struct Connection {
    location: Location,
    ssh: SshOptions,
    connections: usize,
    allow_no_fsync: bool,
    quiet_time: Duration,
    flock: OwnedFd,
}

impl Connection {
    /// As the settings say.
    pub(crate) fn new(settings: &SessionSettings, journal: &WriteJournal) -> Result<Self, Failure> {
        let flock = journal.fd().try_clone_to_owned().map_err(|error| {
            Failure::failed("can't share the local lock record").caused_by(&error)
        })?;
        Ok(Self {
            location: settings.target.location.clone(),
            ssh: settings.ssh.clone(),
            connections: settings.connections,
            allow_no_fsync: settings.allow_no_fsync,
            quiet_time: settings.quiet_time,
            flock,
        })
    }

    /// Connects.
    pub(crate) fn connect(&self) -> Result<Arc<dyn Store>, StoreError> {
        self.connect_asking(Vec::new())
    }

    /// Connects, and asks these questions ahead: see [`Store::ask_ahead`].
    pub(crate) fn connect_asking(
        &self,
        questions: Vec<Question>,
    ) -> Result<Arc<dyn Store>, StoreError> {
        let tune = |options: &mut SftpOptions| {
            options.connections = self.connections;
            options.insist_without_fsync = self.allow_no_fsync;
            options.questions = questions;
            options.inherit_fds = vec![self.share_flock(&options.host)?];
            Ok(())
        };
        open_store(&self.location, &self.ssh, tune)
    }

    fn share_flock(&self, host: &str) -> Result<OwnedFd, StoreError> {
        self.flock.try_clone().map_err(|source| StoreError::Io {
            op: "connect",
            object: host.to_owned(),
            source,
        })
    }

    /// Starts a shell on the server that punches holes into `file`; `None` for a local store.
    pub(crate) fn puncher(
        &self,
        file: &FileName,
        fence: Fence,
    ) -> Result<Option<Puncher>, StoreError> {
        let Location::Ssh(server) = &self.location else {
            return Ok(None);
        };
        let puncher = Puncher::start(PuncherOptions {
            program: ssh_target(server)?.shell_argv(&self.ssh.command),
            host: server.host.clone(),
            folder: server.folder.clone(),
            file: file.clone(),
            fence,
            inherit_fds: vec![self.share_flock(&server.host)?],
            answer_timeout: self.ssh.answer_timeout.unwrap_or(PUNCH_TIMEOUT),
        })?;
        Ok(Some(puncher))
    }

    /// Asks the server's kernel whether anybody has `file` open for writing.
    pub(crate) fn writers_of(&self, file: &FileName, stat: &FileStat) -> Writers {
        let unknown = |reason: &str| Writers::Unknown {
            reason: reason.to_owned(),
        };
        let Location::Ssh(server) = &self.location else {
            return unknown("it is no server");
        };
        match ssh_target(server) {
            Ok(target) => {
                let argv = target.shell_argv(&self.ssh.command);
                sprat_store::writers_of(&argv, &server.path_of(file), stat, KERNEL_TIMEOUT)
            }
            Err(error) => unknown(&error.to_string()),
        }
    }

    /// How long blocks that were in flight at a loss are not written again.
    pub(crate) fn quiet_time(&self) -> Duration {
        self.quiet_time
    }

    /// Whether the store is reached by ssh.
    pub(crate) fn is_ssh(&self) -> bool {
        matches!(self.location, Location::Ssh(_))
    }

    /// Whether requests that were sent may still be carried out after this process has ended. On a
    /// server its process outlives the connection; behind a network file system or a FUSE program
    /// another machine or process outlives us. A disk of this machine has no such process.
    pub(crate) fn outlives_us(&self) -> bool {
        match &self.location {
            Location::Ssh(_) => true,
            Location::Local(folder) => is_behind_others(folder),
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

/// Whether a local folder lies on a network file system or a FUSE program's. If that is unknown, it
/// counts as a disk: opening the folder then reports the error.
fn is_behind_others(folder: &Path) -> bool {
    let kind = rustix::fs::statfs(folder).map(|about| about.f_type);
    // The kernel's type is signed here and unsigned there, and 32 bits wide in any case.
    kind.is_ok_and(|kind| BEHIND_OTHERS.contains(&(i128::from(kind) & 0xFFFF_FFFF)))
}
