//! `serve --landlock`: the kernel lets the agent reach nothing but its root, and all of serving works all the same.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::Command;

use sprat_testkit::{needs, requires};

use crate::client::{
    BLOCK, CREATE_NEW, Client, EAGER, READ, READ_WRITE, Served, agent, blocks, string,
};

const SETPRIV: &str = "/usr/bin/setpriv";
const NOTE: &str = "not confined by Landlock";

/// The machine's own setpriv, if it knows Landlock.
fn setpriv() -> PathBuf {
    let help = Command::new(SETPRIV).arg("--help").output();
    let help = help.map(|help| String::from_utf8_lossy(&help.stdout).into_owned());
    match help.is_ok_and(|help| help.contains("--landlock-rule")) {
        true => SETPRIV.into(),
        false => concat!(env!("CARGO_MANIFEST_DIR"), "/tests/agent/setpriv.py").into(),
    }
}

/// A command of the agent on a machine whose setpriv is this file.
fn with_setpriv(file: &PathBuf, served: &Served, words: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    let script = "mount --bind \"$1\" \"$0\" && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, SETPRIV]);
    command.arg(file).arg(agent()).args(words);
    command.arg("--root").arg(served.path(""));
    command
}

pub fn confined(served: &Served, words: &[&str]) -> Client {
    let words = [&["serve", "--landlock"], words].concat();
    Client::start(with_setpriv(&setpriv(), served, &words))
}

fn status(served: &Served) -> String {
    served.run(&["status"])
}

#[test]
fn a_confined_agent_serves_and_reaches_nothing_outside_its_root() {
    requires!(needs::program("python3"), needs::program("unshare"));
    let content = blocks(64, 1);
    let served = Served::with_container(EAGER, &content);
    let elsewhere = tempfile::tempdir().unwrap();
    let policy = elsewhere.path().join("policy");
    fs::write(&policy, EAGER).unwrap();
    let words = ["--policy", policy.to_str().unwrap()];
    let mut client = confined(&served, &words);
    let path = string(b"x.luks");
    client
        .own(
            "session-begin@sprat",
            &[path.clone(), string(b"t")].concat(),
        )
        .unwrap();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    let ranges = |offset: u64, len: u64| {
        let count = 1_u32.to_be_bytes().to_vec();
        [
            string(&handle),
            count,
            offset.to_be_bytes().to_vec(),
            len.to_be_bytes().to_vec(),
        ]
        .concat()
    };
    let block = BLOCK as u64;
    client
        .own("will-write@sprat", &ranges(0, 8 * block))
        .unwrap();
    client
        .own("punch@sprat", &ranges(16 * block, 8 * block))
        .unwrap();
    assert_eq!(client.write(&handle, 0, &blocks(4, 2)), 0);
    assert_eq!(client.set_len(&handle, 65 * block), 0);
    client
        .own(
            "session-end@sprat",
            &[path, 1_u32.to_be_bytes().to_vec()].concat(),
        )
        .unwrap();
    // Another session begins a generation, seals the older one, and its state is read.
    assert_eq!(client.write(&handle, 0, &blocks(4, 3)), 0);
    assert!(client.content(&served.past_path(1)).unwrap() == content);
    client.open("x.luks.lock.1", CREATE_NEW).unwrap();
    client
        .open("y.luks.new-0123456789abcdef", CREATE_NEW)
        .unwrap();
    assert_eq!(client.rename("y.luks.new-0123456789abcdef", "y.luks"), 0);
    client.end();
    assert_eq!(served.numbers(), [1, 2]);
    assert!(!status(&served).contains(NOTE), "{}", status(&served));

    // What the agent has open lies elsewhere now, and what it opens there lies outside the root.
    let own = served.path(".sprat-agent");
    let moved = elsewhere.path().join("moved");
    let mut free = served.connect();
    let mut client = confined(&served, &words);
    fs::rename(&own, &moved).unwrap();
    assert_eq!(client.open("x.luks", READ_WRITE), Err(3));
    assert!(free.open("x.luks", READ_WRITE).is_ok());
    fs::rename(&moved, &own).unwrap();
    assert!(client.open("x.luks", READ_WRITE).is_ok());
    client.open("x.luks", READ).unwrap();
    client.end();
    free.end();

    // One that only reads, too.
    for words in [&["serve"][..], &["serve", "--read-only"]] {
        Client::start(served.command(words)).end();
        assert!(status(&served).contains(NOTE), "{}", status(&served));
        confined(&served, &[]).end();
        assert!(!status(&served).contains(NOTE), "{}", status(&served));
    }
}

#[test]
fn adopt_prints_the_option_where_the_machine_can_do_it() {
    requires!(needs::program("python3"), needs::program("unshare"));
    let served = Served::new(EAGER);
    chown(served.path(""), Some(61_234), Some(61_234)).unwrap();
    for (file, expected) in [
        (setpriv(), "serve --landlock --root"),
        ("/bin/false".into(), "sprat-agent serve --root"),
    ] {
        let output = with_setpriv(&file, &served, &["adopt"]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find(|line| line.contains("ForceCommand"));
        assert!(
            output.status.success() && line.is_some_and(|line| line.contains(expected)),
            "{text}"
        );
    }
    // Who asks for it is not served without it.
    let mut command = with_setpriv(&"/bin/false".into(), &served, &["serve", "--landlock"]);
    assert!(!command.output().unwrap().status.success());
}
