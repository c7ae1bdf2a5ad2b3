//! A server's disk filled to its last byte by somebody else: what stops, and what gets out of it.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;

use std::fs;
use std::io::Write;
use std::path::Path;

use machine::remote::Remote;
use machine::{Machine, Tmpfs, noise};
use sprat_testkit::sshd::{self, SshdOptions};
use sprat_testkit::{needs, requires};

/// Takes all that is free.
fn fill(folder: &Path) {
    let mut file = fs::File::create(folder.join("somebody-else's")).unwrap();
    for piece in [1 << 20, 4096] {
        let bytes = vec![7; piece];
        while file.write_all(&bytes).is_ok() {}
    }
    assert_eq!(rustix::fs::statvfs(folder).unwrap().f_bavail, 0);
}

/// With a small reserve: the disk is small, too.
fn with_reserve<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    [&["--reserve-bytes", "4194304"], arguments].concat()
}

#[test]
fn on_a_disk_filled_to_its_last_byte_backup_stops_and_prune_gets_out_of_it() {
    requires!(sshd::missing(), needs::root());
    let machine = Machine::new();
    let store = machine.path("store");
    let _disk = Tmpfs::mount(&store, 80);
    let remote = Remote::with(machine, &SshdOptions::default());
    let reserve = store.join("x.luks.reserve");
    let init = ["init", "TARGET", "--size", "1G", "--cheap-kdf-for-tests"];
    let ran = remote.sprat(&with_reserve(&init));
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert_eq!(fs::metadata(&reserve).unwrap().len(), 4 << 20);
    let backup = ["backup", "TARGET", "--name", "home", "src"];
    for round in 1..4 {
        remote.machine.write("src/large", noise(4 << 20, round));
        let ran = remote.sprat(&with_reserve(&backup));
        assert_eq!(ran.code, 0, "{}", ran.whole());
    }
    fill(&store);
    remote.machine.write("src/large", noise(4 << 20, 9));
    let ran = remote.sprat(&with_reserve(&backup));
    let whole = ran.failed_with(1);
    assert!(
        whole.contains("no space left") && whole.contains("sprat prune"),
        "{whole}"
    );
    assert!(
        reserve.exists(),
        "a backup leaves the reserve to those that make room"
    );
    let snapshots = || {
        let ran = remote.sprat(&["snapshots", "TARGET", "--json"]);
        assert_eq!(ran.code, 0, "{}", ran.whole());
        let said = ran.json();
        let kinds = said["snapshots"].as_array().unwrap().iter();
        kinds.filter(|one| one["kind"] == "good").count()
    };
    assert_eq!(snapshots(), 3);
    let prune = ["prune", "TARGET", "--job", "home", "--keep-last", "1"];
    let ran = remote.sprat(&with_reserve(&prune));
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert!(ran.stderr.contains("the reserve"), "{}", ran.whole());
    assert!(!reserve.exists());
    assert_eq!(snapshots(), 1);
    let ran = remote.sprat(&with_reserve(&backup));
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert_eq!(snapshots(), 2);
    assert!(!reserve.exists(), "there is no room for it yet");
    let free = || {
        let about = rustix::fs::statvfs(&store).unwrap();
        about.f_bavail * about.f_frsize
    };
    let before = free();
    let ran = remote.sprat(&with_reserve(&["trim", "TARGET", "--json"]));
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert_eq!(ran.json()["trim"]["route"], "shell_punch");
    assert!(free() >= before + (4 << 20), "{before}, then {}", free());
    fs::remove_file(store.join("somebody-else's")).unwrap();
    let ran = remote.sprat(&with_reserve(&backup));
    assert_eq!(ran.code, 0, "{}", ran.whole());
    assert_eq!(fs::metadata(&reserve).unwrap().len(), 4 << 20);
    remote.machine.nothing_is_left();
}
