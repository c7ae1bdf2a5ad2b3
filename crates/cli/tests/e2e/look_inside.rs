//! The commands that look into snapshots, as a person and a script use them.

use std::fs;
use std::os::unix::ffi::OsStrExt;

use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

/// Two snapshots of `tree`, and the name of the first.
fn with_two_snapshots() -> (TestMachine, String) {
    let machine = TestMachine::with_container();
    machine.write_old("tree/etc/fstab", "one");
    machine.write_old("tree/gone", "x");
    let odd = std::ffi::OsStr::from_bytes(b"odd\n\xe9");
    machine.write("tree/plain", "x");
    fs::rename(machine.path("tree/plain"), machine.path("tree").join(odd)).unwrap();
    machine.ok(&["backup", CONTAINER, "--name", "home", "tree", "-q"]);
    let first = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    let first = first["snapshots"][0]["folder"].as_str().unwrap().to_owned();
    machine.write("tree/etc/fstab", "two, longer");
    fs::remove_file(machine.path("tree/gone")).unwrap();
    machine.ok(&["backup", CONTAINER, "--name", "home", "tree", "-q"]);
    (machine, first)
}

#[test]
fn snapshots_are_listed_printed_searched_and_compared() {
    requires!(needs::root());
    let (machine, first) = with_two_snapshots();
    let source = machine.path("tree").display().to_string();
    let old = format!("home/{first}:{source}/etc/fstab");
    let new = format!("home:{source}/etc/fstab");
    let run = |words: &[&str]| {
        let words = [&[words[0], CONTAINER], &words[1..]].concat();
        machine.sprat(&words)
    };

    assert_eq!(run(&["cat", &old]).succeeded().stdout, "one");
    assert_eq!(run(&["cat", &new]).succeeded().stdout, "two, longer");

    let folder = format!("home:{source}");
    let ran = run(&["ls", &folder]).succeeded();
    let names: Vec<&str> = ran
        .stdout
        .lines()
        .map(|line| line.rsplit("  ").next().unwrap())
        .collect();
    assert_eq!(names, ["etc", "odd\\#012\\#351"], "{}", ran.whole());
    let listed = run(&["ls", &folder, "--json"]).succeeded().json();
    assert_eq!(listed["schema"], 1);
    assert_eq!(listed["command"], "ls");
    assert_eq!(listed["kind"], "good");
    assert_eq!(listed["entries"][0]["kind"], "folder");
    let mut command = machine.command();
    let raw = command
        .args(["ls", CONTAINER, &folder, "--null"])
        .output()
        .unwrap();
    let expected = [
        source.as_bytes(),
        b"/etc\0",
        source.as_bytes(),
        b"/odd\n\xe9\0",
    ]
    .concat();
    assert_eq!(raw.stdout, expected);

    let versions = run(&["versions", &new, "--json"]).succeeded().json();
    let versions = versions["versions"].as_array().unwrap().clone();
    let changes: Vec<&str> = versions
        .iter()
        .map(|one| one["change"].as_str().unwrap())
        .collect();
    assert_eq!(changes, ["new", "content"]);
    assert_eq!(versions[0]["first"], first);
    assert_eq!(
        (&versions[0]["bytes"], &versions[1]["bytes"]),
        (&3.into(), &11.into())
    );

    let found = run(&["find", "GON?", "-i"]).succeeded();
    assert!(
        found.stdout.contains("home:[DIR]/tree/gone"),
        "{}",
        found.whole()
    );
    assert_eq!(found.stdout.lines().count(), 2, "{}", found.whole());
    assert_eq!(run(&["find", "no such name"]).succeeded().stdout, "");
    let raw = run(&["find", "--null", "--", "gone"]).succeeded().stdout;
    assert_eq!(raw, "home:[DIR]/tree/gone\0");

    let ran = run(&["diff", "home"]).succeeded();
    let changes: Vec<Vec<&str>> = ran
        .stdout
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(changes[0][0], "gone");
    assert_eq!(changes[1][0], "changed");
    assert!(
        ran.stdout.contains("1 changed (11 B), 1 gone (1 B)"),
        "{}",
        ran.whole()
    );
    let back = run(&["diff", "home", &format!("home/{first}"), "--json"]);
    let back = back.succeeded().json();
    assert_eq!(back["sums"]["new"]["paths"], 1);
    assert_eq!(back["sums"]["content"]["after_bytes"], 3);
    machine.nothing_is_left();
}

#[test]
fn what_is_not_there_is_1_and_what_is_no_place_is_2() {
    requires!(needs::root());
    let (machine, first) = with_two_snapshots();
    let none = format!("home:{}/none", machine.path("tree").display());
    for words in [
        &["cat", CONTAINER, &none][..],
        &["ls", CONTAINER, &none],
        &["versions", CONTAINER, &none],
        &["diff", CONTAINER, &none],
        &["ls", CONTAINER, "other"],
        &["ls", CONTAINER, "home/2001"],
        // The first one has none before it.
        &["diff", CONTAINER, &format!("home/{first}")],
    ] {
        machine.sprat(words).failed_with(1);
    }
    let folder = format!("home:{}", machine.path("tree").display());
    for words in [
        &["cat", CONTAINER, &folder][..],
        &["ls", CONTAINER, "home/"],
        &["ls", CONTAINER, &format!("home/{first}"), "--at", "3d"],
        &["versions", CONTAINER, "home"],
        &["versions", CONTAINER, &format!("home/{first}:/etc")],
        &["find", CONTAINER, "[a"],
        &["find", CONTAINER, "a", "--job", "-x"],
    ] {
        machine.sprat(words).failed_with(2);
    }
    machine.nothing_is_left();
}

#[test]
fn snapshot_is_compared_with_its_source_as_the_job_would_read_it() {
    requires!(needs::root());
    let machine = TestMachine::new();
    let folder = machine.folder().display().to_string();
    machine.write(
        "config/sprat.toml",
        format!(
            "[container.disk]\ntarget = \"{folder}/store/x.luks\"\n\n\
             [job.one]\ncontainer = \"disk\"\nsources = \"{folder}/tree\"\nexclude = [\"*.tmp\"]\n"
        ),
    );
    machine.write_old("tree/a", "alpha");
    machine.write_old("tree/gone", "x");
    machine.write("tree/b.tmp", "left out");
    machine.init(&["disk", "--size", "1G"]);
    machine.ok(&["backup", "one", "-q"]);
    let diff = |more: &[&str]| {
        let words = [&["diff", "disk", "one", "--source"], more].concat();
        machine.sprat(&words).succeeded()
    };
    let same = diff(&[]);
    assert!(
        same.stdout.starts_with("no difference between one/2"),
        "{}",
        same.whole()
    );
    assert!(
        same.stdout.ends_with("and the source\n"),
        "{}",
        same.whole()
    );

    machine.write("tree/a", "alpha and beta");
    machine.write("tree/new", "x");
    machine.write("tree/c.tmp", "left out, too");
    fs::remove_file(machine.path("tree/gone")).unwrap();
    let json = diff(&["--json"]).json();
    let found: Vec<(String, String)> = json["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            let text = |key: &str| one[key].as_str().unwrap().to_owned();
            (text("path"), text("change"))
        })
        .collect();
    let expected = [("a", "content"), ("gone", "gone"), ("new", "new")];
    let expected = expected.map(|(name, change)| (format!("[DIR]/tree/{name}"), change.to_owned()));
    // The time of the folder follows its names.
    assert_eq!(found, expected);
    assert!(json["after"]["snapshot"].is_null());
    machine
        .sprat(&["diff", "disk", "other", "--source"])
        .failed_with(2);
    machine.nothing_is_left();
}

#[test]
fn costs_are_shown_and_what_a_removal_frees() {
    requires!(needs::root());
    let (machine, first) = with_two_snapshots();
    let shown = machine.ok(&["analyze", CONTAINER]).stdout;
    assert!(shown.starts_with("SNAPSHOT"), "{shown}");
    let rows = shown.lines().filter(|line| line.starts_with("home/"));
    assert_eq!(rows.count(), 2, "{shown}");
    assert!(
        shown.contains("most often changed:\n  2×  home:"),
        "{shown}"
    );
    let named = format!("home/{first}");
    let found = machine.ok(&["analyze", CONTAINER, &named, "--json"]).json();
    assert_eq!(
        (&found["exact"], &found["command"]),
        (&true.into(), &"analyze".into())
    );
    assert_eq!(found["biggest_folders"][0]["path"], "/");
    assert!(found["full_on"].is_null());
    let removal = &found["removal"];
    assert_eq!(removal["snapshots"], serde_json::json!([named]));
    assert_eq!(removal["frees_bytes"], found["snapshots"][0]["own_bytes"]);
    assert!(removal["frees_bytes"].as_u64().unwrap() > 0);
    let text = machine.ok(&["analyze", CONTAINER, &named, "home/latest", "--job", "home"]);
    assert!(
        text.stdout.contains("removing 2 snapshots frees "),
        "{}",
        text.whole()
    );
    for bad in ["home", "home/latest:/etc"] {
        let refused = machine.sprat(&["analyze", CONTAINER, bad]).failed_with(2);
        assert!(refused.contains("is not JOB/SNAPSHOT"), "{refused}");
    }
    machine
        .sprat(&["analyze", CONTAINER, "home/2020"])
        .failed_with(1);
    machine.nothing_is_left();
}

#[test]
fn restore_takes_what_matches_and_counts_it_before() {
    requires!(needs::root());
    let (machine, first) = with_two_snapshots();
    let what = format!("home/{first}");
    let restore = |more: &[&str]| {
        let all = [&["restore", CONTAINER, &what, "--to", "back"], more].concat();
        machine.sprat(&all)
    };
    let inside = machine
        .path("back")
        .join(machine.path("tree").strip_prefix("/").unwrap());
    let dry = restore(&["--pattern", "fstab", "--dry-run"])
        .succeeded()
        .stdout;
    assert!(
        dry.contains("/tree/etc/fstab\n") && dry.contains("new  "),
        "{dry}"
    );
    assert!(dry.contains(" new, 0 replaced, 0 deleted\n"), "{dry}");
    assert!(!inside.exists());
    restore(&["--pattern", "fstab", "--pattern", "gon?"]).succeeded();
    assert_eq!(fs::read(inside.join("etc/fstab")).unwrap(), b"one");
    let mut names: Vec<_> = fs::read_dir(&inside)
        .unwrap()
        .map(|one| one.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["etc", "gone"]);
    fs::write(inside.join("etc/fstab"), "newer").unwrap();
    let dry = restore(&["--dry-run"]).succeeded().stdout;
    assert!(
        dry.contains("1 replaced (newer here: 1), 0 deleted\n"),
        "{dry}"
    );
    assert!(dry.contains("replace     "), "{dry}");
    restore(&["--existing", "keep-newer"]).succeeded();
    assert_eq!(fs::read(inside.join("etc/fstab")).unwrap(), b"newer");
    restore(&[]).succeeded();
    assert_eq!(fs::read(inside.join("etc/fstab")).unwrap(), b"one");
    let found = restore(&["--pattern", "*.none"]).failed_with(1);
    assert!(found.contains("*.none"), "{found}");
    for bad in [
        &["--pattern", "[a"][..],
        &["--existing", "some"],
        &["--pattern", "a", "--delete"],
        &["--existing", "keep", "--verify"],
    ] {
        restore(bad).failed_with(2);
    }
    machine.nothing_is_left();
}
