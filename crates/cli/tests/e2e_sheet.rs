//! The recovery sheet's own commands, typed as they stand, and the passphrase asked for on a terminal.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;

use std::process::{Command, Stdio};

use machine::remote::Remote;
use machine::{CONTAINER, Machine};
use sprat_testkit::sshd::{self, SshdOptions};
use sprat_testkit::{needs, requires};

/// The sheet's steps as a shell script that stops at the first failure, in a mount namespace of its
/// own. There may be no device-mapper here, so `open` only tries the key, and nothing is mounted.
fn script(steps: &serde_json::Value, recovery_key: &str) -> String {
    let mut script = "set -ex; mkdir -p /mnt; mount -t tmpfs none /mnt\n".to_owned();
    for step in steps.as_array().unwrap() {
        for command in step["commands"].as_array().unwrap() {
            let command = command.as_str().unwrap();
            if command.starts_with("cryptsetup open") {
                let tried = command.replace("cryptsetup open", "cryptsetup open --test-passphrase");
                let tried = tried.strip_suffix(" sprat-restore").unwrap();
                let typed = if command.contains("--key-file") {
                    ""
                } else {
                    recovery_key
                };
                script.push_str(&format!("printf %s '{typed}' | {tried}\n"));
            } else if [
                "mkdir -p /mnt",
                "sshfs",
                "cryptsetup luksDump",
                "fusermount3",
            ]
            .iter()
            .any(|wanted| command.starts_with(wanted))
            {
                script.push_str(&format!("{command}\n"));
            }
        }
    }
    script
}

#[test]
fn commands_of_the_sheet_open_the_container_on_the_server() {
    requires!(
        sshd::missing(),
        needs::program("sshfs"),
        needs::program("cryptsetup")
    );
    let remote = Remote::start(&SshdOptions::default());
    let init = [
        "init",
        "TARGET",
        "--size",
        "1G",
        "--cheap-kdf-for-tests",
        "--json",
    ];
    let ran = remote.sprat(&init);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    // The folder's name was replaced in what `sprat` returned.
    let folder = remote.machine.folder().to_string_lossy().into_owned();
    let said: serde_json::Value =
        serde_json::from_str(&ran.stdout.replace("[DIR]", &folder)).unwrap();
    let sheet = &said["recovery_sheet"];
    let script = script(&sheet["steps"], sheet["recovery_key"].as_str().unwrap());
    assert!(script.contains("sshfs -p") && script.matches("--test-passphrase").count() == 2);
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}\n{said}");
    let dump = String::from_utf8_lossy(&output.stdout);
    let uuid = serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["uuid"].clone();
    assert!(dump.contains(uuid.as_str().unwrap()), "{dump}");
    assert!(
        dump.contains("aes-xts-plain64") && dump.contains("16777216"),
        "{dump}"
    );
}

#[test]
fn passphrase_is_asked_for_on_a_terminal_without_echo() {
    use std::io::Write;
    requires!(needs::root(), needs::program("script"));
    let machine = Machine::new();
    machine.write("right.txt", "correct horse battery staple\n");
    machine.init(&[CONTAINER, "--size", "1G", "--passphrase-file", "right.txt"]);
    let ask = |typed: &str| {
        let plain = machine.command();
        let sprat = format!(
            "{} snapshots {CONTAINER}",
            plain.get_program().to_str().unwrap()
        );
        let mut command = Command::new("script");
        command
            .args(["-qec", &sprat, "/dev/null"])
            .current_dir(machine.folder());
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Typed before it is asked for, the terminal would echo it.
        std::thread::sleep(std::time::Duration::from_millis(500));
        child
            .stdin
            .as_mut()
            .unwrap()
            .write_all(typed.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (code, said) = ask("correct horse battery staple\n");
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("Passphrase or recovery key:") && !said.contains("horse"),
        "{said}"
    );
    let (code, said) = ask("wrong horse battery staple\n");
    assert_eq!(code, Some(12), "{said}");
    let (code, said) = ask("\u{3}");
    assert_eq!(code, Some(130), "{said}");
}
