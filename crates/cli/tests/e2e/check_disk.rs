//! `sprat check` where a disk fails, is full or can't be written to, or the container is in use.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::damage::{PAYLOAD_BYTES, check, debugfs, first_name, inside, kept, snapshots};
use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::client_and_server;
use sprat_testkit::machine::{CONTAINER, Ran, TestMachine, noise};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{agent_server, leases, needs, requires};

/// sprat's check as on a server whose disk can't give these blocks of the volume back.
fn command_on_bad_disk(machine: &TestMachine, blocks: &[u64], more: &[&str]) -> Command {
    let bad = blocks.iter().map(|block| {
        let from = PAYLOAD_BYTES + block * 4096;
        format!("{from} 4096\n")
    });
    let list = machine.write("bad-blocks", bad.collect::<String>());
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/damage/bad_disk.py");
    let ssh = format!(
        "python3 -S {} {} {}",
        script.display(),
        list.display(),
        agent_server::sftp_server(&machine.path("store"))
            .unwrap()
            .display()
    );
    let mut command = machine.command();
    command.args(["check", &machine.on_line(CONTAINER), "--json"]);
    command
        .arg("--key-file")
        .arg(machine.path("config/keys/x.key"));
    command.args(["--no-cache", "--reconnect-max", "5", "--ssh-command", &ssh]);
    command.args(more);
    command
}

fn check_on_bad_disk(machine: &TestMachine, blocks: &[u64], more: &[&str]) -> Ran {
    machine.run(&mut command_on_bad_disk(machine, blocks, more))
}

fn bad_disk_missing() -> Option<String> {
    sprat_testkit::machine::strikes::missing().or_else(|| needs::program("debugfs"))
}

#[test]
fn a_file_whose_block_can_not_be_read_is_named_in_each_snapshot() {
    requires!(client_and_server::missing(), bad_disk_missing());
    let machine = crate::damage::with_two_snapshots();
    // The blocks are neighbours, and one read covers several: the one that fails affects no other.
    for file in 0..64 {
        machine.write(&format!("src/folder/small {file}"), noise(4096, file));
    }
    for _ in 0..2 {
        machine.backup(&[]).succeeded();
        std::thread::sleep(Duration::from_millis(1100));
    }
    let newest = snapshots(&machine).pop().unwrap();
    let small = inside(&machine, "folder/small 32");
    let blocks = debugfs(&machine, &format!("blocks \"/home/{newest}{small}\""));
    let block = blocks.trim().parse().unwrap();
    let whole = check_on_bad_disk(&machine, &[], &["--read-data"]).succeeded();
    let all = whole.json()["files"]["files_read"].as_u64().unwrap();
    for _ in 0..3 {
        let read = check_on_bad_disk(&machine, &[block], &["--read-data"]);
        assert_eq!(read.code, 13, "{}", read.whole());
        assert_eq!(read.json()["file_system"]["clean"], true);
        let files = read.json()["files"].clone();
        assert_eq!(files["unreadable"]["count"], 1, "{files}");
        let unreadable = first_name(&files["unreadable"]);
        assert!(unreadable.contains("folder/small 32: "), "{unreadable}");
        assert_eq!(files["affected"]["count"], 2, "{files}");
        assert_eq!(files["files_read"], all - 1, "{files}");
    }
    // Nothing reads the block for this.
    assert_eq!(check_on_bad_disk(&machine, &[block], &[]).code, 0);
    assert_eq!(kept(&machine)["read_data"]["exit"], "damaged");
    machine.nothing_is_left();
}

#[test]
fn metadata_that_can_not_be_read_is_damage_and_kept_as_that() {
    requires!(client_and_server::missing(), bad_disk_missing());
    let machine = crate::damage::with_two_snapshots();
    let said = debugfs(&machine, "imap <2>");
    let (_, inodes) = said.split_once("located at block ").unwrap();
    let inodes: String = inodes.chars().take_while(char::is_ascii_digit).collect();
    for block in [1, 2, inodes.parse().unwrap()] {
        for more in [&[][..], &["--read-data"]] {
            let ran = check_on_bad_disk(&machine, &[block], more);
            assert_eq!(ran.code, 13, "block {block}: {}", ran.whole());
            let said = ran.json();
            assert_eq!(said["file_system"]["clean"], false, "block {block}");
            assert_eq!(kept(&machine)["quick"]["exit"], "damaged");
        }
    }
    assert_eq!(check_on_bad_disk(&machine, &[], &[]).code, 0);
    assert_eq!(kept(&machine)["quick"]["exit"], "done");
    // Without this one nothing is opened; it is damage all the same.
    let said = check_on_bad_disk(&machine, &[0], &[]).failed_with(13);
    assert!(said.contains("super block, can't be read"), "{said}");
    assert_eq!(kept(&machine)["quick"]["exit"], "damaged");
    machine.nothing_is_left();
}

#[test]
fn lost_connection_is_no_damage() {
    requires!(client_and_server::missing(), bad_disk_missing());
    let machine = crate::damage::with_two_snapshots();
    let sums = || machine.path("state/checks").exists();
    // Lost while e2fsck reads.
    machine.write("bad-blocks.lose", "");
    let lost = check_on_bad_disk(&machine, &[2], &["--read-data"]);
    lost.failed_with(14);
    assert!(!sums(), "nothing is known, and nothing kept");
    machine.nothing_is_left();
}

#[test]
fn invalid_descriptors_and_super_blocks_are_damage() {
    requires!(client_and_server::missing());
    let machine = crate::damage::with_two_snapshots();
    let whole = fs::read(machine.path(CONTAINER)).unwrap();
    for block in [0, 1] {
        let mut garbled = whole.clone();
        let at = usize::try_from(PAYLOAD_BYTES).unwrap() + block * 4096;
        garbled[at..at + 4096].copy_from_slice(&noise(4096, 9));
        machine.write(CONTAINER, garbled);
        for more in [&[][..], &["--read-data"]] {
            let ran = check(&machine, more);
            assert_eq!(ran.code, 13, "block {block}: {}", ran.whole());
            assert_eq!(ran.json()["file_system"]["clean"], false, "block {block}");
        }
    }
    machine.nothing_is_left();
}

/// A session that writes is killed: the journal is dirty, and a file is in it.
fn dirty_journal(machine: &TestMachine) {
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    fs::create_dir(machine.path("mnt/by-hand")).unwrap();
    let file = fs::File::create(machine.path("mnt/by-hand/file")).unwrap();
    std::io::Write::write_all(&mut &file, b"alpha").unwrap();
    file.sync_all().unwrap();
    machine.kill_all();
    let _ = Command::new("umount")
        .arg("-l")
        .arg(machine.path("mnt"))
        .output();
    let key = machine.path("config/keys/x.key");
    let image = machine.path("plain");
    let plain = sprat_testkit_session::plain_volume::PlainVolume::export(
        &machine.path(CONTAINER),
        &key,
        &image,
    );
    assert!(plain.journal.contains("recovering"), "{}", plain.journal);
}

#[test]
fn a_replay_needs_no_room_on_this_machine() {
    requires!(
        client_and_server::missing(),
        sprat_testkit::machine::strikes::missing()
    );
    let machine = crate::damage::with_two_snapshots();
    dirty_journal(&machine);
    // The state folder without room, and without what it knew of that session.
    leases::remove_all(&machine.path("store"));
    let disk = Tmpfs::mount(&machine.path("state"), 1);
    assert_eq!(check(&machine, &[]).code, 0);
    let fill = machine.path("state/fill");
    // A page for the record of the lock.
    fs::write(&fill, []).unwrap();
    let free = rustix::fs::statvfs(&fill).unwrap().f_bavail * 4096 - 4096;
    fs::write(&fill, noise(usize::try_from(free).unwrap(), 5)).unwrap();
    check(&machine, &[]).succeeded();
    assert_eq!(kept(&machine)["quick"]["exit"], "done");
    fs::remove_file(&fill).unwrap();
    check(&machine, &[]).succeeded();
    drop(disk);
    machine.nothing_is_left();
}

#[test]
fn check_works_on_full_and_read_only_disks_and_accounts() {
    requires!(
        client_and_server::missing(),
        sprat_testkit::machine::strikes::missing()
    );
    for dirty in [false, true] {
        let machine = TestMachine::new();
        let disk = Tmpfs::mount(&machine.path("store"), 200);
        machine.init(&[CONTAINER, "--size", "256M"]);
        machine.write_old("src/a", "alpha\n");
        machine.backup(&[]).succeeded();
        if dirty {
            dirty_journal(&machine);
        }
        let read = |more: &[&str], files: u64| {
            let ran = check(&machine, more);
            assert_eq!(ran.code, 0, "dirty {dirty}: {}", ran.whole());
            if more.contains(&"--read-data") {
                assert_eq!(ran.json()["files"]["files_read"], files, "{}", ran.whole());
            }
        };
        // The file, its snapshot's record and list of changes, and the journal's content.
        let files = 3 + u64::from(dirty);
        let _ = fs::write(machine.path("store/fill"), noise(200 << 20, 5));
        read(&[], files);
        read(&["--read-data"], files);
        fs::remove_file(machine.path("store/fill")).unwrap();
        disk.remount("ro");
        read(&[], files);
        read(&["--read-data"], files);
        disk.remount("rw");

        // Over this connection the killed session's lock is another machine's.
        let far = machine.path("far.luks");
        fs::copy(machine.path(CONTAINER), &far).unwrap();
        let before = fs::metadata(&far).unwrap().modified().unwrap();
        let sftp = needs::plain_sftp_server().unwrap();
        let server = machine.write("server", format!("exec {} -R\n", sftp.display()));
        let ssh = format!("sh {}", server.display());
        let (target, key) = (
            machine.on_line("far.luks"),
            machine.path("config/keys/x.key"),
        );
        let key = key.to_str().unwrap();
        let ran = machine.sprat(&[
            "check",
            &target,
            "--json",
            "--read-data",
            "--key-file",
            key,
            "--ssh-command",
            &ssh,
        ]);
        assert_eq!(ran.code, 0, "dirty {dirty}: {}", ran.whole());
        assert_eq!(ran.json()["files"]["files_read"], files);
        assert_eq!(before, fs::metadata(&far).unwrap().modified().unwrap());
        machine.nothing_is_left();
    }
}

#[test]
fn container_locked_by_another_machine_is_not_checked() {
    requires!(client_and_server::missing());
    let machine = TestMachine::with_container();
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    // Another machine knows nothing of what this one has under way.
    let other = machine.path("other");
    let ran = check(&machine, &["--state-dir", other.to_str().unwrap()]);
    ran.failed_with(11);
    check(&machine, &["--read-data"]).failed_with(11);
    machine.ok(&["umount", "mnt"]);
    machine.nothing_is_left();
}

#[test]
fn interrupted_reading_continues_at_the_next_check() {
    requires!(client_and_server::missing(), bad_disk_missing());
    let machine = crate::damage::with_two_snapshots();
    machine.write_old("src/large", noise(30 << 20, 3));
    machine.backup(&[]).succeeded();
    let newest = snapshots(&machine).pop().unwrap();
    let large = inside(&machine, "large");
    let blocks = debugfs(&machine, &format!("blocks \"/home/{newest}{large}\""));
    let last = blocks.split_whitespace().last().unwrap().parse().unwrap();
    let hold = machine.write("bad-blocks.hold", "");
    let mut command = command_on_bad_disk(&machine, &[last], &["--read-data"]);
    let child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while !machine.path("bad-blocks.held").exists() {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(20));
    }
    // The small ones don't wait for it.
    std::thread::sleep(Duration::from_secs(3));
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    fs::remove_file(hold).unwrap();
    let ended = child.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130));
    machine.nothing_is_left();
    let rest = check_on_bad_disk(&machine, &[], &["--read-data"]).succeeded();
    let files = &rest.json()["files"];
    // Three small ones, three records and three lists of changes; the large one was not read to its end.
    assert_eq!(files["files_before"], 9, "{files}");
    assert_eq!(files["files_read"], 1, "{files}");
}
