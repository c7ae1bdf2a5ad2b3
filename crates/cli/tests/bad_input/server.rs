//! What goes wrong on the way to the server and on it, each with its message and exit code.

use std::fs;

use insta::assert_snapshot;
use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::requires;
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};

#[test]
fn unknown_host_key_is_refused() {
    requires!(openssh::missing());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.machine.write("config/keys/x.key", vec![7u8; 4096]);
    remote.sshd.forget_host_key().unwrap();
    assert_snapshot!(remote.backup().failed_with(14), @r"
    exit 14
    --- stderr
    sprat: job home failed
    Caused by:
      1: host key of 127.0.0.1 not accepted: No ED25519 host key is known for [127.0.0.1]:[PORT] and you have requested strict checking.; Host key verification failed. (ssh ended with status 255)
    Hint: nothing was sent. Get the fingerprint of the server's key in another way (from its provider, at its console), and compare. If the fingerprints are equal and the server is new to this machine, log in once with `sftp HOST`. If they are equal and the server's key was changed, first remove the old key: `ssh-keygen -R HOST`. If nobody knows why the key changed, stop: another machine may answer in place of the server
    ");
}

#[test]
fn refused_login_is_reported() {
    requires!(openssh::missing());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.machine.write("config/keys/x.key", vec![7u8; 4096]);
    remote.sshd.use_unknown_user_key().unwrap();
    assert_snapshot!(remote.backup().failed_with(14), @r"
    exit 14
    --- stderr
    sprat: job home failed
    Caused by:
      1: 127.0.0.1 refused the login: identity_sign: private key [SSHD]/user_key contents do not match public; root@127.0.0.1: Permission denied (publickey). (ssh ended with status 255)
    Hint: sprat never asks for passwords or passphrases of ssh. Add this account's public key to the server's authorized_keys, or give a key with --ssh-command 'ssh -i FILE'. A key with a passphrase needs an agent (ssh-add), and a timer has no agent: use a key without a passphrase
    ");
}

#[test]
fn server_that_is_not_there() {
    requires!(openssh::missing());
    let mut remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.machine.write("config/keys/x.key", vec![7u8; 4096]);
    remote.sshd.stop();
    assert_snapshot!(remote.backup().failed_with(14), @r"
    exit 14
    --- stderr
    sprat: job home failed
    Caused by:
      1: can't reach 127.0.0.1: ssh: connect to host 127.0.0.1 port [PORT]: Connection refused (ssh ended with status 255)
    Hint: check that `sftp HOST` works from this account without a question
    ");
}

#[test]
fn ssh_that_is_not_installed() {
    requires!(openssh::missing());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.machine.write("config/keys/x.key", vec![7u8; 4096]);
    let ran = remote
        .machine
        .sprat(&["snapshots", "host:x.luks", "--ssh-command", "/nowhere/ssh"]);
    assert_snapshot!(ran.failed_with(1), @r"
    exit 1
    --- stderr
    sprat: the program /nowhere/ssh was not found on this machine
    Hint: nothing was changed. Install the program with your package manager (openssh-client), or give another one with --ssh-command
    ");
}

#[test]
fn server_without_sftp() {
    requires!(openssh::missing());
    let options = OpenSshOptions {
        no_sftp: true,
        ..OpenSshOptions::default()
    };
    let remote = RemoteMachine::start(&options);
    remote.machine.write("config/keys/x.key", vec![7u8; 4096]);
    assert_snapshot!(remote.backup().failed_with(14), @r"
    exit 14
    --- stderr
    sprat: job home failed
    Caused by:
      1: can't reach 127.0.0.1: the server offers no SFTP (subsystem request failed on channel 0)
    Hint: check that `sftp HOST` works from this account without a question
    ");
}

#[test]
fn server_that_lacks_its_sftp_program() {
    requires!(openssh::missing());
    let options = OpenSshOptions {
        no_sftp: true,
        config_lines: vec!["Subsystem sftp /nowhere/sftp-server".into()],
        ..OpenSshOptions::default()
    };
    let remote = RemoteMachine::start(&options);
    remote.machine.write("config/keys/x.key", vec![7u8; 4096]);
    let ran = remote.backup();
    let said = ran.failed_with(14);
    assert!(
        said.contains("the server does not have the program for SFTP"),
        "{said}"
    );
    assert!(said.contains("status 127"), "{said}");
    assert!(said.contains("check that `sftp HOST` works"), "{said}");
}

#[test]
fn folder_on_the_server_is_missing() {
    requires!(openssh::missing());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    fs::remove_dir_all(remote.machine.path("store")).unwrap();
    let ran = remote.sprat(&["init", "TARGET", "--size", "1G", "--cheap-kdf-for-tests"]);
    assert_snapshot!(ran.failed_with(1), @r"
    exit 1
    --- stderr
    sprat: open folder ssh://127.0.0.1[DIR]/store: not found
    Hint: nothing was changed. Check the path, and whether its disk is mounted on the server; sprat creates no folders on a server
    ");
}

#[test]
fn server_without_fsync_is_refused_unless_allowed() {
    requires!(openssh::missing());
    let sftp_arguments = vec!["-P".to_owned(), "fsync".to_owned()];
    let options = OpenSshOptions {
        sftp_arguments,
        ..OpenSshOptions::default()
    };
    let remote = RemoteMachine::start(&options);
    let init = ["init", "TARGET", "--size", "1G", "--cheap-kdf-for-tests"];
    assert_snapshot!(remote.sprat(&init).failed_with(1), @r"
    exit 1
    --- stderr
    sprat: ssh://127.0.0.1[DIR]/store can't make data durable: it has no fsync@openssh.com
    Hint: nothing was changed. Use an OpenSSH server. With --allow-no-fsync sprat writes anyway, but a crash of the server can destroy the whole container. The new key file [DIR]/config/keys/x.key stays. The next `sprat init` uses it
    ");
    let insist = [&init[..], &["--allow-no-fsync"]].concat();
    remote.ok(&insist);
    assert_eq!(remote.backup().code, 1);
    let ran = remote.ok(&[
        "backup",
        "TARGET",
        "--name",
        "home",
        "src",
        "--allow-no-fsync",
    ]);
    assert!(ran.stdout.contains("can't report"), "{}", ran.whole());
}

#[test]
fn read_only_account_restores_and_refuses_to_back_up() {
    requires!(openssh::missing());
    let remote = RemoteMachine::start(&OpenSshOptions::default());
    remote.init();
    remote.backup().succeeded();
    let RemoteMachine { machine, sshd, .. } = remote;
    drop(sshd);
    let options = OpenSshOptions {
        sftp_arguments: vec!["-R".to_owned()],
        ..OpenSshOptions::default()
    };
    let remote = RemoteMachine::with(machine, &options);
    assert_snapshot!(remote.backup().failed_with(1), @r"
    exit 1
    --- stderr
    sprat: job home failed
    Caused by:
      1: the account on ssh://127.0.0.1[DIR]/store seems to be read-only: the server offers no fsync and refuses to remove files
    Hint: nothing was changed. `restore` and `mount` still work. For backups the account needs the right to write
    ");
    remote.ok(&["restore", "TARGET", "home", "--to", "back"]);
    let back = remote
        .machine
        .path("back")
        .join(remote.machine.path("src/a").strip_prefix("/").unwrap());
    assert_eq!(fs::read(back).unwrap(), b"alpha\n");
}
