//! A takeover from a client whose server process was stopped at any moment of its writes: the next session writes at
//! once, and no byte of the old one arrives any more, however the old process goes on.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::dice::{self, Dice};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ_WRITE, Served, agent, blocks};
use crate::sessions::{DENIED, begin, join};

const BLOCKS: u64 = 64;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

#[test]
fn no_byte_of_a_stopped_session_arrives_after_the_next_one_has_begun() {
    let mut dice = Dice::new(dice::seed());
    let rounds = dice::number("SPRAT_TORTURE_ROUNDS").map_or(8, |rounds| rounds * 2);
    let served = Served::with_container(EAGER, &blocks(usize::try_from(BLOCKS).unwrap(), 1));
    let mut ended = 0;
    for round in 0..rounds {
        let mut old = served.connect();
        let session = begin(&mut old);
        let handle = old.open("x.luks", READ_WRITE).unwrap();
        let pid = Pid::from_child(&old.child);
        let seed = dice.any();
        // Some writes of each request are behind others in its pipe.
        let writer = std::thread::spawn(move || {
            let mut dice = Dice::new(seed);
            loop {
                let writes: Vec<_> = (0..12)
                    .map(|_| (block(dice.below(BLOCKS)), blocks(1, dice.any())))
                    .collect();
                if old.write_all(&handle, &writes) < writes.len() {
                    return old;
                }
            }
        });
        std::thread::sleep(Duration::from_millis(dice.below(30)));
        kill_process(pid, Signal::STOP).unwrap();

        let mut new = served.connect();
        assert!(begin(&mut new) > session);
        let mut state = served.live();
        let handle = new.open("x.luks", READ_WRITE).unwrap();
        let at = dice.below(BLOCKS);
        let data = blocks(1, dice.any());
        assert_eq!(new.write(&handle, block(at), &data), 0, "round {round}");
        let place = usize::try_from(block(at)).unwrap();
        state[place..place + BLOCK].copy_from_slice(&data);

        // It may have been killed, because it stood in the way.
        let _ = kill_process(pid, Signal::CONT);
        let mut old = writer.join().unwrap();
        if old.child.try_wait().unwrap().is_none() {
            let denied = old.open("x.luks", READ_WRITE).map(|handle| {
                let data = blocks(1, 7);
                old.write(&handle, 0, &data)
            });
            assert!(denied == Ok(DENIED) || denied.is_err(), "{denied:?}");
        } else {
            ended += 1;
        }
        old.end_anyhow();
        // Its client connects again, and goes on with the session that it knows.
        let mut again = served.connect();
        assert_eq!(join(&mut again, session), Err(DENIED));
        again.end();
        assert!(served.live() == state, "round {round}");
        new.end();
        assert!(served.live() == state, "round {round}");
    }
    println!("{rounds} takeovers; {ended} processes were ended");
    assert!(served.run(&["check", "--read-data"]).contains("0 findings"));
}

fn traced(served: &Served, inject: &str) -> Client {
    let mut command = Command::new("strace");
    // strace runs beside it, so the child is the agent itself.
    command.args(["-D", "-qq", "-o", "/dev/null", "-e", inject]);
    command.arg(agent()).args(["serve", "--root"]);
    command.arg(served.path(""));
    Client::start(command)
}

/// Debian 10 has Linux 4.19.
#[test]
fn a_stopped_process_is_ended_on_a_kernel_without_pidfd_open() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(8, 1));
    // It stops while it begins a generation, so nobody else gets the gate.
    let mut old = traced(&served, "inject=lseek:signal=STOP:when=1");
    let status = format!("/proc/{}/status", old.child.id());
    let writer = std::thread::spawn(move || {
        let handle = old.open("x.luks", READ_WRITE).unwrap();
        assert_ne!(old.write(&handle, 0, &[1; BLOCK]), 0);
        old
    });
    // strace stops it for a moment at each call, too.
    let now = || fs::read_to_string(&status).unwrap();
    let mut last = String::new();
    while !last.contains("stop") || last != now() {
        last = now();
        std::thread::sleep(Duration::from_millis(300));
    }
    let before = served.live();
    let mut new = traced(&served, "inject=pidfd_open:error=ENOSYS");
    begin(&mut new);
    let handle = new.open("x.luks", READ_WRITE).unwrap();
    assert_eq!(new.write(&handle, 0, &[2; BLOCK]), 0);
    assert_eq!(writer.join().unwrap().end_code(), None, "by a signal");
    new.end();
    let newest = *served.numbers().last().unwrap();
    assert!(served.past(newest) == before);
}

/// Else a full disk would refuse the second connection of a client, and `revert`.
#[test]
fn a_further_connection_takes_no_space() {
    let served = Served::with_container(EAGER, &blocks(8, 1));
    let used = || -> u64 {
        let files = fs::read_dir(served.path(".sprat-agent/x.luks/slots")).unwrap();
        files
            .map(|entry| entry.unwrap().metadata().unwrap().blocks())
            .sum()
    };
    let mut clients = Vec::new();
    let mut after = Vec::new();
    for number in 0..4 {
        let mut client = served.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        assert_eq!(client.write(&handle, block(number), &[1; BLOCK]), 0);
        clients.push(client);
        after.push(used());
    }
    assert!(after.iter().all(|used| *used == after[0]), "{after:?}");
}
