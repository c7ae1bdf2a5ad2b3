//! What changes a container without the agent is reported: by `status` and `check` at once, and after the next session
//! until the administrator confirms it. What changes no content is not.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use sprat_testkit::dice::{self, Dice};
use sprat_testkit::program::system;
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, Client, EAGER, READ_WRITE, Served, blocks, string};
use crate::clones::{BTRFS, Disk, XFS, missing};

const BLOCKS: usize = 64;
const LEN: u64 = (BLOCKS * BLOCK) as u64;

/// A way to change the file, at a place, by so many bytes.
type Way = (&'static str, fn(&Path, u64, u64));

fn open(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn len(path: &Path) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// All of them were seen to be used by hand, by another program, or by a restore.
const WAYS: &[Way] = &[
    ("written in place", |path, at, len| {
        let bytes = vec![7; usize::try_from(len).unwrap()];
        open(path).write_all_at(&bytes, at).unwrap();
    }),
    (
        "written, and the old time but for a nanosecond",
        |path, at, len| {
            let file = open(path);
            let time = file.metadata().unwrap().modified().unwrap();
            let bytes = vec![7; usize::try_from(len).unwrap()];
            file.write_all_at(&bytes, at).unwrap();
            file.set_modified(time + Duration::from_nanos(1 + at))
                .unwrap();
        },
    ),
    ("dd", |path, at, len| {
        let to = format!("of={}", path.display());
        let (seek, count) = (format!("seek={at}"), format!("count={len}"));
        let words = [
            "if=/dev/urandom",
            &to,
            "bs=64K",
            &seek,
            &count,
            "status=none",
        ];
        let flags = ["conv=notrunc", "iflag=count_bytes", "oflag=seek_bytes"];
        system("dd", &[&words[..], &flags].concat());
    }),
    ("longer", |path, at, more| {
        open(path).set_len(len(path) + at + more).unwrap();
    }),
    ("shorter", |path, at, _| open(path).set_len(at).unwrap()),
    ("shorter and as long again", |path, at, _| {
        let (file, before) = (open(path), len(path));
        file.set_len(at).unwrap();
        file.set_len(before).unwrap();
    }),
    ("a hole", |path, at, len| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(open(path), flags, at, len).unwrap();
    }),
    ("copied over", |path, at, len| {
        let mut content = fs::read(path).unwrap();
        let at = usize::try_from(at).unwrap();
        let end = content.len().min(at + usize::try_from(len).unwrap());
        content[at..end].fill(7);
        fs::write(path, content).unwrap();
    }),
    ("another file with the old times", |path, at, count| {
        let other = path.with_file_name("other");
        system("cp", &["-a".as_ref(), path.as_os_str(), other.as_os_str()]);
        let file = open(&other);
        let time = file.metadata().unwrap().modified().unwrap();
        let bytes = vec![7; usize::try_from(count).unwrap()];
        file.write_all_at(&bytes, at.min(len(path) - count))
            .unwrap();
        file.set_modified(time).unwrap();
        fs::rename(&other, path).unwrap();
    }),
    ("OpenSSH's server", |path, at, len| {
        let Some(server) = needs::plain_sftp_server() else {
            return open(path).write_all_at(&[7], at).unwrap();
        };
        let mut command = Command::new(server);
        command.arg("-d").arg(path.parent().unwrap());
        let mut client = Client::start(command);
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        let bytes = vec![7; usize::try_from(len.min(200_000)).unwrap()];
        assert_eq!(client.write(&handle, at, &bytes), 0);
        client.end();
    }),
];

/// What else a place may be changed by.
const MORE_WAYS: &[Way] = &[
    ("touch", |path, _, _| {
        system("touch", &[path]);
    }),
    ("written, and an older time", |path, at, len| {
        let file = open(path);
        let time = file.metadata().unwrap().modified().unwrap();
        let bytes = vec![7; usize::try_from(len).unwrap()];
        file.write_all_at(&bytes, at).unwrap();
        file.set_modified(time - Duration::from_secs(1 + at))
            .unwrap();
    }),
    ("truncate", |path, at, _| {
        let size = format!("--size={at}");
        system("truncate", &[size.as_ref(), path.as_os_str()]);
    }),
    ("appended", |path, _, len| {
        let file = File::options().append(true).open(path);
        let bytes = vec![7; usize::try_from(len).unwrap()];
        std::io::Write::write_all(&mut file.unwrap(), &bytes).unwrap();
    }),
    ("rsync", |path, at, len| {
        let other = path.with_file_name("other");
        fs::copy(path, &other).unwrap();
        let bytes = vec![7; usize::try_from(len).unwrap()];
        open(&other).write_all_at(&bytes, at).unwrap();
        let words = ["--inplace", "--no-whole-file", "--ignore-times"];
        let files = [other.as_os_str(), path.as_os_str()];
        let words = words.iter().map(AsRef::as_ref).chain(files);
        system("rsync", &words.collect::<Vec<_>>());
        fs::remove_file(other).unwrap();
    }),
    ("removed and made again", |path, at, _| {
        let content = fs::read(path).unwrap();
        fs::remove_file(path).unwrap();
        fs::write(path, &content[..usize::try_from(at + 1).unwrap()]).unwrap();
    }),
];

/// Places and lengths: the first and the last byte, in holes, across their edge, all of it.
const PLACES: [(u64, u64); 10] = [
    (0, 1),
    (1, LEN - 1),
    (4095, 2),
    (4096, 4096),
    (LEN / 2, 100_000),
    (LEN / 4 * 3 - 4096, 8192),
    (LEN / 4 * 3 + 4096, 4096),
    (LEN - 4096, 4096),
    (LEN - 1, 1),
    (10 * 4096, 4096),
];

pub fn code(served: &Served, words: &[&str]) -> (Option<i32>, String) {
    let output = served.command(words).output().unwrap();
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
    )
}

pub fn past_names(served: &Served) -> Vec<String> {
    let mut client = served.connect();
    let names = client.list(".generations/x.luks");
    client.end();
    names
        .into_iter()
        .filter(|name| !name.starts_with('.'))
        .collect()
}

/// The kernel's times are those of its last tick.
pub fn next_tick() {
    std::thread::sleep(Duration::from_millis(12));
}

fn a_container_with_a_past() -> Served {
    let served = Served::new(EAGER);
    let file = File::create(served.path("x.luks")).unwrap();
    file.set_len(LEN).unwrap();
    file.write_all_at(&blocks(BLOCKS / 4 * 3, 1), 0).unwrap();
    served.overwrite(&[(10 * BLOCK as u64, vec![1; BLOCK])]);
    served
}

fn is_reported(way: &Way, (at, len): (u64, u64)) {
    let served = a_container_with_a_past();
    assert_eq!(code(&served, &["status"]).0, Some(0));
    way.1(&served.path("x.luks"), at, len);
    let what = format!("{} at {at}, {len} bytes", way.0);
    let changed = served.live();
    let reported = |when: &str| {
        let (status, text) = code(&served, &["status"]);
        let says = text.contains("ALARM: the container was changed by something else");
        assert!(status == Some(3) && says, "{what}, {when}: {text}");
        let (check, text) = code(&served, &["check"]);
        let says = text.contains("changed by something else than sprat-agent");
        assert!(check != Some(0) && says, "{what}, {when}: {text}");
    };
    reported("at once");
    let mut client = served.connect();
    let handle = client.open("x.luks", READ_WRITE).unwrap();
    if !changed.is_empty() {
        assert_eq!(client.write(&handle, 0, &[3]), 0);
    }
    client.end();
    if changed.is_empty() {
        return;
    }
    reported("after the next session");
    assert_eq!(served.head(2, "reason"), "written-past", "{what}");
    assert!(served.past(2) == changed, "{what}: the state that it left");
    let names = past_names(&served);
    let suspect = names.iter().filter(|name| name.ends_with("-suspect.luks"));
    assert!(
        names.len() == 2 && suspect.count() == 1,
        "{what}: {names:?}"
    );
    served.run(&["ack", "x.luks"]);
    assert_eq!(code(&served, &["status"]).0, Some(0), "{what}");
}

#[test]
fn each_of_a_hundred_changes_without_the_agent_is_reported_until_it_is_confirmed() {
    assert_eq!(WAYS.len() * PLACES.len(), 100);
    std::thread::scope(|scope| {
        for half in WAYS.chunks(WAYS.len() / 2) {
            scope.spawn(move || {
                for way in half {
                    PLACES.iter().for_each(|place| is_reported(way, *place));
                }
            });
        }
    });
}

/// What is reported of changes without the agent: lines of the journal, names of states, alarms.
pub fn reports(served: &Served) -> usize {
    let journal = |name: &str| {
        let path = served.path(&format!(".sprat-agent/x.luks/{name}"));
        fs::read_to_string(path).unwrap_or_default()
    };
    let lines = journal("sessions.jsonl.old") + &journal("sessions.jsonl");
    assert!(lines.contains("\"session\":"), "{lines}");
    let lines = lines.matches(REPORT).count();
    let names = past_names(served).into_iter();
    let suspect = names.filter(|name| name.ends_with("-suspect.luks")).count();
    let said = ["status", "check"].map(|word| code(served, &[word]).1.matches(REPORT).count());
    lines + suspect + said[0] + said[1]
}

const REPORT: &str = "changed by something else than sprat-agent";

/// Between sessions something changes the container: in a random way, at a random place, of any size, and first seen
/// by a random one of those that must report it. In the short form so often.
fn random_changes_are_reported(new: &dyn Fn() -> Served, short: u64, is_clone: bool) {
    let wanted = dice::number("SPRAT_TORTURE_ROUNDS").unwrap_or(short);
    let mut dice = Dice::new(dice::new_seed());
    let mut counts = BTreeMap::new();
    // Each time in a new folder: of a hundred states in one, each check reads all.
    for first in (0..wanted).step_by(10) {
        let rounds = 10.min(wanted - first);
        some_changes_are_reported(&new(), rounds, is_clone, &mut dice, &mut counts);
    }
    println!("{wanted} of {wanted} changes reported: {counts:?}");
}

fn some_changes_are_reported(
    served: &Served,
    rounds: u64,
    is_clone: bool,
    dice: &mut Dice,
    counts: &mut BTreeMap<&'static str, u32>,
) {
    let path = served.path("x.luks");
    fs::write(&path, blocks(BLOCKS, 1)).unwrap();
    let mut states: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
    let session = |dice: &mut Dice, states: &mut BTreeMap<u32, Vec<u8>>| {
        let before = served.live();
        let mut client = served.connect();
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        if (before.len() as u64) < LEN {
            assert_eq!(client.set_len(&handle, LEN), 0);
        }
        for _ in 0..=dice.below(4) {
            let at = dice.below(LEN - 8192);
            let bytes = blocks(2, dice.any());
            assert_eq!(client.write(&handle, at, &bytes), 0);
        }
        client.end();
        let newest = *served.numbers().last().unwrap();
        states.insert(newest, before);
        newest
    };
    for round in 1..=rounds {
        session(dice, &mut states);
        let before = code(served, &["status"]);
        assert_eq!(before.0, Some(0), "round {round}: {}", before.1);
        next_tick();
        let ways = [WAYS, MORE_WAYS].concat();
        let (name, change) = ways[usize::try_from(dice.below(ways.len() as u64)).unwrap()];
        let live = served.live();
        // A hole where there is one already changes nothing: btrfs does not set the times then.
        let (at, count) = loop {
            let at = 1 + dice.below(len(&path) - 1);
            let count = 1 + dice.below(len(&path) - at);
            let part = usize::try_from(at).unwrap()..usize::try_from(at + count).unwrap();
            if live[part].iter().any(|byte| *byte != 0) {
                break (at, count);
            }
        };
        change(&path, at, count);
        *counts.entry(name).or_default() += 1;
        let what = format!("round {round}, {name} at {at}, {count} bytes");
        let changed = served.live();
        let reported = |word: &str| {
            let (code, text) = code(served, &[word]);
            let wanted = if word == "status" { 3 } else { 1 };
            assert!(
                code == Some(wanted) && text.contains(REPORT),
                "{what}, {word}: {text}"
            );
        };
        match dice.below(3) {
            0 => {}
            1 => reported("status"),
            _ => reported("check"),
        }
        let newest = session(dice, &mut states);
        assert_eq!(states[&newest], changed, "{what}");
        assert_eq!(served.head(newest, "reason"), "written-past", "{what}");
        reported("status");
        reported("check");
        // Nothing older is shown as if it were sure, unless it is a clone: then it is.
        let names = past_names(served);
        for (number, state) in &states {
            let stem = served.head(*number, "name").replace(".luks", "");
            let is_sure = is_clone || *number == newest;
            let shown = format!("{stem}{}.luks", if is_sure { "" } else { "-suspect" });
            assert!(names.contains(&shown), "{what}: {shown} of {names:?}");
            if is_sure {
                assert!(
                    served.past(*number) == *state,
                    "{what}: generation {number}"
                );
            }
        }
        served.run(&["ack", "x.luks"]);
    }
}

#[test]
fn random_changes_without_the_agent_are_reported() {
    random_changes_are_reported(&|| Served::new(EAGER), 8, false);
}

#[test]
fn random_changes_without_the_agent_are_reported_and_clones_stay_exact() {
    requires!(missing());
    for mkfs in [BTRFS, XFS] {
        let disk = Disk::new(mkfs);
        random_changes_are_reported(&|| disk.served(EAGER), 4, true);
    }
}

/// Other owners, modes, names and attributes; reading; copies; and four channels that end in any order.
#[test]
fn what_changes_no_content_is_not_reported() {
    let served = a_container_with_a_past();
    let path = served.path("x.luks");
    let is_root = rustix::process::geteuid().is_root();
    let mut dice = Dice::new(1);
    let rounds = dice::number("SPRAT_TORTURE_ROUNDS").unwrap_or(12);
    for round in 0..rounds {
        let mut first = served.connect();
        let handle = first.open("x.luks", READ_WRITE).unwrap();
        let fields = [string(b"x.luks"), string(b"token")].concat();
        let session = first.own("session-begin@sprat", &fields).unwrap();
        let session = [string(b"x.luks"), session[..8].to_vec()].concat();
        let mut channels = vec![(first, handle)];
        for _ in 1..4 {
            let mut next = served.connect();
            let handle = next.open("x.luks", READ_WRITE).unwrap();
            next.own("session-join@sprat", &session).unwrap();
            channels.push((next, handle));
        }
        for number in 0..8 {
            let at = dice.below(BLOCKS as u64) * BLOCK as u64;
            let (client, handle) = &mut channels[number % 4];
            assert_eq!(
                client.write(handle, at, &[round.to_le_bytes()[0]; BLOCK]),
                0
            );
        }
        while !channels.is_empty() {
            let at = usize::try_from(dice.below(channels.len() as u64)).unwrap();
            channels.swap_remove(at).0.end();
        }
        let root = served.path("");
        match round % 6 {
            0 if is_root => {
                for owner in ["12345:12345", "0:0"] {
                    system("chown", &["-R".as_ref(), owner.as_ref(), root.as_os_str()]);
                }
            }
            1 => drop(system(
                "chmod",
                &["-R".as_ref(), "g+w".as_ref(), path.as_os_str()],
            )),
            2 => {
                let link = served.path("other-name");
                fs::hard_link(&path, &link).unwrap();
                fs::remove_file(link).unwrap();
            }
            3 => {
                let copy = tempfile::tempdir().unwrap();
                system(
                    "cp",
                    &["-a".as_ref(), root.as_os_str(), copy.path().as_os_str()],
                );
            }
            4 => {
                let moved = served.path("moved");
                fs::rename(&path, &moved).unwrap();
                fs::rename(moved, &path).unwrap();
            }
            _ => fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap(),
        }
        if is_root {
            lchown(&path, Some(0), Some(0)).unwrap();
        }
        let (status, text) = code(&served, &["status"]);
        assert_eq!(status, Some(0), "round {round}: {text}");
        assert!(served.run(&["check"]).contains("0 findings"), "{round}");
        let names = past_names(&served);
        assert!(
            names.iter().all(|name| !name.contains("suspect")),
            "{names:?}"
        );
    }
    assert_eq!(fs::metadata(&path).unwrap().size(), LEN);
    assert_eq!(reports(&served), 0);
    println!("{rounds} sessions of four channels: 0 reports");
}

/// The limit of it: all that the agent compares is as it was. docs/agent.md says so.
#[test]
fn a_change_whose_time_was_set_back_is_not_seen() {
    let served = a_container_with_a_past();
    let file = open(&served.path("x.luks"));
    let time = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[7; 100], 5000).unwrap();
    file.set_modified(time).unwrap();
    assert_eq!(code(&served, &["status"]).0, Some(0));
}
