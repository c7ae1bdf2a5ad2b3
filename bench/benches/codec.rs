//! The SFTP codec: what one core turns into packets and back in a second.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sprat_bench::packets;

/// What OpenSSH's server takes at most, nearly.
const DATA_BYTES: usize = 255 << 10;

fn packets_made_and_read(criterion: &mut Criterion) {
    let data = vec![0x5a; DATA_BYTES];
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Bytes(DATA_BYTES as u64));
    group.bench_function("make a write of 255 KiB", |bench| {
        bench.iter(|| packets::write(black_box(&data)));
    });
    let reply = packets::data_reply(&data);
    group.bench_function("read data of 255 KiB", |bench| {
        bench.iter(|| packets::parse(black_box(&reply)));
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("make a read", |bench| {
        bench.iter(|| packets::read(black_box(4096)));
    });
    let status = packets::status_reply();
    group.bench_function("read a status", |bench| {
        bench.iter(|| packets::parse(black_box(&status)));
    });
    group.finish();
}

criterion_group!(benches, packets_made_and_read);
criterion_main!(benches);
