//! `-v` lists each file that a backup copies.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

use serde_json::Value;
use sprat_testkit::machine::{Ran, TestMachine};
use sprat_testkit::{needs, requires};

/// The lines about files, without the folder of the machine.
fn listed(machine: &TestMachine, ran: &Ran) -> Vec<String> {
    let source = format!("home: {}/src/", machine.folder().display());
    let lines = ran
        .stderr
        .replace("[DIR]", &machine.folder().display().to_string());
    let mut listed: Vec<String> = lines
        .lines()
        .filter_map(|line| line.strip_prefix(&source))
        .map(str::to_owned)
        .collect();
    listed.sort_unstable();
    listed
}

#[test]
fn verbose_backup_lists_each_copied_file_and_no_name_reaches_the_terminal_raw() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let odd = OsStr::from_bytes(b"new\nline \x1b[2J \xff \xc3\xa4 \xe2\x80\xae");
    fs::write(machine.path("src").join(odd), "odd").unwrap();
    let ran = machine.backup(&["-v"]).succeeded();
    let odd = r"new\#012line \#033[2J \#377 ä \u{202e}";
    assert_eq!(
        listed(&machine, &ran),
        ["a", odd, "sub/b"],
        "{}",
        ran.whole()
    );
    assert!(!ran.stderr.contains('\x1b'));

    // Unchanged files are linked, not copied.
    machine.write("src/sub/b", "beta, changed\n");
    let ran = machine.backup(&["-v"]).succeeded();
    assert_eq!(listed(&machine, &ran), ["sub/b"]);
    machine.write("src/a", "alpha, changed\n");
    let ran = machine.backup(&[]).succeeded();
    assert_eq!(listed(&machine, &ran), [""; 0]);

    // With --json each line is JSON.
    machine.write("src/a", "alpha, changed again\n");
    let ran = machine.backup(&["-v", "--json"]).succeeded();
    let events = ran.stderr.lines().map(|line| {
        let event: Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        event
    });
    let copied: Vec<Value> = events.filter(|event| event["copied"].is_string()).collect();
    assert_eq!(copied.len(), 1, "{}", ran.whole());
    let path = copied[0]["copied"].as_str().unwrap();
    assert!(path.ends_with("/src/a") && !path.starts_with('/'), "{path}");
    assert_eq!(copied[0]["about"], "home:");
    machine.nothing_is_left();
}
