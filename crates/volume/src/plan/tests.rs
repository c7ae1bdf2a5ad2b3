//! Tests of the plan, without threads.

use super::*;

mod batched_flush;

fn plan() -> Plan {
    Plan::new(Limits {
        buffer_blocks: 16,
        in_flight_blocks: 10,
        run_blocks: 4,
        early_blocks: 2,
        behind_blocks: 100,
        batched_flush_blocks: 0,
    })
}

fn block(byte: u8) -> Block {
    Block::from([byte])
}

fn write(plan: &mut Plan, first: u64, bytes: &[u8]) {
    for (index, byte) in (first..).zip(bytes) {
        plan.write(index, vec![block(*byte)]);
    }
}

/// Passes the lock check that the plan asks for.
fn check_lock(plan: &mut Plan) -> EpochNumber {
    match plan.step() {
        Step::CheckLock(epoch) => {
            plan.lock_checked(epoch);
            epoch
        }
        other => panic!("asked for {other:?} instead of a lock check"),
    }
}

fn shape(run: &Run) -> (u64, Vec<u8>) {
    (run.first, run.blocks.iter().map(|block| block[0]).collect())
}

fn send(plan: &mut Plan) -> Vec<Run> {
    std::iter::from_fn(|| plan.next_run()).collect()
}

fn retire(plan: &mut Plan) -> EpochNumber {
    match plan.step() {
        Step::Flush(epoch) => {
            drop(plan.flushed(epoch));
            epoch
        }
        other => panic!("asked for {other:?} instead of a flush"),
    }
}

#[test]
fn adjacent_blocks_are_sent_as_runs_of_limited_length() {
    let mut plan = plan();
    write(&mut plan, 10, &[1, 2, 3, 4, 5]);
    write(&mut plan, 20, &[6]);
    plan.seal();
    assert_eq!(
        plan.next_run().map(|run| shape(&run)),
        None,
        "nothing is sent without a lock check"
    );
    check_lock(&mut plan);
    let runs: Vec<_> = send(&mut plan).iter().map(shape).collect();
    assert_eq!(runs, [(10, vec![1, 2, 3, 4]), (14, vec![5]), (20, vec![6])]);
}

#[test]
fn next_epoch_is_sent_only_after_all_answers_and_the_flush() {
    let mut plan = plan();
    write(&mut plan, 0, &[1]);
    write(&mut plan, 5, &[2]);
    plan.seal();
    write(&mut plan, 0, &[3]);
    plan.seal();
    assert_eq!(check_lock(&mut plan), EpochNumber(1));
    let runs = send(&mut plan);
    assert_eq!(runs.len(), 2);
    plan.answered(&runs[1]);
    assert_eq!(plan.step(), Step::Wait, "one answer is missing");
    assert!(!plan.has_run());
    plan.answered(&runs[0]);
    assert_eq!(plan.step(), Step::Flush(EpochNumber(1)));
    assert!(!plan.has_run(), "the flush has not returned");
    assert_eq!(retire(&mut plan), EpochNumber(1));
    assert_eq!(check_lock(&mut plan), EpochNumber(2));
    assert_eq!(
        send(&mut plan).iter().map(shape).collect::<Vec<_>>(),
        [(0, vec![3])]
    );
}

#[test]
fn open_epoch_is_sent_early_only_if_it_is_large_and_the_oldest() {
    let mut plan = plan();
    write(&mut plan, 0, &[1]);
    assert_eq!(plan.step(), Step::Wait, "too little");
    write(&mut plan, 1, &[2]);
    assert_eq!(check_lock(&mut plan), EpochNumber(1));
    let runs = send(&mut plan);
    assert_eq!(runs.len(), 1);
    plan.seal();
    write(&mut plan, 8, &[3, 4, 5]);
    plan.answered(&runs[0]);
    assert_eq!(plan.step(), Step::Flush(EpochNumber(1)));
    assert!(!plan.has_run(), "an older epoch is not durable");
}

#[test]
fn runs_are_handed_out_while_few_blocks_are_under_way() {
    let mut plan = plan();
    write(&mut plan, 0, &[1; 8]);
    plan.seal();
    write(&mut plan, 100, &[2; 8]);
    plan.seal();
    check_lock(&mut plan);
    for run in send(&mut plan) {
        plan.answered(&run);
    }
    retire(&mut plan);
    for index in 0..7 {
        write(&mut plan, 2 * index, &[3]);
    }
    plan.limits.in_flight_blocks = 3;
    plan.seal();
    check_lock(&mut plan);
    let runs = send(&mut plan);
    // Epoch 2 holds 8 adjacent blocks and a run has 4, so one run reaches the limit.
    assert_eq!(runs.len(), 1);
    plan.answered(&runs[0]);
    assert_eq!(send(&mut plan).len(), 1);
}

#[test]
fn block_overwritten_before_it_is_sent_is_sent_once() {
    let mut plan = plan();
    write(&mut plan, 3, &[1]);
    write(&mut plan, 3, &[2]);
    plan.seal();
    check_lock(&mut plan);
    assert_eq!(
        send(&mut plan).iter().map(shape).collect::<Vec<_>>(),
        [(3, vec![2])]
    );
}

#[test]
fn block_overwritten_while_under_way_is_sent_again_later() {
    let mut plan = plan();
    write(&mut plan, 0, &[1, 2]);
    check_lock(&mut plan);
    let first = plan.next_run().expect("a run");
    write(&mut plan, 0, &[3]);
    write(&mut plan, 7, &[4]);
    plan.seal();
    let meanwhile = send(&mut plan);
    assert_eq!(
        meanwhile.iter().map(shape).collect::<Vec<_>>(),
        [(7, vec![4])]
    );
    assert_eq!(
        shape(&first),
        (0, vec![1, 2]),
        "what is under way is a copy of its own"
    );
    plan.answered(&first);
    let again = send(&mut plan);
    assert_eq!(again.iter().map(shape).collect::<Vec<_>>(), [(0, vec![3])]);
    plan.answered(&meanwhile[0]);
    assert_eq!(plan.step(), Step::Wait);
    plan.answered(&again[0]);
    assert_eq!(retire(&mut plan), EpochNumber(1));
}

#[test]
fn durable_epoch_frees_space_in_the_buffer() {
    let mut plan = plan();
    write(&mut plan, 0, &[1; 15]);
    assert!(plan.room_for(1));
    assert!(!plan.room_for(2));
    plan.seal();
    check_lock(&mut plan);
    while plan.has_run() {
        send_and_answer(&mut plan);
    }
    assert!(!plan.room_for(2), "answered is not durable");
    retire(&mut plan);
    assert!(plan.room_for(4));
}

/// A plan whose flushes behind are due after 64 answered blocks.
fn long_plan() -> Plan {
    Plan::new(Limits {
        buffer_blocks: 1024,
        in_flight_blocks: 1024,
        run_blocks: 16,
        early_blocks: 2,
        behind_blocks: 64,
        batched_flush_blocks: 0,
    })
}

fn send_and_answer(plan: &mut Plan) {
    for run in send(plan) {
        plan.answered(&run);
    }
}

/// First block and end of each range.
fn ranges(retired: &Retired) -> Vec<(u64, u64)> {
    let ranges = retired.ranges();
    ranges
        .iter()
        .map(|range| (range.start, range.end))
        .collect()
}

fn retire_behind(plan: &mut Plan) -> Vec<(u64, u64)> {
    assert_eq!(plan.step(), Step::FlushBehind);
    let behind = plan.begin_behind();
    let retired = plan.flushed_behind(behind);
    plan.resolved_behind();
    ranges(&retired)
}

#[test]
fn answered_part_of_a_long_epoch_is_retired_while_more_is_sent() {
    let mut plan = long_plan();
    write(&mut plan, 0, &[1; 100]);
    check_lock(&mut plan);
    let runs = send(&mut plan);
    assert_eq!(
        runs.len(),
        4,
        "no more is under way than a flush behind covers"
    );
    runs.iter().for_each(|run| plan.answered(run));
    assert_eq!(plan.step(), Step::FlushBehind);
    let behind = plan.begin_behind();
    let more = send(&mut plan);
    assert_eq!(more.iter().map(|run| run.blocks.len()).sum::<usize>(), 36);
    let retired = plan.flushed_behind(behind);
    assert_eq!(ranges(&retired), [(0, 64)]);
    assert_eq!(plan.kept_blocks(), 36);
    assert!(plan.newest(63).is_none() && plan.newest(64).is_some());
    assert_eq!(plan.durable(), EpochNumber(0), "the epoch goes on");
}

#[test]
fn block_overwritten_during_a_flush_behind_waits_until_it_is_resolved() {
    let mut plan = long_plan();
    write(&mut plan, 0, &[1; 64]);
    check_lock(&mut plan);
    send_and_answer(&mut plan);
    let behind = plan.begin_behind();
    write(&mut plan, 5, &[2]);
    write(&mut plan, 200, &[3]);
    let retired = plan.flushed_behind(behind);
    assert_eq!(ranges(&retired), [(0, 5), (6, 64)]);
    write(&mut plan, 6, &[4]);
    let runs = send(&mut plan);
    assert_eq!(
        runs.iter().map(shape).collect::<Vec<_>>(),
        [(200, vec![3]), (5, vec![2])],
        "6 was retired and is not yet resolved"
    );
    plan.resolved_behind();
    write(&mut plan, 7, &[5]);
    let runs = send(&mut plan);
    assert_eq!(
        runs.iter().map(shape).collect::<Vec<_>>(),
        [(6, vec![4, 5])]
    );
}

#[test]
fn after_a_loss_only_unretired_blocks_are_sent_again() {
    let mut plan = long_plan();
    write(&mut plan, 0, &[1; 70]);
    check_lock(&mut plan);
    send_and_answer(&mut plan);
    assert_eq!(retire_behind(&mut plan), [(0, 64)]);
    write(&mut plan, 70, &[1; 4]);
    send_and_answer(&mut plan);
    plan.lost(Generation(1));
    plan.reconnected();
    check_lock(&mut plan);
    let again: Vec<_> = send(&mut plan).iter().map(shape).collect();
    assert_eq!(again, [(64, vec![1; 10])]);
}

#[test]
fn loss_during_a_flush_behind_retires_nothing() {
    let mut plan = long_plan();
    write(&mut plan, 0, &[1; 64]);
    check_lock(&mut plan);
    send_and_answer(&mut plan);
    drop(plan.begin_behind());
    plan.lost(Generation(1));
    plan.reconnected();
    assert_eq!(plan.kept_blocks(), 64);
    assert_eq!(plan.unanswered_blocks(), 64);
}

#[test]
fn last_part_of_a_sealed_epoch_waits_for_its_final_flush() {
    let mut plan = long_plan();
    write(&mut plan, 0, &[1; 70]);
    plan.seal();
    check_lock(&mut plan);
    let runs = send(&mut plan);
    runs.iter().for_each(|run| plan.answered(run));
    assert_eq!(
        plan.step(),
        Step::Wait,
        "6 blocks are unsent, and all there will be"
    );
    send_and_answer(&mut plan);
    assert_eq!(retire(&mut plan), EpochNumber(1));
}

#[test]
fn fully_retired_epoch_needs_a_new_lock_check_after_a_flush() {
    let mut plan = long_plan();
    write(&mut plan, 0, &[1; 64]);
    check_lock(&mut plan);
    send_and_answer(&mut plan);
    assert_eq!(retire_behind(&mut plan), [(0, 64)]);
    assert_eq!(
        plan.seal(),
        EpochNumber(0),
        "all that was written is durable"
    );
    write(&mut plan, 0, &[2; 2]);
    assert_eq!(check_lock(&mut plan), EpochNumber(1));
}

#[test]
fn full_buffer_sends_the_open_epoch() {
    let mut plan = plan();
    write(&mut plan, 0, &[1; 14]);
    check_lock(&mut plan);
    while plan.has_run() {
        send_and_answer(&mut plan);
    }
    assert_eq!(plan.step(), Step::Wait, "less than a flush behind is for");
    assert!(!plan.room_for(4));
    assert_eq!(retire_behind(&mut plan), [(0, 14)]);
    assert!(plan.room_for(4));
    assert_eq!(plan.open_number(), EpochNumber(1), "no flush was called");
}

#[test]
fn full_buffer_sends_even_a_single_block() {
    let mut plan = plan();
    write(&mut plan, 0, &[1]);
    for index in 100..112 {
        plan.add_recovered(index, digest_of(&[0]));
    }
    assert!(!plan.has_run());
    assert!(!plan.room_for(4));
    check_lock(&mut plan);
    send_and_answer(&mut plan);
    assert_eq!(retire_behind(&mut plan), [(0, 1)]);
}

#[test]
fn empty_epoch_is_not_sealed() {
    let mut plan = plan();
    assert_eq!(plan.seal(), EpochNumber(0));
    write(&mut plan, 0, &[1]);
    assert_eq!(plan.seal(), EpochNumber(1));
    assert_eq!(plan.seal(), EpochNumber(1));
}

#[test]
fn after_a_loss_answered_writes_are_sent_again_too() {
    let mut plan = plan();
    write(&mut plan, 0, &[1, 2, 3, 4, 5]);
    plan.seal();
    check_lock(&mut plan);
    let runs = send(&mut plan);
    plan.answered(&runs[0]);
    plan.lost_run(&runs[1]);
    assert_eq!(plan.step(), Step::Reconnect);
    assert!(!plan.has_run());
    plan.reconnected();
    assert_eq!(
        check_lock(&mut plan),
        EpochNumber(1),
        "the lock is checked again"
    );
    // The cursor goes on where it was; within an epoch the order of blocks does not matter.
    let mut again: Vec<_> = send(&mut plan).iter().map(shape).collect();
    again.sort();
    assert_eq!(again, [(0, vec![1, 2, 3, 4]), (4, vec![5])]);
}

#[test]
fn reconnect_waits_for_all_calls_on_the_lost_connection() {
    let mut plan = plan();
    write(&mut plan, 0, &[1, 2, 3, 4, 5]);
    plan.seal();
    check_lock(&mut plan);
    let runs = send(&mut plan);
    plan.lost_run(&runs[0]);
    assert_eq!(plan.step(), Step::Wait);
    plan.answered(&runs[1]);
    assert_eq!(plan.step(), Step::Reconnect);
    assert_eq!(plan.losses(), 1);
}

#[test]
fn failed_flush_sends_the_whole_epoch_again() {
    let mut plan = plan();
    write(&mut plan, 0, &[1]);
    plan.seal();
    check_lock(&mut plan);
    let run = plan.next_run().expect("a run");
    plan.answered(&run);
    let link = plan.connection().expect("up");
    plan.lost(link);
    plan.reconnected();
    assert_eq!(plan.in_doubt_len(), 0, "what was answered can't come late");
    check_lock(&mut plan);
    assert_eq!(
        send(&mut plan).iter().map(shape).collect::<Vec<_>>(),
        [(0, vec![1])]
    );
}

#[test]
fn loss_reported_late_does_not_affect_the_new_connection() {
    let mut plan = plan();
    let old = plan.connection().expect("up");
    plan.lost(old);
    plan.reconnected();
    plan.lost(old);
    assert!(plan.connection().is_some());
}

/// A plan whose block 0 was under way with byte 1 when the connection was lost, and that is
/// connected again.
fn plan_with_block_in_doubt() -> Plan {
    let mut plan = plan();
    write(&mut plan, 0, &[1]);
    plan.seal();
    check_lock(&mut plan);
    let run = plan.next_run().expect("a run");
    plan.lost_run(&run);
    plan.reconnected();
    plan
}

#[test]
fn in_doubt_block_sends_same_bytes_at_once_and_newer_ones_later() {
    let mut plan = plan_with_block_in_doubt();
    write(&mut plan, 0, &[2]);
    write(&mut plan, 1, &[3]);
    plan.seal();
    check_lock(&mut plan);
    let replay = send(&mut plan);
    assert_eq!(replay.iter().map(shape).collect::<Vec<_>>(), [(0, vec![1])]);
    plan.answered(&replay[0]);
    assert_eq!(retire(&mut plan), EpochNumber(1));
    check_lock(&mut plan);
    let others = send(&mut plan);
    assert_eq!(others.iter().map(shape).collect::<Vec<_>>(), [(1, vec![3])]);
    plan.answered(&others[0]);
    assert_eq!(plan.step(), Step::Wait, "newer bytes wait");
    plan.quiet_over(1);
    assert_eq!(
        send(&mut plan).iter().map(shape).collect::<Vec<_>>(),
        [(0, vec![2])]
    );
}

#[test]
fn quiet_time_of_an_earlier_loss_does_not_end_a_later_one() {
    let mut plan = plan_with_block_in_doubt();
    check_lock(&mut plan);
    let run = plan.next_run().expect("the replay");
    plan.lost_run(&run);
    plan.reconnected();
    write(&mut plan, 0, &[2]);
    plan.seal();
    plan.quiet_over(1);
    check_lock(&mut plan);
    let replay = plan.next_run().expect("the replay");
    plan.answered(&replay);
    retire(&mut plan);
    check_lock(&mut plan);
    assert!(!plan.has_run(), "still waits for loss 2");
    plan.quiet_over(2);
    assert!(plan.has_run());
}

#[test]
fn in_doubt_block_is_read_back_once_durable_and_quiet() {
    let mut plan = plan_with_block_in_doubt();
    check_lock(&mut plan);
    let run = plan.next_run().expect("the replay");
    plan.answered(&run);
    retire(&mut plan);
    assert_eq!(plan.step(), Step::Wait);
    assert!(!plan.is_resolved());
    plan.quiet_over(1);
    assert_eq!(plan.step(), Step::ReadBack);
    assert_eq!(plan.next_read_backs(8), [(0, 1)]);
    assert_eq!(plan.judge(0, &[1]), ReadBackResult::Good);
    assert!(plan.is_resolved());
}

#[test]
fn overwritten_in_doubt_block_is_rewritten_a_few_times_then_foreign() {
    let mut plan = plan_with_block_in_doubt();
    plan.quiet_over(1);
    for _ in 0..REWRITES_MAX {
        plan.seal();
        check_lock(&mut plan);
        let run = plan.next_run().expect("the expected bytes");
        assert_eq!(shape(&run), (0, vec![1]));
        plan.answered(&run);
        retire(&mut plan);
        assert_eq!(plan.judge(0, &[9]), ReadBackResult::Rewritten);
    }
    plan.seal();
    check_lock(&mut plan);
    let run = plan.next_run().expect("the expected bytes");
    plan.answered(&run);
    retire(&mut plan);
    assert_eq!(plan.judge(0, &[9]), ReadBackResult::Foreign);
}

#[test]
fn newest_bytes_are_kept_until_they_are_durable() {
    let mut plan = plan();
    write(&mut plan, 0, &[1]);
    plan.seal();
    write(&mut plan, 0, &[2]);
    assert_eq!(plan.newest(0), Some(&block(2)));
    check_lock(&mut plan);
    let run = plan.next_run().expect("epoch 1");
    plan.answered(&run);
    retire(&mut plan);
    assert_eq!(plan.newest(0), Some(&block(2)), "epoch 2 is not durable");
    plan.seal();
    check_lock(&mut plan);
    let run = plan.next_run().expect("epoch 2");
    plan.answered(&run);
    retire(&mut plan);
    assert_eq!(plan.newest(0), None);
}

#[test]
fn recovered_block_that_was_lost_again_delays_newer_bytes() {
    let mut plan = plan();
    write(&mut plan, 3, &[1]);
    plan.seal();
    check_lock(&mut plan);
    let run = plan.next_run().unwrap();
    plan.lost_run(&run);
    plan.add_recovered(3, digest_of(&[1]));
    plan.reconnected();
    write(&mut plan, 3, &[2]);
    plan.seal();
    check_lock(&mut plan);
    let runs = send(&mut plan);
    assert_eq!(runs.iter().map(shape).collect::<Vec<_>>(), [(3, vec![1])]);
    plan.answered(&runs[0]);
    retire(&mut plan);
    check_lock(&mut plan);
    assert!(plan.next_run().is_none(), "newer bytes wait");
    plan.quiet_over(1);
    assert_eq!(plan.next_run().map(|run| shape(&run)), Some((3, vec![2])));
}

#[test]
fn only_an_epoch_of_the_same_single_block_is_dropped() {
    let sealed = |epochs: &[&[u64]]| {
        let mut plan = plan();
        for (version, blocks) in (1..).zip(epochs) {
            for index in *blocks {
                plan.write(*index, vec![block(version)]);
            }
            plan.seal();
        }
        let mut sent: Vec<Vec<(u64, Vec<u8>)>> = Vec::new();
        while plan.durable() < EpochNumber(epochs.len() as u64) {
            check_lock(&mut plan);
            let runs = send(&mut plan);
            runs.iter().for_each(|run| plan.answered(run));
            sent.push(runs.iter().map(shape).collect());
            retire(&mut plan);
        }
        assert!(plan.is_resolved() && plan.kept_blocks() == 0, "{epochs:?}");
        sent
    };
    let one = |index: u64, version: u8| vec![(index, vec![version])];
    assert_eq!(
        sealed(&[&[1, 2], &[7], &[7], &[7], &[0]])[1..],
        [one(7, 4), one(0, 5)]
    );
    assert_eq!(
        sealed(&[&[7], &[7]]),
        [one(7, 1), one(7, 2)],
        "the oldest may be under way"
    );
    for kept in [
        &[&[1][..], &[7], &[8]],
        &[&[1][..], &[7, 8], &[7, 8]],
        &[&[1][..], &[7], &[7, 8]],
        &[&[1][..], &[7, 8], &[7]],
    ] {
        assert_eq!(sealed(kept).len(), 3, "{kept:?}");
    }
}
