//! What one connection does in the middle of what another one does.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ, READ_WRITE, Served, agent, blocks};
use crate::sessions::ranges;
use crate::slots;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

/// A generation begins with the next write, as at a secret moment.
fn is_due(served: &Served) {
    slots::set(served, "x.luks/state", "secret-due", 0);
}

/// The connection that was idle still has the first generation open. The second one has begun and has gone
/// meanwhile, so its name does not show that there was a later one.
#[test]
fn an_idle_connection_saves_for_the_newest_generation_after_the_next_one_has_gone() {
    an_idle_connection_saves_for_the_newest_generation(&Served::new(EAGER));
}

pub fn an_idle_connection_saves_for_the_newest_generation(served: &Served) {
    std::fs::write(served.path("x.luks"), blocks(16, 1)).unwrap();
    let [mut idle, mut busy] = [served.connect(), served.connect()];
    let idle_handle = idle.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(idle.write(&idle_handle, 0, &[1; BLOCK]), 0);
    let busy_handle = busy.open("x.luks", READ_WRITE).unwrap();
    is_due(served);
    assert_eq!(busy.write(&busy_handle, block(1), &[2; BLOCK]), 0);
    is_due(served);
    let state = served.live();
    assert_eq!(busy.write(&busy_handle, block(2), &[3; BLOCK]), 0);
    assert_eq!(served.numbers(), [1, 2, 3]);
    served.run(&["expire", "x.luks", &served.head(2, "name"), "--yes"]);
    assert_eq!(idle.write(&idle_handle, block(3), &[4; BLOCK]), 0);
    assert!(served.past(3) == state);
    // The one that it has open now goes, too.
    is_due(served);
    assert_eq!(busy.write(&busy_handle, block(4), &[5; BLOCK]), 0);
    is_due(served);
    let state = served.live();
    assert_eq!(busy.write(&busy_handle, block(5), &[6; BLOCK]), 0);
    for number in [4, 3] {
        served.run(&["expire", "x.luks", &served.head(number, "name"), "--yes"]);
    }
    assert_eq!(served.numbers(), [1, 5]);
    assert_eq!(idle.write(&idle_handle, block(6), &[7; BLOCK]), 0);
    assert!(served.past(5) == state && served.past(1) == blocks(16, 1));
    idle.end();
    busy.end();
}

/// Two generations were begun since it read last, and `tidy` keeps others from sealing the first of them.
#[test]
fn an_idle_reader_finds_every_generation_that_was_begun() {
    an_idle_reader_finds_every_generation(&Served::new(EAGER), EAGER);
}

/// The last one begins with this policy.
pub fn an_idle_reader_finds_every_generation(served: &Served, policy: &str) {
    let before = blocks(32, 1);
    std::fs::write(served.path("x.luks"), &before).unwrap();
    served.overwrite(&[(0, vec![2; BLOCK])]);
    let mut reader = served.connect();
    let handle = reader.open(&served.past_path(1), READ).unwrap();
    reader.read(&handle, block(30), 4096).unwrap();
    served.overwrite(&[(block(1), vec![3; BLOCK])]);
    let lock = served.own_file("tidy");
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap();
    served.set_policy(policy);
    let mut writer = served.connect();
    let file = writer.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(writer.write(&file, block(8), &[4; 8 * BLOCK]), 0);
    assert_eq!(served.numbers(), [1, 2, 3]);
    let found = reader.read(&handle, block(8), 8 * 4096).unwrap();
    assert!(found == before[8 * BLOCK..16 * BLOCK]);
    drop(lock);
    reader.end();
    writer.end();
}

fn traced(served: &Served, arguments: &[&str]) -> Client {
    let mut command = Command::new("strace");
    command.args(["-qq", "-f"]).args(arguments).arg(agent());
    command.arg("serve").arg("--root").arg(served.path(""));
    Client::start(command)
}

/// The calls of one request with ranges, as strace prints them.
fn trace_of(
    served: &Served,
    calls: &str,
    request: &str,
    fields: &dyn Fn(&[u8]) -> Vec<u8>,
) -> String {
    let trace = served.path("trace");
    let calls = format!("trace={calls}");
    let mut client = traced(served, &["-y", "-o", trace.to_str().unwrap(), "-e", &calls]);
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    client.own(request, &fields(&handle)).unwrap();
    client.end();
    std::fs::read_to_string(trace).unwrap()
}

fn trace_of_a_save(served: &Served, calls: &str) -> String {
    let all = |handle: &[u8]| ranges(handle, &[(0, block(1600))]);
    trace_of(served, calls, "will-write@sprat", &all)
}

const LOG: &str = "/.sprat-agent/x.luks/logs/";

/// A reader counts what is whole in a log as saved. So nothing whole is ever cut off and replaced by something else,
/// also if the disk is full in the middle of a save.
#[test]
fn a_reader_in_a_save_that_fails_half_way_finds_the_saves_after_it() {
    requires!(needs::program("strace"));
    let state = blocks(2600, 1);
    let served = Served::with_container(EAGER, &state);
    // A session seals the generation before it: the second one does the same as the third one will.
    let text = [0; 2].map(|_| trace_of_a_save(&served, "pwrite64"));
    let writes = text[1].lines().filter(|line| line.contains("pwrite64("));
    let records: Vec<usize> = (1..)
        .zip(writes)
        .filter(|(_, line)| line.contains(LOG))
        .map(|(number, _)| number)
        .collect();
    let mut reader = served.connect();
    let past = reader.open(&served.past_path(1), READ).unwrap();
    // There is no space for the second record. What then cuts the log has to wait.
    let full = format!("inject=pwrite64:error=ENOSPC:when={}", records[1]);
    let slow = "inject=ftruncate:delay_enter=1000000";
    let calls = "trace=pwrite64,ftruncate";
    let mut writer = traced(
        &served,
        &["-o", "/dev/null", "-e", calls, "-e", &full, "-e", slow],
    );
    let handle = writer.open("x.luks", READ_WRITE).unwrap();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::SeqCst) {
                reader.read(&past, block(2599), 4096).unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let answer = writer.own("will-write@sprat", &ranges(&handle, &[(0, block(1600))]));
        ended.store(true, Ordering::SeqCst);
        answer.unwrap_err();
    });
    // Others, as many as the first record has.
    let fields = ranges(&handle, &[(block(1600), block(1000))]);
    writer.own("will-write@sprat", &fields).unwrap();
    for number in (1600..2600).step_by(50) {
        assert_eq!(writer.write(&handle, block(number), &[9; 50 * BLOCK]), 0);
    }
    for number in 1600..2600 {
        let at = usize::try_from(block(number)).unwrap();
        let found = reader.read(&past, block(number), 4096).unwrap();
        assert!(found == state[at..at + BLOCK], "block {number}");
    }
    reader.end();
    writer.end();
}

/// The records of a large save are made durable one after the other. So a power cut tears at most the last one, and
/// no whole record lies behind a torn one: that would be damage.
#[test]
fn a_record_is_durable_before_the_next_one_is_appended() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(1600, 1));
    let (mut records, mut durable) = (0, 0);
    let text = trace_of_a_save(&served, "pwrite64,fdatasync");
    for line in text.lines().filter(|line| line.contains(LOG)) {
        if line.contains("fdatasync(") {
            durable = records;
        } else {
            assert_eq!(durable, records, "{line}");
            records += 1;
        }
    }
    assert!(records >= 2 && durable == records, "{records}");
}

/// Every second block: for each of them the disk would have to be waited for.
#[test]
fn ranges_of_one_request_are_saved_together() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(900, 1));
    let state = served.live();
    let every_second: Vec<_> = (0..400).map(|n| (block(n * 2), block(1))).collect();
    let scattered = |handle: &[u8]| ranges(handle, &every_second);
    for request in ["will-write@sprat", "punch@sprat"] {
        let text = trace_of(&served, "pwrite64,fdatasync", request, &scattered);
        let syncs = text
            .lines()
            .filter(|line| line.contains("fdatasync(") && line.contains(LOG));
        assert_eq!(syncs.count(), 1, "{request}: {text}");
    }
    let mut expected = state.clone();
    for number in 0..400 {
        expected[number * 2 * BLOCK..(number * 2 + 1) * BLOCK].fill(0);
    }
    assert!(served.live() == expected);
    assert!(served.past(1) == state && served.past(2) == state);
}

/// The session before was killed, so the times of the file say nothing. But it is another file.
#[test]
fn a_container_that_was_replaced_after_a_kill_is_noticed() {
    let served = Served::with_container(EAGER, &blocks(16, 1));
    served.overwrite(&[(0, vec![1; BLOCK])]);
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(client.write(&handle, block(1), &[2; BLOCK]), 0);
    client.kill();
    let code = || served.command(&["status"]).status().unwrap().code();
    assert_eq!(code(), Some(0));
    std::fs::copy(served.path("x.luks"), served.path("copy")).unwrap();
    std::fs::rename(served.path("copy"), served.path("x.luks")).unwrap();
    assert_eq!(code(), Some(3));
    served.overwrite(&[(block(2), vec![3; BLOCK])]);
    assert_eq!(served.head(3, "reason"), "written-past");
    let mut client = served.connect();
    let names = client.list(".generations/x.luks");
    let suspect = names.iter().filter(|name| name.contains("-suspect"));
    assert_eq!(suspect.count(), 2, "{names:?}");
    client.end();
}

/// A block of zeros takes no space in a log. When its generation has expired, nothing else may be left of that log.
#[test]
fn a_block_of_zeros_is_read_after_its_log_has_gone() {
    let mut state = blocks(16, 1);
    state[5 * BLOCK..6 * BLOCK].fill(0);
    let served = Served::with_container(EAGER, &state);
    for number in [1, 5, 2] {
        served.overwrite(&[(block(number), vec![9; BLOCK])]);
    }
    served.run(&["expire", "x.luks", &served.head(2, "name"), "--yes"]);
    assert!(!served.path(".sprat-agent/x.luks/logs/2").exists());
    assert!(served.past(1) == state);
    assert!(served.run(&["check", "--read-data"]).contains("0 findings"));
}

/// The reader has read what the first generation saved, and waits before it opens the second one. Meanwhile a block is
/// saved in both. The older content counts.
#[test]
fn a_save_just_before_the_next_generation_begins_is_not_missed() {
    requires!(needs::program("strace"));
    let state = blocks(8, 1);
    let served = Served::with_container(EAGER, &state);
    let mut writer = served.connect();
    let handle = writer.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(writer.write(&handle, 0, &[1; BLOCK]), 0);
    let path = served.past_path(1);
    let trace = served.path("trace");
    let calls = ["-o", trace.to_str().unwrap(), "-e", "trace=openat"];
    let opened = |arguments: &[&str]| {
        let mut reader = traced(&served, arguments);
        let past = reader.open(&path, READ).unwrap();
        (reader, past)
    };
    let (mut reader, past) = opened(&calls);
    reader.read(&past, block(5), 4096).unwrap();
    reader.end();
    let text = std::fs::read_to_string(&trace).unwrap();
    let next = text.lines().position(|line| line.contains("\"g.2\""));
    let slow = format!(
        "inject=openat:delay_enter=2000000:when={}",
        next.unwrap() + 1
    );
    let (mut reader, past) = opened(&[&calls[..], &["-e", &slow]].concat());
    let found = std::thread::scope(|scope| {
        let found = scope.spawn(|| reader.read(&past, block(5), 4096).unwrap());
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(writer.write(&handle, block(5), &[2; BLOCK]), 0);
        is_due(&served);
        assert_eq!(writer.write(&handle, block(5), &[3; BLOCK]), 0);
        found.join().unwrap()
    });
    assert_eq!(served.numbers(), [1, 2]);
    assert!(found == state[5 * BLOCK..6 * BLOCK]);
    reader.end();
    writer.end();
}
