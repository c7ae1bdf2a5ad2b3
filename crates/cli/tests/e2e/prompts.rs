//! Prompts on a terminal: passphrases, the yes before a header restore, a sheet's fingerprint.

use std::fs;
use std::path::Path;
use std::process::Command;

use sprat_testkit::machine::{ADD_PASSPHRASE, CHEAP, CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

const PASSPHRASE: &str = "correct horse battery staple";
const CTRL_C: &str = "\u{3}";
const CTRL_BACKSLASH: &str = "\u{1c}";

/// How a run on a terminal ended, and what was to be seen there.
pub(super) struct Seen {
    code: i64,
    pub(super) said: String,
    /// Whether the terminal echoed when each answer was typed.
    echoed: Vec<bool>,
    echoes_after: bool,
}

impl Seen {
    #[track_caller]
    pub(super) fn ended_with(&self, code: i64) -> &str {
        assert_eq!(self.code, code, "{}", self.said);
        assert!(self.echoes_after, "the terminal no longer echoes");
        &self.said
    }
}

/// Runs a program on a terminal, on which a person types each answer once its prompt is shown.
fn on_terminal(machine: &TestMachine, dialogue: &[(&str, &str)], program: &mut Command) -> Seen {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/terminal.py");
    let dialogue = serde_json::to_string(dialogue).unwrap();
    let mut command = machine.command_of("python3");
    command.arg("-S").arg(script).arg(dialogue);
    command.arg(program.get_program()).args(program.get_args());
    for (name, value) in program.get_envs() {
        value.map(|value| command.env(name, value));
    }
    let shown = machine.run(&mut command).succeeded().json();
    let echoed = shown["echoed"].as_array().unwrap().iter();
    Seen {
        code: shown["code"].as_i64().unwrap(),
        said: shown["said"].as_str().unwrap().to_owned(),
        echoed: echoed.map(|echo| echo.as_bool().unwrap()).collect(),
        echoes_after: shown["echoes_after"].as_bool().unwrap(),
    }
}

/// sprat on a terminal.
pub(super) fn talk(machine: &TestMachine, arguments: &[&str], dialogue: &[(&str, &str)]) -> Seen {
    on_terminal(machine, dialogue, machine.command().args(arguments))
}

/// A container with a passphrase and no key file, and its recovery key.
fn with_passphrase() -> (TestMachine, String) {
    let machine = TestMachine::new();
    machine.write("right", PASSPHRASE);
    let recovery = machine.init(&[CONTAINER, "--size", "64M", "--passphrase-file", "right"]);
    (machine, recovery)
}

fn missing() -> Option<String> {
    needs::root().or_else(|| needs::program("python3"))
}

const PRESENT: &str = "Passphrase or recovery key: ";
const NEW: &str = "New passphrase: ";
const AGAIN: &str = "Repeat the passphrase: ";
/// A fingerprint on the command line is not asked for, and is compared only after the key.
const UNASKED: &str = "0000-0000-0000-0000-0000";

#[test]
fn new_passphrase_is_asked_twice_and_never_echoed() {
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
    machine.ok(&["key", "rehearse", CONTAINER, "--passphrase-file", "new"]);
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
fn header_restore_shows_the_header_and_needs_a_yes() {
    requires!(missing());
    let (machine, _) = with_passphrase();
    let with = ["--passphrase-file", "right"];
    machine.ok(&[&["key", "header-backup", CONTAINER, "kept"], &with[..]].concat());
    machine.write("pass", "a passphrase of later");
    machine.ok(&[&ADD_PASSPHRASE[..], &with].concat());
    let restore = ["-q", "key", "header-restore", CONTAINER, "kept"];
    let restore = [&restore[..], &with].concat();
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    for answer in ["no\n", "y\n", "\n", CTRL_C, CTRL_BACKSLASH] {
        let seen = talk(&machine, &restore, &[("Type yes to restore it: ", answer)]);
        let said = seen.ended_with(130);
        assert!(said.contains("slot 2 GOES AWAY"), "{said}");
        assert!(
            before == fs::read(machine.path(CONTAINER)).unwrap(),
            "{answer:?}"
        );
    }
    let seen = talk(&machine, &restore, &[("Type yes to restore it: ", "yes\n")]);
    seen.ended_with(0);
    let ran = machine.sprat(&["key", "rehearse", CONTAINER, "--passphrase-file", "pass"]);
    assert_eq!(ran.code, 12, "{}", ran.whole());
}

#[test]
fn rehearsal_compares_the_typed_fingerprint() {
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
            seen.ended_with(0).contains("file system in it can be read"),
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
        said.contains("Compare the given fingerprint with the sheet"),
        "{said}"
    );
}

#[test]
fn mistyped_recovery_key_differs_from_a_wrong_one() {
    requires!(missing());
    let (machine, recovery) = with_passphrase();
    let ask = "Fingerprint on the sheet: ";
    for (typed, told) in [
        (recovery[1..].to_owned(), "this one has 39"),
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
        assert!(!seen.said.contains("to a file"), "{}", seen.said);
        // The same where the volume process tries it.
        let seen = talk(&machine, &["snapshots", CONTAINER], &[(PRESENT, &typed)]);
        assert!(seen.ended_with(12).contains(told), "{}", seen.said);
    }
    let wrong = [(ask, "\n"), (PRESENT, "quite another passphrase\n")];
    let seen = talk(&machine, &["key", "rehearse", CONTAINER], &wrong);
    let said = seen.ended_with(12);
    assert!(!said.contains("meant to be a recovery key"), "{said}");
}

#[test]
fn another_answer_than_yes_removes_no_snapshot_and_is_no_interrupt() {
    requires!(missing());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "64M"]);
    machine.write("src/a", "a");
    machine.backup(&[]).succeeded();
    let remove = ["-q", "remove", CONTAINER, "home/2", "--allow-newest"];
    for (answer, code) in [("n\n", 1), ("y\n", 1), (CTRL_C, 130)] {
        let seen = talk(&machine, &remove, &[("Type yes to remove: ", answer)]);
        let said = seen.ended_with(code);
        assert_eq!(said.contains("nothing was removed"), code == 1, "{said}");
        assert_eq!(said.contains("interrupted"), code == 130, "{said}");
    }
    let listed = machine.ok(&["snapshots", CONTAINER]).stdout;
    assert!(listed.contains("latest"), "{listed}");
}

const CTRL_Z: &str = "\u{1a}";

/// A shell with job control on a terminal; as [`talk`].
fn talk_to_shell(machine: &TestMachine, shell: &[&str], dialogue: &[(&str, &str)]) -> Seen {
    let mut command = machine.command_of(shell[0]);
    command
        .args(&shell[1..])
        .env("PS1", "READY> ")
        .env("SPRAT", sprat_testkit::program::sprat());
    on_terminal(machine, dialogue, &mut command)
}

#[test]
fn stop_at_a_prompt_shows_no_secret_and_leaves_a_terminal_that_echoes() {
    requires!(missing(), needs::program("bash"), needs::program("dash"));
    let (machine, _) = with_passphrase();
    let rehearse = format!(
        "\"$SPRAT\" key rehearse {CONTAINER} --fingerprint \
         $(\"$SPRAT\" --json key sheet {CONTAINER} --without-secret | grep -o '....-....-....-....-....' | head -n1)\n"
    );
    let right = format!("{PASSPHRASE}\n");
    let half = format!("corr{CTRL_Z}");
    let state = "stty -a | grep -o '[-]*echo ' | head -n1\n";
    for shell in [
        &["bash", "--norc", "--noprofile", "-i"][..],
        &["dash", "-i"],
    ] {
        let seen = talk_to_shell(
            &machine,
            shell,
            &[
                ("READY> ", &rehearse),
                (PRESENT, &half),
                ("READY> ", state),
                ("READY> ", "bg; sleep 3\n"),
                ("READY> ", "fg\n"),
                (PRESENT, CTRL_Z),
                ("READY> ", "fg\n"),
                (PRESENT, &right),
                ("READY> ", state),
                ("READY> ", "exit\n"),
            ],
        );
        let said = seen.ended_with(0);
        assert!(said.contains("file system in it can be read"), "{said}");
        assert!(!said.contains("corr") && !said.contains("horse"), "{said}");
        assert_eq!(said.matches("\necho \n").count(), 2, "{said}");
        for at in [1, 5, 7] {
            assert!(!seen.echoed[at], "{shell:?}: answer {at}: {said}");
        }
    }
}

const FINGERPRINT: &str = "Fingerprint on the sheet: ";
const YES: &str = "Type yes to restore it: ";

/// What is shown, what is typed then, and whether that is a secret.
type Asked<'a> = (&'static str, &'a str, bool);

/// The commands that ask, each with all that it asks.
fn all_prompts(recovery: &str) -> Vec<(String, Vec<Asked<'_>>)> {
    vec![
        (
            format!("key add {CONTAINER} --new-passphrase {CHEAP}"),
            vec![
                (PRESENT, PASSPHRASE, true),
                (NEW, "another horse altogether", true),
                (AGAIN, "another horse altogether", true),
            ],
        ),
        (
            format!("key rehearse {CONTAINER}"),
            vec![(FINGERPRINT, "", false), (PRESENT, recovery, true)],
        ),
        (
            format!("-q key header-restore {CONTAINER} kept --passphrase-file right"),
            vec![(YES, "yes", false)],
        ),
    ]
}

fn with_all_prompts() -> (TestMachine, String) {
    let (machine, recovery) = with_passphrase();
    let backup = [
        "key",
        "header-backup",
        CONTAINER,
        "kept",
        "--passphrase-file",
        "right",
    ];
    machine.ok(&backup);
    (machine, recovery)
}

#[test]
fn stop_at_each_prompt_shows_no_secret_and_continues() {
    requires!(missing(), needs::program("bash"), needs::program("dash"));
    let state = "stty -a | grep -o '[-]*echo ' | head -n1\n";
    for shell in [
        &["bash", "--norc", "--noprofile", "-i"][..],
        &["dash", "-i"],
    ] {
        let (machine, recovery) = with_all_prompts();
        for (command, prompts) in all_prompts(&recovery) {
            let begin = format!("\"$SPRAT\" {command}\n");
            let typed: Vec<(&str, String, bool)> = prompts
                .iter()
                .map(|(prompt, answer, secret)| (*prompt, format!("{answer}\n"), *secret))
                .collect();
            let halves: Vec<String> = prompts
                .iter()
                .map(|(_, answer, _)| format!("{}{CTRL_Z}", &answer[..answer.len() / 2]))
                .collect();
            let mut dialogue = vec![("READY> ", begin.as_str())];
            let mut silent = Vec::new();
            for ((prompt, answer, secret), half) in typed.iter().zip(&halves) {
                for answer in [half, answer] {
                    if *secret {
                        silent.push(dialogue.len());
                    }
                    dialogue.push((prompt, answer));
                    if answer == half {
                        dialogue.extend([("READY> ", state), ("READY> ", "fg\n")]);
                    }
                }
            }
            dialogue.extend([
                ("READY> ", "echo it ended with $?\n"),
                ("READY> ", state),
                ("READY> ", "exit\n"),
            ]);
            let seen = talk_to_shell(&machine, shell, &dialogue);
            let said = seen.ended_with(0);
            assert!(
                said.contains("it ended with 0"),
                "{shell:?} {command}: {said}"
            );
            for (_, answer, secret) in &prompts {
                let half = &answer[..answer.len() / 2];
                assert!(
                    !secret || !said.contains(half),
                    "{shell:?} {command}: {said}"
                );
            }
            let echoing = said.matches("\necho \n").count();
            assert_eq!(echoing, prompts.len() + 1, "{shell:?} {command}: {said}");
            for at in silent {
                assert!(!seen.echoed[at], "{shell:?} {command}, answer {at}: {said}");
            }
        }
    }
}

#[test]
fn closed_terminal_ends_the_command_and_changes_nothing() {
    requires!(missing());
    let (machine, recovery) = with_all_prompts();
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    for (command, prompts) in all_prompts(&recovery) {
        for last in 0..prompts.len() {
            let answers: Vec<(&str, String)> = prompts[..=last]
                .iter()
                .enumerate()
                .map(|(at, (prompt, answer, _))| match at == last {
                    true => (*prompt, "HANG UP".to_owned()),
                    false => (*prompt, format!("{answer}\n")),
                })
                .collect();
            let dialogue: Vec<(&str, &str)> = answers
                .iter()
                .map(|(prompt, answer)| (*prompt, answer.as_str()))
                .collect();
            let arguments: Vec<&str> = command.split(' ').collect();
            let seen = talk(&machine, &arguments, &dialogue);
            assert_eq!(seen.code, 130, "{command}, prompt {last}: {}", seen.said);
            assert!(
                before == fs::read(machine.path(CONTAINER)).unwrap(),
                "{command}, prompt {last}"
            );
        }
    }
}

#[test]
fn init_makes_no_key_for_an_existing_container() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.write("k.part", "precious");
    let init = ["init", CONTAINER, "--size", "64M", CHEAP, "--key-file", "k"];
    machine.ok(&init);
    assert_eq!(fs::read(machine.path("k.part")).unwrap(), b"precious");
    // The key file is lost: another one would only hide that.
    fs::remove_file(machine.path("k")).unwrap();
    let ran = machine.sprat(&init);
    assert!(
        ran.failed_with(1).contains("exists already"),
        "{}",
        ran.whole()
    );
    assert!(!machine.path("k").exists());
}

#[test]
fn last_key_that_is_no_file_is_removed_only_after_a_warning() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "64M"]);
    let remove = ["key", "remove", CONTAINER, "1"];
    let ran = machine.sprat(&remove);
    assert!(
        ran.failed_with(2)
            .contains("the only key that is not a file"),
        "{}",
        ran.whole()
    );
    machine.write("pass", "correct horse battery");
    let add = ["key", "add", CONTAINER, CHEAP];
    machine.ok(&[&add[..], &["--new-passphrase-file", "pass"]].concat());
    let ran = machine.sprat(&remove);
    assert!(
        ran.failed_with(2).contains("the only recovery key"),
        "{}",
        ran.whole()
    );
    // The same on a machine that knows nothing of the slots: the other one may be a recovery key.
    machine.ok(&[&remove[..], &["--allow-last"]].concat());
    let ran = machine.sprat(&["key", "remove", CONTAINER, "2"]);
    assert!(
        ran.failed_with(2)
            .contains("the only key that is not a file"),
        "{}",
        ran.whole()
    );
}

#[test]
fn secret_is_in_no_message_about_a_failed_send() {
    use std::os::unix::ffi::OsStrExt;
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.write("pass", "\"my secret passphrase\"");
    let folder = machine
        .folder()
        .join(std::ffi::OsStr::from_bytes(b"caf\xe9"));
    fs::create_dir(&folder).unwrap();
    let mut command = machine.command();
    command
        .current_dir(&folder)
        .arg("--passphrase-file")
        .arg(machine.path("pass"));
    let init = ["init", "x.luks", "--size", "64M", CHEAP];
    let ran = machine.run(command.args(init));
    assert_ne!(ran.code, 0, "{}", ran.whole());
    assert!(!ran.stderr.contains("my secret"), "{}", ran.whole());
}

#[test]
fn new_passphrase_that_cannot_be_typed_is_refused() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "64M"]);
    let add = [
        "key",
        "add",
        CONTAINER,
        CHEAP,
        "--new-passphrase-file",
        "new",
    ];
    for (content, told) in [
        ("\u{feff}correct horse battery\n", "byte order mark"),
        ("correct horse\u{3} battery\n", "control character"),
        ("correct horse\u{0} battery\n", "control character"),
        ("correct horse battery\r\n", "carriage return"),
    ] {
        machine.write("new", content);
        let ran = machine.sprat(&add);
        assert!(ran.failed_with(2).contains(told), "{}", ran.whole());
    }
    // Forty letters that could be a mistyped recovery key are a passphrase as well.
    machine.write("new", "a".repeat(40));
    machine.ok(&add);
    let rehearse = ["key", "rehearse", CONTAINER, "--passphrase-file"];
    machine.ok(&[&rehearse[..], &["new"]].concat());
    machine.write("wrong", "b".repeat(12) + "\r\n");
    let ran = machine.sprat(&[&rehearse[..], &["wrong"]].concat());
    assert!(
        ran.failed_with(12).contains("carriage return"),
        "{}",
        ran.whole()
    );
}

#[test]
fn secret_files_open_to_others_warn_and_fifos_do_not_block() {
    use std::os::unix::fs::PermissionsExt;
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "64M", "--key-file", "k"]);
    let rehearse = ["key", "rehearse", CONTAINER, "--key-file", "k"];
    let ran = machine.sprat(&rehearse);
    assert!(
        ran.code == 0 && !ran.stderr.contains("others"),
        "{}",
        ran.whole()
    );
    std::os::unix::fs::chown(machine.path("k"), Some(65534), None).unwrap();
    let ran = machine.sprat(&rehearse);
    assert!(
        ran.stderr.contains("belongs to another user"),
        "{}",
        ran.whole()
    );
    machine.write("typed", "not the passphrase");
    fs::set_permissions(machine.path("typed"), PermissionsExt::from_mode(0o666)).unwrap();
    let wrong = ["key", "rehearse", CONTAINER, "--passphrase-file", "typed"];
    let ran = machine.sprat(&wrong);
    assert!(
        ran.failed_with(12).contains("can be read by other users"),
        "{}",
        ran.whole()
    );
    assert!(
        ran.stderr.contains("others can write to it"),
        "{}",
        ran.whole()
    );
    // What is no regular file is refused at once.
    let made = Command::new("mkfifo").arg(machine.path("fifo")).status();
    assert!(made.unwrap().success());
    for option in ["--key-file", "--passphrase-file"] {
        let ran = machine.sprat(&["key", "rehearse", CONTAINER, option, "fifo"]);
        assert!(
            ran.failed_with(2).contains("not a regular file"),
            "{}",
            ran.whole()
        );
    }
    let ran = machine.sprat(&["key", "header-restore", CONTAINER, "fifo", "--yes"]);
    assert_ne!(ran.code, 0);
    assert!(ran.stderr.contains("not a regular file"), "{}", ran.whole());
    let ran = machine.sprat(&["--config", "fifo", "status"]);
    assert!(
        ran.failed_with(2).contains("not a regular file"),
        "{}",
        ran.whole()
    );
    // A config in a folder where another user could replace it names commands that root would run.
    machine.write("config/sprat.toml", "");
    fs::set_permissions(machine.path("config"), PermissionsExt::from_mode(0o777)).unwrap();
    let ran = machine.sprat(&["status"]);
    assert!(ran.failed_with(2).contains("replace it"), "{}", ran.whole());
}

#[test]
fn mount_where_others_can_enter_is_refused_unless_allowed() {
    use std::os::unix::fs::PermissionsExt;
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "64M"]);
    fs::create_dir(machine.path("mnt")).unwrap();
    fs::set_permissions(machine.folder(), PermissionsExt::from_mode(0o755)).unwrap();
    let mount = ["mount", CONTAINER, "mnt"];
    let ran = machine.sprat(&mount);
    assert!(
        ran.failed_with(2).contains("--allow-other"),
        "{}",
        ran.whole()
    );
    machine.ok(&[&mount[..], &["--allow-other"]].concat());
    machine.ok(&["umount", "mnt"]);
    fs::set_permissions(machine.folder(), PermissionsExt::from_mode(0o700)).unwrap();
    machine.ok(&mount);
    machine.ok(&["umount", "mnt"]);
}
