//! `sprat schedule` and what it promises: sprat works with the environment that cron and systemd give it.

use std::process::Command;

use sprat_testkit::machine::TestMachine;
use sprat_testkit::{needs, requires};

/// Hides this machine's /etc and /run/systemd behind empty ones, so that the schedule is cron's.
const WITH_CRON_ONLY: &str = "mount -t tmpfs none /run/systemd 2>/dev/null; mount -t tmpfs none /etc; \
                              mkdir /etc/cron.d; exec \"$@\"";

fn commands(machine: &TestMachine, script: &str) -> sprat_testkit::machine::Ran {
    let outer = ["unshare", "--mount", "sh", "-c", WITH_CRON_ONLY, "sh"];
    let sprat = sprat_testkit::program::sprat();
    let script = script.replace("sprat ", &format!("{} ", sprat.display()));
    let mut command = machine.command_of(outer[0]);
    command.args(&outer[1..]).args(["sh", "-c", &script]);
    machine.run(&mut command)
}

#[test]
fn schedule_is_installed_shown_and_removed() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let ran = commands(
        &machine,
        "sprat schedule install; cat /etc/cron.d/sprat; sprat schedule install
         sprat schedule show --json; stat -c %a:%u /etc/cron.d/sprat
         sprat schedule remove; ls /etc/cron.d; sprat schedule remove; sprat schedule show",
    )
    .succeeded();
    let said = &ran.stdout;
    for part in [
        "wrote /etc/cron.d/sprat\n",
        " run --scheduled -q\n",
        "nothing to do: the schedule is installed\n",
        r#""command":"schedule show""#,
        r#""scheduler":"cron""#,
        r#""state":"unchanged""#,
        "644:0\n",
        "deleted /etc/cron.d/sprat\n",
        "nothing to do: the schedule is not there\n",
        "NOTHING starts sprat",
    ] {
        assert!(said.contains(part), "{part}: {}", ran.whole());
    }
    // There is no cron daemon here: it must not seem as if something started sprat.
    let starts = said.contains("cron starts `sprat run` every 15 minutes now");
    let warned = ran
        .stderr
        .contains("NOTHING starts sprat: no cron daemon runs");
    assert_ne!(starts, warned, "{}", ran.whole());
    // Nothing would ever be backed up.
    let warning = "warning: there is no config /etc/sprat/sprat.toml";
    assert!(ran.stderr.contains(warning), "{}", ran.whole());
}

#[test]
fn install_needs_root_and_print_does_not() {
    let machine = TestMachine::new();
    let printed = machine.sprat_as_nobody(&["schedule", "install", "--print"]);
    assert_eq!(printed.code, 0, "{}", printed.whole());
    assert!(printed.stdout.contains(" run --scheduled -q\n"));
    assert!(printed.stdout.contains(" status --alert --offline -q\n"));
    let shown = machine.sprat_as_nobody(&["schedule", "show"]);
    assert_eq!(shown.code, 0, "{}", shown.whole());
    for command in ["install", "remove"] {
        let refused = machine.sprat_as_nobody(&["schedule", command]);
        let said = refused.failed_with(2);
        assert!(said.contains("must be run as root"), "{said}");
        let with_config = ["--config", "other.toml", "schedule", command];
        machine.sprat(&with_config).failed_with(2);
    }
}

#[test]
fn backup_works_with_the_path_of_cron_and_without_home() {
    requires!(needs::root(), needs::devices());
    let machine = TestMachine::with_container();
    let mut command: Command = machine.command();
    command.env("PATH", "/usr/bin:/bin").env_remove("HOME");
    let arguments = ["backup", "store/x.luks", "--name", "home", "src", "-q"];
    let ran = machine.run(command.args(arguments)).succeeded();
    // cron mails what is printed, every day.
    assert!(ran.stderr.is_empty(), "{}", ran.whole());
    machine.restores_whole(&[]);
    let mut check = machine.command();
    check.env("PATH", "/usr/bin:/bin").env_remove("HOME");
    let ran = machine.run(check.args(["check", "store/x.luks"]));
    ran.succeeded();
    machine.nothing_is_left();
}

/// The account says where it is: systemd sets no HOME.
#[test]
fn config_may_name_paths_in_the_home_folder_without_home_being_set() {
    let machine = TestMachine::new();
    machine.write(
        "config/sprat.toml",
        "[container.a]\ntarget = \"/nowhere/a.luks\"\nkey_file = \"~/a.key\"\n",
    );
    let mut command = machine.command();
    command.env_remove("HOME").args(["status", "a"]);
    let ran = machine.run(&mut command);
    assert!(!ran.whole().contains("key_file"), "{}", ran.whole());
}
