//! A container that this machine has open already, as a command uses it that only reads: through the session that
//! has it open, or on its mount.

use std::fs::{File, Permissions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};

use crate::files::{make_private_folder, short_hash};
use crate::protocol::frames::{Receiver, Sender};
use crate::protocol::messages::{WorkerOrder, WorkerReply};
use crate::protocol::reports::{ContainerFacts, SessionProgress};
use crate::protocol::spawn::{Child, Role};
use crate::settings::{Access, IdentityPolicy, SessionSettings};
use crate::state::journal::journal_id;
use crate::supervisor::Watch;
use crate::supervisor::background;
use crate::supervisor::calls::{Answer, Reply};
use crate::worker::readers;
use crate::{Exit, Failure};

/// How long a reader waits for a session that does not accept readers yet, or no more.
pub(crate) const READER_WAITS: Duration = Duration::from_secs(60);
/// How long an order may take to stop after an interrupt.
const STOP_MAX: Duration = Duration::from_secs(7);
/// How long a killed process may take to end.
const DEATH_LIMIT: Duration = Duration::from_secs(20);
/// How often an interrupt is checked.
pub(crate) const INTERVAL: Duration = Duration::from_millis(100);
/// How often a session that opens tries to announce itself.
const ANNOUNCE_TRIES: usize = 20;

/// The socket on which a session accepts readers. Until it is dropped, who connects waits.
#[derive(Debug)]
pub(crate) struct ReaderSocket {
    listener: UnixListener,
    path: PathBuf,
}

/// A name for the container in the runtime folder.
fn name_in(settings: &SessionSettings, ending: &str) -> String {
    // Another state folder may know another identity of the container, or none.
    let state_dir = short_hash(settings.state_dir.as_os_str().as_bytes());
    format!("{}-{state_dir}.{ending}", journal_id(&settings.target))
}

/// Announces to readers that a session opens the container here, and will accept them. It is a shared flock(2): it
/// ends with its process.
#[derive(Debug)]
pub(crate) struct Opening {
    _file: File,
}

impl Opening {
    /// `None`: it can't be announced. Then readers open the container themselves, or are refused.
    pub(crate) fn announce(settings: &SessionSettings) -> Option<Self> {
        make_private_folder(&settings.runtime_dir).ok()?;
        let path = settings.runtime_dir.join(name_in(settings, "opening"));
        let mut options = File::options();
        let file = options.create(true).truncate(false).write(true).open(path);
        let file = file.ok()?;
        for _ in 0..ANNOUNCE_TRIES {
            // A reader that asks has the other lock for a moment.
            if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
                return Some(Self { _file: file });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    fn is_announced(settings: &SessionSettings) -> bool {
        let path = settings.runtime_dir.join(name_in(settings, "opening"));
        File::open(path).is_ok_and(|file| {
            flock(&file, FlockOperation::NonBlockingLockExclusive)
                == Err(rustix::io::Errno::WOULDBLOCK)
        })
    }
}

/// The folder, open, and the path of the socket in it: a socket's own path has at most 107 bytes.
fn socket_in(settings: &SessionSettings) -> rustix::io::Result<(OwnedFd, PathBuf, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(&settings.runtime_dir, flags, Mode::empty())?;
    let name = name_in(settings, "readers");
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string());
    Ok((folder, short.join(&name), settings.runtime_dir.join(name)))
}

impl ReaderSocket {
    /// Makes the socket of the session, which has the container open alone. One that a killed session left is
    /// replaced.
    pub(crate) fn bind(settings: &SessionSettings) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            Failure::failed("no other command can read through this session").caused_by(&error)
        };
        make_private_folder(&settings.runtime_dir)?;
        let (_folder, short, path) = socket_in(settings).map_err(|error| failed(error.into()))?;
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(short).map_err(failed)?;
        let this = Self { listener, path };
        // The folder is this user's own. So is the socket.
        std::fs::set_permissions(&this.path, Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(this)
    }

    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for ReaderSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The process that reads for this one.
#[derive(Debug)]
enum Far {
    /// The worker of another session.
    Session {
        sender: Sender,
        control: UnixStream,
        descriptors: UnixStream,
    },
    /// A worker of our own, on a mount.
    Own(Child),
}

/// A container that this machine has open already.
#[derive(Debug)]
pub(crate) struct Beside {
    far: Far,
    replies: mpsc::Receiver<Option<WorkerReply>>,
    progress: SessionProgress,
    /// The session restores and exports nothing for others.
    pub(crate) only_reads: bool,
}

/// Whether a session with these settings may read what this machine has open.
fn may_share(settings: &SessionSettings) -> bool {
    let own = settings.ignore_lock || settings.accept_older_state || settings.accept_changed_keys;
    // With `verify_cache` the answers must come from the server. An open volume answers from the cache of this
    // machine.
    settings.access == Access::ReadOnly && !own && !settings.verify_cache
}

/// Whether a session here may accept this reader soon, or does already.
pub(crate) fn may_accept(settings: &SessionSettings) -> bool {
    // A killed session leaves its socket.
    let listens = || {
        socket_in(settings).is_ok_and(|(_folder, socket, _)| UnixStream::connect(socket).is_ok())
    };
    may_share(settings) && (Opening::is_announced(settings) || listens())
}

impl Beside {
    /// Finds out whether this machine has the container open and lets others read it. Waits for a session that is
    /// about to.
    pub(crate) fn find(
        settings: &SessionSettings,
        watch: &mut Watch<'_>,
    ) -> Result<Option<(Self, ContainerFacts)>, Failure> {
        if !may_share(settings) {
            return Ok(None);
        }
        let begun = Instant::now();
        let found = loop {
            let found = match Self::on_mount(settings, watch)? {
                Some(found) => Some(found),
                None => Self::in_session(settings, watch)?,
            };
            let waits = found.is_none() && begun.elapsed() < READER_WAITS;
            if !waits || !Opening::is_announced(settings) {
                break found;
            }
            watch.interrupt.check()?;
            std::thread::sleep(INTERVAL);
        };
        let is_known = |facts: &ContainerFacts| match &settings.pins {
            IdentityPolicy::Known(pins) => pins.fingerprint() == facts.pins.fingerprint(),
            IdentityPolicy::TrustOnce => true,
            IdentityPolicy::Expect(_) => false,
        };
        Ok(found.filter(|(_, facts)| is_known(facts)))
    }

    /// The mount is used as every other program uses it: while it is read, it can't be unmounted.
    fn on_mount(
        settings: &SessionSettings,
        watch: &mut Watch<'_>,
    ) -> Result<Option<(Self, ContainerFacts)>, Failure> {
        let target = settings.target.to_string();
        let Some(mount) = background::mount_of(&settings.runtime_dir, &target) else {
            return Ok(None);
        };
        let (Some(volume), Some(facts)) = (mount.volume, mount.facts) else {
            return Ok(None);
        };
        let dir = PathBuf::from(&mount.dir);
        // In another mount namespace it is not there.
        if sprat_attach::volume_id(&dir).ok().flatten() != Some(volume) {
            return Ok(None);
        }
        let (heard, replies) = mpsc::channel();
        let child = Child::spawn(&settings.program, Role::Keeper, &target, move |reply| {
            let _ = heard.send(reply);
        })?;
        let mut this = Self {
            far: Far::Own(child),
            replies,
            progress: SessionProgress::default(),
            only_reads: false,
        };
        let order = WorkerOrder::Use {
            at: mount.dir,
            file_system: facts.file_system,
        };
        this.call::<()>(&order, watch)?;
        Ok(Some((this, *facts)))
    }

    fn in_session(
        settings: &SessionSettings,
        watch: &mut Watch<'_>,
    ) -> Result<Option<(Self, ContainerFacts)>, Failure> {
        let Ok((_folder, socket, _)) = socket_in(settings) else {
            return Ok(None);
        };
        let begun = Instant::now();
        while begun.elapsed() < READER_WAITS {
            watch.interrupt.check()?;
            let Ok(control) = UnixStream::connect(&socket) else {
                return Ok(None);
            };
            if let Some(found) = Self::greet(control, begun, watch)? {
                return Ok(Some(found));
            }
            std::thread::sleep(INTERVAL);
        }
        Ok(None)
    }

    /// `None`: the session does not accept this reader.
    fn greet(
        control: UnixStream,
        begun: Instant,
        watch: &mut Watch<'_>,
    ) -> Result<Option<(Self, ContainerFacts)>, Failure> {
        let failed = |error: std::io::Error| {
            Failure::failed("can't read through the open session").caused_by(&error)
        };
        let (descriptors, its_descriptors) = UnixStream::pair().map_err(failed)?;
        if sprat_attach::send_fd(&control, its_descriptors.as_fd()).is_err() {
            return Ok(None);
        }
        drop(its_descriptors);
        let mut receiver = Receiver::new(control.try_clone().map_err(failed)?);
        let (heard, replies) = mpsc::channel();
        std::thread::Builder::new()
            .name("from session".to_owned())
            .spawn(move || {
                while let Ok(Some(reply)) = receiver.receive() {
                    let _ = heard.send(Some(reply));
                }
                let _ = heard.send(None);
            })
            .map_err(failed)?;
        while begun.elapsed() < READER_WAITS {
            watch.interrupt.check()?;
            match replies.recv_timeout(INTERVAL) {
                Ok(Some(WorkerReply::ReaderAccepted(facts))) => {
                    let far = Far::Session {
                        sender: Sender::new(control.try_clone().map_err(failed)?),
                        control,
                        descriptors,
                    };
                    let this = Self {
                        far,
                        replies,
                        progress: SessionProgress::default(),
                        only_reads: false,
                    };
                    return Ok(Some((this, *facts)));
                }
                Ok(Some(_)) | Err(RecvTimeoutError::Timeout) => {}
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Sends a descriptor, for the order that follows.
    pub(crate) fn give(&self, descriptor: BorrowedFd<'_>) -> Result<(), Failure> {
        let socket = match &self.far {
            Far::Session { descriptors, .. } => descriptors,
            Far::Own(child) => child.descriptors(),
        };
        Ok(sprat_attach::send_fd(socket, descriptor)?)
    }

    /// Sends an order and waits for its answer.
    pub(crate) fn call<T: Answer>(
        &mut self,
        order: &WorkerOrder,
        watch: &mut Watch<'_>,
    ) -> Result<T, Failure> {
        self.send(order)?;
        let mut stopping: Option<Instant> = None;
        loop {
            if watch.interrupt.requested() {
                let since = *stopping.get_or_insert_with(Instant::now);
                if since.elapsed() < INTERVAL {
                    self.send(&WorkerOrder::Cancel)?;
                }
                if watch.interrupt.hard() || since.elapsed() > STOP_MAX {
                    return Err(Failure::interrupted());
                }
            }
            let reply = match self.replies.recv_timeout(INTERVAL) {
                Ok(Some(reply)) => reply,
                Err(RecvTimeoutError::Timeout) => continue,
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return Err(readers::ended()),
            };
            match reply {
                WorkerReply::Failed(failure) => return Err(failure),
                WorkerReply::OnlyReads => self.only_reads = true,
                WorkerReply::Progress(progress) => {
                    self.progress.rsync = Some(progress);
                    watch.observer.progress(&self.progress);
                }
                WorkerReply::Notice(notice) => watch.observer.notice(notice),
                reply => {
                    if let Some(answer) = T::of(Reply::Worker(reply)) {
                        return Ok(answer);
                    }
                }
            }
        }
    }

    /// Sends orders to the process that reads, on another thread.
    pub(crate) fn sender(&self) -> Sender {
        match &self.far {
            Far::Session { sender, .. } => sender.clone(),
            Far::Own(child) => child.sender(),
        }
    }

    fn send(&self, order: &WorkerOrder) -> Result<(), Failure> {
        match &self.far {
            // That it is gone is seen where the answer is waited for.
            Far::Session { sender, .. } => match sender.send(order) {
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    Err(Failure::new(Exit::Failed, "the order can't be sent").caused_by(&error))
                }
                _ => Ok(()),
            },
            Far::Own(child) => child.send(order),
        }
    }
}

impl Drop for Beside {
    /// The thread that hears the other side has the socket open, too.
    fn drop(&mut self) {
        match &mut self.far {
            Far::Session { control, .. } => {
                let _ = control.shutdown(std::net::Shutdown::Both);
            }
            Far::Own(child) => {
                child.kill();
                child.wait(DEATH_LIMIT);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Target;

    #[test]
    fn socket_of_a_killed_session_promises_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let target = Target::parse("host:x.luks", Path::new("/")).unwrap();
        let (state, run) = (folder.path().join("state"), folder.path().join("run"));
        let settings = SessionSettings::new(target, Access::ReadOnly, state, run);
        assert!(!may_accept(&settings));
        let socket = ReaderSocket::bind(&settings).unwrap();
        assert!(may_accept(&settings));
        drop(socket);
        let (_folder, short, path) = socket_in(&settings).unwrap();
        drop(UnixListener::bind(short).unwrap());
        assert!(path.exists() && !may_accept(&settings));
        let opening = Opening::announce(&settings).unwrap();
        assert!(may_accept(&settings));
        drop(opening);
        assert!(!may_accept(&settings));
    }
}
