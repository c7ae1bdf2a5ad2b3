//! What goes wrong in the field, each with its message and exit code, through the real program.

use std::fs;
use std::os::unix::fs::FileExt;

use insta::assert_snapshot;
use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

#[test]
fn wrong_key_file_is_reported_and_changes_nothing() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write("other.key", vec![7u8; 4096]);
    let ran = machine.sprat(&["snapshots", CONTAINER, "--key-file", "other.key"]);
    assert_snapshot!(ran.failed_with(12), @r"
    exit 12
    --- stderr
    sprat: the key or passphrase opens none of the 2 key slots
    Caused by:
      1: the key file [DIR]/other.key was tried
    Hint: nothing was changed. Check which key file or passphrase belongs to this container. The recovery key on the sheet opens it, too: write the key to a file, and give --passphrase-file FILE
    ");
    let ran = machine.backup(&["--key-file", "other.key"]);
    assert_snapshot!(ran.failed_with(12), @r"
    exit 12
    --- stderr
    sprat: job home failed
    Caused by:
      1: the key or passphrase opens none of the 2 key slots
      2: the key file [DIR]/other.key was tried
    Hint: nothing was changed. Check which key file or passphrase belongs to this container. The recovery key on the sheet opens it, too: write the key to a file, and give --passphrase-file FILE
    ");
    // Nobody has named the default key file.
    machine.write("config/keys/x.key", vec![7u8; 4096]);
    let text = machine.sprat(&["snapshots", CONTAINER]).failed_with(12);
    let tried = "the default key file [DIR]/config/keys/x.key was tried";
    assert!(text.contains(tried), "{text}");
}

#[test]
fn wrong_passphrase_is_reported_and_recovery_key_opens() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.write("right.txt", "correct horse battery staple\n");
    machine.write("wrong.txt", "correct horse battery maple\n");
    let recovery = machine.init(&[CONTAINER, "--size", "1G", "--passphrase-file", "right.txt"]);
    let open = |file: &str| machine.sprat(&["snapshots", CONTAINER, "--passphrase-file", file]);
    assert_snapshot!(open("wrong.txt").failed_with(12), @r"
    exit 12
    --- stderr
    sprat: the key or passphrase opens none of the 2 key slots
    Caused by:
      1: the passphrase file [DIR]/wrong.txt was tried
    Hint: nothing was changed. Check which key file or passphrase belongs to this container. The recovery key on the sheet opens it, too: write the key to a file, and give --passphrase-file FILE
    ");
    assert_eq!(open("right.txt").code, 0);
    let typed = recovery.replace('-', " ").to_uppercase();
    machine.write("recovery.txt", typed + "\n");
    assert_eq!(open("recovery.txt").code, 0);
    assert!(
        !machine.path("config/keys").exists(),
        "no key file was asked for"
    );
}

#[test]
fn no_container_there() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.write("x.key", vec![7u8; 4096]);
    let ran = machine.sprat(&["snapshots", CONTAINER, "--key-file", "x.key"]);
    assert_snapshot!(ran.failed_with(10), @r"
    exit 10
    --- stderr
    sprat: there is no container [DIR]/store/x.luks
    Hint: check the path, and whether its disk is mounted. To create a container, run `sprat init`
    ");
    let ran = machine.backup(&["--key-file", "x.key"]);
    assert_snapshot!(ran.failed_with(10), @r"
    exit 10
    --- stderr
    sprat: job home failed
    Caused by:
      1: there is no container [DIR]/store/x.luks
    Hint: check the path, and whether its disk is mounted. To create a container, run `sprat init`
    ");
}

#[test]
fn folder_of_the_container_is_missing() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.write("x.key", vec![7u8; 4096]);
    let ran = machine.sprat(&["snapshots", "nowhere/x.luks", "--key-file", "x.key"]);
    assert_snapshot!(ran.failed_with(10), @r"
    exit 10
    --- stderr
    sprat: open folder [DIR]/nowhere: not found
    Hint: nothing was changed. Check the path, and whether its disk is mounted on the server; sprat creates no folders on a server
    ");
    let ran = machine.sprat(&["init", "nowhere/x.luks", "--cheap-kdf-for-tests"]);
    assert_snapshot!(ran.failed_with(1), @r"
    exit 1
    --- stderr
    sprat: open folder [DIR]/nowhere: not found
    Hint: nothing was changed. Check the path, and whether its disk is mounted on the server; sprat creates no folders on a server
    ");
}

#[test]
fn mistyped_name_gets_no_unlock_hint_but_its_key_path() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let ran = machine.sprat(&["unlock", "store/x.luks"]);
    assert_snapshot!(ran.failed_with(10), @r"
    exit 10
    --- stderr
    sprat: there is no container [DIR]/store/x.luks
    Hint: nothing was changed, and there is no lock; check the path, and whether its disk is mounted. To create a container, run `sprat init`
    ");
    // `setsid`: without a terminal to ask on. Where there is no container, no key is the lesser evil.
    let sought = ["snapshots", "store/x.luks"];
    let ran = machine.sprat_under(&["setsid", "--wait"], &sought);
    assert_snapshot!(ran.failed_with(10), @r"
    exit 10
    --- stderr
    sprat: there is no container [DIR]/store/x.luks
    Hint: check the path, and whether its disk is mounted. To create a container, run `sprat init`
    ");
    machine.write("store/x.luks", "");
    let ran = machine.sprat_under(&["setsid", "--wait"], &sought);
    assert_snapshot!(ran.failed_with(2), @r"
    exit 2
    --- stderr
    sprat: there is no key file [DIR]/config/keys/x.key
    Hint: nothing was started. Check whether its disk is mounted. Or give a key with --key-file, --passphrase-file or --passphrase-command, or in the config
    ");
}

#[test]
fn two_runs_at_once_report_which_container_is_open() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt"]);
    let ran = machine.backup(&[]);
    let text = ran.failed_with(11);
    machine.ok(&["umount", "mnt"]);
    assert_snapshot!(text, @r"
    exit 11
    --- stderr
    sprat: job home failed
    Caused by:
      1: another process on this machine has [DIR]/store/x.luks open
    Hint: nothing was changed. The container is mounted at [DIR]/mnt. Browse it there, or run `sprat umount [DIR]/mnt` first
    ");
    machine.nothing_is_left();
}

#[test]
fn sources_with_dots_keep_one_path() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    fs::create_dir_all(machine.path("source/deep")).unwrap();
    machine.write("source/file", "content");
    let up = machine.path("source/deep/../../source");
    machine.ok(&["backup", CONTAINER, "--name", "dots", &up.to_string_lossy()]);
    let what = format!("dots:{}", machine.path("source/file").display());
    machine.ok(&["restore", CONTAINER, &what, "--to", "back"]);
    assert_eq!(fs::read(machine.path("back/file")).unwrap(), b"content");
    let gone = machine.path("nowhere/../source");
    let ran = machine.sprat(&[
        "backup",
        CONTAINER,
        "--name",
        "dots",
        &gone.to_string_lossy(),
    ]);
    assert_snapshot!(ran.failed_with(1), @r"
    exit 1
    --- stderr
    sprat: source [DIR]/nowhere/..: can't be found
    Caused by:
      1: No such file or directory (os error 2)
    Hint: nothing was started. Check the path
    ");
}

#[test]
fn init_never_overwrites() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let key = fs::read(machine.path("config/keys/x.key")).unwrap();
    let ran = machine.sprat(&["init", CONTAINER, "--size", "1G", "--cheap-kdf-for-tests"]);
    assert_snapshot!(ran.failed_with(1), @r"
    exit 1
    --- stderr
    sprat: [DIR]/store/x.luks exists already
    Hint: nothing was changed: `sprat init` never overwrites a container. Choose another name, or delete the old container on the server yourself. If an earlier `sprat init` created it but was interrupted before it showed the sheet, run `sprat key add TARGET --new-recovery`: it creates a recovery key and shows its sheet. If the key file is lost, the recovery key on the sheet opens the container
    ");
    assert_eq!(fs::read(machine.path("config/keys/x.key")).unwrap(), key);
    machine.ok(&["snapshots", CONTAINER]);
    machine.write("store/y.luks", "somebody's file");
    let ran = machine.sprat(&[
        "init",
        "store/y.luks",
        "--size",
        "1G",
        "--cheap-kdf-for-tests",
    ]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert_eq!(
        fs::read(machine.path("store/y.luks")).unwrap(),
        b"somebody's file"
    );
}

#[test]
fn file_that_is_no_container() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write("store/z.luks", vec![1u8; 1 << 20]);
    let key = machine.path("config/keys/x.key");
    let ran = machine.sprat(&[
        "snapshots",
        "store/z.luks",
        "--key-file",
        key.to_str().unwrap(),
    ]);
    assert_snapshot!(ran.failed_with(10), @r"
    exit 10
    --- stderr
    sprat: not a LUKS container: no LUKS header at its beginning
    Hint: nothing was changed. Check the path: the file there is not a container
    ");
}

#[test]
fn truncated_container() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let file = machine.container_file();
    file.set_len(300 << 20).unwrap();
    assert_snapshot!(machine.sprat(&["snapshots", CONTAINER]).failed_with(13), @r"
    exit 13
    --- stderr
    sprat: the container is cut short: it has 314572800 bytes and needs 1073741824
    Hint: nothing was changed. The data after the cut is lost on this server. Find a complete copy of the file before you write to it again
    ");
    file.set_len(10 << 20).unwrap();
    assert_snapshot!(machine.backup(&[]).failed_with(13), @r"
    exit 13
    --- stderr
    sprat: job home failed
    Caused by:
      1: truncated container: 10485760 bytes long, at least 16781312 needed
    Hint: nothing was changed. Don't write to the file. Search the server for an intact copy of it
    ");
}

#[test]
fn one_damaged_header_copy_is_reported_and_two_are_refused() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let file = machine.container_file();
    file.write_all_at(&[0xff; 64], 4096).unwrap();
    let ran = machine.backup(&[]).succeeded();
    let warning = ran
        .stderr
        .lines()
        .find(|line| line.contains("warning"))
        .unwrap()
        .to_owned();
    assert_snapshot!(warning, @"sprat: warning: x: one of the two copies of the LUKS2 header is damaged \
                                (first: wrong checksum); sprat used the other one. The data is \
                                complete. To repair the header, run `sprat key header-restore`");
    file.write_all_at(&[0xff; 64], 16384 + 4096).unwrap();
    assert_snapshot!(machine.backup(&[]).failed_with(13), @r"
    exit 13
    --- stderr
    sprat: job home failed
    Caused by:
      1: both LUKS2 header copies are damaged (primary: wrong checksum; secondary: wrong checksum)
    Hint: nothing was changed. This machine has a saved copy of the header, which opens with 2 keys. Run `sprat key header-restore` to restore it. If only the header was damaged, all data is then available again
    ");
}

#[test]
fn swapped_header_is_refused_and_a_fingerprint_too() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let key = machine.path("config/keys/x.key");
    machine.init(&[
        "store/other.luks",
        "--size",
        "1G",
        "--key-file",
        key.to_str().unwrap(),
    ]);
    let mut other = vec![0; 1 << 20];
    let from = fs::File::open(machine.path("store/other.luks")).unwrap();
    from.read_exact_at(&mut other, 0).unwrap();
    let to = machine.container_file();
    to.write_all_at(&other, 0).unwrap();
    let text = machine.sprat(&["snapshots", CONTAINER]).failed_with(13);
    let first = text
        .lines()
        .nth(2)
        .unwrap()
        .split(" is ")
        .next()
        .unwrap()
        .to_owned();
    assert_snapshot!(first, @"sprat: the LUKS2 header was changed: volume key digest");
    let ran = machine.sprat(&[
        "snapshots",
        CONTAINER,
        "--fingerprint",
        "0000-1111-2222-3333-4444",
    ]);
    assert_eq!(ran.code, 13, "{}", ran.whole());
}

#[test]
fn new_machine_trusts_once_and_reports_the_fingerprint() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    fs::remove_dir_all(machine.path("state")).unwrap();
    let first = machine.ok(&["snapshots", CONTAINER]);
    assert!(first.stderr.contains("fingerprint "), "{}", first.whole());
    let second = machine.sprat(&["snapshots", CONTAINER]);
    assert!(!second.stderr.contains("fingerprint"), "{}", second.whole());
}

#[test]
fn sources_missing_or_empty_make_no_snapshot() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    fs::create_dir(machine.path("empty")).unwrap();
    let backup = |source: &str| machine.sprat(&["backup", CONTAINER, "--name", "home", source]);
    assert_snapshot!(backup("nowhere").failed_with(1), @r"
    exit 1
    --- stderr
    sprat: job home failed
    Caused by:
      1: source [DIR]/nowhere: there is no such file or folder
    Hint: no snapshot was created. Mount the disk of the source, or remove the source from the job
    ");
    assert_snapshot!(backup("empty").failed_with(1), @r"
    exit 1
    --- stderr
    sprat: job home failed
    Caused by:
      1: source [DIR]/empty: is empty. Its disk may not be mounted
    Hint: no snapshot was created. Mount the disk of the source. If the source is meant to be empty, set allow_empty = true in the job, or give --allow-empty
    ");
    assert_snapshot!(machine.sprat(&["snapshots", CONTAINER]).whole(), @r"
    exit 0
    --- stdout
    no snapshots yet
    ");
}

#[test]
fn partly_unreadable_source_makes_a_snapshot_and_exits_with_3() {
    requires!(needs::root(), needs::program("setpriv"));
    let machine = TestMachine::with_container();
    let hidden = machine.write("src/hidden", "for nobody's eyes");
    std::os::unix::fs::chown(hidden, Some(65534), Some(65534)).unwrap();
    // Root without the right to pass over permissions.
    let outer = [
        "setpriv",
        "--bounding-set",
        "-dac_override,-dac_read_search",
    ];
    let ran = machine.sprat_under(&outer, &["backup", CONTAINER, "--name", "home", "src"]);
    let text = ran.failed_with(3);
    let unread = text
        .lines()
        .filter(|line| line.contains("NOT") || line.starts_with("  "));
    assert_snapshot!(unread.collect::<Vec<_>>().join("\n"), @r"
    home: 1 source file could not be read, and NOT stored in this snapshot:
      [DIR]/src/hidden: Permission denied (13)
    ");
    let listed = machine.sprat(&["snapshots", CONTAINER]);
    assert!(
        listed.stdout.contains("1 file unread, latest"),
        "{}",
        listed.whole()
    );
    let ran = machine.sprat(&["restore", CONTAINER, "home", "--to", "back"]);
    assert!(
        ran.stderr.contains("lacks 1 file that could not be read"),
        "{}",
        ran.whole()
    );
}

#[test]
fn job_snapshot_or_path_that_is_not_there() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    assert_snapshot!(machine.sprat(&["snapshots", CONTAINER]).whole(), @r"
    exit 0
    --- stdout
    no snapshots yet
    ");
    machine.backup(&[]).succeeded();
    let restore = |what: &str| {
        machine
            .sprat(&["restore", CONTAINER, what, "--to", "back"])
            .failed_with(1)
    };
    assert_snapshot!(restore("hom"), @r"
    exit 1
    --- stderr
    sprat: there is no job hom on this volume
    Hint: no snapshot was changed. Run `sprat snapshots` to list the jobs and snapshots
    ");
    assert_snapshot!(restore("home/2001-01-01T00-00-00Z"), @r"
    exit 1
    --- stderr
    sprat: job home has no snapshot 2001-01-01T00-00-00Z
    Hint: no snapshot was changed. Run `sprat snapshots` to list the jobs and snapshots
    ");
    let text = restore("home:/no/such/path");
    assert!(text.contains("has no /no/such/path"), "{text}");
    let ran = machine.sprat(&["snapshots", CONTAINER, "--job", "www"]);
    assert_snapshot!(ran.failed_with(1), @r#"
    exit 1
    --- stderr
    sprat: there is no job "www" in this container
    Hint: the container has these jobs: home
    "#);
}

#[test]
fn rsync_missing() {
    requires!(needs::root(), needs::program("unshare"));
    let machine = TestMachine::with_container();
    let hide = "for f in /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /sbin /bin; do \
                [ ! -e $f/rsync ] || mount --bind /dev/null $f/rsync; done; exec \"$@\"";
    let outer = ["unshare", "-m", "sh", "-c", hide, "sh"];
    let ran = machine.sprat_under(&outer, &["backup", CONTAINER, "--name", "home", "src"]);
    assert_snapshot!(ran.failed_with(1), @r"
    exit 1
    --- stderr
    sprat: job home failed
    Caused by:
      1: rsync was not found (rsync)
    Hint: install rsync (3.1.3 or newer) with your package manager
    ");
}

#[test]
fn no_fuse_and_no_loop_devices() {
    requires!(needs::root(), needs::program("unshare"));
    let machine = TestMachine::with_container();
    let bare = |nodes: &str| {
        let script = format!(
            "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && \
             mknod -m 666 /dev/urandom c 1 9 && mknod -m 666 /dev/random c 1 8 && {nodes} && exec \"$@\""
        );
        machine.sprat_under(
            &["unshare", "-m", "sh", "-c", &script, "sh"],
            &["backup", CONTAINER, "--name", "home", "src"],
        )
    };
    assert_snapshot!(bare("true").failed_with(1), @r"
    exit 1
    --- stderr
    sprat: job home failed
    Caused by:
      1: FUSE is not available: /dev/fuse doesn't exist
      2: No such file or directory (os error 2)
    Hint: run `sprat doctor` to see what this machine lacks
    ");
    assert_snapshot!(bare("mknod -m 666 /dev/fuse c 10 229").failed_with(1), @r"
    exit 1
    --- stderr
    sprat: job home failed
    Caused by:
      1: no loop device available: /dev/loop-control doesn't exist (module loop not loaded, or a container without it)
      2: No such file or directory (os error 2)
    Hint: run `sprat doctor` to see what this machine lacks
    ");
}

#[test]
fn a_root_that_is_no_mount_point() {
    requires!(needs::root(), needs::program("chroot"));
    let machine = TestMachine::with_container();
    let root = machine.path("root");
    fs::create_dir(&root).unwrap();
    // The whole system below another root; with the namespace all of it is gone.
    let within = |first: &str, arguments: &[&str]| {
        let script = format!(
            "R={}; {first}; for f in $(ls /); do [ -e $R/$f ] || [ -L $R/$f ] || \
             if [ -L /$f ]; then cp -a /$f $R/$f; \
             elif [ -d /$f ]; then mkdir $R/$f; fi; \
             [ -L /$f ] || [ ! -d /$f ] || mount --rbind /$f $R/$f; done; exec chroot $R \"$@\"",
            root.display()
        );
        machine.sprat_under(&["unshare", "-m", "sh", "-ec", &script, "sh"], arguments)
    };
    let (container, source) = (machine.path(CONTAINER), machine.path("src"));
    let paths = [&container, &source].map(|path| path.to_str().unwrap());
    let backup = ["backup", paths[0], "--name", "home", paths[1]];
    assert_snapshot!(within("true", &backup).failed_with(1), @r"
    exit 1
    --- stderr
    sprat: job home failed
    Caused by:
      1: can't make a mount namespace
      2: the root folder of this process is not a mount point: it runs in a chroot
    Hint: the chroot directory must be a mount point: run mount --bind FOLDER FOLDER before the chroot. Finished snapshots are unharmed
    ");
    let doctor = within("true", &["doctor", "--json"]).json();
    let found = doctor["findings"].as_array().unwrap().iter();
    let mut found = found.filter(|found| found["what"] == "namespaces");
    assert_eq!(found.next().unwrap()["state"], "missing");
    within("mount --bind $R $R", &backup).succeeded();
    machine.nothing_is_left();
    machine.restores_whole(&[]);
}

#[test]
fn mount_points_that_are_in_use_or_nobodys() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    fs::create_dir(machine.path("mnt")).unwrap();
    assert_snapshot!(machine.sprat(&["umount", "mnt"]).failed_with(1), @r"
    exit 1
    --- stderr
    sprat: no container is mounted at [DIR]/mnt
    ");
    // Over its own folders, or the container's, umount would not find what it needs.
    for own in ["state", "store", "."] {
        let refused = machine.sprat(&["mount", CONTAINER, own]).failed_with(2);
        assert!(refused.contains("that would hide the"), "{refused}");
    }
    machine.ok(&["mount", CONTAINER, "mnt"]);
    let again = machine.sprat(&["mount", CONTAINER, "mnt"]);
    let by_name = machine.sprat(&["umount", "x"]).failed_with(1);
    machine.ok(&["umount", "mnt"]);
    assert!(
        by_name.contains("Mounted: [DIR]/store/x.luks at [DIR]/mnt"),
        "{by_name}"
    );
    assert_snapshot!(again.failed_with(2), @r"
    exit 2
    --- stderr
    sprat: can't mount at [DIR]/mnt: a container is mounted there already
    ");
}

#[test]
fn check_finds_its_programs_with_the_path_that_cron_has() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine
        .run(
            machine
                .command()
                .env("PATH", "/usr/bin:/bin")
                .args(["check", CONTAINER]),
        )
        .succeeded();
}

#[test]
fn login_without_a_path_makes_no_local_container() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let said = machine.sprat(&["init", "user@host"]).failed_with(2);
    assert!(
        said.contains("did you mean user@host:PATH/x.luks?"),
        "{said}"
    );
    assert!(!machine.path("user@host").exists());
    assert!(!machine.path("config/keys").exists());
}

#[test]
fn read_only_state_folder_does_not_stop_reading() {
    requires!(needs::root(), needs::program("unshare"));
    let machine = TestMachine::with_container();
    machine.backup(&[]).succeeded();
    // As on a root file system that was remounted read-only, and on one without a free byte.
    let read_only = "mount --bind state state && mount -o remount,ro,bind state && exec \"$@\"";
    let full = "cp -a state kept && mount -t tmpfs -o size=4m,mode=700 t state && \
                cp -a kept/. state && rm -rf kept && \
                dd if=/dev/zero of=state/fill bs=4k 2>/dev/null; exec \"$@\"";
    for (unwritable, stops_writing) in [(read_only, true), (full, false)] {
        let outer = ["unshare", "-m", "sh", "-c", unwritable, "sh"];
        let reads: [&[&str]; 6] = [
            &["snapshots", CONTAINER],
            &["check", CONTAINER],
            &["restore", CONTAINER, "home", "--to", "out"],
            &["key", "list", CONTAINER],
            &["key", "sheet", CONTAINER, "--without-secret"],
            &["key", "header-backup", CONTAINER, "out/header"],
        ];
        for command in reads {
            let ran = machine.sprat_under(&outer, command);
            assert_eq!(ran.code, 0, "{command:?}: {}", ran.whole());
        }
        assert!(machine.path("out").read_dir().unwrap().next().is_some());
        fs::remove_dir_all(machine.path("out")).unwrap();
        let writes: [&[&str]; 4] = [
            &["backup", CONTAINER, "--name", "home", "src"],
            &["key", "remove", CONTAINER, "1", "--allow-last"],
            &["copy", CONTAINER, "another.luks"],
            &["prune", CONTAINER, "--job", "home", "--keep-last", "1"],
        ];
        // On a full disk: see full_state.rs.
        for command in writes.into_iter().filter(|_| stops_writing) {
            let said = machine.sprat_under(&outer, command).failed_with(1);
            assert!(said.contains("--state-dir"), "{command:?}: {said}");
        }
        assert!(!machine.path("another.luks").exists());
    }
}

#[test]
fn output_that_nobody_reads_ends_quietly() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let reads: [&[&str]; 3] = [
        &["completions", "bash"],
        &["snapshots", CONTAINER],
        &["doctor"],
    ];
    for command in reads {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let ran = machine
            .command()
            .args(command)
            .stdout(writer)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(
            ran.status.code().is_some_and(|code| code <= 1),
            "{command:?}: {said}"
        );
        assert!(
            !said.contains("panicked") && !said.contains("Broken pipe"),
            "{said}"
        );
    }
}

#[test]
fn missing_home_and_an_ignored_interrupt() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write(
        "config/sprat.toml",
        "[container.x]\ntarget = \"/nowhere/x.luks\"\n[job.j]\ncontainer = \"x\"\nsources = [\"~/src\"]\n",
    );
    let ran = machine.run(machine.command().env_remove("HOME").arg("backup"));
    // The account says where its home is; the container of the config is missing.
    let said = ran.failed_with(10);
    assert!(said.contains("/nowhere: not found"), "{said}");
    fs::remove_file(machine.path("config/sprat.toml")).unwrap();

    // A shell that runs it in the background has it ignore SIGINT.
    machine.write(
        "pass",
        "kill -INT $PPID; sleep 0.3; echo 'a long enough passphrase'\n",
    );
    let command = ["snapshots", CONTAINER, "--passphrase-command", "sh ./pass"];
    machine.sprat(&command).failed_with(130);
    let outer = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"];
    machine.sprat_under(&outer, &command).failed_with(12);
}
