//! Sessions whose machine, server or connection was away, or that were not alone: machines that slept,
//! readers, idle connections, servers that come back without their disk.

mod away;
mod sleepers;

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::{leases, needs, requires};

/// Another machine with the same key and another path to the container.
struct Other {
    machine: TestMachine,
    container: PathBuf,
}

impl Other {
    fn than(machine: &TestMachine) -> Self {
        let other = TestMachine::new();
        let key = fs::read(machine.path("config/keys/x.key")).unwrap();
        other.write("config/keys/x.key", key);
        other.write("src/of-the-other", noise(300_000, 5));
        Self {
            machine: other,
            container: machine.path(CONTAINER),
        }
    }

    fn sprat(&self, before: &[&str], after: &[&str]) -> sprat_testkit::machine::Ran {
        let container = self.container.to_str().unwrap();
        self.machine.sprat(&[before, &[container], after].concat())
    }

    #[track_caller]
    fn backs_up(&self) {
        self.sprat(&["backup"], &["--name", "other", "src"])
            .succeeded();
    }
}

fn volume_process(machine: &TestMachine) -> Pid {
    let until = Instant::now() + LIMIT;
    loop {
        let found = machine
            .processes()
            .into_iter()
            .find(|process| process.line().contains("volume-process"));
        if let Some(process) = found {
            return Pid::from_raw(process.pid).unwrap();
        }
        assert!(Instant::now() < until, "no volume process");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn start(machine: &TestMachine, arguments: &[&str]) -> Child {
    let mut command = machine.command();
    command
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// A backup of much data by `machine`, and its volume process, which is stopped while it sends.
fn stop_while_it_sends(machine: &TestMachine) -> (Child, Pid) {
    machine.write("src/large", noise(96 << 20, 3));
    let buffer = ["--write-buffer-bytes-max", "33554432", "--quiet-time", "4"];
    let backup = ["backup", CONTAINER, "--name", "home", "src"];
    let sleeper = start(machine, &[&buffer[..], &backup].concat());
    let volume = volume_process(machine);
    let container = machine.path(CONTAINER);
    let taken = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&container).unwrap());
    let before = taken();
    wait_until("nothing is sent", || taken() > before + (8 << 20) / 512);
    kill_process(volume, Signal::STOP).unwrap();
    (sleeper, volume)
}

/// Lets the sleeper continue: it must end because another machine took the container over.
fn wake(sleeper: Child, volume: Pid) -> String {
    kill_process(volume, Signal::CONT).unwrap();
    let ended = sleeper.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(11), "{said}");
    said
}

/// Ends a stopped volume process when a test fails: nobody else would.
struct Stopped(Pid);

impl Stopped {
    fn new(volume: Pid) -> Self {
        kill_process(volume, Signal::STOP).unwrap();
        Self(volume)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = kill_process(self.0, Signal::KILL);
        }
    }
}

#[test]
fn reader_reports_that_another_machine_wrote() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    let other = Other::than(&machine);
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt"]);
    // It comes and goes between two lease checks.
    other.backs_up();
    let ran = machine.sprat(&["umount", "mnt"]);
    let said = ran.failed_with(11);
    assert!(said.contains("another session wrote"), "{said}");
    assert!(said.contains("mixture"), "{said}");
    machine.nothing_is_left();
    // An undisturbed reader ends well.
    machine.ok(&["mount", CONTAINER, "mnt"]);
    machine.ok(&["umount", "mnt"]);
    machine.nothing_is_left();
}

#[test]
fn lock_acquired_during_a_read_is_reported_as_that() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt"]);
    let lock = machine.write("store/x.luks.lock.2000000", "");
    let said = machine.sprat(&["umount", "mnt"]).failed_with(11);
    assert!(said.contains("while this one was reading it"), "{said}");
    assert!(said.contains("mixture"), "{said}");
    assert!(!said.contains("Hint: nothing was changed"), "{said}");
    fs::remove_file(lock).unwrap();
    machine.nothing_is_left();
}

#[test]
fn reader_is_stopped_after_another_machine_wrote() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write("src/large", noise(8 << 20, 3));
    machine.backup(&[]).succeeded();
    let other = Other::than(&machine);
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt"]);
    other.backs_up();
    // At the latest at the next lease check, every ten seconds. What the kernel has read before is still
    // visible.
    std::thread::sleep(Duration::from_secs(20));
    let large = machine
        .path("mnt/home/latest")
        .join(machine.path("src/large").strip_prefix("/").unwrap());
    let read = fs::read(large).map(|bytes| bytes.len());
    assert!(read.is_err(), "{read:?}");
    let _ = machine.sprat(&["umount", "mnt"]);
    machine.nothing_is_left();
}

/// Stopped like a machine that sleeps: its clocks run on, and it renews nothing. A thread that was
/// stopped between its check of the clock and its write can't be fenced. That is rare, and never
/// happens three times in a row.
#[test]
fn sleeping_machine_sends_nothing_after_a_takeover() {
    requires!(needs::root());
    let wrote = (0..3).map_while(|_| sleeper_writes());
    assert!(wrote.count() < 3, "it writes each time");
}

/// The output of a machine that wrote when it woke.
fn sleeper_writes() -> Option<String> {
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    let other = Other::than(&machine);
    let (sleeper, volume) = stop_while_it_sends(&machine);
    let container = machine.path(CONTAINER);
    std::thread::sleep(Duration::from_secs(3));
    // While the owner may only sleep, no other session opens; and an interrupted wait opens for none.
    let target = other.container.to_str().unwrap();
    let lease = || leases::held(&machine.path("store")).pop();
    let of_sleeper = lease();
    let mut waiting = start(&other.machine, &["unlock", target, "--watch", "1"]);
    wait_until("it takes over", || lease() != of_sleeper);
    std::thread::sleep(Duration::from_secs(3));
    assert!(waiting.try_wait().unwrap().is_none(), "it does not wait");
    let pid = Pid::from_child(&waiting);
    kill_process(pid, Signal::INT).unwrap();
    let ended = waiting.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(130), "{said}");
    assert!(said.contains("Run `sprat unlock` again"), "{said}");
    let refused = other.sprat(&["backup"], &["--name", "other", "src"]);
    let said = refused.failed_with(11);
    assert!(said.contains("may still write"), "{said}");
    let third = Other {
        machine: TestMachine::new(),
        container: other.container.clone(),
    };
    let key = fs::read(machine.path("config/keys/x.key")).unwrap();
    third.machine.write("config/keys/x.key", key);
    third.sprat(&["snapshots"], &[]).failed_with(11);
    let off = ["--watch", "1", "--that-machine-is-off", "--json"];
    let ran = other.sprat(&["unlock"], &off).succeeded();
    let ways = ran.json()["ways"].clone();
    let way = |at: usize| ways[at]["way"].as_str().unwrap_or_default().to_owned();
    assert_eq!(
        (way(0), way(1)),
        ("off".to_owned(), String::new()),
        "{ways}"
    );
    other.backs_up();
    let after = fs::read(&container).unwrap();
    let said = wake(sleeper, volume);
    machine.nothing_is_left();
    if fs::read(&container).unwrap() != after {
        return Some(said);
    }
    other.sprat(&["check"], &[]).succeeded();
    None
}

#[test]
fn idle_connection_loss_reconnects_and_renews_the_lock() {
    requires!(openssh::missing(), needs::root());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.init();
    let mnt = remote.machine.path("mnt");
    fs::create_dir(&mnt).unwrap();
    remote.ok(&["mount", "TARGET", mnt.to_str().unwrap(), "--rw"]);
    let store = remote.machine.path("store");
    let lease = || leases::held(&store).pop().unwrap();
    let first = lease();
    // A new lease file is empty for a moment.
    let renewals = || -> u64 {
        let text = fs::read_to_string(lease()).unwrap();
        let found = text.split("\"renewed\":").nth(1).unwrap_or_default();
        let digits: String = found.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    };
    // ext4 has nothing to say any more.
    std::thread::sleep(Duration::from_secs(7));
    for pid in remote.sshd.session_pids() {
        let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
    }
    let before = renewals();
    wait_until("nobody renews", || {
        lease() != first && renewals() >= before + 2
    });
    remote.ok(&["umount", mnt.to_str().unwrap()]);
    remote.machine.nothing_is_left();
}

#[test]
fn a_server_that_comes_back_without_its_disk_is_waited_for() {
    requires!(openssh::missing(), needs::root());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.init();
    let (store, away) = (remote.machine.path("store"), remote.machine.path("away"));
    remote.machine.write("src/large", noise(24 << 20, 3));
    let slow = [
        "--write-buffer-bytes-max",
        "2097152",
        "--quiet-time",
        "2",
        "backup",
        "TARGET",
    ];
    let mut command = remote.command(&[&slow[..], &["--name", "home", "src"]].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let sprat = command.spawn().unwrap();
    let taken = || {
        let about = fs::metadata(store.join("x.luks")).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&about) * 512
    };
    let before = taken();
    wait_until("nothing is sent", || taken() > before + (1 << 20));
    fs::rename(&store, &away).unwrap();
    fs::create_dir(&store).unwrap();
    for pid in remote.sshd.session_pids() {
        let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
    }
    // Some attempts find an empty mount point.
    std::thread::sleep(Duration::from_secs(6));
    fs::remove_dir(&store).unwrap();
    fs::rename(&away, &store).unwrap();
    let ended = sprat.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(0), "{said}");
    assert!(said.contains("connection lost"), "{said}");
    remote.machine.nothing_is_left();
}

/// A wait for a silent server locks nothing.
#[test]
fn read_only_commands_end_at_the_first_interrupt() {
    let machine = TestMachine::new();
    machine.write("hanging-ssh", "exec sleep 1000\n");
    let command = format!("sh {}", machine.path("hanging-ssh").display());
    let looks: [&[&str]; 4] = [&["status"], &["doctor"], &["unlock"], &["key", "list"]];
    for look in looks {
        let mut options = vec!["--ssh-command", &command];
        // It tries no key, and refuses one.
        if look[0] != "status" {
            options.extend(["--key-file", "key"]);
        }
        let sprat = start(
            &machine,
            &[&options[..], look, &["ssh://nobody/x.luks"]].concat(),
        );
        let hangs = || {
            let processes = machine.processes();
            processes
                .iter()
                .any(|process| process.line().contains("sleep 1000"))
        };
        wait_until("no ssh", hangs);
        let pid = Pid::from_raw(i32::try_from(sprat.id()).unwrap()).unwrap();
        kill_process(pid, Signal::INT).unwrap();
        let begun = Instant::now();
        let ended = sprat.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(130), "{look:?}: {said}");
        assert!(begun.elapsed() < LIMIT, "{look:?}");
        assert!(said.contains("interrupted\nHint: "), "{said}");
        // A real ssh ends by itself. The next command's must not be mistaken for this one.
        machine.kill_all();
        wait_until("it is not gone", || !hangs());
    }
}

#[test]
fn kill_9_while_ssh_connects_leaves_no_ssh() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write("hanging-ssh", "exec sleep 1000\n");
    let command = format!("sh {}", machine.path("hanging-ssh").display());
    let backup = ["backup", "ssh://nobody/x.luks", "--name", "home", "src"];
    let key = machine.path("config/keys/x.key");
    let options = [
        "--ssh-command",
        &command,
        "--key-file",
        key.to_str().unwrap(),
    ];
    let mut sprat = start(&machine, &[&options[..], &backup].concat());
    wait_until("no ssh", || {
        let processes = machine.processes();
        processes
            .iter()
            .any(|process| process.line().contains("sleep 1000"))
    });
    sprat.kill().unwrap();
    sprat.wait().unwrap();
    machine.nothing_is_left();
}

/// A backup of the other machine after it took the container over from one that only slept. Then the
/// late writes of that one arrive: bytes over the middle of the finished snapshot's one file.
#[test]
fn late_writes_over_a_snapshot_are_found_and_repaired() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    let other = Other::than(&machine);
    let (sleeper, volume) = stop_while_it_sends(&machine);
    let container = machine.path(CONTAINER);
    // For a minute something may arrive.
    let off = ["--watch", "1", "--that-machine-is-off", "--silence", "60"];
    other.sprat(&["unlock"], &off).succeeded();
    let over = Instant::now() + Duration::from_secs(62);
    let before = fs::read(&container).unwrap();
    other.backs_up();
    other.backs_up();
    let lists = || {
        let entries = fs::read_dir(machine.path("store")).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name.contains(".late-")).count()
    };
    assert_eq!(lists(), 1, "that of the last session has it all");
    let ran = other.sprat(&["check"], &[]);
    assert_eq!(ran.code, 0, "nothing came yet: {}", ran.whole());
    // Before the sleeper wakes: what it has on the wire also goes to blocks that nothing else uses.
    let after = fs::read(&container).unwrap();
    wake(sleeper, volume);
    assert_eq!(lists(), 2, "and that of the session that lost its lease");
    let ran = other.sprat(&["check"], &[]);
    assert_eq!(
        ran.code,
        0,
        "what the sleeper sent is durable: {}",
        ran.whole()
    );

    // The kernel of the sleeper delivers what its server had not got.
    let changed: Vec<usize> = (4096..after.len() / 4096)
        .filter(|at| after[at * 4096..][..4096] != before[at * 4096..][..4096])
        .collect();
    // In the middle of each longer piece: the file, and perhaps the journal.
    let pieces: Vec<usize> = changed
        .chunk_by(|one, next| one + 1 == *next)
        .filter(|piece| piece.len() >= 40)
        .map(|piece| piece[piece.len() / 2])
        .collect();
    let file = machine.container_file();
    for at in &pieces {
        let offset = *at as u64 * 4096;
        std::os::unix::fs::FileExt::write_all_at(&file, &noise(4096, 9), offset).unwrap();
    }

    // The file system's first block as the sleeper had it makes the container look older.
    let first = 16 << 20;
    let write = std::os::unix::fs::FileExt::write_all_at;
    write(&file, &before[first..first + 4096], first as u64).unwrap();
    let said = other.sprat(&["check"], &[]).failed_with(13);
    for part in [
        "is older than the state that this machine saw last",
        "written late",
        "--accept-older-state",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    write(&file, &after[first..first + 4096], first as u64).unwrap();

    let third = Other::than(&machine);
    for machine in [&other, &third] {
        let refused = machine.sprat(&["backup"], &["--name", "other", "src"]);
        let said = refused.failed_with(13);
        assert!(said.contains("overwritten after they had been"), "{said}");
        assert!(said.contains("sprat check"), "{said}");
    }
    let ran = third.sprat(&["snapshots"], &[]);
    assert!(ran.stderr.contains("of-the-other"), "{}", ran.whole());
    let ran = other.sprat(&["check"], &["--json"]);
    assert_eq!(ran.code, 13, "{}", ran.whole());
    let json = ran.json();
    assert_eq!(json["overwritten_blocks"], pieces.len(), "{json}");
    let names = json["overwritten_files"]["names"].to_string();
    assert!(names.contains("of-the-other"), "{names}");
    // It continues, and reads that file from its source.
    other.backs_up();
    let to = other.machine.path("to");
    other
        .sprat(&["restore"], &["other", "--to", to.to_str().unwrap()])
        .succeeded();
    let source = other.machine.path("src/of-the-other");
    let restored = to.join(source.strip_prefix("/").unwrap());
    assert!(fs::read(restored).unwrap() == fs::read(source).unwrap());
    // Once nothing can arrive any more the next session ends all of it.
    std::thread::sleep(over.saturating_duration_since(Instant::now()));
    other.backs_up();
    assert_eq!(lists(), 0);
    third.sprat(&["check"], &[]).succeeded();
}

/// The old session's connections are gone from the server, and its machine sleeps: the kernel of the
/// server knows that nothing can arrive.
#[test]
fn server_kernel_check_frees_a_container_without_a_wait() {
    requires!(openssh::missing(), needs::root());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.init();
    let other = Other::than(&remote.machine).machine;
    remote.machine.write("src/large", noise(48 << 20, 3));
    let words = ["--write-buffer-bytes-max", "16777216", "--quiet-time", "2"];
    let backup = ["backup", "TARGET", "--name", "home", "src"];
    let mut command = remote.command(&[&words[..], &backup].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let sleeper = command.spawn().unwrap();
    let volume = volume_process(&remote.machine);
    let container = remote.machine.path(CONTAINER);
    let taken = || std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&container).unwrap());
    let before = taken();
    wait_until("nothing is sent", || taken() > before + (4 << 20) / 512);
    let _stopped = Stopped::new(volume);
    let sessions = remote.sshd.session_pids();
    let by_other = |words: &[&str]| other.run(&mut remote.command_of(&other, words));
    // While a process of the server has the file open, no other session opens it.
    let mut waiting = remote.command_of(&other, &["unlock", "TARGET", "--watch", "1"]);
    waiting.stdout(Stdio::null()).stderr(Stdio::piped());
    let waiting = waiting.spawn().unwrap();
    std::thread::sleep(Duration::from_secs(8));
    kill_process(Pid::from_child(&waiting), Signal::INT).unwrap();
    let ended = waiting.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(130), "{said}");
    assert!(
        said.contains("has the container open for writing"),
        "{said}"
    );
    for pid in sessions {
        let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
    }
    let ran = by_other(&["unlock", "TARGET", "--watch", "1", "--json"]).succeeded();
    assert_eq!(ran.json()["ways"][0]["way"], "kernel", "{}", ran.whole());
    by_other(&["backup", "TARGET", "--name", "other", "src"]).succeeded();
    let after = fs::read(&container).unwrap();
    wake(sleeper, volume);
    assert!(
        fs::read(&container).unwrap() == after,
        "it wrote when it woke"
    );
    let store = remote.machine.path("store");
    let names = fs::read_dir(store).unwrap().flatten();
    let written = names.filter(|name| {
        let text = fs::read(name.path()).unwrap_or_default();
        String::from_utf8_lossy(&text[..text.len().min(200)]).contains("\"written\"")
    });
    assert_eq!(
        written.count(),
        0,
        "nothing is to be compared after a proof"
    );
}
