//! `sprat prune` over the whole path.

use std::fs;

use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::{needs, requires};

#[test]
fn pruned_snapshots_are_gone_and_the_rest_comes_back() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "128M"]);
    let mut names = Vec::new();
    for round in 0..3 {
        machine.write("src/a", format!("{round}").repeat(1 << 20));
        let ran = machine.backup(&["--json"]).succeeded();
        names.push(ran.json()["jobs"][0]["name"].clone());
    }
    // The config has another container with the name that this file has. Its rules are not for this one.
    let other = format!(
        "[container.x]\ntarget = \"{}\"\n[job.home]\ncontainer = \"x\"\nsources = [\"{}\"]\n\
         every = \"1 day\"\nkeep_last = 1\n",
        machine.path("other/x.luks").display(),
        machine.path("src").display()
    );
    let config = machine.write("config/sprat.toml", other);
    let prune = ["prune", CONTAINER, "--job", "home"];
    let whole = machine.sprat(&prune).failed_with(2);
    assert!(whole.contains("no retention rule given"), "{whole}");
    fs::remove_file(config).unwrap();
    let last = [&prune[..], &["--keep-last", "1"]].concat();
    let ran = machine.ok(&[&last[..], &["--dry-run"]].concat());
    assert!(
        ran.stdout.ends_with("2 snapshots would be removed\n"),
        "{}",
        ran.whole()
    );
    assert_eq!(ran.stdout.matches("no rule keeps it").count(), 2);
    let ran = machine.ok(&last);
    assert!(
        ran.stdout.contains("last, the newest complete one, latest"),
        "{}",
        ran.whole()
    );
    assert!(
        ran.stdout.contains("2 snapshots removed"),
        "{}",
        ran.whole()
    );
    assert!(
        ran.stdout.contains("run `sprat trim store/x.luks`"),
        "{}",
        ran.whole()
    );
    let left = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    assert_eq!(left["snapshots"].as_array().unwrap().len(), 1);
    machine.restores_whole(&[]);
    machine.backup(&[]).succeeded();
    let other = ["prune", CONTAINER, "--job", "other", "--keep-last", "1"];
    let whole = machine.sprat(&other).failed_with(1);
    assert!(whole.contains("there is no job other"), "{whole}");
    machine.nothing_is_left();
}

#[test]
fn interrupted_snapshots_are_reported_and_pruned_on_request() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "128M"]);
    machine.write("src/a", "x".repeat(1 << 20));
    machine.backup(&[]).succeeded();
    machine.write("src/b", "y".repeat(4 << 20));
    machine.backup(&[]).succeeded();
    let mounted = machine.path("mnt");
    fs::create_dir(&mounted).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    let newest = fs::read_link(mounted.join("home/latest")).unwrap();
    let newest = newest.to_str().unwrap();
    let partial = format!("{newest}.partial");
    let job = mounted.join("home");
    fs::rename(job.join(newest), job.join(&partial)).unwrap();
    machine.ok(&["umount", "mnt"]);

    let prune = ["prune", CONTAINER, "--job", "home"];
    let ran = machine.ok(&[&prune[..], &["--keep-last", "5"]].concat());
    assert!(
        ran.stdout.contains(&format!("{partial}  kept")),
        "{}",
        ran.whole()
    );
    assert!(
        ran.stdout.contains("--drop-interrupted removes it"),
        "{}",
        ran.whole()
    );
    let drop = [&prune[..], &["--drop-interrupted"]].concat();
    let ran = machine.sprat(&[&drop[..], &["--dry-run"]].concat());
    let told = "0 snapshots and 1 interrupted snapshot would be removed\n";
    assert!(ran.stdout.ends_with(told), "{}", ran.whole());
    let ran = machine.ok(&drop);
    let told = "0 snapshots and 1 interrupted snapshot removed";
    assert!(ran.stdout.contains(told), "{}", ran.whole());
    let left = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    let left = left["snapshots"].as_array().unwrap();
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["kind"], "good");
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
    machine.nothing_is_left();
}
