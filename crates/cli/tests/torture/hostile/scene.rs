//! A machine, a container with two snapshots, and a server that can be made hostile.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command as Program, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sprat_testkit::hostile::{Hostile, Kind};
use sprat_testkit::{leases, needs};

use super::commands::{COMMANDS, Command};
use sprat_testkit::machine::strikes::{copy_sparse, same_bytes};
use sprat_testkit::machine::{Ran, TestMachine, noise};

/// What a case may change.
const FOLDERS: [&str; 4] = ["store", "state", "cache", "local"];

/// A run that takes longer is killed, and fails the test: far beyond every limit.
const HANGS: Duration = Duration::from_secs(180);

/// What is missing on this machine.
pub fn missing() -> Option<String> {
    let programs = ["rsync", "mkfs.ext4", "losetup", "mount", "bash", "diff"];
    needs::root()
        .or_else(needs::sftp_server_missing)
        .or_else(|| programs.into_iter().find_map(needs::program))
}

type Requests = BTreeMap<Kind, usize>;

pub struct Scene {
    pub machine: TestMachine,
    pub server: Hostile,
    ssh: String,
    /// What an honest run of each command asks for; none where it can't be run here.
    honest: BTreeMap<&'static str, OnceLock<Option<Requests>>>,
    /// Of the commands that can.
    runnable: OnceLock<Vec<&'static Command>>,
}

impl Scene {
    pub fn new() -> Self {
        let machine = TestMachine::new();
        let store = machine.path("store");
        let server = Hostile::start(&store, "x.luks", &machine.path("older.luks")).unwrap();
        let ssh = server.ssh_command(machine.folder()).unwrap();
        let ssh = ssh[0].to_str().unwrap().to_owned();
        let scene = Self {
            machine,
            server,
            ssh,
            honest: COMMANDS.iter().map(|c| (c.name, OnceLock::new())).collect(),
            runnable: OnceLock::new(),
        };
        scene.fill();
        scene
    }

    fn fill(&self) {
        let machine = &self.machine;
        machine.write("pass", "correct horse battery");
        for n in 0..24 {
            machine.write(
                &format!("src/{}/{n}", n % 5),
                noise(20_000 + 9_000 * n, n as u64),
            );
        }
        self.honestly(&["init", "@", "--size", "128M"]);
        let key = fs::read(machine.path("config/keys/x.key")).unwrap();
        machine.write("key", &key);
        self.honestly(&["backup", "@", "--name", "home", "src"]);
        copy_sparse(&machine.path("store/x.luks"), &machine.path("older.luks"));
        // As a copy that a person kept, and not known under this path.
        machine.write("src/1/1", noise(50_000, 77));
        machine.write("src/changed", noise(300_000, 78));
        self.honestly(&["backup", "@", "--name", "home", "src"]);
        copy_sparse(&machine.path("src"), &machine.path("src-of-snapshot"));
        machine.write("src/2/2", noise(60_000, 79));
        machine.write("src/newest", noise(700_000, 80));
        fs::create_dir(machine.path("local")).unwrap();
        copy_sparse(&machine.path("store/x.luks"), &machine.path("local/x.luks"));
        fs::create_dir(machine.path("mnt")).unwrap();
        machine.copy_folders(&FOLDERS, "", "-before");
    }

    /// The commands that run here, each after an honest run of it.
    pub fn commands(&self) -> &[&'static Command] {
        self.runnable.get_or_init(|| {
            let only = std::env::var("SPRAT_HOSTILE_ONLY").ok();
            let wanted = |command: &&Command| match &only {
                Some(only) => command.name == only,
                // What needs CAP_SYS_RESOURCE, which a container may lack.
                None => command.name != "grow" || self.asked_by(command).is_some(),
            };
            let runnable: Vec<_> = COMMANDS.iter().filter(wanted).collect();
            if only.is_none() && runnable.len() < COMMANDS.len() {
                println!("left out: grow, which needs CAP_SYS_RESOURCE here");
            }
            runnable
        })
    }

    /// What an honest run of `command` asks for.
    pub fn seen(&self, command: &Command) -> &Requests {
        self.asked_by(command).unwrap()
    }

    /// The same; none where it can't be run here.
    fn asked_by(&self, command: &Command) -> Option<&Requests> {
        let asked = self.honest[command.name].get_or_init(|| {
            self.begin_anew();
            self.server.set([]);
            let ran = self.run(command);
            let may_fail = command.name == "grow" && ran.stderr.contains("CAP_SYS_RESOURCE");
            assert!(
                ran.code == 0 || may_fail,
                "{}: {}",
                command.name,
                ran.whole()
            );
            (ran.code == 0).then(|| self.server.seen())
        });
        asked.as_ref()
    }

    /// Everything is as it was before the first case.
    pub fn begin_anew(&self) {
        self.machine.copy_folders(&FOLDERS, "-before", "");
        for name in [
            "out",
            "copied.luks",
            "copied.luks.lock",
            "kept",
            "other.key",
        ] {
            let path = self.machine.path(name);
            let _ = fs::remove_file(&path);
            let _ = fs::remove_dir_all(&path);
        }
    }

    /// After a case that failed: nothing of it meets the next one.
    pub fn clear_up(&self) {
        self.server.set([]);
        self.machine.kill_all();
        let mounted = self.machine.path("mnt");
        let _ = Program::new("umount").arg("-l").arg(mounted).status();
        std::thread::sleep(Duration::from_millis(500));
    }

    fn words(&self, words: &[&str]) -> Vec<String> {
        let folder = format!("ssh://server{}", self.machine.path("store").display());
        let mut all: Vec<String> = ["--ssh-command", &self.ssh, "--cheap-kdf-for-tests"]
            .into_iter()
            .chain(["--quiet-time", "0", "--reconnect-max", "5"])
            .map(str::to_owned)
            .collect();
        all.extend(words.iter().map(|word| match *word {
            "@" => format!("{folder}/x.luks"),
            word => word.replace('%', &folder),
        }));
        all
    }

    fn program(&self, words: &[&str]) -> Program {
        let mut command = self.machine.command();
        command
            .args(self.words(words))
            .env("SPRAT_ANSWER_TIMEOUT", "2");
        command
    }

    #[track_caller]
    fn honestly(&self, words: &[&str]) -> Ran {
        let ran = self.machine.run(&mut self.program(words));
        assert_eq!(ran.code, 0, "{words:?}: {}", ran.whole());
        ran
    }

    /// Runs a command to its end.
    pub fn run(&self, command: &Command) -> Ran {
        self.run_interrupted(command, None).0
    }

    /// Runs a command, with one SIGINT this long after the server's fault. Also returns how long it took:
    /// since the SIGINT, else since the fault, else in all.
    pub fn run_interrupted(&self, command: &Command, after: Option<Duration>) -> (Ran, Duration) {
        let (ran, took) = self.run_words(command.words, after);
        if command.name != "mount" || ran.code != 0 {
            return (ran, took);
        }
        self.reads_right_or_not_at_all();
        let (unmounted, longer) = self.run_words(&["umount", "mnt"], after);
        (unmounted, took.max(longer))
    }

    fn run_words(&self, words: &[&str], after: Option<Duration>) -> (Ran, Duration) {
        let out = self.machine.path("stdout");
        let err = self.machine.path("stderr");
        let mut program = self.program(words);
        program
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .stdin(Stdio::null());
        let mut begun = Instant::now();
        let mut child = program.spawn().unwrap();
        let (mut struck, mut interrupt) = (false, None);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status.code().unwrap_or(-1);
            }
            if !struck && self.server.struck() > 0 {
                struck = true;
                begun = Instant::now();
                interrupt = after.map(|after| begun + after);
            }
            if interrupt.is_some_and(|at| Instant::now() >= at) {
                interrupt = None;
                begun = Instant::now();
                let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
                kill_process(pid, Signal::INT).unwrap();
            }
            if begun.elapsed() > HANGS {
                child.kill().unwrap();
                child.wait().unwrap();
                break -2;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let took = begun.elapsed();
        let read = |path: &Path| {
            let text = fs::read(path).unwrap();
            let folder = self.machine.folder().to_string_lossy().into_owned();
            String::from_utf8_lossy(&text).replace(&folder, "[DIR]")
        };
        let ran = Ran {
            code: status,
            stdout: read(&out),
            stderr: read(&err),
        };
        (ran, took)
    }

    /// Files below the mount are read within a time, and are what was backed up, or can't be read.
    #[track_caller]
    fn reads_right_or_not_at_all(&self) {
        let source = self.machine.path("src-of-snapshot");
        let shown = self.machine.path("mnt/home/latest");
        let own = self.machine.path("src");
        let shown = shown.join(own.strip_prefix("/").unwrap());
        for name in ["1/1", "changed", "4/4"] {
            // In a process of its own: reading may take its time.
            let read = Program::new("timeout")
                .args(["60", "cat"])
                .arg(shown.join(name))
                .output()
                .unwrap();
            assert_ne!(read.status.code(), Some(124), "reading {name} hangs");
            if read.status.success() {
                assert!(
                    read.stdout == fs::read(source.join(name)).unwrap(),
                    "{name} is wrong"
                );
            }
        }
    }

    fn names(&self) -> Vec<String> {
        leases::names_but_free(&self.machine.path("store"))
    }

    /// A run that reports that nothing was changed has changed nothing, and left no lease.
    #[track_caller]
    pub fn claims_hold(&self, ran: &Ran, at: &str) {
        if ran.code == 0 || !ran.stderr.contains("nothing was changed") {
            return;
        }
        let before = self.machine.path("store-before/x.luks");
        let same = same_bytes(&before, &self.machine.path("store/x.luks"));
        assert!(same, "{at}: it was changed\n{}", ran.whole());
        let names = leases::names_but_free(&self.machine.path("store-before"));
        assert_eq!(self.names(), names, "{at}\n{}", ran.whole());
    }

    /// What an honest server shows afterwards: everything, where `sound`; else no wrong data as good.
    #[track_caller]
    pub fn is_sound(&self, command: &Command, ran: &Ran, sound: bool, at: &str) {
        let whole = |next: &Ran| format!("{at}\n{}\nthen\n{}", ran.whole(), next.whole());
        // What a command made, it has made.
        if ran.code == 0 && sound {
            self.made(command, at);
        }
        let to = self.machine.path("back");
        let _ = fs::remove_dir_all(&to);
        let (next, _) = self.run_words(&["restore", "@", "home", "--to", "back"], None);
        let back = to.join(self.machine.path("src").strip_prefix("/").unwrap());
        let newest = differs(&self.machine.path("src"), &back);
        let before = differs(&self.machine.path("src-of-snapshot"), &back);
        assert!(!sound || next.code == 0, "{}", whole(&next));
        if next.code == 0 {
            let right = match (command.backs_up, ran.code) {
                (true, 0) => newest.is_none(),
                (true, _) => newest.is_none() || before.is_none(),
                _ => before.is_none(),
            };
            let differences = format!("{newest:?}\n{before:?}");
            assert!(right, "{}\n{differences}", whole(&next));
        }
        let (checked, _) = self.run_words(&["check", "@", "--read-data"], None);
        assert!(!sound || checked.code == 0, "{}", whole(&checked));
        assert!(
            [0, 1, 11, 13].contains(&checked.code),
            "{}",
            whole(&checked)
        );
        self.machine.nothing_is_left();
        if sound {
            self.leases_are_given_back(ran, at);
        }
    }

    /// No lease is left by a run that ended well; the next writer takes over what another run left.
    #[track_caller]
    fn leases_are_given_back(&self, ran: &Ran, at: &str) {
        let of_container = || {
            let mut left = self.names();
            left.retain(|name| name.starts_with("x.luks.lock."));
            left
        };
        let left = of_container();
        let reported = ["could not be given back", "could not be released"]
            .iter()
            .any(|text| ran.stderr.contains(text));
        assert!(
            left.is_empty() || ran.code != 0 || reported,
            "{at}: {left:?}\n{}",
            ran.whole()
        );
        if left.is_empty() {
            return;
        }
        let (next, _) = self.run_words(&["backup", "@", "--name", "home", "src"], None);
        let whole = || format!("{at}\n{}\nthen\n{}", ran.whole(), next.whole());
        assert_eq!(next.code, 0, "{}", whole());
        assert!(
            of_container().is_empty(),
            "{:?}: {}",
            of_container(),
            whole()
        );
    }

    /// A command that ended well has done what it is for.
    #[track_caller]
    fn made(&self, command: &Command, at: &str) {
        let path = |name: &str| self.machine.path(name);
        let (from, to): (PathBuf, PathBuf) = match command.name {
            "restore" | "restore with a cache" => {
                let back = path("out").join(path("src").strip_prefix("/").unwrap());
                let wrong = differs(&path("src-of-snapshot"), &back);
                assert!(wrong.is_none(), "{at}: {wrong:?}");
                return;
            }
            "copy from" => (path("store-before/x.luks"), path("copied.luks")),
            "copy to" => (path("local/x.luks"), path("store/copied.luks")),
            "init" => {
                let words = ["--key-file", "other.key", "snapshots", "%/new.luks"];
                let (shown, _) = self.run_words(&words, None);
                assert_eq!(shown.code, 0, "{at}: {}", shown.whole());
                return;
            }
            _ => return,
        };
        assert!(same_bytes(&from, &to), "{at}: {} differs", to.display());
    }
}

/// The differences of two folders by `diff`; none if they are the same.
fn differs(one: &Path, other: &Path) -> Option<String> {
    let compared = Program::new("diff").arg("-rq").arg(one).arg(other).output();
    let compared = compared.unwrap();
    let said = [compared.stdout, compared.stderr].concat();
    (!compared.status.success()).then(|| String::from_utf8_lossy(&said).into_owned())
}
