//! The plan of write-back: what taking in, giving out and retiring a block costs.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

// The module is the volume's own affair; its source is compiled in here as it stands.
#[path = "../../crates/volume/src/plan.rs"]
#[allow(dead_code, reason = "only the hot part is measured")]
mod plan;

use plan::{Block, Limits, Plan, Step};

/// As many as the default buffer of 256 MiB holds.
const BUFFER_BLOCKS: usize = 65_536;

fn limits() -> Limits {
    Limits {
        buffer_blocks: BUFFER_BLOCKS,
        in_flight_blocks: 2048,
        run_blocks: 256,
        early_blocks: 256,
    }
}

/// Sends all that can be sent now, as if every answer came at once; ends when there is nothing to do.
fn drain(plan: &mut Plan) {
    loop {
        match plan.step() {
            Step::Permit(epoch) => plan.permitted(epoch),
            Step::Flush(epoch) => drop(plan.flushed(epoch)),
            _ => match plan.next_run() {
                Some(run) => plan.answered(&run),
                None => return,
            },
        }
    }
}

fn writes(criterion: &mut Criterion) {
    let block: Block = Arc::from(vec![0x5a; 4096]);
    let blocks = 8192_u64;
    let mut group = criterion.benchmark_group("plan");
    group.throughput(Throughput::Elements(blocks));
    for (name, stride) in [("adjacent", 1), ("scattered", 7919)] {
        group.bench_function(
            BenchmarkId::new("write, send, retire 8,192 blocks", name),
            |bench| {
                bench.iter_batched_ref(
                    || Plan::new(limits()),
                    |plan| {
                        for number in 0..blocks {
                            plan.write(black_box(number * stride), vec![block.clone()]);
                        }
                        plan.seal();
                        drain(plan);
                    },
                    BatchSize::LargeInput,
                );
            },
        );
    }
    group.finish();
}

criterion_group!(benches, writes);
criterion_main!(benches);
