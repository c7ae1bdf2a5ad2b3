//! Answers from the lists of changes on this machine: without a server, and of no state but the last one known.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use sprat_testkit::machine::{CONTAINER, Ran, TestMachine};
use sprat_testkit::{needs, requires};

/// The container and the files beside it are not there.
fn with_server_away<T>(machine: &TestMachine, work: impl FnOnce() -> T) -> T {
    let (here, away) = (machine.path("store"), machine.path("away"));
    fs::rename(&here, &away).unwrap();
    let done = work();
    fs::rename(&away, &here).unwrap();
    done
}

/// An answer without what `--offline` may show otherwise.
fn answer(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let mut json = ran.json();
    json.as_object_mut().unwrap().remove("as_of");
    without_folder_times(&mut json);
    json
}

fn without_folder_times(value: &mut Value) {
    if value["kind"] == "folder" {
        value["modified"] = Value::Null;
    }
    match value {
        Value::Array(all) => all.iter_mut().for_each(without_folder_times),
        Value::Object(all) => all.values_mut().for_each(without_folder_times),
        _ => {}
    }
}

const BACKUP: [&str; 6] = ["backup", CONTAINER, "--name", "home", "tree", "-q"];

fn backup(machine: &TestMachine) {
    machine.ok(&BACKUP);
}

fn backup_of_another_machine(machine: &TestMachine) {
    machine.ok(&[&["--state-dir", "state-of-the-other"], &BACKUP[..]].concat());
}

fn names(machine: &TestMachine) -> Vec<String> {
    let listed = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    let all = listed["snapshots"].as_array().unwrap().iter();
    all.map(|one| one["folder"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn lists_answer_while_the_server_is_away() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write_old("tree/etc/fstab", "one");
    machine.write_old("tree/gone", "x");
    backup(&machine);
    machine.write("tree/etc/fstab", "two, longer");
    fs::remove_file(machine.path("tree/gone")).unwrap();
    backup(&machine);
    machine.write("tree/etc/fstab", "three, again longer");
    backup(&machine);
    let path = format!("home:{}/etc/fstab", machine.path("tree").display());
    let all = names(&machine);
    let middle = format!("home/{}", all[1]);
    let mut questions = vec![
        vec!["find", CONTAINER, "**"],
        vec!["find", CONTAINER, "no such name", "--job", "home"],
        vec!["versions", CONTAINER, &path],
        vec!["diff", CONTAINER, "home"],
        vec!["diff", CONTAINER, &middle],
    ];
    for removed in [false, true] {
        if removed {
            machine.ok(&["remove", CONTAINER, &middle, "--yes"]);
            questions.pop();
        }
        for question in &questions {
            let online = answer(&machine.sprat(&[&question[..], &["--json"]].concat()));
            let words = [&question[..], &["--offline", "--json"]].concat();
            let ran = with_server_away(&machine, || machine.sprat(&words));
            assert!(ran.json()["as_of"].is_string(), "{}", ran.whole());
            assert_eq!(answer(&ran), online, "removed: {removed}, {question:?}");
        }
    }
    // It says where the answer is from, and a folder has no time.
    let folder = format!("home:{}/etc", machine.path("tree").display());
    let ran = machine
        .sprat(&["versions", CONTAINER, &folder, "--offline"])
        .succeeded();
    assert!(
        ran.stderr
            .contains("from the lists of changes on this machine"),
        "{}",
        ran.whole()
    );
    let row: Vec<&str> = ran
        .stdout
        .lines()
        .nth(1)
        .unwrap()
        .split_whitespace()
        .collect();
    assert_eq!(row[4], "-", "{}", ran.whole());

    // Without --offline the server is asked.
    with_server_away(&machine, || {
        machine.sprat(&["find", CONTAINER, "fstab"]).failed_with(10);
    });
    let other = format!("home/{}", all[0]);
    let ran = machine
        .sprat(&["diff", CONTAINER, &other, "home", "--offline"])
        .succeeded();
    assert!(
        ran.stdout.contains("changed"),
        "they follow each other now: {}",
        ran.whole()
    );
    for words in [
        vec!["diff", CONTAINER, &other, "--offline"],
        vec!["diff", CONTAINER, "home", &other, "--offline"],
        vec!["versions", CONTAINER, "home:/none", "--offline"],
        vec!["find", CONTAINER, "x", "--job", "other", "--offline"],
    ] {
        machine.sprat(&words).failed_with(1);
    }
    machine
        .sprat(&["diff", CONTAINER, "home", "--source", "--offline"])
        .failed_with(2);

    // A list that is damaged is not used, and the next backup copies it again if it is removed.
    let lists = fs::read_dir(machine.path("state/lists")).unwrap();
    let lists = lists.map(|entry| entry.unwrap().path().join("home"));
    let lists: Vec<_> = lists.collect();
    let list = lists[0].join(format!("{}.changes.zst", all[2]));
    let good = fs::read(&list).unwrap();
    fs::write(&list, &good[..good.len() / 2]).unwrap();
    let ran = machine.sprat(&["find", CONTAINER, "fstab", "--offline"]);
    ran.failed_with(1);
    assert!(ran.stderr.contains("is damaged"), "{}", ran.whole());
    machine.sprat(&["find", CONTAINER, "fstab"]).succeeded();
    fs::remove_dir_all(&lists[0]).unwrap();
    machine
        .sprat(&["find", CONTAINER, "fstab", "--offline"])
        .failed_with(1);
    backup(&machine);
    machine
        .sprat(&["find", CONTAINER, "fstab", "--offline"])
        .succeeded();
    machine.nothing_is_left();
}

#[test]
fn state_that_this_machine_did_not_note_is_not_answered_about() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write_old("tree/file", "one");
    let offline = |what: &str| machine.sprat(&["find", CONTAINER, what, "--offline"]);
    let none = offline("file");
    none.failed_with(1);
    backup(&machine);
    offline("file").succeeded();

    // Another machine makes a snapshot. This one answers about what it knows, until it has seen that.
    machine.write("tree/file", "of the other machine");
    backup_of_another_machine(&machine);
    offline("file").succeeded();
    machine.ok(&["snapshots", CONTAINER]);
    let ran = offline("file");
    ran.failed_with(1);
    assert!(
        ran.stderr.contains("was written to since"),
        "{}",
        ran.whole()
    );
    machine.write("tree/file", "again of this one");
    backup(&machine);
    let versions = ["find", CONTAINER, "file", "--json"];
    let online = answer(&machine.sprat(&versions));
    let listed = answer(&machine.sprat(&[&versions[..], &["--offline"]].concat()));
    assert_eq!(online, listed);
    assert_eq!(online["paths"][0]["versions"].as_array().unwrap().len(), 3);

    // A person could change files in the snapshots of that time.
    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    offline("file").failed_with(1);
    let snapshots = fs::read_dir(machine.path("mnt/home")).unwrap().flatten();
    let is_snapshot = |path: &PathBuf| path.to_string_lossy().ends_with('Z');
    let oldest = snapshots.map(|one| one.path()).filter(is_snapshot).min();
    let file = machine.path("tree/file");
    fs::remove_file(oldest.unwrap().join(file.strip_prefix("/").unwrap())).unwrap();
    machine.ok(&["umount", "mnt"]);
    let ran = offline("file");
    ran.failed_with(1);
    assert!(
        ran.stderr.contains("which snapshots it has"),
        "{}",
        ran.whole()
    );
    // The next backup lists the snapshots again.
    backup(&machine);
    let online = answer(&machine.sprat(&versions));
    let listed = answer(&machine.sprat(&[&versions[..], &["--offline"]].concat()));
    assert_eq!(online, listed);
    assert_eq!(online["paths"][0]["versions"].as_array().unwrap().len(), 2);
    machine.nothing_is_left();
}

#[test]
fn costs_are_kept_until_somebody_else_could_change_snapshots() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write_old("tree/file", "one");
    backup(&machine);
    let analyze = || {
        let ran = machine.sprat(&["analyze", CONTAINER, "--json"]).succeeded();
        let mut json = ran.json();
        json.as_object_mut().unwrap().remove("full_on");
        json
    };
    let kept = || {
        let all = fs::read_dir(machine.path("state/costs"));
        let all = all.into_iter().flatten().map(|entry| entry.unwrap().path());
        all.map(|folder| folder.join("home"))
            .find(|file| file.exists())
    };
    analyze();
    let first = fs::read(kept().unwrap()).unwrap();
    let again = analyze();
    assert_eq!(fs::read(kept().unwrap()).unwrap(), first);
    // A backup and its own removals change nothing in the snapshots that stay.
    machine.write("tree/file", "two, longer");
    backup(&machine);
    assert!(kept().is_some());
    let now = analyze();
    assert_ne!(now, again);
    assert_ne!(fs::read(kept().unwrap()).unwrap(), first);
    fs::remove_dir_all(machine.path("state/costs")).unwrap();
    assert_eq!(analyze(), now, "nothing is known any more");

    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    assert!(kept().is_none(), "a person writes");
    analyze();
    assert!(kept().is_none(), "a person may write while it is read");
    machine.ok(&["umount", "mnt"]);
    analyze();
    assert!(kept().is_some());
    backup_of_another_machine(&machine);
    machine.ok(&["snapshots", CONTAINER]);
    assert!(kept().is_none(), "another machine has written");
    machine.nothing_is_left();
}
