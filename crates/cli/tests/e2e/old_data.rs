//! A server that answers with yesterday's content: what is detected, and what is not
//! (docs/threat-model.md).

mod btrfs;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use sprat_testkit::client_and_server;
use sprat_testkit::machine::served::{Forgetful, missing, served};
use sprat_testkit::machine::strikes::{copy_sparse, dice};
use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};
use sprat_testkit_session::plain_volume::PlainVolume;

use crate::damage::{first_block, flip, inside};

const HEADER_BYTES: u64 = 16 << 20;

/// A container of two snapshots, `yesterday` with the first alone, and `src-yesterday`, its source.
fn with_a_yesterday() -> TestMachine {
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "64M"]);
    fs::create_dir(machine.path("m")).unwrap();
    for (name, byte) in [("kept", 1), ("changed", 2)] {
        machine.write(&format!("src/{name}"), vec![byte; 300_000]);
    }
    machine.backup(&[]).succeeded();
    copy_sparse(&machine.path(CONTAINER), &machine.path("yesterday"));
    copy_sparse(&machine.path("src"), &machine.path("src-yesterday"));
    machine.write("src/changed", vec![3; 300_000]);
    machine.write("src/new", vec![4; 300_000]);
    machine.backup(&[]).succeeded();
    machine
}

/// The server shows yesterday's container, with the length and times of today's.
fn roll_back(machine: &TestMachine) {
    let container = machine.path(CONTAINER);
    let shown = File::open(&container).unwrap().metadata().unwrap();
    fs::remove_file(&container).unwrap();
    copy_sparse(&machine.path("yesterday"), &container);
    let file = File::options().write(true).open(&container).unwrap();
    file.set_modified(shown.modified().unwrap()).unwrap();
}

#[test]
fn yesterdays_container_is_refused_until_it_is_accepted() {
    requires!(needs::root());
    let machine = with_a_yesterday();
    machine.restores_whole(&[]);
    roll_back(&machine);
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    for arguments in commands() {
        let text = machine.sprat(&arguments).failed_with(13);
        assert!(text.contains("--accept-older-state"), "{text}");
    }
    assert!(fs::read(machine.path(CONTAINER)).unwrap() == before);
    assert!(!machine.path("store/copy.luks").exists());
    // It is whole, and never mixed with what is kept of today's. Accepted once is accepted.
    let accepted = ["snapshots", CONTAINER, "--json", "--accept-older-state"];
    let listed = machine.sprat(&accepted).json();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 1);
    fs::rename(machine.path("src"), machine.path("src-today")).unwrap();
    copy_sparse(&machine.path("src-yesterday"), &machine.path("src"));
    machine.restores_whole(&[]);
    machine.ok(&["check", CONTAINER]);
    // And backups continue from there.
    fs::remove_dir_all(machine.path("src")).unwrap();
    fs::rename(machine.path("src-today"), machine.path("src")).unwrap();
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
}

/// Another machine with the same key backs up what is in `src`.
fn backup_elsewhere(machine: &TestMachine) {
    let mut command = machine.command();
    command.args(["backup", CONTAINER, "--name", "home", "src"]);
    command.env("SPRAT_STATE_DIR", machine.path("state-elsewhere"));
    command.env("SPRAT_CACHE_DIR", machine.path("cache-elsewhere"));
    machine.run(&mut command).succeeded();
}

fn newest(machine: &TestMachine) -> String {
    let listed = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    let listed = listed["snapshots"].as_array().unwrap();
    listed.last().unwrap()["folder"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn snapshot_that_a_copy_with_more_backups_lacks_is_named_until_that_is_accepted() {
    requires!(needs::root());
    let machine = with_a_yesterday();
    let gone = newest(&machine);
    // Otherwise the first backup elsewhere may have the same name, which is of the next second if both backups were made
    // within one.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    // A copy of yesterday's container gets more backups than this machine made, and replaces it.
    roll_back(&machine);
    for number in 0..3 {
        machine.write("src/elsewhere", vec![number; 300_000]);
        backup_elsewhere(&machine);
    }
    // A command that does not mount the volume leaves it to the next one.
    machine.ok(&[
        "key",
        "rehearse",
        CONTAINER,
        "--key-file",
        "config/keys/x.key",
    ]);
    let said = machine.sprat(&["check", CONTAINER]).succeeded().whole();
    assert!(said.contains(&gone), "{said}");
    let status = ["status", CONTAINER, "--json"];
    for _ in 0..2 {
        let ran = machine.sprat(&status);
        assert_eq!(ran.code, 13);
        let known = &ran.json()["containers"][0]["snapshots_gone"]["snapshots"];
        assert_eq!(known[0], format!("home/{gone}"));
        machine.backup(&[]).succeeded();
    }
    let accepted = machine.ok(&["accept", CONTAINER]).whole();
    assert!(accepted.contains(&gone), "{accepted}");
    assert_eq!(machine.sprat(&status).code, 0);
    // What another machine removed in order is not reported, even if that was all that was made from it but the newest.
    let removed = newest(&machine);
    backup_elsewhere(&machine);
    let made_from_it = newest(&machine);
    machine.ok(&["snapshots", CONTAINER]);
    backup_elsewhere(&machine);
    for name in [&removed, &made_from_it] {
        let mut command = machine.command();
        let name = format!("home/{name}");
        command.args(["remove", CONTAINER, &name, "--yes"]);
        command.env("SPRAT_STATE_DIR", machine.path("state-elsewhere"));
        command.env("SPRAT_CACHE_DIR", machine.path("cache-elsewhere"));
        machine.run(&mut command).succeeded();
    }
    let said = machine.backup(&[]).succeeded().whole();
    assert!(!said.contains(&removed), "{said}");
    assert_eq!(machine.sprat(&status).code, 0);
}

/// A command of each kind that opens the container.
fn commands() -> Vec<Vec<&'static str>> {
    let lines = [
        "backup C --name home src",
        "restore C home --to back",
        "snapshots C",
        "check C",
        "check C --read-data",
        "prune C --job home --keep-last 1",
        "mount C m",
        "mount C m --rw",
        "trim C",
        "key add C --new-key-file k2 --cheap-kdf-for-tests",
        "key remove C 1 --allow-last",
        "key rehearse C --key-file config/keys/x.key",
        "copy C store/copy.luks",
        "copy C store/copy.luks --move",
        "trim C --rewrite",
        "check C --against-source home",
        "grow C --size 80M",
    ];
    // The kernel lets only some of us grow a file system; without it nothing is opened.
    let lines = lines.into_iter();
    let lines = lines.filter(|line| !line.starts_with("grow") || sprat_attach::may_grow());
    let words = |line: &'static str| {
        let words = line.split(' ');
        words
            .map(|word| if word == "C" { CONTAINER } else { word })
            .collect()
    };
    lines.map(words).collect()
}

/// Rounds of the long form (`make torture`), else those of the short one.
fn rounds(short: u64, long: u64) -> u64 {
    let asked = std::env::var("SPRAT_TORTURE_ROUNDS").is_ok();
    if asked { long } else { short }
}

/// Rolls the container back by one to five sessions, and runs the next of all commands.
fn each_rollback_is_noticed(
    rounds: u64,
    run: impl Fn(&TestMachine, &[&str]) -> sprat_testkit::machine::Ran,
) {
    let machine = with_a_yesterday();
    let mut dice = dice();
    let commands = commands();
    let first = dice.below(commands.len() as u64);
    let backup = ["backup", CONTAINER, "--name", "home", "src"];
    assert_eq!(run(&machine, &backup).code, 0);
    for round in 0..rounds {
        fs::remove_file(machine.path("yesterday")).unwrap();
        copy_sparse(&machine.path(CONTAINER), &machine.path("yesterday"));
        let sessions = 1 + dice.below(5);
        for session in 0..sessions {
            machine.write(&format!("src/{round}-{session}"), vec![5; 5000]);
            run(&machine, &backup).succeeded();
        }
        copy_sparse(&machine.path(CONTAINER), &machine.path("today"));
        roll_back(&machine);
        let before = fs::read(machine.path(CONTAINER)).unwrap();
        let number = usize::try_from((first + round) % commands.len() as u64).unwrap();
        println!(
            "round {round}: {sessions} sessions back, {:?}",
            commands[number]
        );
        run(&machine, &commands[number]).failed_with(13);
        assert!(fs::read(machine.path(CONTAINER)).unwrap() == before);
        fs::rename(machine.path("today"), machine.path(CONTAINER)).unwrap();
    }
    assert_eq!(run(&machine, &backup).code, 0);
    machine.restores_whole(&["--accept-older-state"]);
    machine.nothing_is_left();
}

#[test]
fn each_rollback_is_detected_by_the_next_command() {
    requires!(needs::root());
    each_rollback_is_noticed(rounds(2, 50), |machine, arguments| machine.sprat(arguments));
}

#[test]
fn each_rollback_of_a_server_is_detected_with_a_warm_cache() {
    requires!(needs::root());
    each_rollback_is_noticed(rounds(2, 50), served);
}

/// The promise of docs/threat-model.md: the same session detects the loss of anything that an fsync
/// reported as durable, because it reads the newest of it back at the end. Where only the last writes
/// are lost, or the server answers reads from discarded data, the next session detects it.
#[test]
fn server_that_discards_writes_is_detected() {
    requires!(missing());
    let machine = with_a_warm_cache();
    let mut dice = dice();
    let forgetful = Forgetful::of(&machine);
    let states = ["store", "state", "cache"];
    for name in states {
        copy_sparse(&machine.path(name), &machine.path(format!("{name}-before")));
    }
    let begin_anew = || {
        for name in states {
            fs::remove_dir_all(machine.path(name)).unwrap();
            copy_sparse(&machine.path(format!("{name}-before")), &machine.path(name));
        }
    };
    machine.write("src/newest", sprat_testkit::machine::noise(200_000, 97));
    let backup = ["backup", CONTAINER, "--name", "home", "src"];
    forgetful.run(usize::MAX, "honest", &backup).succeeded();
    let writes = forgetful.lines("writes");
    assert!(writes > 10, "{writes}");
    let mut nths: Vec<usize> = (1..=writes).collect();
    if rounds(0, 1) == 0 {
        let mut some = vec![1, writes - 1, writes];
        some.extend((0..2).map(|_| 1 + usize::try_from(dice.below(writes as u64)).unwrap()));
        nths = some;
    }
    for how in ["honest", "lying"] {
        let (mut same, mut next, mut lost) = (0, 0, 0);
        for nth in &nths {
            begin_anew();
            let ran = forgetful.run(*nth, how, &backup);
            let forgotten = forgetful.lines("forgotten");
            println!("{how}, from write {nth} on, {forgotten} lost: {}", ran.code);
            if forgotten == 0 {
                // This run had fewer writes.
                continue;
            }
            lost += 1;
            match ran.code {
                13 => same += 1,
                // It was called durable: from here on every session must see that it is not.
                0 => {
                    for arguments in [&["snapshots", CONTAINER][..], &backup] {
                        let text = served(&machine, arguments).failed_with(13);
                        assert!(text.contains("--accept-older-state"), "{text}");
                    }
                    next += 1;
                }
                _ => panic!("{}", ran.whole()),
            }
            // Only the last flight, the file system's last super block, has no fsync behind it
            // that a read could follow.
            assert!(
                how == "lying" || ran.code == 13 || forgotten == 1,
                "{forgotten}"
            );
        }
        println!("{how}: of {lost}, {same} by the same session, {next} by the next");
        assert_eq!(same + next, lost);
        assert!(how == "lying" || same + 1 >= lost, "{same} of {lost}");
    }
    begin_anew();
    assert_eq!(served(&machine, &backup).code, 0);
    machine.nothing_is_left();
}

/// Two snapshots on a server, and a cache that has all of them.
fn with_a_warm_cache() -> TestMachine {
    let machine = TestMachine::new();
    let init = ["init", CONTAINER, "--size", "64M", "--cheap-kdf-for-tests"];
    assert_eq!(served(&machine, &init).code, 0);
    for name in 0..40 {
        machine.write(
            &format!("src/{name}"),
            sprat_testkit::machine::noise(20_000, name),
        );
    }
    for round in 0..2 {
        if round == 1 {
            copy_sparse(&machine.path(CONTAINER), &machine.path("yesterday"));
            machine.write("src/new", sprat_testkit::machine::noise(300_000, 99));
            machine.write("src/3", sprat_testkit::machine::noise(20_000, 98));
        }
        served(&machine, &["backup", CONTAINER, "--name", "home", "src"]).succeeded();
    }
    machine
}

/// Blocks of the file that the file system uses, and of these those that are no file's content.
fn used_blocks(machine: &TestMachine) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let (container, image) = (machine.path(CONTAINER), machine.path("image"));
    let key = machine.path("config/keys/x.key");
    let plain = PlainVolume::export(&container, &key, &image);
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        let output = command.args(arguments).arg(&image).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let about = run("dumpe2fs", &[]);
    let free: BTreeSet<u64> = about
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Free blocks: "))
        .flat_map(|list| list.split(", "))
        .filter_map(|range| {
            let (from, to) = range.split_once('-').unwrap_or((range, range));
            Some(from.parse::<u64>().ok()?..=to.parse().ok()?)
        })
        .flatten()
        .collect();
    let blocks_of = |inode: &str| -> BTreeSet<u64> {
        let said = run("debugfs", &["-R", &format!("blocks <{inode}>")]);
        said.split_whitespace()
            .filter_map(|word| word.parse().ok())
            .collect()
    };
    // The journal's content was written to its place long ago.
    let journal = blocks_of("8");
    let file = File::open(&container).unwrap();
    let mut block = vec![0; 4096];
    let blocks = (fs::metadata(&container).unwrap().len() - HEADER_BYTES) / 4096;
    let used: BTreeSet<u64> = (0..blocks)
        .filter(|block| !free.contains(block) && !journal.contains(block))
        .filter(|number| {
            file.read_exact_at(&mut block, HEADER_BYTES + number * 4096)
                .unwrap();
            // A hole.
            block.iter().any(|byte| *byte != 0)
        })
        .collect();
    let mut content = BTreeSet::new();
    let mounted = machine.path("plain");
    let guard = plain.mount(&mounted);
    let mut folders = vec![mounted.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let about = entry.metadata().unwrap();
            if about.is_dir() {
                folders.push(entry.path());
            } else if about.is_file() {
                content.extend(blocks_of(&about.ino().to_string()));
            }
        }
    }
    drop(guard);
    let metadata = used.difference(&content).copied().collect();
    (used, metadata)
}

#[test]
fn drill_reads_from_the_server_and_not_from_a_warm_cache() {
    requires!(client_and_server::missing());
    let machine = with_a_warm_cache();
    assert_eq!(served(&machine, &["drill", CONTAINER]).code, 0);
    let container = machine.path(CONTAINER);
    let time = fs::metadata(&container).unwrap().modified().unwrap();
    let new = inside(&machine, "new");
    let snapshots = fs::read_dir(machine.path("cache")).unwrap();
    assert!(snapshots.count() > 1, "no cache beside the scratch folder");
    let listed = served(&machine, &["snapshots", CONTAINER, "--json"]).json();
    let newest = listed["snapshots"].as_array().unwrap().last().unwrap();
    let snapshot = newest["folder"].as_str().unwrap();
    let block = first_block(&machine, &format!("blocks \"/home/{snapshot}{new}\""));
    flip(&container, block);
    let file = File::options().write(true).open(&container).unwrap();
    file.set_modified(time).unwrap();
    let drilled = served(&machine, &["drill", CONTAINER]);
    assert_eq!(drilled.code, 13, "{}", drilled.whole());
    assert!(
        drilled
            .stdout
            .contains("1 block of the server differ from what this machine wrote"),
        "{}",
        drilled.whole()
    );
    machine.nothing_is_left();
}

#[test]
fn check_reports_each_damage_with_a_warm_cache_and_same_time() {
    requires!(client_and_server::missing());
    let machine = with_a_warm_cache();
    let (used, metadata) = used_blocks(&machine);
    assert!(used.len() > metadata.len() && metadata.len() > 10);
    let container = machine.path(CONTAINER);
    let time = fs::metadata(&container).unwrap().modified().unwrap();
    let (whole, old) = (
        fs::read(&container).unwrap(),
        fs::read(machine.path("yesterday")).unwrap(),
    );
    let cache = machine.path("cache");
    copy_sparse(&cache, &machine.path("cache-warm"));
    let known = machine.path("state");
    copy_sparse(&known, &machine.path("state-kept"));
    let mut dice = dice();
    let all: Vec<u64> = used.iter().copied().collect();
    let mut reported = [0, 0];
    let total = rounds(10, 200);
    for round in 0..total {
        let mut damaged = whole.clone();
        let at = |block: u64| usize::try_from(HEADER_BYTES + block * 4096).unwrap();
        let mut pick = || all[usize::try_from(dice.below(all.len() as u64)).unwrap()];
        let what = match round % 5 {
            0 => {
                let block = at(pick());
                damaged[block + 77] ^= 1;
                "a bit of a block"
            }
            1 => {
                let first = pick();
                for block in all
                    .iter()
                    .filter(|block| (first..first + 8).contains(*block))
                {
                    damaged[at(*block)..at(*block) + 4096].fill(0xA5);
                }
                "a range"
            }
            2 => {
                let (a, b) = (at(pick()), at(pick()));
                let (first, second) = (whole[a..a + 4096].to_vec(), whole[b..b + 4096].to_vec());
                damaged[a..a + 4096].copy_from_slice(&second);
                damaged[b..b + 4096].copy_from_slice(&first);
                "two blocks swapped"
            }
            3 => {
                for block in all.iter().filter(|_| dice.percent(30)) {
                    damaged[at(*block)..at(*block) + 4096]
                        .copy_from_slice(&old[at(*block)..at(*block) + 4096]);
                }
                "older blocks"
            }
            _ => {
                damaged[at(1)..].copy_from_slice(&old[at(1)..]);
                "all but block 0 is older"
            }
        };
        let touched: Vec<u64> = all
            .iter()
            .copied()
            .filter(|block| damaged[at(*block)..][..4096] != whole[at(*block)..][..4096])
            .collect();
        let touches_metadata = touched.iter().any(|block| metadata.contains(block));
        let file = File::options().write(true).open(&container).unwrap();
        file.write_all_at(&damaged, 0).unwrap();
        file.set_modified(time).unwrap();
        for (number, arguments) in [
            &["check", CONTAINER][..],
            &["check", CONTAINER, "--read-data"],
        ]
        .into_iter()
        .enumerate()
        {
            for (kept, place) in [("cache-warm", &cache), ("state-kept", &known)] {
                fs::remove_dir_all(place).unwrap();
                copy_sparse(&machine.path(kept), place);
            }
            let ran = served(&machine, arguments);
            let must = !touched.is_empty() && (number == 1 || touches_metadata);
            assert!(
                ran.code == 13 || !must && ran.code == 0,
                "round {round}, {what}: {touched:?} {}",
                ran.whole()
            );
            reported[number] += u64::from(ran.code == 13);
        }
    }
    println!(
        "of {total}: {} by check, {} by --read-data",
        reported[0], reported[1]
    );
    assert!(reported[1] > 0);
    let file = File::options().write(true).open(&container).unwrap();
    file.write_all_at(&whole, 0).unwrap();
    file.set_modified(time).unwrap();
    served(&machine, &["check", CONTAINER, "--read-data"]).succeeded();
}

#[test]
fn older_file_behind_the_newest_super_block_is_detected() {
    requires!(needs::root());
    let machine = with_a_warm_cache();
    let container = machine.path(CONTAINER);
    let time = fs::metadata(&container).unwrap().modified().unwrap();
    let old = fs::read(machine.path("yesterday")).unwrap();
    let file = File::options().write(true).open(&container).unwrap();
    let behind = usize::try_from(HEADER_BYTES + 4096).unwrap();
    file.write_all_at(&old[behind..], behind as u64).unwrap();
    file.set_modified(time).unwrap();
    let before = fs::read(&container).unwrap();
    let backup = ["backup", CONTAINER, "--name", "home", "src"];
    // First by the blocks, before anything is written.
    served(&machine, &backup).failed_with(13);
    assert!(fs::read(&container).unwrap() == before);
    // Then the cache is gone, and the missing snapshot is seen: each time, before anything is
    // written.
    fs::create_dir(machine.path("m")).unwrap();
    let prune = ["prune", CONTAINER, "--job", "home", "--keep-last", "1"];
    let mount = ["mount", CONTAINER, "m", "--rw"];
    for writing in [&backup[..], &backup, &prune, &mount, &["trim", CONTAINER]] {
        let text = served(&machine, writing).failed_with(13);
        assert!(text.contains("the newest snapshot is gone"), "{text}");
        let after = fs::read(&container).unwrap();
        let differ = (0..before.len()).step_by(4096);
        let differ = differ.filter(|at| before[*at..*at + 4096] != after[*at..*at + 4096]);
        assert_eq!(differ.count(), 0, "{writing:?} wrote");
    }
    let accepted = [&backup[..], &["--accept-older-state"]].concat();
    assert_eq!(served(&machine, &accepted).code, 0);
    assert_eq!(served(&machine, &backup).code, 0);
}

#[test]
fn older_header_is_refused_before_a_key_is_used() {
    requires!(needs::root());
    let machine = with_a_yesterday();
    machine.write("pass", "correct horse battery");
    let add = ["key", "add", CONTAINER, "--new-passphrase-file", "pass"];
    machine.ok(&[&["--cheap-kdf-for-tests"][..], &add].concat());
    roll_back(&machine);
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    for arguments in [&["snapshots", CONTAINER][..], &["check", CONTAINER]] {
        machine.sprat(arguments).failed_with(13);
    }
    machine.backup(&[]).failed_with(13);
    assert!(fs::read(machine.path(CONTAINER)).unwrap() == before);
}

/// Some blocks of yesterday among today's: XTS can't detect them. sprat does promise to end with a
/// documented code, and to write nothing where it only reads.
#[test]
fn older_blocks_damage_only_the_files_in_them() {
    requires!(needs::root());
    let machine = with_a_yesterday();
    let mut dice = dice();
    copy_sparse(&machine.path(CONTAINER), &machine.path("today"));
    let [yesterday, today] =
        ["yesterday", "today"].map(|name| fs::read(machine.path(name)).unwrap());
    let header = usize::try_from(HEADER_BYTES).unwrap();
    let differing: Vec<usize> = (header..today.len())
        .step_by(4096)
        .filter(|at| today[*at..*at + 4096] != yesterday[*at..*at + 4096])
        .collect();
    for round in 0..4 {
        let file = File::options().write(true).open(machine.path(CONTAINER));
        let file = file.unwrap();
        let mut old = 0;
        for at in &differing {
            let shown = if dice.percent([10, 30, 50, 90][round]) {
                old += 1;
                &yesterday
            } else {
                &today
            };
            let block = &shown[*at..*at + 4096];
            file.write_all_at(block, *at as u64).unwrap();
        }
        let before = fs::read(machine.path(CONTAINER)).unwrap();
        let to = tempfile::tempdir_in(machine.folder()).unwrap();
        let to = to.path().to_str().unwrap();
        let restore = ["restore", CONTAINER, "home", "--to", to];
        for arguments in [&["check", CONTAINER][..], &restore] {
            let ran = machine.sprat(arguments);
            println!(
                "{old} of {} blocks old: {arguments:?}: {}",
                differing.len(),
                ran.code
            );
            assert!(matches!(ran.code, 0 | 1 | 3 | 13), "{}", ran.whole());
            assert!(!ran.stderr.contains("panicked"), "{}", ran.whole());
        }
        machine.nothing_is_left();
        assert!(before == fs::read(machine.path(CONTAINER)).unwrap());
    }
    fs::write(machine.path(CONTAINER), &today).unwrap();
    machine.restores_whole(&[]);
}

#[test]
fn rename_that_a_server_did_not_do_is_no_success() {
    requires!(missing());
    let machine = TestMachine::new();
    let forgetful = Forgetful::of(&machine);
    let init = |name| ["init", name, "--size", "64M", "--cheap-kdf-for-tests"];
    let text = forgetful
        .run(0, "renames", &init(CONTAINER))
        .failed_with(13);
    assert!(text.contains("the server confirmed the renaming"), "{text}");
    assert!(!machine.path(CONTAINER).exists());
    assert_eq!(served(&machine, &init(CONTAINER)).code, 0);
    machine.write("src/a", "alpha\n");
    let backup = ["backup", CONTAINER, "--name", "home", "src"];
    assert_eq!(served(&machine, &backup).code, 0);
    // The old file keeps the name, and the container stays as it is.
    let trimmed = forgetful.run(0, "renames", &["trim", CONTAINER, "--rewrite"]);
    assert_eq!(trimmed.code, 13, "{}", trimmed.whole());
    assert_eq!(served(&machine, &["check", CONTAINER]).code, 0);
    assert_eq!(served(&machine, &backup).code, 0);
    // A copy without its final name, and so no move.
    fs::rename(machine.path(CONTAINER), machine.path("store/y.luks")).unwrap();
    let copy = ["copy", "store/y.luks", CONTAINER, "--move"];
    let copied = forgetful.run(0, "renames", &copy);
    assert_eq!(copied.code, 13, "{}", copied.whole());
    assert!(machine.path("store/y.luks").exists());
    machine.nothing_is_left();
}
