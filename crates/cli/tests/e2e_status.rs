//! `sprat status`: what it tells of a container on a server, and where there is none.

#![allow(clippy::unwrap_used, reason = "a test fails by a panic")]

mod machine;

use machine::remote::Remote;
use sprat_testkit::sshd::{self, SshdOptions};
use sprat_testkit::{needs, requires};

#[test]
fn status_tells_room_jobs_and_lock_without_a_key() {
    requires!(sshd::missing(), needs::root(), needs::program("perl"));
    let remote = Remote::start(&SshdOptions::default());
    remote.init();
    let ran = remote.backup();
    assert_eq!(ran.code, 0, "{}", ran.whole());
    // A run that fails leaves the snapshot before it known.
    std::fs::remove_dir_all(remote.machine.path("src")).unwrap();
    assert_eq!(remote.backup().code, 1);
    // No key lies where it is sought.
    let key = remote.machine.path("elsewhere.key");
    std::fs::rename(remote.machine.path("config/keys/x.key"), &key).unwrap();

    let ran = remote.sprat(&["status", "TARGET", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let said = ran.json();
    let found = &said["containers"][0];
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let (server, volume) = (&found["server"], &found["volume"]);
    assert!(number(&server["available_bytes"]) > 0, "{said}");
    assert!(number(&server["available_bytes"]) <= number(&server["total_bytes"]));
    assert_eq!(number(&server["container_bytes"]), 1 << 30);
    let file = std::fs::metadata(remote.machine.path("store/x.luks")).unwrap();
    let allocated = std::os::unix::fs::MetadataExt::blocks(&file) * 512;
    let told = number(&server["allocated_bytes"]);
    assert!(told.abs_diff(allocated) < 1 << 20, "{told}, {allocated}");
    assert!(server["locked"].is_null(), "{said}");
    assert!(number(&volume["available_bytes"]) < number(&volume["total_bytes"]));
    assert!(number(&volume["free_inodes"]) < number(&volume["inodes"]));
    let job = &found["jobs"]["home"];
    assert_eq!(job["last_snapshot"]["complete"], true, "{said}");
    assert_eq!(job["last_run"]["exit"], "failed", "{said}");

    std::fs::copy(&key, remote.machine.path("key")).unwrap();
    let ran = remote.sprat(&["check", "TARGET", "--key-file", "key"]);
    assert_eq!(ran.code, 0, "{}", ran.whole());
    let text = remote.sprat(&["status", "TARGET"]);
    assert!(text.stdout.contains("quick: whole"), "{}", text.whole());
    assert!(text.stdout.contains("last run FAILED"), "{}", text.whole());
    let offline = remote.sprat(&["status", "TARGET", "--offline"]);
    assert!(offline.stdout.contains("not asked"), "{}", offline.whole());
    assert_eq!(offline.code, 0);
}

#[test]
fn status_of_what_is_not_there_or_not_reached_says_so_and_shows_the_rest() {
    let machine = machine::Machine::with_container();
    let ran = machine.sprat(&["status", "store/nothing.luks", machine::CONTAINER]);
    let said = ran.failed_with(10);
    assert!(said.contains("there is no container"), "{said}");
    assert!(ran.stdout.contains("may grow to 1.0 GiB"), "{said}");
    let away = ["--ssh-command", "false", "status", "ssh://nobody/x.luks"];
    machine.sprat(&away).failed_with(14);
    let none = machine.sprat(&["status"]).failed_with(2);
    assert!(none.contains("the config has no container"), "{none}");
}
