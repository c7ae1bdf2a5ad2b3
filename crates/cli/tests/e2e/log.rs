//! The log that `SPRAT_LOG` asks for: what it shows, and that no secret is in it.

use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit::{needs, requires};

/// Runs a command with a log at `level`.
fn logged(machine: &TestMachine, level: &str, arguments: &[&str]) -> Ran {
    machine.run(machine.command().env("SPRAT_LOG", level).args(arguments))
}

/// Every way in which bytes could stand in a log: as text, in hex, as Rust shows a list of bytes.
fn spellings(secret: &[u8]) -> Vec<String> {
    let hex: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let list: Vec<String> = secret.iter().map(u8::to_string).collect();
    let mut all = vec![hex.to_uppercase(), hex, list.join(", ")];
    all.extend(std::str::from_utf8(secret).map(str::to_owned));
    all
}

#[test]
fn the_fullest_log_of_init_backup_and_key_add_holds_no_secret() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let passphrase = "correct horse battery";
    machine.write("pass", format!("{passphrase}\n"));
    machine.write("src/namedfile", "content that nobody else has");
    let init = logged(
        &machine,
        "trace",
        &[
            "init",
            "--json",
            CONTAINER,
            "--size",
            "64M",
            "--cheap-kdf-for-tests",
        ],
    );
    assert_eq!(init.code, 0, "{}", init.whole());
    let backup = logged(
        &machine,
        "trace",
        &["backup", CONTAINER, "--name", "home", "src"],
    );
    assert_eq!(backup.code, 0, "{}", backup.whole());
    let add = ["key", "add", CONTAINER, "--cheap-kdf-for-tests"];
    let add = logged(
        &machine,
        "trace",
        &[&add[..], &["--new-passphrase-file", "pass"]].concat(),
    );
    assert_eq!(add.code, 0, "{}", add.whole());

    let sheet = init.json();
    let recovery = sheet["recovery_sheet"]["recovery_key"].as_str().unwrap();
    let keys: Vec<Vec<u8>> = std::fs::read_dir(machine.path("config/keys"))
        .unwrap()
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect();
    assert_eq!(keys.len(), 1);
    let log = format!("{}{}{}", init.stderr, backup.stderr, add.stderr);
    for part in ["session{", "epoch", "lease{", "child{", "rsync"] {
        assert!(log.contains(part), "no {part} in the log:\n{log}");
    }
    let mut secrets = spellings(passphrase.as_bytes());
    secrets.extend(spellings(recovery.as_bytes()));
    secrets.extend(spellings(&keys[0]));
    secrets.extend(spellings(b"content that nobody else has"));
    for secret in secrets {
        assert!(!log.contains(&secret), "{secret} is in the log");
    }

    let quiet = logged(
        &machine,
        "info",
        &["backup", CONTAINER, "--name", "home", "src"],
    );
    assert_eq!(quiet.code, 0, "{}", quiet.whole());
    assert!(quiet.stderr.contains("session opened"), "{}", quiet.stderr);
    assert!(!quiet.stderr.contains("namedfile"), "{}", quiet.stderr);
}

#[test]
fn a_log_level_that_does_not_exist_is_a_usage_error() {
    let machine = TestMachine::new();
    let ran = logged(&machine, "debgu", &["snapshots", CONTAINER]);
    let said = ran.failed_with(2);
    assert!(said.contains("debgu") && said.contains("debug"), "{said}");
}
