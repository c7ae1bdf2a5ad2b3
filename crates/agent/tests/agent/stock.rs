//! Unchanged clients behind a real sshd with ForceCommand: sftp, sshfs, sprat.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use sprat_testkit::machine::CHEAP;
use sprat_testkit::ssh_server::{SshServer, openssh};
use sprat_testkit::{needs, requires};

use crate::client::{BLOCK, EAGER, READ_WRITE, Served, agent, blocks};
use crate::sprat::{Client, sprat_missing, sshd_with};

fn sshd(served: &Served) -> SshServer {
    let root = served.path("");
    sshd_with(&format!(
        "{} serve --root {}",
        agent().display(),
        root.display()
    ))
}

fn sftp(server: &SshServer, batch: &str) -> (bool, String) {
    let commands = server.path("batch");
    fs::write(&commands, batch).unwrap();
    let output = Command::new("sftp")
        .arg("-F")
        .arg(server.path("ssh_config"))
        .arg("-b")
        .arg(commands)
        .arg("any.host")
        .output()
        .unwrap();
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    (output.status.success(), text)
}

#[test]
fn sftp_lists_and_fetches_and_can_destroy_nothing() {
    requires!(openssh::missing(), needs::program("sftp"));
    let state = blocks(300, 1);
    let served = Served::with_container(EAGER, &state);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    let server = sshd(&served);
    let (now, past) = (server.path("now"), server.path("past"));
    let batch = format!(
        "ls -la\nls -l .generations/x.luks\nget x.luks {}\nget {} {}\n",
        now.display(),
        served.past_path(1),
        past.display()
    );
    let (done, text) = sftp(&server, &batch);
    assert!(done, "{text}");
    assert!(
        text.contains("x.luks") && text.contains(".generations"),
        "{text}"
    );
    assert!(fs::read(now).unwrap() == served.live());
    assert!(fs::read(past).unwrap() == state);
    fs::write(server.path("evil"), "evil").unwrap();
    for evil in [
        "rm x.luks".to_owned(),
        "rename x.luks y.luks".to_owned(),
        "chmod 777 x.luks".to_owned(),
        "mkdir a".to_owned(),
        "rmdir .generations".to_owned(),
        "symlink /etc/passwd y.luks".to_owned(),
        "ln x.luks y.luks".to_owned(),
        format!("put {} x.luks", server.path("evil").display()),
        format!("put {} evil", server.path("evil").display()),
        format!("rm {}", served.past_path(1)),
        "get /etc/passwd /dev/null".to_owned(),
        "get .sprat-agent/format /dev/null".to_owned(),
    ] {
        let (done, text) = sftp(&server, &format!("{evil}\n"));
        assert!(!done, "{evil}: {text}");
    }
    assert!(served.past(1) == state);
    let names: Vec<_> = fs::read_dir(served.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn the_forced_command_gives_no_shell() {
    requires!(openssh::missing());
    let served = Served::with_container(EAGER, &blocks(1, 1));
    let server = sshd(&served);
    let ssh = server.ssh_command();
    for words in [
        &["any.host", "id"][..],
        &["any.host", "sh", "-c", "id"],
        &["-W", "127.0.0.1:22", "any.host"],
    ] {
        let output = Command::new(&ssh[0])
            .args(&ssh[1..])
            .args(words)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{words:?}: {output:?}"
        );
    }
}

/// Unmounts also when the test fails.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("fusermount").arg("-uz").arg(&self.0).output();
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn sshfs_shows_present_and_past() {
    requires!(
        openssh::missing(),
        needs::program("sshfs"),
        needs::devices()
    );
    let state = blocks(300, 1);
    let served = Served::with_container(EAGER, &state);
    served.overwrite(&[(0, vec![1; BLOCK])]);
    let server = sshd(&served);
    let at = tempfile::tempdir().unwrap();
    let output = Command::new("sshfs")
        .args(["-o", "ro", "-F"])
        .arg(server.path("ssh_config"))
        .arg("any.host:/")
        .arg(at.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let _mounted = Mounted(at.path().to_owned());
    assert!(fs::read(at.path().join("x.luks")).unwrap() == served.live());
    assert!(fs::read(at.path().join(served.past_path(1))).unwrap() == state);
}

#[test]
fn sprat_backs_up_unchanged_and_restores_the_past_of_a_destroyed_container() {
    requires!(
        openssh::missing(),
        needs::root(),
        needs::devices(),
        needs::program("cryptsetup"),
        sprat_missing()
    );
    // No key is changed: nothing of it may be refused.
    let client = Client::new(&EAGER.replace("header = free", "header = refuse"));
    let (served, machine, target) = (&client.served, &client.machine, &*client.target);
    client.init();
    let new_key = machine.path("new.key");
    served.run(&["allow-header", "x.luks"]);
    let new_key = new_key.to_str().unwrap();
    client.ok(&["key", "add", CHEAP, "--new-key-file", new_key, target]);
    served.run(&["allow-header", "x.luks", "--for", "0s"]);
    for round in 1..=3 {
        client.back_up(round);
    }
    let restored = |target: &str, name: &str, more: &[&str], round: u32| {
        let to = machine.path(name);
        let words = ["restore", target, "home", "--to", to.to_str().unwrap()];
        client.ok(&[&words[..], more].concat());
        client.is_restored(&to, round);
    };
    restored(target, "now", &[], 3);
    // The state that the last session began with has the snapshots of the first two.
    let last = *served.numbers().last().unwrap();
    let key = machine.path("config/keys/x.key");
    let past = |number| {
        let path = served.path(&served.past_path(number));
        format!("any.host:{}", path.display())
    };
    let more = ["--ignore-lock", "--key-file", key.to_str().unwrap()];
    restored(&past(last), "past", &more, 2);

    // Somebody has the key and the login, and overwrites everything that is there.
    let mut policy = fs::read_to_string(served.path(".sprat-agent/policy")).unwrap();
    policy = policy.replace("header = refuse", "header = alarm");
    fs::write(served.path(".sprat-agent/policy"), policy).unwrap();
    let mut hostile = served.connect();
    let handle = hostile.open("x.luks", READ_WRITE).unwrap();
    let len = fs::metadata(served.path("x.luks")).unwrap().len();
    let garbage = blocks(60, 99);
    for at in (0..len).step_by(garbage.len()) {
        let part = garbage.len().min(usize::try_from(len - at).unwrap());
        assert_eq!(hostile.write(&handle, at, &garbage[..part]), 0);
    }
    hostile.end();
    assert!(served.live().starts_with(&garbage));
    // The state before that has all three snapshots.
    let evening = *served.numbers().last().unwrap();
    assert!(evening > last);
    restored(&past(evening), "evening", &more, 3);
    let status = served.command(&["status"]).output().unwrap();
    assert_eq!(status.status.code(), Some(3), "{status:?}");
    // The stock tools take a copy of it; the kernel's part is for a VM.
    let copy = machine.path("copy.luks");
    let name = served.head(evening, "name");
    served.run(&["export", "x.luks", &name, copy.to_str().unwrap()]);
    let opened = Command::new("cryptsetup")
        .args(["open", "--test-passphrase", "--key-file"])
        .arg(&key)
        .arg(&copy)
        .output()
        .unwrap();
    assert!(opened.status.success(), "{opened:?}");
    let copy = copy.to_str().unwrap();
    restored(copy, "copied", &["--key-file", key.to_str().unwrap()], 3);
}

/// A container that a plain server had gets an agent, and goes back to the plain server.
#[test]
fn a_plain_container_gets_an_agent_and_goes_back() {
    requires!(
        openssh::missing(),
        needs::root(),
        needs::devices(),
        needs::sftp_server_missing(),
        sprat_missing()
    );
    let served = Served::new(EAGER);
    fs::remove_dir_all(served.path(".sprat-agent")).unwrap();
    let scripts = tempfile::tempdir().unwrap();
    let script = scripts.path().join("server");
    let serve_by = |command: &str| fs::write(&script, format!("exec {command}\n")).unwrap();
    let plain = needs::plain_sftp_server().unwrap().display().to_string();
    let client = Client::with(served, sshd_with(&format!("/bin/sh {}", script.display())));
    let (served, machine) = (&client.served, &client.machine);
    let restored = |target: &str, name: &str, more: &[&str], round: u32| {
        let to = machine.path(name);
        let words = ["restore", target, "home", "--to", to.to_str().unwrap()];
        client.ok(&[&words[..], more].concat());
        client.is_restored(&to, round);
    };
    serve_by(&plain);
    client.init();
    client.back_up(1);
    let before = served.live();

    served.run(&["adopt"]);
    fs::write(served.path(".sprat-agent/policy"), EAGER).unwrap();
    assert!(served.live() == before, "nothing is moved");
    let root = served.path("");
    serve_by(&format!(
        "{} serve --root {}",
        agent().display(),
        root.display()
    ));
    client.back_up(2);
    assert!(served.past(1) == before);
    restored(&client.target, "with-agent", &[], 2);
    let path = served.path(&served.past_path(1));
    let key = machine.path("config/keys/x.key");
    let more = ["--ignore-lock", "--key-file", key.to_str().unwrap()];
    restored(&format!("any.host:{}", path.display()), "past", &more, 1);

    // As docs/agent.md has it: the forced command goes, then what the agent kept.
    serve_by(&plain);
    client.back_up(3);
    fs::remove_dir_all(served.path(".sprat-agent")).unwrap();
    client.back_up(4);
    restored(&client.target, "plain-again", &[], 4);
}
