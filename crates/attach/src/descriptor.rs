//! Passes one open file to another process over a Unix socket.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::AttachError;

/// The byte that carries the descriptor. Ancillary data needs at least one byte of payload. A receiver
/// that reads it as text sees that it is not a line of JSON.
const CARRIER: u8 = 0x46;

/// Sends a copy of `fd` over `socket`, with one byte of payload that [`receive_fd`] removes. The
/// caller's descriptor stays open: close it if the receiver must be the only owner.
pub fn send_fd(socket: &UnixStream, fd: BorrowedFd<'_>) -> Result<(), AttachError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(
        ancillary.push(SendAncillaryMessage::ScmRights(&fds)),
        "the space is made for one descriptor"
    );
    let sent = loop {
        let payload = [IoSlice::new(&[CARRIER])];
        match sendmsg(socket, &payload, &mut ancillary, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other,
        }
    };
    sent.map(drop)
        .map_err(|e| AttachError::io("send descriptor over", "the control socket", e))
}

/// Receives the descriptor that [`send_fd`] sent. Blocks until it arrives. The descriptor is
/// close-on-exec.
///
/// The socket must not be read ahead: read lines without buffering, or use a separate socket for
/// descriptors.
pub fn receive_fd(socket: &UnixStream) -> Result<OwnedFd, AttachError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0_u8; 1];
    loop {
        let mut payload = [IoSliceMut::new(&mut byte)];
        match recvmsg(
            socket,
            &mut payload,
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        ) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                return Err(AttachError::io(
                    "receive descriptor over",
                    "the control socket",
                    e,
                ));
            }
            Ok(_) => break,
        }
    }
    let mut fds: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    match (fds.len(), fds.pop()) {
        (1, Some(fd)) => Ok(fd),
        (got, _) => Err(AttachError::DescriptorCount { got }),
    }
}
