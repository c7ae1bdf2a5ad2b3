//! The administrator's commands, killed at each step that changes something, in the long form at each system call: no
//! past state is lost, clients are served, and the command ends the next time. `expire`, `tidy` and `revert` with more to
//! do: expiry.rs and kills.rs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Command, Output};

use sprat_testkit::dice;
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ_WRITE, Served, agent, blocks};
use crate::outside::{code, next_tick};
use crate::sessions::{begin, lease};

/// What changes a file or a folder. Killed at an fsync, all is as it was after the call before it.
const CHANGES: [&str; 10] = [
    "fallocate",
    "ftruncate",
    "mkdirat",
    "pwrite64",
    "renameat",
    "renameat2",
    "rmdir",
    "unlink",
    "unlinkat",
    "write",
];

/// One command: its words, what it needs, and whether it has done its work.
struct Case {
    words: &'static [&'static str],
    prepare: fn(&Served),
    is_done: fn(&Served) -> bool,
}

fn own(served: &Served, name: &str) -> std::path::PathBuf {
    served.path(&format!(".sprat-agent/x.luks/{name}"))
}

fn leases(served: &Served) -> Vec<u64> {
    let entries = fs::read_dir(served.path("")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut numbers: Vec<u64> = names
        .filter_map(|name| name.strip_prefix("x.luks.lock.")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    numbers
}

/// `STATE` is the name of the first one.
const CASES: &[Case] = &[
    Case {
        words: &["pin", "x.luks", "STATE"],
        prepare: |served| {
            served.run(&["unpin", "x.luks", &served.head(1, "name")]);
        },
        is_done: |served| own(served, "g.1/pinned").exists(),
    },
    Case {
        words: &["unpin", "x.luks", "STATE"],
        prepare: |served| {
            served.run(&["pin", "x.luks", &served.head(1, "name")]);
        },
        is_done: |served| !own(served, "g.1/pinned").exists(),
    },
    Case {
        words: &["hold", "x.luks"],
        prepare: |served| {
            served.run(&["release", "x.luks"]);
        },
        is_done: |served| own(served, "hold").exists(),
    },
    Case {
        words: &["release", "x.luks"],
        prepare: |served| {
            served.run(&["hold", "x.luks"]);
        },
        is_done: |served| !own(served, "hold").exists(),
    },
    Case {
        words: &["ack", "x.luks"],
        prepare: |served| fs::write(own(served, "alarm"), "seen\n").unwrap(),
        is_done: |served| !own(served, "alarm").exists() && own(served, "acked").exists(),
    },
    Case {
        words: &["allow-header", "x.luks"],
        prepare: |served| fs::remove_file(own(served, "header-until")).unwrap_or_default(),
        is_done: |served| own(served, "header-until").exists(),
    },
    Case {
        words: &["clock", "accept"],
        prepare: |served| fs::write(served.path(".sprat-agent/clock"), [1; 1024]).unwrap(),
        is_done: |served| served.run(&["status"]).contains("x.luks"),
    },
    Case {
        words: &["tidy"],
        prepare: |served| fs::remove_file(served.path(".sprat-agent/tidied")).unwrap_or_default(),
        is_done: |served| served.path(".sprat-agent/tidied").exists(),
    },
    Case {
        words: &["unlock", "x.luks", "--yes"],
        prepare: |served| {
            let next = leases(served)
                .last()
                .map_or(1_000_001, |highest| highest + 1);
            let name = format!("x.luks.lock.{next}");
            fs::write(served.path(&name), vec![b'x'; BLOCK]).unwrap();
        },
        is_done: |served| {
            let highest = leases(served).pop().unwrap();
            let name = format!("x.luks.lock.{highest}");
            let text = fs::read_to_string(served.path(&name)).unwrap();
            text.len() == BLOCK && text.contains("\"free\":true")
        },
    },
    Case {
        words: &["repair", "x.luks"],
        prepare: |served| fs::write(own(served, "state"), [1; 1024]).unwrap(),
        is_done: |served| served.run(&["repair", "x.luks"]).contains("whole"),
    },
    Case {
        words: &["repair", "--yes"],
        prepare: |served| fs::write(served.path(".sprat-agent/format"), "f").unwrap(),
        is_done: |served| served.run(&["repair"]).contains("whole"),
    },
    Case {
        words: &["adopt"],
        prepare: |served| {
            for name in ["format", "lease.spare"] {
                fs::remove_file(served.path(&format!(".sprat-agent/{name}"))).unwrap_or_default();
            }
        },
        is_done: |served| served.path(".sprat-agent/format").exists(),
    },
    Case {
        words: &["remove", "y.luks", "--yes"],
        prepare: |served| {
            fs::write(served.path("y.luks"), blocks(4, 7)).unwrap();
            let mut client = served.connect();
            let handle = client.open("y.luks", READ_WRITE).unwrap();
            assert_eq!(client.write(&handle, 0, &[1; BLOCK]), 0);
            client.end();
        },
        is_done: |served| {
            !served.path("y.luks").exists() && !served.path(".sprat-agent/y.luks").exists()
        },
    },
    // A change without the agent, of which the content is the same. It is the last one: the states before it stay marked.
    Case {
        words: &["ack", "x.luks"],
        prepare: |served| {
            next_tick();
            let file = fs::File::options().write(true).open(served.path("x.luks"));
            file.unwrap()
                .set_modified(std::time::SystemTime::now())
                .unwrap();
        },
        is_done: |served| code(served, &["status"]).0 == Some(0),
    },
];

/// Runs it until it is killed at its `step`th `call`.
fn killed_at(served: &Served, words: &[&str], call: &str, step: u64) -> Output {
    let inject = format!("inject={call}:signal=KILL:when={step}");
    let trace = format!("trace={call}");
    let mut command = Command::new("strace");
    command.args(["-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
    command.arg(agent()).args(words).arg("--root");
    command.arg(served.path("")).output().unwrap()
}

/// The kinds of system calls that it makes. In the short form those that change something.
fn kinds(served: &Served, words: &[&str]) -> BTreeSet<String> {
    let trace = served.path("trace");
    let mut command = Command::new("strace");
    command.arg("-qq").arg("-o").arg(&trace);
    command.arg(agent()).args(words).arg("--root");
    let done = command.arg(served.path("")).output().unwrap();
    assert!(done.status.success(), "{words:?}: {done:?}");
    let text = fs::read_to_string(&trace).unwrap();
    fs::remove_file(trace).unwrap();
    let all = text
        .lines()
        .filter_map(|line| Some(line.split_once('(')?.0));
    let is_long = dice::number("SPRAT_TORTURE_ROUNDS").is_some();
    // Before its execve it is not the agent.
    let wanted = |name: &&str| *name != "execve" && (is_long || CHANGES.contains(name));
    all.filter(wanted).map(str::to_owned).collect()
}

/// Calls `one` with each step of each kind of call, until it says that the command came to its end. Returns how often
/// it was killed.
fn at_each_step(kinds: &BTreeSet<String>, one: &mut dyn FnMut(&str, u64) -> bool) -> u64 {
    let mut killed = 0;
    for call in kinds {
        for step in 1.. {
            if one(call, step) {
                break;
            }
            killed += 1;
        }
    }
    killed
}

/// All states are as they are known, whatever is known of changes without the agent.
#[track_caller]
fn check(served: &Served, states: &BTreeMap<u32, Vec<u8>>, what: &str) {
    let mut client = served.connect();
    for (number, state) in states {
        let path = served.past_path(*number);
        let suspect = format!("{}-suspect.luks", path.strip_suffix(".luks").unwrap());
        let content = client.content(&path).or_else(|_| client.content(&suspect));
        assert!(
            content.as_ref() == Ok(state),
            "{what}: generation {number}: {:?}",
            content.err()
        );
    }
    client.end();
}

/// And nothing is damaged: there are no findings but that the container was changed without the agent.
#[track_caller]
fn check_whole(served: &Served, states: &BTreeMap<u32, Vec<u8>>, what: &str) {
    check(served, states, what);
    let found = code(served, &["check", "--read-data"]).1;
    let mut lines: Vec<&str> = found.lines().collect();
    assert!(lines.pop().is_some_and(|last| last.ends_with(" findings")));
    lines.retain(|line| !line.ends_with("something else than sprat-agent after this state"));
    assert!(lines.is_empty(), "{what}: {found}");
}

#[test]
fn killed_at_each_step_a_command_loses_nothing_and_ends_the_next_time() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(16, 1));
    let mut states = BTreeMap::new();
    for number in 1..=2 {
        states.insert(number, served.live());
        served.overwrite(&[(u64::from(number) * BLOCK as u64, vec![9; BLOCK])]);
    }
    let name = served.head(1, "name");
    let mut all = 0;
    for case in CASES {
        let words: Vec<&str> = case
            .words
            .iter()
            .map(|word| if *word == "STATE" { &name } else { *word })
            .collect();
        // What was damaged before may still be.
        let is_repair = ["repair", "adopt", "clock"].contains(&words[0]);
        (case.prepare)(&served);
        let kinds = kinds(&served, &words);
        assert!((case.is_done)(&served), "{words:?}");
        let killed = at_each_step(&kinds, &mut |call, step| {
            (case.prepare)(&served);
            let what = format!("{} at {call} {step}", words.join(" "));
            let is_over = killed_at(&served, &words, call, step).status.success();
            if !is_over {
                let is_done = !is_repair && (case.is_done)(&served);
                match words[0] {
                    // An alarm that was not confirmed to the end stays one.
                    "ack" => {
                        check(&served, &states, &what);
                        let (status, text) = code(&served, &["status"]);
                        assert!(is_done || status == Some(3), "{what}: {text}");
                    }
                    _ if is_repair => {}
                    _ => check_whole(&served, &states, &what),
                }
                let again = served.command(&words).output().unwrap();
                // It may have come to its end but for the last words.
                let is_gone = words[0] == "remove" && is_done;
                assert!(again.status.success() || is_gone, "{what}: {again:?}");
            }
            assert!((case.is_done)(&served), "{what}");
            if is_repair {
                check_whole(&served, &states, &what);
            }
            is_over
        });
        println!("{}: {killed} steps of {kinds:?}", words.join(" "));
        assert!(killed > 0, "{words:?} changes nothing");
        all += killed;
        check_whole(&served, &states, &words.join(" "));
        // A client goes on.
        let number = *served.numbers().last().unwrap() + 1;
        states.insert(number, served.live());
        served.overwrite(&[(0, vec![u8::try_from(killed % 256).unwrap(); BLOCK])]);
        check_whole(&served, &states, &words.join(" "));
    }
    println!("{all} steps");
}

/// A lease that is held through this agent, and the client that holds it.
fn holder(served: &Served) -> (Client, Vec<u8>) {
    let format = fs::read_to_string(served.path(".sprat-agent/format")).unwrap();
    let id = format.lines().find_map(|line| line.strip_prefix("id "));
    let json = format!(
        "{{\"token\":\"0123\",\"free\":false,\"attempt\":\"45\",\"renewed\":3,\"host\":\"a\",\"started_s\":5,\
         \"version\":\"1\",\"doors\":[],\"watch\":[],\"agent\":\"{}\",\"flight\":false}}",
        id.unwrap()
    );
    let next = leases(served).last().map_or(1_000_001, |last| last + 1);
    fs::write(served.path(&format!("x.luks.lock.{next}")), lease(&json)).unwrap();
    let mut client = served.connect();
    begin(&mut client);
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    (client, handle)
}

/// A client that is connected writes while the command is killed, and may go on after that. When it has come to its
/// end, nothing of that client arrives any more.
#[test]
fn killed_at_each_step_unlock_and_repair_refuse_the_old_session_in_the_end() {
    requires!(needs::program("strace"));
    let served = Served::with_container(EAGER, &blocks(16, 1));
    let mut states: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    for words in [&["unlock", "x.luks", "--yes"][..], &["repair", "x.luks"]] {
        let damage = |served: &Served| {
            if words[0] == "repair" {
                fs::write(own(served, "state"), [1; 1024]).unwrap();
            }
        };
        let holds = holder(&served);
        damage(&served);
        let kinds = kinds(&served, words);
        holds.0.end_anyhow();
        let mut count = 0_u8;
        let killed = at_each_step(&kinds, &mut |call, step| {
            let what = format!("{words:?} at {call} {step}");
            count = count.wrapping_add(1);
            // What the session before has begun may be a state that nothing was saved for.
            let known = states.keys().last().copied().unwrap_or(0);
            let before = served.live();
            let (mut client, handle) = holder(&served);
            assert_eq!(client.write(&handle, 0, &[count; BLOCK]), 0, "{what}");
            let newest = *served.numbers().last().unwrap();
            assert!(newest > known, "{what}: {newest}");
            states.insert(newest, before);
            damage(&served);
            let is_over = killed_at(&served, words, call, step).status.success();
            let mut expected = served.live();
            if !is_over {
                if client.write(&handle, 8192, &[count; BLOCK]) == 0 {
                    expected[8192..8192 + BLOCK].fill(count);
                }
                assert!(served.live() == expected, "{what}");
                served.run(words);
            }
            assert_ne!(client.write(&handle, 4096, &[count; BLOCK]), 0, "{what}");
            client.end_anyhow();
            assert!(served.live() == expected, "{what}");
            check_whole(&served, &states, &what);
            is_over
        });
        println!("{words:?}: {killed} steps of {kinds:?}");
        assert!(killed > 2, "{words:?}");
    }
}
