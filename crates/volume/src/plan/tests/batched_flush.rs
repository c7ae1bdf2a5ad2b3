//! Tests of epochs that are sent in one batch with their fsync.

use super::*;

/// A plan whose sealed epochs are sent in one batch with their fsync.
fn batching_plan() -> Plan {
    Plan::new(Limits {
        buffer_blocks: 1024,
        in_flight_blocks: 1024,
        run_blocks: 4,
        early_blocks: 8,
        behind_blocks: 64,
        batched_flush_blocks: 6,
    })
}

fn step_together(plan: &mut Plan) -> Vec<(u64, usize)> {
    let epoch = check_lock(plan);
    assert!(!plan.has_run(), "no sender may take a part of it");
    assert_eq!(plan.step(), Step::BatchedFlush(epoch));
    let runs = plan.begin_batched_flush();
    assert_eq!(plan.step(), Step::Wait, "until all of it was answered");
    assert!(!plan.has_run());
    runs.iter().for_each(|run| plan.answered(run));
    let _ = plan.flushed(epoch);
    runs.iter()
        .map(|run| (run.first, run.blocks.len()))
        .collect()
}

#[test]
fn small_epoch_is_sent_in_one_batch_and_nothing_behind_it() {
    let mut plan = batching_plan();
    write(&mut plan, 3, b"abcde");
    write(&mut plan, 20, b"f");
    assert_eq!(plan.step(), Step::Wait, "it is open");
    let first = plan.seal();
    write(&mut plan, 3, b"x");
    let second = plan.seal();
    assert_eq!(step_together(&mut plan), [(3, 4), (7, 1), (20, 1)]);
    assert_eq!(plan.durable(), first);
    assert_eq!(step_together(&mut plan), [(3, 1)]);
    assert_eq!(plan.durable(), second);
    assert!(plan.is_resolved());
}

#[test]
fn large_or_partly_sent_epoch_is_not_batched() {
    let mut plan = batching_plan();
    write(&mut plan, 0, b"abcdefg");
    plan.seal();
    check_lock(&mut plan);
    assert!(plan.has_run(), "seven blocks are too many");
    let first = plan.next_run().unwrap();
    assert!(plan.has_run(), "what is left of it, too");
    plan.answered(&first);
    send_and_answer(&mut plan);
    let _ = plan.flushed(EpochNumber(1));
    // Sent early, while it was open.
    write(&mut plan, 0, b"abcdefgh");
    check_lock(&mut plan);
    let begun = plan.next_run().unwrap();
    plan.seal();
    assert!(matches!(plan.step(), Step::Wait) && plan.has_run());
    plan.answered(&begun);
    assert!(plan.has_run());
}

#[test]
fn lost_epoch_is_sent_again_unbatched_while_it_is_in_doubt() {
    let mut plan = batching_plan();
    write(&mut plan, 0, b"ab");
    plan.seal();
    check_lock(&mut plan);
    let runs = plan.begin_batched_flush();
    runs.iter().for_each(|run| plan.lost_run(run));
    assert_eq!(plan.step(), Step::Reconnect);
    plan.reconnected();
    let epoch = check_lock(&mut plan);
    assert_eq!(plan.in_doubt_len(), 2);
    assert!(plan.has_run(), "its blocks are sent as runs");
    send_and_answer(&mut plan);
    assert_eq!(plan.step(), Step::Flush(epoch));
}
