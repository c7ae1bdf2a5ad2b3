//! `sprat setup`: from an SSH login to the first backup, on a terminal and without one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sprat_testkit::client_and_server::{self, ClientAndServer};
use sprat_testkit::machine::{CHEAP, Ran, TestMachine, noise};
use sprat_testkit::{needs, requires};

use super::prompts::talk;

const SIZE: [&str; 2] = ["--size", "256M"];

/// A client that has an ssh of its own which knows no server, and the option that names it.
fn stranger(both: &ClientAndServer, identity: &str) -> String {
    let known = both.path("known_hosts");
    let config = format!(
        "Host *\n  HostName 127.0.0.1\n  Port {}\n  User root\n  IdentityFile {identity}\n  IdentitiesOnly yes\n  \
         UserKnownHostsFile {}\n  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n",
        both.sshd.port(),
        known.display()
    );
    let config = both.machine.write("ssh_config", config);
    both.machine.write("src/a", "alpha\n");
    format!("--ssh-command=ssh -F {}", config.display())
}

/// The fingerprint of the server's host key, as its admin reads it there.
fn fingerprint(both: &ClientAndServer) -> String {
    let mut command = Command::new("ssh-keygen");
    command.arg("-lf").arg(both.sshd.path("host_key.pub"));
    let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
    said.split(' ').nth(1).unwrap().to_owned()
}

/// A command that asks nothing.
fn unattended<'a>(target: &'a str, name: &'a str, notify: &'a str, what: &'a str) -> Vec<&'a str> {
    let named = ["setup", target, "--name", name, "--what", what];
    let asks_nothing = ["--yes", "--sheet", "sheet.txt", "--notify", notify];
    let cheap = ["--no-schedule", CHEAP, SIZE[0], SIZE[1]];
    [&named[..], &asks_nothing, &cheap].concat()
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

/// Restores the newest snapshot and compares it with what was backed up.
#[track_caller]
fn restores(machine: &TestMachine, more: &str, container: &str, job: &str) {
    let to = machine.path("back");
    let restore = [
        "restore",
        container,
        job,
        "--to",
        to.to_str().unwrap(),
        more,
    ];
    machine.ok(&restore);
    let back = to.join(machine.path("src/a").strip_prefix("/").unwrap());
    assert_eq!(fs::read_to_string(back).unwrap(), "alpha\n");
    fs::remove_dir_all(to).unwrap();
}

#[test]
fn setup_takes_six_answers_to_the_first_backup_and_then_nothing() {
    requires!(client_and_server::missing(), needs::program("python3"));
    let both = ClientAndServer::new();
    let machine = &both.machine;
    let key = both.sshd.path("user_key").display().to_string();
    let ssh = stranger(&both, &key);
    let source = machine.path("src").display().to_string() + "\n";
    let command = ["setup", "--name", "box", CHEAP, "--no-schedule", &ssh];
    let command = [&command[..], &SIZE].concat();
    let right = fingerprint(&both) + "\n";
    let answers = [
        ("Where shall the backups go?", "root@nas\n"),
        ("Is it right?", right.as_str()),
        ("What shall be backed up?", source.as_str()),
        ("Where shall problems be reported?", "none\n"),
        ("Type groups 3 and 7", "{group 3} {group 7}\n"),
        ("Make the first backup now?", "\n"),
    ];
    let seen = talk(machine, &command, &answers);
    let said = seen.ended_with(0);
    assert!(said.contains("box is set up"), "{said}");
    assert_eq!(
        said.matches("? (").count() + said.matches("Type groups").count(),
        6,
        "{said}"
    );

    for (name, secret) in [
        ("config/conf.d/setup-box.toml", 0o600),
        ("config/keys/box.key", 0o600),
    ] {
        assert_eq!(mode(&machine.path(name)), secret, "{name}");
    }
    let known = fs::read_to_string(machine.path("known_hosts")).unwrap();
    assert!(
        known.starts_with(&format!("[127.0.0.1]:{} ssh-ed25519 ", both.sshd.port())),
        "{known}"
    );
    assert!(!machine.path("config/sprat.toml").exists());
    machine.ok(&["config", "check"]);
    let status = machine.ok(&["status", "box"]);
    assert!(
        !status.whole().contains("never tested here"),
        "{}",
        status.whole()
    );
    restores(machine, "--quiet", "box", "files");

    // A server with ZFS shows older states of the file; they are read without a lock.
    let then = both.server().join(".zfs/snapshot/then");
    fs::create_dir_all(&then).unwrap();
    fs::copy(both.server().join("box.luks"), then.join("box.luks")).unwrap();
    let doctor = machine.sprat(&["doctor", "box"]);
    assert!(
        doctor.stdout.contains("in .zfs/snapshot"),
        "{}",
        doctor.whole()
    );
    restores(
        machine,
        &ssh,
        "root@nas:.zfs/snapshot/then/box.luks",
        "files",
    );
    assert_eq!(fs::read_dir(&then).unwrap().count(), 1, "a lock was left");

    // The same command has nothing to ask, and nothing to do.
    let seen = talk(machine, &command, &[]);
    let said = seen.ended_with(0);
    assert_eq!(said.trim(), "nothing to do: box is set up", "{said}");

    // A second container, and what differs is left.
    fs::create_dir(machine.path("usb")).unwrap();
    let source = machine.path("src").display().to_string();
    let second = unattended("usb", "usb", "desktop", &source);
    let ran = machine.ok(&second);
    assert!(
        ran.stderr.contains("[notify] is in the config already"),
        "{}",
        ran.whole()
    );
    assert_eq!(mode(&machine.path("sheet.txt")), 0o600);
    restores(machine, "--quiet", "usb", "files-usb");
    let ran = machine.ok(&second);
    assert!(ran.stdout.starts_with("nothing to do"), "{}", ran.whole());
    machine.nothing_is_left();
}

#[test]
fn setup_without_answers_accepts_no_unknown_host_and_shows_the_key_to_add() {
    requires!(client_and_server::missing());
    let both = ClientAndServer::new();
    let machine = &both.machine;
    let ssh = stranger(&both, "none");
    let source = machine.path("src").display().to_string();
    let setup = |more: &[&str]| -> Ran {
        let command = unattended("root@nas", "box", "none", &source);
        machine.sprat(&[&command[..], &["--no-first-run", &ssh], more].concat())
    };
    let ran = setup(&[]);
    assert!(
        ran.failed_with(2).contains("host key of nas is not known"),
        "{}",
        ran.whole()
    );
    let other = "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU";
    let ran = setup(&["--host-key", other]);
    assert!(
        ran.failed_with(1).contains("shows another host key"),
        "{}",
        ran.whole()
    );
    assert!(!machine.path("known_hosts").exists());
    assert_eq!(fs::read_dir(machine.path("config")).unwrap().count(), 0);

    let right = fingerprint(&both);
    let right = ["--host-key", &right];
    let ran = setup(&right);
    let said = ran.failed_with(14);
    let line = said
        .find("ssh-ed25519 ")
        .unwrap_or_else(|| panic!("{said}"));
    let line = said[line..].lines().next().unwrap();
    assert_eq!(mode(&machine.path("config/keys/ssh_ed25519")), 0o600);
    assert!(!machine.path("sheet.txt").exists() && !machine.path("config/conf.d").exists());
    fs::write(both.sshd.path("authorized_keys"), format!("{line}\n")).unwrap();

    // The same command goes on.
    let ran = setup(&right).succeeded();
    assert!(ran.stdout.contains("box is set up"), "{}", ran.whole());
    let ran = setup(&[]).succeeded();
    assert!(ran.stdout.starts_with("nothing to do"), "{}", ran.whole());
    let status = machine.ok(&["status", "box"]);
    assert!(
        status.whole().contains("never tested here"),
        "{}",
        status.whole()
    );
    // The config names the new key: another command logs in. It also keeps to the limit: 4 MB a
    // second. Only the last 4 MiB don't wait.
    let file = machine.path("config/conf.d/setup-box.toml");
    let text = fs::read_to_string(&file).unwrap();
    let limited = text.replace(
        "[container.box]\n",
        "[container.box]\nupload_limit = \"32 Mbit/s\"\n",
    );
    fs::write(&file, limited).unwrap();
    machine.write("src/noise", noise(10 << 20, 1));
    let begun = Instant::now();
    machine.ok(&["backup"]);
    assert!(
        begun.elapsed() > Duration::from_millis(1300),
        "{:?}",
        begun.elapsed()
    );
    restores(machine, "--quiet", "box", "files");
}

/// The first backup opens the container while the process that made it still waits to make the reserve.
#[test]
fn setup_backs_up_and_makes_the_reserve() {
    requires!(client_and_server::missing());
    let machine = TestMachine::new();
    machine.write("src/a", "alpha\n");
    let source = machine.path("src").display().to_string();
    let mut setup = machine.command();
    setup.env("SPRAT_RESERVE_BYTES", "1048576");
    setup.args(unattended("store", "box", "none", &source));
    machine.run(&mut setup).succeeded();
    restores(&machine, "--quiet", "box", "files");
    let reserve = machine.path("store/box.luks.reserve");
    assert_eq!(reserve.metadata().unwrap().len(), 1 << 20);
    machine.nothing_is_left();
}

#[test]
fn setup_goes_on_after_a_kill_at_any_step() {
    requires!(client_and_server::missing());
    let machine = TestMachine::new();
    machine.write("src/a", "alpha\n");
    let source = machine.path("src").display().to_string();
    let command = unattended("store", "box", "none", &source);
    for reached in [
        "sheet.txt",
        "store/box.luks",
        "config/conf.d/setup-box.toml",
    ] {
        let mut program = machine.command();
        program
            .args(&command)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = program.spawn().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !machine.path(reached).exists() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(machine.path(reached).exists(), "{reached}");
        machine.kill_all();
        child.wait().unwrap();
        machine.nothing_is_left();
    }
    let ran = machine.ok(&command);
    assert!(ran.stdout.contains("box is set up"), "{}", ran.whole());
    let sheet = fs::read_to_string(machine.path("sheet.txt")).unwrap();
    let key = sheet
        .lines()
        .find(|line| line.starts_with("RECOVERY KEY"))
        .unwrap();
    machine.write("recovery", key.trim_start_matches("RECOVERY KEY").trim());
    machine.ok(&["key", "rehearse", "box", "--passphrase-file", "recovery"]);
    restores(&machine, "--quiet", "box", "files");
    let ran = machine.ok(&command);
    assert!(ran.stdout.starts_with("nothing to do"), "{}", ran.whole());
}
