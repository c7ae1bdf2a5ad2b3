//! `sprat run` where this machine's clock and that of its server differ.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use sprat_testkit::fake_clock::{self, FakeClock};
use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::{Ran, TestMachine};
use sprat_testkit::requires;
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};

/// A machine whose clock nobody sets, and its server, which has the true time.
struct Scene {
    remote: RemoteMachine,
    clock: FakeClock,
}

impl Scene {
    fn new() -> Self {
        let remote = RemoteMachine::start(&OpenSshOptions::default());
        let machine = &remote.machine;
        machine.write(
            "config/sprat.toml",
            format!(
                "[container.x]\ntarget = \"{}\"\ncheck_every = \"never\"\n\
                 [job.home]\ncontainer = \"x\"\nsources = \"{}/src\"\n\
                 keep_last = 1\nprune_every = \"0 s\"\n",
                remote.target(),
                machine.folder().display(),
            ),
        );
        remote.ok(&["init", "x", "--size", "64M", "--cheap-kdf-for-tests"]);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let now_s = i64::try_from(now.as_secs()).unwrap();
        let mut clock = FakeClock::new(machine.folder(), now_s);
        clock.synchronised = false;
        Self { remote, clock }
    }

    fn machine(&self) -> &TestMachine {
        &self.remote.machine
    }

    /// A run of the copy a minute later, and how many snapshots it left.
    fn run(&mut self) -> (Ran, usize) {
        self.clock.awake_until(self.clock.now_s() + 60);
        let ssh = format!("ssh -F {}", self.remote.sshd.path("ssh_config").display());
        let words = ["--ssh-command", &ssh, "run", "--now"];
        let mut command = self.clock.command(self.machine(), &words);
        let ran = self.machine().run(&mut command).succeeded();
        let listed = self.remote.ok(&["snapshots", "x", "--json"]).json();
        (ran, listed["snapshots"].as_array().unwrap().len())
    }

    fn doubt(&self) -> Value {
        let text = std::fs::read(self.machine().path("state/clock.json")).unwrap();
        let known: Value = serde_json::from_slice(&text).unwrap();
        known["doubt"]["cause"].clone()
    }

    /// The next run believes the clock, and prunes.
    fn ends_without_a_doubt(&mut self) {
        let (ran, snapshots) = self.run();
        let found = (snapshots, self.doubt());
        assert_eq!(found, (1, Value::Null), "{}", ran.whole());
        self.machine().nothing_is_left();
    }

    /// The machine was off, and its clock is wrong by so much since. It can't notice that by itself.
    fn boot_with_error(&mut self, error_s: i64) {
        self.clock.error_s = error_s;
        self.clock.off_until(self.clock.now_s());
    }
}

#[test]
fn nothing_is_pruned_while_the_servers_clock_differs_and_no_time_service_decides() {
    requires!(openssh::missing(), fake_clock::missing());
    let mut scene = Scene::new();
    scene.run();
    assert_eq!((scene.run().1, scene.doubt()), (1, Value::Null));
    // Less than an hour is no matter.
    scene.boot_with_error(3000);
    assert_eq!((scene.run().1, scene.doubt()), (1, Value::Null));
    // Two hours ahead. Only the server shows it.
    scene.boot_with_error(7200);
    let (ran, snapshots) = scene.run();
    assert_eq!(snapshots, 2, "{}", ran.whole());
    let text = " min ahead of the server's. Copies are made, but nothing is pruned";
    assert!(ran.stderr.contains(text), "{}", ran.whole());
    let apart = scene.doubt()["server_differs"]["seconds"].as_i64().unwrap();
    assert!((-7800..=-7200).contains(&apart), "{apart}");
    // Reported once.
    let (ran, snapshots) = scene.run();
    assert!(!ran.stderr.contains("clock"), "{}", ran.whole());
    assert_eq!(snapshots, 3);
    // A time service that keeps the clock knows better than a server.
    scene.clock.synchronised = true;
    scene.ends_without_a_doubt();
}

#[test]
fn server_that_agrees_ends_a_doubt_and_the_same_run_prunes() {
    requires!(openssh::missing(), fake_clock::missing());
    let mut scene = Scene::new();
    scene.boot_with_error(-7200);
    scene.run();
    let (ran, snapshots) = scene.run();
    assert_eq!(snapshots, 2, "{}", ran.whole());
    // The clock is set, which alone makes a doubt.
    scene.clock.error_s = 0;
    scene.ends_without_a_doubt();
}
