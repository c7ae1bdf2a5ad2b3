//! `sprat export` as a person uses it.

use std::fs;

use sprat_testkit::compare::assert_same;
use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

fn folders(machine: &TestMachine) -> Vec<String> {
    let listed = machine.ok(&["snapshots", CONTAINER, "--json"]).json();
    let all = listed["snapshots"].as_array().unwrap().iter();
    all.map(|one| one["folder"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn snapshots_are_exported_compared_and_moved_and_pins_are_respected() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write_old("tree/same", "the same");
    for content in ["one", "second", "the third"] {
        machine.write("tree/file", content);
        machine.ok(&["backup", CONTAINER, "--name", "home", "tree", "-q"]);
    }
    let names = folders(&machine);
    let first = format!("home/{}", names[0]);
    let export = |more: &[&str]| machine.sprat(&[&["export", CONTAINER], more].concat());
    assert!(
        export(&[&first, "to"])
            .failed_with(2)
            .contains("Create the folder first")
    );
    fs::create_dir(machine.path("to")).unwrap();
    let refused = export(&["home", "to"]).failed_with(2);
    assert!(refused.contains("needs --older-than"), "{refused}");

    let dry = export(&[&first, "to", "--dry-run"]).succeeded();
    assert!(dry.stdout.contains("would be exported"), "{}", dry.whole());
    assert_eq!(fs::read_dir(machine.path("to")).unwrap().count(), 0);
    let done = export(&[&first, "to"]).succeeded();
    assert!(
        done.stdout.contains("1 snapshot is in "),
        "{}",
        done.whole()
    );
    let top = machine.path("tree");
    let inside = |name: &str| {
        let top = top.strip_prefix("/").unwrap();
        machine.path("to/home").join(name).join(top)
    };
    assert_eq!(
        fs::read_to_string(inside(&names[0]).join("file")).unwrap(),
        "one"
    );

    // A pinned one, and the newest, are neither exported nor removed.
    machine.ok(&["pin", CONTAINER, &first, "--reason", "kept"]);
    let pinned = export(&["home", "to", "--older-than", "0s", "--move"]);
    assert_eq!(pinned.code, 2, "{}", pinned.whole());
    assert!(
        pinned.whole().contains("is pinned: kept"),
        "{}",
        pinned.whole()
    );
    assert_eq!(folders(&machine), names);
    assert!(!inside(&names[1]).exists());
    machine.ok(&["unpin", CONTAINER, &first]);
    let newest = export(&[&format!("home/{}", names[2]), "to", "--move"]);
    assert_eq!(newest.code, 2, "{}", newest.whole());
    assert!(!inside(&names[2]).exists());

    // One that differs from what is at the destination stays, too.
    fs::write(inside(&names[0]).join("file"), "bad").unwrap();
    let second = format!("home/{}", names[1]);
    let differs = export(&[&first, &second, "to", "--move"]);
    assert_eq!(differs.code, 1, "{}", differs.whole());
    assert_eq!(folders(&machine), names);
    fs::remove_dir_all(machine.path("to/home")).unwrap();

    let moved = machine
        .ok(&[
            "export", CONTAINER, &first, &second, "to", "--move", "--json",
        ])
        .json();
    assert_eq!(moved["removed"], true);
    assert_eq!(moved["snapshots"][1]["name"], names[1].as_str());
    assert_eq!(folders(&machine), &names[2..]);
    machine.ok(&["export", CONTAINER, &format!("home/{}", names[2]), "to"]);
    assert_same(&top, &inside(&names[2]));
    let none = export(&["home", "to", "--older-than", "52w"]).succeeded();
    assert!(
        none.stdout.contains("nothing to export"),
        "{}",
        none.whole()
    );
    machine.nothing_is_left();
}

#[test]
fn snapshot_is_exported_to_another_container_that_is_mounted() {
    requires!(needs::root());
    let machine = TestMachine::with_container();
    machine.write_old("tree/same", "the same");
    for content in ["one", "second"] {
        machine.write("tree/file", content);
        machine.ok(&["backup", CONTAINER, "--name", "home", "tree", "-q"]);
    }
    let names = folders(&machine);
    machine.init(&["other.luks", "--size", "64M"]);
    fs::create_dir(machine.path("at")).unwrap();
    machine.ok(&["mount", "other.luks", "at", "--rw"]);
    let all: Vec<String> = names.iter().map(|name| format!("home/{name}")).collect();
    machine.ok(&["export", CONTAINER, &all[0], &all[1], "at"]);
    machine.ok(&["umount", "at"]);
    let there = machine.ok(&["snapshots", "other.luks", "--json"]).json();
    let here = machine.ok(&["snapshots", CONTAINER, "--json"]).json();
    assert_eq!(there["snapshots"], here["snapshots"]);
    machine.nothing_is_left();
}
