//! Restores over what must survive them: the container itself, sprat's own files beside it, and disks
//! that the snapshot knows nothing of.

use std::fs;

use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{needs, requires};

/// The container is in the source that it backs up: `store` is both.
fn in_its_own_source() -> TestMachine {
    let machine = TestMachine::with_container();
    machine.write("store/kept", "as it was");
    assert_eq!(backup(&machine).code, 0);
    machine
}

fn backup(machine: &TestMachine) -> Ran {
    machine.sprat(&["backup", CONTAINER, "--name", "all", "store"])
}

fn restore(machine: &TestMachine, more: &[&str]) -> Ran {
    machine.sprat(&[&["restore", CONTAINER], more].concat())
}

/// Puts `content` into the newest snapshot, as an older version's run might have left it there.
fn into_the_snapshot(machine: &TestMachine, names: &[&str], content: &str) {
    fs::create_dir_all(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    let snapshot = machine.path("mnt/all/latest");
    let store = snapshot.join(machine.path("store").strip_prefix("/").unwrap());
    for name in names {
        fs::write(store.join(name), content).unwrap();
    }
    machine.ok(&["umount", "mnt"]);
}

#[test]
fn restore_with_delete_never_deletes_the_container() {
    requires!(needs::root());
    let machine = in_its_own_source();
    machine.write("store/later", "x");
    let what = format!("all:{}", machine.path("store").display());
    let beside = machine.folder().display().to_string();
    let other_name = machine.path("elsewhere");
    std::os::unix::fs::symlink(machine.folder(), &other_name).unwrap();
    for to in [
        vec!["all", "--to", "/", "--delete"],
        vec!["all", "--to", "/", "--delete", "--delete-excluded"],
        vec![&*what, "--to", &*beside, "--delete"],
        vec![&*what, "--to", "elsewhere", "--delete"],
        vec!["all", "--to", "/", "--delete", "--dry-run"],
    ] {
        let said = restore(&machine, &to).failed_with(2);
        assert!(
            said.contains("the container file [DIR]/store/x.luks"),
            "{said}"
        );
        assert!(said.contains("nothing was changed"), "{said}");
        assert!(machine.path(CONTAINER).exists(), "{to:?}");
        assert!(machine.path("store/later").exists(), "{to:?}");
    }
    // With the container elsewhere, deleting works as always.
    let place = machine.path("place");
    fs::create_dir_all(place.join("store")).unwrap();
    fs::write(place.join("store/later"), "x").unwrap();
    restore(&machine, &[&what, "--to", "place", "--delete"]).succeeded();
    assert!(!place.join("store/later").exists());
    machine.nothing_is_left();
}

#[test]
fn the_container_is_found_by_whatever_path_a_mount_shows_it() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write("store/kept", "as it was");
    fs::create_dir(machine.path("shown")).unwrap();
    let bind = Bind::mount(&machine, "store", "shown");
    machine.ok(&["backup", CONTAINER, "--name", "all", "shown"]);
    restore(&machine, &["all", "--to", "back"]).succeeded();
    let back = machine.path("back");
    let back = back.join(machine.path("shown").strip_prefix("/").unwrap());
    assert!(back.join("kept").exists());
    assert!(!back.join("x.luks").exists());
    restore(&machine, &["all", "--to", "/", "--delete"]).failed_with(2);
    assert!(machine.path(CONTAINER).exists());
    drop(bind);
    machine.nothing_is_left();
}

#[test]
fn restore_in_place_leaves_the_lock_and_sprats_own_files() {
    requires!(needs::root());
    let machine = in_its_own_source();
    let own = [
        "x.luks",
        "x.luks.reserve",
        "x.luks.lock.1",
        "x.luks.lock.23",
        "x.luks.trim",
        "x.luks.new",
        "x.luks.new-0123456789abcdef",
        "x.luks.trim-0123456789abcdef",
        "x.luks.copying-0123456789abcdef",
    ];
    let others = ["x.luks.lock.1.luks", "x.luks.locked", "y.luks.lock.1"];
    into_the_snapshot(&machine, &own, "old");
    into_the_snapshot(&machine, &others, "theirs");
    fs::write(machine.path("store/kept"), "changed since").unwrap();
    let what = format!("all:{}", machine.path("store").display());
    let folder = machine.folder().display().to_string();
    for to in [["all", "--to", "/"], [&*what, "--to", &*folder]] {
        restore(&machine, &to).succeeded();
        assert_eq!(fs::read(machine.path("store/kept")).unwrap(), b"as it was");
        fs::write(machine.path("store/kept"), "changed since").unwrap();
        for name in own {
            let there = fs::read(machine.path("store").join(name)).unwrap_or_default();
            assert_ne!(there, b"old", "{name}");
        }
        for name in others {
            assert!(machine.path("store").join(name).exists(), "{name}");
        }
    }
    // One of them alone is no more put there.
    let lock = format!("{what}/x.luks.lock.1");
    let store = machine.path("store").display().to_string();
    let said = restore(&machine, &[&lock, "--to", &store]).failed_with(2);
    assert!(said.contains("sprat's own"), "{said}");
    // The next run finds no lock.
    backup(&machine).succeeded();
    machine.nothing_is_left();
}

#[test]
fn files_of_sprats_own_beside_the_container_never_enter_a_snapshot() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write("store/x.luks.copying-0123456789abcdef", "copy");
    machine.write("store/x.luks.lock.1.luks", "somebody's");
    assert_eq!(backup(&machine).code, 0);
    let what = format!("all:{}", machine.path("store").display());
    restore(&machine, &[&what, "--to", "back"]).succeeded();
    let back = fs::read_dir(machine.path("back/store")).unwrap();
    let mut names: Vec<_> = back
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["x.luks.lock.1.luks"]);
}

#[test]
fn restore_with_delete_empties_no_disk_that_the_snapshot_has_not() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let at = machine.path("src/disk");
    fs::create_dir(&at).unwrap();
    let disk = Tmpfs::mount(&at, 1);
    let precious = machine.write("src/disk/precious", "x");
    for more in [&["--one-file-system"][..], &[]] {
        if more.is_empty() {
            // Not mounted when the snapshot is made, as after a boot without the disk.
            let script = "umount \"$1\" && shift && exec \"$@\"";
            let at = at.to_str().unwrap();
            let under = ["unshare", "-m", "sh", "-c", script, "sh", at];
            let words = ["backup", CONTAINER, "--name", "home", "src"];
            machine.sprat_under(&under, &words).succeeded();
        } else {
            machine.backup(more).succeeded();
        }
        for also in [
            &["--delete-excluded"][..],
            &["--delete-excluded", "--dry-run"],
        ] {
            let words = [&["home", "--to", "/", "--delete"], also].concat();
            let said = restore(&machine, &words).failed_with(2);
            assert!(said.contains("[DIR]/src/disk"), "{said}");
            assert!(said.contains("nothing was changed"), "{said}");
            assert!(precious.exists());
        }
    }
    drop(disk);
    // Once it is gone from its place, it blocks nothing.
    let words = ["home", "--to", "/", "--delete"];
    restore(&machine, &words).succeeded();
    machine.nothing_is_left();
}

/// A folder shown in a second place, until dropped.
struct Bind(std::path::PathBuf);

impl Bind {
    fn mount(machine: &TestMachine, folder: &str, at: &str) -> Self {
        let at = machine.path(at);
        let done = std::process::Command::new("mount")
            .arg("--bind")
            .args([&machine.path(folder), &at])
            .status();
        assert!(done.unwrap().success());
        Self(at)
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("-l")
            .arg(&self.0)
            .status();
    }
}

#[test]
fn restore_in_place_leaves_the_current_state_folder() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    let all = ["backup", CONTAINER, "--name", "state", "state"];
    machine.ok(&all);
    // Something that no snapshot has.
    machine.write("state/containers/later.json", "{}");
    let ran = restore(&machine, &["state", "--to", "/", "--delete"]);
    let said = ran.failed_with(2);
    assert!(said.contains("sprat's own"), "{said}");
    // Its locks are in no snapshot; the rest may be had elsewhere.
    restore(&machine, &["state", "--to", "out"]).succeeded();
    let out = machine
        .path("out")
        .join(machine.path("state").strip_prefix("/").unwrap());
    assert!(out.join("containers").exists() && !out.join("locks").exists());
    machine.write("state/note", "of then");
    let whole = ["backup", CONTAINER, "--name", "folder", "."];
    machine.ok(&[&whole[..], &["--exclude", "store"]].concat());
    machine.write("state/note", "of today");
    restore(&machine, &["folder", "--to", "/"]).succeeded();
    assert!(machine.path("state/containers/later.json").exists());
    assert_eq!(fs::read(machine.path("state/note")).unwrap(), b"of today");
    assert_eq!(machine.backup(&[]).code, 0, "its lock is whose it was");
    machine.nothing_is_left();
}

/// After a disaster nobody has time for a config. A mistake stops a reader only where it concerns the container.
#[test]
fn mistake_in_the_config_stops_no_restore_but_one_of_that_container() {
    requires!(needs::root());
    let machine = in_its_own_source();
    let location = machine.path(CONTAINER).display().to_string();
    let key = machine.path("config/keys/x.key").display().to_string();
    let container = format!("[container.nas]\ntarget = \"{location}\"\nkey_file = \"{key}\"\n");
    let job = "[job.all]\ncontainer = \"nas\"\nsources = [\"/nowhere\"]\n";
    let config = |text: &str| machine.write("config/sprat.toml", text);
    let restore = |target: &str, to: &str| {
        let to = machine.path(to).display().to_string();
        machine.sprat(&["restore", target, "all", "--to", &to])
    };

    config(&format!("{container}{job}soruces = 1\n"));
    let ran = restore("nas", "one");
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert!(
        ran.stderr
            .contains("sprat.toml:7: unknown setting `soruces`"),
        "{}",
        ran.stderr
    );
    assert!(
        machine
            .path("one")
            .join(&location[1..])
            .parent()
            .unwrap()
            .join("kept")
            .exists()
    );
    for reader in [
        &["ls", "nas", "all"][..],
        &["snapshots", "nas"],
        &["find", "nas", "kept"],
    ] {
        assert_eq!(machine.sprat(reader).code, 0, "{reader:?}");
    }
    // What writes starts nothing.
    machine.sprat(&["backup", "all"]).failed_with(2);
    machine
        .sprat(&["prune", "nas", "--keep-last", "1"])
        .failed_with(2);

    for broken in [
        format!("{container}connections = 99\n{job}"),
        format!("{container}[\n"),
    ] {
        config(&broken);
        let said = restore("nas", "two").failed_with(2);
        assert!(said.contains("nothing was started"), "{said}");
        assert!(
            said.contains("the container's location instead of its name"),
            "{said}"
        );
        assert!(!machine.path("two").exists());
        let ran = restore(&location, "three");
        assert_eq!(ran.code, 0, "{}", ran.whole());
    }
    machine
        .sprat(&["--config", "nowhere.toml", "ls", &location, "all"])
        .failed_with(2);
    machine.nothing_is_left();
}
