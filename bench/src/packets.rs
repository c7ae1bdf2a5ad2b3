//! The codec's part: requests made, replies read.

use crate::codec::{Reply, Request, parse_reply, reply_id};

const HANDLE: &[u8] = b"\0\0\0\0";

/// Makes the packet of a write.
#[must_use]
pub fn write(data: &[u8]) -> Vec<u8> {
    let request = Request::Write {
        handle: HANDLE,
        offset: 1 << 40,
        data,
    };
    request.encode(7)
}

/// Makes the packet of a read.
#[must_use]
pub fn read(len: u32) -> Vec<u8> {
    let request = Request::Read {
        handle: HANDLE,
        offset: 1 << 40,
        len,
    };
    request.encode(7)
}

/// A reply with data as a server sends it, without its length.
#[must_use]
pub fn data_reply(data: &[u8]) -> Vec<u8> {
    let mut body = vec![103, 0, 0, 0, 9];
    body.extend(u32::try_from(data.len()).expect("a packet").to_be_bytes());
    body.extend(data);
    body
}

/// A status as a server sends it, without its length.
#[must_use]
pub fn status_reply() -> Vec<u8> {
    let ok = [0, 0, 0, 0];
    let message = *b"\0\0\0\x07Success\0\0\0\0";
    [&[101, 0, 0, 0, 9][..], &ok, &message].concat()
}

/// Reads a reply; says how many bytes of data it brought.
#[must_use]
pub fn parse(body: &[u8]) -> usize {
    let id = reply_id(body).expect("a reply");
    assert!(id.is_some(), "a greeting is no reply");
    match parse_reply(body).expect("a whole reply") {
        Reply::Data(data) => data.len(),
        _ => 0,
    }
}
