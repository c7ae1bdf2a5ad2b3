//! Full disks, full volumes, dirty journals and interrupts: nothing finished is damaged, and the next
//! run continues.

use std::fs;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use insta::assert_snapshot;
use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::running::until_it_handles;
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

/// The figures in a message, which depend on the machine, as `#`.
fn without_numbers(text: &str) -> String {
    let mut shown = String::new();
    for c in text.chars() {
        match (c.is_ascii_digit(), shown.ends_with('#')) {
            (true, true) => {}
            (true, false) => shown.push('#'),
            (false, _) => shown.push(c),
        }
    }
    shown
}

/// How many files are in the store, without the leases, which stay after their release.
fn without_leases(machine: &TestMachine) -> usize {
    let names = fs::read_dir(machine.path("store")).unwrap();
    names
        .filter(|entry| {
            let name = entry.as_ref().unwrap().file_name();
            !name.to_string_lossy().contains(".lock.")
        })
        .count()
}

#[test]
fn server_disk_full_during_init_leaves_nothing() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let disk = Tmpfs::mount(&machine.path("store"), 1);
    let ran = machine.sprat(&["init", CONTAINER, "--size", "5T", "--cheap-kdf-for-tests"]);
    let said = ran.failed_with(1);
    let (before, token) = said.split_once("x.luks.new-").unwrap();
    let said = format!("{before}x.luks.new-0{}", &token[16..]);
    assert_snapshot!(without_numbers(&said), @r"
    exit #
    --- stderr
    sprat: warning: only #.# MiB are free on the server
    sprat: the container can grow to #.# TiB, but the server has #.# MiB free. That is no problem: the file takes only the space of the data in it, and a backup stops safely before the disk is full
    sprat: creating the file system
    sprat: the server's disk is full
    Caused by:
      #: write [DIR]/store/x.luks.new-#: no space left (# bytes available)
    Hint: sprat removed the unfinished container from the server. Finished snapshots are unharmed. Free space on the server. If NAME.luks.reserve exists there, `sprat prune` works even on a full disk. Then run the same command again: it continues where it stopped. The new key file [DIR]/config/keys/x.key stays. The next `sprat init` uses it
    ");
    assert_eq!(without_leases(&machine), 0);
    disk.remount("size=200m");
    machine.init(&[CONTAINER, "--size", "1G"]);
    machine.nothing_is_left();
}

#[test]
fn full_server_disk_damages_no_snapshot_and_next_run_succeeds() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let disk = Tmpfs::mount(&machine.path("store"), 40);
    machine.init(&[CONTAINER, "--size", "1G"]);
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    machine.write("src/large", noise(80 << 20, 1));
    let ran = machine.backup(&[]);
    assert_snapshot!(without_numbers(&ran.failed_with(1)), @r"
    exit #
    --- stderr
    sprat: warning: x: only #.# MiB are free on the server
    sprat: job home failed
    Caused by:
      #: the server's disk is full
      #: write [DIR]/store/x.luks: no space left (# bytes available)
    Hint: finished snapshots are unharmed. Free space on the server. If NAME.luks.reserve exists there, `sprat prune` works even on a full disk. Then run the same command again: it continues where it stopped
    ");
    machine.nothing_is_left();
    // Still full: reading works.
    let large = fs::read(machine.path("src/large")).unwrap();
    fs::remove_file(machine.path("src/large")).unwrap();
    machine.restores_whole(&[]);
    disk.remount("size=400m");
    machine.write("src/large", large);
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
}

#[test]
fn full_volume_damages_no_snapshot_and_next_run_succeeds() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "80M"]);
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    machine.write("src/large", noise(90 << 20, 2));
    let ran = machine.backup(&[]);
    assert_snapshot!(without_numbers(&ran.failed_with(1)), @r"
    exit #
    --- stderr
    sprat: job home failed
    Caused by:
      #: the volume has no space for [DIR]/src/large (# MiB free)
    Hint: older snapshots are complete, and what was copied is kept for the next run. Enlarge the volume with `sprat grow`, or free space with `sprat prune`. If interrupted runs fill the volume, remove their files with `sprat prune --drop-interrupted`
    ");
    machine.write("src/large", noise(1 << 20, 3));
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
    machine.nothing_is_left();
}

/// A backup that was killed in the middle of its writes.
fn killed_backup(machine: &TestMachine) {
    machine.write("src/large", noise(60 << 20, 4));
    let mut child = machine
        .command()
        .args(["backup", CONTAINER, "--name", "home", "src", "-q"])
        .args(["--write-buffer-bytes-max", "8388608"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let allocated = || {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(machine.path(CONTAINER)).unwrap().blocks() * 512
    };
    let before = allocated();
    let until = Instant::now() + LIMIT;
    while allocated() < before + (16 << 20) && child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    machine.nothing_is_left();
    fs::remove_file(machine.path("src/large")).unwrap();
}

#[test]
fn dirty_journal_on_a_full_and_read_only_disk_still_restores() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let disk = Tmpfs::mount(&machine.path("store"), 200);
    machine.init(&[CONTAINER, "--size", "1G"]);
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    killed_backup(&machine);
    // As little room as there can be, and no right to write.
    let fill = noise(200 << 20, 5);
    let _ = fs::write(machine.path("store/fill"), fill);
    machine.restores_whole(&[]);
    fs::remove_file(machine.path("store/fill")).unwrap();
    disk.remount("ro");
    machine.restores_whole(&[]);
    let ran = machine.backup(&[]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    disk.remount("rw");
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
}

/// Runs a command, and so much later sends it SIGINT or, every other round, SIGTERM.
fn interrupted(machine: &TestMachine, arguments: &[&str], wait_ms: u64, round: usize) -> Output {
    let mut command = machine.command();
    command.args(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(wait_ms));
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    let signal = [Signal::INT, Signal::TERM][round % 2];
    kill_process(pid, signal).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn interrupt_at_any_moment_ends_in_order_with_130() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    let mut codes = Vec::new();
    for (round, wait_ms) in [0, 10, 25, 50, 80, 120, 180, 250, 350, 500, 700]
        .into_iter()
        .enumerate()
    {
        machine.write("src/large", noise(24 << 20, 100 + round as u64));
        let backup = ["backup", CONTAINER, "--name", "home", "src"];
        let ended = interrupted(&machine, &backup, wait_ms, round);
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        // Before sprat handles signals the signal itself ends it; after the last file it is done.
        let code = ended.status.code();
        assert!(
            matches!(code, Some(130 | 0) | None),
            "after {wait_ms} ms: {:?} {said}",
            ended.status
        );
        codes.push(code);
        machine.nothing_is_left();
    }
    assert!(codes.contains(&Some(130)), "{codes:?}");
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
}

#[test]
fn interrupted_init_leaves_no_container() {
    requires!(needs::root());
    let machine = TestMachine::new();
    for (round, wait_ms) in [5, 20, 40, 60, 90, 130].into_iter().enumerate() {
        let init = ["init", CONTAINER, "--size", "1T", "--cheap-kdf-for-tests"];
        let ended = interrupted(&machine, &init, wait_ms, round);
        machine.nothing_is_left();
        let left = without_leases(&machine);
        match ended.status.code() {
            Some(0) => {
                assert_eq!(left, 1, "made, and nothing beside it");
                fs::remove_file(machine.path(CONTAINER)).unwrap();
            }
            code => {
                let said = String::from_utf8_lossy(&ended.stderr).into_owned();
                assert!(
                    matches!(code, Some(130) | None),
                    "after {wait_ms} ms: {code:?} {said}"
                );
                assert_eq!(left, 0, "after {wait_ms} ms: {said}");
            }
        }
    }
}

#[test]
fn limits_of_a_shell_end_no_session() {
    requires!(needs::root().or_else(|| needs::program("prlimit")));
    let machine = TestMachine::with_container();
    machine.write("src/large", noise(4 << 20, 7));
    let limited = |limit: &str| {
        let mut command = machine.command_of("prlimit");
        command.arg(limit).arg(sprat_testkit::program::sprat());
        command.args(["backup", CONTAINER, "--name", "home", "src"]);
        machine.run(&mut command)
    };
    // What a person's shell sets may be lifted up to its hard part.
    for limit in ["--fsize=100000:", "--as=800000000:", "--nofile=40:"] {
        let ran = limited(limit);
        assert_eq!(ran.code, 0, "{limit}: {}", ran.whole());
    }
    // Limits that this process may not raise without the capability are reported.
    for (limit, said) in [
        ("--fsize=100000", "too large"),
        ("--as=300000000", "ulimit -v"),
        ("--nofile=40", "ulimit -n"),
    ] {
        let ran = limited(limit);
        let named = ran.code == 1 && ran.stderr.contains(said);
        assert!(ran.code == 0 || named, "{limit}: {}", ran.whole());
        machine.nothing_is_left();
    }
    machine.restores_whole(&[]);
}

/// A pipe that accepts no more bytes, and its other end.
fn full_pipe() -> (std::io::PipeReader, Stdio) {
    let (reader, writer) = std::io::pipe().unwrap();
    let flags = rustix::fs::fcntl_getfl(&writer).unwrap();
    rustix::fs::fcntl_setfl(&writer, flags | rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&writer, &[b'x'; 4096]).is_ok() {}
    while rustix::io::write(&writer, b"x").is_ok() {}
    rustix::fs::fcntl_setfl(&writer, flags).unwrap();
    (reader, writer.into())
}

#[test]
fn unread_output_does_not_block_signals() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    for command in ["status", "doctor", "unlock", "snapshots"] {
        let ((_out, stdout), (_err, stderr)) = (full_pipe(), full_pipe());
        let mut child = machine
            .command()
            .args([command, CONTAINER])
            .stdout(stdout)
            .stderr(stderr)
            .spawn()
            .unwrap();
        until_it_handles(Signal::INT, child.id());
        std::thread::sleep(Duration::from_millis(700));
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let begun = Instant::now();
        // Over by itself only where it has nothing to say.
        if child.try_wait().unwrap().is_none() {
            kill_process(pid, Signal::INT).unwrap();
        }
        let code = child.wait().unwrap().code();
        let took = begun.elapsed();
        assert!(took < LIMIT, "{command} took {took:?}");
        assert!([Some(0), Some(130)].contains(&code), "{command}: {code:?}");
    }
    machine.nothing_is_left();
}
