//! Frames between sprat's processes: a kind, a length, then JSON or a secret, over a Unix socket.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use serde::Serialize;
use serde::de::DeserializeOwned;
use sprat_store::IgnorePoison;
use zeroize::Zeroizing;

/// Larger than the longest listing; a frame beyond it is a bug on the other side.
const FRAME_BYTES_MAX: usize = 256 << 20;

/// What a frame holds. It is compared before the content is read as anything: if a message is lost, the
/// secret behind it must never be read, and shown, as a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Message = b'm',
    Secret = b's',
}

/// The sending half of a control socket. Clones share it; a frame is never torn by another.
#[derive(Clone, Debug)]
pub(crate) struct Sender {
    socket: Arc<Mutex<UnixStream>>,
}

impl Sender {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            socket: Arc::new(Mutex::new(socket)),
        }
    }

    /// Sends one message.
    ///
    /// # Errors
    /// `InvalidData` if the message can't be sent at all, such as one with a path that JSON has no
    /// form for; nothing was sent then. Any other error means that the other process is gone.
    pub(crate) fn send<T: Serialize>(&self, message: &T) -> io::Result<()> {
        let bytes = serde_json::to_vec(message).map_err(|error| invalid(error.to_string()))?;
        self.send_frame(Kind::Message, &bytes)
    }

    /// A copy of the socket's descriptor.
    pub(crate) fn descriptor(&self) -> io::Result<OwnedFd> {
        let socket = self.socket.lock().ignore_poison();
        Ok(OwnedFd::from(socket.try_clone()?))
    }

    /// Sends a secret as one frame. Errors as in [`Self::send`].
    pub(crate) fn send_secret(&self, secret: &[u8]) -> io::Result<()> {
        self.send_frame(Kind::Secret, secret)
    }

    fn send_frame(&self, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len())
            .ok()
            .filter(|_| bytes.len() <= FRAME_BYTES_MAX)
            .ok_or_else(|| invalid(format!("a message of {} bytes", bytes.len())))?;
        let mut head = [kind as u8; 5];
        head[1..].copy_from_slice(&len.to_le_bytes());
        let mut socket = self.socket.lock().ignore_poison();
        socket.write_all(&head)?;
        socket.write_all(bytes)
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// The receiving half of a control socket.
#[derive(Debug)]
pub(crate) struct Receiver {
    socket: UnixStream,
}

impl Receiver {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self { socket }
    }

    /// The next message; `None` once the other process has gone.
    ///
    /// # Errors
    /// `InvalidData` for a secret, and for what is no such message. The error never quotes what
    /// arrived.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some(bytes) = self.receive_frame(Kind::Message)? else {
            return Ok(None);
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            // The text of `error` may quote a value of the message.
            let (line, column) = (error.line(), error.column());
            invalid(format!(
                "a message can't be read, from line {line}, column {column} on"
            ))
        })
    }

    /// The next secret, wiped when dropped; `None` once the other process has gone.
    ///
    /// # Errors
    /// `InvalidData` for a message.
    pub(crate) fn receive_secret(&mut self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        self.receive_frame(Kind::Secret)
    }

    fn receive_frame(&mut self, wanted: Kind) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let mut head = [0; 5];
        match self.socket.read_exact(&mut head) {
            Ok(()) => {}
            Err(error) if gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        let [kind, len @ ..] = head;
        if kind != wanted as u8 {
            return Err(invalid(format!(
                "no {wanted:?} arrived, but something else"
            )));
        }
        let len = u32::from_le_bytes(len) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(invalid(format!("a message of {len} bytes")));
        }
        let mut bytes = Zeroizing::new(vec![0; len]);
        match self.socket.read_exact(&mut bytes) {
            Ok(()) => Ok(Some(bytes)),
            Err(error) if gone(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// The process at the other end died: with unread bytes in its queue that is a reset.
fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_secrets_arrive_in_order_and_the_end_is_none() {
        let (near, far) = UnixStream::pair().unwrap();
        let sender = Sender::new(near);
        let mut receiver = Receiver::new(far);
        sender.send(&("a\nb", 7)).unwrap();
        sender.send_secret(&[0, 255]).unwrap();
        drop(sender);
        let message: Option<(String, u32)> = receiver.receive().unwrap();
        assert_eq!(message, Some(("a\nb".to_owned(), 7)));
        assert_eq!(
            receiver.receive_secret().unwrap().unwrap().as_slice(),
            &[0, 255]
        );
        assert!(receiver.receive::<u32>().unwrap().is_none());
    }

    #[test]
    fn frame_that_never_ends_is_refused_before_it_is_allocated() {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(b"m\xff\xff\xff\xff").unwrap();
        assert!(Receiver::new(far).receive::<u32>().is_err());
    }

    #[test]
    fn secret_is_never_read_as_message_and_no_error_quotes_it() {
        let (near, far) = UnixStream::pair().unwrap();
        let sender = Sender::new(near);
        let mut receiver = Receiver::new(far);
        sender.send_secret(b"\"a passphrase\"").unwrap();
        let error = receiver.receive::<u32>().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert!(!error.to_string().contains("passphrase"), "{error}");
        let (near, far) = UnixStream::pair().unwrap();
        Sender::new(near).send(&"a passphrase").unwrap();
        let error = Receiver::new(far).receive::<u32>().unwrap_err();
        assert!(!error.to_string().contains("passphrase"), "{error}");
        let (near, far) = UnixStream::pair().unwrap();
        Sender::new(near).send(&7).unwrap();
        assert!(Receiver::new(far).receive_secret().is_err());
    }

    #[test]
    fn message_that_has_no_form_is_an_error_of_its_own() {
        use std::os::unix::ffi::OsStrExt;
        let (near, _far) = UnixStream::pair().unwrap();
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(b"caf\xe9"));
        let error = Sender::new(near).send(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
