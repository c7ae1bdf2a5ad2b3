//! The volume process and the worker as the session sees them: started, heard, ended.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Failure;
use crate::protocol::frames::{Receiver, Sender};

/// What a process of a session is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// V of a session in the foreground; dies with this process.
    Volume,
    /// V of a background mount; outlives this process once it is detached.
    BackgroundVolume,
    /// W; dies with this process.
    Worker,
    /// The keeper of a background mount; outlives this process.
    Keeper,
}

impl Role {
    fn command(self) -> &'static str {
        match self {
            Self::Volume | Self::BackgroundVolume => "volume-process",
            Self::Worker => "worker",
            Self::Keeper => "mount-keeper",
        }
    }

    fn dies_with_us(self) -> bool {
        matches!(self, Self::Volume | Self::Worker)
    }

    /// What `ps` and `top` show before the container's name.
    pub(crate) fn title(self) -> &'static CStr {
        match self {
            Self::Volume | Self::BackgroundVolume => c"sprat: volume",
            Self::Worker => c"sprat: worker",
            Self::Keeper => c"sprat: mount",
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Volume | Self::BackgroundVolume => "volume process",
            Self::Worker => "worker",
            Self::Keeper => "mount keeper",
        }
    }
}

/// One process of a session, with its control socket (its standard input) and the socket on which
/// descriptors are passed (its standard output).
#[derive(Debug)]
pub(crate) struct Child {
    role: Role,
    process: std::process::Child,
    sender: Sender,
    descriptors: UnixStream,
    ended: Option<ExitStatus>,
}

impl Child {
    /// Starts `program` for `container` and hands each message of it to `deliver`, then `None` once
    /// it is gone, on a thread of its own.
    ///
    /// The kernel ties a child to the *thread* that started it: to be called on one that lives as
    /// long as the session.
    pub(crate) fn spawn<T: DeserializeOwned + 'static>(
        program: &Path,
        role: Role,
        container: &str,
        deliver: impl Fn(Option<T>) + Send + 'static,
    ) -> Result<Self, Failure> {
        let failed = |what: &str, error: &dyn std::error::Error| {
            Failure::failed(format!("can't start the {}: {what}", role.name())).caused_by(error)
        };
        let (control, its_control) =
            UnixStream::pair().map_err(|error| failed("control socket", &error))?;
        let (descriptors, its_descriptors) =
            UnixStream::pair().map_err(|error| failed("descriptor socket", &error))?;
        let mut command = Command::new(program);
        let title = role.title().to_string_lossy();
        command
            .arg0(format!("{title} {container}"))
            .arg(role.command())
            .stdin(Stdio::from(OwnedFd::from(its_control)))
            .stdout(Stdio::from(OwnedFd::from(its_descriptors)));
        // udev may be in another namespace, or nowhere: libdevmapper, which W uses in kernel mode,
        // would wait for its word for ever.
        command.env("DM_DISABLE_UDEV", "1");
        if role.dies_with_us() {
            sprat_attach::bind_to_this_process(&mut command);
        }
        let process = command
            .spawn()
            .map_err(|error| failed(&program.display().to_string(), &error))?;
        tracing::debug!(role = role.name(), pid = process.id(), "started");
        // The command holds the far ends; with them open here the end would never be seen.
        drop(command);
        let listening = control
            .try_clone()
            .map_err(|error| failed("control socket", &error))?;
        let child = Self {
            role,
            process,
            sender: Sender::new(control),
            descriptors,
            ended: None,
        };
        std::thread::Builder::new()
            .name(format!("from {}", role.name()))
            .spawn(move || listen(Receiver::new(listening), &deliver))
            .map_err(|error| failed("thread", &error))?;
        Ok(child)
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    /// Sends an order. That the process is gone is heard elsewhere.
    ///
    /// # Errors
    /// An order that can't be sent at all: nobody will ever answer it.
    pub(crate) fn send<T: Serialize>(&self, order: &T) -> Result<(), Failure> {
        self.unless_gone(self.sender.send(order))
    }

    /// The sending half of the control socket, for another thread.
    pub(crate) fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// Sends a secret. Errors as in [`Self::send`].
    pub(crate) fn send_secret(&self, secret: &[u8]) -> Result<(), Failure> {
        self.unless_gone(self.sender.send_secret(secret))
    }

    fn unless_gone(&self, sent: std::io::Result<()>) -> Result<(), Failure> {
        match sent {
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                let what = format!("the {} can't be given its orders", self.role.name());
                Err(Failure::failed(what).caused_by(&error))
            }
            _ => Ok(()),
        }
    }

    /// The control socket itself, to be handed to another process.
    pub(crate) fn control(&self) -> Result<OwnedFd, Failure> {
        self.sender
            .descriptor()
            .map_err(|error| Failure::failed("can't copy the control socket").caused_by(&error))
    }

    /// The socket on which descriptors are passed.
    pub(crate) fn descriptors(&self) -> &UnixStream {
        &self.descriptors
    }

    /// Ends it with SIGKILL. What it holds in the kernel may take a moment to go.
    pub(crate) fn kill(&mut self) {
        if self.ended.is_none() {
            let _ = self.process.kill();
        }
    }

    /// Waits for its end for at most `limit`; false if it is still there.
    pub(crate) fn wait(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_millis(1);
        while self.ended.is_none() {
            match self.process.try_wait() {
                Ok(Some(status)) => self.ended = Some(status),
                Ok(None) if Instant::now() >= deadline => return false,
                Ok(None) => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(20));
                }
                // Not our child any more: nothing is left to wait for.
                Err(_) => return true,
            }
        }
        true
    }

    /// How it ended, in words.
    pub(crate) fn end(&mut self) -> String {
        self.wait(Duration::from_secs(1));
        tracing::debug!(role = self.role.name(), status = ?self.ended, "ended");
        match self.ended {
            Some(status) => format!("the {} ended: {status}", self.role.name()),
            None => format!("the {} closed its control socket", self.role.name()),
        }
    }
}

fn listen<T: DeserializeOwned>(mut receiver: Receiver, deliver: &impl Fn(Option<T>)) {
    // A frame that can't be read comes from a program that isn't this one: as good as gone.
    while let Ok(Some(message)) = receiver.receive() {
        deliver(Some(message));
    }
    deliver(None);
}

/// The other side: takes the two sockets from standard input and output of this process, and puts
/// `/dev/null` there, so that nothing it starts inherits or writes to them.
pub(crate) fn take_sockets() -> std::io::Result<(UnixStream, UnixStream)> {
    let control = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let descriptors = UnixStream::from(std::io::stdout().as_fd().try_clone_to_owned()?);
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    // A socket, not a terminal or file: refuses to run when a person types the hidden command.
    control.peer_addr()?;
    Ok((control, descriptors))
}

/// Leaves it to the session process to end this one in order: a service manager or a shutdown
/// sends SIGTERM to every process at once. A handler, not SIG_IGN, which ssh and rsync would
/// inherit.
pub(crate) fn leave_signals_to_the_session() {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        // Without it the process ends too early, which every other part is prepared for.
        let _ = signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)));
    }
}
