//! `sprat pin`, `unpin` and `remove`, and the names of snapshots, over the whole path.

use std::fs;

use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

/// One test of many steps, because each session takes a second.
#[test]
fn snapshots_are_pinned_unpinned_and_removed_by_name() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "128M"]);
    let mut names = Vec::new();
    for round in 0..3 {
        machine.write("src/a", format!("{round}").repeat(1 << 20));
        let ran = machine.backup(&["--json"]).succeeded();
        let name = ran.json()["jobs"][0]["snapshot"]
            .as_str()
            .unwrap()
            .to_owned();
        names.push(name);
    }
    let named = |at: usize| format!("home/{}", names[at]);
    let first = named(0);

    // Nothing is started for what can't be meant.
    for (words, expected) in [
        (
            &["pin", CONTAINER, "home", "--reason", "x"][..],
            "has no snapshot in it",
        ),
        (
            &["pin", CONTAINER, &first, "--reason", " "],
            "the reason is empty",
        ),
        (&["pin", CONTAINER, &first], "--reason"),
        (
            &["remove", CONTAINER, &first],
            "there is no terminal to ask on",
        ),
        (
            &["remove", CONTAINER, "home", "--yes"],
            "has no snapshot in it",
        ),
        (
            &["restore", CONTAINER, &first, "--at", "14:00", "--to", "out"],
            "--at and the name of a snapshot can't be used together",
        ),
        (
            &["restore", CONTAINER, "home", "--at", "3m", "--to", "out"],
            "for 3 days ago",
        ),
    ] {
        let whole = machine.sprat(words).failed_with(2);
        assert!(whole.contains(expected), "{whole}");
    }

    let ran = machine.ok(&["pin", CONTAINER, &first, "--reason", "before the move"]);
    assert_eq!(ran.stdout, format!("{first} is pinned\n"));
    let listed = machine.ok(&["snapshots", CONTAINER]);
    assert!(
        listed.stdout.contains("pinned: before the move"),
        "{}",
        listed.whole()
    );
    let whole = machine
        .sprat(&["remove", CONTAINER, &first, "--yes"])
        .failed_with(2);
    assert!(whole.contains("is pinned: before the move"), "{whole}");
    let ran = machine.ok(&["unpin", CONTAINER, &first, "--json"]);
    assert_eq!(ran.json()["pin_before"], "before the move");

    let newest = named(2);
    let whole = machine
        .sprat(&["remove", CONTAINER, &newest, "--yes"])
        .failed_with(2);
    assert!(whole.contains("--allow-newest"), "{whole}");
    let whole = machine
        .sprat(&["remove", CONTAINER, "home/2", "--yes"])
        .failed_with(2);
    assert!(names.iter().all(|name| whole.contains(name)), "{whole}");
    let ran = machine.ok(&[
        "remove",
        CONTAINER,
        &first,
        &newest,
        "--yes",
        "--allow-newest",
    ]);
    assert!(
        ran.stderr.contains(&newest) && ran.stderr.contains("the latest one"),
        "{}",
        ran.whole()
    );
    let title = |line: &str| line.contains("SNAPSHOT") && !line.contains("to be removed");
    assert!(ran.stderr.lines().any(title), "{}", ran.whole());
    assert!(
        ran.stdout.starts_with("2 snapshots removed"),
        "{}",
        ran.whole()
    );

    // The next session misses nothing, and a restore finds what is left by a beginning and by a time.
    for choice in [
        &["home/2"][..],
        &["home", "--at", "0s"],
        &["home/latest-complete"],
    ] {
        let mut words = vec!["restore", CONTAINER, "--to", "out"];
        words.extend(choice);
        machine.ok(&words);
        let restored = machine
            .path("out")
            .join(machine.path("src/a").strip_prefix("/").unwrap());
        assert_eq!(
            fs::read(&restored).unwrap(),
            "1".repeat(1 << 20).into_bytes()
        );
        fs::remove_dir_all(machine.path("out")).unwrap();
    }
    let words = [
        "restore",
        CONTAINER,
        "home",
        "--at",
        "2001-01-01",
        "--to",
        "out",
    ];
    // In the time zone that sprat shows times in.
    machine.write("config/sprat.toml", "time_zone = \"Asia/Tokyo\"\n");
    let whole = machine.sprat(&words).failed_with(1);
    assert!(
        whole.contains("has no snapshot from 2001-01-01T14-59-59Z"),
        "{whole}"
    );
    fs::remove_file(machine.path("config/sprat.toml")).unwrap();
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
    machine.nothing_is_left();
}
