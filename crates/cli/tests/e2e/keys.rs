//! Keys added, listed, removed and rehearsed; headers kept and put back.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use insta::assert_snapshot;
use sprat_luks::{FormatOptions, Header, HeaderWrite, Secret, SlotKind, Turn};
use sprat_testkit::machine::strikes::{self, Blow};
use sprat_testkit::machine::{ADD_PASSPHRASE, CHEAP, CONTAINER, TestMachine};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{leases, needs, requires};

/// The list without dates and derivations, which differ from run to run.
fn listed(machine: &TestMachine) -> Vec<String> {
    let ran = machine.ok(&["key", "list", CONTAINER, "--json"]);
    let said = ran.json();
    let keys = said["keys"].as_array().unwrap().iter();
    keys.map(|key| {
        assert!(key["added"].is_string());
        format!(
            "{} {} {}",
            key["slot"],
            key["kind"].as_str().unwrap(),
            key["label"].as_str().unwrap_or("-")
        )
    })
    .collect()
}

fn opens(machine: &TestMachine, secret: &[&str]) -> bool {
    let mut all = vec!["key", "rehearse", CONTAINER];
    all.extend(secret);
    let ran = machine.sprat(&all);
    assert!([0, 12].contains(&ran.code), "{}", ran.whole());
    ran.code == 0
}

#[test]
fn a_key_is_added_listed_rehearsed_and_removed() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    assert_eq!(listed(&machine), ["0 key_file -", "1 recovery -"]);
    let add = ["key", "add", CONTAINER, CHEAP, "--label", "the desk"];
    let ran = machine.sprat(&[&add[..], &["--new-passphrase-file", "pass"]].concat());
    assert_snapshot!(ran.whole(), @r"
    exit 0
    --- stdout
    [DIR]/store/x.luks opens with the new key, in key slot 2
    ");
    assert_eq!(
        listed(&machine),
        ["0 key_file -", "1 recovery -", "2 passphrase the desk"]
    );
    for secret in [
        ["--passphrase-file", "pass"],
        ["--passphrase-file", "recovery"],
    ] {
        assert!(opens(&machine, &secret));
    }
    // Again, as after an interruption: it is seen that it is there.
    machine.ok(&[&add[..], &["--new-passphrase-file", "pass"]].concat());
    assert_eq!(listed(&machine).len(), 3);
    let container = fs::File::options()
        .read(true)
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    let mut header = vec![0; 16 << 20];
    container.read_exact_at(&mut header, 0).unwrap();
    let ran = machine.sprat(&["key", "remove", CONTAINER, "2"]);
    assert_snapshot!(ran.whole(), @r"
    exit 0
    --- stdout
    removed key slot 2
    --- stderr
    sprat: the removed key still opens old copies of the container file and of its header (on the server, in a snapshot of its disk). If somebody else has the key, run `sprat copy --new-key`, or create a new container
    ");
    // The server shows the header in which the removed key still opens.
    let mut now = vec![0; header.len()];
    container.read_exact_at(&mut now, 0).unwrap();
    container.write_all_at(&header, 0).unwrap();
    machine.backup(&[]).failed_with(13);
    container.write_all_at(&now, 0).unwrap();
    assert!(!opens(&machine, &["--passphrase-file", "pass"]));
    assert!(opens(&machine, &["--passphrase-file", "recovery"]));
    assert_eq!(listed(&machine), ["0 key_file -", "1 recovery -"]);
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
    assert!(leases::held(&machine.path("store")).is_empty());
}

#[test]
fn stock_cryptsetup_opens_with_an_added_key() {
    requires!(needs::root(), needs::program("cryptsetup"));
    let (machine, _) = TestMachine::small();
    machine.ok(&["key", "add", CONTAINER, CHEAP, "--new-key-file", "new.key"]);
    assert_eq!(
        fs::metadata(machine.path("new.key")).unwrap().mode() & 0o777,
        0o600
    );
    machine.ok(&[
        "key",
        "add",
        CONTAINER,
        CHEAP,
        "--new-passphrase-file",
        "pass",
    ]);
    for key in ["new.key", "pass"] {
        let tried = Command::new("cryptsetup")
            .args(["open", "--test-passphrase", "--key-file"])
            .args([machine.path(key), machine.path(CONTAINER)])
            .output()
            .unwrap();
        assert!(tried.status.success(), "{key}: {tried:?}");
    }
}

#[test]
fn a_new_key_file_gets_its_name_when_its_key_opens_the_container() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    // The default key file is not there, as on a new machine.
    let path = machine.path("config/keys/x.key");
    fs::rename(&path, machine.path("old.key")).unwrap();
    let add = [
        "key",
        "add",
        CONTAINER,
        CHEAP,
        "--new-key-file",
        path.to_str().unwrap(),
    ];
    let with = |secret: &str| machine.sprat(&[&add[..], &["--passphrase-file", secret]].concat());
    machine.write("wrong", "a passphrase that opens nothing");
    let failed = with("wrong");
    assert!(!path.exists(), "{}", failed.whole());
    assert_snapshot!(failed.failed_with(12), @r"
    exit 12
    --- stderr
    sprat: the key or passphrase opens none of the 2 key slots
    Caused by:
      1: the passphrase file [DIR]/wrong was tried
    Hint: nothing was changed. Check which key file or passphrase belongs to this container. The recovery key on the sheet opens it, too: write the key to a file, and give --passphrase-file FILE. The new key stays in [DIR]/config/keys/x.key.new. The same command uses it
    ");
    let waiting = machine.path("config/keys/x.key.new");
    let made = fs::read(&waiting).unwrap();
    with("recovery").succeeded();
    assert_eq!(fs::read(&path).unwrap(), made);
    assert!(!waiting.exists());
    assert!(opens(&machine, &["--key-file", path.to_str().unwrap()]));
    // A crash before the file got its name: the slot is there, and so is the key.
    fs::rename(&path, &waiting).unwrap();
    with("recovery").succeeded();
    assert_eq!(fs::read(&path).unwrap(), made);
    assert_eq!(listed(&machine).len(), 3);
}

#[test]
fn the_key_file_that_is_added_does_not_open_the_container() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let path = machine.path("config/keys/x.key");
    fs::rename(&path, machine.path("old.key")).unwrap();
    machine.write("config/keys/x.key", vec![7; 4096]);
    let add = [
        "key",
        "add",
        CONTAINER,
        CHEAP,
        "--new-key-file",
        path.to_str().unwrap(),
    ];
    // Without a terminal nothing else can be asked for.
    let ran = machine.sprat_under(&["setsid", "--wait"], &add);
    assert_snapshot!(ran.failed_with(2), @r"
    exit 2
    --- stderr
    sprat: no key was given, and there is no terminal to ask on
    Caused by:
      1: No such device or address (os error 6)
      2: the default key file is the one to add: another key must open the container
    Hint: nothing was started. Give a key with --key-file, --passphrase-file or --passphrase-command, or in the config
    ");
    machine.ok(&[&add[..], &["--passphrase-file", "recovery"]].concat());
    machine.ok(&["snapshots", CONTAINER]);
}

#[test]
fn last_key_and_key_in_use_are_not_removed_by_accident() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let mut seen = String::new();
    for arguments in [
        &["0"][..],
        &["7"],
        &["1", "--allow-last", "--passphrase-file", "recovery"],
    ] {
        let before = fs::read(machine.path(CONTAINER)).unwrap();
        let ran = machine.sprat(&[&["key", "remove", CONTAINER], arguments].concat());
        seen.push_str(&format!("{arguments:?}\n{}", ran.failed_with(2)));
        assert!(before == fs::read(machine.path(CONTAINER)).unwrap());
    }
    machine.ok(&["key", "remove", CONTAINER, "0", "--allow-in-use"]);
    let last = ["--allow-in-use", "--passphrase-file", "recovery"];
    let ran = machine.sprat(&[&["key", "remove", CONTAINER, "1"], &last[..]].concat());
    seen.push_str(&ran.failed_with(2));
    assert_snapshot!(seen, @r#"
    ["0"]
    exit 2
    --- stderr
    sprat: the given key opens key slot 0
    Hint: nothing was changed. Give another key of this container with --key-file or --passphrase-file: that proves that the other key opens the container. If you are sure that you have another key, add --allow-in-use
    ["7"]
    exit 2
    --- stderr
    sprat: there is no key slot 7
    Hint: nothing was changed. `sprat key list` shows the slots
    ["1", "--allow-last", "--passphrase-file", "recovery"]
    exit 2
    --- stderr
    sprat: the given key opens key slot 1
    Hint: nothing was changed. Give another key of this container with --key-file or --passphrase-file: that proves that the other key opens the container. If you are sure that you have another key, add --allow-in-use
    exit 2
    --- stderr
    sprat: key slot 1 is the last one
    Hint: nothing was changed. Add another key first: `sprat key add`
    "#);
    assert!(opens(&machine, &["--passphrase-file", "recovery"]));
}

#[test]
fn restored_header_brings_its_keys_back() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    machine.ok(&["key", "header-backup", CONTAINER, "kept"]);
    let about = fs::metadata(machine.path("kept")).unwrap();
    assert_eq!((about.mode() & 0o777, about.len()), (0o600, 16 << 20));
    let ran = machine.sprat(&["key", "header-backup", CONTAINER, "kept"]);
    assert!(ran.failed_with(1).contains("sprat overwrites no file"));
    let key = machine.path("config/keys/x.key");
    let key = ["--key-file", key.to_str().unwrap()];
    machine.ok(&ADD_PASSPHRASE);
    let remove = ["key", "remove", CONTAINER, "0", "--passphrase-file", "pass"];
    let remove = [&remove[..], &["--allow-in-use"]].concat();
    machine.ok(&remove);
    assert!(!opens(&machine, &key));
    let ran = machine.sprat(&["key", "header-restore", CONTAINER, "kept"]);
    assert!(ran.failed_with(2).contains("--yes"), "{}", ran.whole());
    assert!(!opens(&machine, &key));
    let ran = machine.sprat(&["key", "header-restore", CONTAINER, "kept", "--yes"]);
    let whole = ran.whole();
    let (said, kept) = whole.split_once("sprat: the replaced header").unwrap();
    // It rises by a random step.
    let (_, sequence) = said.split_once("present header has sequence ").unwrap();
    let (sequence, _) = sequence.split_once(',').unwrap();
    let said = said.replace(&format!("sequence {sequence},"), "sequence [N],");
    assert!(
        kept.contains(&format!(".before-restore-{sequence}-")),
        "{whole}"
    );
    assert_snapshot!(said, @r"
    exit 0
    --- stdout
    restored the header of [DIR]/store/x.luks; the given key opens slot 0
    --- stderr
    sprat: the present header has sequence [N], the saved one 4
    sprat:   slot 0 COMES BACK: key file
    sprat:   slot 1 stays: recovery key
    sprat:   slot 2 GOES AWAY: passphrase
    ");
    assert!(opens(&machine, &key));
    assert!(!opens(&machine, &["--passphrase-file", "pass"]));
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
}

#[test]
fn destroyed_header_is_restored_from_the_kept_copy() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    machine.ok(&ADD_PASSPHRASE);
    let file = fs::File::options()
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    file.write_all_at(&vec![0xa5; 1 << 20], 0).unwrap();
    let listed = machine.sprat(&["key", "list", CONTAINER]);
    assert!([10, 13].contains(&listed.code), "{}", listed.whole());
    machine.ok(&["key", "header-restore", CONTAINER, "--yes"]);
    assert!(opens(&machine, &["--passphrase-file", "pass"]));
    machine.restores_whole(&[]);
}

#[test]
fn a_header_of_another_container_is_refused() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    machine.init(&["store/y.luks", "--size", "64M"]);
    machine.ok(&["key", "header-backup", "store/y.luks", "kept"]);
    let key = machine.path("config/keys/y.key");
    let key = key.to_str().unwrap();
    let restore = [
        "key",
        "header-restore",
        CONTAINER,
        "kept",
        "--yes",
        "--key-file",
        key,
    ];
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    let whole = machine.sprat(&restore).failed_with(2);
    assert!(whole.contains("another container"), "{whole}");
    assert!(before == fs::read(machine.path(CONTAINER)).unwrap());
    // With its header destroyed, its identity distinguishes it; without the state, its volume does.
    let file = fs::File::options()
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    file.write_all_at(&vec![0; 1 << 20], 0).unwrap();
    let whole = machine.sprat(&restore).failed_with(13);
    assert!(whole.contains("belongs to another container"), "{whole}");
    fs::remove_dir_all(machine.path("state/containers")).unwrap();
    let whole = machine.sprat(&restore).failed_with(13);
    assert!(
        whole.contains("does not fit this container's volume"),
        "{whole}"
    );
}

#[test]
fn rehearsal_reports_wrong_key_and_typo() {
    requires!(needs::root());
    let (machine, recovery) = TestMachine::small();
    machine.write("wrong", "not the passphrase");
    let ran = machine.sprat(&["key", "rehearse", CONTAINER, "--passphrase-file", "wrong"]);
    assert_eq!(ran.code, 12, "{}", ran.whole());
    let swapped: String = [&recovery[5..10], &recovery[..5], &recovery[10..]].concat();
    machine.write("typo", &swapped);
    let ran = machine.sprat(&["key", "rehearse", CONTAINER, "--passphrase-file", "typo"]);
    assert!(ran.failed_with(12).contains("typing error"));
    let ran = machine.sprat(&["key", "rehearse", CONTAINER]);
    assert!(
        ran.failed_with(2).contains("no terminal"),
        "never the key file that lies there"
    );
    let right = [
        "key",
        "rehearse",
        CONTAINER,
        "--passphrase-file",
        "recovery",
    ];
    let ran = machine.sprat(&[&right[..], &["--fingerprint", "0000-0000-0000-0000-0000"]].concat());
    assert_eq!(ran.code, 13, "{}", ran.whole());
    machine.ok(&right);
    let said = machine.sprat(&["key", "list", CONTAINER, "--json"]).json();
    assert!(said["keys"][0]["proved"].is_null());
    assert!(said["keys"][1]["proved"].is_string());
}

/// `add` with a passphrase in a file, which is tried.
#[test]
fn key_that_backups_use_is_not_removed_by_accident() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let remove = [
        "key",
        "remove",
        CONTAINER,
        "0",
        "--passphrase-file",
        "recovery",
    ];
    // The default key file, one that the config names, and one that can't be determined.
    for config in [
        "",
        "[container.x]\ntarget = \"TARGET\"\nkey_file = \"KEY\"\n",
    ] {
        let target = machine.path(CONTAINER).display().to_string();
        let key = machine.path("config/keys/x.key").display().to_string();
        let config = config.replace("TARGET", &target).replace("KEY", &key);
        machine.write("config/sprat.toml", config);
        let said = machine.sprat(&remove).failed_with(2);
        assert!(said.contains("this machine's backups"), "{said}");
    }
    let unknown = format!(
        "[container.x]\ntarget = \"{}\"\npassphrase_command = \"false\"\n",
        machine.path(CONTAINER).display()
    );
    machine.write("config/sprat.toml", unknown);
    let ran = machine.sprat(&remove);
    assert!(ran.code != 0, "{}", ran.whole());
    assert!(
        ran.stderr.contains("can't check whether"),
        "{}",
        ran.whole()
    );
    machine.write("config/sprat.toml", "");
    assert_eq!(listed(&machine).len(), 2);
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    // A lost key file is not in use.
    fs::rename(machine.path("config/keys/x.key"), machine.path("lost")).unwrap();
    machine.ok(&remove);
    assert_eq!(listed(&machine), ["1 recovery -"]);
}

#[test]
fn a_sheet_names_only_a_key_file_that_opens() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let sheet = ["key", "sheet", CONTAINER, "--passphrase-file", "recovery"];
    let ran = machine.ok(&sheet);
    assert!(ran.stdout.contains("keys/x.key"), "{}", ran.whole());
    machine.write(
        "config/keys/x.key",
        "some other bytes, long enough for a key",
    );
    for sheet in [
        &sheet[..],
        &["key", "sheet", CONTAINER, "--without-secret"],
        &[
            "key",
            "add",
            CONTAINER,
            CHEAP,
            "--new-recovery",
            "--passphrase-file",
            "recovery",
        ],
    ] {
        let ran = machine.ok(sheet);
        assert!(!ran.stdout.contains("config/keys/x.key"), "{}", ran.whole());
        assert!(
            ran.stderr.contains("is not on the sheet"),
            "{}",
            ran.whole()
        );
    }
}

#[test]
fn interrupted_key_change_reports_its_result() {
    requires!(strikes::missing());
    let (machine, _) = TestMachine::small();
    let key = fs::read(machine.path("config/keys/x.key")).unwrap();
    machine.write("key", key);
    // Ctrl-C for the session: the last sprat among those whose ssh runs this.
    machine.write(
        "act",
        "p=$PPID; while [ $p -gt 1 ]; do case $(readlink /proc/$p/exe) in */sprat) s=$p;; esac; \
         p=$(sed 's/.*) . //; s/ .*//' /proc/$p/stat); done; kill -INT $s; sleep 0.3",
    );
    let target = machine.on_line(CONTAINER);
    let add = ["--key-file", "key", "key", "add", &target];
    let blow = |kind, nth| Blow {
        how: "act",
        when: "before",
        nth,
        kind: Some(kind),
    };
    // While the lock is made nothing was sent yet, and nothing is.
    let by_file = [&add[..], &["--new-passphrase-file", "pass"]].concat();
    let ran = machine.sprat_struck(&by_file, Some(blow("make", 1)));
    assert!(machine.was_struck());
    assert_eq!(ran.code, 130, "{}", ran.whole());
    assert_eq!(listed(&machine).len(), 2);
    // From the first write on the change is done and reported as done: the new key is not discarded.
    let recovery = [&add[..], &["--new-recovery"]].concat();
    let ran = machine.sprat_struck(&recovery, Some(blow("write", 3)));
    assert!(machine.was_struck());
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let shown = ran.stdout.lines().find_map(|line| {
        let (_, key) = line.split_once("RECOVERY KEY")?;
        Some(key.trim_start_matches([':', ' ']).to_owned())
    });
    machine.write("recovery", shown.unwrap_or_default().trim());
    assert!(
        opens(&machine, &["--passphrase-file", "recovery"]),
        "{}",
        ran.whole()
    );
    assert!(leases::held(&machine.path("store")).is_empty());
    machine.nothing_is_left();
}

#[test]
fn a_container_that_is_cut_short_or_overwritten_fails_its_rehearsal() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    fs::remove_dir_all(machine.path("state/keys")).unwrap();
    let rehearse = [
        "key",
        "rehearse",
        CONTAINER,
        "--passphrase-file",
        "recovery",
    ];
    let container = machine.container_file();
    let whole = fs::read(machine.path(CONTAINER)).unwrap();
    let proved = || {
        let list = machine.sprat(&["key", "list", CONTAINER, "--json"]).json();
        list["keys"][1]["proved"].is_string()
    };
    container.set_len(20 << 20).unwrap();
    let said = machine.sprat(&rehearse).failed_with(13);
    assert!(said.contains("cut short") && !proved(), "{said}");
    container.write_all_at(&whole, 0).unwrap();
    container.write_all_at(&vec![0; 1 << 20], 16 << 20).unwrap();
    let said = machine.sprat(&rehearse).failed_with(13);
    assert!(
        said.contains("no file system that sprat knows") && !proved(),
        "{said}"
    );
    container.write_all_at(&whole, 0).unwrap();
    machine.ok(&rehearse);
    // Also where nothing was known of the keys.
    let list = machine.sprat(&["key", "list", CONTAINER, "--json"]).json();
    assert!(proved());
    assert_eq!(list["keys"][1]["kind"], "recovery");
}

#[test]
fn unreadable_slot_does_not_stop_adding_a_key() {
    requires!(needs::root(), needs::program("cryptsetup"));
    let (machine, _) = TestMachine::small();
    machine.write("odd", "the passphrase of an odd slot");
    let added = Command::new("cryptsetup")
        .args([
            "luksAddKey",
            "-q",
            "--keyslot-cipher",
            "aes-cbc-essiv:sha256",
        ])
        .args(["--keyslot-key-size", "256", "--pbkdf", "pbkdf2"])
        .args(["--pbkdf-force-iterations", "1000", "--key-file"])
        .args([machine.path("config/keys/x.key"), machine.path(CONTAINER)])
        .arg(machine.path("odd"))
        .output()
        .unwrap();
    assert!(added.status.success(), "{added:?}");
    machine.ok(&ADD_PASSPHRASE);
    machine.ok(&["key", "add", CONTAINER, CHEAP, "--new-recovery"]);
    assert!(opens(&machine, &["--passphrase-file", "pass"]));
}

#[test]
fn a_new_passphrase_is_one_that_can_be_typed() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    for (passphrase, printed) in [
        ("x".repeat(513), "too long"),
        (
            "one line of it\nanother line".to_owned(),
            "more than one line",
        ),
        ("short".to_owned(), "too short"),
    ] {
        machine.write("pass", passphrase);
        let said = machine.sprat(&ADD_PASSPHRASE).failed_with(2);
        assert!(said.contains(printed), "{said}");
    }
    machine.write("pass", "x".repeat(512) + "\n");
    machine.ok(&ADD_PASSPHRASE);
}

#[test]
fn a_key_that_is_added_again_keeps_what_is_known_of_it() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let with = |more: &[&str]| {
        machine.ok(&[&ADD_PASSPHRASE[..], more].concat());
        let list = machine.sprat(&["key", "list", CONTAINER, "--json"]).json();
        let key = &list["keys"][2];
        (key["label"].clone(), key["proved"].is_string())
    };
    assert_eq!(with(&["--label", "the desk"]).0, "the desk");
    assert!(opens(&machine, &["--passphrase-file", "pass"]));
    assert_eq!(with(&[]), ("the desk".into(), true));
    assert_eq!(with(&["--label", "a safe"]), ("a safe".into(), true));
}

#[test]
fn full_header_is_reported_before_anything_changes() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let file = machine.container_file();
    let key = Secret::key_file(fs::read(machine.path("config/keys/x.key")).unwrap());
    let fast = FormatOptions {
        fast_kdf_for_tests: true,
        ..FormatOptions::default()
    };
    let turn = Turn {
        lease: 1,
        after_takeover: false,
    };
    for number in 2..32 {
        let header = Header::load(&file).unwrap();
        let volume_key = header.unlock(&file, &key).unwrap();
        let new = Secret::passphrase(format!("passphrase number {number}"));
        let writes = header
            .add_slot(&volume_key, &new, SlotKind::KeyFile, &fast, turn)
            .unwrap();
        for write in writes {
            if let HeaderWrite::Write(extent) = write {
                file.write_all_at(&extent.bytes, extent.offset).unwrap();
            }
        }
    }
    let said = machine.sprat(&ADD_PASSPHRASE).failed_with(2);
    assert!(said.contains("all 32 key slots are used"), "{said}");
}

#[test]
fn sheet_page_without_space_leaves_no_partial_secret() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    fs::create_dir(machine.path("full")).unwrap();
    let full = Tmpfs::mount(&machine.path("full"), 1);
    machine.write("full/ballast", vec![1; (1 << 20) - 8192]);
    let add = ["key", "add", CONTAINER, CHEAP, "--new-recovery"];
    let ran = machine.sprat(&[&add[..], &["--html", "full/page.html"]].concat());
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(!machine.path("full/page.html").exists());
    let printed = "not all of its sheet was shown";
    assert!(ran.stderr.contains(printed), "{}", ran.whole());
    assert!(ran.stdout.contains("RECOVERY KEY"), "{}", ran.whole());
    drop(full);
}

#[test]
fn unreachable_key_file_may_be_the_one_that_backups_use() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let remove = ["key", "remove", CONTAINER, "0", "--passphrase-file"];
    let remove = [&remove[..], &["recovery"]].concat();
    let key = machine.path("usb/x.key");
    for option in ["key_file", "passphrase_file"] {
        let config = format!(
            "[container.x]\ntarget = \"{}\"\n{option} = \"{}\"\n",
            machine.path(CONTAINER).display(),
            key.display()
        );
        machine.write("config/sprat.toml", config);
        let said = machine.sprat(&remove).failed_with(2);
        assert!(said.contains("can't check whether"), "{said}");
        assert!(said.contains("usb/x.key"), "{said}");
        assert!(said.contains("nothing was changed"), "{said}");
        assert!(said.contains("--allow-in-use"), "{said}");
        assert_eq!(listed(&machine).len(), 2);
    }
    machine.ok(&[&remove[..], &["--allow-in-use"]].concat());
    assert_eq!(listed(&machine), ["1 recovery -"]);
}

#[test]
fn only_a_key_on_no_machine_counts_as_rehearsed() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let proved = || {
        let ran = machine.ok(&["status", CONTAINER, "--offline", "--json"]);
        ran.json()["containers"][0]["key_proved"].is_string()
    };
    assert!(opens(&machine, &["--key-file", "config/keys/x.key"]));
    assert!(!proved(), "a key file is on no paper");
    for (secret, slot) in [("pass", "2"), ("recovery", "1")] {
        machine.ok(&ADD_PASSPHRASE);
        assert!(opens(&machine, &["--passphrase-file", secret]));
        assert!(proved(), "{secret}");
        machine.ok(&["key", "remove", CONTAINER, slot, "--allow-last"]);
        assert!(!proved(), "the slot of {secret} is gone");
    }
}
