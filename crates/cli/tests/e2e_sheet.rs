//! The recovery sheet's own commands, typed as they stand, and the passphrase asked for on a terminal.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;

use std::process::{Command, Stdio};

use machine::remote::Remote;
use machine::strikes::{self, Blow};
use machine::{CONTAINER, Machine, Tmpfs};
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

const INIT: [&str; 5] = ["init", CONTAINER, "--size", "64M", "--cheap-kdf-for-tests"];

#[test]
fn a_sheet_is_shown_whatever_becomes_of_the_machines_own_notes() {
    requires!(needs::root());
    let machine = Machine::new();
    let mut full = Vec::new();
    for folder in ["state/containers", "state/headers"] {
        std::fs::create_dir(machine.path(folder)).unwrap();
        let tmpfs = Tmpfs::mount(&machine.path(folder), 1);
        tmpfs.remount("ro");
        full.push(tmpfs);
    }
    let ran = machine.sprat(&[&INIT[..], &["--html", "page.html"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert!(ran.stdout.contains("RECOVERY KEY"), "{}", ran.whole());
    for told in [
        "can't remember the container",
        "can't keep a copy of the header",
    ] {
        assert!(ran.stderr.contains(told), "{}", ran.whole());
    }
    let page = std::fs::metadata(machine.path("page.html")).unwrap();
    assert!(page.len() > 1000);
}

#[test]
fn an_init_cut_off_after_its_last_rename_says_what_is_there_and_how_to_get_a_sheet() {
    requires!(strikes::missing());
    for how in ["cut", "kill"] {
        let machine = Machine::new();
        let target = machine.on_line(CONTAINER);
        let init = ["init", &target, "--size", "64M", "--html", "page.html"];
        let blow = Blow {
            how,
            when: "after",
            nth: 1,
            kind: Some("rename"),
        };
        let ran = machine.sprat_struck(&init, Some(blow));
        assert!(machine.was_struck(), "{how}: {}", ran.whole());
        assert!(machine.path(CONTAINER).exists(), "{how}: {}", ran.whole());
        if how == "cut" {
            assert!([1, 14].contains(&ran.code), "{}", ran.whole());
            let told = "the container may be made, whole, and no sheet was shown";
            assert!(ran.stderr.contains(told), "{}", ran.whole());
            assert!(!machine.path("page.html").exists());
        }
        let _ = std::fs::remove_file(machine.path("page.html"));
        let again = machine.sprat_struck(&init, None).failed_with(1);
        assert!(again.contains("exists already"), "{how}: {again}");
        assert!(again.contains("--new-recovery"), "{how}: {again}");
        let ran = machine.sprat_struck(&["key", "add", &target, "--new-recovery"], None);
        assert_eq!(ran.code, 0, "{how}: {}", ran.whole());
        assert!(
            ran.stdout.contains("RECOVERY KEY"),
            "{how}: {}",
            ran.whole()
        );
        machine.nothing_is_left();
    }
}

#[test]
fn a_page_may_have_a_name_that_is_no_text() {
    use std::os::unix::ffi::OsStrExt;
    requires!(needs::root());
    let machine = Machine::new();
    machine.init(&INIT[1..4]);
    let name = std::ffi::OsStr::from_bytes(b"sheet-\xff.html");
    let mut command = machine.command();
    command.args([
        "key",
        "sheet",
        CONTAINER,
        "--without-secret",
        "--json",
        "--html",
    ]);
    let ran = machine.run(command.arg(name));
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let page = ran.json()["page"].as_str().unwrap().to_owned();
    assert!(page.ends_with("/sheet-\\#377.html"), "{page}");
    assert!(
        std::fs::metadata(machine.folder().join(name))
            .unwrap()
            .len()
            > 1000
    );
}
