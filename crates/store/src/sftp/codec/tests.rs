//! The codec against the draft's layouts, hostile bytes and its own inverse.

use super::*;
use proptest::prelude::*;

#[test]
fn init_is_nine_bytes() {
    assert_eq!(Request::Init.encode(77), [0, 0, 0, 5, 1, 0, 0, 0, 3]);
}

#[test]
fn requests_are_laid_out_as_the_draft_says() {
    let read = Request::Read {
        handle: b"h",
        offset: 0x0102,
        len: 9,
    }
    .encode(7);
    assert_eq!(
        read,
        [
            0, 0, 0, 22, 5, 0, 0, 0, 7, 0, 0, 0, 1, b'h', 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 9
        ]
    );
    let create = Request::Open {
        path: "a",
        how: OpenFor::Creating,
    }
    .encode(1);
    assert_eq!(
        create,
        [
            0, 0, 0, 22, 3, 0, 0, 0, 1, 0, 0, 0, 1, b'a', 0, 0, 0, 0x2b, 0, 0, 0, 4, 0, 0, 1, 0x80
        ]
    );
    let fsync = Request::Fsync { handle: b"h" }.encode(2);
    assert_eq!(&fsync[4..13], [200, 0, 0, 0, 2, 0, 0, 0, 17]);
    assert_eq!(&fsync[13..], b"fsync@openssh.com\0\0\0\x01h");
}

#[test]
fn packet_lengths_beyond_the_limit_are_refused_before_reading() {
    assert_eq!(packet_len([0, 0, 0, 5]), Ok(5));
    assert_eq!(packet_len([0, 4, 0, 0]), Ok(PACKET_BYTES_MAX));
    assert!(packet_len([0, 4, 0, 1]).is_err());
    assert!(packet_len([0, 0, 0, 4]).is_err());
    assert!(packet_len([255; 4]).is_err());
}

#[test]
fn version_lists_extensions_by_name_and_version() {
    let mut body = vec![2, 0, 0, 0, 3];
    for (name, version) in [
        ("fsync@openssh.com", "1"),
        ("statvfs@openssh.com", "9"),
        ("x@y", ""),
    ] {
        for text in [name, version] {
            body.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
            body.extend(text.as_bytes());
        }
    }
    let expected = Extensions {
        fsync: true,
        ..Extensions::default()
    };
    assert_eq!(parse_version(&body), Ok(expected));
    assert!(parse_version(&body[..body.len() - 1]).is_err());
    assert_eq!(parse_version(&[2, 0, 0, 0, 4]), Err(Malformed::Version(4)));
}

#[test]
fn status_may_lack_its_message_but_data_must_not_have_a_tail() {
    let status = [101, 0, 0, 0, 1, 0, 0, 0, 4];
    assert_eq!(
        parse_reply(&status),
        Ok(Reply::Status {
            code: 4,
            message: b""
        })
    );
    let data = [103, 0, 0, 0, 1, 0, 0, 0, 1, b'x', b'y'];
    assert_eq!(parse_reply(&data), Err(Malformed::Trailing(1)));
    assert_eq!(parse_reply(&data[..10]), Ok(Reply::Data(b"x")));
    assert_eq!(parse_reply(&data[..9]), Err(Malformed::Short("data")));
}

#[test]
fn name_count_from_the_server_reserves_no_memory() {
    let names = [104, 0, 0, 0, 1, 255, 255, 255, 255];
    assert_eq!(parse_reply(&names), Err(Malformed::Short("file name")));
}

proptest! {
    #[test]
    fn no_packet_panics_and_every_part_lies_within_it(body in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = reply_id(&body);
        let _ = parse_version(&body);
        let _ = parse_limits(&body);
        let _ = parse_statvfs(&body);
        let _ = crate::sftp::agent::parse_states(&body);
        if let Ok(Reply::Data(part) | Reply::Handle(part)) = parse_reply(&body) {
            prop_assert!(part.len() + 9 <= body.len());
        }
    }

    #[test]
    fn no_reply_of_a_known_type_panics(
        kind in prop::sample::select(vec![2u8, 101, 102, 103, 104, 105, 201]),
        lengths in proptest::collection::vec((0u32..40, proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
    ) {
        let mut body = vec![kind, 0, 0, 0, 3];
        for (len, bytes) in &lengths {
            body.extend(len.to_be_bytes());
            body.extend(bytes);
        }
        let _ = parse_version(&body);
        let _ = parse_reply(&body);
    }

    #[test]
    fn data_reply_is_parsed_as_it_was_sent(id: u32, data in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let mut body = vec![DATA];
        body.extend(id.to_be_bytes());
        body.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        body.extend(&data);
        prop_assert_eq!(reply_id(&body), Ok(Some(id)));
        prop_assert_eq!(parse_reply(&body), Ok(Reply::Data(&data)));
    }

    #[test]
    fn every_request_announces_its_own_length(
        id: u32, offset: u64, path in "[a-zé/]{0,40}", data in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let handle = &data[..data.len().min(4)];
        let (path, how) = (path.as_str(), OpenFor::Writing);
        for request in [
            Request::Init, Request::Limits, Request::Open { path, how },
            Request::Write { handle, offset, data: &data }, Request::Read { handle, offset, len: id },
            Request::Close { handle }, Request::Fsync { handle }, Request::SetLen { handle, len: offset },
            Request::Rename { from: path, to: path }, Request::PosixRename { from: path, to: path },
            Request::Agent(AgentRequest::Generations { path }),
            Request::Statvfs { path }, Request::Lstat { path }, Request::Readdir { handle },
        ] {
            let packet = request.encode(id);
            let announced = u32::from_be_bytes(packet[..4].try_into().unwrap());
            prop_assert_eq!(announced as usize, packet.len() - 4);
            prop_assert_eq!(packet[4], request.kind());
        }
    }
}
