//! Round trips of a daily run: a slow connection makes sprat wait for each of them. `make bench
//! TRIPS=1` has the table of all commands.

use std::path::{Path, PathBuf};
use std::process::Command;

use sprat_testkit::machine::TestMachine;
use sprat_testkit::{needs, requires};

/// Requests of an unchanged backup each of which is sent after the answer of the one before, the
/// greeting included, the login not. Lower it with each one that goes.
const UNCHANGED_TRIPS_MAX: usize = 16;

/// Far longer than what sprat computes between two requests, on a busy machine too.
const ROUND_TRIP_MS: &str = "100";

fn trips_program() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/trips.py")
}

/// Runs sprat behind a stand-in for ssh that counts.
fn run(machine: &TestMachine, round_trip_ms: &str, arguments: &[&str]) -> PathBuf {
    let log = machine.path("trips.log");
    let _ = std::fs::remove_file(&log);
    let ssh = format!("python3 -S {}", trips_program().display());
    let mut command = machine.command();
    command.env("SPRAT_TRIPS", &log);
    command.env("SPRAT_TRIPS_RTT_MS", round_trip_ms);
    let words = ["--ssh-command", &ssh, "--cheap-kdf-for-tests"];
    machine.run(command.args(words).args(arguments)).succeeded();
    log
}

/// The totals of a log, by their names.
fn totals(log: &Path) -> serde_json::Value {
    let mut command = Command::new("python3");
    let said = command.arg(trips_program()).arg("--total").arg(log);
    serde_json::from_slice(&said.output().unwrap().stdout).unwrap()
}

#[test]
fn unchanged_backup_needs_one_login_and_few_round_trips() {
    requires!(
        needs::sftp_server_missing(),
        needs::root(),
        needs::program("python3")
    );
    let machine = TestMachine::new();
    for number in 0..41 {
        machine.write_old(&format!("src/d{}/f{number}", number % 5), [7; 20_000]);
    }
    let target = format!("ssh://slow{}/x.luks", machine.path("store").display());
    let backup = ["backup", &target, "--name", "home", "src"];
    run(&machine, "0", &["init", &target, "--size", "1G"]);
    for _ in 0..2 {
        run(&machine, "0", &backup);
    }
    // On a busy machine, requests that don't depend on each other may be sent one after another.
    let mut seen = Vec::new();
    for _ in 0..3 {
        let totals = totals(&run(&machine, ROUND_TRIP_MS, &backup));
        assert_eq!(totals["logins"], 1, "{totals}");
        let trips = usize::try_from(totals["chain"].as_u64().unwrap()).unwrap();
        seen.push(trips);
        if trips <= UNCHANGED_TRIPS_MAX {
            return;
        }
    }
    panic!("{seen:?} round trips; bench/trips.py shows each request");
}
