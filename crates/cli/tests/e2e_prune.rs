//! `sprat prune` over the whole path.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;

use machine::{CONTAINER, Machine};
use sprat_testkit::{needs, requires};

#[test]
fn pruned_snapshots_are_gone_and_the_rest_comes_back() {
    requires!(needs::root());
    let machine = Machine::new();
    machine.init(&[CONTAINER, "--size", "128M"]);
    let mut names = Vec::new();
    for round in 0..3 {
        machine.write("src/a", format!("{round}").repeat(1 << 20));
        let ran = machine.backup(&["--json"]);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        names.push(ran.json()["jobs"][0]["name"].clone());
    }
    let prune = ["prune", CONTAINER, "--job", "home"];
    let whole = machine.sprat(&prune).failed_with(2);
    assert!(whole.contains("nothing says what to keep"), "{whole}");
    let last = [&prune[..], &["--keep-last", "1"]].concat();
    let ran = machine.sprat(&[&last[..], &["--dry-run"]].concat());
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert!(
        ran.stdout.ends_with("2 snapshots would go\n"),
        "{}",
        ran.whole()
    );
    assert_eq!(ran.stdout.matches("no rule keeps it").count(), 2);
    let ran = machine.sprat(&last);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert!(
        ran.stdout.contains("last, the newest whole one, latest"),
        "{}",
        ran.whole()
    );
    assert!(
        ran.stdout.contains("2 snapshots removed"),
        "{}",
        ran.whole()
    );
    assert!(
        ran.stdout.contains("`sprat trim store/x.luks` gives"),
        "{}",
        ran.whole()
    );
    let left = machine.sprat(&["snapshots", CONTAINER, "--json"]).json();
    assert_eq!(left["snapshots"].as_array().unwrap().len(), 1);
    machine.restores_whole(&[]);
    assert_eq!(machine.backup(&[]).code, 0);
    let other = ["prune", CONTAINER, "--job", "other", "--keep-last", "1"];
    let whole = machine.sprat(&other).failed_with(1);
    assert!(whole.contains("there is no job other"), "{whole}");
    machine.nothing_is_left();
}
