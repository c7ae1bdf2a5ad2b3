//! sprat itself behind a real sshd with the agent as ForceCommand: its commands for past states, and what an
//! intruder with its key and login can do.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::fake_clock::{self, FakeClock};
use sprat_testkit::machine::{CHEAP, Ran, TestMachine, noise};
use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, openssh};
use sprat_testkit::{needs, requires};

use crate::client::{EAGER, READ_WRITE, Served, agent, blocks};
use crate::commands::code;

/// The `sprat` that was built beside the agent; in a run of one package it may be missing.
fn sprat_program() -> PathBuf {
    agent().with_file_name("sprat")
}

pub fn sprat_missing() -> Option<String> {
    needs::built(&sprat_program())
}

/// An sshd that runs `command` in place of its SFTP server.
pub fn sshd_with(command: &str) -> SshServer {
    SshServer::start_with(&OpenSshOptions::forced(command))
}

/// A machine that backs up through the agent, and its server.
pub struct Client {
    pub served: Served,
    pub machine: TestMachine,
    _sshd: SshServer,
    pub target: String,
    ssh: String,
}

impl Client {
    pub fn new(policy: &str) -> Self {
        let served = Served::new(policy);
        let root = served.path("");
        let command = format!("{} serve --root {}", agent().display(), root.display());
        Self::with(served, sshd_with(&command))
    }

    pub fn with(served: Served, sshd: SshServer) -> Self {
        let ssh = sshd.ssh_command().into_iter();
        let ssh: Vec<String> = ssh.map(|word| word.into_string().unwrap()).collect();
        Self {
            machine: TestMachine::new(),
            target: format!("any.host:{}", served.path("x.luks").display()),
            ssh: ssh.join(" "),
            served,
            _sshd: sshd,
        }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = self.machine.command_of(sprat_program());
        command.args(words).args(["--ssh-command", &self.ssh]);
        command
    }

    pub fn sprat(&self, words: &[&str]) -> Ran {
        self.machine.run(&mut self.command(words))
    }

    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> Ran {
        self.sprat(words).succeeded()
    }

    pub fn init(&self) {
        self.ok(&["init", "--json", CHEAP, &self.target, "--size", "64M"]);
    }

    /// Backs up files that are different in each round.
    pub fn back_up(&self, round: u32) {
        for number in 0..8 {
            let name = format!("src/{number}");
            self.machine.write(&name, Self::content(round, number));
        }
        self.ok(&["backup", &self.target, "--name", "home", "src"]);
    }

    fn content(round: u32, number: u32) -> String {
        format!("{round} {number}\n").repeat(2000)
    }

    /// Whether the folder has all files of that round, restored.
    #[track_caller]
    pub fn is_restored(&self, to: &Path, round: u32) {
        let back = to.join(self.machine.path("src").strip_prefix("/").unwrap());
        for number in 0..8 {
            let text = fs::read_to_string(back.join(number.to_string())).unwrap();
            assert!(text == Self::content(round, number), "file {number}");
        }
    }

    /// Somebody with the key and the login overwrites this part of the container, in 16ths.
    fn destroy(&self, client: &mut crate::client::Client, part: std::ops::Range<u64>) {
        let handle = client.open("x.luks", READ_WRITE).unwrap();
        let step = fs::metadata(self.served.path("x.luks")).unwrap().len() / 16;
        let garbage = blocks(60, 99);
        let mut at = part.start * step;
        while at < part.end * step {
            let left = usize::try_from(part.end * step - at).unwrap();
            let data = &garbage[..garbage.len().min(left)];
            assert_eq!(client.write(&handle, at, data), 0);
            at += data.len() as u64;
        }
    }
}

/// A program that sshd runs with this clock.
fn with_clock(clock: &FakeClock, machine: &TestMachine, script: &Path) {
    let command = clock.command_of(machine, agent());
    let quoted = |text: &std::ffi::OsStr| format!("'{}'", text.to_str().unwrap());
    let mut text = "#!/bin/sh\n".to_owned();
    for (name, value) in command.get_envs() {
        let name = name.to_str().unwrap();
        if name == "LD_PRELOAD" || name.starts_with("TEST_CLOCK") {
            text.push_str(&format!("export {name}={}\n", quoted(value.unwrap())));
        }
    }
    let words: Vec<String> = command.get_args().map(quoted).collect();
    text.push_str(&format!("exec unshare {} \"$@\"\n", words.join(" ")));
    let new = script.with_extension("new");
    fs::write(&new, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&new, mode).unwrap();
    fs::rename(new, script).unwrap();
}

/// The content of all files below a folder.
fn contents(folder: &Path, leave_out: &[&str]) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        if leave_out.contains(&entry.file_name().to_str().unwrap()) {
            continue;
        }
        match entry.file_type().unwrap().is_dir() {
            true => all.extend(contents(&entry.path(), leave_out)),
            false => drop(all.insert(entry.path(), fs::read(entry.path()).unwrap())),
        }
    }
    all
}

fn wait(mut child: Child) -> bool {
    child.wait().unwrap().success()
}

#[test]
fn yesterday_is_restored_after_an_intruder_destroyed_the_container() {
    requires!(
        openssh::missing(),
        needs::root(),
        needs::devices(),
        fake_clock::missing(),
        sprat_missing()
    );
    // The server's clock goes on by days; the client's own is not trusted with anything.
    let served = Served::new(&EAGER.replace("header = free", "header = alarm"));
    let scripts = tempfile::tempdir().unwrap();
    let script = scripts.path().join("agent");
    let command = format!(
        "{} serve --root {}",
        script.display(),
        served.path("").display()
    );
    let client = Client::with(served, sshd_with(&command));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let now_s = i64::try_from(now.as_secs()).unwrap();
    let mut clock = FakeClock::new(client.machine.folder(), now_s);
    with_clock(&clock, &client.machine, &script);
    client.init();
    client.back_up(1);
    clock.awake_until(clock.now_s() + 86_400);
    with_clock(&clock, &client.machine, &script);
    client.back_up(2);
    // The times of files are the real ones. The intruder comes in a later second.
    std::thread::sleep(Duration::from_millis(1100));
    let evening = Command::new("date").arg("+%F %T").output().unwrap();
    let evening = format!(
        "latest-before:{}",
        String::from_utf8(evening.stdout).unwrap().trim()
    );
    clock.awake_until(clock.now_s() + 40_000);
    with_clock(&clock, &client.machine, &script);

    let alarm = || {
        let mut status = Command::new(&script);
        status.args(["status", "--root"]);
        status.arg(client.served.path("")).status().unwrap().code()
    };
    assert_eq!(alarm(), Some(0));

    let other = Client::new(EAGER);
    other.init();
    let mut intruder = client.served.connect();
    client.destroy(&mut intruder, 0..8);
    // Another client's backup goes on meanwhile.
    other.back_up(1);
    client.destroy(&mut intruder, 8..16);
    intruder.end();
    let restored = other.machine.path("back");
    other.ok(&[
        "restore",
        &other.target,
        "home",
        "--to",
        restored.to_str().unwrap(),
    ]);
    other.is_restored(&restored, 1);
    assert_eq!(alarm(), Some(3));

    assert_eq!(client.sprat(&["snapshots", &client.target]).code, 13);
    let state = client.machine.path("state");
    let known = contents(&state, &["generations"]);
    let on_server = contents(&client.served.path(""), &[".sprat-agent"]);
    let listed = client.ok(&["generations", &client.target, "--json"]).json();
    let listed = listed["generations"].as_array().unwrap().clone();
    assert!(listed.len() >= 2, "{listed:?}");
    let name = listed.last().unwrap()["name"].as_str().unwrap();
    let text = client.ok(&["generations", &client.target]).stdout;
    assert!(text.contains(name), "{text}");
    let back = client.machine.path("back");
    let words = [
        "restore",
        &client.target,
        "home",
        "--generation",
        &evening,
        "--to",
    ];
    let ran = client.ok(&[&words[..], &[back.to_str().unwrap()]].concat());
    assert!(ran.stderr.contains(name), "{}", ran.stderr);
    client.is_restored(&back, 2);
    every_reading_command_reads_the_past(&client, name);

    // Nothing that the machine knows of its container was changed, and nothing on the server.
    assert!(contents(&state, &["generations"]) == known);
    assert!(contents(&client.served.path(""), &[".sprat-agent"]) == on_server);
    let refused = ["snapshots", &client.target, "--generation", "1999"];
    assert_eq!(client.sprat(&refused).code, 10);
    let refused = client.sprat(&["backup", &client.target, "--generation", name]);
    assert_eq!(refused.code, 2);
    let doctor = client.sprat(&["doctor", &client.target]);
    assert!(doctor.stdout.contains("past states"), "{}", doctor.stdout);
    client.machine.nothing_is_left();
}

fn every_reading_command_reads_the_past(client: &Client, name: &str) {
    let path = client.machine.path("src/3");
    let file = format!("home:{}", path.display());
    let of_file = file.as_str();
    for words in [
        &["snapshots"][..],
        &["ls", "home"],
        &["cat", of_file],
        &["find", "3"],
        &["versions", of_file],
        &["diff", "home"],
        &["analyze"],
        &["check", "--read-data"],
    ] {
        let mut all = vec![words[0], &client.target];
        all.extend(&words[1..]);
        all.extend(["--generation", name]);
        let ran = client.ok(&all);
        if words[0] == "cat" {
            assert!(ran.stdout == Client::content(2, 3));
        }
    }
    let at = client.machine.path("private/mounted");
    fs::create_dir_all(&at).unwrap();
    let private = at.parent().unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(private, mode).unwrap();
    let at = at.to_str().unwrap();
    client.ok(&["mount", &client.target, at, "--generation", name]);
    let latest = Path::new(at).join("home/latest");
    let inside = latest.join(path.strip_prefix("/").unwrap());
    let text = fs::read_to_string(inside);
    assert!(wait(client.command(&["umount", at]).spawn().unwrap()));
    assert!(text.unwrap() == Client::content(2, 3));
    let both = ["mount", &client.target, at, "--rw", "--generation", name];
    assert_eq!(client.sprat(&both).code, 2);
}

/// A client whose server process is started without sshd, by a script: so the test knows it, and it outlives
/// the client like one on another machine.
fn client_with_known_server(policy: &str) -> (Client, tempfile::TempDir) {
    let served = Served::new(policy);
    let scripts = tempfile::tempdir().unwrap();
    let script = scripts.path().join("ssh");
    let text = format!(
        "#!/bin/bash\nfor fd in /proc/self/fd/*; do n=${{fd##*/}}; [ \"$n\" -gt 2 ] && eval \"exec $n>&-\"; done 2>/dev/null\n\
         echo $$ >> {}/pids\nexec setsid env -i {} serve --root {}\n",
        scripts.path().display(),
        agent().display(),
        served.path("").display()
    );
    fs::write(&script, text).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&script, mode).unwrap();
    let sshd = sshd_with("true");
    let mut client = Client::with(served, sshd);
    client.ssh = script.to_str().unwrap().to_owned();
    (client, scripts)
}

fn server_pids(scripts: &Path) -> Vec<Pid> {
    let text = fs::read_to_string(scripts.join("pids")).unwrap_or_default();
    let pids = text.lines().map(|line| line.parse().unwrap());
    pids.filter_map(Pid::from_raw).collect()
}

/// Each request of whole backups goes to the agent and to OpenSSH's server: the same answers, and the same bytes.
#[test]
fn backups_leave_the_same_bytes_as_with_openssh() {
    requires!(
        needs::root(),
        needs::devices(),
        needs::program("python3"),
        needs::sftp_server_missing(),
        openssh::missing(),
        sprat_missing()
    );
    let (mut client, scripts) = client_with_known_server(EAGER);
    let other = scripts.path().join("other");
    fs::create_dir(&other).unwrap();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/agent/both.py");
    let root = client.served.path("");
    client.ssh = format!(
        "python3 -S {} {} {} {} {}",
        program.display(),
        agent().display(),
        root.display().to_string().trim_end_matches('/'),
        needs::plain_sftp_server().unwrap().display(),
        other.display()
    );
    client.init();
    for round in 1..4 {
        client.back_up(round);
    }
    client.ok(&["prune", &client.target, "--job", "home", "--keep-last", "1"]);
    client.back_up(4);
    let differences = fs::read_to_string(scripts.path().join("differences"));
    assert!(differences.is_err(), "{differences:?}");
    let ours = contents(&root, &[".sprat-agent"]);
    let ours: BTreeMap<_, _> = ours
        .iter()
        .map(|(path, content)| (path.file_name().unwrap(), content))
        .collect();
    let theirs = contents(&other, &[]);
    assert!(ours.len() >= 2 && ours.len() == theirs.len());
    for (path, content) in &theirs {
        assert!(
            ours[path.file_name().unwrap()] == content,
            "{}",
            path.display()
        );
    }
    assert!(client.served.numbers().len() >= 3);
}

/// Nobody waits for the quiet time, which is longer than any test; and nothing arrives late.
#[test]
fn dead_clients_server_process_is_refused_without_a_wait() {
    requires!(
        needs::root(),
        needs::devices(),
        openssh::missing(),
        sprat_missing()
    );
    let (client, scripts) = client_with_known_server(EAGER);
    client.init();
    client.back_up(1);
    let before = server_pids(scripts.path()).len();
    let big = noise(24 << 20, 1);
    client.machine.write("src/big", big);
    let blocks_of = |name: &str| fs::metadata(client.served.path(name)).unwrap().blocks();
    let begun = blocks_of("x.luks");
    let words = ["backup", &client.target, "--name", "home", "src"];
    let mut backup = client.command(&words).spawn().unwrap();
    wait_for(|| blocks_of("x.luks") > begun + 8192);
    let servers = server_pids(scripts.path()).split_off(before);
    for pid in &servers {
        kill_process(*pid, Signal::STOP).unwrap();
    }
    // What the client still sends waits in the pipes of its server processes.
    std::thread::sleep(Duration::from_millis(500));
    client.machine.kill_all();
    let _ = backup.kill();
    backup.wait().unwrap();

    client.ok(&[&words[..], &["--quiet-time", "100000"]].concat());
    let content = client.served.live();
    for pid in &servers {
        // The agent may have ended it.
        let _ = kill_process(*pid, Signal::CONT);
    }
    for pid in servers {
        wait_for(|| !Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists());
    }
    assert!(
        client.served.live() == content,
        "bytes of the dead client arrived"
    );
    let back = client.machine.path("back");
    let to = back.to_str().unwrap();
    client.ok(&["restore", &client.target, "home", "--to", to, "--verify"]);
    client.ok(&["check", &client.target, "--read-data"]);
}

/// Another machine needs the container, and the one that has its lock is gone.
#[test]
fn the_server_releases_the_lock_of_a_machine_that_is_gone() {
    requires!(
        needs::root(),
        needs::devices(),
        openssh::missing(),
        sprat_missing()
    );
    let (mut client, scripts) = client_with_known_server(EAGER);
    client.init();
    client.back_up(1);
    let unlock = |client: &Client, words: &[&str]| {
        code(&client.served, &[&["unlock", "x.luks"], words].concat())
    };
    let (code, text) = unlock(&client, &[]);
    assert!(code == Some(0) && text.contains("not locked"), "{text}");
    let before = server_pids(scripts.path()).len();
    client.machine.write("src/big", noise(24 << 20, 1));
    let blocks_of = |client: &Client| fs::metadata(client.served.path("x.luks")).unwrap().blocks();
    let begun = blocks_of(&client);
    let words = ["backup", "--name", "home", "src"];
    let words = [&words[..1], &[client.target.as_str()], &words[1..]].concat();
    let mut backup = client.command(&words).spawn().unwrap();
    wait_for(|| blocks_of(&client) > begun + 8192);
    let servers = server_pids(scripts.path()).split_off(before);
    for pid in &servers {
        kill_process(*pid, Signal::STOP).unwrap();
    }
    client.machine.kill_all();
    let _ = backup.kill();
    backup.wait().unwrap();

    let first = std::mem::replace(&mut client.machine, TestMachine::new());
    client.machine.write("src/other", "other");
    let key = fs::read(first.path("config/keys/x.key")).unwrap();
    client.machine.write("config/keys/x.key", key);
    let ran = client.sprat(&words);
    assert_eq!(ran.code, 11, "{}", ran.stderr);
    let (code, text) = unlock(&client, &[]);
    assert!(code == Some(1) && text.contains("--yes"), "{text}");
    let (code, text) = unlock(&client, &["--yes"]);
    // It used the agent: nothing can arrive.
    assert!(code == Some(0) && !text.contains("may arrive"), "{text}");
    let (code, text) = unlock(&client, &[]);
    assert!(code == Some(0) && text.contains("not locked"), "{text}");
    let ran = client.ok(&words);
    assert!(!ran.stderr.contains("compared"), "{}", ran.stderr);
    let content = client.served.live();
    for pid in servers {
        // The agent may have ended it.
        let _ = kill_process(pid, Signal::CONT);
        wait_for(|| !Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists());
    }
    assert!(
        client.served.live() == content,
        "bytes of the first machine arrived"
    );
    client.ok(&["check", &client.target, "--read-data"]);
    client.machine = first;
    client.ok(&[&words[..], &["--quiet-time", "1"]].concat());
}

/// The note comes by the connection of the change.
#[test]
fn after_the_removal_of_a_key_sprat_says_until_when_it_opens_past_states() {
    requires!(openssh::missing(), sprat_missing());
    let (client, scripts) = client_with_known_server(EAGER);
    client.init();
    client.machine.write("pass", "correct horse battery");
    let added = ["key", "add", &client.target, CHEAP];
    let added = [&added[..], &["--new-passphrase-file", "pass", "--json"]].concat();
    let slot = client.ok(&added).json()["slot"].to_string();
    let before = server_pids(scripts.path()).len();
    let ran = client.ok(&["key", "remove", &client.target, &slot]);
    let year_s = Duration::from_secs(12 * 31 * 86_400);
    let day = |at: SystemTime| {
        let s = at.duration_since(UNIX_EPOCH).unwrap().as_secs();
        let mut date = Command::new("date");
        let date = date.args(["-u", "+%F", "-d", &format!("@{s}")]).output();
        String::from_utf8(date.unwrap().stdout)
            .unwrap()
            .trim()
            .to_owned()
    };
    // The test may run over midnight.
    let now = SystemTime::now();
    let days = [now, now - Duration::from_secs(600)].map(|now| day(now + year_s));
    let text = ran.stderr.replace('\n', " ");
    assert!(
        days.iter()
            .any(|day| text.contains(&format!("about {day}"))),
        "{text}"
    );
    // One to show the key that will be removed, and one to remove it.
    assert_eq!(server_pids(scripts.path()).len() - before, 2, "{text}");
}

#[track_caller]
fn wait_for(mut is_so: impl FnMut() -> bool) {
    for _ in 0..6000 {
        if is_so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("it does not happen");
}
