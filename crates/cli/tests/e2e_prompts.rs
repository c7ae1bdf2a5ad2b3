//! What is asked on a terminal: passphrases, the yes before a header goes back, a sheet's fingerprint.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;

use std::fs;
use std::path::Path;

use machine::{CONTAINER, Machine};
use sprat_testkit::{needs, requires};

const PASSPHRASE: &str = "correct horse battery staple";
const CHEAP: &str = "--cheap-kdf-for-tests";
const CTRL_C: &str = "\u{3}";
const CTRL_BACKSLASH: &str = "\u{1c}";

/// How a run on a terminal ended, and what was to be seen there.
struct Seen {
    code: i64,
    said: String,
    /// Whether the terminal echoed when each answer was typed.
    echoed: Vec<bool>,
    echoes_after: bool,
}

impl Seen {
    #[track_caller]
    fn ended_with(&self, code: i64) -> &str {
        assert_eq!(self.code, code, "{}", self.said);
        assert!(self.echoes_after, "the terminal no longer echoes");
        &self.said
    }
}

/// sprat with a person before it, who types each answer once its prompt is shown.
fn talk(machine: &Machine, arguments: &[&str], dialogue: &[(&str, &str)]) -> Seen {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/machine/terminal.py");
    let dialogue = serde_json::to_string(dialogue).unwrap();
    let outer = ["python3", "-S", script.to_str().unwrap(), &dialogue];
    let ran = machine.sprat_under(&outer, arguments);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let told = ran.json();
    let echoed = told["echoed"].as_array().unwrap().iter();
    Seen {
        code: told["code"].as_i64().unwrap(),
        said: told["said"].as_str().unwrap().to_owned(),
        echoed: echoed.map(|echo| echo.as_bool().unwrap()).collect(),
        echoes_after: told["echoes_after"].as_bool().unwrap(),
    }
}

/// A container with a passphrase and no key file, and its recovery key.
fn with_passphrase() -> (Machine, String) {
    let machine = Machine::new();
    machine.write("right", PASSPHRASE);
    let recovery = machine.init(&[CONTAINER, "--size", "64M", "--passphrase-file", "right"]);
    (machine, recovery)
}

fn missing() -> Option<String> {
    needs::root().or_else(|| needs::program("python3"))
}

const PRESENT: &str = "Passphrase or recovery key: ";
const NEW: &str = "New passphrase: ";
const AGAIN: &str = "The same again: ";
/// A fingerprint that is given is not asked for, and looked at after the key only.
const UNASKED: &str = "0000-0000-0000-0000-0000";

#[test]
fn a_new_passphrase_is_asked_for_twice_by_its_own_name_and_never_echoed() {
    requires!(missing());
    let (machine, _) = with_passphrase();
    let add = ["key", "add", CONTAINER, "--new-passphrase", CHEAP];
    let new = "another horse altogether";
    let answers = |new: &'static str, again: &'static str| {
        [
            (PRESENT, "correct horse battery staple\n"),
            (NEW, new),
            (AGAIN, again),
        ]
    };
    let seen = talk(
        &machine,
        &add,
        &answers("one long passphrase\n", "another\n"),
    );
    assert!(seen.ended_with(2).contains("differ"), "{}", seen.said);
    let seen = talk(&machine, &add, &answers("too short\n", "too short\n"));
    assert!(seen.ended_with(2).contains("too short"), "{}", seen.said);
    let typed = "another horse altogether\n";
    let seen = talk(&machine, &add, &answers(typed, typed));
    assert!(seen.ended_with(0).contains("key slot 2"), "{}", seen.said);
    assert_eq!(seen.echoed, [false; 3]);
    assert!(!seen.said.contains("horse"), "{}", seen.said);
    machine.write("new", new);
    let ran = machine.sprat(&["key", "rehearse", CONTAINER, "--passphrase-file", "new"]);
    assert_eq!(ran.code, 0, "{}", ran.whole());
}

#[test]
fn a_prompt_that_is_interrupted_leaves_a_terminal_that_echoes() {
    requires!(missing());
    let (machine, _) = with_passphrase();
    for typed in [CTRL_C, CTRL_BACKSLASH, "half of it\u{3}"] {
        let seen = talk(
            &machine,
            &["key", "rehearse", CONTAINER, "--fingerprint", UNASKED],
            &[(PRESENT, typed)],
        );
        seen.ended_with(130);
        assert_eq!(seen.echoed, [false], "{typed:?}");
        let add = ["key", "add", CONTAINER, "--new-passphrase", CHEAP];
        let right = format!("{PASSPHRASE}\n");
        let seen = talk(&machine, &add, &[(PRESENT, &right), (NEW, typed)]);
        seen.ended_with(130);
    }
}

#[test]
fn a_header_goes_back_after_a_yes_and_nothing_else_and_is_shown_before() {
    requires!(missing());
    let (machine, _) = with_passphrase();
    let with = ["--passphrase-file", "right"];
    let ran = machine.sprat(&[&["key", "header-backup", CONTAINER, "kept"], &with[..]].concat());
    assert_eq!(ran.code, 0, "{}", ran.whole());
    machine.write("later", "a passphrase of later");
    let add = [
        "key",
        "add",
        CONTAINER,
        CHEAP,
        "--new-passphrase-file",
        "later",
    ];
    assert_eq!(machine.sprat(&[&add[..], &with].concat()).code, 0);
    let restore = ["-q", "key", "header-restore", CONTAINER, "kept"];
    let restore = [&restore[..], &with].concat();
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    for answer in ["no\n", "y\n", "\n", CTRL_C, CTRL_BACKSLASH] {
        let seen = talk(&machine, &restore, &[("Type yes to put it back: ", answer)]);
        let said = seen.ended_with(130);
        assert!(said.contains("slot 2 GOES AWAY"), "{said}");
        assert!(
            before == fs::read(machine.path(CONTAINER)).unwrap(),
            "{answer:?}"
        );
    }
    let seen = talk(
        &machine,
        &restore,
        &[("Type yes to put it back: ", "yes\n")],
    );
    seen.ended_with(0);
    let ran = machine.sprat(&["key", "rehearse", CONTAINER, "--passphrase-file", "later"]);
    assert_eq!(ran.code, 12, "{}", ran.whole());
}

#[test]
fn a_rehearsal_on_a_terminal_compares_the_fingerprint_that_is_typed() {
    requires!(missing());
    let (machine, recovery) = with_passphrase();
    let list = machine.sprat(&["key", "sheet", CONTAINER, "--without-secret", "--json"]);
    let fingerprint = list.json()["fingerprint"].as_str().unwrap().to_owned();
    let ask = "Fingerprint on the sheet: ";
    let rehearse = ["key", "rehearse", CONTAINER];
    let key = format!("{recovery}\n");
    for typed in [
        format!("{fingerprint}\n"),
        fingerprint.to_lowercase() + "\n",
        "\n".to_owned(),
    ] {
        let seen = talk(&machine, &rehearse, &[(ask, &typed), (PRESENT, &key)]);
        assert!(
            seen.ended_with(0).contains("file system behind it reads"),
            "{}",
            seen.said
        );
        assert_eq!(seen.echoed, [true, false]);
    }
    let wrong = fingerprint.replace(|c: char| c.is_ascii_digit(), "A") + "\n";
    let seen = talk(&machine, &rehearse, &[(ask, &wrong), (PRESENT, &key)]);
    let said = seen.ended_with(13);
    assert!(said.contains("not this container's fingerprint"), "{said}");
    assert!(
        said.contains(&fingerprint) && !said.contains("Somebody"),
        "{said}"
    );
    // On a machine that knows nothing of it, it may be the server's doing.
    fs::remove_dir_all(machine.path("state/containers")).unwrap();
    let seen = talk(&machine, &rehearse, &[(ask, &wrong), (PRESENT, &key)]);
    let said = seen.ended_with(13);
    assert!(
        said.contains("Compare what was typed with the sheet"),
        "{said}"
    );
}

#[test]
fn a_recovery_key_that_is_mistyped_is_told_from_a_wrong_one() {
    requires!(missing());
    let (machine, recovery) = with_passphrase();
    let ask = "Fingerprint on the sheet: ";
    for (typed, told) in [
        (recovery[1..].to_owned(), "these are 39"),
        (
            format!("{}0{}", &recovery[..11], &recovery[12..]),
            "group 3",
        ),
    ] {
        let typed = typed + "\n";
        let seen = talk(
            &machine,
            &["key", "rehearse", CONTAINER],
            &[(ask, "\n"), (PRESENT, &typed)],
        );
        assert!(seen.ended_with(12).contains(told), "{}", seen.said);
        // The same where the volume process tries it.
        let seen = talk(&machine, &["snapshots", CONTAINER], &[(PRESENT, &typed)]);
        assert!(seen.ended_with(12).contains(told), "{}", seen.said);
    }
    let wrong = [(ask, "\n"), (PRESENT, "quite another passphrase\n")];
    let seen = talk(&machine, &["key", "rehearse", CONTAINER], &wrong);
    let said = seen.ended_with(12);
    assert!(!said.contains("meant to be a recovery key"), "{said}");
}
