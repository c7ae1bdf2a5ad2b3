//! The command line and the config: what is refused, in which words, before anything starts.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use insta::assert_snapshot;
use sprat_testkit::machine::TestMachine;

#[test]
fn wrong_arguments_exit_with_2_and_a_reason() {
    let machine = TestMachine::new();
    let cases: [&[&str]; 8] = [
        &["backu"],
        &["backup", "--frobnicate"],
        &["backup", "--exclude", "x"],
        &["init"],
        &["init", "x.luks", "--size", "12Q"],
        &["restore", "x.luks", "home"],
        &[
            "snapshots",
            "x.luks",
            "--key-file",
            "a",
            "--passphrase-file",
            "b",
        ],
        &["snapshots", "x.luks", "-q", "-v"],
    ];
    let mut seen = String::new();
    for case in cases {
        let ran = machine.sprat(case);
        assert_eq!(ran.code, 2, "{case:?}: {}", ran.whole());
        assert!(ran.stdout.is_empty(), "{case:?}");
        seen.push_str(&format!(
            "{case:?}\n  {}\n",
            ran.stderr.lines().next().unwrap_or_default()
        ));
    }
    assert_snapshot!(seen, @r#"
    ["backu"]
      sprat: unrecognized subcommand 'backu'
    ["backup", "--frobnicate"]
      sprat: unexpected argument '--frobnicate' found
    ["backup", "--exclude", "x"]
      sprat: the following required arguments were not provided:
    ["init"]
      sprat: the following required arguments were not provided:
    ["init", "x.luks", "--size", "12Q"]
      sprat: invalid value '12Q' for '--size <SIZE>': the unit must be K, M, G, T or P, or KiB, kB and so on
    ["restore", "x.luks", "home"]
      sprat: the following required arguments were not provided:
    ["snapshots", "x.luks", "--key-file", "a", "--passphrase-file", "b"]
      sprat: the argument '--key-file <FILE>' cannot be used with '--passphrase-file <FILE>'
    ["snapshots", "x.luks", "-q", "-v"]
      sprat: the argument '--quiet' cannot be used with '--verbose'
    "#);
}

#[test]
fn requests_that_make_no_sense_are_refused_before_anything_starts() {
    let machine = TestMachine::new();
    let cases: [&[&str]; 16] = [
        &["snapshots", "home"],
        &["snapshots", "--", "-oProxyCommand=touch pwned:x.luks"],
        &["snapshots", "ssh://host/srv/../x.luks"],
        &["snapshots", "ssh://host/srv/"],
        &["init", "x.luks", "--size", "1M"],
        &["backup"],
        &["backup", "home"],
        &["backup", "--name", "home", "store/x.luks"],
        &["backup", "--name", "a/b", "store/x.luks", "/etc"],
        &["backup", "--name", "a:b", "store/x.luks", "/etc"],
        &["restore", "x.luks", "home/", "--to", "back"],
        &["mount", "x.luks", "nowhere"],
        &["snapshots", "x.luks", "--ssh-command", "ssh 'x"],
        &["snapshots", "x.luks", "--fingerprint", "1234"],
        &["backup", "--name", "home", "store/x.luks", ""],
        &[
            "backup",
            "--name",
            "home",
            "store/x.luks",
            "/etc",
            "--exclude",
            "!",
            "--exclude",
            "",
        ],
    ];
    let mut seen = String::new();
    for case in cases {
        let ran = machine.sprat(case);
        assert_eq!(ran.code, 2, "{case:?}: {}", ran.whole());
        assert!(ran.stdout.is_empty(), "{case:?}");
        seen.push_str(&format!("{case:?}\n{}\n", ran.stderr));
    }
    assert!(!machine.path("pwned").exists());
    assert_eq!(fs::read_dir(machine.path("state")).unwrap().count(), 0);
    assert_snapshot!(seen, @r#"
    ["snapshots", "home"]
    sprat: no container "home" in the config
    Caused by:
      1: there is no config
    Hint: name it as [container.NAME] in the config, or give its place: ssh://user@host/path/x.luks, host:path/x.luks or /path/x.luks

    ["snapshots", "--", "-oProxyCommand=touch pwned:x.luks"]
    sprat: "-oProxyCommand=touch pwned" is not a host name
    Hint: a TARGET is a container's name in the config, ssh://user@host[:port]/path/x.luks, host:path/x.luks or a local path

    ["snapshots", "ssh://host/srv/../x.luks"]
    sprat: ".." in a remote path is not accepted
    Hint: a TARGET is a container's name in the config, ssh://user@host[:port]/path/x.luks, host:path/x.luks or a local path

    ["snapshots", "ssh://host/srv/"]
    sprat: "/srv/" must end in the container's file name, such as /srv/backup/home.luks
    Hint: a TARGET is a container's name in the config, ssh://user@host[:port]/path/x.luks, host:path/x.luks or a local path

    ["init", "x.luks", "--size", "1M"]
    sprat: --size 1.0 MiB is too small: at least 64.0 MiB are needed

    ["backup"]
    sprat: no job to run
    Caused by:
      1: there is no config
    Hint: write a [job.NAME] into the config, or: sprat backup TARGET --name JOB SOURCE…

    ["backup", "home"]
    sprat: no job "home" in the config
    Caused by:
      1: there is no config
    Hint: without a config: sprat backup TARGET --name JOB SOURCE…

    ["backup", "--name", "home", "store/x.luks"]
    sprat: `sprat backup --name` needs a TARGET and a SOURCE
    Hint: sprat backup TARGET --name JOB SOURCE…

    ["backup", "--name", "a/b", "store/x.luks", "/etc"]
    sprat: "a/b" is not a job name: it has a slash in it (1 to 128 bytes, no '/', no control characters, no '.' or '-' in front)

    ["backup", "--name", "a:b", "store/x.luks", "/etc"]
    sprat: "a:b" can't be the name of a job: it has a colon in it

    ["restore", "x.luks", "home/", "--to", "back"]
    sprat: "" is not the name of a snapshot
    Hint: nothing was started. Write JOB, JOB/SNAPSHOT, JOB:PATH or JOB/SNAPSHOT:PATH

    ["mount", "x.luks", "nowhere"]
    sprat: [DIR]/nowhere is not a folder
    Hint: nothing was started. Create it with mkdir

    ["snapshots", "x.luks", "--ssh-command", "ssh 'x"]
    sprat: --ssh-command: a quote is not closed

    ["snapshots", "x.luks", "--fingerprint", "1234"]
    sprat: --fingerprint "1234" is not a fingerprint: a fingerprint has 20 hexadecimal digits
    Hint: nothing was started. The fingerprint is on the recovery sheet, in groups with dashes

    ["backup", "--name", "home", "store/x.luks", ""]
    sprat: a SOURCE is empty
    Hint: nothing was started. Is a variable of the shell not set? `.` is the current folder

    ["backup", "--name", "home", "store/x.luks", "/etc", "--exclude", "!", "--exclude", ""]
    sprat: invalid sources
    Caused by:
      1: job home: exclude pattern !: it would clear the list of patterns
      2: job home: exclude pattern : it is empty
    Hint: nothing was started. Correct all of these, in the config or here
    "#);
}

#[test]
fn user_who_is_not_root_is_refused_before_any_key_is_read() {
    let machine = TestMachine::new();
    let cases: [&[&str]; 6] = [
        &["init", "x.luks", "--key-file", "/nowhere"],
        &[
            "backup",
            "--name",
            "home",
            "x.luks",
            "/etc",
            "--key-file",
            "/nowhere",
        ],
        &["snapshots", "x.luks", "--key-file", "/nowhere"],
        &[
            "restore",
            "x.luks",
            "home",
            "--to",
            "/tmp",
            "--key-file",
            "/nowhere",
        ],
        &["mount", "x.luks", "/mnt", "--key-file", "/nowhere"],
        &["umount", "/mnt"],
    ];
    let mut seen: Vec<String> = cases
        .iter()
        .map(|case| {
            machine
                .sprat_as_nobody(case)
                .failed_with(1)
                .replace(&format!("sprat {}`", case[0]), "sprat COMMAND`")
        })
        .collect();
    seen.dedup();
    assert_snapshot!(seen.join("\n"), @r"
    exit 1
    --- stderr
    sprat: `sprat COMMAND` must be run as root: only root can mount and unmount the volume
    Hint: nothing was started. Run it with sudo or as root
    ");
    assert_eq!(machine.sprat_as_nobody(&["--version"]).code, 0);
}

#[test]
fn config_mistakes_are_all_reported_with_their_lines() {
    let machine = TestMachine::new();
    machine.write(
        "config/sprat.toml",
        r#"
ssh_command = "ssh -p '22"
keep = 7

[container.home]
target = "ssh://-oProxyCommand=x/a.luks"
keyfile = "/etc/sprat/home.key"

[container.www]
target = "relative/x.luks"
key_file = "www.key"
passphrase_command = "pass show x"

["container.x"]

[container."a/b"]
target = "host:x.luks"

[job.home]
container = "hom"
source = ["/home"]
exclude = ["*.tmp", 5]

[job."a:b"]
sources = []
one_file_system = "yes"

[job.up]
container = "home"
sources = ["/srv/../etc"]
exclude = ["!", "*.tmp"]

[retention]
"#,
    );
    assert_snapshot!(machine.sprat(&["backup"]).failed_with(2), @r#"
    exit 2
    --- stderr
    sprat: the config [DIR]/config/sprat.toml is wrong
    Caused by:
      1: [DIR]/config/sprat.toml:2: `ssh_command`: a quote is not closed
      2: [DIR]/config/sprat.toml:3: unknown setting `keep` at the top of the file; known are container, job, job_defaults, notify, public_status, ssh_command, time_zone, watch
      3: [DIR]/config/sprat.toml:6: `target`: "-oProxyCommand=x" is not a host name
      4: [DIR]/config/sprat.toml:7: unknown setting `keyfile` in [container.home]; did you mean "key_file"?
      5: [DIR]/config/sprat.toml:9: [container.www]: only one of key_file, passphrase_file, passphrase_command
      6: [DIR]/config/sprat.toml:10: `target`: "relative/x.luks" must be ssh://…, host:path or an absolute path
      7: [DIR]/config/sprat.toml:11: `key_file`: "www.key" must begin with / or ~/
      8: [DIR]/config/sprat.toml:14: unknown setting `container.x` at the top of the file; did you mean "container"?
      9: [DIR]/config/sprat.toml:16: "a/b" can't be the name of a container: use at most 64 letters, digits, `.`, `_` and `-`, no `.` or `-` in front, and no .luks at the end
      10: [DIR]/config/sprat.toml:19: [job.home] has no `sources`
      11: [DIR]/config/sprat.toml:20: there is no [container.hom]; did you mean "home"?
      12: [DIR]/config/sprat.toml:21: unknown setting `source` in [job.home]; did you mean "sources"?
      13: [DIR]/config/sprat.toml:22: `exclude` must be text in quotes, not integer
      14: [DIR]/config/sprat.toml:24: "a:b" can't be the name of a job: it has a colon in it
      15: [DIR]/config/sprat.toml:24: [job.a:b] has no `container`
      16: [DIR]/config/sprat.toml:24: [job.a:b]: `sources` is empty
      17: [DIR]/config/sprat.toml:26: `one_file_system` must be true or false
      18: [DIR]/config/sprat.toml:30: `sources`: "/srv/../etc" must not have `..` in it
      19: [DIR]/config/sprat.toml:31: `exclude`: "!": it would clear the list of patterns
      20: [DIR]/config/sprat.toml:33: unknown setting `retention` at the top of the file; known are container, job, job_defaults, notify, public_status, ssh_command, time_zone, watch
    Hint: nothing was started. Correct the config. `sprat config check` shows all mistakes
    "#);
}

#[test]
fn config_that_is_no_toml_is_refused_with_the_line() {
    let machine = TestMachine::new();
    machine.write("config/sprat.toml", "[container.home]\ntarget = \"x\n");
    assert_snapshot!(machine.sprat(&["backup"]).failed_with(2), @r#"
    exit 2
    --- stderr
    sprat: the config [DIR]/config/sprat.toml is wrong
    Caused by:
      1: [DIR]/config/sprat.toml:2: invalid basic string, expected `"`
    Hint: nothing was started. Correct the config. `sprat config check` shows all mistakes
    "#);
}

#[test]
fn config_that_was_named_must_be_there() {
    let machine = TestMachine::new();
    assert_snapshot!(machine.sprat(&["backup", "--config", "no.toml"]).failed_with(2), @r"
    exit 2
    --- stderr
    sprat: the config [DIR]/no.toml can't be used
    Caused by:
      1: No such file or directory (os error 2)
    ");
}

#[test]
fn config_that_others_can_write_is_refused() {
    let machine = TestMachine::new();
    let path = machine.write("config/sprat.toml", "");
    fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
    assert_snapshot!(machine.sprat(&["backup"]).failed_with(2), @r"
    exit 2
    --- stderr
    sprat: the config [DIR]/config/sprat.toml can't be used
    Caused by:
      1: other users than root can write to this file or replace it, and it contains commands that root runs: others can write to it (mode 0666) (chown root, chmod go-w)
    ");
}

#[test]
fn names_that_the_config_does_not_have_get_the_nearest_one() {
    let machine = TestMachine::new();
    machine.write(
        "config/sprat.toml",
        "[container.laptop]\ntarget = \"/srv/x.luks\"\n\
         [job.homes]\ncontainer = \"laptop\"\nsources = [\"/home\"]\n",
    );
    assert_snapshot!(machine.sprat(&["snapshots", "latop"]).failed_with(2), @r#"
    exit 2
    --- stderr
    sprat: no container "latop" in the config
    Caused by:
      1: the config is [DIR]/config/sprat.toml
    Hint: did you mean "laptop"?
    "#);
    assert_snapshot!(machine.sprat(&["backup", "home"]).failed_with(2), @r#"
    exit 2
    --- stderr
    sprat: no job "home" in the config
    Caused by:
      1: the config is [DIR]/config/sprat.toml
    Hint: did you mean "homes"?
    "#);
    assert_snapshot!(machine.sprat(&["backup", "homes", "homes"]).failed_with(2), @r"
    exit 2
    --- stderr
    sprat: job homes is named twice
    ");
}

#[test]
fn keys_that_can_not_be_read_are_refused_with_their_path() {
    let machine = TestMachine::new();
    machine.write("empty.key", "");
    machine.write("empty.txt", "\n");
    machine.write("latin1.txt", b"gr\xfc\xdfe\n");
    machine.write("long.txt", "x".repeat(9000));
    let cases: [&[&str]; 10] = [
        &["--key-file", "none.key"],
        &["--key-file", "empty.key"],
        &["--key-file", "store"],
        &["--passphrase-file", "none.txt"],
        &["--passphrase-file", "empty.txt"],
        &["--passphrase-file", "latin1.txt"],
        &["--passphrase-file", "long.txt"],
        &["--passphrase-command", "/nowhere/pass"],
        &["--passphrase-command", "true"],
        &[],
    ];
    machine.write("store/x.luks", "");
    let mut seen = String::new();
    for case in cases {
        let mut arguments = vec!["snapshots", "store/x.luks"];
        arguments.extend(case);
        // A session of its own: without a terminal to ask on.
        let mut command = std::process::Command::new("setsid");
        let sprat = machine.command();
        command.arg("-w").arg(sprat.get_program()).args(&arguments);
        for (name, value) in sprat.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        command
            .current_dir(machine.folder())
            .stdin(std::process::Stdio::null());
        let ran = machine.run(&mut command);
        assert_eq!(ran.code, 2, "{case:?}: {}", ran.whole());
        seen.push_str(&format!("{case:?}\n{}\n", ran.stderr));
    }
    assert_snapshot!(seen, @r#"
    ["--key-file", "none.key"]
    sprat: the key file [DIR]/none.key can't be read
    Caused by:
      1: No such file or directory (os error 2)
    Hint: check the path, and whether its disk is mounted

    ["--key-file", "empty.key"]
    sprat: the key file [DIR]/empty.key is empty

    ["--key-file", "store"]
    sprat: the key file [DIR]/store can't be read
    Caused by:
      1: it is a folder
    Hint: give a regular file. For the output of a program use --passphrase-command

    ["--passphrase-file", "none.txt"]
    sprat: the passphrase file [DIR]/none.txt can't be read
    Caused by:
      1: No such file or directory (os error 2)
    Hint: check the path, and whether its disk is mounted

    ["--passphrase-file", "empty.txt"]
    sprat: the passphrase is empty

    ["--passphrase-file", "latin1.txt"]
    sprat: the passphrase is not UTF-8 text

    ["--passphrase-file", "long.txt"]
    sprat: the passphrase file [DIR]/long.txt is longer than 8192 bytes

    ["--passphrase-command", "/nowhere/pass"]
    sprat: the passphrase command "/nowhere/pass" can't be started
    Caused by:
      1: No such file or directory (os error 2)

    ["--passphrase-command", "true"]
    sprat: the passphrase is empty

    []
    sprat: there is no key file [DIR]/config/keys/x.key
    Hint: nothing was started. Check whether its disk is mounted. Or give a key with --key-file, --passphrase-file or --passphrase-command, or in the config
    "#);
}

#[test]
fn failed_passphrase_command_is_reported_without_its_output() {
    let machine = TestMachine::new();
    let command = "sh -c 'echo secret-half; exit 3'";
    let ran = machine.sprat(&["snapshots", "store/x.luks", "--passphrase-command", command]);
    assert_snapshot!(ran.failed_with(1), @r#"
    exit 1
    --- stderr
    sprat: the passphrase command "sh" failed
    Caused by:
      1: exit status: 3
    "#);
}

#[test]
fn init_refuses_weak_keys() {
    let machine = TestMachine::new();
    machine.write("short.key", "too short");
    machine.write("short.txt", "secret\n");
    let ran = machine.sprat(&["init", "store/x.luks", "--key-file", "short.key"]);
    assert_snapshot!(ran.failed_with(2), @r"
    exit 2
    --- stderr
    sprat: the key file [DIR]/short.key is too short: 9 bytes, at least 32 needed
    Hint: give a file that does not exist: sprat creates a good key file there
    ");
    let ran = machine.sprat(&["init", "store/x.luks", "--passphrase-file", "short.txt"]);
    assert_snapshot!(ran.failed_with(2), @r"
    exit 2
    --- stderr
    sprat: the passphrase is too short: at least 12 bytes needed
    Hint: nothing was changed. The server can try passphrases without limit: use a long one
    ");
    assert_eq!(fs::read(machine.path("short.key")).unwrap(), b"too short");
}

#[test]
fn failure_as_json_is_one_line_on_stderr_and_nothing_on_stdout() {
    let machine = TestMachine::new();
    let ran = machine.sprat(&["snapshots", "home", "--json"]);
    assert_snapshot!(ran.failed_with(2), @r#"
    exit 2
    --- stderr
    {"failure":{"causes":["there is no config"],"code":2,"exit":"usage","hint":"name it as [container.NAME] in the config, or give its place: ssh://user@host/path/x.luks, host:path/x.luks or /path/x.luks","what":"no container \"home\" in the config"}}
    "#);
}

#[test]
fn configs_in_the_docs_are_accepted() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let text = fs::read_to_string(root.join("docs/config.md")).unwrap();
    let config = text
        .split("```toml")
        .nth(1)
        .unwrap()
        .split("```")
        .next()
        .unwrap();
    let machine = TestMachine::new();
    machine.write("config/sprat.toml", config);
    let ran = machine.sprat(&["doctor", "--json"]);
    assert!(
        ran.stdout.contains("2 containers, 2 jobs"),
        "{}",
        ran.whole()
    );
}
