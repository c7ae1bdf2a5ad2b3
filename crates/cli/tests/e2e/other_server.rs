//! A container's life on servers of each kind that docs/providers.md lists. Some have no shell, open no folder and state no
//! limits: a plain SFTP account is enough, whether it copies by itself or not.

use std::ffi::OsString;
use std::process::Output;
use std::time::Duration;

use sprat_testkit::client_and_server::{self, ClientAndServer};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::program::{run_within, shown};
use sprat_testkit::ssh_server::{OpenSshOptions, SshServer, asyncssh, dropbear, proftpd};
use sprat_testkit::{agent_server, requires};
use sprat_testkit_session::plain_volume::PlainVolume;

/// Runs `sprat` through `ssh`.
fn run(pair: &ClientAndServer, ssh: &[OsString], words: &[&str]) -> Output {
    let mut command = pair.sprat_through(ssh);
    command.arg("--cheap-kdf-for-tests").args(words);
    let output = run_within(&mut command, Duration::from_secs(120));
    eprintln!("{}", shown(&command, &output));
    output
}

#[test]
fn asyncssh_is_enough_for_a_containers_whole_life() {
    requires!(client_and_server::missing(), asyncssh::missing());
    whole_life(asyncssh::start_without_copies(), Trims::ThroughClient);
}

#[test]
fn asyncssh_with_copy_data_copies_on_the_server() {
    requires!(client_and_server::missing(), asyncssh::missing());
    whole_life(asyncssh::start(), Trims::ByCopying);
}

#[test]
fn proftpd_is_enough_for_a_containers_whole_life() {
    requires!(client_and_server::missing(), proftpd::missing());
    whole_life(proftpd::start(&[]), Trims::ThroughClient);
}

#[test]
fn dropbear_is_enough_for_a_containers_whole_life() {
    requires!(client_and_server::missing(), dropbear::missing());
    whole_life(dropbear::start(), Trims::ByItself);
}

#[test]
fn openssh_with_a_shell_is_enough_for_a_containers_whole_life() {
    requires!(client_and_server::missing());
    whole_life(SshServer::start(), Trims::ByItself);
}

/// As with `ForceCommand internal-sftp`: no shell. The server copies by itself.
#[test]
fn openssh_internal_sftp_without_a_shell_is_enough_for_a_containers_whole_life() {
    requires!(client_and_server::missing());
    let server = SshServer::start_with(&OpenSshOptions {
        internal_sftp: true,
        config_lines: vec!["ForceCommand internal-sftp".to_owned()],
        ..OpenSshOptions::default()
    });
    let trims = if_it_copies(&server);
    whole_life(server, trims);
}

/// Before OpenSSH 9.0 the server has no copy-data.
fn if_it_copies(server: &SshServer) -> Trims {
    let greeting = server.greeting().unwrap();
    let version = greeting.split_once("OpenSSH_").expect(&greeting).1;
    let major: u32 = version.split_once('.').unwrap().0.parse().unwrap();
    match major {
        ..9 => Trims::ThroughClient,
        9.. => Trims::ByCopying,
    }
}

/// As docs/providers.md sets up an account.
#[test]
fn openssh_internal_sftp_in_a_chroot_is_enough_for_a_containers_whole_life() {
    requires!(client_and_server::missing());
    let pair = ClientAndServer::new();
    let server = SshServer::start_with(&OpenSshOptions {
        internal_sftp: true,
        chroot: Some(pair.server()),
        ..OpenSshOptions::default()
    });
    let trims = if_it_copies(&server);
    whole_life_of(pair, server, trims);
}

/// A careful admin forbids what a backup does not need (`sftp-server -P`).
#[test]
fn openssh_with_a_list_of_refused_requests_is_enough() {
    requires!(client_and_server::missing());
    let refused = "symlink,readlink,hardlink,lsetstat,copy-data,expand-path,users-groups-by-id";
    let server = SshServer::start_with(&OpenSshOptions {
        internal_sftp: true,
        sftp_arguments: vec![format!("-P {refused}")],
        config_lines: vec![format!("ForceCommand internal-sftp -P {refused}")],
        ..OpenSshOptions::default()
    });
    whole_life(server, Trims::ThroughClient);
}

#[test]
fn init_names_what_a_server_lacks_and_leaves_nothing_there() {
    requires!(client_and_server::missing(), proftpd::missing());
    for (setting, why, hint) in [
        (
            "AllowOverwrite off",
            "does not let sprat write to an existing file",
            "AllowOverwrite on",
        ),
        (
            "HiddenStores on",
            "hides new files until they are closed",
            "HiddenStores off",
        ),
    ] {
        let server = proftpd::start(&[setting]);
        let pair = ClientAndServer::new();
        let target = format!("backup.example:{}", pair.container().display());
        let refused = run(
            &pair,
            &server.ssh_command(),
            &["init", &target, "--size", "1G"],
        );
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{setting}: {said}");
        for part in [
            "this server can't store a container",
            why,
            hint,
            "nothing was changed",
        ] {
            assert!(said.contains(part), "{setting}: {part}: {said}");
        }
        drop(server);
        let left: Vec<_> = std::fs::read_dir(pair.server()).unwrap().collect();
        assert!(left.is_empty(), "{setting}: {left:?}");
    }
}

/// As docs/agent.md sets up an account.
#[test]
fn the_agent_is_enough_for_a_containers_whole_life() {
    requires!(client_and_server::missing(), agent_server::missing());
    let pair = ClientAndServer::new();
    let server = SshServer::start_with(&OpenSshOptions::agent(&pair.server()));
    whole_life_of(pair, server, Trims::ByItself);
}

/// How a server frees space.
#[derive(Clone, Copy, PartialEq)]
enum Trims {
    /// `trim` needs no option: by a shell, or by the agent.
    ByItself,
    ByCopying,
    ThroughClient,
}

fn whole_life(server: SshServer, trims: Trims) {
    whole_life_of(ClientAndServer::new(), server, trims);
}

fn whole_life_of(mut pair: ClientAndServer, server: SshServer, trims: Trims) {
    let ssh = &server.ssh_command()[..];
    let sprat = |pair: &ClientAndServer, words: &[&str]| run(pair, ssh, words);
    let ok = |pair: &ClientAndServer, words: &[&str]| {
        let output = sprat(pair, words);
        assert!(output.status.success(), "{words:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let target = format!("backup.example:{}", pair.container().display());
    let size = pair.choose_size(1).to_string();
    ok(&pair, &["init", &target, "--size", &size]);

    let source = pair.path("source");
    std::fs::write(source.join("large"), vec![7; 24 << 20]).unwrap();
    for number in 0..200 {
        std::fs::write(source.join(format!("file-{number}")), number.to_string()).unwrap();
    }
    let shown_source = source.display().to_string();
    let backup = ["backup", &target, "--name", "home", &shown_source];
    ok(&pair, &backup);
    std::fs::remove_file(source.join("large")).unwrap();
    ok(&pair, &backup);

    ok(
        &pair,
        &["prune", &target, "--job", "home", "--keep-last", "1"],
    );
    let trim = ["trim", &target];
    if trims == Trims::ByItself {
        ok(&pair, &trim);
    } else {
        let refused = sprat(&pair, &trim);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success());
        assert!(said.contains("--rewrite"), "{said}");
    }
    let trim = ["trim", &target, "--rewrite"];
    match trims {
        Trims::ByItself => {}
        Trims::ByCopying => drop(ok(&pair, &trim)),
        Trims::ThroughClient => {
            let refused = sprat(&pair, &trim);
            let said = String::from_utf8_lossy(&refused.stderr).into_owned();
            assert!(said.contains("--through-client"), "{said}");
            ok(&pair, &[&trim[..], &["--through-client"]].concat());
        }
    }

    let word = pair.path("word");
    std::fs::write(&word, "correct horse battery staple").unwrap();
    let shown_word = word.display().to_string();
    let add = [
        "key",
        "add",
        &target,
        "--new-passphrase-file",
        &shown_word,
        "--label",
        "second",
    ];
    ok(&pair, &add);
    assert!(ok(&pair, &["key", "list", &target]).contains("second"));
    ok(&pair, &["check", &target, "--read-data"]);

    let to = pair.path("restored").join("home");
    let shown_to = to.display().to_string();
    ok(&pair, &["restore", &target, "home", "--to", &shown_to]);
    let back = to.join(source.strip_prefix("/").unwrap());
    assert_same(&Manifest::of(&source), &back, "restored");

    let image = pair.path("plain");
    let plain = PlainVolume::export(&pair.container(), &pair.key_file(), &image);
    plain.assert_clean();
    // A chroot has the server's folder mounted.
    drop(server);
    pair.assert_nothing_is_left();
}
