//! `sprat drill`: what it restores and compares, where its bytes come from, and what a run makes of it.

use std::fs;

use serde_json::Value;
use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit::{needs, requires};

use crate::damage::{check, first_block, flip, inside, kept, snapshots, with_two_snapshots};

fn drill(machine: &TestMachine, target: &str, code: i32) -> Value {
    let ran = machine.sprat(&["drill", target, "--json"]);
    assert_eq!(ran.code, code, "{}", ran.whole());
    let scratch = fs::read_dir(machine.path("cache/drill")).unwrap();
    assert_eq!(scratch.count(), 0);
    ran.json()["drill"].clone()
}

/// The first block of `folder/victim`.
fn victim(machine: &TestMachine) -> u64 {
    let victim = inside(machine, "folder/victim");
    let snapshot = &snapshots(machine)[0];
    first_block(machine, &format!("blocks \"/home/{snapshot}{victim}\""))
}

#[test]
fn drill_names_damaged_file_until_it_is_whole_again() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    // The backup saved a checksum of each.
    let found = drill(&machine, CONTAINER, 0);
    let counts = |found: &Value| {
        [
            "files",
            "compared_with_checksum",
            "compared_with_source",
            "not_compared",
        ]
        .map(|field| found[field].as_u64().unwrap())
    };
    assert_eq!(counts(&found), [3, 3, 0, 0], "{found}");
    assert_eq!(found["bytes"], 150_006);
    check(&machine, &["--read-data"]).succeeded();
    let found = drill(&machine, CONTAINER, 0);
    assert_eq!(counts(&found), [3, 3, 0, 0], "{found}");
    let status = |code| {
        let ran = machine.sprat(&["status", CONTAINER]);
        assert_eq!(ran.code, code, "{}", ran.whole());
        ran.stdout
    };
    assert!(status(0).contains("passed, "));
    let block = victim(&machine);
    flip(&machine.path(CONTAINER), block);
    let found = drill(&machine, CONTAINER, 13);
    assert_eq!(found["damaged"]["count"], 1, "{found}");
    let name = found["damaged"]["names"][0].as_str().unwrap();
    assert!(
        name.contains("folder/victim: differs from the checksum that its backup saved"),
        "{name}"
    );
    assert_eq!(kept(&machine)["drill"]["exit"], "damaged");
    assert!(status(13).contains("FAILED, "));
    // A mount answers from the caches of this machine.
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt"]);
    machine.sprat(&["drill", CONTAINER]).failed_with(11);
    machine.ok(&["umount", "mnt"]);
    // A damaged file is in each sample.
    let text = machine.sprat(&["drill", CONTAINER, "--files", "1"]);
    assert_eq!(text.code, 13, "{}", text.whole());
    assert!(
        text.stdout.contains("the drill FAILED: 1 file"),
        "{}",
        text.whole()
    );
    flip(&machine.path(CONTAINER), block);
    drill(&machine, CONTAINER, 0);
    status(0);
    machine.nothing_is_left();
}

/// A run sees that the copy was first seen, and the last drill was made, long ago.
fn long_after(machine: &TestMachine) {
    let long_ago = Value::from("2026-01-01T00:00:00Z");
    for path in ["state/schedule/home@nas.json", "state/schedule/@nas.json"] {
        let path = machine.path(path);
        let Ok(text) = fs::read(&path) else { continue };
        let mut state: Value = serde_json::from_slice(&text).unwrap();
        for field in ["first_seen", "drill_tried"] {
            if let Some(field) = state.get_mut(field) {
                *field = long_ago.clone();
            }
        }
        fs::write(path, state.to_string()).unwrap();
    }
    let checks = fs::read_dir(machine.path("state/checks"))
        .into_iter()
        .flatten();
    for path in checks.map(|entry| entry.unwrap().path()) {
        let mut kept: Value = match path.extension() {
            Some(json) if json == "json" => {
                serde_json::from_slice(&fs::read(&path).unwrap()).unwrap()
            }
            _ => continue,
        };
        if let Some(at) = kept.get_mut("drill").and_then(|drill| drill.get_mut("at")) {
            *at = long_ago.clone();
        }
        fs::write(path, kept.to_string()).unwrap();
    }
}

#[test]
fn run_drills_when_due_and_its_alarm_closes_when_a_drill_passes() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    let configure = |every: &str| {
        machine.write(
            "config/sprat.toml",
            format!(
                "[container.nas]\ntarget = \"{}\"\nkey_file = \"{}\"\ncheck_every = \"never\"\n\
                 drill_every = \"{every}\"\n\
                 [job.home]\ncontainer = \"nas\"\nsources = \"{}/src\"\nevery = \"never\"\n",
                machine.path(CONTAINER).display(),
                machine.path("config/keys/x.key").display(),
                machine.folder().display(),
            ),
        );
    };
    configure("30 days");
    let run = |code: i32| {
        let ran = machine.sprat(&["run", "--json"]);
        assert_eq!(ran.code, code, "{}", ran.whole());
        ran.json()
    };
    let public = || {
        let text = fs::read(machine.path("state/public/status.json")).unwrap();
        let public: Value = serde_json::from_slice(&text).unwrap();
        public["containers"][0]["drill_passed"].clone()
    };
    // The first drill is not on the first day.
    assert_eq!(run(0)["drills"], serde_json::json!([]));
    assert_eq!(public(), Value::Null);
    long_after(&machine);
    let plan = machine.ok(&["run", "--dry-run"]).stdout;
    assert!(plan.contains("nas: a drill is due"), "{plan}");
    let said = run(0);
    assert_eq!(said["drills"][0]["files"], 3, "{said}");
    assert_eq!(public(), true);
    // The next session removes what a killed drill has left.
    machine.write("cache/drill/0/left", "plain text");
    machine.ok(&["snapshots", "nas"]);
    assert!(!machine.path("cache/drill/0").exists());
    let status = machine.ok(&["status", "nas", "--json"]).json();
    assert_eq!(status["containers"][0]["drill"]["result"]["code"], 0);
    // The job is in the config, so the files were compared with their sources.
    let kept_drill = || kept(&machine)["drill"]["result"]["found"].clone();
    assert_eq!(kept_drill()["compared_with_source"], 3);
    assert_eq!(run(0)["drills"], serde_json::json!([]));

    let block = victim(&machine);
    flip(&machine.path(CONTAINER), block);
    long_after(&machine);
    let ran: Ran = machine.sprat(&["run", "--json"]);
    assert_eq!(ran.code, 13, "{}", ran.whole());
    assert!(
        ran.stderr.contains("nas: the drill failed"),
        "{}",
        ran.whole()
    );
    assert!(
        ran.stderr
            .contains("differs from the checksum that its backup saved"),
        "{}",
        ran.whole()
    );
    let said = ran.json();
    assert_eq!(said["events"][0]["kind"], "damage");
    assert_eq!(said["events"][0]["cause"]["class"], "drill");
    assert_eq!(public(), false);

    flip(&machine.path(CONTAINER), block);
    long_after(&machine);
    assert_eq!(run(0)["events"], serde_json::json!([]));
    assert_eq!(public(), true);
    configure("never");
    long_after(&machine);
    assert_eq!(run(0)["drills"], serde_json::json!([]));
    machine.nothing_is_left();
}

#[test]
fn recovery_is_rehearsed_by_the_sheet_alone() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    machine.write_old("src/letter", "content\n");
    machine.backup(&["-q"]).succeeded();
    // What the sheet does not have is not used: another key, and what is known of an older container.
    machine.write("config/keys/x.key", "no key");
    let rehearse = |more: &[&str]| {
        let words = [&["drill", CONTAINER, "--recovery"], more].concat();
        machine.sprat(&words)
    };
    let ran = rehearse(&["--passphrase-file", "recovery"]).succeeded();
    let whole = ran.whole();
    for words in [
        "the drill passed: 1 file",
        "compare this with the sheet",
        "fingerprint is ",
    ] {
        assert!(whole.contains(words), "{whole}");
    }
    let status = machine.ok(&["status", CONTAINER, "--offline"]).stdout;
    assert!(
        status.contains("by the recovery sheet alone: passed, "),
        "{status}"
    );
    let status = machine
        .ok(&["status", CONTAINER, "--offline", "--json"])
        .json();
    assert!(status["containers"][0]["recovery_drill"]["at"].is_string());
    assert!(status["containers"][0]["drill"].is_null());

    // Neither a passphrase nor a mistake on the way from the sheet.
    rehearse(&["--passphrase-file", "pass"]).failed_with(2);
    let right = fs::read_to_string(machine.path("recovery")).unwrap();
    let wrong = machine.write("wrong", TestMachine::small().1);
    assert_ne!(fs::read_to_string(&wrong).unwrap(), right);
    rehearse(&["--passphrase-file", "wrong"]).failed_with(12);
    let left: Vec<_> = fs::read_dir(machine.path("cache/recovery"))
        .unwrap()
        .collect();
    assert!(left.is_empty(), "{left:?}");
    machine.nothing_is_left();
}
