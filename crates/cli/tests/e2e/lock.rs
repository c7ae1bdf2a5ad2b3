//! The lock beside a container, and the reads around it: a connection lost while the lock is
//! released, and a header changed while it is acquired.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use sprat_testkit::machine::strikes::{self, Blow, copy_sparse};
use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit::{leases, requires};

/// A container that is known by its target on the connection, with a snapshot.
fn ready() -> (TestMachine, Vec<String>) {
    let machine = TestMachine::new();
    machine.write("src/a", "alpha\n");
    machine.init(&[CONTAINER, "--size", "64M"]);
    let key = fs::read(machine.path("config/keys/x.key")).unwrap();
    machine.write("key", key);
    let (target, source) = (machine.on_line(CONTAINER), machine.path("src"));
    let backup = ["--key-file", "key", "backup", "--name", "home", &target];
    let mut backup = backup.map(str::to_owned).to_vec();
    backup.push(source.display().to_string());
    run(&machine, &backup, None).succeeded();
    (machine, backup)
}

fn run(machine: &TestMachine, words: &[String], blow: Option<Blow>) -> Ran {
    let words: Vec<&str> = words.iter().map(|word| &**word).collect();
    machine.sprat_struck(&words, blow)
}

fn locks(machine: &TestMachine) -> usize {
    leases::held(&machine.path("store")).len()
}

/// The server does not answer again, so nobody can check whether another session wrote meanwhile.
#[test]
fn server_lost_at_lock_release_is_reported_and_the_next_run_goes_on() {
    requires!(strikes::missing());
    let (machine, backup) = ready();
    let mut left = 0;
    for when in ["before", "after"] {
        let free = Blow {
            how: "cut",
            when,
            nth: 1,
            kind: Some("free"),
        };
        let ran = run(&machine, &backup, Some(free));
        assert!(machine.was_struck(), "{when}");
        assert_eq!(ran.code, 14, "{when}: {}", ran.whole());
        let hint = "everything is on the server's disk";
        assert!(ran.stderr.contains(hint), "{when}: {}", ran.whole());
        left += locks(&machine);
        let again = run(&machine, &backup, None);
        assert_eq!(again.code, 0, "{when}: {}", again.whole());
        assert_eq!(locks(&machine), 0, "{when}");
    }
    assert!(left > 0, "no lock was ever left");
    machine.restores_whole(&[]);
    machine.nothing_is_left();
}

/// The header is read while the lock is still being acquired; then, before the lock's file is made,
/// another program changes it.
#[test]
fn header_changed_before_the_lock_is_read_again() {
    requires!(strikes::missing());
    let (machine, backup) = ready();
    let container = machine.path(CONTAINER);
    copy_sparse(&container, &machine.path("pristine"));
    // The same container, whose key file opens it no more; and another container.
    let change = |name: &str, make: &dyn Fn(&str)| {
        make(name);
        let mut header = vec![0; 16 << 20];
        let file = File::open(machine.path(name)).unwrap();
        file.read_exact_at(&mut header, 0).unwrap();
        fs::write(machine.path(format!("{name}.header")), header).unwrap();
    };
    let removed = |name: &str| {
        let other = machine.path("pass");
        fs::write(&other, "correct horse battery").unwrap();
        copy_sparse(&container, &machine.path(name));
        let add = ["--key-file", "key", "key", "add", name];
        let add = [&add[..], &["--new-passphrase-file", "pass"]].concat();
        let remove = ["--passphrase-file", "pass", "key", "remove", name, "0"].to_vec();
        for words in [add, remove] {
            machine.ok(&[&["--cheap-kdf-for-tests"][..], &words].concat());
        }
    };
    let another = |name: &str| {
        machine.init(&[name, "--size", "64M", "--key-file", "key"]);
    };
    change("removed.luks", &removed);
    change("another.luks", &another);
    let header = machine.path("header");
    // This machine made neither change.
    for name in ["removed.luks", "another.luks"] {
        copy_sparse(&machine.path("pristine"), &container);
        fs::copy(machine.path(format!("{name}.header")), &header).unwrap();
        let swap = format!(
            "dd if={} of={} bs=1M conv=notrunc status=none",
            header.display(),
            container.display()
        );
        fs::write(machine.path("act"), swap).unwrap();
        let blow = Blow {
            how: "act",
            when: "before",
            nth: 1,
            kind: None,
        };
        let ran = run(&machine, &backup, Some(blow));
        assert!(machine.was_struck(), "{name}");
        assert_eq!(ran.code, 13, "{name}: {}", ran.whole());
        assert_eq!(locks(&machine), 0, "{name}");
        let now = fs::read(&container).unwrap();
        let (then, payload) = (fs::read(machine.path("pristine")).unwrap(), 16 << 20);
        assert!(now[..payload] == fs::read(&header).unwrap(), "{name}");
        assert!(now[payload..] == then[payload..], "{name}");
    }
    copy_sparse(&machine.path("pristine"), &container);
    run(&machine, &backup, None).succeeded();
}
