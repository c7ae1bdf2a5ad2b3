//! The SFTP codec: what one core turns into packets and back in a second.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};

// The module is the store's own affair; its source is compiled in here as it stands.
#[path = "../../crates/store/src/sftp/codec.rs"]
#[allow(dead_code, reason = "only the hot part is measured")]
mod codec;

const HANDLE: &[u8] = b"\0\0\0\0";
/// What OpenSSH's server takes at most.
const WRITE_BYTES_MAX: usize = 255 << 10;

/// A reply as a server sends it, without its length.
fn data_reply(data: &[u8]) -> Vec<u8> {
    let mut body = vec![103, 0, 0, 0, 9];
    body.extend(u32::try_from(data.len()).expect("a packet").to_be_bytes());
    body.extend(data);
    body
}

fn requests(criterion: &mut Criterion) {
    let data = vec![0x5a; WRITE_BYTES_MAX];
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Bytes(WRITE_BYTES_MAX as u64));
    group.bench_function("encode a write of 255 KiB", |bench| {
        let write = codec::Request::Write {
            handle: HANDLE,
            offset: 1 << 40,
            data: &data,
        };
        bench.iter(|| black_box(write).encode(black_box(7)));
    });
    let reply = data_reply(&data);
    group.bench_function("parse data of 255 KiB", |bench| {
        bench.iter(|| {
            codec::reply_id(black_box(&reply)).expect("a reply");
            codec::parse_reply(black_box(&reply))
                .expect("data")
                .eq(&codec::Reply::Handle(b""))
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode a read", |bench| {
        let read = codec::Request::Read {
            handle: HANDLE,
            offset: 1 << 40,
            len: 4096,
        };
        bench.iter(|| black_box(read).encode(black_box(7)));
    });
    let status = [
        101, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 2, b'o', b'k', 0, 0, 0, 0,
    ];
    group.bench_function("parse a status", |bench| {
        bench.iter(|| {
            codec::reply_id(black_box(&status)).expect("a reply");
            codec::parse_reply(black_box(&status)).is_ok()
        });
    });
    group.finish();
}

criterion_group!(benches, requests);
criterion_main!(benches);
