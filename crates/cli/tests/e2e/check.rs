//! What `sprat check` finds in containers that were damaged on purpose.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use crate::damage::{
    check, first_block, first_name, flip, inside, kept, snapshots, with_two_snapshots,
};
use sprat_testkit::client_and_server;
use sprat_testkit::machine::CONTAINER;
use sprat_testkit::{needs, requires};

#[test]
fn a_whole_container_checks_clean_and_is_not_written_to() {
    requires!(client_and_server::missing());
    let machine = with_two_snapshots();
    let before = fs::metadata(machine.path(CONTAINER))
        .unwrap()
        .modified()
        .unwrap();
    let quick = check(&machine, &[]).succeeded();
    assert_eq!(quick.json()["file_system"]["clean"], true);
    let read = check(&machine, &["--read-data"]).succeeded();
    let files = &read.json()["files"];
    // Each file once, however many snapshots link it: a, other, victim, two records and two lists of changes.
    assert_eq!(
        (&files["files_read"], &files["finished"]),
        (&7.into(), &true.into())
    );
    assert_eq!(files["files_known"], 0);
    let again = check(&machine, &["--read-data"]).json();
    assert_eq!(again["files"]["files_known"], 7);
    let source = check(&machine, &["--against-source", "home"]).succeeded();
    let files = &source.json()["files"];
    assert_eq!(files["same"], 3);
    assert_eq!(files["lacking_unknown"], serde_json::Value::Null);
    assert_eq!(
        (&files["lacking"]["count"], &files["new_since"]["count"]),
        (&0.into(), &0.into())
    );
    let after = fs::metadata(machine.path(CONTAINER))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(before, after);
    let shown = machine.sprat(&["check", CONTAINER]);
    assert!(
        shown.stdout.contains("file system: clean"),
        "{}",
        shown.whole()
    );
    assert_eq!(
        machine
            .sprat(&["check", CONTAINER, "--against-source", "nojob"])
            .code,
        1
    );
    machine.nothing_is_left();
}

#[test]
fn flipped_block_of_a_file_is_named_in_each_snapshot() {
    requires!(client_and_server::missing(), needs::program("debugfs"));
    let machine = with_two_snapshots();
    let names = snapshots(&machine);
    assert_eq!(check(&machine, &["--read-data"]).code, 0);
    let victim = inside(&machine, "folder/victim");
    let block = first_block(&machine, &format!("blocks \"/home/{}{victim}\"", names[0]));
    flip(&machine.path(CONTAINER), block);

    // The disk returns the wrong bytes without an error, and no structure of ext4 is concerned.
    assert_eq!(check(&machine, &[]).code, 0);
    let read = check(&machine, &["--read-data"]);
    assert_eq!(read.code, 13, "{}", read.whole());
    let files = read.json()["files"].clone();
    assert_eq!(files["damaged"]["count"], 1);
    assert!(
        first_name(&files["damaged"]).contains("folder/victim"),
        "{files}"
    );
    let expected: Vec<String> = names
        .iter()
        .map(|name| format!("home/{name}[DIR]/src/folder/victim"))
        .collect();
    assert_eq!(files["affected"]["names"], serde_json::json!(expected));

    // A quick check can't find the damage, and does not replace this result.
    assert_eq!(check(&machine, &[]).code, 0);
    let kept = kept(&machine);
    assert_eq!(kept["quick"]["exit"], "done");
    assert_eq!(kept["read_data"]["exit"], "damaged");
    assert_eq!(kept["read_data"]["result"]["files"]["damaged"]["count"], 1);

    // A restore in place leaves the file here, and one elsewhere names it.
    let right = fs::read(machine.path("src/folder/victim")).unwrap();
    let plan = machine.sprat(&["restore", CONTAINER, "home", "--to", "to", "--dry-run"]);
    assert_eq!(plan.code, 0, "{}", plan.whole());
    assert!(plan.stdout.contains("1 file DAMAGED"), "{}", plan.whole());
    let restored = machine.sprat(&["restore", CONTAINER, "home", "--to", "/"]);
    assert_eq!(restored.code, 13, "{}", restored.whole());
    assert!(
        restored.stdout.contains("1 file DAMAGED"),
        "{}",
        restored.whole()
    );
    assert_eq!(fs::read(machine.path("src/folder/victim")).unwrap(), right);
    let restored = machine.sprat(&["restore", CONTAINER, "home", "--to", "to"]);
    assert_eq!(restored.code, 13, "{}", restored.whole());
    assert!(
        restored.stdout.contains("/victim\n"),
        "{}",
        restored.whole()
    );

    // A file that changed since differs from a damaged one.
    machine.write("src/folder/other", vec![b'n'; 50_000]);
    machine.write("src/folder/young", vec![b'n'; 10]);
    fs::remove_file(machine.path("src/a")).unwrap();
    let source = check(&machine, &["--against-source", "home"]);
    assert_eq!(source.code, 13, "{}", source.whole());
    let files = source.json()["files"].clone();
    assert_eq!(files["damaged"]["count"], 1);
    assert!(
        first_name(&files["damaged"]).contains("folder/victim"),
        "{files}"
    );
    assert!(
        first_name(&files["changed"]).ends_with("folder/other"),
        "{files}"
    );
    assert!(first_name(&files["gone"]).ends_with("/a"), "{files}");
    assert!(
        first_name(&files["new_since"]).ends_with("/src/folder/young"),
        "{files}"
    );
    let shown = machine.sprat(&["check", CONTAINER, "--read-data"]);
    assert_eq!(shown.code, 13, "{}", shown.whole());
    assert!(shown.stdout.contains("What to do"), "{}", shown.whole());
    machine.nothing_is_left();
}

#[test]
fn a_folder_that_can_not_be_read_is_named() {
    requires!(client_and_server::missing(), needs::program("debugfs"));
    let machine = with_two_snapshots();
    let name = snapshots(&machine)[0].clone();
    let folder = inside(&machine, "folder");
    let block = first_block(&machine, &format!("blocks \"/home/{name}{folder}\""));
    flip(&machine.path(CONTAINER), block);
    let read = check(&machine, &["--read-data"]);
    assert_eq!(read.code, 13, "{}", read.whole());
    let said = read.json();
    assert_eq!(said["file_system"]["clean"], false);
    let unreadable = first_name(&said["files"]["unreadable"]);
    assert!(
        unreadable.starts_with(&format!("home/{name}[DIR]/src/folder: ")),
        "{unreadable}"
    );
    machine.nothing_is_left();
}

#[test]
fn damaged_header_copy_and_truncated_file_are_reported() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    let file = File::options()
        .write(true)
        .open(machine.path(CONTAINER))
        .unwrap();
    file.write_all_at(&[0; 64], 16384 + 4096 + 10).unwrap();
    let damaged = check(&machine, &[]);
    assert_eq!(damaged.code, 13, "{}", damaged.whole());
    let copies = damaged.json()["header_copies_damaged"].clone();
    assert!(
        copies[0].as_str().unwrap().starts_with("second"),
        "{copies}"
    );
    file.set_len(100 << 20).unwrap();
    let cut = check(&machine, &[]).failed_with(13);
    assert!(cut.contains("cut short"), "{cut}");
    let kept = kept(&machine);
    assert_eq!(kept["quick"]["exit"], "damaged");
    let failure = &kept["quick"]["result"]["failure"]["what"];
    assert!(failure.as_str().unwrap().contains("cut short"), "{kept}");
}

#[test]
fn a_check_that_ran_out_of_time_goes_on_at_the_next() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    let none = check(&machine, &["--read-data", "--max-duration", "0"]).json();
    assert_eq!(none["files"]["finished"], false);
    assert_eq!(none["files"]["files_read"], 1, "however short its time is");
    let all = check(&machine, &["--read-data"]).json();
    assert_eq!(all["files"]["finished"], true);
    assert_eq!(all["files"]["files_before"], 1);
    let ran = check(&machine, &["--max-duration", "1h"]).failed_with(2);
    assert!(ran.contains("--read-data"), "{ran}");
    let kept = fs::read_dir(machine.path("state/checks")).unwrap().count();
    assert_eq!(kept, 2, "checksums, and the last results");
}

#[test]
fn reading_progress_of_one_copy_counts_for_no_other() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    machine.ok(&["copy", CONTAINER, "store/c.luks"]);
    let begun = check(&machine, &["--read-data", "--max-duration", "0"]).json();
    assert_eq!(begun["files"]["files_read"], 1);
    let of_copy = ["check", "store/c.luks", "--read-data", "--json"];
    let of_copy = [&of_copy[..], &["--key-file", "config/keys/x.key"]].concat();
    let files = |ran: sprat_testkit::machine::Ran| {
        assert_eq!(ran.code, 0, "{}", ran.whole());
        ran.json()["files"].clone()
    };
    let copy = files(machine.sprat(&of_copy));
    assert_eq!(
        (&copy["files_read"], &copy["files_before"]),
        (&7.into(), &0.into())
    );
    // Its checksums are what the files are compared with all the same.
    assert_eq!(copy["files_known"], 1, "{copy}");
    let own = files(check(&machine, &["--read-data"]));
    assert_eq!(
        (&own["files_read"], &own["files_before"]),
        (&6.into(), &1.into())
    );
    machine.nothing_is_left();
}

/// The commands that mount the volume, for a container that has job `home`.
fn mounting() -> Vec<Vec<&'static str>> {
    vec![
        vec!["backup", CONTAINER, "--name", "home", "src"],
        vec!["prune", CONTAINER, "--job", "home", "--keep-last", "1"],
        vec!["trim", CONTAINER],
        vec!["mount", CONTAINER, "mnt", "--rw"],
        vec!["snapshots", CONTAINER],
        vec!["restore", CONTAINER, "home", "--to", "back"],
        vec!["check", CONTAINER],
    ]
}

#[test]
fn a_file_system_that_can_not_be_mounted_is_damage_for_every_command() {
    requires!(client_and_server::missing());
    let machine = with_two_snapshots();
    fs::create_dir(machine.path("mnt")).unwrap();
    let root = first_block(&machine, "blocks <2>");
    let file = machine.container_file();
    // The super block, the group descriptors, the root folder.
    for block in [0, 1, root] {
        let at = crate::damage::PAYLOAD_BYTES + block * 4096;
        let mut whole = vec![0; 4096];
        file.read_exact_at(&mut whole, at).unwrap();
        file.write_all_at(&sprat_testkit::machine::noise(4096, 9), at)
            .unwrap();
        let mut commands = mounting();
        if block != root {
            // The others open and mount it in the same way.
            commands.truncate(5);
        }
        for arguments in commands {
            let text = machine.sprat(&arguments).failed_with(13);
            assert!(!text.contains("wrong key"), "{arguments:?}: {text}");
        }
        file.write_all_at(&whole, at).unwrap();
    }
    machine.nothing_is_left();
}

/// Has the kernel meet an error in the file system mounted at `dir`, as it does where a structure is
/// damaged. False: it can't be asked to here.
fn meet_an_error(dir: &std::path::Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let at = dir.display().to_string();
    let device = mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        let device = words.next()?;
        (words.next()? == at).then(|| device.rsplit('/').next().unwrap().to_owned())
    });
    let trigger = format!("/sys/fs/ext4/{}/trigger_fs_error", device.unwrap());
    fs::write(trigger, "a test").is_ok()
}

#[test]
fn file_system_error_is_damage_at_close_and_at_each_open() {
    requires!(client_and_server::missing());
    let machine = with_two_snapshots();
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    let met = meet_an_error(&machine.path("mnt"));
    let ended = machine.sprat(&["umount", "mnt"]);
    if needs::skip((!met).then(|| "the kernel has no trigger_fs_error".to_owned())) {
        return;
    }
    let text = ended.failed_with(13);
    assert!(text.contains("marked as faulty"), "{text}");
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    for arguments in mounting() {
        let text = machine.sprat(&arguments).failed_with(13);
        assert!(text.contains("marked as faulty"), "{arguments:?}: {text}");
    }
    // Reading continues, with a warning.
    assert!(
        machine
            .path("back")
            .join(machine.path("src/a").strip_prefix("/").unwrap())
            .exists()
    );
    assert!(before == fs::read(machine.path(CONTAINER)).unwrap());
    machine.nothing_is_left();
}

#[test]
fn a_container_with_two_names_is_written_to_under_neither() {
    requires!(needs::root());
    let machine = with_two_snapshots();
    fs::create_dir(machine.path("mnt")).unwrap();
    fs::create_dir(machine.path("other")).unwrap();
    fs::hard_link(machine.path(CONTAINER), machine.path("other/second.luks")).unwrap();
    let before = fs::read(machine.path(CONTAINER)).unwrap();
    machine.write("pass", "correct horse battery");
    for name in [CONTAINER, "other/second.luks"] {
        let key = ["--key-file", "config/keys/x.key"];
        let add = [
            "key",
            "add",
            CONTAINER,
            "--cheap-kdf-for-tests",
            "--new-passphrase-file",
            "pass",
        ];
        let grow = ["grow", CONTAINER, "--size", "300M"];
        let mut writing: Vec<Vec<&str>> = mounting().into_iter().take(4).collect();
        writing.extend([
            add.to_vec(),
            vec!["key", "remove", CONTAINER, "1", "--allow-last"],
        ]);
        writing.extend(sprat_attach::may_grow().then(|| grow.to_vec()));
        for arguments in writing {
            let arguments: Vec<&str> = arguments
                .into_iter()
                .map(|word| if word == CONTAINER { name } else { word })
                .collect();
            let text = machine
                .sprat(&[&key[..], &arguments].concat())
                .failed_with(1);
            assert!(
                text.contains("2 names (hard links)"),
                "{arguments:?}: {text}"
            );
        }
        let reading = [&key[..], &["snapshots", name]].concat();
        machine.ok(&reading);
    }
    assert!(before == fs::read(machine.path(CONTAINER)).unwrap());
    machine.restores_whole(&[]);
    fs::remove_file(machine.path("other/second.luks")).unwrap();
    machine.backup(&[]).succeeded();
    machine.nothing_is_left();
}
