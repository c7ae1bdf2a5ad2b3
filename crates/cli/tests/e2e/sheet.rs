//! The recovery sheet's own commands, typed as they stand, and the passphrase asked for on a terminal.

use std::process::{Command, Stdio};

use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::strikes::{self, Blow};
use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

/// The sheet's steps as a shell script that stops at the first failure, in a mount namespace of its
/// own. There may be no device-mapper here, so `open` only tries the key, and nothing is mounted.
fn script(steps: &serde_json::Value, recovery_key: &str) -> String {
    // The rescue system's /root is its own, too.
    let mut script =
        "set -ex; mkdir -p /mnt; mount -t tmpfs none /mnt; mount -t tmpfs none /root\n".to_owned();
    for step in steps.as_array().unwrap() {
        for command in step["commands"].as_array().unwrap() {
            let command = command.as_str().unwrap();
            if command.starts_with("cryptsetup open") {
                let tried = command.replace("cryptsetup open", "cryptsetup open --test-passphrase");
                let tried = tried.strip_suffix(" sprat-restore").unwrap();
                let typed = if command.contains("--key-file") {
                    ""
                } else {
                    recovery_key
                };
                script.push_str(&format!("printf %s '{typed}' | {tried}\n"));
            } else if [
                "mkdir -p /mnt",
                "printf",
                "sshfs",
                "cryptsetup luksDump",
                "fusermount3",
            ]
            .iter()
            .any(|wanted| command.starts_with(wanted))
            {
                script.push_str(&format!("{command}\n"));
            }
        }
    }
    script
}

#[test]
fn commands_of_the_sheet_open_the_container_on_the_server() {
    requires!(
        openssh::missing(),
        needs::program("sshfs"),
        needs::program("cryptsetup")
    );
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    let init = [
        "init",
        "TARGET",
        "--size",
        "1G",
        "--cheap-kdf-for-tests",
        "--json",
    ];
    let ran = remote.ok(&init);
    // The folder's name was replaced in what `sprat` returned.
    let folder = remote.machine.folder().to_string_lossy().into_owned();
    let said: serde_json::Value =
        serde_json::from_str(&ran.stdout.replace("[DIR]", &folder)).unwrap();
    let sheet = &said["recovery_sheet"];
    let script = script(&sheet["steps"], sheet["recovery_key"].as_str().unwrap());
    assert!(
        script.contains("sshfs -F /root/sprat-ssh.conf")
            && script.matches("--test-passphrase").count() == 2
    );
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}\n{said}");
    let dump = String::from_utf8_lossy(&output.stdout);
    let uuid = serde_json::from_str::<serde_json::Value>(&ran.stdout).unwrap()["uuid"].clone();
    assert!(dump.contains(uuid.as_str().unwrap()), "{dump}");
    assert!(
        dump.contains("aes-xts-plain64") && dump.contains("16777216"),
        "{dump}"
    );
}

#[test]
fn passphrase_is_asked_for_on_a_terminal_without_echo() {
    use std::io::{Read, Write};
    requires!(needs::root(), needs::program("script"));
    let machine = TestMachine::new();
    machine.write("right.txt", "correct horse battery staple\n");
    machine.init(&[CONTAINER, "--size", "1G", "--passphrase-file", "right.txt"]);
    let ask = |typed: &str| {
        let plain = machine.command();
        let sprat = format!(
            "{} snapshots {CONTAINER}",
            plain.get_program().to_str().unwrap()
        );
        let mut command = Command::new("script");
        command
            .args(["-qec", &sprat, "/dev/null"])
            .current_dir(machine.folder());
        for (name, value) in plain.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // Typed before it is asked for, the terminal would echo it, and Ctrl-C would end nothing.
        let mut shown = child.stdout.take().unwrap();
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains("recovery key:") {
            let mut byte = [0];
            shown.read_exact(&mut byte).unwrap();
            said.extend(byte);
        }
        let mut keyboard = child.stdin.take().unwrap();
        keyboard.write_all(typed.as_bytes()).unwrap();
        shown.read_to_end(&mut said).unwrap();
        let code = child.wait().unwrap().code();
        (code, String::from_utf8_lossy(&said).into_owned())
    };
    let (code, said) = ask("correct horse battery staple\n");
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("Passphrase or recovery key:") && !said.contains("horse"),
        "{said}"
    );
    let (code, said) = ask("wrong horse battery staple\n");
    assert_eq!(code, Some(12), "{said}");
    let (code, said) = ask("\u{3}");
    assert_eq!(code, Some(130), "{said}");
}

const INIT: [&str; 5] = ["init", CONTAINER, "--size", "64M", "--cheap-kdf-for-tests"];

#[test]
fn sheet_is_shown_though_the_state_cannot_be_written() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let mut full = Vec::new();
    for folder in ["state/containers", "state/headers"] {
        std::fs::create_dir(machine.path(folder)).unwrap();
        let tmpfs = Tmpfs::mount(&machine.path(folder), 1);
        tmpfs.remount("ro");
        full.push(tmpfs);
    }
    let ran = machine.ok(&[&INIT[..], &["--html", "page.html"]].concat());
    assert!(ran.stdout.contains("RECOVERY KEY"), "{}", ran.whole());
    for told in [
        "can't save the container's identity",
        "can't save a copy of the header",
    ] {
        assert!(ran.stderr.contains(told), "{}", ran.whole());
    }
    let page = std::fs::metadata(machine.path("page.html")).unwrap();
    assert!(page.len() > 1000);
}

#[test]
fn init_cut_off_at_its_end_has_shown_a_sheet_that_opens() {
    requires!(strikes::missing());
    for how in ["cut", "kill"] {
        let machine = TestMachine::new();
        let target = machine.on_line(CONTAINER);
        let init = ["init", &target, "--size", "64M", "--html", "page.html"];
        let blow = Blow {
            how,
            when: "after",
            nth: 1,
            kind: Some("rename"),
        };
        let ran = machine.sprat_struck(&init, Some(blow));
        assert!(machine.was_struck(), "{how}: {}", ran.whole());
        assert!(machine.path(CONTAINER).exists(), "{how}: {}", ran.whole());
        // The sheet is shown before the container gets its name: it opens what is there.
        let (_, key) = ran.stdout.split_once("RECOVERY KEY   ").expect("a sheet");
        machine.write("typed", key.lines().next().unwrap());
        if how == "cut" {
            assert!([1, 14].contains(&ran.code), "{}", ran.whole());
            let told = "the container may be complete. Keep the sheet that was shown";
            assert!(ran.stderr.contains(told), "{}", ran.whole());
            assert!(machine.path("page.html").exists());
        }
        let typed = machine.sprat_struck(
            &["key", "rehearse", &target, "--passphrase-file", "typed"],
            None,
        );
        assert_eq!(typed.code, 0, "{how}: {}", typed.whole());
        let _ = std::fs::remove_file(machine.path("page.html"));
        let again = machine.sprat_struck(&init, None).failed_with(1);
        assert!(again.contains("exists already"), "{how}: {again}");
        assert!(again.contains("--new-recovery"), "{how}: {again}");
        let ran = machine.sprat_struck(&["key", "add", &target, "--new-recovery"], None);
        assert_eq!(ran.code, 0, "{how}: {}", ran.whole());
        assert!(
            ran.stdout.contains("RECOVERY KEY"),
            "{how}: {}",
            ran.whole()
        );
        machine.nothing_is_left();
    }
}

#[test]
fn a_page_may_have_a_name_that_is_no_text() {
    use std::os::unix::ffi::OsStrExt;
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&INIT[1..4]);
    let name = std::ffi::OsStr::from_bytes(b"sheet-\xff.html");
    let mut command = machine.command();
    command.args([
        "key",
        "sheet",
        CONTAINER,
        "--without-secret",
        "--json",
        "--html",
    ]);
    let ran = machine.run(command.arg(name)).succeeded();
    let page = ran.json()["page"].as_str().unwrap().to_owned();
    assert!(page.ends_with("/sheet-\\#377.html"), "{page}");
    assert!(
        std::fs::metadata(machine.folder().join(name))
            .unwrap()
            .len()
            > 1000
    );
}

/// A sheet's commands, from its text; a line that ends in a backslash continues in the next.
fn typed_lines(text: &str, heading: &str) -> Vec<String> {
    let (_, rest) = text.split_once(heading).expect("the heading");
    let rest = rest
        .split_once("\nWith sprat")
        .map_or(rest, |(rest, _)| rest);
    let mut commands: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in rest.lines().filter(|line| line.starts_with("       ")) {
        match commands.last_mut() {
            Some(last) if goes_on => *last += &format!("\n{line}"),
            _ => commands.push(line.to_owned()),
        }
        goes_on = line.ends_with('\\');
    }
    commands
}

/// Runs the sheet's commands as printed, up to the folder of the server; then the container must be
/// there. Of the machine's ssh configuration only the key files are left, and known_hosts, with the
/// server's confirmed key.
fn reach(text: &str, lost: &str, name: &str) {
    let typed = typed_lines(text, "To restore everything without sprat");
    let until = typed
        .iter()
        .position(|line| line.trim_start().starts_with("cryptsetup luksDump"));
    let typed = typed[..=until.expect("a line with luksDump")].join("\n");
    let script = format!(
        "set -ex; mkdir -p /mnt; mount -t tmpfs none /mnt; mount -t tmpfs none /root; mount --bind /dev/null '{lost}'\n\
         {typed}\n ls -l /mnt/sprat-server/{name}; fusermount3 -u /mnt/sprat-server"
    );
    let output = Command::new("unshare")
        .args(["-m", "bash", "-c", &script])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script}\n{said}");
}

#[test]
fn sheet_commands_reach_the_server_without_the_ssh_config() {
    requires!(
        openssh::missing(),
        needs::program("sshfs"),
        needs::program("cryptsetup")
    );
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    let machine = &remote.machine;
    let (port, user_key) = (remote.sshd.port(), remote.sshd.path("user_key"));
    let key = machine.path("my key");
    std::fs::copy(&user_key, &key).unwrap();
    let public = std::fs::read_to_string(remote.sshd.path("host_key.pub")).unwrap();
    let known = machine.write("known hosts", format!("[127.0.0.1]:{port} {public}"));
    let config = |lines: &str| {
        format!(
            "Host gate other\n HostName 127.0.0.1\n{lines}Host *\n User root\n Port {port}\n \
             UserKnownHostsFile \"{}\"\n LogLevel ERROR\n",
            known.display()
        )
    };
    let file = machine.path("ssh.config").display().to_string();
    let lab = "Host lab\n HostName 127.0.0.1\n";
    let identity = format!("Host *\n IdentityFile \"{}\"\n", key.display());
    let cases = [
        (
            "plain",
            format!("{lab}{identity}"),
            format!("ssh -F {file}"),
        ),
        (
            "blank-in-a-word",
            lab.to_owned(),
            format!("ssh -F {file} -i '{}'", key.display()),
        ),
        (
            "proxy-command",
            format!("{lab} ProxyCommand ssh -F {file} -W %h:%p gate\n{identity}"),
            format!("ssh -F {file}"),
        ),
        (
            "proxy-command-with-blanks",
            format!(
                "{lab} ProxyCommand bash -c 'exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3'\n{identity}"
            ),
            format!("ssh -F {file}"),
        ),
        (
            "jump-by-alias",
            format!("{lab}{identity}"),
            format!("ssh -F {file} -J gate,other"),
        ),
        (
            "wrapper",
            format!("{lab}{identity}"),
            format!("env FOO=1 ssh -F {file}"),
        ),
    ];
    for (name, lines, ssh) in cases {
        machine.write("ssh.config", config(&lines));
        let target = format!("ssh://lab{}/{name}.luks", machine.path("store").display());
        let mut command = machine.command();
        command.args(["--ssh-command", &ssh, "init", &target, "--size", "64M"]);
        command.args(["--cheap-kdf-for-tests", "--sheet", &format!("{name}.txt")]);
        let ran = machine.run(&mut command);
        assert_eq!(ran.code, 0, "{name}: {}", ran.whole());
        let text = std::fs::read_to_string(machine.path(format!("{name}.txt"))).unwrap();
        let unknown = text.contains("NOT ON THIS SHEET");
        assert_eq!(
            unknown,
            ["wrapper", "proxy-command-with-blanks"].contains(&name),
            "{text}"
        );
        println!("{name}");
        reach(&text, &file, &format!("{name}.luks"));
    }
}

#[test]
fn init_refuses_to_show_its_secret_to_nobody_or_everybody() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    requires!(needs::root());
    let machine = TestMachine::new();
    let sprat = sprat_testkit::program::sprat();
    let key_add = [
        "key",
        "add",
        CONTAINER,
        "--new-recovery",
        "--cheap-kdf-for-tests",
    ];
    let shell = |arguments: &[&str], redirection: &str| {
        let mut command = machine.command_of("sh");
        let line = format!("umask 022; exec \"$0\" \"$@\" {redirection}");
        machine.run(command.args(["-c", &line]).arg(sprat).args(arguments))
    };
    machine.write("open", "something");
    std::fs::set_permissions(machine.path("open"), PermissionsExt::from_mode(0o644)).unwrap();
    for redirection in [">&-", ">/dev/null", ">>open"] {
        let ran = shell(&INIT, redirection);
        assert_eq!(ran.code, 2, "{redirection}: {}", ran.whole());
        assert!(ran.stderr.contains("--sheet FILE"), "{}", ran.whole());
    }
    // Nothing was made, no key file either; a disk that is full is seen before the container has its name.
    let ran = shell(&INIT, ">/dev/full");
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(
        ran.stderr
            .contains("sprat removed the unfinished container"),
        "{}",
        ran.whole()
    );
    assert_eq!(machine.sprat(&["status", CONTAINER]).code, 10);
    shell(&INIT, ">sheet").succeeded();
    let about = std::fs::metadata(machine.path("sheet")).unwrap();
    assert_eq!(about.mode() & 0o7777, 0o600);
    assert!(
        std::fs::read_to_string(machine.path("sheet"))
            .unwrap()
            .contains("RECOVERY KEY")
    );
    for redirection in [">&-", ">/dev/null"] {
        let ran = shell(&key_add, redirection);
        assert_eq!(ran.code, 2, "{redirection}: {}", ran.whole());
    }
    let ran = shell(&key_add, ">/dev/full");
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert_eq!(shell(&["--help"], ">/dev/full").code, 1);
    // A file of the sheet's own: mode 0600, and never over another.
    let ran = machine.ok(&[&key_add[..], &["--sheet", "new", "--html", "page"]].concat());
    assert!(!ran.stdout.contains("RECOVERY KEY"), "{}", ran.whole());
    for name in ["new", "page"] {
        let about = std::fs::metadata(machine.path(name)).unwrap();
        assert!(about.len() > 1000 && about.mode() & 0o7777 == 0o600);
    }
    let ran = machine.sprat(&[&key_add[..], &["--sheet", "new"]].concat());
    assert_eq!(ran.code, 2, "{}", ran.whole());
    // A page doesn't take the place of the text.
    let ran = machine.sprat(&[&key_add[..], &["--html", "page2"]].concat());
    assert!(ran.stdout.contains("RECOVERY KEY"), "{}", ran.whole());
}
