//! A container with btrfs, through every command.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use sprat_testkit::client_and_server::{self, ClientAndServer, FileSystem, HEADER_BYTES};
use sprat_testkit::dice::Dice;
use sprat_testkit::machine::remote::RemoteMachine;
use sprat_testkit::machine::strikes::copy_sparse;
use sprat_testkit::machine::{CONTAINER, TestMachine, noise};
use sprat_testkit::manifest::{Manifest, assert_same};
use sprat_testkit::source_tree::{self, Shape};
use sprat_testkit::ssh_server::{OpenSshOptions, openssh};
use sprat_testkit::{needs, requires};
use sprat_testkit_session::plain_volume::PlainVolume;

const LIMIT: Duration = Duration::from_secs(120);

/// Backs up as job `life`. Returns the snapshot's name, its content, and the bytes that were sent.
fn backed_up(pair: &ClientAndServer, source: &Path) -> (String, Manifest, u64) {
    // Snapshots are named by the second.
    std::thread::sleep(Duration::from_millis(1100));
    let shown = source.display().to_string();
    let arguments = ["backup", "--json", pair.target(), "--name", "life", &shown];
    let output = pair.ok(&arguments, LIMIT);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = json["jobs"][0]["snapshot"].as_str().unwrap().to_owned();
    let sent = json["sessions"][0]["volume"]["written_bytes"].as_u64();
    (name, Manifest::of(source), sent.unwrap())
}

fn said(pair: &ClientAndServer, arguments: &[&str]) -> String {
    let output = pair.ok(arguments, LIMIT);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn restored(pair: &ClientAndServer, snapshot: &str, should: &Manifest, source: &Path) {
    let to = pair.path(format!("restored/{snapshot}"));
    let (what, to_text) = (format!("life/{snapshot}"), to.display().to_string());
    let arguments = [
        "restore",
        pair.target(),
        &what,
        "--to",
        &to_text,
        "--verify",
    ];
    pair.ok(&arguments, LIMIT);
    let back = to.join(source.strip_prefix("/").unwrap());
    assert_same(should, &back, &format!("restored {snapshot}"));
    fs::remove_dir_all(to).unwrap();
}

#[test]
fn whole_life_of_a_container_with_btrfs() {
    requires!(client_and_server::missing(), FileSystem::Btrfs.missing());
    let mut pair = ClientAndServer::new();
    let source = pair.path("source");
    let shape = Shape {
        small_files: 400,
        middle_files: 20,
        large_files: 1,
    };
    source_tree::make(&source, shape, 13);
    let dropped = source.join("dropped");
    fs::write(&dropped, noise(8 << 20, 9)).unwrap();
    pair.init_with(1, FileSystem::Btrfs);
    let target = pair.target();
    let (first, first_tree, _) = backed_up(&pair, &source);
    source_tree::change_source_like(&source, &mut Dice::new(5), 1);
    fs::remove_file(dropped).unwrap();
    let (second, second_tree, _) = backed_up(&pair, &source);
    let (third, _, sent) = backed_up(&pair, &source);
    assert!(sent < 2 << 20, "an unchanged run sent {sent} bytes");

    let listed = said(&pair, &["snapshots", target]);
    for name in [&first, &second, &third] {
        assert!(listed.contains(name.as_str()), "{listed}");
    }
    let checked = said(&pair, &["check", target, "--read-data"]);
    assert!(checked.contains("file system: clean"), "{checked}");
    restored(&pair, &first, &first_tree, &source);
    restored(&pair, &second, &second_tree, &source);

    said(
        &pair,
        &["pin", target, &format!("life/{first}"), "--reason", "kept"],
    );
    let prune = ["prune", target, "--job", "life", "--keep-last", "1"];
    let pruned = said(&pair, &prune);
    assert!(pruned.contains("1 snapshot removed; "), "{pruned}");
    let listed = said(&pair, &["snapshots", target]);
    assert!(
        listed.contains(&first) && !listed.contains(&second),
        "{listed}"
    );
    restored(&pair, &first, &first_tree, &source);
    said(&pair, &["unpin", target, &format!("life/{first}")]);

    let bytes = pair.choose_size(3).to_string();
    said(&pair, &["grow", target, &bytes]);
    let about = fs::metadata(pair.container()).unwrap();
    assert_eq!(about.len().to_string(), bytes);
    let removed = said(
        &pair,
        &["remove", target, &format!("life/{first}"), "--yes"],
    );
    assert!(removed.contains("run `sprat trim"), "{removed}");
    said(&pair, &["trim", target, "--rewrite"]);
    said(&pair, &["check", target]);

    let folder = pair.path("mounted");
    fs::create_dir(&folder).unwrap();
    let mounted = folder.display().to_string();
    said(&pair, &["mount", target, &mounted, "--allow-other"]);
    let tree = folder
        .join("life/latest")
        .join(source.strip_prefix("/").unwrap());
    assert_same(&second_tree, &tree, "the mounted snapshot");
    said(&pair, &["umount", &mounted]);

    let copy = pair.path("copy.luks");
    said(&pair, &["copy", target, &copy.display().to_string()]);
    let plain = PlainVolume::export(&copy, &pair.key_file(), &pair.path("plain"));
    plain.assert_clean();
    let offline = pair.path("offline");
    let guard = plain.mount(&offline);
    let tree = offline.join("life").join(&third);
    let tree = tree.join(source.strip_prefix("/").unwrap());
    assert_same(&second_tree, &tree, "the copy, with stock tools");
    drop(guard);
    let ssh: Vec<String> = pair
        .sshd
        .ssh_command()
        .into_iter()
        .map(|word| word.into_string().unwrap())
        .collect();
    let status = ["--ssh-command", &ssh.join(" "), "status", target];
    let status = pair.machine.ok(&status).stdout;
    assert!(
        status.contains(" free, for metadata ") && !status.contains("0 files"),
        "{status}"
    );
    pair.assert_nothing_is_left();
}

#[test]
fn copy_over_ssh_reads_only_the_chunks_of_a_btrfs() {
    requires!(client_and_server::missing(), FileSystem::Btrfs.missing());
    let mut pair = ClientAndServer::new();
    let source = pair.path("source");
    fs::write(source.join("file"), noise(3 << 20, 1)).unwrap();
    pair.init_with(100, FileSystem::Btrfs);
    pair.backup("job", &source);
    let copy = pair.path("copy.luks").display().to_string();
    let output = pair.ok(&["copy", "--json", pair.target(), &copy], LIMIT);
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["holes_by"], "file_system", "{json}");
    assert!(json["read_bytes"].as_u64().unwrap() < 8 << 30, "{json}");
    let plain = PlainVolume::export(Path::new(&copy), &pair.key_file(), &pair.path("plain"));
    plain.assert_clean();
}

#[test]
fn server_without_fsync_is_refused_for_btrfs_whatever_is_allowed() {
    requires!(openssh::missing(), FileSystem::Btrfs.missing());
    let options = OpenSshOptions {
        sftp_arguments: vec!["-P".to_owned(), "fsync".to_owned()],
        ..OpenSshOptions::default()
    };
    let remote = RemoteMachine::start(&options);
    let init = ["init", "TARGET", "--size", "1G", "--cheap-kdf-for-tests"];
    let btrfs = ["--file-system", "btrfs", "--allow-no-fsync"];
    let init = [&init[..], &btrfs].concat();
    let whole = remote.sprat(&init).failed_with(1);
    assert!(
        whole.contains("`--allow-no-fsync` has no effect on a btrfs"),
        "{whole}"
    );
    assert!(!remote.machine.path(CONTAINER).exists());

    // One that a better server had.
    let made = [CONTAINER, "--size", "1G", "--file-system", "btrfs"];
    remote.machine.init(&made);
    remote.machine.write("src/a", "alpha\n");
    remote.machine.backup(&[]).succeeded();
    let backup = [
        "backup",
        "TARGET",
        "--name",
        "home",
        "src",
        "--allow-no-fsync",
    ];
    let whole = remote.sprat(&backup).failed_with(1);
    assert!(
        whole.contains("`--allow-no-fsync` has no effect on a btrfs"),
        "{whole}"
    );
    remote.ok(&["snapshots", "TARGET"]);
}

fn small() -> TestMachine {
    let machine = TestMachine::new();
    machine.init(&[CONTAINER, "--size", "256M", "--file-system", "btrfs"]);
    machine.write("src/a", noise(300_000, 1));
    machine.backup(&[]).succeeded();
    machine
}

#[test]
fn older_state_of_a_btrfs_is_refused_until_it_is_accepted() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    let machine = small();
    copy_sparse(&machine.path(CONTAINER), &machine.path("yesterday"));
    machine.write("src/b", noise(300_000, 2));
    machine.backup(&[]).succeeded();
    fs::remove_file(machine.path(CONTAINER)).unwrap();
    copy_sparse(&machine.path("yesterday"), &machine.path(CONTAINER));
    for command in ["snapshots", "check"] {
        let whole = machine.sprat(&[command, CONTAINER]).failed_with(13);
        assert!(whole.contains("--accept-older-state"), "{whole}");
    }
    assert_eq!(machine.backup(&[]).code, 13);
    machine.backup(&["--accept-older-state"]).succeeded();
    machine.restores_whole(&[]);
}

#[test]
fn damaged_copy_of_the_super_block_is_found_by_check() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    let machine = small();
    machine.ok(&["check", CONTAINER]);
    let container = File::options().write(true).open(machine.path(CONTAINER));
    // `BTRFS_SUPER_MIRROR_SHIFT`: the first copy is at 64 MiB.
    let at = HEADER_BYTES + (64 << 20);
    container.unwrap().write_all_at(&[0x55; 16], at).unwrap();
    let whole = machine.sprat(&["check", CONTAINER]).failed_with(13);
    assert!(
        whole.contains("the copy of the super block at 64.0 MiB is damaged"),
        "{whole}"
    );
    machine.restores_whole(&[]);
    // The next commit writes it again.
    machine.write("src/b", "beta\n");
    machine.backup(&[]).succeeded();
    machine.ok(&["check", CONTAINER]);
}

#[test]
fn damaged_super_block_is_repaired_from_its_copy() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    let machine = small();
    // With and without its magic.
    for (at, bytes) in [(0x800, 16), (0, 4096)] {
        let container = File::options().write(true).open(machine.path(CONTAINER));
        let garbage = vec![0x55; bytes];
        let super_block = HEADER_BYTES + (64 << 10);
        container
            .unwrap()
            .write_all_at(&garbage, super_block + at)
            .unwrap();
        let whole = machine.sprat(&["check", CONTAINER]).failed_with(13);
        assert!(
            whole.contains("the super block is damaged, and its copy is right"),
            "{whole}"
        );
        // A session that reads changes nothing.
        machine.restores_whole(&[]);
        let ran = machine.backup(&[]);
        assert!(
            ran.stderr.contains("sprat used its copy"),
            "{}",
            ran.whole()
        );
        ran.succeeded();
        machine.ok(&["check", CONTAINER]);
        machine.restores_whole(&[]);
    }
}

/// Where the container file has these bytes, which are not compressed.
fn place_of(machine: &TestMachine, bytes: &[u8]) -> u64 {
    let key = machine.path("config/keys/x.key");
    let image = machine.path("plain");
    let plain = PlainVolume::export(&machine.path(CONTAINER), &key, &image);
    let content = fs::read(image).unwrap();
    drop(plain);
    let mut parts = content.windows(bytes.len());
    HEADER_BYTES + parts.position(|part| part == bytes).unwrap() as u64
}

#[test]
fn damaged_content_is_named_in_each_snapshot_and_read_again() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    let machine = small();
    machine.write("src/b", "beta\n");
    machine.backup(&[]).succeeded();
    let at = place_of(&machine, &noise(300_000, 1)[200_000..200_100]);
    let container = File::options().write(true).open(machine.path(CONTAINER));
    container.unwrap().write_all_at(&[0x55; 16], at).unwrap();
    // The structures are right.
    machine.ok(&["check", CONTAINER]);
    let ran = machine.sprat(&["check", CONTAINER, "--read-data", "--json"]);
    assert_eq!(ran.code, 13, "{}", ran.whole());
    let files = ran.json()["files"].clone();
    assert_eq!(files["affected"]["count"], 2, "{files}");
    // Never wrong content.
    let restored = machine.sprat(&["restore", CONTAINER, "home", "--to", "to"]);
    let text = restored.failed_with(13);
    assert!(text.contains("/src/a"), "{}", restored.whole());
    let to = machine.path("to");
    let source = machine.path("src");
    let back = to.join(source.strip_prefix("/").unwrap());
    assert_eq!(fs::read(back.join("b")).unwrap(), b"beta\n");
    assert!(!back.join("a").exists());
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
    machine.ok(&["prune", CONTAINER, "--job", "home", "--keep-last", "1"]);
    machine.ok(&["check", CONTAINER, "--read-data"]);
}

#[test]
fn full_btrfs_keeps_its_snapshots_and_prunes() {
    requires!(needs::root(), FileSystem::Btrfs.missing());
    let machine = small();
    let first = fs::read(machine.path("src/a")).unwrap();
    machine.write("src/large", noise(300 << 20, 3));
    let ran = machine.backup(&[]);
    assert_eq!(ran.code, 1, "{}", ran.whole());
    assert!(ran.stderr.contains("has no space"), "{}", ran.whole());
    machine.ok(&["check", CONTAINER]);
    fs::remove_file(machine.path("src/large")).unwrap();
    machine.write("src/a", noise(300_000, 4));
    machine.backup(&[]).succeeded();
    machine.restores_whole(&[]);
    machine.ok(&["prune", CONTAINER, "--job", "home", "--keep-last", "1"]);
    machine.restores_whole(&[]);
    assert_ne!(fs::read(machine.path("src/a")).unwrap(), first);
    machine.nothing_is_left();
}
