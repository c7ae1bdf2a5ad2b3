//! Copies and moves a container between two servers, killed or cut off at their remote writes in
//! turn; each time a whole container must be there, and the next run must finish.
//!
//! In `make test` at some of them, with `SPRAT_TORTURE_ROUNDS` (`make torture`) at every one up to
//! 200.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and tells its figures"
)]

mod machine;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use machine::{CONTAINER, Machine, Ran};
use sprat_testkit::{needs, requires};

/// Points of the short form, for each kind of blow.
const POINTS_SHORT: u64 = 7;
const POINTS_LONG: u64 = 200;

/// Two folders, each behind an SFTP server of its own whose changing requests are counted.
struct Servers {
    machine: Machine,
    pristine: PathBuf,
}

impl Servers {
    fn new() -> Self {
        let machine = Machine::new();
        machine.write("src/a", "alpha\n");
        let noise: Vec<u8> = (0..700_000u32)
            .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
            .collect();
        machine.write("src/b", noise);
        machine.init(&[CONTAINER, "--size", "64M"]);
        for _ in 0..2 {
            assert_eq!(machine.backup(&[]).code, 0);
            std::thread::sleep(std::time::Duration::from_millis(1100));
        }
        let pristine = machine.path("pristine");
        copy_sparse(&machine.path(CONTAINER), &pristine);
        for folder in ["from", "to", "relay"] {
            fs::create_dir(machine.path(folder)).unwrap();
        }
        Self { machine, pristine }
    }

    /// The source as it was, nothing else, and no memory of what came before.
    fn begin_anew(&self) {
        for folder in [
            "from",
            "to",
            "state/copies",
            "state/locks",
            "state/containers",
        ] {
            let path = self.machine.path(folder);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path).unwrap();
        }
        copy_sparse(&self.pristine, &self.machine.path("from/x.luks"));
    }

    /// Strikes at the `nth` request that changes anything; 0 never.
    fn copy(&self, moves: bool, nth: u64, how: &str) -> Ran {
        self.copy_patiently(moves, nth, how, "0")
    }

    /// The same, with so many seconds to seek a lost line.
    fn copy_patiently(&self, moves: bool, nth: u64, how: &str, reconnect_max: &str) -> Ran {
        let relay = self.machine.path("relay");
        fs::write(relay.join("strike"), format!("{nth} {how}")).unwrap();
        fs::write(relay.join("count"), "0\n").unwrap();
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/relay.pl");
        let server = needs::sftp_server().unwrap();
        let ssh = format!(
            "perl {} {} {}",
            script.display(),
            relay.display(),
            server.display()
        );
        let target = |folder| format!("ssh://host{}", self.machine.path(folder).display());
        let (from, to) = (target("from/x.luks"), target("to/x.luks"));
        let mut all = vec![
            "copy",
            &from,
            &to,
            "--ssh-command",
            &ssh,
            "--quiet-time",
            "0",
        ];
        all.extend(["--reconnect-max", reconnect_max, "--data-channels", "2"]);
        if moves {
            all.push("--move");
        }
        self.machine.sprat(&all)
    }

    /// Requests of the last copy that changed anything.
    fn count(&self) -> u64 {
        let count = fs::read_to_string(self.machine.path("relay/count")).unwrap();
        count.trim().parse().unwrap()
    }

    fn is_whole(&self, file: &str) -> bool {
        let file = self.machine.path(file);
        let compared = Command::new("cmp")
            .arg("-s")
            .arg(&self.pristine)
            .arg(&file)
            .status();
        file.exists() && compared.unwrap().success()
    }

    fn strike(&self, moves: bool, nth: u64, how: &str) {
        self.begin_anew();
        let struck = self.copy(moves, nth, how);
        let about = format!("{how} at {nth}, move {moves}: {}", struck.whole());
        if how == "cut" {
            assert!(matches!(struck.code, 0 | 1 | 14), "{about}");
        }
        let (source, copy) = (self.is_whole("from/x.luks"), self.is_whole("to/x.luks"));
        assert!(source || copy, "no whole container is left: {about}");
        // What has its name is whole, and a source stays whole as long as it is there.
        assert_eq!(source, self.machine.path("from/x.luks").exists(), "{about}");
        assert_eq!(copy, self.machine.path("to/x.luks").exists(), "{about}");
        // With code 0 only a lock was left to be given back; the next session here takes it over.
        let over = struck.code == 0;
        if !over {
            let again = self.copy(moves, 0, "-");
            assert_eq!(again.code, 0, "{}\nafter {about}", again.whole());
        }
        assert!(self.is_whole("to/x.luks"), "{about}");
        assert_eq!(self.machine.path("from/x.luks").exists(), !moves, "{about}");
        let left: Vec<_> = ["from", "to"]
            .iter()
            .flat_map(|folder| fs::read_dir(self.machine.path(folder)).unwrap())
            .map(|entry| entry.unwrap().file_name())
            .map(|name| name.to_string_lossy().into_owned())
            .filter(|name| name != "x.luks" && !(over && name.contains(".lock.")))
            .collect();
        assert!(left.is_empty(), "{left:?} is left: {about}");
    }
}

fn copy_sparse(from: &Path, to: &Path) {
    let _ = fs::remove_file(to);
    let mut command = Command::new("cp");
    command.args(["--sparse=always", "--preserve=mode,timestamps"]);
    assert!(command.arg(from).arg(to).status().unwrap().success());
}

/// All points, or `most` of them spread out with the first and the last few, where the phases end.
fn points(count: u64, most: u64) -> Vec<u64> {
    if count <= most {
        return (1..=count).collect();
    }
    let mut points: Vec<u64> = (0..most)
        .map(|n| 1 + n * (count - 1) / (most - 1))
        .collect();
    points.extend(count.saturating_sub(if most > 20 { 30 } else { 3 })..=count);
    points.sort_unstable();
    points.dedup();
    points
}

#[test]
fn a_copy_or_a_move_struck_at_any_remote_write_leaves_a_whole_container_and_ends_when_run_again() {
    requires!(
        needs::root(),
        needs::program("perl"),
        needs::sftp_server_missing()
    );
    let most = match std::env::var_os("SPRAT_TORTURE_ROUNDS") {
        Some(rounds) if !rounds.is_empty() => POINTS_LONG,
        _ => POINTS_SHORT,
    };
    let servers = Servers::new();
    for moves in [false, true] {
        servers.begin_anew();
        let whole = servers.copy(moves, 0, "-");
        assert_eq!(whole.code, 0, "{}", whole.whole());
        let count = servers.count();
        let points = points(count, most);
        println!(
            "move {moves}: {} of {count} requests that change anything",
            points.len()
        );
        for how in ["kill", "cut"] {
            for nth in &points {
                servers.strike(moves, *nth, how);
            }
        }
        // With patience the same run goes on by itself.
        servers.begin_anew();
        let patient = servers.copy_patiently(moves, count / 2, "cut", "60");
        assert_eq!(patient.code, 0, "{}", patient.whole());
        assert!(patient.stderr.contains("line lost"), "{}", patient.whole());
        assert!(servers.is_whole("to/x.luks"));
        // The last copy opens, with every snapshot, where nobody pinned it.
        let copy = servers.machine.path("to/x.luks");
        let listed = servers
            .machine
            .sprat(&["snapshots", copy.to_str().unwrap(), "--json"]);
        assert_eq!(listed.json()["snapshots"].as_array().unwrap().len(), 2);
    }
    servers.machine.nothing_is_left();
}
