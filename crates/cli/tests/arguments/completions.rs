//! Completion scripts, in the shells that they are for. Each shell runs on a terminal, as for a person.

use std::path::Path;
use std::process::Command;

use sprat_testkit::machine::TestMachine;
use sprat_testkit::{needs, program, requires};

const CONFIG: &str = r#"
[container.nas]
target = "backup@nas.invalid:x.luks"
[container.usb]
target = "/media/usb/x.luks"
[job.home]
container = ["nas", "usb"]
sources = "/home"
[job.mail]
container = "usb"
sources = "/var/mail"
"#;

const ATTEMPT: &str = r#"{"run":"a","started":"2026-11-28T01:00:00Z","ended":"2026-11-28T01:00:00Z","code":0,"snapshot":"2026-11-28T01-00-00Z"}"#;

/// A machine with a config, a snapshot in its history, the scripts, and `bin/sprat`.
fn machine() -> TestMachine {
    let machine = TestMachine::new();
    machine.write("config/sprat.toml", CONFIG);
    machine.write("state/runs/home@nas.jsonl", ATTEMPT);
    std::fs::create_dir(machine.path("bin")).unwrap();
    std::os::unix::fs::symlink(program::sprat(), machine.path("bin/sprat")).unwrap();
    for (shell, file) in [("bash", "bash"), ("zsh", "_sprat"), ("fish", "fish")] {
        let script = machine.sprat(&["completions", shell]).succeeded();
        machine.write(file, script.stdout);
    }
    machine
}

fn command(machine: &TestMachine, program: &str) -> Command {
    let mut command = machine.command_of(program);
    let bin = machine.path("bin").display().to_string();
    command.env("PATH", format!("{bin}:/usr/bin:/bin"));
    command
}

/// What is typed before the Tab key, and what the line then has.
const COMPLETED: [(&str, &str); 6] = [
    ("sprat snaps", "snapshots"),
    ("sprat snapshots u", "snapshots usb"),
    ("sprat backup ma", "backup mail"),
    ("sprat restore nas h", "nas home"),
    ("sprat restore nas home/", "home/2026-11-28T01-00-00Z"),
    ("sprat check --allow-no", "--allow-no-fsync"),
];

/// Types all of them into `shell`, which loads its script by `load`, on a terminal.
fn completes(shell: &[&str], load: &str) {
    requires!(needs::program(shell[0]), needs::program("python3"));
    let machine = machine();
    let mut dialogue = vec![("> ", load.to_owned())];
    for (typed, completed) in COMPLETED {
        dialogue.push(("> ", format!("{typed}\t")));
        // Ctrl-U empties the line.
        dialogue.push((completed, "\u{15}\n".to_owned()));
    }
    dialogue.push(("> ", "exit\n".to_owned()));
    let mut command = command(&machine, "python3");
    command.env("TERM", "dumb").env("PS1", "> ");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/terminal.py"));
    command.arg(serde_json::to_string(&dialogue).unwrap());
    let said = machine.run(command.args(shell)).succeeded().json();
    // Without its completion the dialogue waits until the shell is killed.
    assert_eq!(said["code"], 0, "{}", said["said"].as_str().unwrap());
}

#[test]
fn bash_completes_containers_jobs_and_snapshots() {
    completes(&["bash", "--norc", "--noprofile", "-i"], "source ./bash\n");
}

#[test]
fn zsh_completes_containers_jobs_and_snapshots() {
    let load = "fpath=($PWD $fpath); autoload compinit; compinit -D -u\n";
    completes(&["zsh", "-f", "-i"], load);
}

#[test]
fn fish_completes_containers_jobs_and_snapshots() {
    requires!(needs::program("fish"));
    let machine = machine();
    for (typed, completed) in COMPLETED {
        let mut fish = command(&machine, "fish");
        let asks = format!("source ./fish; complete -C '{typed}'");
        let offered = machine
            .run(fish.args(["--no-config", "-c", &asks]))
            .succeeded();
        let word = completed.rsplit(' ').next().unwrap();
        let first = offered.stdout.lines().next().unwrap_or_default();
        let first = first.split('\t').next().unwrap();
        assert_eq!(first, word, "{typed}: {}", offered.stdout);
    }
}

#[test]
fn hidden_commands_and_options_are_not_offered() {
    let machine = machine();
    for typed in [&["sprat", ""][..], &["sprat", "status", "--"]] {
        let mut sprat = command(&machine, "sprat");
        sprat.env("SPRAT_COMPLETE", "fish").arg("--").args(typed);
        let offered = machine.run(&mut sprat).succeeded().stdout;
        assert!(offered.contains("--allow-no-fsync"), "{offered}");
        for hidden in [
            "cheap-kdf",
            "state-dir",
            "volume-process",
            "mount-keeper",
            "insist",
        ] {
            assert!(!offered.contains(hidden), "{hidden}: {offered}");
        }
    }
}
