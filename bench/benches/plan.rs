//! The plan of write-back: what taking in, giving out and retiring blocks costs.

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sprat_bench::write_back::WriteBack;

const BLOCKS: u64 = 8192;

fn blocks_through_an_epoch(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    group.throughput(Throughput::Elements(BLOCKS));
    for (name, stride) in [("adjacent", 1), ("scattered", 7919)] {
        let id = BenchmarkId::new("write, send and retire 8,192 blocks", name);
        group.bench_function(id, |bench| {
            bench.iter_batched_ref(
                WriteBack::new,
                |write_back| write_back.pass(black_box(BLOCKS), stride),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, blocks_through_an_epoch);
criterion_main!(benches);
