//! Headers restored over other content, by several machines, and after damage.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Command;

use sprat_luks::{Header, Secret};
use sprat_testkit::machine::served::{Forgetful, missing, served};
use sprat_testkit::machine::{ADD_PASSPHRASE, CHEAP, CONTAINER, TestMachine};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

const HEADER_BYTES: usize = 16 << 20;
const RESTORE: [&str; 4] = ["key", "header-restore", CONTAINER, "--yes"];

/// Whether this key opens the file.
fn opens(machine: &TestMachine, file: &str, key: &Secret) -> bool {
    let file = File::open(machine.path(file)).unwrap();
    Header::load(&file).unwrap().unlock(&file, key).is_ok()
}

/// Files of kept headers whose names have that in them.
fn kept(machine: &TestMachine, what: &str) -> Vec<String> {
    let entries = fs::read_dir(machine.path("state/headers")).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.contains(what))
        .map(|name| format!("state/headers/{name}"))
        .collect();
    names.sort();
    names
}

fn header_bytes(machine: &TestMachine, name: &str) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    let file = File::open(machine.path(name)).unwrap();
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn header_restore_replaces_a_foreign_header() {
    requires!(needs::root());
    let (machine, recovery) = TestMachine::small();
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    let sheet = ["key", "sheet", CONTAINER, "--without-secret", "--json"];
    let said = machine.ok(&sheet).json();
    let fingerprint = said["fingerprint"].as_str().unwrap();
    machine.ok(&["key", "header-backup", CONTAINER, "kept"]);
    machine.init(&["store/y.luks", "--size", "64M"]);
    let foreign = header_bytes(&machine, "store/y.luks");
    let overwrite = || machine.container_file().write_all_at(&foreign, 0).unwrap();
    overwrite();
    let ran = machine.ok(&RESTORE);
    let printed = "the header of another container is there; the restore replaces it";
    assert!(ran.stderr.contains(printed), "{}", ran.whole());
    let recovery = Secret::passphrase(recovery);
    assert!(opens(&machine, CONTAINER, &recovery));
    // What it was is kept, whole.
    let before = kept(&machine, "before-restore-foreign");
    assert_eq!(before.len(), 1);
    let theirs = fs::read(machine.path("config/keys/y.key")).unwrap();
    assert!(opens(&machine, &before[0], &Secret::key_file(theirs)));
    machine.restores_whole(&[]);
    // Without state, the sheet's fingerprint decides which of the two is right.
    overwrite();
    fs::remove_dir_all(machine.path("state")).unwrap();
    fs::create_dir(machine.path("state")).unwrap();
    let by_file = [&RESTORE[..], &["kept"]].concat();
    let refused = machine.sprat(&by_file).failed_with(2);
    assert!(refused.contains("another container"), "{refused}");
    let other = [&by_file[..], &["--fingerprint", "0000-0000-0000-0000-0000"]].concat();
    let refused = machine.sprat(&other).failed_with(13);
    assert!(
        refused.contains("belongs to another container"),
        "{refused}"
    );
    assert!(foreign == header_bytes(&machine, CONTAINER));
    machine.ok(&[&by_file[..], &["--fingerprint", fingerprint]].concat());
    assert!(opens(&machine, CONTAINER, &recovery));
    machine.restores_whole(&[]);
}

#[test]
fn header_restore_replaces_a_luks1_header() {
    requires!(needs::root(), needs::program("cryptsetup"));
    let (machine, recovery) = TestMachine::small();
    let old = File::create(machine.path("old.luks")).unwrap();
    old.set_len(8 << 20).unwrap();
    let made = Command::new("cryptsetup")
        .args([
            "luksFormat",
            "-q",
            "--type",
            "luks1",
            "--pbkdf-force-iterations",
            "1000",
        ])
        .arg(machine.path("old.luks"))
        .arg(machine.path("pass"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let bytes = fs::read(machine.path("old.luks")).unwrap();
    machine
        .container_file()
        .write_all_at(&bytes[..2 << 20], 0)
        .unwrap();
    // Keys of LUKS1 are not sprat's to change, whatever the mode.
    let refused = machine.sprat(&["key", "list", CONTAINER]).failed_with(1);
    assert!(
        refused.contains("luksAddKey") && !refused.contains("--mode"),
        "{refused}"
    );
    let ran = machine.ok(&RESTORE);
    assert!(ran.stderr.contains("LUKS1"), "{}", ran.whole());
    assert!(opens(&machine, CONTAINER, &Secret::passphrase(recovery)));
    let before = kept(&machine, "before-restore-foreign");
    let was = fs::read(machine.path(&before[0])).unwrap();
    assert!(was[..2 << 20] == bytes[..2 << 20]);
}

#[test]
fn each_restore_keeps_what_it_replaces() {
    requires!(needs::root());
    let (machine, recovery) = TestMachine::small();
    machine.ok(&["key", "header-backup", CONTAINER, "kept"]);
    machine.ok(&ADD_PASSPHRASE);
    for _ in 0..2 {
        machine.ok(&["key", "header-restore", CONTAINER, "kept", "--yes"]);
    }
    let later = Secret::passphrase("correct horse battery".to_owned());
    let before = kept(&machine, "before-restore-");
    assert_eq!(before.len(), 2);
    assert!(before.iter().any(|file| opens(&machine, file, &later)));
    assert!(!opens(&machine, CONTAINER, &later));
    assert!(opens(&machine, CONTAINER, &Secret::passphrase(recovery)));
}

#[test]
fn header_restore_by_one_machine_locks_out_no_other() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let other = ["--state-dir", "state-of-the-other"];
    let on_other = |arguments: &[&str]| machine.sprat(&[&other[..], arguments].concat());
    // The other machine knows newer headers than this one.
    for change in [
        &ADD_PASSPHRASE[..],
        &["key", "remove", CONTAINER, "2"],
        &ADD_PASSPHRASE,
    ] {
        on_other(change).succeeded();
    }
    let newest = header_bytes(&machine, CONTAINER);
    machine
        .container_file()
        .write_all_at(&vec![0; 1 << 20], 0)
        .unwrap();
    machine.ok(&RESTORE);
    on_other(&["key", "list", CONTAINER]).succeeded();
    // The other machine did not make that change: it asks once, and is not locked out.
    let refused = on_other(&["snapshots", CONTAINER]).failed_with(13);
    assert!(refused.contains("--accept-changed-keys"), "{refused}");
    on_other(&["--accept-changed-keys", "snapshots", CONTAINER]).succeeded();
    on_other(&["snapshots", CONTAINER]).succeeded();
    // An old header that no restore wrote is refused, with the way out.
    machine.container_file().write_all_at(&newest, 0).unwrap();
    let refused = on_other(&["key", "list", CONTAINER]).failed_with(13);
    assert!(refused.contains("`sprat key header-restore`"), "{refused}");
    on_other(&RESTORE).succeeded();
    assert_eq!(on_other(&["key", "list", CONTAINER]).code, 0);
    machine.ok(&["key", "list", CONTAINER]);
}

#[test]
fn damaged_slot_is_reported_and_its_good_copy_kept() {
    requires!(needs::root());
    let (machine, recovery) = TestMachine::small();
    let recovery = Secret::passphrase(recovery);
    let area = {
        let file = machine.container_file();
        let header = Header::load(&file).unwrap();
        let (slot, _) = header.unlock_by(&file, &recovery).unwrap();
        assert_eq!(slot, 1);
        header.areas()[1].start
    };
    machine
        .container_file()
        .write_all_at(&[0xa5; 4096], area)
        .unwrap();
    assert!(!opens(&machine, CONTAINER, &recovery));
    let checked = machine.sprat(&["check", CONTAINER, "--json"]);
    assert_eq!(checked.code, 13, "{}", checked.whole());
    assert_eq!(checked.json()["key_slots_damaged"][0], 1);
    let ran = machine.ok(&ADD_PASSPHRASE);
    assert!(
        ran.stderr.contains("key slot 1 has other bytes"),
        "{}",
        ran.whole()
    );
    let good = kept(&machine, ".differs-");
    assert_eq!(good.len(), 1);
    assert!(opens(&machine, &good[0], &recovery));
    // It is reported once: the next change finds the known header.
    let ran = machine.ok(&["key", "remove", CONTAINER, "2"]);
    assert!(!ran.stderr.contains("has other bytes"), "{}", ran.whole());
    machine.ok(&["key", "header-restore", CONTAINER, &good[0], "--yes"]);
    assert!(opens(&machine, CONTAINER, &recovery));
    machine.ok(&["check", CONTAINER]);
}

#[test]
fn locked_container_keeps_its_keys() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    machine.ok(&["key", "header-backup", CONTAINER, "kept"]);
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    let before = header_bytes(&machine, CONTAINER);
    for change in [
        &["add", CONTAINER, CHEAP, "--new-passphrase-file", "pass"][..],
        &["remove", CONTAINER, "1", "--allow-last"],
        &["header-restore", CONTAINER, "kept", "--yes"],
    ] {
        let said = machine.sprat(&[&["key"], change].concat()).failed_with(11);
        assert!(said.contains("nothing was changed"), "{said}");
    }
    assert!(before == header_bytes(&machine, CONTAINER));
    machine.ok(&["umount", "mnt"]);
    machine.nothing_is_left();
}

#[test]
fn keys_need_no_root() {
    requires!(needs::root());
    let (machine, recovery) = TestMachine::small();
    let owned = Command::new("chown")
        .args(["-R", "65534:65534"])
        .arg(machine.folder())
        .status();
    assert!(owned.unwrap().success());
    let key = |arguments: &[&str]| {
        machine
            .sprat_as_nobody(&[&["key"], arguments].concat())
            .succeeded()
    };
    key(&["list", CONTAINER]);
    key(&["header-backup", CONTAINER, "kept"]);
    key(&["add", CONTAINER, CHEAP, "--new-passphrase-file", "pass"]);
    key(&["rehearse", CONTAINER, "--passphrase-file", "pass"]);
    key(&["remove", CONTAINER, "1", "--allow-last"]);
    key(&["sheet", CONTAINER, "--without-secret"]);
    assert!(!opens(
        &machine,
        CONTAINER,
        &Secret::passphrase(recovery.clone())
    ));
    key(&["header-restore", CONTAINER, "kept", "--yes"]);
    assert!(opens(&machine, CONTAINER, &Secret::passphrase(recovery)));
}

#[test]
fn key_change_without_space_reports_which_keys_open() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let disk = Tmpfs::mount(&machine.path("store"), 32);
    let recovery = machine.init(&[CONTAINER, "--size", "64M"]);
    machine.write("pass", "correct horse battery");
    // Room for the lock, and not for a key slot's area.
    let ballast = File::create(machine.path("store/ballast")).unwrap();
    let mut filled = 0;
    while ballast.write_all_at(&[1; 4096], filled).is_ok() {
        filled += 4096;
    }
    ballast.set_len(filled - (64 << 10)).unwrap();
    let said = machine.sprat(&ADD_PASSPHRASE).failed_with(1);
    for printed in [
        "Free space on the server",
        "opens with every key that stays",
    ] {
        assert!(said.contains(printed), "{said}");
    }
    assert!(opens(&machine, CONTAINER, &Secret::passphrase(recovery)));
    ballast.set_len(0).unwrap();
    machine.ok(&ADD_PASSPHRASE);
    drop(disk);
}

#[test]
fn good_header_copy_survives_many_other_headers() {
    requires!(needs::root());
    let (machine, recovery) = TestMachine::small();
    let recovery = Secret::passphrase(recovery);
    let file = machine.container_file();
    let area = Header::load(&file).unwrap().areas()[1].start;
    // A key that exists already changes no sequence, but the header is kept again.
    let again = [
        "key",
        "add",
        CONTAINER,
        CHEAP,
        "--key-file",
        "config/keys/x.key",
        "--new-key-file",
        "config/keys/x.key",
    ];
    for noise in [0xa5, 0x5a, 0xa5, 0x5a] {
        file.write_all_at(&[noise; 4096], area).unwrap();
        machine.ok(&again);
    }
    let aside = kept(&machine, ".differs-");
    let good = aside.iter().filter(|file| opens(&machine, file, &recovery));
    assert_eq!(good.count(), 1, "{aside:?}");
    assert_eq!(aside.len(), 3, "one file for each content: {aside:?}");
}

/// `store/c.luks`, a copy of the container, whose keys then changed in another way than those of
/// `store/x.luks`: "only in c" opens the one, and the other has the higher sequence.
fn with_a_copy() -> (TestMachine, String) {
    let (machine, recovery) = TestMachine::small();
    machine.ok(&["copy", CONTAINER, "store/c.luks"]);
    machine.write("c-pass", "only in c, and nowhere else");
    let add = ["key", "add", CHEAP, "--key-file", "config/keys/x.key"];
    let add = |more: &[&str]| machine.ok(&[&add[..], more].concat());
    add(&[CONTAINER, "--new-passphrase-file", "pass"]);
    machine.ok(&["key", "remove", CONTAINER, "2"]);
    add(&["store/c.luks", "--new-passphrase-file", "c-pass"]);
    (machine, recovery)
}

#[test]
fn each_copy_of_a_container_has_its_own_header_kept() {
    requires!(needs::root());
    let (machine, recovery) = with_a_copy();
    let in_c = Secret::passphrase("only in c, and nowhere else".to_owned());
    let zeros = vec![0; 1 << 20];
    machine.container_file().write_all_at(&zeros, 0).unwrap();
    let ran = machine.ok(&RESTORE);
    assert!(!ran.stderr.contains("same UUID"), "{}", ran.whole());
    assert!(opens(&machine, CONTAINER, &Secret::passphrase(recovery)));
    assert!(!opens(&machine, CONTAINER, &in_c));
    assert!(opens(&machine, "store/c.luks", &in_c));
}

#[test]
fn kept_header_of_another_location_is_reported() {
    requires!(needs::root());
    let (machine, recovery) = with_a_copy();
    let recovery = Secret::passphrase(recovery);
    // Moved by hand: nothing is known of the new place.
    fs::rename(machine.path(CONTAINER), machine.path("store/d.luks")).unwrap();
    let of_d = ["--key-file", "config/keys/x.key", "--yes"];
    let of_d = [&["key", "header-restore", "store/d.luks"], &of_d[..]].concat();
    let ran = machine.ok(&of_d);
    // That of x is the newest by its sequence, though that of c was kept after it.
    let printed = "this machine has no saved header of [DIR]/store/d.luks itself; this one is of \
                [DIR]/store/x.luks, which has the same UUID";
    assert!(ran.stderr.contains(printed), "{}", ran.whole());
    assert!(opens(&machine, "store/d.luks", &recovery));
    let own = machine.ok(&of_d);
    assert!(!own.stderr.contains("same UUID"), "{}", own.whole());
    // A file without a place in its name serves, too.
    let headers = kept(&machine, ".luks");
    let newest = headers.iter().find(|name| !name.contains("before-restore"));
    let uuid = &newest.unwrap()["state/headers/".len()..][..36];
    let bytes = fs::read(machine.path(newest.unwrap())).unwrap();
    for name in &headers {
        fs::remove_file(machine.path(name)).unwrap();
    }
    machine.write(&format!("state/headers/{uuid}.luks"), bytes);
    let ran = machine.ok(&of_d);
    let printed = "at a place that is no longer known";
    assert!(ran.stderr.contains(printed), "{}", ran.whole());
    assert!(machine.path(format!("state/headers/{uuid}.luks")).exists());
}

/// Changes the machine's container as another machine or a server can.
fn cryptsetup(machine: &TestMachine, arguments: &[&str]) {
    let key = machine.path("config/keys/x.key");
    let mut command = Command::new("cryptsetup");
    command.args(["--batch-mode", "--key-file"]).arg(key);
    let ran = command.args(arguments).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
}

#[test]
fn a_key_that_another_machine_added_is_in_the_kept_header_after_a_session() {
    requires!(needs::root(), needs::program("cryptsetup"));
    let (machine, _) = TestMachine::small();
    let passphrase = "added by another machine".to_owned();
    machine.write("pass", &passphrase);
    let [container, pass] =
        [CONTAINER, "pass"].map(|name| machine.path(name).display().to_string());
    let quick = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1001"];
    let add = [&["luksAddKey"], &quick[..], &[&container, &pass]].concat();
    cryptsetup(&machine, &add);
    machine.ok(&["check", CONTAINER]);
    let zeros = vec![0; 16 << 20];
    machine.container_file().write_all_at(&zeros, 0).unwrap();
    machine.ok(&RESTORE);
    let added = Secret::passphrase(passphrase);
    assert!(opens(&machine, CONTAINER, &added));
    assert!(kept(&machine, ".differs-").is_empty());
}

#[test]
fn kept_header_is_never_replaced_by_one_with_fewer_slots() {
    requires!(needs::root(), needs::program("cryptsetup"));
    let kill = ["luksKillSlot", CONTAINER, "1"];
    let slower = "--pbkdf-force-iterations";
    let convert = [
        "luksConvertKey",
        CONTAINER,
        "--pbkdf",
        "pbkdf2",
        slower,
        "1001",
    ];
    for (what, change) in [("key slot 1", &kill[..]), ("key slot 0", &convert)] {
        let (machine, recovery) = TestMachine::small();
        let recovery = Secret::passphrase(recovery);
        let key_file = Secret::key_file(fs::read(machine.path("config/keys/x.key")).unwrap());
        let absolute: Vec<String> = change
            .iter()
            .map(|word| word.replace(CONTAINER, &machine.path(CONTAINER).display().to_string()))
            .collect();
        let absolute: Vec<&str> = absolute.iter().map(String::as_str).collect();
        cryptsetup(&machine, &absolute);
        for refused in [
            &ADD_PASSPHRASE[..],
            &["snapshots", CONTAINER],
            &["check", CONTAINER],
        ] {
            let text = machine.sprat(refused).failed_with(13);
            assert!(text.contains(what), "{text}");
        }
        // What only shows the slots warns.
        let listed = machine.ok(&["key", "list", CONTAINER]);
        assert!(
            listed.stderr.contains("not by this machine"),
            "{}",
            listed.whole()
        );
        let accepted = [&["--accept-changed-keys"], &ADD_PASSPHRASE[..]].concat();
        let ran = machine.ok(&accepted);
        let aside = kept(&machine, ".differs-");
        assert_eq!(aside.len(), 1, "{aside:?}");
        let newest = kept(&machine, ".luks");
        let newest = newest.iter().find(|name| !name.contains(".differs-"));
        for named in [what, &aside[0], newest.unwrap()] {
            assert!(ran.stderr.contains(named), "{named}: {}", ran.whole());
        }
        assert!(opens(&machine, &aside[0], &recovery) && opens(&machine, &aside[0], &key_file));
        // Later changes of keys leave it, too, and are silent about it.
        let slot = ran.stdout.trim().rsplit(' ').next().unwrap();
        let remove = ["key", "remove", CONTAINER, slot, "--allow-last"];
        let ran = machine.ok(&remove);
        assert!(!ran.stderr.contains("differs"), "{}", ran.whole());
        assert_eq!(kept(&machine, ".differs-"), aside);
        let ran = machine.ok(&RESTORE);
        assert!(ran.stderr.contains(&aside[0]), "{}", ran.whole());
        let named = ["key", "header-restore", CONTAINER, &aside[0], "--yes"];
        machine.ok(&named);
        assert!(opens(&machine, CONTAINER, &recovery));
    }
}

#[test]
fn destroyed_header_is_damage_and_its_copy_is_named() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    let zeros = vec![0; 32 << 10];
    machine.container_file().write_all_at(&zeros, 0).unwrap();
    for arguments in [
        &["status", CONTAINER][..],
        &["unlock", CONTAINER],
        &["backup", CONTAINER, "--name", "home", "src"],
        &["restore", CONTAINER, "home", "--to", "back"],
        &["snapshots", CONTAINER],
        &["check", CONTAINER],
        &["prune", CONTAINER, "--job", "home", "--keep-last", "1"],
        &["trim", CONTAINER],
        &["copy", CONTAINER, "store/copy.luks"],
        &["key", "list", CONTAINER],
        &[
            "key",
            "rehearse",
            CONTAINER,
            "--key-file",
            "config/keys/x.key",
        ],
        &ADD_PASSPHRASE,
    ] {
        let text = machine.sprat(arguments).failed_with(13);
        let printed =
            text.contains("opens with 2 keys") && text.contains("sprat key header-restore");
        assert!(printed, "{arguments:?}: {text}");
    }
    machine.ok(&RESTORE);
    machine.restores_whole(&[]);
}

#[test]
fn header_that_does_not_fit_its_volume_is_not_trusted() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    machine.write("src/a", "alpha\n");
    machine.backup(&[]).succeeded();
    let key = ["--key-file", "config/keys/x.key"];
    machine.init(&[&["store/y.luks", "--size", "64M"], &key[..]].concat());
    let genuine = header_bytes(&machine, CONTAINER);
    let foreign = header_bytes(&machine, "store/y.luks");
    machine.container_file().write_all_at(&foreign, 0).unwrap();
    for arguments in [
        &["check", CONTAINER][..],
        &["check", CONTAINER, "--read-data"],
        &["trim", CONTAINER],
        &["snapshots", CONTAINER],
        &["backup", CONTAINER, "--name", "home", "src"],
        &["prune", CONTAINER, "--job", "home", "--keep-last", "1"],
        &ADD_PASSPHRASE,
    ] {
        fs::remove_dir_all(machine.path("state")).unwrap();
        fs::create_dir(machine.path("state")).unwrap();
        machine.container_file().write_all_at(&foreign, 0).unwrap();
        machine.sprat(arguments).failed_with(13);
        assert!(
            foreign == header_bytes(&machine, CONTAINER),
            "{arguments:?}"
        );
        machine.container_file().write_all_at(&genuine, 0).unwrap();
        let ran = machine.ok(&["snapshots", CONTAINER]);
        assert!(
            ran.stdout.contains("home"),
            "{arguments:?}: {}",
            ran.whole()
        );
    }
}

#[test]
fn implausible_sequence_is_refused_and_not_trusted() {
    requires!(needs::root());
    let (machine, _) = TestMachine::small();
    let genuine = header_bytes(&machine, CONTAINER);
    for sequence in [u64::MAX, u64::MAX - 1, 1 << 48, (1 << 40) + 1] {
        let mut forged = genuine.clone();
        for copy in [0, 16 << 10] {
            let header = &mut forged[copy..copy + (16 << 10)];
            header[16..24].copy_from_slice(&sequence.to_be_bytes());
            header[448..512].fill(0);
            let sum = openssl::sha::sha256(header);
            header[448..480].copy_from_slice(&sum);
        }
        let put = |bytes: &[u8]| machine.container_file().write_all_at(bytes, 0).unwrap();
        put(&forged);
        for arguments in [
            &["snapshots", CONTAINER][..],
            &["key", "list", CONTAINER],
            &ADD_PASSPHRASE,
        ] {
            machine.sprat(arguments).failed_with(13);
        }
        // Nor on a machine that has never seen the container.
        for arguments in [&["snapshots", CONTAINER][..], &ADD_PASSPHRASE] {
            let other = [&["--state-dir", "state-of-the-other"], arguments].concat();
            machine.sprat(&other).failed_with(13);
        }
        put(&genuine);
        machine.ok(&["snapshots", CONTAINER]);
        let other = ["--state-dir", "state-of-the-other", "snapshots", CONTAINER];
        machine.ok(&other);
        fs::remove_dir_all(machine.path("state-of-the-other")).unwrap();
    }
}

#[test]
fn the_slot_that_opened_the_last_time_is_tried_first() {
    requires!(missing());
    let machine = TestMachine::new();
    let init = ["init", CONTAINER, "--size", "64M", CHEAP];
    assert_eq!(served(&machine, &init).code, 0);
    for name in ["first", "second"] {
        machine.write(name, format!("correct horse {name}"));
        let mut add = ADD_PASSPHRASE;
        add[5] = name;
        served(&machine, &add).succeeded();
    }
    let header = Header::load(&machine.container_file()).unwrap();
    let areas: Vec<u64> = header.areas().iter().map(|area| area.start).collect();
    let server = Forgetful::of(&machine);
    fs::rename(machine.path("config/keys/x.key"), machine.path("x.key")).unwrap();
    let tried = |key: [&str; 2]| -> Vec<usize> {
        let arguments = [&key[..], &["snapshots", CONTAINER]].concat();
        server.run(usize::MAX, "honest", &arguments).succeeded();
        // The area of slot 0 is read with the header.
        (1..4).filter(|slot| server.read_at(areas[*slot])).collect()
    };
    let second = ["--passphrase-file", "second"];
    assert_eq!(tried(second), [1, 2, 3]);
    assert_eq!(tried(second), [3]);
    // Another key comes in the usual order behind it, and is first from then on.
    assert_eq!(tried(["--passphrase-file", "first"]), [1, 2, 3]);
    assert_eq!(tried(["--passphrase-file", "first"]), [2]);
}
