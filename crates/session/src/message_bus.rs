//! A small client of a D-Bus message bus: method calls, their answers, and signals.
//!
//! It also answers calls, so that a test can play a service. The D-Bus specification, versions 0.38 and later: "Message Protocol" (header and alignment),
//! "Authentication Protocol" (EXTERNAL, and descriptors). The size of a message is bounded. A
//! message that can't be parsed ends the connection.

mod values;

pub use values::Value;

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use sprat_store::hex;

/// Services send shorter messages than this.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// The part of a header that has a fixed length.
const HEAD_BYTES: usize = 16;
/// How long to wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
const BUS: &str = "org.freedesktop.DBus";

/// Kinds of messages.
const CALL: u8 = 1;
const RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// A message, with the fields that matter here.
#[derive(Debug, Default)]
pub struct Message {
    kind: u8,
    serial: u32,
    /// The object.
    pub path: String,
    /// The interface of the object.
    pub interface: String,
    /// The method or the signal.
    pub member: String,
    destination: String,
    /// The unique name of the connection that sent it.
    pub sender: String,
    reply_to: Option<u32>,
    /// The types of the values.
    pub signature: String,
    body: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// Whether it is this signal.
    #[must_use]
    pub fn is_signal(&self, interface: &str, member: &str) -> bool {
        self.kind == SIGNAL && self.interface == interface && self.member == member
    }

    /// The first value, if it is a boolean.
    #[must_use]
    pub fn boolean(&self) -> Option<bool> {
        let bytes = self.body.get(..4).filter(|_| self.signature == "b")?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?) != 0)
    }

    /// The first value, if it is a string.
    #[must_use]
    pub fn text(&self) -> Option<String> {
        let mut reader = self.reader();
        self.signature
            .starts_with('s')
            .then(|| reader.text().ok())?
    }

    /// The first value, if it is an unsigned number of 32 bits, also inside a variant (the answer of
    /// `org.freedesktop.DBus.Properties.Get`).
    #[must_use]
    pub fn number(&self) -> Option<u32> {
        let mut reader = self.reader();
        let kind = match self.signature.as_str() {
            "v" => reader.signature().ok()?,
            plain => plain.to_owned(),
        };
        kind.starts_with('u').then(|| reader.number().ok())?
    }

    /// All values in their order. Structures, arrays, dictionaries and variants are flattened. Of the
    /// types without a place in [`Value`] there must be none.
    pub fn values(&self) -> io::Result<Vec<Value>> {
        let mut values = Vec::new();
        self.reader().values(&self.signature, &mut values, 0)?;
        Ok(values)
    }

    fn reader(&self) -> Reader<'_> {
        Reader {
            bytes: &self.body,
            at: 0,
        }
    }
}

/// A connection to the bus.
#[derive(Debug)]
pub struct Bus {
    socket: UnixStream,
    serial: u32,
    /// Messages that arrived during the wait for an answer.
    waiting: Vec<Message>,
}

impl Bus {
    /// Connects to the system's bus, or to the bus that the environment names.
    pub fn system() -> io::Result<Self> {
        let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").ok();
        let path = address
            .as_deref()
            .and_then(|address| address.strip_prefix("unix:path="))
            .map(|path| path.split([',', ';']).next().unwrap_or_default());
        let path = path.unwrap_or("/run/dbus/system_bus_socket");
        Self::at(Path::new(path))
    }

    /// Connects to the bus at this socket.
    pub fn at(path: &Path) -> io::Result<Self> {
        let mut socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(ANSWER_MAX))?;
        socket.set_write_timeout(Some(ANSWER_MAX))?;
        let user = rustix::process::geteuid().as_raw().to_string();
        let user = hex(user.as_bytes());
        socket.write_all(format!("\0AUTH EXTERNAL {user}\r\n").as_bytes())?;
        expect_line(&mut socket, "OK ")?;
        socket.write_all(b"NEGOTIATE_UNIX_FD\r\n")?;
        expect_line(&mut socket, "AGREE_UNIX_FD")?;
        socket.write_all(b"BEGIN\r\n")?;
        let mut bus = Self {
            socket,
            serial: 0,
            waiting: Vec::new(),
        };
        bus.call(BUS, "/org/freedesktop/DBus", BUS, "Hello", &[])?;
        Ok(bus)
    }

    /// Calls a method of the bus itself.
    pub fn ask_bus(&mut self, member: &str, texts: &[&str]) -> io::Result<Message> {
        self.call(BUS, "/org/freedesktop/DBus", BUS, member, texts)
    }

    /// Calls a method with strings, and waits for its answer.
    pub fn call(
        &mut self,
        destination: &str,
        path: &str,
        interface: &str,
        member: &str,
        texts: &[&str],
    ) -> io::Result<Message> {
        let mut values = Values::default();
        texts.iter().for_each(|text| values.text(text));
        self.call_with(
            destination,
            path,
            interface,
            member,
            (&"s".repeat(texts.len()), values),
        )
    }

    /// Calls a method with values of these types, and waits for its answer.
    pub fn call_with(
        &mut self,
        destination: &str,
        path: &str,
        interface: &str,
        member: &str,
        (signature, values): (&str, Values),
    ) -> io::Result<Message> {
        let call = Message {
            kind: CALL,
            path: path.to_owned(),
            interface: interface.to_owned(),
            member: member.to_owned(),
            destination: destination.to_owned(),
            signature: signature.to_owned(),
            body: values.0,
            ..Message::default()
        };
        let serial = self.send(&call, None)?;
        self.socket.set_read_timeout(Some(ANSWER_MAX))?;
        loop {
            let message = self.read()?;
            if message.reply_to != Some(serial) {
                self.waiting.push(message);
                continue;
            }
            return match message.kind {
                RETURN => Ok(message),
                _ => Err(io::Error::other(format!("{member} was refused"))),
            };
        }
    }

    /// The next message, or `None` after `patience`.
    pub fn next(&mut self, patience: Duration) -> io::Result<Option<Message>> {
        if !self.waiting.is_empty() {
            return Ok(Some(self.waiting.remove(0)));
        }
        let mut wanted = [PollFd::new(&self.socket, PollFlags::IN)];
        let patience = Timespec::try_from(patience).ok();
        match poll(&mut wanted, patience.as_ref()) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(None),
            polled => drop(polled?),
        }
        self.socket.set_read_timeout(Some(ANSWER_MAX))?;
        self.read().map(Some)
    }

    /// Acquires a well-known name, as a service does.
    pub fn request_name(&mut self, name: &str) -> io::Result<()> {
        let mut values = Values::default();
        values.text(name);
        values.number(0);
        let path = "/org/freedesktop/DBus";
        self.call_with(BUS, path, BUS, "RequestName", ("su", values))
            .map(drop)
    }

    /// Answers a call with values of these types; `fd` is the descriptor of a type `h`.
    pub fn answer(
        &mut self,
        call: &Message,
        (signature, values): (&str, Values),
        fd: Option<&OwnedFd>,
    ) -> io::Result<()> {
        let message = Message {
            kind: RETURN,
            destination: call.sender.clone(),
            reply_to: Some(call.serial),
            signature: signature.to_owned(),
            body: values.0,
            ..Message::default()
        };
        self.send(&message, fd).map(drop)
    }

    /// Sends a signal with values of these types to everybody.
    pub fn emit(
        &mut self,
        path: &str,
        interface: &str,
        member: &str,
        (signature, values): (&str, Values),
    ) -> io::Result<()> {
        let message = Message {
            kind: SIGNAL,
            path: path.to_owned(),
            interface: interface.to_owned(),
            member: member.to_owned(),
            signature: signature.to_owned(),
            body: values.0,
            ..Message::default()
        };
        self.send(&message, None).map(drop)
    }

    fn send(&mut self, message: &Message, fd: Option<&OwnedFd>) -> io::Result<u32> {
        self.serial += 1;
        let bytes = encode(message, self.serial, fd.is_some());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = fd.map(|fd| [std::os::fd::AsFd::as_fd(fd)]);
        if let Some(fds) = &fds {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(&bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        self.socket.write_all(&bytes[sent..])?;
        Ok(self.serial)
    }

    fn read(&mut self) -> io::Result<Message> {
        let mut fds = Vec::new();
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head, &mut fds)?;
        let number = |at: usize| {
            let bytes = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        // The sender is on this machine, so all programs have the same byte order.
        if head[0] != b'l' || head[3] != 1 {
            return Err(unknown());
        }
        let (body_bytes, fields_bytes) = (number(4), number(12));
        if body_bytes > MESSAGE_BYTES_MAX || fields_bytes > MESSAGE_BYTES_MAX {
            return Err(unknown());
        }
        let mut rest = vec![0; fields_bytes.next_multiple_of(8) + body_bytes];
        self.fill(&mut rest, &mut fds)?;
        let mut message = decode_fields(&rest[..fields_bytes])?;
        message.kind = head[1];
        message.serial = u32::try_from(number(8)).unwrap_or_default();
        message.body = rest.split_off(fields_bytes.next_multiple_of(8));
        message.fds = fds;
        if message.kind == ERROR && message.reply_to.is_none() {
            return Err(unknown());
        }
        Ok(message)
    }

    /// Reads so many bytes, and the descriptors that come with them.
    fn fill(&self, mut into: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
        while !into.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let received = recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(into)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let count = match received {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            for control in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = control {
                    fds.extend(rights);
                }
            }
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into = &mut std::mem::take(&mut into)[count..];
        }
        Ok(())
    }
}

fn unknown() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "a message that is not understood",
    )
}

/// Reads a line of the authentication, byte by byte, because a message may follow it.
fn expect_line(socket: &mut UnixStream, begins: &str) -> io::Result<()> {
    let mut line = Vec::new();
    let mut byte = [0];
    while !line.ends_with(b"\r\n") {
        if line.len() > 1024 {
            return Err(unknown());
        }
        socket.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    match line.starts_with(begins.as_bytes()) {
        true => Ok(()),
        false => Err(io::Error::other("the bus refused the login")),
    }
}

fn encode(message: &Message, serial: u32, has_fd: bool) -> Vec<u8> {
    let mut fields = Values::default();
    for (code, kind, text) in [
        (1, "o", &message.path),
        (2, "s", &message.interface),
        (3, "s", &message.member),
        (6, "s", &message.destination),
    ] {
        if !text.is_empty() {
            fields.begin_field(code, kind);
            fields.text(text);
        }
    }
    if !message.signature.is_empty() {
        fields.begin_field(8, "g");
        fields.signature(&message.signature);
    }
    for (code, number) in [(5, message.reply_to), (9, has_fd.then_some(1))] {
        if let Some(number) = number {
            fields.begin_field(code, "u");
            fields.number(number);
        }
    }
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    // No service is to be started for it, and only a call wants an answer.
    let mut head = Values(vec![
        b'l',
        message.kind,
        2 | u8::from(message.kind != CALL),
        1,
    ]);
    head.number(len(&message.body));
    head.number(serial);
    head.number(len(&fields.0));
    head.0.extend(fields.0);
    head.align(8);
    head.0.extend(&message.body);
    head.0
}

fn decode_fields(bytes: &[u8]) -> io::Result<Message> {
    let mut message = Message::default();
    let mut reader = Reader { bytes, at: 0 };
    while reader.at < bytes.len() {
        reader.align(8);
        if reader.at >= bytes.len() {
            break;
        }
        let code = reader.byte()?;
        let kind = reader.signature()?;
        match (code, kind.as_str()) {
            (1, "o") => message.path = reader.text()?,
            (2, "s") => message.interface = reader.text()?,
            (3, "s") => message.member = reader.text()?,
            (5, "u") => message.reply_to = Some(reader.number()?),
            (6, "s") => message.destination = reader.text()?,
            (7, "s") => message.sender = reader.text()?,
            (8, "g") => message.signature = reader.signature()?,
            (_, "s" | "o") => drop(reader.text()?),
            (_, "g") => drop(reader.signature()?),
            (_, "u") => drop(reader.number()?),
            _ => return Err(unknown()),
        }
    }
    Ok(message)
}

/// Values of a message in their order, each aligned relative to the beginning.
#[derive(Debug, Clone, Default)]
pub struct Values(Vec<u8>);

impl Values {
    /// Fills up to a multiple of `to` bytes: a structure and an entry of a dictionary begin at a
    /// multiple of 8.
    pub fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    /// A number of 32 bits, or a boolean (0 or 1).
    pub fn number(&mut self, number: u32) {
        self.align(4);
        self.0.extend(number.to_le_bytes());
    }

    /// A string.
    pub fn text(&mut self, text: &str) {
        self.number(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// A signature; a variant is the signature of its value, then the value.
    pub fn signature(&mut self, text: &str) {
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend(text.as_bytes());
        self.0.push(0);
    }

    /// An array. Each item is as `item` writes it; the items begin at a multiple of `align` bytes.
    pub fn array<T>(
        &mut self,
        align: usize,
        items: impl IntoIterator<Item = T>,
        item: impl Fn(&mut Self, T),
    ) {
        self.number(0);
        let count_at = self.0.len() - 4;
        self.align(align);
        let begin = self.0.len();
        items.into_iter().for_each(|value| item(self, value));
        let bytes = u32::try_from(self.0.len() - begin).unwrap_or(u32::MAX);
        self.0[count_at..count_at + 4].copy_from_slice(&bytes.to_le_bytes());
    }

    fn begin_field(&mut self, code: u8, kind: &str) {
        self.align(8);
        self.0.push(code);
        self.signature(kind);
    }
}

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
}

impl Reader<'_> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, count: usize) -> io::Result<&[u8]> {
        let end = self.at.checked_add(count).ok_or_else(unknown)?;
        let taken = self.bytes.get(self.at..end).ok_or_else(unknown)?;
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> io::Result<u32> {
        self.align(4);
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self) -> io::Result<String> {
        let len = usize::try_from(self.number()?).map_err(|_| unknown())?;
        self.ended(len)
    }

    fn signature(&mut self) -> io::Result<String> {
        let len = usize::from(self.byte()?);
        self.ended(len)
    }

    /// A string of so many bytes, and a zero.
    fn ended(&mut self, len: usize) -> io::Result<String> {
        let bytes = self.take(len)?.to_vec();
        match self.byte()? {
            0 => String::from_utf8(bytes).map_err(|_| unknown()),
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_read_back_and_torn_ones_are_refused() {
        let message = Message {
            kind: CALL,
            path: "/a/b".to_owned(),
            interface: "a.b".to_owned(),
            member: "Do".to_owned(),
            destination: "c.d".to_owned(),
            signature: "ss".to_owned(),
            ..Message::default()
        };
        let bytes = encode(&message, 7, false);
        let len = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let fields = &bytes[HEAD_BYTES..HEAD_BYTES + len];
        let read = decode_fields(fields).unwrap();
        assert_eq!(
            (read.path, read.interface, read.member, read.destination),
            (
                message.path,
                message.interface,
                message.member,
                message.destination
            )
        );
        assert_eq!(read.signature, "ss");
        for end in 0..fields.len() {
            // There is no panic, and the complete fields so far are parsed.
            let _ = decode_fields(&fields[..end]);
        }
        for at in 0..fields.len() {
            for change in [1, 0x80, 0xff] {
                let mut changed = fields.to_vec();
                changed[at] ^= change;
                let _ = decode_fields(&changed);
            }
        }
    }
}
