//! Reads one SFTP packet off a connection, and says what came in its place.

use std::io::{ErrorKind, Read};

use super::codec;
use crate::text::printable;

/// The end of a connection, in words.
pub(super) const CLOSED: &str = "the connection was closed";
const CUT: &str = "the connection was closed inside an answer";

/// Why there is no packet.
pub(super) enum NoPacket {
    /// The connection ended, in these words.
    Ended(&'static str),
    /// What arrived is no packet.
    Refused(String),
}

/// Reads one packet, without its length.
pub(super) fn read_packet(reader: &mut impl Read) -> Result<Vec<u8>, NoPacket> {
    let mut head = [0; 4];
    let got = read_up_to(reader, &mut head);
    match got {
        0 => return Err(NoPacket::Ended(CLOSED)),
        4 => {}
        _ => return Err(NoPacket::Ended(CUT)),
    }
    let len = codec::packet_len(head).map_err(|malformed| {
        // A login that prints text (a shell's start-up file) is by far the most frequent cause.
        if head
            .iter()
            .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
        {
            let mut text = head.to_vec();
            text.resize(64, 0);
            let more = reader.read(&mut text[4..]).unwrap_or(0);
            text.truncate(4 + more);
            return NoPacket::Refused(format!(
                "text instead of answers: {}. The start-up files of the account's shell on the server \
                 must print nothing if there is no terminal",
                printable(&text)
            ));
        }
        NoPacket::Refused(malformed.to_string())
    })?;
    let mut body = vec![0; len];
    if read_up_to(reader, &mut body) < len {
        return Err(NoPacket::Ended(CUT));
    }
    Ok(body)
}

/// Reads until `buf` is full or nothing more comes; an error counts as the end.
fn read_up_to(reader: &mut impl Read, buf: &mut [u8]) -> usize {
    let mut done = 0;
    while done < buf.len() {
        match reader.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    done
}
