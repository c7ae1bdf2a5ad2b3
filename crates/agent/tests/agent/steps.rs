//! The administrator's commands, killed at each step that changes something: no past state is lost, clients are served,
//! and the command ends the next time. `tidy`, `expire` and `revert`: expiry.rs and kills.rs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use sprat_testkit::dice;
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, EAGER, READ_WRITE, Served, agent, blocks};

/// What changes a file or a folder. Killed at an fsync, all is as it was after the call before it.
const STEPS: &str = "pwrite64,ftruncate,mkdirat,renameat,renameat2,unlinkat,unlink,rmdir";

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
];

/// Runs it until it is killed at its `step`th `call`.
fn killed_at(root: &Path, words: &[&str], call: &str, step: u64) -> Output {
    let inject = format!("inject={call}:signal=KILL:when={step}");
    let trace = format!("trace={call}");
    let mut command = Command::new("strace");
    command.args(["-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
    command.arg(agent()).args(words).arg("--root").arg(root);
    command.output().unwrap()
}

#[track_caller]
fn check(served: &Served, states: &BTreeMap<u32, Vec<u8>>, what: &str) {
    for (number, state) in states {
        assert!(
            served.past(*number) == *state,
            "{what}: generation {number}"
        );
    }
    let found = served.run(&["check", "--read-data"]);
    assert!(found.ends_with(" 0 findings\n"), "{what}: {found}");
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
    let calls = match dice::number("SPRAT_TORTURE_ROUNDS") {
        Some(_) => {
            format!(
                "{STEPS},fdatasync,fsync,openat,flock,pread64,read,fstat,statx,newfstatat,getdents64,write"
            )
        }
        None => STEPS.to_owned(),
    };
    let mut killed = 0;
    for case in CASES {
        let words: Vec<&str> = case
            .words
            .iter()
            .map(|word| if *word == "STATE" { &name } else { *word })
            .collect();
        let before = killed;
        for call in calls.split(',') {
            for step in 1_u64.. {
                (case.prepare)(&served);
                let what = format!("{} at {call} {step}", words.join(" "));
                let output = killed_at(&served.path(""), &words, call, step);
                let is_over = output.status.success();
                if !is_over {
                    killed += 1;
                    // What was damaged before may still be.
                    if !["repair", "adopt", "clock"].contains(&words[0]) {
                        check(&served, &states, &what);
                    }
                    let again = served.command(&words).output().unwrap();
                    // It may have come to its end but for the last words.
                    let is_gone = words[0] == "remove" && (case.is_done)(&served);
                    assert!(again.status.success() || is_gone, "{what}: {again:?}");
                }
                assert!((case.is_done)(&served), "{what}");
                if is_over {
                    break;
                }
            }
        }
        check(&served, &states, &words.join(" "));
        println!("{}: {} steps", words.join(" "), killed - before);
        assert!(killed > before, "{words:?} changes nothing");
        // A client goes on.
        let number = *served.numbers().last().unwrap() + 1;
        states.insert(number, served.live());
        served.overwrite(&[(0, vec![u8::try_from(killed % 256).unwrap(); BLOCK])]);
        check(&served, &states, &words.join(" "));
    }
    println!("{killed} steps");
}
