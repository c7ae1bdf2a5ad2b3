//! Frames between sprat's processes: a length, then JSON or raw bytes, over a Unix socket.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use serde::de::DeserializeOwned;
use zeroize::Zeroizing;

/// Larger than the longest listing; a frame beyond it is a bug on the other side.
const FRAME_BYTES_MAX: usize = 256 << 20;

/// The sending half of a control socket. Clones share it; a frame is never torn by another.
#[derive(Clone, Debug)]
pub(super) struct Sender {
    socket: Arc<Mutex<UnixStream>>,
}

impl Sender {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self {
            socket: Arc::new(Mutex::new(socket)),
        }
    }

    /// Sends one message; an error means that the other process is gone.
    pub(super) fn send<T: Serialize>(&self, message: &T) -> io::Result<()> {
        self.send_bytes(&serde_json::to_vec(message)?)
    }

    /// A copy of the socket's descriptor.
    pub(super) fn descriptor(&self) -> io::Result<OwnedFd> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(OwnedFd::from(socket.try_clone()?))
    }

    /// Sends raw bytes as one frame, such as a secret.
    pub(super) fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len())
            .ok()
            .filter(|_| bytes.len() <= FRAME_BYTES_MAX)
            .ok_or_else(|| io::Error::other(format!("frame of {} bytes", bytes.len())))?;
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        socket.write_all(&len.to_le_bytes())?;
        socket.write_all(bytes)
    }
}

/// The receiving half of a control socket.
#[derive(Debug)]
pub(super) struct Receiver {
    socket: UnixStream,
}

impl Receiver {
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket }
    }

    /// The next message; `None` once the other process has gone.
    pub(super) fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        match self.receive_bytes()? {
            Some(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            None => Ok(None),
        }
    }

    /// The next frame as it is, wiped when dropped.
    pub(super) fn receive_bytes(&mut self) -> io::Result<Option<Zeroizing<Vec<u8>>>> {
        let mut len = [0; 4];
        match self.socket.read_exact(&mut len) {
            Ok(()) => {}
            Err(error) if gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        }
        let len = u32::from_le_bytes(len) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(io::Error::other(format!("frame of {len} bytes")));
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
    fn messages_and_raw_frames_arrive_in_order_and_the_end_is_none() {
        let (near, far) = UnixStream::pair().unwrap();
        let sender = Sender::new(near);
        let mut receiver = Receiver::new(far);
        sender.send(&("a\nb", 7)).unwrap();
        sender.send_bytes(&[0, 255]).unwrap();
        drop(sender);
        let message: Option<(String, u32)> = receiver.receive().unwrap();
        assert_eq!(message, Some(("a\nb".to_owned(), 7)));
        assert_eq!(
            receiver.receive_bytes().unwrap().unwrap().as_slice(),
            &[0, 255]
        );
        assert!(receiver.receive::<u32>().unwrap().is_none());
    }

    #[test]
    fn a_frame_that_never_ends_is_refused_before_it_is_allocated() {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(Receiver::new(far).receive::<u32>().is_err());
    }
}
