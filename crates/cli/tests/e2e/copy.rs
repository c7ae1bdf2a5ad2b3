//! Containers are copied and moved between stores, and backups go on where they went.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::strikes::same_bytes;
use sprat_testkit::machine::{CONTAINER, TestMachine};
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::tmpfs::Tmpfs;
use sprat_testkit::{leases, needs, requires};

/// A container with one snapshot on a "USB disk", and a server whose folder is the machine's
/// `server`.
fn seeded() -> TestMachine {
    let machine = TestMachine::with_container();
    fs::create_dir(machine.path("server")).unwrap();
    let noise: Vec<u8> = (0..9_000_000u32)
        .flat_map(|n| (n.wrapping_mul(2_654_435_761) >> 24).to_le_bytes())
        .step_by(4)
        .collect();
    machine.write("src/large", noise);
    machine.backup(&[]).succeeded();
    machine
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

fn names(folder: &Path) -> Vec<String> {
    leases::names_but_free(folder)
}

/// A server that allows files only.
fn without_shell() -> OpenSshOptions {
    OpenSshOptions {
        internal_sftp: true,
        config_lines: vec!["ForceCommand internal-sftp".to_owned()],
        ..OpenSshOptions::default()
    }
}

/// A machine whose container is in `server`.
fn with_container_in_server() -> TestMachine {
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "128M"]);
    fs::create_dir(machine.path("server")).unwrap();
    fs::rename(machine.path(CONTAINER), machine.path("server/x.luks")).unwrap();
    machine
}

fn on_server(remote: &RemoteMachine, name: &str) -> String {
    let folder = remote.machine.path("server");
    format!(
        "ssh://root@127.0.0.1:{}{}/{name}",
        remote.sshd.port(),
        folder.display()
    )
}

#[test]
fn container_moved_from_usb_to_server_keeps_hard_links() {
    requires!(needs::root(), openssh::missing());
    let remote = RemoteMachine::with(seeded(), &OpenSshOptions::default());
    let machine = &remote.machine;
    let usb = machine.path(CONTAINER);
    let pristine = machine.path("pristine");
    machine
        .run(
            Command::new("cp")
                .args(["--sparse=always"])
                .arg(&usb)
                .arg(&pristine),
        )
        .succeeded();
    let server = on_server(&remote, "x.luks");

    let moved = remote
        .ok(&["copy", "--move", CONTAINER, &server, "--json"])
        .json();
    assert_eq!(moved["source_removed"], true);
    assert_eq!(moved["holes_by"], "allocation");
    assert_eq!(names(&machine.path("store")), [""; 0]);
    assert_eq!(names(&machine.path("server")), ["x.luks"]);
    let arrived = machine.path("server/x.luks");
    assert!(same_bytes(&pristine, &arrived));
    assert!(allocated(&arrived) <= allocated(&pristine) + (1 << 20));
    assert_eq!(fs::metadata(&arrived).unwrap().mode() & 0o7777, 0o600);
    assert_eq!(names(&machine.path("state/copies")), [""; 0]);
    assert_eq!(names(&machine.path("state/containers")).len(), 1);

    // The identity moved too: nothing is trusted again, and unchanged files are linked, not sent.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let again = remote.ok(&["backup", &server, "--name", "home", "src", "--json"]);
    assert!(!again.stderr.contains("trusted"), "{}", again.stderr);
    let stats = again.json()["jobs"][0]["record"]["stats"].clone();
    assert_eq!(stats["transferred"], 0, "{stats}");
    let listed = remote.ok(&["snapshots", &server, "--json"]).json();
    assert_eq!(listed["snapshots"].as_array().unwrap().len(), 2);
    machine.nothing_is_left();
}

#[test]
fn copy_between_servers_keeps_holes() {
    requires!(needs::root(), openssh::missing(), needs::program("perl"));
    let remote = RemoteMachine::with(seeded(), &OpenSshOptions::default());
    let machine = &remote.machine;
    fs::rename(machine.path(CONTAINER), machine.path("server/x.luks")).unwrap();
    let (from, to) = (
        on_server(&remote, "x.luks"),
        on_server(&remote, "copy.luks"),
    );
    let copied = remote.ok(&["copy", &from, &to, "--json"]).json();
    assert_eq!(copied["holes_by"], "server_shell", "{copied}");
    let read = copied["read_bytes"].as_u64().unwrap();
    assert!(read < 100 << 20, "{read} bytes of 1 GiB were read");
    assert_eq!(names(&machine.path("server")), ["copy.luks", "x.luks"]);
    let (from, to) = (
        machine.path("server/x.luks"),
        machine.path("server/copy.luks"),
    );
    assert!(same_bytes(&from, &to));
    assert!(allocated(&to) <= allocated(&from) + (1 << 20));
}

#[test]
fn copy_without_a_shell_keeps_holes() {
    requires!(needs::root(), openssh::missing());
    let machine = with_container_in_server();
    let remote = RemoteMachine::with(machine, &without_shell());
    let machine = &remote.machine;
    let copied = remote
        .ok(&["copy", &on_server(&remote, "x.luks"), CONTAINER, "--json"])
        .json();
    assert_eq!(copied["holes_by"], "zeros");
    assert_eq!(copied["read_bytes"], 128 << 20);
    let (from, to) = (machine.path("server/x.luks"), machine.path(CONTAINER));
    assert!(same_bytes(&from, &to));
    assert!(allocated(&to) <= allocated(&from) + (1 << 20));
}

/// An account of SFTP alone, and a container of 1 GiB with one snapshot that was pruned and one that stays.
fn behind_sftp_alone() -> RemoteMachine {
    let machine = seeded();
    fs::remove_file(machine.path("src/large")).unwrap();
    machine.write("src/small", "what stays");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    machine.backup(&[]).succeeded();
    let keep = ["--job", "home", "--keep-last", "1"];
    machine.ok(&[&["prune", CONTAINER], &keep[..]].concat());
    RemoteMachine::with(machine, &without_shell())
}

#[test]
fn copy_without_a_shell_skips_unused_blocks() {
    requires!(needs::root(), openssh::missing());
    let remote = behind_sftp_alone();
    let machine = &remote.machine;
    let key = ["--key-file", "config/keys/x.key"];
    let to = machine.path("server/x.luks");
    let copy = ["copy", "TARGET", "server/x.luks", "--json"];
    let copied = remote.ok(&[&key[..], &copy].concat()).json();
    assert_eq!(copied["holes_by"], "file_system", "{copied}");
    let read = copied["read_bytes"].as_u64().unwrap();
    assert!(read < 120 << 20, "{read} bytes of 1 GiB were read");
    // What was pruned is not in the copy, and what stays is.
    let (source, copy) = (allocated(&machine.path(CONTAINER)), allocated(&to));
    assert!(copy + (8 << 20) < source, "{copy} of {source}");
    machine.ok(&[&key[..], &["check", "server/x.luks", "--read-data"]].concat());
    machine.ok(&[
        &key[..],
        &["restore", "server/x.luks", "home", "--to", "out"],
    ]
    .concat());
    let back = machine
        .path("out")
        .join(machine.path("src").strip_prefix("/").unwrap());
    let same = Command::new("diff")
        .arg("-r")
        .arg(machine.path("src"))
        .arg(back)
        .status();
    assert!(same.unwrap().success());
    machine.ok(&[
        &key[..],
        &["backup", "server/x.luks", "--name", "home", "src"],
    ]
    .concat());
    machine.nothing_is_left();
}

#[test]
fn unproven_file_system_is_copied_completely() {
    requires!(needs::root(), openssh::missing());
    let remote = behind_sftp_alone();
    let machine = &remote.machine;
    // One sector among the group descriptors, behind the header's 16 MiB.
    let file = fs::File::options()
        .write(true)
        .open(machine.path(CONTAINER));
    std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), &[0x5A; 512], (16 << 20) + 4096)
        .unwrap();
    let key = ["--key-file", "config/keys/x.key"];
    let copy = ["copy", "TARGET", "server/x.luks", "--json"];
    let copied = remote.ok(&[&key[..], &copy].concat());
    assert_eq!(copied.json()["holes_by"], "zeros");
    let (from, to) = (machine.path(CONTAINER), machine.path("server/x.luks"));
    assert!(same_bytes(&from, &to));
}

#[test]
fn copy_never_overwrites_and_never_touches_what_is_in_use() {
    requires!(needs::root());
    let machine = seeded();
    let copy = |more: &[&str]| {
        let mut all = vec!["copy"];
        all.extend(more);
        machine.sprat(&all)
    };
    machine.write("server/x.luks", "something else");
    let refused = copy(&[CONTAINER, "server/x.luks"]).failed_with(1);
    assert!(refused.contains("exists already"), "{refused}");
    assert_eq!(
        fs::read(machine.path("server/x.luks")).unwrap(),
        b"something else"
    );
    let itself = copy(&[CONTAINER, "./store/../store/x.luks"]).failed_with(2);
    assert!(itself.contains("to itself"), "{itself}");
    copy(&["store/none.luks", "server/y.luks"]).failed_with(10);
    copy(&["server/x.luks", "server/y.luks"]).failed_with(10);
    copy(&[CONTAINER, "nowhere/y.luks"]).failed_with(1);
    let missing = copy(&[CONTAINER]).failed_with(2);
    assert!(missing.contains("<DST>"), "{missing}");

    fs::create_dir(machine.path("mnt")).unwrap();
    machine.ok(&["mount", CONTAINER, "mnt", "--rw"]);
    copy(&["--move", CONTAINER, "server/y.luks"]).failed_with(11);
    machine.ok(&["umount", "mnt"]);
    let lock = machine.write("server/y.luks.lock.2000000", "held");
    copy(&[CONTAINER, "server/y.luks"]).failed_with(11);
    fs::remove_file(lock).unwrap();
    assert_eq!(names(&machine.path("server")), ["x.luks"]);
    assert_eq!(names(&machine.path("store")), ["x.luks"]);
    machine.restores_whole(&[]);
    machine.nothing_is_left();
}

#[test]
fn swapped_source_is_refused_by_its_identity() {
    requires!(needs::root());
    let machine = seeded();
    machine.init(&["store/other.luks", "--size", "128M"]);
    fs::rename(machine.path("store/other.luks"), machine.path(CONTAINER)).unwrap();
    let refused = machine.sprat(&["copy", CONTAINER, "server/y.luks"]);
    refused.failed_with(13);
    assert_eq!(names(&machine.path("server")), [""; 0]);
}

#[test]
fn a_full_destination_stops_the_copy_and_room_lets_it_go_on() {
    requires!(needs::root());
    let machine = seeded();
    let small = Tmpfs::mount(&machine.path("server"), 4);
    let full = machine
        .sprat(&["copy", CONTAINER, "server/x.luks"])
        .failed_with(1);
    assert!(
        full.contains("still to be copied") && full.contains("Free space there"),
        "{full}"
    );
    small.remount("size=200m");
    machine.ok(&["copy", CONTAINER, "server/x.luks"]);
    assert!(same_bytes(
        &machine.path(CONTAINER),
        &machine.path("server/x.luks")
    ));
}

#[test]
fn a_read_only_account_can_be_copied_from() {
    requires!(needs::root(), openssh::missing());
    let options = OpenSshOptions {
        sftp_arguments: vec!["-R".to_owned()],
        ..OpenSshOptions::default()
    };
    let machine = seeded();
    fs::rename(machine.path(CONTAINER), machine.path("server/x.luks")).unwrap();
    let remote = RemoteMachine::with(machine, &options);
    let from = on_server(&remote, "x.luks");
    let copied = remote.ok(&["copy", &from, CONTAINER]);
    assert!(
        copied.stderr.contains("can't be locked"),
        "{}",
        copied.stderr
    );
    let machine = &remote.machine;
    assert!(same_bytes(
        &machine.path("server/x.luks"),
        &machine.path(CONTAINER)
    ));
    remote
        .sprat(&["copy", "--move", &from, "store/y.luks"])
        .failed_with(1);
    assert!(machine.path("server/x.luks").exists());
}

#[test]
fn resumed_copy_needs_space_only_for_the_rest() {
    requires!(needs::root(), openssh::missing());
    let machine = with_container_in_server();
    let used = allocated(&machine.path("server/x.luks"));
    let remote = RemoteMachine::with(machine, &without_shell());
    let machine = &remote.machine;
    let megabytes = u32::try_from(used >> 20).unwrap() + 3;
    let small = Tmpfs::mount(&machine.path("store"), megabytes);
    let copied = remote.ok(&["copy", &on_server(&remote, "x.luks"), CONTAINER, "--json"]);
    // The size of the copy was not known before.
    assert_eq!(copied.json()["holes_by"], "zeros");
    let (from, to) = (machine.path("server/x.luks"), machine.path(CONTAINER));
    assert!(same_bytes(&from, &to));
    drop(small);
}

#[test]
fn names_of_sprats_own_files_are_refused() {
    requires!(needs::root());
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "64M"]);
    for suffix in [
        ".reserve",
        ".copying",
        ".copying-0123456789abcdef",
        ".new",
        ".new-0123456789abcdef",
        ".trim",
        ".lock.7",
    ] {
        let own = format!("{CONTAINER}{suffix}");
        for arguments in [
            &["copy", "--move", CONTAINER, &own][..],
            &["copy", CONTAINER, &own],
            &["copy", &own, "store/y.luks"],
            &["init", &own],
        ] {
            let refused = machine.sprat(arguments).failed_with(2);
            assert!(refused.contains("can't be a container's name"), "{refused}");
        }
    }
    assert_eq!(names(&machine.path("store")), ["x.luks"]);
}

#[test]
fn container_with_possible_late_writes_is_not_copied() {
    requires!(needs::root());
    let machine = seeded();
    // The owner of this lease is unknown, and so are its writes in flight.
    machine.write("store/x.luks.lock.2000000", "x");
    let off = ["--watch", "0.1", "--that-machine-is-off"];
    machine.ok(&[&["unlock", CONTAINER][..], &off].concat());
    for more in [&[][..], &["--move"]] {
        let copy = ["copy", CONTAINER, "server/x.luks"];
        let text = machine.sprat(&[&copy[..], more].concat()).failed_with(11);
        assert!(text.contains("nothing was copied"), "{text}");
        assert!(names(&machine.path("server")).is_empty());
    }
    // A backup leaves the list of what it wrote.
    machine.backup(&[]).succeeded();
    machine
        .sprat(&["copy", CONTAINER, "server/x.luks"])
        .failed_with(11);
}

#[test]
fn move_takes_the_reserve_but_no_container_of_that_name() {
    requires!(needs::root());
    for (content, left) in [(&[7; 4096][..], 0), (b"LUKS\xba\xbe and so on", 1)] {
        let machine = TestMachine::new();
        machine.init(&[CONTAINER, "--size", "64M"]);
        fs::create_dir(machine.path("server")).unwrap();
        machine.write("store/x.luks.reserve", content);
        // Others' files beside it, of an older sprat or by hand.
        machine.write("store/x.luks.copying", "something else");
        machine.ok(&["copy", "--move", CONTAINER, "server/x.luks"]);
        let mut names = names(&machine.path("store"));
        assert_eq!(names.remove(0), "x.luks.copying");
        assert_eq!(names.len(), left, "{names:?}");
    }
}

#[test]
fn what_is_known_of_a_container_moves_with_it() {
    requires!(needs::root());
    let machine = seeded();
    let key = ["--key-file", "config/keys/x.key"];
    machine.ok(&["check", CONTAINER, "--read-data"]);
    let known = |target: &str| {
        let ran = machine.ok(&["status", target, "--offline", "--json"]);
        let found = ran.json()["containers"][0].clone();
        ["uuid", "volume", "jobs", "checks"].map(|what| found[what].clone())
    };
    let (before, moved) = (known(CONTAINER), "server/x.luks");
    assert!(before[3]["--read-data"].is_object(), "{before:?}");
    machine.ok(&["copy", "--move", CONTAINER, moved]);
    assert_eq!(known(moved), before);
    assert!(known(CONTAINER)[0].is_null());
    let old_place = machine.sprat(&[&["snapshots", CONTAINER], &key[..]].concat());
    let said = old_place.failed_with(10);
    assert!(
        said.contains("this machine moved the container") && said.contains(moved),
        "{said}"
    );
    let check = ["check", moved, "--read-data", "--json"];
    let files = machine.ok(&[&check[..], &key].concat()).json()["files"].clone();
    assert_eq!(files["files_known"], files["files_read"]);
    for (folder, count) in [("headers", 1), ("status", 1), ("checks", 2)] {
        let names = names(&machine.path("state").join(folder));
        assert_eq!(
            names.len(),
            count,
            "nothing stays of the old place: {names:?}"
        );
    }
    let file = fs::File::options().write(true).open(machine.path(moved));
    let zeros = vec![0; 1 << 20];
    std::os::unix::fs::FileExt::write_all_at(&file.unwrap(), &zeros, 0).unwrap();
    let restore = ["key", "header-restore", moved, "--yes"];
    let ran = machine.ok(&[&restore[..], &key].concat());
    assert!(!ran.stderr.contains("same UUID"), "{}", ran.whole());
    machine.ok(&[&["snapshots", moved], &key[..]].concat());
    machine.nothing_is_left();
}

#[test]
fn copy_with_a_new_key_opens_by_its_own_sheet() {
    requires!(needs::root());
    let machine = seeded();
    let moved = "server/x.luks";
    let key = ["--key-file", "config/keys/x.key"];
    machine.ok(&["check", CONTAINER, "--read-data"]);
    let status = |target: &str| {
        let ran = machine.ok(&["status", target, "--offline", "--json"]);
        ran.json()["containers"][0].clone()
    };
    let before = status(CONTAINER);
    let room = allocated(&machine.path(CONTAINER));
    let pristine = machine.path("pristine");
    let mut copy = Command::new("cp");
    copy.arg("--sparse=always")
        .args([&machine.path(CONTAINER), &pristine]);
    machine.run(&mut copy).succeeded();
    let command = ["copy", "--new-key", "--move", CONTAINER, moved, "--json"];
    let refused = machine.sprat(&command).failed_with(2);
    assert!(refused.contains("--sheet"), "{refused}");
    let taken = ["--sheet", "config/keys/x.key", "--cheap-kdf-for-tests"];
    let refused = machine.sprat(&[&command[..], &taken].concat());
    let refused = refused.failed_with(2);
    assert!(refused.contains("exists already") && refused.contains("Nothing was copied"));
    assert_eq!(names(&machine.path("server")), [""; 0]);
    let sheet = ["--sheet", "new.txt", "--cheap-kdf-for-tests"];
    let copied = machine.ok(&[&command[..], &sheet].concat()).json();
    assert_eq!(copied["source_removed"], true, "{copied}");
    assert_ne!(copied["uuid"], before["uuid"]);
    assert_eq!(names(&machine.path("store")), [""; 0]);
    assert_eq!(names(&machine.path("server")), ["x.luks"]);
    assert_eq!(names(&machine.path("state/copies")), [""; 0]);
    let arrived = machine.path(moved);
    assert!(allocated(&arrived) <= room + (1 << 20));
    // Nothing of the payload is what it was: same plaintext, another key.
    let payload = |path: &Path| {
        let mut block = [0; 4096];
        let file = fs::File::open(path).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut block, 16 << 20).unwrap();
        block
    };
    assert_ne!(payload(&pristine), payload(&arrived));

    // By the new recovery key, and not by the old one.
    let recovery = |sheet: &str| {
        let key = sheet
            .lines()
            .find_map(|line| line.strip_prefix("RECOVERY KEY"));
        key.unwrap().trim().to_owned()
    };
    let new = recovery(&fs::read_to_string(machine.path("new.txt")).unwrap());
    machine.write("recovery", new);
    let by_sheet = ["--passphrase-file", "recovery"];
    let listed = machine.ok(&[&["snapshots", moved][..], &by_sheet].concat());
    assert!(!listed.stderr.contains("trusted"), "{}", listed.stderr);
    fs::rename(&pristine, machine.path("store/old.luks")).unwrap();
    let fingerprint = copied["fingerprint"].as_str().unwrap();
    let old = ["snapshots", "store/old.luks", "--fingerprint", fingerprint];
    machine.sprat(&[&old[..], &key].concat()).failed_with(13);

    // What was known of its content is known of the copy; what was written under the old key doesn't count.
    let after = status(moved);
    assert_eq!(after["checks"], before["checks"]);
    assert_eq!(after["jobs"], before["jobs"]);
    assert!(after["written_bytes"].is_u64(), "{after}");
    for (folder, count) in [("headers", 1), ("status", 1), ("known", 1)] {
        let names = names(&machine.path("state").join(folder));
        assert_eq!(names.len(), count, "{folder}: {names:?}");
    }
    let check = ["check", moved, "--read-data", "--json"];
    let files = machine.ok(&[&check[..], &key].concat()).json()["files"].clone();
    assert_eq!(files["files_known"], files["files_read"]);
    let restore = ["restore", moved, "home", "--to", "back"];
    machine.ok(&[&restore[..], &key].concat());
    let source = machine.path("src");
    let back = machine.path("back").join(source.strip_prefix("/").unwrap());
    assert!(same_bytes(&source.join("large"), &back.join("large")));
    let again = ["backup", moved, "--name", "home", "src", "--json"];
    let again = machine.ok(&[&again[..], &key].concat()).json();
    assert_eq!(again["jobs"][0]["record"]["stats"]["transferred"], 0);
    machine.nothing_is_left();
}
