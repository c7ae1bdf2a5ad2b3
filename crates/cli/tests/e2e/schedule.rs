//! sprat works with the environment that cron and systemd give it.

use std::process::Command;

use sprat_testkit::machine::TestMachine;
use sprat_testkit::{needs, requires};

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
