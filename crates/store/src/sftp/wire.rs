//! A pair of byte streams to an SFTP server, and how to end it.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::StoreError;

/// Why a wire ended, as far as this side can tell (an exit status, an error message).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// What it means for a caller.
    pub kind: EndingKind,
    /// For people; safe for a terminal.
    pub reason: String,
}

/// See [`Ending`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum EndingKind {
    /// The connection was lost, or nothing is known.
    Lost,
    /// The server can't be reached, or it offers no SFTP.
    Unreachable,
    /// The server refused the login.
    LoginRefused,
    /// The server's host key was not accepted.
    HostKey,
    /// The server broke the protocol.
    Protocol,
    /// The channels of one session end at different machines.
    Elsewhere,
}

/// Ends a wire. Dropping it frees everything that the wire holds.
pub trait WireEnd: Send + Sync {
    /// Ends both directions at once, so that a blocked read or write returns.
    fn cut(&self);

    /// Why it ended, after its reader found the end; may wait up to `patience` for an exit status.
    fn ending(&self, patience: Duration) -> Ending;
}

/// One connection to an SFTP server, before its first byte.
pub struct Wire {
    /// Bytes from the server.
    pub reader: Box<dyn Read + Send>,
    /// Bytes to the server; dropped when no more will be sent.
    pub writer: Box<dyn Write + Send>,
    /// Ends both.
    pub end: Box<dyn WireEnd>,
}

impl Wire {
    /// A wire over a connected socket.
    pub fn over_socket(socket: UnixStream) -> io::Result<Self> {
        Ok(Self {
            reader: Box::new(socket.try_clone()?),
            writer: Box::new(SocketWriter(socket.try_clone()?)),
            end: Box::new(SocketEnd(socket)),
        })
    }
}

/// Makes wires to one server, one per channel.
pub trait Dial: Send + Sync {
    /// Starts a connection; must not wait for the server.
    fn dial(&self) -> Result<Wire, StoreError>;
}

impl<F: Fn() -> Result<Wire, StoreError> + Send + Sync> Dial for F {
    fn dial(&self) -> Result<Wire, StoreError> {
        self()
    }
}

/// Dropping it shows the server that no more will come, as closing a pipe would.
struct SocketWriter(UnixStream);

impl Write for SocketWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for SocketWriter {
    fn drop(&mut self) {
        let _ = self.0.shutdown(Shutdown::Write);
    }
}

struct SocketEnd(UnixStream);

impl WireEnd for SocketEnd {
    fn cut(&self) {
        let _ = self.0.shutdown(Shutdown::Both);
    }

    fn ending(&self, _patience: Duration) -> Ending {
        Ending {
            kind: EndingKind::Lost,
            reason: "the server closed the connection".to_owned(),
        }
    }
}
