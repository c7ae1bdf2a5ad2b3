//! `sprat run`: what is due, hooks, prune, and what a killed or interrupted run owes.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use sprat_testkit::leftovers::LIMIT;
use sprat_testkit::machine::Ran;
use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

/// A machine with two containers: one on a server, one on a disk.
struct Scene {
    remote: RemoteMachine,
    disk: Option<Tmpfs>,
}

impl Scene {
    fn new() -> Self {
        let remote = RemoteMachine::start(&OpenSshOptions::default());
        std::fs::create_dir(remote.machine.path("usb")).unwrap();
        let disk = Some(Tmpfs::mount(&remote.machine.path("usb"), 128));
        let scene = Self { remote, disk };
        scene.config("true", "");
        for container in ["x", "usb"] {
            let size = ["--size", "64M", "--cheap-kdf-for-tests"];
            let all = [["init", container].as_slice(), &size].concat();
            scene.remote.ok(&all);
        }
        scene
    }

    /// Every hook writes a line to `log`; `before` of the job also does what is given.
    fn config(&self, before: &str, more: &str) {
        let folder = self.remote.machine.folder().display();
        let hook = format!(
            "sh -c 'echo $SPRAT_HOOK $SPRAT_JOB@$SPRAT_CONTAINER $SPRAT_EXIT >> {folder}/log; {{}}'"
        );
        let log = hook.replace("{}", "true");
        let before = hook.replace("{}", before);
        self.remote.machine.write(
            "config/sprat.toml",
            format!(
                "[container.x]\ntarget = \"{}\"\nbefore = \"{log}\"\nfinally = \"{log}\"\n\
                 [container.usb]\ntarget = \"{folder}/usb/y.luks\"\nmin_free = \"1 MiB\"\n\
                 [job.home]\ncontainer = [\"x\", \"usb\"]\nsources = \"{folder}/src\"\n\
                 keep_last = 2\nprune_every = \"0 s\"\n\
                 before = \"{before}\"\nafter = \"{log}\"\nfailed = \"{log}\"\nfinally = \"{log}\"\n\
                 {more}",
                self.remote.target()
            ),
        );
    }

    fn run(&self, arguments: &[&str]) -> Ran {
        self.remote.sprat(&[["run"].as_slice(), arguments].concat())
    }

    /// The copies that a run reports, by their names.
    fn copies(&self, arguments: &[&str], code: i32) -> impl Fn(&str) -> Value + use<> {
        let ran = self.run(&[arguments, &["--json"]].concat());
        assert_eq!(ran.code, code, "{}", ran.whole());
        let said = ran.json();
        move |name| {
            let mut copies = said["copies"].as_array().unwrap().iter();
            let is_it = |copy: &&Value| {
                let part = |key: &str| copy[key].as_str().unwrap().to_owned();
                format!("{}@{}", part("job"), part("container")) == name
            };
            let found = copies.find(is_it);
            found
                .unwrap_or_else(|| panic!("no {name} in {said}"))
                .clone()
        }
    }

    /// What the hooks wrote since the last call.
    fn log(&self) -> Vec<String> {
        let path = self.remote.machine.path("log");
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let _ = std::fs::remove_file(path);
        text.lines().map(|line| line.trim().to_owned()).collect()
    }

    fn snapshots(&self, container: &str) -> usize {
        let listed = self.remote.ok(&["snapshots", container, "--json"]).json();
        listed["snapshots"].as_array().unwrap().len()
    }

    /// Starts a run, and waits until a hook or a command has made the file `begun`.
    fn start(&self, arguments: &[&str]) -> Child {
        let begun = self.remote.machine.path("begun");
        let _ = std::fs::remove_file(&begun);
        let mut command = self
            .remote
            .command(&[&["run", "--now"], arguments].concat());
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let end = Instant::now() + LIMIT;
        while !begun.exists() {
            assert!(Instant::now() < end, "the hook did not begin");
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    }
}

#[test]
fn run_makes_what_is_due_with_its_hooks_and_prunes() {
    requires!(openssh::missing(), needs::root());
    let mut scene = Scene::new();
    let copies = scene.copies(&["--dry-run"], 0);
    for name in ["home@x", "home@usb"] {
        assert_eq!(copies(name)["due"], true);
        assert_eq!(copies(name)["reason"], "no backup yet");
        assert_eq!(copies(name)["attempted"], false);
    }
    assert!(!scene.remote.machine.path("state/schedule").exists());

    let copies = scene.copies(&[], 0);
    for name in ["home@x", "home@usb"] {
        assert_eq!(copies(name)["result"]["code"], 0);
        assert!(copies(name)["snapshot"].is_string());
        assert!(copies(name)["sent_bytes"].as_u64().unwrap() > 0);
    }
    let of_job = |name: &str| {
        let lines = ["before NAME", "after NAME 0", "finally NAME 0"];
        lines.map(|line| line.replace("NAME", name)).to_vec()
    };
    let all = [
        vec!["before @x".to_owned()],
        of_job("home@x"),
        vec!["finally @x 0".to_owned()],
        of_job("home@usb"),
    ];
    assert_eq!(scene.log(), all.concat());

    // Nothing is due now.
    for silent in ["-q", "--scheduled"] {
        let ran = scene.run(&[silent]);
        assert_eq!(ran.whole(), "exit 0\n");
    }
    let ran = scene.run(&[]);
    assert!(ran.stdout.contains("nothing to do now"), "{}", ran.whole());
    assert_eq!(scene.log(), [""; 0]);

    // The disk is away; the other copy is made, and pruned by the rules.
    scene.disk = None;
    for _ in 0..2 {
        let copies = scene.copies(&["--now"], 0);
        assert_eq!(copies("home@x")["result"]["code"], 0);
        let usb = copies("home@usb");
        assert_eq!(usb["attempted"], false);
        let reason = usb["reason"].as_str().unwrap();
        assert!(
            reason.contains("tmpfs") && reason.ends_with("is not there"),
            "{reason}"
        );
    }
    assert_eq!(scene.snapshots("x"), 2);

    // A mistake in one job stops only that.
    let bad = "[job.bad]\ncontainer = \"x\"\nsource = \"/etc\"\n";
    scene.config("true", bad);
    let copies = scene.copies(&["x", "--now"], 2);
    assert_eq!(copies("home@x")["result"]["code"], 0);
    assert_eq!(copies("bad@x")["result"]["code"], 2);
    let scheduled = || scene.run(&["x", "--scheduled"]);
    let said = scheduled().failed_with(2);
    assert!(said.contains("did you mean \"sources\"?"), "{said}");
    // A timer reports a mistake once.
    assert_eq!(scheduled().whole(), "exit 2\n");
    scene.config("true", "");

    // No server: nothing is printed each time by a timer.
    let away = ["--ssh-command", "false", "run", "x", "--now"];
    let ran = scene.remote.machine.sprat(&away);
    assert_eq!(ran.code, 14, "{}", ran.whole());
    assert!(ran.stderr.contains("job home@x failed"), "{}", ran.whole());
    scene.log();
    let ran = scene
        .remote
        .machine
        .sprat(&[&away[..], &["--scheduled", "-q"]].concat());
    assert_eq!(ran.whole(), "exit 14\n");
    // The job's own hooks wait until a container opens.
    assert_eq!(scene.log(), ["before @x", "finally @x 14"]);
}

/// Sends SIGTERM, and returns what was printed when it ended with 130.
fn interrupted(run: Child) -> String {
    let pid = rustix::process::Pid::from_child(&run);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let output = run.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{said}");
    said
}

#[test]
fn interrupted_killed_and_too_large_dumps_leave_no_application_stopped() {
    requires!(openssh::missing(), needs::root());
    let scene = Scene::new();
    let folder = scene.remote.machine.folder().display().to_string();
    let dump = |command: &str, after_s: u32| {
        let hook = format!("sh -c 'sleep {after_s}; echo $SPRAT_HOOK $SPRAT_EXIT >> {folder}/log'");
        let job = format!(
            "[job.db]\ncontainer = [\"x\", \"usb\"]\ncommand = \"sh -c '{command}'\"\n\
             after = \"{hook}\"\n"
        );
        scene.config("true", &job);
    };
    let of_job = || -> Vec<String> {
        let log = scene.log().into_iter();
        log.filter(|line| !line.contains('@')).collect()
    };
    // It does not end by SIGTERM.
    let stubborn = format!(
        "trap : TERM; echo x; touch {folder}/begun; for i in 1 2 3 4 5 6 7 8 9; do sleep 5; done"
    );
    // `after` takes longer than the 10 s in which the rest ends.
    dump(&stubborn, 11);
    let said = interrupted(scene.start(&["db"]));
    assert!(said.contains("job db@x was interrupted"), "{said}");
    assert!(
        said.contains("job db@usb was interrupted before it began"),
        "{said}"
    );
    assert_eq!(of_job(), ["after 130"]);
    assert_eq!(scene.snapshots("x"), 0);

    dump(&stubborn, 0);
    let mut killed = scene.start(&["db@x"]);
    killed.kill().unwrap();
    killed.wait().unwrap();
    dump("echo small", 0);
    let copies = scene.copies(&["db@x", "--now"], 0);
    assert!(copies("db@x")["snapshot"].is_string());
    assert_eq!(of_job(), ["after 137", "after 0"]);

    // More than the volume has room for: the last snapshot stays, and the next one is made.
    dump("head -c 100000000 /dev/urandom", 0);
    let ran = scene.run(&["db@x", "--now"]);
    let said = ran.failed_with(1);
    assert!(said.contains("the volume is out of space"), "{said}");
    assert_eq!(of_job(), ["after 1"]);
    assert_eq!(scene.snapshots("x"), 1);
    dump("echo small", 0);
    let copies = scene.copies(&["db@x", "--now"], 0);
    assert!(copies("db@x")["snapshot"].is_string());
    assert_eq!(scene.snapshots("x"), 2);
    scene.remote.machine.kill_all();
}

#[test]
fn run_hooks_decide_and_are_owed_after_a_kill() {
    requires!(openssh::missing(), needs::root());
    let scene = Scene::new();

    // A hook that fails, and one that says: not now.
    scene.config("echo no room; exit 1", "");
    let ran = scene.run(&["x", "--now"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(ran.stderr.contains("it wrote: no room"), "{}", ran.whole());
    let around = |lines: &[&str]| -> Vec<String> {
        let before = ["before @x", "before home@x"];
        before
            .iter()
            .chain(lines)
            .map(ToString::to_string)
            .collect()
    };
    let hooks = [
        "after home@x 1",
        "failed home@x 1",
        "finally home@x 1",
        "finally @x 1",
    ];
    assert_eq!(scene.log(), around(&hooks));
    // One that hangs is ended, and is a failure.
    scene.config("sleep 1000", "hook_timeout = \"1 s\"\n");
    let ran = scene.run(&["x", "--now"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(ran.stderr.contains("did not end within"), "{}", ran.whole());
    assert_eq!(scene.log(), around(&hooks));
    scene.config("exit 75", "");
    let copies = scene.copies(&["x", "--now"], 0);
    assert_eq!(copies("home@x")["attempted"], false);
    let hooks = ["after home@x 75", "finally home@x 75", "finally @x 0"];
    assert_eq!(scene.log(), around(&hooks));

    // `backup` runs the hooks, too, and counts as success.
    scene.config("true", "");
    scene.remote.ok(&["backup", "home@x"]);
    let hooks = ["after home@x 0", "finally home@x 0", "finally @x 0"];
    assert_eq!(scene.log(), around(&hooks));
    assert_eq!(scene.copies(&["--dry-run"], 0)("home@x")["due"], false);
    // A person sees that hooks fail, of the job and of the container. No event opens.
    let config = scene.remote.machine.path("config/sprat.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        text.replace("finally = \"sh", "finally = \"false sh"),
    )
    .unwrap();
    scene.remote.sprat(&["backup", "home@x"]).failed_with(1);
    scene.remote.ok(&["status", "x", "--offline"]);
    scene.config("true", "");
    scene.log();
    for command in [["run", "x"], ["backup", "home@x"]] {
        let mut command = scene.remote.command(&command);
        let ran = scene.remote.machine.run(command.env("SPRAT_RUN", "r"));
        assert!(ran.failed_with(2).contains("called from its own run"));
    }

    // A second run while one works; then SIGTERM: the hooks after it still run.
    let folder = scene.remote.machine.folder().display().to_string();
    scene.config(
        &format!("echo $$ > {folder}/hook; touch {folder}/begun; exec sleep 100"),
        "",
    );
    let first = scene.start(&["x"]);
    assert!(scene.run(&[]).failed_with(11).contains("already running"));
    assert_eq!(scene.run(&["--scheduled"]).whole(), "exit 0\n");
    let busy = scene.remote.sprat(&["backup", "home@usb"]);
    assert!(busy.failed_with(11).contains("runs the hooks of job home"));
    scene.remote.machine.sprat(&["--version"]);
    interrupted(first);
    let hooks = [
        "after home@x 130",
        "failed home@x 130",
        "finally home@x 130",
        "finally @x 130",
    ];
    assert_eq!(scene.log(), around(&hooks));

    // After kill -9 the next run first ends the hook that goes on, and runs what is owed.
    let mut first = scene.start(&["x"]);
    first.kill().unwrap();
    first.wait().unwrap();
    scene.log();
    scene.config("true", "");
    let hook = std::fs::read_to_string(format!("{folder}/hook")).unwrap();
    let hook = format!("/proc/{}/cwd", hook.trim());
    assert!(std::path::Path::new(&hook).is_symlink());
    assert_eq!(scene.run(&["--scheduled", "home@x"]).whole(), "exit 0\n");
    assert!(std::fs::read_link(&hook).is_err(), "the hook still runs");
    let owed = ["after home@x 137", "finally home@x 137", "finally @x 137"];
    assert_eq!(scene.log(), owed);
    assert_eq!(scene.run(&["--scheduled"]).code, 0);

    // The session ends with the process that has the connection: what was made in it does not count.
    let kills = "[job.other]\ncontainer = \"x\"\nsources = \"/etc/hostname\"\n\
                 after = \"sh -c 'pkill -9 -f volume-process -P $PPID'\"\n";
    scene.config("true", kills);
    let said = scene.copies(&["other@x", "--now"], 1);
    assert!(said("other@x")["snapshot"].is_null());
    let state = scene.remote.machine.path("state/schedule/other@x.json");
    let state: Value = serde_json::from_slice(&std::fs::read(state).unwrap()).unwrap();
    assert!(state["last_success"].is_null(), "{state}");
    assert_eq!(state["failures_since"], 1);
    scene.remote.machine.kill_all();
}
