//! Changes of keys, cut off and killed at each remote write in turn.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;

use std::fs;
use std::path::Path;
use std::process::Command;

use machine::{CONTAINER, Machine, Ran};
use sprat_luks::{Header, Secret};
use sprat_testkit::{needs, requires};

/// A container behind a line that can be cut, as it was before the change.
struct Bench {
    machine: Machine,
    /// Keys that open it before, and after.
    keys: Vec<Secret>,
}

impl Bench {
    fn new() -> Self {
        let machine = Machine::new();
        machine.write("src/a", "alpha\n");
        let recovery = machine.init(&[CONTAINER, "--size", "64M"]);
        assert_eq!(machine.backup(&[]).code, 0);
        machine.write("pass", "correct horse battery");
        let key = fs::read(machine.path("config/keys/x.key")).unwrap();
        fs::copy(machine.path("config/keys/x.key"), machine.path("key")).unwrap();
        Self {
            machine,
            keys: vec![
                Secret::key_file(key),
                Secret::passphrase(recovery),
                Secret::passphrase("correct horse battery".to_owned()),
            ],
        }
    }

    /// One run of a command; `None`: nothing is cut.
    fn run(&self, arguments: &[&str], cut: Option<(&str, &str, u32)>) -> Ran {
        let folder = self.machine.path("cutter");
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        let (how, when, nth) = cut.unwrap_or(("cut", "before", 0));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/cutter.py");
        let ssh = format!(
            "python3 {} {} {} {how} {when} {nth}",
            script.display(),
            folder.display(),
            needs::sftp_server().unwrap().display()
        );
        let target = format!("ssh://server{}", self.machine.path(CONTAINER).display());
        let mut all = vec!["--ssh-command", &ssh, "--cheap-kdf-for-tests"];
        all.extend([
            "--quiet-time",
            "0",
            "--data-channels",
            "1",
            "--key-file",
            "key",
        ]);
        all.extend(arguments.iter().map(|word| match *word {
            "TARGET" => &*target,
            word => word,
        }));
        self.machine.sprat(&all)
    }

    fn struck(&self) -> bool {
        self.machine.path("cutter/struck").exists()
    }

    /// Which of the keys open the file as it lies there.
    fn opened(&self) -> Vec<bool> {
        let file = fs::File::open(self.machine.path(CONTAINER)).unwrap();
        let header = Header::load(&file).unwrap();
        let keys = self.keys.iter();
        keys.map(|key| header.unlock(&file, key).is_ok()).collect()
    }

    fn payload(&self) -> Vec<u8> {
        fs::read(self.machine.path(CONTAINER))
            .unwrap()
            .split_off(16 << 20)
    }

    fn copy(&self, from: &str, to: &str) {
        for name in ["store", "state"] {
            let to = self.machine.path(&format!("{name}{to}"));
            let _ = fs::remove_dir_all(&to);
            let copied = Command::new("cp")
                .args(["-a", "--sparse=always"])
                .args([self.machine.path(&format!("{name}{from}")), to])
                .status();
            assert!(copied.unwrap().success());
        }
    }

    /// Cuts `change` off at each write until it comes through; `before` and `after`: which keys
    /// open it then.
    fn cut_everywhere(&self, change: &[&str], before: &[bool], after: &[bool]) {
        assert_eq!(self.opened(), before);
        let payload = self.payload();
        self.copy("", "-before");
        for (how, when) in [("kill", "before"), ("cut", "after")] {
            for nth in 1.. {
                let at = format!("{how} {when} write {nth}");
                let ran = self.run(change, Some((how, when, nth)));
                if !self.struck() {
                    assert_eq!(ran.code, 0, "{at}: {}", ran.whole());
                    assert_eq!(self.opened(), after, "{at}");
                    // Lock, area, two copies, and their fsyncs. After the last write, the flush
                    // of the lock's removal, the command may end before its line does.
                    assert!(nth > 8, "{at}: too few writes were seen");
                    self.copy("-before", "");
                    break;
                }
                let now = self.opened();
                let stay = |was: &[bool]| was.iter().zip(&now).all(|(was, now)| !was || *now);
                assert!(
                    stay(before) || stay(after),
                    "{at}: {now:?}\n{}",
                    ran.whole()
                );
                assert!(payload == self.payload(), "{at}");
                // The same command again goes on where it stopped.
                let again = self.run(change, None);
                let came_through = again.stderr.contains("there is no key slot");
                assert!(again.code == 0 || came_through, "{at}: {}", again.whole());
                assert_eq!(self.opened(), after, "{at}");
                assert!(payload == self.payload(), "{at}");
                let header = Header::load(&fs::File::open(self.machine.path(CONTAINER)).unwrap());
                assert!(header.unwrap().copies().both_good(), "{at}");
                self.copy("-before", "");
            }
        }
        let ran = self.run(change, None);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        assert_eq!(self.opened(), after);
    }
}

fn missing() -> Option<String> {
    needs::root()
        .or_else(needs::sftp_server_missing)
        .or_else(|| needs::program("python3"))
}

#[test]
fn keys_cut_off_or_killed_at_any_write_leave_a_container_that_opens() {
    requires!(missing());
    let bench = Bench::new();
    let (old, both) = ([true, true, false], [true, true, true]);
    let ran = bench.run(&["key", "header-backup", "TARGET", "kept"], None);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let add = ["key", "add", "TARGET", "--new-passphrase-file", "pass"];
    bench.cut_everywhere(&add, &old, &both);
    bench.cut_everywhere(
        &["key", "remove", "TARGET", "1"],
        &both,
        &[true, false, true],
    );
    let restore = ["key", "header-restore", "TARGET", "kept", "--yes"];
    bench.cut_everywhere(&restore, &[true, false, true], &old);
    bench.machine.restores_whole(&[]);
    bench.machine.nothing_is_left();
}
