//! A hostile client with a login: packets of a fuzzer, and a list of attacks.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Instant;

use sprat_testkit::dice::{self, Dice};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, CREATE_NEW, Client, READ, READ_WRITE, Served, blocks, string};
use crate::limits::peak_kib;
use crate::watched::{Watch, cpu_time, fuzz_until};

/// The header gives an alarm, as by default.
const POLICY: &str =
    "new = burst 1000000, then 1 per 1s\nsecret = 6h\nfree_min = 0%\nsize_max = 1G\n";
pub const BLOCKS: usize = 64;

fn block(number: u64) -> u64 {
    number * BLOCK as u64
}

/// A folder with a good past state, beside files that no client may reach.
pub struct Target {
    pub served: Served,
    pub good: Vec<u8>,
    outside: tempfile::TempDir,
}

impl Target {
    fn new() -> Self {
        let target = Self::untouched(POLICY);
        let served = &target.served;
        served.overwrite(&[(block(40), vec![1; BLOCK])]);
        target
    }

    /// Nobody has written to it yet.
    pub fn untouched(policy: &str) -> Self {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let served = Served::in_folder(outside.path(), policy);
        let good = blocks(BLOCKS, 1);
        fs::write(served.path("x.luks"), &good).unwrap();
        Self {
            served,
            good,
            outside,
        }
    }

    /// What must hold whatever a client sent.
    #[track_caller]
    fn check(&self, after: &str) {
        assert!(self.served.past(1) == self.good, "the past after {after}");
        let len = fs::metadata(self.served.path("x.luks")).unwrap().len();
        assert!(len >= self.good.len() as u64, "shorter after {after}");
        assert_eq!(self.served.numbers()[0], 1, "{after}");
        let names = |folder: &Path| -> BTreeSet<String> {
            let entries = fs::read_dir(folder).unwrap();
            let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
            entries.map(|entry| name(entry.unwrap())).collect()
        };
        let outside = names(self.outside.path());
        assert!(
            outside.len() == 2 && outside.contains("secret"),
            "{after}: {outside:?}"
        );
        assert_eq!(
            fs::read(self.outside.path().join("secret")).unwrap(),
            b"secret"
        );
        for name in names(&self.served.path("")) {
            let known = name == ".sprat-agent" || name.contains(".luks");
            assert!(known && !name.contains('/'), "{after}: {name}");
        }
        assert!(fs::read_to_string(self.served.path(".sprat-agent/policy")).unwrap() == POLICY);
    }
}

/// The fields that requests are made of, most of them valid.
fn field(dice: &mut Dice) -> Vec<u8> {
    const PATHS: [&str; 14] = [
        "x.luks",
        "/x.luks",
        "y.luks",
        "y.luks.new-0123456789abcdef",
        "x.luks.lock.1000001",
        "x.luks.reserve",
        ".generations",
        ".generations/x.luks",
        ".",
        "..",
        "../secret",
        ".sprat-agent/policy",
        ".sprat-agent/x.luks/g.1/head",
        "x.luks/../../secret",
    ];
    const NUMBERS: [u64; 10] = [
        0,
        1,
        4095,
        4096,
        1 << 17,
        1 << 30,
        1 << 31,
        1 << 62,
        1 << 63,
        u64::MAX,
    ];
    let pick = |dice: &mut Dice, len: usize| usize::try_from(dice.below(len as u64)).unwrap();
    match dice.below(7) {
        0 | 1 => string(PATHS[pick(dice, PATHS.len())].as_bytes()),
        2 | 3 => string(&u32::try_from(dice.below(5)).unwrap().to_be_bytes()),
        4 => NUMBERS[pick(dice, NUMBERS.len())].to_be_bytes().to_vec(),
        5 => [0, 1, 3, 0x1a, 0x2b, 8192, u32::MAX][pick(dice, 7)]
            .to_be_bytes()
            .to_vec(),
        _ => string(&vec![7; pick(dice, 9000)]),
    }
}

pub fn request(dice: &mut Dice) -> (u8, Vec<u8>) {
    const OWN: [&str; 12] = [
        "session-begin@sprat",
        "session-join@sprat",
        "session-end@sprat",
        "will-write@sprat",
        "punch@sprat",
        "map@sprat",
        "generations@sprat",
        "posix-rename@openssh.com",
        "fsync@openssh.com",
        "statvfs@openssh.com",
        "copy-data",
        "hardlink@openssh.com",
    ];
    let kind = match dice.below(10) {
        0 => u8::try_from(dice.below(256)).unwrap(),
        1 | 2 => 3,
        3 | 4 => 6,
        5 => 200,
        _ => u8::try_from(3 + dice.below(18)).unwrap(),
    };
    let mut body = Vec::new();
    if kind == 200 {
        body.extend(string(
            OWN[usize::try_from(dice.below(12)).unwrap()].as_bytes(),
        ));
    }
    for _ in 0..dice.below(5) {
        body.extend(field(dice));
    }
    if dice.percent(20) && !body.is_empty() {
        let at = usize::try_from(dice.below(body.len() as u64)).unwrap();
        body[at] ^= 1 << dice.below(8);
    }
    if dice.percent(10) {
        body.truncate(usize::try_from(dice.below(body.len() as u64 + 1)).unwrap());
    }
    (kind, body)
}

/// Each connection is watched, and so is its memory.
#[test]
fn packets_of_a_fuzzer_change_no_past_state_and_reach_no_other_file() {
    requires!(needs::program("strace"));
    let mut dice = Dice::new(dice::new_seed());
    let target = Target::new();
    let mut watch = Watch::new();
    let mut client = watch.connect(&target.served);
    let (mut count, mut done) = (0, 0);
    let until = fuzz_until();
    while Instant::now() < until || count < 1000 {
        let (kind, body) = request(&mut dice);
        count += 1;
        // INIT again, or what is no packet at all, ends the connection.
        let answered = client.ask(kind, &body);
        let is_done = |(kind, fields): &(u8, Vec<u8>)| *kind != 101 || fields[..4] == [0; 4];
        done += u64::from(answered.as_ref().is_some_and(is_done));
        if count % 500 == 0 || answered.is_none() {
            let peak = peak_kib(&client);
            assert!(answered.is_none() || peak <= 32 * 1024, "{peak} KiB");
            // 101: a panic.
            assert_ne!(client.end_code(), Some(101), "request {kind} {body:?}");
            client = watch.connect(&target.served);
        }
        if count % 1000 == 0 {
            target.check(&format!("packet {count}"));
        }
    }
    assert!(done > count / 50, "only {done} requests were carried out");
    // Lengths that are wrong, and bytes that are no packets.
    for _ in 0..100 {
        let mut bytes = vec![0; usize::try_from(dice.below(300)).unwrap()];
        bytes.fill_with(|| u8::try_from(dice.below(256)).unwrap());
        bytes.splice(0..0, [0, 0, u8::try_from(dice.below(3)).unwrap()]);
        let mut client = watch.connect(&target.served);
        client.send_raw(&bytes);
        assert_ne!(client.end_code(), Some(101), "{bytes:?}");
    }
    client.end_anyhow();
    target.check("all packets");
    watch.check();
    println!(
        "{count} packets, {done} of them carried out; {}",
        cpu_time()
    );
}

pub type Attack = (&'static str, fn(&mut Client, &Target) -> bool);

fn opens(client: &mut Client, path: &str, flags: u32) -> bool {
    client.open(path, flags).is_ok()
}

fn past_of(target: &Target) -> String {
    target.served.past_path(target.served.numbers()[0])
}

/// Each returns whether the client was allowed what it tried.
pub const REFUSED: &[Attack] = &[
    ("truncate", |c, _| opens(c, "x.luks", 0x1a)),
    ("truncate for reading and writing", |c, _| {
        opens(c, "x.luks", 0x13)
    }),
    ("append", |c, _| opens(c, "x.luks", 0x6)),
    ("create over it", |c, _| opens(c, "x.luks", CREATE_NEW)),
    ("create without excl", |c, _| opens(c, "x.luks", 0xb)),
    ("shorter", |c, _| {
        let handle = c.open("x.luks", READ_WRITE).unwrap();
        c.set_len(&handle, 4096) == 0
    }),
    ("shorter by one byte", |c, t| {
        let handle = c.open("x.luks", READ_WRITE).unwrap();
        c.set_len(&handle, t.good.len() as u64 - 1) == 0
    }),
    ("longer than size_max", |c, _| {
        let handle = c.open("x.luks", READ_WRITE).unwrap();
        c.set_len(&handle, (1 << 30) + 1) == 0
    }),
    ("remove", |c, _| c.path_request(13, "x.luks") == 0),
    ("remove the folder", |c, _| {
        c.path_request(15, ".generations") == 0
    }),
    ("make a folder", |c, _| {
        c.status(14, &[string(b"a.luks"), vec![0; 4]].concat()) == 0
    }),
    ("rename away", |c, _| c.rename("x.luks", "y.luks") == 0),
    ("rename over it", |c, _| {
        let _ = c.open("x.luks.new", CREATE_NEW);
        c.rename("x.luks.new", "x.luks") == 0
    }),
    ("rename a rewrite over it", |c, _| {
        let _ = c.open("x.luks.trim", CREATE_NEW);
        c.rename("x.luks.trim", "x.luks") == 0
    }),
    ("rename to another container", |c, _| {
        c.rename("x.luks.new", "y.luks") == 0
    }),
    ("symbolic link", |c, _| {
        c.status(20, &[string(b"/etc/passwd"), string(b"y.luks")].concat()) == 0
    }),
    ("hard link", |c, _| {
        c.extended("hardlink@openssh.com", &[b"x.luks", b"y.luks"]) == 0
    }),
    ("copy-data", |c, _| c.extended("copy-data", &[b"x"]) == 0),
    ("chmod", |c, _| {
        c.status(
            9,
            &[string(b"x.luks"), vec![0, 0, 0, 4, 0, 0, 1, 255]].concat(),
        ) == 0
    }),
    ("times", |c, _| {
        c.status(
            9,
            &[string(b"x.luks"), vec![0, 0, 0, 8], vec![0; 8]].concat(),
        ) == 0
    }),
    ("owner by handle", |c, _| {
        let handle = c.open("x.luks", READ_WRITE).unwrap();
        c.status(
            10,
            &[string(&handle), vec![0, 0, 0, 2], vec![0; 8]].concat(),
        ) == 0
    }),
    ("above the folder", |c, _| opens(c, "../secret", READ)),
    ("absolute path", |c, t| {
        opens(c, t.outside.path().join("secret").to_str().unwrap(), READ)
    }),
    ("through the past", |c, _| {
        opens(c, ".generations/../../secret", READ)
    }),
    ("the policy", |c, _| {
        opens(c, ".sprat-agent/policy", READ_WRITE)
    }),
    ("a new policy", |c, _| {
        opens(c, ".sprat-agent/policy2", CREATE_NEW)
    }),
    ("a log", |c, _| {
        opens(c, ".sprat-agent/x.luks/logs/1", READ_WRITE)
    }),
    ("remove a generation's head", |c, _| {
        c.path_request(13, ".sprat-agent/x.luks/g.1/head") == 0
    }),
    ("any name", |c, _| opens(c, "authorized_keys", CREATE_NEW)),
    ("an executable", |c, _| opens(c, ".ssh/rc", CREATE_NEW)),
    ("NUL in a name", |c, _| {
        opens(c, "y.luks\0.luks", CREATE_NEW)
    }),
    ("a very long name", |c, _| {
        opens(c, &format!("{}.luks", "y".repeat(300)), CREATE_NEW)
    }),
    ("a lease number far above", |c, _| {
        opens(c, "x.luks.lock.99999999", CREATE_NEW)
    }),
    ("write a past state", |c, t| {
        opens(c, &past_of(t), READ_WRITE)
    }),
    ("truncate a past state", |c, t| opens(c, &past_of(t), 0x1a)),
    ("remove a past state", |c, t| {
        c.path_request(13, &past_of(t)) == 0
    }),
    ("rename a past state", |c, t| {
        c.rename(&past_of(t), "y.luks") == 0
    }),
    ("write through a handle for reading", |c, _| {
        let handle = c.open("x.luks", READ).unwrap();
        c.write(&handle, 0, &[6; 10]) == 0
    }),
    ("write to a past state's handle", |c, t| {
        let handle = c.open(&past_of(t), READ).unwrap();
        c.write(&handle, 0, &[6; 10]) == 0 || c.set_len(&handle, 0) == 0
    }),
    ("write behind the end", |c, t| {
        let handle = c.open("x.luks", READ_WRITE).unwrap();
        c.write(&handle, t.good.len() as u64, &[6; 10]) == 0
    }),
    ("write at the highest offset", |c, _| {
        let handle = c.open("x.luks", READ_WRITE).unwrap();
        c.write(&handle, u64::MAX - 3, &[6; 10]) == 0
    }),
    ("a handle of nobody", |c, _| {
        c.write(&[0, 0, 1, 0], 0, &[6; 10]) == 0
    }),
    ("a handle of another length", |c, _| {
        c.write(&[0; 9], 0, &[6; 10]) == 0
    }),
    ("a session of the future", |c, _| {
        let fields = [string(b"x.luks"), (1_u64 << 60).to_be_bytes().to_vec()].concat();
        c.own("session-join@sprat", &fields).is_ok()
    }),
    ("punch parts of blocks", |c, _| {
        let handle = c.open("x.luks", READ_WRITE).unwrap();
        let range = [5_u64.to_be_bytes(), 4096_u64.to_be_bytes()].concat();
        let fields = [string(&handle), vec![0, 0, 0, 1], range].concat();
        c.own("punch@sprat", &fields).is_ok()
    }),
    ("more containers than allowed", |c, _| {
        ["b", "c", "d", "e"]
            .iter()
            .all(|stem| opens(c, &format!("{stem}.luks"), CREATE_NEW))
    }),
    ("a thousand handles", |c, _| {
        (0..1000).all(|_| opens(c, "x.luks", READ))
    }),
];

#[test]
fn no_attack_of_the_list_succeeds_and_the_evening_before_reads_exactly() {
    assert!(REFUSED.len() >= 40);
    let target = Target::new();
    for (name, attack) in REFUSED {
        let mut client = target.served.connect();
        assert!(!attack(&mut client, &target), "{name} was allowed");
        client.end_anyhow();
        target.check(name);
    }
    // What is allowed: garbage, holes, sessions without end, connections that are cut.
    for round in 0..40_u64 {
        let mut client = target.served.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        let token = string(&round.to_be_bytes());
        client
            .own("session-begin@sprat", &[string(b"x.luks"), token].concat())
            .unwrap();
        let end = block(BLOCKS as u64);
        let range = [0_u64.to_be_bytes(), end.to_be_bytes()].concat();
        let fields = [string(&handle), vec![0, 0, 0, 1], range].concat();
        let request = ["punch@sprat", "will-write@sprat"][usize::from(round % 3 == 0)];
        client.own(request, &fields).unwrap();
        assert_eq!(client.write(&handle, 0, &blocks(BLOCKS / 2, round)), 0);
        if round % 4 == 0 {
            client.kill();
        } else {
            client.end();
        }
    }
    target.check("garbage");
    let status = target.served.command(&["status"]).output().unwrap();
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(
        status.status.code() == Some(3) && text.contains("header"),
        "{text}"
    );
    assert!(
        target
            .served
            .run(&["check", "--read-data"])
            .contains("0 findings")
    );
    // Another client's folder is served as before.
    let other = Served::with_container(POLICY, &blocks(4, 5));
    other.overwrite(&[(0, vec![1; BLOCK])]);
    assert!(other.past(1) == blocks(4, 5));
}
