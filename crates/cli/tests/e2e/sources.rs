//! What comes from no folder: the output of commands, and the state of the system.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use sprat_testkit::machine::{Ran, TestMachine};
use sprat_testkit::ssh_server::{SshServer, openssh};
use sprat_testkit::{needs, requires};

/// A machine with a config of these jobs in one container.
fn with_jobs(jobs: &str) -> TestMachine {
    let machine = TestMachine::new();
    write_jobs(&machine, jobs);
    machine.init(&["disk", "--size", "1G"]);
    machine
}

fn write_jobs(machine: &TestMachine, jobs: &str) {
    let folder = machine.folder().display().to_string();
    let target = format!("[container.disk]\ntarget = \"{folder}/store/x.luks\"\n\n");
    machine.write(
        "config/sprat.toml",
        target + &jobs.replace("[DIR]", &folder),
    );
}

fn record(ran: &Ran) -> serde_json::Value {
    ran.json()["jobs"][0]["record"].clone()
}

#[test]
fn a_dump_counts_only_if_its_whole_pipeline_succeeds() {
    requires!(needs::root());
    let job = |command: &str| {
        format!(
            "[job.db]\ncontainer = \"disk\"\nfile = \"dump.sql\"\ncommand_timeout = \"2 s\"\ncommand = {command}\n"
        )
    };
    let machine = with_jobs(&job(r#"["cat [DIR]/db", "tr a-z A-Z"]"#));
    machine.write("db", "rows\n");
    let first = machine.ok(&["backup", "--json"]);
    assert_eq!(record(&first)["stats"]["transferred"], 1);
    // Equal content is linked, not stored again.
    let second = machine.ok(&["backup", "--json"]);
    assert_eq!(record(&second)["stats"]["transferred"], 0);
    assert_eq!(record(&second)["staged"], record(&first)["staged"]);
    for (command, why) in [
        (r#"["sh -c 'echo part; exit 3'", "cat"]"#, "exit status: 3"),
        (r#"["echo part", "sh -c 'cat; exit 4'"]"#, "exit status: 4"),
        // The first stage gets SIGPIPE.
        (r#"["yes", "head -n 1"]"#, "signal: 13"),
        (r#"["no-such-program-here"]"#, "no such program"),
        (r#"["true"]"#, "the command wrote nothing"),
        (r#"["sh -c 'echo part; sleep 60'"]"#, "took too long"),
        (r#"["sh -c 'echo the reason >&2; exit 1'"]"#, "the reason"),
    ] {
        write_jobs(&machine, &job(command));
        let ran = machine.sprat(&["backup"]);
        let text = ran.failed_with(1);
        assert!(text.contains(why), "{command}: {text}");
    }
    let listed = machine.ok(&["snapshots", "disk", "--json"]);
    assert_eq!(listed.json()["snapshots"].as_array().unwrap().len(), 2);
    let out = machine.path("out");
    machine.ok(&["restore", "disk", "db", "--to", "out"]);
    let dump = out.join("@dump/dump.sql");
    assert_eq!(fs::read(&dump).unwrap(), b"ROWS\n");
    assert_eq!(
        fs::metadata(&dump).unwrap().permissions().mode() & 0o7777,
        0o600
    );
    assert_eq!(fs::read_dir(out.join("@dump")).unwrap().count(), 1);
    let refused = machine.sprat(&["restore", "disk", "db", "--to", "/"]);
    assert!(
        refused.stderr.contains("Restore it to another folder"),
        "{}",
        refused.whole()
    );
    // With sources beside it; an empty dump is accepted only where that is said.
    let both = job(r#"["true"]"#) + "sources = \"[DIR]/src\"\nallow_empty = true\n";
    write_jobs(&machine, &both);
    machine.write("src/file", "of a source");
    machine.ok(&["backup"]);
    machine.ok(&["restore", "disk", "db", "--to", "both"]);
    assert_eq!(fs::read(machine.path("both/@dump/dump.sql")).unwrap(), b"");
    let source = machine.path("src/file");
    let restored = machine.path("both").join(source.strip_prefix("/").unwrap());
    assert_eq!(fs::read(restored).unwrap(), b"of a source");
    machine.nothing_is_left();
}

#[test]
fn system_state_is_saved_and_missing_tools_are_notes() {
    requires!(needs::root());
    let machine = with_jobs("[job.state]\ncontainer = \"disk\"\nsystem_state = true\n");
    let first = machine.ok(&["backup", "--json"]);
    machine.ok(&["restore", "disk", "state", "--to", "out"]);
    let system = machine.path("out/@system");
    let read = |name: &str| fs::read_to_string(system.join(name)).unwrap();
    assert!(read("kernel.txt").starts_with("Linux"));
    assert!(read("files/etc/os-release").contains("NAME="));
    // No machine has all of these package managers.
    assert!(read("notes.txt").contains("packages/"));
    // What did not change is linked.
    let second = machine.ok(&["backup", "--json"]);
    let count = |ran: &Ran| record(ran)["stats"]["transferred"].as_u64().unwrap();
    assert!(
        count(&second) < count(&first) / 2,
        "{} of {}",
        count(&second),
        count(&first)
    );
    machine.nothing_is_left();
}

#[test]
fn a_dry_run_needs_no_container() {
    requires!(needs::root());
    let machine = TestMachine::new();
    write_jobs(
        &machine,
        "[job.home]\ncontainer = \"disk\"\nsources = [\"[DIR]/src\", \"[DIR]/none\"]\nexclude = \"*.iso\"\n",
    );
    machine.write("src/file", "content");
    machine.write("src/x.iso", "x");
    let ran = machine.sprat(&["backup", "--dry-run"]);
    let text = ran.failed_with(3);
    assert!(ran.stdout.contains("home: 1 file with 7 B"), "{text}");
    assert!(ran.stdout.contains("*.iso  [DIR]/src/x.iso"), "{text}");
    assert!(
        ran.stdout.contains("1 object can't be read:\n  [DIR]/none"),
        "{text}"
    );
    let ran = machine.sprat(&["backup", "home", "--dry-run", "--all", "--json"]);
    let json: serde_json::Value = ran.json();
    let paths = json["jobs"][0]["preview"]["paths"].to_string();
    assert!(
        paths.contains("/src/file") && !paths.contains("x.iso"),
        "{paths}"
    );
    assert!(!machine.path("store/x.luks").exists());
    machine.nothing_is_left();
}

#[test]
fn folder_of_another_host_is_pulled() {
    requires!(needs::root());
    requires!(openssh::missing());
    let server = SshServer::start();
    let config = server.path("ssh_config").display().to_string();
    let job = |host: &str, more: &str| {
        format!("[job.web]\ncontainer = \"disk\"\nsources = [\"root@{host}:[DIR]/www\"{more}]\n")
    };
    let machine = TestMachine::new();
    let write = |job: &str| {
        let folder = machine.folder().display().to_string();
        let top = format!(
            "ssh_command = \"ssh -F {config}\"\n[container.disk]\ntarget = \"{folder}/store/x.luks\"\n\n"
        );
        machine.write("config/sprat.toml", top + &job.replace("[DIR]", &folder));
    };
    write(&job("web", ""));
    machine.init(&["disk", "--size", "1G"]);
    machine.write("www/page", "page");
    machine.ok(&["config", "check"]);
    let shown = machine.ok(&["backup", "--dry-run", "--all"]).stdout;
    assert!(shown.contains("/@web[DIR]/www/page"), "{shown}");
    let first = machine.ok(&["backup", "--json"]);
    assert_eq!(record(&first)["pulled"][0]["host"], "web");
    assert_eq!(record(&first)["complete"], true);
    let path = format!("web:/@web{}", machine.path("www").display());
    machine.ok(&["restore", "disk", &path, "--to", "out"]);
    assert_eq!(fs::read(machine.path("out/www/page")).unwrap(), b"page");
    let refused = machine.sprat(&["restore", "disk", "web", "--to", "/"]);
    assert!(
        refused.failed_with(1).contains("or another host"),
        "{}",
        refused.whole()
    );
    let doctor = || {
        let said = machine.sprat(&["doctor", "--json"]).json();
        let findings = said["findings"].as_array().unwrap().iter();
        let of_job = findings.filter(|found| found["what"] == "job web: sources");
        let states: Vec<String> = of_job
            .map(|found| format!("{}: {}", found["state"], found["detail"]))
            .collect();
        states.join("\n")
    };
    assert!(doctor().contains("\"fine\""), "{}", doctor());
    write(&job("web", ", \"root@web:[DIR]/none\""));
    let found = doctor();
    assert!(
        found.contains("\"missing\"") && found.contains("/none"),
        "{found}"
    );
    write(&job("web", ""));
    // The host shows another key.
    server.forget_host_key().unwrap();
    let found = doctor();
    assert!(found.contains("Host key verification failed"), "{found}");
    let none = machine.sprat(&["backup"]);
    assert!(
        none.failed_with(14)
            .contains("Host key verification failed"),
        "{}",
        none.whole()
    );
    machine.write("src/file", "here");
    write(&job("web", ", \"[DIR]/src\""));
    let without = machine.sprat(&["backup"]);
    let said = without.failed_with(3);
    assert!(said.contains("source root@web:"), "{said}");
    let listed = machine.ok(&["snapshots", "disk", "--json"]);
    assert_eq!(listed.json()["snapshots"].as_array().unwrap().len(), 2);
}
