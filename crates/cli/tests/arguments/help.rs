//! Help pages and completions.

use insta::assert_snapshot;

use sprat_testkit::machine::TestMachine;

#[test]
fn help_lists_the_commands_and_the_exit_codes() {
    let ran = TestMachine::new().sprat(&["--help"]);
    assert_snapshot!(ran.whole(), @r"
    exit 0
    --- stdout
    End-to-end encrypted backups with rsync: one LUKS2 file on any SSH server

    Usage: sprat [OPTIONS] <COMMAND>

    Commands:
      init         Make a container: key file, LUKS2 header, file system; print its recovery sheet
      backup       Run jobs of the config, or one job given here
      snapshots    List the snapshots of a container
      restore      Copy a snapshot, or a part of it, back
      prune        Remove the snapshots of a job that no rule keeps
      mount        Mount a container to look round in it; it stays mounted until `sprat umount`
      umount       Unmount a container and wait until everything is on the server's disk
      check        Look whether a container is whole: header, file system, and if asked for every file
      copy         Copy a container to another store, or move it there, and read it back
      trim         Give the space of deleted snapshots back to the server
      grow         Give a container a larger size
      status       Show how things stand: space, the last runs of each job, the lock
      unlock       Remove the lock of a session that died on another machine
      key          List, add and remove keys; print the recovery sheet; keep the header and put it back
      doctor       Look whether this machine, the config and the servers are in order
      completions  Print a shell's completion script
      help         Print this message or the help of the given subcommand(s)

    Options:
      -h, --help
              Print help (see a summary with '-h')

      -V, --version
              Print version

    Global options:
          --config <FILE>
              Read this config instead of /etc/sprat/sprat.toml (root) or ~/.config/sprat/sprat.toml

          --json
              Print results as JSON on stdout, and a failure as JSON on stderr

      -q, --quiet
              Print results, warnings and failures only

      -v, --verbose
              Print every step

          --ssh-command <CMD>
              Run this instead of `ssh`; split into words as a shell does, never run by one

          --mode <MODE>
              Where decryption happens

              Possible values:
              - auto:   In the kernel where it has dm-crypt, else in sprat
              - kernel: In the kernel, by dm-crypt
              - user:   In sprat itself
              
              [default: auto]

          --key-file <FILE>
              Unlock with this key file

          --passphrase-file <FILE>
              Unlock with the passphrase in this file (one newline at its end is dropped)

          --passphrase-command <CMD>
              Unlock with the passphrase that this command prints; split into words, not run by a shell

          --fingerprint <HEX>
              Accept this container only with the fingerprint that its recovery sheet shows

          --insist-without-fsync
              Write although the server can't fsync: a crash of the server may then lose the container

          --ignore-lock
              Read although another machine holds the lock: for when that machine is gone for good

          --accept-older-state
              Go on although the container is older than this machine knows it: snapshots may be missing

          --accept-changed-keys
              Go on although key slots were changed, and not by this machine

          --no-cache
              Read everything from the server: neither use nor fill the local cache of encrypted blocks

    Exit codes:
        0  done
        1  failed
        2  wrong command line or config; nothing was started
        3  snapshot made, some source files unread
       10  no container there
       11  locked by another session
       12  wrong key file or passphrase
       13  remote data damaged, or not what was pinned
       14  server not reached
      130  interrupted
    ");
}

#[test]
fn what_is_missing_or_asked_twice_shows_commands_and_none_of_sprats_own() {
    let machine = TestMachine::new();
    // Settings in the environment are arguments to the parser.
    let bare = machine.sprat::<&str>(&[]).failed_with(2);
    assert!(
        bare.contains("snapshots") && bare.contains("doctor"),
        "{bare}"
    );
    for own in ["volume-process", "worker", "mount-keeper"] {
        assert!(!bare.contains(own), "{bare}");
    }
    let help = machine.sprat(&["--help"]);
    for asked in [&["help", "--help"][..], &["help", "-h"], &["help"]] {
        let ran = machine.sprat(asked);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        assert!(help.stdout.contains("Exit codes:") && ran.stdout.contains("Exit codes:"));
    }
}

#[test]
fn every_command_has_a_help_with_an_example() {
    let machine = TestMachine::new();
    let commands = [
        "init",
        "backup",
        "snapshots",
        "restore",
        "prune",
        "mount",
        "umount",
        "trim",
        "grow",
        "unlock",
        "key",
        "doctor",
        "completions",
    ];
    for command in commands {
        let ran = machine.sprat(&[command, "--help"]);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        assert!(
            ran.stdout.contains(&format!("  sprat {command}")),
            "{}",
            ran.stdout
        );
        assert!(
            !ran.stdout.contains("for-tests"),
            "hidden options stay hidden: {}",
            ran.stdout
        );
    }
}

#[test]
fn help_of_backup_shows_both_forms() {
    let ran = TestMachine::new().sprat(&["backup", "-h"]);
    let beginning: String = ran.stdout.split("Options:").next().unwrap().to_owned();
    assert_snapshot!(beginning, @r"
    Run jobs of the config, or one job given here

    Usage: sprat backup [OPTIONS] [JOB]...
           sprat backup [OPTIONS] --name JOB TARGET SOURCE...

    Arguments:
      [JOB]...  Jobs of the config (all of them if none is named); with --name: TARGET SOURCE…
    ");
}

#[test]
fn completions_are_made_for_the_usual_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let ran = TestMachine::new().sprat(&["completions", shell]);
        assert_eq!(ran.code, 0);
        assert!(ran.stdout.contains("sprat") && ran.stdout.contains("snapshots"));
        assert!(ran.stdout.contains("allow-no-fsync"));
        assert!(!ran.stdout.contains("insist-without-fsync"), "an old name");
        for hidden in ["cheap-kdf", "state-dir", "volume-process", "mount-keeper"] {
            assert!(!ran.stdout.contains(hidden), "{shell}: {hidden}");
        }
    }
}
