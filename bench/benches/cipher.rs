//! The sector cipher: what one core encrypts and decrypts in a second, by the length of a request.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sprat_luks::{FormatOptions, Header, Secret, SectorCipher, SlotKind, format};

/// The header's bytes as they would lie in the file, for `Header::load`.
fn cipher() -> SectorCipher {
    let secret = Secret::key_file(vec![7; 64]);
    let options = FormatOptions {
        fast_kdf_for_tests: true,
        ..FormatOptions::default()
    };
    let made = format(&[(secret, SlotKind::KeyFile)], &options).expect("a container can be made");
    let len = usize::try_from(made.payload_offset_bytes).expect("16 MiB") + (1 << 20);
    let mut file = vec![0; len];
    for extent in &made.header {
        let at = usize::try_from(extent.offset).expect("in the header");
        file[at..at + extent.bytes.len()].copy_from_slice(&extent.bytes);
    }
    let header = Header::load(&file.as_slice()).expect("our own header");
    SectorCipher::new(&made.volume_key, &header).expect("our own key")
}

fn sectors(criterion: &mut Criterion) {
    let cipher = cipher();
    let mut group = criterion.benchmark_group("cipher");
    for len in [4096, 128 << 10, 1 << 20] {
        let mut data = vec![0x5a; len];
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("encrypt", len), |bench| {
            bench.iter(|| {
                cipher
                    .encrypt(black_box(1 << 30), &mut data)
                    .expect("whole sectors")
            });
        });
        group.bench_function(BenchmarkId::new("encrypt_from", len), |bench| {
            let plain = vec![0x5a; len];
            bench.iter(|| {
                cipher
                    .encrypt_from(black_box(1 << 30), &plain)
                    .expect("whole sectors")
            });
        });
        group.bench_function(BenchmarkId::new("decrypt", len), |bench| {
            bench.iter(|| {
                cipher
                    .decrypt(black_box(1 << 30), &mut data)
                    .expect("whole sectors")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, sectors);
criterion_main!(benches);
