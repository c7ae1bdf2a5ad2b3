//! Help pages and completions.

use insta::assert_snapshot;

use sprat_testkit::machine::TestMachine;

#[test]
fn help_lists_the_commands_in_groups_and_the_exit_codes() {
    let ran = TestMachine::new().sprat(&["--help"]);
    assert_snapshot!(ran.whole(), @r"
    exit 0
    --- stdout
    End-to-end encrypted backups with rsync: one LUKS2 file on any SSH server

    Usage: sprat [OPTIONS] COMMAND

    Set-up:
      setup        Set up backups: from an SSH login to the first scheduled backup
      init         Create a container, its key file and its recovery sheet
      config       Check the config, and show what is in effect
      schedule     Install, remove or show the timers that start sprat by itself
      doctor       Diagnose set-up problems
      completions  Print a completion script for a shell

    Every day:
      backup       Back up: run jobs of the config, or one job given on the command line
      run          Make the backups that are due, then prune: for timers
      status       Show each copy, free space and the lock
      check        Check a container's integrity
      drill        Restore a sample from the server, and compare it
      prune        Remove the snapshots of a job that no retention rule keeps

    Alarms:
      notify       Send a test notice, list open problems, send notices that wait
      accept       Close an alarm that stops a backup or a prune, so that it can continue

    Browse and restore:
      snapshots    List a container's snapshots
      ls           List a folder of a snapshot
      cat          Print a file of a snapshot
      find         Find files in all snapshots: when they came, changed and went
      versions     List the versions of a file or folder
      diff         Compare two snapshots
      analyze      Show what snapshots cost, and what a removal would free
      generations  List the past states of a container that its server keeps
      browse       Browse snapshots on the terminal
      restore      Restore a snapshot, or a part of it
      mount        Mount snapshots for browsing
      umount       Unmount a container and wait until all data is on the server's disk

    Keep and remove:
      pin          Pin a snapshot, so that it is never pruned or removed
      unpin        Unpin a snapshot, so that it can be pruned again
      remove       Remove snapshots by name

    Container maintenance:
      key          Manage keys, the recovery sheet and header backups
      trim         Release unused space to the server
      grow         Enlarge a container
      shrink       Make a container smaller
      copy         Copy or move a container, and verify the copy
      export       Export snapshots to a folder, and verify them

    Emergencies:
      unlock       Remove the lock of a session that died on another machine

    Exit codes:
        0  done
        1  failed
        2  wrong command line or config; nothing was started
        3  snapshot made, some source files unread
        4  a backup is overdue
        5  init --if-missing: the container is there, and the key opens it
       10  no container there
       11  locked by another session
       12  wrong key file or passphrase
       13  container damaged, or not the one that this machine knows
       14  server not reached
      130  interrupted

    More help:
      sprat COMMAND --help  Arguments, options and examples of a command
      sprat help options    Global options and environment variables
      sprat --version       The version
    ");
}

#[test]
fn global_options_and_environment_are_on_a_page_of_their_own() {
    let machine = TestMachine::new();
    for topic in ["options", "environment"] {
        let page = machine.sprat(&["help", topic]);
        assert_eq!(page.code, 0, "{}", page.whole());
        for option in [
            "--config <FILE>",
            "--ssh-command",
            "--mode",
            "--allow-no-fsync",
            "--no-cache",
        ] {
            assert!(page.stdout.contains(option), "{option}: {}", page.stdout);
        }
        for variable in ["SPRAT_CONFIG_DIR", "SPRAT_LOG", "SPRAT_ANSWER_TIMEOUT"] {
            assert!(
                page.stdout.contains(variable),
                "{variable}: {}",
                page.stdout
            );
        }
        for hidden in ["state-dir", "for-tests", "insist"] {
            assert!(!page.stdout.contains(hidden), "{hidden}: {}", page.stdout);
        }
    }
    let backup = machine.sprat(&["backup", "--help"]).stdout;
    assert!(
        !backup.contains("--ssh-command") && !backup.contains("--no-cache"),
        "{backup}"
    );
    assert!(backup.contains("sprat help options"), "{backup}");
    // Old names of options are accepted.
    let old = ["status", "--insist-without-fsync"];
    assert!(machine.sprat(&old).stderr.contains("nothing to show"));
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
        "run",
        "snapshots",
        "ls",
        "cat",
        "find",
        "versions",
        "diff",
        "restore",
        "prune",
        "pin",
        "unpin",
        "remove",
        "mount",
        "umount",
        "trim",
        "grow",
        "shrink",
        "unlock",
        "key",
        "config",
        "doctor",
        "schedule",
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
    Back up: run jobs of the config, or one job given on the command line

    Usage: sprat backup [OPTIONS] [JOB]...
           sprat backup [OPTIONS] --name JOB TARGET SOURCE...

    Examples:
      sprat backup
      sprat backup home
      sprat backup ssh://u1234@example.org/backup/home.luks --name home /home --exclude .cache/

    Arguments:
      [JOB]...  Jobs of the config, or copies (JOB@CONTAINER) [default: all]; with --name give TARGET
                SOURCE… instead
    ");
}
