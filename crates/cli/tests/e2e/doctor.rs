//! `sprat doctor` as people run it: what it checks, and what it reports as missing.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sprat_testkit::machine::TestMachine;

#[test]
fn doctor_reports_what_is_missing_and_needs_no_root() {
    let machine = TestMachine::new();
    machine.write(
        "config/sprat.toml",
        "[container.x]\ntarget = \"/nowhere/x.luks\"\n",
    );
    let ran = machine.sprat(&["doctor", "x", "--json"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    let said: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let findings = said["findings"].as_array().unwrap();
    let of = |what: &str| {
        let found = findings.iter().find(|found| found["what"] == what);
        found.unwrap_or_else(|| panic!("{what} in {said}")).clone()
    };
    assert_eq!(of("rsync")["state"], "fine");
    assert_eq!(of("ssh")["state"], "fine");
    assert_eq!(of("config")["state"], "fine");
    assert_eq!(of("x: server")["state"], "missing");
    // Without a TARGET it checks every container of the config, and the needs of its jobs.
    machine.write(
        "config/sprat.toml",
        "[container.x]\ntarget = \"/nowhere/x.luks\"\nkey_file = \"/nowhere/x.key\"\n\
         [job.j]\ncontainer = \"x\"\nsources = [\"/nowhere/source\", \"/etc\"]\n",
    );
    let ran = machine.sprat(&["doctor"]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    for (what, detail) in [
        ("x: key", "/nowhere/x.key: No such file"),
        ("x: server", "open folder /nowhere: not found"),
        ("job j: sources", "/nowhere/source: No such file"),
    ] {
        let told =
            |line: &str| line.starts_with(&format!("MISSING  {what}  ")) && line.contains(detail);
        assert!(ran.stdout.lines().any(told), "{what} in {}", ran.stdout);
    }
    fs::set_permissions(
        machine.path("config/sprat.toml"),
        fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    let ran = machine.sprat_as_nobody(&["doctor"]);
    assert!(ran.stdout.contains("config"), "{}", ran.whole());
}

#[test]
fn doctor_reports_programs_that_start_but_fail() {
    let machine = TestMachine::new();
    fs::create_dir(machine.path("bin")).unwrap();
    for program in ["rsync", "ssh", "e2fsck"] {
        let text =
            "#!/bin/sh\necho 'error while loading shared libraries: libx.so' >&2\nexit 127\n";
        machine.write(&format!("bin/{program}"), text);
        fs::set_permissions(
            machine.path(format!("bin/{program}")),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
    }
    let path = format!("{}:/usr/bin:/bin", machine.path("bin").display());
    let ran = machine.run(machine.command().env("PATH", path).arg("doctor"));
    assert_eq!(ran.code, 1, "{}", ran.whole());
    for (state, program) in [("MISSING", "rsync"), ("MISSING", "ssh"), ("weak", "e2fsck")] {
        let told = |line: &&str| {
            line.split_whitespace().nth(1) == Some(program) && line.contains("it starts, but fails")
        };
        let line = ran.stdout.lines().find(told);
        let line = line.unwrap_or_else(|| panic!("{program}: {}", ran.stdout));
        assert!(
            line.to_lowercase().starts_with(&state.to_lowercase()),
            "{line}"
        );
    }
}

#[test]
fn doctor_finds_an_rsync_that_ignores_link_dest() {
    let machine = TestMachine::new();
    let found = |ran: &sprat_testkit::machine::Ran| {
        let line = ran.stdout.lines().find(|line| line.contains("--link-dest"));
        line.unwrap_or_else(|| panic!("{}", ran.whole()))
            .to_lowercase()
    };
    assert!(found(&machine.sprat(&["doctor"])).starts_with("ok"));
    fs::create_dir(machine.path("bin")).unwrap();
    // As the back-ports of 2026 do: everything is copied again, and it succeeds.
    let text = "#!/bin/sh\nfor a do shift; case $a in --link-dest=*) ;; *) set -- \"$@\" \"$a\";; esac; \
                done\nPATH=/usr/local/bin:/usr/bin:/bin exec rsync \"$@\"\n";
    machine.write("bin/rsync", text);
    fs::set_permissions(machine.path("bin/rsync"), fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", machine.path("bin").display());
    let ran = machine.run(machine.command().env("PATH", path).arg("doctor"));
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(found(&ran).starts_with("missing"), "{}", ran.whole());
}

#[test]
fn doctor_reports_sources_that_a_backup_refuses() {
    let machine = TestMachine::new();
    let empty = machine.path("empty");
    fs::create_dir(&empty).unwrap();
    for (source, more, state) in [
        (empty.as_path(), "", "missing"),
        (empty.as_path(), "allow_empty = true\n", "fine"),
        (Path::new("/dev/null"), "", "missing"),
        (Path::new("/etc"), "", "fine"),
    ] {
        let source = source.display();
        machine.write(
            "config/sprat.toml",
            format!(
                "[container.x]\ntarget = \"/nowhere/x.luks\"\n\
                 [job.j]\ncontainer = \"x\"\nsources = [\"{source}\"]\n{more}"
            ),
        );
        let ran = machine.sprat(&["doctor", "--json"]);
        let said: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        let findings = said["findings"].as_array().unwrap();
        let found = findings
            .iter()
            .find(|found| found["what"] == "job j: sources");
        assert_eq!(found.unwrap()["state"], state, "{source} {more}: {said}");
    }
}
