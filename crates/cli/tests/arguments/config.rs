//! `sprat config`: errors and warnings with their lines, and the settings in effect.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use insta::assert_snapshot;
use sprat_testkit::machine::TestMachine;

/// A machine with a config in two files.
fn machine() -> TestMachine {
    let machine = TestMachine::new();
    machine.write(
        "config/sprat.toml",
        "[container.nas]\ntarget = \"host:x.luks\"\nconnections = 2\n\
         [job_defaults]\nexclude = [\"*.iso\"]\n\
         [job.home]\ncontainer = [\"nas\", \"usb\"]\nsources = [\"/home\"]\n\
         [notify]\nntfy = \"https://ntfy.sh/secret-topic\"\n",
    );
    machine.write(
        "config/conf.d/usb.toml",
        "[container.usb]\ntarget = \"/media/usb/x.luks\"\ninsist_without_fsync = true\n",
    );
    machine
}

#[test]
fn config_check_reports_warnings_and_exits_with_0() {
    let machine = machine();
    let ran = machine.sprat(&["config", "check"]);
    assert_snapshot!(ran.succeeded().stdout, @r"
    [DIR]/config/conf.d/usb.toml:3: warning: `insist_without_fsync` is the old name of `allow_no_fsync`: write `allow_no_fsync`
    no mistake: 2 containers, 1 job
    ");
    machine.write("config/keys/nas.key", "k");
    let key = machine.path("config/keys/nas.key");
    fs::set_permissions(key, fs::Permissions::from_mode(0o640)).unwrap();
    let ran = machine.sprat(&["config", "check", "--json"]).succeeded();
    let warnings = ran.json()["warnings"].to_string();
    let exposed = "other users can read [DIR]/config/keys/nas.key (mode 0640): chmod 600";
    assert!(warnings.contains(exposed), "{warnings}");
}

#[test]
fn config_check_reports_every_mistake_and_what_it_stops() {
    let machine = machine();
    machine.write(
        "config/conf.d/z.toml",
        "[job.www]\ncontainer = \"nsa\"\nsources = \"/srv\"\nevery = \"5m\"\n[job.home]\n",
    );
    let ran = machine.sprat(&["config", "check"]);
    assert_snapshot!(ran.failed_with(2), @r#"
    exit 2
    --- stdout
    [DIR]/config/conf.d/z.toml:2: there is no [container.nsa]; did you mean "nas"?
    [DIR]/config/conf.d/z.toml:4: `every`: "5m": `m` could be minutes or months; did you mean "5 min"?
    [DIR]/config/conf.d/z.toml:5: [job.home] is also in [DIR]/config/sprat.toml:6
    [DIR]/config/conf.d/usb.toml:3: warning: `insist_without_fsync` is the old name of `allow_no_fsync`: write `allow_no_fsync`
    3 mistakes
    "#);
    let said = machine.sprat(&["config", "check", "--json"]).json();
    assert_eq!(said["result"]["code"], 2);
    assert_eq!(said["mistakes"][0]["stops"], "job www");
    assert_eq!(said["mistakes"][0]["likely"], "nas");
    // Files that are named are checked alone.
    machine.ok(&["config", "check", "config/conf.d/usb.toml"]);
    // So is the one of --config: a job in it names a container of the other file.
    let alone = machine.sprat(&["--config", "config/sprat.toml", "config", "check"]);
    let missing = "there is no [container.usb]";
    assert!(alone.stdout.contains(missing), "{}", alone.whole());
    let ran = machine.sprat(&["config", "check", "no.toml"]);
    assert_eq!(ran.code, 2, "{}", ran.whole());
    // Commands of a person start nothing.
    assert_eq!(machine.sprat(&["status"]).code, 2);
}

#[test]
fn config_show_names_the_origin_of_each_value_and_hides_secrets() {
    let machine = machine();
    let ran = machine.sprat(&["config", "show"]).succeeded();
    assert!(!ran.stdout.contains("secret-topic"), "{}", ran.whole());
    let home = machine.sprat(&["config", "show", "home@nas"]).succeeded();
    let lines: Vec<&str> = home
        .stdout
        .lines()
        .filter(|line| {
            ["[", "target", "connections", "exclude ", "allow_empty"]
                .iter()
                .any(|key| line.starts_with(key))
        })
        .collect();
    assert_snapshot!(lines.join("\n"), @r#"
    [container.nas]
    target = "host:x.luks"                       # [DIR]/config/sprat.toml:2
    connections = 2                              # [DIR]/config/sprat.toml:3
    [job.home]
    exclude = ["*.iso"]                          # [DIR]/config/sprat.toml:5
    allow_empty = false                          # default
    "#);
    let said = machine.ok(&["config", "show", "--json"]).json();
    // Nobody may rely on a setting that does nothing yet.
    for table in said["tables"].as_array().unwrap() {
        for setting in table["settings"].as_array().unwrap() {
            let key = setting["key"].as_str().unwrap();
            let is_shown = |line: &&str| line.starts_with(&format!("{key} = "));
            let lines: Vec<&str> = ran.stdout.lines().filter(is_shown).collect();
            let marked = lines
                .iter()
                .any(|line| line.ends_with(", not yet in effect"));
            assert!(marked || setting["in_effect"] == true, "{key}: {lines:?}");
        }
    }
    let tables: Vec<&str> = said["tables"]
        .as_array()
        .unwrap()
        .iter()
        .map(|table| table["table"].as_str().unwrap())
        .collect();
    let expected = [
        "",
        "[container.nas]",
        "[container.usb]",
        "[job.home]",
        "[notify]",
    ];
    assert_eq!(tables, expected);
    let notify = said["tables"][4]["settings"].to_string();
    assert!(
        notify.contains(r#""key":"ntfy","line":10,"value":"***""#),
        "{notify}"
    );
}

#[test]
fn config_show_refuses_a_name_that_is_a_container_and_a_job() {
    let machine = TestMachine::new();
    machine.write(
        "config/sprat.toml",
        "[container.home]\ntarget = \"/x.luks\"\n\
         [job.home]\ncontainer = \"home\"\nsources = \"/home\"\n",
    );
    let ran = machine.sprat(&["config", "show", "home"]);
    assert_snapshot!(ran.failed_with(2), @r#"
    exit 2
    --- stderr
    sprat: "home" is a container and a job
    Hint: nothing was done. Write home@home for the job, and /x.luks for the container
    "#);
    machine.ok(&["config", "show", "home@home"]);
    machine.ok(&["config", "show", "/x.luks"]);
}

#[test]
fn config_check_works_for_everybody_who_can_read_the_file() {
    let machine = machine();
    machine.write("all.toml", "[container.nas]\ntarget = \"host:x.luks\"\n");
    let file = machine.path("all.toml");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
    let ran = machine.sprat_as_nobody(&["config", "check", &file.display().to_string()]);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let ran = machine.sprat_as_nobody(&["config", "check"]);
    assert_eq!(ran.code, 2, "{}", ran.whole());
}
