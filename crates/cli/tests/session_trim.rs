//! Trim, by each of its ways: what the server gets back, what is refused, and that nothing is lost
//! wherever it is cut off or killed.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by a panic, and tells its figures"
)]

mod machine;
mod session_bench;
mod stage;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use machine::{CONTAINER, Machine, Ran, Tmpfs};
use serde_json::Value;
use session_bench::{Bench, fill, missing, ssh_missing};
use sprat_testkit::sshd::SshdOptions;
use sprat_testkit::{needs, requires};
use stage::plain::PlainVolume;

/// The container has a snapshot less than it had: the files of `source/gone` are in none any more.
/// Returns how many bytes that frees.
fn delete_half(bench: &mut Bench, mib: u64) -> u64 {
    bench.size_bytes += (mib * 5 / 2) << 20;
    bench.create();
    let files = usize::try_from(mib).unwrap();
    fill(&bench.path("source/gone"), files, 1 << 20, 11);
    fill(&bench.path("source/kept"), files / 2, 1 << 20, 12);
    bench.backup().unwrap();
    fs::remove_dir_all(bench.path("source/gone")).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    bench.backup().unwrap();
    let mount = bench.path("mnt").display().to_string();
    ok(&mut bench.command(&["mount", &bench.target().to_string(), &mount, "--rw"]));
    // An entry holds its folder open, and the mount with it.
    let job = fs::read_dir(&mount)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .find(|path| !path.ends_with("lost+found"))
        .unwrap();
    let mut snapshots: Vec<PathBuf> = fs::read_dir(job)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with("20")
        })
        .collect();
    snapshots.sort();
    fs::remove_dir_all(&snapshots[0]).unwrap();
    ok(&mut bench.command(&["umount", &mount]));
    mib << 20
}

fn ok(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn trim(bench: &Bench, more: &[&str]) -> Value {
    let target = bench.target().to_string();
    let mut arguments = vec!["--json", "trim", &target];
    arguments.extend(more);
    let output = ok(&mut bench.command(&arguments));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    said["trim"].clone()
}

fn gives_back(bench: &mut Bench, mib: u64, more: &[&str], route: &str) {
    let freed = delete_half(bench, mib);
    let before = bench.allocated();
    let said = trim(bench, more);
    let given_back = before - bench.allocated();
    println!("{route}: {freed} bytes freed, {given_back} given back; {said}");
    assert_eq!(said["route"], route);
    assert!(
        given_back * 100 >= freed * 95,
        "{given_back} of {freed} bytes: {said}"
    );
    // The server's free space is everybody's; the other measures are the file's own.
    if !route.starts_with("rewrite") {
        let told = said["measure"]["given_back_bytes"].as_u64().unwrap();
        assert!(told.abs_diff(given_back) < 1 << 20, "{told}, {given_back}");
    }
    bench.assert_nothing_remains();
    assert_eq!(bench.server_files(), ["x.luks"]);
    bench.assert_clean();
    bench.restore_and_compare();
    // Life goes on, and there is nothing more to give back.
    fill(&bench.path("source/new"), 5, 1 << 20, 13);
    bench.backup().unwrap();
    bench.restore_and_compare();
    bench.assert_clean();
}

/// How much is freed; the long form has a volume of 2 GiB.
fn mib() -> u64 {
    std::env::var("SPRAT_TRIM_MIB").map_or(60, |text| text.parse().unwrap())
}

#[test]
fn a_local_container_gets_holes() {
    requires!(missing());
    gives_back(&mut Bench::local(), mib(), &[], "local_punch");
}

#[test]
fn an_account_with_a_shell_makes_the_holes() {
    requires!(ssh_missing().or_else(|| needs::program("fallocate")));
    gives_back(&mut Bench::ssh(), mib(), &[], "shell_punch");
}

/// A server whose account has SFTP and nothing else.
fn sftp_only(arguments: &str) -> Bench {
    Bench::ssh_with(&SshdOptions {
        config_lines: vec![format!("ForceCommand internal-sftp {arguments}")],
        ..SshdOptions::default()
    })
}

#[test]
fn a_server_without_shell_copies_by_itself_where_that_is_asked_for() {
    requires!(ssh_missing());
    let mut bench = sftp_only("");
    gives_back(&mut bench, mib(), &["--rewrite"], "rewrite");
    let target = bench.target().to_string();
    let refused = bench.command(&["trim", &target]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("no shell") && said.contains("trim --rewrite"),
        "{said}"
    );
    bench.assert_clean();
}

#[test]
fn without_copy_data_the_bytes_cross_the_line_only_where_that_is_asked_for() {
    requires!(ssh_missing());
    let mut bench = sftp_only("-P copy-data");
    delete_half(&mut bench, 5);
    let target = bench.target().to_string();
    let refused = bench
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("--through-client"), "{said}");
    assert_eq!(bench.server_files(), ["x.luks"]);
    drop(bench);
    gives_back(
        &mut sftp_only("-P copy-data"),
        20,
        &["--rewrite", "--through-client"],
        "rewrite_through_client",
    );
}

#[test]
fn owner_and_mode_outlive_a_rewrite() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    requires!(ssh_missing());
    let mut bench = Bench::ssh();
    delete_half(&mut bench, 5);
    let container = bench.container();
    fs::set_permissions(&container, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&container, Some(12_345), Some(54_321)).unwrap();
    trim(&bench, &["--rewrite"]);
    let found = fs::metadata(&container).unwrap();
    assert_eq!(found.mode() & 0o7777, 0o640);
    assert_eq!((found.uid(), found.gid()), (12_345, 54_321));
    bench.restore_and_compare();
}

#[test]
fn a_rewrite_that_does_not_fit_is_refused_with_the_numbers() {
    requires!(ssh_missing());
    let mut bench = sftp_only("");
    let disk = Tmpfs::mount(&bench.path("store"), 64);
    delete_half(&mut bench, 20);
    let before = fs::read(bench.container()).unwrap();
    let target = bench.target().to_string();
    disk.remount("size=40m");
    let refused = bench
        .command(&["trim", &target, "--rewrite"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("needs") && said.contains("are free"),
        "{said}"
    );
    assert!(
        before == fs::read(bench.container()).unwrap(),
        "it is as it was"
    );
    assert_eq!(bench.server_files(), ["x.luks"]);
    drop(disk);
}

#[test]
fn a_second_trim_finds_nothing_and_the_cache_stays_right() {
    requires!(ssh_missing().or_else(|| needs::program("fallocate")));
    let mut bench = Bench::ssh();
    delete_half(&mut bench, 10);
    trim(&bench, &[]);
    let said = trim(&bench, &[]);
    assert_eq!(said["measure"]["given_back_bytes"], 0, "{said}");
    // Each reads what the sessions before have kept.
    for round in 0..3 {
        bench.restore_and_compare();
        fill(&bench.path(&format!("source/{round}")), 3, 100_000, round);
        bench.backup().unwrap();
    }
    bench.assert_clean();
}

#[test]
fn a_damaged_file_system_is_not_trimmed() {
    requires!(missing());
    let mut bench = Bench::local();
    delete_half(&mut bench, 5);
    // What the kernel does at an error: s_state, with the super block's checksum anew.
    let image = bench.path("plain");
    let target = bench.target().to_string();
    let mount = bench.path("mnt").display().to_string();
    ok(&mut bench.command(&["mount", &target, &mount, "--rw"]));
    let device = fs::read_to_string("/proc/self/mounts")
        .unwrap()
        .lines()
        .find(|line| line.contains(&mount))
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .unwrap();
    fs::write(&image, "").unwrap();
    let trigger = Path::new("/sys/fs/ext4")
        .join(device.trim_start_matches("/dev/"))
        .join("trigger_fs_error");
    let triggered = fs::write(&trigger, "a test").is_ok();
    let _ = bench.command(&["umount", &mount]).output();
    if !triggered {
        println!("skipped: {} can't be written", trigger.display());
        return;
    }
    let refused = bench.command(&["trim", &target]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(13), "{said}");
    assert!(said.contains("marked as damaged"), "{said}");
}

/// A small container with something to give back, behind a line that strikes.
struct Struck {
    machine: Machine,
}

impl Struck {
    fn new() -> Self {
        let machine = Machine::new();
        machine.init(&[CONTAINER, "--size", "64M"]);
        for name in ["a", "b", "c"] {
            let bytes: Vec<u8> = (0..2_000_000_u32)
                .map(|n| (n % 251) as u8 ^ name.as_bytes()[0])
                .collect();
            machine.write(&format!("src/{name}"), bytes);
        }
        assert_eq!(machine.backup(&[]).code, 0);
        for name in ["a", "c"] {
            fs::remove_file(machine.path(&format!("src/{name}"))).unwrap();
        }
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(machine.backup(&[]).code, 0);
        fs::create_dir(machine.path("mnt")).unwrap();
        for arguments in [&["mount", CONTAINER, "mnt", "--rw"][..], &["umount", "mnt"]] {
            if arguments[0] == "umount" {
                let mut snapshots: Vec<_> = fs::read_dir(machine.path("mnt/home"))
                    .unwrap()
                    .flatten()
                    .map(|entry| entry.path())
                    .filter(|path| {
                        path.file_name()
                            .unwrap()
                            .to_string_lossy()
                            .starts_with("20")
                    })
                    .collect();
                snapshots.sort();
                fs::remove_dir_all(&snapshots[0]).unwrap();
            }
            let ran = machine.sprat(arguments);
            assert_eq!(ran.code, 0, "{}", ran.whole());
        }
        let key = machine.path("config/keys/x.key");
        fs::copy(key, machine.path("key")).unwrap();
        let struck = Self { machine };
        // The record is the target's, so the line's own target is what is known from now on.
        let ran = struck.run(&["snapshots", "TARGET"], None);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        struck.copy("", "-before");
        struck
    }

    fn run(&self, arguments: &[&str], strike: Option<(&str, &str, u32)>) -> Ran {
        let folder = self.machine.path("striker");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let (how, when, nth) = strike.unwrap_or(("cut", "before", 0));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/striker.py");
        let ssh = format!(
            "python3 {} {} {} {how} {when} {nth}",
            script.display(),
            folder.display(),
            needs::sftp_server().unwrap().display()
        );
        let target = format!("ssh://server{}", self.machine.path(CONTAINER).display());
        let mut all = vec!["--ssh-command", &ssh, "--key-file", "key"];
        all.extend(["--quiet-time", "0", "--data-channels", "1"]);
        all.extend(["--reconnect-max", "0"]);
        all.extend(arguments.iter().map(|word| match *word {
            "TARGET" => &*target,
            word => word,
        }));
        self.machine.sprat(&all)
    }

    fn struck(&self) -> bool {
        self.machine.path("striker/struck").exists()
    }

    fn changes(&self) -> u32 {
        let count = fs::read_to_string(self.machine.path("striker/count"));
        count.unwrap().trim().parse().unwrap()
    }

    fn copy(&self, from: &str, to: &str) {
        for name in ["store", "state"] {
            let to = self.machine.path(&format!("{name}{to}"));
            let _ = fs::remove_dir_all(&to);
            ok(Command::new("cp")
                .args(["-a", "--sparse=always"])
                .args([self.machine.path(&format!("{name}{from}")), to]));
        }
    }

    /// It opens, and everything in it is whole: offline, and through a session.
    fn holds_everything(&self, at: &str) {
        let plain = PlainVolume::export(
            &self.machine.path(CONTAINER),
            &self.machine.path("key"),
            &self.machine.path("plain"),
        );
        plain.assert_clean();
        drop(plain);
        let to = tempfile::tempdir_in(self.machine.folder()).unwrap();
        let ran = self.run(
            &[
                "restore",
                "TARGET",
                "home",
                "--to",
                to.path().to_str().unwrap(),
            ],
            None,
        );
        assert_eq!(ran.code, 0, "{at}: {}", ran.whole());
        let source = self.machine.path("src");
        let back = to.path().join(source.strip_prefix("/").unwrap());
        ok(Command::new("diff").arg("-r").arg(&source).arg(back));
    }

    /// Strikes a command at its changes in turn, all of them or as many as `rounds` allow.
    fn strike_everywhere(&self, command: &[&str], rounds: u32) {
        self.copy("-before", "");
        let ran = self.run(command, None);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        let changes = self.changes();
        self.holds_everything("without a strike");
        assert!(changes > 12, "too few changes were seen: {changes}");
        let step = (changes / rounds).max(1);
        println!("{command:?}: {changes} changes, every {step}th is struck");
        let kinds = [
            ("kill", "before"),
            ("cut", "after"),
            ("kill", "after"),
            ("cut", "before"),
        ];
        for (round, nth) in (1..=changes).step_by(step as usize).enumerate() {
            for (how, when) in kinds
                .iter()
                .cycle()
                .skip(round)
                .take(if step == 1 { 2 } else { 1 })
            {
                let at = format!("{command:?}: {how} {when} change {nth}");
                self.copy("-before", "");
                let ran = self.run(command, Some((how, when, nth)));
                if !self.struck() {
                    assert_eq!(ran.code, 0, "{at}: {}", ran.whole());
                    continue;
                }
                self.machine.nothing_is_left();
                self.holds_everything(&at);
                let again = self.run(command, None);
                assert_eq!(again.code, 0, "{at}, then again: {}", again.whole());
                self.holds_everything(&at);
                let left = fs::read_dir(self.machine.path("store")).unwrap().count();
                assert_eq!(left, 1, "{at}: something is left beside the container");
            }
        }
    }
}

/// How many strikes; `make torture` has more.
fn rounds() -> u32 {
    std::env::var("SPRAT_STRIKES").map_or(3, |text| text.parse().unwrap())
}

fn no_striker() -> Option<String> {
    missing()
        .or_else(|| needs::program("python3"))
        .or_else(needs::sftp_server_missing)
}

#[test]
fn holes_that_are_cut_off_or_killed_anywhere_cost_nothing() {
    requires!(no_striker().or_else(|| needs::program("fallocate")));
    Struck::new().strike_everywhere(&["trim", "TARGET"], rounds());
}

#[test]
fn a_rewrite_that_is_cut_off_or_killed_anywhere_costs_nothing() {
    requires!(no_striker());
    let struck = Struck::new();
    struck.strike_everywhere(&["trim", "TARGET", "--rewrite"], rounds());
}

#[test]
fn a_rewrite_through_the_client_that_is_cut_off_or_killed_anywhere_costs_nothing() {
    requires!(no_striker());
    let struck = Struck::new();
    let command = ["trim", "TARGET", "--rewrite", "--through-client"];
    struck.strike_everywhere(&command, rounds());
}
